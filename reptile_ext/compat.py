"""Every private part of PyTorch that this package uses, in one place.

Each is known to be there and to mean this in torch 2.10.0, 2.13.0 and 2.14.1, unless it says otherwise. When a new
version of torch breaks something, look here first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])

# A context manager: operators go below their own autograd layer, for a caller who is an autograd.Function already.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd

# Whether a tensor is a batch that torch.autograd.grad(..., is_grads_batched=True) made of several gradients.
is_batched: Any = torch._C._functorch.is_legacy_batchedtensor

# Whether a transform of torch.func (grad, vmap, jvp, ...) is being applied; the compiler can look at it too.
in_torch_func: Any = torch._C._are_functorch_transforms_active


def in_forward_mode() -> bool:
    """Whether dual numbers (torch.autograd.forward_ad) are about."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode sees every operation, and may make other tensors than one thinks, such as fakes."""
    return torch._C._len_torch_dispatch_stack() > 0


def base_of(x: Tensor) -> Tensor | None:
    """The tensor that this one is a view of."""
    return x._base


def version_of(x: Tensor) -> int:
    """How often a tensor's memory was written to, as autograd counts."""
    return x._version


def argument_declarations(operator: Any) -> tuple[str, ...]:
    """The arguments of an operator as its schema has them, "Tensor? labels" for example."""
    declarations = str(operator._schema).partition("(")[2].partition(") -> ")[0]
    return tuple(declarations.replace("(a!)", "").split(", "))


def not_compiled(function: _Function) -> _Function:
    """Decorates a function that torch.compile is to call as it is. The public torch.compiler.disable imports the
    compiler, which takes a second."""
    decorated: _Function = torch._disable_dynamo(function)  # type: ignore[attr-defined,assignment]
    return decorated
