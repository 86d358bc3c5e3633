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
from ...training.modes import in_mode
from ...training.weights import load_weights
from .data import mask_of, padded, padding_of

_BATCH = 16


def generated(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int | None = None, **options: Any
) -> list[list[int]]:
    """New tokens after each prompt (of an encoder-decoder: all it writes), by transformers' generate; prompts of
    different lengths have their padding in front. seed: of a sampling, which leaves the random numbers as they were."""
    generate: Any = model.generate
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    pad, found = padding_of(tokenizer), []
    device = next(model.parameters()).device
    with torch.random.fork_rng(), torch.no_grad(), in_mode(model, training=False):
        torch.manual_seed(seed or 0)
        for start in range(0, len(prompts), _BATCH):
            some = [list(prompt) for prompt in prompts[start : start + _BATCH]]
            ids, mask = padded(some, pad), mask_of(some)
            if not is_encoder_decoder:
                ids, mask = (
                    torch.stack([_behind(x, len(p)) for x, p in zip(of, some, strict=True)]) for of in (ids, mask)
                )
            out = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=pad,
                do_sample=seed is not None,
                **options,
            )
            found += out[:, 0 if is_encoder_decoder else ids.shape[1] :].tolist()
    return found


def _behind(row: torch.Tensor, length: int) -> torch.Tensor:
    """A row with its padding in front."""
    return row.roll(len(row) - length)


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
