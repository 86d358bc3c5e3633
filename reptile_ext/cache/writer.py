"""Writing a cache: each writer its own shards, with nothing shared but the manifest, on which all have to agree."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C, checks
from ..files import TEMPORARY
from . import format as fmt
from .format import SampleId, Statistics

# What the folder is of, as far as it can be asked for when it is opened.
NAMES = ("teacher", "tokenizer", "data")

_held: set[tuple[str, int, int]] = set()  # folder, rank and process of the writers here


class CacheWriter:
    """What `TeacherCache.write` gives. Use it in a `with` statement: leaving it without an error finishes this writer's
    part of the folder; leaving it with one, or being killed, keeps what was flushed, for `resume=True`."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocab_size: int,
        kind: str,
        k: int,
        temperature: float,
        teacher: str | None,
        tokenizer: str | None,
        data: str | None,
        max_kl: float,
        dtype: torch.dtype | None,
        rank: int | None,
        world_size: int | None,
        resume: bool,
        shard_bytes: int,
        flush_seconds: float,
    ) -> None:
        self._open = False
        checks.one_of("kind", kind, fmt.KINDS)
        self.kind = kind
        self._is_coded = kind in fmt.CODED
        self.vocab_size = _integer("vocab_size", vocab_size, 1, fmt.MAX_VOCAB_SIZE)
        self._k = _integer("k", k, 1, fmt.MAX_K) if self._is_coded else 0
        if self._k > self.vocab_size:
            raise ValueError(f"k must be at most vocab_size, {self.vocab_size}; got {k}")
        temperature = checks.number_of("temperature", temperature, "a positive number", checks.is_temperature)
        if not self._is_coded and temperature != 1:
            raise ValueError(
                f"temperature is for the kinds 'top_k' and 'sampled'; {kind!r} are kept as the model gives them, and "
                f"training may have them at any temperature; got {temperature:g}"
            )
        max_kl = checks.number_of("max_kl", max_kl, "a number of nats from 1e-6 to 1", lambda v: 1e-6 <= v <= 1)
        self.max_kl = max_kl
        for name, value in zip(NAMES, (teacher, tokenizer, data), strict=True):
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string, a name or a hash; got {type(value).__name__}")
        self._dtype = _dtype_of(kind, dtype)
        self.rank, self.world_size = _place(rank, world_size)
        self._shard_bytes = _integer("shard_bytes", shard_bytes, 1, 1 << 40)
        self._flush_seconds = checks.number_of("flush_seconds", flush_seconds, "a positive number", checks.is_positive)
        if not isinstance(resume, bool):
            raise TypeError(f"resume must be True or False; got {resume!r}")

        self.folder = Path(os.path.abspath(folder))
        self._width = {"logits": self.vocab_size, "hidden": 0}.get(kind, self._k)  # hidden: that of the first sample
        manifest: dict[str, Any] = {
            "format": "reptile_ext teacher cache",
            "version": fmt.VERSION,
            "kind": kind,
            "k": self._k if self._is_coded else None,
            "vocab_size": self.vocab_size,
            "temperature": temperature,
            "dtype": fmt.DTYPES[self._dtype],
            "max_kl": max_kl if self._is_coded else None,
            "max_log_prob_error": fmt.MAX_LOG_PROB_ERROR if self._is_coded else None,
            "teacher": teacher,
            "tokenizer": tokenizer,
            "data": data,
            "world_size": self.world_size,
        }
        self._pid = os.getpid()
        self._ids: set[SampleId] = set()
        self._shards: list[dict[str, Any]] = []
        self._statistics = Statistics()
        self._number = 0
        self._pending: dict[SampleId, tuple[bytes, int, Statistics]] = {}
        self._pending_bytes = 0
        self._since = time.monotonic()
        _agree_on_manifest(self.folder, manifest)
        self._lock()
        try:
            self._look_at_what_is_there(resume)
        except BaseException:
            self._unlock()
            raise
        self._open = True

    # ------------------------------------------------------------------------------------------------ adding

    def add(self, sample_id: SampleId, *values: Any, **named: Any) -> None:
        """Add one sample: `indices` and `log_probs`, [T, K] each, for the kinds "top_k" and "sampled"; `values`, [T, V]
        or [T, H], for "logits" and "hidden". Tensors of any device, or arrays.

        Raises ValueError or TypeError, and adds nothing, if they are not that or `sample_id` is already there."""
        self._check_open()
        sample_id = fmt.checked_id(sample_id)
        if sample_id in self:
            raise ValueError(
                f"sample_id {sample_id!r} is already in {self.folder}: each sample is added once "
                "(`sample_id in writer` says which are there)"
            )
        wanted = ("indices", "log_probs") if self._is_coded else ("values",)
        for name in wanted[len(values) :]:
            values += (named.pop(name),) if name in named else ()
        if named or len(values) != len(wanted):
            got = f"{len(values) + 1} values" + (f" and {', '.join(named)}" if named else "")
            raise TypeError(f"add of kind {self.kind!r} takes sample_id, {', '.join(wanted)}; got {got}")
        if self._is_coded:
            block, rows, statistics = self._coded(sample_id, *values)
        else:
            block, rows, statistics = self._plain(sample_id, *values)
        # One step, so that an interrupt leaves the sample there or not there.
        self._pending[sample_id] = (block, rows, statistics)
        self._pending_bytes += len(block)
        too_old = time.monotonic() - self._since > self._flush_seconds
        if too_old or self._pending_bytes >= self._shard_bytes:
            self.flush()

    def _coded(self, sample_id: SampleId, indices: Any, log_probs: Any) -> tuple[bytes, int, Statistics]:
        ids = _tensor("indices", indices)
        if ids.dtype not in checks.INTEGERS:
            raise TypeError(f"indices must be integers; got {_said(ids)} (sample {sample_id!r})")
        logs = _tensor("log_probs", log_probs)
        if logs.dtype not in checks.FLOATING:
            raise TypeError(f"log_probs must be floating-point numbers; got {_said(logs)} (sample {sample_id!r})")
        for name, value in (("indices", ids), ("log_probs", logs)):
            if value.ndim != 2 or value.shape[1] != self._k:
                raise ValueError(f"{name} must be [T, {self._k}]; got {list(value.shape)} (sample {sample_id!r})")
        if ids.shape != logs.shape:
            raise ValueError(
                f"indices and log_probs must have one shape; got {list(ids.shape)} and {list(logs.shape)} "
                f"(sample {sample_id!r})"
            )
        wide = ids.to(torch.int64)
        outside = (wide < -1) | (wide >= self.vocab_size)
        if outside.any():
            row = int(outside.any(1).nonzero()[0])
            raise ValueError(
                f"indices must be from -1 (padding) to {self.vocab_size - 1}; got {int(wide[outside][0])} "
                f"(sample {sample_id!r}, position {row})"
            )
        narrow = wide.to(torch.int32).contiguous().numpy()
        single = logs.to(torch.float32).contiguous().numpy()
        rows = len(narrow)
        error, row, block, worst_kl, sum_kl, worst_error, sum_mass = _C.cache_encode(
            narrow.ctypes.data, single.ctypes.data, rows, self._k, self.vocab_size, self.max_kl, self.kind == "sampled"
        )
        if error:
            raise ValueError(f"{_why(error, narrow[row], single[row], self)} (sample {sample_id!r}, position {row})")
        return block, rows, Statistics(sum_kl, worst_kl, worst_error, sum_mass)

    def _plain(self, sample_id: SampleId, values: Any) -> tuple[bytes, int, Statistics]:
        given = _tensor("values", values)
        if given.dtype not in checks.FLOATING:
            raise TypeError(f"values must be floating-point numbers; got {_said(given)} (sample {sample_id!r})")
        width = self._width or (given.shape[-1] if given.ndim == 2 else 0)
        if given.ndim != 2 or given.shape[1] != width or width == 0:
            raise ValueError(f"values must be [T, {width or 'H'}]; got {list(given.shape)} (sample {sample_id!r})")
        dtype = getattr(torch, fmt.DTYPES[self._dtype])
        stored = given.to(dtype)
        logits = self.kind == "logits"
        broken = ~(stored.isfinite() | ((given == -torch.inf) if logits else torch.zeros((), dtype=torch.bool)))
        if broken.any():
            row, column = broken.nonzero()[0].tolist()
            raise ValueError(
                f"values must be finite in {dtype}{', or -inf' if logits else ''}; got {given[row, column].item()} "
                f"(sample {sample_id!r}, position {row})"
            )
        self._width = width
        statistics = Statistics()
        if logits and len(given):
            y, z = given.double().log_softmax(-1), stored.double().log_softmax(-1)
            p = y.exp()
            error = torch.where(p > 0, y - z, 0)
            kl = (p * error).sum(-1)
            worst = torch.where(p >= 1e-4, error.abs(), 0).max()
            statistics = Statistics(float(kl.sum()), max(float(kl.max()), 0.0), float(worst), float(len(given)))
        return stored.contiguous().view(torch.int16).numpy().tobytes(), len(given), statistics

    def __contains__(self, sample_id: Any) -> bool:
        """Whether this writer has the sample, from an earlier run too: no need to ask the teacher again."""
        sample_id = fmt.checked_id(sample_id)
        return sample_id in self._ids or sample_id in self._pending

    def __len__(self) -> int:
        return len(self._ids) + len(self._pending)

    def todo(self, sample_ids: Iterable[Any]) -> Iterator[Any]:
        """Of these, which must be the same in every process and run: every `world_size`-th, this rank's, without those
        that are there."""
        for i, sample_id in enumerate(sample_ids):
            if i % self.world_size == self.rank and sample_id not in self:
                yield sample_id

    # ------------------------------------------------------------------------------------------------ shards

    def flush(self) -> None:
        """Make a shard of what was added since the last: it survives whatever happens to this process."""
        self._check_open()
        self._since = time.monotonic()
        if not self._pending:
            return
        blocks: list[bytes] = []
        offsets, rows, statistics, crc = [fmt.HEADER_BYTES], [], Statistics(), 0
        for block, count, cost in self._pending.values():
            blocks += (block, bytes(-len(block) % 8))
            crc = zlib.crc32(blocks[-1], zlib.crc32(block, crc))
            offsets.append(offsets[-1] + len(block) + len(blocks[-1]))
            rows.append(count)
            statistics += cost
        index = fmt.index_of(list(self._pending), offsets, rows).pack()
        header = fmt.Header(
            fmt.KINDS.index(self.kind),
            self.vocab_size,
            self._width,
            self._dtype,
            len(rows),
            sum(rows),
            offsets[-1],
            crc,
            zlib.crc32(index),
            statistics,
        )
        content = [header.pack(), *blocks, index]
        path = self.folder / fmt.shard_name(self.rank, self._number)
        # A part that is finished is so no longer, before there is a shard that it does not know.
        (self.folder / fmt.part_name(self.rank)).unlink(missing_ok=True)
        fmt.create(path, content)
        whole = 0
        for piece in content:
            whole = zlib.crc32(piece, whole)
        self._shards.append(_shard_entry(path, sum(map(len, content)), header, whole))
        self._statistics += statistics
        self._ids.update(self._pending)
        self._pending, self._pending_bytes = {}, 0
        self._number += 1  # last: whoever is interrupted before finds the name taken, and writes nothing twice

    def close(self) -> None:
        """Flush, and say that this writer's part is complete. The folder is when all parts are."""
        if not self._open:
            return
        self.flush()
        path = self.folder / fmt.part_name(self.rank)
        path.unlink(missing_ok=True)
        part = {
            "rank": self.rank,
            "samples": sum(shard["samples"] for shard in self._shards),
            "rows": sum(shard["rows"] for shard in self._shards),
            "width": self._width,
            **self._statistics._asdict(),
            "shards": self._shards,
        }
        fmt.create(path, [fmt.pack_json(part)])
        self._open = False
        self._unlock()

    def __enter__(self) -> CacheWriter:  # noqa: PYI034 (typing.Self is of Python 3.11)
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != self._pid:  # a forked process leaves the block as well
            return
        if error is None:
            self.close()
        elif self._open:
            try:
                with contextlib.suppress(OSError):  # the error that is on its way says more
                    self.flush()
            finally:
                self._open = False
                self._unlock()

    # ------------------------------------------------------------------------------------------------ what is there

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("this writer belongs to the process that made it: make one in each, with its own rank")
        if not self._open:
            raise RuntimeError("this writer is closed")

    def _look_at_what_is_there(self, resume: bool) -> None:
        shards = sorted(self.folder.glob(fmt.shard_name(self.rank, 0).replace("000000", "*")))
        part = self.folder / fmt.part_name(self.rank)
        if not resume and (shards or part.exists()):
            raise ValueError(
                f"folder: {self.folder} already holds rows of rank {self.rank}: go on with them by resume=True, or "
                "choose another folder"
            )
        for path in self.folder.glob(f"{TEMPORARY}*-{fmt.shard_name(self.rank, 0).replace('000000', '*')}"):
            path.unlink(missing_ok=True)  # of a writer that was killed
        expected = {}
        if part.exists():
            expected = {shard["name"]: shard for shard in fmt.read_json(part)["shards"]}
            missing = [name for name in expected if not (self.folder / name).exists()]
            if missing:
                raise ValueError(
                    f"{self.folder / missing[0]} is missing: {part.name} lists it. Delete {part}, and its samples are "
                    "written again"
                )
        for path in shards:
            self._take_over(path, expected)
            self._number = int(path.stem.rsplit("-", 1)[1]) + 1

    def _take_over(self, path: Path, expected: dict[str, Any]) -> None:
        content = path.read_bytes()
        hint = "delete it, and its samples are written again"
        try:
            header, index = fmt.read_header_and_index(path)
            if zlib.crc32(memoryview(content)[fmt.HEADER_BYTES : header.index_offset]) != header.crc_blocks:
                raise ValueError(f"{path} is altered: its rows have another checksum than was written")
        except ValueError as error:
            raise ValueError(f"{error}; {hint}") from None
        entry = _shard_entry(path, len(content), header, zlib.crc32(content))
        if expected and expected.get(path.name) != entry:
            raise ValueError(f"{path} is another than {fmt.part_name(self.rank)} lists; {hint}")
        same = (fmt.KINDS.index(self.kind), self.vocab_size, self._width or header.width, self._dtype)
        if header[:4] != same:
            raise ValueError(f"{path} is of another cache: kind, vocabulary, width or dtype differ; {hint}")
        self._width = header.width
        for sample_id in index.ids():
            if sample_id in self._ids:
                raise ValueError(
                    f"{path} holds sample {sample_id!r}, which another shard of rank {self.rank} holds too"
                )
            self._ids.add(sample_id)
        self._shards.append(entry)
        self._statistics += header.statistics

    def _lock(self) -> None:
        """One writer a rank: a lock that the system takes back when its process ends, however it ends."""
        self._key = (os.path.realpath(self.folder), self.rank, self._pid)
        path = self.folder / f".lock-{self.rank:05d}"
        busy = (
            f"folder: another writer is at work as rank {self.rank} on {self.folder}: each needs a rank of its own "
            "(under torchrun: leave rank and world_size out)"
        )
        if self._key in _held:
            raise ValueError(f"{busy}. It is of this process, and was not closed: use it in a `with` statement")
        self._lock_file = path.open("a")
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock_file.close()
            raise ValueError(busy) from None
        _held.add(self._key)
        # Also of a writer that nobody closed and nobody has any more.
        self._unlock = weakref.finalize(self, _release, self._key, self._lock_file)
        self._unlock.atexit = False


