"""A module as head: the linear map that its forward is.

What a module adds to a product of hidden states and one weight (adapters, fake or real quantisation, a
parametrization) is in its forward alone. Where the forward is linear, it is known from what it makes of unit vectors,
differentiably, so that whatever it is made of gets its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import compat
from ..checks import check_features, is_plain_or_sharded

_ROWS = 4  # on which the map found and the module are compared, in every call
# Of a logit plus the row's median one, by the coarsest dtype in between. Products round by less, in whatever order;
# dynamic quantisation errs by more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2**-5, torch.bfloat16: 2**-5}


def linear_map(side: str, head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight [V, H] and bias [V] such that head(hidden) = hidden · weightᵀ + bias.

    Of a plain `torch.nn.Linear` its own. Of any other module those that it gives by calling it on H + 1 rows, which
    takes H·H·V products and, until the backward pass has run, another weight's memory.

    Raises:
        TypeError: `head` is not a module.
        ValueError: its forward is not linear, or it has backward hooks.
    """
    name = f"{side}_head"
    if not isinstance(head, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {type(head).__name__}: pass a weight as {side}_weight")
    check_features(side, hidden)
    for part in head.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{name} has dropout in train mode, which is no linear map: put it in eval mode, or p=0")
        if part._backward_hooks or part._backward_pre_hooks:
            raise ValueError(f"{name} has backward hooks, which would not see the gradients of its logits: remove them")
    if _is_plain(head):
        return hidden, head.weight, head.bias  # type: ignore[return-value]
    size, dtype = hidden.shape[-1], _computes_in(hidden)
    ones = (1,) * max(hidden.dim() - 2, 0)  # for a head that wants [B, T, H]
    nothing = hidden.new_zeros(*ones, 1, size)
    bias = _logits(name, head, nothing).flatten(0, -2)[0]
    # Unit vectors are made so long that the weight's digits, and the bias's gradient, are not lost beside each other;
    # in float16 not longer than gradients that are divided by it can bear.
    has_bias = hidden.is_meta or compat.is_traced(hidden) or bool(compat.values_of(bias != 0).any())
    length = (2.0**4 if dtype == torch.float16 else 2.0**20) if has_bias else 1.0
    units = length * torch.eye(size, dtype=hidden.dtype, device=hidden.device)
    columns = _logits(name, head, units.reshape(*ones, size, size)).flatten(0, -2)
    weight = columns
    if has_bias:
        weight = torch.where(bias.isfinite(), columns - bias, 0.0) / length  # a class may be masked by −inf
    weight = weight.t()
    _compare(name, head, hidden, weight, bias)
    return hidden.to(weight.dtype), weight, bias.clone() if has_bias else None


def _is_plain(head: nn.Module) -> bool:
    """Whether a module is its weight and bias, which may be a parametrization's or a DTensor."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in head.__dict__:
        return False
    hooks: tuple[Any, ...] = (head._forward_hooks, head._forward_pre_hooks)
    return not any(hooks) and all(x is None or is_plain_or_sharded(x) for x in (head.weight, head.bias))


def _computes_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if kind != "meta" and hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _logits(name: str, head: nn.Module, hidden: Tensor) -> Tensor:
    found = head(hidden)
    shape = list(hidden.shape[:-1])
    if not isinstance(found, Tensor) or list(found.shape[:-1]) != shape or not found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name} must make floating-point logits {[*shape, 'V']} of {list(hidden.shape)}; got {got}")
    return found


def _compare(name: str, head: nn.Module, hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise if the module and the map found disagree on some of the rows that it is for."""
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    if rows.shape[0] == 0 or rows.is_meta:
        return
    rows = rows[torch.linspace(0, rows.shape[0] - 1, _ROWS, device=rows.device).long()]
    ones = (1,) * max(hidden.dim() - 2, 0)
    with torch.no_grad():
        right = _logits(name, head, rows.reshape(*ones, *rows.shape)).flatten(0, -2).double()
        found = F.linear(rows.to(weight.dtype), weight, bias).double()
    between = (hidden.dtype, weight.dtype, _computes_in(hidden))
    tolerance = max(_TOLERANCE[dtype] for dtype in between)
    if rows.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        tolerance = max(tolerance, 2**-7)
    # Each logit by its own size and the usual one of its row: a few huge ones (masked classes) hide nothing.
    size = right.abs() + right.abs().median(-1, keepdim=True).values
    wrong = ~((right - found).abs() <= tolerance * size) & (right != found) & ~right.isnan()
    message = (
        f"{name} must be a linear map of the hidden states, up to rounding, and its forward is not (a softcap and a "
        f"scale go in as {name.removesuffix('head')}softcap and {name.removesuffix('head')}scale, and dynamic "
        "quantisation does not fit): use distillation_loss on its logits"
    )
    if compat.is_traced(rows):
        torch._assert_async(~wrong.any(), message)
    elif bool(compat.values_of(wrong).any()):
        raise ValueError(message)
