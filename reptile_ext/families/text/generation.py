"""What models write, and how good it is: translations by chrF and BLEU, source text by whether it parses."""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...training import Reptile
from ...training.on_policy import generated
from ...training.weights import load_weights
from .data import padding_of

_BATCH = 16


def written(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int | None = None, **options: Any
) -> list[list[int]]:
    """New tokens after each prompt (of an encoder-decoder: all it writes), some prompts at a time. seed: of a sampling,
    which leaves the random numbers as they were; None: the likeliest tokens."""
    found: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        for start in range(0, len(prompts), _BATCH):
            some = prompts[start : start + _BATCH]
            found += generated(model, some, pad=padding_of(tokenizer), do_sample=seed is not None, **options)
    return found


def models_of_run(reptile: Reptile, folder: Path, report: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """The models of the report, those that can write, one after the other."""
    for name in report["models"]:
        model: Any = None
        if name == "teacher":
            model = reptile.teacher
        elif name == "student":
            model = reptile.student
        elif name == "student alone":
            model = copy.deepcopy(reptile.student)
            load_weights(folder / "student-alone" / "student.safetensors", model)
        if isinstance(model, nn.Module) and callable(getattr(model, "generate", None)):
            yield name, model


def translation_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus chrF and BLEU of detokenised texts, 0 to 100, as sacrebleu computes them by default."""
    try:
        import sacrebleu
    except ImportError:
        raise ImportError("chrF and BLEU need the extra 'text': pip install 'reptile_ext[text]'") from None
    return {
        "chrF": sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score,
        "BLEU": sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score,
    }


def heads_of_functions(text: str) -> list[tuple[str, str]]:
    """(the line that begins a function, what follows it in the file) of the functions at the top of a source text."""
    lines = text.splitlines(keepends=True)
    found = []
    with contextlib.suppress(SyntaxError, ValueError):
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                body = node.body[0].lineno - 1
                head = "".join(lines[node.lineno - 1 : body])
                if body >= node.lineno and head.count("\n") == 1:
                    found.append((head, "".join(lines[body : node.end_lineno])))
    return found


def parses(head: str, body: str) -> bool:
    """Whether a function with the lines of `body` that are whole is Python."""
    whole = body[: body.rfind("\n") + 1]
    if not whole.strip():
        return False
    try:
        ast.parse(head + whole)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
