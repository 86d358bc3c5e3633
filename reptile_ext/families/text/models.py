"""What `--teacher` and `--student` name, and the models that come of it.

    FOLDER or NAME                as save_pretrained writes it, or on the Hugging Face hub
    config:FOLDER,layers=2        a new model from a configuration (a folder or a config.json), some of it changed
    builtin:lstm,width=64         a new Embedding + LSTM + Linear (`.lstm`)
    builtin:transformer,width=64  a new small transformer of the task's kind
    module:function               what a function of yours returns, an nn.Module

New models have the teacher's tokenizer, so that their classes are the teacher's.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pretrained import (
    OF_TRANSFORMERS,
    check_kind,
    first_line,
    folder_of,
    load_model,
    quiet,
    read_config,
    read_tokenizer,
    weight_files,
)
from ...words import did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
BUILTIN = ("lstm", "transformer")
_BUILTIN_SIZES = {
    "lstm": {"width": 64, "state": 128, "layers": 1, "dropout": 0.0},
    "transformer": {"width": 128, "layers": 2, "heads": 2, "dropout": 0.0},
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.txt", "vocab.json", "spiece.model", "source.spm"),
)


@dataclass(frozen=True)
class Named:
    """What a flag names, taken apart."""

    argument: str  # "teacher" or "student"
    kind: str  # "folder", "config", "builtin" or "function"
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, argument: str, text: str) -> Named:
        """Raises ValueError for what is none of the above."""
        for kind in ("config", "builtin"):
            if text.startswith(f"{kind}:"):
                name, *options = text.removeprefix(f"{kind}:").split(",")
                found = cls(argument, kind, name, key_values(argument, options))
                if kind == "builtin":
                    found._check_builtin()
                return found
        if Path(text).is_dir() or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
            return cls(argument, "folder", text, {})
        return cls(argument, "function", text, {})

    @property
    def is_new(self) -> bool:
        """Whether the model begins with random weights."""
        return self.kind in ("config", "builtin")

    def _check_builtin(self) -> None:
        if self.name not in BUILTIN:
            raise ValueError(
                f"{self.argument} must be one of builtin:{', builtin:'.join(BUILTIN)}; got builtin:{self.name}"
                f"{did_you_mean(self.name, BUILTIN)}"
            )
        sizes = _BUILTIN_SIZES[self.name]
        for key, value in self.options.items():
            if key not in sizes:
                raise ValueError(
                    f"{self.argument}: builtin:{self.name} has {', '.join(sizes)}; got {key!r}"
                    f"{did_you_mean(key, sizes)}"
                )
            wanted = "from 0 to below 1" if key == "dropout" else "a whole number of at least 1"
            is_right = 0 <= value < 1 if key == "dropout" else type(value) is int and value >= 1
            if not is_right:
                raise ValueError(f"{self.argument}: {key} must be {wanted}; got {value!r}")
        if self.name == "transformer" and self._size("width") % self._size("heads"):
            raise ValueError(
                f"{self.argument}: width must be a multiple of heads; got {self._size('width')} and "
                f"{self._size('heads')}"
            )

    def _size(self, name: str) -> Any:
        return self.options.get(name, _BUILTIN_SIZES[self.name][name])

    # ------------------------------------------------------------------------------------------- tokenizer, context

    def folder(self, allow_pickle: bool) -> Path | None:
        """Of models that lie in one; of a configuration, the folder it is in."""
        if self.kind == "folder":
            return folder_of(self.name, allow_pickle, self.argument)
        if self.kind == "config":
            path = Path(self.name)
            if not (path.is_file() or (path / "config.json").is_file()):
                raise ValueError(
                    f"{self.argument} must be a folder with a config.json, or that file, after config:; got {path}"
                )
            return path if path.is_dir() else path.parent
        return None

    def tokenizer(self, allow_pickle: bool) -> Any:
        """The one in the model's folder; None where there is none."""
        folder = self.folder(allow_pickle)
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.txt",
            "vocab.json",
            "spiece.model",
        )
        if folder is None or not any((folder / name).is_file() for name in names):
            return None
        return read_tokenizer(folder, self.argument)

    def context(self, allow_pickle: bool) -> int | None:
        """Positions of the model, where its configuration says."""
        folder = self.folder(allow_pickle)
        if folder is None:
            return None
        config = read_config(Path(self.name) if self.kind == "config" else folder, self.argument)
        for name, value in self.options.items():
            setattr(config, name, value)
        return context_of(config)

    # ------------------------------------------------------------------------------------------- the model

    def load(
        self,
        task: str,
        *,
        tokenizer: Any,
        classes: int | None = None,
        labels: list[str] | None = None,
        context: int = 1024,
        dtype: str = "float32",
        allow_pickle: bool = False,
        device_map: str | None = None,
        quantize: str = "none",
    ) -> nn.Module:
        """The model, in eval mode.

        tokenizer   the special tokens of a new model are its.
        classes     of a new model's vocabulary; None: the tokenizer's number of tokens.
        labels      of a classifier; None: those of its configuration. Where they differ, its head is new.
        context     positions of a new transformer."""
        if self.kind == "function":
            return self._from_function(task, tokenizer=tokenizer, classes=classes, labels=labels)
        if self.kind == "builtin":
            config = self._builtin_config(task, tokenizer, classes or len(tokenizer), labels, context)
            return self._new(task, config)
        folder = self.folder(allow_pickle)
        assert folder is not None
        config = read_config(Path(self.name) if self.kind == "config" else folder, self.argument)
        check_kind(config, task, folder, self.argument)
        if self.kind == "config":
            self._change(config, classes or len(tokenizer), tokenizer, labels)
            return self._new(task, config)
        weight_files(folder, allow_pickle, self.argument)
        more: dict[str, Any] = {}
        may_lack: tuple[str, ...] = ()
        if labels is not None and [config.id2label[i] for i in sorted(config.id2label)] != labels:
            config.num_labels = len(labels)
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
            more["ignore_mismatched_sizes"] = True
            may_lack = ("classifier", "score", "output", "pre_classifier", "classification_head")
        if device_map is not None:
            more["device_map"] = device_map
        if quantize != "none":
            import transformers

            more["quantization_config"] = transformers.BitsAndBytesConfig(**{f"load_in_{quantize}": True})
        model: nn.Module = load_model(folder, config, task, dtype, allow_pickle, self.argument, may_lack, **more)
        if may_lack:  # the old head is for other labels, whatever its size
            _begin_again(model, may_lack)
        return model

    def _new(self, task: str, config: Any) -> nn.Module:
        with quiet() as transformers:
            try:
                model: nn.Module = getattr(transformers, OF_TRANSFORMERS[task]).from_config(config)
            except Exception as error:
                raise ValueError(f"{self.argument}: transformers makes no model of it: {first_line(error)}") from error
        return model.eval()

    def _change(self, config: Any, classes: int, tokenizer: Any, labels: list[str] | None) -> None:
        known = config.to_dict()
        for key, value in self.options.items():
            if key not in known:
                raise ValueError(f"{self.argument}: {self.name} has no {key!r}{did_you_mean(key, known)}")
            setattr(config, key, value)
        if isinstance(getattr(config, "layer_types", None), list) and "num_hidden_layers" in self.options:
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        if "vocab_size" not in self.options:
            config.vocab_size = classes
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name, None) is not None:
                setattr(config, name, getattr(tokenizer, name))
        if labels is not None:
            config.num_labels = len(labels)
            config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}

    def _builtin_config(self, task: str, tokenizer: Any, classes: int, labels: list[str] | None, context: int) -> Any:
        import transformers

        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        more: dict[str, Any] = {}
        if labels is not None:
            more["id2label"] = dict(enumerate(labels))
            more["label2id"] = {name: i for i, name in enumerate(labels)}
        width, layers, dropout = self._size("width"), self._size("layers"), self._size("dropout")
        if self.name == "lstm":
            if task == "translation":
                raise ValueError(f"{self.argument}: builtin:lstm is no encoder-decoder; take builtin:transformer")
            from .lstm import LstmConfig

            return LstmConfig(
                vocab_size=classes, width=width, state=self._size("state"), layers=layers, dropout=dropout,
                **special, **more,
            )  # fmt: skip
        heads = self._size("heads")
        if task == "language-model":
            return transformers.GPT2Config(
                vocab_size=classes, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **special,
            )  # fmt: skip
        if task == "text-classification":
            return transformers.DistilBertConfig(
                vocab_size=classes, max_position_embeddings=context, dim=width, n_layers=layers, n_heads=heads,
                hidden_dim=4 * width, dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
                **special, **more,
            )  # fmt: skip
        start = special["bos_token_id"] if special["bos_token_id"] is not None else special["pad_token_id"]
        return transformers.MarianConfig(
            vocab_size=classes, max_position_embeddings=context, d_model=width, dropout=dropout,
            encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, decoder_start_token_id=start,
            # Else the tokens' embeddings are nothing beside the positions'.
            scale_embedding=True, init_std=width**-0.5,
            forced_eos_token_id=special["eos_token_id"], **special,
        )  # fmt: skip

    def _from_function(self, task: str, **known: Any) -> nn.Module:
        module_name, function_name = self.name.split(":")
        sys.path.insert(0, "")  # as `python -m` does
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"{self.argument}: {module_name} cannot be imported: {first_line(error)}") from error
        finally:
            sys.path.remove("")
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(
                f"{self.argument}: {module_name} has no function {function_name!r}"
                f"{did_you_mean(function_name, vars(module))}"
            )
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        of_labels = None if known["labels"] is None else len(known["labels"])
        offered = {
            "task": task,
            "tokenizer": known["tokenizer"],
            "vocab_size": known["classes"],
            "num_labels": of_labels,
        }
        model = function(**{name: value for name, value in offered.items() if takes_all or name in names})
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.argument}: {self.name} must return an nn.Module; got {type(model).__name__}")
        return model


