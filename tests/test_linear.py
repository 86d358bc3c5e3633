"""The fused linear loss equals distillation_loss on logits in full, and never has them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, every_divergence, keywords_of, make_labels, name_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reptile_ext
from reptile_ext import linear, linear_distillation_loss, reference
from reptile_ext.linear import gradients as linear_gradients
from reptile_ext.linear import loop, plan, rows, scratch
from reptile_ext.linear import loss as linear_loss
from reptile_ext.linear.loop import LinearConfig, run, run_chunks
from reptile_ext.linear.loss import TENSORS, LinearLoss
from reptile_ext.options import make_options

SIX = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "student_bias", "teacher_bias")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# What a loss may be asked for, in chunks of one, some and all rows.
KEYWORDS: list[dict[str, Any]] = [
    {},
    {"temperature": (2.0, 0.5), "reduction": "sum", "memory_budget": 1},
    {"reduction": "none", "temperature": 3.0, "memory_budget": 4000},
    {"hard_weight": 0.7, "label_smoothing": 0.1, "reduction": "none"},
    {"hard_weight": 0.7, "denominator": 5.0, "memory_budget": 3000},
    {"denominator": torch.tensor(5.0), "student_scale": 0.7, "teacher_scale": -1.5, "memory_budget": 3000},
    {"student_softcap": 2.0, "teacher_softcap": 5.0, "student_scale": 3.0, "memory_budget": 3000},
    {"student_softcap": 2.0, "hard_weight": 0.5, "reduction": "none", "memory_budget": 3000},
]
every_keywords = pytest.mark.parametrize("keywords", KEYWORDS, ids=str)


def make_case(
    dtype: torch.dtype = torch.float64,
    rows: int = 23,
    classes: int = 40,
    sizes: tuple[int, int] = (6, 9),
    teacher_classes: int | None = None,
    bias: bool = True,
) -> dict[str, Tensor]:
    case = {}
    for side, size, n in (("student", sizes[0], classes), ("teacher", sizes[1], teacher_classes or classes)):
        case[f"{side}_hidden"] = torch.randn(rows, size).to(dtype)
        case[f"{side}_weight"] = (2 * torch.randn(n, size) / size**0.5).to(dtype)
        if bias:
            case[f"{side}_bias"] = torch.randn(n).to(dtype)
    return case


def gradients(
    loss: Any, case: dict[str, Tensor], wanted: list[str], grad_output: Tensor | None = None, **keywords: Any
):
    """Loss, and gradients of the tensors of those names."""
    case = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in case.items()}
    result = loss(**case, **keywords)
    above = torch.ones_like(result) if grad_output is None else grad_output.to(result.dtype)
    return result.detach(), torch.autograd.grad(result, [case[name] for name in wanted], above)


def check(case: dict[str, Tensor], wanted: list[str], grad_output: Tensor | None = None, **keywords: Any) -> None:
    """Against the reference in float64; no worse than the reference in the case's own dtype, and a little."""
    found = gradients(linear_distillation_loss, case, wanted, grad_output, **keywords)
    plain = gradients(reference.linear_distillation_loss, case, wanted, grad_output, **keywords)
    right = gradients(
        reference.linear_distillation_loss, {k: x.double() for k, x in case.items()}, wanted, grad_output, **keywords
    )
    dtype = case["student_hidden"].dtype
    assert found[0].dtype == plain[0].dtype
    for name, ours, theirs, exact in zip(
        ["loss", *wanted], (found[0], *found[1]), (plain[0], *plain[1]), (right[0], *right[1]), strict=True
    ):
        if name != "loss":
            assert ours.dtype == dtype
            assert ours.shape == case[name].shape
        scale = exact.abs().max() + 1e-6
        # The logits are rounded to the dtype on both ways, not always at the same place.
        epsilon = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
        allowed = 1.5 * (theirs.double() - exact).abs().max() + epsilon * scale
        assert (ours.double() - exact).abs().max() <= allowed, name


@every_dtype
@every_divergence
@every_keywords
def test_it_is_the_loss_of_the_logits(keywords: dict[str, Any], divergence: str, dtype: torch.dtype) -> None:
    case = make_case(dtype)
    wanted = ["student_hidden", "student_weight", "student_bias"]
    labels, weight = make_labels(23, 40), torch.rand(23)
    weight[3] = 0
    grad_output = torch.rand(23) if keywords.get("reduction") == "none" else torch.tensor(1 / 3)
    check(case, wanted, grad_output, labels=labels, weight=weight, **keywords, **keywords_of(divergence))
    no_bias = {name: x for name, x in case.items() if "bias" not in name}
    check(no_bias, wanted[:2], labels=labels, **keywords, **keywords_of(divergence))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@every_keywords
def test_processors_without_products_of_16_bit_matrices(
    keywords: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are then in float32, in blocks: of whole matrices no float32 copy exists."""
    monkeypatch.setattr(linear.logits, "has_product", lambda dtype: False)
    monkeypatch.setattr(linear.logits, "BLOCK", 4)  # of 23 rows, 40 classes, and hidden states of 6 and 9
    case = make_case(dtype)
    labels = make_labels(23, 40)
    check(case, ["student_hidden", "student_weight", "student_bias"], labels=labels, **keywords)
    no_bias = {name: x for name, x in case.items() if "bias" not in name}
    check(no_bias, ["student_hidden", "student_weight"], labels=labels, **keywords)
    assert linear_distillation_loss(*list(no_bias.values())[:2] * 2) == 0  # equal models
    with Products() as mode:
        gradients(linear_distillation_loss, no_bias, ["student_hidden", "student_weight"], labels=labels, **keywords)
    assert mode.dtypes == {torch.float32}


@every_divergence
@every_keywords
def test_gradients_equal_finite_differences(keywords: dict[str, Any], divergence: str) -> None:
    """First and second derivatives, of all six tensors."""
    case = make_case(rows=3, classes=4, sizes=(2, 2))
    keywords = {"labels": torch.tensor([1, -100, 3]), **keywords, **keywords_of(divergence)}
    inputs = tuple(case[name].requires_grad_() for name in SIX)

    def f(*tensors: Tensor) -> Tensor:
        return linear_distillation_loss(**dict(zip(SIX, tensors, strict=True)), **keywords)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("wanted", [[name] for name in SIX] + [list(SIX)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_whoever_learns(wanted: list[str], reduction: str) -> None:
    """Each of the six alone, and all: hidden states with a frozen head (LoRA), a head with frozen hidden states, a
    teacher."""
    keywords = {"labels": make_labels(23, 40), "hard_weight": 0.5, "reduction": reduction, "memory_budget": 3000}
    for divergence in ("forward_kl", "jsd"):
        check(make_case(), wanted, **keywords, divergence=divergence)


def test_a_teacher_that_the_loss_does_not_look_at_has_gradient_zero() -> None:
    case = {name: x.requires_grad_(name.startswith("teacher")) for name, x in make_case().items()}
    wanted = [case["teacher_hidden"], case["teacher_weight"]]
    loss = linear_distillation_loss(**case, labels=make_labels(23, 40), soft_weight=0.0, hard_weight=1.0)
    for keywords in ({}, {"create_graph": True}):
        assert all((g == 0).all() for g in torch.autograd.grad(loss, wanted, retain_graph=True, **keywords))
    above = torch.ones(3, dtype=loss.dtype)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, wanted, above, is_grads_batched=True))


class Products(TorchDispatchMode):
    """Matrix products and their dtypes, and the bytes of the largest tensor that any operation made, as far as memory
    that `given` tensors have is not counted."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.count, self.largest = 0, 0
        self.dtypes: set[torch.dtype] = set()
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.count += 1
            self.dtypes.add(args[0].dtype)
        storages = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *(x.nbytes() for x in storages if x.data_ptr() not in self.given), 0)
        return result


STUDENT = ("student_hidden", "student_weight")


