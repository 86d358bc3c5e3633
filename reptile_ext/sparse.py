"""`sparse_distillation_loss`: a teacher of K classes a row and their log-probabilities; and what makes such pairs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import autograd, distributed, ops, reference
from .autograd import Constants, Gradients
from .checks import (
    FLOATING,
    LARGE_TEMPERATURE,
    MOST_LISTED,
    check_inplace,
    check_is_tensor,
    check_sparse_tensors,
    integer_of,
    is_temperature,
    number_of,
    warn_of_temperature,
)
from .functional import LogitsLoss, apply, for_operators, needs_reference
from .options import TAILS, Options, make_sparse_options
from .sparse_chunks import vocabulary_parallel_sparse_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["captured_mass", "sampled_targets", "sparse_distillation_loss", "top_k_targets"]

# The operator's tensors; `teacher` is the log-probabilities.
TENSORS = (*ops.MODELS, "indices")
_ZERO = TAILS.index("zero")

_warned_of_zero = False


class SparseLoss(LogitsLoss):
    """The same of (student, log-probabilities, indices), of which the student alone gets a gradient."""

    names: ClassVar[tuple[str, ...]] = ("student_logits", "teacher_log_probs", "teacher_indices")

    @staticmethod
    def config_of(given: Any) -> Options:
        return Options.of_operator(given)._replace(tail=given["tail"], truncate=given["truncate"])

    @staticmethod
    def call(
        options: Options,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        student, log_probs, indices = tensors
        numbers = (*ops.numbers(options), indices, options.tail, options.truncate)
        return ops.sparse_distillation_loss(student, log_probs, *constants, grad_output, *numbers, with_gradient)

    @staticmethod
    def in_place(
        options: Options, tensors: tuple[Any, ...], constants: Constants, grad_output: Tensor | None
    ) -> Tensor:
        student, log_probs, indices = tensors
        numbers = (*ops.numbers(options), indices, options.tail, options.truncate)
        return ops.sparse_distillation_loss_(student, log_probs, *constants, grad_output, *numbers)

    @staticmethod
    def keep(options: Options, gradients: Gradients, tensors: tuple[Any, ...], constants: Constants) -> Any:
        return gradients[0], constants[0], constants[1], tensors[0].shape[options.dim]

    @staticmethod
    def scaled(options: Options, kept: Any, grad_output: Tensor, is_ours: bool) -> Gradients:
        return *LogitsLoss.scaled(options, kept, grad_output, is_ours), None

    @staticmethod
    def reference(options: Options, tensors: tuple[Any, ...], constants: Constants) -> Tensor:
        student, log_probs, indices = tensors
        return reference.sparse_with_options(student, indices, log_probs, *constants, options, check_values=False)


autograd.register(ops.sparse_distillation_loss, SparseLoss, TENSORS)


def sparse_distillation_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
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
    group: ProcessGroup | None = None,
) -> Tensor:
    """Distillation loss of student logits against K classes of the teacher a row, and its gradient, in one fused pass:
    the student's logits are read once and the gradient is written once, and nothing of the teacher has V classes.

    Equivalent PyTorch, for the default divergence and tail, one temperature T, no labels, no weights::

        x = F.log_softmax(student_logits.float() / T, -1).gather(-1, teacher_indices)
        p, y = teacher_log_probs.exp(), teacher_log_probs
        r, R = 1 - p.sum(-1), 1 - x.exp().sum(-1)         # of all other classes together; here without cancellation
        loss = T * T * ((p * (y - x)).sum(-1) + r * (r.log() - R.log())).mean()

    Args:
        student_logits: [..., V], float32, bfloat16, float16 or float64, any strides.
        teacher_indices: [..., K], int64 or int32: which classes, each once, in any order; −1 for none. K from 1 to
            4,096. The leading shape is that of the student's logits without their class dimension.
        teacher_log_probs: [..., K], float32, bfloat16, float16 or float64: the logarithms of their probabilities among
            all V classes, **at the teacher's temperature**: they are used as they are given. Where there is no class
            they are not read. They get no gradient. `top_k_targets` makes both of logits, `sampled_targets`
            unbiased ones.
        labels: as of `distillation_loss`; they need not be among the K.
        tail: what becomes of the classes that are not listed. With p the K probabilities, P their sum, r = 1 − P, q the
            student's probabilities and R what they leave for the other classes:

            =================  =====================================================  ==================================
            "bucket"           (p, r) against (q_K, R): all others are one class      all divergences but mse and dkd
            "restrict"         p / P against q_K / Σ q_K: both among the K            all but mse and dkd
            "renormalize"      p / P, elsewhere 0, against q                          those finite where p is 0: not
                                                                                      mse, dkd, reverse and symmetric KL
            "zero"             Σ p (y − x) over the K, as it stands: no divergence    forward_kl, soft_cross_entropy
            =================  =====================================================  ==================================

            "zero" may be negative, and is least where the student gives the K *more* than the teacher does; a warning
            says so, once. A P above 1, by rounding, is scaled to 1 ("zero" leaves it).
        divergence, beta, temperature_scaling, soft_weight, hard_weight, label_smoothing, weight, ignore_index,
            reduction, denominator, dim: as of `distillation_loss`.
        temperature: T, or a pair (T_s, T_t). T_s divides the student's logits; T_t is what the log-probabilities were
            made with, and enters the factor T_s · T_t alone.
        vocab: "error" if an index is V or more, or "truncate" to leave such classes out, the teacher's probabilities of
            the others scaled to add up to 1. A row that lists such classes alone has no divergence: 0, with every tail.
        inplace: write the gradient over the student's logits; as of `distillation_loss`.
        group: processes that each hold a range of the student's classes; indices and labels are numbers of all classes,
            and the same in every process, as is the loss; each gets the gradient of its own classes. O(rows · K)
            numbers are communicated, no [rows, V] exists, and there is no double backward. The passes are torch's.
            Logits that are DTensors sharded over their classes need no group.

    Returns:
        A scalar, or the leading shape with reduction="none"; float32, or float64 if either input is.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it, what came and what is wanted. On
            devices other than the CPU, whose values nothing waits for, an index out of range or listed twice makes its
            row NaN.

    With K = V every tail is `distillation_loss`. Where the teacher lists all its mass, r = 0, and reverse KL with
    "bucket" is +inf as soon as the student has any outside of the list ("skew_reverse_kl" and "jsd" are not). What
    `distillation_loss` says of infinite and broken rows holds; a row without any class listed is NaN with "restrict"
    and "renormalize", and 0 with the others.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. Anshumann et al.: Sparse Logit Sampling,
    2025 (arXiv 2503.16870: what a cut distribution teaches, and unbiased samples).
    """
    options = make_sparse_options(
        tail=tail,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        temperature_scaling=temperature_scaling,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        vocab=vocab,
        dim=dim,
        inplace=inplace,
    )
    if group is not None or distributed.is_dtensor(student_logits):
        constants = (labels, weight, denominator)
        student_logits, _, constants, group = distributed.own_classes((student_logits,) * 2, constants, dim, group)
        labels, weight, denominator = constants
    given = (student_logits, teacher_indices, teacher_log_probs, labels, weight, denominator, options)
    check_sparse_tensors(*given, sharded=group is not None)
    if options.student_temperature > LARGE_TEMPERATURE:
        warn_of_temperature(options, student_logits, teacher_log_probs)
    if options.tail == _ZERO and options.kernel() == "forward_kl" and not torch.compiler.is_compiling():
        _warn_of_zero()
    teacher = teacher_indices, teacher_log_probs
    if group is not None:
        if inplace:
            check_inplace(student_logits, teacher_log_probs)
        return vocabulary_parallel_sparse_loss(*given, group)
    if needs_reference(student_logits.device, "sparse_distillation_loss"):
        return reference.sparse_with_options(student_logits, *teacher, labels, weight, denominator, options)
    if inplace:
        check_inplace(student_logits, teacher_log_probs)
        if not torch.compiler.is_compiling() and student_logits.is_neg():
            options = options._replace(inplace=False)  # the memory holds the numbers with the other sign
    constants, options = for_operators(labels, weight, denominator, options, student_logits.device)
    indices, log_probs = pair_for_operators(*teacher)
    return apply(SparseLoss, (student_logits, log_probs, indices), constants, options)


def pair_for_operators(teacher_indices: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The pair as the operators take it: int64, one row after the other. Nothing of it is of the logits' size."""
    return teacher_indices.to(torch.int64).contiguous(), teacher_log_probs.detach().resolve_neg().contiguous()


