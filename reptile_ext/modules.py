"""The losses as modules: they hold the keywords and take the tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .arguments import check_memory_budget, check_scale, check_softcap, make_options
from .functional import distillation_loss
from .linear import linear_distillation_loss


class DistillationLoss(nn.Module):
    """`distillation_loss` with its keywords fixed.

    Equivalent PyTorch (temperature T, every row counts)::

        x = F.log_softmax(student_logits.float() / T, -1)
        y = F.log_softmax(teacher_logits.float() / T, -1)
        loss = T * T * (y.exp() * (y - x)).sum(-1).mean()

    The keywords are those of `distillation_loss` without `weight` and `denominator`, which go to the call, and are
    checked when the module is made.

    Shapes: student and teacher logits [..., V]; labels, if any, integer [...]; result a scalar, or [...] with
    `reduction="none"`. Dtypes, errors and the paper: see `distillation_loss`.

    Example::

        criterion = DistillationLoss(temperature=2.0, hard_weight=0.5)
        criterion(student(x), teacher(x), labels).backward()
    """

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float | None = None,
        temperature: float | tuple[float, float] = 1.0,
        temperature_scaling: str = "t2",
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab: str = "error",
        dim: int = -1,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.keywords: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "temperature_scaling": temperature_scaling,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "vocab": vocab,
            "dim": dim,
            "inplace": inplace,
        }
        make_options(*self.keywords.values())  # complain now, not in the first step

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return distillation_loss(
            student_logits, teacher_logits, labels, weight=weight, denominator=denominator, **self.keywords
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items() if value is not None)


class LinearDistillationLoss(nn.Module):
    """`linear_distillation_loss` with its keywords fixed.

    Equivalent PyTorch (temperature T, no bias, every row counts), of which only a chunk of rows exists at a time::

        x = F.log_softmax(F.linear(student_hidden, student_weight).float() / T, -1)
        y = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / T, -1)
        loss = T * T * (y.exp() * (y - x)).sum(-1).mean()

    The keywords are those of `linear_distillation_loss` without `student_bias`, `teacher_bias`, `weight` and
    `denominator`, which go to the call.

    Shapes: hidden states [..., H], heads [V, H], biases [V]; labels, if any, integer [...]; result a scalar, or [...]
    with `reduction="none"`. Dtypes, errors and papers: see `linear_distillation_loss`.

    Example::

        criterion = LinearDistillationLoss(temperature=2.0)
        criterion(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight).backward()
    """

    def __init__(
        self,
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        memory_budget: int | None = None,
        divergence: str = "forward_kl",
        beta: float | None = None,
        temperature: float | tuple[float, float] = 1.0,
        temperature_scaling: str = "t2",
        soft_weight: float = 1.0,
        hard_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab: str = "error",
    ) -> None:
        super().__init__()
        of_loss: dict[str, Any] = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "temperature_scaling": temperature_scaling,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "vocab": vocab,
        }
        make_options(*of_loss.values(), -1, False)  # complain now, not in the first step
        check_memory_budget(memory_budget)
        self.keywords: dict[str, Any] = {
            "student_softcap": check_softcap("student", student_softcap),
            "teacher_softcap": check_softcap("teacher", teacher_softcap),
            "student_scale": check_scale("student", student_scale),
            "teacher_scale": check_scale("teacher", teacher_scale),
            "memory_budget": memory_budget,
            **of_loss,
        }

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weight=weight,
            denominator=denominator,
            **self.keywords,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items() if value is not None)
