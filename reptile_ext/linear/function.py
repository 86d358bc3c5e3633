"""The public function."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import autograd, compat
from ..autograd import Constants
from ..checks import (
    FLOATING,
    LARGE_TEMPERATURE,
    check_is_tensor,
    check_linear,
    check_linear_shapes,
    check_memory_budget,
    check_num_rows_in,
    check_rows,
    check_sparse_alone,
    check_sparse_tensors,
    check_tail_has_meaning,
    raise_better,
    refuse_dtensor,
    warn_of_temperature,
)
from ..functional import for_operators, needs_reference
from ..options import REDUCTIONS, Options, make_options, make_sparse_options
from ..reference import counted_rows
from ..sparse import pair_for_operators
from .dtensor import gathered, is_dtensor
from .group import sharded_linear_loss
from .head import linear_map
from .loop import LinearConfig
from .loss import LinearLoss, operator, operator_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SUM = REDUCTIONS.index("sum")


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_head: nn.Module | None = None,
    teacher_head: nn.Module | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    memory_budget: int | None = None,
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
    num_rows_in: int | None = None,
    teacher_indices: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    tail: str = "bucket",
    group: ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
) -> Tensor:
    """`distillation_loss` of the logits of two heads, without the logits: rows go through in chunks, both products, the
    fused loss and the products back to hidden states and head, all in the forward pass.

    Equivalent PyTorch, which needs several tensors of [rows, V]::

        def logits(hidden, weight, bias, softcap, scale):
            z = F.linear(hidden, weight, bias) * scale
            return z if softcap is None else softcap * torch.tanh(z / softcap)

        loss = distillation_loss(logits(student_hidden, student_weight, student_bias, student_softcap, student_scale),
                                 logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
                                 labels, ...)

    Args:
        student_hidden: [..., H_s], float32, bfloat16, float16 or float64; the leading shape is that of the rows.
        student_weight: the head, [V_s, H_s], as in `torch.nn.Linear`; of the dtype of the hidden states, as the bias.
        teacher_hidden: [..., H_t]; its dtype and H_t may differ from the student's.
        teacher_weight: [V_t, H_t], or None: `teacher_hidden` are the teacher's logits, [..., V_t].
        student_head, teacher_head: a module in the place of weight and bias, with whatever its forward adds to them:
            adapters (LoRA), fake quantisation, weights in 8 bits. It has to be linear in the hidden states, up to
            rounding, which is checked on four rows in every call; no dropout in train mode. A module that is more than
            a `torch.nn.Linear` is asked what it makes of H + 1 unit vectors, each time.
        labels, weight: of the leading shape. On the CPU, ignored rows are left out of the products too.
        num_rows_in: how many rows are not ignored, as a number that the host knows, for instance of the labels before
            they went to the device: `int((labels != ignore_index).sum())`. With it, ignored rows are left out of the
            products on a GPU too, which cannot be asked without waiting for it. At least as many as there are; rows
            beyond are ignored ones, and cost their products. Too small a number would lose rows: an error on the CPU,
            and on a GPU NaN, in the loss and its gradients. It is not what the loss is divided by (`denominator`).
        student_bias, teacher_bias: [V].
        student_softcap, teacher_softcap: c of c·tanh(z/c) (Gemma 2), after the scale and before the temperature;
            computed in float32.
        student_scale, teacher_scale: what the logits are multiplied with (Cohere's logit_scale).
        memory_budget: bytes for logits, of student and teacher together, copies for softcaps included, a row's rounded
            up to a multiple of 128. None: 120 MiB on the CPU, but never less than 512 rows of the student's logits and
            256 of the teacher's (of both 256, if the models may be one and the same), below which products get slow; on
            a GPU a 128th of its memory, but never less than 2,048 rows of both. On the CPU more than 512 rows of the
            student's are of no use, and up to 256 MiB are kept for the next call (`reptile_ext.release_scratch()` gives
            them back).
        teacher_indices, teacher_log_probs, tail: a sparse teacher, as of `sparse_distillation_loss`, in the place of
            teacher_hidden and teacher_weight: [..., K].
        group: processes that each have the heads' weights and biases of a range of the classes, in the order of their
            ranks, and all of the hidden states; labels and teacher_indices are numbers of all classes. Every process
            gets the same loss and the gradient of its own heads. O(rows) numbers are communicated for the loss (O(rows
            · K) of a sparse teacher), and the hidden states' gradient. Without double backward and torch.func; what
            teacher_hidden are logits, are those of own classes. On a GPU the host waits, once, to agree on the chunks.
        reduce_hidden_gradient: add the gradient of the hidden states up over the group, of which each process has the
            part of its own classes; False leaves that to you.
        divergence ... denominator, vocab: as of `distillation_loss`. With vocab="truncate" the columns that only one of
            the heads has are not computed.

    Returns:
        A scalar, or the leading shape with reduction="none"; float32, or float64 if either side is.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it, what came and what is wanted.

    Gradients go to whichever of the six tensors requires one, the teacher's too; the others' products are not computed.
    Those of 16-bit heads are added up in 16 bits over at most four chunks, by products that add in float32, and over
    more in float32. (On a GPU, `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` and its float16 twin
    hold for these products as for any other; this function leaves them as they are.)
    With reduction="none", for float16, and for a trainable teacher, gradients are computed in the backward pass, from
    logits that are computed once more. Under autocast, hidden states and heads are cast as `F.linear` would.
    Derivatives of derivatives, and torch.func, go through logits in full.

    Equal models give exactly 0. The products are torch's: the same bits come of the same machine with the same number
    of threads, and another number may round them otherwise.

    A weight is taken as it is: `lm_head.weight` of a head with adapters is the base weight alone, for which pass
    `student_head=lm_head`. Under DDP and FSDP, call the loss inside of the wrapped module's forward (the head's
    gradient has to be one of its outputs' for the processes to add it up).

    Heads and biases may be DTensors, as the parameters of a module that FSDP2 has sharded are outside of its forward:
    they are cast to the dtype of the hidden states and gathered, and get the mean of the processes' gradients, as FSDP2
    does by default. Each process's loss is that of its own rows.
    """
    is_sparse = teacher_indices is not None or teacher_log_probs is not None
    if is_sparse:
        check_sparse_alone(teacher_hidden, teacher_weight, teacher_bias, teacher_head, teacher_softcap, teacher_scale)
    check_tail_has_meaning(tail, is_sparse)
    options = (functools.partial(make_sparse_options, tail=tail) if is_sparse else make_options)(
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
    )
    check_is_tensor("student_hidden", student_hidden)
    if is_sparse:
        check_sparse_tensors(
            student_hidden, teacher_indices, teacher_log_probs, labels, weight, denominator, options, "student_hidden"
        )
        assert teacher_indices is not None
        assert teacher_log_probs is not None
        indices, teacher_hidden = pair_for_operators(teacher_indices, teacher_log_probs)
        indices, teacher_hidden = indices.flatten(0, -2), teacher_hidden.flatten(0, -2)
    check_is_tensor("teacher_hidden", teacher_hidden)
    assert teacher_hidden is not None
    student_hidden, student_weight, student_bias = _weight_of_head(
        "student", student_head, student_hidden, student_weight, student_bias
    )
    teacher_hidden, teacher_weight, teacher_bias = _weight_of_head(
        "teacher", teacher_head, teacher_hidden, teacher_weight, teacher_bias
    )
    device = student_hidden.device
    for name, x in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if is_dtensor(x):
            refuse_dtensor(name)
    student = [student_hidden, *(gathered(x, student_hidden) for x in (student_weight, student_bias))]
    teacher = [teacher_hidden, *(gathered(x, teacher_hidden) for x in (teacher_weight, teacher_bias))]
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        student = _autocast(student, dtype)
        if teacher_weight is not None:
            teacher = _autocast(teacher, dtype)
    of_student = check_linear("student", (student[0], student[1], student[2]), student_softcap, student_scale, device)
    of_teacher = check_linear("teacher", (teacher[0], teacher[1], teacher[2]), teacher_softcap, teacher_scale, device)
    budget = check_memory_budget(memory_budget)
    if options.student_temperature > LARGE_TEMPERATURE or options.teacher_temperature > LARGE_TEMPERATURE:
        warn_of_temperature(options, student[0], teacher[0])
    if not is_sparse:
        check_linear_shapes(student[0], student[1], teacher[0], teacher[1], options)
    leading = student_hidden.shape[:-1]
    check_rows(labels, weight, denominator, options, student_hidden.shape, len(leading), device, "student_hidden")
    num_rows_in = check_num_rows_in(num_rows_in, leading, labels is None and weight is None)

    student[0] = student[0].reshape(-1, student[0].shape[-1])
    if teacher_weight is not None or group is not None or _is_matrix(teacher[0]):
        teacher[0] = teacher[0].reshape(-1, teacher[0].shape[-1])
    if is_sparse:
        teacher[1] = indices
    tensors = (*student, *teacher)
    labels, weight = (x if x is None else x.reshape(-1) for x in (labels, weight))
    softcaps, scales = (of_student[0], of_teacher[0]), (of_student[1], of_teacher[1])
    config = LinearConfig(options, budget, softcaps, scales, num_rows_in, is_sparse)
    if not isinstance(reduce_hidden_gradient, bool):
        raise TypeError(f"reduce_hidden_gradient must be True or False; got {reduce_hidden_gradient!r}")
    if group is not None:
        loss = sharded_linear_loss(config, tensors, (labels, weight, denominator), group, reduce_hidden_gradient)
        return loss.reshape(leading) if reduction == "none" else loss
    if needs_reference(device, "linear_distillation_loss"):
        # A denominator that is a number stays one: its value is checked.
        loss = LinearLoss.reference(config, tensors, (labels, weight, denominator), check_values=True)
    else:
        constants, options = for_operators(labels, weight, denominator, options, device)
        if REDUCTIONS[options.reduction] == "mean":
            constants, options = _mean_as_sum(tensors[0], constants, options)
        loss = _apply(config._replace(options=options), tensors, constants)
    return loss.reshape(leading) if reduction == "none" else loss


def _weight_of_head(side: str, head: Any, hidden: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Any, Any]:
    if head is None:
        return hidden, weight, bias
    if weight is not None or bias is not None:
        raise ValueError(f"{side}_head takes the place of {side}_weight and {side}_bias; got both")
    return linear_map(side, head, hidden)


def _autocast(tensors: list[Any], dtype: torch.dtype) -> list[Any]:
    """As `F.linear` would be cast."""
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOATING[:3] else x for x in tensors]


def _is_matrix(x: Tensor) -> bool:
    """Whether its rows are a matrix's without a copy. (A compiler decides on its own.)"""
    if compat.is_traced(x):
        return True
    leading = [n for n in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n[0] != 1]
    return x.numel() == 0 or all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(leading))


