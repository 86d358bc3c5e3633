"""Checkpoints that survive a kill at any moment, and a log of metrics that can be cut back to one.

A checkpoint is a folder `checkpoints/<step>` that is written under another name, flushed to disk and then renamed,
which the operating system does at once or not at all. Older ones are deleted after that, so that at every moment the
newest whole one is on disk. Weights are safetensors and the rest is read with `weights_only=True`: opening a
checkpoint executes no code.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from ..files import TEMPORARY, flush


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    steps = [path for path in (folder / "checkpoints").glob("[0-9]*") if path.is_dir()]
    return max(steps, key=lambda path: int(path.name), default=None)


def save_checkpoint(
    folder: Path, step: int, student: nn.Module, best: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write `checkpoints/<step>`: student.safetensors, best.safetensors (if any) and state.pt. Then drop older ones."""
    parent = folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"{step:09d}"
    temporary = parent / f"{TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    temporary.mkdir()
    save_model(student, str(temporary / "student.safetensors"))
    if best:
        save_file(best, temporary / "best.safetensors")
    torch.save(state, temporary / "state.pt")
    for file in temporary.iterdir():
        flush(file)
    flush(temporary)
    os.rename(temporary, final)
    flush(parent)
    for other in parent.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def load_checkpoint(checkpoint: Path, student: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fill the student; return the state and the best student's tensors (empty if none were kept)."""
    load_model(student, checkpoint / "student.safetensors")
    best = checkpoint / "best.safetensors"
    state: dict[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    return state, load_file(best) if best.exists() else {}


class Log:
    """A file of JSON lines. `position` goes into the checkpoint; what a killed run wrote after it is cut off."""

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self._path = path
        if path is not None:
            path.touch()
            os.truncate(path, min(position, path.stat().st_size))

    def write(self, **values: Any) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    @property
    def position(self) -> int:
        """Bytes written; they are on disk when this returns."""
        if self._path is None:
            return 0
        flush(self._path)
        return self._path.stat().st_size


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
