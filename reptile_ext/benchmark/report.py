"""The benchmark's table and chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .losses import NAMES
from .measuring import Result

_COLUMNS = (
    ("contender", "<14"),
    ("ms", ">9"),
    ("quartiles", ">17"),
    ("ns/pair", ">8"),
    ("vs eager", ">9"),
    ("vs fp32", ">9"),
    ("vs compile", ">11"),
    ("of limit", ">9"),
    ("of inplace", ">11"),
    ("of fwd_kl", ">10"),
    ("extra MB", ">9"),
    ("loss", ">9"),
)
HEADER = " ".join(f"{title:{width}}" for title, width in _COLUMNS)


def table_row(r: Result) -> str:
    if r.failed is not None:
        return f"{r.contender:<14} {r.failed}"
    (q1, median, q3), extra = r.measured.ms, r.measured.extra_bytes

    def ratio(baseline: str) -> str:
        return f"{r.against[baseline]:.2f}x" if baseline in r.against else "-"

    def share(of: float | None) -> str:
        return "-" if of is None else f"{of:.0%}"

    cells = (
        r.contender,
        f"{median:.4g}",
        f"{q1:.4g} - {q3:.4g}",
        f"{r.ns_per_pair:.3g}",
        ratio("eager"),
        ratio("eager fp32"),
        ratio("torch.compile"),
        share(r.share_of_limit),
        share(r.share_of_in_place),
        share(r.share_of_forward_kl),
        "-" if extra is None else f"{extra / 1e6:.1f}",
        "-" if r.loss is None else f"{r.loss:.5f}",
    )
    return " ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def pyplot_or_complain() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the chart needs matplotlib: pip install 'reptile_ext[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(results: list[Result], about: dict[str, Any], path: Path) -> None:
    """PNG of the time a pair of logits over V: all contenders of the first divergence, ours in place of the others. Of
    cases with the same V the one with most rows."""
    pyplot = pyplot_or_complain()
    first = results[0].case.divergence

    def label(r: Result) -> str:
        return r.contender if r.case.divergence == first else f"{r.contender}, {r.case.divergence}"

    drawn = [r for r in results if r.failed is None and (r.case.divergence == first or r.contender == "ours in place")]
    dtypes = list(dict.fromkeys(r.case.dtype for r in results))
    drawn.sort(key=lambda r: (r.case.divergence != first, NAMES.index(r.contender)))
    labels = list(dict.fromkeys(map(label, drawn)))
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.5), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for i, name in enumerate(labels):
            points = {}
            for r in sorted((r for r in drawn if (r.case.dtype, label(r)) == (dtype, name)), key=lambda r: r.case):
                points[r.case.vocab] = r.ns_per_pair
            if points:
                style = {"color": "black", "linestyle": "--"} if name == "limit" else {"color": colours(i)}
                vs = sorted(points)
                axis.plot(vs, [points[v] for v in vs], label=name, marker="o", markersize=4, **style)
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="classes V")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ns a pair of logits")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    axes[0][-1].legend([lines[name] for name in labels], labels, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"{first}, {about['cpu']}, {about['threads']} threads, {about['instruction_set']}, torch {about['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150, format="png", bbox_inches="tight")
    pyplot.close(figure)
