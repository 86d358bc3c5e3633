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

    loss        c + ℓ        c = soft_weight·S + hard_weight, times what the divergence is a multiple of (1 / (β (1−β))
                             for scaled_jsd); ℓ is a sum of terms that are of order c before they cancel
    gradient    c_s g + c_h (q_1 + target)     g, class by class, the terms that the gradient subtracts (`_terms`: q + p
                             of forward KL, q (|x − y| + D + 1) of reverse KL); and (q_1 − target) likewise;
                             classes below 2^-20 of the row's largest count as if they had that much

so a gradient of 1e-6 in a vocabulary of 128,256 is checked to as many digits as one of 0.5. The subgradient of tvd
jumps at p = q: where p and q are equal to all digits that the arithmetic has, any value between −q and q is right.

ε, and why it is not 0:

    float32    4e-6      both sides lose |a| · 2^-24 where a is a logit's distance from the reference point, and ours
                         may take a reference up to 60 binary orders below the maximum: 60 · 2^-24 = 3.6e-6
    bfloat16,  4e-6      float32 arithmetic; the result's one rounding to the dtype is in error(plain) already
    float16
    float64    4e-14     as float32, with 2^-53: 60 · 2^-53 = 7e-15; the oracle itself is no better than that

A gradient that backward() multiplies by grad_output is rounded to the logits' dtype twice: each time by up to
half a unit in the last place (2^-8 of the value in bfloat16, 2^-11 in float16), whatever plain PyTorch's luck was.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reptile_ext
from reptile_ext import _C, ops, reference
from reptile_ext.options import DIVERGENCE_TABLE, DIVERGENCES, make_options

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTION_SETS: list[str] = _C.cpu_info()["supported"]  # those that this machine has
BFLOAT16_SET = "avx512_bf16"  # avx512 with other instructions to make bfloat16
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 4e-14}


# A β that is not the divergence's default, nor one half, at which mistakes of β and 1 − β do not show.
BETAS = {
    name: next(v for v in (0.3, 2.5) if divergence.beta.is_allowed(v) and v != divergence.beta.default)
    for name, divergence in DIVERGENCE_TABLE.items()
    if divergence.beta is not None
}
BETAS |= {"scaled_jsd": 0.8, "skew_kl": 0.15, "skew_reverse_kl": 0.15, "dkd": 2.5}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
# D is 0 where student and teacher are equal, and so is its gradient: all but this one.
ZERO_AT_EQUALITY = [name for name in DIVERGENCES if name != "soft_cross_entropy"]


