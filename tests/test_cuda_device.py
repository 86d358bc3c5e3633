"""What only a GPU can show of the CUDA operators: nothing waits for the device, streams, graphs, devices, memory. Their
values are test_cuda_kernels.py's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_binary as binary
import test_halves as halves
import torch
from oracle import every_divergence, keywords_of, make_labels, make_logits, run
from torch import Tensor

import reptile_ext
from reptile_ext import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ops.cuda_missing is not None, reason="needs a GPU and the CUDA kernels"
)
loss_of = reptile_ext.distillation_loss


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Within, whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def problem(rows: int, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    return student.cuda(), teacher.cuda(), make_labels(rows, vocab_size).cuda()


def test_the_sync_guard_guards(no_sync: None) -> None:
    with pytest.raises(RuntimeError):
        torch.ones(1, device="cuda").item()


@every_divergence
@pytest.mark.parametrize("vocab_size", [10, 1000, 32_000, 151_936])
def test_bug_13_nothing_waits_for_the_device(vocab_size: int, divergence: str, request: pytest.FixtureRequest) -> None:
    """Forward and backward, every way a loss is divided, with a grad_output that is not 1."""
    student, teacher, labels = problem(8, vocab_size)
    weight, denominator, on_host = torch.rand(8, device="cuda"), torch.tensor(3.0, device="cuda"), torch.tensor(3.0)
    leaf = student.requires_grad_()
    request.getfixturevalue("no_sync")
    for keywords in (
        *({}, {"weight": weight}, {"denominator": denominator}, {"denominator": on_host}),
        *({"reduction": "none"}, {"inplace": True}),
    ):
        loss = loss_of(leaf * 1, teacher, labels, hard_weight=0.5, **keywords, **keywords_of(divergence))
        (loss.sum() / 3).backward()


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a step, which has run once before; and where the graph leaves the step's result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("vocab_size", [10, 1000, 32_000, 151_936])
def test_a_cuda_graph_repeats_it(vocab_size: int) -> None:
    student, teacher, labels = problem(16, vocab_size)
    static = student.clone().requires_grad_()

    def step() -> Tensor:
        static.grad = None
        loss = loss_of(static, teacher, labels, hard_weight=0.5, temperature=2.0)
        loss.backward()
        return loss

    graph, loss = captured(step)
    with torch.no_grad():
        static.copy_(student.flip(0))
    graph.replay()
    right = run(loss_of, student.flip(0), teacher, labels, hard_weight=0.5, temperature=2.0)
    assert torch.equal(loss, right[0])
    assert torch.equal(static.grad, right[1])


def test_shapes_one_after_the_other() -> None:
    """What shared memory a kernel may have is the function's own: a small shape must not leave less for a large one."""
    sizes = (50_257, 4096, 50_257, 1000, 128_256, 4096, 200_000, 50_257)
    for vocab_size in sizes:
        student, teacher, labels = problem(3, vocab_size)
        for keywords in ({}, {"hard_weight": 0.5}):
            found = loss_of(student, teacher, labels, **keywords)
            right = loss_of(student.cpu(), teacher.cpu(), labels.cpu(), **keywords)
            torch.testing.assert_close(found.cpu(), right, rtol=1e-5, atol=1e-5)


