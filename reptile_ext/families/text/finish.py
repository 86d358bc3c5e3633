"""What follows the training of a student of texts: its folder, what it writes, and what the report says of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ...pretrained import quiet
from ...training import Reptile
from .card import model_card
from .generation import written
from .models import context_of
from .saving import save_student
from .settings import TextSettings

Finish = Callable[[Reptile, Path, dict[str, Any]], dict[str, Any]]
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 48
_BEFORE, _AFTER = 12, 4  # tokens that are shown around a position


def finish_with(
    task: str, tokenizer: Any, held_out: Any, scores: Finish | None = None, **of_task: Any
) -> Callable[[TextSettings, Callable[..., Iterable[Any]]], Finish]:
    """What `assemble` takes: a function that makes the one that is called at the end. scores: adds to the report what
    the task measures besides, and returns keywords of `write_page`; of_task: others of them."""

    def made(settings: TextSettings, loader: Callable[..., Iterable[Any]]) -> Finish:
        def finish(reptile: Reptile, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
            page = {"title": f"reptile distill {task}: {folder.name}", **of_task}
            if task == "language-model":
                page |= _of_tokens(tokenizer, held_out)
                page["generations"] = continuations(reptile.student, tokenizer, held_out, settings.seed)
            if scores is not None:
                page |= scores(reptile, folder, report)
            quoted = shlex.quote(str(folder))
            page["commands"] = (
                f"reptile evaluate {quoted} --data FILE\n"
                f"reptile generate {quoted} TEXT\n"
                f"reptile export {quoted} --to onnx"
            )
            with quiet():
                save_student(folder, reptile.student, tokenizer, model_card(task, settings, folder, report))
            return page

        return finish

    return made


def _of_tokens(tokenizer: Any, held_out: Any) -> dict[str, Any]:
    def class_name(token: int) -> str:
        return repr(tokenizer.decode([token]))[1:-1]

    def sample_text(sample: int, position: int) -> str:
        ids = held_out[sample]["input_ids"]
        before = tokenizer.decode(ids[max(0, position + 1 - _BEFORE) : position + 1])
        return f"{before} … {tokenizer.decode(ids[position + 1 : position + 1 + _AFTER])}"

    return {"class_name": class_name, "sample_text": sample_text}


def continuations(student: Any, tokenizer: Any, held_out: Any, seed: int) -> list[dict[str, str]]:
    """What the student writes after the first tokens of held-out samples, sampled; none of a model that cannot."""
    if not callable(getattr(student, "generate", None)) or not hasattr(held_out, "__len__"):
        return []
    context = context_of(getattr(student, "config", None)) or _PROMPT_TOKENS + _NEW_TOKENS
    length = min(_PROMPT_TOKENS, context // 2)
    numbers = torch.linspace(0, len(held_out) - 1, min(_PROMPTS, len(held_out))).long().tolist()
    prompts = [held_out[i]["input_ids"][:length] for i in numbers]
    found = written(student, tokenizer, prompts, seed, max_new_tokens=min(_NEW_TOKENS, context - length))
    return [
        {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(ids, skip_special_tokens=True)}
        for prompt, ids in zip(prompts, found, strict=True)
    ]
