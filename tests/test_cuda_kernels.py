"""The CUDA kernels and their operators against the oracle, every way to divide a row among threads: run on the CPU
(tests/cuda/host.h), where every access out of bounds and every barrier that is not reached by all is reported, and on a
GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import test_binary as binary
import test_halves as halves
import test_sparse as sparse
import torch
from oracle import (
    DTYPES,
    ZERO_AT_EQUALITY,
    check,
    every_divergence,
    keywords_of,
    make_labels,
    make_logits,
    name_of,
    run,
)
from test_halves import EVERYTHING, Operators
from torch import Tensor

import reptile_ext
from reptile_ext import linear, ops, reference
from reptile_ext.options import TAILS, make_binary_options, make_options, make_sparse_options

HERE = Path(__file__).parent / "cuda"
sys.path.insert(0, str(HERE))
budget = importlib.import_module("budget")
NAN, INF = float("nan"), float("inf")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="fibers and the loader as on Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="session")
def library(build_folder: Callable[[str], AbstractContextManager[Path]]) -> ctypes.CDLL:
    with build_folder("cuda_on_host") as out:
        if not (out / "on_host.so").exists():
            command = [str(HERE / "build.sh"), str(Path(torch.__file__).parent), str(out)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stderr, result.stderr
    torch.ops.load_library(str(out / "on_host.so"))
    found = ctypes.CDLL(str(out / "on_host.so"))
    found.reptile_ext_cuda_plan.restype = ctypes.c_char_p
    return found


def counts(library: ctypes.CDLL) -> list[int]:
    """Loads of 16 bytes, exponentials in float32, bytes that copies brought, and launches, since the last call."""
    numbers = (ctypes.c_int64 * 4)()
    library.reptile_ext_host_counts(numbers)
    return list(numbers)


Configure = Callable[..., None]


def on_gpu(x: Any) -> Any:
    """A tensor's whole storage on the GPU, and the same view of it: strides and distances from 16 bytes stay."""
    if not isinstance(x, Tensor) or not x.numel():
        return x.cuda() if isinstance(x, Tensor) else x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def by_gpu(name: str) -> Callable[..., Any]:
    """An operator that takes tensors on the CPU, runs on the GPU and brings everything back."""
    operator = getattr(torch.ops.reptile_ext, name).default

    def run_there(*arguments: Any) -> Any:
        moved = [on_gpu(x) for x in arguments]
        results = operator(*moved)
        if name.endswith("_"):
            arguments[0].copy_(moved[0])
        if isinstance(results, tuple):
            return tuple(x.cpu() for x in results)
        return results.cpu() if isinstance(results, Tensor) else results

    return run_there


OPERATORS = (
    *("distillation_loss", "distillation_loss_", "scale_gradient_"),
    *("binary_distillation_loss", "binary_distillation_loss_", "scale_elements_"),
    *("sparse_distillation_loss", "sparse_distillation_loss_"),
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or ops.cuda_missing is not None, reason="needs a GPU and the CUDA kernels"
)


@pytest.fixture(params=["host", pytest.param("gpu", marks=needs_gpu)])
def operators(request: pytest.FixtureRequest) -> Operators:
    """The operators of the CUDA kernels, for tensors on the CPU."""
    if request.param == "gpu":
        return by_gpu
    request.getfixturevalue("library")
    return lambda name: getattr(torch.ops.reptile_ext_on_host, name).default


@pytest.fixture
def configure(
    operators: Operators, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Configure]:
    """`reptile_ext.distillation_loss` on the CUDA kernels: on a device that the test describes, or as it is."""
    for name in OPERATORS:
        monkeypatch.setattr(ops, name, operators(name))
    if operators is by_gpu:
        yield lambda *_, **__: None
        return
    library = request.getfixturevalue("library")

    def set_device(multiprocessors: int = 3, clusters: bool = True, order: int = 0) -> None:
        library.reptile_ext_host(multiprocessors, int(clusters), order)

    set_device()
    yield set_device
    set_device()


# Rows, classes, clusters: each way to divide a row, with odd sizes, so that rows begin anywhere between 16 bytes.
SHAPES = {
    "a row a thread": (70, 10, True),
    "one class": (5, 1, True),
    "part of a warp": (40, 333, True),
    "a ring, a warp": (40, 777, True),
    "a ring, a block": (5, 3001, True),
    "a ring, a cluster": (5, 21_001, True),
    "a ring before sm_90": (5, 3001, False),
    "from memory": (2, 21_003, False),
}
every_shape = pytest.mark.parametrize(("rows", "vocab_size", "clusters"), SHAPES.values(), ids=SHAPES.keys())


def plan(
    library: ctypes.CDLL, rows: int, vocab_size: int, dtype: torch.dtype, clusters: bool, divergence: str = "forward_kl"
) -> tuple[Any, ...]:
    numbers = (ctypes.c_int64 * 10)()
    code = (torch.float32, torch.bfloat16, torch.float16, torch.float64).index(dtype)
    kind = tuple(reptile_ext._C.divergences()).index(divergence)
    name = library.reptile_ext_cuda_plan(
        ctypes.c_int64(rows), ctypes.c_int64(vocab_size), code, kind, 132, int(clusters), numbers
    )
    return (name.decode(), *numbers)


def test_the_plans_of_known_shapes(library: ctypes.CDLL) -> None:
    """Name, threads of a team in a block, blocks of a cluster, threads of a block, blocks; of a ring, pieces of a row
    and of a block, and rows under way; of 132 multiprocessors. And, at the end, how many pieces of an operand a block's
    ring has room for."""
    bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
    ring = "a ring, a row a "
    for (rows, vocab_size, dtype, clusters), expected in {
        (64, 10, f32, True): ("a row a thread", 1, 1, 256, 1),
        (8192, 300, bf16, True): ("a row part of a warp", 16, 1, 256, 264),
        (8192, 1000, bf16, True): (ring + "warp", 32, 1, 32, 2112, 125, 125, 2),
        (8192, 4096, bf16, True): (ring + "block", 128, 1, 128, 528, 512, 512, 3),
        (8192, 32_000, bf16, True): (ring + "cluster", 416, 2, 416, 132, 4000, 2000, 3),
        (8192, 50_257, bf16, True): (ring + "cluster", 320, 4, 320, 132, 6283, 1571, 4),
        (8192, 58_000, bf16, True): (ring + "cluster", 384, 4, 384, 132, 7250, 1813, 3),
        (8192, 128_256, bf16, True): (ring + "cluster", 416, 8, 416, 128, 16_032, 2004, 3),
        (8192, 151_936, bf16, True): (ring + "cluster", 480, 8, 480, 128, 18_992, 2374, 2),
        (8192, 163_000, bf16, True): (ring + "cluster", 512, 8, 512, 128, 20_375, 2547, 2),
        (8192, 256_000, bf16, True): (ring + "cluster", 512, 8, 512, 128, 32_000, 4000, 2),
        (8192, 300_000, bf16, True): (ring + "cluster", 480, 8, 480, 128, 37_500, 4688, 2),
        (8192, 500_000, bf16, True): ("a row a cluster", 512, 8, 512, 128),
        (8192, 32_000, f32, True): (ring + "cluster", 224, 4, 224, 132, 8000, 2000, 3),
        (8192, 16_000, bf16, False): (ring + "block", 416, 1, 416, 132, 2000, 2000, 2),
        (8192, 32_000, bf16, False): ("a row a block", 512, 1, 512, 132),
        (8192, 32_000, f64, True): ("a row a cluster", 256, 4, 256, 256),
        (8192, 32_000, f64, False): ("a row a block", 256, 1, 256, 264),
    }.items():
        found = plan(library, rows, vocab_size, dtype, clusters)
        assert found[: len(expected)] == expected, (rows, vocab_size, dtype, clusters)
        assert found[8] <= (227 if clusters else 163) << 10
    # 13 stages and 14, of which a row takes 8 and 10: the others are the next row's first.
    assert plan(library, 8192, 256_000, bf16, True)[10] == 13 * 512
    assert plan(library, 8192, 300_000, bf16, True)[10] == 14 * 480
    names = {
        plan(library, rows, vocab_size, dtype, clusters)[0]
        for rows, vocab_size, clusters in SHAPES.values()
        for dtype in DTYPES
    }
    assert len(names) == 7, names  # all there are: the tests below run each


@every_shape
@every_dtype
@every_divergence
def test_loss_and_gradient(
    configure: Configure, rows: int, vocab_size: int, clusters: bool, dtype: torch.dtype, divergence: str
) -> None:
    configure(clusters=clusters)
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    labels = make_labels(rows, vocab_size)
    check(student, teacher, labels, temperature=2.0, **keywords_of(divergence))
    check(student, teacher, labels, weight=torch.rand(rows), **EVERYTHING, **keywords_of(divergence))


