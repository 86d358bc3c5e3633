"""Samples of texts: what is read is what stands in the files; what is learned is the right part of it, once; what is
left out or cut is counted; and each thing that users of other programs have reported to go wrong here does not."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("datasets", "tokenizers", "transformers"):
    pytest.importorskip(needed, reason="needs the extra `text`")

import datasets  # noqa: E402
import pandas  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from reptile_ext.families.text.data import IGNORED, classification, label_names, language_model, translation  # noqa: E402
from reptile_ext.families.text.files import Table  # noqa: E402
from reptile_ext.training.data import Sampler  # noqa: E402

# `datasets` leaves streamed files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SOURCE = Path(json.__file__).read_text(encoding="utf-8") + Path(datasets.__file__).read_text(encoding="utf-8")
SPECIAL = ["<eos>", "<bos>", "<pad>", "<|im_start|>", "<|im_end|>", "<turn>"]
EOS, BOS, PAD = range(3)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def bytes_bpe() -> str:
    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(
        [SOURCE], trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return str(one.to_str())


@pytest.fixture(scope="module")
def sentence_pieces() -> str:
    """Which put a space before every text, as SentencePiece does."""
    one = tokenizers.Tokenizer(models.BPE(unk_token="<eos>"))
    one.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    one.decoder = decoders.Metaspace(prepend_scheme="always")
    letters = sorted(set(SOURCE))
    one.train_from_iterator(
        [SOURCE], trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=letters)
    )
    return str(one.to_str())


def wrap(serialized: str, template: str = "$A", **keywords: Any) -> Any:
    """template: what the tokenizer puts around a text."""
    one = tokenizers.Tokenizer.from_str(serialized)
    if template != "$A":
        special = [(token, i) for i, token in enumerate(SPECIAL)]
        one.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=one, **({"eos_token": "<eos>", "bos_token": "<bos>"} | keywords)
    )


@pytest.fixture(scope="module")
def plain(bytes_bpe: str) -> Any:
    """Without a padding token, and without special tokens around a text, as GPT-2's."""
    return wrap(bytes_bpe, extra_special_tokens=["<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="module")
def surrounding(bytes_bpe: str) -> Any:
    """That puts both special tokens around a text, and pads with one of its own."""
    return wrap(bytes_bpe, "<bos> $A <eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def chat(bytes_bpe: str) -> Any:
    return wrap(
        bytes_bpe,
        "<bos> $A",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


def table(*rows: dict[str, Any], flag: str = "train") -> Table:
    return Table.of_rows(flag, list(rows))


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    content = text.encode(encoding)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix)
    path.write_bytes(pack(content) if pack else content)
    return str(path)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def learned(tokenizer: Any, sample: dict[str, Any]) -> str:
    """The part of a sample that is learned, special tokens included."""
    return str(tokenizer.decode([label for label in sample["labels"] if label != IGNORED]))


def masked(tokenizer: Any, sample: dict[str, Any]) -> str:
    ids = [i for i, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == IGNORED]
    return str(tokenizer.decode(ids))


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_files_of_every_kind(tmp_path: Path, kind: str, suffix: str, streaming: bool) -> None:
    texts = ["one", 'two, "of" it', "drei Äpfel\tund 🚀" if kind != "tsv" else "drei Äpfel und 🚀"]
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    content = {
        "jsonl": "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts),
        "csv": "n,text\n" + "".join(f"1,{text}\n" for text in quoted),
        "tsv": "n\ttext\n" + "".join(f"1\t{text}\n" for text in quoted),
        "txt": "".join(text + "\n" for text in texts),
    }[kind]
    first = write(tmp_path / f"a.{kind}{suffix}", content)
    second = write(tmp_path / f"b.{kind}{suffix}", content.replace("one", "eins"))
    found = Table.open("train", [first, second], streaming=streaming)
    assert [row["text"] for row in found.rows] == [*texts, "eins", *texts[1:]]
    assert sorted(found.columns) == (["text"] if kind == "txt" else ["n", "text"])
    assert found.is_stream == streaming


def test_parquet_saved_folders_and_folders_of_files(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    rows.to_parquet(tmp_path / "x.parquet")
    assert Table.open("train", [str(tmp_path / "x.parquet")]).rows["text"][:] == ["a", "b", "c"]
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "both")
    assert Table.open("train", [str(tmp_path / "one")]).rows["text"][:] == ["a", "b", "c"]
    assert [r["text"] for r in Table.open("eval", [str(tmp_path / "both")], split="test", streaming=True).rows] == ["c"]
    with pytest.raises(
        ValueError, match=r"eval_split: .*both has the splits train, test; got 'tset'; did you mean test"
    ):
        Table.open("eval", [str(tmp_path / "both")], split="tset")
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    write(folder / "b.txt", "last\n")
    write(folder.parent / "a.txt", "first\n")
    write(folder / ".hidden.txt", "no\n")
    assert Table.open("train", [str(folder.parent)]).rows["text"][:] == ["first", "last"]


def test_digests_are_of_content(tmp_path: Path) -> None:
    a = Table.open("train", [jsonl(tmp_path / "a.jsonl", {"text": "a"})])
    same = Table.open("eval", [jsonl(tmp_path / "b.jsonl", {"text": "a"})])
    other = Table.open("train", [jsonl(tmp_path / "c.jsonl", {"text": "b"})])
    assert a.digest == same.digest != other.digest
    for name, texts in (("one", ["a"]), ("two", ["b"])):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name)
    assert len({Table.open("train", [str(tmp_path / name)]).digest for name in ("one", "two")}) == 2


def test_cells_of_csv_are_what_stands_there(tmp_path: Path) -> None:
    """Of a spreadsheet: a byte order mark, carriage returns, quoted line breaks, numbers, words that mean "nothing" to
    pandas (huggingface/datasets#4467)."""
    content = '"text",label,n\r\nnull,x,007\r\nNA,1.50,8\r\n"two\nlines",,9\r\n12,True,1\r\n,nan,2\r\n'
    found = Table.open("train", [write(tmp_path / "a.csv", content, "utf-8-sig")])
    assert found.columns == ["text", "label", "n"]
    assert found.rows["n"][:] == ["007", "8", "9", "1", "2"]
    assert found.rows["text"][:] == ["null", "NA", "two\nlines", "12", ""]
    assert found.rows["label"][:] == ["x", "1.50", "", "True", "nan"]


def test_lines_of_plain_text(tmp_path: Path) -> None:
    """Only line breaks end a line, not all that Unicode calls one (huggingface/datasets#3729); documents keep theirs
    (huggingface/transformers#10269)."""
    content = "\ufeffone\u2028more\u0085\r\ntwo\r\n\r\nthree"
    path = write(tmp_path / "a.txt", content)
    lines = Table.open("train", [path]).rows["text"][:]
    assert lines == ["one\u2028more\u0085", "two", "", "three"]
    assert Table.open("train", [path], sample_by="paragraph").rows["text"][:] == ["one\u2028more\u0085\ntwo", "three"]
    assert Table.open("train", [path], sample_by="document").rows["text"][:] == ["one\u2028more\u0085\ntwo\n\nthree"]


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "reptile_ext.families.text"
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the extra 'text': pip install 'reptile_ext\[text\]' \(no "):
        importlib.import_module(f"{name}.data")


def test_bad_files(tmp_path: Path) -> None:
    def message(*names: str, **keywords: Any) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            Table.open("train", [str(tmp_path / name) for name in names], **keywords)
        return str(caught.value).replace(f"{tmp_path}/", "")

    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "b.jsonl", '{"other": "a"}\n')
    write(tmp_path / "cut.jsonl", '{"text": "a"}\n{"text":')
    write(tmp_path / "blank.jsonl", "\n\n")
    write(tmp_path / "a.csv", "text,label\na,x\n")
    write(tmp_path / "b.csv", "text,lable\na,x\n")
    write(tmp_path / "long.csv", "text,label\na,x\na,b,c\n")
    write(tmp_path / "header.csv", "text,label\n")
    write(tmp_path / "semicolons.csv", "text;label\na;x\n")
    write(tmp_path / "latin.csv", "text,label\nÄpfel,x\n", "latin-1")
    write(tmp_path / "a.tsv", "text\tlabel\na\tx\n")
    write(tmp_path / "a.parquet", "no")
    write(tmp_path / "a.bin", "text")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    assert message() == "train must name at least one file; got none"
    assert message("a.jsonl", "a.jsonl") == "train must name different files; got a.jsonl, a.jsonl"
    assert message("none.jsonl") == "train must name files; there is no file none.jsonl"
    assert message("empty.jsonl") == "train: empty.jsonl is empty"
    assert message("a.bin").startswith("train must name files that end in .jsonl, ")
    assert Table.open("train", [str(tmp_path / "a.bin")], sample_by="line").rows["text"][:] == ["text"]
    assert message("a.jsonl", sample_by="line") == "sample_by is for plain text; got it with a.jsonl"
    assert message("a.jsonl", "a.csv") == "train must name files of one kind; got a.jsonl, a.csv"
    assert message("a.tsv", "a.csv") == "train must name files of one kind; got a.tsv, a.csv"
    assert message("cut.jsonl").startswith("cut.jsonl, line 2: wanted one JSON object a line; ")
    assert message("blank.jsonl") == message("blank.jsonl", streaming=True)
    assert message("blank.jsonl") == "train must hold at least one record; got none in blank.jsonl"
    assert message("header.csv") == "train must hold at least one record; got none in header.csv"
    assert "different columns" in message("a.jsonl", "b.jsonl")
    assert message("a.csv", "b.csv") == (
        "train must name files of the same columns; b.csv has text, lable, and a.csv text, label"
    ).replace("a.csv text", "a.csv has text")
    assert "Expected 2 fields in line 3, saw 3" in message("long.csv")
    assert message("semicolons.csv") == (
        "train: semicolons.csv must have commas (of a .tsv, tabs) between its cells; its first line is 'text;label'"
    )
    assert "latin.csv cannot be read as csv: UnicodeDecodeError" in message("latin.csv")
    assert "a.parquet cannot be read as parquet" in message("a.parquet")
    assert message("folder").endswith("folder holds nothing")


# ------------------------------------------------------------------------------------------------ columns


def test_columns_that_are_guessed(plain: Any) -> None:
    keywords = {"max_length": 64}
    for row, wanted in (
        ({"id": 1, "text": "a b"}, "a b<eos>"),
        ({"content": "a b", "n": 1}, "a b<eos>"),
        ({"prompt": "a", "completion": " b"}, " b<eos>"),
        ({"instruction": "a", "input": "", "output": "b"}, "\nb<eos>"),
        ({"question": "a", "answer": "b"}, "\nb<eos>"),
        ({"input": "a", "output": "b"}, "\nb<eos>"),
        ({"source": "a", "target": "b", "n": 1}, "\nb<eos>"),
        ({"prompt": "a", "completion": " b", "response": "no"}, " b<eos>"),
        ({"text": "a b", "content": "no"}, "a b<eos>"),
    ):
        prepared = language_model(table(row), plain, **keywords)
        assert learned(plain, prepared.samples[0]) == wanted, row
    with_input = language_model(table({"instruction": "Add.", "input": "1 2", "output": "3"}), plain, **keywords)
    assert masked(plain, with_input.samples[0]) == "Add.\n\n1 2"
    with_context = language_model(table({"instruction": "Say.", "context": "x", "response": "y"}), plain, **keywords)
    assert masked(plain, with_context.samples[0]) == "Say.\n\nx"
    assert learned(plain, with_context.samples[0]) == "\ny<eos>"


def test_columns_that_cannot_be_guessed(plain: Any) -> None:
    def message(row: dict[str, Any], make: Any = language_model, **keywords: Any) -> str:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            make(table(row), plain, max_length=8, **keywords)
        return str(caught.value)

    assert message({"txt": "a", "n": 1}) == "text_column must say which column of train it is: txt, n"
    assert message({"body": "a", "review": "b"}) == (
        "text_column must say which column of train it is; it may be review or body"
    )
    assert message({"text": "a"}, text_column="txet") == (
        "text_column: train has no column 'txet', but text; did you mean text?"
    )
    assert "in more than one form (text, prompt, completion): say text_column, or " in message(
        {"text": "a", "prompt": "a", "completion": "b"}
    )
    assert message({"text": "a"}, text_column="text", prompt_column="text") == (
        "text_column and prompt_column are different forms of a sample: give one"
    )
    assert message({"a": "a"}, prompt_column="a") == (
        "prompt_column and completion_column go together; got no completion_column"
    )
    assert "for both" in message({"a": "a"}, prompt_column="a", completion_column="a")
    assert message({"question": "a", "answer": "b", "instruction": "c", "output": "d"}) == (
        "prompt_column and completion_column must say which columns of train they are; instruction and output or "
        "question and answer"
    )
    assert message({"messages": [{"role": "user", "content": "a"}]}).startswith(
        "messages_column: the tokenizer has no chat template: "
    )
    assert message({"en": "a", "de": "b"}, translation) == (
        "source_column and target_column must say which columns of train they are: en, de"
    )
    assert message({"translation": {"en": "a", "de": "b"}}, translation) == (
        "source_column and target_column must say which languages of train they are: en, de"
    )
    assert message({"translation": {"en": "a", "de": "b"}}, translation, source_column="en", target_column="dee") == (
        "target_column: translation of train has no 'dee', but en, de; did you mean de?"
    )


@pytest.mark.parametrize("value", [5, 2.5, True, ["a"], {"a": 1}])
def test_a_cell_that_is_no_text_is_named(tmp_path: Path, plain: Any, value: Any) -> None:
    """With the record, also where types are mixed (huggingface/datasets#5827)."""
    found = Table.open("train", [jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"text": value})])
    with pytest.raises(ValueError, match=r"\Atrain \(.*a\.jsonl\), record 2: wanted text in 'text'; got ") as caught:
        language_model(found, plain, max_length=8)
    assert type(value).__name__ in str(caught.value)


