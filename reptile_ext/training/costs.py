"""What a step costs, in time and memory: with each loss, and with and without `fused_linear`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import distillation_loss
from ..linear import release_scratch
from ..timing import Contender, Measured, Turns
from .batches import logits_of
from .modes import being_trained, frozen, untouched
from .objective import Objective


def eager_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """The mean forward KL as it is usually written in PyTorch."""
    x = F.log_softmax(student_logits / temperature, -1).flatten(0, -2)
    y = F.log_softmax(teacher_logits / temperature, -1).flatten(0, -2)
    return F.kl_div(x, y, log_target=True, reduction="batchmean") * temperature**2


def time_losses(
    student: nn.Module, teacher: nn.Module, inputs: Any, temperature: float, repeats: int = 15
) -> dict[str, dict[str, Any]]:
    """Median milliseconds of the loss alone (value and gradient) and of a whole training step, fused and eager.

    The step is teacher forward, student forward, loss, backward and AdamW, on a copy of the student. A loss that needs
    more memory than there is has None for its time.

    Returns:
        {"loss": {"fused": …, "eager": …, "rows": …}, "step": the same}
    """
    device = next(student.parameters()).device
    inputs = send_to_device(inputs, device)
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=device.type in ("cpu", "cuda"))
    with torch.no_grad():
        student_logits, teacher_logits = logits_of(student, inputs), logits_of(teacher.eval(), inputs)
    student_logits.requires_grad_()

    def loss_alone(loss: Callable[..., Tensor]) -> Contender:
        def setup() -> None:
            student_logits.grad = None

        def step(_: None) -> None:
            torch.autograd.backward(loss(student_logits, teacher_logits, temperature=temperature))

        return Contender("loss", setup, step)

    def whole_step(loss: Callable[..., Tensor]) -> Contender:
        def step(_: None) -> None:
            with torch.no_grad():
                of_teacher = logits_of(teacher, inputs)
            torch.autograd.backward(loss(logits_of(student, inputs), of_teacher, temperature=temperature))
            optimizer.step()
            optimizer.zero_grad()

        return Contender("step", lambda: None, step)

    losses = {"fused": distillation_loss, "eager": eager_loss}
    turns = Turns(
        [make(loss) for make in (loss_alone, whole_step) for loss in losses.values()],
        device,
        catch=torch.OutOfMemoryError,
    )
    for one in turns.measured * 2:  # to warm up
        turns.run(one)
    turns.take_turns(repeats)
    found: dict[str, dict[str, Any]] = {"loss": {}, "step": {}}
    for one, name in zip(turns.measured, [*losses] * 2, strict=True):
        found[one.name][name] = _median(one)
    return {what: {**of, "rows": student_logits[..., 0].numel()} for what, of in found.items()}


def measure_fused_linear(objective: Objective, batch: Any, repeats: int = 5) -> dict[str, Any]:
    """See `Reptile.measure_fused_linear`; `batch` is on the student's device."""
    ways = {"logits": objective.with_fused_linear(False), "fused_linear": objective.with_fused_linear(True)}
    return measure_ways(ways, batch, repeats)


def measure_ways(ways: Mapping[str, Objective], batch: Any, repeats: int = 5) -> dict[str, Any]:
    """Forward and backward of a batch on the student's device, in each of these ways: objectives of the same student.
    The ways take turns, after a round that does not count. Gradients, buffers and random numbers stay as they were.
    Returns what `Reptile.measure_fused_linear` does, by the names of the ways."""
    first = next(iter(ways.values()))
    student = first.student
    shape: dict[str, int] = {}

    def contender(name: str, objective: Objective) -> Contender:
        def setup() -> None:
            for parameter in student.parameters():
                parameter.grad = None

        def step(_: None) -> None:
            parts = objective.split(batch)
            outputs = objective.student_outputs(student, parts)
            rows = objective.num_rows(outputs, parts)
            loss = objective.loss(outputs, objective.teacher_outputs(parts), parts, rows, overwrite=True)
            torch.autograd.backward(loss)
            head = objective.student_head
            classes = outputs.shape[-1] if head is None else head.layer.out_features
            shape.update(rows=outputs.shape[:-1].numel(), classes=classes)

        return Contender(name, setup, step)

    device = next(student.parameters()).device
    turns = Turns([contender(name, way) for name, way in ways.items()], device, catch=torch.OutOfMemoryError)
    with frozen(first.teachers), untouched(student), being_trained(student):
        for one in turns.measured:  # to warm up
            turns.run(one)
        turns.take_turns(repeats)
        turns.measure_peaks(3, release_scratch)
    found: dict[str, Any] = {
        **shape,
        "milliseconds": {one.name: _median(one) for one in turns.measured},
        "peak_bytes": {one.name: one.extra_bytes for one in turns.measured},
    }
    if failed := {one.name: one.failed for one in turns.measured if one.failed is not None}:
        found["failed"] = failed
    return found


def _median(one: Measured) -> float | None:
    return one.ms[1] if one.ns else None
