"""What the loop samples from: micro-batches in any of the common shapes, and a place in the data that can be kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Batch(NamedTuple):
    """What the models take, and the labels, if there are any."""

    inputs: Any
    labels: Tensor | None


def split(batch: Any, shift_labels: bool, ignore_index: int) -> Batch:
    """A batch in its two parts.

    A tensor is input alone; a pair is (inputs, labels); a mapping goes to the models as keywords, its "labels" apart,
    so that an HF model does not compute a loss of its own. `shift_labels` turns the labels of a causal language model
    (equal to the input) into the next token at each position; nothing follows the last one, so it is ignored.
    """
    inputs: Any
    if isinstance(batch, Tensor):
        inputs, labels = batch, None
    elif isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise TypeError(
            f"batch must be a tensor, a pair (inputs, labels) or a mapping with an optional 'labels'; got "
            f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    if shift_labels:
        if labels is None:
            raise ValueError("shift_labels=True needs labels in every batch; got a batch without")
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    return Batch(inputs, labels)


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model on inputs as `split` returns them; its output is a tensor, or holds one as `.logits`."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{type(model).__name__} must return a tensor of logits or an object with .logits; got "
            f"{type(output).__name__}"
        )
    return output


def num_samples(inputs: Any) -> int:
    """Size of the first dimension of a batch's inputs."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return int(first.shape[0])


class Sampler:
    """Micro-batches from endless passes over `data`, from a place that can be saved and found again exactly.

    What is saved is the state of the random numbers at the start of the current pass and how many micro-batches were
    taken since: to come back, the pass is started again from those random numbers and the micro-batches already used
    are read and dropped. That costs reading them, and is exact for any loader, shuffle or augmentation.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._passes = 0
        self._taken = 0
        self._start: dict[str, Any] = {}
        self._iterator: Iterator[Any] | None = None

    def take(self, count: int) -> list[Any]:
        """The next `count` micro-batches, fewer at the end of a pass, never none."""
        while True:
            iterator = self._iterator or self._start_pass()
            window = list(itertools.islice(iterator, count))
            self._taken += len(window)
            if len(window) < count:
                self._iterator = None
                self._passes += 1
            if window:
                return window
            if self._taken == 0:
                raise ValueError(
                    f"train must yield micro-batches on every pass; got none on pass {self._passes} "
                    "(a generator can be read only once: pass a DataLoader or a list)"
                )

    def _start_pass(self) -> Iterator[Any]:
        self._taken = 0
        self._start = random_state(getattr(self._data, "generator", None))
        sampler = getattr(self._data, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._passes)
        self._iterator = iter(self._data)
        return self._iterator

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._passes, "taken": self._taken, "start": self._start, "open": self._iterator is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Moves the global random numbers: set them afterwards."""
        self._passes, self._iterator = state["passes"], None
        if state["open"]:
            set_random_state(state["start"], getattr(self._data, "generator", None))
            for _ in itertools.islice(self._start_pass(), state["taken"]):
                self._taken += 1


def random_state(generator: torch.Generator | None = None) -> dict[str, Any]:
    """Every random-number state a step can draw on, in types that load without executing code."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generator": None if generator is None else generator.get_state(),
    }


def set_random_state(state: dict[str, Any], generator: torch.Generator | None = None) -> None:
    """Put every random-number state back to what `random_state` returned."""
    random.setstate(state["python"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if generator is not None and state["generator"] is not None:
        generator.set_state(state["generator"])
