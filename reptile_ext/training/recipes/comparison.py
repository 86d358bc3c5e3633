"""What all recipes do, and the settings that all have.

A recipe brings its data, a teacher, a student and its settings; `run` does the same with all of them: train the
teacher, distil it into the student, train the same student without a teacher (same start, same data in the same order,
same steps, same learning rate), and compare the three on data that none of them saw. Where there is a cache of the
teacher's answers, one more student is distilled from it. `cache_teacher` makes such a cache.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import shlex
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset
from tqdm.auto import tqdm

from ...cache import TeacherCache
from ...cache.format import TEACHER
from ...files import TEMPORARY, write_atomically, write_json
from ...linear import release_scratch
from ...modules import DistillationLoss
from ...report.answers import collect
from ...report.page import write_page
from ...report.tables import TITLES, draw_curves, format_table
from ...sparse import sampled_targets, top_k_targets
from ...timing import highest_memory
from .. import Reptile, Result, Until
from ..batches import logits_of
from ..checkpoint import latest_checkpoint, read_log
from ..costs import time_losses
from ..metrics import METRICS
from ..modes import frozen
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
    fraction: Annotated[_Number, Field(gt=0, le=1)] = 1.0
    """Share of the students' training samples that they see, drawn by the seed."""
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
class Cacheable:
    """Samples of a task that are the same in every pass, so that a teacher's answers to them can be kept."""

    vocab_size: int
    tokenizer: str  # hashes, which a cache is compared by
    data: str
    inputs: Mapping[str, Tensor]  # [N, T] of "train" and "held-out"
    student_train: Iterable[Any]  # the samples of the task's loaders, in their order, as mappings with "sample_id"
    held_out: Iterable[Any]

    @staticmethod
    def sample_id(part: str, number: int) -> str:
        return f"{part}-{number}"


@dataclass
class Task:
    """What a recipe brings. The loaders give what `Reptile` takes as batches."""

    teacher: nn.Module | TeacherCache
    student: nn.Module
    teacher_train: Iterable[Any] | None  # None: the teacher is trained already
    student_train: Iterable[Any]
    held_out: Iterable[Any]
    metrics: Sequence[str]  # of METRICS, without "agreement"; the first is what the students are judged by
    notes: Sequence[str]  # what each of the three sees, said with the results
    fused_linear: bool = False  # for models that show their heads: train all three without logits in full
    cacheable: Cacheable | None = None
    settings: Settings | None = None  # those given, where the recipe has completed them
    alone_train: Iterable[Any] | None = None  # of the student without a teacher; None: as `student_train`
    keywords: Mapping[str, Any] = field(default_factory=dict)  # of every `Reptile`
    teacher_keywords: Mapping[str, Any] = field(default_factory=dict)  # of those with a teacher
    # Train the student without a teacher, too, if the distilled one took at most so many seconds.
    baseline_within: float = math.inf
    compares_speed: bool = True  # time the loss and the step against eager PyTorch
    # Called with the distilled student's `Reptile`, the run folder and the report, which it may add to; it returns
    # keywords of `write_page`.
    finish: Callable[[Reptile, Path, dict[str, Any]], dict[str, Any]] = lambda reptile, folder, report: {}
    # Of recipes whose student is a folder for other programs: loads it, given one that is like it. None: the weights
    # are in student.safetensors.
    saved_student: Callable[[Path, nn.Module], nn.Module] | None = None
    open_data: Callable[[Sequence[str]], Iterable[Any]] | None = None  # held-out batches of other files


@dataclass(frozen=True)
class Recipe:
    settings: type[Settings]
    build: Callable[[Any, Path], Task]  # (settings, run folder); may leave a file such as the vocabulary there
    task: str | None = None  # of models of transformers: what their students are for, see `reptile_ext.pretrained`


