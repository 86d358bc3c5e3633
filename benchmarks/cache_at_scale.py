"""A large cache, in small: `python benchmarks/cache_at_scale.py [--ranks N] [--json FILE]`.

What a cache of 10^11 tokens will do, from the real code on few: writers that are killed over and over and go on, a
folder of many shards that is opened and read at random, and what each costs a token, a sample and a shard. The numbers
of docs/cache.md, "A large teacher", are these times how many there are of each.

    written     one writer alone, rows made beforehand: microseconds of processor a token, bytes a token
    killed      --ranks writers, each killed with SIGKILL --kills times at random moments and started again with
                resume=True: tokens that had to be computed again a kill, seconds until the first new one, and whether
                the folder then holds each sample once, with the rows of one that nobody interrupted
    opened      seconds and bytes held a sample and a shard: two folders of as many samples in few and in many shards
    read        samples at random, of all shards: microseconds a sample, with checksums and without (`verify=False`),
                once all shards have been read and while they are read for the first time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import made_up

from reptile_ext import TeacherCache
from reptile_ext.benchmark import environment
from reptile_ext.files import write_json

SPAWN = multiprocessing.get_context("spawn")


def rows_of(sample: int, rows: tuple[torch.Tensor, torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different ones for each sample: a stretch of the made-up rows."""
    at = sample * 37 % (len(rows[0]) - length + 1)
    return rows[0][at : at + length], rows[1][at : at + length]


def write_rank(folder: Path, o: argparse.Namespace, rank: int, log: Path, pause: float) -> None:
    """A writer of its own process, which notes what the teacher was asked for, and how long going on took."""
    torch.set_num_threads(1)
    rows = made_up(2 * o.length, o.k, o.vocab)
    start = time.perf_counter()
    with (
        TeacherCache.write(
            folder, vocab_size=o.vocab, k=o.k, rank=rank, world_size=o.ranks, resume=True, shard_bytes=o.shard_bytes
        ) as writer,
        log.open("a", buffering=1) as notes,
    ):
        notes.write(f"began {time.perf_counter() - start} {len(writer)}\n")
        for sample in writer.todo(range(o.samples)):
            notes.write(f"{sample}\n")
            time.sleep(pause)  # the teacher
            writer.add(sample, *rows_of(sample, rows, o.length))
    log.with_suffix(".done").touch()


