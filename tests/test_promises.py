"""The promises of the contract that are not accuracy: zero, masks, broken rows, determinism, memory."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import (
    DTYPES,
    INSTRUCTION_SETS,
    ZERO_AT_EQUALITY,
    arithmetic_of,
    check,
    every_divergence,
    exact,
    keywords_of,
    make_labels,
    make_logits,
    name_of,
    plain,
    run,
)
from torch import Tensor

import reptile_ext
from reptile_ext import ops, reference
from reptile_ext.options import DIVERGENCES

INF, NAN = float("inf"), float("nan")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# 5: less than a vector. 37: a tail. 1,500: the maximum is probed in part. 9,001: several blocks.
VOCAB_SIZES = (5, 37, 1500, 9001)


@pytest.fixture(params=[*INSTRUCTION_SETS, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The promises bind every backend: the kernels of each instruction set, and the reference."""
    before = ops.instruction_set()
    if request.param == "reference":
        yield reference.distillation_loss
    else:
        ops.instruction_set(request.param)
        yield reptile_ext.distillation_loss
    ops.instruction_set(before)


def rows_of(backend: Any, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any):
    """Loss of each row, and gradient of their sum."""
    return run(backend, student, teacher, labels, reduction="none", **keywords)


# -------------------------------------------------------------------------------------------- 3. zero is zero


@every_dtype
@pytest.mark.parametrize("divergence", ZERO_AT_EQUALITY)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equal_logits_give_exactly_zero(backend: Any, temperature: float, dtype: torch.dtype, divergence: str) -> None:
    """In the value, in the student's gradient and in that of a trainable teacher."""
    for kind in ("random", "flat", "peaked", "late_peak", "rising"):
        for vocab_size in (1, 2, *VOCAB_SIZES):
            _, logits = make_logits(kind, 3, vocab_size, dtype)
            student, teacher = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            labels = torch.arange(3) % vocab_size
            loss = backend(student, teacher, labels, temperature=temperature, **keywords_of(divergence))
            loss.backward()
            assert loss.item() == 0.0, (kind, vocab_size)
            assert (student.grad == 0.0).all(), (kind, vocab_size, student.grad.abs().max())
            assert (teacher.grad == 0.0).all(), (kind, vocab_size, teacher.grad.abs().max())


@every_dtype
@pytest.mark.parametrize("divergence", ZERO_AT_EQUALITY)
def test_equal_logits_in_different_layouts_give_exactly_zero(backend: Any, dtype: torch.dtype, divergence: str) -> None:
    """A class gets the same bits wherever it lies: in the body or the tail, direct or gathered."""
    _, logits = make_logits("random", (2, 3), 1037, dtype)
    labels = make_labels((2, 3), 1037)
    apart = torch.full((2, 3, 2 * 1037 + 1), NAN, dtype=dtype)[..., 1::2].copy_(logits)
    for student, teacher in (
        (logits, apart),
        (apart, logits),
        (logits.movedim(-1, 0).contiguous().movedim(0, -1), logits),
    ):
        loss, gradient = run(backend, student, teacher, labels, temperature=2.0, **keywords_of(divergence))
        assert loss.item() == 0.0
        assert (gradient == 0.0).all()


@every_dtype
@pytest.mark.parametrize("divergence", ZERO_AT_EQUALITY)
def test_equal_logits_side_by_side_give_exactly_zero(backend: Any, dtype: torch.dtype, divergence: str) -> None:
    """Images: rows in the lanes instead of classes."""
    _, logits = make_logits("random", (2, 5, 7), 19, dtype)
    logits = logits.movedim(-1, 1).contiguous()
    keywords = {"temperature": 2.0, "dim": 1, **keywords_of(divergence)}
    loss, gradient = run(backend, logits.clone(), logits, make_labels((2, 5, 7), 19), **keywords)
    assert loss.item() == 0.0
    assert (gradient == 0.0).all()


@every_dtype
def test_the_smallest_number_masks_like_minus_infinity(each_set: str, dtype: torch.dtype) -> None:
    """Many models mask with finfo.min. In both rows it must do the same, not overflow."""
    student, teacher = make_logits("random", 4, 600, dtype)
    results = []
    for mask in (-INF, torch.finfo(dtype).min):
        student[:, ::3] = teacher[:, ::3] = mask
        results.append(run(reptile_ext.distillation_loss, student, teacher, make_labels(4, 2) * 0 + 1, hard_weight=0.5))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("divergence", ZERO_AT_EQUALITY)