# ------------------------------------------------------------------------------------------------ what is learned


def test_the_end_of_a_text_is_learned_where_it_pads(plain: Any) -> None:
    """The end-of-text token is the padding, too; collators that mask by id have made models that never stop
    (huggingface/trl#976, huggingface/transformers#22794)."""
    assert plain.pad_token_id is None
    prepared = language_model(table({"text": "a b c d e f"}, {"text": "a"}), plain, max_length=64)
    batch = prepared.collate(list(prepared.samples))
    long, short = (len(sample["input_ids"]) for sample in prepared.samples)
    assert batch["labels"][1, short - 1] == EOS
    assert batch["labels"][1, short:].eq(IGNORED).all()
    assert batch["input_ids"][1, short:].eq(EOS).all()
    assert batch["attention_mask"].tolist() == [[1] * long, [1] * short + [0] * (long - short)]
    assert prepared.counts.sentence().endswith("; padded with the end-of-text token, and masked")


def test_a_tokenizer_without_padding_or_end(bytes_bpe: str) -> None:
    nothing = wrap(bytes_bpe, eos_token=None, bos_token=None)
    with pytest.raises(ValueError, match="tokenizer must have a padding or an end-of-text token to make batches"):
        language_model(table({"text": "a"}), nothing, max_length=8)
    with pytest.raises(ValueError, match="tokenizer must have a padding or an end-of-text token to make batches"):
        classification(
            table({"text": "a", "label": "x"}, {"text": "a", "label": "y"}), (nothing, nothing), max_length=8
        )
    packed = language_model(table({"text": "a b c d e f g h"}), nothing, max_length=4, packing=True)
    assert packed.collate([packed.samples[0]])["attention_mask"].tolist() == [[1] * 4]


