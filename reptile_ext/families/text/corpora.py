"""Texts that need no file: what the Python that runs this has in its standard library (PSF licence)."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from pathlib import Path
from typing import Any

# Well filled packages and modules that every installation has, by what they are called; decimal's is in _pydecimal.
_PACKAGES = {
    **{name: name for name in ("asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing")},
    **{name: name for name in ("unittest", "xml")},
    "_pydecimal": "decimal",
}
_WORDS = 5  # that a docstring has at least
_HELD_OUT, _OF = 3, 10  # parts


def docstrings() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Docstrings of the standard library with the package they are from, {"text", "label"}: (to train on, held out).

    The package's own name is replaced by "_" in them. A definition at the top of a file is on one side with all that is
    inside it; a docstring that several have is there once."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    seen: set[str] = set()
    for name, label in sorted(_PACKAGES.items()):
        paths = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no {path}: this Python was installed without the source of its library")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            for top in [tree, *tree.body]:
                found = [_docstring(top)] if top is tree else [_docstring(node) for node in ast.walk(top)]
                # Names decide, so that a docstring stays on its side when others are added or removed.
                key = f"{path.relative_to(root).as_posix()} {getattr(top, 'name', '')}"
                is_held_out = hashlib.sha256(key.encode()).digest()[0] % _OF < _HELD_OUT
                for text in found:
                    if len(text.split()) < _WORDS or text in seen:
                        continue
                    seen.add(text)
                    masked = re.sub(rf"{re.escape(label)}", "_", text, flags=re.IGNORECASE)
                    parts[is_held_out].append({"text": masked, "label": label})
    return parts


def _docstring(node: Any) -> str:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return ast.get_docstring(node) or ""
    return ""
