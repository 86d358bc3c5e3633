"""`reptile cache-import`: from what servers and data sets write comes the cache that the teacher would have written.

The files are made here, in the structures that docs/cache.md lists, from a small language model that has learned a few
sentences.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reptile_ext import TeacherCache, cli
from reptile_ext.cache import import_rows

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `cache`")

K = 6
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a lazy fox and the brown dog",
    "over the fox jumps a quick dog",
]
WIDE = "naïve 中文字 café"  # tokens that are pieces of characters


class Teacher:
    """A byte-level tokenizer, and a GRU that has read the texts often enough to know what follows."""

    def __init__(self, folder: Path) -> None:
        t = tokenizers.Tokenizer(tokenizers.models.BPE())
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        t.train_from_iterator(TEXTS, trainer)
        t.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        self.folder = folder / "tokenizer"
        self.folder.mkdir()
        t.save(str(self.folder / "tokenizer.json"))
        self.tokenizer, self.V = t, t.get_vocab_size()
        torch.manual_seed(3)
        self.net = torch.nn.ModuleList(
            [torch.nn.Embedding(self.V, 32), torch.nn.GRU(32, 32, batch_first=True), torch.nn.Linear(32, self.V)]
        )
        optimizer = torch.optim.Adam(self.net.parameters(), 0.02)
        for _ in range(40):
            for text in TEXTS:
                ids = torch.tensor(t.encode(text).ids)
                loss = torch.nn.functional.cross_entropy(self.logits(ids)[:-1], ids[1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        embedding, gru, head = self.net
        return head(gru(embedding(ids)[None])[0][0])

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.logits(torch.tensor(ids)).log_softmax(-1)  # [T, V]

    def text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def bytes(self, token: int) -> list[int]:
        shown = self.tokenizer.id_to_token(token)
        return list(self.text(token).encode()) if "\ufffd" not in self.text(token) else [BYTES[c] for c in shown]


_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PLAIN)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Teacher(tmp_path_factory.mktemp("teacher"))
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------- what the servers would say


def listed(teacher: Teacher, row: torch.Tensor, token: int, k: int = K) -> dict[str, Any]:
    """vLLM's entry of a position: the token that came, then the most probable, with their ranks."""
    top = row.topk(k).indices.tolist()
    ranks = {token: int((row > row[token]).sum()) + 1} | {t: n for n, t in enumerate(top, 1)}
    return {
        str(t): {"logprob": row[t].item(), "rank": rank, "decoded_token": teacher.text(t)} for t, rank in ranks.items()
    }


def prompt_logprobs(teacher: Teacher, ids: list[int]) -> list[Any]:
    rows = teacher.log_probs(ids)
    return [None, *(listed(teacher, rows[i - 1], ids[i]) for i in range(1, len(ids)))]


def content(teacher: Teacher, prompt: list[int], answer: list[int], name: Callable[[int], Any]) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""
    rows = teacher.log_probs([*prompt, *answer])[len(prompt) - 1 :]
    return {
        "content": [
            {
                **name(token),
                "logprob": row[token].item(),
                "top_logprobs": [{**name(t), "logprob": row[t].item()} for t in row.topk(K).indices.tolist()],
            }
            for token, row in zip(answer, rows, strict=False)
        ]
    }


def echoed(teacher: Teacher, ids: list[int], name: Callable[[int], str], begin: int = 0) -> dict[str, Any]:
    """`logprobs` of /v1/completions, with echo from the first token on."""
    rows = teacher.log_probs(ids)
    result: dict[str, list[Any]] = {"tokens": [name(t) for t in ids[begin:]], "token_logprobs": [], "top_logprobs": []}
    for i in range(begin, len(ids)):
        row = rows[i - 1]
        result["token_logprobs"].append(row[ids[i]].item() if i else None)
        result["top_logprobs"].append({name(t): row[t].item() for t in row.topk(K).indices.tolist()} if i else None)
    return result


def by_id(token: int) -> str:
    return f"token_id:{token}"


def split(ids: list[int]) -> tuple[list[int], list[int]]:
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def completions(t: Teacher, ids: list[int]) -> Any:
    return {"choices": [{"text": "!", "prompt_token_ids": ids, "prompt_logprobs": prompt_logprobs(t, ids)}]}


