"""The losses as modules: they hold the keywords and take the tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .arguments import make_options
from .functional import distillation_loss


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
