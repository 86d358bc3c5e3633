"""Whole steps of distillation: what a loss costs where a teacher and a student take their time too.

A step is the teacher's forward, the student's forward, the loss, backward and optimizer (AdamW) of two causal
transformers of plain PyTorch on 512 bytes of Python source, the teacher twice as wide, forward KL at T = 2:

    eager           the loss in plain PyTorch, as in eager.py
    torch.compile   the same, compiled
    ours            distillation_loss(s, t, temperature=2.0)
    ours in place   the same with inplace=True
    ours linear     linear_distillation_loss of hidden states and heads: no logits
    without loss    no loss: both models' logits, and a backward pass from numbers that are there already. What is
                    faster than this does not compute the logits' gradient in memory, as ours linear.

All contenders of a case train the same student in turn, as in `reptile benchmark` without --training.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..eager import EAGER, TEMPERATURE
from ..files import write_atomically, write_json
from ..functional import distillation_loss
from ..linear import linear_distillation_loss, release_scratch
from ..timing import DTYPES, Contender, Measured, Turns
from .program import environment
from .report import pyplot_or_complain

SIZES = {"small": (128, 2), "medium": (256, 4), "large": (512, 6)}  # width of the student, and layers of both
VOCABS = (8_192, 32_000, 128_256)
TOKENS = 512
CONTENDERS = ("eager", "torch.compile", "ours", "ours in place", "ours linear", "without loss")
_POSITIONS = 128
_COLUMNS = (
    ("contender", "<14"),
    ("ms", ">9"),
    ("quartiles", ">17"),
    ("tokens/s", ">9"),
    ("vs eager", ">9"),
    ("vs compile", ">11"),
    ("peak MB", ">8"),
)


class Case(NamedTuple):
    dtype: str
    size: str
    vocab: int


class LanguageModel(nn.Module):
    """Ids [B, T] to hidden states [B, T, H], of which `head` makes logits."""

    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.randn(_POSITIONS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, max(width // 64, 1), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=self.positions.dtype).triu(1)
        hidden: Tensor = self.layers(self.embedding(ids) + self.positions[:length], mask=mask, is_causal=True)
        return hidden


def run(
    sizes: Sequence[str] = tuple(SIZES),
    vocab: Sequence[int] = VOCABS,
    dtypes: Sequence[str] = ("float32",),
    tokens: int = TOKENS,
    repeats: int = 5,
    threads: int | None = None,
    compile: bool = True,
    out: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Print a table for each case; write the figures to `out` (JSON) and a chart to `plot` (PNG).

    Returns 0, or 1 if one of ours failed.

    Raises:
        ValueError: an argument that does not fit.
        ModuleNotFoundError: `plot` without matplotlib.
        RuntimeError: a contender's loss is wrong.
    """
    check(sizes, vocab, dtypes, tokens, repeats, threads)
    if plot is not None:
        pyplot_or_complain()
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        about = {**environment(), "tokens": tokens}
        print("\n".join(f"{key:<16}{value}" for key, value in about.items()))
        print("\nsteps of training; peak MB: memory of a step over what was there before")
        print(" ".join(f"{title:{width}}" for title, width in _COLUMNS))
        results: list[dict[str, Any]] = []
        for case in itertools.starmap(Case, itertools.product(dtypes, sizes, vocab)):
            print(f"{case.dtype}, {case.size}, V = {case.vocab:,}", flush=True)
            for row in measure(case, tokens, repeats, compile):
                print(_table_row(row), flush=True)
                results.append({**case._asdict(), **row})
    finally:
        torch.set_num_threads(threads_before)
    if out is not None:
        write_json(out, {"environment": about, "repeats": repeats, "results": results})
    if plot is not None:
        write_atomically(plot, lambda path: draw(results, about, path))
    for path in (out, plot):
        if path is not None:
            print(f"wrote {path}")
    return int(any("failed" in row and row["contender"].startswith("ours") for row in results))


def check(
    sizes: Sequence[str], vocab: Sequence[int], dtypes: Sequence[str], tokens: int, repeats: int, threads: int | None
) -> None:
    """Raise a ValueError for an argument that does not fit."""
    for name, given, known in (("sizes", sizes, SIZES), ("dtypes", dtypes, DTYPES)):
        for one in given:
            if one not in known:
                raise ValueError(f"{name} must be of {', '.join(map(repr, known))}; got {one!r}")
    if any(not 256 <= v < 2**24 for v in vocab):
        raise ValueError(f"vocab must be sizes from 256, one class a byte, to 16,777,215; got {tuple(vocab)}")
    if not 1 <= tokens <= 1_000_000 or (tokens > _POSITIONS and tokens % _POSITIONS):
        raise ValueError(f"tokens must be from 1 to {_POSITIONS}, or a multiple of it up to 1,000,000; got {tokens}")
    if not 1 <= repeats <= 1_000_000:
        raise ValueError(f"repeats must be from 1 to 1,000,000; got {repeats}")
    if threads is not None and not 1 <= threads <= 4096:
        raise ValueError(f"threads must be from 1 to 4096; got {threads}")


