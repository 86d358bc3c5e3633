"""Every check of an argument and every message about one, worded for the person who made the mistake.

Keywords are checked by `options.make_options` in the words of this file, once for each combination that a program uses;
tensors are checked on every call, by `check_tensors`.
"""

from __future__ import annotations

import difflib
import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from . import compat
from .ops import KERNELS, REDUCTIONS
from .words import did_you_mean

if TYPE_CHECKING:
    from .options import Options

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


# ------------------------------------------------------------------------------------------------ numbers and names


# What other libraries call it.
_SAME = {
    "batchmean": "reduction='mean' divides by the number of rows, as torch's batchmean does for logits [N, V]",
    "kl": "divergence='forward_kl' is KL(teacher, student)",
    "kl_div": "divergence='forward_kl' is KL(teacher, student)",
    "kld": "divergence='forward_kl' is KL(teacher, student)",
    "js": "divergence='jsd' is Jensen and Shannon's",
}
_KEYWORDS = {
    "T": "temperature",
    "tau": "temperature",
    "temp": "temperature",
    "alpha": "hard_weight and soft_weight",
    "kd_weight": "soft_weight",
    "loss_type": "divergence",
    "kd_loss_type": "divergence",
    "kind": "divergence",
    "mask": "weight, which the call takes",
}


def refuse_keyword(function: str, name: str, known: Iterable[str], of_the_call: tuple[str, ...]) -> NoReturn:
    if name in of_the_call:
        also = f"; {name} goes to the call"
    else:
        also = f"; did you mean {_KEYWORDS[name]}?" if name in _KEYWORDS else did_you_mean(name, known)
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{also}")


def refuse_attribute(module: str, name: str, known: Iterable[str], of_the_call: tuple[str, ...]) -> None:
    """Raise for a name that was meant to be a keyword's: it would have no effect."""
    if name in of_the_call:
        raise AttributeError(f"{module} has no attribute {name!r}: {name} goes to the call")
    if name in _KEYWORDS or difflib.get_close_matches(name, list(known), 1, cutoff=0.8):
        also = f"; did you mean {_KEYWORDS[name]}?" if name in _KEYWORDS else did_you_mean(name, known)
        raise AttributeError(f"{module} has no attribute {name!r}{also}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(map(repr, known))}; got {value!r}")
    if value not in known:
        also = f"; {_SAME[value]}" if value in _SAME and name in _SAME[value] else did_you_mean(value, known)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}{also}")
    return known.index(value)


def number_of(name: str, value: Any, wanted: str, ok: Any) -> float:
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


def integer_of(name: str, value: Any) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer; got {value!r}")
    return number


def is_temperature(v: float) -> bool:
    return 1e-30 <= v <= 1e30  # what float32 arithmetic can divide by


def is_positive(v: float) -> bool:
    return 0 < v < math.inf


def is_non_negative(v: float) -> bool:
    return 0 <= v < math.inf


def pair_of(temperature: tuple[Any, ...] | list[Any]) -> tuple[Any, Any]:
    """The student's and the teacher's temperature, not yet checked."""
    if len(temperature) != 2:
        raise ValueError(f"temperature must be one number or a pair (student, teacher); got {len(temperature)} numbers")
    return temperature[0], temperature[1]


# --------------------------------------------------------------------------------------------------------- tensors


def _shape(shape: Any) -> str:
    return "[" + ", ".join(str(n) for n in shape) + "]"


def check_is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}{_where_the_tensor_is(name, value)}")


def _where_the_tensor_is(name: str, value: Any) -> str:
    """What to pass instead of something that has, or can be made, a tensor."""
    wanted = "last_hidden_state" if name.endswith("_hidden") else "logits"
    if isinstance(value, torch.nn.Module):
        if name.endswith("_weight"):
            return f": pass it as {name.removesuffix('weight')}head"
        return ": pass what it returns"
    if not isinstance(value, type):
        for attribute in (wanted, "logits"):
            if isinstance(getattr(value, attribute, None), Tensor):
                return f": pass its .{attribute}"
    if isinstance(value, Mapping):
        return f': pass its ["{wanted}"]' if wanted in value else f" with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (list, tuple)):
        return ": pass its [0]" if value and isinstance(value[0], Tensor) else ": pass torch.as_tensor() of it"
    if type(value).__module__ == "numpy":
        return (
            ": pass torch.from_numpy() of it" if type(value).__name__ == "ndarray" else ": pass torch.as_tensor() of it"
        )
    return ""