def test_equal_logits_with_masks_give_exactly_zero(backend: Any, divergence: str) -> None:
    _, logits = make_logits("random", 4, 1500)
    logits[:, ::3] = -INF
    logits[1, :1400] = -INF  # nothing but masked classes where the maximum is probed
    labels = torch.tensor([1, 1499, 700, 2])
    loss, gradient = run(backend, logits.clone(), logits, labels, temperature=2.0, **keywords_of(divergence))
    assert loss.item() == 0.0
    assert (gradient == 0.0).all()


@every_dtype
@every_divergence
def test_divergence_is_never_negative(backend: Any, dtype: torch.dtype, divergence: str) -> None:
    """Student and teacher a few units in the last place apart: rounding errors are far above D."""
    for vocab_size in VOCAB_SIZES:
        teacher = torch.randn(64, vocab_size).to(dtype)
        for step in (1, 3):
            student = (teacher * (1 + step * torch.finfo(dtype).eps * torch.randn(teacher.shape).sign())).to(dtype)
            loss, _ = rows_of(backend, student, teacher, torch.arange(64) % vocab_size, **keywords_of(divergence))
            assert (loss >= 0).all(), loss.min()


# ------------------------------------------------------------------------------------------ 4. masked classes


@every_dtype
@every_divergence
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.2), ((2.0, 3.0), 0.0)])
def test_classes_masked_in_both_rows_are_as_if_deleted(
    backend: Any, temperature: Any, smoothing: float, dtype: torch.dtype, divergence: str
) -> None:
    keywords = {"temperature": temperature, "hard_weight": 0.5, "label_smoothing": smoothing, **keywords_of(divergence)}
    for vocab_size in VOCAB_SIZES:
        student, teacher = make_logits("random", 6, vocab_size, dtype)
        keep = torch.rand(vocab_size) > 0.4
        keep[0], keep[1] = True, False
        if vocab_size > 1000:
            keep[:700] = False
        where_kept = keep.nonzero().flatten()
        student[:, ~keep] = teacher[:, ~keep] = -INF
        labels = make_labels(6, len(where_kept))
        labels_all = torch.where(labels >= 0, where_kept[labels.clamp(min=0)], labels)
        loss, gradient = rows_of(backend, student, teacher, labels_all, **keywords)
        short = student[:, keep], teacher[:, keep]
        right = rows_of(exact, short[0].double(), short[1], labels, **keywords)
        rival = rows_of(plain, *short, labels, **keywords)
        assert (gradient[:, ~keep] == 0).all()
        torch.testing.assert_close(loss.double(), right[0], rtol=1e-5, atol=4e-6)
        allowed = (rival[1].double() - right[1]).abs().max() + 1e-6
        assert (gradient[:, keep].double() - right[1]).abs().max() <= allowed


# What one row costs where the one side has mass and the other's class is masked by −inf: infinity or not.
INFINITE_IF_STUDENT_MASKED = ("forward_kl", "symmetric_kl", "soft_cross_entropy", "mse", "dkd")
INFINITE_IF_TEACHER_MASKED = ("reverse_kl", "symmetric_kl", "mse")


@every_dtype
@every_divergence
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_mass_where_the_other_side_is_masked(backend: Any, masked: str, dtype: torch.dtype, divergence: str) -> None:
    """+inf where the mathematics says so and the exact finite value elsewhere; the gradient is finite in any case, for
    a trainable teacher too; and the other rows are whole."""
    infinite = divergence in (INFINITE_IF_STUDENT_MASKED if masked == "student" else INFINITE_IF_TEACHER_MASKED)
    for vocab_size in VOCAB_SIZES:
        student, teacher = make_logits("random", 3, vocab_size, dtype)
        labels, keywords = torch.zeros(3, dtype=torch.int64), keywords_of(divergence)
        whole = rows_of(backend, student, teacher, labels, **keywords)
        (student if masked == "student" else teacher)[1, vocab_size - 2] = -INF
        loss, gradient = rows_of(backend, student, teacher, labels, **keywords)
        if infinite:
            assert loss[1] == INF
        else:
            right = rows_of(exact, student.double(), teacher, labels, **keywords)
            torch.testing.assert_close(loss.double(), right[0], rtol=1e-5, atol=4e-6)
            rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-6}
            torch.testing.assert_close(gradient.double(), right[1], **rounding)
        assert gradient.isfinite().all()
        for row in (0, 2):
            assert torch.equal(loss[row], whole[0][row])
            assert torch.equal(gradient[row], whole[1][row])
        learner = teacher.clone().requires_grad_()
        backend(student, learner, labels, reduction="sum", **keywords).backward()
        assert learner.grad.isfinite().all()


