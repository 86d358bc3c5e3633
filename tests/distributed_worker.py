"""Two processes for test_distributed.py and test_heads.py, and what each runs: a module of its own, so that a spawned
process can import it."""

from __future__ import annotations

import functools
import os
import socket
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import make_labels
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
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


class LinearStudent(Student):
    """Gives hidden states, or the loss that a function makes from them and the head."""

    def forward(self, hidden: Tensor, loss: Any = None) -> Tensor:
        states = self.body(hidden).tanh()
        return states if loss is None else loss(states, self.head)


def make_teacher() -> tuple[torch.nn.Module, Tensor]:
    """A head of more classes than the student's, and its hidden states."""
    torch.manual_seed(7)
    return torch.nn.Linear(4, CLASSES + 2).requires_grad_(False), torch.randn(ROWS, 4)


def linear_loss(states: Tensor, head: Any, teacher: Any, of_teacher: Tensor, labels: Tensor, **keywords: Any) -> Tensor:
    keywords |= {"vocab": "truncate", "memory_budget": 800, "student_bias": head.bias, "teacher_bias": teacher.bias}
    return reptile_ext.linear_distillation_loss(states, head.weight, of_teacher, teacher.weight, labels, **keywords)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name.removeprefix("module.")] = gradient.detach().clone()
    return found


def in_processes(target: Any, *arguments: Any, world_size: int, expected: int | None = None) -> dict[int, Any]:
    """What target(rank, port, *arguments, results) puts into `results`, by rank; of `expected` processes, if some are
    to die."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(rank, port, *arguments, results)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=240) for _ in range(expected or world_size))
    for process in processes:
        process.join(60)
    for rank, result in found.items():
        assert not (isinstance(result, str) and "Traceback" in result), f"process {rank}:\n{result}"
    return found


def in_two_processes(target: Any, *arguments: Any) -> dict[int, Any]:
    return in_processes(target, *arguments, world_size=2)


def worker(rank: int, port: int, kind: str, all_keywords: list[dict[str, Any]], results: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        hidden, teacher, labels = make_batch()
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        found = []
        for keywords in all_keywords:
            linear = kind.startswith("linear")
            model: Any = LinearStudent() if linear else Student()
            teachers_head, of_teacher = make_teacher()
            if kind.endswith("ddp"):
                model = DistributedDataParallel(model)
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                mesh = init_device_mesh("cpu", (2,))
                if kind != "linear_fsdp2_inside":
                    fully_shard(model.head, mesh=mesh)
                fully_shard(model, mesh=mesh)
                fully_shard(teachers_head, mesh=mesh)
            # Both average the processes' gradients, so each process divides by its share of the whole batch's count.
            count = (labels != -100).sum()
            if linear:
                loss_of = functools.partial(
                    linear_loss,
                    teacher=teachers_head,
                    of_teacher=of_teacher[mine],
                    labels=labels[mine],
                    denominator=count / 2,
                    **keywords,
                )
                if kind == "linear_fsdp2_inside":
                    loss = model(hidden[mine], loss_of)
                else:
                    states, head = model(hidden[mine]), getattr(model, "module", model).head
                    assert hasattr(head.weight, "full_tensor") == (kind == "linear_fsdp2_dtensor")
                    loss = loss_of(states, head)
                    if kind == "linear_fsdp2_dtensor":  # a head in float32, as under FSDP2's mixed precision
                        torch.testing.assert_close(loss_of(states.bfloat16(), head), loss, rtol=0.02, atol=0.02)
                        with pytest.raises(TypeError, match="student_hidden must be this process's own rows"):
                            loss_of(DTensor.from_local(states, mesh, [Shard(0)]), head)
            else:
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


class LanguageModel(torch.nn.Module):
    """Token ids to logits, with or without a head whose weight is the embedding's."""

    def __init__(self, seed: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(CLASSES, HIDDEN)
        self.body, self.head = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, CLASSES)
        if tied:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(ids)).tanh())
        return logits


def fitted_student(tied: bool, fused_linear: bool) -> dict[str, Tensor]:
    """After three steps of two micro-batches on all processes; the labels leave each a different number of rows."""
    from reptile_ext.training import Reptile, Until

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CLASSES, (12, 5), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:2] = -100
    labels[5, 2:] = -100
    size = 1 if dist.is_initialized() else 2  # as many samples a step, however many processes share it
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, labels), size)
    student = LanguageModel(0, tied)
    reptile = Reptile(
        student,
        LanguageModel(1, False),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        accumulate=2,
        hard_weight=0.5,
        metrics=["accuracy"],
        fused_linear=fused_linear,
    )
    assert reptile.accelerator.num_processes == (2 if dist.is_initialized() else 1)
    reptile.fit(batches, batches, until=Until(steps=3), progress_bar=False)
    return {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


def fit_worker(rank: int, port: int, results: Any) -> None:
    try:
        torch.set_num_threads(1)
        of_process = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in of_process.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
        dist.init_process_group("gloo")
        found = [fitted_student(tied, fused_linear=True) for tied in (False, True)]
        results.put((rank, [{name: tensor.numpy() for name, tensor in of.items()} for of in found]))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, traceback.format_exc()))
