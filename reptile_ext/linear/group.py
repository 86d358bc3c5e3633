"""`linear_distillation_loss(group=...)`: heads whose classes are sharded over the processes of a group.

Every process has all hidden states and the heads' weights of its own classes. A chunk of rows is a product, its
vocabulary-parallel loss (`..distributed`, `..sparse_chunks`), which communicates O(rows) numbers, and products back.
The gradient of a process's head is its own; that of the hidden states is a sum over the classes, and so, in the end,
over the processes. All of it is done in the forward pass, chunk by chunk, so that there are never more logits than a
chunk's; where the gradient's factor has to be known first, in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import compat, reference
from ..distributed import check_group, refuse_second_derivative, vocabulary_parallel_loss
from ..functional import needs_reference
from ..options import REDUCTIONS
from ..reference import counted_rows
from ..sparse_chunks import vocabulary_parallel_sparse_loss
from .loop import NONE, LinearConfig
from .plan import DEFAULT_BUDGET, GPU_BUDGET_SHARE, memory_of, split

_MEAN, _SUM = REDUCTIONS.index("mean"), REDUCTIONS.index("sum")
_HIDDEN = (0, 3)  # which of the six tensors are the same in every process


class Sharded(NamedTuple):
    """What is the same for all chunks."""

    config: LinearConfig  # reduction "none" or "sum"
    constants: tuple[Tensor | None, Tensor | None, float | Tensor | None]
    chunks: list[slice]
    group: Any
    reduces: bool  # adds the hidden states' gradients up over the processes


@compat.not_compiled  # collectives: the compiler leaves them as they are
def sharded_linear_loss(
    config: LinearConfig,
    tensors: tuple[Any, ...],
    constants: tuple[Tensor | None, Tensor | None, float | Tensor | None],
    group: Any,
    reduce_hidden_gradient: bool,
) -> Tensor:
    """The loss of checked arguments: rows are flat, and classes are each process's own."""
    check_group(group)
    if compat.in_torch_func() or compat.in_forward_mode():
        refuse_second_derivative("linear_distillation_loss", "heads")
    labels, weight, denominator = constants
    options = config.options
    if options.reduction == _MEAN and denominator is None:
        counted = counted_rows(labels, weight, options.ignore_index)
        if counted is None:
            total = tensors[0].new_full((), max(tensors[0].shape[0], 1), dtype=torch.float64)
        else:
            total = torch.where(counted, 1.0 if weight is None else weight.double(), 0.0).sum()
        denominator = torch.where(total == 0, 1.0, total)
    if options.reduction != NONE:
        options = options._replace(reduction=_SUM)
    learns = torch.is_grad_enabled()
    needed = tuple(learns and isinstance(x, Tensor) and x.requires_grad for x in tensors)
    chunks = _agree(config, tensors, needed, group, reduce_hidden_gradient)
    call = Sharded(
        config._replace(options=options), (labels, weight, denominator), chunks, group, reduce_hidden_gradient
    )
    if not any(needed):
        return _run(call, tensors, needed, None)[0]
    loss: Tensor = _Loss.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return loss


def _agree(
    config: LinearConfig, tensors: tuple[Any, ...], needed: tuple[bool, ...], group: Any, reduces: bool
) -> list[slice]:
    """Chunks that are the same in every process, whatever their heads' sizes. (On a GPU the host waits for it.)"""
    device, rows = tensors[0].device, tensors[0].shape[0]
    row_bytes = sum(source.product_bytes() + source.copy_bytes(any(needed)) for source in config.sources(tensors))
    whole = DEFAULT_BUDGET if device.type == "cpu" else memory_of(device) // GPU_BUDGET_SHARE
    same = [rows, *needed, reduces]
    mine = torch.tensor([row_bytes, config.memory_budget or whole, *map(int, same)], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    found = torch.stack(everyone).tolist()
    names = ["rows", "student_hidden.requires_grad", "student_weight.requires_grad", "student_bias.requires_grad"]
    names += ["teacher_hidden.requires_grad", "teacher_weight.requires_grad", "teacher_bias.requires_grad"]
    for i, name in enumerate([*names, "reduce_hidden_gradient"], start=2):
        values = [line[i] for line in found]
        if len(set(values)) > 1:
            raise ValueError(f"every process of group must have the same {name}; they differ: {values}")
    most = min(line[1] for line in found) // max(1, *(line[0] for line in found))
    return split(0, rows, max(1, most))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Sharded, *tensors: Any) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        # A factor a row, and one that keeps float16's gradients from vanishing, have to be known first.
        ctx.at_once = call.config.options.reduction != NONE and tensors[0].dtype != torch.float16
        loss, gradients = _run(call, tensors, needed if ctx.at_once else (False,) * 6, None)
        ctx.call, ctx.needed = call, needed
        ctx.which = [i for i, x in enumerate(gradients if ctx.at_once else tensors) if isinstance(x, Tensor)]
        ctx.save_for_backward(*((gradients if ctx.at_once else tensors)[i] for i in ctx.which))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled() or compat.is_batched(grad_output):
            refuse_second_derivative("linear_distillation_loss", "heads")
        kept: list[Any] = [None] * 6
        for i, x in zip(ctx.which, ctx.saved_tensors, strict=True):
            kept[i] = x
        if not ctx.at_once:
            return None, *_run(ctx.call, kept, ctx.needed, grad_output)[1]
        # The factor is not rounded to 16 bits.
        return None, *(None if x is None else (x.to(_wide(x)) * grad_output.to(_wide(x))).to(x.dtype) for x in kept)


