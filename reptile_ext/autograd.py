"""How the losses are differentiated: one rule, for eager and for traced programs, and for every loss.

    the gradient that the forward pass kept, times grad_output    in the first backward pass, once
    the kernel, of the logits and grad_output                     in a later one, and for what was not kept
    the reference, in plain PyTorch                               if the gradient is to be differentiated in turn
                                                                  (create_graph=True), or grad_output is a batch

What is kept is kept on `ctx`, not saved: the first backward pass gives it away, so that autograd may take the memory as
it is, and multiplies it where it lies, instead of copying N·V elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from . import compat, ops
from .checks import check_version, refuse_batched_backward, refuse_second_backward, refuse_unsaved
from .options import Options

# labels, weight, denominator: they get no gradient.
Constants = tuple[Tensor | None, Tensor | None, Tensor | None]
Gradients = Sequence[Tensor | None]


class Loss(Protocol):
    """A loss of some tensors: functions of its configuration (what is the same whatever the tensors hold), the tensors
    and the constants."""

    names: tuple[str, ...]  # of the tensors, as the user knows them

    def config_of(self, given: Mapping[str, Any], /) -> Any:
        """The configuration, from the arguments of its operator by name."""

    def forward(
        self, config: Any, tensors: tuple[Any, ...], constants: Constants, needed: Sequence[bool], /
    ) -> tuple[Tensor, Any]:
        """The loss, and what is kept of the gradients that are needed; None: nothing."""

    def keep(self, config: Any, gradients: Gradients, tensors: tuple[Any, ...], constants: Constants, /) -> Any:
        """What is kept, of gradients that are there."""

    def scaled(self, config: Any, kept: Any, grad_output: Tensor, is_ours: bool, /) -> Gradients:
        """Kept gradients times grad_output, where they lie if they are ours alone. Ignored rows, and classes that are
        not compared, stay 0 even times an infinity or NaN."""

    def by_kernel(
        self,
        config: Any,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor,
        needed: Sequence[bool],
        /,
    ) -> Gradients:
        """The gradients that are needed, times a grad_output in float64."""

    def reference(self, config: Any, tensors: tuple[Any, ...], constants: Constants, /) -> Tensor:
        """The loss in plain PyTorch. The values of labels and weights have been checked."""


class InPlaceLoss(Loss, Protocol):
    """One that has `inplace=True`."""

    def in_place(
        self, config: Any, tensors: tuple[Any, ...], constants: Constants, grad_output: Tensor | None, /
    ) -> Tensor:
        """The loss; the gradient, times a grad_output in float64, is written over the first of the tensors."""


def by_reference(
    loss: Loss,
    config: Any,
    tensors: Sequence[Tensor | None],
    constants: Constants,
    grad_output: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by plain PyTorch; differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            tensors = [
                x if x is None else x.detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)
            ]
        value = loss.reference(config, tuple(tensors), constants)
        wanted = [x for x, need in zip(tensors, needed, strict=True) if need and x is not None]
        if not value.requires_grad:  # of an unused teacher alone, at soft_weight=0
            value = value + 0 * wanted[0].sum()
        of = grad_output.to(value.dtype)
        found = iter(torch.autograd.grad(value, wanted, of, create_graph=create_graph, materialize_grads=True))
    return [next(found) if need else None for need in needed]


def _gradients(ctx: Any, kept: Any, grad_output: Tensor, needed: Sequence[bool], is_ours: bool = True) -> Gradients:
    """THE RULE. `ctx` has the loss and its configuration, and has saved its tensors and constants, in this order."""
    loss: Loss = ctx.loss
    plain = torch.is_grad_enabled() or compat.is_batched(grad_output)
    found: Gradients = (None,) * len(needed)
    if kept is not None and not plain:
        found = loss.scaled(ctx.config, kept, grad_output, is_ours)
        needed = [need and gradient is None for need, gradient in zip(needed, found)]  # noqa: B905  (a hot path)
        if True not in needed:
            return found
    saved = ctx.saved_tensors
    if unsaved := getattr(ctx, "unsaved", None):
        refuse_unsaved(unsaved)
    tensors, constants = saved[: len(needed)], saved[len(needed) : len(needed) + len(ops.CONSTANTS)]
    if plain:
        more: Gradients = by_reference(loss, ctx.config, tensors, constants, grad_output, needed)
    else:
        more = loss.by_kernel(ctx.config, tensors, constants, grad_output.to(torch.float64).contiguous(), needed)
    return [a if b is None else b for a, b in zip(found, more, strict=True)]


_Tensors = TypeVar("_Tensors", bound=tuple[Any, ...])


def savable(tensors: _Tensors) -> _Tensors:
    """Tensors that autograd may save: copies of those made in inference mode, which it refuses, as it would not notice
    that they change."""
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in tensors)  # type: ignore[return-value]


def _to_save(
    loss: Loss, tensors: tuple[Any, ...], constants: Constants, is_all_kept: bool
) -> tuple[tuple[Any, ...], str | None]:
    """What to save where some of it was made in inference mode, and the names of what is not saved: where all gradients
    are kept, a first backward pass has no need of the tensors, and copies of N·V elements would be for a second one."""
    unsaved = [name for name, x in zip(loss.names, tensors, strict=True) if x is not None and x.is_inference()]
    if unsaved and is_all_kept:
        tensors = tuple(None if x is None or x.is_inference() else x for x in tensors)
        return (*tensors, *savable(constants)), " and ".join(unsaved)
    return savable((*tensors, *constants)), None


class Fused(torch.autograd.Function):
    """A loss in an eager program: Fused.apply(loss, config, *constants, *tensors)."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, config: Any, labels: Any, weight: Any, denominator: Any, *tensors: Any) -> Tensor:
        constants = (labels, weight, denominator)
        ctx.loss, ctx.config = loss, config
        ctx.set_materialize_grads(False)
        result, ctx.kept = loss.forward(config, tensors, constants, ctx.needs_input_grad[5:])
        saved = (*tensors, *constants)
        for x in saved:  # not any(): a hot path
            if x is not None and x.is_inference():
                saved, ctx.unsaved = _to_save(loss, tensors, constants, is_all_kept=ctx.kept is not None)
                break
        # References, not copies. Autograd lets go of them as soon as this node has run, first of the backward pass.
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(needed)
        kept, ctx.kept = ctx.kept, None
        return (None, None, None, None, None, *_gradients(ctx, kept, grad_output, needed[5:]))


