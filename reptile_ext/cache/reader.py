"""Reading a cache: memory-mapped, without locks, from as many processes and threads as there are."""

from __future__ import annotations

import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C, checks
from . import format as fmt
from .format import SampleId, Statistics
from .writer import NAMES, CacheWriter

_MAPPED = 256  # shards that are mapped at once: each costs a file descriptor

# A sample, or parts of samples after one another: (sample_id, begin, end).
Samples = SampleId | Sequence[tuple[SampleId, int, int]]


class TeacherCache:
    """A teacher's answers in a folder, found by sample and position.

        with TeacherCache.write(folder, vocab_size=V, k=64, teacher="…") as writer:
            for sample_id, ids in samples:
                log_probs, indices = teacher(ids).log_softmax(-1).topk(64)      # [T, 64] each
                writer.add(sample_id, indices, log_probs)
        cache = TeacherCache.open(folder, vocab_size=V, teacher="…")
        indices, log_probs = cache[sample_id]                                   # [T, 64] int64 and float32

    What it takes on disk, how exact it is and how it is laid out: docs/cache.md. Reading is thread-safe, goes on in
    forked processes, and a pickled cache opens the folder again where it is unpickled.
    """

    @staticmethod
    def write(
        folder: str | os.PathLike[str],
        *,
        vocab_size: int,
        kind: str = "top_k",
        k: int = 64,
        temperature: float = 1.0,
        teacher: str | None = None,
        tokenizer: str | None = None,
        data: str | None = None,
        max_kl: float = 1e-3,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        resume: bool = False,
        shard_bytes: int = 1 << 26,
        flush_seconds: float = 600.0,
    ) -> CacheWriter:
        """A writer for `folder`, to be used in a `with` statement.

        kind           "top_k": the teacher's largest `k` of `vocab_size` log-probabilities, at `temperature`.
                       "sampled": as many drawn classes, each once, with the logarithms of their weights.
                       "logits": [T, V] logits in 16 bits. "hidden": [T, H] hidden states in 16 bits.
        teacher, tokenizer, data   names or hashes, which `open` compares.
        max_kl         nats that coding may cost a position, for "top_k" and "sampled": kept by every row.
        dtype          of "logits" (default float16) and "hidden" (default bfloat16).
        rank, world_size   which of how many writers this is; default: torchrun's, else 0 of 1. Each has its own files,
                       and the folder is complete when all of them have closed.
        resume         go on where a writer of this rank stopped; what it had flushed is there. Also for a new folder.
        shard_bytes, flush_seconds   a shard is written when so many bytes or seconds have come together.

        Raises ValueError if the folder holds rows of this rank and not `resume`, or was begun with other settings, if
        another writer has this rank, and for a shard that is damaged.
        """
        return CacheWriter(
            folder,
            vocab_size=vocab_size,
            kind=kind,
            k=k,
            temperature=temperature,
            teacher=teacher,
            tokenizer=tokenizer,
            data=data,
            max_kl=max_kl,
            dtype=dtype,
            rank=rank,
            world_size=world_size,
            resume=resume,
            shard_bytes=shard_bytes,
            flush_seconds=flush_seconds,
        )

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        vocab_size: int | None = None,
        temperature: float | None = None,
        teacher: str | None = None,
        tokenizer: str | None = None,
        data: str | None = None,
        duplicates: str = "error",
        verify: bool = True,
    ) -> TeacherCache:
        """The finished cache in `folder`.

        duplicates   of a sample that two ranks have written: "error", or "first" to take that of the lower rank. A
                     DistributedSampler, which gives some samples twice so that all ranks have as many, makes such;
                     but so do ranks that number different samples alike, whose rows would be mixed up.
        verify       compare a shard's checksum when its first row is asked for in a process, for which it is read
                     whole. False: of a cache that has been verified, and is larger than what a process reads of it.

        Raises ValueError if what is given differs from what the cache was written with (it names which), if the folder
        is not finished (and which writers are missing), or if a file is missing, truncated or altered (and which). The
        rows of a shard are checked when the first of them is asked for, and by `verify`."""
        return cls(folder, {
            "vocab_size": vocab_size,
            "temperature": temperature,
            "teacher": teacher,
            "tokenizer": tokenizer,
            "data": data,
        }, duplicates, verify)  # fmt: skip

    def __init__(
        self,
        folder: str | os.PathLike[str],
        expected: dict[str, Any],
        duplicates: str = "error",
        verify: bool = True,
    ) -> None:
        checks.one_of("duplicates", duplicates, ("error", "first"))
        if not isinstance(verify, bool):
            raise TypeError(f"verify must be True or False; got {verify!r}")
        self.folder = Path(os.path.abspath(folder))
        self._expected = expected
        self._duplicates, self._verify = duplicates, verify
        self._manifest = fmt.read_manifest(self.folder)
        for name, value in expected.items():
            if value is not None and self._manifest[name] != value:
                raise ValueError(
                    f"{name}: the cache in {self.folder} was written with {self._manifest[name]!r}; asked for {value!r}"
                )
        self.kind: str = self._manifest["kind"]
        self.vocab_size: int = self._manifest["vocab_size"]
        self.temperature: float = self._manifest["temperature"]
        self._parts = _read_parts(self.folder, self._manifest["world_size"])
        self._shards = [shard for part in self._parts for shard in part["shards"]]
        widths = {part["width"] for part in self._parts if part["samples"]}
        if len(widths) > 1:
            raise ValueError(f"{self.folder}: writers disagree on the width of a row: {sorted(widths)}")
        self._width: int = widths.pop() if widths else self._parts[0]["width"]
        self._index = _LookUp(self.folder, self._shards, duplicates == "first")
        self._mapped: dict[int, mmap.mmap] = {}
        self._verified: set[int] = set()

    def __reduce__(self) -> Any:
        return TeacherCache, (self.folder, self._expected, self._duplicates, self._verify)

    # ------------------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, sample_id: Any) -> bool:
        return self._index.find(fmt.checked_id(sample_id)) >= 0

    def __iter__(self) -> Iterator[SampleId]:
        """The ids of all samples, in the order of the files."""
        for number, shard in enumerate(self._shards):
            for sample_id in fmt.read_header_and_index(self.folder / shard["name"])[1].ids():
                if self._duplicates == "error" or self._index.shards[self._find(sample_id)] == number:
                    yield sample_id

    def positions(self, sample_id: SampleId) -> int:
        """How many positions a sample has."""
        return int(self._index.rows[self._find(sample_id)])

    def __getitem__(self, sample_id: SampleId) -> Any:
        """All positions of a sample: (indices [T, K] int64, log_probs [T, K] float32), ids in ascending order, padded
        by -1 and -inf; for "logits" and "hidden" the values, [T, V] or [T, H], in the dtype they are kept in.
        KeyError names a sample that is not there."""
        return self.get(sample_id)

    def get(self, sample_id: SampleId, begin: int = 0, end: int | None = None) -> Any:
        """Positions `begin` … `end - 1` of a sample; by default all."""
        place, begin, end = self._range(sample_id, begin, end)
        if self.kind not in fmt.CODED:
            values = torch.empty(end - begin, self._width, dtype=self._dtype)
            self._read_values(place, begin, end, values)
            return values
        indices = torch.empty(end - begin, self._width, dtype=torch.int64)
        log_probs = torch.empty(end - begin, self._width, dtype=torch.float32)
        self._read_rows(place, begin, end, indices, log_probs)
        return indices, log_probs

    def batch(self, samples: Sequence[Samples], length: int | None = None) -> Any:
        """A batch, decoded in place: (indices [B, T, K], log_probs [B, T, K]), or values [B, T, …].

        Each of `samples` is an id, or for packed sequences a list of (id, begin, end). T is `length`, or that of the
        longest; what is shorter is filled with -1 and -inf, values with 0; longer ones are an error. In a DataLoader's
        `collate_fn` this runs in the workers, ahead of the training step."""
        rows = [self._pieces(sample) for sample in samples]
        lengths = [sum(end - begin for _, begin, end in pieces) for pieces in rows]
        if length is None:
            length = max(lengths, default=0)
        elif max(lengths, default=0) > length:
            at = max(range(len(lengths)), key=lengths.__getitem__)
            raise ValueError(f"length must be at least that of the longest sample, {lengths[at]}; got {length}")
        shape = (len(rows), length, self._width)
        coded = self.kind in fmt.CODED
        outputs = (
            (torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32))
            if coded
            else (torch.empty(shape, dtype=self._dtype),)
        )
        for i, pieces in enumerate(rows):
            at = 0
            for place, begin, end in pieces:
                out = [x[i, at : at + end - begin] for x in outputs]
                self._read_rows(place, begin, end, *out) if coded else self._read_values(place, begin, end, *out)
                at += end - begin
            for x, filling in zip(outputs, (-1, -torch.inf) if coded else (0,), strict=True):
                x[i, at:] = filling
        return outputs if coded else outputs[0]

    def collate(self, collate_fn: Callable[[list[Any]], Any] | None = None) -> Any:
        """A `collate_fn` for a DataLoader that decodes the cache's rows in the workers, for `Reptile` and `Objective`.

        Every sample is a mapping with a "sample_id", its id in the cache or, where it is part of a sample or packed, a
        list of (id, begin, end). The rest of it goes to `collate_fn` (default: torch's), which has to return a mapping;
        "sample_id" and "teacher_rows", which is `cache.batch` of these ids, are added to that."""
        from .batches import Collate

        return Collate(self, collate_fn)

    def _pieces(self, sample: Samples) -> list[tuple[int, int, int]]:
        """(place, begin, end) of what a sample is made of."""
        pieces = [(sample, 0, None)] if isinstance(sample, str) or not isinstance(sample, Sequence) else sample
        if not all(isinstance(piece, (tuple, list)) and len(piece) == 3 for piece in pieces):
            raise ValueError(f"sample_id must be an id or a list of (id, begin, end); got {sample!r}")
        return [self._range(*piece) for piece in pieces]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._manifest["dtype"])
        return dtype

    def _find(self, sample_id: Any) -> int:
        sample_id = fmt.checked_id(sample_id)
        place = self._index.find(sample_id)
        if place < 0:
            raise KeyError(f"sample {sample_id!r} is not in the cache in {self.folder}")
        return place

    def _range(self, sample_id: Any, begin: int, end: int | None) -> tuple[int, int, int]:
        place = self._find(sample_id)
        rows = int(self._index.rows[place])
        begin = checks.integer_of("begin", begin)
        end = rows if end is None else checks.integer_of("end", end)
        if not 0 <= begin <= end <= rows:
            raise IndexError(f"sample {sample_id!r} has positions 0 … {rows}; asked for {begin} … {end}")
        return place, begin, end

    def _read_rows(self, place: int, begin: int, end: int, indices: Tensor, log_probs: Tensor) -> None:
        index = self._index
        shard = int(index.shards[place])
        error, row = _C.cache_decode(
            self._map(shard),
            int(index.begins[place]),
            int(index.sizes[place]),
            int(index.rows[place]),
            begin,
            end,
            self._width,
            self.vocab_size,
            indices.data_ptr(),
            log_probs.data_ptr(),
        )
        if error:
            raise ValueError(f"{self._path(shard)}: position {row} of a sample cannot be decoded")

    def _read_values(self, place: int, begin: int, end: int, values: Tensor) -> None:
        offset = int(self._index.begins[place]) + begin * self._width * 2
        count = (end - begin) * self._width
        if count:
            found = np.frombuffer(self._map(int(self._index.shards[place])), np.int16, count, offset)
            values.view(torch.int16).numpy()[...] = found.reshape(values.shape)

    def _path(self, shard: int) -> Path:
        return self.folder / str(self._shards[shard]["name"])

    def _map(self, shard: int) -> mmap.mmap:
        """The shard's bytes; the first time, after a look at all of them."""
        memory = self._mapped.get(shard)
        if memory is None:
            memory = _map_file(self._path(shard), self._shards[shard]["bytes"])
            if self._verify and shard not in self._verified:
                self._check_sum(shard, memory)
            while len(self._mapped) >= _MAPPED:  # not closed here: another thread may be reading it
                self._mapped.pop(next(iter(self._mapped), -1), None)
            self._mapped[shard] = memory
        return memory

    def _check_sum(self, shard: int, memory: mmap.mmap) -> None:
        if f"{zlib.crc32(memory):08x}" != self._shards[shard]["crc32"]:
            raise ValueError(f"{self._path(shard)} is altered: its content has another checksum than was written")
        self._verified.add(shard)

    # ------------------------------------------------------------------------------------------------ the whole

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises ValueError that names all files that are not as written."""
        wrong = []
        for shard in range(len(self._shards)):
            try:
                self._check_sum(shard, _map_file(self._path(shard), self._shards[shard]["bytes"]))
            except ValueError as error:
                self._verified.discard(shard)
                wrong.append(str(error))
        if wrong:
            raise ValueError("; ".join(wrong))

    def info(self) -> dict[str, Any]:
        """What the cache is of, and what is in it: the manifest's entries, the numbers of samples, rows, shards and
        bytes, and of "top_k", "sampled" and "logits" what coding cost. `worst_kl` and `mean_kl` are nats a position,
        `worst_log_prob_error` is that of classes with a probability of 1e-4 and more, `captured_mass` the mean of what
        the classes of a row add up to."""
        samples, rows = len(self), int(self._index.rows.sum())
        written = sum(part["rows"] for part in self._parts)  # those of doubles too
        size = sum(shard["bytes"] for shard in self._shards)
        info = {name: value for name, value in self._manifest.items() if name != "format"}
        info |= {"samples": samples, "rows": rows, "shards": len(self._shards), "bytes": size, "width": self._width}
        if rows:
            info["bytes_per_entry"] = size / (written * self._width)
        if rows and self.kind != "hidden":
            total = Statistics()
            for part in self._parts:
                total += Statistics(*(part[name] for name in Statistics._fields))
            info |= {"worst_kl": total.worst_kl, "mean_kl": total.sum_kl / written}
            info |= {"worst_log_prob_error": total.worst_log_prob_error, "captured_mass": total.sum_mass / written}
        return info

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={self._manifest[name]!r}" for name in NAMES if self._manifest[name] is not None)
        return f"TeacherCache({str(self.folder)!r}, {self.kind}, {len(self)} samples{', ' if given else ''}{given})"


class _LookUp:
    """From an id to a place: one entry a sample, integers before strings, each sorted by key; 40 bytes an entry."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], takes_first: bool) -> None:
        dtypes = (
            np.uint64,
            np.uint64,
            np.uint64,
            np.uint64,
            np.uint32,
            np.uint32,
        )  # key, check, begin, size, rows, shard
        total = sum(shard["samples"] for shard in shards)
        columns = [np.empty(total, dtype) for dtype in dtypes]
        kinds = np.empty(total, np.uint8)
        at = 0
        for number, shard in enumerate(shards):
            path = folder / shard["name"]
            header, index = fmt.read_header_and_index(path)
            if (header.samples, header.rows) != (shard["samples"], shard["rows"]):
                raise ValueError(f"{path} is another than its part lists: {header.samples} samples, {header.rows} rows")
            here = slice(at, at + header.samples)
            kinds[here] = index.kinds
            of_shard = (index.keys, index.checks, index.offsets[:-1], np.diff(index.offsets), index.rows, number)
            for column, values in zip(columns, of_shard, strict=True):
                column[here] = values
            at += header.samples
        order = np.argsort(columns[0], kind="stable")
        of_kinds = kinds[order]
        if kinds.any():
            order = np.concatenate([order[of_kinds == 0], order[of_kinds != 0]])
        later = self._later_doubles(columns[0], columns[1], kinds, order)
        if later and not takes_first:
            self._refuse_doubles(folder, [shard["name"] for shard in shards], columns[5], later)
        if later:
            order = order[~np.isin(order, list(later))]
        self._first_string = int(np.count_nonzero(kinds[order] == 0))
        for i in range(len(columns)):  # one after another, so that little is there twice
            columns[i] = columns[i][order]
        self._keys, self._checks, self.begins, self.sizes, self.rows, self.shards = columns

    @staticmethod
    def _later_doubles(keys: Any, checks: Any, kinds: Any, order: Any) -> dict[int, int]:
        """Entries whose sample has an earlier one, and that one."""
        in_order = keys[order]
        first = np.flatnonzero(in_order[1:] == in_order[:-1])
        seen: dict[tuple[int, int, int], int] = {}
        later = {}
        for entry in map(int, order[np.union1d(first, first + 1)]):  # of one key in the order of the files
            key = (int(kinds[entry]), int(keys[entry]), int(checks[entry]))
            if key in seen:
                later[entry] = seen[key]
            else:
                seen[key] = entry
        return later

    @staticmethod
    def _refuse_doubles(folder: Path, names: list[str], shards: Any, later: dict[int, int]) -> None:
        other, one = next(iter(later.items()))
        paths = [folder / names[int(shards[entry])] for entry in (one, other)]
        found = set.intersection(*(set(fmt.read_header_and_index(path)[1].ids()) for path in paths))
        what = f" {next(iter(found))!r}" if found else ""
        raise ValueError(
            f"{paths[0]} and {paths[1]} both hold sample{what}: {len(later)} samples were given to two writers. If "
            "they are the same (a DistributedSampler gives some twice; writer.todo(ids) none), open the cache with "
            "duplicates='first'"
        )

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, sample_id: SampleId) -> int:
        """The place of a sample, or -1."""
        kind, key, check = fmt.key_of(sample_id)
        low, high = (self._first_string, len(self._keys)) if kind else (0, self._first_string)
        place = low + int(np.searchsorted(self._keys[low:high], np.uint64(key)))
        while place < high and int(self._keys[place]) == key:
            if int(self._checks[place]) == check:
                return place
            place += 1
        return -1