@every_shape
@pytest.mark.parametrize("kind", ["flat", "peaked", "near_equal", "late_peak", "rising"])
def test_kinds_of_logits(configure: Configure, rows: int, vocab_size: int, clusters: bool, kind: str) -> None:
    configure(clusters=clusters)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make_logits(kind, rows, vocab_size, dtype)
        for divergence in ("forward_kl", "jsd"):
            check(student, teacher, make_labels(rows, vocab_size), temperature=2.0, divergence=divergence)


@pytest.mark.parametrize("vocab_size", [65_537, 131_072, 151_936, 163_831, 200_001, 256_000])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_largest_clusters(configure: Configure, vocab_size: int, divergence: str) -> None:
    """With exponentials that are kept, and without."""
    student, teacher = make_logits("random", 3, vocab_size, torch.bfloat16)
    check(student, teacher, make_labels(3, vocab_size), divergence=divergence)
    if vocab_size % 2:
        check(student, teacher, make_labels(3, vocab_size), hard_weight=0.5, divergence=divergence)


# 13 stages of which a row takes 8; 16 and 10; 14 and 10, of rows that begin anywhere; 13 and 13, no room for the next.
WRAPPED = {
    "8 of 13": (256_000, torch.bfloat16),
    "10 of 16": (128_256, torch.float32),
    "10 of 14": (299_999, torch.bfloat16),
    "all": (425_001, torch.bfloat16),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_rows_that_wrap_around_in_their_ring(configure: Configure, name: str) -> None:
    """Rings with no room for two rows, which six rows go round; also with hard labels and ignored rows, without a
    gradient, and with the gradient written over the logits."""
    vocab_size, dtype = WRAPPED[name]
    configure(1)
    student, teacher = make_logits("random", 6, vocab_size, dtype)
    labels = make_labels(6, vocab_size)
    check(student, teacher, labels, divergence="reverse_kl")
    labels[0] = labels[3] = -100
    check(student, teacher, labels, hard_weight=0.5, label_smoothing=0.1, divergence="jsd")
    results = []
    for inplace in (False, True):
        s = student.clone().requires_grad_()
        loss = reptile_ext.distillation_loss(s * 1, teacher, labels, inplace=inplace)
        results.append((loss.detach(), *torch.autograd.grad(loss, s)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert torch.equal(reptile_ext.distillation_loss(student, teacher, labels), results[0][0])


# Rows enough for each team to go round its ring several times.
RINGS = {"a warp": (700, 513, True), "a block": (600, 1601, True), "before sm_90": (600, 1601, False)}


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("name", RINGS)
def test_many_rows_through_a_ring(configure: Configure, name: str, divergence: str, hard_weight: float) -> None:
    rows, vocab_size, clusters = RINGS[name]
    configure(1, clusters)
    student, teacher = make_logits("random", rows, vocab_size, torch.bfloat16)
    labels = make_labels(rows, vocab_size)
    labels[3:40] = -100  # a team's first rows among them
    check(student, teacher, labels, hard_weight=hard_weight, weight=torch.rand(rows), divergence=divergence)


def test_many_rows_through_the_rings_of_a_cluster(configure: Configure) -> None:
    configure(1)
    student, teacher = make_logits("random", 600, 10_300, torch.float32)
    labels = make_labels(600, 10_300)
    labels[3:40] = -100
    check(student, teacher, labels)


def test_rows_that_are_far_apart(configure: Configure) -> None:
    """Beyond 2^31 elements, in memory of which next to nothing is touched."""
    rows, vocab_size, step = 4, 1000, 2**30 + 8
    for clusters in (True, False):
        configure(1, clusters)
        for dtype in (torch.bfloat16, torch.float32):
            student, teacher = make_logits("random", rows, vocab_size, dtype)
            memory = [torch.empty(rows * step, dtype=dtype).as_strided((rows, vocab_size), (step, 1)) for _ in range(2)]
            for far, near in zip(memory, (student, teacher), strict=True):
                far.copy_(near)
            far_student = memory[0].requires_grad_()
            loss = reptile_ext.distillation_loss(far_student * 1, memory[1], inplace=False)
            torch.testing.assert_close(loss, reptile_ext.distillation_loss(student, teacher))
            written = memory[0].detach()
            right = run(reptile_ext.distillation_loss, student, teacher)[1]
            operator = ops.distillation_loss_
            operator(written, memory[1], None, None, None, None, *ops.numbers(make_options()))
            torch.testing.assert_close(written, right)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "tvd", "hellinger"])
@pytest.mark.parametrize(
    ("vocab_size", "mask"), [(700, None), (3001, None), (3001, -1e4), (3001, -1e10), (3001, -1e30)]
)
def test_logits_that_no_exponent_holds(
    configure: Configure, vocab_size: int, mask: float | None, divergence: str
) -> None:
    """Masks by large numbers, None: the dtype's smallest, of some classes, a whole warp's, all of a row; and rows of
    the largest. What is left of m · k when it is rounded must not become an exponent."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make_logits("random", 5, vocab_size, dtype)
        smallest = mask or torch.finfo(dtype).min
        for z in (student, teacher):
            z[0, 1::2] = smallest
            z[1, 5:] = smallest
            z[2] = smallest
            z[3] = -smallest
            z[4, 7] = -smallest
        for temperature in (1.0, 0.5, 3.0):
            keywords = {"reduction": "none", "temperature": temperature, "divergence": divergence}
            loss, gradient = run(reptile_ext.distillation_loss, student, teacher, **keywords)
            right = run(reference.distillation_loss, student.double(), teacher.double(), **keywords)
            torch.testing.assert_close(loss.double(), right[0], rtol=1e-4, atol=1e-5)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(gradient.double(), right[1].double(), rtol=max(1e-3, eps), atol=1e-5)


def test_exponentials_and_bytes_are_those_of_the_plan(configure: Configure, library: ctypes.CDLL) -> None:
    """Each logit comes from memory once; what is executed is what tests/cuda/budget.py counts in the machine code."""
    numbers = ops.numbers(make_options())
    of = torch.ops.reptile_ext_on_host.distillation_loss.default
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        for vocab_size in (1000, 4096, 32_000, 50_256, 200_000):
            logits = torch.zeros(2, vocab_size, dtype=dtype)
            counts(library)
            of(logits, logits.clone(), None, None, None, None, *numbers, True)
            _, exponentials, copied, _ = counts(library)
            _, *found = plan(library, 2, vocab_size, dtype, True)
            assert copied == 2 * 2 * vocab_size * size
            expected = budget.exponentials_of(budget.Plan(*found), vocab_size, size) * vocab_size
            assert exponentials == 2 * expected, (dtype, vocab_size)


@every_shape
@every_divergence
def test_the_order_of_threads_does_not_matter(
    configure: Configure, rows: int, vocab_size: int, clusters: bool, divergence: str
) -> None:
    """A barrier that is missing would show here. And the same bits in every run."""
    student, teacher = make_logits("random", rows, vocab_size, torch.bfloat16)
    labels = make_labels(rows, vocab_size)
    found = []
    # In turn, backwards, the first thread as far ahead of the others as it gets, the last one.
    for order, multiprocessors in ((0, 3), (1, 3), (2, 1), (3, 1)):
        configure(multiprocessors, clusters, order)
        f = reptile_ext.distillation_loss
        found.append(run(f, student, teacher, labels, **EVERYTHING, **keywords_of(divergence)))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def layouts(rows: int, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    yield "transposed", student.t().contiguous().t(), teacher.t().contiguous().t(), 1
    yield "classes in front", student.t().contiguous(), teacher.t().contiguous(), 0
    yield "one of each", student, teacher.t().contiguous().t(), 1
    wide = torch.empty(rows, 2 * vocab_size + 3, dtype=dtype)
    wide[:, 3::2] = student
    yield "every other class", wide[:, 3::2], teacher, 1
    longer = torch.empty(rows, vocab_size + 5, dtype=dtype)
    longer[:, 2 : vocab_size + 2] = student
    yield "another distance from 16 bytes", longer[:, 2 : vocab_size + 2], teacher, 1
    flat = torch.empty(rows * vocab_size + 1, dtype=dtype)
    flat[1:] = student.flatten()
    yield "off by one", flat[1:].view(rows, vocab_size), teacher, 1
    yield "the same teacher for all", student, teacher[:1].expand(rows, -1), 1
    three = student.view(2, rows // 2, vocab_size).transpose(0, 1)
    yield "three dimensions", three, teacher.view(2, rows // 2, vocab_size).transpose(0, 1).contiguous(), 2


@every_dtype
@pytest.mark.parametrize("vocab_size", [7, 40, 800])
def test_layouts(configure: Configure, vocab_size: int, dtype: torch.dtype) -> None:
    for name, student, teacher, dim in layouts(6, vocab_size, dtype):
        labels = make_labels([n for d, n in enumerate(student.shape) if d != dim], vocab_size)
        for divergence in ("forward_kl", "jsd", "dkd"):
            try:
                check(student, teacher, labels, dim=dim, hard_weight=0.5, divergence=divergence)
            except AssertionError as error:
                raise AssertionError(f"{name}, {divergence}") from error


def test_images(configure: Configure) -> None:
    """Classes far apart and rows neighbours: a row a thread."""
    student, teacher = (z.movedim(-1, 1).contiguous() for z in make_logits("random", (2, 9, 5), 21))
    check(student, teacher, make_labels((2, 9, 5), 21), dim=1, hard_weight=0.5, temperature=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("vocab_size", [40, 517, 3001])
def test_the_linear_loss_as_a_gpu_computes_it(
    configure: Configure, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place on rows of an odd number of classes that begin at multiples of 128 bytes, NaN between them, of which
    some are ignored: those are left out where somebody says how many, and are computed over where nobody does."""
    for module in (linear.rows, linear.loop):
        monkeypatch.setattr(module, "can_look", lambda x: False)
    rows = 30
    x, y = (torch.randn(rows, 8).to(dtype) for _ in range(2))
    heads = [torch.randn(vocab_size, 8).to(dtype) for _ in range(2)]
    labels, weight = make_labels(rows, vocab_size), torch.rand(rows)
    labels[[0, 3, 29]], weight[[0, 7]] = -100, 0
    count = int(((labels != -100) & (weight != 0)).sum())
    pitch = linear.scratch.row_bytes(vocab_size, dtype)
    keywords: dict[str, Any] = {"weight": weight, "temperature": 2.0, "reduction": "sum"}
    for hard_weight in (0.0, 0.5):

        def gradients(loss: Any, kind: torch.dtype, hard_weight: float = hard_weight, **more: Any) -> list[Tensor]:
            leaves = [z.to(kind).requires_grad_() for z in (x, heads[0])]
            value = loss(*leaves, y.to(kind), heads[1].to(kind), labels, hard_weight=hard_weight, **keywords, **more)
            return [value.detach(), *torch.autograd.grad(value, leaves)]

        right = gradients(reference.linear_distillation_loss, torch.float64)
        plain = gradients(reference.linear_distillation_loss, dtype)
        for num_rows_in in (count, count + 2, None):
            linear.scratch._kept[:] = [torch.full((1 << 20,), 255, dtype=torch.uint8)]
            more = {"num_rows_in": num_rows_in, "memory_budget": 2 * 11 * pitch}
            found = gradients(reptile_ext.linear_distillation_loss, dtype, **more)
            for ours, theirs, exact in zip(found, plain, right, strict=True):
                epsilon = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.02, torch.float16: 3e-3}[dtype]
                allowed = 1.5 * (theirs.double() - exact).abs().max() + epsilon * exact.abs().max()
                assert (ours.double() - exact).abs().max() <= allowed
    linear.release_scratch()


