"""The fused losses as functions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from . import autograd, compat, distributed, ops, reference
from .autograd import Constants, Gradients
from .checks import LARGE_TEMPERATURE, check_inplace, check_tensors, raise_better, warn_of_temperature
from .options import REDUCTIONS, Options, make_options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["distillation_loss"]

_SUM = REDUCTIONS.index("sum")

_warned_devices: set[torch.device] = set()
_warned_of_one_class = False


class LogitsLoss:
    """`autograd.Loss` of (student, teacher); its configuration is `Options`.

    Of float16 logits the gradient is computed in the backward pass: finished earlier, divided by the number of rows and
    not yet multiplied by grad_output (a loss scaler's 65,536), it would underflow.
    """

    names: ClassVar[tuple[str, ...]] = ("student_logits", "teacher_logits")
    config_of = Options.of_operator

    @staticmethod
    def call(
        options: Options,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """The operator: the loss and, `with_gradient`, the gradient of the first tensor."""
        return ops.distillation_loss(*tensors, *constants, grad_output, *ops.numbers(options), with_gradient)

    @classmethod
    def forward(
        cls, options: Options, tensors: tuple[Any, ...], constants: Constants, needed: Sequence[bool]
    ) -> tuple[Tensor, Any]:
        now = needed[0] and tensors[0].dtype != torch.float16
        # Below the operator's own autograd layer, which would do again, in Python, what `autograd.Fused` does.
        with compat.below_autograd():
            loss, gradient = cls.call(options, tensors, constants, None, now)
        return loss, cls.keep(options, (gradient,), tensors, constants) if now else None

    @staticmethod
    def in_place(
        options: Options, tensors: tuple[Any, ...], constants: Constants, grad_output: Tensor | None
    ) -> Tensor:
        return ops.distillation_loss_(*tensors, *constants, grad_output, *ops.numbers(options))

    @staticmethod
    def keep(options: Options, gradients: Gradients, tensors: tuple[Any, ...], constants: Constants) -> Any:
        # Labels and weight, not asked of what is saved: hooks (save_on_cpu, checkpoint) make that dear to read.
        dim = options.dim
        return gradients[0], constants[0], constants[1], min(tensors[0].shape[dim], tensors[1].shape[dim])

    @staticmethod
    def scaled(options: Options, kept: Any, grad_output: Tensor, is_ours: bool) -> Gradients:
        gradient, labels, weight, vocab_size = kept
        how = (grad_output.contiguous(), labels, weight, options.ignore_index, vocab_size, options.dim)
        if not is_ours:
            return ops.scaled_gradient(gradient, *how), None
        ops.scale_gradient_(gradient, *how)
        return gradient, None

    @classmethod
    def by_kernel(
        cls,
        options: Options,
        tensors: tuple[Any, ...],
        constants: Constants,
        grad_output: Tensor | None,
        needed: Sequence[bool],
    ) -> Gradients:
        """A trainable teacher's gradient is the student's of the mirrored divergence: student and teacher with their
        roles exchanged, and no hard labels."""
        student, teacher, *others = tensors
        of_student = of_teacher = None
        if needed[0]:
            of_student = cls.call(options, tensors, constants, grad_output, True)[1]
        if needed[1]:
            exchanged = options.exchanged()
            if exchanged is not None:
                of_teacher = cls.call(exchanged, (teacher, student, *others), constants, grad_output, True)[1]
            else:
                assert grad_output is not None
                alone = (False, True, *(False for _ in others))
                of_teacher = autograd.by_reference(cls, options, tensors, constants, grad_output, alone)[1]
        return of_student, of_teacher, *(None for _ in others)

    @staticmethod
    def reference(options: Options, tensors: tuple[Any, ...], constants: Constants) -> Tensor:
        # Sizes have been compared, and truncate=True is right for equal ones too.
        student, teacher = tensors
        return reference.with_options(student, teacher, *constants, options, check_values=False)


autograd.register(ops.distillation_loss, LogitsLoss, ops.MODELS)


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
    group: ProcessGroup | None = None,
) -> Tensor:
    """Distillation loss of student logits against teacher logits, and its gradient, in one fused pass.

    Equivalent PyTorch, for the default divergence, one temperature T, labels, no weights::

        x = F.log_softmax(student_logits.float() / T, dim)
        y = F.log_softmax(teacher_logits.float() / T, dim)
        soft = T * T * (y.exp() * (y - x)).sum(dim)
        hard = F.cross_entropy(student_logits, labels, reduction="none", label_smoothing=label_smoothing)
        loss = (soft_weight * soft + hard_weight * hard)[labels != ignore_index].mean()

    Args:
        student_logits: [..., V], float32, bfloat16, float16 or float64, any strides.
        teacher_logits: the same shape; its dtype may differ. Gets a gradient too if it requires one.
        labels: integers, not uint64; the leading shape. A row whose label is `ignore_index` is ignored: no loss,
            no gradient, never read. Needed if `hard_weight` > 0, and for "dkd".
        divergence: measured between the teacher's probabilities p and the student's q, y and x their logarithms:

            ====================  ===========================================================  =============
            "forward_kl"          Σ p (y − x)
            "reverse_kl"          Σ q (x − y)
            "symmetric_kl"        (1−β)·forward_kl + β·reverse_kl                              0 ≤ β ≤ 1, ½
            "jsd"                 β Σ p (y − log m) + (1−β) Σ q (x − log m), m=βp+(1−β)q      0 < β < 1, ½
            "scaled_jsd"          jsd / (β(1−β)); at β = 0 and 1 its limits, the two KLs       0 ≤ β ≤ 1, ½
            "skew_kl"             Σ p (y − log(β p + (1−β) q))                                 0 ≤ β < 1, 0.1
            "skew_reverse_kl"     Σ q (x − log(β q + (1−β) p))                                 0 ≤ β < 1, 0.1
            "tvd"                 ½ Σ |p − q|
            "hellinger"           1 − Σ sqrt(p q)
            "soft_cross_entropy"  −Σ p x
            "mse"                 mean over the classes of (s/T_s − t/T_t)²: logit matching
            "dkd"                 KL, label against rest, + β · KL among the rest; by labels   β ≥ 0, 8
            ====================  ===========================================================  =============
        beta: β, of the divergences that have one; None is the default in the table. Not between 0 and 1e-30.
        temperature: T, or a pair (student's, teacher's).
        temperature_scaling: "t2" multiplies the soft loss, value and gradient, by T_s·T_t, so that its gradient keeps
            its size when the temperature changes (Hinton et al. 2015); "none" does not.
        soft_weight, hard_weight: weights of the divergence and of the cross entropy, which is taken at temperature 1.
        label_smoothing: in [0, 1], of the cross entropy; spread over the classes that are not masked by −inf.
        weight: float ≥ 0, one a row; a row of weight 0 is ignored.
        ignore_index: the label of ignored rows.
        reduction: "mean" (Σ w ℓ / Σ w over the rows that count; 0 if there are none), "sum" or "none".
        denominator: Σ w ℓ / denominator instead, for a count that is known only globally (gradient accumulation, data
            parallelism). A number or a 0-d tensor.
        vocab: "error" if the numbers of classes differ, or "truncate" to compare the classes both have.
        dim: the class dimension.
        inplace: write the gradient over the student's logits, so that nothing of their size is allocated. The logits
            are gone afterwards: whoever reads them later (an argmax for a metric, a second loss) reads gradients, which
            nothing can catch. They must not be a leaf, and allow one backward pass. In a compiled or exported program
            it has no effect: there the compiler plans the memory.
        group: processes that each hold a range of the classes of both logits, in the order of their ranks and of any
            size. Labels are numbers of all classes; rows, labels and weights are the same in every process. Each gets
            the same loss, and the gradient of its own classes (neither summed nor averaged over the processes), as one
            process with all classes would; O(rows) numbers are communicated. Logits that are DTensors sharded over
            their classes need no group.

    Returns:
        A scalar, or the leading shape with reduction="none"; float32, or float64 if either input is.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it, what came and what is wanted. (In a
            compiled program, labels and weights out of range are a RuntimeError with the same words.)

    Equal logits at equal temperatures give exactly 0, value and gradient (soft_cross_entropy aside). Classes at −inf in
    both rows count for nothing. Where only the teacher is at −inf, reverse_kl is +inf and its gradient taken as 0;
    where only the student is, forward_kl is +inf and its gradient finite. A row with a NaN or +inf, or nothing but
    −inf, gets a NaN loss and gradient and leaves the other rows alone.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015. Agarwal et al.: On-Policy Distillation of
    Language Models, 2023 (generalised JSD). Ko et al.: DistiLLM, 2024 (skewed KL). Wen et al.: f-Divergence
    Minimization for Sequence-Level Knowledge Distillation, 2023 (tvd). Zhao et al.: Decoupled Knowledge Distillation,
    2022 (dkd).
    """
    options = make_options(
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
    if group is not None or distributed.is_dtensor(student_logits) or distributed.is_dtensor(teacher_logits):
        student_logits, teacher_logits, (labels, weight, denominator), group = distributed.own_classes(
            (student_logits, teacher_logits), (labels, weight, denominator), dim, group
        )
    check_tensors(student_logits, teacher_logits, labels, weight, denominator, options, sharded=group is not None)
    if options.student_temperature > LARGE_TEMPERATURE or options.teacher_temperature > LARGE_TEMPERATURE:
        warn_of_temperature(options, student_logits, teacher_logits)
    if options.inplace and not torch.compiler.is_compiling() and student_logits.is_neg():
        options = options._replace(inplace=False)  # the memory holds the numbers with the other sign
    if group is None and student_logits.shape[dim] == 1 and not torch.compiler.is_compiling():
        _warn_of_one_class()
    if group is not None:
        if inplace:
            check_inplace(student_logits, teacher_logits)
        by_reference = needs_reference(student_logits.device)
        given = (student_logits, teacher_logits, labels, weight, denominator)
        return distributed.vocabulary_parallel_loss(*given, options, group, by_reference)
    if needs_reference(student_logits.device):
        return reference.with_options(student_logits, teacher_logits, labels, weight, denominator, options)
    if inplace:
        check_inplace(student_logits, teacher_logits)
        if (
            not torch.compiler.is_compiling() and student_logits.is_neg()
        ):  # whose memory holds the numbers with the other sign
            options = options._replace(inplace=False)
    constants, options = for_operators(labels, weight, denominator, options, student_logits.device)
    return apply(LogitsLoss, (student_logits, teacher_logits), constants, options)


def for_operators(
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    device: torch.device,
) -> tuple[Constants, Options]:
    """The constants in the dtypes that the operators take; a denominator that is a number becomes the scale."""
    divisor, options = divisor_for_operators(denominator, options, device)
    if labels is not None and (labels.dtype != torch.int64 or not labels.is_contiguous()):
        labels = labels.to(torch.int64).contiguous()
    if weight is not None:
        weight = weight.detach().to(torch.float64).contiguous()
    return (labels, weight, divisor), options


def divisor_for_operators(
    denominator: float | Tensor | None, options: Options, device: torch.device
) -> tuple[Tensor | None, Options]:
    """A denominator that is a tensor in the operators' dtype; one that is a number becomes the scale."""
    divisor = None
    if denominator is not None:
        if isinstance(denominator, Tensor):
            divisor = denominator.detach()
            if divisor.device.type == "cpu" and device.type != "cpu":
                # A copy from the host would wait for the device; a number is part of the launch.
                divisor = torch.full((), float(divisor), dtype=torch.float64, device=device)
            divisor = divisor.to(device, torch.float64)
            options = options._replace(reduction=_SUM)
        else:
            options = options._replace(reduction=_SUM, scale=1.0 / float(denominator))
    return divisor, options


def apply(loss: type[LogitsLoss], tensors: tuple[Any, ...], constants: Constants, options: Options) -> Tensor:
    """The operator, differentiably: by the fast path in an eager program, as an operator in a traced one."""
    student, teacher = tensors[:2]
    needs_student = needs_teacher = False
    if torch.is_grad_enabled():
        needs_student, needs_teacher = student.requires_grad, teacher.requires_grad
    try:
        if needs_student or needs_teacher:
            if not compat.is_traced(student):
                function = autograd.FusedInPlace if options.inplace else autograd.Fused
                fused: Tensor = function.apply(loss, options, *constants, *tensors)  # type: ignore[no-untyped-call]
                return fused
            if not torch.compiler.is_compiling():  # make_fx: the operator's own autograd saves them
                tensors, constants = autograd.savable(tensors), autograd.savable(constants)
        # A traced program gains nothing by working in place: the compiler plans the memory.
        now = needs_student and student.dtype != torch.float16
        return loss.call(options, tensors, constants, None, now)[0]
    except RuntimeError as error:
        raise_better(error, student.device)
        raise


def _warn_of_one_class() -> None:
    global _warned_of_one_class
    if _warned_of_one_class:
        return
    _warned_of_one_class = True
    warnings.warn(
        "student_logits has one class, whose softmax is always 1: the loss is 0 and trains nothing; of one logit a "
        "sample, or a label, binary_distillation_loss is meant",
        stacklevel=3,
    )


def needs_reference(device: torch.device, function: str = "distillation_loss") -> bool:
    """Whether plain PyTorch computes the loss; a warning, once, if that is because there are no kernels."""
    if not has_kernels(device):
        warn_once(device, function)
        return True
    # The transforms of torch.func, and forward-mode derivatives, see through plain PyTorch only.
    return compat.in_torch_func() or compat.in_forward_mode()


def has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    if ops.cuda_missing is not None or torch.compiler.is_compiling():  # which cannot look at a device
        return ops.cuda_missing is None
    return ops.cuda_problem(device.index) is None


def warn_once(device: torch.device, function: str = "distillation_loss") -> None:
    if has_kernels(device) or device in _warned_devices:
        return
    _warned_devices.add(device)
    if device.type == "cuda":
        why = ops.cuda_missing or ops.cuda_problem(device.index)
    else:
        why = f"reptile_ext has no kernels for device type {device.type!r}"
    warnings.warn(
        f"{why}; {function} runs in plain PyTorch there (right, but slower and with more memory)",
        stacklevel=4,
    )
