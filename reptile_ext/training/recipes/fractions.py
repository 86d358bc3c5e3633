"""What a teacher is worth when data are few: a recipe at several shares of the students' training samples and seeds,
with and without the teacher."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import write_atomically, write_json
from ...report.tables import LABELS, TITLES, draw_fractions
from ..metrics import METRICS
from .comparison import Recipe, Settings, run, take_teacher

RECORD = "fractions.json"


def run_fractions(
    recipe: Recipe,
    settings: Settings,
    folder: Path,
    fractions: Sequence[float],
    seeds: Sequence[int],
    progress_bar: bool = True,
) -> dict[str, Any]:
    """Every share with every seed, each a run in a folder of its own: those that are finished are not run again. The
    teacher of a seed is trained once. Returns, and writes, what came of them; draws it."""
    record: dict[str, Any] = {"fractions": sorted(fractions, reverse=True), "seeds": list(seeds), "points": []}
    write_json(folder / RECORD, record)
    for seed in record["seeds"]:
        first = folder / f"{record['fractions'][0]:g}-seed-{seed}"
        for fraction in record["fractions"]:
            own = folder / f"{fraction:g}-seed-{seed}"
            print(f"\n{fraction:.0%} of the samples, seed {seed}", flush=True)
            if (own / "report.json").exists():
                report = json.loads((own / "report.json").read_text(encoding="utf-8"))
            else:
                own.mkdir(exist_ok=True)
                if own != first:
                    take_teacher(first / "teacher", own / "teacher")
                report = run(
                    recipe, settings.model_copy(update={"fraction": fraction, "seed": seed}), own, progress_bar
                )
            for name, of in report["models"].items():
                metrics = {metric: value for metric, value in of.items() if metric in METRICS}
                record["points"].append({"fraction": fraction, "seed": seed, "model": name, **metrics})
    shared = set.intersection(*(set(point) & set(METRICS) for point in record["points"])) - {"loss"}
    record["metric"] = next(name for name in ("accuracy", *METRICS) if name in shared)
    write_json(folder / RECORD, record)
    metric = record["metric"]
    write_atomically(folder / "fractions.png", lambda path: draw_fractions(record["points"], metric, path))
    print(_table(record), flush=True)
    return record


def _table(record: dict[str, Any]) -> str:
    metric = record["metric"]
    models = list(dict.fromkeys(point["model"] for point in record["points"]))
    lines = [
        "",
        f"{TITLES.get(metric, metric)}, mean and standard deviation of {len(record['seeds'])} seeds",
        f"{'share':<8}" + "".join(f"{LABELS.get(name, name):>22}" for name in models),
    ]
    for fraction in record["fractions"]:
        cells = ""
        for name in models:
            values = [x[metric] for x in record["points"] if (x["fraction"], x["model"]) == (fraction, name)]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells += f"{statistics.mean(values):.4f}{spread}".rjust(22)
        lines.append(f"{fraction:<8g}{cells}")
    return "\n".join(lines)
