"""`Reptile(binary=True)`: one logit a sample, and many labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import reptile_ext
from reptile_ext.training import Objective, Reptile, Until
from reptile_ext.training.metrics import Evaluation

sklearn_datasets = pytest.importorskip("sklearn.datasets")
metrics_of_sklearn = pytest.importorskip("sklearn.metrics")


def net(inputs: int, width: int, outputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class Squeezed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).squeeze(-1)


def test_breast_cancer() -> None:
    """A teacher is trained on the labels, a student of 17 numbers a tenth of its size on the teacher's answers."""
    inputs, labels = sklearn_datasets.load_breast_cancer(return_X_y=True)
    x = torch.tensor((inputs - inputs.mean(0)) / inputs.std(0), dtype=torch.float32)
    y = torch.tensor(labels)  # integers: they are made floating point
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = (TensorDataset(x[part], y[part]) for part in (order[:400], order[400:]))
    loaders = DataLoader(train, 50, shuffle=True), DataLoader(held_out, 64)
    names = ("accuracy", "f1", "average_precision")

    teacher = net(30, 64, 1, seed=0)
    result = Reptile(teacher, None, binary=True, metrics=names, learning_rate=3e-3).fit(
        loaders[0], eval=loaders[1], until=Until(steps=150)
    )
    assert result.metrics["accuracy"] > 0.95
    student = Squeezed(net(30, 4, 1, seed=1))  # [B], the teacher [B, 1]
    reptile = Reptile(
        student,
        teacher,
        binary=True,
        temperature=2.0,
        hard_weight=0.2,
        metrics=(*names, "agreement", "cross_entropy"),
        learning_rate=3e-2,
    )
    before = reptile.evaluate(loaders[1])
    result = reptile.fit(loaders[0], eval=loaders[1], until=Until(steps=200))
    found = result.metrics
    assert found["loss"] < before["loss"] / 5
    assert found["agreement"] > 0.95

    with torch.no_grad():
        z, right = student(held_out.tensors[0]), held_out.tensors[1]
    assert found["accuracy"] == pytest.approx(metrics_of_sklearn.accuracy_score(right, z > 0), abs=1e-6)
    assert found["f1"] == pytest.approx(metrics_of_sklearn.f1_score(right, z > 0), abs=1e-6)
    precision = metrics_of_sklearn.average_precision_score(right, z.sigmoid())
    assert found["average_precision"] == pytest.approx(precision, abs=1e-5)
    assert found["cross_entropy"] == pytest.approx(
        F.binary_cross_entropy_with_logits(z, right.float()).item(), abs=1e-6
    )
    assert found["accuracy"] > 0.95


def test_the_objective_is_the_function() -> None:
    student, teacher = net(6, 8, 5, 0), net(6, 8, 5, 1)
    x, y = torch.randn(7, 6), torch.rand(7, 5)
    y[2, 1:3] = -100
    weight = torch.rand(7)
    keywords: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.5, "pos_weight": torch.rand(5)}
    objective = Objective(student, teacher, binary=True, **keywords)
    found, logits = objective.loss_and_logits(student, (x, y, weight))
    right = reptile_ext.binary_distillation_loss(
        student(x), teacher(x).detach(), y, weight=weight.unsqueeze(-1), **keywords
    )
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(logits, student(x).detach())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])

    torch.testing.assert_close(gradient(objective(student, (x, y, weight))), gradient(right))
    # micro-batches of one step, and a batch without labels
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    count = objective.count(parts)
    whole = objective(student, (x, y))
    torch.testing.assert_close(sum(objective(student, part, count) for part in parts), whole)
    del keywords["pos_weight"]
    soft = Objective(student, teacher, binary=True, temperature=2.0)(student, x)
    torch.testing.assert_close(
        soft, reptile_ext.binary_distillation_loss(student(x), teacher(x).detach(), temperature=2.0)
    )


