"""The losses in plain PyTorch: what every kernel must equal, and what runs on a device without kernels.

In float64 this file is the oracle of the tests. It is written to be read next to docs/maths.md, without regard for
speed or memory: one function a divergence, giving its value and its gradient, each in differentiable operations, so
that autograd has every higher derivative.

The gradient is written out rather than left to autograd because of the promises: equal logits must give a gradient of
exactly 0, and autograd's chain of products rounds both sides of a difference differently. The tests hold the two
together by finite differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import compat
from .checks import (
    check_binary_tensors,
    check_divisor_value,
    check_label_values,
    check_pos_weight_values,
    check_rows_in,
    check_sparse_tensors,
    check_sparse_values,
    check_target_values,
    check_tensors,
    check_weight_values,
)
from .options import (
    KERNELS,
    REDUCTIONS,
    TAILS,
    BinaryKeywords,
    Keywords,
    Options,
    SparseKeywords,
    make_binary_options,
    make_options,
    make_sparse_options,
    mirror,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "binary_distillation_loss",
    "distillation_loss",
    "linear_distillation_loss",
    "sparse_distillation_loss",
]


class Rows(NamedTuple):
    """[N, V] rows, T-scaled: what the functions below are functions of."""

    s: Tensor  # student's logits over T_s
    t: Tensor  # teacher's over T_t
    x: Tensor  # log_softmax(s)
    y: Tensor  # log_softmax(t)
    labels: Tensor | None
    beta: float
    one_minus_beta: float  # 1 − β

    def mirrored(self) -> Rows:
        """Student and teacher with their roles exchanged."""
        return self._replace(s=self.t, t=self.s, x=self.y, y=self.x)


# Value D [N] and gradient T_s · ∂D/∂s [N, V].
Result = tuple[Tensor, Tensor]

# By the name of the kernel.
ROW_DIVERGENCES: dict[str, Callable[[Rows], Result]] = {}


def row_divergence(f: Callable[[Rows], Result]) -> Callable[[Rows], Result]:
    """Makes a function of this file the divergence of its name."""
    ROW_DIVERGENCES[f.__name__] = f
    return f


def _log_softmax(z: Tensor) -> Tensor:
    """log_softmax over the last dimension; a row with a NaN or +inf, or nothing but −inf, is NaN throughout."""
    top = z.detach().amax(-1, keepdim=True)
    broken = ~top.isfinite()
    # Multiplied, not filled, with NaN: the gradient of a fill would be 0 and hide the broken row.
    z = (z - torch.where(broken, 0.0, top)) * torch.where(broken, torch.nan, 1.0)
    return z - z.logsumexp(-1, keepdim=True)


def _centred(q: Tensor, u: Tensor) -> Tensor:
    """q (u − Σ q u), which is g − q Σ g for g = q u; 0 in a row whose Σ q u is infinite."""
    mean = (q * u).sum(-1, keepdim=True)
    infinite = mean.isinf()
    return q * (torch.where(infinite, 0.0, u) - torch.where(infinite, 0.0, mean))


def _where_mass(q: Tensor, u: Tensor) -> Tensor:
    """u of the classes that q gives any mass, 0 for the others: they add nothing, even if u is infinite or NaN."""
    return torch.where(q == 0, 0.0, u)


@row_divergence
def forward_kl(rows: Rows) -> Result:
    """Σ p (y − x)"""
    q, p = rows.x.exp(), rows.y.exp()
    return (p * _where_mass(p, rows.y - rows.x)).sum(-1), q - p


@row_divergence
def reverse_kl(rows: Rows) -> Result:
    """Σ q (x − y)"""
    q = rows.x.exp()
    u = _where_mass(q, rows.x - rows.y)
    return (q * u).sum(-1), _centred(q, u)


@row_divergence
def symmetric_kl(rows: Rows) -> Result:
    """(1−β) · forward_kl + β · reverse_kl"""
    forward, reverse = forward_kl(rows), reverse_kl(rows)
    return rows.one_minus_beta * forward[0] + rows.beta * reverse[0], rows.one_minus_beta * forward[
        1
    ] + rows.beta * reverse[1]


class Mixture(NamedTuple):
    """m = a·p + b·q, a + b = 1, by z = (p − q) / m: exactly 0 where p = q, bounded everywhere, and
    p/m = 1 + b·z, q/m = 1 − a·z."""

    p: Tensor
    q: Tensor
    z: Tensor
    log_p: Tensor  # log(p / m), 0 where p is
    log_q: Tensor  # log(q / m), 0 where q is


def _mixture(rows: Rows, a: float, b: float) -> Mixture:
    p, q = rows.y.exp(), rows.x.exp()
    m = a * p + b * q
    m = torch.where(m == 0, 1.0, m)
    z = (p - q) / m

    def log_ratio(log_w: Tensor, part: Tensor, w_minus_1: Tensor) -> Tensor:
        # A difference of logarithms has no digits left where w is near 1, log1p none where it is near 0.
        near = w_minus_1.abs() < 0.5
        far = torch.where(near | (part == 0), 0.0, log_w) - torch.where(near | (part == 0), 0.0, m.log())
        return torch.where(near, torch.where(near, w_minus_1, 0.0).log1p(), far)

    return Mixture(p, q, z, log_ratio(rows.y, p, b * z), log_ratio(rows.x, q, -a * z))


@row_divergence
def jsd(rows: Rows) -> Result:
    """β Σ p (y − log m) + (1−β) Σ q (x − log m),  m = β p + (1−β) q"""
    m = _mixture(rows, rows.beta, rows.one_minus_beta)
    value = rows.beta * (m.p * m.log_p).sum(-1) + rows.one_minus_beta * (m.q * m.log_q).sum(-1)
    return value, rows.one_minus_beta * _centred(m.q, m.log_q)


@row_divergence
def skew_kl(rows: Rows) -> Result:
    """Σ p (y − log(β p + (1−β) q))"""
    m = _mixture(rows, rows.beta, rows.one_minus_beta)
    return (m.p * m.log_p).sum(-1), -(rows.one_minus_beta**2) * _centred(m.q, m.z)


@row_divergence
def skew_reverse_kl(rows: Rows) -> Result:
    """Σ q (x − log(β q + (1−β) p))"""
    m = _mixture(rows, rows.one_minus_beta, rows.beta)
    return (m.q * m.log_q).sum(-1), _centred(m.q, m.log_q + rows.beta * rows.one_minus_beta * m.z)


@row_divergence
def tvd(rows: Rows) -> Result:
    """½ Σ |p − q|, subgradient 0 where p = q"""
    p, q = rows.y.exp(), rows.x.exp()
    return 0.5 * (p - q).abs().sum(-1), 0.5 * _centred(q, (q - p).sign())


@row_divergence
def hellinger(rows: Rows) -> Result:
    """1 − Σ sqrt(p q) = ½ Σ (sqrt p − sqrt q)²"""
    root_p, root_q = (0.5 * rows.y).exp(), (0.5 * rows.x).exp()
    difference = root_p - root_q
    value = 0.5 * difference.square().sum(-1)
    return value, -0.5 * root_q * (difference + root_q * value.unsqueeze(-1))


@row_divergence
def soft_cross_entropy(rows: Rows) -> Result:
    """−Σ p x"""
    q, p = rows.x.exp(), rows.y.exp()
    return -(p * _where_mass(p, rows.x)).sum(-1), q - p


@row_divergence
def mirrored_soft_cross_entropy(rows: Rows) -> Result:
    """−Σ q y"""
    q = rows.x.exp()
    u = _where_mass(q, -rows.y)
    return (q * u).sum(-1), _centred(q, u)


@row_divergence
def mse(rows: Rows) -> Result:
    """mean (s/T_s − t/T_t)² over the classes that are not masked on both sides"""
    s_masked, t_masked = rows.s == -torch.inf, rows.t == -torch.inf
    either = s_masked | t_masked
    difference = torch.where(either, 0.0, torch.where(either, 0.0, rows.s) - torch.where(either, 0.0, rows.t))
    count = (~either).sum(-1)
    apart = (s_masked != t_masked).any(-1)
    broken = ~(rows.s.detach().amax(-1).isfinite() & rows.t.detach().amax(-1).isfinite())
    value = difference.square().sum(-1) / count.clamp(min=1)
    value = torch.where(broken, torch.nan, torch.where(apart, torch.inf, value))
    return value, 2 * difference / count.clamp(min=1).unsqueeze(-1)


class Decoupled(NamedTuple):
    """A row in two parts: the label against the others, and the others among themselves."""

    is_label: Tensor  # [N, V]
    odds: Tensor  # [N, 1], log(p_label / (1 − p_label))
    others: Tensor  # log-probabilities among the others; −inf at the label, and throughout if there are no others


def _decoupled(z: Tensor, labels: Tensor) -> Decoupled:
    is_label = torch.arange(z.shape[-1], device=z.device) == labels.unsqueeze(-1)
    of_label = z.gather(-1, labels.unsqueeze(-1))
    top = z.detach().amax(-1, keepdim=True)
    broken = torch.where(top.isfinite(), 1.0, torch.nan)
    z = torch.where(is_label, -torch.inf, z)
    none = torch.where(is_label, True, z == -torch.inf).all(-1, keepdim=True)
    lse = torch.where(none, 0.0, z).logsumexp(-1, keepdim=True)
    others = torch.where(none | (z == -torch.inf), -torch.inf, torch.where(z == -torch.inf, 0.0, z) - lse)
    odds = torch.where(none, torch.inf, of_label - torch.where(none, 0.0, lse))
    return Decoupled(is_label, odds * broken, others * broken)


def _binary_kl(v: Tensor, w: Tensor) -> Tensor:
    """KL of probabilities σ(v), 1 − σ(v) against σ(w), 1 − σ(w)."""
    softplus = torch.nn.functional.softplus
    hit, miss = v.sigmoid(), (-v).sigmoid()
    return _where_mass(hit, hit * (softplus(-w) - softplus(-v))) + _where_mass(miss, miss * (softplus(w) - softplus(v)))


def _odds_difference(v: Tensor, w: Tensor) -> Tensor:
    """σ(v) − σ(w), from what is left of 1 where both are near it."""
    return torch.where((v > 0) & (w > 0), (-w).sigmoid() - (-v).sigmoid(), v.sigmoid() - w.sigmoid())


@row_divergence
def dkd(rows: Rows) -> Result:
    """Binary KL of the label against the others + β · KL among the others (Zhao et al. 2022)"""
    assert rows.labels is not None
    s, t = _decoupled(rows.s, rows.labels), _decoupled(rows.t, rows.labels)
    q, p = s.others.exp(), t.others.exp()
    among = rows.beta * (p * _where_mass(p, t.others - s.others)).sum(-1) if rows.beta > 0 else p.new_zeros(())
    delta = _odds_difference(s.odds, t.odds)
    # Where the teacher has no others, their p is 0, the sum above too, and so is its gradient.
    among_gradient = torch.where((p == 0).all(-1, keepdim=True), 0.0, rows.beta * (q - p))
    gradient = torch.where(s.is_label, delta, among_gradient - delta * q)
    return _binary_kl(t.odds, s.odds).squeeze(-1) + among, gradient


@row_divergence
def mirrored_dkd(rows: Rows) -> Result:
    """dkd with the roles exchanged"""
    assert rows.labels is not None
    s, t = _decoupled(rows.s, rows.labels), _decoupled(rows.t, rows.labels)
    q = s.others.exp()
    hit, miss = s.odds.sigmoid(), (-s.odds).sigmoid()
    apart = _where_mass(hit * miss, s.odds - t.odds)
    gamma = hit * miss * torch.where(apart.isinf(), 0.0, apart)
    others = torch.zeros_like(q)
    if rows.beta > 0:
        others = rows.beta * _centred(q, _where_mass(q, s.others - t.others))
    return dkd(rows.mirrored())[0], torch.where(s.is_label, gamma, others - gamma * q)


# Of [N, V] rows as they come, before the temperatures; `of`: kernel, β, 1 − β, T_s, T_t.


def _rows(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Rows:
    _, beta, one_minus_beta, student_temperature, teacher_temperature = of
    s, t = s / student_temperature, t / teacher_temperature
    return Rows(s, t, _log_softmax(s), _log_softmax(t), labels, beta, one_minus_beta)


def _value(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Tensor:
    value = ROW_DIVERGENCES[KERNELS[of[0]]](_rows(s, t, labels, of))[0]
    return torch.where(value < 0, 0.0, value)


def _broken_everywhere(value: Tensor, gradient: Tensor) -> Tensor:
    """All of a broken row's gradient is NaN, wherever in the row it broke."""
    return gradient + torch.where(value.detach().isnan(), torch.nan, 0.0).unsqueeze(-1)