def killed(o: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    random_ = random.Random(0)
    kills = [o.kills] * o.ranks
    processes: list[Any] = [None] * o.ranks
    logs = [folder / f"log-{rank}" for rank in range(o.ranks)]
    try:
        when = [0.0] * o.ranks
        while not all(log.with_suffix(".done").exists() for log in logs):
            for rank, log in enumerate(logs):
                process = processes[rank]
                if process is not None and process.is_alive() and kills[rank] and time.monotonic() > when[rank]:
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    kills[rank] -= 1
                if not log.with_suffix(".done").exists() and (process is None or not process.is_alive()):
                    processes[rank] = SPAWN.Process(
                        target=write_rank, args=(folder / "c", o, rank, log, o.pause), daemon=True
                    )
                    processes[rank].start()
                    when[rank] = time.monotonic() + o.start_up + random_.uniform(0, o.between)
            time.sleep(0.01)
        for process in processes:
            process.join()
        asked, resumed = [], []
        for log in logs:
            for line in log.read_text().splitlines():
                if line.startswith("began"):
                    resumed.append(float(line.split()[1]))
                elif line:
                    asked.append(int(line))
        cache = TeacherCache.open(folder / "c")
        cache.verify()
        rows = made_up(2 * o.length, o.k, o.vocab)
        whole = folder / "whole"
        with TeacherCache.write(whole, vocab_size=o.vocab, k=o.k) as writer:
            for sample in range(o.samples):
                writer.add(sample, *rows_of(sample, rows, o.length))
        uninterrupted = TeacherCache.open(whole)
        same = sorted(cache) == list(range(o.samples)) and all(
            torch.equal(a, b) for i in range(o.samples) for a, b in zip(cache[i], uninterrupted[i], strict=True)
        )
        done = o.ranks * o.kills - sum(kills)
        return {
            "ranks": o.ranks,
            "kills": done,
            "samples": o.samples,
            "shards": cache.info()["shards"],
            "each_sample_once_and_as_uninterrupted": same,
            "tokens_asked_again_a_kill": (len(asked) - o.samples) * o.length / max(done, 1),
            "tokens_a_shard": o.samples * o.length / cache.info()["shards"],
            "seconds_to_go_on": max(resumed),
        }
    finally:
        shutil.rmtree(folder)


def written(o: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    rows = made_up(2 * o.length, o.k, o.vocab)
    torch.set_num_threads(1)
    try:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        with TeacherCache.write(folder / "c", vocab_size=o.vocab, k=o.k) as writer:
            for sample in range(o.samples):
                writer.add(sample, *rows_of(sample, rows, o.length))
        after = resource.getrusage(resource.RUSAGE_SELF)
        tokens = o.samples * o.length
        info = TeacherCache.open(folder / "c").info()
        return {
            "microseconds_of_processor_a_token": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            / tokens
            * 1e6,
            "tokens_a_second": tokens / (time.perf_counter() - start),
            "bytes_a_token": info["bytes"] / tokens,
            "mean_kl": info["mean_kl"],
        }
    finally:
        shutil.rmtree(folder)


def open_and_read(folder: Path, samples: int, verify: bool, queue: Any) -> None:
    """In a process of its own: opening, then every sample once at random, then again."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    cache = TeacherCache.open(folder, verify=verify)
    opening = time.perf_counter() - start
    held = sum(a.nbytes for a in vars(cache._index).values() if isinstance(a, np.ndarray))
    order = random.Random(1).sample(range(samples), samples)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for i in order:
            cache[i]
        seconds.append(time.perf_counter() - start)
    queue.put((opening, held, seconds[0] / samples * 1e6, seconds[1] / samples * 1e6))


def opened_and_read(o: argparse.Namespace) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    rows = made_up(2 * o.length, o.k, o.vocab)
    result: dict[str, Any] = {}
    try:
        for name, shard_bytes in (("few", 1 << 26), ("many", 1)):
            with TeacherCache.write(folder / name, vocab_size=o.vocab, k=o.k, shard_bytes=shard_bytes) as writer:
                for sample in range(o.opened):
                    writer.add(sample, *rows_of(sample, rows, o.length))
            shards = TeacherCache.open(folder / name).info()["shards"]
            for verify in (True, False):
                queue: Any = SPAWN.Queue()
                process = SPAWN.Process(target=open_and_read, args=(folder / name, o.opened, verify, queue))
                process.start()
                opening, held, first, again = queue.get()
                process.join()
                result[f"{name}_{'verified' if verify else 'trusted'}"] = {
                    "shards": shards,
                    "samples": o.opened,
                    "seconds_to_open": opening,
                    "bytes_held_a_sample": held / o.opened,
                    "microseconds_a_sample_first": first,
                    "microseconds_a_sample_again": again,
                }
        few, many = result["few_trusted"], result["many_trusted"]
        result["milliseconds_to_open_a_shard"] = (
            (many["seconds_to_open"] - few["seconds_to_open"]) / (many["shards"] - few["shards"]) * 1e3
        )
        return result
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="writers that are killed (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="of each writer (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="that they write together (default: %(default)s)")
    parser.add_argument("--opened", type=int, default=4000, help="samples of the cache that is opened")
    parser.add_argument("--length", type=int, default=128, help="positions of a sample (default: %(default)s)")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--shard-bytes", type=int, default=1 << 20, help="of the killed writers (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds the teacher takes for a sample")
    parser.add_argument("--start-up", type=float, default=5.0, help="seconds a process takes to start, not killed in")
    parser.add_argument("--between", type=float, default=4.0, help="at most so many seconds later it is killed")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    report: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(o).items()},
        "written": written(o),
        "opened": opened_and_read(o),
        "killed": killed(o),
    }
    print(json.dumps({name: part for name, part in report.items() if name != "environment"}, indent=2))
    if o.json:
        write_json(o.json, report)
    return 0 if report["killed"]["each_sample_once_and_as_uninterrupted"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
