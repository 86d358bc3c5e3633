"""Texts of files that are larger than memory, one by one, through Hugging Face's `datasets`: JSON lines, Parquet, plain
text, each also compressed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import checks
from ..files import add_file
from ..words import did_you_mean
from . import sources
from .format import SampleId, checked_id

SAMPLE_BY = ("line", "paragraph", "document")

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}


class Sample(NamedTuple):
    id: SampleId
    text: str


class Survey(NamedTuple):
    """What the files hold, read once before a model is loaded: what is wrong with them is said then."""

    samples: int
    empty: int
    characters: int
    digest: str  # of the content of all files and how it is cut into texts


class Texts:
    """The texts of `files`, in their order. A record's id is the value of `id_column`, or its number in all the files,
    from 0. Empty texts, and records without one, are left out.

    text_column   of JSON and Parquet files; None: "text", if there is one.
    sample_by     of plain text: what a sample is, a line, a paragraph or a document; None: a line.

    Raises ValueError that names the file and, where there is one, the record, what came and what was wanted."""

    def __init__(self, files: Any, text_column: str | None, id_column: str | None, sample_by: str | None) -> None:
        self.paths = [os.path.abspath(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
        self._datasets = _datasets()
        if not self.paths:
            raise ValueError("files must name at least one file; got none")
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"files must differ; got {', '.join(self.paths)}")
        if sample_by is not None:
            checks.one_of("sample_by", sample_by, SAMPLE_BY)
        self._sample_by = sample_by or "line"
        self._kinds = [_kind_of(path, sample_by is not None) for path in self.paths]
        for name, column in (("text_column", text_column), ("id_column", id_column)):
            if column is not None and "text" in self._kinds:
                path = self.paths[self._kinds.index("text")]
                raise ValueError(f"{name} has no meaning for plain text, which has no columns; got {column!r}: {path}")
        if sample_by is not None and "text" not in self._kinds:
            raise ValueError(f"sample_by is for plain text; got {self.paths[0]}")
        for path in self.paths:
            if not Path(path).is_file():
                raise ValueError(f"files must be files; there is no file {path}")
            if not Path(path).stat().st_size:
                raise ValueError(f"{path} is empty")
        self._text_column, self._id_column = text_column, id_column

    def survey(self, most: int) -> Survey:
        """Read all of it once. Of a text at most so many characters are counted."""
        samples = empty = characters = 0
        seen: dict[SampleId, str] = {}
        for path, number, sample_id, text in self._records():
            if self._id_column is not None:
                if sample_id in seen:
                    raise ValueError(f"{path}, record {number}: id {sample_id!r} is that of {seen[sample_id]}, too")
                if seen and type(sample_id) is not type(next(iter(seen))):
                    first = next(iter(seen))
                    raise ValueError(
                        f"{path}, record {number}: ids must all be numbers or all strings; got {first!r} and "
                        f"{sample_id!r}"
                    )
                seen[sample_id] = f"{path}, record {number}"
            samples += bool(text)
            empty += not text
            characters += min(len(text), most)
        if not samples:
            raise ValueError(f"files must hold at least one text; got {empty} empty ones in {', '.join(self.paths)}")
        about = [*map(_hash, self.paths), self._kinds, self._text_column, self._id_column, self._sample_by]
        return Survey(samples, empty, characters, hashlib.sha256(json.dumps(about).encode()).hexdigest())

    def __iter__(self) -> Iterator[Sample]:
        for _, _, sample_id, text in self._records():
            if text:
                yield Sample(sample_id, text)

    def _records(self) -> Iterator[tuple[str, int, SampleId, str]]:
        """(file, number in it from 1, id, text) of all records."""
        index = 0
        for path, kind in zip(self.paths, self._kinds, strict=True):
            column = ""
            for number, row in enumerate(self._rows(path, kind), 1):
                if not column:
                    column = "text" if kind == "text" else self._column(path, row)
                text = row.get(column)
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"{path}, record {number}: wanted text in {column!r}; got {type(text).__name__} {text!r:.60}"
                    )
                sample_id: SampleId = index
                if self._id_column is not None:
                    try:
                        sample_id = checked_id(row.get(self._id_column))
                    except (TypeError, ValueError) as error:
                        what = str(error).removeprefix("sample_id must be ")
                        raise ValueError(f"{path}, record {number}: {self._id_column!r} must be {what}") from None
                yield path, number, sample_id, text or ""
                index += 1

    def _column(self, path: str, row: dict[str, Any]) -> str:
        columns = ", ".join(row) or "none"
        for name, column in (("text_column", self._text_column), ("id_column", self._id_column)):
            if column is not None and column not in row:
                nearest = did_you_mean(column, row)
                raise ValueError(f"{name}: {path} has no column {column!r}, but {columns}{nearest}")
        if self._text_column is None and "text" not in row:
            raise ValueError(f"text_column must say which column of {path} has the texts: {columns}")
        return self._text_column or "text"

    def _rows(self, path: str, kind: str) -> Iterator[dict[str, Any]]:
        more = {"sample_by": self._sample_by} if kind == "text" else {}
        begun = False
        with without_its_log(self._datasets):
            try:
                rows = self._datasets.load_dataset(
                    kind, data_files=[literal(path)], split="train", streaming=True, **more
                )
                for row in rows:
                    begun = True
                    yield row
            except Exception as error:
                if not begun and isinstance(error, StopIteration):  # what `datasets` makes of a file without a record
                    return
                for _ in sources.records([path]) if path.endswith(sources.LINES) else ():
                    pass  # which says the line
                raise ValueError(f"{path} cannot be read as {kind}: {first_sentence(error)}") from error


def _kind_of(path: str, is_text: bool) -> str:
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    kind = KINDS.get(Path(name).suffix, "text" if is_text else None)
    if kind is None:
        raise ValueError(
            f"files must end in {', '.join(KINDS)}, each also with {', '.join(COMPRESSED)}; got {path} (as plain "
            "text: say sample_by)"
        )
    return kind


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("files of texts need the extra 'cache': pip install 'reptile_ext[cache]'") from None
    return datasets


@contextlib.contextmanager
def without_its_log(datasets: Any) -> Iterator[None]:
    """It logs what it raises."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def literal(path: str) -> str:
    """`datasets` takes names for patterns."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)


def first_sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()
