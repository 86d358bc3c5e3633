"""Loads the compiled operators, reads from their schema what they take, and tells PyTorch about their results.

`distillation_loss` computes the loss and its gradient in one go, `distillation_loss_` the same with the gradient over
the student's logits; csrc/torch/operators.h has all of them. How they are differentiated is in autograd.py.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TORCH_MINIMUM = (2, 10)
REBUILD = "in a clone of the project `pip install --force-reinstall --no-deps .`"


def _find_compiled_files() -> str:
    """Let sources without compiled files, such as a clone's that is the working directory, use those of the installed
    package, if that is of the same version. Returns what to say of one that is not."""
    import reptile_ext

    if any((Path(folder) / "_ops.so").exists() for folder in reptile_ext.__path__):
        return ""
    from importlib import metadata

    others = set()
    for distribution in metadata.distributions(name="reptile_ext"):
        folder = Path(str(distribution.locate_file("reptile_ext")))
        if not (folder / "_ops.so").exists():
            continue
        if distribution.version == reptile_ext.__version__:
            reptile_ext.__path__.append(str(folder))
            return ""
        others.add(distribution.version)
    return f" (version {', '.join(others)}; this is {reptile_ext.__version__})" if others else ""


def _in_full(error: BaseException) -> str:
    """What an error says, and the one it was raised from: torch's own names the file alone."""
    return str(error) if error.__cause__ is None else f"{error}: {error.__cause__}"


def _load_library(path: Path) -> ctypes.CDLL:
    """Load operators. A file that was cut off is an OSError; the loader would end the process (SIGBUS)."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if header[:5] == b"\x7fELF\x02":  # 64 bits; its last part is the table of sections
        table, entry, count = struct.unpack_from("<Q10xHH", header.ljust(64, b"\0"), 40)
        if len(header) < 64 or table + entry * count > size:
            raise OSError(f"{path} is cut off after {size} bytes")
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    return ctypes.CDLL(str(path))


def _load() -> ctypes.CDLL:
    """Load the operator library, or say in one sentence why it could not be and what to do."""
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < TORCH_MINIMUM:
        raise ImportError(
            f"reptile_ext needs torch >= {'.'.join(map(str, TORCH_MINIMUM))} and torch {torch.__version__} is "
            "installed: run `pip install --upgrade torch`."
        )
    import reptile_ext

    of_other_versions = _find_compiled_files()
    # Two folders in an editable install, and where the sources lie before an installed package: the sources' and the
    # compiled files'.
    for folder in reptile_ext.__path__:
        library = Path(folder) / "_ops.so"
        if not library.exists():
            continue
        try:
            return _load_library(library)
        except (OSError, RuntimeError) as error:
            raise ImportError(
                f"reptile_ext's compiled operators do not fit this machine or torch {torch.__version__} "
                f"({_in_full(error)}): build them anew, {REBUILD}"
            ) from error
    raise ImportError(
        "reptile_ext's compiled operators are missing: this looks like a source tree that was not built; "
        f"run `pip install .` in it, or leave its folder if the package is installed elsewhere{of_other_versions}."
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
                return _load_library(library)
            except (OSError, RuntimeError) as error:
                # What dlopen says of a file that is cut off, or never was a library; else it wants what is not there.
                said = _in_full(error)
                broken = any(words in said for words in ("cut off", "file too short", "invalid ELF header"))
                what = "are broken" if broken else f"do not fit this machine or torch {torch.__version__}"
                return f"reptile_ext's CUDA kernels {what} ({said}): {REBUILD}"
    return (
        "reptile_ext was built where there was no CUDA compiler: put nvcc on the PATH (docs/cuda.md has a way without "
        f"the CUDA toolkit), and {REBUILD}"
    )


_library = _load()
# After the library, whose absence `_load` explains, and the version, on which private parts of torch depend.
from . import _C, compat  # noqa: E402

# Names in the order of the operators' numbers: what there are kernels for, what becomes of the rows' losses.
KERNELS: tuple[str, ...] = _C.divergences()
REDUCTIONS: tuple[str, ...] = _C.reductions()
# What becomes of the classes that a sparse teacher does not list.
TAILS: tuple[str, ...] = _C.tails()
# How many numbers a row has in each part of its stats: maxima, sums, mixture sums.
ROW_STATS_SIZES = tuple(_C.row_stats_sizes())

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


def cuda_state() -> tuple[str, bool]:
    """For `reptile doctor`: the state of the CUDA kernels, with the command that mends it; and whether that is wrong,
    because the machine has a GPU whose tensors would go without kernels, or a file is broken."""
    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is None:
        if not has_gpu:
            return f"torch {torch.__version__} is built without CUDA, and there is no NVIDIA GPU here", False
        return (
            f"there is an NVIDIA driver here, and torch {torch.__version__} is built without CUDA: install one for it "
            "(https://pytorch.org/get-started/locally), `pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu130`",
            True,
        )
    if isinstance(_cuda, str):
        # By default torch is for CUDA on Linux, also where there is no GPU: nothing is missing there.
        return _cuda, has_gpu or "are broken" in _cuda
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # no driver, one too old for this torch, or a GPU that does not answer
        said = str(error).split(". ")[0]
        if not has_gpu:
            return f"loaded, and unused: {said}", False
        newest = ".".join(torch.version.cuda.split(".")[:2])
        return (
            f"torch cannot use the GPU ({said}): update the driver to one for CUDA {newest} "
            "(https://www.nvidia.com/drivers), or install a torch for the CUDA that `nvidia-smi` names",
            True,
        )
    for device in range(torch.cuda.device_count()):
        if problem := cuda_problem(device):
            major, minor = torch.cuda.get_device_capability(device)
            cure = f"build them on this machine, {REBUILD}"
            if "no kernel image" in problem:
                cure = f"it is sm_{major}{minor}; the kernels are for sm_80 and later"
            elif "driver" in problem:
                cure = "update the driver (https://www.nvidia.com/drivers), or build with the CUDA `nvidia-smi` names"
            return f"{problem}: {cure}", True
    return f"loaded, {torch.cuda.device_count()} GPU" + "s" * (torch.cuda.device_count() != 1), False


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


_library.reptile_ext_kept_memory.restype = ctypes.c_size_t
_library.reptile_ext_release_memory.restype = None


def kept_memory() -> int:
    """Bytes of memory that were gradients on the CPU, nobody's now, and are kept for the next ones."""
    return int(_library.reptile_ext_kept_memory())


