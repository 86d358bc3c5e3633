"""What the rows of a cache are like: for `reptile cache-info`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from . import format as fmt
from .reader import TeacherCache


def of_rows(cache: TeacherCache, samples: int, plot: Path | None) -> dict[str, Any]:
    """Quantiles of captured mass and entropy (in nats, of the K classes and the rest of the vocabulary as one more)
    over the positions of about so many samples, evenly spaced; with `plot`, histograms. Nothing for an empty cache."""
    if cache.kind == "hidden":
        if plot is not None:
            raise ValueError("plot is for log-probabilities; this cache holds hidden states")
        return {}
    masses, entropies = [], []
    for sample_id in itertools.islice(cache, 0, None, max(1, len(cache) // samples)):
        if cache.kind in fmt.CODED:
            log_probs = cache[sample_id][1].double()
        else:
            log_probs = cache[sample_id].double().log_softmax(-1)
        p = log_probs.exp()
        mass = p.sum(-1)
        rest = (1 - mass).clamp(min=0)
        entropies.append(-torch.where(p > 0, p * log_probs, 0).sum(-1) - torch.where(rest > 0, rest * rest.log(), 0))
        masses.append(mass)
    mass, entropy = (torch.cat(x) if x else torch.empty(0) for x in (masses, entropies))
    if not len(mass):
        return {}
    shares = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    result = {
        name: dict(zip(("1%", "10%", "50%", "90%", "99%"), values.quantile(shares).tolist(), strict=True))
        for name, values in (
            ("captured_mass_quantiles", mass[: 1 << 20]),
            ("entropy_quantiles", entropy[: 1 << 20]),
        )
    }
    if plot is not None:
        _draw(mass, entropy, cache, plot)
    return result


def _draw(mass: torch.Tensor, entropy: torch.Tensor, cache: TeacherCache, path: Path) -> None:
    from ..benchmark.report import pyplot_or_complain

    pyplot = pyplot_or_complain()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.hist(mass.numpy(), bins=60, range=(0, max(1.0, float(mass.max()))), log=True)
    left.set(xlabel="probability that the classes of a row hold", ylabel="positions")
    right.hist(entropy.numpy(), bins=60)
    right.set(xlabel="entropy, nats")
    figure.suptitle(f"{cache.folder.name}: {cache.kind}, {len(cache):,} samples, {len(mass):,} positions")
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)
