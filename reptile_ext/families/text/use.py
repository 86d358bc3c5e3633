"""A run's student put to use: loaded from its folder, asked for continuations, labels and translations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pretrained import load_model, read_config, read_tokenizer
from ...training.weights import load_weights
from . import lstm  # noqa: F401 (so that its models can be loaded)
from .data import padding_of
from .encoding import Encoder
from .models import context_of
from .saving import WEIGHTS

_LONG = 1 << 20  # tokens, of a student whose configuration names no context
_TOP = 3  # labels that are shown


def saved_student(folder: Path, task: str, made: nn.Module | None = None) -> nn.Module:
    """The student in a run folder, in eval mode. made: one of the same kind to load weights into, for a module that is
    none of transformers."""
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no student yet: finish the run with `reptile distill --resume {folder}`")
    if (folder / "config.json").exists():
        model: nn.Module = load_model(folder, read_config(folder), task, "auto", False)
        return model
    if made is None:
        raise ValueError(
            f"{folder} holds the weights of a module of your own: make it, and load {WEIGHTS} into it with safetensors"
        )
    load_weights(folder / WEIGHTS, made)
    return made.eval()


def answers(folder: Path, task: str, texts: Sequence[str], **options: Any) -> Iterator[str]:
    """What the student makes of each text: its continuation, its label with probabilities, its translation. A text that
    is longer than the student's context is cut, of a language model's in front. options: of transformers' generate."""
    model = saved_student(folder, task)
    tokenizer = read_tokenizer(folder)
    context = context_of(getattr(model, "config", None)) or _LONG
    if task == "language-model":
        context -= options.get("max_new_tokens", 0)
        if context < 1:
            raise ValueError(
                f"max_new_tokens must be below the student's context, {context + options['max_new_tokens']}; got "
                f"{options['max_new_tokens']}"
            )
    if torch.cuda.is_available():
        model = model.cuda()
    for text in texts:
        if task == "language-model":  # with what begins a text, and without what ends it
            ids = Encoder(tokenizer).begun([text])[0][-context:]
        else:
            ids = tokenizer(text, truncation=True, max_length=context, verbose=False)["input_ids"]
        if not ids:
            raise ValueError("text must not be empty: there is nothing to go on from")
        tokens = torch.tensor([ids], device=next(model.parameters()).device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            if task == "text-classification":
                yield _labels(model, model(**inputs).logits[0])
                continue
            generate: Any = model.generate
            out = generate(**inputs, pad_token_id=padding_of(tokenizer), **options)[0]
        if task == "language-model":
            out = out[inputs["input_ids"].shape[1] :]
        yield tokenizer.decode(out, skip_special_tokens=True)


def _labels(model: Any, logits: torch.Tensor) -> str:
    probability, classes = logits.float().softmax(-1).topk(min(_TOP, logits.shape[-1]))
    names = model.config.id2label
    return ", ".join(f"{names[int(i)]} {p:.3f}" for p, i in zip(probability, classes, strict=True))


def example_inputs(folder: Path, task: str) -> dict[str, torch.Tensor]:
    """Two texts of different lengths, as the student takes them: to export it with."""
    tokenizer = read_tokenizer(folder)
    texts = ("One text.", "Another text, which is longer.")
    ids = [tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    pad = padding_of(tokenizer)
    found = {
        "input_ids": torch.tensor([[*one, *([pad] * (longest - len(one)))] for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids]),
    }
    if task == "translation":
        found["decoder_input_ids"] = found["input_ids"][:, :3].clone()
    return found
