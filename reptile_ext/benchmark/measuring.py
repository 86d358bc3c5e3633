"""The contenders of a shape take turns; what is made of their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..linear import release_scratch
from ..timing import Measured, Turns
from .data import Case, Data
from .losses import BASELINES, check, contenders, exact

IN_A_ROW, TURN_NS = 200, 20_000_000  # a small case's steps in one turn, as in a training loop: at most so many, so long


@dataclass
class Result:
    """One contender in one case."""

    case: Case
    measured: Measured
    loss: float | None
    against: dict[str, float]  # times as fast as each baseline
    share_of_limit: float | None
    share_of_in_place: float | None  # its speed over that of ours in place
    share_of_forward_kl: float | None  # its speed over that of the same contender with forward_kl

    @property
    def contender(self) -> str:
        return self.measured.name

    @property
    def failed(self) -> str | None:
        return self.measured.failed

    @property
    def ns_per_pair(self) -> float:
        return self.measured.ms[1] * 1e6 / self.case.pairs

    def as_json(self) -> dict[str, Any]:
        found = {**self.case._asdict(), **self.measured.as_json()}
        if self.failed is not None:
            return found
        return {
            **found,
            "ns_per_pair": self.ns_per_pair,
            "times_as_fast_as": self.against,
            "share_of_limit": self.share_of_limit,
            "share_of_in_place": self.share_of_in_place,
            "share_of_forward_kl": self.share_of_forward_kl,
            "loss": self.loss,
        }


def measure(same_shape: Sequence[Case], data: Data, repeats: int, compile: bool) -> list[Result]:
    """Run the contenders of cases that differ in their divergence alone in turn, `repeats` rounds of it."""
    chosen = [(case, contender) for case in same_shape for contender in contenders(case, data, compile)]
    turns = Turns([contender for _, contender in chosen])
    measured = {(case, one.name): one for (case, _), one in zip(chosen, turns.measured, strict=True)}
    losses: dict[tuple[Case, str], float] = {}
    for case in same_shape:
        wanted = exact(case, data)
        for key, one in measured.items():
            if key[0] == case and (found := turns.run(one)) is not None:
                check(*key, found, wanted)
                losses[key] = found[0].item()
                del found  # and its gradient
        del wanted
    is_large = same_shape[0].is_large
    if is_large:
        turns.measure_peaks(release=release_scratch)
    turns.take_turns(repeats, warm_up=True, in_a_row=1 if is_large else IN_A_ROW, enough_ns=TURN_NS)

    medians = {key: one.ms[1] for key, one in measured.items() if one.ns}

    def speed(case: Case, name: str, case_of_other: Case, other: str) -> float | None:
        """Times as fast as another contender; None where one of the two has not run."""
        ms, other_ms = medians.get((case, name)), medians.get((case_of_other, other))
        return None if ms is None or other_ms is None else other_ms / ms

    results = []
    for (case, name), one in measured.items():
        against = {baseline: speed(case, name, case, baseline) for baseline in BASELINES}
        results.append(
            Result(
                case,
                one,
                losses.get((case, name)),
                {baseline: ratio for baseline, ratio in against.items() if ratio is not None},
                speed(case, name, case, "limit"),
                speed(case, name, case, "ours in place"),
                speed(case, name, case._replace(divergence="forward_kl"), name),
            )
        )
    return results
