"""`reptile distill language-model`: a causal language model into a smaller one, on the user's texts.

The teacher may be a cache of its answers. Without files it is the built-in case, that of `code-lm`: the source text of
Python's standard library, on which a small transformer is trained first; it has read much, the students see little.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic_settings import CliImplicitFlag
from torch.utils.data import Dataset

from ...cache import TeacherCache
from ...cache.format import TEACHER
from ...cache.tokens import TOKENS
from ...cache.vocabulary import Vocabulary
from ...training import Reptile
from ...training.recipes.code_lm import standard_library, trained_tokenizer
from ...training.recipes.comparison import Count, Rate, Recipe, Task
from .assemble import (
    assemble,
    check_unchanged,
    classes_of,
    load_teacher,
    models_of,
    parts_of,
    tables_of,
    thinned,
    tokenizer_for,
)
from .data import IGNORED, Prepared, Table, language_model, mask_of, padded, padding_of
from .finish import finish_with
from .generation import shares_that_parse
from .models import wrapped
from .settings import TextSettings

TASK = "language-model"
_METRICS = ("cross_entropy", "perplexity", "accuracy")


class LanguageModel(TextSettings):
    """Distil a causal language model into a smaller one, on your own texts."""

    text_column: str | None = None
    """Of plain texts (default: text, or what is like it)."""
    prompt_column: str | None = None
    """Of prompts, which are not trained on; with --completion-column."""
    completion_column: str | None = None
    """Of what follows the prompts."""
    messages_column: str | None = None
    """Of conversations, written out by the tokenizer's chat template; the assistant's turns are trained on."""
    packing: CliImplicitFlag[bool] = False
    """Cut texts, one after the other, into blocks of --max-length without padding."""
    samples: Count | None = None
    """Of the training samples the students get only so many, evenly spaced."""
    on_policy: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Share of the micro-batches whose completions the student writes itself, for the teacher to answer (GKD)."""
    max_new_tokens: Count = 64
    """Of these completions."""
    sampling_temperature: Rate = 1.0
    """At which they are sampled."""


# The built-in case, where nothing else is given.
_BUILT_IN: dict[str, Any] = {
    "teacher": "builtin:transformer,width=128,layers=2,heads=2",
    "student": "builtin:lstm,width=32,state=64",
    "max_length": 64,
    "packing": True,
    "samples": 312,
    "batch": 4,
    "accumulate": 1,
    "steps": 700,
    "teacher_steps": 1400,
    "teacher_learning_rate": 2e-3,
    "learning_rate": 2e-2,
    "eval_every": 100,
    "checkpoint_every": 350,
    "precision": "float32",
    "fused_linear": "no",
    "baseline": "yes",
}
_VOCABULARY, _HELD_OUT_BLOCKS = 8192, 375


def build(settings: LanguageModel, folder: Path) -> Task:
    if settings.is_cache:
        return _from_cache(settings, folder)
    tokenizer = None
    if settings.is_built_in:
        settings = settings.model_copy(
            update={k: v for k, v in _BUILT_IN.items() if k not in settings.model_fields_set}
        )
        texts = dict(zip(("train", "eval"), standard_library(), strict=True))
        tokenizer = wrapped(trained_tokenizer(_VOCABULARY, texts["train"], folder / "vocabulary.json"))
        tables = {name: Table.of_rows(name, [{"text": text} for text in of]) for name, of in texts.items()}
    else:
        tables = tables_of(settings)
        tokenizer = tokenizer_for(settings, folder, tables["train"])
    check_unchanged(folder, tables)
    models = models_of(TASK, settings, tokenizer)
    columns = {name: getattr(settings, name) for name in _COLUMNS}

    def prepare(table: Table) -> Prepared:
        length = models.max_length
        return language_model(table, models.tokenizer, **columns, max_length=length, packing=settings.packing)

    prepared = {name: prepare(table) for name, table in tables.items()}
    parts = parts_of(settings, {name: of.samples for name, of in prepared.items()})
    if settings.samples is not None:
        parts["train"] = thinned(parts["train"], settings.samples, "samples")
    if settings.is_built_in:
        parts["eval"] = thinned(parts["eval"], min(_HELD_OUT_BLOCKS, len(parts["eval"])), "eval")

    def scores(reptile: Reptile, run: Path, report: dict[str, Any]) -> dict[str, Any]:
        shares_that_parse(reptile, run, report, models.tokenizer, standard_library()[1], models.max_length)
        return {}

    torch.manual_seed(settings.seed)
    teacher = load_teacher(settings, models)
    # A new student has the classes of the teacher's logits, padding of the vocabulary included.
    student = models.load_student(classes_of(teacher), lora=settings.lora)
    return assemble(
        settings,
        folder,
        teacher=teacher,
        student=student,
        trains_teacher=models.teacher is not None and models.teacher.is_new,
        parts=parts,
        collate=prepared["train"].collate,
        prepare=prepare,
        task=TASK,
        metrics=_METRICS,
        notes=[f"{name}: {of.counts.sentence()}" for name, of in prepared.items()],
        keywords={"shift_labels": True},
        teacher_keywords=_on_policy(settings),
        finish=finish_with(TASK, models.tokenizer, parts["eval"], scores if settings.is_built_in else None),
    )


