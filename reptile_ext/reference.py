"""The losses in plain PyTorch: what every kernel must equal, and what runs on a device without kernels.

In float64 this file is the oracle of the tests. It is written to be read next to docs/maths.md: one function a
divergence, differentiable by autograd to any order, without regard for speed or memory.

Two things look roundabout and are not. The row's maximum is taken off before anything is divided or summed, so
that logits of ±1e4 lose nothing; and each divergence is written over t' − s' and the two log-sum-exps rather than
over log-probabilities, because then equal logits give a difference of exactly 0 in the value and in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import DIVERGENCES, REDUCTIONS, Options, check_tensors, make_options

__all__ = ["distillation_loss"]


def _scaled(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z' = (z − max z) / T and lse = log Σ exp z', class dimension last; log_softmax(z / T) is z' − lse.

    A row that holds a NaN or +inf, or nothing but −inf, becomes NaN throughout, gradient included.
    """
    top = z.detach().amax(-1, keepdim=True)
    broken = ~top.isfinite()
    # Multiplied, not filled, with NaN: the gradient of a fill would be 0 and hide the broken row.
    z = (z - torch.where(broken, 0.0, top)) * torch.where(broken, torch.nan, 1.0) / temperature
    return z, z.logsumexp(-1, keepdim=True)


def forward_kl(s: Tensor, lse_s: Tensor, t: Tensor, lse_t: Tensor) -> Tensor:
    """Σ p (y − x) = Σ p (t' − s') + lse_s − lse_t, over the classes that the teacher gives any mass."""
    p = (t - lse_t).exp()
    difference = torch.where(p == 0, 0.0, t - s)
    return (p * difference).sum(-1) + (lse_s - lse_t).squeeze(-1)


ROW_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {"forward_kl": forward_kl}
assert tuple(ROW_DIVERGENCES) == DIVERGENCES


def _not_negative(d: Tensor) -> Tensor:
    """max(d, 0) for the value; the gradient stays that of d, which rounding alone has pushed below 0."""
    return torch.where(d < 0, d - d.detach(), d)


def cross_entropy(s: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy at temperature 1 with the smoothing spread over the classes that are not masked."""
    z, lse = _scaled(s, 1.0)
    at_label = z.gather(-1, labels.unsqueeze(-1))
    loss = (lse - at_label).squeeze(-1)
    if label_smoothing:
        masked = z == -torch.inf
        uniform = torch.where(masked, 0.0, lse - z).sum(-1) / (~masked).sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return loss


def row_losses(s: Tensor, t: Tensor, labels: Tensor | None, options: Options) -> Tensor:
    """ℓ of every row of [N, V] logits of one floating dtype."""
    # Without a soft part the teacher is not looked at; the student in its place gives D = 0 and no gradient.
    zs, lse_s = _scaled(s, options.student_temperature)
    zt, lse_t = _scaled(t, options.teacher_temperature) if options.soft_scale > 0 else (zs, lse_s)
    loss = options.soft_scale * _not_negative(ROW_DIVERGENCES[options.divergence](zs, lse_s, zt, lse_t))
    if options.hard_weight > 0:
        assert labels is not None
        loss = loss + options.hard_weight * cross_entropy(s, labels, options.label_smoothing)
    return loss


def distillation_loss(
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
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    vocab: str = "error",
    dim: int = -1,
    inplace: bool = False,
) -> Tensor:
    """`reptile_ext.distillation_loss` in plain PyTorch: same arguments and result, any device, any order of derivative.

    `inplace` is accepted and has no effect: autograd keeps what it needs.
    """
    options = make_options(
        divergence,
        beta,
        temperature,
        temperature_scaling,
        soft_weight,
        hard_weight,
        label_smoothing,
        ignore_index,
        reduction,
        vocab,
        dim,
        inplace,
    )
    check_tensors(student_logits, teacher_logits, labels, weight, denominator, options)
    return with_options(student_logits, teacher_logits, labels, weight, denominator, options)


def with_options(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    check_values: bool = True,
) -> Tensor:
    """`distillation_loss` of arguments that are checked already; the values of labels and weights if `check_values`."""
    s = student_logits.movedim(options.dim, -1)
    t = teacher_logits.movedim(options.dim, -1)
    leading = s.shape[:-1]
    vocab_size = min(s.shape[-1], t.shape[-1])  # equal, or vocab="truncate"
    double = torch.float64 in (s.dtype, t.dtype)
    arithmetic = torch.float64 if double else torch.float32
    # One layout for both: a sum in another order would make equal logits differ.
    s = s[..., :vocab_size].reshape(-1, vocab_size).contiguous().to(arithmetic)
    t = t[..., :vocab_size].reshape(-1, vocab_size).contiguous().to(arithmetic)

    # Where values can be looked at without a sync, and outside of transforms, wrong ones are errors.
    may_look = (
        check_values
        and s.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    )
    with torch.no_grad():
        w = s.new_ones(s.shape[0]) if weight is None else weight.reshape(-1).to(arithmetic)
        is_in = w != 0
        bad = torch.zeros_like(is_in)
        if weight is not None and may_look and not bool(((w >= 0) & w.isfinite()).all()):
            wrong = w[~((w >= 0) & w.isfinite())][0].item()
            raise ValueError(f"weight must be finite and not negative; got {wrong}")
        if labels is not None:
            labels = labels.reshape(-1).to(torch.int64)
            is_in = is_in & (labels != options.ignore_index)
            bad = is_in & ((labels < 0) | (labels >= vocab_size))
            if may_look and bool(bad.any()):
                first = labels[bad][0].item()
                raise ValueError(
                    f"labels must lie in [0, {vocab_size}) or equal ignore_index={options.ignore_index}; got {first}"
                )
            labels = torch.where(is_in & ~bad, labels, 0)
        w = torch.where(is_in, w, 0.0)

    # A row that is out is never looked at: its logits are replaced before any arithmetic, so that a NaN in it
    # cannot come back through 0 · NaN in the gradient.
    s = torch.where(is_in.unsqueeze(-1), s, 0.0)
    t = torch.where(is_in.unsqueeze(-1), t, 0.0)
    losses = torch.where(is_in, w * row_losses(s, t, labels, options), 0.0)
    losses = losses * torch.where(bad, torch.nan, 1.0)  # a wrong label where it could not be an error: that row alone

    reduction = REDUCTIONS[options.reduction]
    if reduction == "none":
        return losses.reshape(leading)
    total = losses.sum()
    if denominator is not None:
        divisor = torch.as_tensor(denominator, device=total.device).detach().to(arithmetic)
        if may_look and bool(is_in.any()) and not 0 < divisor.item() < torch.inf:
            raise ValueError(f"denominator must be positive and finite; got {divisor.item()}")
        return total / torch.where(is_in.any(), divisor, 1.0)
    if reduction == "sum":
        return total
    return total / torch.where(is_in.any(), w.sum(), 1.0)