def _release(key: tuple[str, int, int], lock_file: Any) -> None:
    _held.discard(key)
    lock_file.close()


def _shard_entry(path: Path, size: int, header: fmt.Header, crc: int) -> dict[str, Any]:
    return {
        "name": path.name,
        "bytes": size,
        "samples": header.samples,
        "rows": header.rows,
        "crc32": f"{crc:08x}",
    }


def _agree_on_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, or compare with the one that is there: writers that differ would spoil one another."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.json"
    if not path.exists():
        ours = (".lock-", TEMPORARY, "manifest.json")
        others = [p.name for p in folder.iterdir() if not p.name.startswith(ours) and p.name != fmt.TEACHER]
        if others and not path.exists():
            raise ValueError(f"folder must be empty or hold a teacher cache; {folder} holds {sorted(others)[0]}")
        try:
            fmt.create(path, [fmt.pack_json(wanted)])
            return
        except FileExistsError:
            pass  # another writer was first
    found = fmt.read_manifest(folder)
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{name}: the cache in {folder} was begun with {found[name]!r}, this writer has {value!r}; "
                "choose another folder"
            )


def _integer(name: str, value: Any, least: int, most: int) -> int:
    number = checks.integer_of(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be from {least} to {most}; got {number}")
    return number


def _dtype_of(kind: str, dtype: torch.dtype | None) -> int:
    if kind in fmt.CODED:
        if dtype is not None:
            raise ValueError(f"dtype is for the kinds 'logits' and 'hidden'; {kind!r} is coded to max_kl")
        return 0
    known = {torch.float16: 1, torch.bfloat16: 2}
    dtype = dtype or (torch.float16 if kind == "logits" else torch.bfloat16)
    if dtype not in known:
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16; got {dtype!r}")
    return known[dtype]


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """torchrun's, where neither is given; else 0 of 1."""
    if rank is None and world_size is None:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    world_size = _integer("world_size", 1 if world_size is None else world_size, 1, 99_999)
    return _integer("rank", 0 if rank is None else rank, 0, world_size - 1), world_size


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    raise TypeError(f"{name} must be a tensor or an array; got {type(value).__name__}")


def _said(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"


def _why(error: int, ids: Any, log_probs: Any, writer: CacheWriter) -> str:
    """What is wrong with a row, by the numbers of csrc/cpu/cache.h."""
    if error == 1:
        return f"log_probs must be numbers below +inf; got {log_probs[~(log_probs < np.inf)][0]}"
    if error == 3:
        values, counts = np.unique(ids[ids >= 0], return_counts=True)
        hint = "; a class that was drawn n times is given once, with its share" if writer.kind == "sampled" else ""
        return f"indices must differ within a row; got {values[counts > 1][0]} twice{hint}"
    if error == 4:
        mass = np.exp(log_probs[ids >= 0].astype(np.float64)).sum()
        return (
            f"log_probs must be logarithms of probabilities, which add up to 1 at most; got {mass:.4g} "
            "(logits need a log_softmax over all classes)"
        )
    if error == 5:
        return f"log_probs must be -inf where indices are -1; got {log_probs[(ids < 0) & (log_probs > -np.inf)][0]}"
    if error == 6:
        return f"max_kl={writer.max_kl:g} cannot be kept for log_probs from {log_probs.min():g} to {log_probs.max():g}"
    return "indices and log_probs cannot be written"
