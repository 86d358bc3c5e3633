"""Values and gradients of `distillation_loss` against the oracle, by the tolerance rule of oracle.py."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    INSTRUCTION_SETS,
    LAYOUTS,
    WRITTEN_OUT,
    assert_near,
    check,
    every_divergence,
    exact,
    keywords_of,
    labels_of,
    make_labels,
    make_logits,
    name_of,
    plain,
    run,
)

import reptile_ext
from reptile_ext import ops

# ------------------------------------------------------------------------------------ the oracle's own witnesses


@every_divergence
@pytest.mark.parametrize("kind", ["random", "flat", "near_equal"])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"temperature": 3.0},
        {"temperature": (2.0, 0.5), "temperature_scaling": "none"},
        {"hard_weight": 0.7, "soft_weight": 0.3, "label_smoothing": 0.2, "temperature": 2.0},
        {"reduction": "sum", "hard_weight": 1.0, "soft_weight": 0.0},
        {"reduction": "none", "hard_weight": 1.0},
        {"denominator": 11.0},
    ],
    ids=str,
)
def test_oracle_equals_pytorchs_own_losses(kind: str, keywords: dict, divergence: str) -> None:
    """The reference and F.kl_div / F.cross_entropy, both in float64, are written independently and must agree."""
    student, teacher = make_logits(kind, 9, 50, torch.float64)
    labels = make_labels(9, 50)
    keywords = {**keywords, **keywords_of(divergence)}
    grad_output = torch.randn(9) if keywords.get("reduction") == "none" else None
    found = run(exact, student, teacher, labels, grad_output=grad_output, **keywords)
    right = run(plain, student, teacher, labels, grad_output=grad_output, **keywords)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-13)  # F.kl_div cancels; near_equal's D is 1e-9


def test_oracle_equals_closed_forms() -> None:
    """Two classes: D = p log(p/q) + (1−p) log((1−p)/(1−q)), gradient q − p. One class: 0."""
    p, q = 0.8, 0.3
    student, teacher = torch.tensor([[math.log(q / (1 - q)), 0.0]]), torch.tensor([[math.log(p / (1 - p)), 0.0]])
    loss, gradient = run(exact, student.double(), teacher.double())
    assert loss.item() == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([q - p, p - q], rel=1e-6)
    loss, gradient = run(exact, torch.tensor([[3.0], [-9.0]]), torch.tensor([[1.0], [1e4]]))
    assert loss.item() == 0.0
    assert gradient.tolist() == [[0.0], [0.0]]


@every_divergence
def test_the_rule_rejects_a_loss_that_is_slightly_wrong(divergence: str) -> None:
    """By 1e-4 of the value, or of the gradient; 1e-2 of those whose terms are not written out."""
    factor = 1.0001 if divergence in WRITTEN_OUT else 1.01
    student, teacher = make_logits("random", 4, 1000)
    labels, keywords = labels_of(divergence, 4, 1000), keywords_of(divergence)
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    for wrong in ((loss * factor, gradient), (loss, gradient * factor)):
        with pytest.raises(AssertionError, match="our error"):
            assert_near({"": wrong}, student, teacher, labels, **keywords)
    assert_near({"": (loss, gradient)}, student, teacher, labels, **keywords)


# ----------------------------------------------------------------------------------------------- kinds and sizes

# 1, 2, 3: no full vector. 15, 16, 17: around one register. 1000: blocks of no vector's size, one maximum probe is too
# short. 32,003: odd and longer than a block. Larger ones: test_the_largest_vocabulary.
VOCAB_SIZES = ((1, 2, 3, 15, 16, 17), (1000,), (32_003,))
KINDS = ("random", "flat", "peaked", "near_equal", "late_peak", "rising")


def rows_for(vocab_size: int) -> int:
    return 7 if vocab_size <= 1000 else 2


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab_sizes", VOCAB_SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_soft_loss(kind: str, vocab_sizes: tuple[int, ...], dtype: torch.dtype, divergence: str) -> None:
    for vocab_size in vocab_sizes:
        rows = rows_for(vocab_size)
        student, teacher = make_logits(kind, rows, vocab_size, dtype)
        labels = labels_of(divergence, rows, vocab_size)
        check(student, teacher, labels, sets=INSTRUCTION_SETS, temperature=2.0, **keywords_of(divergence))


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_largest_vocabulary(dtype: torch.dtype, divergence: str) -> None:
    """262,144 classes, up to which the accuracy is promised, with all that may go wrong in one batch."""
    for kind in ("random", "flat", "near_equal", "peaked"):
        student, teacher = make_logits(kind, 1, 262_144, dtype)
        labels = labels_of(divergence, 1, 262_144)
        check(student, teacher, labels, sets=INSTRUCTION_SETS, temperature=2.0, **keywords_of(divergence))


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab_sizes", VOCAB_SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_soft_and_hard_loss(kind: str, vocab_sizes: tuple[int, ...], dtype: torch.dtype, divergence: str) -> None:
    """The cross entropy rides along, with an exponential of its own because T_s ≠ 1."""
    keywords = {"temperature": (2.0, 3.0), "hard_weight": 0.5, "soft_weight": 0.5, "label_smoothing": 0.1}
    for vocab_size in vocab_sizes:
        rows = rows_for(vocab_size)
        student, teacher = make_logits(kind, rows, vocab_size, dtype)
        labels = make_labels(rows, vocab_size)
        check(student, teacher, labels, sets=INSTRUCTION_SETS, **keywords, **keywords_of(divergence))


@every_divergence
@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), list(itertools.permutations(DTYPES, 2)), ids=name_of)
def test_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, divergence: str) -> None:
    for vocab_size in (3, 1000, 5000):
        student, _ = make_logits("random", 5, vocab_size, student_dtype)
        _, teacher = make_logits("random", 5, vocab_size, teacher_dtype)
        labels = make_labels(5, vocab_size)
        keywords = {"temperature": 2.0, "hard_weight": 0.5, **keywords_of(divergence)}
        check(student, teacher, labels, sets=INSTRUCTION_SETS, **keywords)


# ---------------------------------------------------------------------------------------------------- arguments

KEYWORDS = [
    {"temperature": 1.0, "hard_weight": 1.0},  # the cross entropy shares the soft exponentials
    {"temperature": 1.0, "hard_weight": 1.0, "label_smoothing": 0.3},
    {"temperature": (1.0, 4.0), "hard_weight": 1.0},
    {"temperature": (4.0, 1.0), "hard_weight": 1.0, "label_smoothing": 1.0},
    {"temperature": 0.25, "temperature_scaling": "none"},
    {"temperature": (0.5, 3.0), "temperature_scaling": "none", "soft_weight": 2.5},
    {"soft_weight": 0.0, "hard_weight": 2.0, "temperature": 3.0},  # the teacher counts for nothing
    {"soft_weight": 0.0, "hard_weight": 2.0, "label_smoothing": 0.1},
    {"soft_weight": 0.0},  # nothing counts
    {"hard_weight": 0.5, "ignore_index": 0},  # a label that is in range
    {"denominator": 5.0, "hard_weight": 0.5},
    {"denominator": 0.25},
    {"temperature": [2, 3]},  # a list, and integers
]


@every_divergence
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_keywords(keywords: dict, reduction: str, weighted: bool, divergence: str) -> None:
    if "denominator" in keywords and reduction == "none":
        keywords = {**keywords, "denominator": None}
    student, teacher = make_logits("random", (3, 4), 33)
    labels = make_labels((3, 4), 33)
    labels[0, 0] = 0
    if "ignore_index" in keywords:
        labels[labels == -100] = keywords["ignore_index"]
    keywords = {**keywords, "reduction": reduction, **keywords_of(divergence)}
    if weighted:
        keywords["weight"] = torch.rand(3, 4).round(decimals=1)
        keywords["weight"][0, 2] = 0.0
    if isinstance(keywords.get("temperature"), list):
        loss = reptile_ext.distillation_loss(student, teacher, labels, **keywords)
        keywords["temperature"] = tuple(keywords["temperature"])
        assert torch.equal(loss, reptile_ext.distillation_loss(student, teacher, labels, **keywords))
    for dtype in DTYPES:
        grad_output = torch.randn(3, 4) if reduction == "none" else None
        check(student.to(dtype), teacher.to(dtype), labels, grad_output=grad_output, **keywords)


def test_mean_is_the_weighted_mean_over_rows_that_count() -> None:
    """By hand: Σ w ℓ / Σ w without the ignored row and without the row of weight 0."""
    student, teacher = make_logits("random", 4, 10, torch.float64)
    rows = reptile_ext.distillation_loss(student, teacher, reduction="none")
    labels, weight = torch.tensor([1, -100, 2, 3]), torch.tensor([1.0, 7.0, 0.0, 3.0])
    loss = reptile_ext.distillation_loss(student, teacher, labels, weight=weight)
    assert loss.item() == pytest.approx((rows[0] + 3 * rows[3]).item() / 4, rel=1e-14)
    total = reptile_ext.distillation_loss(student, teacher, labels, weight=weight, reduction="sum")
    assert total.item() == pytest.approx((rows[0] + 3 * rows[3]).item(), rel=1e-14)
    each = reptile_ext.distillation_loss(student, teacher, labels, weight=weight, reduction="none")
    torch.testing.assert_close(each, torch.stack([rows[0], rows[0] * 0, rows[0] * 0, 3 * rows[3]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("denominator_dtype", [torch.int64, torch.float32, torch.float64], ids=name_of)
def test_a_tensor_denominator_is_its_number(dtype: torch.dtype, denominator_dtype: torch.dtype) -> None:
    student, teacher = make_logits("random", 6, 40, dtype)
    for reduction in ("mean", "sum"):
        number = run(reptile_ext.distillation_loss, student, teacher, denominator=13, reduction=reduction)
        tensor = run(
            reptile_ext.distillation_loss,
            student,
            teacher,
            denominator=torch.tensor(13, dtype=denominator_dtype),
            reduction=reduction,
        )
        torch.testing.assert_close(tensor, number, rtol=1e-6 if dtype != torch.bfloat16 else 2**-7, atol=1e-7)
        check(student, teacher, denominator=torch.tensor(13, dtype=denominator_dtype), reduction=reduction)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=name_of)
def test_labels_of_every_integer_dtype_and_stride(label_dtype: torch.dtype) -> None:
    student, teacher = make_logits("random", (4, 6), 12)
    labels = torch.randint(12, (4, 6))
    right = run(reptile_ext.distillation_loss, student, teacher, labels, hard_weight=1.0)
    for strided in (labels.to(label_dtype), labels.to(label_dtype).t().contiguous().t()):
        found = run(reptile_ext.distillation_loss, student, teacher, strided, hard_weight=1.0)
        assert torch.equal(found[0], right[0])
        assert torch.equal(found[1], right[1])


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("ours", "theirs"), [(40, 33), (33, 40), (5000, 4097), (17, 1)])
def test_truncated_vocabularies(ours: int, theirs: int, dtype: torch.dtype, divergence: str) -> None:
    """The shared classes, each side renormalised over them; the rest of the student gets a gradient of 0."""
    student, _ = make_logits("random", 5, ours, dtype)
    _, teacher = make_logits("random", 5, theirs, dtype)
    shared = min(ours, theirs)
    labels = make_labels(5, shared)
    keywords = {"temperature": 2.0, "hard_weight": 0.5, "label_smoothing": 0.1, **keywords_of(divergence)}
    check(student, teacher, labels, sets=INSTRUCTION_SETS, vocab="truncate", **keywords)
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, vocab="truncate", **keywords)
    cut = run(reptile_ext.distillation_loss, student[:, :shared], teacher[:, :shared], labels, **keywords)
    torch.testing.assert_close((loss, gradient[:, :shared]), cut)
    assert (gradient[:, shared:] == 0).all()


def test_truncate_along_another_dimension() -> None:
    student, teacher = torch.randn(3, 20, 4), torch.randn(3, 13, 4)
    check(student, teacher, make_labels((3, 4), 13), vocab="truncate", dim=1, hard_weight=1.0)


# ------------------------------------------------------------------------------------------------------ layouts

LAYOUT_PAIRS = [(name, name) for name in LAYOUTS] + [("contiguous", name) for name in list(LAYOUTS)[1:]]
LAYOUT_PAIRS += [(name, "contiguous") for name in list(LAYOUTS)[1:]]


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("student_layout", "teacher_layout"), LAYOUT_PAIRS)
def test_layouts(student_layout: str, teacher_layout: str, dtype: torch.dtype, divergence: str) -> None:
    for vocab_size in (1, 37, 1030):
        student, teacher = make_logits("random", (2, 3), vocab_size, dtype)
        student, teacher = LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher)
        labels = make_labels((2, 3), vocab_size)
        keywords = {"hard_weight": 0.5, "label_smoothing": 0.1, **keywords_of(divergence)}
        check(student, teacher, labels, sets=INSTRUCTION_SETS, **keywords)


@every_divergence
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_segmentation(dtype: torch.dtype, channels_last: bool, divergence: str) -> None:
    """[B, C, H, W] with dim=1 against F.kl_div and F.cross_entropy as segmentation programs call them."""
    student, teacher = make_logits("random", (2, 5, 6), 7, dtype)
    student, teacher = (z.movedim(-1, 1).contiguous() for z in (student, teacher))
    if channels_last:
        student = student.to(memory_format=torch.channels_last)
        teacher = teacher.to(memory_format=torch.channels_last)
    labels = make_labels((2, 5, 6), 7)
    keywords = {"dim": 1, "temperature": 2.0, **keywords_of(divergence)}
    check(student, teacher, labels, sets=INSTRUCTION_SETS, hard_weight=1.0, **keywords)
    check(student, teacher, labels, sets=INSTRUCTION_SETS, **keywords)
    loss = reptile_ext.distillation_loss(
        student.double(), teacher.double(), labels, dim=1, soft_weight=0.0, hard_weight=1.0
    )
    assert loss.item() == pytest.approx(F.cross_entropy(student.double(), labels).item(), rel=1e-12)


@every_divergence
@pytest.mark.parametrize("shape", [(6,), (6, 5), (4, 6, 5), (2, 3, 4, 5), (2, 1, 3, 1, 4), (1, 1), (3, 1)], ids=str)
def test_every_dim(shape: tuple[int, ...], divergence: str) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    for dim in range(-len(shape), len(shape)):
        leading = [n for d, n in enumerate(shape) if d != dim % len(shape)]
        keywords = {"dim": dim, **keywords_of(divergence)}
        labels = labels_of(divergence, tuple(leading), shape[dim])
        check(student, teacher, labels, reduction="none", grad_output=torch.randn(leading), **keywords)
        check(student, teacher, labels, weight=torch.rand(leading) + 0.1, **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_next_token_slice(dtype: torch.dtype) -> None:
    """logits[:, :-1] against labels[:, 1:]: a view with a gap between batches, not copied, gradient 0 in the gap."""
    whole_s, whole_t = make_logits("random", (3, 5), 101, dtype)
    tokens = torch.randint(101, (3, 5))
    whole_s.requires_grad_()
    loss = reptile_ext.distillation_loss(whole_s[:, :-1], whole_t[:, :-1], tokens[:, 1:], hard_weight=1.0)
    loss.backward()
    right = run(
        reptile_ext.distillation_loss,
        whole_s.detach()[:, :-1].contiguous(),
        whole_t[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        hard_weight=1.0,
    )
    assert torch.equal(loss.detach(), right[0])
    assert torch.equal(whole_s.grad[:, :-1], right[1])
    assert (whole_s.grad[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_no_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    student, teacher, labels = (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape, dtype=dtype),
        torch.zeros(shape[:-1]).long(),
    )
    for reduction in ("mean", "sum"):
        for denominator in (None, 3.0, torch.tensor(3)):
            loss, gradient = run(
                reptile_ext.distillation_loss,
                student,
                teacher,
                labels,
                hard_weight=1.0,
                reduction=reduction,
                denominator=denominator,
            )
            assert loss.item() == 0.0
            assert gradient.shape == shape
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, reduction="none")
    assert loss.shape == shape[:-1]
    assert gradient.shape == shape


def test_many_rows_in_many_chunks() -> None:
    """More rows than one task takes, with a third of them out and a layout in which no dimensions merge."""
    student, teacher = make_logits("random", (50, 70), 40)
    student, teacher = LAYOUTS["rows_transposed"](student), LAYOUTS["padded_rows"](teacher)
    labels = make_labels((50, 70), 40)
    check(student, teacher, labels, hard_weight=0.5, reduction="none", grad_output=torch.randn(50, 70))


# ------------------------------------------------------------------------------------------------------- in place


@every_divergence
@pytest.mark.parametrize(
    "layout", ["contiguous", "class_stride_2", "padded_rows", "misaligned", "class_first", "shifted"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inplace_equals_the_default_and_overwrites_the_logits(layout: str, dtype: torch.dtype, divergence: str) -> None:
    labels = make_labels((2, 3), 1030)
    keywords = {"temperature": 2.0, "hard_weight": 0.5, "label_smoothing": 0.1, **keywords_of(divergence)}
    for reduction in ("mean", "none"):
        student, teacher = make_logits("random", (2, 3), 1030, dtype)
        # In the same layout: lanes that go through memory in another order add up in another order.
        laid_out = LAYOUTS[layout](student)
        right = run(reptile_ext.distillation_loss, laid_out, teacher, labels, reduction=reduction, **keywords)
        leaf = student.clone().requires_grad_()
        logits = LAYOUTS[layout](leaf * 1)
        before = logits.detach().clone()
        loss = reptile_ext.distillation_loss(logits, teacher, labels, reduction=reduction, inplace=True, **keywords)
        assert torch.equal(loss.detach(), right[0])
        # float16 logits stay until the backward pass, where their gradient's scale is known.
        assert torch.equal(logits.detach(), before if dtype == torch.float16 else right[1])
        loss.sum().backward()
        assert torch.equal(leaf.grad, right[1])
        assert torch.equal(logits.detach(), right[1]), "the gradient lies where the logits were"


def test_inplace_needs_a_result_of_a_computation() -> None:
    leaf = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True overwrites student_logits, which is a leaf"):
        reptile_ext.distillation_loss(leaf, torch.randn(3, 5), inplace=True)


def test_inplace_without_a_gradient_leaves_the_logits_alone() -> None:
    student, teacher = make_logits("random", 3, 50)
    before = student.clone()
    loss = reptile_ext.distillation_loss(student, teacher, inplace=True)
    assert torch.equal(student, before)
    assert torch.equal(loss, reptile_ext.distillation_loss(student, teacher))
    leaf = student.requires_grad_()
    with torch.no_grad():
        assert torch.equal(loss, reptile_ext.distillation_loss(leaf, teacher, inplace=True))
    assert torch.equal(leaf.detach(), before)


def test_inplace_refuses_logits_that_share_memory() -> None:
    logits = (torch.randn(1, 5, requires_grad=True) * 1).expand(3, 5)
    with pytest.raises(ValueError, match="inplace=True needs student_logits whose elements do not share memory"):
        reptile_ext.distillation_loss(logits, torch.randn(3, 5), inplace=True)


def test_inplace_checks_before_it_writes() -> None:
    logits = torch.randn(3, 5, requires_grad=True) * 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="labels must lie in"):
        reptile_ext.distillation_loss(logits, torch.randn(3, 5), torch.tensor([0, 1, 5]), hard_weight=1.0, inplace=True)
    assert torch.equal(logits.detach(), before)


def test_inplace_and_a_teacher_that_learns_exclude_each_other() -> None:
    """Silence would be a teacher that does not learn."""
    student, teacher = make_logits("random", 3, 9)
    teacher.requires_grad_()
    logits = student.clone().requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=r"inplace=True.*teacher_logits"):
        reptile_ext.distillation_loss(logits, teacher, inplace=True)
    assert torch.equal(logits.detach(), before)


# ------------------------------------------------------------------------------------------------ instruction sets


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    """And the loss computed there is the loss that the same set computes here."""
    code = (
        "import torch, reptile_ext; from reptile_ext import ops; torch.manual_seed(5);"
        "loss = reptile_ext.distillation_loss(torch.randn(3, 999), torch.randn(3, 999));"
        "print(ops.instruction_set(), loss.item().hex())"
    )
    environment = {**os.environ, "REPTILE_EXT_CPU": name}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before = ops.instruction_set()
    try:
        ops.instruction_set(name)
        torch.manual_seed(5)
        loss = reptile_ext.distillation_loss(torch.randn(3, 999), torch.randn(3, 999)).item().hex()
    finally:
        ops.instruction_set(before)
    assert result.stdout.split() == [name, loss]


def test_an_unknown_instruction_set_is_named_and_changes_nothing() -> None:
    before = ops.instruction_set()
    words = re.escape(f"one of the instruction sets this processor can run ({', '.join(INSTRUCTION_SETS)}); got 'sse9'")
    with pytest.raises(ValueError, match=words):
        ops.instruction_set("sse9")
    assert ops.instruction_set() == before


@every_divergence
def test_sets_agree_with_one_another(divergence: str) -> None:
    """Within the accuracy promise, hence within twice the error of either."""
    student, teacher = make_logits("random", 4, 5003)
    labels, keywords = labels_of(divergence, 4, 5003), keywords_of(divergence)
    results = {}
    before = ops.instruction_set()
    try:
        for name in INSTRUCTION_SETS:
            ops.instruction_set(name)
            results[name] = run(reptile_ext.distillation_loss, student, teacher, labels, temperature=2.0, **keywords)
    finally:
        ops.instruction_set(before)
    for name in INSTRUCTION_SETS[1:]:
        torch.testing.assert_close(results[name], results["portable"], rtol=1e-5, atol=1e-9)
