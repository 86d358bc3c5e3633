"""What a run leaves for the eye: the table, the curves, and what a step costs with each loss."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import distillation_loss
from .batches import logits_of


def eager_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """The mean forward KL as it is usually written in PyTorch."""
    x = F.log_softmax(student_logits / temperature, -1).flatten(0, -2)
    y = F.log_softmax(teacher_logits / temperature, -1).flatten(0, -2)
    return F.kl_div(x, y, log_target=True, reduction="batchmean") * temperature**2


def time_losses(
    student: nn.Module, teacher: nn.Module, inputs: Any, temperature: float, repeats: int = 15
) -> dict[str, dict[str, float]]:
    """Median milliseconds of the loss alone (value and gradient) and of a whole training step, fused and eager.

    The two take turns, so that whatever else the machine does falls on both. The step is teacher forward, student
    forward, loss, backward and AdamW, on a copy of the student.
    """
    device = next(student.parameters()).device
    inputs = inputs.to(device)
    student = copy.deepcopy(student).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=device.type in ("cpu", "cuda"))
    with torch.no_grad():
        student_logits, teacher_logits = logits_of(student, inputs), logits_of(teacher.eval(), inputs)
    student_logits.requires_grad_()

    def loss_alone(loss: Callable[..., Tensor]) -> None:
        student_logits.grad = None
        torch.autograd.backward(loss(student_logits, teacher_logits, temperature=temperature))

    def step(loss: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            answers = logits_of(teacher, inputs)
        torch.autograd.backward(loss(logits_of(student, inputs), answers, temperature=temperature))
        optimizer.step()
        optimizer.zero_grad()

    losses = {"fused": distillation_loss, "eager": eager_loss}
    taken: dict[str, dict[str, list[float]]] = {what: {name: [] for name in losses} for what in ("loss", "step")}
    for repeat in range(-2, repeats):  # two rounds to warm up
        for what, run in (("loss", loss_alone), ("step", step)):
            for name, loss in losses.items():
                started = time.perf_counter()
                run(loss)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat >= 0:
                    taken[what][name].append(1000 * (time.perf_counter() - started))
    return {
        what: {name: statistics.median(values) for name, values in of.items()}
        | {"rows": student_logits[..., 0].numel()}
        for what, of in taken.items()
    }


def format_table(report: dict[str, Any], metrics: Sequence[str]) -> str:
    """The report of a run as text."""
    names = {"cross_entropy": "held-out loss", "accuracy": "accuracy", "f1": "macro F1", "perplexity": "perplexity"}
    labels = {"teacher": "teacher", "student": "student, distilled", "student alone": "student, no teacher"}
    columns = [name for name in (*metrics, "agreement") if name in report["models"]["student"]]
    lines = [
        "",
        f"{'':<20}{'parameters':>12}" + "".join(f"{names.get(c, c):>15}" for c in columns) + f"{'seconds':>10}",
    ]
    for name, values in report["models"].items():
        cells = "".join(f"{values[c]:>15.4f}" if c in values else f"{'':>15}" for c in columns)
        lines.append(f"{labels[name]:<20}{values['parameters']:>12,}{cells}{values['seconds']:>10.1f}")
    lines += ["", f"{'median ms, fwd KL':<20}{'fused loss':>12}{'eager loss':>15}{'eager / fused':>15}"]
    for what, of in report["milliseconds"].items():
        title = "loss fwd + bwd" if what == "loss" else "training step"
        lines.append(f"{title:<20}{of['fused']:>12.2f}{of['eager']:>15.2f}{of['eager'] / of['fused']:>15.2f}")
    if "fused_linear" in report:
        lines += ["", *format_fused_linear(report["fused_linear"])]
    return "\n".join([*lines, "", *report["notes"]])


def format_fused_linear(measured: dict[str, Any]) -> list[str]:
    """What `Reptile.measure_fused_linear` returns as the lines of a table; a saving below 0 % is a loss."""
    rows = {"fwd + bwd, ms": measured["milliseconds"]}
    if None not in measured["peak_bytes"].values():
        rows["peak memory, MB"] = {name: value / 1e6 for name, value in measured["peak_bytes"].items()}
    shape = f"{measured['rows']:,} × {measured['classes']:,}"
    return [
        f"{shape:<20}{'all logits':>12}{'fused linear':>15}{'saved':>15}",
        *(
            f"{title:<20}{of['logits']:>12.2f}{of['fused_linear']:>15.2f}{1 - of['fused_linear'] / of['logits']:>15.0%}"
            for title, of in rows.items()
        ),
    ]


def draw_curves(lines: Sequence[dict[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """PNG of the held-out metrics over the steps, from the lines of `metrics.jsonl` with the model's name in each."""
    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for model in dict.fromkeys(line["model"] for line in lines):
            points = [(x["step"], x["eval"][metric]) for x in lines if x["model"] == model and "eval" in x]
            axes.plot(*zip(*points, strict=True), marker=".", label=model)
        axes.set(xlabel="step", ylabel=f"held-out {metric.replace('_', ' ')}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)
