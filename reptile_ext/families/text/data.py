"""Files of texts, and samples made of them: of tokens for a language model, with a label, in pairs of languages.

Everything is read through Hugging Face's `datasets`: what is not streamed lies as Arrow files in its cache on disk, of
which only the pages that are used are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ...cache import sources
from ...files import add_file
from ...words import did_you_mean

IGNORED = -100  # the label of positions that are not trained on
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), "text"),
}
_BUFFER = 10_000  # samples of a stream that are shuffled with each other

# What columns are called in public data, the first that is there.
_TEXT = ("text", "content", "document", "sentence", "review", "body", "code")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_MESSAGES = ("messages", "conversations")
_LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "target")
_SOURCE_TARGET = (("source", "target"), ("src", "tgt"), ("source_text", "target_text"))


class Table:
    """Records in order, of files, of a folder that `datasets` saved, or of a data set on the hub.

    Attributes:
        flag: what the user calls it, such as "train". rows: a `datasets.Dataset`, or an IterableDataset of a stream.
        columns: their names. digest: of the content.
    """

    def __init__(self, flag: str, rows: Any, digest: str, names: Sequence[str] = ()) -> None:
        self.flag, self.rows, self.digest, self.names = flag, rows, digest, list(names)
        self.is_stream = isinstance(rows, datasets.IterableDataset)
        columns = rows.column_names
        self.columns: list[str] = list(next(iter(rows), {}) if columns is None else columns)
        if not self.is_stream and not len(rows):
            raise ValueError(f"{flag} must hold at least one record; got none in {', '.join(names) or 'it'}")

    @classmethod
    def of_rows(cls, flag: str, rows: list[dict[str, Any]]) -> Table:
        content = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        return cls(flag, datasets.Dataset.from_list(rows), content)

    @classmethod
    def open(
        cls,
        flag: str,
        names: Sequence[str],
        *,
        split: str = "train",
        sample_by: str | None = None,
        streaming: bool = False,
    ) -> Table:
        """Raises ValueError that names the flag and the file, or what `datasets` says of it."""
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} must name different files; got {', '.join(names)}")
        with _silent():
            if len(names) == 1 and Path(names[0]).is_dir():
                return cls._saved(flag, Path(names[0]), split, streaming)
            if len(names) == 1 and not Path(names[0]).exists() and re.fullmatch(r"[\w-]+(/[\w.-]+)?", names[0]):
                return cls._of_hub(flag, names[0], split, streaming)
            return cls._of_files(flag, names, sample_by, streaming)

    @classmethod
    def _saved(cls, flag: str, folder: Path, split: str, streaming: bool) -> Table:
        if not ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            inside = sorted(path.name for path in folder.iterdir())[:5]
            raise ValueError(
                f"{flag} must name files, or a folder as datasets' save_to_disk writes it; {folder} holds "
                f"{', '.join(inside) or 'nothing'}"
            )
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{flag}: datasets cannot read {folder}: {_first(error)}") from error
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                near = did_you_mean(split, found)
                raise ValueError(f"{flag}_split: {folder} has the splits {', '.join(found)}; got {split!r}{near}")
            found = found[split]
        digest = f"{found._fingerprint} {len(found)}"
        return cls(flag, found.to_iterable_dataset() if streaming else found, digest, [str(folder)])

    @classmethod
    def _of_hub(cls, flag: str, name: str, split: str, streaming: bool) -> Table:
        try:
            found = datasets.load_dataset(name, split=split, streaming=streaming)
        except Exception as error:
            raise ValueError(
                f"{flag}: there is no file {name}, and the hub gives no data set of this name: {_first(error)}"
            ) from error
        return cls(flag, found, f"{name} {split} {getattr(found, '_fingerprint', '')}", [name])

    @classmethod
    def _of_files(cls, flag: str, names: Sequence[str], sample_by: str | None, streaming: bool) -> Table:
        kinds = {name: _kind_of(flag, name, sample_by is not None) for name in names}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"{flag} must name files of one kind; got {', '.join(names)}")
        kind = kinds[names[0]]
        if sample_by is not None and kind != "text":
            raise ValueError(f"sample_by is for plain text; got it with {names[0]}")
        more: dict[str, Any] = {}
        if kind == "text":
            more = {"sample_by": sample_by or "line"}
        elif kind == "csv":
            # A cell is what stands there: "NA" or "null" is a word. A byte order mark is no part of a name.
            is_tabs = Path(_without_compression(names[0])).suffix == ".tsv"
            more = {"keep_default_na": False, "encoding": "utf-8-sig", "sep": "\t" if is_tabs else ","}
        paths = [os.path.abspath(name) for name in names]
        try:
            rows = datasets.load_dataset(
                kind, data_files=[_literal(path) for path in paths], split="train", streaming=streaming, **more
            )
            digest = hashlib.sha256(repr((kind, sorted(more.items()))).encode())
            for path in paths:
                add_file(digest, path)
            return cls(flag, rows, digest.hexdigest(), names)
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith(flag):
                raise
            for path in paths:
                if path.endswith(sources.LINES):
                    for _ in sources.records([path]):  # which says the line
                        pass
            said = error.__cause__ or error
            raise ValueError(f"{flag}: {', '.join(names)} cannot be read as {kind}: {_first(said)}") from error

    def column(self, flag: str, given: str | None, guesses: Sequence[str]) -> str:
        """The column that the user named, or the first of the guesses that is there."""
        if given is not None:
            self._check(flag, given)
            return given
        for name in guesses:
            if name in self.columns:
                return name
        raise ValueError(f"{flag} must say which column of {self.where} it is: {', '.join(self.columns)}")

    def pair(
        self, flags: tuple[str, str], given: tuple[str | None, str | None], guesses: Any
    ) -> tuple[str, str] | None:
        """Two columns that belong together: as the user named them, or the first guess of which both are there."""
        if given != (None, None):
            for flag, name in zip(flags, given, strict=True):
                if name is None:
                    raise ValueError(f"{flags[0]} and {flags[1]} go together; got no {flag}")
                self._check(flag, name)
            return given  # type: ignore[return-value]
        return next((pair for pair in guesses if pair[0] in self.columns and pair[1] in self.columns), None)

    def _check(self, flag: str, name: str) -> None:
        if name not in self.columns:
            raise ValueError(
                f"{flag}: {self.where} has no column {name!r}, but {', '.join(self.columns)}"
                f"{did_you_mean(name, self.columns)}"
            )

    @property
    def where(self) -> str:
        return f"{self.flag} ({', '.join(self.names)})" if self.names else self.flag


@dataclass
class Counts:
    """What came of the records."""

    samples: int = 0
    tokens: int = 0
    empty: int = 0  # records without a text
    truncated: int = 0  # samples that lost tokens
    lost: int = 0  # tokens
    unlearnable: int = 0  # samples left out, whose prompt alone fills the context
    max_length: int = 0
    is_stream: bool = False

    def sentence(self) -> str:
        found = f"{self.samples:,} samples, {self.tokens:,} tokens"
        if self.is_stream:
            found = f"a stream, of which were read: {found}"
        if self.truncated:
            found += f"; {self.truncated:,} cut to {self.max_length:,} tokens, which lost {self.lost:,}"
        if self.unlearnable:
            found += f"; {self.unlearnable:,} left out, whose prompt alone has {self.max_length:,} tokens or more"
        if self.empty:
            found += f"; {self.empty:,} empty ones left out"
        return found


@dataclass
class Prepared:
    """Samples to train on or to evaluate. collate makes batches for `Reptile` of a list of them."""

    samples: Any
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]]
    counts: Counts
    labels: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ language models


def language_model(
    table: Table,
    tokenizer: Any,
    *,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
    max_length: int,
    packing: bool = False,
) -> Prepared:
    """Samples {"input_ids", "labels", "sample_id"}: labels are the ids themselves at the same positions, −100 where
    nothing is to be learnt (prompts). Texts and completions end in the tokenizer's end-of-text token, if it has one,
    unless they are cut. `packing`: blocks of max_length tokens across the texts."""
    make = _maker(table, tokenizer, text_column, (prompt_column, completion_column), messages_column)
    return _prepare(table, make, max_length, _collate_tokens(tokenizer), packing)


_Made = tuple[list[int], list[int]]  # ids and labels of one record, not cut yet; no ids: an empty one


def _maker(
    table: Table, tokenizer: Any, text: str | None, pair: tuple[str | None, str | None], messages: str | None
) -> Callable[[dict[str, Any]], _Made]:
    forms = {"text_column": text, "prompt_column": pair[0] or pair[1], "messages_column": messages}
    given = [flag for flag, name in forms.items() if name is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different forms of a sample: give one")
    is_text = any(name in table.columns for name in _TEXT)
    found_pair = table.pair(("prompt_column", "completion_column"), pair, _PAIRS)
    is_messages = any(name in table.columns for name in _MESSAGES)
    if not given and is_text + (found_pair is not None) + is_messages > 1:
        raise ValueError(
            f"{table.where} has texts in more than one form ({', '.join(table.columns)}): say text_column, or "
            "prompt_column and completion_column, or messages_column"
        )
    if messages is not None or (not given and is_messages):
        column = table.column("messages_column", messages, _MESSAGES)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "messages_column: the tokenizer has no chat template: write the conversations out as text, or take "
                "the tokenizer of a chat model"
            )
        return lambda row: _of_messages(tokenizer, row[column], table)
    if found_pair is not None and text is None:
        prompt, completion = found_pair
        more = "input" if found_pair == ("instruction", "output") and "input" in table.columns else None
        return lambda row: _of_pair(tokenizer, _joined(table, row, prompt, more), _text(table, row, completion))
    column = table.column("text_column", text, _TEXT)
    return lambda row: _of_text(tokenizer, _text(table, row, column))


def _text(table: Table, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{table.where}: wanted text in {column!r}; got {type(value).__name__} {value!r:.60}")
    return value


def _joined(table: Table, row: Mapping[str, Any], column: str, more: str | None) -> str:
    """An instruction and its input, of data in Alpaca's form."""
    first = _text(table, row, column)
    second = "" if more is None else _text(table, row, more)
    return f"{first}\n\n{second}\n\n" if second else (f"{first}\n\n" if more is not None else first)


