"""Every check of an argument, in one place, worded for the person who made the mistake.

`Options` holds the keywords of a loss after checking; it is made once for each combination a program uses
(the constructor is memoised), so that a training step does not pay for it again. The tensors are checked on
every call by `check_tensors`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "scaled_jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "hellinger",
    "soft_cross_entropy",
    "mse",
    "dkd",
)
# What there are kernels and reference functions for: the divergences but scaled_jsd, which is jsd times a number, and two
# whose gradient is that of a trainable teacher. The numbers are the registry's in csrc/divergence.h.
KERNELS: tuple[str, ...] = _C.divergences()
_MIRRORS = {
    "forward_kl": "reverse_kl",
    "skew_kl": "skew_reverse_kl",
    "soft_cross_entropy": "mirrored_soft_cross_entropy",
    "dkd": "mirrored_dkd",
}
_MIRRORS |= {mirror: name for name, mirror in _MIRRORS.items()}
LABELLED = tuple(KERNELS.index(name) for name in ("dkd", "mirrored_dkd"))
# Divergences with a parameter: its default, what it may be, and that in words. Below 1e-30, float32 has no room.
_SMALLEST_BETA = 1e-30
_BETAS: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "symmetric_kl": (0.5, lambda v: 0 <= v <= 1, "a number between 0 and 1"),
    "jsd": (0.5, lambda v: _SMALLEST_BETA <= v < 1, "a number between 0 (at least 1e-30) and 1, both excluded"),
    "scaled_jsd": (0.5, lambda v: v == 0 or _SMALLEST_BETA <= v <= 1, "0 or a number from 1e-30 to 1"),
    "skew_kl": (0.1, lambda v: v == 0 or _SMALLEST_BETA <= v < 1, "0 or a number from 1e-30 to 1, 1 excluded"),
    "skew_reverse_kl": (0.1, lambda v: v == 0 or _SMALLEST_BETA <= v < 1, "0 or a number from 1e-30 to 1, 1 excluded"),
    "dkd": (8.0, lambda v: 0 <= v < math.inf, "a finite number >= 0"),
}
REDUCTIONS: tuple[str, ...] = _C.reductions()
TEMPERATURE_SCALINGS = ("t2", "none")
VOCABS = ("error", "truncate")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)

_T2 = "t2"


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(map(repr, known))}; got {value!r}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return known.index(value)


def _number(name: str, value: Any, wanted: str, ok: Any) -> float:
    # Anything that behaves as a real scalar (NumPy's too), but no tensor: reading one would be a host sync on CUDA.
    # Plain floats first: under torch.compile they may be symbols, which know no hasattr.
    if not isinstance(value, float) and (
        isinstance(value, (bool, str, Tensor)) or not (isinstance(value, int) or hasattr(value, "__float__"))
    ):
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__}")
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.nan
    except TypeError:  # a NumPy array of several numbers
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__} {value!r}") from None
    if not ok(number):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer; got {value!r}")
    return number


def _is_temperature(v: float) -> bool:
    return 1e-30 <= v <= 1e30  # what float32 arithmetic can divide by


def _is_positive(v: float) -> bool:
    return 0 < v < math.inf


def _is_non_negative(v: float) -> bool:
    return 0 <= v < math.inf


def mirror(kind: int, beta: float, one_minus_beta: float) -> tuple[int, float, float]:
    """The kernel, β and 1 − β of the same divergence with the roles of student and teacher exchanged."""
    name = KERNELS[kind]
    swap = name in ("symmetric_kl", "jsd")
    return (KERNELS.index(_MIRRORS.get(name, name)), one_minus_beta if swap else beta, beta if swap else one_minus_beta)


def _resolve(divergence: str, beta: float | None) -> tuple[str, float, float]:
    """The kernel of a divergence, its β, and a number to multiply it with. A divergence whose β makes it another one is
    that other one."""
    _one_of("divergence", divergence, DIVERGENCES)
    if divergence not in _BETAS:
        if beta is not None:
            raise ValueError(f"beta has no meaning for divergence={divergence!r}; got beta={beta!r}, wanted None")
        return divergence, 0.0, 1.0
    default, ok, wanted = _BETAS[divergence]
    number = default if beta is None else _number("beta", beta, f"{wanted}, for divergence={divergence!r}", ok)
    if divergence == "dkd":
        return divergence, number, 1.0
    if number == 0.0:
        return "reverse_kl" if divergence == "skew_reverse_kl" else "forward_kl", 0.0, 1.0
    if number == 1.0:
        return "reverse_kl", 0.0, 1.0
    if divergence == "scaled_jsd":
        return "jsd", number, 1.0 / (number * (1.0 - number))
    return divergence, number, 1.0


class Options(NamedTuple):
    """The keywords of a loss, checked and resolved. `kind` to `reduction` are in the order of the operators' schema."""

    kind: int  # position of the divergence's kernel in KERNELS
    beta: float
    one_minus_beta: float  # 1 − beta
    student_temperature: float
    teacher_temperature: float
    soft_scale: float  # soft_weight · S, S = T_s·T_t or 1, times what the divergence's kernel is multiplied with
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: int  # position in REDUCTIONS
    truncate: bool
    dim: int
    inplace: bool

    def exchanged(self) -> Options:
        """Student and teacher with their roles exchanged, and no hard labels: the student's gradient is then that of a
        teacher who learns."""
        kind, beta, one_minus_beta = mirror(self.kind, self.beta, self.one_minus_beta)
        return self._replace(
            kind=kind,
            beta=beta,
            one_minus_beta=one_minus_beta,
            student_temperature=self.teacher_temperature,
            teacher_temperature=self.student_temperature,
            hard_weight=0.0,
            label_smoothing=0.0,
        )

    def operator_arguments(self, scale: float, dim: int) -> tuple[Any, ...]:
        """The numbers of the operators' schema, from `kind` to `dim`."""
        return (*self[:10], scale, dim)


