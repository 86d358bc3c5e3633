"""The model card of a student: the README.md that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...report.page import environment, verdict
from ...training.metrics import METRICS
from .settings import TextSettings

_PIPELINES = {
    "language-model": "text-generation",
    "text-classification": "text-classification",
    "translation": "translation",
}
_CLASSES = {
    "language-model": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "translation": "AutoModelForSeq2SeqLM",
}


def model_card(task: str, settings: TextSettings, folder: Path, report: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINES[task],
        tags=["knowledge-distillation", "reptile_ext"],
    )
    student = report["models"]["student"]
    metrics = [name for name in student if name in METRICS and name != "loss"]
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{of[m]:.4f}" if m in of else "" for m in metrics) + " |"
        for name, of in report["models"].items()
    )
    imports = (
        "import reptile_ext.families.text.lstm  # knows the model's class\n"
        if "builtin:lstm" in settings.student
        else ""
    )
    given = settings.model_dump(exclude_none=True, exclude_defaults=True)
    lines = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in given.items())
    notes = "\n".join(f"- {note}" for note in report["notes"])
    return f"""---
{data.to_yaml()}
---

# {folder.name}

A student of {student["parameters"]:,} parameters, distilled from {settings.teacher or "a teacher trained for it"} by
`reptile distill {task}`. {verdict(report, metrics[0])}

| held-out data | {" | ".join(metrics)} |
|---|{"---|" * len(metrics)}
{rows}

{notes}

## Load it

```python
{imports}from transformers import {_CLASSES[task]}, AutoTokenizer

model = {_CLASSES[task]}.from_pretrained({str(folder.name)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder.name)!r})
```

## How it was made

```toml
{lines}
```

{", ".join(f"{name} {value}" for name, value in environment().items())}. Curves and examples are in report.html.
"""