def _read_parts(folder: Path, world_size: int) -> list[dict[str, Any]]:
    parts, missing = [], []
    for rank in range(world_size):
        try:
            parts.append(fmt.read_json(folder / fmt.part_name(rank)))
        except FileNotFoundError:
            missing.append(rank)
    if missing:
        some = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        raise ValueError(
            f"{folder} is unfinished: of {world_size} writers, these ranks have not closed: {some} "
            f"({fmt.part_name(missing[0])} is missing). Go on by TeacherCache.write(..., resume=True)"
        )
    listed = {shard["name"] for part in parts for shard in part["shards"]}
    for name in sorted(listed):  # a file elsewhere is not this cache's, whatever its checksum
        if not re.fullmatch(r"rows-\d{5}-\d{6,}\.cache", name):
            raise ValueError(f"{folder}: a part of the cache lists {name!r}, which is no name of a shard")
    for part in parts:
        for shard in part["shards"]:
            _check_size(folder / shard["name"], shard["bytes"])
    for path in sorted(folder.glob("rows-*.cache")):
        if path.name not in listed:
            raise ValueError(f"{path} is in no part of the cache: it was put there, or a writer is at work")
    return parts


def _check_size(path: Path, wanted: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if size != wanted:
        raise ValueError(
            f"{path} is {'truncated' if size < wanted else 'altered'}: {size} bytes; written were {wanted}"
        )


def _map_file(path: Path, size: int) -> mmap.mmap:
    _check_size(path, size)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
