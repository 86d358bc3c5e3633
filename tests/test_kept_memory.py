"""Gradients of memory that is kept: used again when nobody holds it, and never before."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from oracle import DTYPES, make_logits, name_of
from torch import Tensor

import reptile_ext
from reptile_ext import ops, reference, release_scratch

needs_deleters = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch does not say when a storage goes"
)
pytestmark = needs_deleters

MIB = 1 << 20
ROWS, VOCAB = 300, 1000  # 1.1 MiB in float32


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    gc.collect()
    release_scratch()
    assert ops.kept_memory() == 0
    yield
    gc.collect()
    release_scratch()


def gradient_of(student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    """A new gradient, held by the caller alone."""
    leaf = student.detach().requires_grad_()
    return torch.autograd.grad(reptile_ext.distillation_loss(leaf, teacher, **keywords), leaf)[0]


@functools.cache
def logits(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return make_logits("random", rows, VOCAB, dtype, seed=seed)


def addresses(x: Tensor) -> range:
    storage = x.untyped_storage()
    return range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


# ------------------------------------------------------------------------------------------------------- used again


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_training_loop_has_one_block(dtype: torch.dtype) -> None:
    """Every step's gradient lies where the first one's lay, and is right."""
    student, teacher = logits(rows=1200, dtype=dtype)
    places = set()
    for step in range(5):
        scaled = student / (step + 1)
        gradient = gradient_of(scaled, teacher)
        wanted = scaled.double().requires_grad_()
        reference.distillation_loss(wanted, teacher.double()).backward()
        torch.testing.assert_close(gradient.double(), wanted.grad, rtol=1e-2, atol=1e-6)
        places.add(gradient.data_ptr())
        del gradient
    assert len(places) == 1
    assert 0 < ops.kept_memory() < 1.01 * student.nbytes


def test_the_gradient_of_a_teacher_and_of_the_halves_too() -> None:
    """Whatever operator makes a gradient."""
    student, teacher = (x.clone().requires_grad_() for x in logits())
    loss = reptile_ext.distillation_loss(student, teacher)
    gradients = torch.autograd.grad(loss, (student, teacher))
    assert ops.kept_memory() == 0
    del gradients
    assert 2 * student.nbytes <= ops.kept_memory() < 2.02 * student.nbytes
    del loss
    with torch.no_grad():  # an operator that is called by itself
        options = reptile_ext.functional.make_options()
        result = ops.distillation_loss(student, teacher, None, None, None, None, *ops.numbers(options), True)
    assert student.nbytes <= ops.kept_memory() < 1.01 * student.nbytes
    del result


def layouts() -> dict[str, Tensor]:
    x = torch.zeros(70, 80, 90)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "middle": x.permute(1, 0, 2),
        "next_token": x[:, :-1],
        "every_second_class": x[..., ::2],
        "holes_transposed": x[:, 1:].transpose(0, 1),
        "channels_last": torch.zeros(2, 30, 80, 90).to(memory_format=torch.channels_last),
        "size_1": x[:, None],
        "size_1_odd_stride": torch.zeros(40, 9000).as_strided((40, 1, 9000), (9000, 7, 1)),
        "size_1_with_holes": torch.zeros(40, 9001).as_strided((40, 1, 9000), (9001, 3, 1)),
        "expanded": torch.zeros(1, 80, 90).expand(70, 80, 90),
        "overlapping": torch.zeros(20_000).as_strided((9000, 40), (1, 100)),
    }


@pytest.mark.parametrize("layout", layouts())
def test_what_a_gradient_looks_like_does_not_depend_on_its_memory(layout: str) -> None:
    student = layouts()[layout]
    gradient = gradient_of(student, student)
    like = torch.empty_like(student)
    assert (gradient.shape, gradient.stride(), gradient.dtype) == (like.shape, like.stride(), like.dtype)
    assert (gradient.device, gradient.layout, gradient.requires_grad) == (like.device, like.layout, False)
    assert type(gradient) is Tensor
    assert gradient.is_contiguous() == like.is_contiguous()
    assert not gradient.is_inference()
    assert not gradient.any()


# ------------------------------------------------------------------------------------------------- held, and by whom

KEEPERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda g: g,
    "detached": lambda g: g.detach(),
    "a row": lambda g: g[17],
    "its last element": lambda g: g.view(-1)[-1:],
    "storage": lambda g: g.untyped_storage(),
    "numpy": lambda g: g.numpy(),
    "numpy, sliced": lambda g: g.numpy()[5:, ::3],
    "numpy and back": lambda g: torch.from_numpy(g.numpy()),
    "memoryview": lambda g: memoryview(g.numpy()),
    "dlpack": lambda g: np.from_dlpack(g),
    "dlpack capsule": lambda g: torch.utils.dlpack.to_dlpack(g),
    "another type": lambda g: g.view(torch.uint8),
    "parameter": lambda g: torch.nn.Parameter(g),
    "set as data": lambda g: setattr(x := torch.zeros(()), "data", g) or x,
    "set_": lambda g: torch.empty(0).set_(g.untyped_storage(), 3, (10,), (1,)),
    "saved by a graph": lambda g: g * torch.ones((), requires_grad=True),
    "a cycle": lambda g: (lambda loop: loop.append(loop) or loop)([g]),
}


def value_of(kept: Any) -> Any:
    """A copy of what a keeper sees."""
    if isinstance(kept, torch.UntypedStorage):
        return torch.empty(0, dtype=torch.uint8).set_(kept).clone()
    if isinstance(kept, Tensor):
        if kept.grad_fn is not None:  # what the graph has saved
            return torch.autograd.grad(kept.sum(), kept.grad_fn.next_functions[1][0].variable, retain_graph=True)[0]
        return kept.detach().clone()
    if isinstance(kept, (np.ndarray, memoryview)):
        return torch.from_numpy(np.array(kept))
    return value_of(kept[0]) if isinstance(kept, list) else None


@pytest.mark.parametrize("name", KEEPERS)
def test_a_gradient_that_is_kept_is_never_overwritten(name: str) -> None:
    student, teacher = logits()
    gradient = gradient_of(student, teacher)
    held, copy = addresses(gradient), gradient.clone()
    kept = KEEPERS[name](gradient)
    del gradient
    before = value_of(kept)
    for seed in range(1, 7):  # and their gradients are dropped or kept, of this size and others
        others = [gradient_of(*logits(seed, rows)) for rows in (ROWS, ROWS + 50, ROWS - 20, 2 * ROWS)]
        for other in others:
            assert held.stop <= addresses(other).start or addresses(other).stop <= held.start
        del others, other
    if before is not None:
        torch.testing.assert_close(value_of(kept), before, rtol=0, atol=0)
    else:  # a capsule shows nothing until it is opened
        kept = torch.utils.dlpack.from_dlpack(kept)
        torch.testing.assert_close(kept, copy, rtol=0, atol=0)
    release_scratch()
    del kept
    gc.collect()
    assert ops.kept_memory() > 0, "and it comes back when it is let go"


def test_gradients_of_leaves() -> None:
    """A leaf's .grad is the very tensor; it is added to, replaced, set to None, kept by hooks."""
    student, teacher = logits()
    leaves = [student.clone().requires_grad_() for _ in range(3)]
    of_steps: list[Tensor] = []
    sums: list[Tensor] = []
    leaves[1].register_hook(of_steps.append)
    leaves[2].register_post_accumulate_grad_hook(lambda leaf: sums.append(leaf.grad))
    wanted = gradient_of(student, teacher)
    for step in range(4):
        for leaf in leaves:
            reptile_ext.distillation_loss(leaf, teacher).backward()
        for leaf in leaves:
            torch.testing.assert_close(leaf.grad, (step % 2 + 1) * wanted)
        if step == 1:
            for leaf in leaves:
                leaf.grad = None
    assert len(of_steps) == len(sums) == 4
    for gradient, total in zip(of_steps, sums, strict=True):
        torch.testing.assert_close(gradient, wanted)
        torch.testing.assert_close(total, 2 * wanted)  # the same tensor as that of the step before or after
    assert len({leaf.grad.data_ptr() for leaf in leaves}) == 3


