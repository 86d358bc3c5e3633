"""A teacher cache from what servers and data sets hold: each sequence checked, then added to a `CacheWriter`."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import checks
from . import format as fmt
from . import sources
from .answers import ALIGNMENTS, Answer, Keys, of_columns, of_server, value_of
from .progress import bar_of
from .reader import TeacherCache
from .vocabulary import Vocabulary
from .writer import CacheWriter

FORMATS = ("server", "columns")

_NOTHING = -9999.0  # vLLM's for -inf; others write -1e9 and less
_MASS = 1.02  # what the probabilities of a row may add up to, rounded to 16 bits: as the writer
_BINS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999)


def import_rows(
    folder: str | os.PathLike[str],
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    k: int,
    vocab_size: int,
    format: str = "server",
    align: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    id: str | None = None,
    tokens: str | None = None,
    text: str | None = None,
    ids: str | None = None,
    log_probs: str | None = None,
    temperature: float = 1.0,
    teacher: str | None = None,
    data: str | None = None,
    max_kl: float = 1e-3,
    rank: int = 0,
    world_size: int = 1,
    resume: bool = False,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """Write what `files` hold into a teacher cache of kind "top_k", one sample a record, and return what was found.

    files          JSON lines (.jsonl, .jsonl.gz, …), .parquet, or "-" for standard input, read record by record.
    k              the most that a position keeps: the K most probable, padded by -1 where the file has fewer.
    format         "server": responses of vLLM, SGLang and others with OpenAI's interface, OpenAI's batch files, dumps
                   of vLLM's RequestOutput. "columns": rows with token ids, and lists of K ids and log-probabilities.
    align          for "columns", which has no convention. "next": row t is of the token after token t, the logits at t;
                   "own": row t is of token t itself; "last": so too, for the last tokens, one a row.
    tokenizer      folder with a tokenizer.json: ids and texts in the files are compared with it, strings become ids,
                   and the cache's name of the tokenizer is "sha256:" and the hash of that file.
    id             key of the sample's id (dotted within records); default: the number of the line or row, from 1.
    tokens, text   keys of the token ids and the text: of the prompt ("server"), of the whole sequence ("columns", there
                   `tokens` defaults to "input_ids").
    ids, log_probs keys for "columns"; default "target_token_ids" and "target_logprobs".
    temperature    at which the log-probabilities were made: it is written down, nothing is computed.
    The rest is as in `TeacherCache.write`.

    Row t of a sample is the distribution of what follows token t; the last, and prompts without one, are -1.

    Raises ValueError that names file, line, position, what came and what was wanted. What was added before is kept:
    `resume=True` goes on after it. ImportError if a package is missing, with the extra that has it."""
    paths = sources.checked(files)
    checks.one_of("format", format, FORMATS)
    k, vocab_size = checks.integer_of("k", k), checks.integer_of("vocab_size", vocab_size)
    for name, value, most in (("k", k, fmt.MAX_K), ("vocab_size", vocab_size, fmt.MAX_VOCAB_SIZE)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be from 1 to {most}; got {value}")
    if format == "columns":
        if align is None:
            raise ValueError(
                f"align must be given with format='columns', one of {', '.join(ALIGNMENTS)}: which token row t is of, "
                "the one after token t (next) or token t itself (own, last)"
            )
        checks.one_of("align", align, ALIGNMENTS)
    else:
        for name, given in (("align", align), ("ids", ids), ("log_probs", log_probs)):
            if given is not None:
                raise ValueError(f"{name} has no meaning with format='server', which has a convention; got {given!r}")
    if text is not None and tokenizer is None:
        raise ValueError(f"text needs tokenizer, to compare with; got text={text!r} alone")
    if id is None and (len(paths) > 1 or world_size > 1):
        raise ValueError("id must be given with more than one file or writer: the lines of each are counted from 1")
    vocabulary = Vocabulary(tokenizer) if tokenizer is not None else None
    keys = Keys(tokens, text, ids or "target_token_ids", log_probs or "target_logprobs")

    def begin() -> CacheWriter:
        return TeacherCache.write(
            folder,
            vocab_size=vocab_size,
            k=k,
            temperature=temperature,
            teacher=teacher,
            tokenizer=vocabulary.name if vocabulary is not None else None,
            data=data,
            max_kl=max_kl,
            rank=rank,
            world_size=world_size,
            resume=resume,
        )

    found = _Found(k)
    seen: dict[fmt.SampleId, tuple[str, int]] = {}
    writer: CacheWriter | None = None
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(bar_of(sources.total_bytes(paths) if progress_bar else -1))
        if resume:  # to know what need not be read again
            writer = stack.enter_context(begin())
        try:
            for record in sources.records(paths):
                try:
                    sample_id = record.number if id is None else fmt.checked_id(value_of(record.value, id))
                    if sample_id in seen:
                        file, earlier = seen[sample_id]
                        raise ValueError(f"wanted each sample once; got {sample_id!r} again, as in {file}, {earlier}")
                    seen[sample_id] = record.file, record.number
                    if writer is not None and sample_id in writer:
                        found.skipped += 1
                        continue
                    if format == "server":
                        answer = of_server(record.value, keys, vocabulary)
                    else:
                        answer = of_columns(record.value, keys, align or "", vocabulary)
                    indices, values = _packed(answer, k, vocab_size, found)
                    found.add(answer.tokens, indices, values)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                    ours = isinstance(error, (TypeError, ValueError))
                    said = error if ours else f"this is not of the format: {type(error).__name__} {error}"
                    raise ValueError(f"{record.file}, {record.unit} {record.number}: {said}") from error
                if writer is None:  # not before the first is right: an error there leaves no folder
                    writer = stack.enter_context(begin())
                try:
                    writer.add(sample_id, indices, values)
                except ValueError as error:
                    raise ValueError(f"{record.file}, {record.unit} {record.number}: {error}") from error
                bar(record.bytes, found.tokens)
            found.check_alignment()
        except ValueError as error:
            number = len(writer) if writer is not None else 0
            kept = f"; {number} samples are kept in {folder}: go on with resume" if number else ""
            if number and any(isinstance(e, _OtherTokensError) for e in (error, error.__cause__)):
                kept = f"; {folder} holds {number} such samples: delete it"
            raise ValueError(f"{error}{kept}") from error
        if writer is None or not seen:
            raise ValueError(f"files must hold at least one record; got none in {', '.join(paths)}")
    return {"samples": len(writer), **found.report()}


def _packed(answer: Answer, k: int, vocab_size: int, found: _Found) -> tuple[np.ndarray, np.ndarray]:
    """[T, K] ids and log-probabilities of an answer whose every entry has been checked."""
    places = [t for t, row in enumerate(answer.rows) if row is not None]
    rows = [row for row in answer.rows if row is not None]
    indices = np.full((len(answer.rows), k), -1, np.int32)
    values = np.full((len(answer.rows), k), -np.inf, np.float32)
    if not rows:
        return indices, values
    for t, row in zip(places, rows, strict=True):
        if len(row.ids) != len(row.log_probs):
            raise ValueError(f"position {t}: wanted as many log-probabilities as ids; got {len(row.log_probs)}")
    where = np.repeat(np.array(places), [len(row.ids) for row in rows])
    given_ids = list(itertools.chain.from_iterable(row.ids for row in rows))
    ids = np.array(given_ids)
    logs = np.array(list(itertools.chain.from_iterable(row.log_probs for row in rows)), object)
    _refuse(np.array([type(x) not in (int, float) for x in logs], bool), where, logs, "log-probabilities")
    logs = logs.astype(np.float64)
    _refuse(~(logs <= 1e-3), where, logs, "logarithms of probabilities, at most 0")
    if ids.dtype.kind not in "iu":
        _refuse(
            np.array([type(x) is not int for x in given_ids]), where, np.array(given_ids, object), "integers as ids"
        )
        raise ValueError("wanted token ids of 64 bits")

    listed = np.bincount(where, minlength=len(answer.rows))
    ranks = None
    if all(row.ranks is not None for row in rows):
        given = itertools.chain.from_iterable(row.ranks or () for row in rows)
        ranks = np.array([np.nan if rank is None else rank for rank in given], np.float64)
    real = logs > _NOTHING  # the others are padding, or classes without any probability
    where, ids, logs = where[real], ids[real].astype(np.int64), np.minimum(logs[real], 0)
    _refuse((ids < 0) | (ids >= vocab_size), where, ids, f"token ids below vocab_size={vocab_size}")
    order = np.lexsort((ids, where))
    twice = np.zeros(len(ids), bool)
    twice[order[1:]] = (np.diff(where[order]) == 0) & (np.diff(ids[order]) == 0)
    _refuse(twice, where, ids, "different tokens in a row")
    mass = np.bincount(where, np.exp(logs), len(answer.rows))
    if (mass > _MASS).any():
        t = int((mass > _MASS).argmax())
        raise ValueError(
            f"position {t}: wanted probabilities that add up to 1 at most; got {mass[t]:.4g} (log_probs must be "
            "natural logarithms of a softmax over all classes, neither logits nor log10)"
        )
    _check_own(answer, where, ids, logs)

    # A server adds the token that came although it is not among the most probable: only its rank tells it from them.
    if ranks is not None:
        extra = ranks[real] > listed[where]
        where, ids, logs = where[~extra], ids[~extra], logs[~extra]
        found.unasked += int(extra.sum())
    order = np.lexsort((-logs, where))
    where, ids, logs = where[order], ids[order], logs[order]
    counts = np.bincount(where, minlength=len(answer.rows))
    column = np.arange(len(where)) - (np.cumsum(counts) - counts)[where]
    fits = column < k
    indices[where[fits], column[fits]] = ids[fits]
    values[where[fits], column[fits]] = logs[fits]
    found.cut += int((~fits).sum())
    return indices, values


def _refuse(wrong: np.ndarray, where: np.ndarray, values: np.ndarray, wanted: str) -> None:
    if wrong.any():
        n = int(wrong.argmax())
        value = values[n].item() if isinstance(values[n], np.generic) else values[n]
        raise ValueError(f"position {where[n]}: wanted {wanted}; got {value!r:.60}")


def _check_own(answer: Answer, where: np.ndarray, ids: np.ndarray, logs: np.ndarray) -> None:
    """A token's own log-probability, given apart: that of the list if it is there, and no larger than the list's least
    if not. A list of another position says something else."""
    for t, row in enumerate(answer.rows):
        if row is None or row.own is None:
            continue
        if type(row.own) not in (int, float):
            raise ValueError(f"position {t}: wanted the token's log-probability; got {row.own!r:.60}")
        of_row = slice(*np.searchsorted(where, (t, t + 1)))
        token, own, some = answer.tokens[t + 1], max(row.own, _NOTHING), logs[of_row]
        same = some[ids[of_row] == token]
        slack = 0.02 + 0.01 * abs(own)  # 16-bit numbers
        if len(same) and abs(same[0] - own) > slack:
            said = f"token {token} to have the same log-probability by itself and in the list, {same[0]:.4g}"
        elif not len(same) and len(some) and own > some.min() + slack:
            said = f"token {token}, which is not listed, to be no more probable than those listed, {some.min():.4g}"
        else:
            continue
        raise ValueError(f"position {t}: is the list of another position? Wanted {said}; got {own:.4g}")


class _OtherTokensError(ValueError):
    """What was added before is as wrong."""


class _Found:
    """What the rows were like: mass that top-k has lost is said, never silent."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.tokens = self.skipped = self.cut = self.unasked = 0
        self._rows = self._entries = self._narrow = self._widest = 0
        self._mass, self._least = 0.0, 1.0
        self._bins = np.zeros(len(_BINS), np.int64)
        self._hits, self._compared = np.zeros(3, np.int64), 0

    def add(self, tokens: list[int], indices: np.ndarray, values: np.ndarray) -> None:
        counts = (indices >= 0).sum(1)
        has = counts > 0
        mass = np.exp(values[has].astype(np.float64)).sum(1)
        self.tokens += len(tokens)
        self._rows += int(has.sum())
        self._entries += int(counts.sum())
        self._narrow += int((counts[has] < self.k).sum())
        if len(mass):
            self._widest = max(self._widest, int(counts.max()))
            self._mass += float(mass.sum())
            self._least = min(self._least, float(mass.min()))
            self._bins += np.bincount(np.searchsorted(_BINS, mass, "right") - 1, minlength=len(_BINS))
        # Whose list holds the next token more often, this row's or a neighbour's? (Of the rows that have both.)
        known = np.array(tokens)
        inner = has[1:-2] & (known[1:-2] >= 0) & (known[2:-1] >= 0) & (known[3:] >= 0)
        if inner.any():
            rows = indices[1:-2][inner]
            hits = [(rows == some[inner, None]).any(1).sum() for some in (known[1:-2], known[2:-1], known[3:])]
            self._hits += np.array(hits)
            self._compared += int(inner.sum())
            if self._compared >= 512:
                self.check_alignment()

    def check_alignment(self) -> None:
        """Refuse rows whose lists hold a neighbour's token clearly more often than the one that they should be of."""
        own, margin = self._hits[1], 5 * self._compared**0.5
        for n, whose in ((0, "the token of the row itself"), (2, "the one after that")):
            if self._hits[n] > own + margin:
                raise _OtherTokensError(
                    f"the rows are of other tokens: of {self._compared} lists {own} hold the next token and "
                    f"{self._hits[n]} hold {whose}: wanted another align, or the tokens that the teacher has read"
                )

    def report(self) -> dict[str, Any]:
        edges = [*map(str, _BINS), "1"]
        return {
            "skipped": self.skipped,
            "tokens": self.tokens,
            "rows": self._rows,
            "rows_without_teacher": self.tokens - self._rows,
            "entries_a_row": self._entries / max(1, self._rows),
            "most_entries": self._widest,
            "rows_with_fewer_than_k": self._narrow,
            "entries_cut": self.cut,
            "entries_beyond_top_k": self.unasked,
            "next_token_listed": float(self._hits[1] / self._compared) if self._compared else None,
            "captured_mass": {
                "mean": self._mass / self._rows if self._rows else None,
                "least": self._least if self._rows else None,
                "rows": {f"{a} to {b}": int(n) for a, b, n in zip(edges, edges[1:], self._bins, strict=False)},
            },
        }
