"""`reptile cache-teacher MODEL FILE …`: the rows are what the model says, however they are batched, shared out or
stopped; and a student learns from the folder alone.

The models are small ones of four architectures, and one of them has learned something: of the docstrings of Python's
standard library, which are the texts as well.
"""

from __future__ import annotations

import ast
import copy
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reptile_ext import TeacherCache, cli
from reptile_ext.heads import KnownHead
from reptile_ext.training import Objective

for needed in ("datasets", "pyarrow", "tokenizers", "transformers"):
    pytest.importorskip(needed, reason="needs the extra `cache`")

import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402

import reptile_ext.cache.teacher as teacher_module  # noqa: E402
from reptile_ext.cache import cache_model  # noqa: E402
from reptile_ext.cache.tokens import TokenWriter, tokens_of  # noqa: E402

CONTEXT = 48
MAX_KL = 1e-5
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def docstrings(module: str) -> list[str]:
    tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


LEARNED = [text for module in ("argparse", "statistics", "random", "textwrap") for text in docstrings(module)]
TEXTS = docstrings("heapq") + docstrings("fractions")
V = 400


def build(kind: str, folder: Path, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT)
        model: Any = transformers.GPT2LMHeadModel(config)
    elif kind == "gemma2":  # its logits are softcapped
        config = transformers.Gemma2Config(vocab_size=V, head_dim=8, final_logit_softcapping=3.0, **SMALL)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **SMALL))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # so that rows differ from one another
    if kind == "bfloat16":
        model = model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


class Place:
    """A folder with models, a tokenizer and files of texts."""

    def __init__(self, folder: Path) -> None:
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=V,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        t.train_from_iterator(LEARNED, trainer)
        assert t.get_vocab_size() == V
        t.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>")
        self.folder = folder
        kinds = ("llama", "gpt2", "gemma2", "bfloat16")
        self.models = {kind: build(kind, folder / kind, self.tokenizer) for kind in kinds}
        self._learn(self.models["llama"])
        self.models["llama"].save_pretrained(folder / "llama")
        self.file = folder / "texts.jsonl"
        self.file.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))

    def _learn(self, model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        ids = [i for text in LEARNED for i in self.tokenizer(text)["input_ids"]]
        rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).reshape(-1, CONTEXT)
        model.train()
        for step in range(60):
            batch = rows[torch.arange(16) * 7 + step * 16 & 127]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()

    def ids(self, text: str, most: int = CONTEXT) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])[:most]

    @torch.no_grad()
    def logits(self, kind: str, text: str, most: int = CONTEXT) -> Tensor:
        """[T, V] of a text by itself, without padding."""
        return self.models[kind](input_ids=torch.tensor([self.ids(text, most)])).logits[0].double()

    def cache(self, folder: Path, model: str = "llama", files: Any = None, **more: Any) -> TeacherCache:
        options = {"max_kl": MAX_KL, **more} if more.get("kind") != "hidden" else more
        cache_model(folder, self.folder / model, files or self.file, **options)
        return TeacherCache.open(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path_factory.mktemp("place"))
    torch.set_num_threads(threads)


