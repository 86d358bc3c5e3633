"""From settings, models and samples to what `training.recipes` runs: what the three tasks of texts have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from ...cache import TeacherCache
from ...files import write_json
from ...linear import release_scratch
from ...pretrained import read_tokenizer
from ...training import Reptile
from ...training.costs import measure_ways
from ...training.recipes.code_lm import trained_tokenizer
from ...training.recipes.comparison import Task
from .data import Prepared, Table
from .models import Models, Named, wrapped
from .settings import TextSettings
from .use import saved_student

_CHOSEN = "chosen.json"  # in the run folder: what was found out, so that a run that goes on does not find out otherwise
_DATA = "data.json"  # likewise, what the data were
_VOCABULARY, _TOKENIZED_ROWS = 8192, 100_000  # of a tokenizer that is trained here
_AUTO_BASELINE = 600.0  # seconds of the distilled student's training


def tables_of(settings: TextSettings) -> dict[str, Table]:
    """The user's data: "train", "eval" and "teacher_train", those that are given."""
    found: dict[str, Table] = {}
    for name, split in (("train", settings.train_split), ("eval", settings.eval_split), ("teacher_train", "train")):
        if files := getattr(settings, name):
            streaming = settings.streaming and name != "eval"
            found[name] = Table.open(name, files, split=split, sample_by=settings.sample_by, streaming=streaming)
    return found


def tokenizer_for(settings: TextSettings, folder: Path, table: Table) -> Any:
    """None where a model brings its own, or the settings name one; else one that is trained on the data's texts, and
    kept in the run folder."""
    named = [Named.parse(name, getattr(settings, name) or "") for name in ("teacher", "student")]
    if settings.tokenizer is not None or not all(one.kind == "builtin" for one in named):
        return None
    if table.is_stream:
        raise ValueError("tokenizer must name a folder with one: none is trained on a stream, and no model has one")
    rows = table.rows.select(range(min(len(table.rows), _TOKENIZED_ROWS)))
    texts = [text for row in rows for text in row.values() if isinstance(text, str)]
    found = wrapped(trained_tokenizer(_VOCABULARY, texts, folder / "vocabulary.json"))
    print(f"  tokenizer: {len(found):,} tokens, trained on the training data", flush=True)
    return found


def models_of(task: str, settings: TextSettings, tokenizer: Any = None, same_tokenizer: bool = True) -> Models:
    """tokenizer: of models that have none, where the settings name no folder with one."""
    if settings.tokenizer is not None:
        tokenizer = read_tokenizer(settings.tokenizer)
    return Models(
        task,
        None if settings.is_cache else settings.teacher,
        settings.student,
        tokenizer=tokenizer,
        max_length=settings.max_length,
        same_tokenizer=same_tokenizer,
        allow_pickle=settings.allow_pickle,
    )


def load_teacher(settings: TextSettings, models: Models, labels: list[str] | None = None) -> nn.Module:
    assert models.teacher is not None
    if models.teacher.is_new:
        return models.load_teacher(labels)
    return models.load_teacher(
        labels,
        dtype=settings.teacher_dtype,
        device_map=settings.teacher_device_map,
        quantize=settings.teacher_quantize,
    )


def parts_of(settings: TextSettings, samples: Mapping[str, Any]) -> dict[str, Any]:
    """The samples of "train", "eval", "teacher_train" and others. Without data to evaluate, a share of the training
    data is held out, of a new teacher's too; without data of its own, a new teacher is trained on the students'."""
    parts = dict(samples)
    if "eval" not in parts:
        numbers, held_out = _split_off(len(parts["train"]), settings.held_out, settings.seed)
        parts |= {"train": Subset(parts["train"], numbers), "eval": Subset(parts["train"], held_out)}
    return {"teacher_train": parts["train"], **parts}


def thinned(samples: Any, count: int, name: str) -> Subset[Any]:
    """So many of the samples, evenly spaced."""
    if count > len(samples):
        raise ValueError(f"{name} must be at most the number of samples, {len(samples)}; got {count}")
    return Subset(samples, torch.linspace(0, len(samples) - 1, count).long().tolist())


