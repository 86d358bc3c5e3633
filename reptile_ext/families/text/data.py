"""Samples made of records: of tokens for a language model, with a label, in pairs of languages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch

from ...words import did_you_mean
from .encoding import Encoder, Made, check_template, turns_of
from .files import Table
from .samples import (
    EMPTY,
    IGNORED,
    KEPT,
    UNLEARNABLE,
    Counts,
    Left,
    Prepared,
    collate_tokens,
    fingerprint_of,
    inputs_of,
    mask_of,
    notes_on_padding,
    padded,
    padding_of,
    prepare,
)

__all__ = [
    "IGNORED",
    "Counts",
    "Prepared",
    "Table",
    "classification",
    "label_names",
    "language_model",
    "mask_of",
    "padded",
    "padding_of",
    "translation",
]

# What columns are called in public data. The first is taken if it is there, the others only if it is one alone.
_TEXT = ("text", "content", "document", "sentence", "review", "body", "code")
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response")),
    *(("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "response"), ("problem", "solution"), ("input", "output"), ("source", "target")),
)
_MESSAGES = ("messages", "conversations", "conversation")
_LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "target")
_SOURCE_TARGET = (("source", "target"), ("src", "tgt"), ("source_text", "target_text"))
# Pairs whose names say that they are two utterances: a line break, which is learned, begins the second.
_UTTERANCES = _PAIRS[2:]
_OF_INSTRUCTION = ("input", "context")  # what an instruction is about, in a column of its own

_TOKENS = {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")}
_Form = tuple[list[str], Callable[[Mapping[str, Any]], Any], Callable[[list[Any]], Sequence[Made]]]


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
    nothing is to be learned (prompts, what others say in a conversation). Texts and completions end in the tokenizer's
    end-of-text token, if it has one, unless they are cut. sample_id is the number of the record, from 0.

    A completion is what follows the prompt as it stands, without anything between; of columns that hold two utterances
    by their names (instruction and output, question and answer), it begins with a line break. The prompt's tokens are
    those it has alone, as when the student is asked.

    packing: blocks of max_length tokens across the texts, in their order; sample_id is the pieces of a block,
    [[record, begin, end], …].

    Raises ValueError for columns that are not there or ambiguous, and records that are no texts; if nothing is left to
    learn from."""
    columns, read, encode = _form(table, tokenizer, text_column, (prompt_column, completion_column), messages_column)
    what = ["language-model", columns, max_length, packing]

    def made(parts: list[Any]) -> Iterator[dict[str, Any]]:
        for ids, labels in encode(parts):
            kind = KEPT if len(ids) > (0 if packing else 1) else EMPTY
            lost = 0 if packing else max(0, len(ids) - max_length)
            if not packing:
                ids, labels = ids[:max_length], labels[:max_length]
            if not packing and kind == KEPT and all(label == IGNORED for label in labels[1:]):
                kind = UNLEARNABLE
            yield {"input_ids": ids, "labels": labels, "lost": lost, "kind": kind}

    notes = [] if packing else notes_on_padding(tokenizer)
    counts = Counts(max_length=max_length, packed=0 if packing else None, notes=notes)
    samples = prepare(table, counts, columns, read, made, fingerprint_of(table, what, [tokenizer]), _TOKENS)
    return Prepared(samples, collate_tokens(tokenizer, packing), counts)


