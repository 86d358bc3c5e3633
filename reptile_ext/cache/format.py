"""The cache on disk, format version 1, as docs/cache.md describes it: names, headers, checksums.

    manifest.json              what the folder is of; written once, by whichever writer comes first
    rows-00003-000012.cache    shard 12 of writer 3: a header, blocks of rows (one a sample), an index
    part-00003.json            writer 3 has finished; its shards with sizes and checksums

Every file is written under another name, flushed, and only then given its own: one that is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import TEMPORARY, flush

VERSION = 1
KINDS = ("top_k", "sampled", "logits", "hidden")
CODED = ("top_k", "sampled")  # rows of classes and log-probabilities; the others are rows of 16-bit values
DTYPES = ("coded", "float16", "bfloat16")
MAX_VOCAB_SIZE = 1 << 24
MAX_K = 4096
MAX_LOG_PROB_ERROR = 0.5  # of classes with a probability of 1e-4 and more, whatever max_kl is (csrc/cpu/cache.cpp)
MAGIC = b"RPTCACHE"
TEACHER = "teacher"  # a folder of whoever made the cache: no writer or reader looks into it
# What a manifest says, beside its format and version.
MANIFEST = (
    "kind", "k", "vocab_size", "temperature", "dtype", "max_kl", "max_log_prob_error",
    "teacher", "tokenizer", "data", "world_size",
)  # fmt: skip
SLACK = 8  # bytes that a decoder may read behind a block

# magic, version, kind, vocab_size, width, dtype, samples, rows, offset of the index, CRC-32 of blocks and of index,
# sum and worst of KL, worst log-probability error, sum of mass; then zeros, and the CRC-32 of all before it.
_HEADER = struct.Struct("<8sIIIIIIQQIIdddd")
HEADER_BYTES = 128

SampleId = int | str


class Statistics(NamedTuple):
    """What coding has cost, over rows."""

    sum_kl: float = 0.0
    worst_kl: float = 0.0
    worst_log_prob_error: float = 0.0
    sum_mass: float = 0.0

    def __add__(self, other: Any) -> Statistics:
        return Statistics(
            self.sum_kl + other.sum_kl,
            max(self.worst_kl, other.worst_kl),
            max(self.worst_log_prob_error, other.worst_log_prob_error),
            self.sum_mass + other.sum_mass,
        )


class Header(NamedTuple):
    """The first 128 bytes of a shard."""

    kind: int
    vocab_size: int
    width: int
    dtype: int
    samples: int
    rows: int
    index_offset: int
    crc_blocks: int
    crc_index: int
    statistics: Statistics

    def pack(self) -> bytes:
        packed = _HEADER.pack(MAGIC, VERSION, *self[:-1], *self.statistics).ljust(HEADER_BYTES - 4, b"\0")
        return packed + struct.pack("<I", zlib.crc32(packed))

    @classmethod
    def unpack(cls, data: bytes, path: Path) -> Header:
        if len(data) < HEADER_BYTES or zlib.crc32(data[: HEADER_BYTES - 4]) != _u32(data, HEADER_BYTES - 4):
            raise ValueError(f"{path} is altered or truncated: its header is not what was written")
        magic, version, *rest = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"{path} is no shard of a teacher cache of format version {VERSION}")
        fields: list[Any] = [*rest[:9], Statistics(*rest[9:])]
        return cls(*fields)


def _u32(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])


# ------------------------------------------------------------------------------------------------ ids of samples


def checked_id(sample_id: Any) -> SampleId:
    """A string, or a Python integer of 64 bits; NumPy's and torch's integers become one."""
    if isinstance(sample_id, str):
        return str(sample_id)
    if isinstance(sample_id, (bool, np.bool_)) or not hasattr(type(sample_id), "__index__"):
        raise TypeError(f"sample_id must be a string or an integer; got {type(sample_id).__name__} {sample_id!r}")
    try:
        number = operator.index(sample_id)
    except TypeError:  # a tensor or an array of another shape or dtype
        raise TypeError(f"sample_id must be a string or an integer; got {sample_id!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"sample_id must be a string or a 64-bit integer; got {number}")
    return number


def key_of(sample_id: SampleId) -> tuple[int, int, int]:
    """(0 for an integer or 1 for a string, key, check): 64 bits each. An integer is its own key; of a string they are
    the halves of a hash, so that an index need not hold the strings."""
    if isinstance(sample_id, int):
        return 0, sample_id & (2**64 - 1), 0
    key, check = struct.unpack(
        "<QQ", hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    )
    return 1, key, check


# ------------------------------------------------------------------------------------------------ shards


_COLUMNS = (("<u8", 1), ("<u8", 0), ("<u8", 0), ("<u4", 0), ("<u4", 1), ("<u1", 0))  # dtype, entries more than samples


class Index(NamedTuple):
    """Behind the blocks of a shard: where each sample's block lies, and what it is called."""

    offsets: np.ndarray[Any, Any]  # [n + 1] uint64, in the file; the last is the end of the last block
    keys: np.ndarray[Any, Any]  # [n] uint64
    checks: np.ndarray[Any, Any]  # [n] uint64
    rows: np.ndarray[Any, Any]  # [n] uint32
    name_offsets: np.ndarray[Any, Any]  # [n + 1] uint32, in `names`
    kinds: np.ndarray[Any, Any]  # [n] uint8: 0 an integer, 1 a string
    names: bytes  # of strings, in UTF-8

    def pack(self) -> bytes:
        columns = (np.ascontiguousarray(a, dtype=t) for a, (t, _) in zip(self[:-1], _COLUMNS, strict=True))
        return b"".join(column.tobytes() for column in columns) + self.names + bytes(SLACK)

    @classmethod
    def unpack(cls, data: bytes, samples: int) -> Index:
        columns: list[Any] = []
        at = 0
        for dtype, more in _COLUMNS:
            columns.append(np.frombuffer(data, dtype, samples + more, at))
            at += columns[-1].nbytes
        return cls(*[*columns, data[at : len(data) - SLACK]])

    def ids(self) -> Iterator[SampleId]:
        for i, kind in enumerate(self.kinds):
            if kind:
                yield self.names[self.name_offsets[i] : self.name_offsets[i + 1]].decode("utf-8", "surrogatepass")
            else:
                yield int(self.keys[i : i + 1].view("<i8")[0])