def test_many_labels_train_and_are_measured() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    y = (x @ torch.randn(6, 5) > 0.5).float()
    y[::7, 2] = -100
    student = net(6, 16, 5, 0)
    data = DataLoader(TensorDataset(x, y), 32)
    names = ("accuracy", "f1", "average_precision")
    reptile = Reptile(student, None, binary=True, metrics=names, learning_rate=1e-2)
    found = reptile.fit(data, eval=data, until=Until(steps=200)).metrics
    assert found["accuracy"] > 0.95
    with torch.no_grad():
        probability = student(x).sigmoid()
    kept = y != -100
    assert found["accuracy"] == pytest.approx(((probability > 0.5) == (y > 0.5))[kept].double().mean().item(), abs=1e-6)
    columns = [(y[k, i], probability[k, i]) for i in range(5) for k in [kept[:, i]]]
    f1 = sum(metrics_of_sklearn.f1_score(a, b > 0.5) for a, b in columns) / 5
    assert found["f1"] == pytest.approx(f1, abs=1e-6)
    precision = sum(metrics_of_sklearn.average_precision_score(a, b) for a, b in columns) / 5
    assert found["average_precision"] == pytest.approx(precision, abs=1e-5)


def test_several_teachers_and_a_schedule() -> None:
    x, y = torch.randn(32, 6), torch.randint(2, (32, 1))
    student, teachers = net(6, 4, 1, 0), [net(6, 4, 1, 1), net(6, 4, 1, 2)]
    data = DataLoader(TensorDataset(x, y), 8)
    reptile = Reptile(
        student, teachers, binary=True, temperature="linear:4->1", hard_weight=0.5, metrics=("accuracy", "agreement")
    )
    found = reptile.fit(data, eval=data, until=Until(steps=8)).metrics
    with torch.no_grad():
        mean = sum(teacher(x).sigmoid() for teacher in teachers) / 2
        right = ((student(x) > 0) == (mean > 0.5)).double().mean().item()
    assert found["agreement"] == pytest.approx(right, abs=1e-6)
    weights = [Objective(student, teacher, binary=True, hard_weight=0.5) for teacher in teachers]
    together = Objective(student, teachers, binary=True, hard_weight=0.5)(student, (x, y))
    torch.testing.assert_close(together, sum(one(student, (x, y)) for one in weights) / 2)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"fused_linear": True}, ValueError, "binary=True has no class dimension: fused_linear=True"),
        ({"dim": 1}, ValueError, "binary=True has no class dimension: dim must be -1; got 1"),
        ({"divergence": "dkd"}, ValueError, "divergence must be one of"),
        ({"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    ],
)
def test_what_is_refused(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Reptile(net(6, 4, 1, 0), net(6, 4, 1, 1), binary=True, **keywords)


def test_wrong_labels_and_metrics_are_named() -> None:
    student, teacher = net(6, 4, 5, 0), net(6, 4, 5, 1)
    objective = Objective(student, teacher, binary=True, hard_weight=0.5)
    with pytest.raises(ValueError, match=r"labels must have the shape of student_logits, \[3, 5\]; got \[3\]"):
        objective(student, (torch.randn(3, 6), torch.zeros(3)))
    with pytest.raises(ValueError, match="labels must lie between 0 and 1"):
        objective(student, (torch.randn(3, 6), torch.full((3, 5), 2)))
    with pytest.raises(ValueError, match="'average_precision' is measured with binary=True"):
        Reptile(student, teacher, metrics="average_precision")
    evaluation = Evaluation(("f1",), -100, torch.device("cpu"), binary=True)
    with pytest.raises(ValueError, match="need labels in the eval batches"):
        evaluation.update(torch.tensor(1.0), 3.0, torch.randn(3, 1), None, None)


def test_pos_weight_is_for_binary_losses() -> None:
    with pytest.raises(ValueError, match="pos_weight is for labels of one logit each, binary=True"):
        Reptile(torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), pos_weight=torch.ones(4))
