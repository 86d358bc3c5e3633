"""Samples on disk or in a stream, made of a table's records, and batches of them.

What cannot be learned from is left out, what is too long is cut, and both are counted. What is not streamed are Arrow
files, as the records are, and made once for the same data, tokenizer and settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .files import Table, said, silent

IGNORED = -100  # the label of positions that are not trained on
_BUFFER = 1 << 21  # tokens of a stream that are shuffled with each other


@dataclass
class Counts:
    """What came of the records."""

    samples: int = 0
    tokens: int = 0
    empty: int = 0  # records without a text
    unanswered: int = 0  # conversations without a turn of the assistant's
    unlearnable: int = 0  # samples, or blocks, of which all labels that fit are masked
    truncated: int = 0  # samples that lost tokens
    lost: int = 0  # tokens
    max_length: int = 0
    side: str = "end"  # that is cut
    packed: int | None = None  # texts in the blocks
    remainder: int = 0  # tokens that fill no block
    is_stream: bool = False
    where: str | None = None  # the folder of the Arrow files
    notes: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        found = f"{self.samples:,} samples, {self.tokens:,} tokens"
        if self.packed is not None:
            found = f"{self.samples:,} blocks of {self.max_length:,} tokens, made of {self.packed:,} texts"
        if self.is_stream:
            found = f"a stream, of which {found} were read" if self.samples else "a stream, read in every pass"
        if self.truncated:
            found += (
                f"; {self.truncated:,} cut at the {self.side} to {self.max_length:,} tokens, which lost {self.lost:,}"
            )
        if self.remainder:
            found += f"; {self.remainder:,} tokens at the end, too few for a block"
        prompts = f"whose prompt alone has {self.max_length:,} tokens or more"
        reasons = {
            "empty": self.empty,
            prompts if self.packed is None else "blocks in which nothing is to be learned": self.unlearnable,
            "without a turn of the assistant": self.unanswered,
        }
        if any(reasons.values()):
            found += "; left out: " + ", ".join(f"{count:,} {why}" for why, count in reasons.items() if count)
        for note in self.notes:
            found += f"; {note}"
        return found + (f"; in {self.where}" if self.where else "")


@dataclass
class Prepared:
    """Samples to train on or to evaluate: a Dataset of mappings, an IterableDataset of a stream. collate: makes batches
    for `Reptile` of a list of them. labels: names of classes."""

    samples: Any
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]]
    counts: Counts
    labels: list[str] = field(default_factory=list)


class Left(NamedTuple):
    """In the place of a record that is left out, why."""

    kind: int


KEPT, EMPTY, UNLEARNABLE, UNANSWERED = range(4)


def prepare(
    table: Table,
    counts: Counts,
    columns: Sequence[str],
    read: Callable[[Mapping[str, Any]], Any],
    made: Callable[[list[Any]], Iterator[dict[str, Any]]],
    fingerprint: str,
    features: Mapping[str, Any],
) -> Any:
    """The samples of a table, with "sample_id", the number of the record from 0.

    read       takes the parts of a sample out of a record, or says why it is `Left`.
    made       makes samples of many of them, with what they lost and their kind.
    features   of the samples, for `datasets`."""
    counts.is_stream = table.is_stream
    features = {**features, **{name: datasets.Value("int64") for name in ("sample_id", "lost", "kind")}}
    nothing: dict[str, Any] = {
        name: [] if isinstance(feature, datasets.List) else None for name, feature in features.items()
    }

    def samples_of(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        parts = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                parts.append(read(dict(zip(batch, values, strict=True))))
            except ValueError as error:
                raise ValueError(f"{table.record(index)}: {error}") from error
        of_parts = made([part for part in parts if not isinstance(part, Left)])
        found: dict[str, list[Any]] = {name: [] for name in features}
        for index, part in zip(indices, parts, strict=True):
            left_out = {"lost": 0, "kind": part.kind} if isinstance(part, Left) else None
            sample = {**nothing, **(left_out or next(of_parts)), "sample_id": index}
            for name in features:
                found[name].append(sample[name])
        return found

    rows = table.rows.select_columns(list(columns))
    keywords = {"batched": True, "with_indices": True, "remove_columns": list(columns)}
    if table.is_stream:
        return _Stream(table, rows.map(samples_of, **keywords), counts)
    with silent():
        rows = _on_disk(table, rows, samples_of, fingerprint, features=datasets.Features(features), **keywords)
        kinds, lost = (rows.data.column(name).to_numpy() for name in ("kind", "lost"))
        kept = kinds == KEPT
        counts.empty, counts.unlearnable, counts.unanswered = (
            int((kinds == kind).sum()) for kind in (EMPTY, UNLEARNABLE, UNANSWERED)
        )
        counts.truncated, counts.lost = int((lost[kept] > 0).sum()), int(lost[kept].sum())
        rows = rows.remove_columns(["lost", "kind"])
        if not kept.all():
            rows = rows.select(np.flatnonzero(kept))
        if counts.packed is not None and len(rows):
            rows = _packed(table, rows, fingerprint, counts)
    if not len(rows):
        raise ValueError(f"{table.where} must hold at least one sample to learn from; got {counts.sentence()}")
    samples = _Rows(rows)
    counts.samples, counts.tokens = len(rows), int(samples.lengths().sum())
    if rows.cache_files:
        counts.where = str(Path(rows.cache_files[0]["filename"]).parent)
    return samples


def _on_disk(table: Table, rows: Any, function: Any, fingerprint: str, **keywords: Any) -> Any:
    """Mapped, into a file in the cache of `datasets`, whose name says what is in it; in memory, of built-in data."""
    if table.names:
        path = Path(datasets.config.HF_DATASETS_CACHE) / "reptile_ext" / f"{fingerprint}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        keywords["cache_file_name"] = str(path)
    return rows.map(function, new_fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest()[:32], **keywords)


def fingerprint_of(table: Table, what: Sequence[Any], tokenizers: Sequence[Any]) -> str:
    """Of all that makes the samples what they are."""
    digest = hashlib.sha256(repr([_VERSION, table.digest, *what]).encode())
    for tokenizer in tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        whole = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
        settings = {key: value for key, value in whole.items() if key not in ("truncation", "padding")}  # of a call
        digest.update(json.dumps(settings, sort_keys=True).encode())
        special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
        digest.update(repr([type(tokenizer).__name__, special, tokenizer.chat_template]).encode())
    return digest.hexdigest()


_VERSION = 1  # of how samples are made: a change of that makes the old ones invalid


def _packed(table: Table, rows: Any, fingerprint: str, counts: Counts) -> Any:
    length = counts.max_length
    counts.packed = len(rows)
    total = int(_Rows(rows).lengths().sum())
    packer = _Packer(length)

    def blocks(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        found = list(packer.add(batch))
        return {name: [block[name] for block in found] for name in ("input_ids", "labels", "sample_id")}

    ids = datasets.List(datasets.Value("int32"))
    pieces = datasets.List(datasets.List(datasets.Value("int64")))
    features = datasets.Features({"input_ids": ids, "labels": ids, "sample_id": pieces})
    packed = _on_disk(
        table, rows, blocks, f"{fingerprint}-packed", batched=True, remove_columns=rows.column_names, features=features
    )
    counts.remainder = total % length
    counts.unlearnable = total // length - len(packed)
    return packed


class _Packer:
    """Cuts texts, one after the other, into blocks; what is left begins the next one. Blocks in which nothing is to be
    learned are left out."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._ids: list[int] = []
        self._labels: list[int] = []
        self._pieces: list[tuple[int, int, int]] = []

    def add(self, batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
        for ids, labels, number in zip(batch["input_ids"], batch["labels"], batch["sample_id"], strict=True):
            begin = 0
            while begin < len(ids):
                end = min(len(ids), begin + self._length - len(self._ids))
                self._ids += ids[begin:end]
                self._labels += labels[begin:end]
                self._pieces.append((number, begin, end))
                begin = end
                if len(self._ids) == self._length:
                    if any(label != IGNORED for label in self._labels[1:]):
                        yield {"input_ids": self._ids, "labels": self._labels, "sample_id": self._pieces}
                    self._ids, self._labels, self._pieces = [], [], []


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(self._rows[i])

    def numbers(self, name: str) -> Any:
        """A column of them."""
        return np.concatenate(
            [batch[name] for batch in self._rows.select_columns([name]).with_format("numpy").iter(10_000)]
        )

    def lengths(self) -> Any:
        import pyarrow.compute

        tables = self._rows.select_columns(["input_ids"]).with_format("arrow").iter(10_000)
        return np.concatenate([pyarrow.compute.list_value_length(table["input_ids"]).to_numpy() for table in tables])


class _Stream(IterableDataset[dict[str, Any]]):
    """Samples as they are read, shuffled with those near them, another way in every pass, the same for its number.

    It has no state of its own: a place in a pass is found again by reading the pass from its beginning, as
    `training.data` does, which is exact. What `datasets` keeps of a stream is not: it forgets what it was about to
    shuffle."""

    def __init__(self, table: Table, rows: Any, counts: Counts) -> None:
        size = max(100, min(10_000, _BUFFER // counts.max_length))
        self._table, self._rows, self._counts = table, rows.shuffle(seed=0, buffer_size=size), counts

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counts, before = self._counts, self._counts.samples
        packer = None if counts.packed is None else _Packer(counts.max_length)
        for row in self._kept():
            if packer is None:
                counts.samples += 1
                counts.tokens += len(row["input_ids"])
                yield row
                continue
            counts.packed = (counts.packed or 0) + 1
            for block in packer.add({name: [value] for name, value in row.items()}):
                counts.samples += 1
                counts.tokens += counts.max_length
                yield block
        if counts.samples == before:
            raise ValueError(
                f"{self._table.where} must hold at least one sample to learn from; got {counts.sentence()}"
            )

    def _kept(self) -> Iterator[dict[str, Any]]:
        counts = self._counts
        for row in self._read():
            lost, kind = row.pop("lost"), row.pop("kind")
            counts.empty += kind == EMPTY
            counts.unlearnable += kind == UNLEARNABLE
            counts.unanswered += kind == UNANSWERED
            if kind == KEPT:
                counts.truncated += lost > 0
                counts.lost += lost
                yield row

    def _read(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._rows)
        while True:
            try:
                with silent():
                    some = list(itertools.islice(rows, 100))
            except (OSError, MemoryError):
                raise
            except Exception as error:
                if isinstance(error, ValueError) and str(error).startswith(self._table.flag):
                    raise
                raise ValueError(f"{self._table.where} cannot be read: {said(error)}") from error
            if not some:
                return
            yield from some


# ------------------------------------------------------------------------------------------------ batches


def padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*one, *([value] * (longest - len(one)))] for one in lists])


def mask_of(lists: Sequence[Sequence[int]]) -> Tensor:
    """By length, not by id: the padding's id may be that of the end-of-text token, which is learned."""
    return padded([[1] * len(one) for one in lists], 0)


def padding_of(tokenizer: Any) -> int:
    """The id of the padding token; of a tokenizer without one, that of the end of a text: the mask tells them apart."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise ValueError(
        "tokenizer must have a padding or an end-of-text token to make batches: set its pad_token, and save it"
    )


def notes_on_padding(tokenizer: Any) -> list[str]:
    padding_of(tokenizer)
    return [] if tokenizer.pad_token_id is not None else ["padded with the end-of-text token, and masked"]


def inputs_of(lists: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, Tensor]:
    return {"input_ids": padded(lists, padding_of(tokenizer)), "attention_mask": mask_of(lists)}


def collate_tokens(tokenizer: Any, packing: bool = False) -> Callable[[list[Mapping[str, Any]]], dict[str, Any]]:
    pad = 0 if packing else padding_of(tokenizer)

    def collate(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": mask_of(ids),
            "labels": padded([sample["labels"] for sample in samples], IGNORED),
        }

    return collate
