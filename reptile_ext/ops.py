"""Loads the compiled operators and tells PyTorch about them: fake implementations and autograd formulas.

`torch.ops.reptile_ext.distillation_loss` computes the loss and its gradient in one go. It is what torch.compile and
torch.export see. Eager programs reach the same kernel through `functional._FusedLoss`, which hands the gradient's
memory on to autograd instead of copying it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference
from .arguments import REDUCTIONS, Options

TORCH_MINIMUM = (2, 10)


def _load() -> ctypes.CDLL:
    """Load the operator library, or say in one sentence why it could not be and what to do."""
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < TORCH_MINIMUM:
        raise ImportError(
            f"reptile_ext needs torch >= {'.'.join(map(str, TORCH_MINIMUM))} and torch {torch.__version__} is "
            "installed: run `pip install --upgrade torch`."
        )
    import reptile_ext

    # Two folders in an editable install: the sources' and the compiled files'.
    for folder in reptile_ext.__path__:
        library = Path(folder) / "_ops.so"
        if not library.exists():
            continue
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            return ctypes.CDLL(str(library))
        except (OSError, RuntimeError) as error:
            raise ImportError(
                f"reptile_ext's compiled operators do not fit this machine or torch {torch.__version__} ({error}): "
                "build them anew, in a clone of the project with `pip install --force-reinstall --no-deps .`"
            ) from error
    raise ImportError(
        "reptile_ext's compiled operators are missing: this looks like a source tree that was not built; "
        "run `pip install .` in it, or leave its folder if the package is installed elsewhere."
    )


def _load_cuda() -> ctypes.CDLL | str:
    """Load the CUDA operators where torch has CUDA, or say why CUDA tensors go without kernels."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    import reptile_ext

    for folder in reptile_ext.__path__:
        library = Path(folder) / "_cuda.so"
        if library.exists():
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
                return ctypes.CDLL(str(library))
            except (OSError, RuntimeError) as error:
                return f"reptile_ext's CUDA kernels do not fit this machine or torch {torch.__version__} ({error})"
    return (
        "reptile_ext was built where there was no CUDA compiler: put nvcc on the PATH (docs/cuda.md has a way without "
        "the CUDA toolkit), and in a clone of the project `pip install --force-reinstall --no-deps .`"
    )


_library = _load()
_cuda = _load_cuda()
# Why no CUDA tensor has kernels; None: the library is loaded.
cuda_missing: str | None = _cuda if isinstance(_cuda, str) else None
if not isinstance(_cuda, str):
    _cuda.reptile_ext_cuda_problem.restype = ctypes.c_char_p
    _cuda.reptile_ext_cuda_problem.argtypes = [ctypes.c_int]


@functools.cache
def cuda_problem(device: int) -> str | None:
    """Why tensors on a CUDA device go without kernels: no library, or the device or its driver is too old for it."""
    if isinstance(_cuda, str):
        return _cuda
    with torch.cuda.device(device):
        problem = _cuda.reptile_ext_cuda_problem(device)
    return None if problem is None else f"reptile_ext's CUDA kernels do not run on cuda:{device} ({problem.decode()})"


_library.reptile_ext_instruction_set.restype = ctypes.c_char_p
_library.reptile_ext_instruction_set.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]


def instruction_set(name: str | None = None) -> str:
    """The CPU instruction set the kernels use: "portable", "avx2", "avx512" or "avx512_bf16".

    With a name, use that one from now on, in all threads. The environment variable REPTILE_EXT_CPU does the same at
    the start of a program.

    Raises:
        ValueError: the name, or the environment variable, is not a set that this processor can run.
    """
    error = ctypes.create_string_buffer(400)
    result = _library.reptile_ext_instruction_set(None if name is None else name.encode(), error, len(error))
    if result is None:
        raise ValueError(error.value.decode())
    return str(result.decode())


distillation_loss: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reptile_ext.distillation_loss.default
distillation_loss_: Callable[..., Tensor] = torch.ops.reptile_ext.distillation_loss_.default
scale_gradient_: Callable[..., None] = torch.ops.reptile_ext.scale_gradient_.default


def _fake_loss(student: Tensor, teacher: Tensor, reduction: int, dim: int) -> Tensor:
    double = torch.float64 in (student.dtype, teacher.dtype)
    shape = [n for d, n in enumerate(student.shape) if d != dim % student.dim()]
    return student.new_empty(
        shape if REDUCTIONS[reduction] == "none" else [], dtype=torch.float64 if double else torch.float32
    )


@torch.library.register_fake("reptile_ext::distillation_loss")  # type: ignore[untyped-decorator]
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor | None,
    grad_output: Tensor | None,
    divergence: int,
    beta: float,
    one_minus_beta: float,
    student_temperature: float,
    teacher_temperature: float,
    soft_scale: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    scale: float,
    dim: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student) if needs_gradient else student.new_empty([0])
    return _fake_loss(student, teacher, reduction, dim), gradient


