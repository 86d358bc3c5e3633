"""`reptile distill` on the user's own models and texts, and what it leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F

from reptile_ext import cli
from reptile_ext.families.text.lstm import LstmConfig, LstmForCausalLM, LstmForSequenceClassification
from reptile_ext.families.text.models import Named, compare_tokenizers
from reptile_ext.training.recipes.code_lm import standard_library

QUIET = ["--quiet", "--precision", "float32", "--fused-linear", "no", "--batch", "4", "--max-length", "24"]
TEXTS = [line for text in standard_library()[1][:3] for line in text.splitlines() if len(line.split()) > 4][:60]


def tokenizer_of(texts: list[str], size: int = 400) -> Any:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=size, min_frequency=1, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def llama(folder: Path, tokenizer: Any, classes: int | None = None) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=classes or len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classifier(folder: Path, tokenizer: Any, labels: list[str]) -> Path:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a classifier and their files."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tokenizer_of(TEXTS)
    llama(folder / "teacher", tokenizer)
    classifier(folder / "classifier", tokenizer, ["spam", "ham"])
    write_lines(folder / "train.jsonl", [{"text": text} for text in TEXTS[:40]])
    write_lines(folder / "eval.jsonl", [{"text": text} for text in TEXTS[40:]])
    labelled = [{"text": text, "label": "ham" if i % 3 else "spam"} for i, text in enumerate(TEXTS)]
    write_lines(folder / "labelled.jsonl", labelled)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = cli.main(argv)
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run with all that is usual."""
    argv = ["--teacher", str(place / "teacher"), "--train", str(place / "train.jsonl"), "--eval"]
    out = place / "run"
    assert cli.main(["distill", "language-model", *argv, str(place / "eval.jsonl"), "--out", str(out), *QUIET]) == 0
    return out


