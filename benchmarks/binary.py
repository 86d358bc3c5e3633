"""Times the binary loss: `python benchmarks/binary.py [--elements N] [--dtypes …] [--divergences …] [--json FILE]`.

Forward and backward at T = 2 of N logits in one tensor, caches full of other data. Contenders take turns, as
`reptile_ext/timing.py` says; of `limit` (two reads and one write of as much memory) is the share of its speed.

    ours in place  binary_distillation_loss(s, t, divergence=d, temperature=2.0, inplace=True)
    ours           the same with a new gradient
    eager          forward KL alone, as one writes it: torch.sigmoid and F.logsigmoid
    limit          no loss: reads s and t and writes as much past the caches
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from reptile_ext import binary_distillation_loss
from reptile_ext._C import stream_limit
from reptile_ext.benchmark import environment
from reptile_ext.eager import TEMPERATURE
from reptile_ext.files import write_json
from reptile_ext.options import BINARY_DIVERGENCES
from reptile_ext.timing import DTYPES, Contender, Logits, Turns, flush_caches, produced


def eager(s: Tensor, t: Tensor) -> Tensor:
    s, t = s / TEMPERATURE, t / TEMPERATURE
    p = t.sigmoid()
    kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return kl.mean() * TEMPERATURE * TEMPERATURE


def contenders(logits: Logits, elements: int, divergence: str) -> Iterator[Contender]:
    student, teacher, buffer = (x.view(-1) for x in logits.of_shape(1, elements))
    leaf = student.detach().requires_grad_()

    def ours(s: Tensor, inplace: bool = False) -> Tensor:
        return binary_distillation_loss(s, teacher, divergence=divergence, temperature=TEMPERATURE, inplace=inplace)

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
    if divergence == "forward_kl":
        yield Contender("eager", without_gradient, lambda s: eager(s, teacher).backward())
    pointers = student.data_ptr(), teacher.data_ptr(), buffer.data_ptr()
    size = elements * student.element_size()
    yield Contender("limit", flush_caches, lambda _: stream_limit(*pointers, size, torch.get_num_threads()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=32_768_000)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", default=list(BINARY_DIVERGENCES), choices=list(BINARY_DIVERGENCES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    about = environment()
    print("\n".join(f"{key:<16}{value}" for key, value in about.items()))
    results = []
    for dtype in o.dtypes:
        logits = Logits(dtype, o.elements)
        for divergence in o.divergences:
            turns = Turns(list(contenders(logits, o.elements, divergence)))
            turns.take_turns(o.repeats, warm_up=True)
            ms = {one.name: one.ms for one in turns.measured if one.ns}
            for one in turns.measured:
                cell = one.failed or f"{ms[one.name][1]:8.2f} ms {ms['limit'][1] / ms[one.name][1]:6.0%} of limit"
                print(f"{dtype:<10}{divergence:<20}{one.name:<15}{cell}", flush=True)
                results.append({"dtype": dtype, "divergence": divergence, **one.as_json()})
    if o.json is not None:
        write_json(o.json, {"environment": about, "elements": o.elements, "results": results})


if __name__ == "__main__":
    main()
