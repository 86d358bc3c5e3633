"""Data parallelism: two processes over gloo give the gradient of one process with the whole batch."""

from __future__ import annotations

import socket
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import every_divergence, keywords_of, make_labels
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reptile_ext

ROWS, HIDDEN, CLASSES = 12, 6, 33
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch is built without gloo"
)


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, teacher's logits, and labels that leave the processes different numbers of rows."""
    torch.manual_seed(3)
    labels = make_labels(ROWS, CLASSES)
    labels[:3] = -100
    return torch.randn(ROWS, HIDDEN), 3 * torch.randn(ROWS, CLASSES), labels


class Student(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self.head = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, CLASSES)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(hidden).tanh())
        return logits


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = gradient.detach().clone()
    return found


def of_one_process(keywords: dict[str, Any]) -> dict[str, Tensor]:
    hidden, teacher, labels = make_batch()
    model = Student()
    reptile_ext.distillation_loss(model(hidden), teacher, labels, **keywords).backward()
    return gradients(model)


def worker(rank: int, port: int, kind: str, all_keywords: list[dict[str, Any]], results: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        hidden, teacher, labels = make_batch()
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        found = []
        for keywords in all_keywords:
            model: Any = Student()
            if kind == "ddp":
                model = DistributedDataParallel(model)
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                mesh = init_device_mesh("cpu", (2,))
                fully_shard(model.head, mesh=mesh)
                fully_shard(model, mesh=mesh)
            # Both average the processes' gradients, so each process divides by its share of the whole batch's count.
            count = (labels != -100).sum()
            loss = reptile_ext.distillation_loss(
                model(hidden[mine]), teacher[mine], labels[mine], denominator=count / 2, **keywords
            )
            loss.backward()
            found.append({name: gradient.numpy() for name, gradient in gradients(model).items()})
        results.put((rank, found))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc()))


def in_two_processes(kind: str, all_keywords: list[dict[str, Any]]) -> dict[int, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, kind, all_keywords, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=240) for _ in processes)
    for process in processes:
        process.join(60)
    for rank, result in found.items():
        assert not isinstance(result, str), f"process {rank}:\n{result}"
    return found


@needs_gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradient_of_one(kind: str) -> None:
    """For every divergence, with rows that are out, so that the processes' own means would be another objective."""
    of = [
        {"temperature": 2.0, "hard_weight": 0.5, "inplace": inplace, **keywords_of(divergence)}
        for divergence in reptile_ext.arguments.DIVERGENCES
        for inplace in (False, True)
    ]
    found = in_two_processes(kind, of)
    for i, keywords in enumerate(of):
        right = of_one_process(keywords)
        for rank in range(2):
            assert found[rank][i].keys() == right.keys()
            for name, gradient in right.items():
                torch.testing.assert_close(torch.from_numpy(found[rank][i][name]), gradient, rtol=1e-5, atol=1e-6)


@every_divergence
def test_the_processes_own_means_are_another_objective(divergence: str) -> None:
    """So the test above can fail: without `denominator` its two halves do not average to the whole."""
    hidden, teacher, labels = make_batch()
    model, half = Student(), ROWS // 2
    whole = reptile_ext.distillation_loss(model(hidden), teacher, labels, **keywords_of(divergence))
    halves = [
        reptile_ext.distillation_loss(model(hidden[part]), teacher[part], labels[part], **keywords_of(divergence))
        for part in (slice(half), slice(half, None))
    ]
    assert abs(sum(halves) / 2 - whole) > 1e-4 * whole
