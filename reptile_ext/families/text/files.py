"""Records of files, of folders that `datasets` saved, of data sets on the hub; and which of their columns are meant.

Everything is read through Hugging Face's `datasets`: what is not streamed lies as Arrow files in its cache on disk, of
which only the pages that are used are in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas

from ...cache import sources
from ...cache.texts import COMPRESSED, KINDS, first_sentence, literal, without_its_log
from ...files import add_file
from ...words import did_you_mean

_KINDS = KINDS | {".csv": "csv", ".tsv": "csv", ".py": "text"}


class Table:
    """Records in order, of files, of a folder that `datasets` saved, or of a data set on the hub.

    Attributes:
        flag: what the user calls it, such as "train". names: of its files, as they were given.
        rows: a `datasets.Dataset`, or an IterableDataset of a stream, which is read again in every pass.
        columns: their names. digest: of the content.
    """

    def __init__(self, flag: str, rows: Any, digest: str, names: Sequence[str] = ()) -> None:
        self.flag, self.rows, self.digest, self.names = flag, rows, digest, list(names)
        self.is_stream = isinstance(rows, datasets.IterableDataset)
        self.columns: list[str] = list(rows.column_names or self.first())
        if not (self.first() if self.is_stream else len(rows)):
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
        """names: files of one kind, a folder of them, a folder as `save_to_disk` writes it, or a name on the hub.

        Raises ValueError that names the flag and the file, and says what was wanted or what `datasets` says of it."""
        if not names:
            raise ValueError(f"{flag} must name at least one file; got none")
        if len(set(names)) < len(names):
            raise ValueError(f"{flag} must name different files; got {', '.join(names)}")
        with silent():
            if len(names) == 1 and Path(names[0]).is_dir():
                folder = Path(names[0])
                if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                    return cls._saved(flag, folder, split, streaming)
                return cls._of_files(flag, _files_in(flag, folder), sample_by, streaming)
            if len(names) == 1 and not Path(names[0]).exists() and re.fullmatch(r"[\w-]+(/[\w.-]+)?", names[0]):
                return cls._of_hub(flag, names[0], split, streaming)
            return cls._of_files(flag, names, sample_by, streaming)

    @classmethod
    def _saved(cls, flag: str, folder: Path, split: str, streaming: bool) -> Table:
        try:
            found = datasets.load_from_disk(str(folder))
        except Exception as error:
            raise ValueError(f"{flag}: datasets cannot read {folder}: {said(error)}") from error
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                near = did_you_mean(split, found)
                raise ValueError(f"{flag}_split: {folder} has the splits {', '.join(found)}; got {split!r}{near}")
            found = found[split]
        found = found.with_format(None)  # which is saved, too: cells are wanted, not tensors
        digest = hashlib.sha256()
        for file in found.cache_files:
            add_file(digest, file["filename"])
        return cls(flag, found.to_iterable_dataset() if streaming else found, digest.hexdigest(), [str(folder)])

    @classmethod
    def _of_hub(cls, flag: str, name: str, split: str, streaming: bool) -> Table:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=10)  # `datasets` asks again and again, for half a minute
            found = datasets.load_dataset(name, split=split, streaming=streaming)
        except Exception as error:
            raise ValueError(
                f"{flag}: there is no file {name}, and the hub gives no data set of this name: {said(error)}"
            ) from error
        return cls(flag, found, f"{name} {split} {getattr(found, '_fingerprint', '')}", [name])

    @classmethod
    def _of_files(cls, flag: str, names: Sequence[str], sample_by: str | None, streaming: bool) -> Table:
        kinds = {_kind_of(flag, name, sample_by is not None) for name in names}
        suffixes = {Path(_without_compression(name)).suffix for name in names}
        if len(kinds) > 1 or suffixes == {".csv", ".tsv"}:
            raise ValueError(f"{flag} must name files of one kind; got {_some(names)}")
        kind = kinds.pop()
        if sample_by is not None and kind != "text":
            raise ValueError(f"sample_by is for plain text; got it with {names[0]}")
        paths = [os.path.abspath(name) for name in names]
        more: dict[str, Any] = {"data_files": [literal(path) for path in paths], "split": "train"}
        if kind != "parquet":
            more["encoding"] = "utf-8-sig" if kind != "json" else "utf-8"  # it drops a byte order mark itself
        if kind == "text":
            more["sample_by"] = sample_by or "line"
        try:
            if kind == "csv":
                # A cell is the text that stands there: "NA" is a word, and 007 is not 7.
                more |= {"keep_default_na": False, "sep": "\t" if suffixes == {".tsv"} else ","}
                header = _header(flag, paths, more["sep"], more["encoding"])
                more["features"] = datasets.Features({name: datasets.Value("string") for name in header})
            rows = datasets.load_dataset(kind, streaming=streaming, **more)
            digest = hashlib.sha256(f"{kind} {more.get('sep')} {more.get('sample_by')}".encode())
            for path in paths:
                add_file(digest, path)
            return cls(flag, rows, digest.hexdigest(), names)
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith(flag):
                raise
            if "corresponds to no data" in str(error):
                raise ValueError(f"{flag} must hold at least one record; got none in {_some(names)}") from None
            for path in paths:
                for _ in sources.records([path]) if path.endswith(sources.LINES) and not _is_array(path) else ():
                    pass  # which says the line
            raise ValueError(f"{flag}: {_some(names)} cannot be read as {kind}: {said(error)}") from error

    # ------------------------------------------------------------------------------------------- its columns

    def column(self, flag: str, given: str | None, guesses: Sequence[str]) -> str:
        """The column that the user named; else the first of the guesses, if it is there, or the only other one."""
        if given is not None:
            self.check(flag, given)
            return given
        found = [name for name in guesses if name in self.columns]
        if not found:
            raise ValueError(f"{flag} must say which column of {self.where} it is: {', '.join(self.columns)}")
        if len(found) > 1 and found[0] != guesses[0]:
            raise ValueError(f"{flag} must say which column of {self.where} it is; it may be {' or '.join(found)}")
        return found[0]

    def pair(
        self,
        flags: tuple[str, str],
        given: tuple[str | None, str | None],
        guesses: Sequence[tuple[str, str]],
    ) -> tuple[str, str] | None:
        """Two columns that belong together, likewise; None if there is no such pair."""
        if given != (None, None):
            for flag, name in zip(flags, given, strict=True):
                if name is None:
                    raise ValueError(f"{flags[0]} and {flags[1]} go together; got no {flag}")
                self.check(flag, name)
            if given[0] == given[1]:
                raise ValueError(f"{flags[0]} and {flags[1]} must be different columns; got {given[0]!r} for both")
            return given  # type: ignore[return-value]
        found = [pair for pair in guesses if pair[0] in self.columns and pair[1] in self.columns]
        if len(found) > 1 and found[0] != guesses[0]:
            which = " or ".join(f"{a} and {b}" for a, b in found)
            raise ValueError(f"{flags[0]} and {flags[1]} must say which columns of {self.where} they are; {which}")
        return found[0] if found else None

    def check(self, flag: str, name: str) -> None:
        """Raise a ValueError if there is no such column."""
        if name not in self.columns:
            raise ValueError(
                f"{flag}: {self.where} has no column {name!r}, but {', '.join(self.columns)}"
                f"{did_you_mean(name, self.columns)}"
            )

    def first(self) -> dict[str, Any]:
        """Its first record, or nothing."""
        return dict(next(iter(self.rows), {}))

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.flag} ({_some(self.names)})" if self.names else self.flag

    def record(self, index: int) -> str:
        """For messages, which count records from 1."""
        return f"{self.where}, record {index + 1}"


# ------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """`datasets` without its log and bars."""
    has_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with without_its_log(datasets):
            yield
    finally:
        if has_bars:
            datasets.enable_progress_bars()


def _without_compression(name: str) -> str:
    name = name.lower()
    for suffix in COMPRESSED:
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
            f"{flag} must name files that end in {', '.join(_KINDS)}, each also with {', '.join(COMPRESSED)}; got "
            f"{name} (as plain text: say sample_by)"
        )
    return kind


def _files_in(flag: str, folder: Path) -> list[str]:
    """Those of a folder that are data, in order of their names."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    names = [
        str(path) for path in found if Path(_without_compression(path.name)).suffix in _KINDS and path.stat().st_size
    ]
    if not names:
        raise ValueError(
            f"{flag} must name files, or a folder of files that end in {', '.join(_KINDS)}, or one as datasets' "
            f"save_to_disk writes it; {folder} holds {_some([path.name for path in found]) or 'nothing'}"
        )
    return names


