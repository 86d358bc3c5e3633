"""What a run leaves for the eye, against plain computations; and students for other programs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from reptile_ext import distillation_loss
from reptile_ext.export import export_model
from reptile_ext.report.answers import Answers, Calibration, collect
from reptile_ext.report.page import verdict, write_page
from reptile_ext.training import Reptile

CLASSES = 5


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batches() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(n, 4) * 3, torch.randint(0, CLASSES, (n,))) for n in (7, 1, 12)]


def test_answers_are_those_of_a_plain_computation() -> None:
    student, teacher = models()
    found = collect(Reptile(student, teacher), batches(), examples=4)
    x, labels = (torch.cat(of) for of in zip(*batches(), strict=True))
    with torch.no_grad():
        z, t = student(x), teacher(x)
    assert found.rows == 20
    wanted = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for label, first in zip(labels, z.argmax(-1), strict=True):
        wanted[label, first] += 1
    assert found.confusion == wanted.tolist()
    for name, logits in (("student", z), ("teacher", t)):
        error = MulticlassCalibrationError(CLASSES, n_bins=10)(logits.softmax(-1), labels)
        assert found.calibration[name].error == pytest.approx(float(error), abs=1e-6)
    far = distillation_loss(z, t, reduction="none")
    order = far.argsort(descending=True)[:4].tolist()
    assert [one.sample for one in found.disagreements] == order
    for one in found.disagreements:
        assert one.divergence == pytest.approx(float(far[one.sample]), rel=1e-5)
        assert one.label == int(labels[one.sample])
        assert one.teacher[0][0] == int(t[one.sample].argmax())
        assert one.teacher[0][1] == pytest.approx(float(t[one.sample].softmax(-1).max()), rel=1e-5)


def test_positions_of_tokens_and_ignored_ones() -> None:
    """Of a sample the row that is farthest, at its own position, and never one that is ignored."""
    torch.manual_seed(0)
    student, teacher = nn.Embedding(18, CLASSES), nn.Embedding(18, CLASSES)
    ids = torch.randperm(18).reshape(3, 6)
    labels = torch.randint(0, CLASSES, (3, 6))
    labels[0, 2:] = -100
    data = [(ids[:2], labels[:2]), (ids[2:], labels[2:])]
    found = collect(Reptile(student, teacher), data, examples=10)
    far = distillation_loss(student(ids), teacher(ids), reduction="none").detach()
    far[labels == -100] = -1
    assert {(one.sample, one.position) for one in found.disagreements} == {(i, int(far[i].argmax())) for i in range(3)}
    assert found.rows == int((labels != -100).sum())
    assert found.confusion is None


def test_a_perfect_calibration_has_no_error() -> None:
    one = Calibration([10, 0, 30], [0.2, 0.0, 0.9], [0.2, 0.0, 0.9])
    assert one.error == 0
    assert math.isclose(Calibration([1, 3], [0.5, 1.0], [0.0, 1.0]).error, 0.125)
    assert Calibration([0], [0.0], [0.0]).error == 0


def a_report() -> dict[str, Any]:
    values = {"parameters": 1000, "cross_entropy": 1.0, "accuracy": 0.5, "seconds": 2.0}
    return {
        "models": {
            "teacher": {**values, "parameters": 4000, "cross_entropy": 0.5},
            "student": {**values, "agreement": 0.75},
            "student alone": {**values, "cross_entropy": 1.25},
        },
        "notes": ["a note with <b>markup</b>"],
        "minutes": 0.1,
    }


def test_the_page_escapes_what_users_wrote(tmp_path: Path) -> None:
    student, teacher = models()
    evil = "<script>alert(1)</script>"
    path = tmp_path / "report.html"
    write_page(
        path,
        title=evil,
        report=a_report(),
        lines=[{"model": "student", "step": 1, "eval": {"cross_entropy": 1.0, "accuracy": 0.5}}],
        metrics=("cross_entropy", "accuracy"),
        settings={"train": [evil]},
        commands=evil,
        answers=collect(Reptile(student, teacher), batches()),
        class_name=lambda i: f"{evil} $x_{i}$",
        sample_text=lambda sample, position: evil,
        generations=[{"prompt": evil, "text": evil}],
    )
    page = path.read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert") > 5
    assert "1.2500" in page
    assert "0.2500 better than" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("alone", "words"), [(1.25, "better than"), (0.5, "worse than"), (1.0, "the same as")])
def test_the_verdict_is_what_the_numbers_say(alone: float, words: str) -> None:
    report = a_report()
    report["models"]["student alone"]["cross_entropy"] = alone
    said = verdict(report, "cross_entropy")
    assert f"{abs(alone - 1):.4f} {words}" in said
    assert "4.0 times the parameters" in said


def test_an_empty_answer_has_a_page(tmp_path: Path) -> None:
    report = a_report()
    del report["models"]["student alone"], report["models"]["teacher"]
    write_page(
        tmp_path / "report.html",
        title="t",
        report=report,
        lines=[],
        metrics=("cross_entropy",),
        settings={},
        commands="",
        answers=Answers(),
    )
    assert "1.0000" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------ export


def example() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_an_exported_student_says_the_same_whatever_the_size(to: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.LlamaForCausalLM(config)
    path = tmp_path / "student"
    assert export_model(model, example(), path, to)["largest_difference"] < 1e-5
    ids = torch.randint(1, 20, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # which must count in the file, too
    wanted = model.eval()(input_ids=ids, attention_mask=mask).logits.detach()
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
    else:
        with path.open("rb") as file:
            found = torch.export.load(file).module()(ids, mask).detach()
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_lstm_goes_to_onnx_and_is_refused_by_torch_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from reptile_ext.families.text.lstm import LstmConfig, LstmForSequenceClassification

    model = LstmForSequenceClassification(LstmConfig(vocab_size=20, width=4, state=6, num_labels=3))
    assert export_model(model, example(), tmp_path / "s.onnx")["largest_difference"] < 1e-5
    with pytest.raises(ValueError, match="for one length alone"):
        export_model(model, example(), tmp_path / "s.pt2", "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]
    with pytest.raises(ValueError, match="to must be one of onnx, torch-export; got 'tflite'"):
        export_model(model, example(), tmp_path / "s", "tflite")


def test_a_file_that_says_something_else_is_not_left_behind(tmp_path: Path) -> None:
    """A model whose graph depends on values is written out for those of the example."""

    class ByValue(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            n = input_ids.shape[1] if torch.compiler.is_exporting() else 1
            return (input_ids.float() + n)[..., None]

    with pytest.raises(ValueError, match="differ"):
        export_model(ByValue(), example(), tmp_path / "s.pt2", "torch-export")
    assert not list(tmp_path.iterdir())
