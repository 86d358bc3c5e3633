"""The teacher cache: what comes back, what is refused, and what survives.

The error of coding is measured here in float64, by the definition of a KL divergence; a decoder of a few lines, written
after docs/cache.md and not after the code, reads the files too.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from reptile_ext import _C, TeacherCache
from reptile_ext.cache import format as fmt
from reptile_ext.cache import reader, writer
from reptile_ext.cli import main

V, K = 151_936, 64
FORK = multiprocessing.get_context("fork")


def rows_of(shape: str, count: int, k: int = K, vocab_size: int = V, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of a teacher, [count, k] ids and float32 log-probabilities, of a kind that is hard to code."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(count)])
    spread = rng.uniform(0.1, 12, (count, 1))
    rank = np.arange(1, k + 1)[None]
    logits = {
        "flat": 1e-3 * rng.standard_normal((count, k)),
        "equal": np.zeros((count, k)),
        "zipf": -rng.uniform(0.3, 3, (count, 1)) * np.log(rank) + 0.1 * rng.standard_normal((count, k)),
        "gauss": spread * rng.standard_normal((count, k)),
        "peaked": np.where(rank == 1, 0.0, -rng.uniform(10, 20_000, (count, k))),
        "half": np.where(rank == 1, math.log(k), rng.uniform(-3, 0, (count, k))),
        "two": np.where(rank <= k // 2, 0.0, -rng.uniform(1, 9, (count, k))),
        "dirichlet": np.log(rng.dirichlet(np.full(k, 0.2), count) + 1e-38),
        "steps": -np.round(rng.uniform(0, 12, (count, k)), 1),
    }[shape]
    tail = {"flat": 3.0, "equal": 6.0, "peaked": -20.0}.get(shape, float(rng.uniform(-6, 1)))
    total = np.logaddexp(np.logaddexp.reduce(logits, 1, keepdims=True), tail)
    return torch.from_numpy(ids), torch.from_numpy(logits - total).float()


SHAPES = ("flat", "equal", "zipf", "gauss", "peaked", "half", "two", "dirichlet", "steps")


def sorted_rows(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """In the order that the cache gives: ascending ids, padding last."""
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids.long()).argsort(dim=-1, stable=True)
    return ids.long().gather(-1, order), log_probs.float().gather(-1, order)


def kl_errors(given: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the K classes and the rest of the vocabulary as one more; and of the K classes by themselves."""
    y, z = given.double(), decoded.double()
    p = y.exp()
    first = torch.where(p > 0, p * (y - z), 0).sum(-1)
    mass, found = p.sum(-1), z.exp().sum(-1)
    rest = (1 - mass).clamp(min=0)
    tail = torch.where(rest > 0, rest * (rest / (1 - found).clamp(min=1e-12)).log(), 0)
    within = torch.where(mass > 0, first / mass - (mass / found).log(), 0)
    return first + tail, within


def check_rows(
    given: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], max_kl: float, sampled: bool = False
) -> None:
    ids, log_probs = sorted_rows(*given)
    assert found[0].dtype == torch.int64
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1] == -torch.inf, log_probs == -torch.inf)
    bucket, within = kl_errors(log_probs, found[1])
    slack = 2e-7  # of float32 log-probabilities, which a test that sums in another order sees otherwise
    assert within.max() <= max_kl + slack
    if not sampled:
        assert bucket.max() <= max_kl + slack
    p = log_probs.double().exp()
    assert (found[1].double() - log_probs.double())[p >= 1e-4].abs().max().item() <= 0.5 + 1e-6
    torch.testing.assert_close(found[1].double().exp().sum(-1), p.sum(-1), rtol=3e-6, atol=0)


def write(folder: Path, samples: dict[Any, Any], **keywords: Any) -> TeacherCache:
    keywords = {"vocab_size": V, "k": K} | keywords
    with TeacherCache.write(folder, **keywords) as out:
        for sample_id, values in samples.items():
            out.add(sample_id, *(values if isinstance(values, tuple) else (values,)))
    return TeacherCache.open(folder)


def small(seed: int = 0, rows: int = 3) -> tuple[Tensor, Tensor]:
    return rows_of("gauss", rows, 4, 100, seed)


SMALL: dict[str, Any] = {"vocab_size": 100, "k": 4}


# ------------------------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize(("max_kl", "bytes_per_entry"), [(1e-3, 2.8), (1e-5, 4.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_and_the_size_of_hard_rows(tmp_path: Path, shape: str, max_kl: float, bytes_per_entry: float) -> None:
    given = rows_of(shape, 200)
    cache = write(tmp_path / "c", {"a": given}, max_kl=max_kl)
    check_rows(given, cache["a"], max_kl)
    info = cache.info()
    bucket, within = kl_errors(sorted_rows(*given)[1], cache["a"][1])
    worst = max(bucket.max().item(), within.max().item())
    assert info["worst_kl"] <= max_kl
    assert info["worst_kl"] == pytest.approx(worst, abs=2e-7)
    assert info["mean_kl"] <= info["worst_kl"]
    assert info["captured_mass"] == pytest.approx(given[1].double().exp().sum(-1).mean().item(), abs=1e-6)
    assert info["bytes_per_entry"] <= bytes_per_entry
    assert info["max_kl"] == max_kl


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    k = draw(st.sampled_from([1, 2, 3, 7, 64, 300, 4096]))
    vocab_size = max(draw(st.sampled_from([1, 2, 100, 4096, 50_257, 151_936, 1 << 24])), k)
    count = draw(st.integers(0, 3 if k > 100 else 8))
    shape = draw(st.sampled_from(SHAPES))
    ids, log_probs = rows_of(shape, max(count, 1), k, vocab_size, draw(st.integers(0, 10_000)))
    ids, log_probs = ids[:count], log_probs[:count]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    log_probs[torch.rand(log_probs.shape, generator=generator) < share] = -torch.inf
    padding = torch.rand(ids.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    ids[padding], log_probs[padding] = -1, -torch.inf
    return ids, log_probs, vocab_size


@given(rows=any_rows(), max_kl=st.sampled_from([1e-2, 1e-3, 1e-5]), kind=st.sampled_from(["top_k", "sampled"]))
@settings(max_examples=120)
def test_any_rows_come_back(tmp_path_factory: Any, rows: Any, max_kl: float, kind: str) -> None:
    ids, log_probs, vocab_size = rows
    folder = tmp_path_factory.mktemp("any") / "c"
    cache = write(folder, {7: (ids, log_probs)}, vocab_size=vocab_size, k=ids.shape[1], max_kl=max_kl, kind=kind)
    assert cache.positions(7) == len(ids)
    found = cache[7]
    if len(ids):
        p = log_probs.exp()
        if (p >= 1e-4).any():
            check_rows((ids, log_probs), found, max_kl, kind == "sampled")
        else:
            assert torch.equal(found[0], sorted_rows(ids, log_probs)[0])
    for t in range(len(ids)):
        assert all(torch.equal(a, b[t : t + 1]) for a, b in zip(cache.get(7, t, t + 1), found, strict=True))


def test_certainty_and_masked_classes_come_back_exactly(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 2, 7]] * 5)
    inf = math.inf
    log_probs = torch.tensor(
        [[0.0, -inf, -inf, -inf], [-inf, -inf, 0.0, -inf], [-inf] * 4, [math.log(0.25)] * 4, [-inf, -1.5, -1.5, -inf]]
    )
    cache = write(tmp_path / "c", {"a": (ids, log_probs)}, **SMALL)
    assert torch.equal(cache["a"][0], sorted_rows(ids, log_probs)[0])
    assert torch.equal(cache["a"][1], sorted_rows(ids, log_probs)[1])