def kl_of_listed(exact: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """[T] KL divergence from exact log-probabilities [T, V] to a cache's rows, of the listed classes and the rest."""
    y = exact.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    p, q = y.exp(), log_probs.double().exp()
    of_listed = torch.where(p > 0, p * (y - log_probs.double()), 0).sum(-1)
    rest, of_cache = 1 - p.sum(-1), 1 - q.sum(-1)
    return of_listed + rest * (rest.log() - of_cache.log())


# ------------------------------------------------------------------------------------------------ what is in the rows


@pytest.mark.parametrize(("kind", "temperature"), [("llama", 1.0), ("llama", 2.5), ("gpt2", 1.0), ("gemma2", 1.0)])
def test_rows_are_what_the_model_says(place: Place, tmp_path: Path, kind: str, temperature: float) -> None:
    cache = place.cache(tmp_path / "c", kind, k=20, temperature=temperature, batch_tokens=300)
    assert [cache.info()[name] for name in ("kind", "vocab_size", "temperature")] == ["top_k", V, temperature]
    assert sorted(cache) == list(range(len(TEXTS)))
    widest = 0.0
    for i, text in enumerate(TEXTS):
        indices, log_probs = cache[i]
        exact = (place.logits(kind, text) / temperature).log_softmax(-1)
        assert len(indices) == len(exact) == len(place.ids(text))
        listed = exact.gather(-1, indices)
        # The K likeliest, up to rounding where two are as likely.
        assert (listed.amin(-1) >= exact.topk(20).values[:, -1] - 1e-4).all()
        kl = kl_of_listed(exact, indices, log_probs)
        assert float(kl.max()) <= MAX_KL + 1e-7  # the cache's promise, and rounding of float32
        widest = max(widest, float(exact.std(0).max()))
    assert widest > 0.1  # rows differ, so that those of another position would be seen


def test_rows_of_a_16_bit_model(place: Place, tmp_path: Path) -> None:
    """In its own dtype, as the checkpoint is: its logits are rounded to bfloat16, and so are ours, after the same
    products of states that may differ by a rounding."""
    cache = place.cache(tmp_path / "c", "bfloat16", k=20, batch_tokens=300)
    assert cache.info()["teacher"].endswith(" in bfloat16")
    for i, text in enumerate(TEXTS):
        logits = place.logits("bfloat16", text)
        # Errors of at most d in each logit cost at most d² / 2 nats (the variance of the error, halved).
        d = 4 * 2**-8 * float(logits.abs().max())
        kl = kl_of_listed(logits.log_softmax(-1), *cache[i])
        assert float(kl.max()) <= MAX_KL + d * d / 2


def test_float32_can_be_asked_for(place: Place, tmp_path: Path) -> None:
    cache = place.cache(tmp_path / "c", "bfloat16", k=20, dtype="float32")
    model = copy.deepcopy(place.models["bfloat16"]).float()
    with torch.no_grad():
        exact = model(input_ids=torch.tensor([place.ids(TEXTS[0])])).logits[0].double().log_softmax(-1)
    assert float(kl_of_listed(exact, *cache[0]).max()) <= MAX_KL + 1e-7
    assert cache.info()["teacher"].endswith(" in float32")


def test_draws_are_a_samples_own(place: Place, tmp_path: Path) -> None:
    """The same whatever else is in the batch, others by another seed, and as often as the model says: classes of a
    probability above the row's threshold τ always, with their own, and others with p / τ and the weight τ."""
    one = place.cache(tmp_path / "one", kind="sampled", k=24, batch_tokens=1)
    together = place.cache(tmp_path / "together", kind="sampled", k=24, batch_tokens=4096)
    other = place.cache(tmp_path / "other", kind="sampled", k=24, seed=1)
    same = differ = rows = 0
    drawn, expected, variance = (torch.zeros(V, dtype=torch.float64) for _ in range(3))
    for i, text in enumerate(TEXTS):
        p = place.logits("llama", text).softmax(-1)
        listed, of_together, of_other = (
            torch.zeros(len(p), V + 1)
            .double()
            .scatter(-1, cache[i][0].masked_fill(cache[i][0] < 0, V), cache[i][1].double().exp())[:, :V]
            for cache in (one, together, other)
        )
        rows += len(p)
        same += int(((listed > 0) == (of_together > 0)).all(-1).sum())
        differ += int(((listed > 0) != (of_other > 0)).any(-1).sum())
        threshold = listed.masked_fill(listed == 0, 1).amin(-1, keepdim=True)
        certain = p > 1.1 * threshold  # with room for what coding may cost a weight
        assert torch.allclose(listed[certain], p[certain], rtol=0.1)
        share = torch.where(p < threshold / 1.1, p / threshold, 0)
        drawn += ((listed > 0) & (share > 0)).sum(0)
        expected += share.sum(0)
        variance += (share * (1 - share)).sum(0)
    assert same > 0.97 * rows  # but where a rounding decides a draw
    assert differ > 0.9 * rows
    assert ((drawn - expected).abs() <= 5 * variance.sqrt() + 2).all()
    assert float(expected.sum()) > rows  # some draws in every row are chance


def test_batches_change_nothing(place: Place, tmp_path: Path) -> None:
    alone = place.cache(tmp_path / "alone", k=20, batch_tokens=1)
    together = place.cache(tmp_path / "together", k=20, batch_tokens=100_000)
    for i in range(len(TEXTS)):
        exact = torch.full((len(alone[i][0]), V), -torch.inf).double().scatter(-1, alone[i][0], alone[i][1].double())
        assert float(kl_of_listed(exact, *together[i]).abs().max()) < 4 * MAX_KL


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bfloat16"])
def test_hidden_states_and_the_head(place: Place, tmp_path: Path, kind: str) -> None:
    """What goes into the head, after the last norm, in bfloat16; with the head beside it the model's logits."""
    cache = place.cache(tmp_path / "c", kind, kind="hidden", batch_tokens=300)
    head = KnownHead.load(tmp_path / "c" / "teacher" / "head.safetensors", teacher=cache.info()["teacher"])
    model = place.models[kind]
    assert torch.equal(head.weight, model.lm_head.weight)
    assert (head.softcap, head.scale) == (3.0 if kind == "gemma2" else None, 1.0)
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([place.ids(text)])).last_hidden_state[0]
        assert cache[i].dtype == torch.bfloat16
        assert torch.allclose(cache[i].float(), hidden.float(), rtol=2**-7, atol=2**-7 * float(hidden.abs().max()))
        error = (head.logits(cache[i]).double() - place.logits(kind, text)).abs()
        bound = 2**-6 * (hidden.double().abs() @ model.lm_head.weight.double().abs().T)
        assert (error <= bound).all()


def test_long_samples_never_have_all_logits(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=V, **{**SMALL, "max_position_embeddings": 4096})
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    place.tokenizer.save_pretrained(tmp_path / "model")
    text = "\n\n".join(LEARNED)[:6000]
    (tmp_path / "long.txt").write_text(text)
    made: list[int] = []

    def recorded(logits: Tensor, *rest: Any) -> Any:
        made.append(logits.shape[0])
        return top_k_targets(logits, *rest)

    top_k_targets = teacher_module.top_k_targets
    monkeypatch.setattr(teacher_module, "top_k_targets", recorded)
    cache_model(tmp_path / "c", tmp_path / "model", tmp_path / "long.txt", sample_by="document", k=8, max_kl=MAX_KL)
    ids = place.ids(text, 4096)
    assert len(ids) > 1500
    assert max(made) <= 512
    assert sum(made) == len(ids)
    with torch.no_grad():
        exact = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert float(kl_of_listed(exact, *TeacherCache.open(tmp_path / "c")[0]).max()) <= MAX_KL + 1e-7


# ------------------------------------------------------------------------------------------------ texts and names


