"""What people who distil have lost weeks to, each kind in a few lines: what is right comes out, or a clear error."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training import dataset, loader, perceptron, sgd, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

import reptile_ext
from reptile_ext.training import Objective, Reptile, Until
from reptile_ext.training.batches import num_samples, split
from reptile_ext.training.checkpoint import read_log


def fit(student: Any, teacher: Any, data: Any, steps: int = 1, fit_keywords: Any = None, **keywords: Any) -> Any:
    keywords = {"optimizer": sgd, "clip": None} | keywords
    reptile = Reptile(student, teacher, **keywords)
    return reptile.fit(data, until=steps, progress_bar=False, **(fit_keywords or {}))


def kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def moved_by(student: nn.Module, loss: Any) -> Tensor:
    """The weights after a step of `sgd` by this loss of the student, on a copy."""
    student = copy.deepcopy(student)
    optimizer = sgd(student.parameters())
    loss(student).backward()
    optimizer.step()
    return weights(student)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


class Language(nn.Module):
    """Ids [B, T] to logits [B, T, V] as an HF-style output."""

    def __init__(self, seed: int, classes: int = 11, **extra: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.output = nn.Embedding(classes, 8), nn.Linear(8, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.output(self.embedding(input_ids.long())))


IDS = torch.randint(1, 11, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 2:] = MASK[2, 4:] = 0


# ------------------------------------------------------------------------------------------------ rows that count


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused_linear", [False, True])
def test_padding_does_not_count_where_there_is_a_mask(accumulate: int, fused_linear: bool) -> None:
    student, teacher = Language(0), Language(1)
    if fused_linear:
        student.get_output_embeddings = lambda: student.output  # type: ignore[assignment]

    def by_hand(model: nn.Module) -> Tensor:
        return kl(model(IDS).logits, teacher(IDS).logits.detach())[MASK.bool()].mean()

    wanted = moved_by(student, by_hand)
    batches = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(IDS.chunk(accumulate), MASK.chunk(accumulate), strict=True)
    ]
    value = Reptile(student, teacher, fused_linear=fused_linear).evaluate(batches)["loss"]
    assert value == pytest.approx(by_hand(student).item(), rel=1e-5)
    rows = fit(student, teacher, batches, accumulate=accumulate, fused_linear=fused_linear).rows
    assert rows == MASK.sum()
    close(weights(student), wanted)


def test_a_mask_of_what_the_logits_are_not_of_is_not_looked_at() -> None:
    class Classifier(Language):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=self.output(self.embedding(input_ids).mean(1)))

    student, teacher = Classifier(0), Classifier(1)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    wanted = kl(student(IDS).logits, teacher(IDS).logits).mean().item()
    assert Reptile(student, teacher).evaluate([batch])["loss"] == pytest.approx(wanted, rel=1e-5)
    assert fit(student, teacher, [batch] * 2, accumulate=2).rows == 8


def test_the_number_of_samples_is_not_that_of_the_first_tensor() -> None:
    assert num_samples({"pixel_values": torch.zeros(80, 3), "input_ids": IDS}) == 4
    assert num_samples({"use_cache": False, "scale": torch.tensor(2.0), "x": torch.zeros(5, 2)}) == 5
    with pytest.raises(ValueError, match=r"disagree on the number of samples: \{'a': \[2\], 'b': \[3\]\}"):
        num_samples({"a": torch.zeros(2), "b": torch.zeros(3)})

    class Images(Language):
        def forward(self, pixel_values: Tensor, input_ids: Tensor, use_cache: bool = True) -> Any:  # type: ignore[override]
            return super().forward(input_ids)

    batch = {"use_cache": False, "pixel_values": torch.zeros(80, 3), "input_ids": IDS}
    student, teacher = Images(0), Images(1)
    wanted = moved_by(student, lambda model: kl(model(**batch).logits, teacher(**batch).logits.detach()).mean())
    halves = [{**batch, "input_ids": ids, "pixel_values": torch.zeros(40, 3)} for ids in IDS.chunk(2)]
    fit(student, teacher, halves, accumulate=2)
    close(weights(student), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32])
@pytest.mark.parametrize("shift_labels", [False, True])
def test_narrow_labels_are_those_of_int64(dtype: torch.dtype, shift_labels: bool) -> None:
    """In uint8, 156 is −100; so it is when the label of nothing is put at the end."""
    found = []
    for kind in (dtype, torch.int64):
        student, labels = Language(0, 171), torch.full((4, 6), 156).to(kind)
        labels[0] = 3
        result = fit(student, Language(1, 171), [(IDS, labels)], hard_weight=1.0, shift_labels=shift_labels)
        found.append((result.rows, weights(student)))
    assert found[0][0] == found[1][0] == (20 if shift_labels else 24)
    assert torch.equal(found[0][1], found[1][1])


def test_a_label_that_wrapped_around_is_no_ignored_one() -> None:
    labels = torch.tensor([0, 255, 1]).to(torch.int8)  # −1, and not 255
    with pytest.raises(ValueError, match="equal ignore_index=255; got -1"):
        fit(perceptron(8, 0), perceptron(8, 1), [(torch.zeros(3, 6), labels)], ignore_index=255, hard_weight=1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_of_samples_and_of_rows(accumulate: int) -> None:
    teacher, labels = Language(1), IDS.roll(-1, 1)
    labels[1, 3:] = -100
    for weight in (torch.tensor([0.1, 0.0, 0.2, 0.3]), torch.rand(4, 6)):
        rows = weight.reshape(4, -1).expand(4, 6) * (labels != -100)

        def by_hand(model: nn.Module, rows: Tensor = rows) -> Tensor:
            logits = model(IDS).logits
            hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(4, 6)
            return (rows * (kl(logits, teacher(IDS).logits.detach()) + 0.5 * hard)).sum() / rows.sum()

        student = Language(0)
        wanted = moved_by(student, by_hand)
        parts = [x.chunk(accumulate) for x in (IDS, labels, weight)]
        triples = list(zip(*parts, strict=True))
        mappings = [dict(zip(("input_ids", "labels", "sample_weight"), one, strict=True)) for one in triples]
        for batches in (triples, mappings):
            one = copy.deepcopy(student)
            assert Reptile(one, teacher, hard_weight=0.5).evaluate(batches)["loss"] == pytest.approx(
                by_hand(one).item(), rel=1e-5
            )
            fit(one, teacher, batches, hard_weight=0.5, accumulate=accumulate)
            close(weights(one), wanted)
    with pytest.raises(
        TypeError, match=r"sample_weight must be a floating-point tensor; got a tensor of torch.int64 \(in a"
    ):
        split((IDS, labels, torch.arange(4)), False, -100)
    with pytest.raises(ValueError, match=r"sample_weight must have the shape of the samples, \[4\].*got \[3\]"):
        fit(Language(0), teacher, [(IDS, labels, torch.ones(3))])


def test_without_labels_weights_of_samples_divide_by_their_sum() -> None:
    student, teacher, weight = Language(0), Language(1), torch.tensor([0.1, 0.2, 0.0, 0.4])

    def by_hand(model: nn.Module) -> Tensor:
        each = kl(model(IDS).logits, teacher(IDS).logits.detach()).mean(1)
        return (weight * each).sum() / weight.sum()

    wanted = moved_by(student, by_hand)
    batches = [{"input_ids": i, "sample_weight": w} for i, w in zip(IDS.chunk(2), weight.chunk(2), strict=True)]
    fit(student, teacher, batches, accumulate=2)
    close(weights(student), wanted)


def test_a_step_of_no_row_is_none() -> None:
    """No weight decay, no momentum, no count; and a batch of no sample is not run."""
    inputs, labels = dataset(16).tensors
    ignored = torch.full_like(labels, -100)
    empty = (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    student, other = (nn.Sequential(nn.BatchNorm1d(6), perceptron(8, 0)) for _ in range(2))
    good = (inputs, labels)
    keywords: dict[str, Any] = {"optimizer": None, "weight_decay": 0.5, "learning_rate": 0.1}
    assert fit(student, perceptron(8, 1), [good, (inputs, ignored), empty, good], steps=2, **keywords).rows == 32
    fit(other, perceptron(8, 1), [good, good], steps=2, **keywords)
    assert torch.equal(weights(student), weights(other))
    # In one step with others.
    student, other = (nn.Sequential(nn.BatchNorm1d(6), perceptron(8, 0)) for _ in range(2))
    fit(student, perceptron(8, 1), [empty, good], accumulate=2)
    fit(other, perceptron(8, 1), [good])
    close(weights(student), weights(other))


def test_rows_that_never_count_are_spoken_of() -> None:
    inputs, labels = dataset(16).tensors
    nothing = (inputs, torch.full_like(labels, -100))
    with pytest.warns(
        UserWarning, match=r"10 steps in a row have no row that counts \(labels other than ignore_index=-100"
    ):
        fit(perceptron(8, 0), perceptron(8, 1), [nothing] * 12 + [(inputs, labels)])
    with pytest.raises(ValueError, match="got a whole pass with no row that counts"):
        fit(perceptron(8, 0), perceptron(8, 1), [nothing] * 3)


# ------------------------------------------------------------------------------------------------ whose labels


transformers = pytest.importorskip("transformers")


def gpt2(width: int) -> Any:
    torch.manual_seed(width)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=30, n_positions=16, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def test_a_causal_language_model_of_transformers_gets_the_labels_its_own_loss_would() -> None:
    ids = torch.randint(1, 30, (3, 8))
    batch = {"input_ids": ids, "labels": ids}
    student = gpt2(8)
    wanted = student.eval()(**batch).loss.item()
    for model in (student, torch.compile(student, backend="eager")):
        assert Reptile(model, None).evaluate([batch])["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
def test_an_adapted_model_shifts_as_what_it_adapts() -> None:
    import peft

    adapted = peft.get_peft_model(gpt2(8), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert Objective(adapted, None).shift_labels


def config_of(kind: str) -> Any:
    """The smallest configuration of a model type that runs here."""
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "num_key_value_heads": 2, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    more |= {
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "d_inner": 16,
    }
    more |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "is_decoder": True, "emb_dim": 16, "n_heads": 2}
    more |= {"n_layers": 1, "max_position_embeddings": 32, "ffn_dim": 16, "word_embed_proj_dim": 16}
    found = transformers.AutoConfig.for_model(kind)
    for name, value in {**small, **more}.items():
        if hasattr(found, name) or name == "is_decoder":
            with contextlib.suppress(NotImplementedError):  # XLNet has no greatest length
                setattr(found, name, value)
    return found


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "llama", "opt", "bert", "gpt_neox", "bart", "pegasus", "xlnet", "qwen2", "mistral", "bloom", "roberta"],
)
def test_who_shifts_is_known(kind: str) -> None:
    """Measured: the model's own loss is the cross entropy of shifted labels, or of labels as they are."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind)).eval()
    ids = torch.randint(1, 30, (3, 8))
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    logits = output.logits.float()
    apart = F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(apart - shifted) > 1e-4
    shifts = abs(output.loss.item() - shifted) < abs(output.loss.item() - apart)
    assert min(abs(output.loss.item() - value) for value in (shifted, apart)) < 1e-4
    assert Objective(model, None).shift_labels == shifts


