"""The student of a run as `from_pretrained` loads it: in the run folder itself, beside what the run wrote down."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ...files import TEMPORARY, flush
from ...training.weights import save_weights
from .models import merged

WEIGHTS = "model.safetensors"


def save_student(folder: Path, student: nn.Module, tokenizer: Any, card: str) -> None:
    """Model, tokenizer and a model card. Adapters are merged into the model. A module that is none of transformers has
    its weights saved, without a config.json. Every file is whole or not there, and config.json is last."""
    temporary = folder / f"{TEMPORARY}student"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    temporary.mkdir(parents=True)
    try:
        model: Any = merged(student)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(temporary)
        else:
            save_weights(temporary / WEIGHTS, model)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            else:
                flush(path)
            os.replace(path, folder / path.name)
        flush(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