def _warn_of_zero() -> None:
    global _warned_of_zero
    if _warned_of_zero:
        return
    _warned_of_zero = True
    warnings.warn(
        "tail='zero' leaves classes out and does not make up for it: the sum of p (y - x) over those listed is "
        "no divergence, may be negative, and is least where the student gives them more than the teacher does; "
        "tail='bucket' is 0 at the teacher and never negative",
        stacklevel=3,
    )


# ------------------------------------------------------------------------------------------------- what makes the pairs


def captured_mass(teacher_log_probs: Tensor, teacher_indices: Tensor | None = None) -> Tensor:
    """P, how much of a teacher's probability its K classes hold: `teacher_log_probs.exp().sum(-1)`, in float32.

    [..., K] gives [...]. With `teacher_indices` of the same shape, what stands at −1 is not counted; without, it has to
    be −inf, as `top_k_targets`, `sampled_targets` and the cache write it. Where P is far from 1, "renormalize" and
    "restrict" teach something else than the teacher knows; more classes, or `tail="bucket"`, do not.
    """
    check_is_tensor("teacher_log_probs", teacher_log_probs)
    arithmetic = torch.float64 if teacher_log_probs.dtype == torch.float64 else torch.float32
    y = teacher_log_probs.to(arithmetic)
    if teacher_indices is not None:
        check_is_tensor("teacher_indices", teacher_indices)
        if teacher_indices.shape != y.shape:
            raise ValueError(
                f"teacher_indices must have the shape of teacher_log_probs, {list(y.shape)}; got "
                f"{list(teacher_indices.shape)}"
            )
        y = torch.where(teacher_indices >= 0, y, -torch.inf)
    return y.exp().sum(-1)


