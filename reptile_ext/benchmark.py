"""Times the fused loss against plain PyTorch on this machine: `reptile benchmark`, and the cases of `benchmarks/`.

What is timed is forward and backward of a divergence as a user calls it, with gradients cleared before, at T = 2:

    ours in place   distillation_loss(s, t, divergence=d, temperature=2.0, inplace=True), s the output of another node
                    of the graph
    ours            distillation_loss(s, t, divergence=d, temperature=2.0)
    eager           d in plain PyTorch, as in eager.py
    eager fp32      the same of s.float() and t.float(); for float32 logits that is eager itself, and left out
    torch.compile   eager, compiled for exactly this shape
    limit           no loss: reads s and t and writes as much past the caches, on as many threads. Nothing that touches
                    memory as often as the fused loss must can be faster.

How: all contenders of all divergences of a shape run in one process, in turn, in an order that is shuffled for every
round. A turn begins with a step that does not count, so that memory and threads are in the state that the contender's
own last step left, as in a training loop, and not in another's. Then large logits are timed once, with caches full of
other data, small ones several times in a row with warm caches. Every time is the median over the rounds and is given
with the quartiles. Losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import ctypes
import datetime
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._C import stream_limit
from ._version import __version__
from .arguments import DIVERGENCES
from .eager import EAGER, TEMPERATURE
from .functional import distillation_loss
from .linear import release_scratch

__all__ = ["DTYPES", "SHAPES", "TEMPERATURE", "Case", "Contender", "Data", "cases", "contenders", "run"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS = 32_768_000  # student-teacher pairs of logits in a large case

LARGE_PAIRS = 1 << 22  # from here on a case is beyond the caches: a streaming limit, cold caches and a peak of memory
COMPILE_VOCAB = 1000  # torch.compile takes seconds a case, and below this size has nothing to show
NAMES = ("ours in place", "ours", "eager", "eager fp32", "torch.compile", "limit")
IN_A_ROW, TURN_NS = 200, 20_000_000  # a small case's steps in one turn, as in a training loop: at most so many, so long
FLUSH_BYTES = 1 << 27

_SMALL = ((64, 10), (4096, 10), (64, 100), (1024, 100), (64, 1000), (1024, 1000), (256, 4096))
_LARGE = tuple((round(PAIRS / v), v) for v in (32_000, 50_257, 128_256, 151_936, 262_144))
SHAPES = {
    "default": _SMALL + _LARGE,
    "small": _SMALL,
    "large": _LARGE,
    "quick": ((64, 10), (1024, 100), (256, 32_000)),
}
BASELINES = ("eager", "eager fp32", "torch.compile")
# Measured unless told otherwise: of large float32 logits of these sizes the divergences whose speed has a target
# relative to forward KL's, else forward KL alone.
TARGETED, TARGETED_VOCABS = ("forward_kl", "reverse_kl", "jsd"), (32_000, 128_256)


class Case(NamedTuple):
    """A divergence of logits of shape [rows, vocab]."""

    dtype: str
    rows: int
    vocab: int
    divergence: str = "forward_kl"

    @property
    def pairs(self) -> int:
        return self.rows * self.vocab

    @property
    def is_large(self) -> bool:
        return self.pairs >= LARGE_PAIRS

    def __str__(self) -> str:
        return f"{self.divergence} {self.dtype} [{self.rows}, {self.vocab}]"


def cases(
    shapes: str = "default",
    dtypes: Sequence[str] = tuple(DTYPES),
    vocab: Sequence[int] | None = None,
    pairs: float | None = None,
    divergences: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a named set, those of a dtype and shape together; with `vocab`, those of these sizes only (a size
    that the set lacks gets `pairs` pairs); with `pairs`, with as many rows as make about that number of pairs; with
    `divergences` ("all" for all of them), of these instead of what `TARGETED` says.

    Raises:
        ValueError: a name that is not known, or a number that is not positive.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes must be one of {', '.join(map(repr, SHAPES))}; got {shapes!r}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be of {', '.join(map(repr, DTYPES))}; got {dtype!r}")
    if vocab is not None and any(v < 1 for v in vocab):
        raise ValueError(f"vocab must be positive sizes; got {tuple(vocab)}")
    if pairs is not None and not pairs > 0:
        raise ValueError(f"pairs must be a positive number; got {pairs!r}")
    if divergences is not None and tuple(divergences) == ("all",):
        divergences = DIVERGENCES
    for divergence in divergences or ():
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergences must be 'all' or of {', '.join(map(repr, DIVERGENCES))}; got {divergence!r}")

    def rows_of(v: int) -> int:
        return max(1, round((pairs or PAIRS) / v))

    chosen = list(SHAPES[shapes])
    if vocab is not None:
        known = {v for _, v in chosen}
        chosen = [(n, v) for n, v in chosen if v in vocab] + [(rows_of(v), v) for v in vocab if v not in known]
    if pairs is not None:
        chosen = [(rows_of(v), v) for _, v in chosen]

    def divergences_of(case: Case) -> Sequence[str]:
        if divergences is not None:
            return tuple(dict.fromkeys(divergences))
        has_targets = case.is_large and case.dtype == "float32" and case.vocab in TARGETED_VOCABS
        return TARGETED if has_targets else ("forward_kl",)

    ordered = sorted(dict.fromkeys(chosen), key=lambda shape: shape[::-1])
    of_shapes = [Case(dtype, *shape) for dtype in dtypes for shape in ordered]
    return [case._replace(divergence=d) for case in of_shapes for d in divergences_of(case)]


class Data:
    """Memory that the cases of one dtype share: random logits and labels, and what the contenders write."""

    def __init__(self, dtype: str, max_pairs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._student, self._teacher = (
            torch.randn(max_pairs, generator=generator).mul_(2.0).to(DTYPES[dtype]) for _ in range(2)
        )
        self._buffer = torch.empty_like(self._student)
        self._flush = torch.ones(FLUSH_BYTES // 4)
        self._leaf = torch.empty(0)

    def logits(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and a buffer of their size, each [rows, vocab]."""
        student, teacher, buffer = (
            x[: case.pairs].view(case.rows, case.vocab) for x in (self._student, self._teacher, self._buffer)
        )
        return student, teacher, buffer

    def leaf(self, case: Case) -> Tensor:
        """The student's logits as a leaf, one for all contenders of a shape: they hold one gradient, not one each."""
        if self._leaf.shape != (case.rows, case.vocab):
            self._leaf = self.logits(case)[0].detach().requires_grad_()
        return self._leaf

    def labels(self, case: Case) -> Tensor | None:
        """None where the divergence has no use for them."""
        if case.divergence != "dkd":
            return None
        return torch.randint(case.vocab, (case.rows,), generator=torch.Generator().manual_seed(0))

    def flush_caches(self) -> None:
        self._flush.sum()