@torch.library.register_fake("reptile_ext::distillation_loss_")  # type: ignore[untyped-decorator]
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor | None,
    grad_output: Tensor | None,
    divergence: int,
    beta: float,
    one_minus_beta: float,
    student_temperature: float,
    teacher_temperature: float,
    soft_scale: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    scale: float,
    dim: int,
) -> Tensor:
    return _fake_loss(student, teacher, reduction, dim)


@torch.library.register_fake("reptile_ext::scale_gradient_")  # type: ignore[untyped-decorator]
def _(
    gradient: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    vocab_size: int,
    dim: int,
) -> None:
    return None


def gradients_by_autograd(
    loss_of: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of loss_of(*inputs), which is plain PyTorch: for derivatives of derivatives and batches of gradients,
    which the kernel does not compute. Differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not create_graph:
            inputs = [
                x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)
            ]
        loss = loss_of(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        if not loss.requires_grad:  # a teacher alone, at soft_weight=0
            loss = loss + 0 * wanted[0].sum()
        found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=create_graph, materialize_grads=True))
    return [next(found) if need else None for need in needed]


def reference_gradients(
    inputs: tuple[Tensor, Tensor],
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: Options,
    scale: float,
    grad_output: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for student and teacher by plain PyTorch."""

    def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
        # The operator has looked at the values of labels and weights.
        return reference.with_options(student, teacher, *rows, options, check_values=False) * scale

    of_student, of_teacher = gradients_by_autograd(loss_of, inputs, grad_output, needed)
    return of_student, of_teacher


def kernel_gradients(
    inputs: tuple[Tensor, Tensor],
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: Options,
    scale: float,
    grad_output: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The same, once, by the kernel. The teacher's is the student's of the mirrored divergence: student and teacher
    with their roles exchanged, and no hard labels."""
    student, teacher = inputs
    grad_output = grad_output.to(torch.float64).contiguous()
    numbers = options.operator_arguments(scale, options.dim)
    of_student = distillation_loss(student, teacher, *rows, grad_output, *numbers, True)[1] if needed[0] else None
    if not needed[1]:
        return of_student, None
    exchanged = options.exchanged().operator_arguments(scale, options.dim)
    return of_student, distillation_loss(teacher, student, *rows, grad_output, *exchanged, True)[1]


def scale_gradient(
    gradient: Tensor,
    grad_output: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    ignore_index: int,
    vocab_size: int,
    dim: int,
) -> Tensor:
    """d loss / d student times what comes from above, where the gradient lies. `rows` are labels and weight: what is
    out, rows and classes, stays 0 whatever comes from above. `dim` is not negative."""
    # torch.autograd.grad(..., is_grads_batched=True): only plain PyTorch knows what to do with such a tensor.
    if not torch._C._functorch.is_legacy_batchedtensor(grad_output):
        scale_gradient_(gradient, grad_output.contiguous(), *rows, ignore_index, vocab_size, dim)
        return gradient
    labels, weight = rows
    if labels is not None:
        grad_output = torch.where(labels == ignore_index, 0.0, grad_output)
    if weight is not None:
        grad_output = torch.where(weight == 0, 0.0, grad_output)
    factor = grad_output if grad_output.dim() == 0 else grad_output.unsqueeze(dim)
    scaled = (gradient * factor).to(gradient.dtype)
    if vocab_size < gradient.shape[dim]:
        class_index = torch.arange(gradient.shape[dim], device=gradient.device)
        class_index = class_index.view(-1, *[1] * (gradient.dim() - 1 - dim))
        scaled = torch.where(class_index < vocab_size, scaled, torch.zeros_like(gradient))
    return scaled


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, labels, weight, denominator, grad_output, *numbers, needs_gradient = inputs
    ctx.numbers = (*numbers, needs_gradient and grad_output is None)
    ctx.save_for_backward(student, teacher, labels, weight, denominator, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, labels, weight, denominator, gradient = ctx.saved_tensors
    *numbers, scale, dim, has_gradient = ctx.numbers
    needed = tuple(ctx.needs_input_grad[:2])
    if has_gradient and needed == (True, False) and not torch.is_grad_enabled():
        positive = dim % student.dim()
        vocab_size = min(student.shape[positive], teacher.shape[positive])
        ignore_index = numbers[Options._fields.index("ignore_index")]
        # A copy: the operator's gradient is one of its outputs, and may be asked for again.
        scaled = scale_gradient(gradient.clone(), grad_loss, (labels, weight), ignore_index, vocab_size, positive)
        return (scaled, *[None] * 18)
    # truncate=True is right for equal sizes too; inplace=False, whatever was asked: the inputs are here.
    options = Options._make((*numbers, True, dim, False))
    gradients = reference_gradients if torch.is_grad_enabled() else kernel_gradients
    found = gradients((student, teacher), (labels, weight, denominator), options, scale, grad_loss, needed)
    return (*found, *[None] * 17)


torch.library.register_autograd("reptile_ext::distillation_loss", _backward, setup_context=_setup_context)