def test_special_tokens_are_there_once(surrounding: Any, bytes_bpe: str) -> None:
    """Whether they stand in the text, the tokenizer puts them there, or both (huggingface/trl#1912)."""
    for text in ("a b", "<bos>a b", "a b<eos>", "<bos>a b<eos>"):
        for tokenizer in (surrounding, wrap(bytes_bpe, "<bos> $A", pad_token="<pad>")):
            ids = language_model(table({"text": text}), tokenizer, max_length=64).samples[0]["input_ids"]
            assert tokenizer.decode(ids) == "<bos>a b<eos>"
    of_pair = language_model(table({"prompt": "a", "completion": " b"}), surrounding, max_length=64).samples[0]
    assert (masked(surrounding, of_pair), learned(surrounding, of_pair)) == ("<bos>a", " b<eos>")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("def lo", "ads(x):"), ("return ", "None"), ("return", " None"), ("a\n", "\nb"), ("", "import os"), ("x", "🚀")],
)
@pytest.mark.parametrize("kind", ["bytes_bpe", "sentence_pieces"])
def test_the_prompt_has_the_tokens_it_has_alone(
    request: pytest.FixtureRequest, kind: str, prompt: str, completion: str
) -> None:
    """As when the student is asked: tokens across the boundary are never seen then, and a tokenizer that ends a prompt
    by a token of its own must not shift it (huggingface/trl#5213, #5555). Nor is a space put between the two."""
    for template in ("$A", "<bos> $A <eos>"):
        tokenizer = wrap(request.getfixturevalue(kind), template, pad_token="<pad>")
        rows = table({"prompt": prompt, "completion": completion})
        sample = language_model(rows, tokenizer, max_length=64).samples[0]
        alone = [i for i in tokenizer(prompt)["input_ids"] if i != EOS]
        begin = len(alone)
        assert sample["input_ids"][:begin] == alone
        assert sample["labels"] == [IGNORED] * begin + sample["input_ids"][begin:]
        assert sample["input_ids"][-1] == EOS
        if completion != "🚀" or kind == "bytes_bpe":
            assert tokenizer.decode(sample["input_ids"], skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize("kind", ["bytes_bpe", "sentence_pieces"])
def test_prompts_that_end_anywhere(request: pytest.FixtureRequest, kind: str) -> None:
    """Within words, white space and lines: the prompt's tokens are its own, and nothing is lost or put between."""
    tokenizer = wrap(request.getfixturevalue(kind), "<bos> $A", pad_token="<pad>")
    numbers = random.Random(0)
    rows = []
    for _ in range(300):
        middle = numbers.randrange(len(SOURCE) - 30)
        begin, end = max(0, middle - numbers.randrange(30)), middle + numbers.randrange(1, 30)
        rows.append({"prompt": SOURCE[begin:middle], "completion": SOURCE[middle:end]})
    prepared = language_model(table(*rows), tokenizer, max_length=1000)
    assert prepared.counts.samples > 250
    for sample in prepared.samples:
        prompt, completion = (rows[sample["sample_id"]][name] for name in ("prompt", "completion"))
        alone = tokenizer(prompt)["input_ids"]
        assert sample["labels"][: len(alone) + 1] == [IGNORED] * len(alone) + [sample["input_ids"][len(alone)]]
        assert sample["input_ids"][: len(alone)] == alone
        whole = tokenizer(prompt + completion)["input_ids"]
        assert tokenizer.decode(sample["input_ids"][:-1]) == tokenizer.decode(whole)


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


def test_of_a_conversation_the_assistant_is_learned(chat: Any) -> None:
    """Without `generation` in the template (huggingface/transformers#34172), without the header of the turn
    (huggingface/trl#4147), and with what ends it; the template's beginning is the only one (OpenRLHF#393)."""
    prepared = language_model(table({"messages": CONVERSATION}), chat, max_length=256)
    sample = prepared.samples[0]
    assert chat.decode(sample["input_ids"]) == chat.apply_chat_template(CONVERSATION, tokenize=False)
    assert learned(chat, sample) == "Hi<|im_end|>\nSo.<|im_end|>\n"
    assert masked(chat, sample).endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_begins_a_text(bytes_bpe: str) -> None:
    tokenizer = wrap(bytes_bpe, "<bos> $A", chat_template="<bos>" + CHATML)
    sample = language_model(table({"messages": CONVERSATION}), tokenizer, max_length=256).samples[0]
    assert sample["input_ids"].count(BOS) == 1


def test_conversations_of_other_shapes(chat: Any) -> None:
    """From and value; prompt and completion of messages; without what Arrow fills in (modelscope/ms-swift#6467)."""
    said = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    sample = language_model(table({"conversations": said}), chat, max_length=64).samples[0]
    assert learned(chat, sample) == "Hi<|im_end|>\n"
    row = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    sample = language_model(table(row), chat, max_length=256).samples[0]
    assert learned(chat, sample) == "So.<|im_end|>\n"
    calling = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=CHATML.replace("{{ message['content'] }}", "{{ message.get('call', message['content']) }}"),
    )
    call = {"name": datasets.Value("string"), "city": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": datasets.Value("string"), "call": call}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "call": {"name": "now"}}]
    stored = datasets.Dataset.from_dict({"messages": [turns]}, features=datasets.Features({"messages": [message]}))
    assert stored[0]["messages"][1]["call"] == {"name": "now", "city": None}
    sample = language_model(Table("train", stored, "digest"), calling, max_length=64).samples[0]
    assert learned(calling, sample) == "{'name': 'now'}<|im_end|>\n"
    assert masked(calling, sample).startswith("<|im_start|>user\nx<|im_end|>")


def test_what_ends_a_turn_is_learned(bytes_bpe: str) -> None:
    """Where it is another token than the end-of-text token (axolotl#3754), and where the template writes none."""
    marked = wrap(bytes_bpe, chat_template=CHATML.replace("<|im_end|>", "<turn>"), extra_special_tokens=["<turn>"])
    rows = table({"messages": CONVERSATION[1:3]})
    assert learned(marked, language_model(rows, marked, max_length=64).samples[0]) == "Hi<turn>\n"
    bare = wrap(
        bytes_bpe,
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    sample = language_model(rows, bare, max_length=64).samples[0]
    assert (masked(bare, sample), learned(bare, sample)) == ("user: Hello\nassistant:", " Hi\n<eos>")


def test_a_template_that_rewrites_what_was_said(bytes_bpe: str) -> None:
    """As those that drop earlier thoughts: only the last turn stands as it was generated (huggingface/trl#5213)."""
    thoughtful = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = wrap(bytes_bpe, chat_template=thoughtful, extra_special_tokens=["<|im_end|>"])
    sample = language_model(table({"messages": CONVERSATION}), tokenizer, max_length=256).samples[0]
    assert learned(tokenizer, sample) == "<think></think>So.<|im_end|>\n"
    assert "Hi<|im_end|>" in masked(tokenizer, sample)
    turned = wrap(bytes_bpe, chat_template="{{ messages | length }}{{ messages[-1]['content'] }}")
    with pytest.raises(
        ValueError, match=r"\Atrain, record 1: the chat template writes the conversation otherwise when "
    ):
        language_model(table({"messages": CONVERSATION}), turned, max_length=256)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hello", "wanted a list of messages with role and content in 'messages'; got 'Hello'"),
        ([{"role": "user"}], "wanted messages with role and content, which are text; got {'role': 'user'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], "wanted messages with role and content, which are text"),
        ([{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}], "no tools here"),
    ],
)
def test_conversations_that_are_none(bytes_bpe: str, messages: Any, says: str) -> None:
    refusing = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + CHATML
    tokenizer = wrap(bytes_bpe, chat_template=refusing)
    with pytest.raises(ValueError, match=r"\Atrain, record 1: [^\n]+\Z") as caught:
        language_model(table({"messages": messages}), tokenizer, max_length=64)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------------ what is left out, cut


def test_what_is_left_out_is_counted(plain: Any, chat: Any) -> None:
    """Samples whose labels would all be masked have made losses NaN, or 0, without a word (huggingface/trl#6668,
    NVIDIA NeMo#8025)."""
    rows = [
        {"prompt": "a b c d e f g h i j k l", "completion": " m"},
        {"prompt": "a", "completion": " b c d e f g h i j k l"},
        {"prompt": "a", "completion": None},
        {"prompt": None, "completion": "b"},
        {"prompt": "a", "completion": "  \n"},
    ]
    prepared = language_model(table(*rows), plain, max_length=6)
    assert [sample["sample_id"] for sample in prepared.samples] == [1, 3]
    assert all(set(sample["labels"][1:]) != {IGNORED} for sample in prepared.samples)
    whole = [len(plain(f"{row['prompt'] or ''}{row['completion']}")["input_ids"]) + 1 for row in rows[:2]]
    counts = prepared.counts
    assert (counts.samples, counts.tokens) == (2, 6 + 2)
    assert (counts.empty, counts.unlearnable, counts.truncated, counts.lost) == (2, 1, 1, whole[1] - 6)
    assert counts.sentence() == (
        f"2 samples, 8 tokens; 1 cut at the end to 6 tokens, which lost {whole[1] - 6}; left out: 2 empty, 1 whose "
        "prompt alone has 6 tokens or more; padded with the end-of-text token, and masked"
    )
    spoken = language_model(table({"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}), chat, max_length=256)
    assert (spoken.counts.samples, spoken.counts.unanswered) == (1, 1)


def test_nothing_left_is_an_error(plain: Any, chat: Any) -> None:
    """And says why (hiyouga/LLaMA-Factory#9618: invalid roles, and a list that is empty)."""
    cases: list[tuple[dict[str, Any], Any, int, str]] = [
        ({"text": " "}, plain, 8, "left out: 1 empty"),
        ({"prompt": "a b c d", "completion": "e"}, plain, 3, "left out: 1 whose prompt alone has 3 tokens or more"),
        ({"messages": [{"role": "helper", "content": "x"}]}, chat, 64, "left out: 1 without a turn of the assistant"),
    ]
    for row, tokenizer, max_length, why in cases:
        with pytest.raises(
            ValueError, match="train must hold at least one sample to learn from; got 0 samples"
        ) as caught:
            language_model(table(row), tokenizer, max_length=max_length)
        assert why in str(caught.value)


def test_what_is_cut_does_not_end(plain: Any) -> None:
    sample = language_model(table({"text": "a b c d e f g h"}), plain, max_length=4).samples[0]
    assert len(sample["input_ids"]) == 4
    assert EOS not in sample["labels"]


@pytest.mark.parametrize("streaming", [False, True])
def test_packing(tmp_path: Path, plain: Any, streaming: bool) -> None:
    """All texts with the end of each, and nothing else (huggingface/trl#805); where a block's tokens come from is
    known; what fills no block is counted (huggingface/trl#1850)."""
    texts = [line for line in SOURCE.splitlines() if line.strip()] * 4
    path = jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    prepared = language_model(Table.open("train", [path], streaming=streaming), plain, max_length=50, packing=True)
    blocks = list(prepared.samples)
    by_text = [[*plain(text)["input_ids"], EOS] for text in texts]
    for block in blocks:
        assert len(block["input_ids"]) == 50
        assert block["labels"] == block["input_ids"]
        assert block["input_ids"] == [
            i for number, begin, end in block["sample_id"] for i in by_text[number][begin:end]
        ]
    total = sum(map(len, by_text))
    assert len(blocks) == total // 50
    assert (prepared.counts.packed, prepared.counts.samples) == (len(texts), len(blocks))
    assert len(texts) > 1000  # that are read in one go
    if not streaming:
        assert [i for block in blocks for i in block["input_ids"]] == [i for ids in by_text for i in ids][
            : 50 * len(blocks)
        ]
        assert prepared.counts.remainder == total % 50
        again = language_model(Table.open("train", [path]), plain, max_length=50, packing=True)  # from the disk
        assert (list(again.samples), again.counts) == (blocks, prepared.counts)


def test_blocks_in_which_nothing_is_learned(plain: Any) -> None:
    row = {"prompt": "a b c d e f g h i j k l m n", "completion": " o p q"}
    prepared = language_model(table(row), plain, max_length=4, packing=True)
    assert prepared.counts.unlearnable > 0
    assert all(any(label != IGNORED for label in sample["labels"][1:]) for sample in prepared.samples)


def test_samples_are_made_once(tmp_path: Path, plain: Any, bytes_bpe: str, sentence_pieces: str) -> None:
    """For the same data, tokenizer and settings; a tokenizer that has been used is the same, and one with another
    vocabulary or template is not."""
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"{i} a b c", "label": f"{i % 2}"} for i in range(50)))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "reptile_ext"
    found = Table.open("train", [path])
    first = language_model(found, plain, max_length=8)
    assert first.counts.where == str(folder)
    classification(found, (plain, plain), max_length=2)  # cuts, which leaves the tokenizer set to
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = language_model(Table.open("train", [path]), plain, max_length=8)
    assert (list(again.samples), again.counts) == (list(first.samples), first.counts)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    language_model(found, wrap(bytes_bpe, chat_template=CHATML), max_length=8)
    language_model(found, wrap(sentence_pieces), max_length=8)
    assert len(list(folder.iterdir())) == len(before) + 2
    datasets.load_dataset("json", data_files=path, split="train").save_to_disk(tmp_path / "saved")
    kept = sorted((tmp_path / "saved").iterdir())
    language_model(Table.open("train", [str(tmp_path / "saved")]), plain, max_length=8)
    assert sorted((tmp_path / "saved").iterdir()) == kept


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_is_what_the_files_are(tmp_path: Path, plain: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"line {i} " * (i % 7)} for i in range(300)))
    whole = language_model(Table.open("train", [path]), plain, max_length=12)
    stream = language_model(Table.open("train", [path], streaming=True), plain, max_length=12)
    assert stream.counts.sentence() == "a stream, read in every pass; padded with the end-of-text token, and masked"
    passes = []
    for epoch in range(2):
        stream.samples.set_epoch(epoch)
        passes.append(list(stream.samples))
    stream.samples.set_epoch(0)
    assert list(stream.samples) == passes[0] != passes[1]
    for samples in passes:
        assert sorted(samples, key=lambda sample: sample["sample_id"]) == list(whole.samples)
        assert [sample["sample_id"] for sample in samples] != sorted(sample["sample_id"] for sample in samples)
    for name in ("samples", "tokens", "empty", "truncated", "lost"):
        assert getattr(stream.counts, name) == 3 * getattr(whole.counts, name)


