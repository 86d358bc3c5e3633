"""What each process of test_distributed.py runs: a module of its own, so that a spawned process can import it."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.distributed as dist
from oracle import make_labels
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reptile_ext

ROWS, HIDDEN, CLASSES = 12, 6, 33


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