def _on_policy(settings: LanguageModel) -> dict[str, Any]:
    if not settings.on_policy:
        return {}
    generate = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.sampling_temperature}
    return {"on_policy": settings.on_policy, "generate": generate}


_COLUMNS = ("text_column", "prompt_column", "completion_column", "messages_column")


# ------------------------------------------------------------------------------------------------ from a cache


class CachedTokens(Dataset[dict[str, Any]]):
    """The samples of a cache that `reptile cache-teacher MODEL FILE …` has written, from the tokens beside its rows: of
    each, its first `max_length` tokens."""

    def __init__(self, cache: TeacherCache, max_length: int) -> None:
        import datasets

        files = sorted(map(str, (cache.folder / TOKENS).glob("rows-*.parquet")))
        if not files:
            raise ValueError(
                f"teacher: the cache in {cache.folder} has no tokens beside its rows: it was written with "
                "--no-save-tokens, or not by `reptile cache-teacher MODEL FILE …`"
            )
        self._rows = datasets.load_dataset("parquet", data_files=files, split="train")
        self._max_length = max_length
        self.truncated = sum(length > max_length for length in map(len, self._rows.with_format("numpy")["input_ids"]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._rows[i]
        ids = row["input_ids"][: self._max_length]
        return {"input_ids": ids, "sample_id": [(row["sample_id"], 0, len(ids))]}


def _collated(pad: int) -> Any:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": mask_of(ids),
            "labels": padded(ids, IGNORED),
            "sample_id": [sample["sample_id"] for sample in samples],
        }

    return collate


def _from_cache(settings: LanguageModel, folder: Path) -> Task:
    assert settings.teacher is not None
    cache = TeacherCache.open(settings.teacher)
    if settings.on_policy:
        raise ValueError("on_policy needs a teacher that can be asked: a cache knows its own samples alone")
    for name in ("train", "eval", "teacher_train"):
        if getattr(settings, name):
            raise ValueError(
                f"{name} has no meaning with a teacher cache, whose samples are beside its rows: a share of them "
                "(--held-out) is held out"
            )
    if settings.tokenizer is None:
        settings = settings.model_copy(update={"tokenizer": _tokenizer_of(cache)})
    models = models_of(TASK, settings)
    assert settings.tokenizer is not None
    found, wanted = Vocabulary(settings.tokenizer).name, cache.info()["tokenizer"]
    if found != wanted:
        raise ValueError(
            f"tokenizer: {settings.tokenizer} is another one ({found[:19]}…) than the cache in {cache.folder} was "
            f"written with ({str(wanted)[:19]}…)"
        )
    columns = {name: getattr(settings, name) for name in _COLUMNS}

    def prepare(table: Table) -> Prepared:
        return language_model(table, models.tokenizer, **columns, max_length=models.max_length)

    samples = CachedTokens(cache, models.max_length)
    parts = parts_of(settings, {"train": samples})
    if settings.samples is not None:
        parts["train"] = thinned(parts["train"], settings.samples, "samples")
    torch.manual_seed(settings.seed)
    student = models.load_student(cache.vocab_size, lora=settings.lora)
    cut = f", {samples.truncated:,} cut to {models.max_length} tokens" if samples.truncated else ""
    return assemble(
        settings,
        folder,
        teacher=cache,
        student=student,
        trains_teacher=False,
        parts=parts,
        collate=_collated(padding_of(models.tokenizer)),
        prepare=prepare,
        task=TASK,
        metrics=_METRICS,
        notes=[f"train: {len(samples):,} samples of the cache in {cache.folder}{cut}"],
        keywords={"shift_labels": True},
        finish=finish_with(TASK, models.tokenizer, parts["eval"]),
    )


def _tokenizer_of(cache: TeacherCache) -> str:
    """The folder of the tokenizer that the cache was written with, if it is where it was."""
    record = cache.folder / TEACHER / "model.json"
    try:
        begun = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        begun = {}
    folder = begun.get("tokenizer") or begun.get("model")
    if folder is None or not Path(folder).is_dir():
        raise ValueError(
            f"tokenizer must name the folder of the tokenizer that the cache in {cache.folder} was written with; "
            f"it is not in {folder}"
        )
    return str(folder)


RECIPE = Recipe(settings=LanguageModel, build=build, task=TASK)
