"""A student for other programs: as an ONNX file or a program of torch.export, compared with the student itself.

Needs the extra `export` for ONNX.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import write_atomically

FORMATS = ("onnx", "torch-export")


class _Logits(nn.Module):
    """The logits alone, by names of the inputs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        found = self.model(**dict(zip(self.names, tensors, strict=True)))
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits


def export_model(model: nn.Module, inputs: Mapping[str, Tensor], path: Path, to: str = "onnx") -> dict[str, Any]:
    """Write the model, from `inputs` to logits, to a file; batch and length may be any afterwards.

    model    returns logits, or an object with .logits. inputs: an example of each, [batch, length], batch and length at
             least 2. to: "onnx" or "torch-export".

    The file is loaded again and compared with the model on the example and on another batch and length, before it is
    put in its place. Returns {"path", "to", "bytes", "inputs", "largest_difference"}. Raises ValueError for a model
    that cannot be exported, or whose file says something else."""
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}; got {to!r}")
    if to == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    inputs = {name: x.contiguous() for name, x in inputs.items()}
    names = list(inputs)
    was_training = model.training
    wrapped = _Logits(model, names).eval()
    differences: list[float] = []

    def write(temporary: Path) -> None:
        _write(wrapped, tuple(inputs.values()), names, temporary, to)
        for example in (inputs, {name: _other_size(x) for name, x in inputs.items()}):
            with torch.no_grad():
                wanted = wrapped(*example.values()).float()
            found = _run(temporary, to, names, tuple(example.values())).float()
            if found.shape != wanted.shape:
                raise ValueError(f"the exported model returns {list(found.shape)}, the student {list(wanted.shape)}")
            differences.append(float((found - wanted).abs().max()))
            if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(wanted.abs().max()))):
                raise ValueError(
                    f"the exported model's logits differ from the student's by {differences[-1]:.3g} (of "
                    f"{float(wanted.abs().max()):.3g}), on inputs of {list(next(iter(example.values())).shape)}"
                )

    try:
        write_atomically(path, write)
    finally:
        model.train(was_training)
    return {
        "path": str(path),
        "to": to,
        "bytes": path.stat().st_size,
        "inputs": names,
        "largest_difference": max(differences),
    }


def _write(model: nn.Module, example: tuple[Tensor, ...], names: list[str], path: Path, to: str) -> None:
    recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
    if recurrent and to == "torch-export":
        raise ValueError("torch-export writes recurrent layers out for one length alone: export such a student to onnx")
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch, 1: torch.export.Dim.AUTO} for _ in example)
    try:
        with _without_warnings(), torch.no_grad():
            if recurrent:  # likewise; the older exporter has an operator for them
                axes = {name: {0: "batch", 1: "length"} for name in names}
                torch.onnx.export(
                    model, example, path, input_names=names, output_names=["logits"], dynamic_axes=axes, dynamo=False
                )
                return
            program = torch.export.export(model, example, dynamic_shapes=(shapes,), strict=False)
            if to == "torch-export":
                with path.open("wb") as file:
                    torch.export.save(program, file)
                return
            onnx = torch.onnx.export(
                program, example, input_names=names, output_names=["logits"], dynamo=True, verbose=False
            )
            assert onnx is not None
            onnx.save(path, external_data=False)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ValueError(
            f"{type(getattr(model, 'model', model)).__name__} cannot be exported as {to}: {type(error).__name__}: "
            f"{said[0] if said else ''}"
        ) from error


def _run(path: Path, to: str, names: list[str], tensors: tuple[Tensor, ...]) -> Tensor:
    with _without_warnings():
        if to == "torch-export":
            with path.open("rb") as file:
                found: Tensor = torch.export.load(file).module()(*tensors)
            return found.detach()
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        given = {one.name: x.numpy() for one, x in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])


def _other_size(x: Tensor) -> Tensor:
    """Three times the batch, and one position more than twice the length."""
    length = x.repeat(3, 2)
    return torch.cat([length, length[:, :1]], 1)


def _require(*packages: str) -> None:
    from importlib import util

    for package in packages:
        if util.find_spec(package) is None:
            raise ImportError(
                f"ONNX needs the extra 'export': pip install 'reptile_ext[export]' (no module {package!r})"
            )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """The exporters warn of their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