def assemble(
    settings: TextSettings,
    folder: Path,
    *,
    teacher: nn.Module | TeacherCache,
    student: nn.Module,
    trains_teacher: bool,
    parts: Mapping[str, Any],
    collate: Callable[[list[Any]], Any],
    prepare: Callable[[Table], Prepared],
    task: str,
    metrics: Sequence[str],
    notes: Sequence[str],
    keywords: Mapping[str, Any],
    teacher_keywords: Mapping[str, Any] | None = None,
    finish: Callable[[TextSettings, Callable[..., Iterable[Any]]], Any],
) -> Task:
    """prepare: makes samples of a table. keywords: of every `Reptile`; teacher_keywords: of those with a teacher.
    finish: makes what is called at the end, from the completed settings and a function that makes a loader of samples.
    """

    def loader(samples: Any, batch: int, shuffle: bool) -> Iterable[Any]:
        shuffle = shuffle and hasattr(samples, "__len__")  # a stream shuffles itself
        return DataLoader(samples, batch, shuffle=shuffle, collate_fn=collate)

    def open_data(names: Sequence[str]) -> Iterable[Any]:
        return loader(prepare(Table.open("data", names, split=settings.eval_split)).samples, batch, False)

    of_teacher = {"vocab": _vocab(settings, teacher, student)}

    def make(precision: str, fused_linear: bool) -> Reptile:
        options = {"precision": precision, "fused_linear": fused_linear, **settings.loss(), **keywords, **of_teacher}
        return Reptile(student, teacher, **options)

    train = parts["train"]
    samples = len(train) if hasattr(train, "__len__") else None
    # A part that the teacher has yet to answer is not measured: it may be untrained.
    measured = parts.get("alone", train)
    completed = complete(settings, folder, samples, lambda batch: loader(measured, batch, False), make)
    batch = completed.batch or 1
    return Task(
        teacher=teacher,
        student=student,
        teacher_train=loader(parts["teacher_train"], settings.teacher_batch, True) if trains_teacher else None,
        student_train=loader(train, batch, True),
        alone_train=loader(parts["alone"], batch, True) if "alone" in parts else None,
        held_out=loader(parts["eval"], batch, False),
        metrics=metrics,
        notes=notes,
        fused_linear=completed.fused_linear == "yes",
        settings=completed,
        keywords=keywords,
        teacher_keywords={**of_teacher, **(teacher_keywords or {})},
        baseline_within={"yes": math.inf, "no": 0.0, "auto": _AUTO_BASELINE}[settings.baseline],
        compares_speed=False,
        finish=finish(completed, loader),
        saved_student=lambda path, made: saved_student(path, task, made),
        open_data=open_data,
    )


def _vocab(settings: TextSettings, teacher: nn.Module | TeacherCache, student: nn.Module) -> str:
    if settings.vocab != "auto":
        return settings.vocab
    sizes = [teacher.vocab_size if isinstance(teacher, TeacherCache) else classes_of(teacher), classes_of(student)]
    if None in sizes or sizes[0] == sizes[1]:
        return "error"
    print(f"  vocab = truncate  # teacher and student have {sizes[0]:,} and {sizes[1]:,} classes", flush=True)
    return "truncate"


