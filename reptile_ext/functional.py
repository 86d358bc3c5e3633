"""The fused losses as functions."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .arguments import REDUCTIONS, Options, check_tensors, make_options

__all__ = ["distillation_loss"]

_SUM = REDUCTIONS.index("sum")

_warned_devices: set[torch.device] = set()


class _FusedLoss(torch.autograd.Function):
    """Runs the operator and hands its gradient on to autograd.

    The gradient is kept on `ctx` rather than saved: the first backward gives it away, so that autograd may take it as
    it is (and a scale is applied where it lies) instead of copying N·V elements. A second backward through the same
    graph, which is rare, computes it anew.

    Of float16 logits it is computed in the backward pass: finished earlier, divided by the number of rows and not yet
    multiplied by what comes from above (a loss scaler's 65,536), it would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        denominator: Tensor | None,
        scale: float,
        options: Options,
        dim: int,
    ) -> Tensor:
        ctx.options = options
        ctx.scale = scale
        ctx.dim = dim
        ctx.vocab_size = min(student.shape[dim], teacher.shape[dim])
        # Not among the saved ones, which hooks (save_on_cpu, checkpoint) make dear to look at.
        ctx.rows = (labels, weight)
        ctx.gradient = None
        ctx.is_done = False
        ctx.set_materialize_grads(False)
        numbers = options.operator_arguments(scale, dim)
        now = ctx.needs_input_grad[0] and student.dtype != torch.float16
        if options.inplace and now:
            loss = ops.distillation_loss_(student, teacher, labels, weight, denominator, None, *numbers)
            torch.autograd.graph.increment_version(student)
            ctx.gradient = student.detach()  # shares the version counter
            ctx.version = student._version
            return loss
        # Below the operator's own autograd layer, which would do again, in Python, what this class does.
        with torch._C._AutoDispatchBelowAutograd():
            loss, gradient = ops.distillation_loss(student, teacher, labels, weight, denominator, None, *numbers, now)
        ctx.gradient = gradient if now else None
        # References, not copies. Autograd lets go of them as soon as this node has run, first of the backward pass.
        ctx.save_for_backward(student, teacher, labels, weight, denominator)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        options: Options = ctx.options
        gradient, ctx.gradient = ctx.gradient, None
        differentiable = torch.is_grad_enabled()
        if options.inplace:
            if ctx.is_done or differentiable:
                raise RuntimeError(
                    "distillation_loss(inplace=True) supports one backward pass and no double backward: "
                    "the logits were overwritten by their gradient; pass inplace=False"
                )
            ctx.is_done = True
            if gradient is None:
                student, *others = ctx.saved_tensors
                grad_output = grad_output.to(torch.float64).contiguous()
                ops.distillation_loss_(student, *others, grad_output, *options.operator_arguments(ctx.scale, ctx.dim))
                torch.autograd.graph.increment_version(student)
                return (student.detach(), *[None] * 7)
            if gradient._version != ctx.version:
                raise RuntimeError(
                    "the student_logits of distillation_loss(inplace=True) hold their gradient and were modified by an "
                    f"inplace operation before the backward pass (version {gradient._version}, expected {ctx.version})"
                )
            return (_scaled(ctx, gradient, grad_output), *[None] * 7)
        of_student: Tensor | None = None
        needs_student, needs_teacher = ctx.needs_input_grad[:2]
        if gradient is not None and not differentiable:
            of_student = _scaled(ctx, gradient, grad_output)
            needs_student = False
        if not (needs_student or needs_teacher):
            return (of_student, *[None] * 7)
        student, teacher, *rows = ctx.saved_tensors
        is_batched = torch._C._functorch.is_legacy_batchedtensor(grad_output)
        gradients = ops.reference_gradients if differentiable or is_batched else ops.kernel_gradients
        found = gradients(
            (student, teacher),
            tuple(rows),
            options._replace(dim=ctx.dim),
            ctx.scale,
            grad_output,
            (needs_student, needs_teacher),
        )
        return (found[0] if needs_student else of_student, found[1], *[None] * 6)


def _scaled(ctx: Any, gradient: Tensor, grad_output: Tensor) -> Tensor:
    return ops.scale_gradient(gradient, grad_output, ctx.rows, ctx.options.ignore_index, ctx.vocab_size, ctx.dim)


