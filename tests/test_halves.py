"""The two halves of a loss called apart, as where other processes hold some of the classes: the classes are cut into
ranges, each gets its own row_stats and row_gradient, and what comes out is the loss of the whole.

This file runs on the CPU's operators; test_cuda_kernels.py runs what is below on those of the CUDA kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import (
    DTYPES,
    arithmetic_of,
    assert_near,
    every_divergence,
    keywords_of,
    make_labels,
    make_logits,
    name_of,
)
from torch import Tensor

from reptile_ext import ops
from reptile_ext.options import make_options

NAN, INF = float("nan"), float("inf")
IGNORED = -100
Operators = Callable[[str], Callable[..., Any]]  # the operator of a name
EVERYTHING: dict[str, Any] = {
    "temperature": (2.0, 3.0),
    "hard_weight": 0.5,
    "soft_weight": 0.7,
    "label_smoothing": 0.1,
    "reduction": "none",
}


def installed(name: str) -> Callable[..., Any]:
    """Those of the package, for tensors on the CPU or CUDA."""
    operator: Callable[..., Any] = getattr(torch.ops.reptile_ext, name).default
    return operator


def numbers_of(dim: int, *, is_mirrored: bool = False, **keywords: Any) -> tuple[Any, ...]:
    """The operators' arguments from `divergence` to `dim`, of a loss's keywords; `is_mirrored`: of its teacher."""
    options = make_options(**{"ignore_index": IGNORED, "vocab": "truncate"} | keywords)._replace(dim=dim)
    return ops.numbers(options.exchanged() if is_mirrored else options)


class Ranges:
    """The arguments of the operators for each range of classes, and for all of them (`whole`)."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        cuts: tuple[int, ...],
        *,
        weight: Tensor | None = None,
        denominator: float | None = None,
        grad_output: Tensor | None = None,
        dim: int = -1,
        **keywords: Any,
    ) -> None:
        dim %= student.dim()
        numbers = numbers_of(dim, **keywords)
        of_rows = [
            None if x is None else torch.as_tensor(x, dtype=torch.float64).contiguous()
            for x in (weight, denominator, grad_output)
        ]
        compared = min(student.shape[dim], teacher.shape[dim])
        self.dim = dim
        self.whole = (student, teacher, labels, *of_rows, *numbers)
        self.each = []
        for begin, end in itertools.pairwise((0, *cuts, student.shape[dim])):
            # The classes that student and teacher share come first; behind them are the student's own.
            teachers = teacher.narrow(dim, min(begin, compared), min(end, compared) - min(begin, compared))
            local = None
            if labels is not None:
                is_here = (labels >= begin) & (labels < min(end, compared))
                local = torch.where(is_here, labels - begin, torch.where(labels == IGNORED, IGNORED, -1))
            self.each.append((student.narrow(dim, begin, end - begin), teachers, local, *of_rows, *numbers))


def combined_stats(operators: Operators, ranges: Ranges) -> tuple[Tensor, Tensor, Tensor]:
    """Row stats of all classes: three rounds, each from what the rounds before have found."""
    row_stats = operators("row_stats")
    maxima = torch.stack([row_stats(*arguments, None, None) for arguments in ranges.each]).amax(0)
    sums = torch.stack([row_stats(*arguments, maxima, None) for arguments in ranges.each]).sum(0)
    mixture_sums = torch.stack([row_stats(*arguments, maxima, sums) for arguments in ranges.each]).sum(0)
    return maxima, sums, mixture_sums