def _header(flag: str, paths: Sequence[str], sep: str, encoding: str) -> list[str]:
    """The columns of .csv files, which `datasets` would take to be those of the first, whatever the others are."""
    headers = [list(pandas.read_csv(path, sep=sep, encoding=encoding, nrows=0)) for path in paths]
    if len(headers[0]) == 1 and (";" in headers[0][0] or "\t" in headers[0][0]):
        wanted = "commas (of a .tsv, tabs)"
        raise ValueError(
            f"{flag}: {paths[0]} must have {wanted} between its cells; its first line is {headers[0][0]!r}"
        )
    for path, header in zip(paths, headers, strict=True):
        if sorted(header) != sorted(headers[0]):
            raise ValueError(
                f"{flag} must name files of the same columns; {path} has {', '.join(header)}, and {paths[0]} has "
                f"{', '.join(headers[0])}"
            )
    return headers[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _is_array(path: str) -> bool:
    """Whether a .json file is one array and not an object a line."""
    if not path.endswith(".json"):
        return False
    with open(path, "rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def said(error: BaseException) -> str:
    """What a library says, in one line."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        error = error.__cause__ or error
    if isinstance(error, datasets.table.CastError):
        return "its files, or parts of them, have different columns, or values of different types in one"
    return first_sentence(error)