def classes_of(model: nn.Module) -> int | None:
    """Of a model's logits, where it says."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


def check_unchanged(folder: Path, tables: Mapping[str, Table]) -> None:
    """Keep what the data are in the run folder; raise a ValueError if a run goes on with others."""
    digests = {name: table.digest for name, table in tables.items()}
    path = folder / _DATA
    if not path.exists():
        write_json(path, digests)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in {**before, **digests}:
        if before.get(name) != digests.get(name):
            raise ValueError(f"{name}: the data are others than {folder} was begun with: begin another run")


def complete(
    settings: TextSettings,
    folder: Path,
    samples: int | None,
    loader: Callable[[int], Iterable[Any]],
    make: Callable[[str, bool], Reptile],
) -> TextSettings:
    """The settings with nothing left out; what was found out is printed, and kept in the run folder for a run that goes
    on.

    samples   that a pass has. loader: makes the students' batches of a size. make: the distilled student's `Reptile` by
              precision and `fused_linear`; steps of it are measured, which change nothing."""
    path = folder / _CHOSEN
    if path.exists():
        return settings.model_copy(update=json.loads(path.read_text(encoding="utf-8")))
    found: dict[str, Any] = {}
    said: dict[str, str] = {}

    def measure(batch: int, **ways: tuple[str, bool]) -> dict[str, Any]:
        reptiles = {name: make(*way) for name, way in ways.items()}
        last = list(reptiles.values())[-1]
        parts = last.on_device(last.objective.split(next(iter(loader(batch)))))
        return measure_ways({name: reptile.objective for name, reptile in reptiles.items()}, parts, 5)

    precision = "float32" if settings.precision == "auto" else settings.precision
    fused = settings.fused_linear == "yes"
    per_step = (settings.accumulate or 1) if settings.batch is None and settings.accumulate else 16
    if settings.batch is None:
        peak = measure(1, one=(precision, fused))["peak_bytes"]["one"]
        most = per_step if samples is None else min(per_step, samples)
        free = _free_memory()
        fits = most if not peak or not free else max(1, int(0.5 * free / peak))
        # Only divisors of a step's samples, so that steps are of one size.
        found["batch"] = max(n for n in range(1, most + 1) if n <= fits and (per_step % n == 0 or n == most))
        said["batch"] = f"a sample takes {_megabytes(peak)} of the {_megabytes(free)} that are free"
    batch: int = found.get("batch") or settings.batch or 1
    if settings.accumulate is None:
        found["accumulate"] = max(1, per_step // batch)
    accumulate: int = found.get("accumulate") or settings.accumulate or 1
    if settings.precision == "auto":
        found["precision"] = "float32"
        if _has_bfloat16():
            ms = measure(batch, float32=("float32", fused), bfloat16=("bfloat16", fused))["milliseconds"]
            if None not in ms.values() and 1.2 * ms["bfloat16"] < ms["float32"]:
                found["precision"] = "bfloat16"
            said["precision"] = _times(ms)
        else:
            said["precision"] = "there are no instructions for bfloat16 here"
        precision = found["precision"]
    if settings.fused_linear == "auto":
        found["fused_linear"] = "no"
        try:
            if not settings.inplace:
                costs = measure(batch, logits=(precision, False), fused_linear=(precision, True))
                ms, peaks = costs["milliseconds"], costs["peak_bytes"]
                if None not in ms.values():
                    saves = None not in peaks.values() and peaks["fused_linear"] < 0.95 * peaks["logits"]
                    pays = ms["fused_linear"] < ms["logits"] or (saves and ms["fused_linear"] < 1.05 * ms["logits"])
                    found["fused_linear"] = "yes" if pays else "no"
                said["fused_linear"] = f"{_times(ms)}; {' and '.join(map(_megabytes, peaks.values()))}"
        except ValueError as error:  # models that it is not for
            said["fused_linear"] = str(error).split("; pass fused_linear")[0]
    release_scratch()
    if settings.steps is None:
        assert samples is not None
        epochs = settings.epochs or 3
        found["steps"] = math.ceil(math.ceil(samples / batch) / accumulate) * epochs
        said["steps"] = f"{epochs} passes over {samples:,} samples"
    for name in ("eval_every", "checkpoint_every"):
        if getattr(settings, name) is None:
            found[name] = max(1, math.ceil((found.get("steps") or settings.steps or 1) / 10))
    for name, value in found.items():
        print(f"  {name} = {value}" + (f"  # {said[name]}" if name in said else ""), flush=True)
    write_json(path, found)
    return settings.model_copy(update=found)


def _times(milliseconds: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'-' if ms is None else f'{ms:.0f} ms'}" for name, ms in milliseconds.items())


def _free_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _has_bfloat16() -> bool:
    """Whether there is a chance that bfloat16 is faster: without its instructions it never is."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _megabytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e6:,.0f} MB"


def _split_off(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of `count` samples to train on, and of those held out: the same for a seed, in their order."""
    if count < 2:
        raise ValueError(f"train must have at least two samples, of which one is held out; got {count}: or give eval")
    held_out = min(count - 1, max(1, round(share * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