def raise_better(error: RuntimeError, device: torch.device) -> None:
    """The operators can raise RuntimeErrors only. To the caller, values that only they look at are ValueErrors, and
    memory that a smaller batch would not have needed is what training loops know it as."""
    message = str(error)
    if message.startswith(("labels ", "weight ", "denominator ", "inplace=")):
        raise ValueError(message) from None
    if message.startswith("not enough memory for the gradient") and device.type == "cuda":
        raise torch.OutOfMemoryError(f"CUDA out of memory: {message}") from None


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
        labels: integers, not uint64; the leading shape. A row whose label is `ignore_index` is out: no loss,
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
        weight: float ≥ 0, one a row; a row of weight 0 is out.
        ignore_index: the label of rows that are out.
        reduction: "mean" (Σ w ℓ / Σ w over the rows that are in; 0 if there are none), "sum" or "none".
        denominator: Σ w ℓ / denominator instead, for a count that is known only globally (gradient accumulation, data
            parallelism). A number or a 0-d tensor.
        vocab: "error" if the numbers of classes differ, or "truncate" to compare the classes both have.
        dim: the class dimension.
        inplace: write the gradient over the student's logits, so that nothing of their size is allocated. The logits
            are gone afterwards: whoever reads them later (an argmax for a metric, a second loss) reads gradients, which
            nothing can catch. They must not be a leaf, and allow one backward pass. In a compiled or exported program
            it has no effect: there the compiler plans the memory.

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
    dim = check_tensors(student_logits, teacher_logits, labels, weight, denominator, options)
    if (
        not has_kernels(student_logits.device)
        # The transforms of torch.func, and forward-mode derivatives, see through plain PyTorch only.
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        warn_once(student_logits.device)
        return reference.with_options(student_logits, teacher_logits, labels, weight, denominator, options)
    if options.inplace:
        _check_inplace(student_logits, teacher_logits)

    labels, weight, denominator, scale, options = for_operators(
        labels, weight, denominator, options, student_logits.device
    )
    return _apply(student_logits, teacher_logits, labels, weight, denominator, scale, options, dim)


def for_operators(
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, Options]:
    """The same in the dtypes that the operators take, and what a denominator that is a number makes of the scale."""
    scale, divisor = 1.0, None
    if denominator is not None:
        if isinstance(denominator, Tensor):
            divisor = denominator.detach()
            if divisor.device.type == "cpu" and device.type != "cpu":
                # A copy from the host would wait for the device; a number is part of the launch.
                divisor = torch.full((), float(divisor), dtype=torch.float64, device=device)
            divisor = divisor.to(device, torch.float64)
        else:
            scale = 1.0 / float(denominator)
        options = options._replace(reduction=_SUM)
    if labels is not None and (labels.dtype != torch.int64 or not labels.is_contiguous()):
        labels = labels.to(torch.int64).contiguous()
    if weight is not None:
        weight = weight.detach().to(torch.float64).contiguous()
    return labels, weight, divisor, scale, options


def _apply(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor | None,
    scale: float,
    options: Options,
    dim: int,
) -> Tensor:
    """The operator, differentiably: by the fast path in an eager program, as an operator in a traced one."""
    rows = (labels, weight, denominator)
    grad_enabled = torch.is_grad_enabled()
    needs_student = grad_enabled and student.requires_grad
    needs_grad = needs_student or (grad_enabled and teacher.requires_grad)
    try:
        if needs_grad and not torch.compiler.is_compiling():
            fused: Tensor = _FusedLoss.apply(student, teacher, *rows, scale, options, dim)  # type: ignore[no-untyped-call]
            return fused
        # A traced program gains nothing by working in place: the compiler plans the memory.
        numbers = options.operator_arguments(scale, dim)
        now = needs_student and student.dtype != torch.float16
        return ops.distillation_loss(student, teacher, *rows, None, *numbers, now)[0]
    except RuntimeError as error:
        raise_better(error, student.device)
        raise


def _check_inplace(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    if teacher_logits.requires_grad:
        raise ValueError(
            "inplace=True keeps nothing to compute the gradient of teacher_logits from, which requires grad: pass "
            "teacher_logits.detach(), or inplace=False"
        )
    if not student_logits.requires_grad:
        return
    base = student_logits._base
    if student_logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True overwrites student_logits, which is a leaf that requires grad, or a view of one: pass the "
            "output of a model, or inplace=False"
        )


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
        stacklevel=3,
    )