def release_memory() -> None:
    """Give them back to the system."""
    _library.reptile_ext_release_memory()


distillation_loss: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reptile_ext.distillation_loss.default
distillation_loss_: Callable[..., Tensor] = torch.ops.reptile_ext.distillation_loss_.default
row_stats: Callable[..., Tensor] = torch.ops.reptile_ext.row_stats.default
row_gradient: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reptile_ext.row_gradient.default
row_gradient_: Callable[..., Tensor] = torch.ops.reptile_ext.row_gradient_.default
scale_gradient_: Callable[..., None] = torch.ops.reptile_ext.scale_gradient_.default

binary_distillation_loss: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reptile_ext.binary_distillation_loss.default
binary_distillation_loss_: Callable[..., Tensor] = torch.ops.reptile_ext.binary_distillation_loss_.default
scale_elements_: Callable[..., None] = torch.ops.reptile_ext.scale_elements_.default

sparse_distillation_loss: Callable[..., tuple[Tensor, Tensor]] = torch.ops.reptile_ext.sparse_distillation_loss.default
sparse_distillation_loss_: Callable[..., Tensor] = torch.ops.reptile_ext.sparse_distillation_loss_.default

# THE ARGUMENTS of the operators are listed in csrc/torch/arguments.h and nowhere else. All operators but
# scale_gradient_ and scale_elements_ have these: two models' logits, constants of the loss that are tensors, what the
# gradient is multiplied by, and numbers.
DECLARATIONS = compat.argument_declarations(distillation_loss_)  # "Tensor? labels", ...
NAMES = tuple(declaration.split()[-1] for declaration in DECLARATIONS)
MODELS, CONSTANTS = ("student", "teacher"), ("labels", "weight", "denominator")
NUMBERS = NAMES[6:]
if NAMES[:6] != (*MODELS, *CONSTANTS, "grad_output"):
    raise ImportError(
        "reptile_ext's Python files and its compiled operators are of different versions: install it anew"
    )