def test_weights_of_drawn_classes(tmp_path: Path) -> None:
    """ids that were drawn n times of 50 with log(n / 50), once each: their shares, and nothing beside."""
    rng = np.random.default_rng(0)
    ids, log_probs = torch.full((40, K), -1), torch.full((40, K), -torch.inf)
    for row in range(40):
        drawn, times = np.unique(rng.zipf(1.3, 50) % V, return_counts=True)
        ids[row, : len(drawn)] = torch.from_numpy(drawn)
        log_probs[row, : len(drawn)] = torch.from_numpy(np.log(times / 50)).float()
    cache = write(tmp_path / "c", {"a": (ids, log_probs)}, kind="sampled")
    check_rows((ids, log_probs), cache["a"], 1e-3, sampled=True)
    assert cache.info()["captured_mass"] == pytest.approx(1)
    weights = log_probs + 3.0  # importance weights need not add up to 1
    check_rows((ids, weights), write(tmp_path / "d", {"a": (ids, weights)}, kind="sampled")["a"], 1e-3, sampled=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_arrays_and_layouts_that_are_given(tmp_path: Path, dtype: torch.dtype) -> None:
    ids, log_probs = rows_of("zipf", 20)
    log_probs = log_probs.to(dtype)
    given: dict[str, Any] = {
        "plain": (ids.int(), log_probs),
        "strided": (ids.repeat_interleave(2, 1)[:, ::2], log_probs.t().contiguous().t().requires_grad_()),
    }
    if dtype != torch.bfloat16:
        fixed = log_probs.numpy().copy()
        fixed.flags.writeable = False
        given["array"] = (ids.numpy().astype(np.uint32), fixed)
    cache = write(tmp_path / "c", given)
    for name in given:
        check_rows((ids, log_probs), cache[name], 1e-3)


def test_hidden_states_and_logits(tmp_path: Path) -> None:
    hidden = torch.randn(5, 24).bfloat16()
    cache = write(tmp_path / "h", {"a": hidden, "b": hidden[:2].float(), 3: hidden[:0]}, kind="hidden")
    assert torch.equal(cache["a"], hidden)
    assert cache["a"].dtype == torch.bfloat16
    assert torch.equal(cache.get("a", 1, 4), hidden[1:4])
    assert torch.equal(cache["b"], hidden[:2])
    assert cache[3].shape == (0, 24)
    assert cache.info()["bytes"] < 7 * 24 * 2 + 500
    batch = cache.batch(["b", [("a", 3, 5), ("a", 0, 1)]])
    assert torch.equal(batch[0], torch.cat([hidden[:2], torch.zeros(1, 24).bfloat16()]))
    assert torch.equal(batch[1], torch.cat([hidden[3:5], hidden[:1]]))

    logits = 5 * torch.randn(6, 50)
    logits[0, 3:] = -torch.inf
    cache = write(tmp_path / "l", {"a": logits, "b": logits.half()}, kind="logits", vocab_size=50)
    assert torch.equal(cache["a"], logits.half())
    assert torch.equal(cache["b"], logits.half())
    kl = kl_errors(logits.log_softmax(-1), cache["a"].double().log_softmax(-1))[1]
    assert cache.info()["worst_kl"] == pytest.approx(kl.max().item(), rel=1e-3, abs=1e-9)
    assert torch.equal(
        write(tmp_path / "b", {0: logits}, kind="logits", vocab_size=50, dtype=torch.bfloat16)[0], logits.bfloat16()
    )


def test_rows_do_not_depend_on_order_batch_or_packing(tmp_path: Path) -> None:
    samples = {i: rows_of("gauss", 1 + 37 * i % 200, seed=i) for i in range(12)}
    one = write(tmp_path / "one", samples)
    backwards = dict(reversed(samples.items()))
    other = write(tmp_path / "other", backwards, shard_bytes=20_000)
    assert other.info()["shards"] > 3
    assert sorted(one) == sorted(other) == list(samples)
    for i, (ids, _) in samples.items():
        whole = one[i]
        assert all(torch.equal(a, b) for a, b in zip(whole, other[i], strict=True))
        for begin, end in [(0, 1), (len(ids) - 1, len(ids)), (len(ids) // 3, len(ids)), (0, 0)]:
            part = other.get(i, begin, end)
            assert all(torch.equal(a, b[begin:end]) for a, b in zip(part, whole, strict=True))
    indices, log_probs = other.batch([3, [(5, 10, 30), (1, 0, 38)], 0], length=150)
    assert indices.shape == log_probs.shape == (3, 150, K)
    assert torch.equal(indices[0, :112], one[3][0])
    assert torch.equal(log_probs[1, 20:58], one[1][1])
    assert torch.equal(indices[1, :20], one[5][0][10:30])
    assert (indices[1, 58:] == -1).all()
    assert (log_probs[2, 1:] == -torch.inf).all()


def test_ids_of_samples(tmp_path: Path) -> None:
    ids = [5, "5", -1, 2**63 - 1, -(2**63), "", "naïve", "\udc80", np.int32(8), torch.tensor(9), "x" * 5000]
    samples = [small(i) for i in range(len(ids))]
    with TeacherCache.write(tmp_path / "c", **SMALL) as out:
        for sample_id, values in zip(ids, samples, strict=True):
            out.add(sample_id, *values)
        assert len(out) == len(ids)
    cache = TeacherCache.open(tmp_path / "c")
    assert len(cache) == len(ids)
    assert list(cache) == [int(i) if not isinstance(i, str) else i for i in ids]
    for sample_id, values in zip(ids, samples, strict=True):
        assert sample_id in cache
        assert torch.equal(cache[sample_id][0], sorted_rows(*values)[0])
    for absent in (6, "6", "-1", 8 - 2**63):
        assert absent not in cache
        with pytest.raises(KeyError, match=rf"sample {absent!r} is not in the cache"):
            cache[absent]
    for wrong in (1.0, None, True, b"5", torch.ones(2, dtype=torch.int64), ("a",)):
        with pytest.raises(TypeError, match="sample_id must be a string or an integer; got"):
            cache[wrong]
    with pytest.raises(ValueError, match=r"64-bit integer; got 9223372036854775808"):
        cache[2**63]


def test_names_with_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names whose first 64 bits of hash agree, and an integer that equals them."""
    monkeypatch.setattr(fmt, "key_of", lambda i: (0, i, 0) if isinstance(i, int) else (1, 77, len(i)))
    cache = write(
        tmp_path / "c", {"a": small(1), "bb": small(2), 77: small(3), "dddd": small(4), "": small(5)}, **SMALL
    )
    for name, seed in (("a", 1), ("bb", 2), (77, 3), ("dddd", 4), ("", 5)):
        assert torch.equal(cache[name][0], sorted_rows(*small(seed))[0])
    assert "ccc" not in cache
    assert 78 not in cache


# ------------------------------------------------------------------------------------------------ the format


def bits(data: bytes, at: int, width: int) -> int:
    return (int.from_bytes(data, "little") >> at) & ((1 << width) - 1)


def decoded_by_the_page(path: Path) -> Iterator[tuple[Any, list[dict[int, float]]]]:
    """Every sample of a shard, by docs/cache.md alone."""
    data = path.read_bytes()
    magic, version, kind, vocab, width, dtype, samples, _, index, crc_blocks, crc_index = struct.unpack_from(
        "<8sIIIIIIQQII", data
    )
    assert (magic, version, kind, dtype) == (b"RPTCACHE", 1, 0, 0)
    assert struct.unpack_from("<I", data, 124)[0] == zlib.crc32(data[:124])
    assert crc_blocks == zlib.crc32(data[128:index])
    assert crc_index == zlib.crc32(data[index:])
    offsets = struct.unpack_from(f"<{samples + 1}Q", data, index)
    at = index + 8 * (samples + 1)
    keys = struct.unpack_from(f"<{samples}q", data, at)
    rows = struct.unpack_from(f"<{samples}I", data, at + 16 * samples)
    names_at = struct.unpack_from(f"<{samples + 1}I", data, at + 20 * samples)
    kinds = data[at + 24 * samples + 4 :][:samples]
    names = data[at + 25 * samples + 4 :]
    curves = [0, 1, 2, 3, 4, 5, 6.5, 8, 10, 13, 18, 32, 128, 512, 2048, 16384]
    for i in range(samples):
        at = offsets[i] + 8 * rows[i] + 4 * ((max(rows[i], 1) - 1) // 64)
        begin, found = at, []
        for t in range(rows[i]):
            if t and t % 64 == 0:
                assert at == begin + struct.unpack_from("<I", data, offsets[i] + 8 * rows[i] + 4 * (t // 64 - 1))[0]
            hi, count, r, levels = struct.unpack_from("<fHBB", data, offsets[i] + 8 * t)
            masked, n, b, s = count >> 15, count & 0x7FFF, levels & 15, curves[levels >> 4]
            assert n <= width
            low = (vocab // n).bit_length() - 1 if n else 0
            high = n + ((vocab - 1) >> low) if n else 0
            size = (high + n * (low + b) + 7) // 8
            body, row, m = data[at : at + size], {}, 2**b - 1 - masked
            for j, place in enumerate(p for p in range(high) if bits(body, p, 1)):
                c = bits(body, high + n * low + j * b, b)
                u = min(c, m) / m if m else 0.0
                h = u if s == 0 or u == 1 else -math.log1p(u * math.expm1(-s)) / s
                log_prob = -math.inf if masked and c > m else hi - (2 ** ((r - 95) / 10) if r else 0) * h
                row[(place - j) << low | bits(body, high + j * low, low)] = log_prob
            assert len(row) == n
            found.append(row)
            at += size
        yield (names[names_at[i] : names_at[i + 1]].decode() if kinds[i] else keys[i]), found


def test_another_program_reads_the_format(tmp_path: Path) -> None:
    samples: dict[Any, Any] = {"naïve": rows_of("gauss", 70, 9, 5000), -3: rows_of("steps", 2, 9, 5000), 4: ()}
    samples["masked"] = rows_of("zipf", 5, 9, 5000)
    samples["masked"][1][:, ::2] = -torch.inf
    samples["masked"][0][3:, 1], samples["masked"][1][3:, 1] = -1, -torch.inf
    samples[4] = (torch.zeros(0, 9, dtype=torch.int64), torch.zeros(0, 9))
    samples["equal"] = rows_of("equal", 2, 9, 5000)
    cache = write(tmp_path / "c", samples, vocab_size=5000, k=9)
    (path,) = (tmp_path / "c").glob("rows-*")
    read = dict(decoded_by_the_page(path))
    assert list(read) == list(samples) == list(cache)
    for sample_id, rows in read.items():
        ids, log_probs = cache[sample_id]
        assert [list(row) for row in rows] == [[i for i in row.tolist() if i >= 0] for row in ids]
        for row, of_cache in zip(rows, log_probs, strict=True):
            wanted = torch.tensor(list(row.values()), dtype=torch.float64)
            torch.testing.assert_close(of_cache[: len(row)].double(), wanted, rtol=1e-6, atol=1e-6)


def test_bytes_of_the_first_version_are_read_as_they_were_meant(tmp_path: Path) -> None:
    """Whatever later versions write, these bytes stay what they are."""
    block = bytes.fromhex("631081be04007414000080bf0280000113cda5c22f02a3180100")
    ids, log_probs = torch.empty(2, 4, dtype=torch.int64), torch.empty(2, 4)
    arguments = (2, 0, 2, 4, 100, ids.data_ptr(), log_probs.data_ptr())
    assert _C.cache_decode(block + bytes(8), 0, len(block), *arguments) == (0, 0)
    inf = math.inf
    assert ids.tolist() == [[3, 7, 41, 90], [5, 6, -1, -1]]
    wanted = torch.tensor([[-0.252078, -4.539172, -2.922043, -2.014836], [-1.0, -inf, -inf, -inf]])
    torch.testing.assert_close(log_probs, wanted, rtol=1e-6, atol=1e-6)
    for cut in range(len(block)):  # nothing is read past what there is
        error, _ = _C.cache_decode(block[:cut] + bytes(8), 0, cut, *arguments)
        assert error or cut >= 24
    with pytest.raises(ValueError, match="out of range"):
        _C.cache_decode(block, 0, len(block), *arguments)


def test_damaged_blocks_are_never_read_past_their_end() -> None:
    """Whoever decodes without comparing checksums gets an error or other rows, and no crash."""
    ids, log_probs = rows_of("gauss", 130, 20, 1000)
    ids, outcomes = ids.int().contiguous(), set()
    arguments = (ids.data_ptr(), log_probs.data_ptr(), 130, 20, 1000, 1e-3, False)
    error, _, block, *_ = _C.cache_encode(*arguments)
    assert error == 0
    out, logs = torch.empty(130, 20, dtype=torch.int64), torch.empty(130, 20)
    rng = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(block[: rng.choice([len(block), rng.randrange(len(block))])] + bytes(8))
        for _ in range(rng.randrange(1, 40)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        begin = rng.randrange(131)
        end = rng.randrange(begin, 131)
        size = len(damaged) - 8
        outcomes.add(
            _C.cache_decode(bytes(damaged), 0, size, 130, begin, end, 20, 1000, out.data_ptr(), logs.data_ptr())[0]
        )
    assert outcomes == {0, 7}


def test_the_manifest_is_the_statement(tmp_path: Path) -> None:
    names = {"teacher": "t:1", "tokenizer": "sha256:2", "data": "d"}
    cache = write(tmp_path / "c", {0: small()}, **SMALL, temperature=2.0, **names)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    wanted = {"version": 1, "kind": "top_k", "k": 4, "vocab_size": 100, "temperature": 2.0, "dtype": "coded", **names}
    assert wanted.items() <= manifest.items()
    assert (manifest["max_kl"], manifest["max_log_prob_error"]) == (1e-3, 0.5)
    assert wanted.items() <= cache.info().items()
    assert "top_k, 1 samples, teacher='t:1'" in repr(cache)


# ------------------------------------------------------------------------------------------------ what is refused


def test_wrong_rows_are_refused_and_leave_the_writer_as_it_was(tmp_path: Path) -> None:
    ids, log_probs = small()

    def changed(value: Any, row: int = 1, column: int = 2, of: Tensor = log_probs) -> Tensor:
        other = of.clone()
        other[row, column] = value
        return other

    cases: list[tuple[Any, str]] = [
        ((ids, changed(math.nan)), r"log_probs must be numbers below \+inf; got nan \(sample 'a', position 1\)"),
        ((ids, changed(math.inf)), r"log_probs must be numbers below \+inf; got inf"),
        ((ids, log_probs.exp()), r"logarithms of probabilities, which add up to 1 at most; got .*log_softmax"),
        ((ids, 9 - log_probs), r"logarithms of probabilities"),
        (
            (changed(100, of=ids), log_probs),
            r"indices must be from -1 \(padding\) to 99; got 100 \(sample 'a', position 1",
        ),
        ((changed(-2, of=ids), log_probs), r"indices must be from -1 \(padding\) to 99; got -2"),
        ((changed(2**32 + 3, of=ids), log_probs), r"got 4294967299"),
        ((changed(int(ids[1, 0]), of=ids), log_probs), rf"indices must differ within a row; got {ids[1, 0]} twice"),
        ((changed(-1, of=ids), log_probs), r"log_probs must be -inf where indices are -1; got"),
        ((ids[:, :3], log_probs[:, :3]), r"indices must be \[T, 4\]; got \[3, 3\]"),
        ((ids[0], log_probs[0]), r"indices must be \[T, 4\]; got \[4\]"),
        ((ids[:2], log_probs), r"one shape; got \[2, 4\] and \[3, 4\]"),
        ((log_probs, ids), r"indices must be integers; got torch.float32 \[3, 4\]"),
        ((ids, ids), r"log_probs must be floating-point numbers; got torch.int64"),
        ((ids.tolist(), log_probs), r"indices must be a tensor or an array; got list"),
        ((ids,), r"takes sample_id, indices, log_probs; got 2 values"),
        ((ids, log_probs, ids), r"takes sample_id, indices, log_probs; got 4 values"),
    ]
    with TeacherCache.write(tmp_path / "c", **SMALL) as out:
        for values, message in cases:
            with pytest.raises((ValueError, TypeError), match=message):
                out.add("a", *values)
            assert "a" not in out
        with pytest.raises(TypeError, match=r"takes sample_id, indices, log_probs; got 2 values and logprobs"):
            out.add("a", ids, logprobs=log_probs)
        out.add("a", log_probs=log_probs, indices=ids)
        with pytest.raises(ValueError, match="sample_id 'a' is already in"):
            out.add("a", ids, log_probs)
    assert list(TeacherCache.open(tmp_path / "c")) == ["a"]
    with pytest.raises(RuntimeError, match="this writer is closed"):
        out.add("b", ids, log_probs)


def test_more_positions_than_a_sample_can_have() -> None:
    with pytest.raises(ValueError, match=r"a sample of 40000000 positions may take more than 4 GiB.*add it in parts"):
        _C.cache_encode(0, 0, 40_000_000, 64, 151_936, 1e-3, False)  # nothing is read


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    with TeacherCache.write(tmp_path / "h", vocab_size=100, kind="hidden") as out:
        out.add(0, torch.zeros(2, 8))
        for value, message in (
            (torch.zeros(2, 9), r"values must be \[T, 8\]; got \[2, 9\]"),
            (
                torch.full((2, 8), math.nan),
                r"values must be finite in torch.bfloat16; got nan \(sample 1, position 0\)",
            ),
            (torch.full((2, 8), -math.inf), r"values must be finite in torch.bfloat16; got -inf"),
            (torch.zeros(2, 8, dtype=torch.int32), r"values must be floating-point"),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                out.add(1, value)
    with TeacherCache.write(tmp_path / "l", vocab_size=8, kind="logits") as out:
        with pytest.raises(ValueError, match=r"values must be finite in torch.float16, or -inf; got 70000"):
            out.add(0, torch.full((1, 8), 70000.0))
        with pytest.raises(ValueError, match=r"values must be \[T, 8\]; got \[1, 9\]"):
            out.add(0, torch.zeros(1, 9))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kind": "topk"}, r"kind must be one of 'top_k'.*got 'topk'; did you mean top_k\?"),
        ({"vocab_size": 2**24 + 1}, "vocab_size must be from 1 to 16777216; got 16777217"),
        ({"vocab_size": 3}, "k must be at most vocab_size, 3; got 4"),
        ({"k": 0}, "k must be from 1 to 4096; got 0"),
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"max_kl": 1e-9}, "max_kl must be a number of nats from 1e-6 to 1; got 1e-09"),
        ({"teacher": torch.nn.Linear(1, 1)}, "teacher must be a string, a name or a hash; got Linear"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1; got 2"),
        ({"rank": -1, "world_size": 2}, "rank must be from 0 to 1; got -1"),
        ({"resume": "yes"}, "resume must be True or False; got 'yes'"),
        (
            {"temperature": 2.0, "kind": "logits"},
            "temperature is for the kinds 'top_k' and 'sampled'; 'logits' are kept as the model gives them.*; got 2",
        ),
        ({"temperature": 0.5, "kind": "hidden"}, "temperature is for the kinds 'top_k' and 'sampled'; 'hidden' are"),
        ({"dtype": torch.float16}, "dtype is for the kinds 'logits' and 'hidden'"),
        (
            {"dtype": torch.float32, "kind": "hidden"},
            "dtype must be torch.float16 or torch.bfloat16; got torch.float32",
        ),
    ],
)
def test_wrong_keywords_are_refused_before_there_is_a_folder(tmp_path: Path, keywords: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TeacherCache.write(tmp_path / "c", **(SMALL | keywords))
    assert not (tmp_path / "c").exists()


def test_opening_with_other_settings_names_which(tmp_path: Path) -> None:
    names = {"teacher": "t:1", "tokenizer": "sha256:2"}
    write(tmp_path / "c", {0: small()}, **SMALL, temperature=2.0, **names)
    same = {"vocab_size": 100, "temperature": 2.0, **names}
    assert len(TeacherCache.open(tmp_path / "c", **same)) == 1
    other = {"vocab_size": 128, "temperature": 1.0, "teacher": "t:2", "tokenizer": "sha256:3", "data": "d"}
    for name, value in other.items():
        has = same.get(name)
        with pytest.raises(ValueError, match=rf"^{name}: .* was written with {has!r}; asked for {value!r}"):
            TeacherCache.open(tmp_path / "c", **(same | {name: value}))
    with pytest.raises(ValueError, match=r"no teacher cache: .*manifest.json is missing"):
        TeacherCache.open(tmp_path / "nothing")


def test_a_folder_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    write(tmp_path / "c", {0: small()}, **SMALL)
    with pytest.raises(ValueError, match=r"already holds rows of rank 0: go on with them by resume=True"):
        TeacherCache.write(tmp_path / "c", **SMALL)
    for name, value, has in (("vocab_size", 101, 100), ("k", 3, 4), ("teacher", "t", None), ("max_kl", 0.1, 0.001)):
        with pytest.raises(
            ValueError, match=rf"^{name}: the cache in .* was begun with {has!r}, this writer has {value!r}"
        ):
            TeacherCache.write(tmp_path / "c", **(SMALL | {name: value}), resume=True)
    assert len(TeacherCache.open(tmp_path / "c")) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"must be empty or hold a teacher cache; .* holds thesis.tex"):
        TeacherCache.write(tmp_path / "other", **SMALL)
    with pytest.raises(ValueError, match=r"folder must be a folder; .*thesis.tex is a file"):
        TeacherCache.write(tmp_path / "other" / "thesis.tex", **SMALL)


def test_positions_out_of_range(tmp_path: Path) -> None:
    cache = write(tmp_path / "c", {"a": small()}, **SMALL)
    for begin, end in ((0, 4), (-1, 2), (2, 1), (4, None)):
        with pytest.raises(IndexError, match=r"sample 'a' has positions 0 … 3; asked for"):
            cache.get("a", begin, end)
    with pytest.raises(ValueError, match="length must be at least that of the longest sample, 3; got 2"):
        cache.batch(["a"], length=2)


# ------------------------------------------------------------------------------------------------ damaged files


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def two_shards(folder: Path, **keywords: Any) -> list[Path]:
    write(folder, {"a": small(0, 90), "b": small(1)}, **SMALL, shard_bytes=400, **keywords)
    paths = files_of(folder)
    assert len(paths) == 4
    return paths


@pytest.mark.parametrize("which", range(4))
def test_every_file_that_is_missing_or_truncated_is_named_by_open(tmp_path: Path, which: int) -> None:
    path = two_shards(tmp_path / "c")[which]
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        sizes = rf": {length} bytes; written were {len(whole)}$" if path.name.startswith("rows") else ""
        with pytest.raises(ValueError, match=rf"{path.name}.* is (altered or )?truncated{sizes}"):
            TeacherCache.open(tmp_path / "c")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}.* is missing"):
        TeacherCache.open(tmp_path / "c")


@pytest.mark.parametrize("which", range(4))
def test_every_byte_that_is_altered_is_noticed_and_its_file_named(tmp_path: Path, which: int) -> None:
    paths = two_shards(tmp_path / "c")
    path, whole = paths[which], paths[which].read_bytes()
    for at in [*random.Random(0).sample(range(len(whole)), 60), 0, len(whole) - 2]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        in_rows = path.name.startswith("rows") and 128 <= at < struct.unpack_from("<Q", whole, 40)[0]
        if in_rows:  # noticed by the first access to the file, and by verify
            sample_id = "a" if path == paths[2] else "b"
            with pytest.raises(ValueError, match=path.name):
                TeacherCache.open(tmp_path / "c").verify()
            with pytest.raises(ValueError, match=path.name):
                TeacherCache.open(tmp_path / "c").get(sample_id)
        else:
            with pytest.raises(ValueError, match=path.name):
                TeacherCache.open(tmp_path / "c")
    path.write_bytes(whole)
    TeacherCache.open(tmp_path / "c").verify()


def test_verify_names_all_and_reading_names_the_one(tmp_path: Path) -> None:
    paths = [p for p in two_shards(tmp_path / "c") if p.name.startswith("rows")]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[140] ^= 4
        path.write_bytes(data)
    cache = TeacherCache.open(tmp_path / "c")
    with pytest.raises(ValueError, match=rf"{paths[0].name} is altered: .*; .*{paths[1].name} is altered"):
        cache.verify()
    for sample, path in zip(("a", "b"), paths, strict=True):
        for _ in range(2):  # the second time too
            with pytest.raises(ValueError, match=rf"{path.name} is altered: its content has another checksum"):
                cache[sample]


def test_of_a_cache_that_was_verified_a_process_need_not_read_all(tmp_path: Path) -> None:
    """With verify=False a shard's other rows are not read; `verify()` still reads them."""
    samples = {i: small(i, rows=40) for i in range(8)}
    write(tmp_path / "c", samples, **SMALL)
    (path,) = (tmp_path / "c").glob("rows-*")
    header, index = fmt.read_header_and_index(path)
    data = bytearray(path.read_bytes())
    last = int(index.offsets[-2])
    data[last + 8 * 40 + 2] ^= 1  # of the last sample
    path.write_bytes(data)
    assert header.samples == 8
    cache = TeacherCache.open(tmp_path / "c", verify=False)
    for found in (cache, pickle.loads(pickle.dumps(cache))):
        for i in range(7):
            assert torch.equal(found[i][0], sorted_rows(*samples[i])[0])
        with pytest.raises(ValueError, match=f"{path.name} is altered"):
            found.verify()
    with pytest.raises(ValueError, match=f"{path.name} is altered"):
        TeacherCache.open(tmp_path / "c")[0]
    with pytest.raises(TypeError, match="verify must be True or False; got 'no'"):
        TeacherCache.open(tmp_path / "c", verify="no")  # type: ignore[arg-type]


def test_files_that_change_after_open_are_noticed(tmp_path: Path) -> None:
    paths = two_shards(tmp_path / "c")
    cache = TeacherCache.open(tmp_path / "c")
    os.truncate(paths[2], 500)
    paths[3].unlink()
    with pytest.raises(ValueError, match=rf"{paths[2].name} is truncated: 500 bytes"):
        cache["a"]
    with pytest.raises(ValueError, match=rf"{paths[3].name} is missing"):
        cache["b"]
    with pytest.raises(ValueError, match=rf"{paths[2].name} is truncated.*; .*{paths[3].name} is missing"):
        cache.verify()


def test_files_of_another_cache_are_noticed(tmp_path: Path) -> None:
    paths = [p for p in two_shards(tmp_path / "c") if p.name.startswith("rows")]
    others = [p for p in two_shards(tmp_path / "d", teacher="another") if p.name.startswith("rows")]
    added = paths[0].with_name("rows-00000-000007.cache")
    added.write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match=rf"{added.name} is in no part of the cache"):
        TeacherCache.open(tmp_path / "c")
    added.unlink()
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match=paths[0].name):
        TeacherCache.open(tmp_path / "c")["a"]
    part = tmp_path / "d" / "part-00000.json"
    listed = fmt.read_json(part)
    listed["shards"][0]["samples"] += 1
    part.write_bytes(fmt.pack_json(listed))
    with pytest.raises(ValueError, match=rf"{others[0].name} is another than its part lists: 1 samples, 90 rows"):
        TeacherCache.open(tmp_path / "d")


def test_a_later_version_says_so(tmp_path: Path) -> None:
    write(tmp_path / "c", {0: small()}, **SMALL)
    path = tmp_path / "c" / "manifest.json"
    manifest = fmt.read_json(path) | {"version": 2}
    path.write_bytes(fmt.pack_json(manifest))
    with pytest.raises(
        ValueError, match=r"manifest.json: format version 2; this version of reptile_ext reads version 1"
    ):
        TeacherCache.open(tmp_path / "c")


def test_a_manifest_that_says_too_little(tmp_path: Path) -> None:
    write(tmp_path / "c", {0: small()}, **SMALL)
    path = tmp_path / "c" / "manifest.json"
    manifest = fmt.read_json(path)
    for name in manifest:
        if name not in ("format", "version"):
            path.write_bytes(fmt.pack_json({key: value for key, value in manifest.items() if key != name}))
            with pytest.raises(ValueError, match=rf"manifest.json has no '{name}'"):
                TeacherCache.open(tmp_path / "c")


# ------------------------------------------------------------------------------------------------ many writers


def test_an_unfinished_folder_says_which_writers_are_missing(tmp_path: Path) -> None:
    for rank in (2, 0):
        with TeacherCache.write(tmp_path / "c", **SMALL, rank=rank, world_size=4) as out:
            out.add(rank, *small(rank))
        missing = "0, 1, 3" if rank else "1, 3"
        with pytest.raises(
            ValueError, match=rf"is unfinished: of 4 writers, these ranks have not closed: {missing} \("
        ):
            TeacherCache.open(tmp_path / "c")
    with pytest.raises(ValueError, match=r"not closed: 1, 3 \(part-00001.json is missing\)"):
        TeacherCache.open(tmp_path / "c")
    for rank in (1, 3):  # one of them has nothing to add
        with TeacherCache.write(tmp_path / "c", **SMALL, rank=rank, world_size=4) as out:
            if rank == 1:
                out.add(rank, *small(rank))
    assert sorted(TeacherCache.open(tmp_path / "c")) == [0, 1, 2]


def test_a_sample_of_two_writers_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        with TeacherCache.write(tmp_path / "c", **SMALL, rank=rank, world_size=2) as out:
            out.add(rank, *small(rank))
            out.add("both", *small(5))
    with pytest.raises(
        ValueError, match=r"rows-00000-000000.cache and .*rows-00001-000000.cache both hold sample 'both'"
    ):
        TeacherCache.open(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"1 samples were given to two writers.* open the cache with duplicates='first'"
    ):
        TeacherCache.open(tmp_path / "c")


def test_of_samples_that_were_written_twice_the_first_can_be_had(tmp_path: Path) -> None:
    """As a DistributedSampler makes them: whole again, without the teacher."""
    names: list[Any] = ["both", "a", 7, -3, "also", "z"]
    for rank, own in enumerate((["a", "both", 7, "also"], ["also", -3, "both", 7, "z"])):
        with TeacherCache.write(tmp_path / "c", **SMALL, rank=rank, world_size=2) as out:
            for name in own:
                out.add(name, *small(names.index(name) + 10 * rank))
    cache = TeacherCache.open(tmp_path / "c", duplicates="first")
    for found in (cache, pickle.loads(pickle.dumps(cache))):
        assert len(found) == 6
        for name in names:
            rank = int(name in (-3, "z"))
            assert torch.equal(found[name][0], sorted_rows(*small(names.index(name) + 10 * rank))[0])
    assert sorted(map(str, cache)) == sorted(map(str, names))
    assert cache.info()["samples"] == 6
    assert cache.info()["rows"] == 18
    with pytest.raises(ValueError, match=r"duplicates must be one of 'error', 'first'; got 'last'"):
        TeacherCache.open(tmp_path / "c", duplicates="last")


def as_rank(folder: Path, rank: int, barrier: Any, count: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    barrier.wait()
    with TeacherCache.write(folder, **SMALL, shard_bytes=1500) as out:
        assert (out.rank, out.world_size) == (rank, 3)
        for i in out.todo(range(count)):
            out.add(i, *small(i))


def test_processes_of_torchrun_share_the_work(tmp_path: Path) -> None:
    barrier = FORK.Barrier(3)
    processes = [FORK.Process(target=as_rank, args=(tmp_path / "c", rank, barrier, 50)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = TeacherCache.open(tmp_path / "c")
    assert sorted(cache) == list(range(50))
    assert all(torch.equal(cache[i][0], sorted_rows(*small(i))[0]) for i in range(50))
    cache.verify()


def test_a_writer_that_nobody_closed_is_no_hindrance_for_ever(tmp_path: Path) -> None:
    out = TeacherCache.write(tmp_path / "c", **SMALL)
    out.add(0, *small())
    out.flush()
    with pytest.raises(ValueError, match=r"It is of this process, and was not closed: use it in a `with` statement"):
        TeacherCache.write(tmp_path / "c", **SMALL, resume=True)
    del out
    gc.collect()
    with TeacherCache.write(tmp_path / "c", **SMALL, resume=True) as out:
        assert 0 in out


def test_one_writer_a_rank(tmp_path: Path) -> None:
    with TeacherCache.write(tmp_path / "c", **SMALL) as out:
        out.add(0, *small())
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another writer is at work as rank 0"):
                TeacherCache.write(tmp_path / "c", **SMALL, resume=resume)

        def elsewhere(queue: Any) -> None:
            writer._held.clear()  # as in a program of its own
            for what in (
                lambda: TeacherCache.write(tmp_path / "c", **SMALL, resume=True),
                lambda: out.add(1, *small()),
            ):
                try:
                    what()
                except (ValueError, RuntimeError) as error:
                    queue.put(str(error))

        queue = FORK.Queue()
        process = FORK.Process(target=elsewhere, args=(queue,))
        process.start()
        assert "another writer is at work as rank 0" in queue.get(timeout=60)
        assert "belongs to the process that made it" in queue.get(timeout=60)
        process.join()
        out.add(1, *small(1))
    assert list(TeacherCache.open(tmp_path / "c")) == [0, 1]


# ------------------------------------------------------------------------------------------------ kills


def fill(folder: Path, count: int, die: Callable[[], None] | None = None) -> None:
    if die is not None:
        die()
    with TeacherCache.write(folder, **SMALL, resume=True, shard_bytes=700) as out:
        for i in out.todo(range(count)):
            out.add(i, *small(i, 1 + i % 7))


def die_at(call: int, before: bool) -> Callable[[], None]:
    """Have the process killed before or after its n-th call that changes the disk."""

    def install() -> None:
        calls = 0

        def wrapped(function: Any) -> Any:
            def run(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return function(*arguments, **keywords)
                finally:
                    if calls == call:
                        os.kill(os.getpid(), signal.SIGKILL)

            return run

        for name in ("link", "fsync", "unlink", "mkdir"):
            setattr(os, name, wrapped(getattr(os, name)))

    return install


def run_in_a_process(*arguments: Any) -> Any:
    process = FORK.Process(target=fill, args=arguments)
    process.start()
    return process


def check_filled(folder: Path, count: int) -> None:
    cache = TeacherCache.open(folder)
    cache.verify()
    assert sorted(cache) == list(range(count))
    assert len(cache) == count
    for i in range(count):
        assert torch.equal(cache[i][0], sorted_rows(*small(i, 1 + i % 7))[0])
    assert not list(folder.glob(".tmp-*rows*"))


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_change_of_the_disk_nothing_is_lost_or_doubled(tmp_path: Path, before: bool) -> None:
    for call in range(1, 40):
        folder = tmp_path / str(call)
        process = run_in_a_process(folder, 20, die_at(call, before))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        whole = {path: path.read_bytes() for path in folder.glob("rows-*")}
        if not (folder / "part-00000.json").exists():
            with pytest.raises(ValueError, match=r"is unfinished|manifest.json is missing"):
                TeacherCache.open(folder)
        fill(folder, 20)
        check_filled(folder, 20)
        assert {path: path.read_bytes() for path in whole} == whole  # what was there stays
    assert call > 15


def test_killed_at_random_times_over_and_over(tmp_path: Path) -> None:
    rng, kills, there = random.Random(1), 0, 0
    for _ in range(200):
        process = run_in_a_process(tmp_path / "c", 300)
        process.join(rng.uniform(0.005, 0.12))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        shards = len(list((tmp_path / "c").glob("rows-*")))
        assert shards >= there
        there = shards
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert kills > 0
    check_filled(tmp_path / "c", 300)


def test_an_error_keeps_what_was_added_and_leaves_the_folder_unfinished(tmp_path: Path) -> None:
    def fail() -> None:
        with TeacherCache.write(tmp_path / "c", **SMALL) as out:
            out.add(0, *small(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(ValueError, match="is unfinished"):
        TeacherCache.open(tmp_path / "c")
    with TeacherCache.write(tmp_path / "c", **SMALL, resume=True) as out:
        assert 0 in out
        assert list(out.todo([0, 1])) == [1]
        with pytest.raises(ValueError, match="sample_id 0 is already in"):
            out.add(0, *small(0))
        out.add(1, *small(1))
    cache = TeacherCache.open(tmp_path / "c")
    assert list(cache) == [0, 1]
    errors = [torch.stack(kl_errors(sorted_rows(*small(i))[1], cache[i][1])).amax(0) for i in (0, 1)]
    info = cache.info()  # of both runs
    assert info["worst_kl"] == pytest.approx(torch.cat(errors).max().item(), abs=2e-7)
    assert info["mean_kl"] == pytest.approx(torch.cat(errors).mean().item(), abs=2e-7)
    assert info["captured_mass"] == pytest.approx(torch.cat([small(i)[1].exp().sum(-1) for i in (0, 1)]).mean().item())
    assert cache.info()["rows"] == 6


def test_a_finished_folder_may_be_added_to(tmp_path: Path) -> None:
    write(tmp_path / "c", {0: small(0)}, **SMALL)
    with TeacherCache.write(tmp_path / "c", **SMALL, resume=True) as out:
        pass
    assert list(TeacherCache.open(tmp_path / "c")) == [0]
    out = TeacherCache.write(tmp_path / "c", **SMALL, resume=True)
    out.add(1, *small(1))
    out.flush()
    with pytest.raises(ValueError, match="is unfinished"):  # not a folder without sample 1
        TeacherCache.open(tmp_path / "c")
    out.close()
    assert list(TeacherCache.open(tmp_path / "c")) == [0, 1]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with TeacherCache.write(tmp_path / "c", **SMALL) as out:
        out.add(0, *small(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                out.flush()
        assert not list((tmp_path / "c").glob("*rows*"))
        assert 0 in out
        out.add(1, *small(1))
    assert list(TeacherCache.open(tmp_path / "c")) == [0, 1]


def test_an_interrupt_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after a shard has got its name, and before the writer has noted it."""

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    out = TeacherCache.write(tmp_path / "c", **SMALL)
    out.add(0, *small(0))
    with monkeypatch.context() as patch:
        patch.setattr(fmt, "flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            out.flush()
    with pytest.raises(FileExistsError):
        out.flush()
    with pytest.raises(FileExistsError):
        out.close()
    out.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with TeacherCache.write(tmp_path / "c", **SMALL, resume=True) as out:
        assert list(out.todo([0, 1])) == [1]
        out.add(1, *small(1))
    assert list(TeacherCache.open(tmp_path / "c")) == [0, 1]


def test_resume_names_a_damaged_or_missing_shard(tmp_path: Path) -> None:
    paths = [p for p in two_shards(tmp_path / "c") if p.name.startswith("rows")]
    whole = paths[1].read_bytes()
    for damaged in (whole[:-1], whole[:60], whole[:150] + b"\x00" + whole[151:], b""):
        paths[1].write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{paths[1].name} is .*delete it, and its samples are written again"):
            TeacherCache.write(tmp_path / "c", **SMALL, resume=True)
    paths[1].unlink()
    with pytest.raises(ValueError, match=rf"{paths[1].name} is missing: part-00000.json lists it"):
        TeacherCache.write(tmp_path / "c", **SMALL, resume=True)
    (tmp_path / "c" / "part-00000.json").unlink()
    with TeacherCache.write(tmp_path / "c", **SMALL, resume=True) as out:
        assert list(out.todo(["a", "b"])) == ["b"]
        out.add("b", *small(1))
    cache = TeacherCache.open(tmp_path / "c")
    assert sorted(cache) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ many readers


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_loader_decode_batches(tmp_path: Path, method: str) -> None:
    samples = {i: small(i, 1 + i % 5) for i in range(24)}
    cache = write(tmp_path / "c", samples, **SMALL, shard_bytes=500)
    wanted = cache.batch(range(24), length=5)
    loader = DataLoader(
        range(24),
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=partial(cache.batch, length=5),
    )
    for _ in range(1 if method == "spawn" else 2):
        found = [torch.cat(parts) for parts in zip(*loader, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(wanted[0][i, : 1 + i % 5], sorted_rows(*samples[i])[0]) for i in samples)


def test_a_worker_notices_a_damaged_shard(tmp_path: Path) -> None:
    cache = write(tmp_path / "c", {0: small()}, **SMALL)
    (path,) = (tmp_path / "c").glob("rows-*")
    data = bytearray(path.read_bytes())
    data[140] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name} is altered"):
        list(DataLoader([0], num_workers=1, multiprocessing_context="fork", collate_fn=cache.batch))


def test_a_folder_that_is_moved_is_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c", {"a": small()}, **SMALL, teacher="t")
    (tmp_path / "c").rename(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    cache = TeacherCache.open("d", teacher="t")
    copy = pickle.loads(pickle.dumps(cache))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for one in (cache, copy, pickle.loads(pickle.dumps(cache))):
        assert torch.equal(one["a"][0], sorted_rows(*small())[0])
    manifest = fmt.read_json(tmp_path / "d" / "manifest.json") | {"teacher": "another"}
    (tmp_path / "d" / "manifest.json").write_bytes(fmt.pack_json(manifest))
    with pytest.raises(ValueError, match=r"teacher: .* 'another'; asked for 't'"):
        pickle.loads(pickle.dumps(cache))


def test_a_position_without_a_teacher_keeps_its_place(tmp_path: Path) -> None:
    """Servers give no log-probabilities of the first token: dropping the row would shift all others by one."""
    ids, log_probs = small(0, 4)
    ids[0], log_probs[0] = -1, -torch.inf
    indices, found = write(tmp_path / "c", {"a": (ids, log_probs)}, **SMALL)["a"]
    assert len(indices) == 4
    assert (indices[0] == -1).all()
    assert (found[0] == -torch.inf).all()
    assert torch.equal(indices[1:], sorted_rows(ids[1:], log_probs[1:])[0])


def test_threads(tmp_path: Path) -> None:
    samples = {i: small(i) for i in range(30)}
    cache = write(tmp_path / "c", samples, **SMALL, shard_bytes=300)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        order = list(samples)
        random.Random(seed).shuffle(order)
        for i in order * 5:
            if not torch.equal(cache[i][0], sorted_rows(*samples[i])[0]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_shards_without_number_need_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard that is mapped costs a file descriptor, of which a process has 1,024."""
    monkeypatch.setattr(reader, "_MAPPED", 5)
    samples = {i: small(i) for i in range(40)}
    cache = write(tmp_path / "c", samples, **SMALL, shard_bytes=1)
    assert cache.info()["shards"] == 40
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in samples:
        assert torch.equal(cache[i][0], sorted_rows(*samples[i])[0])
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_what_an_index_needs(tmp_path: Path) -> None:
    """100 million positions in samples of 10 are 10 million samples: 1 GB is 100 bytes each."""
    cache = write(tmp_path / "c", {f"sample {i}": small(i, 1) for i in range(500)}, **SMALL)
    index = cache._index
    held = sum(a.nbytes for a in vars(index).values() if isinstance(a, np.ndarray))
    assert held / 500 <= 50


def test_a_program_of_its_own_reads_it_and_pays_for_the_import_only_then(tmp_path: Path) -> None:
    write(tmp_path / "c", {"a": small()}, **SMALL)
    code = (
        "import sys, reptile_ext; assert 'reptile_ext.cache' not in sys.modules; "
        f"cache = reptile_ext.TeacherCache.open({str(tmp_path / 'c')!r}); print(cache['a'][0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{sorted_rows(*small())[0].tolist()}\n"


def test_the_command_says_what_is_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_probs = torch.tensor([[0.6, 0.2, 0.1, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    write(tmp_path / "c", {"a": (torch.tensor([[1, 2, 3, 4]] * 2), log_probs)}, **SMALL, teacher="t")
    folder, plot = str(tmp_path / "c"), tmp_path / "p.png"
    assert main(["cache-info", folder, "--verify", "--plot", str(plot)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["teacher"], said["rows"], said["vocab_size"]) == ("t", 2, 100)
    assert said["captured_mass_quantiles"]["1%"] == pytest.approx(0.9505, abs=1e-4)
    p = np.array([0.6, 0.2, 0.1, 0.05, 0.05])
    entropies = [-(p * np.log(p)).sum(), math.log(4)]
    assert said["entropy_quantiles"]["50%"] == pytest.approx(np.mean(entropies), abs=0.02)
    assert plot.read_bytes().startswith(b"\x89PNG")
    (path,) = (tmp_path / "c").glob("rows-*")
    data = bytearray(path.read_bytes())
    data[140] ^= 1
    path.write_bytes(data)
    assert main(["cache-info", folder, "--verify"]) == 2
    assert f"{path} is altered" in capsys.readouterr().err
    write(tmp_path / "h", {"a": torch.zeros(2, 4)}, kind="hidden")
    assert main(["cache-info", str(tmp_path / "h"), "--plot", str(plot)]) == 2
    assert "this cache holds hidden states" in capsys.readouterr().err