def key_values(argument: str, options: list[str]) -> dict[str, Any]:
    """Of "key=value" words, values as Python writes them, or strings."""
    found: dict[str, Any] = {}
    for option in options:
        key, is_there, value = option.partition("=")
        if not is_there or not key.strip():
            raise ValueError(f"{argument} must have options as key=value, with commas between; got {option!r}")
        try:
            found[key.strip()] = ast.literal_eval(value.strip())
        except (SyntaxError, ValueError):
            found[key.strip()] = {"true": True, "false": False}.get(value.strip().lower(), value.strip())
    return found


def _begin_again(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        if name.startswith(prefixes) and isinstance(module, nn.Linear):
            std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------ a run's models

_LONGEST = 512  # tokens of a sample, where nobody says more


class Models:
    """The teacher and the student of a run. Tokenizers and configurations are read first, so that what is wrong with
    them, or with the data, is said before weights are loaded.

    Attributes:
        tokenizer: the student's. teacher_tokenizer: another one, of a teacher of samples, not of tokens; else the same.
        max_length: tokens that a sample keeps.
    """

    def __init__(
        self,
        task: str,
        teacher: str | None,
        student: str,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        same_tokenizer: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        """teacher: None for one that is a cache. tokenizer: for models that have none."""
        self.task, self._allow_pickle = task, allow_pickle
        self.teacher = None if teacher is None else Named.parse("teacher", teacher)
        self.student = Named.parse("student", student)
        for one in (self.teacher, self.student):
            if one is not None and one.kind == "folder":
                folder = folder_of(one.name, allow_pickle, one.argument)
                check_kind(read_config(folder, one.argument), task, folder, one.argument)
        of_teacher = None if self.teacher is None else self.teacher.tokenizer(allow_pickle)
        of_student = self.student.tokenizer(allow_pickle) if self.student.kind == "folder" else None
        self.teacher_tokenizer = of_teacher or tokenizer or of_student
        self.tokenizer = of_student or tokenizer or of_teacher
        if self.tokenizer is None:
            raise ValueError("tokenizer must name a folder with one: neither teacher nor student has a tokenizer")
        if self.tokenizer is not self.teacher_tokenizer:
            if compare_tokenizers(self.teacher_tokenizer, self.tokenizer) is None:
                self.teacher_tokenizer = self.tokenizer
            elif same_tokenizer:
                check_same_tokenizer(self.teacher_tokenizer, self.tokenizer)
        contexts = {
            one.argument: context
            for one in (self.teacher, self.student)
            if one is not None and (context := one.context(allow_pickle)) is not None
        }
        shortest = min(contexts, key=lambda name: contexts[name], default=None)
        if max_length is not None and shortest is not None and max_length > contexts[shortest]:
            raise ValueError(
                f"max_length must be at most the {shortest}'s context, {contexts[shortest]}; got {max_length}"
            )
        self.max_length: int = max_length or min([_LONGEST, *contexts.values()])

    def labels_of_teacher(self) -> list[str] | None:
        """What a classifier that is trained already calls its classes."""
        if self.teacher is None or self.teacher.kind != "folder":
            return None
        folder = self.teacher.folder(self._allow_pickle)
        assert folder is not None
        names = read_config(folder, "teacher").id2label
        return [str(names[i]) for i in sorted(names)]

    def load_teacher(self, labels: list[str] | None = None, **more: Any) -> nn.Module:
        assert self.teacher is not None
        keywords = {"context": self.max_length, "allow_pickle": self._allow_pickle, **more}
        model = self.teacher.load(self.task, tokenizer=self.teacher_tokenizer, labels=labels, **keywords)
        check_ids_fit(model, self.teacher_tokenizer, "teacher")
        return model

    def load_student(
        self, classes: int | None = None, labels: list[str] | None = None, lora: str | None = None
    ) -> nn.Module:
        """In float32, in which it is trained. classes: of the teacher's logits, which a new student has too."""
        keywords: dict[str, Any] = {"context": self.max_length, "allow_pickle": self._allow_pickle}
        model = self.student.load(self.task, tokenizer=self.tokenizer, classes=classes, labels=labels, **keywords)
        check_ids_fit(model, self.tokenizer, "student")
        return model if lora is None else add_lora(model, self.task, lora)


# ------------------------------------------------------------------------------------------------ tokenizers


def wrapped(tokenizer: Any) -> Any:
    """A tokenizer of the library `tokenizers` as transformers has it, with an end-of-text token of its own."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  def f(x):\n\treturn x ** 2  # 1,234.5\n",
    "Äpfel, naïve café; Привет мир. 你好 \N{ROCKET}",
)


def compare_tokenizers(teacher: Any, student: Any) -> str | None:
    """None if the two make the same ids of every text, as far as can be told; else how they differ."""
    by_id = [{i: token for token, i in one.get_vocab().items()} for one in (teacher, student)]
    shared = by_id[0].keys() & by_id[1].keys()
    differing = sorted(i for i in shared if by_id[0][i] != by_id[1][i])
    if differing or not shared:
        if not differing:
            return "they share no id"
        i = differing[0]
        return f"id {i} is {by_id[0][i]!r} in the teacher's and {by_id[1][i]!r} in the student's"
    for text in _PROBES:
        one, other = (x(text, add_special_tokens=False)["input_ids"] for x in (teacher, student))
        if one != other:
            return f"{text[:24]!r}… is {len(one)} tokens to the teacher's and {len(other)} to the student's, or others"
    return None


def check_same_tokenizer(teacher: Any, student: Any) -> None:
    """Raise a ValueError for a student whose tokenizer is another one than the teacher's."""
    if difference := compare_tokenizers(teacher, student):
        raise ValueError(
            f"student: its tokenizer is not the teacher's ({difference}), and logits of different tokens cannot be "
            "compared: start a student with the teacher's tokenizer (--student config:FOLDER,… or builtin:lstm), or "
            "take a teacher of the student's family"
        )


# ------------------------------------------------------------------------------------------------ adapters, sizes


def add_lora(model: nn.Module, task: str, options: str) -> nn.Module:
    """The student with LoRA adapters of peft, which alone are trained. options: "r=16,alpha=32,dropout=0,target=…"."""
    try:
        import peft
    except ImportError:
        raise ImportError("lora needs the extra 'text': pip install 'reptile_ext[text]'") from None
    given = key_values("lora", [word for word in re.split(r"[,\s]+", options) if word])
    names = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target": "target_modules"}
    for key in given:
        if key not in names:
            raise ValueError(f"lora has {', '.join(names)}; got {key!r}{did_you_mean(key, names)}")
    r = given.get("r")
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"lora must say a rank, such as r=16; got {options!r}")
    of = {"language-model": "CAUSAL_LM", "text-classification": "SEQ_CLS", "translation": "SEQ_2_SEQ_LM"}[task]
    keywords = {names[key]: value.split("+") if key == "target" else value for key, value in given.items()}
    keywords.setdefault("lora_alpha", 2 * r)
    try:
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(task_type=of, **keywords))
        return adapted
    except Exception as error:
        raise ValueError(
            f"lora: peft cannot add adapters to {type(model).__name__}: {first_line(error)} (target=q_proj+v_proj "
            "names the layers)"
        ) from error


def merged(model: nn.Module) -> nn.Module:
    """A student without its adapters, merged into it."""
    merge = getattr(model, "merge_and_unload", None)
    found: nn.Module = merge() if callable(merge) else model
    return found


def context_of(config: Any) -> int | None:
    """Positions that a configuration gives a model; None if it names none."""
    config = None if config is None else config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's kind counts positions from behind the padding's id.
            offset = (config.pad_token_id or 0) + 1 if config.model_type in _POSITIONS_AFTER_PAD else 0
            return value - offset
    return None


_POSITIONS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xlm-roberta-xl", "data2vec-text")


def check_ids_fit(model: nn.Module, tokenizer: Any, argument: str) -> None:
    """Raise a ValueError if the tokenizer has ids that the model has no embedding for."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    highest = max(tokenizer.get_vocab().values())
    if isinstance(weight, torch.Tensor) and weight.ndim == 2 and highest >= weight.shape[0]:
        raise ValueError(
            f"{argument}: the tokenizer has token {highest}, and the model has embeddings for {weight.shape[0]}: is it "
            "another model's?"
        )
