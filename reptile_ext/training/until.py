"""When a training stops, where it stands, and what it came to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .metrics import METRICS, better


@dataclass(frozen=True)
class Until:
    """When training is good enough: at the first of the conditions that are given.

    steps:    optimizer steps.
    minutes:  of training, earlier parts of a resumed run included.
    target:   value that `metric` must reach in an evaluation.
    patience: evaluations in a row without a better `metric`; the best student is then put back.
    metric:   one of `METRICS`.
    epochs:   passes over the data.
    """

    steps: int | None = None
    minutes: float | None = None
    metric: str = "loss"
    target: float | None = None
    patience: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}; got {self.metric!r}")
        for name in ("steps", "minutes", "epochs", "patience"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not hasattr(value, "__float__"):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not (value > 0 and math.isfinite(value) and (name == "minutes" or value == int(value))):
                kind = "" if name == "minutes" else " whole number"
                raise ValueError(f"{name} must be a positive{kind or ' number'}; got {value!r}")
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"target must be a finite number; got {self.target!r}")
        if self.steps is self.minutes is self.epochs is self.target is self.patience is None:
            raise ValueError(
                "until needs at least one of steps, minutes, epochs, target, patience; got none: it would never end"
            )

    def check_measured(self, metrics: tuple[str, ...], has_eval: bool) -> None:
        """Raise a ValueError if a condition needs an evaluation, or a metric, that `fit` does not have."""
        if self.target is None and self.patience is None:
            return
        if not has_eval:
            raise ValueError("until.target and until.patience need eval; got eval=None")
        if self.metric not in ("loss", *metrics):
            raise ValueError(f"until.metric={self.metric!r} is not among the metrics measured: {('loss', *metrics)}")

    def reason_to_stop(self, progress: Progress) -> str | None:
        """The condition that `progress` fulfils, in words, or None."""
        if self.steps is not None and progress.step >= self.steps:
            return f"{self.steps} steps"
        if self.minutes is not None and progress.seconds >= 60 * self.minutes:
            return f"{self.minutes:g} minutes"
        if self.epochs is not None and progress.epochs >= self.epochs:
            return f"{self.epochs} epochs"
        value = progress.metrics.get(self.metric)
        if (
            self.target is not None
            and value is not None
            and (value == self.target or better(self.metric, value, self.target))
        ):
            return f"{self.metric} {value:.4g} reached {self.target:g}"
        if self.patience is not None and progress.stale >= self.patience:
            return f"no better {self.metric} in {self.patience} evaluations"
        return None


@dataclass
class Progress:
    """Where a run is; what a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    rows: int = 0
    epochs: int = 0  # whole passes over the data; known as soon as they end only where until.epochs asks
    metrics: dict[str, float] = field(default_factory=dict)  # the latest evaluation
    best_metrics: dict[str, float] = field(default_factory=dict)  # the evaluation best in until.metric
    stale: int = 0  # evaluations since then

    def evaluated(self, metrics: dict[str, float], metric: str) -> bool:
        """Take in an evaluation; whether it is the best so far in `metric`."""
        self.metrics = metrics
        is_best = better(metric, metrics[metric], self.best_metrics.get(metric))
        self.stale = 0 if is_best else self.stale + 1
        if is_best:
            self.best_metrics = metrics
        return is_best


@dataclass(frozen=True)
class Result:
    """What `fit` did: `metrics` is the last evaluation, or the best one when patience ended the run."""

    steps: int
    seconds: float
    rows: int
    reason: str
    metrics: dict[str, float]
