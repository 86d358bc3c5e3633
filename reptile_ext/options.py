"""The keywords of a loss: what they may be, and what they are for the operators.

`DIVERGENCES` is the table of the divergences' names. `Options` holds a loss's keywords after checking; it is made once
for each combination that a program uses (`make_options` remembers), so that a training step does not pay for it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch

from .checks import integer_of, is_non_negative, is_temperature, number_of, one_of, pair_of
from .ops import KERNELS, NUMBERS, REDUCTIONS, TAILS

__all__ = [
    "BINARY_DIVERGENCES",
    "DIVERGENCES",
    "DIVERGENCE_TABLE",
    "KERNELS",
    "REDUCTIONS",
    "TAILS",
    "BinaryKeywords",
    "Keywords",
    "Options",
    "SparseKeywords",
    "make_binary_options",
    "make_options",
    "make_sparse_options",
]

TEMPERATURE_SCALINGS = ("t2", "none")
VOCABS = ("error", "truncate")


# -------------------------------------------------------------------------------------------------- the divergences


class Beta(NamedTuple):
    """A divergence's parameter."""

    default: float
    is_allowed: Callable[[float], bool]
    wanted: str  # what is allowed, in words


class Divergence(NamedTuple):
    """What there is to know of a divergence besides its formulas, which are in csrc/divergence.h and reference.py."""

    beta: Beta | None = None
    # The kernel whose D(s, t) is this one's D(t, s): its gradient for the student is this one's for a trainable
    # teacher. None: not known, and a trainable teacher gets its gradient from the reference, by autograd.
    mirror: str | None = None
    mirror_swaps_beta: bool = False  # β of the one is 1 − β of the other
    needs_labels: bool = False
    # Of a sparse teacher, those that it goes with. "renormalize" takes one that is finite where p is 0, and whose
    # classes may be merged where p/q is the same (every f-divergence's may).
    tails: tuple[str, ...] = ("bucket", "restrict")
    # Where it is another one's kernel: at some β, and throughout, times a factor.
    limits: Mapping[float, str] = {}
    kernel: str | None = None
    factor: Callable[[float], float] | None = None


_SMALLEST = 1e-30  # below this, a β other than 0 has no room in float32
_UP_TO_ZERO_P = ("bucket", "restrict", "renormalize")
_SKEW = Beta(0.1, lambda v: v == 0 or _SMALLEST <= v < 1, "0 or a number from 1e-30 to 1, 1 excluded")

DIVERGENCE_TABLE: dict[str, Divergence] = {
    "forward_kl": Divergence(mirror="reverse_kl", tails=TAILS),
    "reverse_kl": Divergence(mirror="forward_kl"),
    "symmetric_kl": Divergence(
        beta=Beta(0.5, lambda v: 0 <= v <= 1, "a number between 0 and 1"),
        limits={0.0: "forward_kl", 1.0: "reverse_kl"},
        mirror="symmetric_kl",
        mirror_swaps_beta=True,
    ),
    "jsd": Divergence(
        beta=Beta(0.5, lambda v: _SMALLEST <= v < 1, "a number between 0 (at least 1e-30) and 1, both excluded"),
        mirror="jsd",
        mirror_swaps_beta=True,
        tails=_UP_TO_ZERO_P,
    ),
    "scaled_jsd": Divergence(
        beta=Beta(0.5, lambda v: v == 0 or _SMALLEST <= v <= 1, "0 or a number from 1e-30 to 1"),
        limits={0.0: "forward_kl", 1.0: "reverse_kl"},
        kernel="jsd",
        factor=lambda v: 1.0 / (v * (1.0 - v)),
        tails=_UP_TO_ZERO_P,
    ),
    "skew_kl": Divergence(beta=_SKEW, limits={0.0: "forward_kl"}, mirror="skew_reverse_kl", tails=_UP_TO_ZERO_P),
    "skew_reverse_kl": Divergence(beta=_SKEW, limits={0.0: "reverse_kl"}, mirror="skew_kl", tails=_UP_TO_ZERO_P),
    "tvd": Divergence(mirror="tvd", tails=_UP_TO_ZERO_P),
    "hellinger": Divergence(mirror="hellinger", tails=_UP_TO_ZERO_P),
    "soft_cross_entropy": Divergence(mirror="mirrored_soft_cross_entropy", tails=TAILS),
    "mse": Divergence(mirror="mse", tails=()),
    "dkd": Divergence(
        beta=Beta(8.0, lambda v: 0 <= v < math.inf, "a finite number >= 0"),
        mirror="mirrored_dkd",
        needs_labels=True,
        tails=(),
    ),
}
DIVERGENCES = tuple(DIVERGENCE_TABLE)
# Those of two classes without a label among them: what an element of `binary_distillation_loss` is.
BINARY_DIVERGENCES = tuple(name for name in DIVERGENCES if not DIVERGENCE_TABLE[name].needs_labels)