@pytest.mark.parametrize("divergence", ["forward_kl", "mse", "dkd"])
def test_mixed_dtypes_and_vocabularies_that_differ(configure: Configure, divergence: str) -> None:
    for student_dtype in DTYPES:
        for teacher_dtype in DTYPES:
            student, _ = make_logits("random", 4, 300, student_dtype)
            _, teacher = make_logits("random", 4, 277, teacher_dtype)
            labels = make_labels(4, 277)
            check(student, teacher, labels, hard_weight=0.5, vocab="truncate", divergence=divergence)
            check(teacher, student, labels, hard_weight=0.5, vocab="truncate", divergence=divergence)


@every_dtype
@every_shape
def test_inplace(configure: Configure, rows: int, vocab_size: int, clusters: bool, dtype: torch.dtype) -> None:
    configure(clusters=clusters)
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    keywords = {**EVERYTHING, "weight": torch.rand(rows)}
    labels = make_labels(rows, vocab_size)
    right = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)

    def inplace(s: Tensor, *others: Any, **keywords: Any) -> Tensor:
        return reptile_ext.distillation_loss(s * 1, *others, inplace=True, **keywords)

    found = run(inplace, student, teacher, labels, **keywords)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_reductions_and_ignored_rows(
    configure: Configure, rows: int, vocab_size: int, clusters: bool, dtype: torch.dtype
) -> None:
    """NaN in ignored rows, by label or by weight, reaches no other."""
    configure(clusters=clusters)
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    labels, weight = make_labels(rows, vocab_size).clamp_min(0), torch.rand(rows) + 0.5
    labels[0] = -100
    if rows > 2:
        weight[rows // 2] = 0
    for reduction in ("mean", "sum", "none"):
        keywords: dict[str, Any] = {"reduction": reduction, "weight": weight, "hard_weight": 0.5}
        check(student, teacher, labels, **keywords)
        broken = student.clone()
        broken[0] = NAN
        broken[rows // 2 if rows > 2 else 0] = INF
        f = reptile_ext.distillation_loss
        right, found = (run(f, s, teacher, labels, **keywords) for s in (student, broken))
        assert torch.equal(found[0], right[0])
        assert torch.equal(found[1], right[1])
    check(student, teacher, labels, hard_weight=0.5, denominator=torch.tensor(7.0, dtype=torch.float64))
    nobody = torch.full((rows,), -100)
    for keywords in ({}, {"denominator": 3.0}, {"denominator": torch.tensor(0.0)}):
        loss, gradient = run(reptile_ext.distillation_loss, student, teacher, nobody, hard_weight=0.5, **keywords)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("rows", [4096, 4097, 8192, 30_011])
def test_many_rows_are_added_up_in_tiles(configure: Configure, rows: int) -> None:
    """What is divided by, and the sum, with a last tile that is full, has one row, or some; each row counts once."""
    student, teacher = make_logits("random", rows, 3, torch.float64)
    labels, weight = make_labels(rows, 3), torch.rand(rows, dtype=torch.float64)
    labels[:: rows // 7] = -100
    f = reptile_ext.distillation_loss
    each = f(student, teacher, labels, weight=weight, reduction="none")
    assert (each[labels != -100] > 0).all()
    torch.testing.assert_close(f(student, teacher, labels, weight=weight, reduction="sum"), each.sum())
    divisor = weight[labels != -100].sum()
    torch.testing.assert_close(f(student, teacher, labels, weight=weight), each.sum() / divisor)
    torch.testing.assert_close(f(student, teacher, labels, weight=weight, denominator=5.0), each.sum() / 5)
    nobody = torch.full_like(labels, -100)
    assert f(student, teacher, nobody, weight=weight) == 0


@every_shape
def test_the_loss_takes_one_launch(
    configure: Configure, library: ctypes.CDLL, rows: int, vocab_size: int, clusters: bool
) -> None:
    """Loss, gradient and the sum over the rows; one more counts what a mean with labels is divided by."""
    configure(1, clusters)
    student, teacher = make_logits("random", rows, vocab_size, torch.float32)
    labels, of = make_labels(rows, vocab_size), reptile_ext.distillation_loss
    counts(library)
    for expected, keywords in (
        (1, {}),
        (1, {"labels": labels, "reduction": "sum"}),
        (2, {"labels": labels}),
        (2, {"denominator": torch.tensor(3.0)}),
        (2, {"reduction": "none"}),
    ):
        of(student, teacher, **keywords)
        assert counts(library)[3] == expected, keywords


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("divergence", ZERO_AT_EQUALITY)
def test_equal_logits_give_exactly_zero(
    configure: Configure, rows: int, vocab_size: int, clusters: bool, dtype: torch.dtype, divergence: str
) -> None:
    configure(clusters=clusters)
    student, _ = make_logits("random", rows, vocab_size, dtype)
    f = reptile_ext.distillation_loss
    labels = make_labels(rows, vocab_size)
    for temperature in (1.0, 3.0):
        keywords = {"temperature": temperature, **keywords_of(divergence)}
        loss, gradient = run(f, student, student.clone(), labels, **keywords)
        assert loss == 0
        assert (gradient == 0).all()


@every_shape
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse", "dkd"])
def test_broken_rows_stay_alone(
    configure: Configure, rows: int, vocab_size: int, clusters: bool, divergence: str
) -> None:
    configure(clusters=clusters)
    labels = torch.zeros(rows, dtype=torch.int64)
    keywords = {"reduction": "none", "temperature": 2.0, **keywords_of(divergence)}
    f = reptile_ext.distillation_loss
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = make_logits("random", rows, vocab_size, dtype)
        whole = run(f, student, teacher, labels, **keywords)
        for what in (NAN, INF, -INF):
            broken = student.clone()
            broken[1, slice(None) if what == -INF else vocab_size // 2] = what
            loss, gradient = run(f, broken, teacher, labels, **keywords)
            assert loss[1].isnan()
            assert gradient[1].isnan().all()
            others = torch.arange(rows) != 1
            assert torch.equal(loss[others], whole[0][others])
            assert torch.equal(gradient[others], whole[1][others])


@every_divergence
def test_masked_classes(configure: Configure, divergence: str) -> None:
    """In both: as if they were not there. On one side alone: infinite where the divergence is, and nothing is NaN."""
    labels, keywords = torch.zeros(5, dtype=torch.int64), {"reduction": "none", **keywords_of(divergence)}
    for vocab_size in (9, 700):
        student, teacher = make_logits("random", 5, vocab_size)
        masked = torch.arange(vocab_size) % 3 == 2
        for z in (student, teacher):
            z[:, masked] = -INF
        f = reptile_ext.distillation_loss
        loss, gradient = run(f, student, teacher, labels, **keywords)
        right = run(reference.distillation_loss, student[:, ~masked], teacher[:, ~masked], labels, **keywords)
        torch.testing.assert_close(loss, right[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient[:, ~masked], right[1], rtol=1e-4, atol=1e-6)
        assert (gradient[:, masked] == 0).all()
        for side in range(2):
            one_sided = [student.clone(), teacher.clone()]
            one_sided[side][:, 1] = -INF
            loss, gradient = run(f, *one_sided, labels, **keywords)
            right = run(reference.distillation_loss, *one_sided, labels, **keywords)
            torch.testing.assert_close(loss, right[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gradient, right[1], rtol=1e-4, atol=1e-6)
            assert gradient.isfinite().all()


def test_a_wrong_label_breaks_its_row_alone(configure: Configure) -> None:
    """NaN where the CPU raises an error: the host would have to wait for the device to know the values."""
    for vocab_size in (10, 700, 3000):
        student, teacher = make_logits("random", 4, vocab_size)
        for wrong in (vocab_size, -1, 2**40):
            labels = torch.tensor([1, wrong, 2, 0])
            for keywords in ({}, {"hard_weight": 0.5}, {"divergence": "dkd"}):
                f = reptile_ext.distillation_loss
                loss, gradient = run(f, student, teacher, labels, reduction="none", **keywords)
                assert loss.isnan().tolist() == [False, True, False, False]
                assert gradient.isnan().all(-1).tolist() == [False, True, False, False]
                assert gradient[[0, 2, 3]].isfinite().all()


@every_dtype
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_grad_output(configure: Configure, reduction: str, dtype: torch.dtype) -> None:
    """One for all, one a row, infinities; ignored rows and classes that are cut off stay 0."""
    for vocab_size in (9, 700):
        student, teacher = make_logits("random", 6, vocab_size, dtype)
        teacher = teacher[:, : vocab_size - 2].contiguous()
        labels, weight = torch.arange(6), torch.ones(6)
        labels[0], weight[1] = -100, 0
        keywords = {"vocab": "truncate", "weight": weight, "reduction": reduction}
        grad_output = torch.rand(6) if reduction == "none" else torch.tensor(1 / 3)
        check(student, teacher, labels, grad_output=grad_output.double(), **keywords)
        for factor in (NAN, INF, 1.0):
            leaf = student.clone().requires_grad_()
            loss = reptile_ext.distillation_loss(leaf * 1, teacher, labels, **keywords)
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor))
            assert (gradient[:2] == 0).all()
            assert (gradient[:, vocab_size - 2 :] == 0).all()
            assert gradient[2:, : vocab_size - 2].isfinite().all() == (factor == 1)


@pytest.mark.parametrize("vocab_size", [777, 2501, 3001, 5001, 6001, 30_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_gradients_are_scaled_once_however_many_threads_a_ring_has(
    configure: Configure, vocab_size: int, dtype: torch.dtype
) -> None:
    """By a factor a row, when the gradient is there: powers of two, which round nothing."""
    configure(1)
    student, teacher = make_logits("random", 9, vocab_size, dtype)
    factors = 2.0 ** torch.arange(-4, 5)
    gradients = []
    for weights in (torch.ones(9), factors):
        leaf = student.clone().requires_grad_()
        loss = reptile_ext.distillation_loss(leaf, teacher, reduction="none")
        gradients.append(torch.autograd.grad(loss, leaf, weights)[0])
    assert torch.equal(gradients[0] * factors.unsqueeze(-1).to(dtype), gradients[1])


@every_divergence
def test_a_trainable_teacher(configure: Configure, divergence: str) -> None:
    student, teacher = make_logits("random", 5, 90)
    labels, keywords = make_labels(5, 90), {"temperature": (2.0, 0.5), **keywords_of(divergence)}
    found = []
    for f in (reptile_ext.distillation_loss, reference.distillation_loss):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        f(s, t, labels, hard_weight=0.5, **keywords).backward()
        found.append((s.grad, t.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_soft_weight_zero_leaves_the_teacher_unused(configure: Configure) -> None:
    student, teacher = make_logits("random", 5, 90)
    labels = make_labels(5, 90)
    check(student, teacher, labels, soft_weight=0.0, hard_weight=1.0)
    teacher[:] = NAN
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, soft_weight=0.0, hard_weight=1.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_empty(configure: Configure) -> None:
    for shape in ((0, 5), (3, 0, 5)):
        for reduction in ("none", "mean", "sum"):
            loss, gradient = run(
                reptile_ext.distillation_loss, torch.zeros(shape), torch.zeros(shape), reduction=reduction
            )
            assert loss.shape == (shape[:-1] if reduction == "none" else ())
            assert gradient.shape == shape
            assert (loss == 0).all()


# --------------------------------------------------------------------------------------------- the halves called apart

# Every way to divide a row that is read from memory, as it is in these parts: rows, classes, where they are cut.
RANGES = {
    "a row a thread": (70, 22, (9,)),
    "part of a warp": (20, 333, (111, 300)),
    "a block": (3, 3001, (1600,)),
    "a cluster": (2, 18_000, (501,)),
}
every_range = pytest.mark.parametrize(("rows", "vocab_size", "cuts"), RANGES.values(), ids=RANGES.keys())


@every_dtype
@every_divergence
def test_ranges_of_classes_make_the_whole(operators: Operators, divergence: str, dtype: torch.dtype) -> None:
    halves.check_divergence(operators, 5, 53, dtype, divergence)


@every_range
@halves.some_divergences
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_ranges_however_a_row_is_divided(
    operators: Operators, rows: int, vocab_size: int, cuts: tuple[int, ...], divergence: str, dtype: torch.dtype
) -> None:
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    labels = make_labels(rows, vocab_size)
    halves.check_halves(operators, student, teacher, labels, cuts, **EVERYTHING, **keywords_of(divergence))


@every_range
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd"])
def test_the_order_of_threads_does_not_matter_to_ranges(
    operators: Operators,
    configure: Configure,
    rows: int,
    vocab_size: int,
    cuts: tuple[int, ...],
    divergence: str,
) -> None:
    student, teacher = make_logits("random", rows, vocab_size, torch.bfloat16)
    ranges = halves.Ranges(
        student, teacher, make_labels(rows, vocab_size), cuts, **EVERYTHING, **keywords_of(divergence)
    )
    found = []
    for order, multiprocessors in ((0, 3), (1, 3), (2, 1), (3, 1)):
        configure(multiprocessors, order=order)
        found.append((*halves.combined_stats(operators, ranges), *halves.by_halves(operators, ranges)))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


@halves.every_kind
def test_ranges_of_kinds_of_logits(operators: Operators, kind: str) -> None:
    halves.check_kinds(operators, 3, 700, kind)


@halves.some_divergences
def test_ranges_of_mixed_dtypes_and_vocabularies_that_differ(operators: Operators, divergence: str) -> None:
    halves.check_mixed_dtypes(operators, divergence)


@every_dtype
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd"])
def test_ranges_of_layouts(operators: Operators, divergence: str, dtype: torch.dtype) -> None:
    halves.check_layouts(operators, divergence, dtype)


def test_what_the_loss_of_ranges_is_divided_by(operators: Operators) -> None:
    halves.check_what_is_divided(operators)


@halves.with_mirrors
def test_ranges_of_a_trainable_teacher(operators: Operators, divergence: str) -> None:
    halves.check_trainable_teacher(operators, divergence)


@halves.some_divergences
@pytest.mark.parametrize("vocab_size", [16, 600])
def test_ignored_rows_of_ranges(operators: Operators, vocab_size: int, divergence: str) -> None:
    halves.check_ignored_rows(operators, vocab_size, divergence)


@halves.some_divergences
def test_broken_rows_of_ranges_stay_alone(operators: Operators, divergence: str) -> None:
    for vocab_size in (16, 600):
        halves.check_broken_rows(operators, vocab_size, divergence)


@every_divergence
def test_masked_classes_of_ranges(operators: Operators, divergence: str) -> None:
    halves.check_masked_classes(operators, 40, divergence)


def test_ranges_without_classes(operators: Operators) -> None:
    halves.check_a_row_without_classes(operators)


def test_the_halves_refuse(operators: Operators) -> None:
    halves.check_refusals(operators)


@pytest.mark.parametrize("vocab_size", [10, 700])
def test_a_wrong_label_breaks_its_row_in_every_range(operators: Operators, vocab_size: int) -> None:
    """Also in those that know it as a class of another range."""
    student, teacher = make_logits("random", 3, vocab_size)
    for divergence in ("forward_kl", "jsd", "tvd", "hellinger", "mse", "dkd"):
        keywords = {"hard_weight": 0.5, "reduction": "none", "divergence": divergence}
        ranges = halves.Ranges(student, teacher, torch.tensor([1, 5, 2]), (4,), **keywords)
        here, there = (arguments[2] for arguments in ranges.each)
        assert here.tolist() == [1, -1, 2]
        assert there.tolist() == [-1, 1, -1]
        for wrong in (4, -2, 2**40):
            here[1], there[1] = wrong, -1
            loss, gradient = halves.by_halves(operators, ranges)
            assert loss.isnan().tolist() == [False, True, False]
            assert gradient.isnan().all(-1).tolist() == [False, True, False]
            assert gradient[[0, 2]].isfinite().all()


# ------------------------------------------------------------------------------------ one logit, many labels: elements

loss_of_elements = reptile_ext.binary_distillation_loss
# No whole span, spans and what is left at both ends, several tiles of 4,096 in several rounds of the grid.
SIZES = (1, 7, 8, 1000, 4096, 70_001)
EVERYTHING_OF_ELEMENTS: dict[str, Any] = {"temperature": (2.0, 1.3), "hard_weight": 0.4}


@every_dtype
@binary.every_divergence
@pytest.mark.parametrize("kind", ["random", "near_equal", "certain", "large"])
def test_elements(configure: Configure, kind: str, dtype: torch.dtype, divergence: str) -> None:
    s, t = binary.logits(kind, (37, 59), dtype)
    scale = 6.25 if divergence == "scaled_jsd" else 1.0
    scale = max(1.0, s.abs().max().item()) ** 2 if divergence == "mse" else scale
    keywords = {"temperature": (1.7, 1.3), "reduction": "none", **binary.keywords_of(divergence)}
    binary.assert_right(s, t, scale=scale, **keywords)


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_elements(configure: Configure, size: int, dtype: torch.dtype) -> None:
    """Any number of them, from any distance from 16 bytes, student and teacher from the same or from others."""
    configure(1)
    for start, other in ((0, 0), (1, 1), (3, 3), (5, 2)):
        s, t = binary.logits("random", size + 8, dtype)
        s, t = s[start : start + size], t[other : other + size]
        binary.assert_right(s, t, temperature=(2.0, 2.0), reduction="none")
        y = binary.targets(size)
        check_elements(s, t, y, weight=torch.rand(size), **EVERYTHING_OF_ELEMENTS)


@pytest.mark.parametrize(("dtype", "loads"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 2)], ids=str)
def test_elements_come_by_whole_loads(library: ctypes.CDLL, dtype: torch.dtype, loads: int) -> None:
    """Of 16 bytes, wherever both begin; and what is elsewhere does not, and the rest does all the same."""
    numbers = ops.numbers(make_binary_options())
    of = torch.ops.reptile_ext_on_host.binary_distillation_loss.default
    memory = torch.zeros(1016, dtype=dtype)
    assert memory.data_ptr() % 16 == 0
    for start in (0, 1, 3):
        shift = start * dtype.itemsize % 16 // dtype.itemsize
        spans = (1000 + shift) // 8 - (shift > 0)
        student = memory[start : start + 1000]
        for teacher, operands in ((student, 2), (memory[2 + start : start + 1002], 1), (student.double(), 0)):
            counts(library)
            of(student, teacher, None, None, None, None, *numbers, None, False)
            assert counts(library)[0] == spans * loads * operands


def check_elements(s: Tensor, t: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """As the reference in float64, in the logits' precision."""
    found = binary.value_and_gradient(loss_of_elements, s, t, *args, **keywords)
    right = binary.value_and_gradient(reference.binary_distillation_loss, s.double(), t.double(), *args, **keywords)
    double = torch.float64 in (s.dtype, t.dtype)
    # Labels and weights may be float32's; a sum of 70,000 terms of order 1.
    torch.testing.assert_close(
        found[0].double(), right[0], rtol=1e-13 if double else 2e-6, atol=1e-13 if double else 4e-6
    )
    tolerance = max(torch.finfo(s.dtype).eps, 1e-13 if double else 4e-6)
    size = right[1].abs().max().item()
    smallest = 2.0**-24 if s.dtype == torch.float16 else 0
    torch.testing.assert_close(
        found[1].double(), right[1], rtol=2 * tolerance, atol=min(tolerance, 4e-6) * size + smallest, check_dtype=False
    )
    return found


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elements_with_everything(configure: Configure, reduction: str, dtype: torch.dtype) -> None:
    """Labels, weights that broadcast, pos_weight, ignored elements and what is in them; each of them alone, too."""
    s, t = binary.logits("random", (41, 67), dtype)
    y = binary.targets((41, 67))
    weight = torch.rand(67) + 0.1
    weight[5] = 0
    t[:, 5] = NAN
    s[y == -100] = INF
    of_class, of_row = torch.rand(67) * 3, torch.rand(41, 1)
    keywords = {**EVERYTHING_OF_ELEMENTS, "reduction": reduction}
    for pos_weight in (of_class, of_row, torch.tensor(2.5), of_row * of_class, None):
        gradient = check_elements(s, t, y, weight=weight, pos_weight=pos_weight, **keywords)[1]
        assert (gradient[y == -100] == 0).all()
        assert (gradient[:, 5] == 0).all()
    s, t = binary.logits("random", (41, 67), dtype)
    check_elements(s, t, weight=weight, reduction=reduction)
    check_elements(s, t, weight=torch.tensor(0.5), reduction=reduction)
    check_elements(s, t, y, reduction=reduction)
    check_elements(s, t, y.to(dtype), soft_weight=0.0, hard_weight=2.0, reduction=reduction)
    check_elements(s, t, y.double(), weight=of_row.double(), reduction=reduction)
    t[:] = NAN  # unused
    check_elements(s, t, y, soft_weight=0.0, hard_weight=2.0, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("of_teacher", [None, *binary.LAYOUTS])
@pytest.mark.parametrize("of_student", [None, *binary.LAYOUTS])
def test_layouts_of_elements(
    configure: Configure, of_student: str | None, of_teacher: str | None, dtype: torch.dtype
) -> None:
    s, t = binary.logits("random", (6, 7, 31), dtype)
    y = binary.targets((6, 7, 31))
    lie = [binary.LAYOUTS.get(name, lambda z: z) for name in (of_student, of_teacher)]
    for reduction in ("none", "mean"):
        keywords = {"hard_weight": 0.5, "reduction": reduction, "pos_weight": torch.rand(31)}
        right = check_elements(s, t, y, **keywords)
        found = binary.value_and_gradient(loss_of_elements, lie[0](s), lie[1](t), y, **keywords)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 2**-7, atol=1e-7)
    in_place = lie[0](s).clone().requires_grad_() * 1
    loss_of_elements(in_place, lie[1](t), y, inplace=True, **keywords)
    torch.testing.assert_close(in_place.detach(), right[1], rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-9)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_mixed_dtypes_of_elements(configure: Configure, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    s, t = (z.to(dtype) for z, dtype in zip(binary.logits("random", (33, 40)), dtypes, strict=True))
    binary.assert_right(s, t, binary.targets((33, 40)), hard_weight=0.5, reduction="none", temperature=(1.0, 2.0))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 4), (17,), (3, 1, 5, 1), (2,) * 12])
def test_shapes_of_elements(configure: Configure, shape: tuple[int, ...]) -> None:
    s, t = binary.logits("random", shape)
    keywords = {"temperature": (1.0, 1.0), "reduction": "none"}
    binary.assert_right(s, t, **keywords)
    binary.assert_right(s.reshape(shape[::-1]).permute(list(range(len(shape)))[::-1]), t, **keywords)
    for reduction in ("mean", "sum"):
        loss = loss_of_elements(s, t, reduction=reduction)
        torch.testing.assert_close(loss, reference.binary_distillation_loss(s, t, reduction=reduction))
    if s.numel() == 0:
        for more in ({}, {"denominator": torch.tensor(0.0)}, {"weight": torch.ones(4)}):
            assert loss_of_elements(s, t, **more) == 0


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_elements_in_place(configure: Configure, reduction: str, dtype: torch.dtype) -> None:
    for size in (50, 4099):
        s, t = binary.logits("random", (2, size), dtype)
        y = binary.targets((2, size))
        keywords = {"hard_weight": 0.5, "reduction": reduction}
        right = binary.value_and_gradient(loss_of_elements, s, t, y, **keywords)
        found = binary.value_and_gradient(
            lambda s, *args, **keywords: loss_of_elements(s * 1, *args, inplace=True, **keywords), s, t, y, **keywords
        )
        for a, b in zip(found, right, strict=True):
            assert torch.equal(a, b)


@every_dtype
@binary.every_divergence
def test_the_order_of_threads_does_not_matter_to_elements(
    configure: Configure, divergence: str, dtype: torch.dtype
) -> None:
    """Neither does the number of blocks, nor which run it is."""
    s, t = binary.logits("random", 20_001, dtype)
    y, weight = binary.targets(20_001), torch.rand(20_001)
    found = []
    for order, multiprocessors in ((0, 3), (1, 3), (2, 1), (3, 1)):
        configure(multiprocessors, order=order)
        keywords = {"weight": weight, "hard_weight": 0.5, **binary.keywords_of(divergence)}
        found.append(binary.value_and_gradient(loss_of_elements, s, t, y, **keywords))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


@every_dtype
@binary.every_divergence
def test_equal_elements_give_exactly_zero(configure: Configure, divergence: str, dtype: torch.dtype) -> None:
    z = torch.cat([torch.randn(3001) * 10, torch.tensor([0.0, -0.0, 1e4, -1e4, -INF])]).to(dtype)
    for temperature in (1.0, 1.7):
        keywords = {"temperature": temperature, **binary.keywords_of(divergence)}
        loss, gradient = binary.value_and_gradient(loss_of_elements, z, z.clone(), **keywords)
        if divergence == "soft_cross_entropy":
            assert loss > 0
        else:
            assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@binary.every_divergence
def test_infinite_and_broken_elements(configure: Configure, divergence: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.5, -3.0, INF, -INF, NAN, 30.0], dtype=dtype)
    s, t = (x.reshape(-1).contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    keywords = {**binary.keywords_of(divergence), "reduction": "none"}
    found = binary.value_and_gradient(loss_of_elements, s, t, **keywords)
    right = binary.value_and_gradient(reference.binary_distillation_loss, s.double(), t.double(), **keywords)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True)
    broken = s.isnan() | t.isnan() | (s == INF) | (t == INF)
    assert (found[0].isnan() == broken).all()
    assert (found[1].isnan() == broken).all()


@pytest.mark.parametrize("name", ["labels", "weight", "pos_weight"])
def test_a_constant_out_of_range_breaks_its_element_alone(configure: Configure, name: str) -> None:
    """NaN where the CPU raises an error: the host would have to wait for the device to know the values."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        s, t = binary.logits("random", 40, dtype)
        given = {"labels": torch.rand(40), "weight": torch.rand(40) + 0.1, "pos_weight": torch.rand(40)}
        broken = torch.zeros(40, dtype=torch.bool)
        for i, wrong in enumerate((-0.5, NAN, INF, -INF, 1.5)):
            if wrong != 1.5 or name == "labels":
                given[name][7 * i + 1] = wrong
                broken[7 * i + 1] = True
        labels = given.pop("labels")
        keywords = {"hard_weight": 0.5, "reduction": "none", **given}
        loss, gradient = binary.value_and_gradient(loss_of_elements, s, t, labels, **keywords)
        assert torch.equal(loss.isnan(), broken)
        assert torch.equal(gradient.isnan(), broken)
        labels[broken] = -100  # ignored, whatever the other values are
        loss, gradient = binary.value_and_gradient(loss_of_elements, s, t, labels, **keywords)
        assert (loss[broken] == 0).all()
        assert (gradient[broken] == 0).all()
        assert loss.isfinite().all()


def test_what_the_loss_of_elements_is_divided_by(configure: Configure) -> None:
    s, t = binary.logits("random", (50, 90))
    y, weight = binary.targets((50, 90)), torch.rand(50, 1)
    keywords = {"hard_weight": 1.0, "weight": weight}
    each = loss_of_elements(s, t, y, reduction="none", **keywords)
    torch.testing.assert_close(loss_of_elements(s, t, y, reduction="sum", **keywords), each.sum())
    torch.testing.assert_close(loss_of_elements(s, t, y, **keywords), each.sum() / (weight * (y != -100)).sum())
    for denominator in (12.5, torch.tensor(12.5), torch.tensor(12.5, dtype=torch.float64)):
        check_elements(s, t, y, denominator=denominator, **keywords)
        check_elements(s, t, denominator=denominator)
    for nothing in ({"labels": torch.full_like(s, -100)}, {"weight": 0 * weight}):
        for more in ({}, {"denominator": 3.0}, {"denominator": torch.tensor(0.0)}, {"reduction": "none"}):
            labels = nothing.get("labels")
            rest = {k: v for k, v in nothing.items() if k != "labels"}
            loss, gradient = binary.value_and_gradient(loss_of_elements, s, t, labels, **rest, **more)
            assert (loss == 0).all()
            assert (gradient == 0).all()


@every_dtype
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_grad_output_of_elements(configure: Configure, reduction: str, dtype: torch.dtype) -> None:
    """One for all, one an element, expanded, infinities; ignored elements stay 0. First and second backward pass: the
    gradient that is kept is scaled, and the kernel multiplies."""
    s, t = binary.logits("random", (12, 75), dtype)
    y = binary.targets((12, 75))
    for factor in (1.0, 0.25, 1 / 3, NAN, INF):
        found = []
        for of in (loss_of_elements, reference.binary_distillation_loss):
            leaf = s.clone().requires_grad_()
            loss = of(leaf, t, y, hard_weight=0.5, reduction=reduction)
            for grad_output in (torch.full_like(loss, factor), torch.tensor(factor, dtype=loss.dtype).expand_as(loss)):
                found.append(torch.autograd.grad(loss, leaf, grad_output, retain_graph=True)[0])
        for gradient in found:
            assert (gradient[y == -100] == 0).all()
            assert gradient[y != -100].isfinite().all() == (abs(factor) <= 1)
            if abs(factor) <= 1:
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    gradient, found[-1], rtol=max(3 * eps, 1e-13), atol=max(eps, 1e-6 * (eps > 1e-10))
                )


@binary.every_divergence
def test_a_trainable_teacher_of_elements(configure: Configure, divergence: str) -> None:
    s, t = binary.logits("random", (5, 90))
    y, keywords = binary.targets((5, 90)), {"temperature": (2.0, 0.5), **binary.keywords_of(divergence)}
    found = []
    for f in (loss_of_elements, reference.binary_distillation_loss):
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        f(a, b, y, hard_weight=0.5, **keywords).backward()
        found.append((a.grad, b.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_operators_of_elements_refuse(operators: Operators) -> None:
    numbers, z = ops.numbers(make_binary_options()), torch.zeros(3, 4)
    out_of_place, in_place = operators("binary_distillation_loss"), operators("binary_distillation_loss_")
    with pytest.raises(RuntimeError, match="teacher must have the shape of student"):
        out_of_place(z, z[:2], None, None, None, None, *numbers, None, True)
    with pytest.raises(RuntimeError, match="weight must have the shape"):
        out_of_place(z, z, None, torch.ones(4), None, None, *numbers, None, True)
    with pytest.raises(RuntimeError, match="grad_output must be float64"):
        out_of_place(z, z, None, None, None, torch.ones(()), *numbers, None, True)
    with pytest.raises(RuntimeError, match="do not share memory"):
        in_place(torch.zeros(1, 4).expand(3, 4), z, None, None, None, None, *numbers, None)
    with pytest.raises(RuntimeError, match="factor must have the shape of gradient"):
        operators("scale_elements_")(z, z[0], None, None, -100)


BROKEN = {
    "beyond_device_memory": "access to device memory that is not the call's, 4 bytes",
    "misaligned": "misaligned access of 16 bytes",
    "beyond_shared_memory": "access beyond shared memory",
    "unwritten_shared_memory": "shared memory is read before it is written",
    "barrier_of_some": "a barrier or shuffle that is not reached by all threads",
    "sum_of_some": "a barrier or shuffle that is not reached by all threads",
    "span_beyond_the_end": "access to device memory that is not the call's, 16 bytes",
    "shuffle_of_some": "a barrier or shuffle that is not reached by all threads",
    "peer_too_early": "a peer's memory before all blocks have begun",
    "no_such_peer": "a peer outside of the cluster",
    "copy_read_before_its_phase": "shared memory is read before it is written",
    "phase_of_the_wrong_parity": "shared memory is read before it is written",
    "slot_ordered_while_it_is_read": "shared memory is read before it is written",
    "too_few_bytes_expected": "a barrier or shuffle that is not reached by all threads",
    "too_many_bytes_expected": "a barrier or shuffle that is not reached by all threads",
    "copy_that_nobody_waits_for": "copies that nobody waited for",
    "copy_beyond_the_row": "a copy of device memory that is not the call's, 64 bytes",
    "misaligned_copy": "a misaligned copy",
    "phase_without_init": "a phase that was not initialised",
    "told_and_read_at_once": "shared memory is read before it is written",
    "own_copy_read_too_early": "shared memory is read before it is written",
    "right_ring": "",
    "others_read_too_early": "what other blocks have stored is read before all have",
    "arrived_is_not_cleared": "more blocks than there are have counted themselves",
    "quotients": "",
    "right": "",
}

# ------------------------------------------------------------------------------ teachers of K classes a row (sparse.cu)

loss_of_few = reptile_ext.sparse_distillation_loss
ignores_zero = pytest.mark.filterwarnings("ignore:tail='zero'")
# Rows, classes, listed, clusters: a warp a row, a block, a cluster, from memory, by tiles; one multiprocessor, so that
# a block has several rows, and odd sizes, so that these begin anywhere between 16 bytes.
LISTS = {
    "one class": (5, 1, 1, True),
    "a warp": (40, 333, 20, True),
    "a block": (20, 3001, 64, True),
    "a cluster": (4, 70_001, 64, True),
    "from memory": (5, 90_001, 40, False),
    "all listed": (5, 77, 77, True),
}
every_list = pytest.mark.parametrize(("rows", "vocab_size", "k", "clusters"), LISTS.values(), ids=LISTS.keys())


def sparse_plan(
    library: ctypes.CDLL, vocab_size: int, k: int, dtype: torch.dtype, clusters: bool, rows: int = 8192
) -> tuple[int, ...]:
    numbers = (ctypes.c_int64 * 7)()
    code = (torch.float32, torch.bfloat16, torch.float16, torch.float64).index(dtype)
    library.reptile_ext_cuda_sparse_plan(
        ctypes.c_int64(rows), ctypes.c_int64(vocab_size), ctypes.c_int64(k), code, 132, int(clusters), numbers
    )
    return tuple(numbers)


def test_the_plans_of_sparse_teachers(library: ctypes.CDLL) -> None:
    """Threads, blocks of a cluster, chunks of a block, tiles, whether a row is kept, bytes of shared memory, blocks."""
    bf16, f32 = torch.bfloat16, torch.float32
    for (vocab_size, k, dtype, clusters), expected in {
        (1000, 64, bf16, True): (32, 1, 126, 1, 1),
        (32_000, 64, bf16, True): (256, 1, 4001, 1, 1),
        (32_000, 64, f32, True): (256, 2, 2001, 1, 1),
        (151_936, 64, bf16, True): (256, 8, 2375, 1, 1),
        (262_144, 4096, f32, True): (256, 8, 4097, 1, 1),
        (32_000, 64, bf16, False): (256, 1, 4001, 1, 1),
        (151_936, 64, bf16, False): (256, 1, 18_993, 1, 0),
        (1_000_000, 4096, bf16, False): (256, 1, 125_001, 1, 0),
        (2_000_000, 64, bf16, False): (256, 1, 161_024, 2, 0),
    }.items():
        found = sparse_plan(library, vocab_size, k, dtype, clusters)
        assert found[:5] == expected, (vocab_size, k, dtype, clusters, found)
        assert found[5] <= (227 if clusters else 163) << 10


def check_list(
    rows: int, vocab_size: int, k: int, tail: str, divergence: str = "forward_kl", dtype: torch.dtype = torch.float32
) -> None:
    s, t = make_logits("random", rows, vocab_size, dtype)
    ids, log_probs = sparse.targets(t, k, 1.3, torch.float64 if dtype == torch.float64 else torch.float32)
    sparse.assert_right(s, ids, log_probs, temperature=(1.7, 1.3), **sparse.keywords_of(tail, divergence))


@ignores_zero
@sparse.every_case_and_dtype
def test_divergences_of_lists(configure: Configure, tail: str, divergence: str, dtype: torch.dtype) -> None:
    configure(1)
    for name in ("one class", "a warp", "all listed"):
        check_list(*LISTS[name][:3], tail, divergence, dtype)


@ignores_zero
@every_dtype
@every_list
@pytest.mark.parametrize("tail", TAILS)
def test_lists(
    configure: Configure, rows: int, vocab_size: int, k: int, clusters: bool, dtype: torch.dtype, tail: str
) -> None:
    configure(1, clusters)
    check_list(rows, vocab_size, k, tail, dtype=dtype)


@pytest.mark.parametrize(("vocab_size", "k"), [(151_936, 64), (262_144, 4096)])
def test_lists_of_large_vocabularies(configure: Configure, vocab_size: int, k: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_list(2, vocab_size, k, "bucket", "jsd", dtype)


@every_dtype
@every_list
@pytest.mark.parametrize("temperature", [1.0, (2.0, 1.0)])
def test_lists_and_hard_labels(
    configure: Configure, rows: int, vocab_size: int, k: int, clusters: bool, dtype: torch.dtype, temperature: Any
) -> None:
    """Labels that are listed and that are not; ignored rows among the first of a block."""
    configure(1, clusters)
    s, t = make_logits("random", rows, vocab_size, dtype)
    ids, log_probs = sparse.targets(t, k)
    labels = sparse.make_labels(rows, vocab_size)
    labels[0] = ids[0].max()
    for smoothing in (0.0, 0.2):
        keywords = {"temperature": temperature, "hard_weight": 0.6, "label_smoothing": smoothing}
        sparse.assert_right(s, ids, log_probs, labels, **keywords)


@ignores_zero
@pytest.mark.parametrize("kind", ["late_peak", "rising", "peaked"])
@pytest.mark.parametrize("tail", TAILS)
def test_lists_of_logits_far_apart(configure: Configure, tail: str, kind: str) -> None:
    sparse.test_logits_far_apart(tail, kind, "")
    s, t = make_logits(kind, 3, 3001, torch.float32)
    ids, log_probs = sparse.targets(t, 20, padded=False)
    labels = sparse.make_labels(3, 3001)
    keywords = {"tail": tail, "hard_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0, "reduction": "none"}
    found = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, labels, **keywords)
    right = sparse.value_and_gradient(
        reference.sparse_distillation_loss, s.double(), ids, log_probs.double(), labels, **keywords
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_what_is_left_of_the_student_beside_a_list_has_its_digits(configure: Configure) -> None:
    sparse.test_what_is_left_of_the_student_has_its_digits("")


# What else docs/contract.md says of sparse teachers, as the CPU's kernels are asked for it.
@ignores_zero
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@sparse.every_case
def test_the_contract_of_lists(configure: Configure, tail: str, divergence: str, dtype: torch.dtype) -> None:
    sparse.test_all_classes_listed_is_the_dense_loss(tail, divergence, dtype)
    if tail != "zero" and divergence != "soft_cross_entropy":
        sparse.test_equal_rows_give_exactly_zero(tail, divergence, dtype, "")
    sparse.test_masked_classes(tail, divergence, "")
    sparse.test_a_broken_row_is_visible_and_stays_alone(dtype, tail, divergence, "")
    sparse.test_padding_by_minus_infinity_gives_no_nan(tail, divergence, "")


@ignores_zero
def test_lists_that_are_no_ordinary_ones(configure: Configure) -> None:
    sparse.test_mass_where_the_student_is_masked("")
    sparse.test_rows_without_a_class_listed()
    sparse.test_probabilities_above_one_by_rounding_are_scaled()
    sparse.test_two_classes_of_which_one_is_listed_lose_nothing()
    sparse.test_mean_sum_none_and_denominator()
    sparse.test_an_expanded_student_and_teacher()
    sparse.test_the_largest_vocabulary_and_list("")
    sparse.test_a_second_backward_and_what_is_ignored_times_infinity()


@ignores_zero
@pytest.mark.parametrize("tail", TAILS)
def test_lists_of_classes_that_the_student_lacks(configure: Configure, tail: str) -> None:
    """Some of what a row lists, or all of it: no divergence then, and NaN if it is broken."""
    s, t = make_logits("random", 4, 40)
    ids, log_probs = sparse.targets(t, 30, padded=False)
    found, right = (
        sparse.value_and_gradient(of, s[:, :25].contiguous(), ids, log_probs, tail=tail, vocab="truncate")
        for of in (loss_of_few, reference.sparse_distillation_loss)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    s = s[:, :25].contiguous()
    s[2, 9] = NAN
    ids, log_probs = sparse.targets(t, 4, padded=False)
    ids[1:3] = torch.tensor([25, 26, 27, 39])
    labels = torch.tensor([1, 2, 3, 4])
    for more in ({}, {"hard_weight": 0.5, "temperature": 2.0}):
        keywords = {"tail": tail, "vocab": "truncate", "reduction": "none", **more}
        found = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, labels, **keywords)
        assert more or found[0][1] == 0
        right = sparse.value_and_gradient(reference.sparse_distillation_loss, s, ids, log_probs, labels, **keywords)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@every_list
@every_dtype
def test_a_list_that_is_wrong_breaks_its_row_alone(
    configure: Configure, rows: int, vocab_size: int, k: int, clusters: bool, dtype: torch.dtype
) -> None:
    """An index out of range, however far, or one that is there twice: NaN, and nothing is read or written there."""
    configure(1, clusters)
    s, t = make_logits("random", rows, vocab_size, dtype)
    ids, log_probs = sparse.targets(t, k, padded=False)
    right = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, reduction="none")
    wrong: list[int] = [vocab_size, -2, 2**40, -(2**62)]
    for index in [*wrong, *([int(ids[3, 0])] if k > 1 else [])]:
        bad = ids.clone()
        bad[3, -1] = index
        vocabs = ("error", "truncate") if index < vocab_size else ("error",)
        for vocab in vocabs:
            found = sparse.value_and_gradient(loss_of_few, s, bad, log_probs, reduction="none", vocab=vocab)
            is_nan = torch.arange(rows) == 3
            assert torch.equal(found[0].isnan(), is_nan)
            assert torch.equal(found[1].isnan().all(-1), is_nan)
            for a, b in zip(found, right, strict=True):
                assert torch.equal(a[~is_nan], b[~is_nan])
    if k > 1:  # also where the student has neither of the two
        bad = ids.clone()
        bad[3, -2:] = vocab_size + 1
        loss = loss_of_few(s, bad, log_probs, reduction="none", vocab="truncate")
        assert torch.equal(loss.isnan(), torch.arange(rows) == 3)


def test_a_wrong_label_beside_a_list(configure: Configure) -> None:
    s, t = make_logits("random", 6, 1001)
    ids, log_probs = sparse.targets(t, 9)
    labels = torch.tensor([3, 1001, -1, -100, 2**40, 1000])
    loss, gradient = sparse.value_and_gradient(
        loss_of_few, s, ids, log_probs, labels, hard_weight=0.5, reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, True, False, True, False]
    assert gradient.isnan().all(-1).tolist() == loss.isnan().tolist()
    assert gradient.isfinite().all(-1).tolist() == [True, False, False, True, False, True]


@every_list
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_lists_in_place_and_in_any_order_of_threads(
    configure: Configure, rows: int, vocab_size: int, k: int, clusters: bool, dtype: torch.dtype
) -> None:
    """The same bits: in place or not, whoever goes first, with or without a gradient, and with garbage in ignored
    rows."""
    s, t = make_logits("random", rows, vocab_size, dtype)
    ids, log_probs = sparse.targets(t, k)
    labels = sparse.make_labels(rows, vocab_size)
    s[2] = NAN
    ids[2] = 2**50
    keywords = {"hard_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0}
    found = []
    for order in range(4):
        configure(1, clusters, order)
        for inplace in (False, True):
            leaf = s.clone().requires_grad_()
            loss = loss_of_few(leaf * 1, ids, log_probs, labels, inplace=inplace, **keywords)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        with torch.no_grad():
            found.append((loss_of_few(s, ids, log_probs, labels, **keywords), found[0][1]))
    assert found[0][0].isfinite()
    assert (found[0][1][2] == 0).all()
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


@every_dtype
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts_of_lists(configure: Configure, inplace: bool, dtype: torch.dtype) -> None:
    configure(1)
    sparse.test_layouts(inplace, dtype)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_dtypes_of_lists(configure: Configure, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sparse.test_dtypes_of_the_log_probabilities(dtypes)


def test_lists_that_are_far_apart(configure: Configure) -> None:
    """Beyond 2^31 elements, in memory of which next to nothing is touched."""
    rows, vocab_size, step = 4, 1000, 2**30 + 8
    s, t = make_logits("random", rows, vocab_size, torch.bfloat16)
    ids, log_probs = sparse.targets(t, 9)
    right = sparse.value_and_gradient(loss_of_few, s, ids, log_probs)
    far = torch.empty(rows * step, dtype=s.dtype).as_strided((rows, vocab_size), (step, 1))
    far.copy_(s)
    numbers = (*ops.numbers(make_sparse_options()), ids, 0, False)
    loss = ops.sparse_distillation_loss_(far, log_probs, None, None, None, None, *numbers)
    torch.testing.assert_close(loss, right[0], rtol=0, atol=0)
    torch.testing.assert_close(far, right[1], rtol=0, atol=0)


def test_rows_by_tiles(configure: Configure) -> None:
    """A row whose bits no block has room for; in place, hard labels, the list in every tile."""
    configure(1, False)
    vocab_size = 1_300_001
    s = torch.randn(2, vocab_size).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(vocab_size)[:50], torch.arange(0, 50 * 26_000, 26_000)])
    log_probs = torch.full((2, 50), 0.01).log()
    labels = torch.tensor([int(ids[0, 7]), vocab_size - 1])
    keywords = {"hard_weight": 0.5, "label_smoothing": 0.1, "reduction": "none"}
    sparse.assert_right(s, ids, log_probs, labels, **keywords)
    leaf = s.clone().requires_grad_()
    loss = loss_of_few(leaf * 1, ids, log_probs, labels, inplace=True, **keywords)
    found = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, labels, **keywords)
    assert torch.equal(loss, found[0])
    weights = torch.linspace(0.5, 2, 2)
    assert torch.equal(torch.autograd.grad(loss, leaf, weights)[0], found[1])
    ids[1, 3] = ids[1, 40]
    assert loss_of_few(s, ids, log_probs, reduction="none").isnan().tolist() == [False, True]


def test_a_row_is_read_once(configure: Configure, library: ctypes.CDLL, operators: Operators) -> None:
    """By copies, of all its whole chunks and no more; and 2 exponentials a class. From memory, twice."""
    if operators is by_gpu:
        pytest.skip("counts are the host's")
    rows, vocab_size, k = 4, 4096, 8
    for dtype in (torch.bfloat16, torch.float32):
        s, t = make_logits("random", rows, vocab_size, dtype)
        ids, log_probs = sparse.targets(t, k, padded=False)
        numbers = (*ops.numbers(make_sparse_options()), ids, 0, False, True)
        configure(1)
        counts(library)
        ops.sparse_distillation_loss(s, log_probs, None, None, None, None, *numbers)
        loads, exponentials, copied, launches = counts(library)
        assert (loads, copied, launches) == (0, s.nbytes, 1)
        # And what moves the sums of a row's 64 threads to a larger maximum, a few times each, and joins them.
        assert 2 * rows * vocab_size <= exponentials <= 2 * rows * vocab_size + rows * 64 * 8


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_lists_is_the_references(configure: Configure, reduction: str) -> None:
    """Weights, a denominator, no gradient, several rows a block; and grad_output."""
    configure(1)
    s, t = make_logits("random", 37, 501, torch.float32)
    ids, log_probs = sparse.targets(t, 17)
    labels, weight = sparse.make_labels(37, 501), torch.rand(37)
    weight[5] = 0
    others: list[dict[str, Any]] = [{}] if reduction == "none" else [{}, {"denominator": 3.0}]
    for more in (*others, {"soft_weight": 0.0}, {"temperature": (0.7, 3.0)}):
        keywords = {"hard_weight": 0.5, "weight": weight, "reduction": reduction, **more}
        found = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, labels, **keywords)
        right = sparse.value_and_gradient(
            reference.sparse_distillation_loss, s.double(), ids, log_probs.double(), labels, **keywords
        )
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(loss_of_few(s, ids, log_probs, labels, **keywords), found[0])


def test_no_rows_with_lists(configure: Configure) -> None:
    s, ids, log_probs = torch.empty(0, 9), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    for reduction, wanted in (("mean", torch.zeros(())), ("sum", torch.zeros(())), ("none", torch.empty(0))):
        loss, gradient = sparse.value_and_gradient(loss_of_few, s, ids, log_probs, reduction=reduction)
        assert torch.equal(loss, wanted)
        assert gradient.shape == (0, 9)


@pytest.fixture(scope="session")
def broken_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("broken") / "broken.so"
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{HERE}", str(HERE / "broken.cpp"), "-o", str(out)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("name", BROKEN)
def test_the_host_notices(broken_kernels: ctypes.CDLL, name: str) -> None:
    """So the tests above can fail: kernels with one mistake each."""
    kernel = getattr(broken_kernels, name)
    kernel.restype = ctypes.c_char_p
    found = (kernel() or b"").decode()
    assert found.startswith(BROKEN[name])
    assert (found == "") == (BROKEN[name] == "")
