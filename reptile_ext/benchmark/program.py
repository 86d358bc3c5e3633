"""The benchmark as a program: what it depends on, case after case, and what it writes."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .._version import __version__
from ..eager import TEMPERATURE
from ..files import write_atomically, write_json
from ..timing import DTYPES
from .data import Case, Data, cases
from .measuring import Result, measure
from .report import HEADER, draw, pyplot_or_complain, table_row


def run(
    shapes: str = "default",
    dtypes: Sequence[str] = tuple(DTYPES),
    repeats: int = 7,
    threads: int | None = None,
    out: Path | None = None,
    vocab: tuple[int, ...] | None = None,
    pairs: float | None = None,
    compile: bool = True,
    plot: Path | None = None,
    divergences: Sequence[str] | None = None,
) -> int:
    """Print a table for each dtype; write the figures to `out` (JSON) and a chart to `plot` (PNG).

    Returns 0, or 1 if one of ours failed. What fails besides is in the table, with the reason.

    Args:
        shapes: a set of SHAPES; see `cases` for what `vocab`, `pairs` and `divergences` make of it.
        repeats: rounds.
        threads: of PyTorch and ours; default: what PyTorch uses.
        compile: torch.compile too, from 1,000 classes on. It needs a C++ compiler and several seconds a case.

    Raises:
        ValueError: an argument that does not fit.
        ModuleNotFoundError: `plot` without matplotlib.
        RuntimeError: a contender's loss or gradient is wrong.
    """
    chosen = check(shapes, dtypes, repeats, threads, vocab, pairs, divergences)
    if plot is not None:
        pyplot_or_complain()  # find out now, not after minutes
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        about = environment()
        print("\n".join(f"{key:<16}{value}" for key, value in about.items()))
        results = list(_measure_and_print(chosen, repeats, compile))
    finally:
        torch.set_num_threads(threads_before)
    if out is not None:
        write_json(out, {"environment": about, "repeats": repeats, "results": [r.as_json() for r in results]})
    if plot is not None:
        write_atomically(plot, lambda path: draw(results, about, path))
    for path in (out, plot):
        if path is not None:
            print(f"wrote {path}")
    return int(any(r.failed is not None and r.contender.startswith("ours") for r in results))


def check(
    shapes: str,
    dtypes: Sequence[str],
    repeats: int,
    threads: int | None,
    vocab: tuple[int, ...] | None,
    pairs: float | None,
    divergences: Sequence[str] | None,
) -> list[Case]:
    """The cases that `run` would measure.

    Raises:
        ValueError: an argument that does not fit.
    """
    chosen = cases(shapes, dtypes, vocab, pairs, divergences)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    if repeats > 1_000_000:
        raise ValueError(f"repeats must be at most 1,000,000; got {repeats}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    if threads is not None and threads > 4096:
        raise ValueError(f"threads must be at most 4096; got {threads}")
    return chosen


def _measure_and_print(chosen: list[Case], repeats: int, compile: bool) -> Iterator[Result]:
    for dtype in dict.fromkeys(case.dtype for case in chosen):
        same_dtype = [case for case in chosen if case.dtype == dtype]
        data = Data(dtype, max(case.pairs for case in same_dtype))
        print(f"\n{dtype}, forward + backward; extra MB: peak memory of a step over what was there before")
        print(HEADER)
        for shape, same_shape in itertools.groupby(same_dtype, key=lambda case: (case.rows, case.vocab)):
            size = math.prod(shape) * DTYPES[dtype].itemsize / 1e6
            print(f"{list(shape)}, logits of {size:.3g} MB each", flush=True)
            results = measure(list(same_shape), data, repeats, compile)
            for divergence, rows in itertools.groupby(results, key=lambda r: r.case.divergence):
                print(f"{divergence}:")
                print("\n".join(map(table_row, rows)), flush=True)
            yield from results


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "instruction_set": ops.instruction_set(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # other programs' included: it should be near 0 at the start
        "torch": torch.__version__,
        "reptile_ext": __version__,
        "python": platform.python_version(),
        "allocator": _allocator(),
        "temperature": TEMPERATURE,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _allocator() -> str:
    """The memory allocator of this process, and whether the system backs it by huge pages."""
    try:
        maps = Path("/proc/self/maps").read_text()
        huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "the system's"
    preloaded = [name for name in ("jemalloc", "tcmalloc", "mimalloc") if f"/lib{name}" in maps]
    name = preloaded[0] if preloaded else " ".join(platform.libc_ver()) + " malloc"
    return f"{name}, huge pages {huge[huge.find('[') + 1 : huge.find(']')]}"
