"""Concurrent calls: threads that share the process's thread pool and have scratch of their own."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import DTYPES, LAYOUTS, make_labels, make_logits, run
from torch import Tensor

import reptile_ext


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """Of the process's pool, in each of the tests' own threads."""
    torch.set_num_threads(2)


def make_problems() -> list[tuple[tuple[Tensor, Tensor, Tensor], dict]]:
    """Every dtype, rows that fit one task and rows that are shared out, direct and gathered, scratch that grows."""
    problems = []
    for seed, dtype in enumerate(DTYPES):
        for rows, vocab_size in ((2, 3), (300, 200), (4, 9001), (1, 40_000)):
            for layout in ("contiguous", "class_stride_2"):
                student, teacher = make_logits("random", (rows, 1), vocab_size, dtype, seed=seed)
                student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
                keywords = {"temperature": 1.0 + seed, "hard_weight": 0.5, "label_smoothing": 0.1}
                problems.append(((student, teacher, make_labels((rows, 1), vocab_size)), keywords))
    return problems


def test_concurrent_calls_give_the_bits_of_single_calls() -> None:
    """8 threads, each through all problems in an order of its own, forward and backward at once with the others."""
    problems = make_problems()
    right = [run(reptile_ext.distillation_loss, *tensors, **keywords) for tensors, keywords in problems]
    start = threading.Barrier(8)

    def worker(seed: int) -> list[int]:
        order = list(range(len(problems))) * 6
        random.Random(seed).shuffle(order)
        start.wait()
        wrong = []
        for i in order:
            tensors, keywords = problems[i]
            loss, gradient = run(reptile_ext.distillation_loss, *tensors, **keywords)
            if not (torch.equal(loss, right[i][0]) and torch.equal(gradient, right[i][1])):
                wrong.append(i)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        for wrong in pool.map(worker, range(8)):
            assert wrong == []


def test_errors_in_one_thread_leave_the_others_alone() -> None:
    """Half of the threads ask for nonsense all the time; the other half gets right results."""
    student, teacher = make_logits("random", 50, 700)
    labels = make_labels(50, 700)
    right = run(reptile_ext.distillation_loss, student, teacher, labels, hard_weight=1.0)
    start = threading.Barrier(8)

    def worker(i: int) -> bool:
        start.wait()
        good = True
        for _ in range(50):
            if i % 2:
                try:
                    reptile_ext.distillation_loss(student, teacher, labels + 1000, hard_weight=1.0)
                    good = False
                except ValueError as error:
                    good &= "labels must lie in [0, 700)" in str(error)
            else:
                found = run(reptile_ext.distillation_loss, student, teacher, labels, hard_weight=1.0)
                good &= torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(worker, range(8)))


def test_one_graph_in_many_threads() -> None:
    """Backward passes through the same retained graph: who takes the gradient first must not matter to the others."""
    student, teacher = make_logits("random", 20, 300)
    right = run(reptile_ext.distillation_loss, student, teacher)[1]
    student.requires_grad_()
    for _ in range(20):
        loss = reptile_ext.distillation_loss(student, teacher)
        start = threading.Barrier(4)

        def worker(_: int, loss: Tensor = loss, start: threading.Barrier = start) -> Tensor:
            start.wait()
            return torch.autograd.grad(loss, student, retain_graph=True)[0]

        with ThreadPoolExecutor(4) as pool:
            for gradient in pool.map(worker, range(4)):
                torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-7)
