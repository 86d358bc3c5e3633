"""The training loop: what it computes, what it leaves alone, when it stops, and that a kill costs nothing."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import reptile_ext
from reptile_ext.training import Reptile, Until
from reptile_ext.training.batches import split
from reptile_ext.training.checkpoint import latest_checkpoint, read_log
from reptile_ext.training.data import Sampler, random_state, set_random_state
from reptile_ext.training.metrics import Evaluation


def perceptron(width: int, seed: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 4))


def dataset(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(6, 4, generator=generator)).argmax(-1))


def loader(count: int = 64, batch: int = 16, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(count), batch, shuffle=shuffle)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class Tagger(nn.Module):
    """Token ids [B, T] to an HF-style output with logits [B, T, V]."""

    def __init__(self, seed: int, vocab_size: int = 11) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(vocab_size, 8)
        self.output = nn.Linear(8, vocab_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.output(self.embedding(input_ids)))


# ------------------------------------------------------------------------------------------------ one step


def test_a_step_is_the_loss_s_gradient() -> None:
    student, teacher = perceptron(8, 0), perceptron(32, 1)
    inputs, labels = dataset(16).tensors
    by_hand = copy.deepcopy(student)
    optimizer = sgd(by_hand.parameters())
    x = F.log_softmax(by_hand(inputs) / 2, -1)
    y = F.log_softmax(teacher(inputs).detach() / 2, -1)
    hard = F.cross_entropy(by_hand(inputs), labels)
    (4 * F.kl_div(x, y, log_target=True, reduction="batchmean") + 0.5 * hard).backward()
    optimizer.step()

    reptile = Reptile(student, teacher, optimizer=sgd, clip=None, temperature=2.0, hard_weight=0.5)
    reptile.fit([(inputs, labels)], until=Until(steps=1), progress_bar=False)
    torch.testing.assert_close(weights(student), weights(by_hand), rtol=1e-5, atol=1e-6)


def test_without_a_teacher_a_step_is_that_of_cross_entropy() -> None:
    student = perceptron(8, 0)
    inputs, labels = dataset(16).tensors
    labels[3] = -100
    by_hand = copy.deepcopy(student)
    optimizer = sgd(by_hand.parameters())
    F.cross_entropy(by_hand(inputs), labels).backward()
    optimizer.step()
    Reptile(student, None, optimizer=sgd, clip=None).fit([(inputs, labels)], until=Until(steps=1), progress_bar=False)
    torch.testing.assert_close(weights(student), weights(by_hand), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_unequal_micro_batches_give_the_gradient_of_the_whole(labelled: bool) -> None:
    """Averaging the means of micro-batches, as some trainers did, weighs a row of a short one more."""
    teacher = Tagger(1)
    ids = torch.randint(0, 11, (12, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:3, 1:] = -100  # the first micro-batch has 3 rows that count, the second 14, the third 49
    labels[3:5, 0] = -100

    def batch(rows: slice) -> Any:
        return {"input_ids": ids[rows], "labels": labels[rows]} if labelled else {"input_ids": ids[rows]}

    def trained(batches: list[Any], accumulate: int) -> Tensor:
        student = Tagger(0)
        reptile = Reptile(
            student, teacher, optimizer=sgd, clip=None, accumulate=accumulate, hard_weight=0.5 if labelled else 0.0
        )
        reptile.fit(batches, until=Until(steps=1), progress_bar=False)
        return weights(student)

    whole = trained([batch(slice(0, 12))], 1)
    parts = trained([batch(slice(0, 3)), batch(slice(3, 5)), batch(slice(5, 12))], 3)
    assert (whole - weights(Tagger(0))).abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_samples_of_different_lengths_without_labels_are_refused_rather_than_misweighed() -> None:
    batches = [{"input_ids": torch.zeros(2, length, dtype=torch.long)} for length in (5, 3)]
    with pytest.raises(ValueError, match="got 5 and 3: give labels"):
        Reptile(Tagger(0), Tagger(1), accumulate=2).fit(batches, until=Until(steps=1), progress_bar=False)


def test_clipping_bounds_the_step() -> None:
    student, teacher = perceptron(8, 0), perceptron(32, 1)
    before = weights(student)
    Reptile(student, teacher, optimizer=sgd, clip=1e-3).fit(loader(), until=Until(steps=1), progress_bar=False)
    assert (weights(student) - before).norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_rise_and_fall(schedule: str, tmp_path: Path) -> None:
    reptile = Reptile(perceptron(8, 0), perceptron(8, 1), learning_rate=1.0, schedule=schedule, warmup=4)
    reptile.fit(loader(), until=Until(steps=20), folder=tmp_path, log_every=1, progress_bar=False)
    rates = [line["lr"] for line in read_log(tmp_path / "metrics.jsonl")]  # after each step: of the next one
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    expected = {"constant": [1.0, 1.0], "linear": [0.5, 0.0], "cosine": [0.5, 0.0]}[schedule]
    assert [rates[11], rates[19]] == pytest.approx(expected, abs=1e-9)


def test_mixed_precision_reaches_the_models_and_leaves_their_weights_float32() -> None:
    seen: list[torch.dtype] = []
    student, teacher = perceptron(8, 0), perceptron(32, 1)
    for model in (student, teacher):
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = Reptile(student, teacher, precision="bfloat16").fit(
        loader(), loader(shuffle=False), until=Until(steps=60), progress_bar=False
    )
    assert set(seen) == {torch.bfloat16}
    assert weights(student).dtype == torch.float32
    untrained = Reptile(perceptron(8, 0), teacher, precision="bfloat16").evaluate(loader(shuffle=False))
    assert result.metrics["loss"] < 0.5 * untrained["loss"]


# ------------------------------------------------------------------------------------------------ batches


def test_labels_of_a_causal_model_are_shifted_on_request() -> None:
    ids = torch.arange(6).reshape(2, 3)
    inputs, labels, *_ = split({"input_ids": ids, "labels": ids}, shift_labels=True, ignore_index=-100)
    assert list(inputs) == ["input_ids"]
    assert labels is not None
    assert labels.tolist() == [[1, 2, -100], [4, 5, -100]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [((torch.zeros(1),) * 4, "got tuple of 4"), ("text", "got str")],
)
def test_a_batch_of_another_kind_is_named(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        split(batch, False, -100)


def test_an_output_without_logits_is_named() -> None:
    with pytest.raises(TypeError, match=r"LSTM must return a tensor of logits.*got tuple"):
        Reptile(nn.LSTM(6, 4), perceptron(8, 1)).fit([torch.zeros(2, 3, 6)], until=Until(steps=1), progress_bar=False)


def test_the_sampler_finds_its_place_again() -> None:
    numbers = DataLoader(list(range(20)), 3, shuffle=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    sampler = Sampler(numbers)
    expected = []
    places = []
    for _ in range(12):
        places.append((copy.deepcopy(sampler.state_dict()), random_state()))
        expected.append([batch.tolist() for batch in sampler.take(2)])
        torch.rand(3)  # the model draws, too
    assert sorted(itertools.chain(*itertools.chain(*expected[:4]))) == list(range(20))
    assert expected[:4] != expected[4:8]
    for place, (state, numbers_state) in enumerate(places):
        again = Sampler(numbers)
        again.load_state_dict(state)
        set_random_state(numbers_state)
        for wanted in expected[place:]:
            assert [batch.tolist() for batch in again.take(2)] == wanted
            torch.rand(3)


def test_data_that_ends_is_named() -> None:
    with pytest.raises(ValueError, match="got none on pass 1"):
        Reptile(perceptron(8, 0), perceptron(8, 1)).fit([], until=Until(steps=1), progress_bar=False)
    once = (batch for batch in loader())
    with pytest.raises(ValueError, match="got none on pass 2"):
        Reptile(perceptron(8, 0), perceptron(8, 1)).fit(once, until=Until(steps=9), progress_bar=False)


# ------------------------------------------------------------------------------------------------ the teacher


def test_the_teacher_is_as_it_was_and_in_no_checkpoint(tmp_path: Path) -> None:
    student = perceptron(8, 0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    teacher.train()
    teacher[1].eval()
    teacher[0].bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    Reptile(student, teacher).fit(loader(), loader(), until=Until(steps=5), folder=tmp_path, progress_bar=False)

    assert set(modes) == {(False, False)}
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # BatchNorm's statistics included
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [parameter.requires_grad for parameter in teacher.parameters()] == [True, False, True, True, True, True]
    assert [module.training for module in teacher] == [True, False, True, True]
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    in_bytes = sum(file.stat().st_size for file in checkpoint.iterdir())
    saved = torch.load(checkpoint / "state.pt", weights_only=True)
    assert set(saved["optimizer"]["state"]) == set(range(4))
    assert in_bytes < 60_000


def test_shared_parameters_are_refused() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    teacher[0] = student[0]
    with pytest.raises(ValueError, match=r"share 2 parameters \('0.weight'"):
        Reptile(student, teacher)


def test_the_student_keeps_its_modes() -> None:
    student = perceptron(8, 0, dropout=0.1).eval()
    Reptile(student, perceptron(8, 1)).fit(loader(), loader(), until=Until(steps=2), progress_bar=False)
    assert not any(module.training for module in student.modules())


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_weigh_every_row_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = Tagger(0), Tagger(1)
    ids = torch.randint(0, 11, (10, 6), generator=generator)
    labels = torch.randint(0, 11, (10, 6), generator=generator)
    labels[:2] = -100
    labels[2, 1:] = -100
    names = ("cross_entropy", "perplexity", "accuracy", "f1", "agreement")
    reptile = Reptile(student, teacher, metrics=names, temperature=2.0)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 10)]  # 0, 1 and 42 rows that count
    measured = reptile.evaluate([{"input_ids": ids[cut], "labels": labels[cut]} for cut in cuts])

    keep = labels != -100
    s, t, wanted = student(ids).logits.detach()[keep], teacher(ids).logits.detach()[keep], labels[keep]
    prediction = s.argmax(-1)
    scores = []
    for label in set(wanted.tolist()) | set(prediction.tolist()):
        both = ((prediction == label) & (wanted == label)).sum().item()
        scores.append(2 * both / ((prediction == label).sum() + (wanted == label).sum()).item())
    assert measured == pytest.approx(
        {
            "loss": reptile_ext.reference.distillation_loss(s, t, temperature=2.0).item(),
            "cross_entropy": F.cross_entropy(s, wanted).item(),
            "perplexity": F.cross_entropy(s, wanted).exp().item(),
            "accuracy": (prediction == wanted).float().mean().item(),
            "f1": sum(scores) / len(scores),
            "agreement": (prediction == t.argmax(-1)).float().mean().item(),
        },
        rel=1e-4,
    )


def test_metrics_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics must be among 'loss'.*got 'bleu'"):
        Reptile(perceptron(8, 0), perceptron(8, 1), metrics=["bleu"])
    with pytest.raises(ValueError, match="agreement with the teacher, and teacher is None"):
        Reptile(perceptron(8, 0), None, metrics=["agreement"])
    with pytest.raises(ValueError, match=r"\['accuracy'\] need labels"):
        Reptile(perceptron(8, 0), perceptron(8, 1), metrics=["accuracy"]).evaluate([torch.zeros(2, 6)])
    with pytest.raises(ValueError, match="at least one row that counts"):
        Evaluation((), -100, torch.device("cpu")).compute()


def test_evaluation_does_not_change_training() -> None:
    def trained(every: int) -> Tensor:
        student = perceptron(8, 0, dropout=0.3)
        reptile = Reptile(student, perceptron(32, 1))
        reptile.fit(loader(), loader(), until=Until(steps=12), eval_every=every, progress_bar=False)
        return weights(student)

    assert torch.equal(trained(1), trained(100))


# ------------------------------------------------------------------------------------------------ until


def fitted(until: Until, **keywords: Any) -> Any:
    reptile = Reptile(perceptron(16, 0), perceptron(32, 1), metrics=["agreement"], learning_rate=0.02)
    return reptile.fit(loader(), loader(), until=until, eval_every=5, progress_bar=False, **keywords)


def test_until_steps() -> None:
    result = fitted(Until(steps=7))
    assert (result.steps, result.reason, result.rows) == (7, "7 steps", 7 * 16)


def test_until_minutes() -> None:
    result = fitted(Until(minutes=1e-4))
    assert result.reason == "0.0001 minutes"
    assert result.seconds >= 0.006


def test_until_target() -> None:
    result = fitted(Until(metric="agreement", target=0.9, steps=5000))
    assert result.reason.startswith("agreement 0.9")
    assert result.metrics["agreement"] >= 0.9
    assert result.steps % 5 == 0


def test_until_patience_gives_the_best_student_back(tmp_path: Path) -> None:
    student = perceptron(16, 0)
    reptile = Reptile(student, perceptron(32, 1), optimizer=lambda p: torch.optim.SGD(p, lr=30.0), clip=None)
    result = reptile.fit(
        loader(), loader(shuffle=False), until=Until(patience=3), eval_every=1, folder=tmp_path, progress_bar=False
    )
    assert result.reason == "no better loss in 3 evaluations"
    evaluations = [line["eval"]["loss"] for line in read_log(tmp_path / "metrics.jsonl") if "eval" in line]
    assert result.metrics["loss"] == min(evaluations) < evaluations[-1]
    assert reptile.evaluate(loader(shuffle=False))["loss"] == pytest.approx(min(evaluations), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Until(), "at least one of steps, minutes, epochs, target, patience"),
        (lambda: Until(steps=0), "steps must be a positive whole number; got 0"),
        (lambda: Until(steps=1, metric="bleu"), "metric must be one of .*got 'bleu'"),
        (lambda: Reptile(perceptron(8, 0), None, precision="int4"), "precision must be one of .*got 'int4'"),
        (lambda: Reptile(perceptron(8, 0), None, schedule="sine"), "schedule must be .*got 'sine'"),
        (lambda: Reptile(perceptron(8, 0), None, temperature=2.0), r"no meaning to \['temperature'\]"),
        (lambda: Reptile(perceptron(8, 0), perceptron(8, 1), reduction="sum"), "reduction is set by the training step"),
        (lambda: fitted(Until(metric="accuracy", target=0.5)), "until.metric='accuracy' is not among"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
