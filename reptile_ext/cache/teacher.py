"""A teacher cache from a causal language model of Hugging Face's `transformers` and files of texts.

The texts are read twice: once to find what is wrong with them before a model is loaded, and to know how much there is;
then tokenized, some at a time, and put through the model in batches of similar lengths. The model gives the states that
go into its head (`..heads`), and the logits are made of a few rows at a time, so that a long sample never has all of
them in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..files import restated, write_json
from ..pretrained import (
    check_kind,
    first_line,
    folder_of,
    hash_of_files,
    load_model,
    read_config,
    read_tokenizer,
    require_transformers,
    weight_files,
)
from ..sparse import sampled_targets, top_k_targets
from . import format as fmt
from .progress import bar_of
from .reader import TeacherCache
from .texts import Sample, Texts
from .tokens import TokenWriter
from .vocabulary import Vocabulary
from .writer import CacheWriter, _place

KINDS = ("top_k", "sampled", "hidden")
DTYPES = ("auto", "float32", "bfloat16", "float16")

_RECORD = "model.json"  # in the folder TEACHER: what the cache was begun with
_ROWS = 512  # whose logits are made at a time: as many as make a product fast
_TEXTS, _CHARACTERS = 512, 1 << 20  # that are tokenized at a time, the first that is reached


def cache_model(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    files: Any = None,
    *,
    text_column: str | None = None,
    id_column: str | None = None,
    sample_by: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    kind: str | None = None,
    k: int | None = None,
    temperature: float | None = None,
    max_kl: float | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch_tokens: int = 4096,
    allow_pickle: bool | None = None,
    save_tokens: bool | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    resume: bool = False,
    progress_bar: bool = False,
    shard_bytes: int = 1 << 26,
    flush_seconds: float = 600.0,
) -> dict[str, Any]:
    """Write what a causal language model says of the texts in `files` into a teacher cache, one sample a text: row t is
    the distribution of what follows token t. Return what was done.

    model         a folder as `save_pretrained` writes it, or a name on the Hugging Face hub. Weights are read from
                  safetensors files, others only with `allow_pickle`; no code of the model's is run.
    files         .jsonl, .parquet or .txt, also compressed, or several, of any size.
    text_column   of the texts; default "text". id_column: of the samples' ids; default: the number of the record in all
                  the files, from 0. sample_by: what a sample of plain text is, "line" (default), "paragraph",
                  "document".
    tokenizer     its folder, with a tokenizer.json; default: the model's. Special tokens are what it adds by default.
    max_length    tokens that a sample keeps; default: the model's context. How many were cut is in the result.
    kind          "top_k" (default): the `k` likeliest classes; "sampled": `k` draws, by `seed`; "hidden": the states
                  that go into the head, which is saved beside them.
    k, temperature, max_kl   64, 1 and 10⁻³ by default, as in `TeacherCache.write`; not for "hidden".
    dtype         "auto" (default) is that of the checkpoint. device: default: this process's GPU, else the CPU.
    batch_tokens  that go through the model at once, padding included.
    save_tokens   keep the token ids, too, in the folder `tokens` (default: True).
    rank, world_size   which of how many processes this is; default: torchrun's. They share the samples.
    resume        go on with the cache in `folder`: what is left out is as it was begun, and what is given has to be.

    Raises ValueError for files, models and settings that do not do, before there is a folder; ImportError for a package
    that is missing."""
    folder = Path(os.path.abspath(folder))
    place = _place(rank, world_size)
    given = {
        "model": None if model is None else _absolute(model),
        "files": None if files is None else _absolute_all(files),
        "text_column": text_column,
        "id_column": id_column,
        "sample_by": sample_by,
        "tokenizer": None if tokenizer is None else os.path.abspath(tokenizer),
        "max_length": max_length,
        "kind": kind,
        "k": k,
        "temperature": temperature,
        "max_kl": max_kl,
        "seed": seed,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "save_tokens": save_tokens,
    }
    batch_tokens = checks.integer_of("batch_tokens", batch_tokens)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
    settings = _settings(folder, given, resume, place[0])
    texts = Texts(settings["files"], settings["text_column"], settings["id_column"], settings["sample_by"])
    source = _Source(settings)
    survey = texts.survey(source.most_characters)
    teacher = _Teacher(source, settings, _device(device))
    if settings["k"] is not None and settings["k"] > teacher.vocab_size:
        raise ValueError(f"k must be at most the model's number of classes, {teacher.vocab_size}; got {settings['k']}")

    kind_of_writer: Any = TokenWriter if settings["save_tokens"] else CacheWriter
    coded = settings["kind"] in fmt.CODED
    with kind_of_writer(
        folder,
        vocab_size=teacher.vocab_size,
        kind=settings["kind"],
        k=settings["k"] if coded else 1,
        temperature=settings["temperature"] if coded else 1.0,
        teacher=teacher.name,
        tokenizer=source.tokenizer_name,
        data=_hash_of([survey.digest, source.max_length]),
        max_kl=settings["max_kl"] if coded else 1e-3,
        dtype=None,
        rank=place[0],
        world_size=place[1],
        resume=resume,
        shard_bytes=shard_bytes,
        flush_seconds=flush_seconds,
    ) as writer:
        record = folder / fmt.TEACHER / _RECORD
        if not record.exists():
            write_json(record, settings)
        if settings["kind"] == "hidden" and place[0] == 0:
            teacher.save_head(folder)
        try:
            done = _write(writer, teacher, texts, source, batch_tokens, survey.characters if progress_bar else -1)
        except OSError as error:
            raise restated(
                error, f"{folder} cannot be written", "What was flushed is kept: go on with resume"
            ) from error
    done |= {"max_length": source.max_length, "empty": survey.empty, "rank": place[0], "world_size": place[1]}
    with contextlib.suppress(ValueError):  # others are not finished
        done["cache"] = TeacherCache.open(folder).info()
    return done


def _write(
    writer: CacheWriter,
    teacher: _Teacher,
    texts: Texts,
    source: _Source,
    batch_tokens: int,
    characters: int,
) -> dict[str, Any]:
    """Add what is missing of this writer's share, with a bar for all characters of the files, but for -1."""
    began = time.perf_counter()
    found = {"samples": 0, "tokens": 0, "truncated": 0, "without_tokens": 0, "there_before": len(writer)}
    # Time left is taken from characters, of which a first look has told the number: of tokens nobody knows it.
    read = 0
    end: int | None = None
    latest: list[Sample] = []

    def length(sample: Sample) -> int:
        return min(len(sample.text), source.most_characters)

    def ids() -> Iterator[fmt.SampleId]:
        nonlocal read
        for sample in texts:
            latest[:] = [sample]
            read += length(sample)
            yield sample.id

    def todo() -> Iterator[Sample]:
        nonlocal end
        for _ in writer.todo(ids()):
            if end is None:  # what was there before is passed over in no time
                end = read - length(latest[0])
            yield latest[0]

    with contextlib.ExitStack() as stack, torch.no_grad():
        bar: Any = None
        for window in _windows(todo()):
            begin, end = end or 0, read
            bar = bar or stack.enter_context(bar_of(characters, begin))
            tokenized = []
            for sample, (token_ids, is_cut) in zip(window, source.tokenize([s.text for s in window]), strict=True):
                found["truncated"] += is_cut
                found["without_tokens"] += not token_ids
                if token_ids:
                    tokenized.append(_Tokens(sample.id, token_ids))
            of_window = sum(len(tokens.ids) for tokens in tokenized)
            before = found["tokens"]
            for batch in _batches(tokenized, batch_tokens):
                answers = teacher.answers([tokens.ids for tokens in batch])
                for tokens, rows in zip(batch, teacher.rows(answers, batch), strict=True):
                    if isinstance(writer, TokenWriter):
                        writer.add_with_tokens(tokens.id, tokens.ids, *rows)
                    else:
                        writer.add(tokens.id, *rows)
                    found["samples"] += 1
                    found["tokens"] += len(tokens.ids)
                bar(begin + (end - begin) * (found["tokens"] - before) // of_window, found["tokens"])
    seconds = time.perf_counter() - began
    return {**found, "seconds": seconds, "tokens_per_second": found["tokens"] / seconds}


class _Tokens(NamedTuple):
    id: fmt.SampleId
    ids: list[int]


def _windows(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    window: list[Sample] = []
    characters = 0
    for sample in samples:
        window.append(sample)
        characters += len(sample.text)
        if len(window) >= _TEXTS or characters >= _CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _batches(samples: list[_Tokens], batch_tokens: int) -> Iterator[list[_Tokens]]:
    """The longest first, with others nearly as long: at most `batch_tokens` in all with the padding, or one sample."""
    batch: list[_Tokens] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------ what is asked for


def _absolute(model: str | os.PathLike[str]) -> str:
    """A folder's path; a name on the hub stays."""
    return os.path.abspath(model) if os.path.exists(model) else os.fspath(model)


def _absolute_all(files: Any) -> list[str]:
    return [os.path.abspath(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]


_OF_CODED = {"k": 64, "temperature": 1.0, "max_kl": 1e-3}


def _settings(folder: Path, given: dict[str, Any], resume: bool, rank: int) -> dict[str, Any]:
    """All that says which rows there are: what was given, and where it was not, what the cache was begun with."""
    record = folder / fmt.TEACHER / _RECORD
    kept: dict[str, Any] | None = None
    if record.exists():
        try:
            kept = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{record} is altered or truncated: {error}") from None
    if resume and kept is None:
        raise ValueError(f"resume must name a folder that `reptile cache-teacher MODEL FILE …` began; got {folder}")
    there = any(folder.glob(f"rows-{rank:05d}-*")) or (folder / fmt.part_name(rank)).exists()
    if not resume and there:
        raise ValueError(f"folder: {folder} already holds a cache: go on with it by resume, or choose another folder")
    settings = {"kind": "top_k", "dtype": "auto", "allow_pickle": False, "save_tokens": True}
    settings = {**given, **{name: value for name, value in settings.items() if given[name] is None}}
    if kept is not None and resume:
        settings = {name: kept.get(name) if value is None else value for name, value in given.items()}
    for name in ("model", "files"):
        if not settings[name]:
            raise ValueError(f"{name} must be given for a new cache; got none")
    checks.one_of("kind", settings["kind"], KINDS)
    checks.one_of("dtype", settings["dtype"], DTYPES)
    coded = settings["kind"] in fmt.CODED
    for name, default in _OF_CODED.items():
        if coded and settings[name] is None:
            settings[name] = default
        elif not coded and settings[name] is not None:
            raise ValueError(f"{name} has no meaning for kind='hidden', of which all of it can be had later")
    if settings["kind"] == "sampled" and settings["seed"] is None:
        settings["seed"] = 0
    elif settings["kind"] != "sampled" and settings["seed"] is not None:
        raise ValueError(f"seed is for kind='sampled'; got it with {settings['kind']!r}")
    if coded:
        k = settings["k"] = checks.integer_of("k", settings["k"])
        if not 1 <= k <= fmt.MAX_K:
            raise ValueError(f"k must be from 1 to {fmt.MAX_K}; got {k}")
        checks.number_of("temperature", settings["temperature"], "a positive number", checks.is_temperature)
    if settings["max_length"] is not None and checks.integer_of("max_length", settings["max_length"]) < 1:
        raise ValueError(f"max_length must be at least 1; got {settings['max_length']}")
    for name, value in settings.items():
        if kept is None:
            break
        # Model and files may have moved: hashes of what is in them are compared, by the manifest.
        if name not in ("model", "files") and value != kept.get(name):
            raise ValueError(
                f"{name}: the cache in {folder} was begun with {kept.get(name)!r}; got {value!r}: leave it out to go "
                "on, or choose another folder"
            )
    return settings


def _device(device: str | None) -> torch.device:
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device must be one that torch has here, such as cpu or cuda; got {device!r}: {first_line(error)}"
        ) from None
    return found


# ------------------------------------------------------------------------------------------------ the model


class _Source:
    """Configuration and tokenizer of a model's folder: what is wrong is said before its weights are read."""

    def __init__(self, settings: dict[str, Any]) -> None:
        require_transformers("cache")
        self.allow_pickle: bool = settings["allow_pickle"]
        self.folder = folder_of(settings["model"], self.allow_pickle)
        self.config = read_config(self.folder)
        check_kind(self.config, "language-model", self.folder)
        self.weights = weight_files(self.folder, self.allow_pickle)
        folder = settings["tokenizer"] or self.folder
        self.tokenizer_name = Vocabulary(folder).name
        self._tokenizer = read_tokenizer(folder)
        context: Any = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        given = settings["max_length"]
        if given is not None and context is not None and given > context:
            raise ValueError(f"max_length must be at most the model's context, {context}; got {given}")
        if given is None and context is None:
            raise ValueError(f"max_length must be given: the configuration of {self.folder} names no context")
        self.max_length = int(given or context)
        self.most_characters = 4 * self.max_length  # of a text that is cut, as far as they take time: about so many

    def load(self, dtype: str) -> Any:
        return load_model(self.folder, self.config, "language-model", dtype, self.allow_pickle)

    def tokenize(self, texts: list[str]) -> list[tuple[list[int], bool]]:
        """Token ids, and whether they were cut to `max_length`."""
        found: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        is_cut = [len(ids) > self.max_length for ids in found]
        for i, cut in enumerate(is_cut):
            if cut:  # by the tokenizer, which keeps its special tokens
                found[i] = self._tokenizer(texts[i], truncation=True, max_length=self.max_length)["input_ids"]
        return list(zip(found, is_cut, strict=True))


class _Teacher:
    """The model, and how rows are made of what it says."""

    def __init__(self, source: _Source, settings: dict[str, Any], device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._model = source.load(settings["dtype"]).to(device)
        self._dtype = next(self._model.parameters()).dtype
        files = [source.folder / "config.json", *source.weights]
        self.name = f"sha256:{hash_of_files(files)} in {str(self._dtype).removeprefix('torch.')}"
        self._classes_in: int = self._model.get_input_embeddings().weight.shape[0]
        look = torch.arange(2 * min(24, source.max_length)).reshape(2, -1) * 7 % self._classes_in
        with torch.no_grad():
            self._head = self._find_head(look)
            self._check_causal(look, source.folder)
            self.vocab_size = int(self._logits(self.answers(look.tolist())[0, :1]).shape[-1])

    def _find_head(self, look: Tensor) -> Any:
        """None where the logits are more than a plain head makes of states: they have to be had whole."""
        from ..heads import Head  # which imports the cache

        try:
            head = Head("teacher", self._model)
            head.hidden_states(lambda: self._run(look, torch.ones_like(look)))
        except ValueError as error:
            if self._settings["kind"] == "hidden":
                said = str(error).split("; pass fused_linear")[0]
                raise ValueError(f"kind='hidden' is for the fused linear loss, and {said}") from error
            return None
        return head

    def _check_causal(self, look: Tensor, folder: Path) -> None:
        """Another last token must change nothing before it: BERT's models load as causal ones, too."""
        changed = look.clone()
        changed[:, -1] = (changed[:, -1] + 1) % self._classes_in
        one, other = (self.answers(ids.tolist())[:, :-1].float() for ids in (look, changed))
        slack = max(1e-4, 4 * torch.finfo(self._dtype).eps)  # rounding, of products that may be split in other ways
        if one.numel() and float((one - other).abs().max()) > slack * float(one.abs().max()):
            raise ValueError(
                f"model must be a causal language model; in {folder} ({type(self._model).__name__}) later tokens "
                "change what is said of earlier ones"
            )

    def answers(self, samples: list[list[int]]) -> Tensor:
        """[B, T, H] states that go into the head or, where there is no plain one, [B, T, V] logits; padding behind."""
        ids = torch.zeros(len(samples), max(map(len, samples)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, sample in enumerate(samples):
            ids[i, : len(sample)] = torch.tensor(sample)
            mask[i, : len(sample)] = 1
        if int(ids.max()) >= self._classes_in:
            raise ValueError(
                f"tokenizer: it has token {int(ids.max())}, and the model has {self._classes_in} of them: is it "
                "another model's?"
            )
        if self._head is None:
            return self._run(ids, mask)
        found: Tensor = self._head.hidden_states(lambda: self._run(ids, mask))
        return found

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids, mask = ids.to(self._device), mask.to(self._device)
        found: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def _logits(self, answers: Tensor) -> Tensor:
        found: Tensor = answers if self._head is None else self._head.logits(answers)
        return found

    def rows(self, answers: Tensor, samples: list[_Tokens]) -> Iterator[tuple[Tensor, ...]]:
        """What the cache keeps of each sample's answers, [B, T, H] or [B, T, V] with padding behind."""
        settings = self._settings
        parts = [answer[: len(sample.ids)] for answer, sample in zip(answers, samples, strict=True)]
        broken = torch.stack([part.isnan().any() for part in parts]).tolist()
        if any(broken):
            sample_id = samples[broken.index(True)].id
            raise ValueError(f"sample {sample_id!r}: what the model says are no numbers, computed in {self._dtype}")
        if settings["kind"] == "hidden":
            yield from ((part,) for part in parts)
        elif settings["kind"] == "top_k":
            lengths = [len(part) for part in parts]
            targets = self._targets(torch.cat(parts), None)
            yield from zip(*(torch.split(x.cpu(), lengths) for x in targets), strict=True)
        else:  # a sample's draws are its own, whatever else is in the batch
            for part, sample in zip(parts, samples, strict=True):
                seed = zlib.crc32(f"{settings['seed']} {sample.id}".encode())
                yield self._targets(part, torch.Generator(self._device).manual_seed(seed))

    def _targets(self, answers: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Indices and log-probabilities, [N, K] each, of answers [N, H] or [N, V]."""
        k, temperature = self._settings["k"], self._settings["temperature"]
        found = []
        for some in torch.split(answers, _ROWS):
            logits = self._logits(some)
            if generator is None:
                found.append(top_k_targets(logits, k, temperature))
            else:
                found.append(sampled_targets(logits, k, temperature, generator))
        return tuple(torch.cat(x) for x in zip(*found, strict=True))

    def save_head(self, folder: Path) -> None:
        from ..heads import HEAD_FILE, KnownHead

        head = self._head
        known = KnownHead(head.layer.weight, head.layer.bias, head.softcap, head.scale)
        known.save(folder / fmt.TEACHER / HEAD_FILE, teacher=self.name)


def _hash_of(what: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(what).encode()).hexdigest()}"