def _make_options(
    divergence: str,
    beta: float | None,
    student_temperature: float,
    teacher_temperature: float,
    temperature_scaling: str,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    vocab: str,
    dim: int,
    inplace: bool,
) -> Options:
    kernel, kernel_beta, factor = _resolve(divergence, beta)
    wanted = "a positive number, 1e-30 to 1e30, or a pair (student, teacher) of them"
    t_s = _number("temperature", student_temperature, wanted, _is_temperature)
    t_t = _number("temperature", teacher_temperature, wanted, _is_temperature)
    _one_of("temperature_scaling", temperature_scaling, TEMPERATURE_SCALINGS)
    soft = _number("soft_weight", soft_weight, "a finite number >= 0", _is_non_negative)
    hard = _number("hard_weight", hard_weight, "a finite number >= 0", _is_non_negative)
    smoothing = _number("label_smoothing", label_smoothing, "a number between 0 and 1", lambda v: 0.0 <= v <= 1.0)
    ignore_index = _integer("ignore_index", ignore_index)
    dim = _integer("dim", dim)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be True or False; got {type(inplace).__name__}")
    return Options(
        kind=KERNELS.index(kernel),
        beta=kernel_beta,
        one_minus_beta=1.0 - kernel_beta,
        student_temperature=t_s,
        teacher_temperature=t_t,
        soft_scale=soft * factor * (t_s * t_t if temperature_scaling == _T2 else 1.0),
        hard_weight=hard,
        label_smoothing=smoothing,
        ignore_index=ignore_index,
        reduction=_one_of("reduction", reduction, REDUCTIONS),
        truncate=_one_of("vocab", vocab, VOCABS) == 1,
        dim=dim,
        inplace=inplace,
    )


_memoised_options = functools.lru_cache(maxsize=1024, typed=True)(_make_options)


