"""What the rows of a cache are like: for `reptile cache-info`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import format as fmt
from .reader import TeacherCache
from .tokens import tokens_of
from .vocabulary import Vocabulary

_SHOWN = 8  # classes of a row
_BEFORE = 40  # tokens of the text


def of_rows(cache: TeacherCache, samples: int, plot: Path | None) -> dict[str, Any]:
    """Quantiles of captured mass and entropy (in nats, of the K classes and the rest of the vocabulary as one more)
    over the positions of about so many samples, evenly spaced; with `plot`, histograms. Nothing for an empty cache."""
    if cache.kind == "hidden":
        if plot is not None:
            raise ValueError("plot is for log-probabilities; this cache holds hidden states")
        return {}
    masses, entropies = [], []
    for sample_id in itertools.islice(cache, 0, None, max(1, len(cache) // samples)):
        of_sample = _mass_and_entropy(_rows_of(cache, sample_id)[1])
        masses.append(of_sample[0])
        entropies.append(of_sample[1])
    mass, entropy = (torch.cat(x) if x else torch.empty(0) for x in (masses, entropies))
    if not len(mass):
        return {}
    shares = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    result: dict[str, Any] = {"mean_entropy": float(entropy.mean())}
    result |= {
        name: dict(zip(("1%", "10%", "50%", "90%", "99%"), values.quantile(shares).tolist(), strict=True))
        for name, values in (
            ("captured_mass_quantiles", mass[: 1 << 20]),
            ("entropy_quantiles", entropy[: 1 << 20]),
        )
    }
    if plot is not None:
        _draw(mass, entropy, cache, plot)
    return result


def examples(cache: TeacherCache, number: int, tokenizer: Path | None) -> list[dict[str, Any]]:
    """Positions in the middle of so many samples, evenly spaced: the text before, what the teacher says of what
    follows, and what did follow, in the tokenizer's words or as ids."""
    if cache.kind == "hidden":
        raise ValueError("examples are of log-probabilities; this cache holds hidden states")
    vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
    own = cache.info()["tokenizer"]
    if vocabulary is not None and own is not None and own != vocabulary.name:
        raise ValueError(
            f"tokenizer: the cache in {cache.folder} is of {own!r}, and {tokenizer} is {vocabulary.name!r}"
        )

    def said(ids: list[int]) -> Any:
        return ids if vocabulary is None else vocabulary.decode(ids)

    found = []
    step = max(1, len(cache) // number)
    for sample_id in itertools.islice(cache, step // 2, None, step):
        ids, log_probs = _rows_of(cache, sample_id)
        known = torch.nonzero((ids >= 0).any(-1)).flatten().tolist()
        if not known:
            continue
        t = known[len(known) // 2]
        mass, entropy = (float(x) for x in _mass_and_entropy(log_probs[t]))
        example: dict[str, Any] = {"sample_id": sample_id, "position": t}
        if (tokens := tokens_of(cache, sample_id)) is not None:
            example["before"] = said(tokens[max(0, t + 1 - _BEFORE) : t + 1])
            example["next"] = said(tokens[t + 1 : t + 2])
        top, places = log_probs[t].topk(min(_SHOWN, log_probs.shape[-1]))
        likeliest = [(i, p) for i, p in zip(ids[t][places].tolist(), top.exp().tolist(), strict=True) if i >= 0]
        example["likeliest"] = [
            f"{p:.4f} {i}" + ("" if vocabulary is None else f" {said([i])!r}") for i, p in likeliest
        ]
        found.append(example | {"captured_mass": mass, "entropy": entropy})
        if len(found) == number:
            break
    return found


def _rows_of(cache: TeacherCache, sample_id: fmt.SampleId) -> tuple[Tensor, Tensor]:
    """Classes and float64 log-probabilities, [T, K] or, of logits, [T, V] each."""
    if cache.kind in fmt.CODED:
        indices, log_probs = cache[sample_id]
        return indices, log_probs.double()
    log_probs = cache[sample_id].double().log_softmax(-1)
    return torch.arange(log_probs.shape[-1]).expand(log_probs.shape), log_probs


def _mass_and_entropy(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows [..., K]: what the classes add up to, and the entropy with the rest as one more class."""
    p = log_probs.exp()
    mass = p.sum(-1)
    rest = (1 - mass).clamp(min=0)
    return mass, -torch.where(p > 0, p * log_probs, 0).sum(-1) - torch.where(rest > 0, rest * rest.log(), 0)


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
