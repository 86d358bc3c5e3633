"""A teacher for each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reptile_ext.training import Reptile
from reptile_ext.training.batches import split
from reptile_ext.training.objective import Objective


class Counting(nn.Linear):
    """A linear model that takes a keyword, and writes down how many samples it was given."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(6, 4)
        self.samples: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.samples.append(len(x))
        return super().forward(x)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([1, 2, -100, 0, 3, 1, 2])
    return {"x": torch.randn(7, 6, generator=generator), "labels": labels, "sample_weight": torch.arange(1.0, 8.0)}


def step(teacher: Any, batches: list[Any], accumulate: int = 1) -> tuple[Tensor, Any]:
    student = Counting(1)
    before = student.weight.detach().clone()
    reptile = Reptile(
        student,
        teacher,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        clip=None,
        accumulate=accumulate,
        hard_weight=0.5,
        temperature=2.0,
        metrics=["agreement"],
    )
    reptile.fit(batches, until=1, progress_bar=False)
    gradient = before - student.weight.detach()
    student.load_state_dict(Counting(1).state_dict())
    return gradient, reptile.evaluate(batches)


@pytest.mark.parametrize("named", [False, True])
def test_each_sample_is_compared_with_its_own_teacher(named: bool) -> None:
    chosen = [0, 1, 0, 1, 1, 0, 1]
    teachers = [Counting(2), Counting(3)]
    given: Any = {"math": teachers[0], "code": teachers[1]} if named else teachers
    of_samples: Any = [list(given)[i] for i in chosen] if named else torch.tensor(chosen)
    whole = batch()
    gradient, metrics = step(given, [whole | {"teacher": of_samples}])
    assert [teacher.samples for teacher in teachers] == [[3, 3], [4, 4]]  # a step and an evaluation

    # By hand, in float64: every row's loss by its weight, over the sum of the weights of the rows that count.
    student = Counting(1).double()
    x, labels, weight = whole["x"].double(), whole["labels"], whole["sample_weight"].double()
    logits = student(x)
    with torch.no_grad():
        answers = torch.stack([teachers[t].double()(x[i : i + 1])[0] for i, t in enumerate(chosen)])
    y, z = (answers / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    rows = 4 * (y.exp() * (y - z)).sum(-1)
    rows = rows + 0.5 * nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    counts = weight * (labels != -100)
    loss = (rows * counts).sum() / counts.sum()
    loss.backward()
    assert student.weight.grad is not None
    torch.testing.assert_close(gradient.double(), student.weight.grad, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    agree = (answers.argmax(-1) == logits.argmax(-1)).double()
    assert metrics["agreement"] == pytest.approx(float((agree * counts).sum() / counts.sum()), rel=1e-5)


def test_batches_that_name_no_teacher_have_all_of_them() -> None:
    teachers = {"math": Counting(2), "code": Counting(3)}
    named, _ = step(teachers, [batch()])
    listed, _ = step(list(teachers.values()), [batch()])
    assert torch.equal(named, listed)


def test_a_teacher_that_is_none_is_said() -> None:
    teachers = {"math": Counting(2), "code": Counting(3)}
    for chosen, message in (
        (["math", "cod"] + ["math"] * 5, r"one of \['math', 'code'\]; got 'cod'.*code"),
        ([0, 2, 0, 0, 0, 0, 0], "a number from 0 to 1; got 2"),
        ([0, 1], "one for each of 7 samples; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(Counting(1), teachers).parts(batch() | {"teacher": chosen})
    with pytest.raises(ValueError, match="several batches"):
        Objective(Counting(1), teachers).split(batch() | {"teacher": [0] * 7})
    assert "teacher" in split(batch() | {"teacher": 1}, False, -100).inputs  # with one teacher a key like any other