def index_of(ids: Sequence[SampleId], offsets: Sequence[int], rows: Sequence[int]) -> Index:
    kinds, keys, checks = zip(*map(key_of, ids), strict=True)
    names = [i.encode("utf-8", "surrogatepass") if isinstance(i, str) else b"" for i in ids]
    name_offsets = np.cumsum([0, *map(len, names)])
    return Index(
        np.array(offsets, "<u8"),
        np.array(keys, "<u8"),
        np.array(checks, "<u8"),
        np.array(rows, "<u4"),
        name_offsets.astype("<u4"),
        np.array(kinds, "<u1"),
        b"".join(names),
    )


def read_header_and_index(path: Path) -> tuple[Header, Index]:
    """Without the blocks between them."""
    with path.open("rb") as file:
        header = Header.unpack(file.read(HEADER_BYTES), path)
        file.seek(header.index_offset)
        data = file.read()
    if zlib.crc32(data) != header.crc_index:
        raise ValueError(f"{path} is altered or truncated: its index has another checksum than was written")
    return header, Index.unpack(data, header.samples)


def shard_name(rank: int, number: int) -> str:
    return f"rows-{rank:05d}-{number:06d}.cache"


def part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


# ------------------------------------------------------------------------------------------------ files


def create(path: Path, content: Sequence[bytes | bytearray | memoryview]) -> None:
    """Write a file that is whole or not there. One that is there is never written over: FileExistsError."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}")  # process numbers repeat on other machines
    try:
        with temporary.open("xb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:  # no hard links there
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV):
                raise
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def pack_json(value: dict[str, Any]) -> bytes:
    """With a checksum of the rest."""
    checksum = f"{zlib.crc32(_canonical(value)):08x}"
    return (json.dumps({**value, "checksum": checksum}, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        checksum = value.pop("checksum")
    except FileNotFoundError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is altered or truncated: it cannot be read ({error})") from None
    if not text.endswith("\n"):
        raise ValueError(f"{path} is truncated: it does not end with the end of a line")
    if checksum != f"{zlib.crc32(_canonical(value)):08x}":
        raise ValueError(f"{path} is altered: its content has another checksum than was written")
    return dict(value)


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no teacher cache: {path} is missing") from None
    if manifest.get("format") != "reptile_ext teacher cache":
        raise ValueError(f"{path} is not of a teacher cache")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {manifest.get('version')}; this version of reptile_ext reads version {VERSION}"
        )
    missing = [name for name in MANIFEST if name not in manifest]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}: it was not written as docs/cache.md says")
    return manifest