@pytest.mark.parametrize("packing", [False, True])
def test_a_place_in_a_stream_is_found_again(tmp_path: Path, plain: Any, packing: bool) -> None:
    """Exactly: not as a shuffled stream's own state, which forgets the samples it holds (huggingface/datasets#7901)."""
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"line {i}"} for i in range(60)))

    def sampler() -> Sampler:
        rows = Table.open("train", [path], streaming=True)
        prepared = language_model(rows, plain, max_length=8, packing=packing)
        return Sampler(DataLoader(prepared.samples, 4, collate_fn=prepared.collate), seed=1)

    one = sampler()
    assert one.problems == []
    batches = [one.take(1)[0]["input_ids"].tolist() for _ in range(40)]
    for stop in (3, 17, 33):
        before, after = sampler(), sampler()
        for _ in range(stop):
            before.take(1)
        after.load_state_dict(before.state_dict())
        assert [after.take(1)[0]["input_ids"].tolist() for _ in range(stop, 40)] == batches[stop:]


def test_what_is_wrong_with_a_stream_is_said_with_its_name(tmp_path: Path, plain: Any) -> None:
    rows = [{"text": "fine"}] * 3
    late = jsonl(tmp_path / "a.jsonl", *rows, {"text": 5})
    with pytest.raises(ValueError, match=r"\Atrain \(.*a.jsonl\), record 4: wanted text in 'text'; got int 5"):
        list(language_model(Table.open("train", [late], streaming=True), plain, max_length=8).samples)
    other = jsonl(tmp_path / "b.jsonl", {"other": "x"})
    stream = Table.open("train", [jsonl(tmp_path / "c.jsonl", *rows), other], streaming=True)
    with pytest.raises(ValueError, match=r"\Atrain \(.*b.jsonl\) cannot be read: its files, .* have different columns"):
        list(language_model(stream, plain, max_length=8).samples)
    empty = Table.open("train", [jsonl(tmp_path / "d.jsonl", {"text": " "})], streaming=True)
    with pytest.raises(ValueError, match=r"train .* must hold at least one sample to learn from"):
        list(language_model(empty, plain, max_length=8).samples)
    labelled = Table.open("train", [jsonl(tmp_path / "e.jsonl", {"text": "a", "label": "x"})], streaming=True)
    with pytest.raises(ValueError, match="train: the labels of a stream are not known before it ends"):
        classification(labelled, (plain, plain), max_length=8)
    assert [s["label"] for s in classification(labelled, (plain, plain), labels=["y", "x"], max_length=8).samples] == [
        1
    ]