def make_options(divergence: str, beta: float | None, temperature: Any, *others: Any) -> Options:
    """Check the keywords of a loss, in the order of its signature, and resolve them; the result is remembered."""
    if isinstance(temperature, (tuple, list)):
        if len(temperature) != 2:
            raise ValueError(
                f"temperature must be one number or a pair (student, teacher); got {len(temperature)} numbers"
            )
        keywords = (divergence, beta, *temperature, *others)
    else:
        keywords = (divergence, beta, temperature, temperature, *others)
    if torch.compiler.is_compiling():  # a cache is a side effect the compiler would have to guard
        return _make_options(*keywords)
    try:
        return _memoised_options(*keywords)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _make_options(*keywords)  # an unhashable value is a wrong value: let the checks name it


def _shape(shape: Any) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor; got layout {layout}")


def check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> int:
    """Check shapes, dtypes and devices against one another; return the class dimension, counted from 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, sizes or devices that do not fit.
    """
    if not isinstance(student_logits, Tensor):
        raise TypeError(f"student_logits must be a torch.Tensor; got {type(student_logits).__name__}")
    if not isinstance(teacher_logits, Tensor):
        raise TypeError(f"teacher_logits must be a torch.Tensor; got {type(teacher_logits).__name__}")
    if student_logits.dtype not in FLOATING:
        raise TypeError(f"student_logits must be float32, bfloat16, float16 or float64; got {student_logits.dtype}")
    if teacher_logits.dtype not in FLOATING:
        raise TypeError(f"teacher_logits must be float32, bfloat16, float16 or float64; got {teacher_logits.dtype}")
    _check_dense("student_logits", student_logits)
    _check_dense("teacher_logits", teacher_logits)
    s_shape = student_logits.shape
    t_shape = teacher_logits.shape
    ndim = len(s_shape)
    if ndim == 0:
        raise ValueError("student_logits must have a class dimension; got a 0-dimensional tensor")
    dim = options.dim
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"dim must lie between {-ndim} and {ndim - 1} for student_logits of shape {_shape(s_shape)}; got {dim}"
        )
    if dim < 0:
        dim += ndim
    if s_shape != t_shape:
        if len(t_shape) != ndim:
            raise ValueError(
                f"teacher_logits must have the shape of student_logits, {_shape(s_shape)}; got {_shape(t_shape)}"
            )
        if s_shape[:dim] != t_shape[:dim] or s_shape[dim + 1 :] != t_shape[dim + 1 :]:
            raise ValueError(
                "teacher_logits must have the shape of student_logits outside the class dimension "
                f"(dim={options.dim}), {_shape(s_shape)}; got {_shape(t_shape)}"
            )
        if not options.truncate:
            raise ValueError(
                f"teacher_logits has {t_shape[dim]} classes and student_logits has {s_shape[dim]} (dim={options.dim}); "
                "both need the same number, or pass vocab='truncate' to compare the classes they share"
            )
    if s_shape[dim] == 0 or t_shape[dim] == 0:
        raise ValueError(
            f"student_logits and teacher_logits need at least one class in dim={options.dim}; "
            f"got {_shape(s_shape)} and {_shape(t_shape)}"
        )
    device = student_logits.device
    if teacher_logits.device != device:
        raise ValueError(
            f"teacher_logits must be on the device of student_logits, {device}; got {teacher_logits.device}"
        )
    check_rows(labels, weight, denominator, options, s_shape, dim, device)
    return dim


