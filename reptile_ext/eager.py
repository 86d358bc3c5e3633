"""Every divergence in plain PyTorch as one writes it without us: the baseline of the benchmark.

Each function takes logits [N, V] and labels [N], which dkd alone uses, and returns the mean over the rows at
T_s = T_t = `TEMPERATURE`, times T². Speed is what these are for: none keeps the promises that `reference` keeps (equal
logits, masked classes, ignored rows). One function a divergence, because torch.compile counts recompilations by
function. A divergence without a function here is timed as `reference` writes its value, with autograd's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .options import DIVERGENCES, make_options

__all__ = ["EAGER", "TEMPERATURE", "eager_loss_of"]

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of student's logits, teacher's logits and labels
TEMPERATURE = 2.0
T2 = TEMPERATURE * TEMPERATURE


def _log_probabilities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of docs/maths.md."""
    return F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), the mean over rows; PyTorch has the two the other way round."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(β p + (1−β) q)"""
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))


def forward_kl(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    return _kl(y, x) * T2


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    return _kl(x, y) * T2


def symmetric_kl(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    return (0.5 * _kl(y, x) + 0.5 * _kl(x, y)) * T2


def jsd(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    log_m = _mixture(y, x, 0.5)
    return (0.5 * _kl(y, log_m) + 0.5 * _kl(x, log_m)) * T2


def scaled_jsd(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    return jsd(student, teacher, labels) / (0.5 * 0.5)


def skew_kl(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    return _kl(y, _mixture(y, x, 0.1)) * T2


def skew_reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)
    return _kl(x, _mixture(x, y, 0.1)) * T2


def tvd(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    q, p = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return 0.5 * (p - q).abs().sum(-1).mean() * T2


def hellinger(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    x, y = _log_probabilities(student, teacher)  # not sqrt(p q), whose derivative at 0 is infinite
    return (1 - (0.5 * (x + y)).exp().sum(-1)).mean() * T2


def soft_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    return F.cross_entropy(student / TEMPERATURE, F.softmax(teacher / TEMPERATURE, -1)) * T2


def mse(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    return F.mse_loss(student / TEMPERATURE, teacher / TEMPERATURE) * T2


def dkd(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    index = labels.unsqueeze(-1)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the label and of all others together; and of the others among themselves."""
        z = logits / TEMPERATURE
        of_label = F.log_softmax(z, -1).gather(-1, index)
        return torch.cat([of_label, (-of_label.exp()).log1p()], -1), F.log_softmax(z.scatter(-1, index, -1e4), -1)

    (x, x_others), (y, y_others) = parts(student), parts(teacher)
    return (_kl(y, x) + 8.0 * _kl(y_others, x_others)) * T2


def eager_loss_of(divergence: str) -> Loss:
    """The function above of that name or, where there is none, the reference's formula."""
    written: Loss | None = globals().get(divergence)
    return written or _from_reference(divergence)


def _from_reference(divergence: str) -> Loss:
    options = make_options(divergence=divergence, temperature=TEMPERATURE)
    value_and_gradient = reference.ROW_DIVERGENCES[options.kernel()]

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        s, t = student / TEMPERATURE, teacher / TEMPERATURE
        x, y = F.log_softmax(s, -1), F.log_softmax(t, -1)
        value, _ = value_and_gradient(reference.Rows(s, t, x, y, labels, options.beta, options.one_minus_beta))
        return value.mean() * options.soft_scale

    return loss


EAGER: dict[str, Loss] = {divergence: eager_loss_of(divergence) for divergence in DIVERGENCES}
