"""What follows the training of a student of texts: its folder, what it writes, and what the report says of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...pretrained import quiet
from ...training import Reptile
from ...training.metrics import METRICS
from .card import model_card
from .saving import save_student
from .settings import TextSettings

Finish = Callable[[Reptile, Path, dict[str, Any]], dict[str, Any]]
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 16, 48
_BEFORE, _AFTER = 12, 4  # tokens that are shown around a position


def finish_with(
    task: str, tokenizer: Any, held_out: Any, **of_task: Any
) -> Callable[[TextSettings, Callable[..., Iterable[Any]]], Finish]:
    """What `assemble` takes: a function that makes the one that is called at the end. `of_task`: keywords of
    `write_page`."""

    def made(settings: TextSettings, loader: Callable[..., Iterable[Any]]) -> Finish:
        def finish(reptile: Reptile, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
            page = {"title": f"reptile distill {task}: {folder.name}", **of_task}
            quoted = shlex.quote(str(folder))
            commands = [f"reptile evaluate {quoted} --data FILE", f"reptile export {quoted} --to onnx"]
            if task == "language-model":
                page |= _of_tokens(tokenizer, held_out)
                page["generations"] = continuations(reptile.student, tokenizer, held_out, settings.seed)
            commands.insert(1, f"reptile generate {quoted} TEXT")
            page["commands"] = "\n".join(commands)
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
    found = []
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for i in torch.linspace(0, len(held_out) - 1, min(_PROMPTS, len(held_out))).long().tolist():
            prompt = torch.tensor([held_out[i]["input_ids"][:_PROMPT_TOKENS]], device=device)
            out = student.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                max_new_tokens=_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )[0]
            new = tokenizer.decode(out[prompt.shape[1] :], skip_special_tokens=True)
            found.append({"prompt": tokenizer.decode(prompt[0], skip_special_tokens=True), "text": new})
    student.train(was_training)
    return found


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Of the distilled student."""
    return {name: value for name, value in report["models"]["student"].items() if name in METRICS}
