"""Times the sparse loss: `python benchmarks/sparse.py [--vocab V …] [--k K …] [--dtypes …] [--tails …] [--json FILE]`.

Forward and backward at T = 2 of forward KL, N · V logits, caches full of other data. Contenders take turns, as
`reptile_ext/timing.py` says; of `limit` (one read and one write of as much memory) is the share of its speed.

    ours in place  sparse_distillation_loss(s, indices, log_probs, tail=tail, temperature=2.0, inplace=True)
    ours           the same with a new gradient
    eager          as one writes it: log_softmax of the logits in float32, gather, and the divergence
    compiled       the same by torch.compile
    limit          no loss: reads s and writes as much past the caches
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from reptile_ext import sparse_distillation_loss, top_k_targets
from reptile_ext._C import stream_limit
from reptile_ext.benchmark import environment
from reptile_ext.eager import TEMPERATURE
from reptile_ext.files import write_json
from reptile_ext.options import TAILS
from reptile_ext.timing import DTYPES, Contender, Logits, Turns, flush_caches, produced


def eager(s: Tensor, indices: Tensor, y: Tensor, tail: str) -> Tensor:
    x = torch.log_softmax(s.float() / TEMPERATURE, -1).gather(-1, indices)
    if tail in ("restrict", "renormalize"):
        y = y - y.logsumexp(-1, keepdim=True)
    if tail == "restrict":
        x = x - x.logsumexp(-1, keepdim=True)
    p = y.exp()
    kl = (p * (y - x)).sum(-1)
    if tail == "bucket":
        r, rest = 1 - p.sum(-1), (1 - x.exp().sum(-1)).clamp(min=1e-7)
        kl = kl + r * (r.log() - rest.log())
    return kl.mean() * TEMPERATURE * TEMPERATURE


def contenders(
    logits: Logits, rows: int, vocab: int, k: int, tail: str, compiled: Callable[..., Tensor] | None
) -> Iterator[Contender]:
    student, teacher, buffer = logits.of_shape(rows, vocab)
    leaf = student.detach().requires_grad_()
    indices, log_probs = top_k_targets(teacher, k, TEMPERATURE)

    def ours(s: Tensor, inplace: bool = False) -> Tensor:
        return sparse_distillation_loss(s, indices, log_probs, tail=tail, temperature=TEMPERATURE, inplace=inplace)

    def to_overwrite() -> Tensor:
        found = produced(buffer.copy_(student))
        flush_caches()
        return found

    def without_gradient() -> Tensor:
        leaf.grad = None
        flush_caches()
        return leaf

    yield Contender("ours in place", to_overwrite, lambda s: ours(s, inplace=True).backward())
    yield Contender("ours", without_gradient, lambda s: ours(s).backward())
    yield Contender("eager", without_gradient, lambda s: eager(s, indices, log_probs, tail).backward())
    if compiled is not None:
        yield Contender("compiled", without_gradient, lambda s: compiled(s, indices, log_probs, tail).backward())
    size = student.numel() * student.element_size()
    pointers = student.data_ptr(), 0, buffer.data_ptr()
    yield Contender("limit", flush_caches, lambda _: stream_limit(*pointers, size, torch.get_num_threads()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--logits", type=int, default=32_768_000)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--tails", nargs="+", default=["bucket"], choices=TAILS)
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    warnings.simplefilter("ignore")
    about = environment()
    print("\n".join(f"{key:<16}{value}" for key, value in about.items()))
    compiled = torch.compile(eager) if o.compile else None
    results = []
    for dtype in o.dtypes:
        logits = Logits(dtype, o.logits)
        for vocab in o.vocab:
            for tail in o.tails:
                turns = Turns(list(contenders(logits, o.logits // vocab, vocab, o.k, tail, compiled)))
                turns.take_turns(o.repeats, warm_up=True)
                ms = {one.name: one.ms for one in turns.measured if one.ns}
                for one in turns.measured:
                    cell = one.failed or f"{ms[one.name][1]:8.2f} ms {ms['limit'][1] / ms[one.name][1]:6.0%} of limit"
                    print(f"{dtype:<10}{vocab:<8}{tail:<13}{one.name:<15}{cell}", flush=True)
                    results.append({"dtype": dtype, "vocab": vocab, "tail": tail, **one.as_json()})
    if o.json is not None:
        write_json(o.json, {"environment": about, "logits": o.logits, "k": o.k, "results": results})


if __name__ == "__main__":
    main()