def measure(case: Case, tokens: int, repeats: int, compile: bool) -> Iterator[dict[str, Any]]:
    """Times and peaks of all contenders of a case, as they go into the JSON file."""
    found = Turns(list(contenders(case, tokens, compile)))
    losses = {one.name: found.run(one) for one in found.measured}
    right = losses["eager"]
    for name, loss in losses.items():
        # Each has trained the student a step further.
        if loss is not None and right is not None and not torch.allclose(loss, right, rtol=0.05, atol=1e-3):
            raise RuntimeError(f"{name}: loss {loss.item()} where eager has {right.item()}")
    found.measure_peaks(release=release_scratch)
    found.take_turns(repeats, warm_up=True)
    medians = {one.name: one.ms[1] for one in found.measured if one.ns}
    for one in found.measured:
        yield _as_json(one, tokens, medians)


def _as_json(one: Measured, tokens: int, medians: dict[str, float]) -> dict[str, Any]:
    if one.failed is not None:
        return one.as_json()
    median = one.ms[1]
    return {
        **one.as_json(),
        "tokens_per_second": 1e3 * tokens / median,
        "times_as_fast_as": {k: medians[k] / median for k in ("eager", "torch.compile") if k in medians},
    }


def contenders(case: Case, tokens: int, compile: bool) -> Iterator[Contender]:
    dtype = DTYPES[case.dtype]
    width, layers = SIZES[case.size]
    torch.manual_seed(0)
    student = LanguageModel(case.vocab, width, layers).to(dtype)
    teacher = LanguageModel(case.vocab, 2 * width, layers).to(dtype).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ids = source_bytes(tokens)
    eager = EAGER["forward_kl"]
    given = torch.zeros(ids.numel(), case.vocab, dtype=dtype)  # a gradient that moves nothing

    def of_logits(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher.head(teacher(ids)).flatten(0, 1)
            return loss_of(student.head(student(ids)).flatten(0, 1), teacher_logits)

        return loss

    def linear() -> Tensor:
        with torch.no_grad():
            teacher_hidden = teacher(ids)
        return linear_distillation_loss(
            student(ids), student.head.weight, teacher_hidden, teacher.head.weight, temperature=TEMPERATURE
        )

    def step(loss_of: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
        def step(_: Any) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach().float()

        return step

    def without_loss(_: Any) -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            teacher.head(teacher(ids))
        student.head(student(ids)).flatten(0, 1).backward(given)
        optimizer.step()

    def ours(inplace: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, t: distillation_loss(s, t, temperature=TEMPERATURE, inplace=inplace)

    losses = {
        "eager": of_logits(lambda s, t: eager(s.float(), t.float(), None)),
        "ours": of_logits(ours(False)),
        "ours in place": of_logits(ours(True)),
        "ours linear": linear,
    }
    if compile:
        compiled = torch.compile(lambda s, t: eager(s.float(), t.float(), None))
        losses["torch.compile"] = of_logits(compiled)
    for name in CONTENDERS:
        if name in losses:
            yield Contender(name, lambda: None, step(losses[name]))
    yield Contender("without loss", lambda: None, without_loss)


def source_bytes(count: int) -> Tensor:
    """`count` bytes of argparse's source, [samples, at most 128]; from the start again after its end."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8)
    length = min(count, _POSITIONS)
    rows = count // length
    return text.repeat(-(-rows * length // len(text)))[: rows * length].view(rows, length).long()


def _table_row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['contender']:<14} {row['failed']}"
    ms, extra, against = row["ms"], row["extra_bytes"], row["times_as_fast_as"]
    cells = (
        row["contender"],
        f"{ms['median']:.4g}",
        f"{ms['q1']:.4g} - {ms['q3']:.4g}",
        f"{row['tokens_per_second']:.0f}",
        *(f"{against[name]:.2f}x" if name in against else "-" for name in ("eager", "torch.compile")),
        "-" if extra is None else f"{extra / 1e6:.0f}",
    )
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def draw(results: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """PNG of tokens a second and of the peak of memory, a pair of axes for each dtype and size."""
    pyplot = pyplot_or_complain()
    panels = list(dict.fromkeys((r["dtype"], r["size"]) for r in results))
    vocabs = list(dict.fromkeys(r["vocab"] for r in results))
    names = [name for name in CONTENDERS if any(r["contender"] == name for r in results)]
    figure, axes = pyplot.subplots(2, len(panels), figsize=(4.5 * len(panels), 7), squeeze=False)
    colours = pyplot.get_cmap("tab10")
    for column, panel in enumerate(panels):
        for i, name in enumerate(names):
            rows = [r for r in results if (r["dtype"], r["size"]) == panel and r["contender"] == name]
            rows = [r for r in rows if "failed" not in r]
            places = [vocabs.index(r["vocab"]) + (i - len(names) / 2) * 0.8 / len(names) for r in rows]
            bar = {"width": 0.8 / len(names), "label": name, "color": colours(i)}
            axes[0][column].bar(places, [r["tokens_per_second"] for r in rows], **bar)
            axes[1][column].bar(places, [(r["extra_bytes"] or 0) / 1e6 for r in rows], **bar)
        axes[0][column].set_title(f"{panel[1]}, {panel[0]}")
        for row in axes:
            row[column].set_xticks(range(len(vocabs)), [f"V = {v:,}" for v in vocabs])
            row[column].set_yscale("log")
            row[column].grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("tokens a second")
    axes[1][0].set_ylabel("peak of a step, MB")
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"steps of distillation, {about['tokens']} tokens, {about['cpu']}, {about['threads']} threads, "
        f"{about['instruction_set']}, torch {about['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight")
    pyplot.close(figure)
