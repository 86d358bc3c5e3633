"""Files that are whole or not there. Imports nothing of this package: `benchmarks/compare.py` loads it by its path."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # begins the name of what is not whole yet


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then put it in the place of `path` in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise restated(error, f"{path} was not written") from error
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def restated(error: OSError, message: str, hint: str = "") -> OSError:
    """An error of the same number, and so of the same class, that says what could not be done."""
    message = f"{message}: {error.strerror or error}" + (f". {hint}" if hint else "")
    return OSError(error.errno, message) if error.errno else OSError(message)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and needs no flush of one
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def add_file(digest: Any, path: str | os.PathLike[str]) -> None:
    """To a hash, the content of a file of any size."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