def chat(t: Teacher, ids: list[int]) -> Any:
    prompt, answer = split(ids)
    name = lambda token: {"token": by_id(token), "bytes": list(by_id(token).encode())}  # noqa: E731
    choice = {"index": 0, "logprobs": content(t, prompt, answer, name), "token_ids": answer}
    return {"prompt_logprobs": prompt_logprobs(t, prompt), "prompt_token_ids": prompt, "choices": [choice]}


def batch(t: Teacher, ids: list[int]) -> Any:
    body = {"prompt_logprobs": prompt_logprobs(t, ids), "prompt_token_ids": ids, "choices": [{}]}
    return {"custom_id": "x", "response": {"status_code": 200, "body": body}, "error": None}


def dump(t: Teacher, ids: list[int]) -> Any:
    prompt, answer = split(ids)
    rows = t.log_probs(ids)[len(prompt) - 1 :]
    logprobs = [listed(t, row, token) for row, token in zip(rows, answer, strict=False)]
    outputs = [{"index": 0, "token_ids": answer, "logprobs": logprobs}]
    return {"prompt_token_ids": prompt, "prompt_logprobs": prompt_logprobs(t, prompt), "outputs": outputs}


def echo(t: Teacher, ids: list[int]) -> Any:
    return {"choices": [{"logprobs": echoed(t, ids, t.text)}]}


def echo_beside_the_prompt(t: Teacher, ids: list[int]) -> Any:
    prompt = ids[:3]
    choice = {"logprobs": echoed(t, ids, by_id), "prompt_logprobs": prompt_logprobs(t, prompt), "token_ids": ids[3:]}
    return {"choices": [choice]}


def sglang(t: Teacher, ids: list[int]) -> Any:
    prompt, _ = split(ids)
    rows = t.log_probs(ids)
    own = [[rows[i - 1][ids[i]].item() if i else None, ids[i], None] for i in range(len(ids))]
    top = [[[rows[i - 1][n].item(), n, None] for n in rows[i - 1].topk(K).indices.tolist()] for i in range(len(ids))]
    n = len(prompt)
    meta = {
        "prompt_tokens": n,
        "input_token_logprobs": own[:n],
        "input_top_logprobs": [None, *top[1:n]],
        "output_token_logprobs": own[n:],
        "output_top_logprobs": top[n:],
    }
    return {"text": "!", "meta_info": meta}


def columns(t: Teacher, ids: list[int]) -> Any:
    values, indices = t.log_probs(ids)[:-1].topk(K)
    return {"input_ids": ids, "target_token_ids": indices.tolist(), "target_logprobs": values.tolist()}


def axolotl(t: Teacher, ids: list[int]) -> Any:
    """Prepared by axolotl: a row for each token itself, the first one padding."""
    row = columns(t, ids)
    row["target_token_ids"].insert(0, list(range(K)))
    row["target_logprobs"].insert(0, [-float("inf")] * K)
    return row


def axolotl_raw(t: Teacher, ids: list[int]) -> Any:
    row = columns(t, ids)
    pairs = zip(row["target_token_ids"], row["target_logprobs"], strict=True)
    return {"input_ids": ids, "logprobs": [[{"token": by_id(i), "logprob": x} for i, x in zip(*p)] for p in pairs]}  # noqa: B905


def trl(t: Teacher, ids: list[int]) -> Any:
    rows, n = columns(t, ids), len(ids) // 2
    own = t.log_probs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).tolist()
    return {
        "input_ids": ids,
        "logprob_token_ids": rows["target_token_ids"][n - 1 :],
        "logprobs": rows["target_logprobs"][n - 1 :],
        "actual_logprobs": own[n - 1 :],
        "actual_token_ids": [[i] for i in ids[n:]],
    }