@dataclass
class Contender:
    """`setup` is outside the time, `step` is what is timed and returns the loss, `gradient` is what it left."""

    name: str
    setup: Callable[[], None]
    step: Callable[[], Tensor | None]
    gradient: Callable[[], Tensor | None] = lambda: None


def ours(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    inplace: bool = False,
) -> Tensor:
    return distillation_loss(student, teacher, labels, divergence=divergence, temperature=TEMPERATURE, inplace=inplace)


class _Produced(torch.autograd.Function):
    """Stands for the student: its output is a buffer that exists already, and it drops the gradient it gets."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, values: list[Tensor]) -> Tensor:
        return values[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def produced(buffer: Tensor) -> Tensor:
    """`buffer` as logits that may be overwritten: not a leaf, and part of a graph."""
    result: Tensor = _Produced.apply(torch.zeros((), requires_grad=True), [buffer])  # type: ignore[no-untyped-call]
    return result


def contenders(case: Case, data: Data, compile: bool = True) -> list[Contender]:
    """Everything that `case` compares; without torch.compile where `compile` is False, or the classes are few."""
    student, teacher, buffer = data.logits(case)
    leaf, labels = data.leaf(case), data.labels(case)
    eager = EAGER[case.divergence]
    prepare = data.flush_caches if case.is_large else lambda: None

    def of_leaf(name: str, loss_of: Callable[[], Tensor]) -> Contender:
        def setup() -> None:
            leaf.grad = None
            prepare()

        def step() -> Tensor:
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return Contender(name, setup, step, lambda: leaf.grad)

    def in_place() -> Contender:
        logits = [buffer]

        def setup() -> None:
            buffer.copy_(student)
            logits[0] = produced(buffer)
            prepare()

        def step() -> Tensor:
            loss = ours(logits[0], teacher, labels, case.divergence, inplace=True)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return Contender("ours in place", setup, step, lambda: buffer)

    def limit() -> Contender:
        num_bytes = case.pairs * student.element_size()

        def step() -> None:
            stream_limit(student.data_ptr(), teacher.data_ptr(), buffer.data_ptr(), num_bytes, torch.get_num_threads())

        return Contender("limit", prepare, step)

    chosen = [
        in_place(),
        of_leaf("ours", lambda: ours(leaf, teacher, labels, case.divergence)),
        of_leaf("eager", lambda: eager(leaf, teacher, labels)),
    ]
    if case.dtype != "float32":
        chosen.append(of_leaf("eager fp32", lambda: eager(leaf.float(), teacher.float(), labels)))
    if compile and case.vocab >= COMPILE_VOCAB:
        # One shape at a time: else the ninth would hit the limit of recompilations. What a case of the same shape
        # compiles is compiled at its first step, after this.
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        chosen.append(of_leaf("torch.compile", lambda: compiled(leaf, teacher, labels)))
    if case.is_large:
        chosen.append(limit())
    return chosen


def check(case: Case, contender: Contender, loss: Tensor | None, exact: tuple[float, Tensor]) -> None:
    """Compare a loss and its gradient with those of eager PyTorch in float32 arithmetic.

    Raises:
        RuntimeError: they differ by more than the contender's arithmetic explains. Where that is float32: 1e-3 for the
            loss, 5e-3 for the gradient (tvd's jumps where p = q), 1e-2 for one that is rounded to bfloat16. Where
            log-probabilities were rounded to bfloat16 on the way: 1e-1. A gradient's error is that of the whole
            tensor, in the Euclidean norm.
    """
    gradient = contender.gradient()
    if loss is None or gradient is None:
        return
    narrow = case.dtype != "float32"
    rounds_inside = narrow and contender.name in ("eager", "torch.compile")
    errors = {
        "loss": (abs(loss.item() / exact[0] - 1), 1e-1 if rounds_inside else 1e-3),
        "gradient": (
            float((gradient.float() - exact[1]).norm() / exact[1].norm()),
            1e-1 if rounds_inside else 1e-2 if narrow else 5e-3,
        ),
    }
    for what, (error, tolerance) in errors.items():
        if not error <= tolerance:
            raise RuntimeError(
                f"{contender.name} computes a wrong {what} for {case}: {error:.1e} off eager PyTorch in float32, "
                f"{tolerance:.0e} allowed; there is no point in timing it"
            )


def _trim() -> None:
    """Give the memory that malloc keeps for later back to the system, so that its next use counts.

    glibc's malloc_trim does so with holes, but with the free end of an arena only if it is the main one: not in a
    thread, nor in the main thread after an allocation that failed, which moves it to another arena. So the end is made
    a hole: by blocks up to a last one that is not free yet. 64 MiB is the most it can be; larger blocks would lie
    elsewhere.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    *blocks, last = [libc.malloc(100 << 10) for _ in range(700)]
    for block in blocks:
        libc.free(block)
    libc.malloc_trim(0)
    libc.free(last)


def peak_extra_bytes(contender: Contender) -> int | None:
    """Peak of resident memory during a step over what was resident before; None where the system does not tell.

    The new gradient counts, and the scratch that the fused linear loss keeps. What a library keeps besides from call to
    call (ours: two float32 rows a thread) does not.
    """

    def status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(f"no {key} in /proc/self/status")

    contender.setup()
    release_scratch()
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        before = status("VmRSS")
        contender.step()
        return max(0, status("VmHWM") - before)
    except OSError:
        return None


@dataclass
class Result:
    """One contender in one case; `ms` are the quartiles, the median in the middle."""

    case: Case
    contender: str
    ms: tuple[float, float, float]
    loss: float | None
    extra_bytes: int | None
    against: dict[str, float]  # times as fast as each baseline
    share_of_limit: float | None
    share_of_forward_kl: float | None  # its speed over that of the same contender with forward_kl

    @property
    def ns_per_pair(self) -> float:
        return self.ms[1] * 1e6 / self.case.pairs

    def as_json(self) -> dict[str, Any]:
        return {
            "dtype": self.case.dtype,
            "rows": self.case.rows,
            "vocab": self.case.vocab,
            "divergence": self.case.divergence,
            "contender": self.contender,
            "ms": dict(zip(("q1", "median", "q3"), self.ms, strict=True)),
            "ns_per_pair": self.ns_per_pair,
            "times_as_fast_as": self.against,
            "share_of_limit": self.share_of_limit,
            "share_of_forward_kl": self.share_of_forward_kl,
            "extra_bytes": self.extra_bytes,
            "loss": self.loss,
        }


def measure(of_shape: Sequence[Case], data: Data, repeats: int, compile: bool) -> list[Result]:
    """Run the contenders of cases that differ in their divergence alone in turn, `repeats` rounds of it."""
    runners = {(case, c.name): c for case in of_shape for c in contenders(case, data, compile)}
    losses: dict[tuple[Case, str], float | None] = {}
    for case in of_shape:
        student, teacher, _ = data.logits(case)
        leaf = student.detach().float().requires_grad_()
        wanted = EAGER[case.divergence](leaf, teacher.float(), data.labels(case))
        exact = (wanted.item(), torch.autograd.grad(wanted, leaf)[0])
        for key, runner in runners.items():
            if key[0] == case:
                runner.setup()
                loss = runner.step()
                check(case, runner, loss, exact)
                losses[key] = None if loss is None else loss.item()
        del leaf, wanted, exact
    extra = {key: peak_extra_bytes(runner) if key[0].is_large else None for key, runner in runners.items()}

    times: dict[tuple[Case, str], list[int]] = {key: [] for key in runners}
    in_turn, order = list(runners), random.Random(0)
    for _ in range(repeats):
        order.shuffle(in_turn)
        for key in in_turn:
            times[key] += _time_in_a_row(runners[key], 1 if key[0].is_large else IN_A_ROW)
    quartiles = {key: _quartiles(ns) for key, ns in times.items()}

    def result(case: Case, name: str) -> Result:
        def as_fast_as(case: Case, other: str) -> float | None:
            return quartiles[case, other][1] / ms[1] if (case, other) in quartiles else None

        ms = quartiles[case, name]
        against = {baseline: as_fast_as(case, baseline) for baseline in BASELINES}
        return Result(
            case,
            name,
            ms,
            losses[case, name],
            extra[case, name],
            {baseline: ratio for baseline, ratio in against.items() if ratio is not None},
            as_fast_as(case, "limit"),
            as_fast_as(case._replace(divergence="forward_kl"), name),
        )

    return [result(*key) for key in runners]


def _time_in_a_row(runner: Contender, most: int) -> list[int]:
    """Nanoseconds of each of up to `most` steps, one at least, and no more than a turn has time for."""
    runner.setup()
    runner.step()
    times: list[int] = []
    while not times or (len(times) < most and sum(times) < TURN_NS):
        runner.setup()
        start = time.perf_counter_ns()
        runner.step()
        times.append(time.perf_counter_ns() - start)
    return times


def _quartiles(ns: list[int]) -> tuple[float, float, float]:
    """In milliseconds."""
    if len(ns) == 1:
        return (ns[0] / 1e6,) * 3
    q1, median, q3 = statistics.quantiles((t / 1e6 for t in ns), n=4, method="inclusive")
    return q1, median, q3


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


_COLUMNS = (
    ("contender", "<14"),
    ("ms", ">9"),
    ("quartiles", ">17"),
    ("ns/pair", ">8"),
    ("vs eager", ">9"),
    ("vs fp32", ">9"),
    ("vs compile", ">11"),
    ("of limit", ">9"),
    ("of fwd_kl", ">10"),
    ("extra MB", ">9"),
    ("loss", ">9"),
)
HEADER = " ".join(f"{title:{width}}" for title, width in _COLUMNS)


def _table_row(r: Result) -> str:
    def ratio(baseline: str) -> str:
        return f"{r.against[baseline]:.2f}x" if baseline in r.against else "-"

    def share(of: float | None) -> str:
        return "-" if of is None else f"{of:.0%}"

    cells = (
        r.contender,
        f"{r.ms[1]:.4g}",
        f"{r.ms[0]:.4g} - {r.ms[2]:.4g}",
        f"{r.ns_per_pair:.3g}",
        ratio("eager"),
        ratio("eager fp32"),
        ratio("torch.compile"),
        share(r.share_of_limit),
        share(r.share_of_forward_kl),
        "-" if r.extra_bytes is None else f"{r.extra_bytes / 1e6:.1f}",
        "-" if r.loss is None else f"{r.loss:.5f}",
    )
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def run(
    shapes: str = "default",
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    repeats: int = 7,
    threads: int | None = None,
    out: Path | None = None,
    vocab: tuple[int, ...] | None = None,
    pairs: float | None = None,
    compile: bool = True,
    plot: Path | None = None,
    divergences: Sequence[str] | None = None,
) -> int:
    """Print a table for each dtype; write the figures to `out` (JSON) and a chart to `plot` (PNG). Returns 0.

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
    chosen = cases(shapes, dtypes, vocab, pairs, divergences)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    if plot is not None:
        _pyplot()  # find out now, not after minutes
    if compile and shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        print("without torch.compile, which needs a C++ compiler: install g++", file=sys.stderr)
        compile = False
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
        document = {"environment": about, "repeats": repeats, "results": [r.as_json() for r in results]}
        _write(out, lambda path: path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8"))
    if plot is not None:
        _write(plot, lambda path: _draw(results, about, path))
    for path in (out, plot):
        if path is not None:
            print(f"wrote {path}")
    return 0


def _measure_and_print(chosen: list[Case], repeats: int, compile: bool) -> Iterator[Result]:
    for dtype in dict.fromkeys(case.dtype for case in chosen):
        of_dtype = [case for case in chosen if case.dtype == dtype]
        data = Data(dtype, max(case.pairs for case in of_dtype))
        print(f"\n{dtype}, forward + backward; extra MB: peak memory of a step over what was there before")
        print(HEADER)
        for shape, of_shape in itertools.groupby(of_dtype, key=lambda case: (case.rows, case.vocab)):
            size = math.prod(shape) * DTYPES[dtype].itemsize / 1e6
            print(f"{list(shape)}, logits of {size:.3g} MB each", flush=True)
            results = measure(list(of_shape), data, repeats, compile)
            for divergence, of_divergence in itertools.groupby(results, key=lambda r: r.case.divergence):
                print(f"{divergence}:")
                print("\n".join(map(_table_row, of_divergence)), flush=True)
            yield from results


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write all of a file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the chart needs matplotlib: pip install 'reptile_ext[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(results: list[Result], about: dict[str, Any], path: Path) -> None:
    """Time a pair over V: all contenders of the first divergence, ours in place of the others. Of cases with the same V
    the one with most rows."""
    pyplot = _pyplot()
    first = results[0].case.divergence

    def label(r: Result) -> str:
        return r.contender if r.case.divergence == first else f"{r.contender}, {r.case.divergence}"

    drawn = [r for r in results if r.case.divergence == first or r.contender == "ours in place"]
    dtypes = list(dict.fromkeys(r.case.dtype for r in results))
    drawn.sort(key=lambda r: (r.case.divergence != first, NAMES.index(r.contender)))
    labels = list(dict.fromkeys(map(label, drawn)))
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.5), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for i, name in enumerate(labels):
            points = {}
            for r in sorted((r for r in drawn if (r.case.dtype, label(r)) == (dtype, name)), key=lambda r: r.case):
                points[r.case.vocab] = r.ns_per_pair
            if points:
                style = {"color": "black", "linestyle": "--"} if name == "limit" else {"color": colours(i)}
                vs = sorted(points)
                axis.plot(vs, [points[v] for v in vs], label=name, marker="o", markersize=4, **style)
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="classes V")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ns a pair of logits")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    axes[0][-1].legend([lines[name] for name in labels], labels, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"{first}, {about['cpu']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight")
    pyplot.close(figure)