class _Stages:
    """The models of a run, trained one after the other in folders of a run folder."""

    def __init__(self, settings: Settings, task: Task, folder: Path, progress_bar: bool, measures_memory: bool) -> None:
        self._settings, self._folder, self._progress_bar = settings, folder, progress_bar
        self._measures_memory = measures_memory
        self._common: dict[str, Any] = {
            "schedule": settings.schedule,
            "warmup": settings.warmup,
            "weight_decay": settings.weight_decay,
            "accumulate": settings.accumulate,
            "precision": settings.precision,
            "seed": settings.seed,
            "fused_linear": task.fused_linear,
            **task.keywords,
        }
        self._of_teacher = dict(task.teacher_keywords)
        self._metrics = tuple(task.metrics)
        self.table: dict[str, dict[str, Any]] = {}
        self.lines: list[dict[str, Any]] = []

    def on_labels(self, model: nn.Module, learning_rate: float) -> Reptile:
        return Reptile(model, None, learning_rate=learning_rate, metrics=self._metrics, **self._common)

    def on_teacher(self, student: nn.Module, teacher: nn.Module | TeacherCache) -> Reptile:
        settings = self._settings
        metrics = (*self._metrics, "agreement")
        keywords = {"metrics": metrics, "learning_rate": settings.learning_rate, **settings.loss(), **self._common}
        return Reptile(student, teacher, **keywords | self._of_teacher)

    def measure_teacher(self, reptile: Reptile, held_out: Iterable[Any]) -> None:
        """Of a teacher that is trained already: what its answers to the held-out data are worth."""
        began = time.perf_counter()
        teacher = reptile.objective.teachers[0]
        parameters = sum(x.numel() for x in teacher.parameters()) if isinstance(teacher, nn.Module) else 0
        metrics = reptile.evaluate_teacher(held_out)
        self.table["teacher"] = {"parameters": parameters, **metrics, "seconds": time.perf_counter() - began}

    def train(self, name: str, reptile: Reptile, train: Iterable[Any], held_out: Iterable[Any], steps: int) -> None:
        print(f"{name}: {steps} steps", flush=True)
        settings, folder = self._settings, self._folder / name.replace(" ", "-")
        results: list[Result] = []
        last = latest_checkpoint(folder)
        is_done = last is not None and int(last.name) >= steps

        def fit() -> None:
            found = reptile.fit(
                train,
                held_out,
                until=Until(steps=steps),
                eval_every=settings.eval_every,
                checkpoint_every=settings.checkpoint_every,
                folder=folder,
                resume=True,
                progress_bar=self._progress_bar,
            )
            results.append(found)

        peak: dict[str, Any] = {}
        try:
            if self._measures_memory:
                gc.collect()
                release_scratch()
                bytes_ = highest_memory(fit, reptile.accelerator.device)
                peak = {"peak_bytes": None if is_done else bytes_}
            else:
                fit()
        except FloatingPointError as error:
            raise FloatingPointError(f"{name}: {error}") from error
        parameters = sum(parameter.numel() for parameter in reptile.student.parameters())
        self.table[name] = {"parameters": parameters, **results[0].metrics, "seconds": results[0].seconds, **peak}
        self.lines += [{"model": name, **line} for line in read_log(folder / "metrics.jsonl")]


def check(settings: Settings) -> None:
    """Raise a ValueError for a folder among the settings that is no teacher cache, or is unfinished."""
    folder: str | None = getattr(settings, "cache", None)
    if folder is not None:
        _open(folder, temperature=settings.temperature)


