"""Token ids beside a cache's rows: `tokens/rows-00003-000012.parquet` has those of the samples in shard
`rows-00003-000012.cache`, with the columns sample_id and input_ids. No reader of the rows needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .format import SampleId, shard_name
from .reader import TeacherCache
from .writer import CacheWriter

TOKENS = "tokens"


class TokenWriter(CacheWriter):
    """A writer that puts each sample's token ids beside the rows. They are written before the shard is: after a kill
    there may be tokens without rows, which are removed or written over when it goes on, and never rows without
    tokens."""

    def __init__(self, folder: Any, **keywords: Any) -> None:
        self._token_ids: dict[SampleId, Sequence[int]] = {}
        super().__init__(folder, **keywords)
        stems = {Path(shard["name"]).stem for shard in self._shards}
        for path in (self.folder / TOKENS).glob(f"*rows-{self.rank:05d}-*.parquet"):
            if path.stem not in stems:
                path.unlink(missing_ok=True)  # of a writer that was killed, or a shard that was lost
        for shard in self._shards:
            path = tokens_path(self.folder, shard["name"])
            if not path.exists():
                self._open = False
                self._unlock()
                raise ValueError(
                    f"{path} is missing: delete {self.folder / shard['name']} and part-{self.rank:05d}.json, and its "
                    "samples are written again"
                )

    def add_with_tokens(self, sample_id: SampleId, token_ids: Sequence[int], *values: Any) -> None:
        self._token_ids[sample_id] = token_ids  # first: `add` may flush
        self.add(sample_id, *values)

    def flush(self) -> None:
        self._check_open()
        if self._pending:
            import pyarrow
            import pyarrow.parquet

            names = list(self._pending)
            columns = {
                "sample_id": pyarrow.array(names, pyarrow.string() if isinstance(names[0], str) else pyarrow.int64()),
                "input_ids": pyarrow.array([self._token_ids[name] for name in names], pyarrow.list_(pyarrow.int32())),
            }
            table = pyarrow.table(columns)
            path = tokens_path(self.folder, shard_name(self.rank, self._number))
            write_atomically(path, lambda temporary: pyarrow.parquet.write_table(table, temporary, compression="zstd"))
        super().flush()
        self._token_ids.clear()


def tokens_path(folder: Path, shard: str) -> Path:
    return folder / TOKENS / f"{Path(shard).stem}.parquet"


def tokens_of(cache: TeacherCache, sample_id: SampleId) -> list[int] | None:
    """The token ids of a sample; None where none are kept."""
    shard = int(cache._index.shards[cache._find(sample_id)])
    path = tokens_path(cache.folder, cache._shards[shard]["name"])
    if not path.exists():
        return None
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "the tokens beside a cache need the extra 'cache': pip install 'reptile_ext[cache]'"
        ) from None
    try:
        found = pyarrow.parquet.read_table(path, filters=[("sample_id", "==", sample_id)])["input_ids"].to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {error}") from error
    return list(found[0]) if found else None
