"""Records of files that are larger than memory, one by one: JSON lines, plain or gzipped, Parquet, standard input."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


class Record(NamedTuple):
    value: dict[str, Any]
    file: str
    unit: str  # "line" or "row"
    number: int  # of the line, counted from 1 as editors do, or of the row of a Parquet file, likewise
    bytes: int  # read of all files so far


def checked(files: Any) -> list[str]:
    """The paths as strings. Raises before anything is read if one cannot be."""
    paths = [os.fspath(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not paths:
        raise ValueError("files must name at least one file; got none")
    if len(set(paths)) < len(paths):
        raise ValueError(f"files must differ; got {', '.join(paths)}")
    for path in paths:
        if path == "-":
            continue
        if not Path(path).is_file():
            raise ValueError(f"files must be files or - for standard input; there is no file {path}")
        if not path.endswith((*LINES, ".parquet")):
            raise ValueError(f"files must end in {', '.join(LINES)} or .parquet; got {path}")
        if path.endswith(".parquet"):
            _parquet()
    return paths


def total_bytes(paths: Sequence[str]) -> int | None:
    """None where nobody knows, as of standard input."""
    return None if "-" in paths else sum(Path(path).stat().st_size for path in paths)


def records(paths: Sequence[str]) -> Iterator[Record]:
    before = 0
    for path in paths:
        if path == "-":
            yield from _lines(sys.stdin.buffer, None, "standard input", before)
        elif path.endswith(".parquet"):
            yield from _rows(path, before)
        else:
            with open(path, "rb") as raw:
                yield from _lines(gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw, raw, path, before)
        before += 0 if path == "-" else Path(path).stat().st_size


def _lines(lines: Any, raw: Any, name: str, before: int) -> Iterator[Record]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                cut = "" if line.endswith(b"\n") else "; the file ends within this line"
                raise ValueError(f"{name}, line {number}: wanted one JSON object a line; {error}{cut}") from error
            if not isinstance(value, dict):
                raise ValueError(f"{name}, line {number}: wanted one JSON object a line; got {type(value).__name__}")
            yield Record(value, name, "line", number, before + (raw.tell() if raw is not None else 0))
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is damaged or cut short after line {number}: {error}") from error


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet files need the extra 'cache': pip install 'reptile_ext[cache]'") from None
    return pyarrow


def _rows(path: str, before: int) -> Iterator[Record]:
    pyarrow = _parquet()
    size, number = Path(path).stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=16):  # few: a row is a whole sequence
                for value in batch.to_pylist():
                    number += 1
                    yield Record(value, path, "row", number, before + size * number // total)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file (after row {number}): {error}") from error
