"""Times the fused linear loss on the CPU: `python benchmarks/linear.py [--rows N] [--hidden H] [--vocab V]`.

Forward KL at T = 2, both heads, gradients of the student's hidden states and head. Contenders take turns in an order
that is shuffled for every round; times are medians with quartiles, and extra memory is the peak of a step over what was
resident before, dW (V · H) included, and what ours keeps between calls.

    ours             linear_distillation_loss
    fused on logits  both logits in full, distillation_loss in place on the student's
    eager            both logits in full, KL in plain PyTorch
    torch.compile    the same, compiled
    compiled chunks  the same, 512 rows at a time under checkpoint
    Liger            its chunked JSD with beta=0, compiled, which is forward KL (where liger-kernel is installed)
    limit            no loss: the four matrix products, of all rows at once, into memory that is there
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import reptile_ext
from reptile_ext.benchmark import Contender, environment, peak_extra_bytes
from reptile_ext.eager import EAGER, TEMPERATURE
from reptile_ext.linear import release_scratch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def contenders(rows: int, hidden: int, vocab: int, dtype: torch.dtype, compile: bool) -> list[Contender]:
    generator = torch.Generator().manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x, y = new(rows, hidden).requires_grad_(), new(rows, hidden)
    head = (3 * new(vocab, hidden) / hidden**0.5).requires_grad_()
    teachers = 3 * new(vocab, hidden) / hidden**0.5
    labels = torch.zeros(rows, dtype=torch.int64)
    forward_kl = EAGER["forward_kl"]
    logits = torch.empty(rows, vocab, dtype=dtype)
    of_x, of_head = torch.empty_like(x), torch.empty_like(head)

    def ours() -> Tensor:
        return reptile_ext.linear_distillation_loss(x, head, y, teachers, temperature=TEMPERATURE)

    def on_logits() -> Tensor:
        student, teacher = F.linear(x, head), F.linear(y, teachers)
        return reptile_ext.distillation_loss(student, teacher, temperature=TEMPERATURE, inplace=True)

    def eager(kl: Callable[..., Tensor] = forward_kl) -> Tensor:
        return kl(F.linear(x, head), F.linear(y, teachers), labels)

    def four_products() -> None:
        with torch.no_grad():
            torch.mm(y, teachers.t(), out=logits)
            torch.mm(x, head.t(), out=logits)
            torch.mm(logits, head, out=of_x)
            torch.mm(logits.t(), x, out=of_head)

    losses: dict[str, Callable[[], Tensor]] = {"ours": ours, "fused on logits": on_logits, "eager": eager}
    if compile:
        losses["torch.compile"] = torch.compile(eager, dynamic=False)
        in_chunks = compiled_in_chunks(rows, forward_kl)
        losses["compiled chunks"] = lambda: in_chunks(x, head, y, teachers, labels)
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            liger = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=True
            )
            losses["Liger"] = lambda: liger(x, head, y, teachers, labels)
        except ImportError:
            pass

    def clear() -> None:
        x.grad = head.grad = None

    def step_of(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            result = loss()
            result.backward()
            return result.detach()

        return step

    found = [Contender(name, clear, step_of(loss)) for name, loss in losses.items()]
    return [*found, Contender("limit", clear, four_products)]


def compiled_in_chunks(rows: int, kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What one writes without a library: some rows at a time under checkpoint, so that no chunk's logits are kept."""

    @torch.compile(dynamic=False)
    def part(x: Tensor, head: Tensor, y: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
        return kl(F.linear(x, head), F.linear(y, teachers), labels) * (x.shape[0] / rows)

    def loss(x: Tensor, head: Tensor, y: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        for some in zip(x.split(512), y.split(512), labels.split(512), strict=True):
            total = total + checkpoint(part, some[0], head, some[1], teachers, some[2], use_reentrant=False)
        return total

    return loss


def measure(chosen: list[Contender], repeats: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {c.name: [] for c in chosen}
    values: dict[str, float] = {}
    for round_ in range(repeats + 1):  # the first is not counted
        for c in random.sample(chosen, len(chosen)):
            c.setup()
            begin = time.perf_counter()
            loss = c.step()
            elapsed = time.perf_counter() - begin
            if loss is not None:
                values[c.name] = loss.item()
            if round_:
                times[c.name].append(1e3 * elapsed)
    limit = statistics.median(times["limit"])
    results = []
    for c in chosen:
        q1, median, q3 = statistics.quantiles(times[c.name], n=4)
        release_scratch()
        extra = peak_extra_bytes(c)
        results.append(
            {
                "contender": c.name,
                "ms": {"q1": q1, "median": median, "q3": q3},
                "share_of_limit": limit / median,
                "extra_bytes": extra,
                "loss": values.get(c.name),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {**environment(), "rows": options.rows, "hidden": options.hidden, "vocab": options.vocab}
    print(json.dumps(about, indent=1))
    results = []
    for name in options.dtypes:
        size = (options.rows, options.hidden, options.vocab)
        found = measure(contenders(*size, DTYPES[name], not options.no_compile), options.repeats)
        ours = found[0]["ms"]["median"]
        header = f"{'contender':16} {'ms':>8} {'quartiles':>17} {'of limit':>9} {'vs ours':>8} {'extra MB':>9}  loss"
        print(f"\n{name}\n{header}")
        for r in found:
            ms = r["ms"]
            spread = f"{ms['q1']:.1f} - {ms['q3']:.1f}"
            extra = "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e6:.1f}"
            loss = "" if r["loss"] is None else f"{r['loss']:.5f}"
            print(
                f"{r['contender']:16} {ms['median']:8.1f} {spread:>17} {r['share_of_limit']:8.0%} "
                f"{ms['median'] / ours:7.2f}x {extra:>9}  {loss}"
            )
        results += [{"dtype": name, **r} for r in found]
    if options.json:
        options.json.write_text(json.dumps({"environment": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