def _mean_as_sum(student_hidden: Tensor, constants: Constants, options: Options) -> tuple[Constants, Options]:
    """The mean over the rows that count as a sum over chunks, divided by what they count."""
    labels, weight, _ = constants
    divisor = None
    counted = counted_rows(labels, weight, options.ignore_index)
    if counted is None and not compat.is_traced(student_hidden):
        options = options._replace(scale=1.0 / max(student_hidden.shape[0], 1))
    elif counted is None:  # the number of rows may be a symbol
        divisor = student_hidden.new_ones(student_hidden.shape[0], dtype=torch.float64).sum().clamp(min=1.0)
    else:
        total = counted.sum(dtype=torch.float64) if weight is None else torch.where(counted, weight, 0.0).sum()
        divisor = torch.where(total == 0, 1.0, total)
    return (labels, weight, divisor), options._replace(reduction=_SUM)


def _apply(config: LinearConfig, tensors: tuple[Any, ...], constants: Constants) -> Tensor:
    """Differentiably: by the fast path in an eager program, as an operator in a traced one."""
    if not torch.is_grad_enabled():  # autograd's functions are asked for gradients of what requires one there too
        tensors = tuple(x if x is None else x.detach() for x in tensors)
    try:
        if not compat.is_traced(tensors[0]):
            fused: Tensor = autograd.Fused.apply(LinearLoss, config, *constants, *tensors)  # type: ignore[no-untyped-call]
            return fused
        needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
        if any(needed) and not torch.compiler.is_compiling():  # make_fx: the operator's own autograd saves them
            tensors, constants = autograd.savable(tensors), autograd.savable(constants)
        now = LinearLoss.gradients_at_once(config, tensors[0], needed)
        traced: Tensor = operator(*operator_arguments(config, tensors, constants, None, now))[0]
        return traced
    except RuntimeError as error:
        raise_better(error, tensors[0].device)
        raise