TRL = {"format": "columns", "align": "last", "ids": "logprob_token_ids", "log_probs": "logprobs"}
CASES: dict[str, tuple[Callable[[Teacher, list[int]], Any], dict[str, Any]]] = {
    "completions": (completions, {}),
    "chat": (chat, {}),
    "batch": (batch, {}),
    "dump": (dump, {}),
    "echo": (echo, {}),
    "echo beside prompt_logprobs": (echo_beside_the_prompt, {}),
    "sglang": (sglang, {}),
    "columns of the next": (columns, {"format": "columns", "align": "next"}),
    "axolotl, prepared": (axolotl, {"format": "columns", "align": "own"}),
    "axolotl, raw": (axolotl_raw, {"format": "columns", "align": "last", "log_probs": "logprobs"}),
    "trl": (trl, TRL),
}


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="needs the extra `cache`")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
        return path
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def of_the_teacher(teacher: Teacher, folder: Path, sequences: list[list[int]], begin: int = 0) -> TeacherCache:
    """The cache that the teacher writes itself: its top K after each token but the last."""
    with TeacherCache.write(folder, vocab_size=teacher.V, k=K, max_kl=1e-5) as writer:
        for n, ids in enumerate(sequences, 1):
            values, indices = teacher.log_probs(ids).topk(K)
            none = torch.ones(len(ids), dtype=torch.bool)
            none[len(ids) // 2 - 1 if begin else 0 : -1] = False
            indices[none], values[none] = -1, -torch.inf
            writer.add(n, indices, values)
    return TeacherCache.open(folder)


def same(one: TeacherCache, other: TeacherCache) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert torch.equal(one[name][0], other[name][0]), name
        # Of a prefix the teacher's sums are added up in another order.
        torch.testing.assert_close(one[name][1], other[name][1], atol=0.01, rtol=0)


SUFFIXES = [
    (case, suffix) for case in CASES for suffix in (".jsonl", ".parquet") if suffix == ".jsonl" or CASES[case][1]
]


@pytest.mark.parametrize(("case", "suffix"), [("completions", ".jsonl.gz"), *SUFFIXES])
def test_the_cache_of_each_format_is_the_teachers_own(case: str, suffix: str, teacher: Teacher, tmp_path: Path) -> None:
    make, options = CASES[case]
    sequences = [teacher.tokenizer.encode(text).ids for text in TEXTS]
    file = write(tmp_path / f"rows{suffix}", [make(teacher, ids) for ids in sequences])
    found = import_rows(
        tmp_path / "cache", file, k=K, vocab_size=teacher.V, tokenizer=teacher.folder, max_kl=1e-5, **options
    )
    half = case == "trl"
    wanted = of_the_teacher(teacher, tmp_path / "wanted", sequences, begin=half)
    same(TeacherCache.open(tmp_path / "cache"), wanted)
    tokens = sum(map(len, sequences))
    assert (found["tokens"], found["samples"], found["most_entries"]) == (tokens, 3, K)
    mass = torch.cat([wanted[n][1].exp().sum(-1) for n in wanted])
    assert found["rows"] == int((mass > 0).sum()) == sum(found["captured_mass"]["rows"].values())
    assert found["captured_mass"]["least"] == pytest.approx(mass[mass > 0].min().item(), abs=1e-3)
    if not half:  # which has few rows
        assert found["next_token_listed"] > 0.7


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(teacher: Teacher, tmp_path: Path, record: Any, *words: str, before: Any = None, **options: Any) -> str:
    """Import one good record and then this one; the error names the file, the line and each of `words`."""
    good = completions(teacher, teacher.tokenizer.encode(TEXTS[0]).ids) if before is None else before
    file = write(tmp_path / "rows.jsonl", [good, record])
    options = {"vocab_size": teacher.V, **options}
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: ") as error:
        import_rows(tmp_path / f"cache {len(list(tmp_path.iterdir()))}", file, k=K, **options)
    said = str(error.value)
    for word in ("1 samples are kept", "resume", *words):
        assert word in said, said
    return said


def test_misaligned_tokens_are_refused_by_file_line_and_position(teacher: Teacher, tmp_path: Path) -> None:
    """ms-swift #9671: log-probabilities of one tokenization used with the tokens of another."""
    ids = teacher.tokenizer.encode(TEXTS[1]).ids
    other = [*ids[:4], next(t for t in range(teacher.V) if t not in ids), *ids[5:]]
    record = completions(teacher, ids)
    record["choices"][0]["prompt_token_ids"] = other
    refused(teacher, tmp_path, record, "position 4", f"wanted prompt_logprobs[4] to list the token there, {other[4]}")

    record = completions(teacher, ids)
    record["choices"][0]["prompt_logprobs"].pop()
    refused(teacher, tmp_path, record, f"wanted prompt_logprobs for the prompt's {len(ids)} tokens; got {len(ids) - 1}")
    record["choices"][0]["prompt_logprobs"] = [*prompt_logprobs(teacher, ids)[1:], {"1": {"logprob": -1.0}}]
    refused(teacher, tmp_path, record, "wanted null for the first token")

    # Of another tokenizer, by the text of the ids; and the text of the record, by its ids.
    record = completions(teacher, ids)
    record["choices"][0]["prompt_logprobs"][2][str(ids[2])]["decoded_token"] = "zebra"
    refused(teacher, tmp_path, record, "position 2", "'zebra'", tokenizer=teacher.folder)
    record = {**completions(teacher, ids), "prompt": TEXTS[2]}
    good = {**completions(teacher, ids), "prompt": TEXTS[1]}
    refused(teacher, tmp_path, record, "position", "of prompt", before=good, tokenizer=teacher.folder, text="prompt")

    # TRL's and SGLang's own tokens, and log-probabilities that are those of a neighbour.
    row = trl(teacher, ids)
    row["actual_token_ids"][1] = [ids[0]]
    refused(teacher, tmp_path, row, "position 1", f"got {ids[0]}", before=trl(teacher, ids), **TRL)
    row = trl(teacher, ids)
    row["logprobs"].insert(0, row["logprobs"].pop())
    row["logprob_token_ids"].insert(0, row["logprob_token_ids"].pop())
    refused(teacher, tmp_path, row, "is the list of another position?", before=trl(teacher, ids), **TRL)
    row = sglang(teacher, ids)
    row["meta_info"]["input_token_logprobs"][2][1] = 5
    good = {**sglang(teacher, ids), "ids": split(ids)[0]}
    refused(teacher, tmp_path, {**row, "ids": split(ids)[0]}, "position 2", "got 5", before=good, tokens="ids")
    row["meta_info"]["input_token_logprobs"].pop(0)
    row["meta_info"]["input_top_logprobs"].pop(0)
    refused(teacher, tmp_path, row, "logprob_start_len=0", before=sglang(teacher, ids))


def late(t: Teacher, ids: list[int]) -> Any:
    """Each row one place before its own."""
    row = columns(t, ids)
    return row | {key: [*row[key][1:], None] for key in ("target_token_ids", "target_logprobs")}


def test_rows_of_the_wrong_token_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    """Where a format has no convention one has to be given, and a wrong one shows by where the next tokens are."""
    sequences = [teacher.tokenizer.encode(text).ids for text in TEXTS] * 8
    for number, (make, words) in enumerate(
        ((axolotl, "hold the token of the row itself"), (late, "hold the one after"))
    ):
        file = write(tmp_path / f"{number}.jsonl", [make(teacher, ids) for ids in sequences])
        with pytest.raises(
            ValueError,
            match=f"the rows are of other tokens: of .*{words}.*: wanted another align.*such samples: delete it",
        ):
            import_rows(tmp_path / f"{number}", file, k=2, vocab_size=teacher.V, format="columns", align="next")
        with pytest.raises(ValueError, match="finished"):
            TeacherCache.open(tmp_path / f"{number}")
    with pytest.raises(ValueError, match="align must be given with format='columns'"):
        import_rows(tmp_path / "x", file, k=K, vocab_size=teacher.V, format="columns")
    with pytest.raises(ValueError, match="align has no meaning"):
        import_rows(tmp_path / "x", file, k=K, vocab_size=teacher.V, align="own")
    row = columns(teacher, sequences[0])
    row["target_token_ids"].append(row["target_token_ids"][0])
    row["target_logprobs"].append(row["target_logprobs"][0])
    refused(
        teacher, tmp_path, row, "nothing comes before the first", before=axolotl(teacher, sequences[0]),
        format="columns", align="own",
    )  # fmt: skip


def test_what_cannot_be_a_distribution_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    ids = teacher.tokenizer.encode(TEXTS[0]).ids
    good = columns(teacher, ids)

    def altered(key: str, values: list[Any]) -> dict[str, Any]:
        row = json.loads(json.dumps(good))
        row[key][3][: len(values)] = values
        return row

    logs, tokens = "target_logprobs", "target_token_ids"
    for row, words in (
        (altered(tokens, [teacher.V]), f"position 3: wanted token ids below vocab_size={teacher.V}; got {teacher.V}"),
        (altered(tokens, [-2]), "position 3: wanted token ids below"),
        (altered(tokens, [7, 7]), "position 3: wanted different tokens in a row; got 7"),
        (altered(tokens, [1.5]), "position 3: wanted integers as ids; got 1.5"),
        (altered(tokens, ["4"]), "position 3: wanted integers as ids; got '4'"),
        (altered(logs, [0.5]), "position 3: wanted logarithms of probabilities, at most 0; got 0.5"),
        (altered(logs, [float("nan")]), "position 3: wanted logarithms of probabilities, at most 0; got nan"),
        (altered(logs, [None]), "position 3: wanted log-probabilities; got None"),
        (altered(logs, [-0.1, -0.2, -0.3]), "position 3: wanted probabilities that add up to 1 at most; got 2.4"),
        (altered(logs, [-1.0] * (K + 1)), "target_token_ids[3] and target_logprobs[3] to be lists of one length"),
        ({**good, tokens: good[tokens][:2]}, "of one length; got 2 and"),
        ({**good, "input_ids": ids[:3]}, "rows of target_logprobs for 3 tokens"),
        ({"input_ids": ids}, "wanted a key 'target_logprobs'; got input_ids"),
        ([1], "wanted one JSON object a line; got list"),
    ):
        refused(teacher, tmp_path, row, words, before=good, format="columns", align="next")

    log10 = columns(teacher, ids)
    log10[logs] = (np.array(log10[logs]) / np.log(10)).tolist()
    refused(teacher, tmp_path, log10, "neither logits nor log10", before=good, format="columns", align="next")


def test_what_a_server_may_say_wrong_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    ids = teacher.tokenizer.encode(TEXTS[0]).ids
    two = dump(teacher, ids)
    two["outputs"] *= 2
    alone = chat(teacher, ids)
    del alone["prompt_token_ids"], alone["prompt_logprobs"]
    hole = sglang(teacher, ids)
    hole["meta_info"]["input_top_logprobs"][1] = None
    unnamed = completions(teacher, ids)
    del unnamed["choices"][0]["prompt_token_ids"]
    broken = dump(teacher, ids)
    broken["outputs"][0]["logprobs"][1] = {"1": {"rank": 3}}
    for record, words in (
        ({"error": {"message": "too long"}}, "the server answered with an error: {'message': 'too long'}"),
        ({"response": {"status_code": 500, "body": {}}}, "the server answered with status 500"),
        ({"choices": [{"text": "!"}]}, "wanted log-probabilities: prompt_logprobs, or logprobs of what was generated"),
        (two, "one choice; got 2"),
        (alone, "wanted the prompt, at whose end the answer begins"),
        (unnamed, "wanted the prompt's ids beside prompt_logprobs"),
        (hole, "wanted log-probabilities for each token; got null for 1"),
        (broken, "wanted logprobs[1] to be ids with log-probabilities"),
        ({"prompt_logprobs": [None], "choices": 3}, "one choice; got int"),
        ({"choices": [{"logprobs": {"content": [{}]}}]}, "wanted logprobs.content[0].top_logprobs to be a list"),
    ):
        refused(teacher, tmp_path, record, words)
    (tmp_path / "rows.jsonl").write_bytes(b'{"choices": [{"te')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: wanted one JSON object a line; .*ends within this line"):
        import_rows(tmp_path / "new", tmp_path / "rows.jsonl", k=K, vocab_size=teacher.V)
    whole = write(tmp_path / "rows.jsonl.gz", [completions(teacher, ids)]).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is damaged or cut short|ends within"):
        import_rows(tmp_path / "new", tmp_path / "rows.jsonl.gz", k=K, vocab_size=teacher.V)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 is not enough")
    pytest.importorskip("pyarrow", reason="needs the extra `cache`")
    with pytest.raises(ValueError, match=r"rows.parquet is damaged or no Parquet file"):
        import_rows(tmp_path / "new", tmp_path / "rows.parquet", k=K, vocab_size=teacher.V)
    assert not (tmp_path / "new").exists()  # nothing was right yet


# --------------------------------------------------------------------------------------------------- what is kept of it


def test_entries_beyond_the_top_k(teacher: Teacher, tmp_path: Path) -> None:
    """vLLM lists the token that came too: K are kept whether K is what it was asked for, less or more."""
    ids = teacher.tokenizer.encode(WIDE).ids  # a text that it has not read: what comes is seldom listed
    record = completions(teacher, ids)
    ranks = [next(iter(entries.values()))["rank"] for entries in record["choices"][0]["prompt_logprobs"][1:]]
    assert sum(rank > K for rank in ranks) > len(ids) // 2
    file = write(tmp_path / "rows.jsonl", [record])
    rows = teacher.log_probs(ids)
    for k in (K - 2, K, K + 3):
        found = import_rows(tmp_path / str(k), file, k=k, vocab_size=teacher.V)
        indices, log_probs = TeacherCache.open(tmp_path / str(k))[1]
        kept_of_all = [min(k, K + (rank == K + 1)) for rank in ranks]  # who is next in rank may as well stay
        for row, kept, some, values in zip(rows[:-1], kept_of_all, indices, log_probs, strict=False):
            assert set(some[some >= 0].tolist()) == set(row.topk(kept).indices.tolist())
            assert (some[kept:] == -1).all()
            assert (values[kept:] == -torch.inf).all()
        assert found["entries_beyond_top_k"] == sum(rank > K + 1 for rank in ranks)
        assert found["entries_cut"] == sum(K + (rank == K + 1) for rank in ranks) - sum(kept_of_all)
        assert found["rows_with_fewer_than_k"] == (len(ids) - 1 if k > K else 0)


def test_minus_infinity_as_servers_write_it(teacher: Teacher, tmp_path: Path) -> None:
    ids = teacher.tokenizer.encode(TEXTS[0]).ids
    row = columns(teacher, ids)
    row["target_logprobs"][2][3:] = [-9999.0, -1e9, -float("inf")]
    row["target_token_ids"][2][3:] = [0, 0, -1]  # padding, as some write it: an id again, or none
    row["target_token_ids"][4], row["target_logprobs"][4] = None, None
    file = write(tmp_path / "rows.jsonl", [row])
    found = import_rows(tmp_path / "cache", file, k=K, vocab_size=teacher.V, format="columns", align="next")
    indices, log_probs = TeacherCache.open(tmp_path / "cache")[1]
    assert sorted(indices[2, :3].tolist()) == sorted(row["target_token_ids"][2][:3])
    assert (log_probs[2, 3:] == -torch.inf).all()
    for padded in (indices[2, 3:], indices[4], indices[-1]):
        assert (padded == -1).all()
    assert found["rows_without_teacher"] == 2


@pytest.mark.parametrize("known", ["ids", "text", "usage"])
def test_an_answer_whose_prompt_has_no_log_probabilities(known: str, teacher: Teacher, tmp_path: Path) -> None:
    """Its rows stand at the prompt's last token and after it; the others have none. Strings become ids by bytes."""
    prompt, answer = teacher.tokenizer.encode(TEXTS[0]).ids, teacher.tokenizer.encode(" " + WIDE).ids[1:]
    name = lambda token: {"token": teacher.text(token), "bytes": teacher.bytes(token)}  # noqa: E731
    record = {"choices": [{"logprobs": content(teacher, prompt, answer, name)}]}
    record |= {
        "ids": {"prompt_token_ids": prompt},
        "text": {"asked": {"prompt": TEXTS[0]}, "usage": {"prompt_tokens": len(prompt)}},
        "usage": {"usage": {"prompt_tokens": len(prompt)}},
    }[known]  # fmt: skip
    options = {"text": "asked.prompt"} if known == "text" else {}
    file = write(tmp_path / "rows.jsonl", [record])
    import_rows(tmp_path / "cache", file, k=K, vocab_size=teacher.V, tokenizer=teacher.folder, **options)
    indices, _ = TeacherCache.open(tmp_path / "cache")[1]
    rows = teacher.log_probs([*prompt, *answer])
    assert len(indices) == len(rows)
    for t in range(len(rows)):
        has = len(prompt) - 1 <= t < len(rows) - 1
        assert sorted(indices[t].tolist()) == (sorted(rows[t].topk(K).indices.tolist()) if has else [-1] * K), t


def test_strings_that_name_no_token_or_two(teacher: Teacher, tmp_path: Path) -> None:
    ids = teacher.tokenizer.encode(TEXTS[0]).ids
    good = echo(teacher, ids)
    for text, words in (
        ("\ufffd", "is the text of many tokens, pieces of characters: ask the server for ids"),
        ("zebra crossing", "is no token of the tokenizer"),
        ("", "is no token of the tokenizer"),
    ):
        record = echo(teacher, ids)
        record["choices"][0]["logprobs"]["tokens"][2] = text
        said = refused(teacher, tmp_path, record, words, before=good, tokenizer=teacher.folder)
        assert "logprobs.tokens[2]" in said
    file = write(tmp_path / "rows.jsonl", [good])
    with pytest.raises(ValueError, match=r"the file has strings for tokens .*: give the tokenizer, or ask the server"):
        import_rows(tmp_path / "new", file, k=K, vocab_size=teacher.V)
    # Two tokens with the same bytes, and a tokenizer whose texts hide the spaces.
    written = json.loads((teacher.folder / "tokenizer.json").read_text())
    (tmp_path / "spaces.json").write_text(json.dumps(written | {"decoder": {"type": "Metaspace", "replacement": "▁",
        "prepend_scheme": "always", "split": True}}))  # fmt: skip
    with pytest.raises(ValueError, match="the tokenizer is not of bytes"):
        import_rows(tmp_path / "new", file, k=K, vocab_size=teacher.V, tokenizer=tmp_path / "spaces.json")
    spaced = next(token for token in ids if teacher.text(token).startswith(" "))
    twin = {**written["added_tokens"][0], "id": teacher.V, "content": teacher.text(spaced)}
    (tmp_path / "twin.json").write_text(json.dumps(written | {"added_tokens": [*written["added_tokens"], twin]}))
    with pytest.raises(ValueError, match=f"is the text of tokens {spaced} and {teacher.V}: ask the server for ids"):
        import_rows(tmp_path / "new", file, k=K, vocab_size=teacher.V + 1, tokenizer=tmp_path / "twin.json")


# --------------------------------------------------------------------------------------------------- ids, going on, CLI


def test_sample_ids_and_going_on_after_an_error(teacher: Teacher, tmp_path: Path) -> None:
    """Nothing of what was right is lost or read twice, and a sample that comes again is named with both lines."""
    sequences = [teacher.tokenizer.encode(text).ids for text in TEXTS]
    records = [{"meta": {"name": f"s{n}"}, **completions(teacher, ids)} for n, ids in enumerate(sequences)]
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    options = {"k": K, "vocab_size": teacher.V, "id": "meta.name", "max_kl": 1e-5}
    file.write_text("\n".join([json.dumps(records[0]), "", json.dumps(records[1]), '{"meta": ', ""]))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 4: .*; 2 samples are kept in .*: go on with resume"):
        import_rows(cache, file, **options)
    with pytest.raises(ValueError, match="finished"):
        TeacherCache.open(cache)
    with pytest.raises(ValueError, match="resume=True"):
        import_rows(cache, file, **options)
    write(file, [*records, records[1]])
    with pytest.raises(ValueError, match=r"line 4: wanted each sample once; got 's1' again, as in .*rows.jsonl, 2"):
        import_rows(cache, file, **options, resume=True)
    write(file, records)
    found = import_rows(cache, file, **options, resume=True)
    assert (found["skipped"], found["samples"]) == (3, 3)  # the third was kept when the fourth was refused
    names = TeacherCache.open(cache)
    wanted = of_the_teacher(teacher, tmp_path / "wanted", sequences)
    for n in range(3):
        assert torch.equal(names[f"s{n}"][0], wanted[n + 1][0])

    files = [file, write(tmp_path / "rows.jsonl.gz", records)]
    with pytest.raises(ValueError, match="id must be given with more than one file"):
        import_rows(tmp_path / "x", files, k=K, vocab_size=teacher.V)
    for record in (records[0] | {"meta": {"name": 1.5}}, records[0] | {"meta": {"name": True}}):
        write(file, [record])
        with pytest.raises(ValueError, match="line 1: sample_id must be a string or an integer"):
            import_rows(tmp_path / "x", file, **options)
    write(file, [])
    with pytest.raises(ValueError, match="files must hold at least one record; got none"):
        import_rows(tmp_path / "x", file, **options)
    assert not (tmp_path / "x").exists()


def test_writers_with_files_of_their_own(teacher: Teacher, tmp_path: Path) -> None:
    for rank, text in enumerate(TEXTS[:2]):
        row = {"id": rank, **completions(teacher, teacher.tokenizer.encode(text).ids)}
        file = write(tmp_path / f"{rank}.jsonl", [row])
        import_rows(tmp_path / "cache", file, k=K, vocab_size=teacher.V, id="id", rank=rank, world_size=2)
    assert sorted(TeacherCache.open(tmp_path / "cache")) == [0, 1]


def test_the_command(teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [completions(teacher, teacher.tokenizer.encode(t).ids) for t in TEXTS])
    argv = ["cache-import", str(tmp_path / "cache"), str(file), "--k", str(K), "--vocab-size", str(teacher.V)]
    argv += ["--temperature", "2", "--teacher", "GRU", "--tokenizer", str(teacher.folder)]
    assert cli.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 3
    assert found["captured_mass"]["mean"] > 0.5
    cache = TeacherCache.open(tmp_path / "cache", vocab_size=teacher.V, temperature=2.0, teacher="GRU")
    assert cache.info()["tokenizer"].startswith("sha256:")
    assert len(cache) == 3
    for wrong, words in (
        (["--format", "columns"], "align must be given with format='columns'"),
        (["--text", "prompt", "--tokenizer", str(tmp_path)], "tokenizer must be a folder with a tokenizer.json"),
        (["--k", "0"], "k must be from 1 to 4096; got 0"),
    ):
        assert cli.main([*argv, *wrong]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["cache-import", str(tmp_path / "cache"), "no.jsonl", "--k", "1", "--vocab-size", "9"]) == 2
    assert "there is no file no.jsonl" in capsys.readouterr().err


def test_standard_input_the_bar_and_what_is_imported(teacher: Teacher, tmp_path: Path) -> None:
    """JSON lines with ids need torch and numpy alone; a bar counts tokens where tqdm is."""
    line = json.dumps(completions(teacher, teacher.tokenizer.encode(TEXTS[0]).ids)) + "\n"
    (tmp_path / "rows.jsonl").write_text(line)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('pyarrow', 'tokenizers', 'transformers', 'tqdm')))\n"
        "from reptile_ext.cache import import_rows\n"
        f"import_rows({str(tmp_path / 'cache')!r}, '-', k={K}, vocab_size={teacher.V}, progress_bar=True)\n"
        "for more in ({'tokenizer': '.'}, {'files': 'rows.parquet'}):\n"
        "    try: import_rows(**{'folder': 'x', 'files': '-', 'k': 1, 'vocab_size': 9} | more)\n"
        "    except ImportError as error: print(error)\n"
        "del sys.modules['tqdm']\n"
        f"import_rows({str(tmp_path / 'other')!r}, 'rows.jsonl', k={K}, vocab_size={teacher.V}, progress_bar=True)\n"
    )
    (tmp_path / "rows.parquet").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", code], input=line, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.count("extra 'cache': pip install 'reptile_ext[cache]'") == 2, done.stderr
    assert "tokens/s" in done.stderr
    assert "100 %" in done.stderr
    assert len(TeacherCache.open(tmp_path / "cache")) == 1
