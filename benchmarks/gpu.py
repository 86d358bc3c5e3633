"""Times the dense losses on a GPU against the same run's copy bandwidth: `python benchmarks/gpu.py --out FOLDER`.

Forward and backward as a user calls it, T = 2, N = 8,192 rows. Contenders take turns in every round; times are CUDA
events', medians over the rounds with quartiles; logits are random, of another part of memory in every round, and
together larger than three times the L2. The limit is two reads and one write of every logit at the rate of a copy of
the same tensors, taken in turn with the contenders. `--device cpu` is for seeing that the script works.

Writes gpu.json, and gpu.md, the table for docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reptile_ext
from reptile_ext import ops
from reptile_ext.eager import EAGER, TEMPERATURE

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of student, teacher and labels
VOCABS = (1_000, 8_000, 32_000, 58_000, 128_256, 151_936, 256_000)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def environment(device: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "reptile_ext": reptile_ext.__version__,
        "python": platform.python_version(),
        "cuda_kernels": ops.cuda_missing or "loaded",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        about |= {"cuda": torch.version.cuda, "l2_bytes": properties.L2_cache_size}
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        about["driver, clocks, power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return about


class Stopwatch:
    """Milliseconds of what is done between `start` and `stop`, on the device if it has a clock."""

    def __init__(self, device: str) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else None
        self.begin = 0.0

    def start(self) -> None:
        if self.events:
            # The device is busy while the host launches, so that the host's own time is not in the figure.
            torch.cuda._sleep(2_000_000)
            self.events[0].record()
        self.begin = time.perf_counter()

    def stop(self) -> float:
        if not self.events:
            return 1e3 * (time.perf_counter() - self.begin)
        self.events[1].record()
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1]))


def made(make: Callable[[], Loss]) -> Loss:
    """What `make` makes; where it fails (a library is not installed), a loss that fails for the same reason."""
    try:
        return make()
    except Exception as error:
        why = error

    def fail(*_: Tensor) -> Tensor:
        raise why

    return fail


def liger() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        x, y = ((z / TEMPERATURE).log_softmax(-1) for z in (student, teacher))
        result: Tensor = TEMPERATURE**2 * kl(x, y)
        return result

    return loss


def contenders(divergence: str, dtype: torch.dtype, compile: bool) -> dict[str, Loss]:
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": TEMPERATURE}
    eager = EAGER[divergence]
    found: dict[str, Loss] = {
        "ours in place": lambda s, t, n: reptile_ext.distillation_loss(s, t, n, inplace=True, **keywords),
        "ours": lambda s, t, n: reptile_ext.distillation_loss(s, t, n, **keywords),
        "eager": eager,
    }
    if dtype != torch.float32:
        found["eager fp32"] = lambda s, t, n: eager(s.float(), t.float(), n)
    if compile:
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    if divergence == "forward_kl":
        found["Liger"] = made(liger)
    return found


def measure(
    rows: int, vocab: int, dtype: torch.dtype, divergence: str, device: str, repeats: int, compile: bool
) -> list[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)
    # As many as it takes to leave the L2 behind.
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    copies = max(2, 3 * l2 // (2 * rows * vocab * dtype.itemsize) + 1)
    students, teachers = (
        [4 * torch.randn(rows, vocab, device=device, dtype=dtype, generator=generator) for _ in range(copies)]
        for _ in range(2)
    )
    labels = torch.randint(vocab, (rows,), device=device, generator=generator)
    stopwatch = Stopwatch(device)
    functions = contenders(divergence, dtype, compile)
    times: dict[str, list[float]] = {name: [] for name in (*functions, "copy")}
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for round_ in range(repeats + 3):  # the first three are not counted
        for name in times:
            if name in failed:
                continue
            student, teacher = students[round_ % copies], teachers[round_ % copies]
            try:
                if name == "copy":
                    destination = torch.empty_like(student)
                    stopwatch.start()
                    destination.copy_(student)
                    elapsed = stopwatch.stop()
                else:
                    logits = student.clone().requires_grad_()
                    # A leaf cannot be overwritten: its product by 1, outside of what is timed.
                    z = logits * 1 if name == "ours in place" else logits
                    stopwatch.start()
                    loss = functions[name](z, teacher, labels)
                    torch.autograd.grad(loss, z)
                    elapsed = stopwatch.stop()
                    losses[name] = loss.item()
                    del loss, z, logits
            except Exception as error:  # not installed, not for this device, out of memory: the others go on
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if round_ >= 3:
                times[name].append(elapsed)
    copy = statistics.median(times["copy"]) if times["copy"] else math.nan
    limit = 1.5 * copy  # a copy is one read and one write
    results = []
    for name, ms in times.items():
        if not ms:
            results.append({"contender": name, "failed": failed.get(name, "")})
            continue
        q1, median, q3 = statistics.quantiles(ms, n=4) if len(ms) > 1 else (ms[0], ms[0], ms[0])
        results.append(
            {
                "contender": name,
                "ms": {"q1": q1, "median": median, "q3": q3},
                "share_of_copy_bandwidth": None if name == "copy" else limit / median,
                "loss": losses.get(name),
            }
        )
    about = {"rows": rows, "vocab": vocab, "dtype": str(dtype).removeprefix("torch."), "divergence": divergence}
    return [{**about, **result} for result in results]


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| | contender | ms | share of copy bandwidth | ours in place is faster by |", "|---|---|---|---|---|"]
    ours = math.nan
    for r in results:
        case = f"{r['divergence']}, {r['dtype']}, [{r['rows']}, {r['vocab']}]"
        if r["contender"] == "ours in place":
            ours = r["ms"]["median"] if "ms" in r else math.nan
        if "ms" not in r:
            lines.append(f"| {case} | {r['contender']} | {r['failed']} | | |")
            continue
        median, share = r["ms"]["median"], r["share_of_copy_bandwidth"]
        of_limit = "" if share is None else f"{100 * share:.0f} %"
        lines.append(f"| {case} | {r['contender']} | {median:.3f} | {of_limit} | {median / ours:.2f} × |")
    return "\n".join(lines) + "\n"


def main() -> None:
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
    about = environment(options.device)
    print(json.dumps(about, indent=1))
    results: list[dict[str, Any]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for divergence in options.divergences:
        for name in options.dtypes:
            for vocab in options.vocab:
                case = (options.rows, vocab, DTYPES[name], divergence, options.device, options.repeats)
                found = measure(*case, not options.no_compile)
                print(table(found), flush=True)
                results += found
                # After every case: what was measured is kept, whatever happens to the next.
                (options.out / "gpu.json").write_text(json.dumps({"environment": about, "results": results}, indent=1))
                (options.out / "gpu.md").write_text(table(results))


if __name__ == "__main__":
    main()
