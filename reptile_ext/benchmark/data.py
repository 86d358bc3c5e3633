"""The cases of the benchmark, and the logits that they are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import distillation_loss
from ..options import DIVERGENCES
from ..timing import DTYPES, LARGE_PAIRS, Logits, needs_labels

PAIRS = 32_768_000  # pairs of student's and teacher's logits in a large case

_SMALL = ((64, 10), (4096, 10), (64, 100), (1024, 100), (64, 1000), (1024, 1000), (256, 4096))
_LARGE = tuple((round(PAIRS / v), v) for v in (32_000, 50_257, 128_256, 151_936, 262_144))
SHAPES = {
    "default": _SMALL + _LARGE,
    "small": _SMALL,
    "large": _LARGE,
    "quick": ((64, 10), (1024, 100), (256, 32_000)),
}
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
        """Beyond the caches: such a case has a streaming limit, starts with cold caches and has its peak measured."""
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
    """The cases of a named set, those of a dtype and shape together.

    With `vocab`, those of these sizes only (a size that the set lacks gets `pairs` pairs); with `pairs`, with as many
    rows as make about that number of pairs; with `divergences` ("all" for all of them), of these instead of what
    `TARGETED` says.

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
    if vocab is not None and any(v >= 2**31 for v in vocab):
        raise ValueError(f"vocab must be sizes below 2,147,483,648; got {tuple(vocab)}")
    if pairs is not None and not pairs > 0:
        raise ValueError(f"pairs must be a positive number; got {pairs!r}")
    if pairs is not None and pairs > 1e12:
        raise ValueError(f"pairs must be at most 1e12; got {pairs!r}")
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
    by_shape = [Case(dtype, *shape) for dtype in dtypes for shape in ordered]
    return [case._replace(divergence=d) for case in by_shape for d in divergences_of(case)]


class Data(Logits):
    """The logits and labels of all cases of a dtype, and what the contenders write."""

    def __init__(self, dtype: str, max_pairs: int) -> None:
        super().__init__(dtype, max_pairs)
        self._leaf = torch.empty(0)

    def logits(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and a buffer of their size, each [rows, vocab]."""
        return self.of_shape(case.rows, case.vocab)

    def leaf(self, case: Case) -> Tensor:
        """The student's logits as a leaf, one for all contenders of a shape: they hold one gradient, not one each."""
        if self._leaf.shape != (case.rows, case.vocab):
            self._leaf = self.logits(case)[0].detach().requires_grad_()
        return self._leaf

    def labels(self, case: Case) -> Tensor | None:
        """None where the divergence has no use for them."""
        if not needs_labels(distillation_loss, case.divergence):
            return None
        return torch.randint(case.vocab, (case.rows,), generator=torch.Generator().manual_seed(0))