def _encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Without an end-of-text token, which is added where it belongs, and with one beginning, not two."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if ids and special and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if special and len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids


def _of_text(tokenizer: Any, text: str) -> _Made:
    if not text.strip():
        return [], []
    ids = _encode(tokenizer, text)
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    return ids, list(ids)


def _of_pair(tokenizer: Any, prompt: str, completion: str) -> _Made:
    if not completion.strip():
        return [], []
    start = _encode(tokenizer, prompt)
    whole = _encode(tokenizer, prompt + completion)
    # When the student is used, the prompt is tokenized alone: a token across the boundary would never be seen.
    ids = whole if whole[: len(start)] == start else start + _encode(tokenizer, completion, special=False)
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1] != eos:
        ids = [*ids, eos]
    return ids, [IGNORED] * len(start) + ids[len(start) :]


_ROLES = {"human": "user", "gpt": "assistant"}


def _of_messages(tokenizer: Any, messages: Any, table: Table) -> _Made:
    """The assistant's turns are learnt, each from all that stands before it."""
    if not messages:
        return [], []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{table.where}: wanted a list of messages with role and content; got {messages!r:.80}")
    turns = [_turn(message, table) for message in messages]
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _templated(tokenizer, turns[:i], True)
        after = _templated(tokenizer, turns[: i + 1], False)
        if before[: len(ids)] != ids or after[: len(before)] != before:
            raise ValueError(
                f"{table.where}: the chat template writes earlier turns otherwise once later ones follow, so that the "
                "assistant's part cannot be told; give prompt_column and completion_column"
            )
        labels += [IGNORED] * (len(before) - len(ids)) + after[len(before) :]
        ids = after
    return ids, labels


