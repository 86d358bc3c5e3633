"""Every private part of PyTorch that this package uses, in one place.

Each is known to be there and to mean this in torch 2.10.0, 2.13.0 and 2.14.1, unless it says otherwise. When a new
version of torch breaks something, look here first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])

# A context manager: operators go below their own autograd layer, for a caller who is an autograd.Function already.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd

_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor

# Whether a transform of torch.func (grad, vmap, jvp, ...) is being applied; the compiler can ask for it too.
in_torch_func: Any = torch._C._are_functorch_transforms_active


def is_batched(x: Tensor) -> bool:
    """Whether a tensor is a batch that torch.autograd.grad(..., is_grads_batched=True) made of several gradients. (A
    compiler of the backward pass cannot tell, and refuses such a call on its own.)"""
    return not torch.compiler.is_compiling() and bool(_is_batched(x))


def in_forward_mode() -> bool:
    """Whether dual numbers (torch.autograd.forward_ad) are about."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode sees every operation, and may make other tensors than one thinks, such as fakes."""
    return torch._C._len_torch_dispatch_stack() > 0


def base_of(x: Tensor) -> Tensor | None:
    """The tensor that this one is a view of."""
    return x._base


_PLAIN = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # where make_fx(pre_dispatch=True) records
_is_included = torch._C._dispatch_tls_is_dispatch_key_included


def is_traced(x: Tensor) -> bool:
    """Whether a compiler or make_fx is recording what happens to a tensor, or it is a fake without values."""
    if torch.compiler.is_compiling():
        return True
    if type(x) in _PLAIN and not in_dispatch_mode() and not _is_included(_PRE_DISPATCH):
        return False  # almost always, and cheap to find out
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return isinstance(x, FakeTensor) or fake is not None or get_proxy_mode() is not None


def has_its_own_values(kind: Any) -> bool:
    """Whether tensors of a type compute with something else than their own memory: subclasses that wrap others."""
    ours = ("torch._subclasses", "torch.distributed")
    return hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith(ours)


def values_of(x: Tensor) -> Tensor:
    """All values of a tensor that a transform of torch.func has wrapped."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


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


def is_only_owner(x: Tensor) -> bool:
    """Whether a local variable of the caller is all that holds the memory of `x`, the result of an operation.

    No node of a graph has saved it, no hook or module has kept it, under this or another name. Where torch does not
    tell (before 2.13), the answer is no.
    """
    if x.grad_fn is None or type(x) is not Tensor or not hasattr(x, "_use_count"):
        return False
    if x._base is not None and x._base.grad_fn is None:
        return False
    return _owners(x) == _owners_of_an_example(x._base is not None)


def _owners(x: Tensor) -> list[int]:
    """Numbers of those who hold a tensor's memory, the tensor and its Python object, and the same of its base."""
    base = x._base
    found = [torch._C._storage_Use_Count(x.untyped_storage()._cdata), x._use_count(), sys.getrefcount(x)]  # type: ignore[attr-defined]
    return found if base is None else [*found, base._use_count(), sys.getrefcount(base)]  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=2)
def _owners_of_an_example(is_view: bool) -> list[int]:
    """What `is_only_owner` counts for a tensor that a local variable alone holds: Python's versions count otherwise."""

    def count(x: Tensor) -> list[int]:
        return _owners(x)

    with torch.enable_grad():
        x = -torch.zeros(1, requires_grad=True)
        if is_view:
            x = x.view(1, 1)
    return count(x)