def test_hooks_keep_what_they_saw() -> None:
    student, teacher = logits()
    seen, copies = [], []
    leaf = student.clone().requires_grad_()

    def keep(gradient: Tensor) -> None:
        seen.append(gradient)
        copies.append(gradient.clone())

    for step in range(1, 5):
        hidden = leaf / step
        hidden.retain_grad()
        hidden.register_hook(keep)
        reptile_ext.distillation_loss(hidden, teacher).backward()
        seen.append(hidden.grad)
        copies.append(hidden.grad.clone())
        del hidden
    for gradient, copy in zip(seen, copies, strict=True):
        assert torch.equal(gradient, copy)
    assert not torch.equal(copies[0], copies[-1])


def test_two_losses_of_the_same_logits() -> None:
    """Autograd adds the second gradient to the first, perhaps in its memory."""
    student, teacher = logits()
    _, other = logits(9)
    for _ in range(4):
        leaf = student.clone().requires_grad_()
        hidden = leaf * 1.0
        reptile_ext.distillation_loss(hidden, teacher).add(reptile_ext.distillation_loss(hidden, other)).backward()
        torch.testing.assert_close(leaf.grad, gradient_of(student, teacher) + gradient_of(student, other))


def test_several_backward_passes_and_derivatives_of_the_gradient() -> None:
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    right = gradient_of(student, teacher)
    loss = reptile_ext.distillation_loss(leaf, teacher)
    found = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]
    (differentiable,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(differentiable.square().sum(), leaf)
    for _ in range(3):
        gradient_of(*logits(5))
    for gradient in (*found, differentiable):
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-9)
    wanted = student.clone().requires_grad_()
    (of_reference,) = torch.autograd.grad(reference.distillation_loss(wanted, teacher), wanted, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(of_reference.square().sum(), wanted)[0])