def _turn(message: Mapping[str, Any], table: Table) -> dict[str, str]:
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{table.where}: wanted messages with role and content; got {dict(message)!r:.80}")
    return {"role": _ROLES.get(role, role), "content": content}


def _templated(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _prepare(
    table: Table,
    make: Callable[[dict[str, Any]], _Made],
    max_length: int,
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]],
    packing: bool,
) -> Prepared:
    counts = Counts(max_length=max_length, is_stream=table.is_stream)

    def samples_of(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "sample_id", "lost", "kind")}
        names = list(batch)
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            ids, labels = make(dict(zip(names, values, strict=True)))
            lost = 0 if packing else max(0, len(ids) - max_length)
            kind = 0 if ids else 1
            if not packing:
                ids, labels = ids[:max_length], labels[:max_length]
                if ids and all(label == IGNORED for label in labels[1:]):
                    kind = 2
            for name, value in zip(found, (ids, labels, index, lost, kind), strict=True):
                found[name].append(value)
        return found

    rows = _mapped(table, samples_of)
    if table.is_stream:
        return Prepared(_Stream(rows, counts, max_length if packing else None), collate, counts)
    samples = _counted(table, rows, counts)
    if packing:
        with _silent():
            names = samples.rows.column_names
            packed = samples.rows.map(_Packer(max_length), batched=True, batch_size=None, remove_columns=names)
        if not len(packed):
            raise ValueError(f"{table.where} must hold at least max_length={max_length} tokens to be packed")
        samples = _Rows(packed)
        counts.samples, counts.tokens = len(packed), max_length * len(packed)
    return Prepared(samples, collate, counts)


