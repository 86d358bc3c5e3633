"""Checkpoints that survive a kill at any moment and tell when they are damaged, and a log that can be cut back to one.

A checkpoint is a folder `checkpoints/<step>` that is written under another name, flushed to disk and then renamed,
which the operating system does at once or not at all. Older ones than the newest two are deleted after that. Its
`manifest.json` has the size and the sha256 of every other file, which are compared before anything is loaded.
Checkpoints of before it existed are loaded without. Weights are safetensors and the rest is read with
`weights_only=True`: opening a checkpoint executes no code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from ..files import TEMPORARY, flush, restated
from .weights import check_storable, has_checksum, load_weights, read_state, save_weights, write_state

FORMAT = 1
MANIFEST = "manifest.json"


@contextlib.contextmanager
def writing_to(folder: Path, student: nn.Module) -> Iterator[None]:
    """Be the only run that writes to `folder`, and know before the first step that it, and the student, can be written.

    The operating system drops the lock with the process, however it ends. Raises OSError, or RuntimeError for a second
    run.
    """
    check_storable(student)
    holder = folder / ".lock-holder"
    with contextlib.ExitStack() as stack:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock").acquire(timeout=0))
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            for left in folder.glob(f"{TEMPORARY}*"):  # by a kill
                left.unlink()
            probe = folder / "checkpoints" / f"{TEMPORARY}probe"
            try:
                probe.write_bytes(b"probe")
            finally:
                probe.unlink(missing_ok=True)
        except Timeout:
            who = holder.read_text(encoding="utf-8") if holder.exists() else "of unknown process"
            raise RuntimeError(
                f"another run ({who}) is writing to folder {folder}: wait for its end, or pass another folder"
            ) from None
        except OSError as error:
            raise restated(error, f"folder {folder} cannot be written to") from error
        yield


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder."""
    return max(_checkpoints(folder), key=_step, default=None)


def find_checkpoint(folder: Path | None, resume: bool | str) -> Path | None:
    """The newest checkpoint; for `resume="last_good"` the newest whose files are whole, with a warning if it is older.

    Raises ValueError for another `resume`, and if there are checkpoints and none is whole.
    """
    if not isinstance(resume, bool) and resume != "last_good":
        raise ValueError(f"resume must be True, False or 'last_good'; got {resume!r}")
    if folder is None:
        return None
    if resume != "last_good":
        return latest_checkpoint(folder)
    damages: list[str] = []
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        damage = _damage(checkpoint)
        if damage is None:
            if damages:
                warnings.warn(
                    f"resume='last_good' goes on from step {_step(checkpoint)}, as {'; '.join(damages)}", stacklevel=4
                )
            return checkpoint
        damages.append(damage)
    if damages:
        raise ValueError(f"resume='last_good' finds no whole checkpoint in {folder}: {'; '.join(damages)}")
    return None


def save_checkpoint(
    folder: Path, step: int, student: nn.Module, best: Mapping[str, Any], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `checkpoints/<step>`: student.safetensors, best.safetensors (if any), state.pt and manifest.json.

    Then drop all but the newest `keep` and those of later steps, which the run has gone back from. Raises OSError if
    it cannot be written; what was there is whole then.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep!r}")
    parent = folder / "checkpoints"
    final = parent / f"{step:09d}"
    temporary = parent / f"{TEMPORARY}{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir()
        save_weights(temporary / "student.safetensors", student)
        if best:
            write_state(temporary / "best.safetensors", best)
        _torch_save(state, temporary / "state.pt")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
        manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            flush(path)
        flush(temporary)
        if final.exists():  # a damaged one that the run went back from
            _remove(final)
        os.rename(temporary, final)
        flush(parent)
    except OSError as error:
        last = latest_checkpoint(folder)
        stands = (
            "There is none before it."
            if last is None
            else f"That of step {_step(last)} is whole, and resume=True goes on from there."
        )
        raise restated(error, f"the checkpoint of step {step} was not written to {parent}", stands) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    kept = sorted((path for path in _checkpoints(folder) if _step(path) <= step), key=_step)[-keep:]
    for path in _checkpoints(folder):
        if path not in kept:
            with contextlib.suppress(OSError):
                _remove(path)
    for path in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    return final


def load_checkpoint(checkpoint: Path, student: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill the student; return the state and the best student's (empty if none was kept).

    Raises ValueError, before it changes anything, for a checkpoint that is damaged or not of this student.
    """
    damage = _damage(checkpoint)
    if damage is not None:
        raise ValueError(
            f'{damage}: the checkpoint is damaged; resume="last_good" goes on from the newest one that is whole'
        )
    try:
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # damaged, and no manifest to tell
        raise ValueError(f"{checkpoint / 'state.pt'} cannot be read: {error}") from error
    best = checkpoint / "best.safetensors"
    # Copied: the file that the tensors are mapped to will be deleted.
    best_state = copy.deepcopy(read_state(best)) if best.exists() else {}
    load_weights(checkpoint / "student.safetensors", student)
    return state, best_state


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints").glob("[0-9]*") if path.is_dir() and path.name.isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return _damage_without_manifest(checkpoint)
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, step = content["format"], content["step"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({type(error).__name__}: {error})"
    if version != FORMAT:
        return f"{manifest} has format {version!r}, expected {FORMAT}"
    if step != _step(checkpoint):
        return f"{manifest} is of step {step!r}, expected {_step(checkpoint)}"
    for name, (size, sha256) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if _sha256(path) != sha256:
            return f"the checksum of {path} differs from that in {MANIFEST}"
    return None


def _damage_without_manifest(checkpoint: Path) -> str | None:
    for name in ("student.safetensors", "state.pt"):
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    try:  # whoever wrote a checksum here wrote a manifest, too
        return f"{checkpoint / MANIFEST} is missing" if has_checksum(checkpoint / "student.safetensors") else None
    except SafetensorError as error:
        return f"{checkpoint / 'student.safetensors'} cannot be read ({error})"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under another name: half of one must not look like one."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _torch_save(value: Any, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's own, about its writer, hides the one that says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class Log:
    """A file of JSON lines. `position` goes into the checkpoint; what a killed run wrote after it is cut off."""

    def __init__(self, path: Path | None, position: int = 0) -> None:
        self._path = path
        if path is not None:
            path.touch()
            with path.open("rb+") as file:
                whole = file.read(position).rfind(b"\n") + 1  # less than `position` only if someone cut the file
                file.truncate(whole)

    def write(self, **values: Any) -> None:
        """Append a line, or raise OSError and leave the file as it was."""
        if self._path is None:
            return
        size = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            raise restated(error, f"a line was not written to {self._path}") from error

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