def register(operator: Any, loss: Loss, tensors: tuple[str, ...]) -> None:
    """Makes an operator differentiable by the same rule, for traced programs. Its tensors, constants and options have
    names; it returns the loss, and gradients of the first of its tensors, without elements where they are not computed.

    Where a program is traced the compiler plans the memory, and gradients are the operator's outputs: they may be asked
    for again, and are copied before they are multiplied.
    """
    names = ops.names_of(operator)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = dict(zip(names, inputs, strict=True))
        ctx.loss, ctx.config = loss, loss.config_of(given)
        needed = given["needed"] if "needed" in given else [given["needs_gradient"]]
        ctx.is_kept = [need and given["grad_output"] is None for need in needed]
        ctx.save_for_backward(*(given[name] for name in (*tensors, *ops.CONSTANTS)), *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        saved, count = ctx.saved_tensors, len(tensors)
        kept = None
        if any(ctx.is_kept):
            computed = saved[count + len(ops.CONSTANTS) :]
            kept = loss.keep(
                ctx.config,
                [gradient if has else None for gradient, has in zip(computed, ctx.is_kept, strict=True)],
                saved[:count],
                saved[count : count + len(ops.CONSTANTS)],
            )
        needed = dict(zip(names, ctx.needs_input_grad, strict=True))
        found = _gradients(ctx, kept, grad_loss, [needed[name] for name in tensors], is_ours=False)
        by_name = dict(zip(tensors, found, strict=True))
        return tuple(by_name.get(name) for name in names)

    torch.library.register_autograd(operator.name(), backward, setup_context=setup_context)


class FusedInPlace(torch.autograd.Function):
    """`distillation_loss(inplace=True)`: the gradient is written over the student's logits, so there is nothing to
    compute another one from. FusedInPlace.apply(loss, options, *constants, *tensors), the student's first."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: InPlaceLoss,
        options: Options,
        labels: Any,
        weight: Any,
        denominator: Any,
        *tensors: Any,
    ) -> Tensor:
        constants = (labels, weight, denominator)
        student = tensors[0]
        ctx.loss, ctx.config = loss, options
        ctx.kept, ctx.is_done = None, False
        ctx.set_materialize_grads(False)
        if student.dtype == torch.float16:  # in the backward pass, as always
            result, _ = loss.forward(options, tensors, constants, (False,) * len(tensors))
            ctx.save_for_backward(*savable((*tensors, *constants)))
            return result
        result = loss.in_place(options, tensors, constants, None)
        torch.autograd.graph.increment_version(student)
        gradient = student.detach()  # shares the version counter
        ctx.kept = loss.keep(options, (gradient,), tensors, constants)
        ctx.version = compat.version_of(student)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, ctx.kept = ctx.kept, None
        if ctx.is_done or torch.is_grad_enabled():
            refuse_second_backward()
        if compat.is_batched(grad_output):
            refuse_batched_backward()
        ctx.is_done = True
        if kept is None:
            saved = ctx.saved_tensors
            tensors, constants = saved[: -len(ops.CONSTANTS)], saved[-len(ops.CONSTANTS) :]
            ctx.loss.in_place(ctx.config, tensors, constants, grad_output.to(torch.float64).contiguous())
            torch.autograd.graph.increment_version(tensors[0])
            return (None, None, None, None, None, tensors[0].detach(), *(None,) * (len(tensors) - 1))
        check_version(kept[0], ctx.version)
        return (None, None, None, None, None, *ctx.loss.scaled(ctx.config, kept, grad_output, True))