def test_it_runs_on_the_current_stream() -> None:
    """What is written to the logits on a side stream just before is what the loss sees."""
    student, teacher, labels = problem(64, 32_000)
    right = loss_of(student, teacher, labels)
    late = torch.zeros_like(student)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(student)
        found = loss_of(late, teacher, labels)
    stream.synchronize()
    assert torch.equal(found, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one() -> None:
    student, teacher, labels = (x.to("cuda:1") for x in problem(8, 1000))
    with torch.cuda.device(0):
        found = run(loss_of, student, teacher, labels)
    assert found[0].device == student.device
    assert torch.equal(found[0].cpu(), run(loss_of, *problem(8, 1000))[0].cpu())


def test_the_same_bits_in_every_run() -> None:
    for vocab_size in (10, 1000, 32_000, 128_256):
        student, teacher, labels = problem(64, vocab_size)
        first, second = (run(loss_of, student, teacher, labels, hard_weight=0.5) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_the_operators_refuse_tensors_of_another_device() -> None:
    student, teacher, labels = problem(4, 10)
    rest = halves.numbers_of(1, hard_weight=0.5)
    for name, (t, n) in {"teacher": (teacher.cpu(), labels), "labels": (teacher, labels.cpu())}.items():
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of student"):
            ops.distillation_loss(student, t, n, None, None, None, *rest, True)
    ranges = halves.Ranges(student, teacher, labels, ())
    stats = dict(zip(("maxima", "sums", "mixture_sums"), halves.combined_stats(halves.installed, ranges), strict=True))
    for name, value in stats.items():
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of student"):
            halves.installed("row_gradient")(*ranges.whole, *(stats | {name: value.cpu()}).values(), True)
    with pytest.raises(RuntimeError, match="maxima must be on the device of student"):
        halves.installed("row_stats")(*ranges.whole, stats["maxima"].cpu(), None)
    with pytest.raises(RuntimeError, match="sums must be on the device of student"):
        halves.installed("row_stats")(*ranges.whole, stats["maxima"], stats["sums"].cpu())


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd"])
def test_the_halves_apart_do_not_wait_and_allocate_a_few_numbers_a_row(
    divergence: str, request: pytest.FixtureRequest
) -> None:
    student, teacher, labels = problem(256, 32_000)
    weight = torch.rand(256, device="cuda")
    ranges = halves.Ranges(
        student, teacher, labels, (12_345,), hard_weight=0.5, weight=weight, **keywords_of(divergence)
    )
    request.getfixturevalue("no_sync")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = halves.combined_stats(halves.installed, ranges)
    for arguments in ranges.each:
        halves.installed("row_gradient_")(*arguments, *stats)
    assert torch.cuda.max_memory_allocated() - before <= 2 << 20  # what the allocator rounds up


def test_out_of_memory_is_what_training_loops_expect() -> None:
    free = torch.cuda.mem_get_info()[0]
    student = torch.empty(1, int(0.6 * free) // 2, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError, match="inplace=True needs none"):
        loss_of(student, student.detach())


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_logits_size_is_allocated(inplace: bool) -> None:
    student, teacher, labels = problem(256, 32_000)
    leaf = student.requires_grad_()
    z = leaf * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = loss_of(z, teacher, labels, hard_weight=0.5, inplace=inplace)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else student.nbytes) + (2 << 20)  # what the allocator rounds up
    loss.backward()


def test_every_integer_dtype_and_the_module() -> None:
    student, teacher, labels = problem(8, 100)
    module: Any = reptile_ext.DistillationLoss(hard_weight=0.5)
    right = module(student, teacher, labels)
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert torch.equal(module(student, teacher, labels.to(dtype)), right)


def elements(size: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    s, t = binary.logits("random", size, dtype)
    return s.cuda(), t.cuda(), binary.targets(size).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@binary.every_divergence
def test_the_loss_of_elements_is_that_of_the_cpu(divergence: str, dtype: torch.dtype) -> None:
    """As users call it; test_cuda_kernels.py has the layouts."""
    given = elements((300, 1001), dtype)
    keywords = {"hard_weight": 0.5, "temperature": 2.0, **binary.keywords_of(divergence)}
    found = binary.value_and_gradient(reptile_ext.binary_distillation_loss, *given, **keywords)
    assert found[1].is_cuda
    right = binary.value_and_gradient(reptile_ext.binary_distillation_loss, *(x.cpu() for x in given), **keywords)
    for a, b in zip(found, right, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a.cpu(), b, rtol=max(2 * eps, 1e-12), atol=8 * eps * b.abs().max().item())


def test_the_loss_of_elements_does_not_wait(request: pytest.FixtureRequest) -> None:
    student, teacher, labels = elements((64, 1000))
    weight, denominator = torch.rand(1000, device="cuda"), torch.tensor(3.0, device="cuda")
    leaf = student.requires_grad_()
    request.getfixturevalue("no_sync")
    for keywords in (
        *({}, {"weight": weight}, {"pos_weight": weight}, {"denominator": denominator}),
        *({"reduction": "none"}, {"inplace": True}),
    ):
        loss = reptile_ext.binary_distillation_loss(leaf * 1, teacher, labels, hard_weight=0.5, **keywords)
        (loss.sum() / 3).backward()


def test_a_cuda_graph_repeats_the_loss_of_elements() -> None:
    student, teacher, labels = elements((64, 1001))
    static = student.clone().requires_grad_()

    def step() -> Tensor:
        static.grad = None
        loss = reptile_ext.binary_distillation_loss(static, teacher, labels, hard_weight=0.5)
        loss.backward()
        return loss

    graph, loss = captured(step)
    with torch.no_grad():
        static.copy_(student.flip(0))
    graph.replay()
    right = run(reptile_ext.binary_distillation_loss, student.flip(0), teacher, labels, hard_weight=0.5)
    assert torch.equal(loss, right[0])
    assert torch.equal(static.grad, right[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_size_of_the_elements_is_allocated(inplace: bool) -> None:
    student, teacher, labels = elements(1 << 23)
    z = student.requires_grad_() * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = reptile_ext.binary_distillation_loss(z, teacher, labels, hard_weight=0.5, inplace=inplace)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else student.nbytes) + (2 << 20)  # what the allocator rounds up
    loss.backward()


def test_the_operators_of_elements_refuse_tensors_of_another_device() -> None:
    from reptile_ext.options import make_binary_options

    student, teacher, labels = elements((4, 10))
    numbers = ops.numbers(make_binary_options(hard_weight=0.5))
    given = {"teacher": teacher, "labels": labels, "weight": None, "denominator": None, "grad_output": None}
    for name in ("teacher", "labels"):
        wrong = (given | {name: given[name].cpu()}).values()
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of student"):
            ops.binary_distillation_loss(student, *wrong, *numbers, None, True)
    with pytest.raises(RuntimeError, match="factor must be on the device of"):
        ops.scale_elements_(student, torch.tensor(2.0), None, None, -100)


def few_classes(rows: int, vocab_size: int, k: int) -> tuple[Tensor, ...]:
    student, teacher, labels = problem(rows, vocab_size)
    return student, *reptile_ext.top_k_targets(teacher, k), labels


@pytest.mark.parametrize(("vocab_size", "k"), [(10, 3), (1000, 64), (32_000, 64), (151_936, 4096)])
def test_lists_wait_for_nothing_and_are_captured(vocab_size: int, k: int, request: pytest.FixtureRequest) -> None:
    """Forward and backward, every way a loss is divided; and a graph, replayed with other logits and another list."""
    student, ids, log_probs, labels = few_classes(300, vocab_size, k)
    weight = torch.rand(300, device="cuda")
    leaf = student.requires_grad_()

    def step() -> Tensor:
        leaf.grad = None
        loss = reptile_ext.sparse_distillation_loss(leaf, ids, log_probs, labels, hard_weight=0.5, weight=weight)
        loss.backward()
        return loss

    graph, loss = captured(step)
    with torch.no_grad():
        leaf.copy_(leaf.roll(1, 0) * 0.5)
        ids.copy_(ids.roll(7, 0))
    graph.replay()
    found = loss.clone(), leaf.grad.clone()
    assert torch.equal(found[0], step())
    assert torch.equal(found[1], leaf.grad)
    right = reptile_ext.reference.sparse_distillation_loss(
        leaf.detach().double(), ids, log_probs.double(), labels, hard_weight=0.5, weight=weight
    )
    torch.testing.assert_close(found[0].double(), right, rtol=1e-5, atol=1e-6)

    request.getfixturevalue("no_sync")
    for keywords in (
        *({}, {"weight": weight}, {"denominator": torch.tensor(3.0, device="cuda")}),
        *({"reduction": "none"}, {"inplace": True}, {"divergence": "jsd", "temperature": 2.0}),
    ):
        loss = reptile_ext.sparse_distillation_loss(leaf * 1, ids, log_probs, labels, hard_weight=0.5, **keywords)
        (loss.sum() / 3).backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_of_the_size_of_the_logits_is_allocated_for_a_list(inplace: bool) -> None:
    student, ids, log_probs, labels = few_classes(512, 32_000, 64)
    z = student.requires_grad_() * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = reptile_ext.sparse_distillation_loss(z, ids, log_probs, labels, hard_weight=0.5, inplace=inplace)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else student.nbytes) + (2 << 20)  # what the allocator rounds up
    loss.backward()


def test_the_operators_of_lists_refuse_tensors_of_another_device() -> None:
    from reptile_ext.options import make_sparse_options

    student, ids, log_probs, _ = few_classes(4, 1000, 8)
    numbers = ops.numbers(make_sparse_options())
    for wrong, message in (((log_probs.cpu(), ids), "log-probabilities"), ((log_probs, ids.cpu()), "indices")):
        with pytest.raises(RuntimeError, match=f"{message} must be on the device of student"):
            ops.sparse_distillation_loss(student, wrong[0], None, None, None, None, *numbers, wrong[1], 0, False, True)


def linear_problem(rows: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    sizes = {"student_hidden": (rows, 64), "student_weight": (5000, 64), "teacher_hidden": (rows, 96)}
    sizes |= {"teacher_weight": (5000, 96), "student_bias": (5000,)}
    return {k: torch.randn(size, device="cuda").div(8).to(dtype) for k, size in sizes.items()}


LEARNING = ["student_hidden", "student_weight", "student_bias"]


def linear_step(case: dict[str, Tensor], loss: Any, **keywords: Any) -> tuple[Tensor, ...]:
    case = {k: x.detach().clone().requires_grad_(k in LEARNING) for k, x in case.items()}
    result = loss(**case, **keywords)
    return result.detach(), *torch.autograd.grad(result / 3, [case[k] for k in LEARNING])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [None, 2_000_000], ids=["one_chunk", "many_chunks"])
def test_the_fused_linear_loss_is_that_of_the_cpu(dtype: torch.dtype, budget: int | None) -> None:
    case = linear_problem(300, dtype)
    keywords: dict[str, Any] = {"labels": make_labels(300, 5000).cuda(), "hard_weight": 0.5, "temperature": 2.0}
    keywords |= {"student_scale": 0.7, "teacher_softcap": 3.0}
    found = linear_step(case, reptile_ext.linear_distillation_loss, memory_budget=budget, **keywords)
    keywords["labels"] = keywords["labels"].cpu()
    wide = {k: x.double().cpu() for k, x in case.items()}
    right = linear_step(wide, reptile_ext.reference.linear_distillation_loss, **keywords)
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4  # float32 products may be TF32's
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=8 * eps, atol=float(8 * eps * b.abs().max()))


def test_the_fused_linear_loss_does_not_wait(request: pytest.FixtureRequest) -> None:
    case = linear_problem(300)
    labels, weight = make_labels(300, 5000).cuda(), torch.rand(300, device="cuda")
    linear_step(case, reptile_ext.linear_distillation_loss, labels=labels)
    request.getfixturevalue("no_sync")
    for keywords in ({}, {"weight": weight}, {"memory_budget": 2_000_000}, {"num_rows_in": 300}, {"num_rows_in": 150}):
        linear_step(case, reptile_ext.linear_distillation_loss, labels=labels, hard_weight=0.5, **keywords)
    # A teacher's logits of the positions but the last of each sequence: rows that no matrix has.
    logits = torch.randn(3, 101, 5000, device="cuda", dtype=torch.bfloat16)[:, :-1]
    given = {name: x for name, x in case.items() if not name.startswith("teacher")}
    given |= {"student_hidden": case["student_hidden"].view(3, 100, 64), "teacher_hidden": logits}
    linear_step(given, functools.partial(reptile_ext.linear_distillation_loss, teacher_weight=None))


def test_rows_that_the_fused_linear_loss_leaves_out() -> None:
    """The same values, also from a graph that is replayed with other labels; NaN where rows would be lost."""
    case = linear_problem(300)
    labels = torch.randint(5000, (300,), device="cuda")
    labels[::3] = -100
    right = linear_step(case, reptile_ext.linear_distillation_loss, labels=labels, hard_weight=0.5)
    for number in (200, 217):
        keywords: dict[str, Any] = {"labels": labels, "hard_weight": 0.5, "num_rows_in": number}
        found = linear_step(case, reptile_ext.linear_distillation_loss, **keywords)
        torch.testing.assert_close(found, right, rtol=0.02, atol=1e-4)
    lost = linear_step(case, reptile_ext.linear_distillation_loss, labels=labels, num_rows_in=199)
    assert lost[0].isnan()
    assert lost[2].isnan().all()

    x = case["student_hidden"].requires_grad_()

    def step() -> Tensor:
        x.grad = None
        loss = reptile_ext.linear_distillation_loss(**case, labels=labels, num_rows_in=200)
        loss.backward()
        return loss

    graph, loss = captured(step)
    labels.copy_(labels.roll(1))
    graph.replay()
    found = loss.clone(), x.grad.clone()
    torch.testing.assert_close(found[0], step())
    torch.testing.assert_close(found[1], x.grad)


def test_the_memory_of_the_fused_linear_loss() -> None:
    """A chunk's logits, the head's gradient and its sum in float32; without gradients the same for any rows."""
    head, teachers = (torch.randn(50_000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    budget, peaks = 40_000_000, {}
    for rows, learns in ((8192, True), (2048, False), (16_384, False)):
        x, y = (torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        head.requires_grad_(learns)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        reptile_ext.linear_distillation_loss(x, head, y, teachers, memory_budget=budget)
        peaks[rows, learns] = torch.cuda.max_memory_allocated() - before
    sums = head.numel() * (4 + 2)
    small = 8 << 20  # what the allocator rounds up, and cuBLAS's workspace
    assert budget / 2 < peaks[8192, True] < budget + sums + small
    assert abs(peaks[16_384, False] - peaks[2048, False]) < small
    assert peaks[16_384, False] < budget + small
