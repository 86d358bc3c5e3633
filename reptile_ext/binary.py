"""`binary_distillation_loss`: every logit is a distribution of its own (one logit, many labels)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from . import autograd, ops, reference
from .autograd import Constants, Gradients
from .checks import LARGE_TEMPERATURE, check_binary_tensors, check_inplace, warn_of_temperature
from .functional import LogitsLoss, apply, divisor_for_operators, needs_reference
from .options import Options, make_binary_options

__all__ = ["binary_distillation_loss"]

# The operator's tensors. pos_weight is a constant as labels and weight are.
TENSORS = (*ops.MODELS, "pos_weight")


class BinaryLoss(LogitsLoss):
    """The same of (student, teacher, pos_weight)."""

    names: ClassVar[tuple[str, ...]] = ("student_logits", "teacher_logits", "pos_weight")

    @staticmethod
    def call(
        options: Options,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        student, teacher, pos_weight = tensors
        numbers = ops.numbers(options)
        return ops.binary_distillation_loss(
            student, teacher, *constants, grad_output, *numbers, pos_weight, with_gradient
        )

    @staticmethod
    def in_place(
        options: Options, tensors: tuple[Any, ...], constants: Constants, grad_output: Tensor | None
    ) -> Tensor:
        student, teacher, pos_weight = tensors
        return ops.binary_distillation_loss_(
            student, teacher, *constants, grad_output, *ops.numbers(options), pos_weight
        )

    @staticmethod
    def keep(options: Options, gradients: Gradients, tensors: tuple[Any, ...], constants: Constants) -> Any:
        return gradients[0], constants[0], constants[1]

    @staticmethod
    def scaled(options: Options, kept: Any, grad_output: Tensor, is_ours: bool) -> Gradients:
        gradient, labels, weight = kept
        if not is_ours:
            return ops.scaled_elements(gradient, grad_output, labels, weight, options.ignore_index), None, None
        ops.scale_elements_(gradient, grad_output, labels, weight, options.ignore_index)
        return gradient, None, None

    @staticmethod
    def reference(options: Options, tensors: tuple[Any, ...], constants: Constants) -> Tensor:
        student, teacher, pos_weight = tensors
        labels, weight, denominator = constants
        return reference.binary_with_options(
            student, teacher, labels, weight, pos_weight, denominator, options, check_values=False
        )


autograd.register(ops.binary_distillation_loss, BinaryLoss, TENSORS)


def binary_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | tuple[float, float] = 1.0,
    temperature_scaling: str = "t2",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    pos_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Distillation loss of logits that each are a distribution of their own, σ(z) against 1 − σ(z): one logit a sample,
    or many labels; and its gradient, in one fused pass.

    Equivalent PyTorch, for the default divergence, one temperature T, labels, no weights::

        s, t = student_logits.float() / T, teacher_logits.float() / T
        p = t.sigmoid()
        soft = T * T * (p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s)))
        hard = F.binary_cross_entropy_with_logits(student_logits, labels, pos_weight=pos_weight, reduction="none")
        loss = (soft_weight * soft + hard_weight * hard)[labels != ignore_index].mean()

    The divergence is that of `distillation_loss` on `torch.stack([z, torch.zeros_like(z)], -1)`, without the stack.
    One differs: "mse" is (s/T_s − t/T_t)², which is twice the mean over the two classes of that stack.

    Args:
        student_logits: [...], float32, bfloat16, float16 or float64, any strides.
        teacher_logits: the same shape; its dtype may differ. Gets a gradient too if it requires one.
        labels: targets from 0 to 1, floating point, of the logits' shape. An element whose label is `ignore_index` is
            ignored: no loss, no gradient, its logits never read. Needed if `hard_weight` > 0.
        divergence, beta: as of `distillation_loss`, all but "dkd", which needs more than two classes.
        temperature, temperature_scaling, soft_weight: as of `distillation_loss`.
        hard_weight: weight of the labels' binary cross entropy, which is taken at temperature 1.
        pos_weight: float ≥ 0, what the cross entropy of the positive labels is multiplied with, as in
            `F.binary_cross_entropy_with_logits`; a shape that broadcasts to that of the logits.
        weight: float ≥ 0, a shape that broadcasts to that of the logits; an element of weight 0 is ignored.
        ignore_index: the label of ignored elements.
        reduction: "mean" (Σ w ℓ / Σ w over the elements that count; 0 if there are none), "sum" or "none".
        denominator: Σ w ℓ / denominator instead. A number or a 0-d tensor.
        inplace: write the gradient over the student's logits; as of `distillation_loss`.

    Returns:
        A scalar, or the logits' shape with reduction="none"; float32, or float64 if either input is.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it, what came and what is wanted. (In a
            compiled program, labels and weights out of range are a RuntimeError with the same words. By the CUDA
            kernels, which nothing waits for, their elements become NaN.)

    Equal logits at equal temperatures give exactly 0, value and gradient (soft_cross_entropy aside). A logit of −inf is
    a probability of 0, one of +inf or NaN makes the loss and gradient of its element NaN. Where one side alone is −inf
    what `distillation_loss` says of a masked class holds.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. Yang et al.: Multi-Label Knowledge
    Distillation, 2023 (a binary problem for every label).
    """
    options = make_binary_options(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        temperature_scaling=temperature_scaling,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
    )
    check_binary_tensors(student_logits, teacher_logits, labels, weight, pos_weight, denominator, options)
    if options.student_temperature > LARGE_TEMPERATURE or options.teacher_temperature > LARGE_TEMPERATURE:
        warn_of_temperature(options, student_logits, teacher_logits)
    if needs_reference(student_logits.device, "binary_distillation_loss"):
        return reference.binary_with_options(
            student_logits, teacher_logits, labels, weight, pos_weight, denominator, options
        )
    if inplace:
        check_inplace(student_logits, teacher_logits)
        if not torch.compiler.is_compiling() and student_logits.is_neg():
            options = options._replace(inplace=False)  # the memory holds the numbers with the other sign
    divisor, options = divisor_for_operators(denominator, options, student_logits.device)
    shape = student_logits.shape
    labels, weight, pos_weight = (x if x is None else x.detach().expand(shape) for x in (labels, weight, pos_weight))
    return apply(BinaryLoss, (student_logits, teacher_logits, pos_weight), (labels, weight, divisor), options)
