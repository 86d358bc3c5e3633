"""What is right, and how near to it is near enough. All tests share this file.

Three programs compute every loss:

    ours    `reptile_ext.distillation_loss`
    exact   `reptile_ext.reference` on logits upcast to float64: the oracle
    plain   what one writes without this package: log_softmax of the upcast logits, F.kl_div, F.cross_entropy

`plain` has two jobs. In float64 it is the independent witness that the oracle is right (test_oracle_* in
test_loss.py), and in the dtype's own arithmetic it is the rival whose error ours may not exceed.

THE TOLERANCE RULE (SPEC, promise 2):   error(ours) <= error(plain) + ε(dtype)

An error is the largest of |found − exact| / size over all elements, where size is what the rounding errors of a
straightforward computation are proportional to:

    loss        c + ℓ        c = soft_weight·S + hard_weight; ℓ is a sum of terms that are of order c before they cancel
    gradient    c_s (q + p) + c_h (q_1 + target)     the terms that (q − p) and (q_1 − target) subtract, class by class;
                             classes below 2^-20 of the row's largest count as if they had that much

so a gradient of 1e-6 in a vocabulary of 128,256 is checked to as many digits as one of 0.5.

ε, and why it is not 0:

    float32    4e-6      both sides lose |a| · 2^-24 where a is a logit's distance from the reference point, and ours
                         may take a reference up to 60 binary orders below the maximum: 60 · 2^-24 = 3.6e-6
    bfloat16,  4e-6      float32 arithmetic; the result's one rounding to the dtype is in error(plain) already
    float16
    float64    4e-14     as float32, with 2^-53: 60 · 2^-53 = 7e-15; the oracle itself is no better than that

plus half a unit in the last place of the logits' dtype (2^-8 of the value in bfloat16, 2^-11 in float16) for a gradient
that is rounded once more when backward() multiplies it: by what comes from above, and in float16 always (the division
by the number of rows happens there, so that a loss scaler has something to scale).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reptile_ext
from reptile_ext import _C, ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTION_SETS: list[str] = _C.cpu_info()["supported"]  # those that this machine has
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 4e-14}


def name_of(value: Any) -> str | None:
    """Readable test ids for dtypes."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def arithmetic_of(*logits: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [z.dtype for z in logits] else torch.float32