def check_rows(
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    s_shape: torch.Size,
    dim: int,
    device: torch.device,
    of: str = "student_logits",
) -> None:
    """Check what has one element a row of logits of a shape, and what their sum is divided by."""
    if labels is not None:
        _check_row_shape("labels", labels, s_shape, dim, device, of)
        if labels.dtype not in INTEGERS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in INTEGERS)
            raise TypeError(f"labels must have an integer dtype ({known}); got {labels.dtype}")
    elif options.hard_weight > 0:
        raise ValueError(f"labels are needed for hard_weight={options.hard_weight}; got None")
    elif options.kind in LABELLED:
        raise ValueError("labels are needed for divergence='dkd'; got None")
    if weight is not None:
        _check_row_shape("weight", weight, s_shape, dim, device, of)
        if weight.dtype not in FLOATING:
            raise TypeError(
                f"weight must be float32, bfloat16, float16 or float64; got {weight.dtype}"
                + (" (a mask goes in as mask.float())" if weight.dtype == torch.bool else "")
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight is a constant of the loss and gets no gradient; pass weight.detach()")
    if denominator is not None:
        if options.reduction == 0:
            raise ValueError("denominator divides the sum over rows, and reduction='none' has no sum; drop one of them")
        if isinstance(denominator, Tensor):
            if denominator.dim() != 0:
                raise ValueError(f"denominator must be a number or a 0-d tensor; got shape {_shape(denominator.shape)}")
            if denominator.is_complex() or denominator.dtype == torch.bool:
                raise TypeError(f"denominator must be a real number; got {denominator.dtype}")
            if denominator.requires_grad and torch.is_grad_enabled():
                raise ValueError("denominator is a constant of the loss and gets no gradient; pass its .detach()")
            if denominator.device != device and denominator.device.type != "cpu":
                places = "the CPU" if device.type == "cpu" else f"{device} or on the CPU"
                raise ValueError(f"denominator must be on {places}; got {denominator.device}")
        else:
            _number("denominator", denominator, "a positive, finite number or a 0-d tensor", _is_positive)


def _check_row_shape(name: str, rows: Tensor, s_shape: torch.Size, dim: int, device: torch.device, of: str) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(rows).__name__}")
    # Compared piecewise: building the wanted shape costs as much as the rest of the check.
    shape = rows.shape
    if len(shape) != len(s_shape) - 1 or shape[:dim] != s_shape[:dim] or shape[dim:] != s_shape[dim + 1 :]:
        wanted = [*s_shape[:dim], *s_shape[dim + 1 :]]
        last = "class" if of == "student_logits" else "last"
        raise ValueError(
            f"{name} must have the shape of {of} without the {last} dimension, {_shape(wanted)}; got {_shape(shape)}"
        )
    if rows.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}; got {rows.device}")


def check_linear(
    side: str,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    device: torch.device,
) -> tuple[float | None, float]:
    """Check one model's hidden states [..., H] and head [V, H], or its logits [..., V] where there is no head; return
    softcap and scale as floats."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None and name != f"{side}_hidden":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")
        _check_dense(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of student_hidden, {device}; got {tensor.device}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of {side}_hidden, {hidden.dtype}; got {tensor.dtype}")
    if hidden.dim() == 0:
        raise ValueError(f"{side}_hidden must have a last dimension; got a 0-dimensional tensor")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden needs at least one feature; got shape {_shape(hidden.shape)}")
    if weight is None:
        if side == "student":
            raise TypeError("student_weight must be a torch.Tensor, the head [classes, hidden size]; got NoneType")
        if bias is not None:
            raise ValueError("teacher_bias has no meaning where teacher_weight=None, teacher_hidden being logits")
    else:
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{side}_weight must be [classes, {hidden.shape[-1]}], as {side}_hidden is {_shape(hidden.shape)}; "
                f"got {_shape(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{side}_bias must be {_shape(weight.shape[:1])}; got {_shape(bias.shape)}")
    if (hidden if weight is None else weight).shape[-1 if weight is None else 0] == 0:
        raise ValueError(f"{side}_weight needs at least one class; got none")
    return check_softcap(side, softcap), check_scale(side, scale)


def check_softcap(side: str, softcap: float | None) -> float | None:
    if softcap is None:
        return None
    # As of temperatures: what float32 arithmetic can divide by.
    return _number(f"{side}_softcap", softcap, "a positive number or None", _is_temperature)


def check_scale(side: str, scale: float) -> float:
    return _number(
        f"{side}_scale", scale, "a finite number that is not 0", lambda v: -math.inf < v < 0 or 0 < v < math.inf
    )


def check_memory_budget(memory_budget: int | None) -> int | None:
    if memory_budget is None:
        return None
    number = _integer("memory_budget", memory_budget)
    if number <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes; got {number}")
    return number