# The divergences whose terms `_terms` writes out. Of another one it has to suppose the largest.
WRITTEN_OUT = (
    *("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "scaled_jsd", "skew_kl", "skew_reverse_kl"),
    *("tvd", "hellinger", "soft_cross_entropy", "mse", "dkd"),
)


def keywords_of(divergence: str) -> dict[str, Any]:
    return {"divergence": divergence, "beta": BETAS.get(divergence)}


def labels_of(divergence: str, rows: int | tuple[int, ...], vocab_size: int) -> Tensor | None:
    """Labels for the divergence that needs them, none for the others."""
    return make_labels(rows, vocab_size) if DIVERGENCE_TABLE[divergence].needs_labels else None


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


def _plain_divergence(s: Tensor, t: Tensor, labels: Tensor | None, divergence: str, beta: float | None) -> Tensor:
    """D of T-scaled logits, as their papers and programs write it: log-probabilities first, autograd for the rest."""
    x, y = F.log_softmax(s, -1), F.log_softmax(t, -1)
    q, p = x.exp(), y.exp()
    if divergence == "forward_kl":
        return F.kl_div(x, y, reduction="none", log_target=True).sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(y, x, reduction="none", log_target=True).sum(-1)
    if divergence == "symmetric_kl":
        beta = 0.5 if beta is None else beta
        return (1 - beta) * (p * (y - x)).sum(-1) + beta * (q * (x - y)).sum(-1)
    if divergence in ("jsd", "scaled_jsd"):
        beta = 0.5 if beta is None else beta
        if beta in (0.0, 1.0):
            return _plain_divergence(s, t, None, "forward_kl" if beta == 0.0 else "reverse_kl", None)
        log_m = torch.logaddexp(y + math.log(beta), x + math.log1p(-beta))
        d = beta * (p * (y - log_m)).sum(-1) + (1 - beta) * (q * (x - log_m)).sum(-1)
        return d / (beta * (1 - beta)) if divergence == "scaled_jsd" else d
    if divergence in ("skew_kl", "skew_reverse_kl") and beta == 0.0:
        return _plain_divergence(s, t, None, divergence.replace("skew_kl", "forward_kl").removeprefix("skew_"), None)
    if divergence == "skew_kl":
        beta = 0.1 if beta is None else beta
        return (p * (y - torch.logaddexp(y + math.log(beta), x + math.log1p(-beta)))).sum(-1)
    if divergence == "skew_reverse_kl":
        beta = 0.1 if beta is None else beta
        return (q * (x - torch.logaddexp(x + math.log(beta), y + math.log1p(-beta)))).sum(-1)
    if divergence == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if divergence == "hellinger":
        return 1 - (0.5 * (x + y)).exp().sum(-1)
    if divergence == "soft_cross_entropy":
        return -(p * x).sum(-1)
    if divergence == "mse":
        return F.mse_loss(s, t, reduction="none").mean(-1)
    if divergence != "dkd":
        # One that nobody has written out here: the reference's formula of the value, autograd for the rest.
        options = make_options(divergence=divergence, beta=beta)
        rows = reference.Rows(s, t, x, y, labels, options.beta, options.one_minus_beta)
        return options.soft_scale * reference.ROW_DIVERGENCES[options.kernel()](rows)[0]
    # Zhao et al. 2022: the probabilities of the label and of all others, and the distribution among the others.
    assert labels is not None
    beta = 8.0 if beta is None else beta
    label = F.one_hot(labels.clamp(min=0).long(), s.shape[-1]).bool()

    def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others = z[~label].reshape(*z.shape[:-1], z.shape[-1] - 1)
        odds = z[label].reshape(z.shape[:-1]) - others.logsumexp(-1)
        return F.logsigmoid(odds), F.logsigmoid(-odds), F.log_softmax(others, -1)

    of_label_s, of_rest_s, others_s = parts(s)
    of_label_t, of_rest_t, others_t = parts(t)
    tckd = of_label_t.exp() * (of_label_t - of_label_s) + of_rest_t.exp() * (of_rest_t - of_rest_s)
    if s.shape[-1] == 1:
        return torch.zeros_like(tckd) + 0 * s.sum(-1)
    return tckd + beta * F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(-1)


def plain(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any) -> Tensor:
    """The loss as one writes it in PyTorch, in the arithmetic of the logits. Finite logits only."""
    arithmetic = arithmetic_of(student, teacher)
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    dim = keywords.get("dim", -1)
    s, t = student.movedim(dim, -1), teacher.movedim(dim, -1)
    size = min(s.shape[-1], t.shape[-1])
    s, t = s[..., :size].to(arithmetic), t[..., :size].to(arithmetic)
    d = _plain_divergence(
        s / t_s,
        t / t_t,
        None if labels is None else torch.where(labels == keywords.get("ignore_index", -100), 0, labels),
        keywords.get("divergence", "forward_kl"),
        keywords.get("beta"),
    )
    losses = (
        keywords.get("soft_weight", 1.0) * (t_s * t_t if keywords.get("temperature_scaling", "t2") == "t2" else 1) * d
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


def run(loss_fn: Any, student: Tensor, teacher: Tensor, *args: Any, grad_output: Tensor | None = None, **keywords: Any):
    """Loss and gradient of the student, whose strides stay as they are. `grad_output`: what backward() gets."""
    leaf = student.detach().requires_grad_()
    loss = loss_fn(leaf, teacher, *args, **keywords)
    if grad_output is None and loss.dim():
        grad_output = torch.ones_like(loss)
    return loss.detach(), torch.autograd.grad(loss, leaf, None if grad_output is None else grad_output.to(loss.dtype))[
        0
    ]


def _terms(
    s: Tensor, t: Tensor, labels: Tensor, divergence: str, beta: float | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of T-scaled rows: the size of D's terms [...]; of the terms that its gradient subtracts [..., V]; and by how much
    the gradient may differ because the arithmetic, of that epsilon, cannot tell p from q."""
    x, y = s.log_softmax(-1), t.log_softmax(-1)
    q, p = x.exp(), y.exp()
    one = torch.ones(s.shape[:-1], dtype=s.dtype)
    none = torch.zeros_like(s)
    given_beta = beta
    beta = {"dkd": 8.0, "skew_kl": 0.1, "skew_reverse_kl": 0.1}.get(divergence, 0.5) if beta is None else beta

    def centred(u: Tensor) -> Tensor:
        return q * (u.abs() + (q * u.abs()).sum(-1, keepdim=True) + 1)

    def log_ratio(log_w: Tensor, a: float) -> Tensor:
        return log_w - torch.logaddexp(y + math.log(a), x + math.log1p(-a))

    if divergence == "scaled_jsd" and beta == 0.0:
        divergence = "forward_kl"
    if divergence == "scaled_jsd" and beta == 1.0:
        divergence = "reverse_kl"
    if divergence in ("skew_kl", "skew_reverse_kl") and beta == 0.0:
        divergence = "forward_kl" if divergence == "skew_kl" else "reverse_kl"
    if divergence in ("forward_kl", "soft_cross_entropy"):
        return one, q + p, none
    if divergence == "reverse_kl":
        return one, centred(x - y), none
    if divergence == "symmetric_kl":
        return one, (1 - beta) * (q + p) + beta * centred(x - y), none
    if divergence in ("jsd", "scaled_jsd"):
        factor = 1 / (beta * (1 - beta)) if divergence == "scaled_jsd" else 1.0
        return factor * one, factor * (1 - beta) * centred(log_ratio(x, beta)), none
    if divergence == "skew_kl":
        z = (p - q) / (beta * p + (1 - beta) * q)
        return one, (1 - beta) ** 2 * centred(torch.where(q == 0, 0.0, z)), none
    if divergence == "skew_reverse_kl":
        z = (p - q) / (beta * q + (1 - beta) * p)
        u = log_ratio(x, 1 - beta).abs() + beta * (1 - beta) * torch.where(q == 0, 0.0, z).abs()
        return one, centred(u), none
    if divergence == "tvd":
        # An exponent of x is rounded at |x|, and both sides by their reference points and normalisers.
        same = (p - q).abs() <= 2 * epsilon * (x.abs() + y.abs() + 80) * (p + q)
        ambiguous = torch.where(same, q, 0.0)
        return one, q, ambiguous + q * ambiguous.sum(-1, keepdim=True)
    if divergence == "hellinger":
        return one, (p * q).sqrt() + q, none
    if divergence == "mse":
        return (s.abs() + t.abs()).square().mean(-1), 2 / s.shape[-1] * (s.abs() + t.abs()), none
    if divergence not in WRITTEN_OUT:
        # As large as terms of p, q and their logarithms can be.
        scale = make_options(divergence=divergence, beta=given_beta).soft_scale
        distance = (x - y).abs()
        return scale * one, scale * (q + p) * (1 + distance + ((q + p) * distance).sum(-1, keepdim=True)), none
    label = F.one_hot(labels, s.shape[-1]).bool()
    q_hat, p_hat = (torch.where(label, -torch.inf, z).softmax(-1).nan_to_num() for z in (s, t))
    return (1 + beta) * one, torch.where(label, q + p, (1 + beta) * q_hat + beta * p_hat), none


def mixture_terms(s: Tensor, t: Tensor, divergence: str, beta: float) -> Tensor:
    """What rounding errors of the gradient of a divergence through a mixture m are proportional to at any β, also where
    m is nearly p or q and a straightforward computation loses everything [..., V].

    The gradient is a multiple of q (u − Σ q u). Relative errors of q, p and 1/m change u by as much times |∂u/∂log q|,
    which is |∂u/∂log p|, and those of its arithmetic by as much times |u|; and what u − Σ q u cancels is lost.
    """
    x, y = s.log_softmax(-1), t.log_softmax(-1)
    q, p = x.exp(), y.exp()
    mirrored = divergence == "skew_reverse_kl"
    of_p, of_q = (1 - beta, beta) if mirrored else (beta, 1 - beta)
    m = of_p * p + of_q * q
    z = (p - q) / m
    log_q, of_log_q = torch.log1p(-of_p * z).abs(), of_p * p / m  # log q/m
    of_z = p * q / m**2
    if divergence == "skew_kl":
        factor, u = (1 - beta) ** 2, z.abs() + of_z
    elif mirrored:
        factor, u = 1.0, log_q + of_log_q + beta * (1 - beta) * (z.abs() + of_z)
    else:
        factor, u = (1 / beta if divergence == "scaled_jsd" else 1 - beta), log_q + of_log_q
    return factor * q * (u + (q * u).sum(-1, keepdim=True))


def sizes(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    grad_output: Tensor | None,
    exact_loss: Tensor,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the rounding errors of loss and gradient are proportional to, and what the gradient may be off by besides;
    see the top of this file."""
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    dim = keywords.get("dim", -1)
    s, t = (z.detach().double().movedim(dim, -1) for z in (student, teacher))
    size = min(s.shape[-1], t.shape[-1])
    leading = s.shape[:-1]
    soft = keywords.get("soft_weight", 1.0) * (t_s * t_t if keywords.get("temperature_scaling", "t2") == "t2" else 1)
    hard = keywords.get("hard_weight", 0.0)
    is_in, factor = _in_and_factor(leading, labels, keywords)
    at = torch.zeros(leading, dtype=torch.int64) if labels is None else torch.where(is_in, labels, 0).long()
    loss_terms, terms, slack = _terms(
        s[..., :size] / t_s,
        t[..., :size] / t_t,
        at,
        keywords.get("divergence", "forward_kl"),
        keywords.get("beta"),
        torch.finfo(arithmetic_of(student, teacher)).eps,
    )
    loss_size = factor * (soft * loss_terms + hard)
    if keywords.get("reduction") != "none":
        loss_size = loss_size.sum()
    if grad_output is not None:
        factor = factor * grad_output.double()

    terms, slack = soft / t_s * terms, soft / t_s * slack
    if hard:
        smoothing = keywords.get("label_smoothing", 0.0)
        terms = terms + hard * s[..., :size].softmax(-1) + hard * smoothing / size
        terms = terms + hard * (1 - smoothing) * torch.zeros_like(terms).scatter_(-1, at.unsqueeze(-1), 1.0)
    terms = terms.maximum(terms.amax(-1, keepdim=True) * 2**-20)

    def of_gradient(z: Tensor) -> Tensor:
        whole = torch.zeros_like(s)
        whole[..., :size] = z
        return (whole * factor.abs().unsqueeze(-1)).movedim(-1, dim)

    return loss_size + exact_loss.abs(), of_gradient(terms), of_gradient(slack)


def error(found: Tensor, right: Tensor, size: Tensor, slack: Tensor | float = 0.0) -> float:
    """The largest error beyond `slack` in units of `size`; what has no size must be exactly right."""
    assert found.shape == right.shape
    if not found.numel():
        return 0.0
    difference = ((found.double() - right).abs() - slack).clamp(min=0)
    assert not difference.isnan().any(), "NaN in finite results"
    return torch.where(difference == 0, 0.0, difference / size).max().item()


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    sets: list[str] | None = None,
    **keywords: Any,
) -> None:
    """Asserts the tolerance rule for loss and gradient, on every instruction set in `sets` (default: the one in use)
    that is another for these dtypes. The logits of rows that count must be finite."""
    if sets and torch.bfloat16 not in (student.dtype, teacher.dtype):
        sets = [name for name in sets if name != BFLOAT16_SET]
    before = ops.instruction_set()
    found = {}
    try:
        for name in sets or [before]:
            ops.instruction_set(name)
            found[name] = run(
                reptile_ext.distillation_loss, student, teacher, labels, grad_output=grad_output, **keywords
            )
    finally:
        ops.instruction_set(before)
    assert_near(found, student, teacher, labels, grad_output=grad_output, **keywords)


def assert_near(
    found: dict[str, tuple[Tensor, Tensor]],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    **keywords: Any,
) -> None:
    """Asserts that these losses and gradients, however they came about, keep the tolerance rule."""
    # float64 from the leaf on, so that the oracle's gradient is not rounded to the logits' dtype.
    right = run(exact, student.double(), teacher, labels, grad_output=grad_output, **keywords)
    rival = run(plain, student, teacher, labels, grad_output=grad_output, **keywords)
    loss_size, gradient_size, slack = sizes(student, teacher, labels, grad_output, right[0], keywords)
    # The kernel rounds its gradient to the logits' dtype; what backward() brings in comes on top of that.
    half_unit = torch.finfo(student.dtype).eps / 2 if grad_output is not None else 0.0
    plain_errors = error(rival[0], right[0], loss_size), error(rival[1], right[1], gradient_size, slack)
    for name, (loss, gradient) in found.items():
        assert loss.dtype == arithmetic_of(student, teacher)
        assert gradient.dtype == student.dtype
        epsilons = EPSILON[loss.dtype], EPSILON[student.dtype] + half_unit + max(0.0, half_unit - plain_errors[1])
        errors = error(loss, right[0], loss_size), error(gradient, right[1], gradient_size, slack)
        for what, ours, plains, epsilon in zip(("loss", "gradient"), errors, plain_errors, epsilons, strict=True):
            assert ours <= plains + epsilon, (
                f"{what} on {name}: our error {ours:.3g} > plain PyTorch's {plains:.3g} + {epsilon:.3g}"
            )
