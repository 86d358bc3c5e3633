"""Times the teacher cache against other ways to keep a teacher's answers: `python benchmarks/cache.py [--gguf FILE]`.

Size, the error of coding (KL of K + 1 classes, in float64), writing, and reading into int64 ids and float32
log-probabilities, 12 bytes an entry, which is what GB/s counts. All files are in the page cache. Reading in sequence is
sample after sample; at random, samples in a shuffled order. Every contender reads on one thread; the cache on two too.

    cache 1e-3, 1e-5      TeacherCache with that max_kl
    arrays                int32 ids and float16 log-probabilities as two .npy files, memory-mapped
    safetensors           the same as two tensors of one file, read by slices
    Arrow, Parquet        the same as fixed-size lists; Arrow IPC memory-mapped, Parquet with zstd and dictionary off
    Arrow, Parquet of blocks   the cache's blocks, a binary value a sample: what the container alone costs

The rows: by default made up, with log-probabilities that fall as a power of the rank, the power and the captured mass
differing from row to row. `--gguf FILE`: a language model in a GGUF file that transformers can read (and `pip install
gguf`), on the held-out text of the code-lm recipe; ids are of its own vocabulary, --vocab is what they are coded for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from reptile_ext import TeacherCache
from reptile_ext.benchmark import environment

LENGTH = 128  # positions of a sample


def made_up(count: int, k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    # Ids as often as Zipf has them, and in no order, as BPE's are.
    name, ids = rng.permutation(vocab_size), np.empty((count, k), np.int64)
    for row in range(count):
        found = np.empty(0, np.int64)
        while len(found) < k:
            drawn = 10 * ((vocab_size + 10) / 10) ** rng.random(4 * k) - 10
            found = np.unique(np.concatenate([found, drawn.astype(np.int64)]))
        ids[row] = name[rng.choice(found, k, replace=False)]
    power, mass = rng.uniform(0.7, 3.5, (count, 1)), 1 - 10 ** -rng.uniform(0.3, 4, (count, 1))
    logits = -power * np.log(np.arange(1, k + 1)) + 0.2 * rng.standard_normal((count, k))
    log_probs = logits - np.logaddexp.reduce(logits, 1, keepdims=True) + np.log(mass)
    return torch.from_numpy(ids).int(), torch.from_numpy(log_probs).float()


def of_a_model(path: Path, count: int, k: int) -> tuple[Tensor, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reptile_ext.training.recipes.code_lm import standard_library

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    tokens = tokenizer("\n".join(standard_library()[1][3:8])).input_ids
    rows = []
    with torch.no_grad():
        for chunk in torch.tensor(tokens[:count]).split(512):
            rows.append(model(chunk[None]).logits[0].float().log_softmax(-1).topk(k))
    return torch.cat([r.indices for r in rows]).int(), torch.cat([r.values for r in rows])


# ------------------------------------------------------------------------------------------------ contenders

Samples = list[tuple[Tensor, Tensor]]
Get = Callable[[int], tuple[Any, Any]]


def cache(max_kl: float, vocab_size: int, folder: Path, samples: Samples) -> Callable[[], Get]:
    with TeacherCache.write(folder, vocab_size=vocab_size, k=samples[0][0].shape[1], max_kl=max_kl) as writer:
        for i, (ids, log_probs) in enumerate(samples):
            writer.add(i, ids, log_probs)
    return lambda: TeacherCache.open(folder).__getitem__


def widened(ids: Any, log_probs: Any) -> tuple[Any, Any]:
    return ids.astype(np.int64), log_probs.astype(np.float32)


def columns(samples: Samples) -> tuple[Any, Any]:
    return torch.cat([i for i, _ in samples]).numpy(), torch.cat([p for _, p in samples]).half().numpy()


def arrays(folder: Path, samples: Samples) -> Callable[[], Get]:
    for name, column in zip(("ids", "log_probs"), columns(samples), strict=True):
        np.save(folder / f"{name}.npy", column)

    def reader() -> Get:
        ids, log_probs = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "log_probs"))
        return lambda i: widened(ids[i * LENGTH : (i + 1) * LENGTH], log_probs[i * LENGTH : (i + 1) * LENGTH])

    return reader


def safetensors(folder: Path, samples: Samples) -> Callable[[], Get]:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    ids, log_probs = columns(samples)
    save_file({"ids": ids, "log_probs": log_probs}, folder / "rows.safetensors")

    def reader() -> Get:
        file = safe_open(folder / "rows.safetensors", "np")
        slices = [file.get_slice(name) for name in ("ids", "log_probs")]
        return lambda i: widened(*(x[i * LENGTH : (i + 1) * LENGTH] for x in slices))

    return reader


def arrow(parquet: bool, blocks: int | None, folder: Path, samples: Samples) -> Callable[[], Get]:
    """Record batches and row groups of 8 samples; `blocks`: the vocabulary size the cache's blocks are coded for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from reptile_ext import _C

    k, per_group = samples[0][0].shape[1], 8
    if blocks is None:
        ids, log_probs = columns(samples)
        table = pa.table(
            {
                "ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), k),
                "log_probs": pa.FixedSizeListArray.from_arrays(pa.array(log_probs.ravel()), k),
            }
        )
        group, dtypes = per_group * LENGTH, (np.int32, np.float16)
    else:
        coded = [
            _C.cache_encode(i.data_ptr(), p.data_ptr(), len(i), k, blocks, 1e-3, False)[2] + bytes(8)
            for i, p in samples
        ]
        table, group = pa.table({"block": pa.array(coded, pa.binary())}), per_group
    path = folder / ("rows.parquet" if parquet else "rows.arrow")
    if parquet:
        pq.write_table(table, path, row_group_size=group, compression="zstd", use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)

    def reader() -> Get:
        file = pq.ParquetFile(path, memory_map=True) if parquet else pa.ipc.open_file(pa.memory_map(str(path)))
        known: dict[int, Any] = {}

        def of_group(number: int) -> Any:
            if number not in known:  # the last one is kept, for reading in sequence
                known.clear()
                known[number] = file.read_row_group(number).combine_chunks() if parquet else file.get_batch(number)
            return known[number]

        def get(i: int) -> tuple[Any, Any]:
            batch, at = of_group(i // per_group), i % per_group
            if blocks is not None:
                block = batch.column("block")[at].as_buffer()
                ids, log_probs = torch.empty(LENGTH, k, dtype=torch.int64), torch.empty(LENGTH, k)
                error = _C.cache_decode(
                    block, 0, block.size - 8, LENGTH, 0, LENGTH, k, blocks, ids.data_ptr(), log_probs.data_ptr()
                )
                assert error == (0, 0)
                return ids, log_probs
            found = []
            for name, dtype in zip(("ids", "log_probs"), dtypes, strict=True):
                column = batch.column(name)
                column = column.combine_chunks() if parquet else column
                values = column.slice(at * LENGTH, LENGTH).flatten().to_numpy(zero_copy_only=False)
                found.append(values.astype(dtype, copy=False).reshape(LENGTH, k))
            return widened(*found)

        return get

    return reader


# ------------------------------------------------------------------------------------------------ measuring


def kl_of(given: tuple[Tensor, Tensor], found: tuple[Any, Any]) -> Tensor:
    """Nats a position, of the K classes and the rest as one more, in the order of `found`'s ids."""
    ids, log_probs = torch.as_tensor(found[0]), torch.as_tensor(found[1]).double()
    order, back = given[0].long().argsort(-1), ids.argsort(-1).argsort(-1)
    y = given[1].double().gather(-1, order).gather(-1, back)
    p, rest, decoded = y.exp(), 1 - y.exp().sum(-1), 1 - log_probs.exp().sum(-1)
    tail = rest.clamp(min=0) * (rest.clamp(min=1e-12) / decoded.clamp(min=1e-12)).log()
    return (p * (y - log_probs)).sum(-1) + tail


def seconds(work: Callable[[], Any], rounds: int = 5) -> float:
    """The median of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def measure(name: str, write: Any, samples: Samples, threads: tuple[int, ...]) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    k = samples[0][0].shape[1]
    entries = len(samples) * LENGTH * k
    try:
        start = time.perf_counter()
        reader = write(folder / "c" if name.startswith("cache") else folder, samples)
        writing = time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        get = reader()
        kl = torch.cat([kl_of(samples[i], get(i)) for i in range(0, len(samples), max(1, len(samples) // 64))])
        order = list(range(len(samples)))
        shuffled = random.Random(0).sample(order, len(order))

        def read(which: list[int]) -> None:
            for i in which:
                get(i)

        def read_by(count: int) -> None:
            workers = [threading.Thread(target=read, args=(order[t::count],)) for t in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        result = {
            "name": name,
            "bytes_per_entry": size / entries,
            "mean_kl": kl.mean().item(),
            "worst_kl": kl.max().item(),
            "rows_per_second_written": len(samples) * LENGTH / writing,
            "sequential_gb_per_second": 12 * entries / seconds(lambda: read(order)) / 1e9,
            "random_gb_per_second": 12 * entries / seconds(lambda: read(shuffled)) / 1e9,
            "microseconds_a_sample_at_random": seconds(lambda: read(shuffled[:64])) / min(64, len(shuffled)) * 1e6,
        }
        for count in threads:
            result[f"gb_per_second_on_{count}"] = 12 * entries / seconds(lambda n=count: read_by(n)) / 1e9  # type: ignore[misc]
        return result
    finally:
        shutil.rmtree(folder)


def measure_index(samples: int) -> dict[str, Any]:
    """Samples of one position each: what opening costs, in a process of its own."""
    folder = Path(tempfile.mkdtemp()) / "c"
    try:
        with TeacherCache.write(folder, vocab_size=100, k=2) as writer:
            ids, log_probs = torch.tensor([[3, 50]]), torch.tensor([[-1.0, -2.0]])
            start = time.perf_counter()
            for i in range(samples):
                writer.add(f"sample-{i:012d}", ids, log_probs)
            adding = time.perf_counter() - start
        queue: Any = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=open_and_look, args=(folder, samples, queue))
        process.start()
        result: dict[str, Any] = queue.get()
        process.join()
        return {"samples": samples, "microseconds_an_add": adding / samples * 1e6, **result}
    finally:
        shutil.rmtree(folder.parent)


def open_and_look(folder: Path, samples: int, queue: Any) -> None:
    def memory(name: str) -> int:  # of this process alone: ru_maxrss is inherited
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])

    before = memory("VmRSS")
    start = time.perf_counter()
    opened = TeacherCache.open(folder)
    opening = time.perf_counter() - start
    peak = memory("VmHWM") - before
    held = sum(a.nbytes for a in vars(opened._index).values() if isinstance(a, np.ndarray))
    names = [f"sample-{random.Random(0).randrange(samples):012d}" for _ in range(1000)]
    found = seconds(lambda: [name in opened for name in names]) / len(names)
    queue.put(
        {
            "seconds_to_open": opening,
            "bytes_held_a_sample": held / samples,
            "peak_bytes_a_sample": peak / samples,
            "microseconds_a_look_up": found * 1e6,
        }
    )


def measure_loader(samples: Samples, vocab_size: int) -> dict[str, Any]:
    """Steps of the code-lm recipe's student, and how long they wait for the teacher: of rows that the loop decodes
    itself, and of a loader with one worker, whose tensors pass from process to process."""
    from reptile_ext.training.recipes.code_lm import LSTM

    folder, k = Path(tempfile.mkdtemp()) / "c", samples[0][0].shape[1]
    classes, steps, warm = 8192, 60, 5
    student = LSTM(classes, 32, 64)
    optimizer = torch.optim.AdamW(student.parameters())
    torch.set_num_threads(1)  # the other core is the worker's
    try:
        cache(1e-3, vocab_size, folder, samples)
        opened = TeacherCache.open(folder)
        wanted = [i % len(samples) for i in range(2 * steps)]
        result: dict[str, Any] = {"tokens_a_step": 2 * LENGTH}

        def step(ids: Tensor, log_probs: Tensor) -> None:
            logits = student(ids[..., 0].clamp(max=classes - 1))
            x = logits.log_softmax(-1).gather(-1, ids.clamp(min=0, max=classes - 1))
            loss = (log_probs.exp() * (log_probs - x)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for workers in (0, 1):
            loader = DataLoader(
                wanted, batch_size=2, num_workers=workers, collate_fn=partial(opened.batch, length=LENGTH)
            )
            batches: Iterator[Any] = iter(loader)
            waiting = working = 0.0
            for number in range(steps):
                start = time.perf_counter()
                ids, log_probs = next(batches)
                middle = time.perf_counter()
                step(ids, log_probs)
                if number >= warm:
                    waiting += middle - start
                    working += time.perf_counter() - middle
            a_step = working / (steps - warm)
            result |= {
                "milliseconds_a_step": a_step * 1e3,
                "gb_per_second_consumed": 2 * LENGTH * k * 12 / a_step / 1e9,
                f"share_waiting_{workers}_workers": waiting / (waiting + working),
            }
        return result
    finally:
        shutil.rmtree(folder.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path, help="a model whose answers are kept")
    parser.add_argument("--rows", type=Path, help="npz file of rows; with --gguf written if it is not there")
    parser.add_argument("--count", type=int, default=8192, help="different rows (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=8, help="how often they are written (default: %(default)s)")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151_936, help="vocabulary (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="also open a cache of N samples")
    parser.add_argument("--loader", action="store_true", help="also steps of training beside a loader")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.rows is not None and o.rows.exists():
        kept = np.load(o.rows)
        ids, log_probs = (torch.from_numpy(kept[name][: o.count, : o.k]) for name in ("ids", "log_probs"))
        ids, log_probs = ids.contiguous(), log_probs.contiguous()
    else:
        ids, log_probs = of_a_model(o.gguf, o.count, o.k) if o.gguf else made_up(o.count, o.k, o.vocab)
        if o.rows is not None:
            np.savez(o.rows, ids=ids.numpy(), log_probs=log_probs.numpy())
    count = len(ids) // LENGTH * LENGTH
    samples = list(zip(ids[:count].split(LENGTH), log_probs[:count].split(LENGTH), strict=True)) * o.repeat
    print(f"{count} rows of {o.gguf or o.rows or 'made-up data'}, {o.repeat} times; K = {o.k}, V = {o.vocab}; ", end="")
    print(f"mean mass {log_probs.exp().sum(-1).mean():.4f}; one thread, torch {torch.__version__}")
    torch.set_num_threads(1)
    contenders: list[tuple[str, Any, tuple[int, ...]]] = [
        ("cache 1e-3", partial(cache, 1e-3, o.vocab), (1, 2)),
        ("cache 1e-5", partial(cache, 1e-5, o.vocab), (1, 2)),
        ("arrays", arrays, ()),
        ("safetensors", safetensors, ()),
        ("Arrow", partial(arrow, False, None), ()),
        ("Parquet", partial(arrow, True, None), ()),
        ("Arrow of blocks", partial(arrow, False, o.vocab), ()),
        ("Parquet of blocks", partial(arrow, True, o.vocab), ()),
    ]
    results = []
    print(f"{'':20}{'B/entry':>9}{'mean KL':>10}{'worst KL':>10}{'rows/s':>10}{'seq. GB/s':>11}{'random':>8}", end="")
    print(f"{'µs a sample':>13}")
    for name, write, threads in contenders:
        try:
            r = measure(name, write, samples, threads)
        except ImportError as error:
            print(f"{name:20} cannot run: {error}")
            continue
        results.append(r)
        print(
            f"{name:20}{r['bytes_per_entry']:9.3f}{r['mean_kl']:10.1e}{r['worst_kl']:10.1e}"
            f"{r['rows_per_second_written']:10.0f}{r['sequential_gb_per_second']:11.2f}{r['random_gb_per_second']:8.2f}"
            f"{r['microseconds_a_sample_at_random']:13.0f}"
            + "".join(f"   {r[f'gb_per_second_on_{n}']:.2f} GB/s on {n} threads" for n in threads),
            flush=True,
        )
    extra = {}
    if o.index:
        extra["index"] = measure_index(o.index)
        print(json.dumps(extra["index"]))
    if o.loader:
        extra["loader"] = measure_loader(samples, o.vocab)
        print(json.dumps(extra["loader"]))
    if o.json:
        o.json.write_text(json.dumps({"environment": environment(), "results": results, **extra}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
