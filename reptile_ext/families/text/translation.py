"""`reptile distill translation`: an encoder-decoder into a smaller one, on the user's pairs of texts.

Without files it is the built-in case: phrases of locale data in English and German. A small transformer is trained on
thousands first; the students see some hundred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.utils.data import ConcatDataset, Dataset

from ...files import write_json
from ...training import Reptile
from ...training.recipes.code_lm import trained_tokenizer
from ...training.recipes.comparison import Count, Recipe, Task
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
from .corpora import phrases
from .data import Prepared, Table, translation
from .finish import finish_with
from .generation import models_of_run, translation_scores, written
from .models import wrapped
from .settings import TextSettings

TASK = "translation"
_MOST_TRANSLATED = 200  # held-out samples, evenly spaced
_SHOWN = 8


class Translation(TextSettings):
    """Distil a translator into a smaller one, on your own pairs of texts."""

    source_column: str | None = None
    """Of the texts (default: source), or their language in a column "translation"."""
    target_column: str | None = None
    """Of what they are in the other language (default: target), likewise."""
    samples: Count | None = None
    """Of the training samples the students get only so many, evenly spaced."""
    transfer: list[str] = Field(default_factory=list)
    """Files of texts without translations: the distilled student learns the teacher's translations of them, too
    (sequence-level distillation, Kim & Rush 2016); the student without a teacher has the pairs alone."""
    student: str = "builtin:transformer"


# The built-in case, where nothing else is given.
_BUILT_IN: dict[str, Any] = {
    "teacher": "builtin:transformer,width=128,layers=2,heads=4",
    "student": "builtin:transformer,width=48,layers=1,heads=4",
    "max_length": 32,
    "samples": 200,
    "batch": 32,
    "accumulate": 1,
    "steps": 1000,
    "teacher_batch": 32,
    "teacher_steps": 1000,
    "teacher_learning_rate": 1e-3,
    "learning_rate": 2e-3,
    "eval_every": 100,
    "checkpoint_every": 500,
    "precision": "float32",
    "fused_linear": "no",
    "baseline": "yes",
}
_VOCABULARY = 1500


def build(settings: Translation, folder: Path) -> Task:
    tokenizer = None
    if settings.is_built_in:
        given = settings.model_fields_set
        settings = settings.model_copy(update={name: x for name, x in _BUILT_IN.items() if name not in given})
        train, held_out = phrases()
        texts = [text for row in train for text in row.values()]
        path = folder / "vocabulary.json"
        tokenizer = wrapped(trained_tokenizer(_VOCABULARY, texts, path, single_digits=True))
        tables = {"train": Table.of_rows("train", train), "eval": Table.of_rows("eval", held_out)}
        tables["transfer"] = _without_targets(row["source"] for row in train)
    else:
        tables = tables_of(settings)
        tokenizer = tokenizer_for(settings, folder, tables["train"])
        if settings.transfer:
            found = Table.open("transfer", settings.transfer, sample_by=settings.sample_by)
            column = found.column("source_column", settings.source_column, ("source", "text", "src"))
            tables["transfer"] = _without_targets(row[column] for row in found.rows)
    check_unchanged(folder, tables)
    models = models_of(TASK, settings, tokenizer)
    decode: Callable[[Any], str] = models.tokenizer.decode  # type: ignore[union-attr]
    torch.manual_seed(settings.seed)
    teacher = load_teacher(settings, models)
    student = models.load_student(classes_of(teacher), lora=settings.lora)
    start = _same_start(teacher, student)

    def prepare(table: Table) -> Prepared:
        has_columns = table.flag != "transfer"
        return translation(
            table,
            models.tokenizer,
            source_column=settings.source_column if has_columns else "source",
            target_column=settings.target_column if has_columns else "target",
            max_length=models.max_length,
            decoder_start_token_id=start,
        )

    prepared = {name: prepare(table) for name, table in tables.items()}
    parts = parts_of(settings, {name: of.samples for name, of in prepared.items()})
    if settings.samples is not None:
        parts["train"] = thinned(parts["train"], settings.samples, "samples")
    seen = f"The students see {len(parts['train']):,} pairs, the same in both."
    if "transfer" in parts:
        parts["alone"] = parts["train"]
        translated = Translated(parts["transfer"], teacher, models.tokenizer, models.max_length, folder)
        parts["train"] = ConcatDataset([parts["alone"], translated])
        seen = (
            f"The student without a teacher sees {len(parts['alone']):,} pairs; the distilled one these and the "
            f"teacher's translations of {len(translated):,} texts."
        )

    def sample_text(sample: int, position: int) -> str:
        row = parts["eval"][sample]
        return f"{row['source']} → {decode(row['labels'][:position])} …"

    def scores(reptile: Reptile, run: Path, report: dict[str, Any]) -> dict[str, Any]:
        shown = _translate(reptile, run, report, models.tokenizer, parts["eval"], models.max_length)
        return {"generations": shown, "generations_title": "What the student translates"}

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
        metrics=("cross_entropy", "perplexity", "accuracy"),
        notes=[*(f"{name}: {of.counts.sentence()}" for name, of in prepared.items()), seen],
        keywords={"shift_labels": False},
        finish=finish_with(
            TASK,
            models.tokenizer,
            parts["eval"],
            scores,
            class_name=lambda token: repr(decode([token]))[1:-1],
            sample_text=sample_text,
        ),
    )


class Translated(Dataset[dict[str, Any]]):
    """Texts with the teacher's greedy translations, which are made when the first is asked for, once the teacher is
    trained, and kept in the run folder."""

    def __init__(self, samples: Any, teacher: Any, tokenizer: Any, max_length: int, folder: Path) -> None:
        self._samples, self._teacher, self._tokenizer = samples, teacher, tokenizer
        self._max_length, self._path = max_length, folder / "translated.json"
        self._labels: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if self._labels is None:
            self._labels = self._read() if self._path.exists() else self._translate()
        return {**self._samples[i], "labels": self._labels[i]}

    def _read(self) -> list[list[int]]:
        found: list[list[int]] = json.loads(self._path.read_text(encoding="utf-8"))
        return found

    def _translate(self) -> list[list[int]]:
        print(f"the teacher translates {len(self):,} texts", flush=True)
        prompts = [self._samples[i]["input_ids"] for i in range(len(self))]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        ids = written(self._teacher, self._tokenizer, [prompts[i] for i in order], max_new_tokens=self._max_length - 1)
        eos = self._tokenizer.eos_token_id
        found: list[list[int]] = [[]] * len(prompts)
        for i, one in zip(order, ids, strict=True):
            body = one[1:]  # behind the token that begins
            found[i] = [*body[: body.index(eos)], eos] if eos in body else body
        write_json(self._path, found)
        return found


def _without_targets(texts: Iterable[str]) -> Table:
    return Table.of_rows("transfer", [{"source": text, "target": text} for text in texts])  # which are replaced


def _same_start(teacher: Any, student: Any) -> int:
    """The token that both decoders begin with: else their first rows are of different questions."""
    found = [getattr(getattr(model, "config", None), "decoder_start_token_id", None) for model in (teacher, student)]
    if found[0] is None or found[0] != found[1]:
        raise ValueError(
            f"decoder_start_token_id of teacher and student must be the same token; got {found[0]} and {found[1]}"
        )
    return int(found[0])


def _translate(
    reptile: Reptile, folder: Path, report: dict[str, Any], tokenizer: Any, held_out: Any, max_length: int
) -> list[dict[str, str]]:
    """Add chrF and BLEU of greedy translations to the report's models; some of the student's to show."""
    count = min(_MOST_TRANSLATED, len(held_out))
    rows = [held_out[i] for i in torch.linspace(0, len(held_out) - 1, count).long().tolist()]
    references = [row["target"] for row in rows]
    shown: list[dict[str, str]] = []
    for name, model in models_of_run(reptile, folder, report):
        ids = written(model, tokenizer, [row["input_ids"] for row in rows], max_new_tokens=max_length)
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        report["models"][name] |= translation_scores(texts, references)
        if name == "student":
            shown = [{"prompt": f"{row['source']} → ", "text": text} for row, text in zip(rows, texts, strict=True)]
    report["notes"].append(f"chrF and BLEU by sacrebleu, of greedy translations of {count:,} held-out samples.")
    return shown[:: max(1, len(shown) // _SHOWN)][:_SHOWN]


RECIPE = Recipe(settings=Translation, build=build, task=TASK)
