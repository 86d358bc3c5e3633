"""A cache's rows beside a batch: row t of a sample belongs to the logits at its position t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from . import format as fmt
from .reader import TeacherCache

Rows = tuple[Tensor, ...]  # (indices, log_probs) [B, T, K], or (values,) [B, T, V]


def rows_of_batch(
    cache: TeacherCache, sample_id: Any, mask: Tensor | None, labels: Tensor | None = None, decoded: Any = None
) -> Rows:
    """What the cache says of the samples of a batch, [B, T, …]: at padding -1 and -inf, or 0.

    sample_id: ids, a tensor of them, or for packed samples and parts a list of (id, begin, end) each.
    mask: [B, T], 0 at padding, on whichever side or sides it is; None: there is no padding. It is of the inputs alone
        where each sample has one row and its label, if any, is one number: of a classifier of texts, say.
    decoded: `cache.batch(sample_id)`, where it has been read already.

    Raises ValueError for samples that have another number of positions than the batch; KeyError names one that is not
    in the cache.
    """
    sample_id = _ids(sample_id)
    lengths = [sum(end - begin for _, begin, end in cache._pieces(sample)) for sample in sample_id]
    if mask is not None and len(mask) != len(lengths):
        raise ValueError(f"sample_id must be of {len(mask)} samples, as attention_mask is; got {len(lengths)}")
    if mask is not None and mask.numel() != len(lengths) and all(length == 1 for length in lengths):
        mask = mask if labels is not None and labels.numel() != len(lengths) else None
    if mask is None and len(set(lengths)) > 1:
        raise ValueError(
            f"sample_id: samples of {min(lengths)} to {max(lengths)} positions share a batch, and nothing says where "
            "their padding is: give an attention_mask, or a decoder_attention_mask where the student has a decoder"
        )
    is_there = None if mask is None else _is_there(mask, sample_id, lengths)
    decoded = cache.batch(sample_id) if decoded is None else decoded
    decoded = decoded if isinstance(decoded, (tuple, list)) else (decoded,)
    if is_there is None or bool(is_there.all()):
        return tuple(decoded)
    begins_left = torch.arange(max(lengths, default=0)) < torch.tensor(lengths).unsqueeze(1)
    placed = []
    for x, filling in zip(decoded, (-1, -torch.inf) if cache.kind in fmt.CODED else (0,), strict=True):
        out = x.new_full((*is_there.shape, x.shape[-1]), filling)
        out[is_there.to(x.device)] = x[begins_left.to(x.device)]
        placed.append(out)
    return tuple(placed)


def _ids(sample_id: Any) -> Sequence[Any]:
    if isinstance(sample_id, Tensor):
        if sample_id.ndim != 1 or sample_id.is_floating_point():
            raise TypeError(f"sample_id must be whole numbers [B]; got {sample_id.dtype} {list(sample_id.shape)}")
        sample_id = sample_id.tolist()
    if isinstance(sample_id, str) or not isinstance(sample_id, Sequence):
        raise TypeError(
            f"sample_id must be a list or tensor of ids, one for each sample of the batch; got {sample_id!r}"
        )
    return sample_id


def _is_there(mask: Tensor, sample_id: Sequence[Any], lengths: list[int]) -> Tensor:
    """[B, T]: which positions of the batch are none of padding. Raises where they are not as many as in the cache."""
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, T], 0 at padding, to say where the cache's rows belong; got {list(mask.shape)}"
        )
    is_there = (mask != 0).cpu()
    for sample, length, found in zip(sample_id, lengths, is_there.sum(1).tolist(), strict=True):
        if length != found:
            raise ValueError(f"{_said(sample, length)}; the batch has {found}, by its attention_mask{_HINT}")
    return is_there


_HINT = (
    ". Row t of the cache is the answer to tokens 0 … t: where the batch holds a part of the sample, give a list of "
    "(id, begin, end) in the place of the id"
)


def _said(sample: Any, length: int) -> str:
    return f"sample_id {sample!r} has {length} positions in the cache"


def rows_like(rows: Rows, shape: torch.Size, device: torch.device) -> list[Tensor]:
    """[B, T, K] as [..., K] for logits [..., V] whose leading shape is `shape`; [B, 1, K] as [B, K]."""
    found = []
    for x in rows:
        if x.shape[:-1] != shape:
            if not shape or x.shape[0] != shape[0] or x.shape[:-1].numel() != shape.numel():
                raise ValueError(
                    f"the cache has {x.shape[1]} positions for each of {x.shape[0]} samples, and the student's logits "
                    f"are of {list(shape)} rows{_HINT}"
                )
            x = x.reshape(*shape, x.shape[-1])
        found.append(x.to(device))
    return found


class Collate:
    """See `TeacherCache.collate`."""

    def __init__(self, cache: TeacherCache, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        self.cache = cache
        self.collate_fn = collate_fn or default_collate

    def __call__(self, samples: list[Any]) -> Any:
        ids, rest = [], []
        for sample in samples:
            if not isinstance(sample, Mapping) or "sample_id" not in sample:
                what = f"one with the keys {list(sample)}" if isinstance(sample, Mapping) else type(sample).__name__
                raise ValueError(f"cache.collate needs samples that are mappings with a 'sample_id'; got {what}")
            ids.append(sample["sample_id"])
            rest.append({name: value for name, value in sample.items() if name != "sample_id"})
        batch = self.collate_fn(rest)
        if not isinstance(batch, Mapping):
            raise TypeError(f"cache.collate needs a collate_fn that returns a mapping; got {type(batch).__name__}")
        # Which of the batch's positions the rows belong to, the objective knows, which knows the student.
        return {**batch, "sample_id": ids, "teacher_rows": self.cache.batch(ids)}
