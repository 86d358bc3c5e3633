"""`reptile distill text-classification`: a sequence classifier into a smaller one, on the user's texts and labels.

Without files it is the built-in case: which package of Python's standard library a docstring is from. A small
transformer is trained on many first; the students get the same few.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch.utils.data import ConcatDataset, Subset

from ...training.recipes.code_lm import trained_tokenizer
from ...training.recipes.comparison import Count, Recipe, Task
from .assemble import assemble, check_unchanged, load_teacher, models_of, parts_of, tables_of, tokenizer_for
from .corpora import docstrings
from .data import Prepared, Table, classification, label_names
from .finish import finish_with
from .models import wrapped
from .settings import TextSettings

TASK = "text-classification"


class TextClassification(TextSettings):
    """Distil a classifier of texts into a smaller one, on your own texts and labels."""

    text_column: str | None = None
    """Of the texts (default: text, or what is like it)."""
    label_column: str | None = None
    """Of the labels (default: label, or what is like it)."""
    per_label: Count | None = None
    """Of each label's training samples the students get only so many, drawn by the seed."""
    transfer: list[str] = Field(default_factory=list)
    """Files of texts whose labels nobody needs: the distilled student learns the teacher's answers to them, with
    --hard-weight 0; the student without a teacher has the labelled texts alone."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    hard_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5

    @model_validator(mode="after")
    def _transfer_has_no_labels(self) -> TextClassification:
        if self.transfer and self.hard_weight:
            raise ValueError(
                f"hard_weight must be 0 with transfer, whose texts have no labels; got {self.hard_weight:g}"
            )
        return self


# The built-in case, where nothing else is given.
_BUILT_IN: dict[str, Any] = {
    "teacher": "builtin:lstm,width=64,state=128,dropout=0.5",
    "student": "builtin:lstm,width=20,state=32",
    "max_length": 64,
    "per_label": 10,
    "hard_weight": 0.0,
    "batch": 20,
    "accumulate": 1,
    "steps": 400,
    "teacher_batch": 32,
    "teacher_steps": 500,
    "teacher_learning_rate": 3e-3,
    "learning_rate": 1e-2,
    "eval_every": 50,
    "checkpoint_every": 200,
    "precision": "float32",
    "fused_linear": "no",
    "baseline": "yes",
}
_VOCABULARY = 4096


def build(settings: TextClassification, folder: Path) -> Task:
    tokenizer = None
    if settings.is_built_in:
        given = settings.model_fields_set
        settings = settings.model_copy(update={name: x for name, x in _BUILT_IN.items() if name not in given})
        train, held_out = docstrings()
        tokenizer = wrapped(trained_tokenizer(_VOCABULARY, [row["text"] for row in train], folder / "vocabulary.json"))
        tables = {"train": Table.of_rows("train", train), "eval": Table.of_rows("eval", held_out)}
        if not settings.hard_weight:
            tables["transfer"] = Table.of_rows("transfer", [{"text": row["text"]} for row in train])
    else:
        tables = tables_of(settings)
        tokenizer = tokenizer_for(settings, folder, tables["train"])
        if settings.transfer:
            tables["transfer"] = Table.open("transfer", settings.transfer, sample_by=settings.sample_by)
    check_unchanged(folder, tables)
    models = models_of(TASK, settings, tokenizer, same_tokenizer=False)
    labels = models.labels_of_teacher() or label_names(tables["train"], settings.label_column)
    tokenizers = (models.tokenizer, models.teacher_tokenizer)
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}

    def prepare(table: Table) -> Prepared:
        length, is_labelled = models.max_length, table.flag != "transfer"
        return classification(table, tokenizers, **columns, labels=labels, max_length=length, is_labelled=is_labelled)

    prepared = {name: prepare(table) for name, table in tables.items()}
    parts = parts_of(settings, {name: of.samples for name, of in prepared.items()})
    if settings.per_label is not None:
        parts["train"] = few(parts["train"], settings.per_label, settings.seed)
    seen = f"the students see {len(parts['train']):,} labelled texts, the same in both."
    if "transfer" in parts:
        parts["alone"] = parts["train"]
        parts["train"] = ConcatDataset([parts["alone"], parts["transfer"]])
        seen = (
            f"the student without a teacher sees {len(parts['alone']):,} labelled texts; the distilled one these and "
            f"{len(parts['transfer']):,} others, all without their labels."
        )
    torch.manual_seed(settings.seed)
    teacher = load_teacher(settings, models, labels if models.teacher is not None and models.teacher.is_new else None)
    student = models.load_student(labels=labels, lora=settings.lora)

    def sample_text(sample: int, _: int) -> str:
        return str(parts["eval"][sample]["text"])

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
        metrics=("accuracy", "f1", "cross_entropy"),
        notes=[
            *(f"{name}: {of.counts.sentence()}" for name, of in prepared.items()),
            f"{len(labels)} labels; {seen}",
        ],
        keywords={},
        finish=finish_with(
            TASK, models.tokenizer, parts["eval"], class_name=lambda i: labels[i], sample_text=sample_text
        ),
    )


def few(samples: Any, per_label: int, seed: int) -> Subset[Any]:
    """So many samples of each label, or all it has."""
    of_label: dict[int, list[int]] = defaultdict(list)
    for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist():
        of_label[samples[i]["label"]].append(i)
    return Subset(samples, sorted(i for numbers in of_label.values() for i in numbers[:per_label]))


RECIPE = Recipe(settings=TextClassification, build=build, task=TASK)