def test_a_loss_whose_backward_pass_has_not_run_holds_its_gradient() -> None:
    """Kept by the graph; many graphs at a time, in any order."""
    of = {seed: logits(seed) for seed in range(6)}
    right = {seed: gradient_of(*of[seed]) for seed in of}
    leaves = {seed: student.clone().requires_grad_() for seed, (student, _) in of.items()}
    losses = {seed: reptile_ext.distillation_loss(leaves[seed], of[seed][1]) for seed in of}
    for seed in (3, 0, 5, 1, 4, 2):
        losses.pop(seed).backward()
        assert torch.equal(leaves[seed].grad, right[seed])
    assert all(torch.equal(leaves[seed].grad, right[seed]) for seed in of)


def test_in_shared_memory_and_pickled() -> None:
    student, teacher = logits()
    gradient = gradient_of(student, teacher)
    copy = gradient.clone()
    gradient.share_memory_()
    assert gradient.is_shared()
    gradient_of(*logits(1))
    assert torch.equal(gradient, copy)


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_what_a_compiled_program_returns_is_kept_too() -> None:
    student, teacher = logits()
    compiled = torch.compile(reptile_ext.distillation_loss, backend="aot_eager", fullgraph=True)
    found, copies = [], []
    for step in range(1, 5):
        leaf = (student / step).requires_grad_()
        compiled(leaf, teacher).backward()
        found.append(leaf.grad)
        copies.append(leaf.grad.clone())
        torch.testing.assert_close(leaf.grad, gradient_of(student / step, teacher))
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
    assert len({x.data_ptr() for x in found}) == 4


# ------------------------------------------------------------------------------------------------------- how much


def test_small_gradients_are_left_to_malloc() -> None:
    for rows in (1, 100, 260):
        gradient_of(*logits(rows=rows))
    assert ops.kept_memory() == 0
    gradient_of(*logits(rows=264))
    assert MIB < ops.kept_memory() < 1.01 * MIB


def test_no_more_than_four_blocks_are_kept() -> None:
    gradients = [gradient_of(*logits(seed)) for seed in range(7)]
    assert ops.kept_memory() == 0
    del gradients
    size = ROWS * VOCAB * 4
    assert 4 * size <= ops.kept_memory() < 4.1 * size


def test_batches_of_many_sizes_end_with_one_block() -> None:
    for rows in (600, 610, 500, 640, 400, 639, 350):
        gradient_of(*logits(rows=rows))
    assert 640 * VOCAB * 4 <= ops.kept_memory() < 1.01 * 640 * VOCAB * 4


def test_a_small_gradient_does_not_hold_a_large_block() -> None:
    large = gradient_of(*logits(rows=3 * ROWS))
    place = addresses(large)
    del large
    small = gradient_of(*logits())
    assert small.data_ptr() not in place
    assert small.untyped_storage().nbytes() == small.nbytes
    assert ops.kept_memory() >= 3 * ROWS * VOCAB * 4


