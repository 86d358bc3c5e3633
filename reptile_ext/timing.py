"""How everything here is timed: contenders take turns in one process, so that a slow second hits all of them.

Every round is in another order. A time is the median over the rounds and comes with its quartiles; memory is the peak
of a step over what was there before it. A contender that fails, because it is not installed, does not run on the device
or needs more memory than there is, is reported by name with the reason, and the others go on.

Imports nothing of this package: `benchmarks/compare.py` loads this file by its path, to time other builds with it.
"""

from __future__ import annotations

import ctypes
import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGE_PAIRS = 1 << 22  # pairs of student's and teacher's logits from which on a case is larger than the caches
FLUSH_BYTES = 1 << 27


@dataclass
class Contender:
    """`step(setup())`, of which `step` alone is timed."""

    name: str
    setup: Callable[[], Any]
    step: Callable[[Any], Any]

    def run(self) -> Any:
        return self.step(self.setup())


def made(name: str, make: Callable[[], Contender]) -> Contender:
    """What `make` makes; where that fails (a library is not installed), a contender that fails for the same reason."""
    try:
        return make()
    except Exception as error:
        why = error

    def fail() -> NoReturn:
        raise why

    return Contender(name, fail, lambda _: None)


@dataclass(eq=False)
class Measured:
    """What is known of a contender. Where `failed` says why there is no time, `ns` is empty."""

    name: str
    ns: list[int] = field(default_factory=list)
    extra_bytes: int | None = None
    failed: str | None = None

    @property
    def ms(self) -> tuple[float, float, float]:
        """First quartile, median and third quartile of the times, in milliseconds."""
        return quartiles([ns / 1e6 for ns in self.ns])

    def as_json(self) -> dict[str, Any]:
        """Name and times, or name and reason."""
        if self.failed is not None:
            return {"contender": self.name, "failed": self.failed}
        return {
            "contender": self.name,
            "ms": dict(zip(("q1", "median", "q3"), self.ms, strict=True)),
            "extra_bytes": self.extra_bytes,
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


class Stopwatch:
    """Nanoseconds of a step.

    On a GPU that is until the device has done it, its launches included; with `launches=False`, the device's time
    alone, by its own clock.
    """

    def __init__(self, device: str | torch.device = "cpu", launches: bool = True) -> None:
        self._device = torch.device(device)
        self._is_cuda = self._device.type == "cuda"
        self._events: list[Any] = []
        if self._is_cuda and not launches:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def time(self, step: Callable[[Any], Any], given: Any) -> int:
        if self._events:
            start, stop = self._events
            # The device is busy while the host launches, so that the host's own time is not in the figure.
            torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
            start.record()
            step(given)
            stop.record()
            stop.synchronize()
            return int(1e6 * start.elapsed_time(stop))
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        begin = time.perf_counter_ns()
        step(given)
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        return time.perf_counter_ns() - begin

    def in_a_row(self, of: Contender, *, least: int = 1, most: int = 1, enough_ns: float = 0) -> list[int]:
        """`least` steps, and more until there are `most` or they have taken `enough_ns`."""
        times: list[int] = []
        total = 0
        while len(times) < least or (len(times) < most and total < enough_ns):
            times.append(self.time(of.step, of.setup()))
            total += times[-1]
        return times


class Turns:
    """Runs contenders in turn and keeps what it finds in `measured`, in their order.

    catch: the errors of a contender that make it fail, instead of the caller.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        device: str | torch.device = "cpu",
        *,
        launches: bool = True,
        catch: type[Exception] = Exception,
    ) -> None:
        # Apart from one another: what is measured outlives the contenders, which hold the tensors.
        self._contenders = {Measured(c.name): c for c in contenders}
        self.measured = list(self._contenders)
        self._device = torch.device(device)
        self._stopwatch = Stopwatch(device, launches)
        self._catch = catch

    def run(self, one: Measured) -> Any:
        """What a step returns, untimed: a warm-up, and for checking results. None if the contender fails."""
        return self._attempt(one, self._contenders[one].run)

    def take_turns(
        self, rounds: int, *, warm_up: bool = False, in_a_row: int = 1, enough_ns: float = 0, seed: int = 0
    ) -> None:
        """Time the contenders.

        warm_up: begin every turn with an untimed step, so that memory and threads are in the state that the
            contender's own last step left, as in a training loop, and not in another's.
        in_a_row, enough_ns: steps of a turn, and the time after which it has no more.
        """

        def turn(of: Contender) -> list[int]:
            if warm_up:
                of.run()
            return self._stopwatch.in_a_row(of, most=in_a_row, enough_ns=enough_ns)

        in_turn, order = list(self.measured), random.Random(seed)
        for _ in range(rounds):
            order.shuffle(in_turn)
            for one in in_turn:
                one.ns += self._attempt(one, functools.partial(turn, self._contenders[one])) or []

    def measure_peaks(self, repeats: int = 1, release: Callable[[], object] | None = None) -> None:
        """Fill `extra_bytes`, the median of `repeats`; see `peak_bytes`."""
        for one in self.measured:
            found = [
                self._attempt(one, functools.partial(peak_bytes, self._contenders[one], self._device, release))
                for _ in range(repeats)
            ]
            one.extra_bytes = None if None in found else statistics.median_low(found)

    def _attempt(self, one: Measured, action: Callable[[], Any]) -> Any:
        """What `action` returns; None of a contender that fails in it, or has failed before."""
        if one.failed is not None:
            return None
        try:
            return action()
        except self._catch as error:
            one.failed = reason(error)
            one.ns.clear()
            one.extra_bytes = None
            return None


def reason(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def peak_bytes(
    of: Contender, device: str | torch.device = "cpu", release: Callable[[], object] | None = None
) -> int | None:
    """Peak of the memory during a step over what there was before it; None where the system does not tell.

    On a GPU the memory that is allocated, else the process's resident memory. A new gradient counts. What a library
    keeps from call to call counts if `release` gives it back before the step.
    """
    given = of.setup()
    if release is not None:
        release()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        of.step(given)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        resident = _status("VmRSS")
        of.step(given)
        return max(0, _status("VmHWM") - resident)
    except OSError:
        return None


def highest_memory(of: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Run `of`; return the most memory that there was meanwhile, what was there before included; None where the system
    does not tell. On a GPU the memory that is allocated, else the process's resident memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        of()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    tells = Path("/proc/self/clear_refs")
    try:
        _trim()
        tells.write_text("5")
    except OSError:
        of()
        return None
    of()
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of this process, as the system has them under `key`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


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


# ------------------------------------------------------------------------------------------- what losses are timed on


class Logits:
    """Random logits of student and teacher and a buffer of their size, all cut from memory for `max_pairs` of them."""

    def __init__(self, dtype: str, max_pairs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._student, self._teacher = (
            torch.randn(max_pairs, generator=generator).mul_(2.0).to(DTYPES[dtype]) for _ in range(2)
        )
        self._buffer = torch.empty_like(self._student)

    def of_shape(self, rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and buffer, each [rows, vocab]."""
        student, teacher, buffer = (
            x[: rows * vocab].view(rows, vocab) for x in (self._student, self._teacher, self._buffer)
        )
        return student, teacher, buffer


def needs_labels(loss_of: Callable[..., Tensor], divergence: str) -> bool:
    """Whether `distillation_loss`, which is `loss_of`, refuses to compute a divergence without labels."""
    logits = torch.zeros(1, 2)
    try:
        loss_of(logits, logits, divergence=divergence)
    except ValueError:
        return True
    return False


def flush_caches() -> None:
    """Fill the processor's caches with other data."""
    _other_data().sum()


@functools.cache
def _other_data() -> Tensor:
    return torch.ones(FLUSH_BYTES // 4)


class _Produced(torch.autograd.Function):
    """Stands for the student: its output is a buffer that exists already, and it drops the gradient it gets."""

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, values: list[Tensor]) -> Tensor:
        return values[0].detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None]:
        return None, None


def produced(buffer: Tensor) -> Tensor:
    """`buffer` as logits that may be overwritten: not a leaf, and part of a graph."""
    result: Tensor = _Produced.apply(torch.zeros((), requires_grad=True), [buffer])  # type: ignore[no-untyped-call]
    return result