def test_a_run_leaves_a_student_for_from_pretrained_and_a_page(finished: Path, place: Path) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    assert isinstance(student, LstmForCausalLM)
    report = json.loads((finished / "report.json").read_text())
    texts = [json.loads(line)["text"] for line in (place / "eval.jsonl").read_text().splitlines()]
    nats = rows = 0.0
    for text in texts:  # the plainest evaluation there is
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:24]])
        logits = student(ids).logits[0, :-1].detach()
        nats += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        rows += len(logits)
    assert report["models"]["student"]["cross_entropy"] == pytest.approx(nats / rows, rel=1e-5)
    assert {"teacher", "student", "student alone"} == set(report["models"])
    page = (finished / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=[\"']?https?:", page)  # it needs no network
    assert f"{report['models']['student']['cross_entropy']:.4f}" in page
    assert "from_pretrained" in (finished / "README.md").read_text()


def test_evaluate_says_what_the_report_says(finished: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = json.loads((finished / "report.json").read_text())["models"]["student"]
    found = json.loads(run(capsys, "evaluate", str(finished)).splitlines()[-1])
    other = json.loads(run(capsys, "evaluate", str(finished), "--data", str(place / "eval.jsonl")).splitlines()[-1])
    for name in ("cross_entropy", "accuracy", "agreement"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)
        assert other[name] == pytest.approx(wanted[name], rel=1e-6)


def test_generate_is_transformers_own(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = transformers.AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    inputs = tokenizer("def read(self", return_tensors="pt")
    ids = student.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    wanted = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run(capsys, "generate", str(finished), "def read(self", "--max-new-tokens", "6") == wanted + "\n"


def test_a_stopped_run_goes_on_to_the_same_student(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reptile_ext.training import reptile

    calls = 0
    save = reptile.save_checkpoint

    def stop(*args: Any) -> None:
        nonlocal calls
        save(*args)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    argv = ["--teacher", str(place / "teacher"), "--train", str(place / "train.jsonl"), "--eval"]
    with monkeypatch.context() as patch:
        patch.setattr(reptile, "save_checkpoint", stop)
        argv += [str(place / "eval.jsonl"), "--out", str(tmp_path / "run"), *QUIET]
        assert cli.main(["distill", "language-model", *argv]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # from another folder
    run(capsys, "distill", "--resume", str(tmp_path / "run"), "--quiet")
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (finished, tmp_path / "run")
    )
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_data_that_changed_do_not_go_on(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_lines(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS[:20]])
    argv = ["--teacher", str(place / "teacher"), "--train", str(train), "--steps", "1", "--baseline", "no"]
    run(capsys, "distill", "language-model", *argv, "--out", str(tmp_path / "run"), *QUIET)
    write_lines(train, [{"text": text} for text in TEXTS[:21]])
    assert cli.main(["distill", "--resume", str(tmp_path / "run"), "--quiet"]) == 2
    assert "train: the data are others" in capsys.readouterr().err


STUDENTS: dict[str, Callable[[Path], str]] = {
    "the same folder": lambda place: str(place / "teacher"),
    "a configuration": lambda place: f"config:{place / 'teacher'},num_hidden_layers=1,hidden_size=8",
    "a transformer": lambda place: "builtin:transformer,width=8,layers=1,heads=2",
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_any_kind(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--teacher", str(place / "teacher"), "--train", str(place / "train.jsonl"), "--steps", "2"]
    argv += ["--student", STUDENTS[name](place), "--baseline", "no", "--out", str(tmp_path / "run"), *QUIET]
    run(capsys, "distill", "language-model", *argv)
    student = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    if name == "a configuration":
        assert student.config.num_hidden_layers == 1
        assert student.config.hidden_size == 8
    if name == "the same folder":  # nothing to learn: it stays what it was
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["models"]["student"]["agreement"] == 1.0
        assert 0 <= report["models"]["student"]["loss"] < 1e-7  # weight decay alone


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_alone_are_trained_and_then_merged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    other = transformers.LlamaForCausalLM.from_pretrained(place / "teacher")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "teacher")
    other.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    argv = ["--teacher", str(place / "teacher"), "--train", str(place / "train.jsonl"), "--steps", "4"]
    argv += ["--student", str(tmp_path / "student"), "--lora", "r=2", "--baseline", "no", "--learning-rate", "0.01"]
    run(capsys, "distill", "language-model", *argv, "--out", str(tmp_path / "run"), *QUIET)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    before = other.state_dict()
    changed = {name for name, x in found.items() if not torch.equal(x, before[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_a_module_of_ones_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_text.py").write_text(
        "from torch import nn\n"
        "def student(vocab_size):\n"
        "    return nn.Sequential(nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size))\n"
    )
    (tmp_path / "takes_ids.py").write_text(
        "import mine_of_text\n"
        "from torch import nn\n"
        "class Student(nn.Module):\n"
        "    def __init__(self, vocab_size):\n"
        "        super().__init__()\n"
        "        self.layers = mine_of_text.student(vocab_size)\n"
        "    def forward(self, input_ids, attention_mask=None):\n"
        "        return self.layers(input_ids)\n"
        "def make(vocab_size):\n"
        "    return Student(vocab_size)\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = ["--teacher", str(place / "teacher"), "--train", str(place / "train.jsonl"), "--steps", "2"]
    argv += ["--student", "takes_ids:make", "--out", str(tmp_path / "run"), "--baseline", "no", *QUIET]
    run(capsys, "distill", "language-model", *argv)
    found = json.loads(run(capsys, "evaluate", str(tmp_path / "run")).splitlines()[-1])
    wanted = json.loads((tmp_path / "run" / "report.json").read_text())["models"]["student"]
    assert found["cross_entropy"] == pytest.approx(wanted["cross_entropy"], rel=1e-6)


def test_vocabularies_padded_to_other_sizes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "teacher")
    llama(tmp_path / "padded", tokenizer, classes=len(tokenizer) + 24)
    argv = ["--teacher", str(tmp_path / "padded"), "--train", str(place / "train.jsonl"), "--steps", "2"]
    argv += ["--student", str(place / "teacher"), "--baseline", "no", "--out", str(tmp_path / "run"), *QUIET]
    assert "vocab = truncate" in run(capsys, "distill", "language-model", *argv)


def test_from_a_teacher_cache(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens lie beside the rows; of as many classes as there are, the loss is the teacher's own."""
    cache = str(tmp_path / "cache")
    teacher, train = str(place / "teacher"), str(place / "train.jsonl")
    classes = transformers.AutoConfig.from_pretrained(teacher).vocab_size
    run(capsys, "cache-teacher", teacher, train, "--k", str(classes), "--out", cache, "--max-kl", "1e-5", "--quiet")
    common = ["--student", teacher, "--steps", "1", "--learning-rate", "1e-9", "--baseline", "no", *QUIET]
    run(capsys, "distill", "language-model", "--teacher", cache, *common, "--out", str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "report.json").read_text())["models"]["student"]
    assert 0 <= found["loss"] < 2e-5
    assert cli.main(["distill", "language-model", "--teacher", cache, "--train", train, "--out", "x"]) == 2
    assert "train has no meaning with a teacher cache" in capsys.readouterr().err


def test_a_classifier_whose_teacher_has_another_tokenizer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model reads its own tokens; the teacher's labels decide the order of the classes."""
    tokenizer = tokenizer_of([text.upper() for text in TEXTS], 300)
    student = classifier(tmp_path / "student", tokenizer, ["ham", "spam"])
    argv = ["--teacher", str(place / "classifier"), "--student", str(student), "--steps", "3"]
    argv += ["--train", str(place / "labelled.jsonl"), "--out", str(tmp_path / "run"), *QUIET]
    run(capsys, "distill", "text-classification", *argv)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "spam", 1: "ham"}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 <= report["models"]["student"]["f1"] <= 1
    said = run(capsys, "generate", str(tmp_path / "run"), TEXTS[0])  # cut to the 32 positions of the student
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    tokens = own(TEXTS[0], return_tensors="pt", truncation=True, max_length=32)
    best = int(model(tokens["input_ids"], tokens["attention_mask"]).logits.argmax())
    assert said.startswith(model.config.id2label[best])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which classes are taken for which" in page


def test_texts_without_labels_for_the_distilled_student(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--teacher", str(place / "classifier"), "--steps", "2", "--per-label", "3", "--hard-weight", "0"]
    argv += ["--train", str(place / "labelled.jsonl"), "--transfer", str(place / "train.jsonl")]
    said = run(capsys, "distill", "text-classification", *argv, "--out", str(tmp_path / "run"), *QUIET)
    assert "the student without a teacher sees 6 labelled texts; the distilled one these and 40 others" in said


# What is wrong, and a word of what is said of it.
WRONG: dict[str, tuple[str, str]] = {
    "language-model --teacher {p}/teacher": ("train must name files", ""),
    "language-model --train {p}/train.jsonl": ("teacher must be given with --train", ""),
    "language-model --teacher {p}/nothing --train {p}/train.jsonl": ("nothing", ""),
    "language-model --teacher {p} --train {p}/train.jsonl": ("no config.json", ""),
    "language-model --teacher {p}/classifier --train {p}/train.jsonl": ("causal language model", ""),
    "text-classification --teacher {p}/teacher --train {p}/labelled.jsonl": ("sequence classifier", ""),
    "language-model --teacher {p}/teacher --train {p}/nothing.jsonl": ("there is no file", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --text-column txt": ("did you mean text?", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --max-length 99": ("context, 32", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --student builtin:lstn": ("did you mean lstm?", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --student builtin:lstm,wdth=3": ("width?", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --student {p}/classifier": ("causal", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --student nothing:make": ("imported", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --lora r=0": ("lora", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --lora rank=3": ("rank", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --streaming": ("streaming needs steps", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --steps 3 --epochs 1": ("give one", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --messages-column text": ("template", ""),
    "language-model --teacher {p}/teacher --train {p}/train.jsonl --teacher-dtype half": ("teacher-dtype", ""),
    "text-classification --teacher {p}/classifier --train {p}/train.jsonl": ("label", ""),
    "text-classification --teacher {p}/classifier --train {t}/other.jsonl": (
        "eggs",
        '{"text": "a b", "label": "ham"}\n{"text": "c d", "label": "eggs"}\n',
    ),
    "text-classification --teacher {p}/classifier --train {t}/one.jsonl": (
        "two",
        '{"text": "a b", "label": "ham"}\n{"text": "c d", "label": "ham"}\n',
    ),
    "language-model --teacher {p}/teacher --train {t}/empty.jsonl": ("empty", ""),
    "language-model --teacher {p}/teacher --train {t}/blank.jsonl": ("", '{"text": ""}\n{"text": " "}\n'),
    "language-model --teacher {p}/teacher --train {t}/broken.jsonl": ("line 2", '{"text": "a b"}\n{"text": \n'),
    "language-model --config {t}/wrong.toml": ("did you mean teacher?", 'techer = "x"\n'),
}


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_said_in_a_line(
    command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, content = WRONG[command]
    if found := re.search(r"\{t\}/(\S+)", command):
        (tmp_path / found[1]).write_text(content)
    argv = command.format(p=place, t=tmp_path).split()
    code = cli.main(["distill", *argv, "--out", str(tmp_path / "run"), "--quiet"])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "run").exists()


def test_other_tokenizers_are_refused_whatever_their_size(place: Path, tmp_path: Path) -> None:
    """Equal sizes with different ids; the same vocabulary that splits texts otherwise."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "teacher")
    assert compare_tokenizers(tokenizer, tokenizer) is None
    other = tokenizer_of([text[::-1] for text in TEXTS])
    assert len(other) == len(tokenizer)
    assert "is " in str(compare_tokenizers(tokenizer, other))
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    written["model"]["merges"] = written["model"]["merges"][:20]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(written))
    fewer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
    assert "tokens" in str(compare_tokenizers(tokenizer, fewer))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("org/model", "folder"),
        ("model", "folder"),
        ("C:model", "function"),
        ("package.module:make", "function"),
        ("builtin:lstm,width=3", "builtin"),
        ("config:folder,layers=2", "config"),
    ],
)
def test_what_a_name_means(text: str, kind: str) -> None:
    assert Named.parse("student", text).kind == kind


def test_padding_has_no_influence_on_the_lstm() -> None:
    torch.manual_seed(0)
    model = LstmForCausalLM(LstmConfig(vocab_size=50, width=6, state=8)).eval()
    ids = torch.randint(1, 50, (2, 5))
    wanted = model(ids).logits
    for mask in ([0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]):
        kept = torch.tensor(mask, dtype=torch.bool)
        padded = torch.zeros(2, 7, dtype=torch.long)
        padded[:, kept] = ids
        found = model(padded, torch.tensor([mask, mask])).logits[:, kept]
        torch.testing.assert_close(found, wanted)
    classes = LstmForSequenceClassification(LstmConfig(vocab_size=50, width=6, state=8, num_labels=3)).eval()
    padded = F.pad(ids, (2, 1))
    mask = F.pad(torch.ones_like(ids), (2, 1))
    torch.testing.assert_close(classes(padded, mask).logits, classes(ids).logits)


def test_a_saved_lstm_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LstmForCausalLM(LstmConfig(vocab_size=50, width=6, state=8)).eval()
    model.save_pretrained(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.output.weight is found.embedding.weight
    ids = torch.randint(0, 50, (2, 5))
    assert torch.equal(found(ids).logits, model(ids).logits)
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=3, pad_token_id=0)
    assert beams.shape == (2, 8)