def make_logits(
    kind: str, rows: int | tuple[int, ...], vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [..., V] of one of the kinds that go wrong in different ways."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*((rows,) if isinstance(rows, int) else rows), vocab_size)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def spike(height: float) -> Tensor:
        at = torch.randint(vocab_size, shape[:-1], generator=generator).unsqueeze(-1)
        return torch.zeros(shape, dtype=torch.float64).scatter_(-1, at, height)

    if kind == "random":
        s, t = 3 * normal(), 3 * normal()
    elif kind == "flat":  # every class near 1/V: the gradient is all cancellation
        s, t = 5 + 0.01 * normal(), -7 + 0.01 * normal()
    elif kind == "peaked":  # ±1e4: overflow, and one-hot distributions that may or may not agree
        s, t = normal() + spike(1e4) - spike(1e4), normal() + spike(1e4) - spike(1e4)
    elif kind == "near_equal":  # D far below the rounding error of its terms
        t = 3 * normal()
        s = t + 1e-4 * normal()
    elif kind == "late_peak":  # maxima that the first classes say nothing of: 35, still tame, and 300, not
        s, t = normal(), normal()
        s[..., -1] += 35
        t[..., vocab_size // 2 :] += 300
    elif kind == "rising":  # every class has a new maximum
        s = torch.linspace(-500, 500, vocab_size, dtype=torch.float64) + normal()
        t = torch.linspace(-30, 30, vocab_size, dtype=torch.float64) + normal()
    else:
        raise ValueError(kind)
    return s.to(dtype), t.to(dtype)


def make_labels(rows: int | tuple[int, ...], vocab_size: int, seed: int = 1) -> Tensor:
    """Labels with every third row out (-100), for as long as a row stays in."""
    shape = (rows,) if isinstance(rows, int) else rows
    labels = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[1::3] = -100
    return labels


def _copy_into(memory: Tensor, z: Tensor) -> Tensor:
    assert memory.shape == z.shape
    return memory.copy_(z)


# name: (logits [2, 3, V] -> the same logits lying otherwise in memory)
LAYOUTS = {
    "contiguous": lambda z: z.contiguous(),
    "class_stride_2": lambda z: _copy_into(z.new_full((*z.shape[:-1], 2 * z.shape[-1]), torch.nan)[..., ::2], z),
    "padded_rows": lambda z: _copy_into(z.new_full((*z.shape[:-1], z.shape[-1] + 3), torch.nan)[..., 1:-2], z),
    "misaligned": lambda z: _copy_into(z.new_full((z.numel() + 1,), torch.nan)[1:].view_as(z), z),
    "class_first": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows_transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "shifted": lambda z: _copy_into(z.new_full((z.shape[0], z.shape[1] + 1, z.shape[2]), torch.nan)[:, :-1], z),
    "expanded": lambda z: z[:1].expand_as(z),
}


def pair(temperature: float | tuple[float, float]) -> tuple[float, float]:
    return temperature if isinstance(temperature, tuple) else (temperature, temperature)


def _in_and_factor(leading: torch.Size, labels: Tensor | None, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which rows are in, and d loss / d ℓ of every row."""
    w = keywords.get("weight")
    w = torch.ones(leading, dtype=torch.float64) if w is None else w.double()
    if labels is not None:
        w = torch.where(labels == keywords.get("ignore_index", -100), 0.0, w)
    factor = w
    reduction = keywords.get("reduction", "mean")
    if keywords.get("denominator") is not None:
        factor = w / keywords["denominator"]
    elif reduction == "mean" and (w != 0).any():
        factor = w / w.sum()
    return w != 0, factor


def plain(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any) -> Tensor:
    """The loss as one writes it in PyTorch, in the arithmetic of the logits. Finite logits only."""
    arithmetic = arithmetic_of(student, teacher)
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    dim = keywords.get("dim", -1)
    s, t = student.movedim(dim, -1), teacher.movedim(dim, -1)
    size = min(s.shape[-1], t.shape[-1])
    s, t = s[..., :size].to(arithmetic), t[..., :size].to(arithmetic)
    kl = F.kl_div(F.log_softmax(s / t_s, -1), F.log_softmax(t / t_t, -1), reduction="none", log_target=True).sum(-1)
    losses = (
        keywords.get("soft_weight", 1.0) * (t_s * t_t if keywords.get("temperature_scaling", "t2") == "t2" else 1) * kl
    )
    if keywords.get("hard_weight"):
        ce = F.cross_entropy(
            s.reshape(-1, size),
            labels.reshape(-1).long(),
            ignore_index=keywords.get("ignore_index", -100),
            label_smoothing=keywords.get("label_smoothing", 0.0),
            reduction="none",
        )
        losses = losses + keywords["hard_weight"] * ce.reshape(losses.shape)
    is_in, factor = _in_and_factor(losses.shape, labels, keywords)
    losses = torch.where(is_in, losses, 0) * factor.to(arithmetic)
    return losses if keywords.get("reduction") == "none" else losses.sum()


def exact(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any) -> Tensor:
    """The oracle: the reference in float64."""
    return reference.distillation_loss(student.double(), teacher.double(), labels, **keywords)


def run(loss_fn: Any, student: Tensor, teacher: Tensor, *args: Any, upstream: Tensor | None = None, **keywords: Any):
    """Loss and gradient of the student, whose strides stay as they are. `upstream`: what backward() gets."""
    leaf = student.detach().requires_grad_()
    loss = loss_fn(leaf, teacher, *args, **keywords)
    if upstream is None and loss.dim():
        upstream = torch.ones_like(loss)
    return loss.detach(), torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))[0]


def sizes(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    upstream: Tensor | None,
    exact_loss: Tensor,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """What the rounding errors of loss and gradient are proportional to; see the top of this file."""
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    s, t = (z.detach().double().movedim(keywords.get("dim", -1), -1) for z in (student, teacher))
    size = min(s.shape[-1], t.shape[-1])
    leading = s.shape[:-1]
    soft = keywords.get("soft_weight", 1.0) * (t_s * t_t if keywords.get("temperature_scaling", "t2") == "t2" else 1)
    hard = keywords.get("hard_weight", 0.0)
    is_in, factor = _in_and_factor(leading, labels, keywords)
    loss_size = factor * (soft + hard)
    if keywords.get("reduction") != "none":
        loss_size = loss_size.sum()
    if upstream is not None:
        factor = factor * upstream.double()

    q, p = (s[..., :size] / t_s).softmax(-1), (t[..., :size] / t_t).softmax(-1)
    terms = soft / t_s * (q + p)
    if hard:
        smoothing = keywords.get("label_smoothing", 0.0)
        at = torch.where(is_in, labels, 0).long().unsqueeze(-1)
        terms = terms + hard * s[..., :size].softmax(-1) + hard * smoothing / size
        terms = terms + hard * (1 - smoothing) * torch.zeros_like(terms).scatter_(-1, at, 1.0)
    terms = terms.maximum(terms.amax(-1, keepdim=True) * 2**-20)
    gradient_size = torch.zeros_like(s)
    gradient_size[..., :size] = terms
    gradient_size = gradient_size * factor.abs().unsqueeze(-1)
    return loss_size + exact_loss.abs(), gradient_size.movedim(-1, keywords.get("dim", -1))


def error(found: Tensor, right: Tensor, size: Tensor) -> float:
    """The largest error in units of `size`; what has no size must be exactly right."""
    assert found.shape == right.shape
    if not found.numel():
        return 0.0
    difference = (found.double() - right).abs()
    assert not difference.isnan().any(), "NaN in finite results"
    return torch.where(difference == 0, 0.0, difference / size).max().item()


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    sets: list[str] | None = None,
    **keywords: Any,
) -> None:
    """Asserts the tolerance rule for loss and gradient, on every instruction set in `sets` (default: the one in use).
    The logits of rows that are in must be finite."""
    before = ops.instruction_set()
    found = {}
    try:
        for name in sets or [before]:
            ops.instruction_set(name)
            found[name] = run(reptile_ext.distillation_loss, student, teacher, labels, upstream=upstream, **keywords)
    finally:
        ops.instruction_set(before)
    assert_near(found, student, teacher, labels, upstream=upstream, **keywords)


def assert_near(
    found: dict[str, tuple[Tensor, Tensor]],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    **keywords: Any,
) -> None:
    """Asserts that these losses and gradients, however they came about, keep the tolerance rule."""
    # float64 from the leaf on, so that the oracle's gradient is not rounded to the logits' dtype.
    right = run(exact, student.double(), teacher, labels, upstream=upstream, **keywords)
    rival = run(plain, student, teacher, labels, upstream=upstream, **keywords)
    loss_size, gradient_size = sizes(student, teacher, labels, upstream, right[0], keywords)
    # The kernel rounds its gradient to the logits' dtype; what backward() brings in comes on top of that.
    rounded_again = (
        torch.finfo(student.dtype).eps / 2 if upstream is not None or student.dtype == torch.float16 else 0.0
    )
    plain_errors = error(rival[0], right[0], loss_size), error(rival[1], right[1], gradient_size)
    for name, (loss, gradient) in found.items():
        assert loss.dtype == arithmetic_of(student, teacher)
        assert gradient.dtype == student.dtype
        epsilons = EPSILON[loss.dtype], EPSILON[student.dtype] + rounded_again
        errors = error(loss, right[0], loss_size), error(gradient, right[1], gradient_size)
        for what, ours, plains, epsilon in zip(("loss", "gradient"), errors, plain_errors, epsilons, strict=True):
            assert ours <= plains + epsilon, (
                f"{what} on {name}: our error {ours:.3g} > plain PyTorch's {plains:.3g} + {epsilon:.3g}"
            )
