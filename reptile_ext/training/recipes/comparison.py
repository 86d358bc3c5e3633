"""What all recipes do, and the settings that all have.

A recipe brings its data, a teacher, a student and its settings; `run` does the same with all of them: train the
teacher, distil it into the student, train the same student without a teacher (same start, same data in the same order,
same steps, same learning rate), and compare the three on data that none of them saw.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from torch import nn

from ...files import write_atomically, write_json
from ...modules import DistillationLoss
from .. import Reptile, Until
from ..checkpoint import read_log
from ..costs import time_losses
from ..report import draw_curves, format_table
from ..weights import load_weights


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):  # true in a TOML file, which would pass for 1
        raise ValueError("wanted a number")
    return value


# What can be wrong with a number is said before anything is trained. The limit is what every kernel's counts can hold.
_Integer = Annotated[int, BeforeValidator(_no_boolean), Field(lt=2**31)]
_Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Count = Annotated[_Integer, Field(ge=1)]
NonNegative = Annotated[_Integer, Field(ge=0)]
Threads = Annotated[NonNegative, Field(le=4096)]
Rate = Annotated[_Number, Field(gt=0)]
Weight = Annotated[_Number, Field(ge=0)]


class Settings(BaseSettings):
    """What every recipe lets you set, by flag or in a TOML file. A flag wins over the file."""

    model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True, cli_kebab_case=True)

    seed: Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, lt=2**32)] = 0
    """Seed of the models' first weights and of the order of the data."""
    threads: Threads = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    batch: Count = 8
    """Samples in a micro-batch of the students."""
    teacher_batch: Count = 8
    """Samples in a micro-batch of the teacher."""
    accumulate: Count = 1
    """Micro-batches in a step."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The last two by autocast."""
    divergence: str = "forward_kl"
    """What is measured between teacher and student: forward_kl, jsd, dkd, … (see `reptile_ext.distillation_loss`)."""
    beta: _Number | None = None
    """Parameter of the divergences that have one; without it, the divergence's default."""
    temperature: Rate = 1.0
    """Temperature of the distillation."""
    hard_weight: Weight = 0.5
    """Weight of the labels' cross entropy beside the teacher's divergence, which has weight 1."""
    inplace: bool = False
    """Write the loss's gradient over the student's logits, which saves their size in memory."""
    teacher_steps: Count = 100
    """Steps that train the teacher."""
    teacher_learning_rate: Rate = 1e-3
    """Peak learning rate of the teacher."""
    steps: Count = 100
    """Steps that train each student."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of the students."""
    weight_decay: Weight = 0.01
    """Weight decay of AdamW, for all three."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Of the learning rate, after the warm-up."""
    warmup: NonNegative = 20
    """Steps of linear rise of the learning rate."""
    eval_every: Count = 100
    """Steps between evaluations on the held-out data."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _loss_is_possible(self) -> Settings:
        """Complain of a divergence that is unknown, or a β it cannot have, before a teacher is trained."""
        DistillationLoss(**self.loss())
        return self

    def loss(self) -> dict[str, Any]:
        """The keywords of `distillation_loss` that are settings."""
        names = ("divergence", "beta", "temperature", "hard_weight", "inplace")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # no environment variables: SEED=1 meant for something else must not get in


@dataclass
class Task:
    """What a recipe brings. The loaders give pairs (inputs, labels)."""

    teacher: nn.Module
    student: nn.Module
    teacher_train: Iterable[Any]
    student_train: Iterable[Any]
    held_out: Iterable[Any]
    metrics: Sequence[str]  # of METRICS, without "agreement"
    notes: Sequence[str]  # what each of the three sees, said with the results
    fused_linear: bool = False  # for models that show their heads: train all three without logits in full


@dataclass(frozen=True)
class Recipe:
    settings: type[Settings]
    build: Callable[[Any, Path], Task]  # (settings, run folder); may leave a file such as the vocabulary there


def run(recipe: Recipe, settings: Settings, folder: Path, progress_bar: bool = True) -> dict[str, Any]:
    """Do all of it in `folder`, going on where an earlier run of the same settings was stopped; return the report."""
    started = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    task = recipe.build(settings, folder)
    student_alone = copy.deepcopy(task.student)  # before the student is trained: the same start
    common: dict[str, Any] = {
        "schedule": settings.schedule,
        "warmup": settings.warmup,
        "weight_decay": settings.weight_decay,
        "accumulate": settings.accumulate,
        "precision": settings.precision,
        "seed": settings.seed,
        "fused_linear": task.fused_linear,
    }
    labels = {**common, "metrics": task.metrics}
    teacher = Reptile(task.teacher, None, learning_rate=settings.teacher_learning_rate, **labels)
    distilled = Reptile(
        task.student,
        task.teacher,
        learning_rate=settings.learning_rate,
        **settings.loss(),
        **{**common, "metrics": (*task.metrics, "agreement")},
    )
    alone = Reptile(student_alone, None, learning_rate=settings.learning_rate, **labels)
    stages = {
        "teacher": (teacher, task.teacher_train, settings.teacher_steps),
        "student": (distilled, task.student_train, settings.steps),
        "student alone": (alone, task.student_train, settings.steps),
    }
    table: dict[str, dict[str, float]] = {}
    lines = []
    for name, (reptile, train, steps) in stages.items():
        print(f"{name}: {steps} steps", flush=True)
        stage_folder = folder / name.replace(" ", "-")
        try:
            result = reptile.fit(
                train,
                task.held_out,
                until=Until(steps=steps),
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
                folder=stage_folder,
                resume=True,
                progress_bar=progress_bar,
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from error
        parameters = sum(parameter.numel() for parameter in reptile.student.parameters())
        table[name] = {"parameters": parameters, **result.metrics, "seconds": result.seconds}
        lines += [{"model": name, **line} for line in read_log(stage_folder / "metrics.jsonl")]

    batch = next(iter(task.student_train))
    times = time_losses(task.student, task.teacher, batch[0], settings.temperature)
    report = {"models": table, "milliseconds": times, "notes": list(task.notes), "minutes": 0.0}
    if task.fused_linear:
        report["fused_linear"] = distilled.measure_fused_linear(batch)
    report["minutes"] = (time.perf_counter() - started) / 60
    text = "".join(f"{line}\n" for line in map(json.dumps, lines))
    write_atomically(folder / "metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    weights = folder / "student" / "student.safetensors"
    write_atomically(folder / "student.safetensors", lambda path: shutil.copyfile(weights, path))
    write_atomically(folder / "curves.png", lambda path: draw_curves(lines, task.metrics, path))
    write_json(folder / "report.json", report)
    print(format_table(report, task.metrics), flush=True)
    return report


def evaluate(recipe: Recipe, settings: Settings, folder: Path) -> dict[str, float]:
    """Metrics of a run folder's distilled student on the held-out data."""
    task = recipe.build(settings, folder)
    load_weights(folder / "student.safetensors", task.student)
    return Reptile(task.student, None, metrics=task.metrics, precision=settings.precision).evaluate(task.held_out)
