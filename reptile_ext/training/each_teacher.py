"""A batch whose samples have teachers of their own, as one batch for each teacher that is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..words import did_you_mean
from .batches import num_samples

KEY = "teacher"


def by_teacher(batch: Any, names: Sequence[str], count: int) -> list[tuple[int | None, Any]]:
    """Pairs of a teacher's number and the samples that are compared with it; without the key "teacher", (None, batch).

    names: the teachers' names, where they have some; a sample says one of them, or the number of a teacher.
    """
    if not isinstance(batch, Mapping) or KEY not in batch:
        return [(None, batch)]
    rest = {name: value for name, value in batch.items() if name != KEY}
    chosen = batch[KEY].tolist() if isinstance(batch[KEY], Tensor) else list(batch[KEY])
    inputs = rest.get("student_inputs", rest)
    samples = num_samples(inputs)
    if len(chosen) != samples:
        raise ValueError(f"teacher of a batch must be one for each of {samples} samples; got {len(chosen)}")
    numbers = torch.tensor([_number(one, names, count) for one in chosen])
    return [
        (i, rest if len(found) == samples else _select(rest, found, samples))
        for i in range(count)
        if len(found := (numbers == i).nonzero().flatten())
    ]


def _number(one: Any, names: Sequence[str], count: int) -> int:
    if isinstance(one, str) and one in names:
        return names.index(one)
    if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < count:
        return one
    if isinstance(one, str) and names:
        raise ValueError(f"teacher of a sample must be one of {list(names)}; got {one!r}{did_you_mean(one, names)}")
    raise ValueError(f"teacher of a sample must be a number from 0 to {count - 1}; got {one!r}")


def _select(value: Any, found: Tensor, samples: int) -> Any:
    """These samples of a batch. What has another first dimension is of all of them."""
    if isinstance(value, Mapping):
        return {name: _select(x, found, samples) for name, x in value.items()}
    if isinstance(value, Tensor):
        return value[found.to(value.device)] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, (list, tuple)) and len(value) == samples:
        return type(value)(value[i] for i in found.tolist())
    return value
