"""Times the dense losses on a GPU against the same run's copy bandwidth: `python benchmarks/gpu.py --out FOLDER`.

Forward and backward as a user calls it, T = 2, N = 8,192 rows. Contenders take turns, as `reptile_ext/timing.py` says;
times are CUDA events'; logits are random, of another part of memory in every round, and together larger than three
times the L2. The limit is two reads and one write of every logit at the rate of a copy of the same tensors, taken in
turn with the contenders. `--device cpu` is for seeing that the script works.

Writes gpu.json, and gpu.md, the table for docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reptile_ext
from reptile_ext import ops
from reptile_ext.benchmark import environment
from reptile_ext.eager import EAGER, TEMPERATURE, Loss, eager_loss_of
from reptile_ext.files import write_atomically, write_json
from reptile_ext.timing import DTYPES, Contender, Turns, made

VOCABS = (1_000, 4_096, 8_000, 32_000, 50_257, 58_000, 128_256, 151_936, 256_000)


def device_environment(device: str) -> dict[str, Any]:
    about = environment() | {
        "command": " ".join(["python", *sys.argv]),
        "cuda_kernels": ops.cuda_missing or "loaded",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        about |= {"cuda": torch.version.cuda, "l2_bytes": properties.L2_cache_size}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        about["driver, clocks, power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return about


def liger() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        x, y = ((z / TEMPERATURE).log_softmax(-1) for z in (student, teacher))
        result: Tensor = TEMPERATURE**2 * kl(x, y)
        return result

    return loss


class Data:
    """Logits of several rounds, together larger than three times the L2, and labels."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
        copies = max(2, 3 * l2 // (2 * rows * vocab * dtype.itemsize) + 1)
        self._students, self._teachers = (
            [4 * torch.randn(rows, vocab, device=device, dtype=dtype, generator=generator) for _ in range(copies)]
            for _ in range(2)
        )
        self.labels = torch.randint(vocab, (rows,), device=device, generator=generator)

    def rounds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Student's and teacher's logits, of another part of memory in every round."""
        return itertools.cycle(zip(self._students, self._teachers, strict=True))


def contenders(divergence: str, dtype: torch.dtype, data: Data, compile: bool) -> list[Contender]:
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": TEMPERATURE}
    eager = eager_loss_of(divergence)

    def of_logits(name: str, loss_of: Loss) -> Contender:
        rounds = data.rounds()

        def setup() -> tuple[Tensor, Tensor]:
            student, teacher = next(rounds)
            logits = student.clone().requires_grad_()
            # A leaf cannot be overwritten: its product by 1, outside of what is timed.
            return logits * 1 if name == "ours in place" else logits, teacher

        def step(logits: tuple[Tensor, Tensor]) -> Tensor:
            loss = loss_of(*logits, data.labels)
            torch.autograd.grad(loss, logits[0])
            return loss.detach()

        return Contender(name, setup, step)

    def copy() -> Contender:
        rounds = data.rounds()

        def setup() -> tuple[Tensor, Tensor]:
            student, _ = next(rounds)
            return torch.empty_like(student), student

        def step(tensors: tuple[Tensor, Tensor]) -> None:
            destination, source = tensors
            destination.copy_(source)

        return Contender("copy", setup, step)

    found = [
        of_logits(
            "ours in place", lambda s, t, labels: reptile_ext.distillation_loss(s, t, labels, inplace=True, **keywords)
        ),
        of_logits("ours", lambda s, t, labels: reptile_ext.distillation_loss(s, t, labels, **keywords)),
        of_logits("eager", eager),
    ]
    if dtype != torch.float32:
        found.append(of_logits("eager fp32", lambda s, t, labels: eager(s.float(), t.float(), labels)))
    if compile:
        found.append(of_logits("torch.compile", torch.compile(eager, dynamic=False)))
    if divergence == "forward_kl":
        found.append(made("Liger", lambda: of_logits("Liger", liger())))
    return [*found, copy()]


def measure(
    rows: int, vocab: int, dtype: str, divergence: str, device: str, repeats: int, compile: bool
) -> list[dict[str, Any]]:
    chosen = contenders(divergence, DTYPES[dtype], Data(rows, vocab, DTYPES[dtype], device), compile)
    turns = Turns(chosen, device, launches=False)
    for one in turns.measured * 2:
        turns.run(one)
    losses = {one.name: turns.run(one) for one in turns.measured}
    turns.take_turns(repeats)
    copy = turns.measured[-1]
    limit = 1.5 * copy.ms[1] if copy.ns else math.nan  # a copy is one read and one write
    results = []
    for one in turns.measured:
        found = {"rows": rows, "vocab": vocab, "dtype": dtype, "divergence": divergence, **one.as_json()}
        if one.ns:
            loss = losses[one.name]
            found["share_of_copy_bandwidth"] = None if one is copy else limit / one.ms[1]
            found["loss"] = None if loss is None else loss.item()
        results.append(found)
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| | contender | ms | share of copy bandwidth | ours in place is faster by |", "|---|---|---|---|---|"]
    ours = math.nan
    for r in results:
        case = f"{r['divergence']}, {r['dtype']}, [{r['rows']}, {r['vocab']}]"
        if r["contender"] == "ours in place":
            ours = math.nan if "failed" in r else r["ms"]["median"]
        if "failed" in r:
            lines.append(f"| {case} | {r['contender']} | {r['failed']} | | |")
            continue
        median, share = r["ms"]["median"], r["share_of_copy_bandwidth"]
        of_limit = "" if share is None else f"{100 * share:.0f} %"
        lines.append(f"| {case} | {r['contender']} | {median:.3f} | {of_limit} | {median / ours:.2f} × |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", choices=list(EAGER), default=["forward_kl", "jsd"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    about = device_environment(options.device)
    print(json.dumps(about, indent=1))
    results: list[dict[str, Any]] = []
    for divergence in options.divergences:
        for name in options.dtypes:
            for vocab in options.vocab:
                case = (options.rows, vocab, name, divergence, options.device, options.repeats)
                found = measure(*case, not options.no_compile)
                print(table(found), flush=True)
                results += found
                # After every case: what was measured is kept, whatever happens to the next.
                write_json(options.out / "gpu.json", {"environment": about, "results": results})
                text = table(results)
                write_atomically(options.out / "gpu.md", lambda path, text=text: path.write_text(text))
    return int(any(r["contender"].startswith("ours") and "failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