_numbers: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*NUMBERS)


def numbers(options: Any) -> tuple[Any, ...]:
    """Of a call with some `Options`: operator(*logits, *constants, grad_output, *numbers(options), ...)."""
    if torch.compiler.is_compiling():  # the compiler knows no attrgetter
        return tuple([getattr(options, name) for name in NUMBERS])
    return _numbers(options)


def names_of(of: Any) -> tuple[str, ...]:
    """The names of all arguments of an operator."""
    return tuple(declaration.split()[-1] for declaration in compat.argument_declarations(of))


def _fake_loss(given: dict[str, Any]) -> Tensor:
    student: Tensor = given["student"]
    double = torch.float64 in (student.dtype, given["teacher"].dtype)
    shape = [n for d, n in enumerate(student.shape) if d != given["dim"] % student.dim()]
    return student.new_empty(
        shape if REDUCTIONS[given["reduction"]] == "none" else [], dtype=torch.float64 if double else torch.float32
    )


def _fake_binary_loss(given: dict[str, Any]) -> Tensor:
    student: Tensor = given["student"]
    double = torch.float64 in (student.dtype, given["teacher"].dtype)
    shape = student.shape if REDUCTIONS[given["reduction"]] == "none" else []
    return student.new_empty(shape, dtype=torch.float64 if double else torch.float32)


def _fake_binary_loss_and_gradient(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    student: Tensor = given["student"]
    gradient = torch.empty_like(student) if given["needs_gradient"] else student.new_empty([0])
    return _fake_binary_loss(given), gradient


def _fake_loss_and_gradient(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    student: Tensor = given["student"]
    gradient = torch.empty_like(student) if given["needs_gradient"] else student.new_empty([0])
    return _fake_loss(given), gradient


def _fake_row_stats(given: dict[str, Any]) -> Tensor:
    student: Tensor = given["student"]
    rows = math.prod(n for d, n in enumerate(student.shape) if d != given["dim"] % student.dim())
    part = (given["maxima"] is not None) + (given["sums"] is not None)
    return student.new_empty((rows, ROW_STATS_SIZES[part]), dtype=torch.float64)


def _register_fake(name: str, result: Callable[[dict[str, Any]], Any]) -> None:
    """What an operator returns, by its arguments' names, on tensors that have no values."""
    names = names_of(getattr(torch.ops.reptile_ext, name).default)
    torch.library.register_fake(
        f"reptile_ext::{name}", lambda *arguments: result(dict(zip(names, arguments, strict=True)))
    )


_register_fake("distillation_loss", _fake_loss_and_gradient)
_register_fake("distillation_loss_", _fake_loss)
_register_fake("row_stats", _fake_row_stats)
_register_fake("row_gradient", _fake_loss_and_gradient)
_register_fake("row_gradient_", _fake_loss)
_register_fake("scale_gradient_", lambda given: None)
_register_fake("binary_distillation_loss", _fake_binary_loss_and_gradient)
_register_fake("binary_distillation_loss_", _fake_binary_loss)
_register_fake("scale_elements_", lambda given: None)
_register_fake("sparse_distillation_loss", _fake_loss_and_gradient)
_register_fake("sparse_distillation_loss_", _fake_loss)


def _out_of_place(name: str, arguments: str, in_place: Callable[..., None]) -> Any:
    """An operator that returns what `in_place` makes of a copy of its first argument.

    For programs that are traced for sizes that may change: inductor cannot replace an operator that writes over its
    argument there, and fails with an assertion that says nothing (torch 2.13).
    """

    def run(gradient: Tensor, *rest: Any) -> Tensor:
        copy = gradient.clone()
        in_place(copy, *rest)
        return copy

    schema = f"(Tensor gradient, Tensor factor, Tensor? labels, Tensor? weight, {arguments}) -> Tensor"
    operator = torch.library.custom_op(f"reptile_ext::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(lambda gradient, *_: torch.empty_like(gradient))
    return operator


scaled_gradient = _out_of_place("scaled_gradient", "int ignore_index, SymInt vocab_size, int dim", scale_gradient_)
scaled_elements = _out_of_place("scaled_elements", "int ignore_index", scale_elements_)
