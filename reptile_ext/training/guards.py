"""That student and teacher stay apart, models stay where they have to, and processes train one student."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn


def make_accelerator(find_unused_parameters: bool) -> Accelerator:
    """One process of as many as a launcher has started. On the CPU, Accelerate has to be told that it is one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    of_ddp = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
    accelerator = Accelerator(cpu=processes > 1 and not torch.accelerator.is_available(), kwargs_handlers=[of_ddp])
    if accelerator.num_processes != processes:
        raise RuntimeError(
            f"WORLD_SIZE is {processes}, but Accelerate sees {accelerator.num_processes} process: each would train a "
            "student of its own. Make a Reptile before any other Accelerator, or set ACCELERATE_USE_CPU=true"
        )
    return accelerator


@contextlib.contextmanager
def naming_unused_parameters() -> Iterator[None]:
    """DDP's complaint of a parameter without a gradient, with what to pass to whom."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("Expected to have finished reduction"):
            raise RuntimeError(
                "the student has parameters that got no gradient in a step, which processes that share it have to "
                "know: pass find_unused_parameters=True to Reptile, or freeze them by requires_grad_(False)"
            ) from error
        raise


def stays_where_it_is(model: nn.Module) -> bool:
    """Whether a model may not be moved: quantised, offloaded, or spread over devices."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    marks = ("hf_device_map", "_hf_hook", "hf_quantizer", "quantization_method", "is_quantized")
    return len(devices) > 1 or torch.device("meta") in devices or any(getattr(model, mark, None) for mark in marks)


def check_trainable(student: nn.Module) -> None:
    """Parameters that were made in inference mode look trainable and are not."""
    for name, x in student.named_parameters():
        if x.is_inference():
            raise ValueError(
                f"the student's parameter {name!r} was made under torch.inference_mode() and cannot be trained: make "
                "the model outside of it, or pass a copy.deepcopy made outside"
            )


def check_precision(student: nn.Module, precision: str) -> None:
    """Autocast keeps the weights that it trains in float32, where small steps are not rounded away."""
    dtypes = {x.dtype for x in student.parameters() if x.requires_grad}
    wrong = {torch.float16} if precision != "float32" else set()
    wrong |= {torch.bfloat16} if precision == "float16" else set()
    if found := dtypes & wrong:
        name = str(found.pop()).removeprefix("torch.")
        raise ValueError(
            f"precision={precision!r} trains float32 weights and casts them in each step; got a student whose weights "
            f"are {name}: pass student.float(), or precision='float32', which casts nothing"
        )


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """What the student trains must not be the teacher's memory, under whatever name."""
    spans = sorted((*span, name) for name, x in teacher.named_parameters() if (span := _span(x)) is not None)
    shared = [
        (name, other)
        for name, x in student.named_parameters()
        if x.requires_grad and (own := _span(x)) is not None
        for start, end, other in spans
        if own[0] < end and start < own[1]
    ]
    if shared:
        names = len({name for name, _ in shared})
        raise ValueError(
            f"student and teacher share {names} parameters ({shared[0][0]!r} …; the teacher's {shared[0][1]!r}) or "
            "their memory: training the student would change the teacher. Pass copy.deepcopy(teacher), or freeze them "
            "in the student by requires_grad_(False)"
        )


def _span(x: Tensor) -> tuple[int, int] | None:
    """First and last address of a tensor's elements; None where it has none of its own."""
    try:
        local = x.to_local() if hasattr(x, "to_local") else x
        start = local.data_ptr()
    except RuntimeError:
        return None
    extent = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True)) + 1
    return (start, start + extent * local.element_size()) if start and local.numel() else None


def check_finite(student: nn.Module, step: int) -> None:
    """Raise a FloatingPointError for weights that are not numbers any more, though the loss was."""
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise FloatingPointError(
                f"{name!r} of the student is not finite after step {step}, though the loss was: its gradient was not"
            )


class Unchanged:
    """That teachers are after the first step what they were: parameters, and buffers in the student's memory."""

    def __init__(self, teachers: Iterable[Any], student: nn.Module) -> None:
        own = [
            span for x in student.state_dict(keep_vars=True).values() if isinstance(x, Tensor) and (span := _span(x))
        ]
        self._tensors: dict[str, Tensor] = {}
        for number, teacher in enumerate(t for t in teachers if isinstance(t, nn.Module)):
            self._tensors |= {
                f"{number}: {name}": x for name, x in teacher.named_parameters() if x.device.type != "meta"
            }
            for name, x in teacher.named_buffers():
                span = _span(x)
                if span is not None and any(span[0] < end and start < span[1] for start, end in own):
                    self._tensors[f"{number}: {name}"] = x
        self._before = self._sums()

    def check(self) -> None:
        changed = [
            name for name, before in self._before.items() if not torch.equal(before, self._sum(self._tensors[name]))
        ]
        if changed:
            raise RuntimeError(
                f"the first step changed the teacher ({changed[0].split(': ')[1]!r} and {len(changed) - 1} others): it "
                "shares memory with the student, or the optimizer trains it"
            )

    def _sums(self) -> dict[str, Tensor]:
        return {name: self._sum(x) for name, x in self._tensors.items()}

    @staticmethod
    def _sum(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.hash_tensor(x.to_local() if hasattr(x, "to_local") else x.detach())