class _Packer:
    """All texts, one after the other, cut into blocks."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [token for one in batch["input_ids"] for token in one]
        labels = [label for one in batch["labels"] for label in one]
        starts = range(0, len(ids) - self._length + 1, self._length)
        return {
            "input_ids": [ids[i : i + self._length] for i in starts],
            "labels": [labels[i : i + self._length] for i in starts],
            "sample_id": [i // self._length for i in starts],
        }


class _Rows(Dataset[dict[str, Any]]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(self.rows[i])


class _Stream(IterableDataset[dict[str, Any]]):
    """Samples as they are read, shuffled with those near them, another way in every pass."""

    def __init__(self, rows: Any, counts: Counts, packed: int | None) -> None:
        self._rows = rows.shuffle(seed=0, buffer_size=_BUFFER)
        self._counts, self._packed = counts, packed

    def set_epoch(self, epoch: int) -> None:
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._in_blocks() if self._packed is not None else self._kept()

    def _kept(self) -> Iterator[dict[str, Any]]:
        counts = self._counts
        for row in self._rows:
            counts.empty += row["kind"] == 1
            counts.unlearnable += row["kind"] == 2
            if row["kind"] == 0:
                counts.samples += 1
                counts.tokens += len(row["input_ids"])
                counts.truncated += row["lost"] > 0
                counts.lost += row["lost"]
                yield row

    def _in_blocks(self) -> Iterator[dict[str, Any]]:
        assert self._packed is not None
        ids: list[int] = []
        labels: list[int] = []
        number = 0
        for row in self._kept():
            ids += row["input_ids"]
            labels += row["labels"]
            while len(ids) >= self._packed:
                yield {"input_ids": ids[: self._packed], "labels": labels[: self._packed], "sample_id": number}
                ids, labels, number = ids[self._packed :], labels[self._packed :], number + 1


# ------------------------------------------------------------------------------------------------ classifiers


def label_names(table: Table, column: str | None) -> list[str]:
    """The labels of a table in order: as the data set names them, else sorted, numbers as numbers."""
    column = table.column("label_column", column, _LABEL)
    feature = (table.rows.features or {}).get(column)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if table.is_stream:
        raise ValueError(
            f"{table.flag}: the labels of a stream are not known before it ends: take a teacher that names them, or no "
            "streaming"
        )
    names = {_label_name(table, value) for value in table.rows.unique(column) if value is not None and value != ""}
    if len(names) < 2:
        raise ValueError(
            f"{table.where} must have at least two labels in {column!r}; got {', '.join(map(repr, names)) or 'none'}"
        )
    are_numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return sorted(names, key=int) if are_numbers else sorted(names)


def _label_name(table: Table, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if isinstance(value, (str, int)):
        return str(value)
    raise ValueError(
        f"{table.where}: a label must be a word or a whole number; got {type(value).__name__} {value!r:.60}"
    )


def classification(
    table: Table,
    tokenizers: tuple[Any, Any],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str],
    max_length: int,
    is_labelled: bool = True,
) -> Prepared:
    """Samples {"input_ids", "label", "sample_id", "text"} and, where the tokenizers (the student's, the teacher's) are
    two, "teacher_ids". `labels` are the names of the classes; data that have numbers mean their place among them.
    is_labelled=False: the label is 0, which is to have no weight."""
    text_column = table.column("text_column", text_column, [name for name in _TEXT if name != label_column])
    label_column = table.column("label_column", label_column, _LABEL) if is_labelled else text_column
    place = {name: i for i, name in enumerate(labels)}
    feature = (table.rows.features or {}).get(label_column)
    names_of = feature.names if isinstance(feature, datasets.ClassLabel) else None
    counts = Counts(max_length=max_length, is_stream=table.is_stream)
    student, teacher = tokenizers
    two = {} if teacher is student else {"teacher_ids": teacher}

    def class_of(value: Any, index: int) -> int:
        if not is_labelled:
            return 0
        name = names_of[value] if names_of is not None and isinstance(value, int) else _label_name(table, value)
        if name in place:
            return place[name]
        if name.isdigit() and int(name) < len(labels):
            return int(name)
        raise ValueError(
            f"{table.where}, record {index + 1}: label {name!r} is none of the {len(labels)} known: "
            f"{', '.join(labels[:20])}{did_you_mean(name, labels)}"
        )

    def samples_of(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", *two, "label", "sample_id", "lost", "kind", "text")
        }
        for index, text, label in zip(indices, batch[text_column], batch[label_column], strict=True):
            words = _text(table, {text_column: text}, text_column)
            is_empty = not words.strip() or label is None or label == ""
            ids = [] if is_empty else student(words, verbose=False)["input_ids"]
            lost = max(0, len(ids) - max_length)
            if lost:  # by the tokenizer, which keeps its special tokens
                ids = student(words, truncation=True, max_length=max_length)["input_ids"]
            values = [ids, *([] if is_empty else _cut(of, words, max_length) for of in two.values())]
            values += [-1 if is_empty else class_of(label, index), index, lost, int(is_empty), words[:200]]
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        return found

    rows = _mapped(table, samples_of)
    samples = _Stream(rows, counts, None) if table.is_stream else _counted(table, rows, counts)
    pads = {"input_ids": padding_of(student), **{name: padding_of(of) for name, of in two.items()}}

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = {}
        for name, pad in pads.items():
            ids = [sample[name] for sample in batch]
            inputs[name] = {"input_ids": padded(ids, pad), "attention_mask": mask_of(ids)}
        classes = torch.tensor([sample["label"] for sample in batch])
        if two:
            return {"student_inputs": inputs["input_ids"], "teacher_inputs": inputs["teacher_ids"], "labels": classes}
        return {**inputs["input_ids"], "labels": classes}

    return Prepared(samples, collate, counts, list(labels))


def _cut(tokenizer: Any, text: str, max_length: int) -> list[int]:
    found: list[int] = tokenizer(text, truncation=True, max_length=max_length, verbose=False)["input_ids"]
    return found


# ------------------------------------------------------------------------------------------------ translation


def translation(
    table: Table,
    tokenizer: Any,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    max_length: int,
) -> Prepared:
    """Samples {"input_ids", "labels", "sample_id", "source", "target"}: a text and what it is in the other language,
    each cut to max_length tokens. Of a column "translation" that holds both, the flags name the languages."""
    source, target = _languages(table, source_column, target_column)
    counts = Counts(max_length=max_length, is_stream=table.is_stream)

    def text_of(batch: Mapping[str, list[Any]], i: int, column: str) -> str:
        name, _, language = column.partition(".")
        value = batch[column][i] if column in batch else (batch[name][i] or {}).get(language)
        return _text(table, {column: value}, column)

    def samples_of(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            name: [] for name in ("input_ids", "labels", "sample_id", "lost", "kind", "source", "target")
        }
        for i, index in enumerate(indices):
            one, other = text_of(batch, i, source), text_of(batch, i, target)
            is_empty = not one.strip() or not other.strip()
            ids: list[int] = [] if is_empty else tokenizer(one, verbose=False)["input_ids"]
            labels: list[int] = [] if is_empty else tokenizer(text_target=other, verbose=False)["input_ids"]
            lost = max(0, len(ids) - max_length) + max(0, len(labels) - max_length)
            if lost:
                ids = _cut(tokenizer, one, max_length)
                labels = tokenizer(text_target=other, truncation=True, max_length=max_length)["input_ids"]
            for name, value in zip(found, (ids, labels, index, lost, int(is_empty), one, other), strict=True):
                found[name].append(value)
        return found

    rows = _mapped(table, samples_of)
    samples = _Stream(rows, counts, None) if table.is_stream else _counted(table, rows, counts)
    return Prepared(samples, _collate_tokens(tokenizer), counts)


def _languages(table: Table, source: str | None, target: str | None) -> tuple[str, str]:
    feature = (table.rows.features or {}).get("translation")
    if "translation" in table.columns and isinstance(feature, Mapping) and source not in table.columns:
        languages = list(feature)
        for flag, name in (("source_column", source), ("target_column", target)):
            if name not in languages:
                raise ValueError(
                    f"{flag} must be one of the languages of {table.where}: {', '.join(languages)}; got {name!r}"
                )
        return f"translation.{source}", f"translation.{target}"
    found = table.pair(("source_column", "target_column"), (source, target), _SOURCE_TARGET)
    if found is None:
        raise ValueError(
            f"source_column and target_column must say which columns of {table.where} are the two languages: "
            f"{', '.join(table.columns)}"
        )
    return found


def _mapped(table: Table, samples_of: Callable[..., dict[str, list[Any]]]) -> Any:
    with _silent():
        return table.rows.map(samples_of, batched=True, with_indices=True, remove_columns=table.columns)


def _counted(table: Table, rows: Any, counts: Counts) -> _Rows:
    """The rows that are samples; what became of the others is counted."""
    kinds, lost = (torch.tensor(rows.with_format("numpy")[name]) for name in ("kind", "lost"))
    counts.empty, counts.unlearnable = int((kinds == 1).sum()), int((kinds == 2).sum())
    cut = (lost > 0) & (kinds == 0)
    counts.truncated, counts.lost = int(cut.sum()), int(lost[cut].sum())
    if bool((kinds != 0).any()):
        rows = rows.select(torch.nonzero(kinds == 0).flatten().tolist())
    if not len(rows):
        raise ValueError(f"{table.where} must hold at least one sample to learn from; got {counts.sentence()}")
    rows = rows.remove_columns(["lost", "kind"])
    counts.samples = len(rows)
    counts.tokens = sum(map(len, rows.with_format("arrow")["input_ids"]))
    return _Rows(rows)


# ------------------------------------------------------------------------------------------------ batches


def padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, lists))
    return torch.tensor([[*one, *([value] * (longest - len(one)))] for one in lists])


def mask_of(lists: Sequence[Sequence[int]]) -> Tensor:
    """By length, not by id: the padding's id may be that of the end-of-text token, which is learnt."""
    return padded([[1] * len(one) for one in lists], 0)