# kernel: (its mirror, whether β and 1 − β change places), in both directions.
MIRRORS: dict[str, tuple[str, bool]] = {}
for _name, _divergence in DIVERGENCE_TABLE.items():
    if _divergence.mirror is not None:
        MIRRORS[_name] = (_divergence.mirror, _divergence.mirror_swaps_beta)
        MIRRORS.setdefault(_divergence.mirror, (_name, _divergence.mirror_swaps_beta))


def mirror(kernel: int, beta: float, one_minus_beta: float) -> tuple[int, float, float] | None:
    """Kernel, β and 1 − β of the same divergence with the roles of student and teacher exchanged; None: not known."""
    found = MIRRORS.get(KERNELS[kernel])
    if found is None:
        return None
    name, swaps = found
    first, second = (one_minus_beta, beta) if swaps else (beta, one_minus_beta)
    return KERNELS.index(name), first, second


def _resolve(name: str, beta: float | None) -> tuple[str, float, float]:
    """The kernel of a divergence, its β, and a number to multiply it with. A divergence whose β makes it another one is
    that other one."""
    one_of("divergence", name, DIVERGENCES)
    divergence = DIVERGENCE_TABLE[name]
    if divergence.beta is None:
        if beta is not None:
            raise ValueError(f"beta has no meaning for divergence={name!r}; got beta={beta!r}, wanted None")
        return divergence.kernel or name, 0.0, 1.0
    default, is_allowed, wanted = divergence.beta
    number = default if beta is None else number_of("beta", beta, f"{wanted}, for divergence={name!r}", is_allowed)
    for limit, other in divergence.limits.items():
        if number == limit:
            return other, 0.0, 1.0
    factor = 1.0 if divergence.factor is None else divergence.factor(number)
    return divergence.kernel or name, number, factor


# --------------------------------------------------------------------------------------------------- the keywords


class Keywords(TypedDict, total=False):
    """The keywords of a loss of rows, for editors and type checkers; what they mean: `distillation_loss`."""

    divergence: str
    beta: float | None
    temperature: float | tuple[float, float]
    temperature_scaling: str
    soft_weight: float
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    vocab: str
    dim: int
    inplace: bool


class BinaryKeywords(TypedDict, total=False):
    """Those of `binary_distillation_loss`."""

    divergence: str
    beta: float | None
    temperature: float | tuple[float, float]
    temperature_scaling: str
    soft_weight: float
    hard_weight: float
    ignore_index: int
    reduction: str
    inplace: bool


class SparseKeywords(Keywords, total=False):
    """Those of `sparse_distillation_loss`."""

    tail: str


class Options(NamedTuple):
    """The keywords of a loss, checked and resolved: the operators' numbers by their names, and what Python needs."""

    divergence: int  # position of the divergence's kernel in KERNELS
    beta: float
    one_minus_beta: float  # of its own, because 1 − beta has lost a small β
    student_temperature: float
    teacher_temperature: float
    soft_scale: float  # soft_weight · S, S = T_s·T_t or 1, times what the divergence's kernel is multiplied with
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: int  # position in REDUCTIONS
    scale: float = 1.0  # on top of everything: 1 / denominator, where that is a number
    dim: int = -1
    truncate: bool = True  # also right for vocabularies of one size
    inplace: bool = False
    needs_labels: bool = False
    tail: int = 0  # position in TAILS, of a sparse teacher

    @classmethod
    def of_operator(cls, given: Mapping[str, Any]) -> Options:
        """From the arguments of an operator by name, which have been checked."""
        return cls(**{name: given[name] for name in NUMBERS})

    def kernel(self) -> str:
        return KERNELS[self.divergence]

    def exchanged(self) -> Options | None:
        """Student and teacher with their roles exchanged, and no hard labels: the student's gradient is then that of a
        trainable teacher. None: no kernel has it."""
        mirrored = mirror(self.divergence, self.beta, self.one_minus_beta)
        if mirrored is None:
            return None
        return self._replace(
            divergence=mirrored[0],
            beta=mirrored[1],
            one_minus_beta=mirrored[2],
            student_temperature=self.teacher_temperature,
            teacher_temperature=self.student_temperature,
            hard_weight=0.0,
            label_smoothing=0.0,
        )


