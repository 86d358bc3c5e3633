"""Models and tokenizers in folders as `save_pretrained` writes them, or on the Hugging Face hub.

Weights come from safetensors files, others only where the caller allows it; no code that lies in a folder is run. What
is wrong with a folder is a ValueError that begins with the name of the argument, before its weights are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .files import add_file

# What a model is for: the class of `transformers` that loads it, the mappings its architecture has to be in, its name.
_TASKS = {
    "language-model": (
        "AutoModelForCausalLM",
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
        "causal language model",
    ),
    "text-classification": (
        "AutoModelForSequenceClassification",
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
        "sequence classifier",
    ),
    "translation": (
        "AutoModelForSeq2SeqLM",
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
        "encoder-decoder with a language head",
    ),
}
OF_TRANSFORMERS: dict[str, str] = {task: auto for task, (auto, _, _) in _TASKS.items()}
KIND_OF_MODEL: dict[str, str] = {task: kind for task, (_, _, kind) in _TASKS.items()}


def require_transformers(extra: str) -> None:
    try:
        _transformers()
    except ImportError:
        raise ImportError(f"a model needs the extra {extra!r}: pip install 'reptile_ext[{extra}]'") from None


def _transformers() -> Any:
    return importlib.import_module("transformers")


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """transformers without its log and bars: what it warns of is checked here; its bars are not of tokens."""
    transformers = _transformers()
    log = transformers.utils.logging
    verbosity, has_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(verbosity)
        if has_bar:
            log.enable_progress_bar()


def folder_of(name: str, allow_pickle: bool, argument: str = "model") -> Path:
    """The folder itself, or where the hub's model has been downloaded to."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            hint = " (an adapter: merge it into its model, and save that)" if adapter else ""
            raise ValueError(
                f"{argument} must be a folder as save_pretrained writes it; {folder} has no config.json{hint}"
            )
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{argument} must be a folder as save_pretrained writes it, or a name on the hub; got {name}")
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.model", "*.txt", "*.jinja", *weights],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except Exception as error:
        raise ValueError(
            f"{argument}: there is no folder {name}, and the hub does not give it: {first_line(error)}"
        ) from error


def read_config(folder: Path, argument: str = "model") -> Any:
    with quiet() as transformers:
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            path = folder if folder.is_file() else folder / "config.json"
            raise ValueError(f"{argument}: transformers cannot read {path}: {first_line(error)}") from error


def check_kind(config: Any, task: str, folder: Path, argument: str = "model") -> None:
    """Raise a ValueError for a model that is not for the task."""
    modeling_auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    auto, mappings, kind = _TASKS[task]
    known: set[str] = set()
    for name in mappings:
        known.update(name for name in getattr(modeling_auto, name).values() if isinstance(name, str))
    registered = type(config) in getattr(_transformers(), auto)._model_mapping
    names = config.architectures or []
    if not registered or (task == "language-model" and config.is_encoder_decoder):
        what = f"a {names[0] if names else config.model_type}"
        raise ValueError(f"{argument} must be a {kind}; {folder} is {what}")
    if names and not known.intersection(names) and config.model_type in modeling_auto.CONFIG_MAPPING_NAMES:
        raise ValueError(f"{argument} must be a {kind}; {folder} is a {names[0]}")


def read_tokenizer(folder: str | Path, argument: str = "tokenizer") -> Any:
    with quiet() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"{argument}: {folder} has no tokenizer that transformers loads: {first_line(error)}"
            ) from error


def load_model(
    folder: Path,
    config: Any,
    task: str,
    dtype: str,
    allow_pickle: bool,
    argument: str = "model",
    may_lack: Sequence[str] = (),
    **more: Any,
) -> Any:
    """The model in eval mode. Parameters that its files do not have would be random: only those whose names begin with
    one of `may_lack` may be."""
    with quiet() as transformers:
        try:
            model, info = getattr(transformers, OF_TRANSFORMERS[task]).from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **more,
            )
        except (torch.OutOfMemoryError, MemoryError, ImportError):
            raise
        except Exception as error:
            raise ValueError(f"{argument}: transformers cannot load {folder}: {first_line(error)}") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(tuple(may_lack)))
    if missing:
        raise ValueError(
            f"{argument}: {len(missing)} parameters are missing in the weights of {folder}, {missing[0]} for one: "
            "they would be random"
        )
    return model.eval()


def weight_files(folder: Path, allow_pickle: bool, argument: str = "model") -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin")[: 1 + allow_pickle]:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (KeyError, ValueError, AttributeError) as error:
                raise ValueError(f"{argument}: {index} is damaged: {error!r}") from None
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ValueError(f"{argument}: {folder / missing[0]} is missing, which {index.name} names")
            return [folder / name for name in names]
    others = sorted(path.name for path in folder.glob("*.bin"))
    hint = f"; {others[0]} can run code when it is read: allow_pickle reads it" if others and not allow_pickle else ""
    raise ValueError(f"{argument}: {folder} has no weights, model.safetensors{hint}")


def hash_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        add_file(digest, path)
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
