"""Distillation on what the student itself writes (GKD, Agarwal et al. 2023, arXiv 2306.13649): completions of a batch
are replaced by ones that the student samples after its prompts, and the teacher is asked about those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .modes import in_mode

_RESERVED = ("input_ids", "inputs", "attention_mask", "num_return_sequences", "return_dict_in_generate")


class OnPolicy:
    """Samples completions. generate: keywords of transformers' `generate`, such as max_new_tokens and temperature; by
    default it samples, at temperature 1 and from all classes, at most 64 tokens."""

    def __init__(self, student: nn.Module, ignore_index: int, generate: Mapping[str, Any] | None = None) -> None:
        if not callable(getattr(student, "generate", None)):
            raise ValueError(
                f"on_policy needs a student that has transformers' generate(); {type(student).__name__} has none"
            )
        if getattr(getattr(student, "config", None), "is_encoder_decoder", False):
            raise ValueError("on_policy is for decoders alone; the student has an encoder, too")
        options = dict(generate or {})
        if wrong := sorted(set(options) & set(_RESERVED)):
            raise ValueError(f"generate must not hold {', '.join(wrong)}: the batch says it")
        self._options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64, **options}
        self._student, self._ignore_index = student, ignore_index

    def sampled(self, batch: Batch) -> Batch:
        """The batch's prompts with completions of the student's own. Labels are those of the next tokens, as `split`
        returns them: a row's prompt ends with the position of its first label that is not ignored. The rows that count
        are those that predict a sampled token, up to and with the first end-of-text token."""
        inputs = batch.inputs
        if not isinstance(inputs, Mapping) or "input_ids" not in inputs or batch.labels is None:
            raise ValueError("on_policy needs batches that are mappings with input_ids and labels")
        if batch.teacher_inputs is not None or batch.teacher_logits is not None:
            raise ValueError("on_policy has the teacher answer what the student writes: batches may bring no answers")
        ids, labels = inputs["input_ids"], batch.labels
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        learned = labels != self._ignore_index
        prompts: list[list[int]] = []
        for row, kept, counts in zip(ids.tolist(), (mask != 0).tolist(), learned.tolist(), strict=True):
            if True in counts:
                end = counts.index(True) + 1
                prompts.append([token for token, is_kept in zip(row[:end], kept[:end], strict=True) if is_kept])
        if not prompts:
            return batch  # nothing counts in it anyway
        options = dict(self._options)
        context, longest = self._context(), max(map(len, prompts))
        if context is not None and longest + options["max_new_tokens"] > context:
            options["max_new_tokens"] = context - longest
            if options["max_new_tokens"] < 1:
                raise ValueError(
                    f"a prompt of {longest} tokens leaves the student no room to write in its context of {context}"
                )
        completions = generated(self._student, prompts, self._ends(), **options)
        return _joined(prompts, completions, self._ignore_index, ids.device)

    def _context(self) -> int | None:
        config: Any = getattr(self._student, "config", None)
        names = ("max_position_embeddings", "n_positions")
        return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)

    def _ends(self) -> set[int]:
        """Ids that end a completion."""
        config = getattr(self._student, "generation_config", None)
        given = self._options.get("eos_token_id", getattr(config, "eos_token_id", None))
        return set() if given is None else set(given if isinstance(given, (list, tuple)) else [given])


def _joined(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], ignore_index: int, device: torch.device
) -> Batch:
    """One batch of prompts and what follows them, padding behind."""
    longest = max(len(one) + len(other) for one, other in zip(prompts, completions, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, ignore_index)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = torch.tensor([*prompt, *completion])
        ids[i, : len(whole)] = whole
        mask[i, : len(whole)] = 1
        # Position t is asked for token t + 1.
        labels[i, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    count = int((labels != ignore_index).sum())
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    return Batch(inputs, labels.to(device), mask=inputs["attention_mask"], num_rows_in=count)


def generated(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: set[int] | None = None, pad: int = 0, **options: Any
) -> list[list[int]]:
    """New tokens after each prompt (of an encoder-decoder: all it writes), by transformers' generate, in eval mode and
    without a graph. Prompts of different lengths have their padding in front. ends: cut behind the first of these."""
    generate: Any = model.generate
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if is_encoder_decoder else slice(longest - len(prompt), longest)
        ids[i, where] = torch.tensor(prompt)
        mask[i, where] = 1
    with torch.no_grad(), in_mode(model, training=False):
        out: Tensor = generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, use_cache=True, **options
        )
    found: list[list[int]] = out[:, 0 if is_encoder_decoder else longest :].tolist()
    return [_cut(one, ends or set()) for one in found]


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first that ends it: what follows is padding, whatever its id."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids
