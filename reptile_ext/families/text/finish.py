"""What follows the training of a student of texts: its folder, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...pretrained import quiet
from ...training import Reptile
from .saving import save_student
from .settings import TextSettings

Finish = Callable[[Reptile, Path, dict[str, Any]], None]


def finish_with(
    task: str, tokenizer: Any, held_out: Any
) -> Callable[[TextSettings, Callable[..., Iterable[Any]]], Finish]:
    """What `assemble` takes: a function that makes the one that is called at the end."""

    def made(settings: TextSettings, loader: Callable[..., Iterable[Any]]) -> Finish:
        def finish(reptile: Reptile, folder: Path, report: dict[str, Any]) -> None:
            with quiet():
                save_student(folder, reptile.student, tokenizer, f"# {folder.name}\n")

        return finish

    return made