_CHUNK_BYTES = 1 << 24  # of a copy of logits in the dtype of the arithmetic


def _check_targets(teacher_logits: Tensor, temperature: float) -> float:
    check_is_tensor("teacher_logits", teacher_logits)
    if teacher_logits.dtype not in FLOATING:
        raise TypeError(f"teacher_logits must be float32, bfloat16, float16 or float64; got {teacher_logits.dtype}")
    if teacher_logits.dim() == 0 or teacher_logits.shape[-1] == 0:
        raise ValueError(f"teacher_logits must be [..., V] with at least one class; got {list(teacher_logits.shape)}")
    return number_of("temperature", temperature, "a positive number, 1e-30 to 1e30", is_temperature)


def _in_chunks(teacher_logits: Tensor) -> tuple[torch.dtype, tuple[Tensor, ...]]:
    """The dtype of the arithmetic, and rows [n, V] of logits so many at a time that a copy of them is small."""
    logits = teacher_logits.detach()
    arithmetic = torch.float64 if logits.dtype == torch.float64 else torch.float32
    vocab_size = logits.shape[-1]
    rows = logits.reshape(-1, vocab_size)
    return arithmetic, torch.split(rows, max(1, _CHUNK_BYTES // (vocab_size * arithmetic.itemsize)))


def top_k_targets(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest classes of a teacher and their log-probabilities among all classes, largest first.

    Equivalent PyTorch::

        log_probs, indices = F.log_softmax(teacher_logits.float() / temperature, -1).topk(k)

    without a copy of all logits in float32: some rows at a time, and log_softmax of the k alone.

    Args:
        teacher_logits: [..., V], float32, bfloat16, float16 or float64.
        k: from 1 to 4,096 and at most V.
        temperature: the teacher's; pass it to `sparse_distillation_loss`, too, as the second of the pair.

    Returns:
        teacher_indices [..., k] int64 and teacher_log_probs [..., k] float32 (float64 of float64). A class of
        probability 0 (−inf) is not listed: −1, −inf.
    """
    temperature = _check_targets(teacher_logits, temperature)
    most = min(MOST_LISTED, teacher_logits.shape[-1])
    k = integer_of("k", k)
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and {most}, the number of classes or {MOST_LISTED}; got {k}")
    shape = (*teacher_logits.shape[:-1], k)
    arithmetic, chunks = _in_chunks(teacher_logits)
    log_probs = teacher_logits.new_empty((len(chunks) and sum(len(rows) for rows in chunks), k), dtype=arithmetic)
    indices = torch.empty_like(log_probs, dtype=torch.int64)
    at = 0
    for rows in chunks:
        here = slice(at, at + len(rows))
        at += len(rows)
        values, classes = rows.topk(k)
        # From the largest logit on, which is exact: the logarithm of a sum alone would lose digits of large logits.
        top = values[:, :1].to(arithmetic)
        z = (rows.to(arithmetic) - top) / temperature
        log_probs[here] = (values.to(arithmetic) - top) / temperature - z.logsumexp(-1, keepdim=True)
        indices[here] = classes
    indices.masked_fill_(log_probs == -torch.inf, -1)
    return indices.view(shape), log_probs.view(shape)


def sampled_targets(
    teacher_logits: Tensor,
    num_samples: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    replacement: bool = False,
) -> tuple[Tensor, Tensor]:
    """Classes drawn from a teacher and the logarithms of their weights, whose mean over many draws is its distribution.

    With `tail="renormalize"` they are an unbiased estimate of forward KL's gradient, as the k likeliest are not.

    No class is drawn twice: with a threshold τ such that Σ min(1, p / τ) = num_samples, classes of p ≥ τ are all
    listed, with their own p, and each other one with probability p / τ and the weight τ (systematic sampling). For as
    many classes, that has far less noise than draws with replacement, which are, of one row::

        drawn = F.softmax(teacher_logits.float() / temperature, -1).multinomial(num_samples, replacement=True)
        indices, counts = drawn.unique(return_counts=True)
        log_probs = (counts / num_samples).log()

    Weights add up to 1 either way.

    Args:
        teacher_logits: [..., V], float32, bfloat16, float16 or float64. Of a row with a NaN, a +inf or nothing but
            −inf, class 0 is listed with NaN, so that the loss shows it.
        num_samples: how many are drawn, 1 to 4,096.
        temperature: the teacher's.
        generator: where the random numbers come from; None: torch's own.
        replacement: draw a class as often as it comes, as the paper does, or at most once.

    Returns:
        teacher_indices [..., num_samples] int64, in ascending order and padded by −1, and teacher_log_probs of the
        same shape, float32 (float64 of float64), padded by −inf.

    Madow: On the Theory of Systematic Sampling, II, 1949. With replacement, Anshumann et al.: Sparse Logit Sampling,
    2025 (arXiv 2503.16870).
    """
    temperature = _check_targets(teacher_logits, temperature)
    n = integer_of("num_samples", num_samples)
    if not 1 <= n <= MOST_LISTED:
        raise ValueError(f"num_samples must lie between 1 and {MOST_LISTED}; got {n}")
    if not isinstance(replacement, bool):
        raise TypeError(f"replacement must be True or False; got {replacement!r}")
    draw = _draws if replacement else _different_draws
    shape = (*teacher_logits.shape[:-1], n)
    arithmetic, chunks = _in_chunks(teacher_logits)
    found = []
    for rows in chunks:
        z = rows.to(arithmetic)
        top = z.amax(-1, keepdim=True)
        broken = ~top.isfinite()
        z = torch.where(broken, 0.0, (z - top) / temperature)  # multinomial ends the program of a GPU that sees a NaN
        indices, weights = draw(z.softmax(-1), n, generator)
        is_first = torch.arange(n, device=z.device) == 0
        found.append((
            torch.where(broken, torch.where(is_first, 0, -1), indices),
            torch.where(broken, torch.where(is_first, torch.nan, -torch.inf), weights.log()),
        ))  # fmt: skip
    if not found:
        return (
            teacher_logits.new_empty(shape, dtype=torch.int64),
            teacher_logits.new_empty(shape, dtype=arithmetic),
        )
    indices, log_probs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return indices.view(shape), log_probs.view(shape)


def _draws(p: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """n classes of each row of probabilities, each that came once, with its share: −1 and 0 behind them."""
    drawn = p.multinomial(n, replacement=True, generator=generator).sort(-1).values
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = is_new.cumsum(-1) - 1
    indices = torch.full_like(drawn, -1).scatter_(-1, place, drawn)
    counts = torch.zeros_like(drawn, dtype=p.dtype)
    counts.scatter_add_(-1, place, torch.ones_like(counts))
    return indices, counts / n


def _different_draws(p: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The same without a class twice: see `sampled_targets`."""
    k = min(n, p.shape[-1])
    tail = p.double()
    top, classes = tail.topk(k)
    # τ if the i largest are listed with their own p: what they leave, shared out over the places that they leave. Added
    # up from the small end: 1 − Σ p has no digits of a small rest.
    others = tail.scatter(-1, classes, 0.0).sum(-1, keepdim=True)
    left = top.flip(-1).cumsum(-1).flip(-1) + others
    threshold = left / torch.arange(n, n - k, -1, device=p.device)
    is_certain = (top >= threshold).to(torch.int8).cumprod(-1).bool() & (top > 0)
    certain = is_certain.sum(-1, keepdim=True)
    tau = threshold.gather(-1, certain.clamp(max=k - 1))
    # A ruler with a mark at each whole number, over what is left in units of τ: it hits a class of p < τ once at most.
    tail.scatter_(-1, classes, torch.where(is_certain, 0.0, top))
    length = tail.cumsum(-1)
    places = torch.arange(n, device=p.device)
    start = torch.rand(len(p), 1, dtype=torch.float64, device=p.device, generator=generator)
    marks = (start + places - certain) * (length[:, -1:] / (n - certain).clamp(min=1))
    hit = torch.searchsorted(length, marks.clamp(min=0), right=True).clamp(max=p.shape[-1] - 1)
    of_places = torch.cat([classes, classes.new_full((len(p), n - k), -1)], -1)
    indices = torch.where(places < certain, of_places, torch.where(length[:, -1:] > 0, hit, -1))
    weights = torch.where(places < certain, torch.cat([top, top.new_zeros(len(p), n - k)], -1), tau)
    # In ascending order; a mark that rounding has put on the class of the one before it adds its weight to that.
    order = torch.where(indices < 0, p.shape[-1], indices).argsort(dim=-1, stable=True)
    indices, weights = indices.gather(-1, order), torch.where(indices < 0, 0.0, weights).gather(-1, order)
    is_new = torch.ones_like(indices, dtype=torch.bool)
    is_new[:, 1:] = indices[:, 1:] != indices[:, :-1]
    place = is_new.cumsum(-1) - 1
    return (
        torch.full_like(indices, -1).scatter_(-1, place, indices),
        torch.zeros_like(weights).scatter_add_(-1, place, weights).to(p.dtype),
    )
