"""Bugs that other distillation losses have shipped, one test each; the numbers are those of the project's list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, INSTRUCTION_SETS, assert_near, check, exact, make_labels, make_logits, name_of, plain, run

import reptile_ext
from reptile_ext import reference

INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_04_ignored_rows_are_in_neither_sum_nor_count(dtype: torch.dtype) -> None:
    """A masked row was left out of the sum but not out of the count (or the reverse), so that masking changed the
    loss of the rest. Masking half of a batch must be the same as not having that half, for soft and hard loss."""
    student, teacher = make_logits("random", 8, 50, dtype)
    labels = torch.arange(8)
    masked = torch.where(labels % 2 == 0, labels, -100)
    keywords = {"hard_weight": 0.5, "temperature": 2.0}
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, masked, **keywords)
    half = run(reptile_ext.distillation_loss, student[::2], teacher[::2], labels[::2], **keywords)
    torch.testing.assert_close(loss, half[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[::2], half[1], rtol=torch.finfo(dtype).eps, atol=0)
    assert (gradient[1::2] == 0).all()
    # A batch that is twice its own half: masking the copy leaves the mean where it was.
    twice = torch.cat([student, student]), torch.cat([teacher, teacher]), torch.cat([labels, labels * 0 - 100])
    once = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    torch.testing.assert_close(reptile_ext.distillation_loss(*twice, **keywords), once[0], rtol=1e-6, atol=0)


def test_bug_05_a_class_masked_on_both_sides_is_no_nan(each_set: str) -> None:
    """A class at −inf in both rows gave exp(−inf)·(−inf − −inf) = NaN, as F.kl_div with log_target does. It must count
    for nothing, in loss and gradient."""
    student, teacher = make_logits("random", 4, 30)
    right = run(reptile_ext.distillation_loss, student[:, 5:], teacher[:, 5:])
    student[:, :5] = teacher[:, :5] = -INF
    assert plain(student, teacher).isnan(), "plain PyTorch has the bug, so this input shows it"
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher)
    torch.testing.assert_close(loss, right[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:, 5:], right[1], rtol=1e-5, atol=1e-8)
    assert (gradient[:, :5] == 0).all()


@pytest.mark.parametrize("depth", [80.0, 104.0, 150.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_06_log_probabilities_below_the_smallest_float(depth: float, dtype: torch.dtype) -> None:
    """Where both log-probabilities lie below about −104 their exponentials are 0 in float32 and the divergence became
    NaN, or, cancelling badly, negative. The classes must be as good as absent."""
    student, teacher = make_logits("random", 3, 40, torch.float64)
    student[:, 7:] -= depth
    teacher[:, 7:] -= depth
    student, teacher = student.to(dtype), teacher.to(dtype)
    check(student, teacher, sets=INSTRUCTION_SETS)
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher)
    assert loss > 0
    assert gradient.isfinite().all()
    if depth > 104 and dtype != torch.float64:
        assert (gradient[:, 7:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_bug_07_16_bit_logits_are_widened_first(dtype: torch.dtype) -> None:
    """Logits were divided by the temperature, or exponentiated, in bfloat16 before the cast to float32: gradients 4 to
    23 % wrong, unnoticed because the test's oracle did the same. The oracle here is float64 from the logits on, and
    would reject that program."""
    student, teacher = make_logits("random", 4, 1000, dtype)
    check(student, teacher, sets=INSTRUCTION_SETS, temperature=3.0)

    def rounds_too_early(s: torch.Tensor, t: torch.Tensor, *_: Any, temperature: float) -> torch.Tensor:
        x, y = F.log_softmax((s / temperature).float(), -1), F.log_softmax((t / temperature).float(), -1)
        return temperature**2 * F.kl_div(x, y, reduction="batchmean", log_target=True)

    wrong = run(rounds_too_early, student, teacher, temperature=3.0)
    with pytest.raises(AssertionError, match="our error"):
        assert_near({"": wrong}, student, teacher, temperature=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_09_row_losses_pass_on_a_gradient_of_their_own(dtype: torch.dtype) -> None:
    """reduction="none" gave gradients that ignored what came from above, or none at all. Each row's must be its own
    gradient times its own factor; a row with factor 0 gets 0."""
    student, teacher = make_logits("random", (3, 4), 33, dtype)
    labels = make_labels((3, 4), 33)
    upstream = torch.tensor([[1.0, -2.0, 0.0, 0.5], [3.0, 1e-3, -1.0, 1.0], [0.0, 7.0, 1.0, 100.0]])
    keywords = {"reduction": "none", "hard_weight": 0.5}
    found = run(reptile_ext.distillation_loss, student, teacher, labels, upstream=upstream, **keywords)
    assert_near({"": found}, student, teacher, labels, upstream=upstream, **keywords)
    assert (found[1][upstream == 0] == 0).all()
    assert found[1][upstream * (labels >= 0) != 0].any(-1).all()
    # The rows' mean, taken by hand, is reduction="mean".
    leaf = student.clone().requires_grad_()
    losses = reptile_ext.distillation_loss(leaf, teacher, labels, **keywords)
    (losses.sum() / (labels >= 0).sum()).backward()
    whole = run(reptile_ext.distillation_loss, student, teacher, labels, hard_weight=0.5)
    torch.testing.assert_close(leaf.grad, whole[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bug_10_micro_batches_are_divided_by_the_global_count(dtype: torch.dtype, as_tensor: bool) -> None:
    """With gradient accumulation every micro-batch was divided by its own number of tokens, so that tokens of short
    micro-batches weighed more. With `denominator` the micro-batches add up to the whole batch."""
    student, teacher = make_logits("random", (6, 5), 33, dtype)
    labels = make_labels((6, 5), 33)
    labels[0], labels[1, 1:] = -100, -100  # micro-batches of very different sizes
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, hard_weight=0.5)
    count = (labels != -100).sum()
    denominator = count if as_tensor else count.item()
    leaf = student.clone().requires_grad_()
    total = torch.zeros((), dtype=loss.dtype)
    naive = torch.zeros((), dtype=loss.dtype)
    for i in range(0, 6, 2):
        part = slice(i, i + 2)
        micro = reptile_ext.distillation_loss(
            leaf[part], teacher[part], labels[part], hard_weight=0.5, denominator=denominator
        )
        micro.backward()
        total += micro.detach()
        naive += reptile_ext.distillation_loss(student[part], teacher[part], labels[part], hard_weight=0.5) / 3
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert (naive - loss).abs() > 0.01 * loss, "per-micro-batch means are another objective, so this input shows it"


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 4.0},
        {"temperature": (2.0, 5.0), "temperature_scaling": "none"},
        {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "label_smoothing": 0.1},
        {"soft_weight": 0.0, "hard_weight": 1.0},
        {"reduction": "sum", "vocab": "truncate"},
    ],
    ids=str,
)
def test_bug_12_every_path_has_the_same_objective(keywords: dict[str, Any]) -> None:
    """Switching the fast path on dropped the T² or mixed in a cross entropy. Kernel, traced operator, torch.func's
    fallback, the module and the reference must agree in value and gradient, default arguments included."""
    student, teacher = make_logits("random", 6, 40)
    if "vocab" in keywords:
        teacher = teacher[:, :33]
    labels = make_labels(6, 33)
    torch.compiler.reset()

    def functional(s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return reptile_ext.distillation_loss(s, t, labels, **keywords)

    right = run(reference.distillation_loss, student, teacher, labels, **keywords)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for path in (
        reptile_ext.distillation_loss,
        reptile_ext.DistillationLoss(**keywords),
        torch.compile(functional, backend="aot_eager", fullgraph=True),
    ):
        options = {} if isinstance(path, torch.nn.Module) else keywords
        torch.testing.assert_close(run(path, student, teacher, labels, **options), right, **close)
    transformed = torch.func.grad_and_value(lambda s: functional(s, teacher, labels, **keywords))(student)
    torch.testing.assert_close((transformed[1], transformed[0]), right, **close)


def test_bug_12_nothing_but_what_was_asked_for() -> None:
    """Labels alone mix nothing in: they only say which rows are in."""
    student, teacher = make_logits("random", 6, 40, torch.float64)
    labels = torch.arange(6)
    for loss_fn in (reptile_ext.distillation_loss, exact):
        with_labels = run(loss_fn, student, teacher, labels, temperature=2.0)
        without = run(loss_fn, student, teacher, temperature=2.0)
        torch.testing.assert_close(with_labels, without, rtol=0, atol=0)
        right = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(with_labels[0], right)
