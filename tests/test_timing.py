"""The harness that all benchmarks share: who is run how often, who fails alone, and what is reported. No time is."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import reptile_ext
from reptile_ext.options import DIVERGENCES
from reptile_ext.timing import Contender, Stopwatch, Turns, made, needs_labels, peak_bytes, quartiles

tells_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux tells it"
)


def counted(name: str, steps: list[str], fail: Callable[[int], Exception | None] = lambda _: None) -> Contender:
    """Writes its name down at every step, and raises what `fail` makes of their number."""

    def step(given: str) -> str:
        assert given == f"for {name}"
        steps.append(name)
        if error := fail(steps.count(name)):
            raise error
        return f"of {name}"

    return Contender(name, lambda: f"for {name}", step)


def test_every_contender_has_its_turn_in_every_round_in_changing_order() -> None:
    steps: list[str] = []
    turns = Turns([counted(name, steps) for name in "abc"])
    turns.take_turns(20)
    rounds = [tuple(steps[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6
    assert [len(one.ns) for one in turns.measured] == [20] * 3
    again: list[str] = []
    Turns([counted(name, again) for name in "abc"]).take_turns(20)
    assert again == steps


def test_a_turn_may_have_several_steps_and_one_that_does_not_count() -> None:
    steps: list[str] = []
    turns = Turns([counted("a", steps)])
    turns.take_turns(2, warm_up=True, in_a_row=5, enough_ns=float("inf"))
    assert len(steps) == 2 * (1 + 5)
    assert len(turns.measured[0].ns) == 2 * 5
    turns.take_turns(1, in_a_row=5)  # a turn has at least one, however long it takes
    assert len(turns.measured[0].ns) == 2 * 5 + 1
    assert len(Stopwatch().in_a_row(counted("b", []), least=3, most=9)) == 3


@pytest.mark.parametrize("when", ["made", "set up", "run", "timed", "measured"])
def test_a_contender_that_fails_is_named_with_its_reason_and_the_others_go_on(when: str) -> None:
    steps: list[str] = []
    number = {"run": 1, "timed": 3, "measured": 5}.get(when)
    bad = counted("bad", steps, lambda n: torch.OutOfMemoryError("tried to\nallocate 2 GiB") if n == number else None)

    def not_installed() -> Contender:
        raise ModuleNotFoundError("No module named 'bird'")

    def no_kernels() -> None:
        raise ValueError("Pointer argument cannot be accessed")

    if when == "made":
        bad = made("bad", not_installed)
    elif when == "set up":
        bad = Contender("bad", no_kernels, lambda _: None)
    turns = Turns([counted("a", steps), bad, counted("z", steps)])
    results = {one.name: turns.run(one) for one in turns.measured}
    turns.take_turns(3)
    turns.measure_peaks(2)
    first, failed, last = turns.measured
    assert failed.failed == {
        "made": "ModuleNotFoundError: No module named 'bird'",
        "set up": "ValueError: Pointer argument cannot be accessed",
    }.get(when, "OutOfMemoryError: tried to")
    assert failed.as_json() == {"contender": "bad", "failed": failed.failed}
    assert failed.ns == []
    assert Counter(steps)["bad"] == (number or 0)
    for one in (first, last):
        assert results[one.name] == f"of {one.name}"
        assert Counter(steps)[one.name] == 1 + 3 + 2
        assert one.failed is None
        assert set(one.as_json()) == {"contender", "ms", "extra_bytes"}
        assert one.as_json()["ms"]["q1"] <= one.as_json()["ms"]["median"] <= one.as_json()["ms"]["q3"]
    assert results["bad"] == ("of bad" if when in ("timed", "measured") else None)


def test_other_errors_are_the_caller_s() -> None:
    def broken(_: int) -> Exception:
        return ValueError("a bug")

    turns = Turns([counted("a", [], broken)], catch=torch.OutOfMemoryError)
    with pytest.raises(ValueError, match="a bug"):
        turns.run(turns.measured[0])
    interrupted = Turns([Contender("a", lambda: None, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))])
    with pytest.raises(KeyboardInterrupt):
        interrupted.take_turns(1)


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    values = random.Random(0).sample(range(101), 101)
    assert quartiles(values) == (25, 50, 75)


@tells_peaks
def test_a_peak_is_that_of_the_step_alone() -> None:
    """What `setup` makes is there before; what `release` gives back, and the step needs again, counts."""
    size = 64 << 20
    kept: list[torch.Tensor] = []

    def needs(num_bytes: int) -> torch.Tensor:
        return torch.ones(num_bytes, dtype=torch.uint8)

    def keep(_: Any) -> None:
        if not kept:
            kept.append(needs(size))

    def found(setup: Callable[[], Any], step: Callable[[Any], Any], release: Callable[[], Any] | None = None) -> float:
        peak = peak_bytes(Contender("", setup, step), "cpu", release)
        assert peak is not None
        return peak / size

    assert found(lambda: None, lambda _: needs(size)) == pytest.approx(1, abs=0.1)
    assert found(lambda: needs(size), lambda x: None) < 0.1
    assert found(lambda: needs(size), lambda x: x + x) == pytest.approx(1, abs=0.1)
    keep(None)
    assert found(lambda: None, keep) < 0.1
    assert found(lambda: None, keep, kept.clear) == pytest.approx(1, abs=0.1)


@tells_peaks
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="gives freed memory back as glibc does")
def test_memory_that_the_allocator_kept_from_before_counts() -> None:
    """Blocks too small to be mapped one by one: freed, they stay with malloc, and the step gets them again."""

    def blocks(_: Any) -> list[torch.Tensor]:
        return [torch.ones(100_000, dtype=torch.uint8) for _ in range(400)]

    before = blocks(None)
    plug = torch.ones(100_000, dtype=torch.uint8)  # at the end of the heap, which would else shrink by itself
    before.clear()
    assert peak_bytes(Contender("", lambda: None, blocks)) == pytest.approx(400 * 100_000, rel=0.1)
    assert plug.all()


@tells_peaks
def test_peaks_are_medians() -> None:
    sizes = iter([16 << 20, 256 << 20, 128 << 20])
    turns = Turns([Contender("a", lambda: next(sizes), lambda n: torch.ones(n, dtype=torch.uint8))])
    turns.measure_peaks(3)
    assert turns.measured[0].extra_bytes == pytest.approx(128 << 20, rel=0.1)


def test_which_divergences_need_labels_is_asked() -> None:
    assert {d for d in DIVERGENCES if needs_labels(reptile_ext.distillation_loss, d)} == {"dkd"}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux tells it")
def test_the_peak_counts_memory_that_was_free_before() -> None:
    """In the main thread, in another, and after an allocation that failed: malloc has another place for it each time.

    In a process of its own, as the last is for good."""
    code = """
import threading, torch
from reptile_ext.timing import Contender, peak_bytes

def step(_):
    torch.empty(12_000_000, dtype=torch.uint8).fill_(1)

def print_peaks():
    torch.empty(30_000_000, dtype=torch.uint8)  # from now on malloc keeps memory of less than that
    step(None)
    print(*(peak_bytes(Contender("", lambda: None, step)) for _ in range(4)))

print_peaks()
thread = threading.Thread(target=print_peaks)
thread.start()
thread.join()
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError:
    print_peaks()
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peaks = [int(peak) for peak in result.stdout.split()]
    assert len(peaks) == 12
    assert all(11e6 < peak < 15e6 for peak in peaks), result.stdout