def run(recipe: Recipe, settings: Settings, folder: Path, progress_bar: bool = True) -> dict[str, Any]:
    """Do all of it in `folder`, going on where an earlier run of the same settings was stopped; return the report."""
    started = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check(settings)
    cache_folder: str | None = getattr(settings, "cache", None)
    task = recipe.build(settings, folder)
    settings = task.settings or settings
    if settings.fraction < 1:
        task.student_train = _share(task.student_train, settings)
        task.alone_train = None if task.alone_train is None else _share(task.alone_train, settings)
        task.notes = [*task.notes, f"Of the students' samples, they see {settings.fraction:.1%} alone."]
    student_alone = copy.deepcopy(task.student) if task.baseline_within > 0 else None  # before the student is trained
    stages = _Stages(settings, task, folder, progress_bar, measures_memory=cache_folder is not None)
    metrics, cacheable = task.metrics, task.cacheable
    from_cache: Reptile | None = None
    expected: dict[str, Any] = {}
    if cache_folder is not None:
        assert cacheable is not None
        expected = {name: getattr(cacheable, name) for name in ("vocab_size", "tokenizer", "data")}
        expected["temperature"] = settings.temperature
        from_cache = stages.on_teacher(copy.deepcopy(task.student), _open(cache_folder, **expected))
    distilled = stages.on_teacher(task.student, task.teacher)
    alone = None if student_alone is None else stages.on_labels(student_alone, settings.learning_rate)
    if task.teacher_train is not None:
        assert isinstance(task.teacher, nn.Module)
        teacher = stages.on_labels(task.teacher, settings.teacher_learning_rate)
        if cache_folder is not None:
            take_teacher(Path(cache_folder) / TEACHER / "teacher", folder / "teacher")
        stages.train("teacher", teacher, task.teacher_train, task.held_out, settings.teacher_steps)
        if cache_folder is not None:
            _open(cache_folder, **expected, teacher=_digest_of(task.teacher))
        del teacher
    elif isinstance(task.teacher, nn.Module):
        stages.measure_teacher(distilled, task.held_out)
    stages.train("student", distilled, task.student_train, task.held_out, settings.steps)
    if alone is not None and stages.table["student"]["seconds"] <= task.baseline_within:
        alone_train = task.student_train if task.alone_train is None else task.alone_train
        stages.train("student alone", alone, alone_train, task.held_out, settings.steps)

    report: dict[str, Any] = {"models": stages.table, "notes": list(task.notes), "minutes": 0.0}
    page: dict[str, Any] = {"answers": collect(distilled, task.held_out), **task.finish(distilled, folder, report)}
    if task.compares_speed:
        assert isinstance(task.teacher, nn.Module)
        batch = next(iter(task.student_train))
        report["milliseconds"] = time_losses(task.student, task.teacher, batch[0], settings.temperature)
        if task.fused_linear:
            report["fused_linear"] = distilled.measure_fused_linear(batch)
    if from_cache is not None and cacheable is not None:
        del task, alone, student_alone, batch, distilled  # no teacher in memory
        stages.train("student from cache", from_cache, cacheable.student_train, cacheable.held_out, settings.steps)
        order = ("teacher", "student", "student from cache", "student alone")
        report["models"] = {name: stages.table[name] for name in order}
        report["cache"] = from_cache.objective.cache.info()  # type: ignore[union-attr]
        report["notes"] += _notes_on_cache(report["cache"], from_cache.accelerator.device)
    if "student alone" in stages.table:
        report["notes"].append(_best_of(stages.lines, "student alone", metrics[0]))
    report["minutes"] = (time.perf_counter() - started) / 60
    text = "".join(f"{line}\n" for line in map(json.dumps, stages.lines))
    write_atomically(folder / "metrics.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    if not (folder / "model.safetensors").exists():  # which a recipe writes that has a form of its own
        weights = folder / "student" / "student.safetensors"
        write_atomically(folder / "student.safetensors", lambda path: shutil.copyfile(weights, path))
    write_atomically(folder / "curves.png", lambda path: draw_curves(stages.lines, metrics, path))
    write_json(folder / "report.json", report)
    page.setdefault("title", f"reptile distill: {folder.name}")
    page.setdefault("commands", f"reptile evaluate {shlex.quote(str(folder))}")
    write_page(
        folder / "report.html",
        report=report,
        lines=stages.lines,
        metrics=metrics,
        settings=settings.model_dump(exclude_none=True),
        **page,
    )
    print(format_table(report, metrics), flush=True)
    return report


def _share(loader: Iterable[Any], settings: Settings) -> Iterable[Any]:
    """A loader of a part of the samples, at least one."""
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise ValueError(f"fraction must be 1 with samples that cannot be counted; got {settings.fraction:g}")
    count = len(loader.dataset)
    kept = max(1, round(settings.fraction * count))
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()[:kept]
    shuffled = isinstance(loader.sampler, RandomSampler)
    return DataLoader(
        Subset(loader.dataset, sorted(numbers)), loader.batch_size, shuffle=shuffled, collate_fn=loader.collate_fn
    )


def cache_teacher(
    recipe: Recipe, settings: Settings, folder: Path, kind: str, k: int, progress_bar: bool = True
) -> dict[str, Any]:
    """Train the recipe's teacher in `folder`/teacher, and write k classes at each position of the samples that the
    students see, and of those held out, to `folder`: its likeliest ("top_k") or drawn ones ("sampled"). Go on where
    that was stopped. Returns `info()` of it."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    own = folder / TEACHER
    task = recipe.build(settings, own)
    cacheable = task.cacheable
    if cacheable is None or not isinstance(task.teacher, nn.Module) or task.teacher_train is None:
        raise ValueError("recipe: its samples are others in every pass, so that a teacher's answers cannot be kept")
    if k > cacheable.vocab_size:
        raise ValueError(f"k must be at most the vocabulary's size, {cacheable.vocab_size}; got {k}")
    stages = _Stages(settings, task, own, progress_bar, measures_memory=False)
    reptile = stages.on_labels(task.teacher, settings.teacher_learning_rate)
    stages.train("teacher", reptile, task.teacher_train, task.held_out, settings.teacher_steps)
    where = {Cacheable.sample_id(part, i): x for part, inputs in cacheable.inputs.items() for i, x in enumerate(inputs)}
    tokens = sum(x.numel() for x in where.values())
    print(f"cache: {len(where):,} samples, {tokens:,} tokens, {kind}, K = {k}", flush=True)
    device = reptile.accelerator.device
    with TeacherCache.write(
        folder,
        vocab_size=cacheable.vocab_size,
        kind=kind,
        k=k,
        temperature=settings.temperature,
        teacher=_digest_of(task.teacher),
        tokenizer=cacheable.tokenizer,
        data=cacheable.data,
        resume=True,
    ) as writer:
        todo = list(writer.todo(where))
        done = tokens - sum(where[sample_id].numel() for sample_id in todo)
        bar = tqdm(total=tokens, initial=done, unit="token", unit_scale=True, disable=not progress_bar)
        with bar, torch.no_grad(), frozen([task.teacher]):
            for start in range(0, len(todo), settings.teacher_batch):
                names = todo[start : start + settings.teacher_batch]
                inputs = torch.stack([where[name] for name in names]).to(device)
                for name, logits in zip(names, logits_of(task.teacher, inputs), strict=True):
                    if kind == "top_k":
                        rows = top_k_targets(logits, k, settings.temperature)
                    else:  # a sample's draws are its own, whatever was there before
                        seed = zlib.crc32(f"{settings.seed} {name}".encode())
                        generator = torch.Generator(device).manual_seed(seed)
                        rows = sampled_targets(logits, k, settings.temperature, generator)
                    writer.add(name, *rows)
                bar.update(inputs.numel())
    return TeacherCache.open(folder).info()


def _open(folder: str, **expected: Any) -> TeacherCache:
    try:
        return TeacherCache.open(folder, **expected)
    except (OSError, ValueError) as error:
        raise ValueError(f"cache: {error}") from error


def take_teacher(found: Path, wanted: Path) -> None:
    """A teacher that is trained already, of a cache or another run; where it is gone, the run trains its own."""
    if wanted.exists() or latest_checkpoint(found) is None:
        return
    temporary = wanted.with_name(f"{TEMPORARY}{wanted.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    shutil.copytree(found, temporary)
    temporary.rename(wanted)


def _digest_of(model: nn.Module) -> str:
    """Of a model's weights."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        values = x.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _best_of(lines: Sequence[Mapping[str, Any]], model: str, metric: str) -> str:
    """What a student without a teacher would have by stopping in time: on few data it learns them by heart."""
    evaluations = [(line["step"], line["eval"][metric]) for line in lines if line["model"] == model and "eval" in line]
    step, value = (max if METRICS[metric] else min)(evaluations, key=lambda x: x[1])
    return f"The best evaluation of the student without a teacher, after {step} steps: {TITLES[metric]} {value:.4f}."


def _notes_on_cache(info: Mapping[str, Any], device: torch.device) -> list[str]:
    held = (
        f"{info['k']} draws a position"
        if info["kind"] == "sampled"
        else f"{info['k']} classes hold {info['captured_mass']:.3f} of the mass"
    )
    memory = "allocated on the GPU" if device.type == "cuda" else "resident memory of the process, libraries included"
    return [
        f"Cache: {info['rows']:,} positions in {info['bytes'] / 1e6:.1f} MB, {info['bytes_per_entry']:.2f} bytes an "
        f"entry; {held}. The student from it is trained last, when the teacher is no longer in memory.",
        f"Peak memory: the highest of a training, evaluations included ({memory}); - where it was trained before.",
    ]


def evaluate(recipe: Recipe, settings: Settings, folder: Path, data: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of a run folder's distilled student on the held-out data, or on other files."""
    task = recipe.build(settings, folder)
    settings = task.settings or settings
    if data and task.open_data is None:
        raise ValueError("data: the recipe of this run has its own data alone")
    held_out = task.open_data(data) if data and task.open_data is not None else task.held_out
    if task.saved_student is None:
        load_weights(folder / "student.safetensors", task.student)
        reptile = Reptile(task.student, None, metrics=task.metrics, precision=settings.precision, **task.keywords)
        return reptile.evaluate(held_out)
    if task.teacher_train is not None and isinstance(task.teacher, nn.Module):
        load_weights(folder / "teacher" / "student.safetensors", task.teacher)
    has_answers = not (data and isinstance(task.teacher, TeacherCache))  # a cache knows its own samples alone
    metrics = (*task.metrics, "agreement") if has_answers else task.metrics
    teacher = {**settings.loss(), **task.teacher_keywords} if has_answers else {}
    student = task.saved_student(folder, task.student)
    common = {"metrics": metrics, "precision": settings.precision, "fused_linear": task.fused_linear, **task.keywords}
    return Reptile(student, task.teacher if has_answers else None, **common, **teacher).evaluate(held_out)