def by_halves(operators: Operators, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Loss and gradient; every range finds the same loss, to the bit. In place comes out the same."""
    stats = combined_stats(operators, ranges)
    losses, gradients = [], []
    for student, *arguments in ranges.each:
        loss, gradient = operators("row_gradient")(student, *arguments, *stats, True)
        assert gradient.dtype == student.dtype
        memory = student.clone()
        in_place = operators("row_gradient_")(memory, *arguments, *stats)
        alone, nothing = operators("row_gradient")(student, *arguments, *stats, False)
        assert nothing.numel() == 0
        torch.testing.assert_close(memory, gradient, rtol=0, atol=0, equal_nan=True)
        for other in (in_place, alone, *losses[:1]):
            torch.testing.assert_close(other, loss, rtol=0, atol=0, equal_nan=True)
        losses.append(loss)
        gradients.append(gradient)
    return losses[0], torch.cat(gradients, ranges.dim)


def check_halves(
    operators: Operators,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    cuts: tuple[int, ...],
    **keywords: Any,
) -> None:
    """The oracle's rule for loss and gradient of all ranges together."""
    found = {f"ranges cut at {cuts}": by_halves(operators, Ranges(student, teacher, labels, cuts, **keywords))}
    assert_near(found, student, teacher, labels, **keywords)


def check_against_the_whole(
    operators: Operators,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    cuts: tuple[int, ...],
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """Where there is no oracle: NaN and infinities where the whole call has them, and its numbers to the rounding of
    sums that are added up in another order."""
    ranges = Ranges(student, teacher, labels, cuts, **keywords)
    right = operators("distillation_loss")(*ranges.whole, True)
    found = by_halves(operators, ranges)
    epsilon = torch.finfo(arithmetic_of(student, teacher)).eps
    for a, b in zip(found, right, strict=True):
        size = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
        rounding = max(64 * epsilon, torch.finfo(b.dtype).eps)
        torch.testing.assert_close(a, b, rtol=rounding, atol=64 * epsilon * size, equal_nan=True)
    return found


def cuts_of(vocab_size: int) -> list[tuple[int, ...]]:
    """One range, two, three of sizes that differ, and some without a class."""
    third = vocab_size // 3
    return [(), (third,), (third, vocab_size - third // 2), (0, vocab_size // 2), (vocab_size - 1, vocab_size - 1)]


# --------------------------------------------------------------------- what test_cuda_kernels.py runs on its operators


def check_divergence(operators: Operators, rows: int, vocab_size: int, dtype: torch.dtype, divergence: str) -> None:
    """Hard labels, smoothing, two temperatures, weights and ignored rows; and none of these."""
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    labels, weight = make_labels(rows, vocab_size), torch.rand(rows)
    keywords = keywords_of(divergence)
    for cuts in cuts_of(vocab_size):
        check_halves(operators, student, teacher, labels, cuts, weight=weight, **EVERYTHING, **keywords)
        check_halves(operators, student, teacher, labels, cuts, hard_weight=0.5, **keywords)
        check_halves(operators, student, teacher, labels, cuts, temperature=0.5, **keywords)


def check_kinds(operators: Operators, rows: int, vocab_size: int, kind: str) -> None:
    """Maxima that lie in one range and are far above another's; distributions that are next to equal."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make_logits(kind, rows, vocab_size, dtype)
        labels = make_labels(rows, vocab_size)
        for cuts in cuts_of(vocab_size)[1:3]:
            for divergence in ("forward_kl", "jsd"):
                check_halves(operators, student, teacher, labels, cuts, divergence=divergence, hard_weight=0.5)


def check_mixed_dtypes(operators: Operators, divergence: str) -> None:
    """And a student with more classes than the teacher, one of whose ranges has none that are compared."""
    for student_dtype, teacher_dtype in itertools.product(DTYPES, DTYPES):
        student, _ = make_logits("random", 4, 90, student_dtype)
        _, teacher = make_logits("random", 4, 77, teacher_dtype)
        keywords = {"hard_weight": 0.5, "vocab": "truncate", **keywords_of(divergence)}
        for cuts in ((), (40,), (33, 80)):
            check_halves(operators, student, teacher, make_labels(4, 77), cuts, **keywords)


def check_layouts(operators: Operators, divergence: str, dtype: torch.dtype) -> None:
    """Classes far apart with rows for neighbours, rows that begin anywhere, three dimensions."""
    student, teacher = make_logits("random", (2, 3, 9), 21, dtype)
    labels = make_labels((2, 3, 9), 21)
    keywords = {"hard_weight": 0.5, "temperature": (2.0, 0.5), **keywords_of(divergence)}
    sideways = labels.transpose(0, 1).contiguous()
    front = student.movedim(-1, 1).contiguous(), teacher.movedim(-1, 1).contiguous()
    for cuts in ((8,), (5, 5)):
        check_halves(operators, *front, labels, cuts, dim=1, **keywords)
        check_halves(operators, student.transpose(0, 1), teacher.transpose(0, 1), sideways, cuts, **keywords)
        check_halves(operators, front[0].movedim(1, -1), teacher, labels, cuts, **keywords)


def check_what_is_divided(operators: Operators) -> None:
    """Reductions, a denominator, grad_output: one for all, and one a row."""
    student, teacher = make_logits("random", 6, 40, torch.float32)
    labels, weight = make_labels(6, 40), torch.rand(6)
    labels[2], weight[4] = IGNORED, 0
    cuts = (11, 30)
    for reduction in ("mean", "sum", "none"):
        keywords: dict[str, Any] = {"reduction": reduction, "hard_weight": 0.5}
        check_halves(operators, student, teacher, labels, cuts, **keywords)
        grad_output = torch.rand(6 if reduction == "none" else ()).double()
        check_halves(operators, student, teacher, labels, cuts, weight=weight, grad_output=grad_output, **keywords)
    check_halves(operators, student, teacher, labels, cuts, weight=weight, denominator=3.0, hard_weight=0.5)
    check_halves(operators, student, teacher, labels, cuts, soft_weight=0.0, hard_weight=1.0, label_smoothing=0.2)


def check_trainable_teacher(operators: Operators, divergence: str) -> None:
    """The kernels whose gradient is that of a trainable teacher: here in the student's place."""
    for temperature in (1.0, (2.0, 0.5)):
        teacher, student = make_logits("random", 5, 40, torch.float64)
        labels = make_labels(5, 40)
        keywords = {"temperature": temperature, "is_mirrored": True, **keywords_of(divergence)}
        for cuts in cuts_of(40):
            check_against_the_whole(operators, teacher, student, labels, cuts, **keywords)


def check_ignored_rows(operators: Operators, vocab_size: int, divergence: str) -> None:
    """Their stats are 0, so is their gradient, and nothing of what they hold reaches a row that counts."""
    student, teacher = make_logits("random", 40, vocab_size)
    labels, weight = make_labels(40, vocab_size).clamp_min(0), torch.rand(40) + 0.5
    labels[::3], weight[1::5] = IGNORED, 0
    is_ignored = (labels == IGNORED) | (weight == 0)
    keywords = {**EVERYTHING, "weight": weight, **keywords_of(divergence)}
    cuts = (vocab_size // 3,)
    found = []
    for broken in (False, True):
        if broken:
            student[is_ignored], teacher[is_ignored] = NAN, INF
        ranges = Ranges(student, teacher, labels, cuts, **keywords)
        for stats in combined_stats(operators, ranges):
            assert (stats[is_ignored] == 0).all()
            assert not stats.isnan().any()
        found.append(by_halves(operators, ranges))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert (b[is_ignored] == 0).all()
        assert b.isfinite().all()


def check_broken_rows(operators: Operators, vocab_size: int, divergence: str) -> None:
    """A NaN or an infinity in one range makes the row NaN in all of them, and leaves the others alone."""
    labels = torch.zeros(4, dtype=torch.int64)
    labels[1] = vocab_size - 1
    others = torch.arange(4) != 1
    keywords = {"reduction": "none", "temperature": 2.0, "hard_weight": 0.5, **keywords_of(divergence)}
    student, teacher = make_logits("random", 4, vocab_size)
    whole = by_halves(operators, Ranges(student, teacher, labels, (vocab_size // 2,), **keywords))
    for what in (NAN, INF, -INF):
        for side in range(2):
            logits = [student.clone(), teacher.clone()]
            logits[side][1, slice(None) if what == -INF else vocab_size // 4] = what
            found = by_halves(operators, Ranges(*logits, labels, (vocab_size // 2,), **keywords))
            assert found[0][1].isnan()
            assert found[1][1].isnan().all()
            for a, b in zip(found, whole, strict=True):
                assert torch.equal(a[others], b[others])


def check_masked_classes(operators: Operators, vocab_size: int, divergence: str) -> None:
    """In both, as where a vocabulary is padded: a whole range of them too. On one side alone: infinite where the
    divergence is."""
    labels = torch.tensor([1, 0, vocab_size // 2, 1, 0])
    keywords = {**EVERYTHING, **keywords_of(divergence)}
    student, teacher = make_logits("random", 5, vocab_size)
    third = vocab_size - vocab_size // 3
    for z in (student, teacher):
        z[:, 2 : vocab_size // 2 : 3] = -INF
        z[:, third:] = -INF
    loss, gradient = check_against_the_whole(operators, student, teacher, labels, (3, third), **keywords)
    assert loss.isfinite().all()
    assert (gradient[:, third:] == 0).all()
    for side in range(2):
        one_sided = [student.clone(), teacher.clone()]
        one_sided[side][:, 4] = -INF
        _, gradient = check_against_the_whole(operators, *one_sided, labels, (3, third), **keywords)
        assert gradient.isfinite().all()


def check_a_row_without_classes(operators: Operators) -> None:
    """Maxima of −inf and sums of 0: what changes nothing in a maximum or a sum."""
    empty, labels = torch.zeros(3, 0), torch.full((3,), -1)
    for divergence in ("forward_kl", "jsd", "mse", "dkd"):
        ranges = Ranges(empty, empty, labels, (), **EVERYTHING, **keywords_of(divergence))
        maxima, sums, mixture_sums = combined_stats(operators, ranges)
        assert (maxima == -INF).all()
        assert (sums == 0).all()
        row_stats = operators("row_stats")
        mixture_sums = row_stats(*ranges.each[0], torch.zeros_like(maxima), torch.ones_like(sums))
        assert (mixture_sums == 0).all()
    none = torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    assert [x.shape for x in combined_stats(operators, Ranges(*none, (2,)))] == [(0, 3), (0, 10), (0, 2)]


def check_refusals(operators: Operators) -> None:
    """What memory safety hangs on."""
    student, teacher = make_logits("random", 4, 9)
    ranges = Ranges(student, teacher, None, ())
    maxima, sums, mixture_sums = combined_stats(operators, ranges)
    (arguments,) = ranges.each
    wrong = {"maxima": maxima.float(), "sums": sums[:3], "mixture_sums": mixture_sums.t().contiguous().t()[:, :1]}
    stats = {"maxima": maxima, "sums": sums, "mixture_sums": mixture_sums}
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match=f"^{name} must be contiguous float64"):
            operators("row_gradient")(*arguments, *(stats | {name: value}).values(), True)
    with pytest.raises(RuntimeError, match=r"^maxima must be contiguous float64"):
        operators("row_stats")(*arguments, wrong["maxima"], None)
    with pytest.raises(RuntimeError, match=r"^sums must be contiguous float64"):
        operators("row_stats")(*arguments, maxima, wrong["sums"])
    with pytest.raises(RuntimeError, match="sums need the maxima"):
        operators("row_stats")(*arguments, None, sums)


KINDS = ("peaked", "near_equal", "late_peak", "rising")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
some_divergences = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "mse", "dkd"])
with_mirrors = pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl", "soft_cross_entropy", "mse", "dkd"])


# ----------------------------------------------------------------------------------------------------- on the CPU


@pytest.fixture
def operators(each_set: str) -> Operators:
    return installed


@every_dtype
@every_divergence
@pytest.mark.parametrize("vocab_size", [3, 133])
def test_ranges_of_classes_make_the_whole(
    operators: Operators, vocab_size: int, divergence: str, dtype: torch.dtype
) -> None:
    check_divergence(operators, 5, vocab_size, dtype, divergence)


@every_kind
def test_kinds_of_logits(operators: Operators, kind: str) -> None:
    check_kinds(operators, 3, 1700, kind)


@some_divergences
def test_mixed_dtypes_and_vocabularies_that_differ(operators: Operators, divergence: str) -> None:
    check_mixed_dtypes(operators, divergence)


@every_dtype
@some_divergences
def test_layouts(operators: Operators, divergence: str, dtype: torch.dtype) -> None:
    check_layouts(operators, divergence, dtype)


def test_what_is_divided(operators: Operators) -> None:
    check_what_is_divided(operators)


@with_mirrors
def test_a_trainable_teacher(operators: Operators, divergence: str) -> None:
    check_trainable_teacher(operators, divergence)


@some_divergences
def test_ignored_rows(operators: Operators, divergence: str) -> None:
    check_ignored_rows(operators, 37, divergence)


@some_divergences
def test_broken_rows_stay_alone(operators: Operators, divergence: str) -> None:
    check_broken_rows(operators, 37, divergence)


@every_divergence
def test_masked_classes(operators: Operators, divergence: str) -> None:
    check_masked_classes(operators, 40, divergence)


def test_a_row_without_classes(operators: Operators) -> None:
    check_a_row_without_classes(operators)


def test_refusals(operators: Operators) -> None:
    check_refusals(operators)


def test_a_wrong_label_is_an_error(operators: Operators) -> None:
    """−1 says that the class is elsewhere; nothing else below 0 or beyond the classes at hand does."""
    student, teacher = make_logits("random", 2, 9)
    for wrong in (9, -2, 2**40):
        ranges = Ranges(student, teacher, torch.tensor([0, 0]), (), hard_weight=0.5)
        _, _, labels, *others = ranges.each[0]
        labels[1] = wrong
        with pytest.raises(RuntimeError, match="labels must lie in"):
            operators("row_stats")(student, teacher, labels, *others, None, None)