def _refuse_dtype(name: str, dtype: torch.dtype) -> NoReturn:
    also = ""
    if name == "weight" and (dtype in INTEGERS or dtype == torch.bool):
        also = " (a mask goes in as mask.float())"
    elif dtype in INTEGERS:
        also = " (class numbers go in as labels)"
    raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {dtype}{also}")


def is_plain_or_sharded(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are in its own memory, or in the memories of several processes."""
    kind = type(tensor)
    return kind is Tensor or kind is torch.nn.Parameter or not compat.has_its_own_values(kind)


def _check_plain(name: str, tensor: Tensor) -> None:
    if not is_plain_or_sharded(tensor):
        kind = type(tensor)
        also = ""
        if name.endswith(("_weight", "_bias")):
            also = f", or the module that it belongs to as {name.rpartition('_')[0]}_head"
        raise TypeError(
            f"{name} must be a plain tensor; got a {kind.__module__}.{kind.__qualname__}, whose numbers are only known "
            f"to its own operations: pass a plain tensor of them{also}"
        )


def _check_dense(name: str, tensor: Tensor) -> None:
    _check_plain(name, tensor)
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
    sharded: bool = False,
) -> int:
    """Check shapes, dtypes and devices against one another; return the class dimension, counted from 0. The numbers of
    classes are not compared if they are `sharded` over processes: those compare their numbers themselves.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, sizes or devices that do not fit.
    """
    check_is_tensor("student_logits", student_logits)
    check_is_tensor("teacher_logits", teacher_logits)
    if student_logits.dtype not in FLOATING:
        _refuse_dtype("student_logits", student_logits.dtype)
    if teacher_logits.dtype not in FLOATING:
        _refuse_dtype("teacher_logits", teacher_logits.dtype)
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
        if not options.truncate and not sharded:
            raise ValueError(
                f"teacher_logits has {t_shape[dim]} classes and student_logits has {s_shape[dim]} (dim={options.dim}); "
                "both need the same number, or pass vocab='truncate' to compare the classes they share"
            )
    if not sharded and (s_shape[dim] == 0 or t_shape[dim] == 0):
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
    elif options.needs_labels:
        raise ValueError(f"labels are needed for divergence={options.kernel()!r}; got None")
    if weight is not None:
        _check_row_shape("weight", weight, s_shape, dim, device, of)
        if weight.dtype not in FLOATING:
            _refuse_dtype("weight", weight.dtype)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight is a constant of the loss and gets no gradient; pass weight.detach()")
    check_denominator(denominator, options, device)


def check_denominator(denominator: float | Tensor | None, options: Options, device: torch.device) -> None:
    if denominator is None:
        return
    if REDUCTIONS[options.reduction] == "none":
        raise ValueError("denominator divides the sum over rows, and reduction='none' has no sum; drop one of them")
    if isinstance(denominator, Tensor):
        _check_plain("denominator", denominator)
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
        number_of("denominator", denominator, "a positive, finite number or a 0-d tensor", is_positive)


def _check_row_shape(name: str, rows: Tensor, s_shape: torch.Size, dim: int, device: torch.device, of: str) -> None:
    check_is_tensor(name, rows)
    _check_plain(name, rows)
    # Compared piecewise: building the wanted shape costs as much as the rest of the check.
    shape = rows.shape
    if len(shape) != len(s_shape) - 1 or shape[:dim] != s_shape[:dim] or shape[dim:] != s_shape[dim + 1 :]:
        wanted = [*s_shape[:dim], *s_shape[dim + 1 :]]
        last = "class" if of == "student_logits" else "last"
        also = ""
        if name == "labels" and shape == s_shape:
            also = ": pass labels.argmax(dim) of one-hot rows" if rows.dtype in INTEGERS else f" of {rows.dtype}"
        raise ValueError(
            f"{name} must have the shape of {of} without the {last} dimension, {_shape(wanted)}; "
            f"got {_shape(shape)}{also}"
        )
    if rows.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}; got {rows.device}")


def check_linear(
    side: str,
    tensors: tuple[Any, Any, Any],
    softcap: float | None,
    scale: float,
    device: torch.device,
) -> tuple[float | None, float]:
    """Check one model's hidden states [..., H] and head [V, H], or its logits [..., V] where there is no head; return
    softcap and scale as floats."""
    hidden, weight, bias = tensors
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None and name != f"{side}_hidden":
            continue
        check_is_tensor(name, tensor)
        if tensor.dtype not in FLOATING:
            _refuse_dtype(name, tensor.dtype)
        _check_dense(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of student_hidden, {device}; got {tensor.device}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of {side}_hidden, {hidden.dtype}; got {tensor.dtype}")
    check_features(side, hidden)
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


def check_features(side: str, hidden: Tensor) -> None:
    if hidden.dim() == 0:
        raise ValueError(f"{side}_hidden must have a last dimension; got a 0-dimensional tensor")
    if hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden needs at least one feature; got shape {_shape(hidden.shape)}")


def check_softcap(side: str, softcap: float | None) -> float | None:
    if softcap is None:
        return None
    # As of temperatures: what float32 arithmetic can divide by.
    return number_of(f"{side}_softcap", softcap, "a positive number or None", is_temperature)


def check_scale(side: str, scale: float) -> float:
    return number_of(
        f"{side}_scale", scale, "a finite number that is not 0", lambda v: -math.inf < v < 0 or 0 < v < math.inf
    )


def check_memory_budget(memory_budget: int | None) -> int | None:
    if memory_budget is None:
        return None
    number = integer_of("memory_budget", memory_budget)
    if number <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes; got {number}")
    return number


def check_num_rows_in(num_rows_in: int | None, leading: torch.Size, all_are_in: bool) -> int | None:
    """Check the number of rows that are not ignored against the number of all."""
    if num_rows_in is None:
        return None
    num_rows = math.prod(leading)  # leading.numel() would make a number of a symbol
    # Where a program is traced, it may be a symbol.
    is_number = isinstance(num_rows_in, (int, torch.SymInt)) and not isinstance(num_rows_in, bool)
    number = num_rows_in if is_number else integer_of("num_rows_in", num_rows_in)
    if number < 0 or number > num_rows:
        also = ": a count of several micro-batches or processes goes in as denominator" if number > num_rows else ""
        raise ValueError(f"num_rows_in must be a number of this call's rows, 0 to {num_rows}; got {number}{also}")
    if all_are_in:
        check_rows_in(number, num_rows)
    return number


def check_rows_in(num_rows_in: int, found: int) -> None:
    if num_rows_in < found:
        raise ValueError(
            "num_rows_in must be at least the number of rows that are not ignored (by labels, or a weight of 0), "
            f"{found}; got {num_rows_in}"
        )


def check_linear_shapes(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    options: Options,
) -> None:
    """Check the rows and classes of two models, each of which is right in itself, against one another."""
    leading = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != leading:
        raise ValueError(
            f"teacher_hidden must have the shape of student_hidden but for the last dimension, {_shape(leading)}; "
            f"got {_shape(teacher_hidden.shape[:-1])}"
        )
    of_student = student_weight.shape[0]
    of_teacher = teacher_hidden.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
    if of_student != of_teacher and not options.truncate:
        raise ValueError(
            f"teacher_weight has {of_teacher} classes and student_weight has {of_student}; both need the same number, "
            "or pass vocab='truncate' to compare the classes they share"
        )


def check_binary_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
) -> None:
    """`check_tensors` of logits that are distributions of their own: one shape, and what is as large or broadcast.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that do not fit.
    """
    shape = getattr(student_logits, "shape", None)
    device = getattr(student_logits, "device", None)
    given = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": labels,
        "weight": weight,
        "pos_weight": pos_weight,
    }
    for name, tensor in given.items():
        if tensor is None and not name.endswith("_logits"):
            continue
        check_is_tensor(name, tensor)
        assert tensor is not None
        assert shape is not None
        if name == "labels" and tensor.dtype not in FLOATING:
            raise TypeError(
                f"labels must be targets from 0 to 1, float32, bfloat16, float16 or float64; got {tensor.dtype}: pass "
                "labels.float()"
            )
        if tensor.dtype not in FLOATING:
            _refuse_dtype(name, tensor.dtype)
        _check_dense(name, tensor)
        if name in ("weight", "pos_weight"):
            own = tensor.shape
            broadcasts = len(own) <= len(shape) and all(
                n in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False)
            )
            if not broadcasts:
                raise ValueError(
                    f"{name} must have a shape that broadcasts to that of student_logits, {_shape(shape)}; "
                    f"got {_shape(own)}"
                )
        elif tensor.shape != shape:
            also = ""
            if tensor.numel() == student_logits.numel():
                also = f": pass {name}.view_as(student_logits)"
            raise ValueError(
                f"{name} must have the shape of student_logits, {_shape(shape)}; got {_shape(tensor.shape)}{also}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of student_logits, {device}; got {tensor.device}")
        if not name.endswith("_logits") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is a constant of the loss and gets no gradient; pass {name}.detach()")
    if labels is None and options.hard_weight > 0:
        raise ValueError(f"labels are needed for hard_weight={options.hard_weight}; got None")
    assert device is not None
    check_denominator(denominator, options, device)


def check_sparse_tensors(
    student_logits: Tensor,
    teacher_indices: Any,
    teacher_log_probs: Any,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    of: str = "student_logits",
    sharded: bool = False,
) -> int:
    """`check_tensors` of a teacher that is K classes a row; returns the class dimension, counted from 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, sizes or devices that do not fit.
    """
    check_is_tensor(of, student_logits)
    if student_logits.dtype not in FLOATING:
        _refuse_dtype(of, student_logits.dtype)
    _check_dense(of, student_logits)
    s_shape, ndim, dim = student_logits.shape, student_logits.dim(), options.dim
    if ndim == 0:
        raise ValueError(f"{of} must have a class dimension; got a 0-dimensional tensor")
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must lie between {-ndim} and {ndim - 1} for {of} of shape {_shape(s_shape)}; got {dim}")
    dim %= ndim
    if not sharded and s_shape[dim] == 0:
        raise ValueError(f"{of} needs at least one class in dim={options.dim}; got {_shape(s_shape)}")
    for name, tensor in (("teacher_indices", teacher_indices), ("teacher_log_probs", teacher_log_probs)):
        check_is_tensor(name, tensor)
        if name == "teacher_indices" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"teacher_indices must be int64 or int32; got {tensor.dtype}")
        if name == "teacher_log_probs" and tensor.dtype not in FLOATING:
            _refuse_dtype(name, tensor.dtype)
        _check_dense(name, tensor)
        shape = tensor.shape
        if len(shape) != ndim or shape[:dim] != s_shape[:dim] or shape[dim:-1] != s_shape[dim + 1 :]:
            wanted = [*map(str, s_shape[:dim]), *map(str, s_shape[dim + 1 :]), "K"]
            raise ValueError(
                f"{name} must have the shape of {of} without its {'class' if of == 'student_logits' else 'last'} "
                f"dimension, and K classes last, [{', '.join(wanted)}]; got {_shape(shape)}"
            )
        if tensor.device != student_logits.device:
            raise ValueError(f"{name} must be on the device of {of}, {student_logits.device}; got {tensor.device}")
    if teacher_indices.shape != teacher_log_probs.shape:
        raise ValueError(
            f"teacher_indices and teacher_log_probs must have one shape; got {_shape(teacher_indices.shape)} and "
            f"{_shape(teacher_log_probs.shape)}"
        )
    k = teacher_indices.shape[-1]
    if not 1 <= k <= MOST_LISTED:
        raise ValueError(f"teacher_indices must list 1 to {MOST_LISTED} classes a row; got {k}")
    if teacher_log_probs.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_log_probs gets no gradient from a sparse loss: pass teacher_log_probs.detach(), or the teacher's "
            "logits in full to distillation_loss"
        )
    check_rows(labels, weight, denominator, options, s_shape, dim, student_logits.device, of)
    return dim


def check_sparse_alone(hidden: Any, weight: Any, bias: Any, head: Any, softcap: Any, scale: float) -> None:
    """Of the fused linear loss: a sparse teacher takes the place of hidden states and head."""
    given = {"hidden": hidden, "weight": weight, "bias": bias, "head": head, "softcap": softcap}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"teacher_indices and teacher_log_probs take the place of teacher_{name}; got both")
    if scale != 1.0:
        raise ValueError(f"teacher_scale has no meaning for teacher_log_probs; got {scale!r}, wanted 1.0")


def check_tail_has_meaning(tail: str, is_sparse: bool) -> None:
    if tail != "bucket" and not is_sparse:
        raise ValueError(f"tail has no meaning without teacher_indices and teacher_log_probs; got {tail!r}")


# Classes that a sparse teacher lists of a row.
MOST_LISTED = 4096


def refuse_dtensor(name: str) -> NoReturn:
    raise TypeError(f"{name} must be this process's own rows; got a DTensor: pass {name}.to_local()")


# ---------------------------------------------------------------------------------------------------------- in place


def check_inplace(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    if teacher_logits.requires_grad:
        raise ValueError(
            "inplace=True keeps nothing to compute the gradient of teacher_logits from, which requires grad: pass "
            "teacher_logits.detach(), or inplace=False"
        )
    if not student_logits.requires_grad:
        return
    base = compat.base_of(student_logits)
    if student_logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True overwrites student_logits, which is a leaf that requires grad, or a view of one: pass the "
            "output of a model, or inplace=False"
        )


def refuse_second_backward() -> NoReturn:
    raise RuntimeError(
        "distillation_loss(inplace=True) supports one backward pass and no double backward: "
        "the logits were overwritten by their gradient; pass inplace=False"
    )


def refuse_batched_backward() -> NoReturn:
    raise RuntimeError(
        "distillation_loss(inplace=True) supports no batch of gradients (is_grads_batched=True): the logits were "
        "overwritten by their gradient; pass inplace=False"
    )


def refuse_unsaved(names: str) -> NoReturn:
    raise RuntimeError(
        f"{names} was made under torch.inference_mode(), where autograd saves nothing: there can be one backward pass, "
        "and no double backward; make it under torch.no_grad(), or pass a .clone() of it"
    )


def check_version(gradient: Tensor, expected: int) -> None:
    # A compiler of the backward pass (compiled autograd) counts on its own.
    if not torch.compiler.is_compiling() and compat.version_of(gradient) != expected:
        raise RuntimeError(
            "the student_logits of distillation_loss(inplace=True) hold their gradient and were modified by an "
            f"inplace operation before the backward pass (version {compat.version_of(gradient)}, expected {expected})"
        )


LARGE_TEMPERATURE = 300.0


def warn_of_temperature(options: Options, student: Tensor, teacher: Tensor) -> None:
    """Divergences shrink with T², and what float32 rounds of probabilities does not."""
    if torch.float64 in (student.dtype, teacher.dtype) or torch.compiler.is_compiling():
        return
    if KERNELS[options.divergence] in ("mse", "soft_cross_entropy"):  # no difference of nearly equal numbers
        return
    temperature = max(options.student_temperature, options.teacher_temperature)
    warnings.warn(
        f"temperature={temperature:g} leaves a divergence of about 1/T² times the variance of the logits, of which "
        "float32 has few digits: errors of 1 % at T = 1,000 and of 100 % at T = 10,000 are usual. Pass logits in "
        "float64, or divergence='mse', which compares logits",
        stacklevel=3,
    )


# ------------------------------------------------------------------------- values, where they can be read at no cost


def check_weight_values(weight: Tensor) -> None:
    wrong = ~((weight >= 0) & weight.isfinite())
    if bool(wrong.any()):
        raise ValueError(f"weight must be finite and not negative; got {weight[wrong][0].item()}")


def check_pos_weight_values(pos_weight: Tensor) -> None:
    wrong = ~((pos_weight >= 0) & pos_weight.isfinite())
    if bool(wrong.any()):
        raise ValueError(f"pos_weight must be finite and not negative; got {pos_weight[wrong][0].item()}")


def check_target_values(labels: Tensor, wrong: Tensor, ignore_index: int) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"labels must lie between 0 and 1 or equal ignore_index={ignore_index}; got {labels[wrong][0].item()}"
        )


def check_label_values(labels: Tensor, wrong: Tensor, vocab_size: int, ignore_index: int) -> None:
    if bool(wrong.any()):
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index={ignore_index}; got {labels[wrong][0].item()}"
        )


def check_sparse_values(
    ids: Tensor, log_probs: Tensor, outside: Tensor, repeated: Tensor, vocab_size: int, truncate: bool
) -> None:
    """Of rows that count; `outside` and `repeated` say which rows have such ids."""
    if bool(outside.any()):
        row = ids[outside][0]
        wrong = row[(row < -1) | ((row >= vocab_size) & (not truncate))][0].item()
        also = "" if wrong < 0 else ", or pass vocab='truncate' to leave out classes that the student does not have"
        raise ValueError(f"teacher_indices must lie in [-1, {vocab_size}), -1 for none{also}; got {wrong}")
    if bool(repeated.any()):
        row = ids[repeated][0].sort().values
        twice = row[1:][(row[1:] == row[:-1]) & (row[1:] >= 0)][0].item()
        raise ValueError(f"teacher_indices must differ from one another in a row; got {twice} twice")
    wrong_y = (ids >= 0) & (log_probs > LARGEST_LOG_PROB)
    if bool(wrong_y.any()):
        raise ValueError(
            "teacher_log_probs must be logarithms of probabilities, at most 0 but for rounding; got "
            f"{log_probs[wrong_y][0].item():g} (top_k_targets makes them of logits)"
        )
    mass = torch.where(ids >= 0, log_probs, -torch.inf).float().exp().sum(-1)
    if bool((mass > LARGEST_MASS).any()):
        raise ValueError(
            "teacher_log_probs must be logarithms of probabilities, which add up to 1 at most; got a row of sum "
            f"{mass[mass > LARGEST_MASS][0].item():f} (F.log_softmax over all classes, or top_k_targets, makes them of "
            "logits)"
        )


# What rounding to 16 bits may make of a logarithm that is not above 0, and more; and of a sum of probabilities, each of
# which it changes by 3 % at most where it has a share in the sum.
LARGEST_LOG_PROB = 0.1
LARGEST_MASS = 1.1


def check_divisor_value(divisor: Tensor) -> None:
    wrong = ~((divisor > 0) & divisor.isfinite())
    if bool(wrong.any()):
        raise ValueError(f"denominator must be positive and finite; got {divisor[wrong][0].item()}")


def raise_better(error: RuntimeError, device: torch.device) -> None:
    """The operators can raise RuntimeErrors only. To the caller, values that only they look at are ValueErrors, and
    memory that a smaller batch would not have needed is what training loops know it as."""
    message = str(error)
    if message.startswith(
        ("labels ", "weight ", "pos_weight ", "denominator ", "inplace=", "teacher_indices ", "teacher_log_probs ")
    ):
        raise ValueError(message) from None
    if message.startswith("not enough memory for the gradient") and device.type == "cuda":
        raise torch.OutOfMemoryError(f"CUDA out of memory: {message}") from None
