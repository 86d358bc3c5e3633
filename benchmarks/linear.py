"""Times the fused linear loss: `python benchmarks/linear.py [--device cuda] [--rows N] [--hidden H] [--vocab V]`.

Forward KL at T = 2, both heads, gradients of the student's hidden states and head. Contenders take turns, as
`reptile_ext/timing.py` says; extra memory includes dW (V · H).

    ours             linear_distillation_loss
    fused on logits  both logits in full, distillation_loss in place on the student's
    eager            both logits in full, KL in plain PyTorch
    torch.compile    the same, compiled
    compiled chunks  the same, 512 rows (on a GPU 2,048) at a time under checkpoint
    Liger            on the CPU its chunked JSD with beta=0, compiled, which is forward KL; on a GPU its Triton kernel
                     for the same
    limit            no loss: the four matrix products, of all rows at once, into memory that is there

`--model` measures nothing, and needs no GPU. It counts what the loss does on one, from the program itself, run on
tensors without values: the operations of its products and the bytes that each step reads and writes, to the gradients
of hidden states and head. At a GPU's rate and bandwidth that is the time to expect, beside the four products' alone:
`--model [--rate FLOPs a second] [--bandwidth bytes a second] [--memory bytes of the GPU]`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reptile_ext
from reptile_ext.benchmark import environment
from reptile_ext.eager import EAGER, TEMPERATURE
from reptile_ext.files import write_json
from reptile_ext.linear import plan, release_scratch
from reptile_ext.linear.loop import LinearConfig, run
from reptile_ext.options import make_options
from reptile_ext.timing import DTYPES, Contender, Turns, made


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

    def four_products(_: None) -> None:
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

    def clear() -> None:
        x.grad = head.grad = None

    def forward_and_backward(name: str, loss: Callable[[], Tensor]) -> Contender:
        def step(_: None) -> Tensor:
            result = loss()
            result.backward()
            return result.detach()

        return Contender(name, clear, step)

    def of_liger() -> Contender:
        return forward_and_backward("Liger", liger(device, x, head, y, teachers, labels))

    found = [forward_and_backward(name, loss) for name, loss in losses.items()]
    if compile:
        found.append(made("Liger", of_liger))
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


class Counted(TorchDispatchMode):
    """What a program on a GPU does: operations and bytes of its products, bytes of everything else, by the operator's
    name, and the largest sum of bytes that were in use at a time, as allocated by it."""

    def __init__(self, *given: Tensor | None) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.operations = self.calls = self.in_use = self.peak = 0
        self.products: list[tuple[int, int]] = []  # operations, and bytes of result and of what it is added to
        self.known = {x.untyped_storage()._cdata for x in given if x is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in made:
            self._allocated(x.untyped_storage())
        if func.is_view or func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            return result
        self.calls += 1
        name = func.name().split("::")[1].partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[-3:-1] if "out" in kwargs else given[-2:]
            adds = name != "mm" and kwargs.get("beta", 1) != 0
            written = _bytes(made[0]) * (2 if adds and given[0].shape == made[0].shape else 1)
            self.products.append((2 * a.shape[0] * a.shape[1] * b.shape[1], written))
            self.bytes["products"] += _bytes(a) + _bytes(b) + written
        else:
            written = [x for x in made if all(x is not y for y in given)] + given[: func._schema.is_mutable]
            read = given[1:] if name == "copy_" else given
            self.bytes[name] += sum(map(_bytes, read + written))
        return result

    def _allocated(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.in_use += size
        self.peak = max(self.peak, self.in_use)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.in_use -= size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.dtype.itemsize


def model(rows: int, hidden: int, vocab: int, dtype: torch.dtype, memory: float, rows_in: int | None = None) -> Counted:
    """What loss and gradients of a call do on a GPU of so much memory; with labels if `rows_in` are not ignored."""
    options = make_options(temperature=TEMPERATURE, reduction="sum")
    config = LinearConfig(options, None, (None, None), (1.0, 1.0), rows_in)
    new = functools.partial(torch.empty, device="meta", dtype=dtype)  # tensors without values, like a GPU's to the host
    tensors = (new(rows, hidden), new(vocab, hidden), None, new(rows, hidden), new(vocab, hidden), None)
    labels = None if rows_in is None else torch.empty(rows, dtype=torch.int64, device="meta")
    needed = (True, True, False, False, False, False)
    with mock.patch.object(plan, "memory_of", return_value=int(memory)), Counted(*tensors, labels) as counted:
        run(config, tensors, (labels, None, None), None, needed)
    return counted


def print_model(size: tuple[int, int, int], dtype: torch.dtype, rate: float, bandwidth: float, memory: float) -> None:
    rows, hidden, vocab = size
    print(f"predicted, not measured: {rate / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.1f} TB/s, {memory / 1e9:.0f} GB")
    print(f"| {rows:,} × {hidden:,} × {vocab:,} | all rows | half of them ignored, num_rows_in given |")
    print("| --- | --- | --- |")
    columns = []
    for rows_in in (None, rows // 2):
        counted = model(rows, hidden, vocab, dtype, memory, rows_in)
        products = sum(operations for operations, _ in counted.products) / rate
        # How much of a product's result and addend is written and read while others of its blocks still multiply is
        # not known: all, or none.
        results = sum(written for _, written in counted.products) / bandwidth
        loss = counted.bytes["distillation_loss_"] / bandwidth
        others = counted.bytes.total() / bandwidth - loss - counted.bytes["products"] / bandwidth
        # Of all the rows at once, of those that are not ignored.
        once = (3 * rows_in * vocab if rows_in else 3 * rows * vocab) + (rows_in or rows) * hidden + vocab * hidden
        limit = products + once * dtype.itemsize / bandwidth
        ours = products + results + loss + others
        columns.append(
            {
                "chunks": f"{len(counted.products) // 4}",
                "four products: operations over rate": f"{1e3 * products:.1f} ms",
                "loss": f"{1e3 * loss:.2f} ms",
                "everything else": f"{1e3 * others:.2f} ms",
                "in all, results written beside the products": f"{1e3 * (products + loss + others):.1f} ms, "
                f"{products / (products + loss + others):.0%} of the products",
                "results written, and read where added to": f"{1e3 * results:.2f} ms",
                "in all, written after them": f"{1e3 * ours:.1f} ms, {limit / ours:.0%} of the products",
                "extra memory at the peak": f"{counted.peak / 1e9:.2f} GB",
            }
        )
    for what in columns[0]:
        print(f"| {what} | {' | '.join(column[what] for column in columns)} |")


def measure(chosen: list[Contender], repeats: int, device: str) -> list[dict[str, Any]]:
    turns = Turns(chosen, device)
    first = {one.name: turns.run(one) for one in turns.measured}  # compiles, too
    turns.take_turns(repeats)
    turns.measure_peaks(release=release_scratch)
    limit = next((one.ms[1] for one in turns.measured if one.name == "limit" and one.ns), math.nan)
    results = []
    for one in turns.measured:
        found = one.as_json()
        if one.ns:
            loss = first[one.name]
            found |= {"share_of_limit": limit / one.ms[1], "loss": None if loss is None else loss.item()}
        results.append(found)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="2,048 on the CPU, 8,192 on a GPU")
    parser.add_argument("--hidden", type=int, help="512 on the CPU, 4,096 on a GPU")
    parser.add_argument("--vocab", type=int, help="32,000 on the CPU, 128,256 on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", action="store_true", help="what to expect of a GPU; measures nothing")
    parser.add_argument("--rate", type=float, default=790e12, help="of --model: 16-bit products of an H200")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="of --model: a copy's on an H200")
    parser.add_argument("--memory", type=float, default=141e9, help="of --model: an H200's")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    usual = (2048, 512, 32_000) if options.device == "cpu" and not options.model else (8192, 4096, 128_256)
    size = (options.rows or usual[0], options.hidden or usual[1], options.vocab or usual[2])
    if options.model:
        print_model(size, torch.bfloat16, options.rate, options.bandwidth, options.memory)
        return 0
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
        write_json(options.json, {"environment": about, "results": results})
    return int(any(r["contender"] in ("ours", "fused on logits") and "failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
