"""Settings that the three tasks of texts share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

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

    @field_validator("train", "eval", "teacher_train")
    @classmethod
    def _files_from_anywhere(cls, names: list[str]) -> list[str]:
        return [str(Path(name).absolute()) if Path(name).exists() else name for name in names]

    @field_validator("teacher", "student", "tokenizer")
    @classmethod
    def _model_from_anywhere(cls, text: str | None) -> str | None:
        """A run can go on from another folder."""
        if text is None:
            return None
        if not text:
            raise ValueError("wanted a folder, or a name")
        prefix = "config:" if text.startswith("config:") else ""
        path, comma, options = text.removeprefix(prefix).partition(",") if prefix else (text, "", "")
        return f"{prefix}{Path(path).absolute()}{comma}{options}" if path and Path(path).exists() else text

    @field_validator("lora")
    @classmethod
    def _is_of_options(cls, options: str | None) -> str | None:
        if options is not None:
            key_values("lora", options.split(","))
        return options

    @model_validator(mode="after")
    def _goes_together(self) -> TextSettings:
        if self.teacher is not None and not self.train and not self.is_cache:
            if not Named.parse("teacher", self.teacher).is_new:
                raise ValueError("train must name files of samples for this teacher; got none")
            if self.eval or self.teacher_train:
                raise ValueError("eval and teacher_train go with train; without it, built-in data are used")
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
        """Whether the data need no file."""
        return not self.train and not self.is_cache