def test_files_of_all_kinds_hold_the_same(place: Place, tmp_path: Path) -> None:
    names = [f"doc/{i}" for i in range(len(TEXTS))]
    table = pyarrow.table({"name": names, "body": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    lines = "".join(json.dumps({"body": text, "name": name}) + "\n" for name, text in zip(names, TEXTS, strict=True))
    (tmp_path / "a [1]*.jsonl").write_text(lines)  # a name, not a pattern
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    wanted = place.cache(tmp_path / "wanted", k=4)
    for name in ("a.parquet", "a [1]*.jsonl", "a.jsonl.gz"):
        folder = tmp_path / f"c-{name}"
        cache = place.cache(folder, files=tmp_path / name, k=4, text_column="body", id_column="name")
        assert sorted(cache) == sorted(names)
        for i, name in enumerate(names):
            assert all(map(torch.equal, cache[name], wanted[i]))
    # Two files are one, and a record that is empty keeps its number.
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": ""}) + '\n{"text": null}\n' + json.dumps({"text": TEXTS[3]}))
    cache = place.cache(tmp_path / "two", files=[place.file, tmp_path / "b.jsonl"], k=4)
    assert sorted(cache) == [*range(len(TEXTS)), len(TEXTS) + 2]
    assert torch.equal(cache[len(TEXTS) + 2][0], wanted[3][0])


def test_plain_text(place: Place, tmp_path: Path) -> None:
    text = TEXTS[0] + "\n\n" + TEXTS[1] + "\n"
    (tmp_path / "a.txt").write_text(text)
    cut = {
        "line": [line for line in text.split("\n") if line],
        "paragraph": [part for part in text.rstrip("\n").split("\n\n") if part],
        "document": [text],
    }
    for sample_by, wanted in cut.items():
        cache = place.cache(tmp_path / sample_by, files=tmp_path / "a.txt", k=4, sample_by=sample_by)
        found = [tokens_of(cache, sample_id) for sample_id in sorted(cache)]
        wanted_ids = [place.ids(part) for part in wanted]
        if sample_by == "paragraph":  # the last one may keep its line break
            found, wanted_ids = found[:-1], wanted_ids[:-1]
        assert found == wanted_ids
        assert found


def test_what_was_done_is_said(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *TEXTS[:6], ""]))
    lengths = [len(place.tokenizer(text)["input_ids"]) for text in TEXTS[:6]]
    cut = sum(length > 40 for length in lengths)
    assert 0 < cut < 6
    argv = ["cache-teacher", str(place.folder / "llama"), str(file), "--out", str(tmp_path / "c"), "--max-length", "40"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    tokens = sum(min(40, length) for length in lengths)
    assert re.match(rf"6 samples, {tokens} tokens, [\d,]+ tokens/s; 2 empty; {cut} cut to 40 tokens\n", said)
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.info()["rows"] == tokens
    assert f"{tmp_path / 'c'}: 6 samples, {tokens} positions, 0.0 MB; 64 classes hold 0." in said


def test_a_bar_of_tokens_and_time_left(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes from nothing to all of it, and where half is there already from half of it."""
    import tqdm.auto

    folder, seen = tmp_path / "c", []

    class Seen(tqdm.auto.tqdm):
        def update(self, n: float = 1) -> Any:
            seen.append((self.n, self.n + n, self.total))
            return super().update(n)

    monkeypatch.setattr(tqdm.auto, "tqdm", Seen)
    total = sum(min(len(text), 4 * CONTEXT) for text in TEXTS)
    with monkeypatch.context() as patch:
        added: list[Any] = []

        def stop(self: Any, *values: Any) -> None:
            added.append(values)
            if len(added) > len(TEXTS) // 2:
                raise KeyboardInterrupt
            original(self, *values)

        original = TokenWriter.add_with_tokens
        patch.setattr(TokenWriter, "add_with_tokens", stop)
        patch.setattr(teacher_module, "_TEXTS", 8)
        with pytest.raises(KeyboardInterrupt):
            cache_model(folder, place.folder / "llama", place.file, k=5, batch_tokens=200, progress_bar=True)
    assert seen[0][0] == 0
    done = seen[-1][1]
    assert 0.2 * total < done < 0.8 * total
    assert all(a[1] == b[0] and b[2] == total for a, b in itertools.pairwise(seen))
    seen.clear()
    cache_model(folder, resume=True, progress_bar=True)
    assert 0.2 * total < seen[0][0] < total
    assert seen[-1][1:] == (total, total)
    said = capsys.readouterr().err
    assert re.search(r"100 % \|.*\| \d\d:\d\d < 00:00, [\d,]+ tokens, [\d,]+ tokens/s", said)


def test_names_are_hashes(place: Place, tmp_path: Path) -> None:
    """Of what changes the rows: weights and configuration, tokenizer.json (as `cache-import` has it), texts, their
    length."""
    from reptile_ext.cache.vocabulary import Vocabulary

    def names(folder: str, model: Path = place.folder / "llama", files: Any = place.file, **more: Any) -> list[str]:
        cache_model(tmp_path / folder, model, files, k=2, **more)
        info = TeacherCache.open(tmp_path / folder).info()
        return [info[name] for name in ("teacher", "tokenizer", "data")]

    first = names("first")
    assert first[1] == Vocabulary(place.folder / "llama").name
    moved = tmp_path / "elsewhere"
    shutil.copytree(place.folder / "llama", moved)
    shutil.copy(place.file, tmp_path / "copy.jsonl")
    assert names("same", moved, tmp_path / "copy.jsonl") == first
    assert names("shorter", max_length=20)[:2] == first[:2]
    assert names("shorter-again", max_length=20)[2] != first[2]
    (tmp_path / "copy.jsonl").write_text(place.file.read_text().replace("heap", "heal", 1))
    assert names("other-texts", moved, tmp_path / "copy.jsonl")[2] != first[2]
    with (moved / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert names("other-tokenizer", moved)[1] != first[1]
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = names("other-weights", moved)
    assert other[0] != first[0]
    with pytest.raises(ValueError, match=f"teacher: .* was written with '{first[0]}'; asked for '{other[0]}'"):
        TeacherCache.open(tmp_path / "first", teacher=other[0])


# ------------------------------------------------------------------------------------------------ stopped, shared out


def same_caches(found: TeacherCache, wanted: TeacherCache) -> None:
    assert sorted(found) == sorted(wanted)
    for sample_id in wanted:
        assert tokens_of(found, sample_id) == tokens_of(wanted, sample_id)
        indices, log_probs = wanted[sample_id]
        exact = torch.full((len(indices), V), -torch.inf).double().scatter(-1, indices, log_probs.double())
        assert len(found[sample_id][0]) == len(indices)
        assert float(kl_of_listed(exact, *found[sample_id]).abs().max()) < 4 * MAX_KL
    files = sorted((found.folder / "tokens").iterdir())
    assert [path.stem for path in files] == sorted(path.stem for path in found.folder.glob("rows-*"))
    listed = [i for path in files for i in pyarrow.parquet.read_table(path)["sample_id"].to_pylist()]
    assert sorted(listed) == sorted(wanted)


KILLED = """
import os, signal, sys
from reptile_ext.cache import cache_model, tokens, writer
where, folder, model, file = sys.argv[1:]
count = 0
def kill(*_):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
if where == "between":  # tokens are there, and their rows are not
    written = tokens.write_atomically
    tokens.write_atomically = lambda *a: (written(*a), kill())
else:
    flushed = writer.CacheWriter.flush
    writer.CacheWriter.flush = lambda self: (flushed(self), kill())
cache_model(folder, model, file, k=20, max_kl=1e-5, batch_tokens=200, shard_bytes=1)
"""


@pytest.mark.parametrize("where", ["between", "after"])
def test_killed_it_goes_on(place: Place, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing lost, nothing twice: as if it had not been stopped."""
    folder = tmp_path / "c"
    argv = [sys.executable, "-c", KILLED, where, folder, place.folder / "llama", place.file]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    kept = len(list(folder.glob("rows-*")))
    assert kept == {"between": 6, "after": 7}[where]
    with pytest.raises(ValueError, match="unfinished"):
        TeacherCache.open(folder)
    assert cli.main(["cache-teacher", "--resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{len(TEXTS) - kept} samples, ")
    assert f"{kept} already there" in said
    same_caches(TeacherCache.open(folder), place.cache(tmp_path / "whole", k=20, batch_tokens=200, shard_bytes=1))


def test_stopped_by_hand_it_says_how_to_go_on(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    model, file = str(place.folder / "llama"), str(place.file)
    added: list[Any] = []

    def stop(self: Any, *values: Any) -> None:
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(values[0])
        original(self, *values)

    original = TokenWriter.add_with_tokens
    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "add_with_tokens", stop)
        argv = ["cache-teacher", model, file, "--out", str(folder), "--k", "20", "--max-kl", "1e-5"]
        assert cli.main(argv) == 130
    again = f"reptile cache-teacher --resume {folder}"
    assert capsys.readouterr().err == f"reptile cache-teacher: stopped; go on with `{again}`\n"
    assert cli.main(again.split()[1:]) == 0
    assert "5 already there" in capsys.readouterr().out
    same_caches(TeacherCache.open(folder), place.cache(tmp_path / "whole", k=20))
    # All done: nothing is left to do, and what is there stays.
    assert cli.main([*again.split()[1:], "--batch-tokens", "99"]) == 0
    assert "0 samples, 0 tokens" in capsys.readouterr().out


def test_a_full_disk(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from reptile_ext.cache import format as fmt

    folder = tmp_path / "c"
    create = fmt.create

    def full(path: Path, content: Any) -> None:
        if path.name.endswith("000003.cache"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        create(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(fmt, "create", full)
        with pytest.raises(OSError, match=f"{folder} cannot be written: No space left on device. What was flushed is"):
            cache_model(folder, place.folder / "llama", place.file, k=20, max_kl=MAX_KL, shard_bytes=1)
    assert cache_model(folder, resume=True)["there_before"] == 3
    same_caches(TeacherCache.open(folder), place.cache(tmp_path / "whole", k=20, shard_bytes=1))


def test_a_shard_that_is_lost_is_written_again(place: Place, tmp_path: Path) -> None:
    """With its tokens, which are then there once."""
    folder = tmp_path / "c"
    place.cache(folder, k=20, shard_bytes=4000)
    assert len(list(folder.glob("rows-*"))) > 4
    (folder / "rows-00000-000002.cache").unlink()
    (folder / "part-00000.json").unlink()
    assert 0 < cache_model(folder, resume=True)["samples"] < len(TEXTS)
    same_caches(TeacherCache.open(folder), place.cache(tmp_path / "whole", k=20))
    (folder / "tokens" / "rows-00000-000001.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"rows-00000-000001\.parquet is missing: delete .*rows-00000-000001\.cache and"
    ):
        cache_model(folder, resume=True)


def test_torchrun_shares_the_work(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    argv = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "reptile_ext.cli"]
    argv += ["cache-teacher", str(place.folder / "llama"), str(place.file), "--out", str(folder), "--k", "20"]
    done = subprocess.run(
        [sys.executable, *argv, "--max-kl", "1e-5"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    half = [len(TEXTS) - len(TEXTS) // 2, len(TEXTS) // 2]
    for rank in (0, 1):
        assert re.search(rf"(?m)^{half[rank]} samples, [\d,]+ tokens, [\d,]+ tokens/s, rank {rank} of 2", done.stdout)
    assert {path.name for path in folder.glob("part-*")} == {"part-00000.json", "part-00001.json"}
    same_caches(TeacherCache.open(folder), place.cache(tmp_path / "whole", k=20))


# ------------------------------------------------------------------------------------------------ training from it


def test_the_page_trains_a_student_from_the_folder_alone(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program in docs/cache.md, as it stands there."""
    text = (Path(__file__).parents[1] / "docs" / "cache.md").read_text(encoding="utf-8")
    section = text.split("## From a Hugging Face model")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    place.cache(tmp_path / "CACHE", k=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(program, "docs/cache.md", "exec"), names)
    student = names["student"]

    @torch.no_grad()
    def kl(model: Any) -> float:
        found = []
        for text in TEXTS[:10]:
            y = place.logits("llama", text).log_softmax(-1)
            ids = torch.tensor([place.ids(text)])
            x = model(input_ids=ids).logits[0].double().log_softmax(-1)
            found.append((y.exp() * (y - x)).sum(-1))
        return float(torch.cat(found).mean())

    torch.manual_seed(0)
    fresh = type(student)(student.config).eval()
    assert kl(student.eval()) < 0.6 * kl(fresh)


def student_of(kind: str) -> Any:
    torch.manual_seed(5)
    small = {**SMALL, "hidden_size": 16, "head_dim": 4}
    config = transformers.LlamaConfig(vocab_size=V, **small)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bfloat16"])
@pytest.mark.parametrize("head", ["beside the rows", "given"])
def test_hidden_states_train_as_the_live_teacher(place: Place, tmp_path: Path, kind: str, head: str) -> None:
    """A step from the cache is one with the live teacher, but for the rounding of its states to bfloat16: the same to
    float32 where they are rounded before, too, and near it where they are not."""
    cache = place.cache(tmp_path / "c", kind, kind="hidden")
    teacher = place.models[kind]
    given: Any = None
    if head == "given":
        (tmp_path / "c" / "teacher" / "head.safetensors").unlink()
        with pytest.raises(ValueError, match="holds hidden states, which need the teacher's head: pass teacher_head="):
            Objective(student_of(kind), cache, fused_linear=True)
        softcap = 3.0 if kind == "gemma2" else None
        given = teacher.lm_head if softcap is None else KnownHead(teacher.lm_head.weight, softcap=softcap)
    rows = [place.ids(text) for text in TEXTS[:6]]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in rows]),
    }

    def step(teacher: Any, **more: Any) -> tuple[Tensor, Tensor]:
        student = student_of(kind)
        from_cache = isinstance(teacher, TeacherCache)
        objective = Objective(student, teacher, fused_linear=True, temperature=2.0, hard_weight=0.3, **more)
        loss = objective(student, {**batch, "sample_id": list(range(6))} if from_cache else batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
        return loss.detach().double(), gradient.double()

    loss, gradient = step(cache, teacher_head=given)
    of_live, live_gradient = step(teacher)
    rounded = copy.deepcopy(teacher)
    rounded.model.norm.register_forward_hook(lambda module, inputs, output: output.bfloat16().to(output.dtype))
    of_rounded, rounded_gradient = step(rounded)
    # Batches of other shapes: their products differ by a rounding, which bfloat16 states make one of theirs.
    close = 2e-2 if kind == "bfloat16" else 2e-3
    assert float((gradient - rounded_gradient).norm()) <= close * float(rounded_gradient.norm())
    assert float((gradient - live_gradient).norm()) <= 2e-2 * float(live_gradient.norm())
    assert float((loss - of_rounded).abs()) <= 1e-3 * float(of_rounded)
    assert float((loss - of_live).abs()) <= 1e-2 * float(of_live)
    assert float(live_gradient.norm()) > 0.1


def test_hidden_states_are_evaluated(place: Place, tmp_path: Path) -> None:
    """`Reptile` trains from them, and its metrics see the teacher's logits over all classes."""
    from reptile_ext.training import Reptile

    cache = place.cache(tmp_path / "c", kind="hidden")
    batches = []
    for i, text in enumerate(TEXTS[:8]):
        ids = torch.tensor([place.ids(text)])
        batches.append({"input_ids": ids, "labels": ids.clone(), "sample_id": [i]})
    found = []
    for teacher in (cache, place.models["llama"]):
        data = [{k: v for k, v in b.items() if teacher is cache or k != "sample_id"} for b in batches]
        keywords = {"metrics": ("perplexity", "agreement"), "fused_linear": True, "learning_rate": 1e-2}
        reptile = Reptile(student_of("llama"), teacher, **keywords)
        reptile.fit(data, until=20, progress_bar=False)
        found.append(reptile.evaluate(data))
    for name in ("loss", "perplexity", "agreement"):
        assert found[0][name] == pytest.approx(found[1][name], rel=0.03), name
    assert found[0]["agreement"] > 0.05
    refused = pytest.raises(ValueError, match="of kind 'hidden' is for the loss of hidden states: pass fused_linear=Tr")
    with refused:
        Reptile(student_of("llama"), cache)
    with pytest.raises(ValueError, match="teacher_head is for a cache of kind 'hidden'"):
        Reptile(student_of("llama"), place.models["llama"], teacher_head=torch.zeros(V, 32))
    with pytest.raises(ValueError, match=re.escape(f"must have a weight of {[V, 32]}")):
        Reptile(student_of("llama"), cache, teacher_head=torch.zeros(V, 31), fused_linear=True)
    with pytest.raises(TypeError, match=r"teacher_head must be a torch\.nn\.Linear"):
        Reptile(student_of("llama"), cache, teacher_head=place.models["llama"], fused_linear=True)


def test_a_head_that_is_another_is_refused(place: Place, tmp_path: Path) -> None:
    cache = place.cache(tmp_path / "c", kind="hidden")
    path = tmp_path / "c" / "teacher" / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"head\.safetensors is altered"):
        Objective(student_of("llama"), cache, fused_linear=True)
    path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"head\.safetensors is damaged or cut short"):
        Objective(student_of("llama"), cache, fused_linear=True)
    place.cache(tmp_path / "other", "gemma2", kind="hidden")
    shutil.copy(tmp_path / "other" / "teacher" / "head.safetensors", path)
    with pytest.raises(ValueError, match=r"head\.safetensors is of another teacher"):
        Objective(student_of("llama"), cache, fused_linear=True)


# ------------------------------------------------------------------------------------------------ cache-info


def test_examples_are_decoded(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    place.cache(folder, k=20)
    model = str(place.folder / "llama")
    assert cli.main(["cache-info", str(folder), "--examples", "3", "--tokenizer", model]) == 0
    info = json.loads(capsys.readouterr().out)
    assert len(info["examples"]) == 3
    entropies = []
    for i, text in enumerate(TEXTS):
        log_probs = place.logits("llama", text).log_softmax(-1).topk(20).values
        rest = 1 - log_probs.exp().sum(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1) - rest * rest.log())
        for example in info["examples"]:
            if example["sample_id"] != i:
                continue
            t = example["position"]
            ids = place.ids(text)
            assert example["before"] == place.tokenizer.decode(ids[max(0, t - 39) : t + 1])
            assert example["next"] == place.tokenizer.decode(ids[t + 1 : t + 2])
            first = int(place.logits("llama", text)[t].argmax())
            p, number, word = example["likeliest"][0].split(" ", 2)
            assert (int(number), word) == (first, repr(place.tokenizer.decode([first])))
            assert float(p) == pytest.approx(float(log_probs[t].exp().max()), abs=2e-3)
            assert example["entropy"] == pytest.approx(float(entropies[i][t]), abs=2e-3)
    assert info["mean_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), abs=2e-3)

    assert cli.main(["cache-info", str(folder), "--examples", "1"]) == 0
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    ids = place.ids(TEXTS[example["sample_id"]])
    assert example["before"] == ids[max(0, example["position"] - 39) : example["position"] + 1]

    place.cache(tmp_path / "bare", k=20, save_tokens=False)
    assert not (tmp_path / "bare" / "tokens").exists()
    assert cli.main(["cache-info", str(tmp_path / "bare"), "--examples", "1"]) == 0
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    assert set(example) == {"sample_id", "position", "likeliest", "captured_mass", "entropy"}

    shutil.copytree(place.folder / "llama", tmp_path / "other")
    with (tmp_path / "other" / "tokenizer.json").open("a") as file:
        file.write("\n")
    for argv, words in (
        (["--examples", "1", "--tokenizer", str(tmp_path / "other")], "tokenizer: the cache in "),
        (["--tokenizer", model], "--tokenizer is for --examples N"),
        (["--examples", "-1"], "--examples must be at least 0; got -1"),
    ):
        assert cli.main(["cache-info", str(folder), *argv]) == 2
        assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ bad input


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """What is said of a command line that must fail, in one line."""
    capsys.readouterr()
    assert cli.main(["cache-teacher", *map(str, argv)]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("reptile cache-teacher: ")
    assert len(said.splitlines()) == 1
    return said.removeprefix("reptile cache-teacher: ").rstrip("\n")


def test_bad_files(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"
    model = place.folder / "llama"
    files = {
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "nothing.jsonl": '{"text": ""}\n{"text": null}\n',
        "bad.jsonl": '{"text": "one"}\n{"text": two}\n',
        "cut.jsonl": '{"text": "one"}\n{"text": "tw',
        "number.jsonl": '{"text": "one"}\n{"text": 2}\n',
        "columns.jsonl": '{"body": "one", "title": "two"}\n',
        "twice.jsonl": '{"text": "one", "id": "a"}\n{"text": "two", "id": "a"}\n',
        "mixed.jsonl": '{"text": "one", "id": "a"}\n{"text": "two", "id": 3}\n',
        "part.jsonl": '{"text": "one", "id": 0.5}\n',
        "junk.parquet": "junk",
        "table.csv": "text\none\n",
        "plain.txt": "one\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with gzip.open(tmp_path / "whole.jsonl.gz", "wt") as file:
        file.write(place.file.read_text())
    (tmp_path / "short.jsonl.gz").write_bytes((tmp_path / "whole.jsonl.gz").read_bytes()[:-60])
    for name, flags, words in (
        ("none.jsonl", "", f"files must be files; there is no file {tmp_path}/none.jsonl"),
        ("empty.jsonl", "", f"{tmp_path}/empty.jsonl is empty"),
        ("blank.jsonl", "", "files must hold at least one text; got 0 empty ones in "),
        ("nothing.jsonl", "", "files must hold at least one text; got 2 empty ones in "),
        ("bad.jsonl", "", f"{tmp_path}/bad.jsonl, line 2: wanted one JSON object a line; "),
        ("cut.jsonl", "", f"{tmp_path}/cut.jsonl, line 2: wanted one JSON object a line; "),
        ("number.jsonl", "", f"{tmp_path}/number.jsonl, record 2: wanted text in 'text'; got int 2"),
        ("columns.jsonl", "", f"text_column must say which column of {tmp_path}/columns.jsonl has the texts: body, "),
        ("columns.jsonl", "--text-column boby", "no column 'boby', but body, title; did you mean body?"),
        ("columns.jsonl", "--text-column body --id-column titel", "no column 'titel', but body, title; did you mean t"),
        ("twice.jsonl", "--id-column id", f"record 2: id 'a' is that of {tmp_path}/twice.jsonl, record 1, too"),
        ("mixed.jsonl", "--id-column id", "record 2: ids must all be numbers or all strings; got 'a' and 3"),
        ("part.jsonl", "--id-column id", "record 1: 'id' must be a string or an integer; got float 0.5"),
        ("junk.parquet", "", f"{tmp_path}/junk.parquet cannot be read as parquet: "),
        ("table.csv", "", "files must end in .jsonl, "),
        ("latin.txt", "", f"{tmp_path}/latin.txt cannot be read as text: UnicodeDecodeError: "),
        ("short.jsonl.gz", "", f"{tmp_path}/short.jsonl.gz is damaged or cut short after line "),
        ("plain.txt", "--text-column text", "text_column has no meaning for plain text"),
        (
            "plain.txt",
            "--sample-by lines",
            "sample_by must be one of 'line', 'paragraph', 'document'; got 'lines'; did you mean line?",
        ),
        ("columns.jsonl", "--sample-by line", "sample_by is for plain text; got "),
    ):
        said = refused(capsys, model, tmp_path / name, *flags.split(), "--out", out)
        assert words in said, name
    assert "files must differ; got " in refused(capsys, model, place.file, place.file, "--out", out)
    assert not out.exists()


def test_bad_models(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c"

    def changed(name: str, source: str = "llama") -> Path:
        return Path(shutil.copytree(place.folder / source, tmp_path / name))

    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    (changed("no-tokenizer") / "tokenizer.json").unlink()
    (changed("no-weights") / "model.safetensors").unlink()
    folder = changed("pickle")
    (folder / "model.safetensors").unlink()
    torch.save(place.models["llama"].state_dict(), folder / "pytorch_model.bin")
    weights = changed("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (changed("no-json") / "config.json").write_text("{")
    (changed("unknown") / "config.json").write_text('{"model_type": "nothing-of-the-kind"}')
    own = changed("own-code")
    (own / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (own / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\n")
    small = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    bert = transformers.BertConfig(num_hidden_layers=2, max_position_embeddings=CONTEXT, **small)
    made = {
        "bert": transformers.BertLMHeadModel(bert),
        "filler": transformers.BertForMaskedLM(bert),
        "classifier": transformers.LlamaForSequenceClassification(transformers.LlamaConfig(vocab_size=V, **SMALL)),
        "headless": transformers.LlamaModel(transformers.LlamaConfig(vocab_size=V, **SMALL)),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=V, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        place.tokenizer.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]  # which its weights are not
    (changed("no-head") / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "headless" / "model.safetensors", tmp_path / "no-head")
    torch.manual_seed(0)
    few = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V - 300, **SMALL))
    few.save_pretrained(tmp_path / "few")
    place.tokenizer.save_pretrained(tmp_path / "few")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    nan = changed("nan")
    broken = copy.deepcopy(place.models["llama"])
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    broken.save_pretrained(nan)

    for name, flags, words in (
        ("nothing", "", f"model must be a folder as save_pretrained writes it; {tmp_path}/nothing has no config.json"),
        ("adapter", "", "has no config.json (an adapter: merge it into its model, and save that)"),
        ("file", "", f"model must be a folder as save_pretrained writes it, or a name on the hub; got {tmp_path}/file"),
        ("no-tokenizer", "", "tokenizer must be a folder with a tokenizer.json, or that file; got "),
        ("no-weights", "", f"model: {tmp_path}/no-weights has no weights, model.safetensors"),
        ("pickle", "", "pytorch_model.bin can run code when it is read: allow_pickle reads it"),
        ("cut", "", f"model: transformers cannot load {tmp_path}/cut: "),
        ("no-json", "", f"model: transformers cannot read {tmp_path}/no-json/config.json: "),
        ("unknown", "", f"model: transformers cannot read {tmp_path}/unknown/config.json: "),
        ("own-code", "", f"model: transformers cannot read {tmp_path}/own-code/config.json: "),
        ("bert", "", "(BertLMHeadModel) later tokens change what is said of earlier ones"),
        ("filler", "", f"model must be a causal language model; {tmp_path}/filler is a BertForMaskedLM"),
        ("classifier", "", "is a LlamaForSequenceClassification"),
        ("headless", "", "is a LlamaModel"),
        ("t5", "", "is a T5ForConditionalGeneration"),
        ("no-head", "", "1 parameters are missing in the weights of"),
        ("few", "", "and the model has 100 of them: is it another model's?"),
        ("nan", "", "what the model says are no numbers, computed in torch.float32"),
        ("../place/llama", "--k 401", "k must be at most the model's number of classes, 400; got 401"),
        ("../place/llama", "--k 0", "k must be from 1 to 4096; got 0"),
        ("../place/llama", "--k many", "argument --k: invalid int value: 'many'"),
        (
            "../place/llama",
            "--kind topk",
            "kind must be one of 'top_k', 'sampled', 'hidden'; got 'topk'; did you mean top_k?",
        ),
        ("../place/llama", "--kind hidden --k 3", "k has no meaning for kind='hidden'"),
        ("../place/llama", "--kind hidden --temperature 2", "temperature has no meaning for kind='hidden'"),
        ("../place/llama", "--seed 3", "seed is for kind='sampled'; got it with 'top_k'"),
        ("../place/llama", "--temperature 0", "temperature must be a positive number; got 0"),
        ("../place/llama", "--max-kl 2", "max_kl must be a number of nats from 1e-6 to 1; got 2"),
        ("../place/llama", "--max-length 49", "max_length must be at most the model's context, 48; got 49"),
        ("../place/llama", "--max-length 0", "max_length must be at least 1; got 0"),
        ("../place/llama", "--batch-tokens 0", "batch_tokens must be at least 1; got 0"),
        (
            "../place/llama",
            "--dtype float8",
            "dtype must be one of 'auto', 'float32', 'bfloat16', 'float16'; got 'float8'",
        ),
        ("../place/llama", "--device tpu9", "device must be one that torch has here, such as cpu or cuda; got 'tpu9'"),
        (
            "../place/llama",
            "--tokenizer nowhere",
            "tokenizer must be a folder with a tokenizer.json, or that file; got",
        ),
        ("../place/llama", "--sedd 3", "unrecognized arguments: --sedd 3; did you mean --seed?"),
    ):
        model = place.folder / "llama" if name.startswith("..") else tmp_path / name
        said = refused(capsys, model, place.file, *flags.split(), "--out", out)
        assert words in said, (name, flags)
        assert out.exists() == (name in ("few", "nan"))  # what only the texts show is found when they are read
        assert not list(out.glob("rows-*"))
        shutil.rmtree(out, ignore_errors=True)
    assert not (tmp_path / "executed").exists()
    assert (
        cli.main(["cache-teacher", str(tmp_path / "pickle"), str(place.file), "--allow-pickle", "--out", str(out)]) == 0
    )


def test_bad_commands(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reptile_ext.training.recipes import NAMES

    assert NAMES == cli._RECIPES
    monkeypatch.chdir(tmp_path)
    out, model = tmp_path / "c", place.folder / "llama"
    assert refused(capsys, model) == f"a model needs files of texts, MODEL FILE …; got {model} alone"
    assert "got 'code-ml'; did you mean code-lm?" in refused(capsys, "code-ml")
    said = refused(capsys, model, place.file, "--out", "a", "--resume", "b")
    assert said == "--out and --resume are both folders to write to: give one"
    argv = [model, place.file, "--out", out, "--k", "5"]
    assert cli.main(["cache-teacher", *map(str, argv)]) == 0
    capsys.readouterr()
    said = refused(capsys, *argv)
    assert said == f"folder: {out} already holds a cache: go on with it by resume, or choose another folder"
    for flags, words in (
        ("--k 6", f"k: the cache in {out} was begun with 5; got 6: leave it out to go on, or choose another folder"),
        ("--kind sampled", f"kind: the cache in {out} was begun with 'top_k'; got 'sampled'"),
        ("--max-length 20", f"max_length: the cache in {out} was begun with None; got 20"),
        ("--no-save-tokens", f"save_tokens: the cache in {out} was begun with True; got False"),
        ("--dtype float32", f"dtype: the cache in {out} was begun with 'auto'; got 'float32'"),
    ):
        assert words in refused(capsys, "--resume", out, *flags.split())
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other"}))
    assert "data: the cache in " in refused(capsys, model, "other.jsonl", "--resume", out)
    assert "teacher: the cache in " in refused(capsys, place.folder / "gemma2", place.file, "--resume", out)
    assert cli.main(["cache-teacher", str(model), str(place.file), "--resume", str(out), "--k", "5"]) == 0
    capsys.readouterr()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    said = refused(capsys, model, place.file, "--out", "mine")
    assert said == f"folder must be empty or hold a teacher cache; {tmp_path}/mine holds thesis.tex"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["thesis.tex"]
    assert "--resume must be the run folder of a `reptile cache-teacher`" in refused(capsys, "--resume", "mine")
    (out / "teacher" / "model.json").write_text("{")
    assert f"{out}/teacher/model.json is altered or truncated: " in refused(capsys, "--resume", out)


@pytest.mark.parametrize("package", ["datasets", "transformers", "tokenizers"])
def test_missing_packages_are_named(place: Place, tmp_path: Path, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from reptile_ext import cli; sys.exit(cli.main(sys.argv[1:]))"
    argv = ["cache-teacher", str(place.folder / "llama"), str(place.file), "--out", str(tmp_path / "c")]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'reptile_ext[cache]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_a_name_that_the_hub_does_not_give(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the hub is weights in safetensors, configuration and tokenizer; what it says is passed on."""
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def download(name: str, **keywords: Any) -> str:
        asked.append({"name": name, **keywords})
        if name == "nobody/none":
            raise OSError("cannot reach the hub\nmore of it")
        return str(place.folder / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refused(capsys, "nobody/none", place.file, "--out", tmp_path / "c")
    assert said == "model: there is no folder nobody/none, and the hub does not give it: cannot reach the hub"
    assert cli.main(["cache-teacher", "some/model", str(place.file), "--out", str(tmp_path / "c"), "--k", "5"]) == 0
    assert asked[-1]["name"] == "some/model"
    assert "*.safetensors" in asked[-1]["allow_patterns"]
    assert not [pattern for pattern in asked[-1]["allow_patterns"] if "bin" in pattern or "py" in pattern]
