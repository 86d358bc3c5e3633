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
from .data import padding_of

_BATCH, _FUNCTIONS = 16, 100


def written(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int | None = None, **options: Any
) -> list[list[int]]:
    """New tokens after each prompt (of an encoder-decoder: all it writes), by transformers' generate, some prompts at a
    time, those of different lengths with their padding in front. seed: of a sampling, which leaves the random numbers
    as they were; None: the likeliest tokens."""
    generate: Any = model.generate
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    device, pad = next(model.parameters()).device, padding_of(tokenizer)
    found: list[list[int]] = []
    with torch.random.fork_rng(), torch.no_grad(), in_mode(model, training=False):
        torch.manual_seed(seed or 0)
        for start in range(0, len(prompts), _BATCH):
            some = prompts[start : start + _BATCH]
            longest = max(map(len, some))
            ids = torch.full((len(some), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, prompt in enumerate(some):
                where = slice(0, len(prompt)) if is_encoder_decoder else slice(longest - len(prompt), longest)
                ids[i, where] = torch.tensor(prompt)
                mask[i, where] = 1
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            out = generate(**inputs, pad_token_id=pad, do_sample=seed is not None, **options)
            found += out[:, 0 if is_encoder_decoder else longest :].tolist()
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


def shares_that_parse(
    reptile: Reptile, folder: Path, report: dict[str, Any], tokenizer: Any, texts: Sequence[str], max_length: int
) -> None:
    """Add to the report's models which share of the functions they write is Python: each is given the line that begins
    a function of a held-out file, and samples up to the end of its context; what is whole of it must parse."""
    heads = [pair for text in texts for pair in heads_of_functions(text)]
    encoded = [(head, body, tokenizer(head)["input_ids"], tokenizer(body)["input_ids"]) for head, body in heads]
    encoded = [one for one in encoded if len(one[2]) <= max_length // 2]
    encoded = [encoded[i] for i in torch.linspace(0, len(encoded) - 1, min(_FUNCTIONS, len(encoded))).long().tolist()]
    if not encoded:
        return
    room = max_length - max(len(ids) for _, _, ids, _ in encoded)
    for name, model in models_of_run(reptile, folder, report):
        new = written(model, tokenizer, [ids for _, _, ids, _ in encoded], 0, max_new_tokens=room, min_new_tokens=room)
        bodies = tokenizer.batch_decode(new, skip_special_tokens=True)
        found = [parses(head, body) for (head, *_), body in zip(encoded, bodies, strict=True)]
        report["models"][name]["parses"] = sum(found) / len(found)
    real = [parses(head, tokenizer.decode(ids[:room])) for head, _, _, ids in encoded]
    report["notes"].append(
        f"Parses: the share of {len(encoded)} functions, of {room} tokens after the first line of one, that is Python; "
        f"of the library's own, cut alike, {sum(real) / len(real):.4f}."
    )


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