def _gradient(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Tensor:
    """∂D/∂s"""
    value, gradient = ROW_DIVERGENCES[KERNELS[of[0]]](_rows(s, t, labels, of))
    return _broken_everywhere(value, gradient / of[3])


def _teachers_gradient(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Tensor:
    """∂D/∂t, which is the mirrored divergence's ∂D/∂s with the roles exchanged."""
    kernel, beta, one_minus_beta, student_temperature, teacher_temperature = of
    mirrored = mirror(kernel, beta, one_minus_beta)
    if mirrored is not None:
        return _gradient(t, s, labels, (*mirrored, teacher_temperature, student_temperature))

    def value_of(t: Tensor) -> Tensor:
        return ROW_DIVERGENCES[KERNELS[of[0]]](_rows(s, t, labels, of))[0]

    # Not known: by autograd of the value. Where that is infinite, its gradient is taken as 0 where it is no number.
    value, gradient_of = torch.func.vjp(value_of, t)  # type: ignore[misc]
    (gradient,) = gradient_of(torch.ones_like(value))
    return _broken_everywhere(value, torch.where(gradient.isfinite(), gradient, 0.0))


class _Divergence(torch.autograd.Function):
    """D of [N, V] rows, differentiated by the gradients that the functions above write out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Tensor:
        return _value(s, t, labels, of)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        s, t, labels, ctx.of = inputs
        ctx.save_for_backward(s, t, labels)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        s, t, labels = ctx.saved_tensors
        found: list[Tensor | None] = [None, None]
        for i, gradient in enumerate((_gradient, _teachers_gradient)):
            if ctx.needs_input_grad[i]:
                found[i] = grad_output.unsqueeze(-1) * gradient(s, t, labels, ctx.of)
        return found[0], found[1], None, None


class _DivergenceWithJvp(_Divergence):
    """The same in forward mode too. A class of its own because the compiler takes no function that has a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Divergence.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, s_tangent: Tensor | None, t_tangent: Tensor | None, *_: Any) -> Tensor:
        s, t, labels = ctx.saved_tensors
        total: Tensor = s.new_zeros(s.shape[:-1])
        for tangent, gradient in ((s_tangent, _gradient), (t_tangent, _teachers_gradient)):
            if tangent is not None:
                total = total + (gradient(s, t, labels, ctx.of) * tangent).sum(-1)
        return total


def _divergence(s: Tensor, t: Tensor, labels: Tensor | None, of: tuple[Any, ...]) -> Tensor:
    """D of [N, V] rows, differentiably."""
    if not torch.compiler.is_compiling():
        apply = _DivergenceWithJvp.apply
    elif not compat.in_torch_func():
        apply = _Divergence.apply
    else:  # what the compiler makes of torch.func knows no functions with a gradient of their own: autograd's, then
        return _value(s, t, labels, of)
    value: Tensor = apply(s, t, labels, of)  # type: ignore[no-untyped-call]
    return value


def cross_entropy(s: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy at temperature 1 with the smoothing spread over the classes that are not masked."""
    x = _log_softmax(s)
    loss = -x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        masked = x == -torch.inf
        uniform = -torch.where(masked, 0.0, x).sum(-1) / (~masked).sum(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform if label_smoothing < 1 else uniform
    return loss


def row_losses(s: Tensor, t: Tensor, labels: Tensor | None, options: Options) -> Tensor:
    """ℓ of every row of [N, V] logits of one floating dtype."""
    of = (
        options.divergence,
        options.beta,
        options.one_minus_beta,
        options.student_temperature,
        options.teacher_temperature,
    )
    if not options.soft_scale > 0:  # an unused teacher; the student in its place gives D = 0 and no gradient
        t, of = s.detach(), (KERNELS.index("forward_kl"), 0.0, 1.0, 1.0, 1.0)
    loss = options.soft_scale * _divergence(s, t, labels, of)
    if options.hard_weight > 0:
        assert labels is not None
        loss = loss + options.hard_weight * cross_entropy(s, labels, options.label_smoothing)
    return loss


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **keywords: Unpack[Keywords],
) -> Tensor:
    """`reptile_ext.distillation_loss` in plain PyTorch: same arguments and result, any device, any order of derivative.

    `inplace` is accepted and has no effect: autograd keeps what it needs.
    """
    options = make_options(**keywords)
    check_tensors(student_logits, teacher_logits, labels, weight, denominator, options)
    return with_options(student_logits, teacher_logits, labels, weight, denominator, options)


def linear_logits(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Logits of hidden states and a head (None: `hidden` are logits): scale · (h Wᵀ + b), softcapped to c · tanh(z/c).
    The product is rounded to the dtype, what follows is float32 (float64)."""
    z = hidden if weight is None else torch.nn.functional.linear(hidden, weight, bias)
    if scale == 1.0 and softcap is None:
        return z
    z = scale * (z if z.dtype in (torch.float32, torch.float64) else z.float())
    return z if softcap is None else softcap * (z / softcap).tanh()


def without_ignored(hidden: Tensor, counted: Tensor | None) -> Tensor:
    """Hidden states, 0 in ignored rows: a NaN there would come back through 0 · NaN in the head's gradient."""
    return hidden if counted is None else torch.where(counted.unsqueeze(-1), hidden, 0.0)


def counted_rows(labels: Tensor | None, weight: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows count; None: all."""
    counted = None if labels is None else labels != ignore_index
    if weight is not None:
        counted = weight != 0 if counted is None else counted & (weight != 0)
    return counted


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    memory_budget: int | None = None,
    num_rows_in: int | None = None,
    teacher_indices: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """`reptile_ext.linear_distillation_loss` in plain PyTorch, logits in full; `memory_budget` has no effect, and
    `num_rows_in` none but that too small a number is an error (NaN on a GPU)."""
    leading, counted = student_hidden.shape[:-1], None
    # What does not fit is complained of below.
    fitting = (x if isinstance(x, Tensor) and x.shape == leading else None for x in (labels, keywords.get("weight")))
    if teacher_hidden is None or teacher_hidden.shape[:-1] == leading:
        counted = counted_rows(next(fitting), next(fitting), keywords.get("ignore_index", -100))
        student_hidden = without_ignored(student_hidden, counted)
    student = linear_logits(student_hidden, student_weight, student_bias, student_softcap, student_scale)
    if teacher_indices is not None and teacher_log_probs is not None:
        loss = sparse_distillation_loss(student, teacher_indices, teacher_log_probs, labels, **keywords)
        return nan_if_rows_are_lost(loss, counted, num_rows_in, True)
    assert teacher_hidden is not None
    if teacher_hidden.shape[:-1] == leading:
        teacher_hidden = without_ignored(teacher_hidden, counted)
    teacher = linear_logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale)
    return nan_if_rows_are_lost(distillation_loss(student, teacher, labels, **keywords), counted, num_rows_in, True)


def nan_if_rows_are_lost(loss: Tensor, counted: Tensor | None, num_rows_in: int | None, check_values: bool) -> Tensor:
    """The loss; NaN, and a NaN gradient, if more rows count than `num_rows_in`. That is an error where one can look."""
    if counted is None or num_rows_in is None:
        return loss
    found = counted.sum()
    if check_values and _has_values_at_hand(found):
        check_rows_in(num_rows_in, int(compat.values_of(found).max()))
    return loss * torch.where(found > num_rows_in, torch.nan, 1.0)


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

    may_check = check_values and _has_values_at_hand(s)
    labels, w, counted, wrong = _rows_that_count(s, labels, weight, options, may_check)

    # An ignored row is never read: its logits are replaced before any arithmetic, so that a NaN in it cannot come back
    # through 0 · NaN in the gradient.
    s = torch.where(counted.unsqueeze(-1), s, 0.0)
    t = torch.where(counted.unsqueeze(-1), t, 0.0)
    losses = torch.where(counted, w * row_losses(s, t, labels, options), 0.0)
    # A wrong label where it could not be an error: that row alone.
    losses = losses * torch.where(wrong, torch.nan, 1.0)
    return _reduced(losses.reshape(leading), w, counted, denominator, options, may_check)


@torch.no_grad()
def _rows_that_count(
    s: Tensor, labels: Tensor | None, weight: Tensor | None, options: Options, may_check: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Of rows [N, V]: labels that are in range; weights, 0 of ignored rows; which rows count, and which of them have a
    label out of range."""
    vocab_size = s.shape[-1]
    w = s.new_ones(s.shape[0]) if weight is None else weight.reshape(-1).to(s.dtype)
    counted = w != 0
    wrong = torch.zeros_like(counted)
    if weight is not None and may_check:
        check_weight_values(compat.values_of(w))
    if labels is not None:
        labels = labels.reshape(-1).to(torch.int64)
        counted = counted & (labels != options.ignore_index)
        wrong = counted & ((labels < 0) | (labels >= vocab_size))
        if may_check:
            values = compat.values_of(torch.where(wrong, labels, options.ignore_index))
            check_label_values(values, values != options.ignore_index, vocab_size, options.ignore_index)
        labels = torch.where(counted & ~wrong, labels, 0)
    return labels, torch.where(counted, w, 0.0), counted, wrong


def _has_values_at_hand(x: Tensor) -> bool:
    """Whether wrong values can be an error: they are on the CPU, where reading them waits for nothing, and no tracer
    stands before them. Under vmap, those of the whole batch are checked (`compat.values_of`)."""
    return x.device.type == "cpu" and not compat.is_traced(compat.values_of(x))


def _reduced(
    losses: Tensor,
    w: Tensor,
    counted: Tensor,
    denominator: float | Tensor | None,
    options: Options,
    may_check: bool,
) -> Tensor:
    """What becomes of weighted losses; w and counted of each."""
    reduction = REDUCTIONS[options.reduction]
    if reduction == "none":
        return _scaled(losses, options.scale)
    total = losses.sum()
    if denominator is not None:
        divisor = torch.as_tensor(denominator, device=total.device).detach().to(losses.dtype)
        if may_check and bool(compat.values_of(counted).any()):
            check_divisor_value(compat.values_of(torch.where(counted.any(), divisor, 1.0)))
        total = total / torch.where(counted.any(), divisor, 1.0)
    elif reduction == "mean":
        total = total / torch.where(counted.any(), w.sum(), 1.0)
    return _scaled(total, options.scale)


# ------------------------------------------------------------------------- one logit: two classes, [z, 0] its logits


def _binary_cross_entropy(s: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """−(pos_weight · y log σ(s) + (1−y) log σ(−s)). A side without weight adds nothing, even if it is infinite."""
    hit = labels if pos_weight is None else pos_weight * labels
    miss = 1 - labels
    log_sigmoid = torch.nn.functional.logsigmoid
    loss = torch.where(hit == 0, 0.0, -hit * log_sigmoid(s)) + torch.where(miss == 0, 0.0, -miss * log_sigmoid(-s))
    return loss * torch.where(s.isnan() | (s == torch.inf), torch.nan, 1.0)


def _as_rows(z: Tensor) -> Tensor:
    return torch.stack([z, torch.zeros_like(z)], -1)


def binary_with_options(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    check_values: bool = True,
) -> Tensor:
    """`binary_distillation_loss` of arguments that are checked already; constants' values are if `check_values`."""
    shape = student_logits.shape
    double = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    arithmetic = torch.float64 if double else torch.float32
    s, t = student_logits.to(arithmetic), teacher_logits.to(arithmetic)
    may_check = check_values and _has_values_at_hand(s)
    with torch.no_grad():
        w = s.new_ones(shape) if weight is None else weight.to(arithmetic).expand(shape)
        counted = w != 0
        wrong = torch.zeros_like(counted)
        if weight is not None and may_check:
            check_weight_values(compat.values_of(weight))
        if pos_weight is not None:
            if may_check:
                check_pos_weight_values(compat.values_of(pos_weight))
            pos_weight = pos_weight.to(arithmetic)
        if labels is not None:
            labels = labels.to(arithmetic)
            counted = counted & (labels != options.ignore_index)
            wrong = counted & ~((labels >= 0) & (labels <= 1))
            if may_check:
                values = compat.values_of(torch.where(wrong, labels, options.ignore_index))
                check_target_values(values, values != options.ignore_index, options.ignore_index)
            labels = torch.where(counted & ~wrong, labels, 0.0)
        w = torch.where(counted, w, 0.0)

    # An ignored element is never read: see `with_options`.
    s, t = torch.where(counted, s, 0.0), torch.where(counted, t, 0.0)
    soft = options._replace(hard_weight=0.0)
    losses = row_losses(_as_rows(s).reshape(-1, 2), _as_rows(t).reshape(-1, 2), None, soft).reshape(shape)
    if options.hard_weight > 0:
        assert labels is not None
        losses = losses + options.hard_weight * _binary_cross_entropy(s, labels, pos_weight)
    losses = torch.where(counted, w * losses, 0.0)
    losses = losses * torch.where(wrong, torch.nan, 1.0)
    return _reduced(losses, w, counted, denominator, options, may_check)


def binary_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **keywords: Unpack[BinaryKeywords],
) -> Tensor:
    """`reptile_ext.binary_distillation_loss` in plain PyTorch: same arguments and result, any device, any order of
    derivative. `inplace` is accepted and has no effect."""
    options = make_binary_options(**keywords)
    check_binary_tensors(student_logits, teacher_logits, labels, weight, pos_weight, denominator, options)
    return binary_with_options(student_logits, teacher_logits, labels, weight, pos_weight, denominator, options)


# ----------------------------------------------- sparse teachers: K classes and, of all the others, one number or none


class SparseRows(NamedTuple):
    """The teacher's side of [N, V] rows of the student."""

    ids: Tensor  # [N, K], −1: none
    y: Tensor  # [N, K] log-probabilities as they were given, −inf where there is no id
    dropped: Tensor  # [N]: mass of classes that the student does not have
    is_cut: Tensor  # [N]: there are such, and no others: nothing is known of the student's classes
    eps: float  # of the log-probabilities' own dtype


def _log_sum_exp(z: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept; −inf of nothing but −inf, with a gradient of 0."""
    top = z.detach().amax(-1, keepdim=True)
    none = top == -torch.inf
    top = torch.where(none, 0.0, top)
    total = (z - top).exp().sum(-1, keepdim=True)
    return torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + top)


def _few_classes(z: Tensor, teacher: SparseRows, tail: str) -> tuple[Tensor, Tensor]:
    """Student and teacher as rows of K + 1 classes [N, K + 1]: those that the teacher lists and, last, all the others
    as one. Logits over T_s, and logarithms of probabilities that do not have to add up to 1; −inf in both where there
    is no class.

    Merging classes changes no D in which p/q is the same for all of them, and so none where p is 0 ("renormalize").
    The student's is the logarithm of a sum over the other classes: 1 − Σ q would have no digits left where they have
    little.
    """
    listed = teacher.ids >= 0
    any_listed = listed.any(-1, keepdim=True)
    # A place without an id becomes the row's first id once more; a row without any writes class 0 over itself.
    first = teacher.ids.gather(-1, listed.to(torch.int8).argmax(-1, keepdim=True)).clamp(min=0)
    ids = torch.where(listed, teacher.ids, first)
    at_ids = z.gather(-1, ids)
    others = z.scatter(-1, ids, torch.where(any_listed, -torch.inf, at_ids))
    of_student = torch.where(listed, at_ids, -torch.inf)
    of_others = torch.full_like(of_student[:, :1], -torch.inf) if tail == "restrict" else _log_sum_exp(others)
    few = torch.cat([of_student, of_others], -1)
    return few, few_classes_of_teacher(teacher, tail, z.shape[-1], few.detach()[:, -1])


def few_classes_of_teacher(teacher: SparseRows, tail: str, vocab_size: int, of_others: Tensor) -> Tensor:
    """The teacher's side of `_few_classes`; of_others is the student's last class."""
    r = torch.zeros_like(teacher.y[:, 0])
    if tail == "bucket":
        p = teacher.y.exp()
        rest = 1 - teacher.dropped - p.sum(-1)  # below 0 by rounding: p is rescaled
        are_all = (teacher.ids >= 0).sum(-1) == vocab_size
        # Where the student has nothing outside of the list, all others are masked. What the log-probabilities' rounding
        # leaves of r there is nothing, and would be infinitely far.
        of_logarithms = -torch.where(p > 0, p * teacher.y, 0.0).sum(-1)
        computed = min(teacher.eps, torch.finfo(torch.float32).eps)
        rounding = 2 * teacher.eps * of_logarithms + 16 * computed * (1 + of_logarithms)
        are_all = are_all | ((of_others == -torch.inf) & (rest < rounding))
        r = torch.where(are_all, 0.0, rest.clamp(min=0))
    return torch.cat([teacher.y, r.log().unsqueeze(-1)], -1)


def _is_broken(s: Tensor, teacher: SparseRows, tail: str) -> Tensor:
    """Which rows have a NaN, a +inf, or nothing but −inf where they need something."""
    broken = ~s.amax(-1).isfinite() | ~(teacher.y.amax(-1) < torch.inf)
    if tail in ("restrict", "renormalize"):
        broken = broken | ((teacher.y == -torch.inf).all(-1) & ~teacher.is_cut)
    if tail == "restrict":
        at_ids = s.gather(-1, teacher.ids.clamp(min=0))
        broken = broken | (((at_ids == -torch.inf) | (teacher.ids < 0)).all(-1) & ~teacher.is_cut)
    return broken


def loss_of_few_classes(of_student: Tensor, of_teacher: Tensor, teacher: SparseRows, options: Options) -> Tensor:
    """The soft part of ℓ, from the rows of `_few_classes`; 0 where the student has none of the teacher's classes."""
    cut = teacher.is_cut.unsqueeze(-1)
    of_student, of_teacher = torch.where(cut, 0.0, of_student), torch.where(cut, 0.0, of_teacher)
    return torch.where(teacher.is_cut, 0.0, _soft_loss(of_student, of_teacher, teacher, options))


def _soft_loss(of_student: Tensor, of_teacher: Tensor, teacher: SparseRows, options: Options) -> Tensor:
    of = (options.divergence, options.beta, options.one_minus_beta, 1.0, 1.0)
    if TAILS[options.tail] != "zero":
        return options.soft_scale * _divergence(of_student, of_teacher, None, of)
    # Σ p (y − x) = P (KL(p / P ‖ q) + log P), and −Σ p x = P (cross entropy of p / P and q)
    mass = teacher.y.exp().sum(-1)
    # Of what the student's classes have; which by rounding may be less than these have of it.
    mass = mass / torch.where(teacher.dropped > 0, (1 - teacher.dropped).maximum(mass), 1.0)
    none = mass == 0
    of_teacher = torch.where(none.unsqueeze(-1), of_student.detach(), of_teacher)
    losses = _divergence(of_student, of_teacher, None, of)
    if options.kernel() == "forward_kl":
        losses = losses + torch.where(none, 1.0, mass).log()
    return options.soft_scale * torch.where(none, 0.0, mass) * losses


def sparse_row_losses(s: Tensor, teacher: SparseRows, labels: Tensor | None, options: Options) -> Tensor:
    """ℓ of every row of [N, V] logits of one floating dtype."""
    losses: Tensor = s.new_zeros(s.shape[0])
    if options.soft_scale > 0:
        # Multiplied with NaN, not filled: a broken row's gradient is NaN in all classes, also where a tail has none.
        broken = _is_broken(s.detach(), teacher, TAILS[options.tail])
        z = s / options.student_temperature * torch.where(broken, torch.nan, 1.0).unsqueeze(-1)
        losses = loss_of_few_classes(*_few_classes(z, teacher, TAILS[options.tail]), teacher, options)
        losses = torch.where(teacher.is_cut & broken, z.sum(-1), losses)
    if options.hard_weight > 0:
        assert labels is not None
        losses = losses + options.hard_weight * cross_entropy(s, labels, options.label_smoothing)
    return losses


def sparse_with_options(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    check_values: bool = True,
) -> Tensor:
    """`sparse_distillation_loss` of arguments that are checked already; constants' values are if `check_values`."""
    s = student_logits.movedim(options.dim, -1)
    leading, vocab_size = s.shape[:-1], s.shape[-1]
    double = torch.float64 in (s.dtype, teacher_log_probs.dtype)
    arithmetic = torch.float64 if double else torch.float32
    s = s.reshape(-1, vocab_size).to(arithmetic)
    may_check = check_values and _has_values_at_hand(s)
    labels, w, counted, wrong = _rows_that_count(s, labels, weight, options, may_check)
    teacher, wrong_list = _sparse_rows(s, teacher_indices, teacher_log_probs, counted, options, may_check)
    s = torch.where(counted.unsqueeze(-1), s, 0.0)
    losses = torch.where(counted, w * sparse_row_losses(s, teacher, labels, options), 0.0)
    losses = losses * torch.where(wrong | wrong_list, torch.nan, 1.0)
    return _reduced(losses.reshape(leading), w, counted, denominator, options, may_check)


@torch.no_grad()
def _sparse_rows(
    s: Tensor, teacher_indices: Tensor, teacher_log_probs: Tensor, counted: Tensor, options: Options, may_check: bool
) -> tuple[SparseRows, Tensor]:
    """The teacher of rows [N, V], and which rows have indices out of range, or one twice."""
    vocab_size, k = s.shape[-1], teacher_indices.shape[-1]
    ids = teacher_indices.reshape(-1, k).to(torch.int64)
    y = teacher_log_probs.reshape(-1, k).to(s.dtype)
    # Ignored rows are never read: they have class 0 alone, of which the teacher is certain.
    is_first = torch.arange(k, device=s.device) == 0
    ids = torch.where(counted.unsqueeze(-1), ids, torch.where(is_first, 0, -1))
    y = torch.where(counted.unsqueeze(-1), y, 0.0)
    ordered = ids.sort(-1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    outside = ((ids < -1) | ((ids >= vocab_size) & (not options.truncate))).any(-1)
    if may_check:
        values = [compat.values_of(x) for x in (ids, y, outside, repeated)]
        check_sparse_values(values[0], values[1], values[2], values[3], vocab_size, options.truncate)
    wrong = repeated | outside
    dropped = torch.where(ids >= vocab_size, y.exp(), 0.0).sum(-1)
    is_cut = (ids >= vocab_size).any(-1) & ~((ids >= 0) & (ids < vocab_size)).any(-1) & ~wrong
    ids = torch.where((ids >= vocab_size) | (ids < 0) | wrong.unsqueeze(-1), -1, ids)
    y = torch.where(ids >= 0, y, -torch.inf)
    return SparseRows(ids, y, dropped, is_cut, torch.finfo(teacher_log_probs.dtype).eps), wrong


def sparse_distillation_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **keywords: Unpack[SparseKeywords],
) -> Tensor:
    """`reptile_ext.sparse_distillation_loss` in plain PyTorch: same arguments and result, any device, any order of
    derivative. `inplace` is accepted and has no effect."""
    options = make_sparse_options(**keywords)
    check_sparse_tensors(student_logits, teacher_indices, teacher_log_probs, labels, weight, denominator, options)
    return sparse_with_options(student_logits, teacher_indices, teacher_log_probs, labels, weight, denominator, options)


def _scaled(loss: Tensor, scale: float) -> Tensor:
    """Times a number that nearly always is 1: in forward mode a 0-d product with one has a tangent in float64."""
    return loss if scale == 1.0 else loss * scale
