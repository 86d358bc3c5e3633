"""What changes from step to step, as a function of the number of steps done: rates, temperature, weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

SCHEDULES = ("constant", "linear", "cosine")
Schedule = Callable[[int], float]


def share_of_rate(schedule: str, warmup: int, total: int | None, step: int) -> float:
    """What part of the peak rate a schedule gives to the step after `step` others."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant" or total is None:
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def as_function(name: str, value: Any, total: int | None) -> Schedule:
    """A schedule of temperature or hard_weight as a function of the number of steps done."""
    if callable(value):
        return lambda step: float(value(step))
    found = re.fullmatch(r"(linear|cosine):([^→>]+?)(?:→|->)([^→>]+)", value.replace(" ", ""))
    try:
        kind, first, last = found.group(1), float(found.group(2)), float(found.group(3))  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        raise ValueError(
            f"{name} must be a number, a function of the step, or such as 'linear:4->1' or 'cosine:4->1'; got {value!r}"
        ) from None
    if total is None:
        raise ValueError(f"{name}={value!r} ends at until.steps; got until.steps=None and no epochs of a known length")
    return lambda step: last + (first - last) * share_of_rate(kind, 0, max(total - 1, 1), step)
