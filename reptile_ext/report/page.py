"""The page of a run: one HTML file that needs nothing else, neither a network nor scripts."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .._version import __version__
from ..files import write_atomically
from ..training.metrics import METRICS
from .answers import Answers, Calibration
from .tables import LABELS, MORE, TITLES, curves_figure

_MOST_IN_A_MATRIX = 20  # classes whose numbers can be read


def write_page(
    path: Path,
    *,
    title: str,
    report: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    settings: Mapping[str, Any],
    commands: str,
    answers: Answers | None = None,
    class_name: Callable[[int], str] = str,
    sample_text: Callable[[int, int], str] = lambda sample, position: f"{sample}, {position}",
    generations: Sequence[Mapping[str, str]] = (),
    generations_title: str = "What the student writes",
) -> None:
    """report, lines: as in report.json and metrics.jsonl. metrics: the first is what the runs are judged by.
    class_name: of a class's number. sample_text: of a sample's number and a row's position in it. generations:
    {"prompt", "text"} each. Everything is escaped."""
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = env.from_string((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    columns = [name for name in (*metrics, *MORE) if any(name in of for of in report["models"].values())]
    known = answers or Answers()
    text = template.render(
        title=title,
        made=f"reptile_ext {__version__}, {datetime.datetime.now():%Y-%m-%d %H:%M}, {report['minutes']:.1f} minutes",
        verdict=verdict(report, metrics[0]),
        columns=["parameters", *(TITLES.get(name, name) for name in columns), "seconds"],
        rows=_rows(report, columns),
        notes=report["notes"],
        curves=_svg(curves_figure(lines, metrics)),
        generations=generations,
        generations_title=generations_title,
        examples=[
            {
                "divergence": one.divergence,
                "text": sample_text(one.sample, one.position),
                "label": "" if one.label is None else class_name(one.label),
                "student": [(class_name(i), p) for i, p in one.student],
                "teacher": [(class_name(i), p) for i, p in one.teacher],
            }
            for one in known.disagreements
        ],
        confusion=None if known.confusion is None else _svg(_confusion_figure(known.confusion, class_name)),
        calibration=_svg(_calibration_figure(known.calibration)) if known.calibration else None,
        calibration_note="; ".join(
            f"{name}: expected calibration error {of.error:.3f}" for name, of in known.calibration.items()
        ),
        commands=commands,
        settings="\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()),
        environment=environment(),
    )
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def verdict(report: Mapping[str, Any], metric: str) -> str:
    """What came of it, in a sentence."""
    models = report["models"]
    student, alone, teacher = (models.get(name) for name in ("student", "student alone", "teacher"))
    title = TITLES.get(metric, metric)
    found = f"The distilled student's {title} is {student[metric]:.4f}"
    if teacher is not None and metric in teacher:
        found += f", the teacher's {teacher[metric]:.4f}"
        if teacher["parameters"]:
            found += f" with {teacher['parameters'] / student['parameters']:.1f} times the parameters"
    found += "."
    if alone is not None:
        gain = alone[metric] - student[metric] if not METRICS[metric] else student[metric] - alone[metric]
        word = "better than" if gain > 0 else ("worse than" if gain < 0 else "the same as")
        found += f" That is {abs(gain):.4f} {word} the same student without a teacher, {alone[metric]:.4f}."
    return found


def _rows(report: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    models: Mapping[str, Any] = report["models"]
    students = [name for name in models if name != "teacher"]
    rows = []
    for name, of in models.items():
        cells = [{"text": f"{of['parameters']:,}" if of["parameters"] else "", "best": False}]
        for column in columns:
            better = max if METRICS.get(column, True) else min
            values = [models[other][column] for other in students if column in models[other]]
            is_best = name in students and len(values) > 1 and of.get(column) == better(values)
            cells.append({"text": f"{of[column]:.4f}" if column in of else "", "best": is_best})
        cells.append({"text": f"{of['seconds']:.1f}", "best": False})
        rows.append({"name": LABELS.get(name, name), "cells": cells})
    return rows


def environment() -> dict[str, str]:
    from importlib import metadata

    from .. import ops

    found = {
        "reptile_ext": __version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "instruction set": ops.instruction_set(),
        "cores": str(os.cpu_count()),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for package in ("torch", "transformers", "datasets", "tokenizers", "peft", "accelerate", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _svg(figure: Figure) -> Markup:
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return Markup(svg[svg.index("<svg") :].replace("<svg ", '<svg class="chart" ', 1))


def _confusion_figure(confusion: list[list[int]], class_name: Callable[[int], str]) -> Figure:
    """Shares of each label's samples; the numbers themselves where there is room."""
    count = len(confusion)
    figure = Figure(figsize=(min(9.0, 2.5 + 0.45 * count),) * 2, layout="constrained")
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [class_name(i)[:24].replace("$", r"\$") for i in range(count)]
    axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), names)
    axes.set(xlabel="the student says", ylabel="label")
    if count <= _MOST_IN_A_MATRIX:
        for i, row in enumerate(confusion):
            for j, n in enumerate(row):
                if n:
                    axes.text(j, i, str(n), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    return figure


def _calibration_figure(calibration: Mapping[str, Calibration]) -> Figure:
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="as good as it says")
    for name, of in calibration.items():
        points = [(p, a) for n, p, a in zip(of.rows, of.probability, of.accuracy, strict=True) if n]
        axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
    axes.set(xlabel="probability of the likeliest class", ylabel="how often it is right", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
