"""Heads that are DTensors, sharded over processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(x: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    return distributed is not None and isinstance(x, distributed.DTensor)


class _Gathered(torch.autograd.Function):
    """All of a DTensor, in every process. Back comes the mean of the processes' gradients, as in FSDP and DDP, in the
    shards of the DTensor."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        full: Tensor = sharded.full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        share = gradient / ctx.mesh.size()
        return DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim).redistribute(placements=ctx.placements)


def gathered(x: Any, hidden: Tensor) -> Any:
    """A head or bias as one tensor, in the dtype of the hidden states if it was a DTensor."""
    if not is_dtensor(x) or not isinstance(hidden, Tensor):  # which is an error
        return x
    return _Gathered.apply(x.to(hidden.dtype))  # type: ignore[no-untyped-call]