def zeros(num_bytes: int) -> Tensor:
    """Logits that take no memory until they are written to."""
    return torch.zeros(num_bytes // 2 // 50_000, 50_000, dtype=torch.bfloat16)


def test_no_more_than_a_gibibyte_is_kept() -> None:
    nothing = torch.zeros(30_000, dtype=torch.float64)  # of every row, so that this is quick

    def ignored(num_bytes: int) -> Tensor:
        student = zeros(num_bytes)
        return gradient_of(student, student, weight=nothing[: len(student)])

    gradients = [ignored(450 * MIB) for _ in range(3)]
    del gradients
    assert 890 * MIB < ops.kept_memory() < 905 * MIB, "two of the three"
    release_scratch()
    ignored(1030 * MIB)
    assert ops.kept_memory() == 0, "more than that in one is not kept"


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads resident memory as Linux tells it")
def test_release_gives_it_back_to_the_system() -> None:
    student = torch.zeros(100 * MIB // 4 // 1000, 1000)
    held = gradient_of(student, student)
    gradient_of(student, student)
    before = resident()
    release_scratch()
    assert before - resident() > 95 * MIB
    assert ops.kept_memory() == 0
    assert not held.any()


def test_an_error_gives_the_block_back() -> None:
    student, teacher = logits()
    gradient_of(student, teacher)
    kept = ops.kept_memory()
    labels = torch.full((ROWS,), VOCAB)
    with pytest.raises(ValueError, match="labels must lie in"):
        gradient_of(student, teacher, labels=labels, hard_weight=1.0)
    assert ops.kept_memory() == kept > 0


# --------------------------------------------------------------------------------------------- threads and processes


def test_threads_that_keep_and_drop_as_they_like() -> None:
    """Gradients that are kept for a while, some passed on to be dropped by another thread."""
    problems = [logits(seed, rows) for seed, rows in enumerate((ROWS, ROWS, ROWS + 60, 2 * ROWS))]
    right = [gradient_of(*problem) for problem in problems]
    shared: list[tuple[int, Tensor]] = []
    start = threading.Barrier(6)

    def worker(seed: int) -> int:
        chance = random.Random(seed)
        own: list[tuple[int, Tensor]] = []
        wrong = 0
        start.wait()
        for _ in range(60):
            i = chance.randrange(len(problems))
            own.append((i, gradient_of(*problems[i])))
            if len(own) > 3:
                shared.append(own.pop(chance.randrange(len(own))))
            if chance.random() < 0.3 and len(shared) > 4:
                which, gradient = shared.pop(0)
                wrong += not torch.equal(gradient, right[which])
            if chance.random() < 0.1:
                release_scratch()
            wrong += sum(not torch.equal(gradient, right[which]) for which, gradient in own)
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(worker, range(6))) == 0
    assert all(torch.equal(gradient, right[which]) for which, gradient in shared)


FORK = """
import os, sys, threading, torch, reptile_ext
from reptile_ext import ops

torch.set_num_threads(1)
student, teacher = torch.randn(300, 1000), torch.randn(300, 1000)

def gradient():
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(reptile_ext.distillation_loss(leaf, teacher), leaf)[0]

right = gradient()
gradient()
stop = threading.Event()

def work():
    while not stop.is_set():
        assert torch.equal(gradient(), right)

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(15):
    held = gradient()
    child = os.fork()
    if child == 0:
        good = ops.kept_memory() == 0 and torch.equal(held, right)
        for _ in range(3):
            good = good and torch.equal(gradient(), right)
        good = good and ops.kept_memory() > 0
        held.zero_()  # the child's own
        os._exit(0 if good else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(held, right)
stop.set()
for thread in threads:
    thread.join()
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forks_while_other_threads_are_at_work() -> None:
    """The child finds nothing kept, no lock that nobody will ever open, and its gradients are right."""
    result = python(FORK)
    assert result.returncode == 0, result.stderr


def test_gradients_that_outlive_the_interpreter() -> None:
    code = """
import torch, reptile_ext
x = torch.randn(300, 1000, requires_grad=True)
reptile_ext.distillation_loss(x, torch.randn(300, 1000)).backward()
reptile_ext.keep = x
x.grad.array = x.grad.numpy()
loop = [x]
loop.append(loop)
print("done")
"""
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