@every_dtype
def test_the_gradient_where_the_student_is_masked_is_that_of_everywhere(backend: Any, dtype: torch.dtype) -> None:
    """Forward KL is +inf there, and its gradient q − p all the same."""
    for vocab_size in VOCAB_SIZES:
        student, teacher = make_logits("random", 3, vocab_size, dtype)
        student[1, vocab_size - 2] = -INF
        _, gradient = rows_of(backend, student, teacher)
        wanted = student.double().softmax(-1) - teacher.double().softmax(-1)
        torch.testing.assert_close(gradient.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_the_reverse_part_of_an_infinite_row_pulls_nowhere(backend: Any) -> None:
    """Reverse KL is +inf where the teacher alone is masked; its gradient, infinite too, is taken as 0."""
    student, teacher = make_logits("random", 2, 700)
    teacher[1, 3] = -INF
    loss, gradient = rows_of(backend, student, teacher, divergence="reverse_kl")
    assert loss.isinf().tolist() == [False, True]
    assert (gradient[1] == 0).all()
    _, gradient = rows_of(backend, student, teacher, divergence="symmetric_kl", beta=0.25)
    wanted = 0.75 * (student.softmax(-1) - teacher.softmax(-1))
    torch.testing.assert_close(gradient[1], wanted[1], rtol=1e-5, atol=1e-7)


def test_disjoint_supports(backend: Any) -> None:
    """No class in common: the bounded divergences take their greatest value, exactly as known, and nothing is NaN."""
    student, teacher = torch.full((2, 40), -INF), torch.full((2, 40), -INF)
    student[:, ::2], teacher[:, 1::2] = torch.randn(2, 20), torch.randn(2, 20)
    wanted = {
        ("tvd", None): 1.0,
        ("hellinger", None): 1.0,
        ("jsd", 0.5): math.log(2),
        ("jsd", 0.3): -0.3 * math.log(0.3) - 0.7 * math.log(0.7),
        ("scaled_jsd", 0.5): 4 * math.log(2),
        ("skew_kl", 0.1): -math.log(0.1),
        ("skew_reverse_kl", 0.1): -math.log(0.1),
        **{(name, None): INF for name in (*INFINITE_IF_STUDENT_MASKED, *INFINITE_IF_TEACHER_MASKED) if name != "dkd"},
    }
    for (divergence, beta), value in wanted.items():
        loss, gradient = rows_of(backend, student, teacher, divergence=divergence, beta=beta)
        assert loss.tolist() == pytest.approx([value] * 2, rel=1e-6), divergence
        assert gradient.isfinite().all(), divergence


def test_student_mass_where_the_teacher_is_masked_costs_nothing_extra(backend: Any) -> None:
    """p = 0 there: the class is in the student's normaliser and nowhere else. By hand, two classes against one."""
    student = torch.tensor([[1.0, 2.0]])
    loss, gradient = run(backend, student, torch.tensor([[5.0, -INF]]))
    q = student.softmax(-1)
    assert loss.item() == pytest.approx(-q[0, 0].log().item(), rel=1e-6)
    torch.testing.assert_close(gradient, q - torch.tensor([[1.0, 0.0]]), rtol=1e-6, atol=1e-7)


def test_a_masked_label_costs_infinity_and_its_gradient_is_finite(backend: Any) -> None:
    for smoothing in (0.0, 0.1):
        student, teacher = make_logits("random", 2, 40)
        student[0, 7] = teacher[0, 7] = -INF
        keywords = {"hard_weight": 1.0, "label_smoothing": smoothing}
        loss, gradient = rows_of(backend, student, teacher, torch.tensor([7, 7]), **keywords)
        assert loss[0] == INF
        assert loss[1].isfinite()
        assert gradient.isfinite().all()


# -------------------------------------------------------------------------------------------- 5. broken rows


@every_dtype
@every_divergence
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("what", ["nan", "+inf", "all -inf", "nan and -inf"])
def test_a_broken_row_is_visible_and_stays_alone(
    backend: Any, what: str, whose: str, dtype: torch.dtype, divergence: str
) -> None:
    # A vector's first and last lane, the probe, the last block.
    for vocab_size, at in ((1, 0), (37, 0), (37, 36), (1500, 750), (9001, 9000)):
        student, teacher = make_logits("random", 4, vocab_size, dtype)
        labels, keywords = torch.zeros(4, dtype=torch.int64), {"temperature": 2.0, **keywords_of(divergence)}
        whole = rows_of(backend, student, teacher, labels, **keywords)
        row = (student if whose == "student" else teacher)[2]
        if "-inf" in what:
            row.fill_(-INF)
        if what != "all -inf":
            row[at] = INF if what == "+inf" else NAN
        loss, gradient = rows_of(backend, student, teacher, labels, **keywords)
        assert loss[2].isnan(), (vocab_size, at, loss[2])
        assert gradient[2].isnan().all(), (vocab_size, at, gradient[2])
        for good in (0, 1, 3):
            assert torch.equal(loss[good], whole[0][good])
            assert torch.equal(gradient[good], whole[1][good])
        learner = teacher.clone().requires_grad_()
        backend(student, learner, labels, reduction="sum", **keywords).backward()
        assert learner.grad.isnan().all(-1).tolist() == [False, False, True, False]
        assert learner.grad[[0, 1, 3]].isfinite().all()


@every_dtype
@every_divergence
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("what", [NAN, INF, -INF], ids=str)
def test_a_broken_pixel_stays_alone(backend: Any, what: float, whose: str, dtype: torch.dtype, divergence: str) -> None:
    """Rows side by side in the lanes: the neighbours share every instruction and not one bit."""
    student, teacher = (z.movedim(-1, 1).contiguous() for z in make_logits("random", (1, 9, 9), 6, dtype))
    labels, keywords = torch.zeros(1, 9, 9, dtype=torch.int64), {"dim": 1, **keywords_of(divergence)}
    whole = rows_of(backend, student, teacher, labels, **keywords)
    (student if whose == "student" else teacher)[0, slice(None) if what == -INF else 2, 4, 5] = what
    loss, gradient = rows_of(backend, student, teacher, labels, **keywords)
    broken = torch.zeros(1, 9, 9, dtype=torch.bool)
    broken[0, 4, 5] = True
    assert torch.equal(loss.isnan(), broken)
    assert torch.equal(gradient.isnan(), broken.unsqueeze(1).expand_as(gradient))
    assert torch.equal(loss[~broken], whole[0][~broken])
    assert torch.equal(gradient.movedim(1, -1)[~broken], whole[1].movedim(1, -1)[~broken])


@pytest.mark.parametrize("what", [NAN, INF], ids=str)
def test_a_broken_row_with_labels_is_visible(backend: Any, what: float) -> None:
    """The label's class is written last, on its own: it must be NaN too."""
    for smoothing in (0.0, 0.1):
        for vocab_size in (5, 1500):
            student, teacher = make_logits("random", 3, vocab_size)
            student[1, 3] = what
            keywords = {"hard_weight": 1.0, "label_smoothing": smoothing, "temperature": 2.0}
            loss, gradient = rows_of(backend, student, teacher, torch.tensor([0, 1, 2]), **keywords)
            assert loss.isnan().tolist() == [False, True, False]
            assert gradient[1].isnan().all()
            assert gradient[[0, 2]].isfinite().all()


def test_a_broken_row_makes_the_mean_nan_and_no_other_gradient(backend: Any) -> None:
    student, teacher = make_logits("random", 3, 30)
    student[1, 4] = NAN
    loss, gradient = run(backend, student, teacher)
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


# ---------------------------------------------------------------------------------------------- ignored rows


@every_dtype
@every_divergence
@pytest.mark.parametrize("by", ["label", "weight"])
def test_rows_that_are_out_are_never_read(backend: Any, by: str, dtype: torch.dtype, divergence: str) -> None:
    """NaN, infinities and huge numbers in them change not one bit of anything."""
    student, teacher = make_logits("random", 9, 600, dtype)
    labels, weight = torch.arange(9), torch.rand(9) + 0.5
    if by == "label":
        labels[[0, 4, 5, 8]] = -100
    else:
        weight[[0, 4, 5, 8]] = 0.0
        labels[4] = 10**9  # never read either
    keywords = {"hard_weight": 0.5, "weight": weight, "temperature": 2.0, "label_smoothing": 0.1}
    keywords |= keywords_of(divergence)
    for reduction in ("mean", "sum", "none"):
        clean = run(backend, student, teacher, labels, reduction=reduction, **keywords)
        dirty_s, dirty_t = student.clone(), teacher.clone()
        dirty_s[0], dirty_s[4], dirty_s[5, 7], dirty_t[8], dirty_t[5] = NAN, INF, -INF, NAN, torch.finfo(dtype).max
        dirty = run(backend, dirty_s, dirty_t, labels, reduction=reduction, **keywords)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
        assert (dirty[1][[0, 4, 5, 8]] == 0).all()
        assert dirty[1][1].any()


@every_dtype
@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_counted_row_gives_zero_and_no_gradient(
    backend: Any, reduction: str, dtype: torch.dtype, divergence: str
) -> None:
    student = torch.full((4, 20), NAN, dtype=dtype)
    ignored = torch.full((4,), -100)
    for labels, weight in ((ignored, None), (ignored * 0, torch.zeros(4)), (ignored, torch.zeros(4))):
        keywords = {"weight": weight, "hard_weight": 1.0, "reduction": reduction, **keywords_of(divergence)}
        loss, gradient = run(backend, student, student, labels, **keywords)
        assert (loss == 0).all()
        assert (gradient == 0).all()


@every_dtype
def test_inplace_clears_the_ignored_rows(dtype: torch.dtype) -> None:
    leaf = torch.full((3, 50), NAN, dtype=dtype, requires_grad=True)
    loss = reptile_ext.distillation_loss(leaf * 1, leaf.detach(), torch.full((3,), -100), inplace=True)
    loss.backward()
    assert loss.item() == 0.0
    # `leaf * 1` passes the gradient on as it is.
    assert (leaf.grad == 0).all()


# ------------------------------------------------------------------------------------------------ 6. determinism


@every_dtype
@every_divergence
@pytest.mark.parametrize(
    ("rows", "vocab_size"),
    [(3, 40_001), (300, 1000), (5000, 33), (50_000, 2)],  # from many tasks a row down to a few tasks in all
    ids=str,
)
def test_same_bits_in_every_run_and_with_any_number_of_threads(
    each_set: str, rows: int, vocab_size: int, dtype: torch.dtype, divergence: str
) -> None:
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    labels = make_labels(rows, vocab_size)
    weight = torch.rand(rows)
    keywords = {"weight": weight, "hard_weight": 0.5, "temperature": 2.0, **keywords_of(divergence)}
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(reptile_ext.distillation_loss, student, teacher, labels, **keywords))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_dtype
@every_divergence
def test_a_row_has_the_same_bits_alone_and_in_company(each_set: str, dtype: torch.dtype, divergence: str) -> None:
    student, teacher = make_logits("late_peak", 40, 1500, dtype)
    labels, keywords = torch.arange(40), keywords_of(divergence)
    loss, gradient = rows_of(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        alone = rows_of(reptile_ext.distillation_loss, student[one], teacher[one], labels[one], **keywords)
        assert torch.equal(alone[0][0], loss[row])
        assert torch.equal(alone[1][0], gradient[row])


# -------------------------------------------------------------------------------------------------- 8. memory

MEASURE = """
import sys, torch, reptile_ext
from reptile_ext.options import DIVERGENCES

class Head(torch.autograd.Function):  # a model that costs nothing: logits from x, and a gradient that is looked at only
    @staticmethod
    def forward(ctx, x, rows):
        return torch.full((rows, 32_000), 0.5, dtype=torch.{dtype})

    @staticmethod
    def backward(ctx, gradient):
        return gradient[0, 0].float(), None

def step(rows, divergence):
    logits, teacher = (Head.apply(torch.ones((), requires_grad=True), rows) for _ in range(2))
    if not {teacher_learns}:
        teacher = teacher.detach()
    labels = torch.zeros(rows, dtype=torch.long)
    reptile_ext.release_scratch()
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is what is there now
    before = status("VmHWM")
    keywords = dict(divergence=divergence, temperature=2.0, hard_weight=1.0, inplace={inplace}, reduction="{reduction}")
    reptile_ext.distillation_loss(logits, teacher, labels, **keywords).mul(3.0).sum().backward()
    return (status("VmHWM") - before) / logits.numel()

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

torch.set_num_threads(2)
for divergence in {divergences}:
    step(8, divergence)  # what is loaded or grown once
    print(step(1000, divergence))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux tells it")
@pytest.mark.parametrize(
    ("inplace", "teacher_learns", "reduction", "dtype"),
    [
        # Both 16-bit dtypes with row factors, where a product with float32 may promote; float32 needs a look only.
        *itertools.product((True, False), (False,), ("mean", "none"), ("bfloat16", "float16")),
        (True, False, "none", "float32"),
        # Both gradients, and nothing besides.
        *itertools.product((False,), (True,), ("mean", "none"), ("bfloat16", "float16")),
    ],
)
def test_nothing_of_the_logits_size_is_allocated(
    inplace: bool, teacher_learns: bool, reduction: str, dtype: str
) -> None:
    """The process's peak memory, in bytes a logit: in place nothing, else the gradient and nothing besides."""
    of = {"inplace": inplace, "teacher_learns": teacher_learns, "reduction": reduction, "dtype": dtype}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(divergences=repr(DIVERGENCES), **of)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    gradient = 0.0 if inplace else (1 + teacher_learns) * torch.finfo(getattr(torch, dtype)).bits / 8
    found = dict(zip(DIVERGENCES, map(float, result.stdout.split()), strict=True))
    assert all(gradient - 0.2 < bytes_a_logit < gradient + 0.2 for bytes_a_logit in found.values()), found


# ------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("student_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=name_of)
def test_results_are_float32_or_float64(backend: Any, teacher_dtype: torch.dtype, student_dtype: torch.dtype) -> None:
    """And what is in them is not a rounded 16-bit number: 1 − 2^-12 of it would be."""
    student, teacher = make_logits("random", 3, 50, student_dtype)
    teacher = teacher.to(teacher_dtype)
    loss, gradient = run(backend, student, teacher)
    assert loss.dtype == arithmetic_of(student, teacher)
    assert gradient.dtype == student_dtype
    assert loss.double() != loss.bfloat16().double()


def test_a_16_bit_logit_is_widened_before_anything_is_done_to_it(each_set: str) -> None:
    """The loss of bfloat16 logits is, bit for bit, the loss of the same numbers in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher = make_logits("random", 4, 1500, dtype)
        found = reptile_ext.distillation_loss(student, teacher, temperature=2.0)
        wide = reptile_ext.distillation_loss(student.float(), teacher.float(), temperature=2.0)
        torch.testing.assert_close(found, wide, rtol=3e-7, atol=0)


def test_every_16_bit_number_is_read_right(each_set: str) -> None:
    """All 65,536 bit patterns of both formats through the kernel, subnormals too, each against a class at 0."""
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        student = torch.stack([z, torch.zeros_like(z)], -1)
        teacher = torch.zeros_like(student)
        loss, gradient = rows_of(reptile_ext.distillation_loss, student, teacher)
        wide, wide_gradient = rows_of(exact, student.double(), teacher)
        broken = z.isnan() | (z == INF)
        assert torch.equal(loss.isnan(), broken)
        assert torch.equal(gradient.isnan().any(-1), broken)
        masked = z == -INF
        assert (loss[masked] == INF).all()
        good = ~(broken | masked) & (z.abs().float() < 2e38)  # times log2 e beyond that is not a float32 any more
        torch.testing.assert_close(loss[good].double(), wide[good], rtol=1e-6, atol=4e-7)
        torch.testing.assert_close(gradient[good].double(), wide_gradient[good], rtol=torch.finfo(dtype).eps, atol=2e-7)


def test_check_accepts_every_set_on_extreme_temperatures() -> None:
    student, teacher = make_logits("random", 5, 700)
    for temperature in (0.01, 100.0, (0.05, 20.0)):
        check(student, teacher, sets=INSTRUCTION_SETS, temperature=temperature)
