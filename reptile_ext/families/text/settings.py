"""Settings that the three tasks of texts share, and what is found out where one of them is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

from ...files import write_json
from ...linear import release_scratch
from ...training import Reptile
from ...training.costs import measure_ways
from ...training.recipes.comparison import Count, Rate, Settings
from .models import DTYPES, Named, key_values

CHOSEN = "chosen.json"  # in the run folder: what was found out, so that a run that goes on does not find out otherwise


class TextSettings(Settings):
    """What `reptile distill language-model`, `text-classification` and `translation` have in common."""

    teacher: str | None = None
    """Folder, name on the hub, config:FOLDER, builtin:transformer, module:function, or a teacher cache. Without it, and
    without --train, built-in data are used, and a teacher is trained on them."""
    student: str = "builtin:lstm"
    """Likewise; with options such as builtin:lstm,width=64,state=128 or config:FOLDER,num_hidden_layers=2."""
    train: list[str] = Field(default_factory=list)
    """Files (.jsonl, .csv, .tsv, .parquet, .txt, also compressed), a folder that `datasets` saved, or its name on the
    hub; more than one with commas between, or the flag once for each."""
    eval: list[str] = Field(default_factory=list)
    """Likewise, held out. Without it, a part of the training data is."""
    teacher_train: list[str] = Field(default_factory=list)
    """What a new teacher is trained on (default: --train)."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training data that is held out where there is no --eval."""
    train_split: str = "train"
    """Of a data set that has splits."""
    eval_split: str = "test"
    """Likewise, of --eval."""
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """What a sample of plain text is (default: a line)."""
    streaming: CliImplicitFlag[bool] = False
    """Read the files again in every pass, where they are too large for the disk's cache, too. Needs --steps."""
    max_length: Count | None = None
    """Tokens that a sample keeps (default: the models' context, at most 512)."""
    tokenizer: str | None = None
    """Folder of the tokenizer, where neither model has one."""
    teacher_dtype: str = "auto"
    """auto (the checkpoint's), float32, bfloat16 or float16."""
    teacher_quantize: Literal["none", "8bit", "4bit"] = "none"
    """By bitsandbytes, as transformers does."""
    teacher_device_map: str | None = None
    """Of transformers and accelerate, such as auto: spreads a large teacher over devices."""
    allow_pickle: CliImplicitFlag[bool] = False
    """Read weights that are no safetensors, which can run code."""
    lora: str | None = None
    """Train adapters of peft alone, such as r=16 or r=8,alpha=32,target=q_proj+v_proj."""
    baseline: Literal["auto", "yes", "no"] = "auto"
    """Train the same student without a teacher, too, to compare (auto: where that takes at most ten minutes)."""
    fused_linear: Literal["auto", "yes", "no"] = "auto"
    """Train from hidden states and heads, without the logits in full (auto: where a measured step is faster or needs
    less memory for at most 5 % more time)."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # type: ignore[assignment]
    """The 16-bit ones by autocast (auto: bfloat16 where a measured step is a fifth faster)."""
    vocab: Literal["auto", "error", "truncate"] = "auto"
    """Of vocabularies that are padded to other sizes (auto: truncate, where the tokenizers are the same)."""

    batch: Count | None = None  # type: ignore[assignment]
    """Samples in a micro-batch of the students (default: what memory has room for, at most 16)."""
    accumulate: Count | None = None  # type: ignore[assignment]
    """Micro-batches in a step (default: so many that a step has 16 samples)."""
    steps: Count | None = None  # type: ignore[assignment]
    """Steps that train each student (default: by --epochs)."""
    epochs: Count | None = None
    """Passes over the training data (default: 3), where there are no --steps."""
    eval_every: Count | None = None  # type: ignore[assignment]
    """Steps between evaluations (default: a tenth of all)."""
    checkpoint_every: Count | None = None  # type: ignore[assignment]
    """Steps between checkpoints (default: a tenth of all)."""
    hard_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    learning_rate: Rate = 1e-3

    @field_validator("teacher_dtype")
    @classmethod
    def _known_dtype(cls, name: str) -> str:
        if name not in DTYPES:
            raise ValueError(f"must be one of {', '.join(DTYPES)}")
        return name

    @field_validator("lora")
    @classmethod
    def _is_of_options(cls, options: str | None) -> str | None:
        if options is not None:
            key_values("lora", options.split(","))
        return options

    @model_validator(mode="after")
    def _goes_together(self) -> TextSettings:
        if self.teacher is not None and not self.train and not self.is_cache:
            raise ValueError("train must name files of samples for this teacher; got none")
        if self.teacher is None and self.train:
            raise ValueError(
                "teacher must be given with --train: a model's folder or name, a teacher cache, or a new one that is "
                "trained first, such as builtin:transformer"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs both say when training ends: give one")
        if self.streaming and self.steps is None:
            raise ValueError("streaming needs steps: how many samples a pass has is not known before it ends")
        if self.streaming and not self.eval:
            raise ValueError("streaming needs eval: a share of samples cannot be held out of a stream")
        if self.inplace and self.fused_linear == "yes":
            raise ValueError("inplace has no meaning with fused_linear: there are no logits to write over")
        for name in ("teacher", "student"):
            text = getattr(self, name)
            if text is not None:
                Named.parse(name, text)
        return self

    @property
    def is_cache(self) -> bool:
        return self.teacher is not None and (Path(self.teacher) / "manifest.json").is_file()

    @property
    def is_built_in(self) -> bool:
        return self.teacher is None


def absolute(settings: TextSettings) -> TextSettings:
    """With paths that hold from any folder, so that a run can go on from anywhere."""
    found: dict[str, Any] = {}
    for name in ("train", "eval", "teacher_train"):
        found[name] = [str(Path(x).absolute()) if Path(x).exists() else x for x in getattr(settings, name)]
    for name in ("teacher", "student", "tokenizer"):
        text = getattr(settings, name)
        if text is None:
            continue
        prefix, rest = ("config:", text[7:]) if text.startswith("config:") else ("", text)
        path, comma, options = rest.partition(",") if prefix else (rest, "", "")
        if Path(path).exists():
            found[name] = f"{prefix}{Path(path).absolute()}{comma}{options}"
    return settings.model_copy(update=found)


# ------------------------------------------------------------------------------------------------ what is left out


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
    path = folder / CHOSEN
    if path.exists():
        return settings.model_copy(update=json.loads(path.read_text(encoding="utf-8")))
    found: dict[str, Any] = {}
    said: dict[str, str] = {}

    def measure(batch: int, **ways: tuple[str, bool]) -> dict[str, Any]:
        reptiles = {name: make(*way) for name, way in ways.items()}
        last = list(reptiles.values())[-1]
        parts = last.on_device(last.objective.split(next(iter(loader(batch)))))
        return measure_ways({name: reptile.objective for name, reptile in reptiles.items()}, parts, 3)

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


def split_off(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of `count` samples to train on, and of those held out: the same for a seed, in their order."""
    if count < 2:
        raise ValueError(f"train must have at least two samples, of which one is held out; got {count}: or give eval")
    held_out = min(count - 1, max(1, round(share * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