def padding_of(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0  # whatever stands there is masked


def _collate_tokens(tokenizer: Any) -> Callable[[list[Mapping[str, Any]]], dict[str, Any]]:
    pad = padding_of(tokenizer)

    def collate(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": mask_of(ids),
            "labels": padded([sample["labels"] for sample in samples], IGNORED),
        }

    return collate


# ------------------------------------------------------------------------------------------------ reading


class _silent:  # noqa: N801 (used as a function)
    """`datasets` without its log and bars."""

    def __enter__(self) -> None:
        self._before = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        datasets.logging.set_verbosity(self._before[0])
        if self._before[1]:
            datasets.enable_progress_bars()


def _without_compression(name: str) -> str:
    name = name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _kind_of(flag: str, name: str, is_text: bool) -> str:
    if not Path(name).is_file():
        raise ValueError(f"{flag} must name files; there is no file {name}")
    if not Path(name).stat().st_size:
        raise ValueError(f"{flag}: {name} is empty")
    kind = _KINDS.get(Path(_without_compression(name)).suffix, "text" if is_text else None)
    if kind is None:
        raise ValueError(
            f"{flag} must name files that end in {', '.join(_KINDS)}, each also with {', '.join(_COMPRESSED)}; got "
            f"{name} (as plain text: say sample_by)"
        )
    return kind


def _literal(path: str) -> str:
    """`datasets` takes names for patterns."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"