def test_labels_one_position_off_are_refused() -> None:
    ids = torch.randint(1, 11, (3, 8))
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    copying = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"labels equal the input ids at the same positions.*shift_labels=True"):
        fit(Language(0), Language(1), [copying])
    with pytest.raises(ValueError, match="labels equal the input ids at the same positions"):
        fit(Language(0), Language(1), [(ids, ids.masked_fill(ids == 3, -100))])
    with pytest.raises(
        ValueError, match="already the next input ids, and shift_labels shifts them once more: pass False"
    ):
        fit(gpt2(8), gpt2(16), [{"input_ids": ids, "labels": shifted}])
    with pytest.warns(UserWarning, match="labels equal the input ids at the same positions"):
        fit(Language(0), Language(1), [copying], shift_labels=False)
    with pytest.warns(UserWarning, match="already the next input ids"):
        fit(Language(0), Language(1), [{"input_ids": ids, "labels": shifted}], shift_labels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Language(0), Language(1), [{"input_ids": ids, "labels": shifted}])
        fit(Language(0), Language(1), [copying], shift_labels=True)
        fit(Language(0), Language(1), [{"input_ids": ids[:, :1], "labels": ids[:, :1]}])  # nothing to tell by
        same = torch.full_like(ids, 3)  # the same tokens everywhere: both at once
        fit(Language(0), Language(1), [{"input_ids": same, "labels": same}])


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_models_with_a_decoder_make_its_inputs_from_the_labels(kind: str) -> None:
    common = {"vocab_size": 30, "d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    heads = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32, "bos_token_id": 0}
    torch.manual_seed(0)
    if kind == "t5":
        config = transformers.T5Config(**common, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        make: Any = transformers.T5ForConditionalGeneration
    elif kind == "bart":
        config = transformers.BartConfig(**common, **layers, **heads, dropout=0.0)
        make = transformers.BartForConditionalGeneration
    else:
        lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "bos_token_id": 0}
        del heads["max_position_embeddings"], heads["bos_token_id"]
        config = transformers.WhisperConfig(**common, **layers, **heads, **lengths, dropout=0.0, suppress_tokens=None)
        make = transformers.WhisperForConditionalGeneration
    student, teacher = make(config).eval(), make(config).eval()
    labels = torch.randint(3, 30, (3, 5))
    labels[0, 3:] = -100
    inputs = (
        {"input_features": torch.randn(3, 8, 20)} if kind == "whisper" else {"input_ids": torch.randint(3, 30, (3, 6))}
    )
    batch = {**inputs, "labels": labels}
    with torch.no_grad():
        s, t = student(**batch), teacher(**batch)
    wanted = kl(s.logits, t.logits)[labels != -100].mean() + 0.5 * s.loss
    found = Reptile(student, teacher, hard_weight=0.5).evaluate([batch])["loss"]
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    fit(student, teacher, [batch], hard_weight=0.5)


# ------------------------------------------------------------------------------------------------ whose inputs


def test_teacher_and_student_may_have_different_inputs() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    inputs, labels = dataset(16).tensors
    wanted = moved_by(student, lambda model: kl(model(inputs), teacher(inputs.flip(1)).detach()).mean())
    ways: list[tuple[Any, dict[str, Any]]] = [
        ({"student_inputs": inputs, "teacher_inputs": inputs.flip(1), "labels": labels}, {}),
        ((inputs, labels), {"teacher_inputs": lambda x: x.flip(1)}),
        ((inputs.flip(1), labels), {"student_inputs": lambda x: x.flip(1)}),
        (inputs.flip(1), {"student_inputs": lambda x: x.flip(1)}),
    ]
    for batch, keywords in ways:
        one = copy.deepcopy(student)
        fit(one, teacher, [batch], **keywords)
        close(weights(one), wanted)
    with pytest.raises(ValueError, match="got both: 'student_inputs' and \\['x'\\]"):
        fit(student, teacher, [{"student_inputs": inputs, "x": inputs}])


def test_the_teacher_s_answers_may_come_in_the_batch() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    inputs, labels = dataset(16).tensors
    answers = teacher(inputs).detach()
    wanted = moved_by(student, lambda model: kl(model(inputs), answers).mean())
    batch = {"student_inputs": inputs, "labels": labels, "teacher_logits": answers}
    for given in ("batch", lambda x: pytest.fail("the teacher was asked")):
        one = copy.deepcopy(student)
        fit(one, given, [batch])
        close(weights(one), wanted)
    with pytest.raises(ValueError, match="teacher='batch' needs 'teacher_logits' in every batch"):
        fit(student, "batch", [(inputs, labels)])
    with pytest.raises(ValueError, match="teacher=None trains on labels alone; got a batch with 'teacher_logits'"):
        fit(student, None, [batch])
    with pytest.raises(ValueError, match=r"teacher_logits must be 1 floating-point tensors; got \['torch.int64'\]"):
        fit(student, "batch", [{**batch, "teacher_logits": labels}])


def test_inputs_are_cast_to_the_dtype_of_each_model() -> None:
    inputs = dataset(16).tensors[0]
    student, teacher = perceptron(8, 0), perceptron(8, 1).bfloat16()
    answers = teacher(inputs.bfloat16()).float().detach()
    wanted = moved_by(student, lambda model: kl(model(inputs), answers).mean())
    fit(student, teacher, [inputs])
    close(weights(student), wanted)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.float16), ("float16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_teacher_of_the_other_half_precision_keeps_to_it(precision: str, dtype: torch.dtype) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(30, 16), nn.LayerNorm(16), nn.Linear(16, 4))  # a norm does not take two dtypes

    inputs = torch.randn(16, 30)
    student, teacher = model(0), model(1).to(dtype)
    answers = teacher(inputs.to(dtype)).detach()
    reptile = Reptile(student, teacher, precision=precision, optimizer=sgd, clip=None)
    assert reptile.fit([inputs], until=1, progress_bar=False).steps == 1
    found = reptile.evaluate([inputs])["loss"]
    assert found == pytest.approx(kl(student(inputs), answers.float()).mean().item(), rel=0.05)
    if dtype == torch.float16 or precision == "float16":  # autocast trains float32 weights
        with pytest.raises(ValueError, match=f"precision='{precision}' trains float32 weights .* pass student.float()"):
            Reptile(model(0).to(dtype), model(1), precision=precision)


# ------------------------------------------------------------------------------------------------ teachers


def test_a_teacher_may_be_a_function_and_there_may_be_several() -> None:
    inputs = dataset(16).tensors[0]
    student, first, second = perceptron(8, 0), perceptron(8, 1), perceptron(16, 2)

    def loss(model: nn.Module, shares: tuple[float, float]) -> Tensor:
        logits = model(inputs)
        return sum(w * kl(logits, t(inputs).detach()).mean() for w, t in zip(shares, (first, second), strict=True))

    for shares, weigh in (((0.5, 0.5), None), ((0.7, 0.1), (0.7, 0.1))):
        wanted = moved_by(student, lambda model, shares=shares: loss(model, shares))
        one = copy.deepcopy(student)
        reptile = Reptile(
            one, [first, lambda x: second(x)], teacher_weights=weigh, optimizer=sgd, clip=None, metrics="agreement"
        )
        found = reptile.evaluate([inputs])
        assert found["loss"] == pytest.approx(loss(one, shares).item(), rel=1e-5)
        together = sum(w * t(inputs).softmax(-1) for w, t in zip(shares, (first, second), strict=True))
        assert found["agreement"] == pytest.approx(
            (one(inputs).argmax(-1) == together.argmax(-1)).float().mean().item()
        )  # type: ignore[union-attr]
        reptile.fit([inputs], until=1, progress_bar=False)
        close(weights(one), wanted)
    with pytest.raises(ValueError, match="teacher_weights must be a number of at least 0 for each of 2 teachers"):
        Reptile(student, [first, second], teacher_weights=[1.0])
    with pytest.raises(
        TypeError, match=r"teacher must be a module or function .*got a list of \['Sequential', 'int'\]"
    ):
        Reptile(student, [first, 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got 'big'"):
        Reptile(student, "big")


def test_several_teachers_learn_the_labels_once() -> None:
    inputs, labels = dataset(16).tensors
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    found = [
        Reptile(student, teachers, hard_weight=0.5).evaluate([(inputs, labels)])["loss"]
        for teachers in (teacher, [teacher, copy.deepcopy(teacher)])
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_teacher_that_may_not_be_moved_is_used_where_it_is() -> None:
    class Quantised(nn.Sequential):
        is_quantized = True

        def to(self, *_: Any, **__: Any) -> Any:
            raise ValueError("`.to` is not supported for 4-bit models")

    fit(perceptron(8, 0), Quantised(*perceptron(8, 1)), loader())

    class Dispatched(nn.Module):
        """One part's weights are on the meta device, and a hook brings them when they are wanted."""

        def __init__(self) -> None:
            super().__init__()
            self.real, self.away = perceptron(8, 1), nn.Linear(6, 4, device="meta")
            self._hf_hook = object()

        def forward(self, x: Tensor) -> Any:
            return self.real(x)

        def to(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("Cannot copy out of meta tensor")

    fit(perceptron(8, 0), Dispatched(), loader())


@pytest.mark.parametrize("how", ["data", "assign", "slice", "view as another shape", "numpy"])
def test_a_student_in_its_teacher_s_memory_is_refused(how: str) -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    if how == "data":
        student[0].weight = nn.Parameter(teacher[0].weight.data)
    elif how == "assign":
        student.load_state_dict(teacher.state_dict(), assign=True)
    elif how == "slice":
        teacher = perceptron(16, 1)
        student[0].weight = nn.Parameter(teacher[0].weight.data[4:12])
    elif how == "view as another shape":
        student[0].bias = nn.Parameter(teacher[0].weight.data.flatten()[:8])
    else:
        student[0].weight = nn.Parameter(torch.from_numpy(teacher[0].weight.detach().numpy()))
    for given in (teacher, [perceptron(8, 3), teacher]):
        with pytest.raises(
            ValueError, match=r"share . parameters .* or their memory: training the student would change"
        ):
            Reptile(student, given)


def test_what_is_frozen_in_the_student_may_be_shared() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    student[0] = teacher[0]
    student[0].requires_grad_(False)
    before = weights(teacher)
    fit(student, teacher, loader(), steps=3)
    assert torch.equal(weights(teacher), before)


def test_a_teacher_that_the_first_step_changes_is_noticed() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)

    def both(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([*parameters, *teacher.parameters()], lr=0.5, weight_decay=0.1)

    for parameter in teacher.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="the first step changed the teacher"):
        fit(student, teacher, loader(), optimizer=both)


# ------------------------------------------------------------------------------------------------ modes


def test_frozen_parts_in_eval_mode_stay_there() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Any:
            return self.head(self.body(x))

    for whole_in_eval in (False, True):
        student = Net()
        student.body.requires_grad_(False)
        (student if whole_in_eval else student.body).eval()
        modes, before = set(), student.body[1].running_mean.clone()
        student.body.register_forward_hook(
            lambda module, *_: modes.add((*(part.training for part in student.body), student.head[0].training))  # noqa: B023
        )
        fit(student, perceptron(8, 1), loader(), steps=4)
        assert modes == {(False, False, False, True)}
        assert torch.equal(student.body[1].running_mean, before)
        assert not student.body.training
        assert student.training != whole_in_eval


def test_parts_that_were_put_in_eval_mode_alone_stay_there() -> None:
    student = nn.Sequential(nn.BatchNorm1d(6), perceptron(8, 0))
    student[0].eval()  # its scale is trained, its statistics are not
    fit(student, perceptron(8, 1), loader(), steps=2)
    assert (student[0].running_mean == 0).all()
    assert (student[0].weight != 1).any()


# ------------------------------------------------------------------------------------------------ one logit


@pytest.mark.parametrize("shape", ["[B, 1]", "[B]", "[B, 1, H, W]"])
@pytest.mark.parametrize("teacher", [True, False])
def test_one_logit_is_refused_with_the_way_out(shape: str, teacher: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 1, 1) if "H" in shape else nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x).squeeze(-1) if shape == "[B]" else self.layer(x)

    inputs = torch.randn(4, 3, 2, 2) if "H" in shape else torch.randn(4, 6)
    labels = torch.zeros((4, 2, 2) if "H" in shape else (4,), dtype=torch.long)
    student, before = Net(), None
    before = weights(student)
    with pytest.raises(ValueError, match=r"softmax is always 1.*Reptile\(binary=True\).*binary_distillation_loss"):
        fit(student, Net() if teacher else None, [(inputs, labels)], dim=1 if "H" in shape else -1)
    assert torch.equal(weights(student), before)


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_resumed_for_longer_the_rates_are_those_of_the_longer_run(schedule: str, warmup: int, tmp_path: Path) -> None:
    def rates(folder: str, *lengths: int) -> list[float]:
        for steps in lengths:
            fit(
                perceptron(8, 0),
                perceptron(8, 1),
                loader(),
                steps,
                {"folder": tmp_path / folder, "resume": True, "log_every": 1},
                optimizer=None,
                schedule=schedule,
                warmup=warmup,
            )
        return [line["lr"] for line in read_log(tmp_path / folder / "metrics.jsonl")]

    longer, at_once = rates("longer", 20, 40), rates("at once", 40)
    assert longer[20:] == at_once[20:]
    assert len(longer) == 40
    assert schedule == "constant" or longer[:20] != at_once[:20]


def test_temperature_and_hard_weight_have_schedules() -> None:
    inputs, labels = dataset(16).tensors
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    by_hand = copy.deepcopy(student)
    optimizer = sgd(by_hand.parameters())
    for step in range(5):
        loss = reptile_ext.distillation_loss(
            by_hand(inputs), teacher(inputs).detach(), labels, temperature=5.0 - step, hard_weight=0.25 * step
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hard_weight in (lambda step: 0.25 * step, "linear:0→1"):
        one = copy.deepcopy(student)
        seen: list[dict[str, Any]] = []
        fit(
            one,
            teacher,
            [(inputs, labels)],
            5,
            {"callback": seen.append},
            temperature="linear:5->1" if callable(hard_weight) else (lambda step: 5.0 - step),
            hard_weight=hard_weight,
        )
        close(weights(one), weights(by_hand))
    assert seen[-1]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"temperature must be a number, a function of the step, or such as .*got 'warm'"
    ):
        Reptile(student, teacher, temperature="warm")
    with pytest.raises(ValueError, match=r"temperature must be .*got -1.0"):
        Reptile(student, teacher, temperature="linear:-1->2")
    with pytest.raises(ValueError, match=r"'linear:4->1' ends at until.steps; got until.steps=None"):
        Reptile(student, teacher, temperature="linear:4->1").fit(loader(), until=Until(minutes=1), progress_bar=False)
    with pytest.raises(ValueError, match="changes what loss means"):
        Reptile(student, teacher, temperature="linear:4->1").fit(
            loader(), loader(), until=Until(steps=5, patience=1), progress_bar=False
        )


def test_the_ends_of_a_written_schedule_are_reached() -> None:
    from reptile_ext.training.schedules import as_function

    for text in ("linear:4->1", "cosine:4→1"):
        values = [as_function("temperature", text, 11)(step) for step in (0, 5, 10, 11)]
        assert values == pytest.approx([4.0, 2.5, 1.0, 1.0])


# ------------------------------------------------------------------------------------------------ the student's own


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(8, 0)

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        return SimpleNamespace(logits=logits, aux_loss=logits.square().mean(), loss=logits.sum())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_student_s_own_losses_are_added_by_name(accumulate: int) -> None:
    inputs, teacher = dataset(16).tensors[0], perceptron(8, 1)

    def by_hand(model: nn.Module) -> Tensor:
        output = model(inputs)
        loss: Tensor = kl(output.logits, teacher(inputs).detach()).mean() + 0.3 * output.aux_loss
        return loss

    student = Expert()
    wanted = moved_by(student, by_hand)
    fit(
        student,
        teacher,
        inputs.split([16] if accumulate == 1 else [4, 12]),
        accumulate=accumulate,
        auxiliary={"aux_loss": 0.3},
    )
    close(weights(student), wanted)


def test_a_loss_of_the_student_that_is_left_out_is_named() -> None:
    with pytest.warns(
        UserWarning, match="'aux_loss', a loss of its own, which is not added: pass auxiliary="
    ) as caught:
        fit(Expert(), perceptron(8, 1), loader(), steps=3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Expert(), perceptron(8, 1), loader(), steps=2, auxiliary={"aux_loss": 0.0})
    with pytest.raises(ValueError, match="auxiliary names 'z_loss', which the student's output has not"):
        fit(perceptron(8, 0), perceptron(8, 1), loader(), auxiliary={"z_loss": 1.0})


# ------------------------------------------------------------------------------------------------ logits as scratch


def in_place(student: nn.Module, monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> bool:
    """Whether the loop writes the gradient over this student's logits; the step is right in any case."""
    seen = []
    from reptile_ext.modules import DistillationLoss

    loss = DistillationLoss.loss
    monkeypatch.setattr(
        DistillationLoss, "loss", staticmethod(lambda *args, **kw: (seen.append(kw["inplace"]), loss(*args, **kw))[1])
    )
    inputs, teacher = dataset(16).tensors[0], perceptron(8, 1)

    def by_hand(model: nn.Module) -> Tensor:
        return kl(model(inputs), teacher(inputs).detach()).mean()

    wanted = moved_by(student, by_hand)
    fit(student, teacher, [inputs], **keywords)
    close(weights(student), wanted)
    monkeypatch.undo()
    return seen[0]


class Ends(nn.Module):
    """A perceptron with something after it."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.body, self.end, self.kept = perceptron(8, 0), end, []

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.body(x))


only_where_torch_tells = pytest.mark.skipif(not hasattr(torch.Tensor, "_use_count"), reason="torch does not tell")


@only_where_torch_tells
def test_logits_that_nobody_else_has_are_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_place(perceptron(8, 0), monkeypatch)
    assert in_place(Ends(lambda self, logits: logits * 2), monkeypatch)
    assert in_place(Ends(lambda self, logits: logits[:, :4]), monkeypatch)
    assert in_place(Ends(lambda self, logits: logits.reshape(16, 1, 4).squeeze(1)), monkeypatch)
    assert not in_place(perceptron(8, 0), monkeypatch, inplace=False)


def test_logits_that_somebody_has_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps(self: Any, logits: Tensor) -> Tensor:
        self.kept.append(logits)
        return logits

    def keeps_a_view(self: Any, logits: Tensor) -> Tensor:
        self.kept.append(logits[:, :2])
        return logits

    def keeps_the_base(self: Any, logits: Tensor) -> Tensor:
        self.kept.append(logits)
        return logits[:, :4]

    def keeps_a_graph(self: Any, logits: Tensor) -> Tensor:
        self.kept.append(logits * logits)
        return logits

    def detached(self: Any, logits: Tensor) -> Tensor:
        self.kept.append(logits.detach())
        return logits

    for end in (keeps, keeps_a_view, keeps_the_base, keeps_a_graph, detached):
        student = Ends(end)
        assert not in_place(student, monkeypatch), end
        logits = student.body(dataset(16).tensors[0])
        before = Ends(lambda self, logits: logits).body(dataset(16).tensors[0])
        assert logits.shape == before.shape
        first = student.kept[-1]  # of the step: what it was before the step changed the weights
        wanted = keeps_what(end, before)
        close(first.detach(), wanted.detach())
    for end in (
        lambda self, logits: logits.tanh(),  # saves its result
        lambda self, logits: logits.softmax(-1),
        lambda self, logits: logits.expand(16, 4),
    ):
        in_place(Ends(end), monkeypatch)  # right, whichever way

    hooked = perceptron(8, 0)
    kept: list[Tensor] = []
    hooked.register_forward_hook(lambda module, inputs, output: kept.append(output))
    assert not in_place(hooked, monkeypatch)
    close(kept[-1].detach(), perceptron(8, 0)(dataset(16).tensors[0]).detach())


def keeps_what(end: Any, logits: Tensor) -> Tensor:
    found = SimpleNamespace(kept=[])
    end(found, logits)
    kept: Tensor = found.kept[0]
    return kept


def test_logits_that_are_a_parameter_are_left_alone() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(16, 4))

        def forward(self, x: Tensor) -> Any:
            return self.logits

    inputs, student, teacher = dataset(16).tensors[0], Table(), perceptron(8, 1)
    wanted = moved_by(student, lambda model: kl(model(inputs), teacher(inputs).detach()).mean())
    fit(student, teacher, [inputs])
    close(weights(student), wanted)


def test_outputs_of_an_objective_taken_step_by_step_are_the_caller_s() -> None:
    inputs, student = dataset(16).tensors[0], perceptron(8, 0)
    objective = Objective(student, perceptron(8, 1))
    batch = objective.split(inputs)
    outputs = objective.student_outputs(student, batch)
    before = outputs.detach().clone()
    objective.loss(outputs, objective.teacher_outputs(batch), batch, 16).backward()
    assert torch.equal(outputs.detach(), before)


# ------------------------------------------------------------------------------------------------ steps


def test_a_callback_sees_each_step() -> None:
    seen: list[dict[str, Any]] = []
    result = fit(
        perceptron(8, 0), perceptron(8, 1), loader(), 5, {"callback": seen.append, "eval": loader(), "eval_every": 2}
    )
    assert [values["step"] for values in seen] == [1, 2, 3, 4, 5]
    assert [values["rows"] for values in seen] == [16, 32, 48, 64, 80]
    assert ["eval" in values for values in seen] == [False, True, False, True, True]
    assert seen[-1]["eval"] == result.metrics
    assert all(values["loss"] > 0 and values["lr"] == 0.5 for values in seen)


def test_steps_that_float16_skips_are_not_counted() -> None:
    """The scaler starts at 2^16, which overflows for some steps."""
    student = perceptron(8, 0)
    made: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, *args: Any, **keywords: Any) -> Any:
            made.append(1)
            return super().step(*args, **keywords)

    skipping = copy.deepcopy(student)
    for parameter in skipping.parameters():
        parameter.register_hook(lambda g: g * torch.inf if len(seen) < 3 and not seen.append(0) else g)  # type: ignore[func-returns-value]
    seen: list[int] = []
    rates: list[float] = []
    result = fit(
        skipping,
        perceptron(8, 1),
        loader(),
        4,
        {"callback": lambda values: rates.append(values["lr"])},
        precision="float16",
        optimizer=lambda parameters: Counting(parameters, lr=0.5),
        schedule="linear",
    )
    assert result.steps == 4
    assert len(made) == 4
    assert rates == pytest.approx([0.375, 0.25, 0.125, 0.0])


def test_float16_that_never_comes_to_a_step_is_an_error() -> None:
    student = perceptron(8, 0)
    next(student.parameters()).register_hook(lambda g: g * torch.inf)
    with pytest.raises(FloatingPointError, match="float16 overflowed in 100 steps in a row after step 0"):
        fit(student, perceptron(8, 1), loader(), precision="float16")


# ------------------------------------------------------------------------------------------------ what is tried first


def test_what_people_pass_first_is_understood_or_answered() -> None:
    student, teacher = perceptron(8, 0), perceptron(8, 1)
    reptile = Reptile(student, teacher, metrics="agreement")
    assert reptile.metrics == ("agreement",)
    assert reptile.fit(loader(), until=3, progress_bar=False).steps == 3

    def said(train: Any, error: type[Exception] = TypeError, **keywords: Any) -> str:
        with pytest.raises(error) as caught:
            Reptile(student, teacher).fit(train, **({"until": 1, "progress_bar": False} | keywords))
        return str(caught.value)

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.zeros(3, 6))

    assert "a TensorDataset yields samples: pass DataLoader(train, batch_size=32, shuffle=True)" in said(dataset())
    assert "a Stream yields samples: pass DataLoader(train, batch_size=32), or batch_size=None" in said(Stream())
    assert "eval must yield batches, and a TensorDataset" in said(loader(), eval=dataset())
    assert "train must yield batches, as a DataLoader does or a list such as [batch]; got a tuple" in said(
        dataset().tensors
    )
    for one in ({"x": torch.zeros(2, 6)}, torch.zeros(2, 6), "text", 3):
        assert "train must yield batches" in said(one)
    assert "until must be an Until, such as Until(steps=1000), or a number of steps; got 'long'" in said(
        loader(), until="long"
    )
    rows = [{"input_ids": [1, 2, 3], "text": "abc"}]
    assert (
        "batch['input_ids'] must be a tensor; got a list of int: make tensors of it in the loader's collate_fn"
        in said(rows)
    )
    assert "batch['text'] must be a tensor; got a list of str: turn text into ids with the model's tokenizer" in said(
        [{"text": ["abc", "def"]}]
    )
    assert "batch['text'] must be a tensor; got a str" in said([{"x": torch.zeros(2, 6), "text": "abc"}])
    assert "the batch's inputs must be a tensor; got a list of str" in said([(["abc"], torch.zeros(1))])
    assert "labels must be a tensor; got a list of int" in said([(torch.zeros(1, 6), [3])])
    assert "inputs of a batch must hold a tensor; got a mapping with the keys ['n']" in said([{"n": 3}])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("report_to", None),
        ("temprature", "temperature"),
        ("lr", None),
        ("learning_rat", "learning_rate"),
        ("metric", "metrics"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest(name: str, nearest: str | None) -> None:
    with pytest.raises(TypeError, match=rf"Reptile\(\) got an unknown keyword '{name}'") as caught:
        Reptile(perceptron(8, 0), perceptron(8, 1), **{name: 1})
    assert nearest is None or f"the nearest is '{nearest}'" in str(caught.value)
    with pytest.raises(TypeError, match=r"Objective\(\) got an unknown keyword 'tau'"):
        Objective(perceptron(8, 0), perceptron(8, 1), tau=3.0)


def test_settings_are_checked_before_a_step() -> None:
    for keywords, message in (
        ({"warmup": -1}, "warmup must be a whole number of at least 0; got -1"),
        ({"accumulate": 1.5}, "accumulate must be a whole number of at least 1; got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and at least 0; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be finite"),
        ({"clip": 0.0}, "clip must be positive, or None; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Reptile(perceptron(8, 0), perceptron(8, 1), **keywords)  # type: ignore[arg-type]
    for until in ({"steps": 2.5}, {"epochs": 0}, {"minutes": float("inf")}, {"steps": 5, "target": float("nan")}):
        with pytest.raises(ValueError, match="must be a"):
            Until(**until)  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_any_more_are_not_saved(tmp_path: Path) -> None:
    """The loss is finite, and its gradient is not."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) + (0 * self.layer.bias).pow(0.5)

    with pytest.raises(FloatingPointError, match=r"'layer.*' of the student is not finite after step 1"):
        fit(Root(), perceptron(8, 1), loader(), fit_keywords={"folder": tmp_path})
    assert not list((tmp_path / "checkpoints").glob("0*"))


def test_samples_of_other_lengths_in_other_steps_are_fine() -> None:
    batches = [IDS[:, :5], IDS]
    assert fit(Language(0), Language(1), batches, steps=4).rows == 2 * (4 * 5 + 4 * 6)


def test_a_schedule_s_value_is_that_of_the_step_after_a_run_that_had_ended(tmp_path: Path) -> None:
    def run() -> float:
        reptile = Reptile(perceptron(8, 0), perceptron(8, 1), temperature="linear:4->1", learning_rate=0.0)
        reptile.fit(loader(), until=4, folder=tmp_path, resume=True, progress_bar=False)
        return reptile.evaluate(loader(shuffle=False))["loss"]

    assert run() == run()


def test_agreement_is_about_the_classes_that_are_compared() -> None:
    class Fixed(nn.Module):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([logits]))

        def forward(self, x: Tensor) -> Any:
            return self.logits * x[:, :1]

    for student, teacher in (((1.0, 2.0, 0.0), (1.0, 2.0, 0.0, 5.0)), ((1.0, 2.0, 0.0, 5.0), (1.0, 2.0, 0.0))):
        found = Reptile(Fixed(*student), Fixed(*teacher), metrics="agreement", vocab="truncate").evaluate(
            [torch.ones(2, 1)]
        )
        assert found["agreement"] == 1.0
        assert found["loss"] == 0.0


def test_a_wrapped_model_with_a_decoder_gets_its_inputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    student, teacher = (transformers.T5ForConditionalGeneration(config).eval() for _ in range(2))
    batch = {"input_ids": torch.randint(3, 30, (2, 6)), "labels": torch.randint(3, 30, (2, 5))}
    objective = Objective(student, teacher)
    assert torch.equal(objective(Wrapped(student), batch), objective(student, batch))


# ------------------------------------------------------------------------------------------------ several processes


TORCHRUN = r"""
import sys, torch
torch.set_num_threads(1)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from reptile_ext.training import Reptile, Until
from reptile_ext.training.guards import naming_unused_parameters

class Net(nn.Module):
    def __init__(self, width, seed, unused=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(6, width), nn.Linear(width, 5)
        self.pooler, self.dropout = (nn.Linear(3, 3) if unused else None), nn.Dropout(dropout)
    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.body(x))))

class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(zip(X, Y)))

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 5
pairs = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 60, 4)]
class Batches:
    def __iter__(self):
        return iter([list(range(i, i + 4)) for i in range(0, 60, 4)])
shuffled = lambda: DataLoader(TensorDataset(X, Y), 4, shuffle=True)
kinds = {
    "list": lambda: pairs,
    "loader": lambda: DataLoader(TensorDataset(X, Y), 4),
    "batches": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=Batches()),
    "stream": lambda: DataLoader(Stream(), 4),
    "unused": lambda: pairs,
    "whole": shuffled,
    "resumed": shuffled,
}
for kind, data in kinds.items():
    for steps in [5, 11] if kind == "resumed" else [11]:
        student = Net(8, 0, unused=kind == "unused", dropout=0.3 if kind in ("resumed", "whole") else 0.0)
        unused = kind == "unused"
        reptile = Reptile(student, Net(16, 1), hard_weight=0.5, learning_rate=0.05, find_unused_parameters=unused)
        reptile.fit(data(), until=steps, folder=f"{sys.argv[1]}/{kind}", resume=True, progress_bar=False)
try:
    Reptile(Net(8, 0, unused=True), Net(16, 1)).fit(pairs, until=3, progress_bar=False)
except RuntimeError as error:
    sys.stdout.write(f"{reptile.accelerator.num_processes} processes: {error}\n")
# Neither process ends while the other still talks to it.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch is built without gloo",
)
def test_processes_of_torchrun_train_one_student(tmp_path: Path) -> None:
    """Without a GPU and with no word of it; lists, streams and batch samplers are shared out too."""
    from safetensors.torch import load_file

    code = tmp_path / "run.py"
    code.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(code), str(tmp_path)]
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = "2 processes: the student has parameters that got no gradient in a step"
    assert done.stdout.count(said) == 2, done.stdout
    assert done.stdout.count("pass find_unused_parameters=True to Reptile") == 2

    kinds = ("list", "loader", "batches", "stream", "unused", "whole", "resumed")
    found = {kind: load_file(tmp_path / kind / "student.safetensors") for kind in kinds}
    for kind in kinds:
        assert read_log(tmp_path / kind / "metrics.jsonl")[-1]["rows"] == 11 * 8, kind
    for kind in ("list", "batches", "stream", "unused"):
        for name, tensor in found["loader"].items():
            torch.testing.assert_close(found[kind][name], tensor, msg=kind)
    for name, tensor in found["whole"].items():
        assert torch.equal(found["resumed"][name], tensor)


def test_a_world_that_accelerate_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Reptile(perceptron(8, 0), None)  # Accelerate's state, of one process, is there
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((RuntimeError, ValueError), match="WORLD_SIZE is 2, but Accelerate sees 1"):
        Reptile(perceptron(8, 0), None)