def _form(
    table: Table, tokenizer: Any, text: str | None, pair: tuple[str | None, str | None], messages: str | None
) -> _Form:
    """The columns of a sample, what takes its parts out of a record, and what makes tokens of many samples' parts."""
    forms = {"text_column": text, "prompt_column": pair[0] or pair[1], "messages_column": messages}
    given = [flag for flag, name in forms.items() if name is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different forms of a sample: give one")
    encoder = Encoder(tokenizer)
    is_text = any(name in table.columns for name in _TEXT)
    found_pair = None
    if not given or given == ["prompt_column"]:
        guesses = [one for one in _PAIRS if one[0] != "input" or "instruction" not in table.columns]
        found_pair = table.pair(("prompt_column", "completion_column"), pair, guesses)
    is_messages = any(name in table.columns for name in _MESSAGES)
    if not given and is_text + (found_pair is not None) + is_messages > 1:
        raise ValueError(
            f"{table.where} has texts in more than one form ({', '.join(table.columns)}): say text_column, or "
            "prompt_column and completion_column, or messages_column"
        )
    if messages is not None or (not given and is_messages):
        column = table.column("messages_column", messages, _MESSAGES)
        check_template(tokenizer, "messages_column")
        return [column], lambda row: encoder.conversation(turns_of(row[column], column)), list
    if found_pair is not None:
        return _form_of_pair(table, encoder, *found_pair)
    column = table.column("text_column", text, _TEXT)
    return [column], lambda row: _text(row, column) or Left(EMPTY), encoder.texts


def _form_of_pair(table: Table, encoder: Encoder, prompt: str, completion: str) -> _Form:
    if isinstance(table.first()[completion], list):  # conversations in two parts, as TRL has them
        check_template(encoder.tokenizer, "prompt_column")

        def conversation(row: Mapping[str, Any]) -> Any:
            before = turns_of(row[prompt], prompt)
            return encoder.conversation(before + turns_of(row[completion], completion), len(before))

        return [prompt, completion], conversation, list
    abouts = [name for name in _OF_INSTRUCTION if name in table.columns and prompt == "instruction"]
    between = "\n" if (prompt, completion) in _UTTERANCES else ""

    def read(row: Mapping[str, Any]) -> Any:
        asked, answer = _cell(row, prompt), _text(row, completion)
        for about in abouts:
            asked += f"\n\n{_text(row, about)}" if _text(row, about) else ""
        return (asked, between + answer) if answer else Left(EMPTY)

    return [prompt, completion, *abouts], read, encoder.pairs


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"wanted text in {column!r}; got {type(value).__name__} {value!r:.60}")
    return value or ""


def _text(row: Mapping[str, Any], column: str) -> str:
    """Nothing of a cell that holds white space alone, of which nobody learns."""
    value = _cell(row, column)
    return value if value.strip() else ""


# ------------------------------------------------------------------------------------------------ classifiers


def classification(
    table: Table,
    tokenizers: Sequence[Any],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int,
    is_labelled: bool = True,
) -> Prepared:
    """Samples {"input_ids", "label", "sample_id", "text"}, and "teacher_ids" where the tokenizers are two; "text" is
    the beginning of the text, to show it. Batches have "labels" [B] int64 and, of two tokenizers, "student_inputs" and
    "teacher_inputs".

    tokenizers   the student's and the teacher's, which may be the same.
    labels       names of the classes in the models' order. A record has one of the names or, unless the names are whole
                 numbers themselves, the number of one, from 0. None: `label_names`.
    is_labelled  False: the label is 0, which is to have no weight.

    Raises ValueError that names the record for a label that is none of these, missing, not whole or a list; for data of
    fewer than two classes, but to evaluate; if nothing is left to learn from."""
    guesses = [name for name in _TEXT if name != label_column]
    text = table.column("text_column", text_column, guesses)
    label = _label_column(table, label_column, text) if is_labelled else None
    cells = None if label is None else _Labels(table, label)
    classes = list(labels) if labels is not None else label_names(table, label)
    class_of = None if cells is None else cells.classes(classes)
    student, teacher = (*tokenizers, *tokenizers)[:2]
    of = {"input_ids": student} | ({} if teacher is student else {"teacher_ids": teacher})

    def read(row: Mapping[str, Any]) -> Any:
        words = _text(row, text)
        if not words:
            return Left(EMPTY)
        return words, 0 if class_of is None or label is None else class_of(row[label])

    def made(parts: list[Any]) -> Iterator[dict[str, Any]]:
        texts = [words for words, _ in parts]
        tokens = {name: _cut(tokenizer, texts, max_length) for name, tokenizer in of.items()}
        for i, (words, number) in enumerate(parts):
            ids = {name: found[i][0] for name, found in tokens.items()}
            lost = max(found[i][1] for found in tokens.values())
            kind = KEPT if all(ids.values()) else EMPTY
            yield {**ids, "label": number, "text": words[:_SHOWN], "lost": lost, "kind": kind}

    counts = Counts(max_length=max_length, side=_side(student), notes=notes_on_padding(student))
    features = {
        **{name: datasets.List(datasets.Value("int32")) for name in of},
        "label": datasets.Value("int64"),
        "text": datasets.Value("string"),
    }
    what = ["classification", text, label, classes, max_length]
    columns = [text, *([label] if label is not None else [])]
    samples = prepare(table, counts, columns, read, made, fingerprint_of(table, what, list(of.values())), features)
    if label is not None and not table.is_stream:
        _check_classes(table, classes, samples.numbers("label"), counts)

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = [inputs_of([sample[name] for sample in batch], tokenizer) for name, tokenizer in of.items()]
        named = inputs[0] if len(of) == 1 else {"student_inputs": inputs[0], "teacher_inputs": inputs[1]}
        return {**named, "labels": torch.tensor([sample["label"] for sample in batch])}

    return Prepared(samples, collate, counts, classes)