def _run(
    call: Sharded, tensors: Sequence[Any], needed: Sequence[bool], grad_output: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients that are needed, times grad_output."""
    config, (labels, weight, denominator) = call.config, call.constants
    by_row = config.options.reduction == NONE
    device = tensors[0].device
    double = torch.float64 in (tensors[0].dtype, tensors[3].dtype)
    losses: list[Tensor] = []
    found: list[Any] = [None] * 6
    of_rows: dict[int, list[Tensor]] = {i: [] for i in _HIDDEN}
    by_reference = needs_reference(device, "linear_distillation_loss")
    with _as_it_is(device):
        for part in call.chunks:
            own = [
                x.detach()[part] if isinstance(x, Tensor) and i in _HIDDEN else x.detach() if x is not None else None
                for i, x in enumerate(tensors)
            ]
            if config.is_sparse:
                own[4] = tensors[4][part]
            leaves: list[Any] = [x.requires_grad_() if need else x for x, need in zip(own, needed, strict=True)]  # type: ignore[union-attr]
            of_part = tuple(x if x is None else x[part] for x in (labels, weight))
            with torch.set_grad_enabled(any(needed)):
                loss = _loss_of(call, leaves, of_part, denominator, by_reference)
            losses.append(loss.detach())
            if not any(needed):
                continue
            factor = grad_output[part] if by_row and grad_output is not None else grad_output
            which = [i for i, need in enumerate(needed) if need]
            of_loss = torch.ones_like(loss) if factor is None else factor.to(loss.dtype)
            gradients = torch.autograd.grad(loss, [leaves[i] for i in which], of_loss, allow_unused=True)
            for i, gradient in zip(which, gradients, strict=True):
                gradient = torch.zeros_like(leaves[i]) if gradient is None else gradient
                if i in _HIDDEN:
                    of_rows[i].append(gradient)
                elif found[i] is None:
                    found[i] = gradient if len(call.chunks) == 1 else gradient.to(_wide(gradient))
                else:
                    found[i].add_(gradient)
    for i, need in enumerate(needed):
        if need and i in _HIDDEN:
            found[i] = torch.cat(of_rows[i]) if of_rows[i] else torch.zeros_like(tensors[i])
            if call.reduces and not (i == 3 and tensors[4] is None):  # logits that are given are of own classes
                total = found[i].to(_wide(found[i]))
                dist.all_reduce(total, group=call.group)
                found[i] = total
        if need:
            found[i] = (torch.zeros_like(tensors[i]) if found[i] is None else found[i]).to(tensors[i].dtype)
    dtype = torch.float64 if double else torch.float32
    if by_row:
        return torch.cat(losses) if losses else torch.zeros(0, dtype=dtype, device=device), found
    total = torch.stack(losses).sum(dtype=torch.float64) if losses else torch.zeros((), device=device)
    return total.to(dtype), found


def _loss_of(
    call: Sharded, leaves: Sequence[Any], of_part: tuple[Any, ...], denominator: Any, by_reference: bool
) -> Tensor:
    config, (labels, weight) = call.config, of_part
    counted = counted_rows(labels, weight, config.options.ignore_index)
    student, teacher = config.sources(tuple(leaves))

    def logits(source: Any) -> Tensor:
        hidden = reference.without_ignored(source.hidden, counted)
        return reference.linear_logits(hidden, source.weight, source.bias, source.softcap, source.scale)

    s = logits(student)
    # Nobody else has these logits; tanh needs its own again.
    options = config.options._replace(dim=-1, inplace=s.requires_grad and student.softcap is None and not by_reference)
    rows = (labels, weight, denominator)
    if config.is_sparse:
        return vocabulary_parallel_sparse_loss(s, leaves[4], leaves[3], *rows, options, call.group)
    return vocabulary_parallel_loss(s, logits(teacher), *rows, options, call.group, by_reference)


def _wide(x: Tensor) -> torch.dtype:
    """What sums over chunks and processes are added up in."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


@contextlib.contextmanager
def _as_it_is(device: torch.device) -> Iterator[None]:
    """Without autocast: what it wants cast has been."""
    with torch.autocast(device.type, enabled=False):
        yield