# ------------------------------------------------------------------------------------------------ classifiers


def rows_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("values", "names", "numbers"),
    [
        (["spam", "ham", "spam"], ["ham", "spam"], [1, 0, 1]),
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
        (["1.0", "0.0"], ["0", "1"], [1, 0]),
        ([True, False], ["false", "true"], [1, 0]),
        (["10", "2"], ["2", "10"], [1, 0]),
    ],
)
def test_labels_of_data(plain: Any, values: list[Any], names: list[str], numbers: list[int]) -> None:
    """In an order that is the same in every run: a set's is not (RomRoc/objdet_fizyr_colab#5)."""
    prepared = classification(table(*rows_of(*values)), (plain, plain), max_length=8)
    assert prepared.labels == label_names(table(*rows_of(*values)), None) == names
    assert [sample["label"] for sample in prepared.samples] == numbers
    batch = prepared.collate(list(prepared.samples))
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == numbers


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        (["a", "b"], ["b", "a"], [1, 0]),
        ([0, 1], ["b", "a"], [0, 1]),
        (["0", "1.0"], ["b", "a"], [0, 1]),
        ([True, False], ["no", "yes"], [1, 0]),
        ([1, 5], ["1", "2", "3", "4", "5"], [0, 4]),
        ([0, 1], ["LABEL_0", "LABEL_1"], [0, 1]),
    ],
)
def test_labels_of_a_teacher(plain: Any, values: list[Any], labels: list[str], numbers: list[int]) -> None:
    prepared = classification(table(*rows_of(*values)), (plain, plain), labels=labels, max_length=8)
    assert [sample["label"] for sample in prepared.samples] == numbers