_THE_SAME = object()  # of the teacher's temperature: the student's


def _make_options(
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    teacher_temperature: Any = _THE_SAME,
    temperature_scaling: str = "t2",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab: str = "error",
    dim: int = -1,
    inplace: bool = False,
) -> Options:
    kernel, kernel_beta, factor = _resolve(divergence, beta)
    wanted = "a positive number, 1e-30 to 1e30, or a pair (student, teacher) of them"
    t_s = number_of("temperature", temperature, wanted, is_temperature)
    same = teacher_temperature is _THE_SAME
    t_t = t_s if same else number_of("temperature", teacher_temperature, wanted, is_temperature)
    one_of("temperature_scaling", temperature_scaling, TEMPERATURE_SCALINGS)
    soft = number_of("soft_weight", soft_weight, "a finite number >= 0", is_non_negative)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False; got {type(inplace).__name__}")
    return Options(
        divergence=KERNELS.index(kernel),
        beta=kernel_beta,
        one_minus_beta=1.0 - kernel_beta,
        student_temperature=t_s,
        teacher_temperature=t_t,
        soft_scale=soft * factor * (t_s * t_t if temperature_scaling == "t2" else 1.0),
        hard_weight=number_of("hard_weight", hard_weight, "a finite number >= 0", is_non_negative),
        label_smoothing=number_of(
            "label_smoothing", label_smoothing, "a number between 0 and 1", lambda v: 0.0 <= v <= 1.0
        ),
        ignore_index=integer_of("ignore_index", ignore_index),
        reduction=one_of("reduction", reduction, REDUCTIONS),
        dim=integer_of("dim", dim),
        truncate=one_of("vocab", vocab, VOCABS) == 1,
        inplace=inplace,
        needs_labels=DIVERGENCE_TABLE[divergence].needs_labels,
    )


_memoised_options = functools.lru_cache(maxsize=1024, typed=True)(_make_options)


def make_options(**keywords: Any) -> Options:
    """Check the keywords of a loss and resolve them; the result is remembered."""
    temperature = keywords.get("temperature")
    if isinstance(temperature, (tuple, list)):  # taken apart, so that each number is remembered with its type
        keywords["temperature"], keywords["teacher_temperature"] = pair_of(temperature)
    if torch.compiler.is_compiling():  # a cache is a side effect the compiler would have to guard
        return _make_options(**keywords)
    try:
        return _memoised_options(**keywords)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _make_options(**keywords)  # an unhashable value is a wrong value: let the checks name it


def make_binary_options(**keywords: Any) -> Options:
    """The same of `binary_distillation_loss`. A logit z is a row [z, 0] of two classes."""
    one_of("divergence", keywords.get("divergence", "forward_kl"), BINARY_DIVERGENCES)
    options = make_options(**keywords)
    if options.kernel() == "mse":  # of the logit, not the mean of it and of a class that is 0 for both
        options = options._replace(soft_scale=2.0 * options.soft_scale)
    return options


def check_tail(tail: str, divergence: str, kernel: str) -> int:
    """The position of a tail in TAILS, if it goes with a divergence and the kernel that its β makes of it."""
    number = one_of("tail", tail, TAILS)
    tails = DIVERGENCE_TABLE[divergence].tails
    if kernel != divergence and kernel in DIVERGENCE_TABLE:
        tails = tuple(name for name in tails if name in DIVERGENCE_TABLE[kernel].tails)
    if tail not in tails:
        fitting = ", ".join(repr(name) for name in DIVERGENCES if tail in DIVERGENCE_TABLE[name].tails)
        its = " or ".join(f"tail={name!r}" for name in tails) or "distillation_loss, of the teacher's logits in full"
        limit = f" (at this beta it is {kernel})" if kernel in DIVERGENCE_TABLE[divergence].limits.values() else ""
        raise ValueError(
            f"divergence={divergence!r}{limit} does not go with tail={tail!r}: it is infinite, or not defined, by the "
            f"classes listed alone; pass one of {fitting}, or {its}"
        )
    return number


def make_sparse_options(*, tail: str = "bucket", **keywords: Any) -> Options:
    """The same of `sparse_distillation_loss`. The teacher's log-probabilities are used as they are given: T_t enters S
    alone."""
    options = make_options(**keywords)
    number = check_tail(tail, keywords.get("divergence", "forward_kl"), options.kernel())
    return options._replace(teacher_temperature=1.0, tail=number)
