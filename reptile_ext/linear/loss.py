"""The fused linear loss for autograd, and as one operator for traced programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import autograd, ops, reference
from ..autograd import Constants, Gradients
from ..options import Options
from .loop import NONE, LinearConfig, run

TENSORS = {
    "student_hidden": "Tensor",
    "student_weight": "Tensor",
    "student_bias": "Tensor?",
    "teacher_hidden": "Tensor",
    "teacher_weight": "Tensor?",
    "teacher_bias": "Tensor?",
}


class LinearLoss:
    """`autograd.Loss` of the six tensors; its configuration is `LinearConfig`."""

    names: ClassVar[tuple[str, ...]] = tuple(TENSORS)

    @staticmethod
    def config_of(given: Mapping[str, Any]) -> LinearConfig:
        softcaps, scales = ((given[f"student_{name}"], given[f"teacher_{name}"]) for name in ("softcap", "scale"))
        options = Options.of_operator(given)._replace(tail=given["tail"], truncate=given["truncate"])
        more = (given["memory_budget"], softcaps, scales, given["num_rows_in"], given["is_sparse"])
        return LinearConfig(options, *more)

    @staticmethod
    def gradients_at_once(config: LinearConfig, student_hidden: Tensor, needed: Sequence[bool]) -> tuple[bool, ...]:
        """Which gradients the forward pass computes: none where grad_output has to be known first (a factor a row,
        float16), nor for a trainable teacher."""
        one_factor = config.options.reduction != NONE and student_hidden.dtype != torch.float16
        at_once = one_factor and any(needed[:3]) and not any(needed[3:])
        return tuple(need and at_once for need in needed)

    @staticmethod
    def forward(
        config: LinearConfig, tensors: tuple[Any, ...], constants: Constants, needed: Sequence[bool]
    ) -> tuple[Tensor, Any]:
        now = LinearLoss.gradients_at_once(config, tensors[0], needed)
        loss, gradients = run(config, tensors, constants, None, now)
        return loss, LinearLoss.keep(config, gradients, tensors, constants) if any(now) else None

    @staticmethod
    def keep(config: LinearConfig, gradients: Gradients, tensors: tuple[Any, ...], constants: Constants) -> Any:
        counted = reference.counted_rows(constants[0], constants[1], config.options.ignore_index)
        # As weights. A tensor of its own: labels may change before the backward pass.
        mask = None if counted is None else counted.to(torch.float64)
        return gradients, min(source.num_classes() for source in config.sources(tensors)), mask

    @staticmethod
    def scaled(config: LinearConfig, kept: Any, grad_output: Tensor, is_ours: bool) -> Gradients:
        gradients, vocab_size, mask = kept
        factor = grad_output.contiguous()
        if not is_ours:

            def scaled(i: int, gradient: Tensor) -> Tensor:
                rows = (mask, 0, gradient.shape[-1], -1) if i == 0 else (None, 0, vocab_size, 0)
                found: Tensor = ops.scaled_gradient(gradient, factor, None, *rows)
                return found

            return [None if gradient is None else scaled(i, gradient) for i, gradient in enumerate(gradients)]
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                compared, weight = (gradient, mask) if i == 0 else (gradient[:vocab_size], None)
                ops.scale_gradient_(compared, factor, None, weight, 0, compared.shape[-1], -1)
        return list(gradients)

    @staticmethod
    def by_kernel(
        config: LinearConfig,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor,
        needed: Sequence[bool],
    ) -> Gradients:
        return run(config, tensors, constants, grad_output, tuple(needed))[1]

    @staticmethod
    def reference(config: LinearConfig, tensors: tuple[Any, ...], constants: Any, check_values: bool = False) -> Tensor:
        """With logits in full."""
        counted = reference.counted_rows(constants[0], constants[1], config.options.ignore_index)
        student, teacher = (
            reference.linear_logits(reference.without_ignored(source.hidden.flatten(0, -2), counted), *source[1:5])
            for source in config.sources(tensors)
        )
        labels, weight, denominator = constants
        if config.is_sparse:
            pair = tensors[4], tensors[3]
            loss = reference.sparse_with_options(
                student, *pair, labels, weight, denominator, config.options, check_values
            )
        else:
            loss = reference.with_options(student, teacher, labels, weight, denominator, config.options, check_values)
        return reference.nan_if_rows_are_lost(loss, counted, config.num_rows_in, check_values)


# What `distillation_loss` takes, by its own schema, with hidden states and heads in the place of logits.
SCHEMA = ", ".join(
    [
        *(f"{kind} {name}" for name, kind in TENSORS.items()),
        *ops.DECLARATIONS[len(ops.MODELS) :],
        *("int? memory_budget", "float? student_softcap", "float? teacher_softcap"),
        *("float student_scale", "float teacher_scale", "SymInt? num_rows_in"),
        *("bool is_sparse", "int tail", "bool truncate", "bool[] needed"),
    ]
)


@torch.library.custom_op(
    "reptile_ext::linear_distillation_loss",
    mutates_args=(),
    schema=f"({SCHEMA}) -> ({', '.join(['Tensor'] * (1 + len(TENSORS)))})",
)
def _run_operator(*arguments: Any) -> tuple[Tensor, ...]:
    """What traced programs see: the loss, and the gradients of the six tensors, empty where they are not needed."""
    given = dict(zip(NAMES, arguments, strict=True))
    tensors, needed = tuple(given[name] for name in TENSORS), tuple(given["needed"])
    constants = (given["labels"], given["weight"], given["denominator"])
    loss, gradients = run(LinearLoss.config_of(given), tensors, constants, given["grad_output"], needed)
    return (loss, *(tensors[0].new_empty(0) if g is None else g for g in gradients))


operator: Any = torch.ops.reptile_ext.linear_distillation_loss.default
NAMES = ops.names_of(operator)


@_run_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(NAMES, arguments, strict=True))
    student = given["student_hidden"]
    double = torch.float64 in (student.dtype, given["teacher_hidden"].dtype)
    shape = student.shape[:1] if given["reduction"] == NONE else ()
    loss = student.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    wanted = zip((given[name] for name in TENSORS), given["needed"], strict=True)
    return (loss, *(x.new_empty(x.shape) if need else student.new_empty(0) for x, need in wanted))


def operator_arguments(
    config: LinearConfig,
    tensors: tuple[Any, ...],
    constants: Constants,
    grad_output: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Any, ...]:
    numbers = (*ops.numbers(config.options), config.memory_budget, *config.softcaps, *config.scales)
    of_teacher = (config.is_sparse, config.options.tail, config.options.truncate)
    return (*tensors, *constants, grad_output, *numbers, config.num_rows_in, *of_teacher, list(needed))


class TracedLinearLoss(LinearLoss):
    """The same where a program is traced, which sees operators alone."""

    @staticmethod
    def by_kernel(
        config: LinearConfig,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor,
        needed: Sequence[bool],
    ) -> Gradients:
        results = operator(*operator_arguments(config, tensors, constants, grad_output, needed))[1:]
        return [gradient if need else None for gradient, need in zip(results, needed, strict=True)]


autograd.register(operator, TracedLinearLoss, tuple(TENSORS))