def test_named_classes_of_a_data_set(plain: Any) -> None:
    """By their names, whatever order the teacher has them in (google-deepmind/dmvr#6); by number if it has no names."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    found = Table("train", rows, "digest")
    assert classification(found, (plain, plain), max_length=8).labels == ["neg", "pos"]
    for labels, numbers in ((["pos", "neg"], [1, 0]), (["LABEL_0", "LABEL_1"], [0, 1])):
        prepared = classification(found, (plain, plain), labels=labels, max_length=8)
        assert [sample["label"] for sample in prepared.samples] == numbers
    with pytest.raises(ValueError, match=r"\Atrain, record 1: label 'neg' in 'label' is none of NEGATIVE, POSITIVE"):
        classification(found, (plain, plain), labels=["NEGATIVE", "POSITIVE"], max_length=8)
    hidden = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)  # as of a test set
    with pytest.raises(ValueError, match=r"\Aeval, record 1: there is no label in 'label'; got -1"):
        classification(Table("eval", hidden, "digest"), (plain, plain), labels=["neg", "pos"], max_length=8)


@pytest.mark.parametrize(
    ("values", "labels", "says"),
    [
        (
            ["spam", "hma"],
            ["ham", "spam"],
            "train, record 2: label 'hma' in 'label' is none of ham, spam; did you mean ham?",
        ),
        ([0, 2], ["ham", "spam"], "train, record 2: label '2' in 'label' is none of ham, spam"),
        ([0, 1], ["1", "2"], "train, record 1: label '0' in 'label' is none of 1, 2"),
        ([0, -1], ["ham", "spam"], "train, record 2: label '-1' in 'label' is none of ham, spam"),
        (["a", "b", None], None, "train, record 3: there is no label in 'label'; got None"),
        (["a", ""], ["a", "b"], "train, record 2: there is no label in 'label'; got ''"),
        ([0.5, 1.0], None, "train, record 1: a label in 'label' must be a word or a whole number; got 0.5"),
        ([["a", "b"], ["a"]], None, "train, record 1: wanted one label in 'label'; got ['a', 'b']: several are not "),
        (["a", "a"], None, "train must have at least two classes in 'label'; got only 'a'"),
        (["a", "a"], ["a", "b"], "train must have samples of at least two classes; got only 'a'"),
        (["a", "b"], ["a", "a"], "labels must differ; got a, a"),
    ],
)
def test_bad_labels(plain: Any, values: list[Any], labels: list[str] | None, says: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        classification(table(*rows_of(*values)), (plain, plain), labels=labels, max_length=8)
    assert str(caught.value).startswith(says)


def test_a_classifiers_columns(plain: Any) -> None:
    with pytest.raises(ValueError, match="label_column must say which column of train it is: text, stars"):
        classification(table({"text": "a", "stars": 1}), (plain, plain), max_length=8)
    with pytest.raises(
        ValueError, match="label_column: train has no column 'lable', but text, label; did you mean label"
    ):
        classification(table(*rows_of(1, 0)), (plain, plain), label_column="lable", max_length=8)
    with pytest.raises(ValueError, match="text_column and label_column must be different columns; got 'text' for both"):
        classification(table(*rows_of(1, 0)), (plain, plain), label_column="text", text_column="text", max_length=8)
    unlabelled = classification(
        table({"text": "a"}, {"text": "b"}), (plain, plain), labels=["x", "y"], max_length=8, is_labelled=False
    )
    assert [(sample["text"], sample["label"]) for sample in unlabelled.samples] == [("a", 0), ("b", 0)]


def test_labels_as_other_programs_save_them(tmp_path: Path, plain: Any) -> None:
    """A folder whose rows come as tensors, categories of pandas, numbers made floats by one that is missing."""
    rows = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(rows).with_format("torch").save_to_disk(tmp_path / "tensors")
    pandas.DataFrame({**rows, "label": pandas.Categorical(["y", "x", "y"])}).to_parquet(tmp_path / "categories.parquet")
    floats = {"text": [*rows["text"], None], "label": [1.0, 0.0, 1.0, None]}
    pandas.DataFrame(floats).to_parquet(tmp_path / "floats.parquet")
    for name, names in (("tensors", ["0", "1"]), ("categories.parquet", ["x", "y"]), ("floats.parquet", ["0", "1"])):
        prepared = classification(Table.open("train", [str(tmp_path / name)]), (plain, plain), max_length=8)
        assert prepared.labels == names
        assert [sample["label"] for sample in prepared.samples] == [1, 0, 1]


def test_classes_that_are_missing_are_said(plain: Any) -> None:
    prepared = classification(table(*rows_of("a", "b")), (plain, plain), labels=["a", "b", "c"], max_length=8)
    assert "none of class c" in prepared.counts.sentence()
    alike = classification(table(*rows_of("Spam", "spam", "ham")), (plain, plain), max_length=8)
    assert alike.labels == ["Spam", "ham", "spam"]
    assert "some classes differ by case or white space alone" in alike.counts.sentence()
    alone = table(*rows_of("a"), flag="eval")
    assert "none of class b" in classification(alone, (plain, plain), labels=["a", "b"], max_length=8).counts.sentence()


def test_two_tokenizers(plain: Any, surrounding: Any) -> None:
    """Each model its own tokens, cut with the special tokens kept."""
    rows = [*rows_of("a", "b"), {"text": "one two three four five six seven eight", "label": "a"}, *rows_of("a")]
    rows[3]["text"] = ""
    prepared = classification(table(*rows), (plain, surrounding), max_length=6)
    batch = prepared.collate(list(prepared.samples))
    assert sorted(batch) == ["labels", "student_inputs", "teacher_inputs"]
    student, teacher = batch["student_inputs"], batch["teacher_inputs"]
    assert student["input_ids"][0, : int(student["attention_mask"][0].sum())].tolist() == plain("text 0")["input_ids"]
    assert teacher["input_ids"][2, [0, -1]].tolist() == [BOS, EOS]
    assert teacher["input_ids"].shape == student["input_ids"].shape == (3, 6)
    assert teacher["input_ids"][0, -1] in (PAD, EOS)
    counts = prepared.counts
    assert (counts.samples, counts.empty, counts.truncated) == (3, 1, 1)
    assert counts.lost == len(surrounding(rows[2]["text"])["input_ids"]) - 6
    same = classification(table(*rows), (plain, plain), max_length=6)
    assert sorted(same.collate(list(same.samples))) == ["attention_mask", "input_ids", "labels"]


def test_rows_without_anything_are_left_out(tmp_path: Path, plain: Any) -> None:
    """As spreadsheets write them at the end."""
    found = Table.open("train", [write(tmp_path / "a.csv", "text,label\na,x\nb,y\n,\n,\n")])
    prepared = classification(found, (plain, plain), max_length=8)
    assert (prepared.labels, prepared.counts.samples, prepared.counts.empty) == (["x", "y"], 2, 2)


def test_no_room_beside_the_special_tokens(surrounding: Any) -> None:
    rows = rows_of("a", "b")
    with pytest.raises(ValueError, match="max_length must be more than the tokenizer's 2 special tokens; got 2"):
        classification(table(*rows), (surrounding, surrounding), max_length=2)
    samples = classification(table(*rows), (surrounding, surrounding), max_length=3).samples
    assert [sample["input_ids"][::2] for sample in samples] == [[BOS, EOS]] * 2


def test_csv_and_json_say_the_same(tmp_path: Path, plain: Any) -> None:
    rows = rows_of(3, 1, 2, 1)
    of_json = Table.open("train", [jsonl(tmp_path / "a.jsonl", *rows)])
    lines = "".join(f"{row['text']},{row['label']}\n" for row in rows)
    of_csv = Table.open("eval", [write(tmp_path / "a.csv", "text,label\n" + lines)])
    train = classification(of_json, (plain, plain), max_length=8)
    held_out = classification(of_csv, (plain, plain), labels=train.labels, max_length=8)
    assert train.labels == ["1", "2", "3"]
    assert list(train.samples) == list(held_out.samples)


# ------------------------------------------------------------------------------------------------ translation


def test_translation(surrounding: Any) -> None:
    rows = [
        {"translation": {"de": "Hallo Welt", "en": "hello world"}},
        {"translation": {"de": "Ja", "en": ""}},
        {"translation": None},
        {"translation": {"de": "ein zwei drei vier", "en": "one two three four five six seven"}},
        {"translation": {"de": "Ja", "en": "yes"}},
    ]
    prepared = translation(
        table(*rows), surrounding, source_column="de", target_column="en", max_length=10, decoder_start_token_id=PAD
    )
    assert [(sample["source"], sample["target"]) for sample in prepared.samples] == [
        (rows[i]["translation"]["de"], rows[i]["translation"]["en"])  # type: ignore[index]
        for i in (0, 3, 4)
    ]
    assert [sample["sample_id"] for sample in prepared.samples] == [0, 3, 4]
    assert (prepared.counts.samples, prepared.counts.empty) == (3, 2)
    batch = prepared.collate(list(prepared.samples))
    long = surrounding("one two three four five six seven")["input_ids"]
    assert batch["labels"][1].tolist() == long[:10]  # cut, and so without an end
    short = surrounding("yes")["input_ids"]
    assert batch["labels"][2].tolist() == short + [IGNORED] * (10 - len(short))
    assert batch["decoder_input_ids"][2].tolist() == [PAD, *short, *[PAD] * 10][:10]
    assert batch["decoder_input_ids"][1].tolist() == [PAD, *long[:9]]
    source = surrounding("Ja")["input_ids"]
    assert batch["input_ids"][2, : len(source)].tolist() == source
    assert batch["attention_mask"][2].sum() == len(source)


def test_translation_of_two_columns(plain: Any) -> None:
    """Of a tokenizer that puts no end behind a target, which is then added."""
    for row, columns in (
        ({"source": "ja", "target": "yes"}, {}),
        ({"src": "ja", "tgt": "yes"}, {}),
        ({"de": "ja", "en": "yes"}, {"source_column": "de", "target_column": "en"}),
    ):
        sample = translation(table(row), plain, max_length=8, **columns).samples[0]
        assert plain.decode(sample["input_ids"]) == "ja"
        assert plain.decode(sample["labels"]) == "yes<eos>"
        assert (sample["source"], sample["target"]) == ("ja", "yes")


class _Languages(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
    """That writes targets otherwise than sources, as those of many languages do."""

    def _switch_to_target_mode(self) -> None:
        self._tokenizer.post_processor = processors.TemplateProcessing(single="<turn> $A <eos>", special_tokens=AROUND)

    def _switch_to_input_mode(self) -> None:
        self._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=AROUND)


AROUND = [("<eos>", EOS), ("<bos>", BOS), ("<turn>", SPECIAL.index("<turn>"))]


def test_targets_are_tokenized_as_targets(bytes_bpe: str) -> None:
    """(huggingface/transformers#6262, #19943)"""
    tokenizer = _Languages(
        tokenizer_object=tokenizers.Tokenizer.from_str(bytes_bpe), eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer._switch_to_input_mode()
    sample = translation(table({"source": "a", "target": "b"}), tokenizer, max_length=8).samples[0]
    assert tokenizer.decode(sample["input_ids"]) == "<bos>a<eos>"
    assert tokenizer.decode(sample["labels"]) == "<turn>b<eos>"


# ------------------------------------------------------------------------------------------------ models take them


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=700, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_padding_changes_no_loss(plain: Any, tiny: Any) -> None:
    """The loss of a batch is that of its samples alone, weighted by the tokens that are learned."""
    rows = [{"prompt": "a b", "completion": " c d e"}, {"prompt": "a", "completion": " b"}]
    prepared = language_model(table(*rows), plain, max_length=32)
    both = tiny(**prepared.collate(list(prepared.samples))).loss
    alone = [tiny(**prepared.collate([sample])).loss for sample in prepared.samples]
    weights = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in prepared.samples]
    wanted = sum(loss * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert both.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weights == [len(plain(f" {'c d e'}")["input_ids"]) + 1, len(plain(" b")["input_ids"]) + 1]