@pytest.mark.parametrize(
    ("wanted", "soft_weight", "products"),
    [
        *((STUDENT, 1.0, 4), (("student_hidden",), 1.0, 3), (("student_weight",), 1.0, 3), ((), 1.0, 2)),
        *((STUDENT, 0.0, 3), ((), 0.0, 1), (("teacher_weight",), 0.0, 2)),  # the teacher is unused
    ],
    ids=str,
)
def test_bug_15_what_is_frozen_costs_no_product(wanted: tuple[str, ...], soft_weight: float, products: int) -> None:
    case = {name: x.requires_grad_(name in wanted) for name, x in make_case(torch.float32, bias=False).items()}
    keywords = {"labels": make_labels(23, 40), "soft_weight": soft_weight, "hard_weight": 1.0}
    with Products() as mode:
        loss = linear_distillation_loss(**case, **keywords)
        if loss.requires_grad:
            loss.backward()
    assert mode.count == products
    right = reference.linear_distillation_loss(**case, **keywords)
    torch.testing.assert_close(loss, right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_are_two_products(mode: Any) -> None:
    """Whatever requires a gradient."""
    case = {name: x.requires_grad_() for name, x in make_case(torch.float32, bias=False).items()}
    with Products() as products, mode():
        loss = linear_distillation_loss(**case)
    assert products.count == 2
    assert not loss.requires_grad


def test_no_tensor_of_all_logits_exists() -> None:
    case = make_case(torch.float32, rows=600, classes=3000, sizes=(8, 8))
    keywords = {"labels": make_labels(600, 3000), "hard_weight": 0.5, "memory_budget": 1 << 20}
    wanted = ["student_hidden", "student_weight", "student_bias"]
    linear.release_scratch()
    with Products() as mode:
        gradients(linear_distillation_loss, case, wanted, **keywords)
    assert mode.largest <= 1 << 20
    with Products() as mode:
        gradients(reference.linear_distillation_loss, case, wanted, **{**keywords, "memory_budget": None})
    assert mode.largest >= 600 * 3000 * 4  # so the test can fail


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(
    "keywords", [{}, {"teacher_scale": 0.5}, {"teacher_softcap": 3.0, "teacher_scale": 0.5}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_teachers_logits_are_not_copied(dtype: torch.dtype, keywords: dict[str, Any], learns: bool) -> None:
    """With ignored rows, and with rows that no matrix has: the positions but the last of each sequence."""
    case = make_case(torch.float32, rows=4 * 75, classes=3000, sizes=(8, 8))
    hidden, head = case["student_hidden"].view(4, 75, 8).to(dtype), case["student_weight"].to(dtype)
    logits = torch.randn(4, 76, 3100).to(dtype).requires_grad_(learns)
    labels = make_labels(4 * 75, 3000).view(4, 75)
    assert (labels == -100).any()
    found = []
    for loss, budget in (
        (linear_distillation_loss, {"memory_budget": 1 << 19}),
        (reference.linear_distillation_loss, {}),
    ):
        x = hidden.clone().requires_grad_()
        with Products(logits) as mode:
            value = loss(x, head, logits[:, :-1], None, labels, hard_weight=0.5, vocab="truncate", **keywords, **budget)
            if not learns:
                assert mode.largest <= 1 << 19 or loss is not linear_distillation_loss
        found.append((value, *torch.autograd.grad(value, [x, *[logits] * learns])))
    assert mode.largest >= 4 * 75 * 3000 * dtype.itemsize  # so the test can fail
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 1e-3}
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_lies_between_rows_of_logits_is_zero(dtype: torch.dtype) -> None:
    """bfloat16 products of oneDNN with AMX read it: a NaN there, from an earlier call, came into rows' gradients."""
    linear.release_scratch()
    memory = scratch.Scratch(1 << 20, torch.device("cpu"))
    memory.bytes.fill_(0xFF)  # NaN in every dtype
    for count, size in ((5, 37), (3, 64), (17, 1000)):
        cut = memory.cut(count, size, dtype)
        whole = cut.as_strided((count, cut.stride(0)), cut.stride())
        assert cut.isnan().all()
        assert not whole[:, size:].any()
        assert whole.shape[1] * dtype.itemsize % 128 == 0
    memory.bytes.fill_(0xFF)
    memory.give_back()  # to the next call
    case = make_case(dtype, rows=60, classes=1000, sizes=(8, 8))
    loss, found = gradients(linear_distillation_loss, case, list(case), memory_budget=20 * 1024 * 4)
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in found)


MEASURE = """
import sys, torch, reptile_ext

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def extra(rows, hidden, classes, dtype, learns, has_product=None, **keywords):
    if has_product is not None:
        reptile_ext.linear.logits.has_product = lambda dtype: has_product
    x, y = (torch.randn(rows, hidden).to(dtype).requires_grad_(learns and i == 0) for i in range(2))
    head, teachers = (torch.randn(classes, hidden).to(dtype).requires_grad_(learns and i == 0) for i in range(2))
    reptile_ext.linear_distillation_loss(x[:8], head, y[:8], teachers)  # what is loaded or grown once
    with torch.no_grad():  # and what the products' library keeps of its own: MKL 0.6 MB more on a Xeon with AMX
        z = x[:512] @ head.t()
        z @ head, z.t() @ x[:512]
        del z
    reptile_ext.linear.release_scratch()
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is what is there now
    before = status("VmHWM")
    loss = reptile_ext.linear_distillation_loss(x, head, y, teachers, temperature=2.0, **keywords)
    if learns:
        loss.backward()
    return status("VmHWM") - before

torch.set_num_threads(2)
print(extra{case})
"""


def extra_bytes(case: str) -> int:
    """Peak memory of a call; in a process of its own, as what another has freed would be used again, and not seen."""
    command = [sys.executable, "-c", MEASURE.format(case=case)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


reads_peak_memory = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux tells it"
)


@reads_peak_memory
@pytest.mark.parametrize(
    ("case", "of_head", "logits"),
    [
        ("(2048, 512, 32_000, torch.bfloat16, True)", 512 * 32_000 * 2, 33e6),
        # As on a processor without products of 16-bit matrices, whatever this one has.
        ("(2048, 512, 32_000, torch.float16, True, False)", 512 * 32_000 * 2, 33e6),
        ("(2048, 512, 32_000, torch.float32, True)", 512 * 32_000 * 4, 66e6),
    ],
    ids=["bfloat16", "float16 without products", "float32"],
)
def test_peak_memory(case: str, of_head: int, logits: float) -> None:
    """In bytes: 128 MB beside the head's gradient."""
    assert logits < extra_bytes(case) - of_head < 128e6  # not less than the logits of 512 rows: something was measured


@reads_peak_memory
def test_peak_memory_without_gradients_is_the_same_for_any_number_of_rows() -> None:
    few, many = (extra_bytes(f"({rows}, 64, 8_000, torch.float32, False)") for rows in (2048, 16_384))
    assert abs(many - few) < 4e6 < few


@reads_peak_memory
def test_peak_memory_with_softcaps() -> None:
    """dW and its sum beside a budget of 100 MB, and what products take."""
    keywords = "student_softcap=9.0, teacher_softcap=9.0, memory_budget=100_000_000"
    assert 50e6 < extra_bytes(f"(1100, 64, 64_000, torch.bfloat16, True, {keywords})") - 64 * 64_000 * (2 + 4) < 135e6


def test_chunks() -> None:
    assert plan.split(0, 1000, 100) == [slice(i, i + 100) for i in range(0, 1000, 100)]
    assert [s.stop - s.start for s in plan.split(0, 1300, 512)] == [433, 433, 434]  # equal but for a row
    assert plan.split(7, 10, 512) == [slice(7, 10)]
    assert plan.split(0, 0, 512) == []
    assert plan.split(0, 0, 512, 128) == []
    for num_rows, most, step in itertools.product((1, 127, 128, 2047, 5000, 8192, 10_001), (128, 512, 2048), (1, 128)):
        parts = plan.split(3, 3 + num_rows, most, step)
        assert (parts[0].start, parts[-1].stop) == (3, 3 + num_rows)
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
        sizes = [part.stop - part.start for part in parts]
        assert len(sizes) == -(-num_rows // most)  # no more than have to be
        assert max(sizes) <= most
        assert min(sizes) > max(sizes) - 2 * step
        assert all(size % step == 0 for size in sizes[:-1])

    for logits in itertools.product((4, 128_000, 2_000_000), (0, 4, 128_000, 2_000_000)):
        for copies, alike, budget in itertools.product(
            (0, 8, 1_000_000), (False, True), (None, 1, 10_000, 10**7, 2**40)
        ):
            *rows, at_once, step = plan.chunk_sizes(logits, copies, alike, budget, torch.device("cpu"))
            assert min(*rows, at_once, step) == 1
            assert rows[0] == rows[1] or not alike
            most = plan.DEFAULT_BUDGET if budget is None else budget
            for_copies = most // 4 if copies else 0
            assert at_once * copies <= max(for_copies, copies)
            fits = rows[0] * logits[0] + rows[1] * logits[1] <= most - for_copies
            if budget is None and not alike:
                assert rows[0] == 512
                assert fits or rows[1] == 256
            elif budget is not None:
                assert fits or rows[0] == 1


@pytest.mark.parametrize("memory", [24 << 30, 80 << 30, 141 * 10**9, 192 << 30])
def test_chunks_of_a_gpu(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 rows or more, of whole tiles and the same of both models; a budget that was asked for is kept."""
    monkeypatch.setattr(plan, "memory_of", lambda device: memory)
    gpu = torch.device("cuda")
    for logits, copies in itertools.product((2_000, 100_514, 256_512, 524_288), (0, 1_000_000)):
        both = (logits, logits)
        student, teacher, at_once, step = plan.chunk_sizes(both, copies, True, None, gpu)
        assert student == teacher >= 2048
        assert student % step == 0 == step % 128
        assert 2 * student * logits <= max(memory // 128, 2 * 2048 * logits)
        assert at_once >= 1
        for budget in (1, 10**6, 10**9):
            student, teacher, at_once, step = plan.chunk_sizes(both, copies, True, budget, gpu)
            assert student == teacher >= 1
            assert student % step == 0
            for_copies = budget // 4 if copies else 0
            assert 2 * student * logits <= max(budget - for_copies, 2 * logits)
            assert at_once * copies <= max(for_copies, copies)
    for num_rows in (1, 512, 2049, 4097, 5731, 8192, 100_000):
        sizes = plan.chunk_sizes((256_512, 256_512), 0, True, None, gpu)
        chunks = [chunk.stop - chunk.start for chunk in plan.plan(num_rows, sizes, True).student_chunks]
        assert min(chunks) >= min(num_rows, 512)


def test_chunks_of_student_and_teacher_need_not_end_together() -> None:
    """917 rows of the teacher's logits for 512 of the student's."""
    case = make_case(torch.float64, rows=1300, classes=11_000, sizes=(3, 2))
    assert plan.chunk_sizes((88_000, 88_000), 0, False, None, torch.device("cpu"))[:2] == (512, 917)
    keywords = {"labels": make_labels(1300, 11_000), "hard_weight": 0.5, "temperature": 2.0}
    wanted = [name for name in SIX if name.startswith("student")]
    found = gradients(linear_distillation_loss, case, wanted, **keywords)
    right = gradients(reference.linear_distillation_loss, case, wanted, **keywords)
    torch.testing.assert_close(found, right)


def test_the_scratch_of_a_call_is_another_ones_after_it() -> None:
    """Calls in threads and in inference mode, one after the other and at once."""
    cases = [make_case(dtype, rows=40 + 30 * i, classes=500) for dtype in DTYPES for i in range(2)]
    wanted = ["student_hidden", "student_weight"]

    def step(case: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return gradients(linear_distillation_loss, case, wanted, memory_budget=100_000)[1]

    linear.release_scratch()
    with torch.inference_mode():
        linear_distillation_loss(**cases[0])  # makes the scratch that the others find
    right = [step(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(step, cases * 20)):
            assert all(torch.equal(a, b) for a, b in zip(found, right[i % len(cases)], strict=True))
    assert sum(x.numel() for x in scratch._kept) <= plan.DEFAULT_BUDGET
    linear.release_scratch()
    assert scratch._kept == []


@pytest.mark.parametrize(
    ("dtype", "rows", "size", "classes"),
    [
        *((torch.bfloat16, 777, 512, 1024), (torch.bfloat16, 2049, 512, 1024), (torch.bfloat16, 700, 2000, 33)),
        *((torch.float32, 1025, 2000, 33), (torch.float32, 514, 2000, 7), (torch.float64, 514, 2000, 300)),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 60_000], ids=["default", "small"])
def test_zero_is_zero(dtype: torch.dtype, rows: int, size: int, classes: int, budget: int | None) -> None:
    """Equal models: their products are of the same rows, and so rounded in the same way."""
    x, head = torch.randn(rows, size).to(dtype), (3 * torch.randn(classes, size) / size**0.5).to(dtype)
    student = [x.clone().requires_grad_(), head.clone().requires_grad_()]
    for keywords in (
        {},
        {"student_softcap": 3.0, "teacher_softcap": 3.0},
        {"student_scale": 0.3, "teacher_scale": 0.3},
    ):
        loss = linear_distillation_loss(*student, x, head, memory_budget=budget, **keywords)
        assert loss == 0.0
        assert all((g == 0.0).all() for g in torch.autograd.grad(loss, student))


def test_what_is_out_is_not_looked_at_where_it_is_computed() -> None:
    """As on a GPU, where ignored rows are not taken away."""
    case = make_case(torch.float32)
    labels = make_labels(23, 40)
    assert (labels == -100).any()
    for name in ("student_hidden", "teacher_hidden"):
        case[name][labels == -100] = torch.nan
    options = make_options(temperature=2.0, hard_weight=0.5, reduction="sum")._replace(scale=0.2)
    config = LinearConfig(options, 3000, (3.0, None), (1.0, 0.5))
    tensors, constants, needed = tuple(case[name] for name in TENSORS), (labels, None, None), (True,) * 6
    grad_output = torch.tensor(1.0, dtype=torch.float64)
    found = run_chunks(config, config.sources(tensors), constants, grad_output, needed, labels == -100)
    right = run(config, tensors, constants, grad_output, needed)
    torch.testing.assert_close(found, right)
    # And derivatives of derivatives, which have logits in full.
    wanted = [name for name in SIX if name.startswith("student")]
    keywords = {"labels": labels, "hard_weight": 0.5}
    for loss in (linear_distillation_loss, reference.linear_distillation_loss):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in case.items()}
        inputs = [leaves[name] for name in wanted]
        first = torch.autograd.grad(loss(**leaves, **keywords), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        assert all(g.isfinite().all() for g in (*first, *second))


def test_what_changes_before_the_backward_pass() -> None:
    """Gradients that are there already stay right; those that are not cannot be computed any more."""
    case, wanted = make_case(torch.float32), ["student_hidden", "student_weight"]
    labels = make_labels(23, 40)
    right = gradients(linear_distillation_loss, case, wanted, labels=labels, hard_weight=0.5)[1]
    for reduction in ("mean", "none"):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in case.items()}
        changing = labels.clone()
        loss = linear_distillation_loss(**leaves, labels=changing, hard_weight=0.5, reduction=reduction).sum() * 2
        changing.fill_(-100)
        leaves["teacher_weight"].lerp_(torch.ones(()), 0.1)  # a teacher that follows its student
        if reduction == "mean":
            loss.backward()
            torch.testing.assert_close([leaves[name].grad / 2 for name in wanted], list(right))
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_forward_mode_without_gradients() -> None:
    case = make_case(torch.float32, bias=False)
    x, direction = case.pop("student_hidden"), torch.randn(23, 6)

    def f(x: Tensor) -> Tensor:
        return linear_distillation_loss(x, **case)

    right = torch.func.jvp(f, (x,), (direction,))
    with torch.no_grad():
        found = torch.func.jvp(f, (x,), (direction,))
    assert right[1] != 0
    torch.testing.assert_close(found, right)
    assert found[1].dtype == torch.float32


def test_fakes_and_tensors_without_memory() -> None:
    """Memory estimators run programs on them; what is kept between calls is not theirs, nor theirs ours."""
    case, right = make_case(torch.float32, sizes=(6, 6)), []
    keywords: dict[str, Any] = {"labels": make_labels(23, 40), "weight": torch.rand(23)}
    for _ in range(2):
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(x).requires_grad_() for name, x in case.items()}
            rows = {name: mode.from_tensor(x) for name, x in keywords.items()}
            linear_distillation_loss(**fakes, **rows).backward()
            assert fakes["student_weight"].grad.shape == (40, 6)
            linear_distillation_loss(
                *(fakes[f"student_{name}"].detach() for name in ("hidden", "weight")),
                *(fakes[f"teacher_{name}"].detach() for name in ("hidden", "weight")),
            )
        right.append(linear_distillation_loss(**case, **keywords))
    assert torch.equal(*right)
    meta = {name: x.to("meta").requires_grad_() for name, x in case.items()}
    linear_distillation_loss(**meta).backward()
    assert meta["student_weight"].grad.shape == (40, 6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_traced_for_any_number_of_rows() -> None:
    torch.compiler.reset()
    head, teachers = (
        torch.randn(40, 6).t().contiguous().t().requires_grad_(),
        torch.randn(40, 6),
    )  # columns lie together
    criterion = reptile_ext.LinearDistillationLoss(temperature=2.0, student_scale=0.5, student_softcap=3.0)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return criterion(x, head, y, teachers)

    torch.manual_seed(1)
    inputs = [(torch.randn(n, 6).requires_grad_(), torch.randn(n, 6)) for n in (5, 8, 11, 13, 17, 19, 23, 29, 31, 37)]
    for dynamic in (None, True):
        compiled = torch.compile(f, fullgraph=True, backend="inductor", dynamic=dynamic)
        for x, y in inputs:  # more than may be compiled anew
            found = [torch.autograd.grad(loss(x, y), [x, head]) for loss in (compiled, f)]
            torch.testing.assert_close(*found)
    rows = torch.export.Dim("rows", min=2)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, head: Tensor) -> Tensor:
            return criterion(x, head, y, teachers)

    exported = torch.export.export(Model(), (*inputs[0], head), dynamic_shapes=({0: rows}, {0: rows}, None))
    for x, y in inputs[:3]:
        torch.testing.assert_close(exported.module()(x, y, head), f(x, y))


def test_bug_2_all_leading_dimensions_are_rows() -> None:
    """[B, T, H]: chunks of tokens, not of sequences."""
    case = make_case(rows=24)
    labels = make_labels(24, 40)
    flat = gradients(linear_distillation_loss, case, ["student_hidden"], labels=labels, hard_weight=0.5)
    shaped = {name: x.reshape(2, 12, -1) if "hidden" in name else x for name, x in case.items()}
    keywords = {"labels": labels.view(2, 12), "hard_weight": 0.5, "memory_budget": 2000}
    found = gradients(linear_distillation_loss, shaped, ["student_hidden"], **keywords)
    torch.testing.assert_close(found[0], flat[0])
    torch.testing.assert_close(found[1][0].reshape(24, -1), flat[1][0])
    none = linear_distillation_loss(**shaped, reduction="none")
    assert none.shape == (2, 12)
    for transposed in ({k: x.transpose(0, 1) if "hidden" in k else x for k, x in shaped.items()},):
        torch.testing.assert_close(linear_distillation_loss(**transposed, reduction="none"), none.t())


@pytest.mark.parametrize(("classes", "teacher_classes"), [(40, 33), (33, 40)])
def test_bug_17_vocabularies_that_differ(classes: int, teacher_classes: int) -> None:
    case = make_case(classes=classes, teacher_classes=teacher_classes)
    wanted = ["student_hidden", "student_weight", "student_bias"]
    keywords = {"vocab": "truncate", "labels": make_labels(23, 33), "hard_weight": 0.5, "memory_budget": 3000}
    check(case, wanted, **keywords)
    _, (_, of_head, of_bias) = gradients(linear_distillation_loss, case, wanted, **keywords)
    assert (of_head[33:] == 0).all()
    assert (of_bias[33:] == 0).all()
    check(case, ["teacher_weight", "teacher_bias"], **keywords)


def test_bug_3_the_same_model_with_more_classes_is_at_a_distance_of_0() -> None:
    """Not padded with logits of 0."""
    case = make_case(sizes=(6, 6))
    for part in ("hidden", "weight", "bias"):
        case[f"teacher_{part}"] = case[f"student_{part}"]
    case["student_weight"], case["student_bias"] = case["student_weight"][:30], case["student_bias"][:30]
    loss, found = gradients(linear_distillation_loss, case, ["student_hidden", "student_weight"], vocab="truncate")
    assert loss == 0
    assert all((g == 0).all() for g in found)


def test_bug_14_a_head_in_16_bits_is_added_up_in_32() -> None:
    """256 chunks: their sum in bfloat16 would lose most of what comes late."""
    case = make_case(torch.bfloat16, rows=256, classes=16, bias=False)
    (one,) = gradients(linear_distillation_loss, case, ["student_weight"])[1]
    (many,) = gradients(linear_distillation_loss, case, ["student_weight"], memory_budget=1)[1]
    exact = {name: x.double() for name, x in case.items()}
    (right,) = gradients(reference.linear_distillation_loss, exact, ["student_weight"])[1]
    scale = right.abs().max()
    assert (many.double() - right).abs().max() <= (one.double() - right).abs().max() + 0.004 * scale


def test_bug_12_the_switch_does_not_change_the_objective() -> None:
    """T², weights, softcap and labels are what they are with logits in full: no default of its own."""
    case = make_case()
    labels = make_labels(23, 40)
    keywords = {"temperature": 3.0, "hard_weight": 0.3, "soft_weight": 0.7, "label_smoothing": 0.1}
    logits = [
        torch.nn.functional.linear(*(case[f"{side}_{part}"] for part in ("hidden", "weight", "bias")))
        for side in ("student", "teacher")
    ]
    right = reptile_ext.distillation_loss(*logits, labels, **keywords)
    torch.testing.assert_close(linear_distillation_loss(**case, labels=labels, **keywords), right)
    capped = [5 * (z / 5).tanh() for z in logits]
    right = reptile_ext.distillation_loss(*capped, labels, **keywords)
    found = linear_distillation_loss(**case, labels=labels, student_softcap=5, teacher_softcap=5.0, **keywords)
    torch.testing.assert_close(found, right)


def test_a_teacher_given_as_logits() -> None:
    case = make_case()
    logits = torch.nn.functional.linear(*(case.pop(f"teacher_{part}") for part in ("hidden", "weight", "bias")))
    for keywords in ({}, {"teacher_scale": 0.5, "teacher_softcap": 3.0, "memory_budget": 3000}):
        given = {**case, "teacher_hidden": logits}
        for wanted in (["student_hidden"], ["teacher_hidden"]):
            check_without = {"teacher_weight": None, **keywords}
            found = gradients(linear_distillation_loss, given, wanted, **check_without)
            right = gradients(reference.linear_distillation_loss, given, wanted, **check_without)
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad_output", [float("nan"), float("inf"), 1.0])
def test_ignored_rows(grad_output: float, reduction: str) -> None:
    """Neither their hidden states nor grad_output reaches anybody."""
    case = make_case()
    labels, weight = make_labels(23, 40).clamp_min(0), torch.rand(23) + 0.5
    labels[4], weight[7] = -100, 0
    for name in ("student_hidden", "teacher_hidden"):
        case[name][4], case[name][7] = float("nan"), float("inf")
    keywords = {"labels": labels, "weight": weight, "reduction": reduction, "memory_budget": 3000}
    above = torch.full((23,) if reduction == "none" else (), grad_output)
    loss, (of_hidden, of_head) = gradients(
        linear_distillation_loss, case, ["student_hidden", "student_weight"], above, **keywords
    )
    assert loss.isfinite().all()
    assert (of_hidden[[4, 7]] == 0).all()
    if grad_output == 1:
        assert of_hidden.isfinite().all()
        assert of_head.isfinite().all()
    others = [i for i in range(23) if i not in (4, 7)]
    left = {name: x[others] if "hidden" in name else x for name, x in case.items()}
    keywords |= {"labels": labels[others], "weight": weight[others]}
    right = linear_distillation_loss(**left, **keywords)
    torch.testing.assert_close(loss[others] if reduction == "none" else loss, right)


def test_no_rows() -> None:
    wanted = ["student_hidden", "student_weight", "student_bias"]
    for case, labels in (
        (make_case(), torch.full((23,), -100)),
        (make_case(rows=0), torch.zeros(0, dtype=torch.int64)),
    ):
        for reduction in ("mean", "sum", "none"):
            keywords = {"labels": labels, "hard_weight": 0.5, "reduction": reduction}
            loss, found = gradients(linear_distillation_loss, case, wanted, **keywords)
            assert (loss == 0).all()
            assert all((g == 0).all() for g in found)


def test_tied_weights() -> None:
    """A head that is the embedding too gets the sum of both gradients."""
    case = make_case(bias=False, sizes=(6, 6))
    tokens = torch.randint(40, (23,))
    found = []
    for loss in (linear_distillation_loss, reference.linear_distillation_loss):
        shared = case["student_weight"].clone().requires_grad_()
        keywords = {**case, "student_weight": shared, "student_hidden": shared[tokens].tanh()}
        loss(**keywords).backward()
        found.append(shared.grad)
    torch.testing.assert_close(*found)


def test_a_second_backward_and_accumulation() -> None:
    case = make_case()
    head = case["student_weight"].requires_grad_()
    loss = linear_distillation_loss(**case) / 3
    (first,) = torch.autograd.grad(loss, head, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, head)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first)
    for _ in range(2):
        (linear_distillation_loss(**case) / 3).backward()
    torch.testing.assert_close(head.grad, 2 * first)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    case = make_case(torch.float32, bias=False)
    wanted = ["student_hidden", "student_weight"]

    def logits_first(**tensors: Tensor) -> Tensor:
        logits = (
            torch.nn.functional.linear(tensors[f"{s}_hidden"], tensors[f"{s}_weight"]) for s in ("student", "teacher")
        )
        return reptile_ext.distillation_loss(*logits)

    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(linear_distillation_loss, case, wanted)
        right = gradients(logits_first, case, wanted)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, right, rtol=0.02, atol=1e-3)
    case = {name: x.half() if "hidden" in name else x for name, x in case.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(linear_distillation_loss, case, wanted)
        right = gradients(logits_first, case, wanted)
    torch.testing.assert_close(found, right, rtol=0.02, atol=1e-3)


def test_dtypes_of_the_two_sides_may_differ() -> None:
    for student in DTYPES:
        for teacher in DTYPES:
            case = {k: x.to(student if "student" in k else teacher) for k, x in make_case().items()}
            wanted = ["student_hidden", "student_weight", "student_bias"]
            found = gradients(linear_distillation_loss, case, wanted, memory_budget=3000)
            right = gradients(reference.linear_distillation_loss, case, wanted)
            assert found[0].dtype == right[0].dtype
            low = torch.bfloat16 in (student, teacher) or torch.float16 in (student, teacher)
            tolerance = {"rtol": 0.03, "atol": 0.003} if low else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(found, right, **tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@every_keywords
def test_traced_transformed_and_checkpointed(keywords: dict[str, Any]) -> None:
    torch.compiler.reset()
    case = make_case()
    keywords = {**keywords, "labels": make_labels(23, 40)}
    names = ["student_hidden", "student_weight"]
    fixed = {name: x for name, x in case.items() if name not in names}

    def f(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_distillation_loss(student_hidden=hidden, student_weight=head, **fixed, **keywords).sum()

    inputs = [case[name].requires_grad_() for name in names]
    loss = f(*inputs)
    right = torch.autograd.grad(loss, inputs)
    compiled = torch.compile(f, backend="inductor", fullgraph=True)(*inputs)
    checkpointed = checkpoint(f, *inputs, use_reentrant=False)
    for other in (compiled, checkpointed):
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(torch.autograd.grad(other, inputs), right)
    torch.testing.assert_close(torch.func.grad(f, (0, 1))(*(x.detach() for x in inputs)), right)


def operator_arguments(needed: str = "110000", **keywords: Any) -> tuple[Any, ...]:
    """As _apply calls it in a traced program."""
    case = make_case(torch.float32, rows=5, classes=8)
    reduction = "none" if keywords.get("none") else "sum"
    options = make_options(temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction=reduction)
    config = LinearConfig(options._replace(scale=0.2), 500, (3.0, None), (1.0, 0.5), keywords.get("num_rows_in"))
    tensors = [case[name].requires_grad_(need == "1") for name, need in zip(TENSORS, needed, strict=True)]
    if keywords.get("transposed"):
        tensors[:2] = [x.detach().t().contiguous().t().requires_grad_(x.requires_grad) for x in tensors[:2]]
    constants = (make_labels(5, 8), None, None)
    now = LinearLoss.gradients_at_once(config, tensors[0], [need == "1" for need in needed])
    return linear_loss.operator_arguments(config, tuple(tensors), constants, None, now)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize(
    "sample",
    [{}, {"needed": "111111"}, {"none": True}, {"needed": "000000"}, {"transposed": True}, {"num_rows_in": 5}],
    ids=str,
)
def test_opcheck(sample: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.reptile_ext.linear_distillation_loss, operator_arguments(**sample))


def test_no_traced_program_has_all_logits() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, head: Tensor, teacher: Tensor, teachers_head: Tensor) -> Tensor:
            return linear_distillation_loss(hidden, head, teacher, teachers_head, memory_budget=1 << 20)

    case = make_case(torch.float32, rows=600, classes=3000, sizes=(8, 8), bias=False)
    inputs = tuple(case.values())
    exported = torch.export.export(Module(), inputs).module()
    for x in inputs[:2]:
        x.requires_grad_()
    with Products() as mode:
        exported(*inputs).backward()
    assert mode.largest <= 1 << 19
    right = gradients(linear_distillation_loss, case, ["student_hidden", "student_weight"])[1]
    torch.testing.assert_close([x.grad for x in inputs[:2]], list(right))


def test_the_module_is_the_function() -> None:
    case = make_case()
    keywords = {"temperature": 2.0, "hard_weight": 0.5, "student_softcap": 3.0}
    module = reptile_ext.LinearDistillationLoss(**keywords)
    labels = make_labels(23, 40)
    assert torch.equal(module(**case, labels=labels), linear_distillation_loss(**case, labels=labels, **keywords))
    assert "temperature=2.0" in repr(module)
    for wrong, message in (({"student_softcap": 0}, "student_softcap"), ({"memory_budget": -1}, "memory_budget")):
        with pytest.raises(ValueError, match=message):
            reptile_ext.LinearDistillationLoss(**wrong)


@contextmanager
def refuses(kind: type[Exception], words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert words in str(caught.value), str(caught.value)


def test_dead_classes_stay_0_whatever_grad_output_is() -> None:
    case = make_case(torch.float32, classes=40, teacher_classes=33)
    wanted = ["student_weight", "student_bias"]
    above = torch.tensor(torch.nan)
    found = gradients(linear_distillation_loss, case, wanted, above, vocab="truncate")[1]
    assert all((g[33:] == 0).all() and g[:33].isnan().all() for g in found)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": None}, TypeError, "student_hidden must be a torch.Tensor; got NoneType"),
    ({"student_weight": None}, TypeError, "student_weight must be a torch.Tensor, the head"),
    (
        {"student_weight": torch.randn(40, 6).double().to_sparse()},
        TypeError,
        "student_weight must be a dense tensor; got",
    ),
    ({"student_softcap": 1e39}, ValueError, "student_softcap must be a positive number or None; got 1e+39"),
    (
        {"student_hidden": torch.zeros(23, 0).double()},
        ValueError,
        "student_hidden needs at least one feature; got shape [23, 0]",
    ),
    (
        {"labels": torch.tensor([-100] * 22 + [1]), "weight": torch.tensor([torch.nan] * 22 + [1.0])},
        ValueError,
        "weight must be finite and not negative; got nan",
    ),
    ({"teacher_hidden": "x"}, TypeError, "teacher_hidden must be a torch.Tensor; got str"),
    ({"student_hidden": torch.ones(23, 6, dtype=torch.int64)}, TypeError, "student_hidden must be float32,"),
    ({"student_hidden": torch.ones(23, 6)}, TypeError, "student_weight must have the dtype of student_hidden,"),
    ({"student_weight": torch.ones(40, 5).double()}, ValueError, "student_weight must be [classes, 6], as student_hi"),
    ({"student_weight": torch.ones(40).double()}, ValueError, "got [40]"),
    ({"student_weight": torch.ones(0, 6).double(), "student_bias": None}, ValueError, "needs at least one class"),
    ({"teacher_bias": torch.ones(3).double()}, ValueError, "teacher_bias must be [40]; got [3]"),
    ({"teacher_weight": None}, ValueError, "teacher_bias has no meaning where teacher_weight=None"),
    (
        {"teacher_weight": None, "teacher_bias": None},
        ValueError,
        "teacher_weight has 9 classes and student_weight has 40",
    ),
    (
        {"teacher_hidden": torch.ones(22, 9).double()},
        ValueError,
        "teacher_hidden must have the shape of student_hidden",
    ),
    ({"teacher_hidden": torch.ones(23, 9, device="meta").double()}, ValueError, "on the device of student_hidden, cpu"),
    ({"student_softcap": -1.0}, ValueError, "student_softcap must be a positive number or None; got -1.0"),
    ({"teacher_softcap": "30"}, TypeError, "teacher_softcap must be a positive number or None; got str"),
    ({"student_scale": 0.0}, ValueError, "student_scale must be a finite number that is not 0; got 0.0"),
    ({"teacher_scale": np.ones(2)}, TypeError, "teacher_scale must be a finite number that is not 0"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be a positive number of bytes; got 0"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget must be an integer; got float"),
    (
        {"labels": torch.zeros(22, dtype=torch.int64)},
        ValueError,
        "labels must have the shape of student_hidden without",
    ),
    ({"labels": torch.full((23,), 40)}, ValueError, "labels must lie in [0, 40)"),
    ({"hard_weight": 1.0}, ValueError, "labels are needed for hard_weight=1.0"),
    ({"weight": -torch.ones(23)}, ValueError, "weight must be finite and not negative"),
    ({"divergence": "kl"}, ValueError, "divergence must be one of"),
    ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
    ({"denominator": 0.0}, ValueError, "denominator must be a positive, finite number"),
    ({"num_rows_in": 20.0}, TypeError, "num_rows_in must be an integer; got float"),
    ({"num_rows_in": True}, TypeError, "num_rows_in must be an integer; got bool"),
    ({"num_rows_in": torch.tensor(20)}, TypeError, "num_rows_in must be an integer; got Tensor"),
    ({"num_rows_in": -1}, ValueError, "num_rows_in must be a number of this call's rows, 0 to 23; got -1"),
    ({"num_rows_in": 24}, ValueError, "0 to 23; got 24: a count of several micro-batches or processes goes in as deno"),
    ({"num_rows_in": 22}, ValueError, "num_rows_in must be at least the number of rows that are not ignored (by labe"),
    ({"num_rows_in": 2, "weight": torch.tensor([1.0] * 3 + [0.0] * 20)}, ValueError, "a weight of 0), 3; got 2"),
    ({"num_rows_in": 1, "labels": torch.tensor([-100] * 21 + [1] * 2)}, ValueError, "a weight of 0), 2; got 1"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), BAD, ids=[str(list(b[0])) + b[2][:30] for b in BAD])
def test_bad_input(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    with refuses(kind, words):
        linear_distillation_loss(**{**make_case(), **wrong})


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.data())
def test_any_combination(data: st.DataObject) -> None:
    """Of sizes, budgets, options, ignored rows and trainable models; in float64, where rounding hides nothing."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    rows, classes, others = draw(st.integers(0, 40)), draw(st.integers(1, 30)), draw(st.integers(1, 30))
    sizes = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    case = make_case(torch.float64, rows, classes, sizes, others, bias=draw(st.booleans()))
    if draw(st.booleans()):  # a teacher's logits, of positions but the last
        case = {name: x for name, x in case.items() if not name.startswith("teacher")}
        leading = (2, rows // 2) if rows % 2 == 0 else (rows, 1)
        case["teacher_hidden"] = torch.randn(leading[0], leading[1] + 1, others, dtype=torch.float64)[:, :-1]
        case["student_hidden"] = case["student_hidden"].view(*leading, sizes[0])
        case["teacher_weight"] = None
    leading = case["student_hidden"].shape[:-1]
    keywords: dict[str, Any] = {"vocab": "truncate", "reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    keywords["divergence"] = draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd", "tvd", "mse", "dkd"]))
    keywords["soft_weight"] = draw(st.sampled_from([1.0, 0.3, 0.0]))
    if keywords["divergence"] == "dkd" or draw(st.booleans()):
        keywords["labels"] = torch.randint(min(classes, others), leading)
        keywords["labels"][torch.rand(leading) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
        keywords["hard_weight"] = draw(st.sampled_from([0.0, 0.7]))
    if draw(st.booleans()):
        keywords["weight"] = torch.rand(leading).double() * (torch.rand(leading) < 0.7)
    for side in ("student", "teacher"):
        keywords[f"{side}_softcap"] = draw(st.sampled_from([None, 2.0]))
        keywords[f"{side}_scale"] = draw(st.sampled_from([1.0, -0.5]))
    budget = draw(st.sampled_from([None, 1, 500, 2000, 10_000]))
    learning = [name for name, x in case.items() if x is not None and draw(st.booleans())]
    found = []
    for loss, more in ((linear_distillation_loss, {"memory_budget": budget}), (reference.linear_distillation_loss, {})):
        leaves = {k: x if x is None else x.detach().clone() for k, x in case.items()}
        if case["teacher_weight"] is None:  # a clone would be a matrix
            leaves["teacher_hidden"] = case["teacher_hidden"].detach()
        inputs = [leaves[name].requires_grad_() for name in learning]
        value = loss(**leaves, **keywords, **more)
        above = torch.arange(1.0, 1.0 + value.numel(), dtype=value.dtype).view(value.shape)
        if value.requires_grad:
            of_inputs = torch.autograd.grad(value, inputs, above, allow_unused=True, materialize_grads=True)
        else:  # the reference, of an unused teacher
            of_inputs = tuple(map(torch.zeros_like, inputs))
        found.append((value.detach(), *of_inputs))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------- as a GPU is asked to do


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that a GPU gets, on the CPU: the host reads no value of labels or weights."""
    for module in (rows, loop):
        monkeypatch.setattr(module, "can_look", lambda x: False)


class Shapes(TorchDispatchMode):
    """The results of products: their shapes and strides; and everything that asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[list[int], tuple[int, ...], torch.dtype]] = []
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append((list(result.shape), result.stride(), result.dtype))
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.asked.append(func.name())
        return result


def ignored_by(labels: bool, weight: bool) -> tuple[dict[str, Tensor], int]:
    """Labels and weights of 23 rows, and how many rows they leave."""
    of_rows = {}
    counted = torch.ones(23, dtype=torch.bool)
    if labels:
        of_rows["labels"] = torch.randint(40, (23,))
        of_rows["labels"][[0, 5, 6, 22]] = -100
        counted &= of_rows["labels"] != -100
    if weight:
        of_rows["weight"] = torch.rand(23) + 0.5
        of_rows["weight"][[1, 5, 20]] = 0
        counted &= of_rows["weight"] != 0
    return of_rows, int(counted.sum())


@pytest.mark.usefixtures("unseen")
@every_dtype
@every_keywords
@pytest.mark.parametrize("beyond", [0, 2])
def test_ignored_rows_are_left_out_where_their_number_is_known(
    keywords: dict[str, Any], dtype: torch.dtype, beyond: int
) -> None:
    """Where fewer rows count than was said, the rest are ignored ones, whatever is in them."""
    for labels, weight in ((True, True), (True, False), (False, True)):
        if not labels and "hard_weight" in keywords:
            continue
        of_rows, count = ignored_by(labels, weight)
        counted = reference.counted_rows(of_rows.get("labels"), of_rows.get("weight"), -100)
        assert counted is not None
        # Of other hidden sizes, torch's bfloat16 products with AMX carry a NaN from row to row (docs/design.md).
        case = make_case(dtype, sizes=(32, 64))
        wanted = ["student_hidden", "student_weight", "student_bias"]
        above = torch.rand(23) if keywords.get("reduction") == "none" else torch.tensor(1 / 3)
        check(case, wanted, above, num_rows_in=count + beyond, **of_rows, **keywords)
        case["student_hidden"][~counted], case["teacher_hidden"][~counted] = torch.nan, torch.inf
        everything = {**of_rows, **keywords, "memory_budget": None}
        right = gradients(linear_distillation_loss, case, wanted, above, **everything)
        with Shapes() as mode:
            found = gradients(linear_distillation_loss, case, wanted, above, num_rows_in=count + beyond, **everything)
        assert {shape[0] for shape, *_ in mode.products} == {count + beyond, 40}  # rows, and classes of dW
        assert mode.asked == []
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)
        assert (found[1][0][~counted] == 0).all()


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("few", [0, 1, 16])
def test_rows_are_not_lost_unseen(few: int, reduction: str, dtype: torch.dtype) -> None:
    """Too small a number makes everything NaN, whoever learns; where one can look, it is an error."""
    of_rows, count = ignored_by(True, True)
    assert count == 17
    for keywords in ({}, {"student_softcap": 3.0, "memory_budget": 500}, {"divergence": "jsd"}, {"hard_weight": 0.5}):
        call = {**of_rows, "reduction": reduction, "num_rows_in": few, **keywords}
        loss, found = gradients(linear_distillation_loss, make_case(dtype), list(SIX), **call)
        assert loss.isnan().all()
        counted = (of_rows["labels"] != -100) & (of_rows["weight"] != 0)
        for name, gradient in zip(SIX, found, strict=True):
            assert gradient[counted if "hidden" in name else slice(None)].isnan().all(), name
        given = {**make_case(dtype), "teacher_hidden": torch.randn(23, 40).to(dtype)}
        given = {name: x for name, x in given.items() if name not in ("teacher_weight", "teacher_bias")}
        loss, found = gradients(
            linear_distillation_loss, given, ["student_weight", "student_hidden"], teacher_weight=None, **call
        )
        assert loss.isnan().all()
        assert found[0].isnan().all()


def test_too_few_rows_in_is_an_error_where_one_can_look(monkeypatch: pytest.MonkeyPatch) -> None:
    of_rows, count = ignored_by(True, True)
    case = make_case()
    right = linear_distillation_loss(**case, **of_rows)
    for enough in (count, count + 1, 23):
        assert torch.equal(linear_distillation_loss(**case, **of_rows, num_rows_in=enough), right)
        torch.testing.assert_close(reference.linear_distillation_loss(**case, **of_rows, num_rows_in=enough), right)
    assert linear_distillation_loss(**case, num_rows_in=23) == linear_distillation_loss(**case)
    criterion = reptile_ext.LinearDistillationLoss()
    assert torch.equal(criterion(**case, **of_rows, num_rows_in=count), right)
    for loss in (linear_distillation_loss, reference.linear_distillation_loss, criterion):
        with pytest.raises(ValueError, match=f"num_rows_in must be at least .*, {count}; got {count - 1}"):
            loss(**case, **of_rows, num_rows_in=count - 1)
    # A device without kernels, which has the reference.
    monkeypatch.setattr(reference, "_has_values_at_hand", lambda x: False)
    for enough in (count - 1, count):
        value, found = gradients(
            reference.linear_distillation_loss, case, ["student_weight"], **of_rows, num_rows_in=enough
        )
        assert value.isnan() == found[0].isnan().all() == (enough < count)


@pytest.mark.usefixtures("unseen")
def test_whoever_learns_of_the_rows_that_are_left() -> None:
    of_rows, count = ignored_by(True, True)
    for reduction, divergence in itertools.product(("mean", "none"), ("forward_kl", "jsd")):
        keywords = {"reduction": reduction, "divergence": divergence, "memory_budget": 3000, "num_rows_in": count + 1}
        for wanted in ([*SIX], ["teacher_hidden"], ["student_weight"], ["student_hidden"]):
            check(make_case(), wanted, **of_rows, **keywords)
    # A teacher's logits, rows of which no matrix has, and its gradient.
    case = make_case()
    hidden, logits = case["student_hidden"][:22].view(2, 11, 6), torch.randn(2, 12, 40, dtype=torch.float64)
    shaped = {name: x[:22].view(2, 11) for name, x in of_rows.items()}
    count = int(((shaped["labels"] != -100) & (shaped["weight"] != 0)).sum())
    found = []
    for loss in (linear_distillation_loss, reference.linear_distillation_loss):
        x, z = hidden.clone().requires_grad_(), logits.clone().requires_grad_()
        value = loss(x, case["student_weight"], z[:, :-1], None, **shaped, teacher_softcap=2.0, num_rows_in=count + 1)
        found.append((value, *torch.autograd.grad(value, [x, z])))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("unseen")
def test_derivatives_of_derivatives_of_the_rows_that_are_left() -> None:
    labels = torch.tensor([1, -100, 3])
    case = make_case(rows=3, classes=4, sizes=(2, 2))
    inputs = tuple(case[name].requires_grad_() for name in SIX)

    def f(*tensors: Tensor) -> Tensor:
        return linear_distillation_loss(**dict(zip(SIX, tensors, strict=True)), labels=labels, num_rows_in=2)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_num_rows_in_in_traced_and_transformed_programs() -> None:
    """The number may differ from step to step, and is read where the program runs."""
    torch.compiler.reset()
    case = make_case(torch.float32, bias=False)
    head, teachers = case["student_weight"].requires_grad_(), case["teacher_weight"]
    x, y = case["student_hidden"].requires_grad_(), case["teacher_hidden"]

    def f(labels: Tensor, num_rows_in: int) -> Tensor:
        return linear_distillation_loss(x, head, y, teachers, labels, num_rows_in=num_rows_in)

    for dynamic in (None, True):
        compiled = torch.compile(f, fullgraph=True, backend="inductor", dynamic=dynamic)
        for ignored in (3, 4, 7, 23):
            labels = torch.randint(40, (23,))
            labels[:ignored] = -100
            found, right = (torch.autograd.grad(g(labels, 23 - ignored), [x, head]) for g in (compiled, f))
            torch.testing.assert_close(found, right)
        with pytest.raises(Exception, match=r"num_rows_in must be at least .*, 23; got 22"):
            compiled(torch.zeros(23, dtype=torch.int64), 22)

    def of_any_size(x: Tensor, y: Tensor, labels: Tensor, num_rows_in: int) -> Tensor:
        return linear_distillation_loss(x, head, y, teachers, labels, num_rows_in=num_rows_in)

    compiled = torch.compile(of_any_size, fullgraph=True, backend="inductor", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows, number in ((23, 20), (17, 17), (31, 2)):
            some = torch.randn(num_rows, 6), torch.randn(num_rows, 9), torch.randint(40, (num_rows,))
            some[2][number:] = -100
            found, right = (torch.autograd.grad(g(*some, number), head)[0] for g in (compiled, of_any_size))
            torch.testing.assert_close(found, right)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
            return linear_distillation_loss(x, head, y, teachers, labels, num_rows_in=20)

    labels = torch.randint(40, (23,))
    labels[:3] = -100
    exported = torch.export.export(Model(), (x.detach(), head.detach(), labels)).module()
    torch.testing.assert_close(exported(x.detach(), head.detach(), labels), f(labels, 20))
    # Each of a batch has its own rows; the number is of the one that has most.
    many = torch.randint(40, (4, 23))
    many[0, :3], many[1, :5] = -100, -100
    found = torch.func.vmap(lambda labels: f(labels, 23))(many)
    torch.testing.assert_close(found, torch.stack([f(labels, 23) for labels in many]))
    with pytest.raises(ValueError, match="23; got 20"):
        torch.func.vmap(lambda labels: f(labels, 20))(many)


def on_meta(num_rows: int, size: int, classes: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """The six tensors, without values: as a GPU's are to the host."""
    shapes = ((num_rows, size), (classes, size))
    x, head, y, teachers = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes * 2)
    return x, head, None, y, teachers, None


@pytest.mark.parametrize("num_rows_in", [None, 0, 5000])
def test_bug_13_a_gpu_is_not_asked(num_rows_in: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: whatever waits for one is an error."""
    monkeypatch.setattr(plan, "memory_of", lambda device: 141 * 10**9)
    options = make_options(reduction="sum", hard_weight=0.5)
    labels, weight = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty(8192, device="meta").double()
    for softcap, needed in itertools.product((None, 3.0), ((True,) * 2 + (False,) * 4, (True, True, False) * 2)):
        config = LinearConfig(options, None, (softcap, softcap), (1.0, 0.5), num_rows_in)
        tensors = on_meta(8192, 64, 1001, torch.bfloat16)
        grad_output = torch.empty((), dtype=torch.float64, device="meta")
        with Shapes() as mode:
            run(config, tensors, (labels, weight, None), grad_output, needed)
        assert mode.asked == []
    with pytest.raises(Exception, match="meta"), Shapes():  # so the test can fail
        labels.nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("classes", [1, 7, 33, 251])
def test_rows_of_odd_vocabularies_begin_at_cache_lines(classes: int, dtype: torch.dtype) -> None:
    """What lies between them is nobody's: here it is NaN, and stays what it is."""
    linear.release_scratch()
    case = make_case(dtype, classes=classes, bias=False)
    labels = make_labels(23, classes)
    wanted = ["student_hidden", "student_weight"]
    keywords = {"labels": labels, "hard_weight": 0.5, "memory_budget": 4096}
    scratch._kept.append(torch.full((1 << 20,), 255, dtype=torch.uint8))  # NaN in every dtype
    with Shapes() as mode:
        found = gradients(linear_distillation_loss, case, wanted, **keywords)
    assert found[0].isfinite()
    assert all(g.isfinite().all() for g in found[1])
    logits = [stride for shape, stride, kind in mode.products if shape[1] == classes and kind == dtype]
    assert len(logits) >= 2 * linear.logits.has_product(dtype)
    assert all(stride[0] * dtype.itemsize % 128 == 0 for stride in logits)
    check(case, wanted, **keywords)
    linear.release_scratch()


class Made(TorchDispatchMode):
    """Bytes of the memory that operations allocated for tensors of so many elements at least, by their dtype."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.bytes = least, dict.fromkeys((*DTYPES, torch.uint8), 0)
        self.known: dict[int, Tensor] = {}  # by storage; kept, so that no other gets its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.known.setdefault(x.untyped_storage()._cdata, x)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                self.known[x.untyped_storage()._cdata] = x
                if x.numel() >= self.least:
                    self.bytes[x.dtype] += x.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(("chunks", "sums"), [(1, 0), (4, 0), (5, 1), (9, 1)])
def test_a_few_chunks_add_up_a_heads_gradient_where_it_stays(
    chunks: int, sums: int, dtype: torch.dtype, device: str
) -> None:
    """One tensor of its size and dtype, and a float32 sum from the fifth chunk on. Nothing else: no copy, no cast."""
    size, classes = 60, 2000
    rows_of_chunk, num_rows = 128, 128 * chunks
    config = LinearConfig(make_options(reduction="sum"), 2 * rows_of_chunk * 4096, (None, None), (1.0, 1.0))
    if device == "cpu" and not linear.logits.has_product(dtype):
        pytest.skip("this processor multiplies in float32, in blocks")
    tensors = tuple(
        None if x is None else torch.randn(x.shape, device=device).to(dtype)
        for x in on_meta(num_rows, size, classes, dtype)
    )
    assert plan.chunk_sizes((4096, 4096), 0, True, config.memory_budget, torch.device(device))[:2] == (128, 128)
    linear.release_scratch()
    with Made(size * classes) as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_gradients, "CLASSES_OF_A_SUM", 500)
        run(config, tensors, (None, None, None), None, (False, True, False, False, False, False))
    assert mode.bytes[dtype] == size * classes * 2
    assert mode.bytes[torch.float32] == sums * size * classes * 4
    assert mode.bytes[torch.uint8] == 2 * rows_of_chunk * 4096  # the logits
    linear.release_scratch()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("chunks", [1, 2, 4, 5, 8, 23])
@pytest.mark.parametrize("classes", [40, 33])
def test_a_heads_gradient_of_any_number_of_chunks(chunks: int, classes: int, dtype: torch.dtype) -> None:
    """Its error is at most that of plain PyTorch and of the 1.6 roundings, half a unit of the last place each."""
    case = make_case(dtype, classes=classes, teacher_classes=33, bias=False)
    keywords = {"vocab": "truncate", "temperature": 2.0, "student_scale": 0.7, "reduction": "sum"}
    exact, plain, found = (
        gradients(loss, {k: x.to(kind) for k, x in case.items()}, ["student_weight"], **keywords, **more)[1][0].double()
        for loss, kind, more in (
            (reference.linear_distillation_loss, torch.float64, {}),
            (reference.linear_distillation_loss, dtype, {}),
            (linear_distillation_loss, dtype, {"memory_budget": 2 * 128 * -(-23 // chunks)}),
        )
    )
    norm = exact.norm()
    assert (found - exact).norm() <= (plain - exact).norm() + 1.6 * torch.finfo(dtype).eps / 2 * norm
    assert (found[33:] == 0).all()


def test_extra_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 × 4,096 × 128,256 on an H200: dW, dX and the logits of a chunk, in 16 bits, and next to nothing else."""
    monkeypatch.setattr(plan, "memory_of", lambda device: 141 * 10**9)
    config = LinearConfig(make_options(reduction="sum"), None, (None, None), (1.0, 1.0))
    tensors = on_meta(8192, 4096, 128_256, torch.bfloat16)
    with Made(1 << 20) as mode:
        run(config, tensors, (None, None, None), None, (True, True, False, False, False, False))
    of_head, of_hidden = 128_256 * 4096 * 2, 8192 * 4096 * 2
    assert mode.bytes[torch.bfloat16] == of_head + of_hidden
    assert mode.bytes[torch.float32] == 0
    assert mode.bytes[torch.uint8] == 2 * 2048 * 128_256 * 2
    assert sum(mode.bytes.values()) < 2.2e9


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("first", "last"), [(20, 23), (0, 1), (22, 23), (5, 5)])
def test_few_rows_that_are_not_ignored(first: int, last: int, dtype: torch.dtype) -> None:
    """The last turn of a conversation alone, one row, or none, whose loss is 0 and still has a graph."""
    labels = torch.full((23,), -100)
    labels[first:last] = torch.randint(40, (last - first,))
    case = make_case(dtype)
    for more in ({}, {"denominator": torch.tensor(0.0 if first == last else 3.0)}, {"reduction": "none"}):
        keywords = {"labels": labels, "hard_weight": 0.5, "memory_budget": 3000, **more}
        above = torch.ones(23) if more.get("reduction") == "none" else None
        wanted = ["student_hidden", "student_weight", "student_bias"]
        loss, found = gradients(linear_distillation_loss, case, wanted, above, num_rows_in=last - first, **keywords)
        if first == last:
            assert (loss == 0).all()
            assert all((g == 0).all() for g in found)
            continue
        assert all((g != 0).any() for g in found)
        check(case, wanted, above, num_rows_in=last - first, **keywords)


def test_a_chunk_beyond_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors without values: sizes, strides and offsets."""
    config = LinearConfig(make_options(reduction="sum"), 2**40, (None, None), (1.0, 1.0))
    with Shapes() as mode:
        run(config, on_meta(20_000, 8, 151_937, torch.bfloat16), (None,) * 3, None, (True, True) + (False,) * 4)
    assert [shape for shape, *_ in mode.products] == [[20_000, 151_937]] * 2 + [[20_000, 8], [151_937, 8]]
    assert mode.products[0][1] == (151_936 + 64, 1)
