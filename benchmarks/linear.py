"""Times the fused linear loss: `python benchmarks/linear.py [--device cuda] [--rows N] [--hidden H] [--vocab V]`.

Forward KL at T = 2, both heads, gradients of the student's hidden states and head. Contenders take turns in an order
that is shuffled for every round; times are medians with quartiles, and extra memory is the peak of a step over what was
resident before (on a GPU: allocated), dW (V · H) included.

    ours             linear_distillation_loss
    fused on logits  both logits in full, distillation_loss in place on the student's
    eager            both logits in full, KL in plain PyTorch
    torch.compile    the same, compiled
    compiled chunks  the same, 512 rows (on a GPU 2,048) at a time under checkpoint
    Liger            on the CPU its chunked JSD with beta=0, compiled, which is forward KL; on a GPU its Triton kernel
                     for the same
    limit            no loss: the four matrix products, of all rows at once, into memory that is there

A contender that fails (Liger is not installed, does not run on the device, or needs more memory than there is) is
listed with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
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

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def liger(device: str, x: Tensor, head: Tensor, y: Tensor, teachers: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    if device == "cpu":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        chunked = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=True
        )
        return lambda: chunked(x, head, y, teachers, labels)
    from liger_kernel.transformers import LigerFusedLinearJSD

    kernel = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    return lambda: kernel(x, head, y, teachers)


def made(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """What `make` makes; where it fails, a loss that fails for the same reason."""
    try:
        return make()
    except Exception as error:
        why = error

    def fail() -> Tensor:
        raise why

    return fail


def contenders(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str, compile: bool) -> list[Contender]:
    generator = torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    x, y = new(rows, hidden).requires_grad_(), new(rows, hidden)
    head = (3 * new(vocab, hidden) / hidden**0.5).requires_grad_()
    teachers = 3 * new(vocab, hidden) / hidden**0.5
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    forward_kl = EAGER["forward_kl"]
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
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
        in_chunks = compiled_in_chunks(rows, 512 if device == "cpu" else 2048, forward_kl)
        losses["compiled chunks"] = lambda: in_chunks(x, head, y, teachers, labels)
        losses["Liger"] = made(lambda: liger(device, x, head, y, teachers, labels))

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


def compiled_in_chunks(rows: int, size: int, kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What one writes without a library: some rows at a time under checkpoint, so that no chunk's logits are kept."""

    @torch.compile(dynamic=False)
    def part(x: Tensor, head: Tensor, y: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
        return kl(F.linear(x, head), F.linear(y, teachers), labels) * (x.shape[0] / rows)

    def loss(x: Tensor, head: Tensor, y: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=x.device)
        for some in zip(x.split(size), y.split(size), labels.split(size), strict=True):
            total = total + checkpoint(part, some[0], head, some[1], teachers, some[2], use_reentrant=False)
        return total

    return loss


def peak_bytes(c: Contender, device: str) -> int | None:
    if device == "cpu":
        return peak_extra_bytes(c)
    c.setup()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    c.step()
    return torch.cuda.max_memory_allocated() - before


def measure(chosen: list[Contender], repeats: int, device: str) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {c.name: [] for c in chosen}
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for round_ in range(repeats + 1):  # the first is not counted
        for c in random.sample(chosen, len(chosen)):
            if c.name in failed:
                continue
            c.setup()
            wait()
            begin = time.perf_counter()
            try:
                loss = c.step()
            except Exception as error:
                failed[c.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            wait()
            elapsed = time.perf_counter() - begin
            if loss is not None:
                values[c.name] = loss.item()
            if round_:
                times[c.name].append(1e3 * elapsed)
    limit = statistics.median(times["limit"]) if times["limit"] else math.nan
    results: list[dict[str, Any]] = []
    for c in chosen:
        if c.name in failed:
            results.append({"contender": c.name, "failed": failed[c.name]})
            continue
        q1, median, q3 = statistics.quantiles(times[c.name], n=4)
        results.append(
            {
                "contender": c.name,
                "ms": {"q1": q1, "median": median, "q3": q3},
                "share_of_limit": limit / median,
                "extra_bytes": peak_bytes(c, device),
                "loss": values.get(c.name),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="2,048 on the CPU, 8,192 on a GPU")
    parser.add_argument("--hidden", type=int, help="512 on the CPU, 4,096 on a GPU")
    parser.add_argument("--vocab", type=int, help="32,000 on the CPU, 128,256 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for quartiles; got {options.repeats}")
    usual = (2048, 512, 32_000) if options.device == "cpu" else (8192, 4096, 128_256)
    size = (options.rows or usual[0], options.hidden or usual[1], options.vocab or usual[2])
    about = {**environment(), "device": options.device, "rows": size[0], "hidden": size[1], "vocab": size[2]}
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    print(json.dumps(about, indent=1))
    results = []
    for name in options.dtypes:
        chosen = contenders(*size, DTYPES[name], options.device, not options.no_compile)
        found = measure(chosen, options.repeats, options.device)
        del chosen
        ours = found[0]["ms"]["median"] if "ms" in found[0] else math.nan
        header = f"{'contender':16} {'ms':>8} {'quartiles':>17} {'of limit':>9} {'vs ours':>8} {'extra MB':>9}  loss"
        print(f"\n{name}\n{header}")
        for r in found:
            if "failed" in r:
                print(f"{r['contender']:16} {r['failed']}")
                continue
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