_SHOWN = 200  # characters of a text


def label_names(table: Table, column: str | None) -> list[str]:
    """The classes of a table in order: as the data set names them; else what its records say, whole numbers by size,
    words by the alphabet. Raises ValueError for fewer than two, records without a label, and streams."""
    column = _label_column(table, column)
    names = _Labels(table, column).names()
    if len(names) < 2:
        got = f"only {names[0]!r}" if names else "no label"
        raise ValueError(f"{table.where} must have at least two classes in {column!r}; got {got}")
    return names


def _label_column(table: Table, given: str | None, text: str | None = None) -> str:
    found = table.column("label_column", given, [name for name in _LABEL if name != text])
    if found == text:
        raise ValueError(f"text_column and label_column must be different columns; got {text!r} for both")
    return found


class _Labels:
    """What the cells of a column say."""

    def __init__(self, table: Table, column: str) -> None:
        self._table, self._column = table, column
        feature = (table.rows.features or {}).get(column)
        self._names: list[str] | None = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def names(self) -> list[str]:
        if self._names is not None:
            return self._names
        if self._table.is_stream:
            raise ValueError(
                f"{self._table.flag}: the labels of a stream are not known before it ends: take a teacher that names "
                "them, or no streaming"
            )
        found: set[str] = set()
        for start, batch in enumerate(self._table.rows.select_columns([self._column]).iter(1000)):
            for i, value in enumerate(batch[self._column]):
                if value is None or value == "":  # an error where there is a text
                    continue
                try:
                    found.add(self._name(value))
                except ValueError as error:
                    raise ValueError(f"{self._table.record(1000 * start + i)}: {error}") from error
        return sorted(found, key=int if all(map(_is_whole, found)) else None)

    def classes(self, labels: Sequence[str]) -> Callable[[Any], int]:
        """What makes a class of a cell."""
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels must differ; got {', '.join(labels)}")
        places = {name: i for i, name in enumerate(labels)}
        has_no_names = all(re.fullmatch(r"LABEL_\d+", name) for name in labels)  # which transformers makes up
        if has_no_names and self._names is not None:
            places |= {name: i for i, name in enumerate(self._names[: len(labels)])}
        if not all(map(_is_whole, labels)):  # else a number is a name
            places = {**{str(i): i for i in range(len(labels))}, **places}
            if len(labels) == 2:
                places = {"false": 0, "true": 1, **places}

        def class_of(value: Any) -> int:
            name = self._name(value)
            if name not in places:
                known = ", ".join(labels[:20]) + (", …" if len(labels) > 20 else "")
                near = did_you_mean(name, labels)
                raise ValueError(f"label {name!r} in {self._column!r} is none of {known}{near}")
            return places[name]

        return class_of

    def _name(self, value: Any) -> str:
        """Of a cell; a whole number is the same, whatever its type."""
        if isinstance(value, (list, tuple, Mapping)):
            raise ValueError(f"wanted one label in {self._column!r}; got {value!r:.60}: several are not supported")
        if value is None or value == "" or value != value:
            raise ValueError(f"there is no label in {self._column!r}; got {value!r}")
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            if self._names is None:
                return str(value)
            if 0 <= value < len(self._names):
                return self._names[value]
            raise ValueError(f"there is no label in {self._column!r}; got {value!r}")
        if isinstance(value, str):
            return re.sub(r"\A(-?\d+)\.0+\Z", r"\1", value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        raise ValueError(f"a label in {self._column!r} must be a word or a whole number; got {value!r:.60}")


def _is_whole(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def _check_classes(table: Table, names: Sequence[str], numbers: Any, counts: Counts) -> None:
    there = set(numbers.tolist())
    missing = [name for i, name in enumerate(names) if i not in there]
    if len(there) < 2 and table.flag != "eval":
        raise ValueError(f"{table.where} must have samples of at least two classes; got only {names[there.pop()]!r}")
    alike = {unicodedata.normalize("NFKC", name).strip().casefold() for name in names}
    if len(alike) < len(names):
        counts.notes.append("some classes differ by case or white space alone")
    if missing:
        counts.notes.append(f"none of class {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}")


# ------------------------------------------------------------------------------------------------ translation


def translation(
    table: Table,
    tokenizer: Any,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    max_length: int,
    decoder_start_token_id: int | None = None,
) -> Prepared:
    """Samples {"input_ids", "labels", "sample_id", "source", "target"}; labels are −100 at padding. Targets end in the
    end-of-text token, if the tokenizer has one, unless they are cut. The columns may be languages of a column
    "translation" that holds mappings, as WMT's data have it.

    decoder_start_token_id: of the models' configuration. With it, batches have "decoder_input_ids": the labels, one
    position later, as models make them of labels.

    Raises ValueError for columns that are not there or ambiguous; if nothing is left to learn from."""
    columns, both = _languages(table, source_column, target_column)
    eos = tokenizer.eos_token_id

    def read(row: Mapping[str, Any]) -> Any:
        source, target = both(row)
        return (source, target) if source and target else Left(EMPTY)

    def made(parts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        sources = _cut(tokenizer, [source for source, _ in parts], max_length)
        targets = tokenizer(text_target=[target for _, target in parts], verbose=False)["input_ids"] if parts else []
        for (source, target), (ids, lost), labels in zip(parts, sources, targets, strict=True):
            if eos is not None and eos not in labels[1:]:
                labels = [*labels, eos]
            lost += max(0, len(labels) - max_length)
            tokens = {"input_ids": ids, "labels": labels[:max_length]}
            kind = KEPT if ids and labels else EMPTY
            yield {**tokens, "source": source, "target": target, "lost": lost, "kind": kind}

    counts = Counts(max_length=max_length, side=_side(tokenizer), notes=notes_on_padding(tokenizer))
    features = _TOKENS | {name: datasets.Value("string") for name in ("source", "target")}
    what = ["translation", columns, source_column, target_column, max_length]
    samples = prepare(table, counts, columns, read, made, fingerprint_of(table, what, [tokenizer]), features)
    of_tokens = collate_tokens(tokenizer)

    def collate(batch: list[Mapping[str, Any]]) -> dict[str, Any]:
        found = of_tokens(batch)
        if decoder_start_token_id is not None:
            shifted = found["labels"].roll(1, 1)
            shifted[:, 0] = decoder_start_token_id
            found["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, padding_of(tokenizer))
        return found

    return Prepared(samples, collate, counts)


def _languages(
    table: Table, source: str | None, target: str | None
) -> tuple[list[str], Callable[[Mapping[str, Any]], tuple[str, str]]]:
    """The columns that are needed, and what takes a pair of texts out of a record."""
    flags = ("source_column", "target_column")
    nested = table.first().get("translation")
    if not isinstance(nested, Mapping) or (source in table.columns and target in table.columns):
        pair = table.pair(flags, (source, target), _SOURCE_TARGET)
        if pair is None:
            raise ValueError(
                f"source_column and target_column must say which columns of {table.where} they are: "
                f"{', '.join(table.columns)}"
            )
        a, b = pair
        return [a, b], lambda row: (_text(row, a), _text(row, b))
    if source is None or target is None or source == target:
        raise ValueError(
            f"source_column and target_column must say which languages of {table.where} they are: {', '.join(nested)}"
        )
    for flag, name in zip(flags, (source, target), strict=True):
        if name not in nested:
            raise ValueError(
                f"{flag}: translation of {table.where} has no {name!r}, but {', '.join(nested)}"
                f"{did_you_mean(name, nested)}"
            )

    def both(row: Mapping[str, Any]) -> tuple[str, str]:
        languages = row["translation"] or {source: None, target: None}
        return _text(languages, source), _text(languages, target)

    return ["translation"], both


def _cut(tokenizer: Any, texts: list[str], max_length: int) -> list[tuple[list[int], int]]:
    """Ids with the tokenizer's special tokens, cut by the tokenizer, which keeps these, and how many were lost."""
    if not texts:
        return []
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ValueError(f"max_length must be more than the tokenizer's {special} special tokens; got {max_length}")
    found: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    lost = [max(0, len(ids) - max_length) for ids in found]
    long = [i for i, count in enumerate(lost) if count]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        for i, ids in zip(long, cut, strict=True):
            found[i] = ids
    return list(zip(found, lost, strict=True))


def _side(tokenizer: Any) -> str:
    return "beginning" if tokenizer.truncation_side == "left" else "end"
