"""What a run leaves for the eye: the table and the curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {"teacher": "teacher", "student": "student, distilled", "student alone": "student, no teacher"}
MORE = ("agreement", "chrF", "BLEU", "parses")  # that some runs have, in this order
TITLES = {"cross_entropy": "held-out loss", "accuracy": "accuracy", "f1": "macro F1", "perplexity": "perplexity"}


def format_table(report: dict[str, Any], metrics: Sequence[str]) -> str:
    """The report of a run as text."""
    labels = dict(LABELS)
    if "cache" in report:
        labels["student from cache"] = f"distilled from cache, K = {report['cache']['k']}"
    width = max(20, *(len(labels[name]) + 2 for name in report["models"]))
    has_peaks = any("peak_bytes" in values for values in report["models"].values())
    columns = [name for name in (*metrics, *MORE) if name in report["models"]["student"]]
    lines = [
        "",
        f"{'':<{width}}{'parameters':>12}"
        + "".join(f"{TITLES.get(c, c):>15}" for c in columns)
        + f"{'seconds':>10}"
        + (f"{'peak MB':>10}" if has_peaks else ""),
    ]
    for name, values in report["models"].items():
        cells = "".join(f"{values[c]:>15.4f}" if c in values else f"{'':>15}" for c in columns)
        peak = values.get("peak_bytes")
        cells += f"{values['seconds']:>10.1f}"
        cells += (f"{'-':>10}" if peak is None else f"{peak / 1e6:>10.0f}") if has_peaks else ""
        lines.append(f"{labels[name]:<{width}}{values['parameters']:>12,}{cells}")
    if "milliseconds" in report:
        lines += ["", f"{'median ms, fwd KL':<20}{'fused loss':>12}{'eager loss':>15}{'eager / fused':>15}"]
    for what, of in report.get("milliseconds", {}).items():
        title = "loss fwd + bwd" if what == "loss" else "training step"
        compared = _cells(of["fused"], of["eager"], lambda fused, eager: f"{eager / fused:.2f}")
        lines.append(f"{title:<20}{compared}")
    if "fused_linear" in report:
        lines += ["", *format_fused_linear(report["fused_linear"])]
    return "\n".join([*lines, "", *report["notes"]])


def format_fused_linear(measured: dict[str, Any]) -> list[str]:
    """What `Reptile.measure_fused_linear` returns as the lines of a table; a saving below 0 % is a loss."""
    rows = {"fwd + bwd, ms": measured["milliseconds"]}
    megabytes = {name: None if value is None else value / 1e6 for name, value in measured["peak_bytes"].items()}
    if set(megabytes.values()) != {None}:
        rows["peak memory, MB"] = megabytes
    shape = f"{measured['rows']:,} × {measured['classes']:,}"
    lines = [f"{shape:<20}{'all logits':>12}{'fused linear':>15}{'saved':>15}"]
    for title, of in rows.items():
        compared = _cells(of["logits"], of["fused_linear"], lambda logits, fused: f"{1 - fused / logits:.0%}")
        lines.append(f"{title:<20}{compared}")
    return lines + [f"{name}: {why}" for name, why in measured.get("failed", {}).items()]


def _cells(first: float | None, second: float | None, compare: Callable[[float, float], str]) -> str:
    """Two numbers and how they compare; what could not be measured is a dash."""
    one, other = ("-" if value is None else f"{value:.2f}" for value in (first, second))
    compared = "-" if first is None or second is None else compare(first, second)
    return f"{one:>12}{other:>15}{compared:>15}"


def draw_curves(lines: Sequence[dict[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """PNG of the held-out metrics over the steps, from the lines of `metrics.jsonl` with the model's name in each."""
    figure = curves_figure(lines, metrics)
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    figure.savefig(path, format="png", dpi=120)


def curves_figure(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Figure:
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for model in dict.fromkeys(line["model"] for line in lines):
            points = [(x["step"], x["eval"][metric]) for x in lines if x["model"] == model and "eval" in x]
            axes.plot(*zip(*points, strict=True), marker=".", label=model)
        axes.set(xlabel="step", ylabel=f"held-out {metric.replace('_', ' ')}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def draw_fractions(points: Sequence[Mapping[str, Any]], metric: str, path: Path) -> None:
    """PNG of a metric over the share of the data: of each model the mean of the seeds, and from lowest to highest."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for model in dict.fromkeys(point["model"] for point in points):
        shares = sorted({point["fraction"] for point in points})
        values = [[x[metric] for x in points if (x["fraction"], x["model"]) == (share, model)] for share in shares]
        line = axes.plot(shares, [sum(of) / len(of) for of in values], marker="o", label=LABELS.get(model, model))
        axes.fill_between(shares, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line[0].get_color())
    axes.set(xscale="log", xlabel="share of the students' samples", ylabel=f"held-out {metric.replace('_', ' ')}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
