"""`fused_linear=True`: the same training from hidden states and heads, or an error, for every kind of model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import fit_worker, fitted_student, in_two_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reptile_ext import heads, linear
from reptile_ext.heads import Head, made_up_logits
from reptile_ext.report.tables import format_fused_linear
from reptile_ext.training import Objective, Reptile, Until
from reptile_ext.training.batches import logits_of
from reptile_ext.training.data import random_state

CLASSES = 37


class Tagger(nn.Module):
    """Token ids [B, T] to logits [B, T, V] that `after` is the last to touch."""

    def __init__(
        self, seed: int, classes: int = CLASSES, width: int = 8, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(classes, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(width, classes, bias=bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.body(self.embedding(input_ids))
        return SimpleNamespace(logits=self.after(self.head(hidden), hidden))

    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits


def batches(count: int = 3, size: int = 4, length: int = 6, masked: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, CLASSES, (size, length), generator=generator)
        labels = ids.roll(-1, 1)
        if masked:
            labels[:, -1] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def trained(student: nn.Module, teacher: nn.Module | None, data: Any = None, **keywords: Any) -> dict[str, Tensor]:
    """The parameters after a few steps, of which those that were trained must have moved."""
    student = copy.deepcopy(student)
    before = copy.deepcopy(student.state_dict())
    reptile = Reptile(student, teacher, optimizer=sgd, clip=None, shift_labels=False, **keywords)
    reptile.fit(batches() if data is None else data, until=Until(steps=3), progress_bar=False)
    after = dict(student.named_parameters())
    assert all((after[name] != before[name]).any() for name in after if after[name].requires_grad)
    return {name: parameter.detach().float() for name, parameter in after.items()}


def assert_the_switch_changes_nothing(
    student: nn.Module, teacher: nn.Module | None, rtol: float = 1e-4, atol: float = 2e-6, **keywords: Any
) -> None:
    with_logits = trained(student, teacher, **keywords)
    fused = trained(student, teacher, fused_linear=True, **keywords)
    for name, wanted in with_logits.items():
        torch.testing.assert_close(fused[name], wanted, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("masked", [True, False])
def test_rows_are_counted_while_the_batch_is_on_the_host(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU computes those that are not ignored, and is not asked which: by labels or, without, the mask."""
    for module in (linear.rows, linear.loop):
        monkeypatch.setattr(module, "can_look", lambda x: False)
    products: set[int] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and result.shape[1] == CLASSES:
                products.add(result.shape[0])
            return result

    class Masked(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids)

    data = batches(masked=masked)
    if not masked:
        for batch in data:
            del batch["labels"]
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][:, :2] = 0
    kept = 20 if masked else 16  # of 24
    assert_the_switch_changes_nothing(Masked(0), Masked(1), data=data)
    objective = Objective(Masked(0), Masked(1), shift_labels=False, fused_linear=True)
    batch = objective.split(data[0])
    assert batch.num_rows_in == kept
    outputs = objective.student_outputs(objective.student, batch)
    with Products():
        objective.loss(outputs, objective.teacher_outputs(batch), batch, kept)
    assert products == {kept}
    if not masked:  # a mask of other things than the rows says nothing about them

        class First(Masked):
            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
                return SimpleNamespace(logits=self.head(self.body(self.embedding(input_ids[:, 0]))))

        assert_the_switch_changes_nothing(First(0), First(1), data=data)
    if masked:  # those of no weight may be among them
        weighted = objective.split({**data[0], "sample_weight": torch.tensor([1.0, 0.0, 1.0, 1.0])})
        assert weighted.num_rows_in == kept
        loss = objective(objective.student, weighted)
        torch.testing.assert_close(loss, objective.with_fused_linear(False)(objective.student, weighted))


# ------------------------------------------------------------------------------------------------ models of others

SMALL = {
    "vocab_size": CLASSES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")}
BERT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": CLASSES, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1}
OPT = {"vocab_size": CLASSES, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

# Model, its configuration, and what comes after its head: softcap and scale.
MODELS: dict[str, tuple[str, str, dict[str, Any], float | None, float]] = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL | {"final_logit_softcapping": 2.0}, 2.0, 1.0),
    "cohere": ("CohereForCausalLM", "CohereConfig", SMALL | {"logit_scale": 0.25}, None, 0.25),
    "granite": ("GraniteForCausalLM", "GraniteConfig", SMALL | {"logits_scaling": 8.0}, None, 0.125),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL, None, 1.0),
    "gpt2, tied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"eos_token_id": 2}, None, 1.0),
    "opt, projects before": ("OPTForCausalLM", "OPTConfig", OPT | {"word_embed_proj_dim": 8}, None, 1.0),
    "bert, transform and bias": ("BertForMaskedLM", "BertConfig", BERT, None, 1.0),
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    """With random weights, and a head whose logits are large enough for a softcap to be seen."""
    transformers = pytest.importorskip("transformers")
    model, config, keywords, *_ = MODELS[name]
    torch.manual_seed(0)
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**keywords))
    with torch.no_grad():
        Head("model", made).weight.mul_(20)
    return made.eval()


@every_model
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_hidden_states_and_head_give_the_model_s_own_logits(name: str, precision: str) -> None:
    model = model_of(name).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    head, inputs = Head("model", model), {"input_ids": batches()[0]["input_ids"]}
    for _ in range(2):  # the first call finds out what comes after the head
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            hidden = head.hidden_states(lambda: logits_of(model, inputs))
            assert (head.softcap, head.scale) == MODELS[name][3:]
            found, wanted = head.logits(hidden).float(), logits_of(model, inputs).float()
        # In bfloat16 the model rounds after each operation, by 2⁻⁹.
        tolerance = 1e-6 if precision == "float32" else 3 * 2**-9
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-6)
    assert wanted.std() > 0.05


@every_model
def test_the_switch_changes_nothing_of_what_others_models_learn(name: str) -> None:
    """Tied weights, frozen dropout, softcaps: all in the student and in the teacher."""
    student = model_of(name)
    assert_the_switch_changes_nothing(student, model_of("gemma2"), temperature=2.0, hard_weight=0.5)
    assert_the_switch_changes_nothing(model_of("llama"), student, hard_weight=0.5, divergence="jsd")


# ------------------------------------------------------------------------------------------------ one's own models


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"temperature": (2.0, 3.0), "hard_weight": 0.5, "label_smoothing": 0.1, "divergence": "reverse_kl"},
        {"divergence": "dkd", "accumulate": 2},
        {"memory_budget": 1000, "hard_weight": 0.5, "clip": 0.1},
    ],
    ids=str,
)
def test_the_switch_changes_nothing(keywords: dict[str, Any]) -> None:
    clip, budget = keywords.pop("clip", None), {k: keywords.pop(k) for k in ["memory_budget"] if k in keywords}
    student, teacher = Tagger(0, dropout=0.3), Tagger(1, width=24, bias=False)
    found = []
    for switch in ({}, {"fused_linear": True, **budget}):
        one = copy.deepcopy(student)
        reptile = Reptile(one, teacher, optimizer=sgd, clip=clip, shift_labels=False, **keywords, **switch)
        result = reptile.fit(batches(), batches(1), until=Until(steps=4), progress_bar=False)
        found.append((dict(one.named_parameters()), result.metrics["loss"]))
    for name, wanted in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], wanted, rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_switch_changes_nothing_in_mixed_precision(precision: str) -> None:
    """The hidden states come in 16 bits from a linear layer, and in 32 from a norm."""
    student, teacher = Tagger(0), Tagger(1, width=24)
    teacher.body = nn.Sequential(teacher.body, nn.LayerNorm(24))
    # Both paths round the same products to 16 bits, but not the same sums of gradients: to 2⁻⁹ of the largest.
    keywords = {"precision": precision, "hard_weight": 0.5, "rtol": 2e-2, "atol": 4e-3}
    assert_the_switch_changes_nothing(student, teacher, **keywords)


def test_vocabularies_that_differ() -> None:
    assert_the_switch_changes_nothing(Tagger(0), Tagger(1, classes=CLASSES + 3), vocab="truncate")
    with pytest.raises(ValueError, match="teacher_weight has 40 classes and student_weight has 37"):
        trained(Tagger(0), Tagger(1, classes=CLASSES + 3), fused_linear=True)


def test_without_a_teacher() -> None:
    assert_the_switch_changes_nothing(Tagger(0), None)
    with pytest.raises(ValueError, match="trains on labels; got a batch without"):
        trained(Tagger(0), None, [{"input_ids": batches()[0]["input_ids"]}], fused_linear=True)


def test_without_labels_every_row_counts() -> None:
    data = [{"input_ids": batch["input_ids"]} for batch in batches()]
    assert_the_switch_changes_nothing(Tagger(0), Tagger(1), data=data)


def test_rows_may_be_a_batch_s_only_dimension() -> None:
    data = [(batch["input_ids"][0], batch["labels"][0]) for batch in batches()]
    assert_the_switch_changes_nothing(Tagger(0), Tagger(1), data=data, hard_weight=1.0)


def test_a_teacher_without_a_head_gives_logits() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList([Tagger(1), Tagger(2, width=24)])

        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.stack([member(input_ids).logits for member in self.members]).mean(0)

    assert_the_switch_changes_nothing(Tagger(0), Ensemble(), hard_weight=0.5)


def test_parts_that_are_frozen_stay() -> None:
    for part in ("head", "body"):
        student = Tagger(0)
        getattr(student, part).requires_grad_(False)
        assert_the_switch_changes_nothing(student, Tagger(1))


def test_metrics_are_those_of_the_logits() -> None:
    names = ("cross_entropy", "perplexity", "accuracy", "f1", "agreement")
    data = batches(2, size=120)  # 720 rows: more than one part
    measured = [
        Reptile(Tagger(0), Tagger(1), metrics=names, temperature=2.0, fused_linear=fused).evaluate(data)
        for fused in (False, True)
    ]
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in data]
    measured = [
        Reptile(Tagger(0), Tagger(1), metrics=["agreement"], fused_linear=fused).evaluate(unlabelled)
        for fused in (False, True)
    ]
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):  # neither one number seen as many, nor a part of some memory, is large
                self.num_bytes = max(self.num_bytes, min(x.untyped_storage().nbytes(), x.numel() * x.element_size()))
        return result


@pytest.mark.parametrize("taught", [True, False], ids=["taught", "alone"])
def test_the_logits_never_exist_in_full(taught: bool) -> None:
    data = batches(1, size=400, length=6)
    logits = 2400 * CLASSES * 4
    largest = {}
    for fused in (False, True):
        budget = {"memory_budget": logits // 4} if fused else {}  # of student's and teacher's together
        reptile = Reptile(
            Tagger(0), Tagger(1) if taught else None, metrics=["accuracy"], optimizer=sgd, fused_linear=fused, **budget
        )
        with Largest() as of_fit:
            reptile.fit(data, until=Until(steps=2), progress_bar=False)
        with Largest() as of_evaluate:
            reptile.evaluate(data)
        largest[fused] = (of_fit.num_bytes, of_evaluate.num_bytes)
    assert min(largest[False]) >= logits
    assert max(largest[True]) < 0.3 * logits


# ------------------------------------------------------------------------------------------------ what does not fit


class Scaled(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits * 1.1


class Capped(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return 30 * (logits / 30).tanh()


class Normalised(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits.log_softmax(-1)


class Masked(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(logits.shape[-1]) >= CLASSES - 2, -torch.inf)


class Cut(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits[..., :-1]


class Shifted(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits[:, :-1]


class Turned(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits.flip(1)


class PerRow(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits * hidden.detach()[..., :1].exp()


class Weighed(Tagger):
    """By what is learned: at first it is 1, and does nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.factor = nn.Parameter(torch.ones(()))

    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits * self.factor


class InTraining(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return F.dropout(logits, 0.5, self.training)


class Gathered(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits.view(hidden.shape[0], -1, CLASSES)


UNKNOWN = [Scaled, Capped, Normalised, Masked, Cut, Shifted, Turned, PerRow, Weighed, InTraining, Gathered]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_done_to_the_logits_unknown_to_us_is_refused(kind: type[Tagger]) -> None:
    """Left out in silence, each of these would change what is trained."""
    student = kind(0)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=rf"does not fit the student: {kind.__name__} does something to its logits"):
        Reptile(student, Tagger(1), fused_linear=True).fit(batches(), until=Until(steps=1), progress_bar=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert "forward" not in student.head.__dict__
    if kind not in (InTraining, Weighed):  # a teacher does not train, and has nothing to learn
        with pytest.raises(ValueError, match=f"does not fit the teacher: {kind.__name__}"):
            Reptile(Tagger(1), kind(0), fused_linear=True).evaluate(batches())


class InEvaluation(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        return logits if self.training else logits * 1.1


def test_train_mode_does_not_vouch_for_eval_mode() -> None:
    reptile = Reptile(InEvaluation(0), Tagger(1), fused_linear=True)
    reptile.fit(batches(), until=Until(steps=1), progress_bar=False)
    with pytest.raises(ValueError, match="does not fit the student: InEvaluation"):
        reptile.evaluate(batches())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("config", "after", "wanted"),
    [
        ({"logits_scaling": 8.0}, lambda z: z * 8.0, (None, 8.0)),  # HyperCLOVA X's way
        ({"logits_scaling": 8.0}, lambda z: z / 8.0, (None, 0.125)),  # Granite's
        ({"logit_scale": 8.0, "final_logit_softcapping": None}, lambda z: z, (None, 1.0)),  # a name that means nothing
        (
            {"output_multiplier": 0.3, "final_logit_softcapping": 30.0},
            lambda z: (z * 0.3).div(30.0).tanh() * 30.0,
            (30.0, 0.3),
        ),
        ({"final_logit_softcapping": 30.0}, lambda z: z.float().div_(30.0).tanh_().mul_(30.0), (30.0, 1.0)),
        ({"final_logit_softcapping": 30.0}, lambda z: z.div_(30.0).tanh_().mul_(30.0), (30.0, 1.0)),
        ({"final_logit_softcapping": 30.0}, lambda z: 30.0 * (z.bfloat16() / 30.0).tanh(), (30.0, 1.0)),  # casts
        ({"logits_scaling": 8.0}, lambda z: z.half() * 8.0, (None, 8.0)),  # more than float16 holds: infinite
    ],
)
def test_what_a_config_s_numbers_mean_is_found_out(config: Any, after: Any, wanted: Any, dtype: torch.dtype) -> None:
    model = Tagger(0).to(dtype)
    model.after = lambda logits, hidden: after(logits)  # type: ignore[method-assign]
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))  # type: ignore[assignment]
    head, inputs = Head("model", model), {"input_ids": batches()[0]["input_ids"]}
    for _ in range(2):
        head.hidden_states(lambda: logits_of(model, inputs))
        assert (head.softcap, head.scale) == wanted


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize(
    "after",
    [
        lambda z: z * 1.01,
        lambda z: z * 1.001,
        lambda z: z * (1 + 1e-5),
        lambda z: z + 1e-4,
        lambda z: 1e4 * (z / 1e4).tanh(),
        lambda z: z.clamp(-1000, 1000),
        lambda z: z.clamp(max=20_000),
    ],
    ids=["1.01", "1.001", "1.00001", "plus", "softcap", "clamp", "clamp, one side"],
)
def test_what_16_bits_would_hide_is_refused(after: Any, precision: str) -> None:
    model = Tagger(0).to(torch.float32 if precision == "autocast" else getattr(torch, precision))
    model.after = lambda logits, hidden: after(logits)  # type: ignore[method-assign]
    head, inputs = Head("model", model), {"input_ids": batches()[0]["input_ids"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"), pytest.raises(ValueError, match="fit"):
        head.hidden_states(lambda: logits_of(model, inputs))


def after_batches_of(
    *shapes: tuple[int, int], after: Callable[[Tensor], Tensor] = lambda z: z, **config: float
) -> Head:
    """A head of which hidden states of such batches were taken, one after the other."""
    model = Tagger(0)
    model.after = lambda logits, hidden: after(logits)  # type: ignore[method-assign]
    model.config = SimpleNamespace(**config)  # type: ignore[assignment]
    head = Head("model", model)
    for shape in shapes:
        ids = torch.zeros(shape, dtype=torch.int64)
        assert head.hidden_states(lambda ids=ids: logits_of(model, ids)).shape == (*shape, 8)
    return head


@pytest.mark.parametrize("last", [1, 2, 5, 16])
def test_a_model_that_returns_the_last_positions_is_refused(last: int) -> None:
    """At once, or when there are more for the first time."""
    with pytest.raises(ValueError, match="Tagger does something to its logits"):
        after_batches_of((4, 40), after=lambda z: z[:, -last:])
    after_batches_of((4, 1), (4, last), after=lambda z: z[:, -last:])
    for shape in ((4, last + 1), (1, 17)):
        with pytest.raises(ValueError, match="Tagger does something to its logits"):
            after_batches_of((4, 1), (4, last), shape, after=lambda z: z[:, -last:])
    with pytest.raises(ValueError, match="Tagger does something to its logits"):
        after_batches_of((1, 17), (2, 17), after=lambda z: z[-1:])


def test_a_batch_with_more_rows_must_give_the_same_softcap_and_scale() -> None:
    with pytest.raises(ValueError, match="Tagger does something to its logits"):
        after_batches_of((4, 1), (4, 6), after=lambda z: z * 8.0 if z.shape[1] > 1 else z, logit_scale=8.0)


def test_made_up_logits_are_made_only_where_there_are_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def remembered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append(shape[:-1])
        return made_up_logits(shape, dtype)

    monkeypatch.setattr(heads, "made_up_logits", remembered)
    # Each is made twice, for the model and to compare with; of (1, 17) and (2, 3), neither is the larger.
    for shapes, wanted in (
        ([(4, 40), (4, 40), (8, 50), (1, 1)], [(2, 17)]),
        ([(4, 3), (4, 2), (1, 40), (5, 3), (1, 40), (3, 20)], [(2, 3), (1, 17), (2, 17)]),
    ):
        after_batches_of(*shapes)
        assert made[::2] == made[1::2] == wanted
        made.clear()


def test_a_batch_without_rows_says_nothing() -> None:
    """A scale that the model does not use would explain its logits, had it none."""
    for shapes in ([(0, 6)], [(4, 0)], [(0, 6), (4, 6)], [(4, 6), (4, 0)]):
        head = after_batches_of(*shapes, logit_scale=8.0)
        assert (head.softcap, head.scale) == (None, 1.0)
    with pytest.raises(ValueError, match="Tagger does something to its logits"):
        after_batches_of((0, 6), (4, 6), after=lambda z: z * 1.1)


def test_the_made_up_logits_tell_apart_what_is_close() -> None:
    """In every class and every row there are small ones and large ones, of both signs."""
    z = made_up_logits((2, 17, 32_000), torch.float32)
    assert z.shape == (2, 17, 32_000)
    assert torch.isfinite(z.half()).all()
    for part in (z, z[..., :50], z[..., -50:], z[:, -1, :50], z[0, :, -50:], z[..., 7]):
        assert part.abs().min() < 0.02
        assert part.abs().max() > 20_000
        assert (part > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    rows = z.flatten(0, 1)
    assert len(rows.unique(dim=0)) == 34
    assert torch.equal(made_up_logits((2, 17, 32_000), torch.float32), z)
    assert made_up_logits((1, 1, 2), torch.float32).max() == 30_000  # of few, too, one is large


class Adapted(nn.Linear):
    """Like a low-rank adapter, which at first adds 0."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Twice(Tagger):
    def after(self, logits: Tensor, hidden: Tensor) -> Tensor:
        self.head(hidden)
        return logits


class Never(Tagger):
    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.body(self.embedding(input_ids))
        return SimpleNamespace(logits=F.linear(hidden, self.head.weight, self.head.bias))


def test_what_is_refused() -> None:
    teacher = Tagger(1)
    headless = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES))
    with pytest.raises(ValueError, match=r"needs the student's head: get_output_embeddings\(\) of Sequential.*no such"):
        Reptile(headless, teacher, fused_linear=True)
    adapted = Tagger(0)
    adapted.head = Adapted(8, CLASSES)
    with pytest.raises(ValueError, match=r"return the torch.nn.Linear.*got a .*test_heads.Adapted"):
        Reptile(adapted, teacher, fused_linear=True)
    for kind, calls in ((Twice, 2), (Never, 0)):
        with pytest.raises(ValueError, match=f"{kind.__name__} called it {calls} times"):
            trained(kind(0), teacher, fused_linear=True)
    with pytest.raises(ValueError, match=r"needs classes in the last dimension, dim=-1; got dim=1"):
        Reptile(Tagger(0), teacher, fused_linear=True, dim=1)
    with pytest.raises(ValueError, match="inplace=True has no meaning with fused_linear=True"):
        Reptile(Tagger(0), teacher, fused_linear=True, inplace=True)
    with pytest.raises(ValueError, match="memory_budget is for the chunks of fused_linear=True"):
        Reptile(Tagger(0), teacher, memory_budget=1000)
    with pytest.raises(ValueError, match="memory_budget must be a positive number of bytes; got -1"):
        Reptile(Tagger(0), teacher, fused_linear=True, memory_budget=-1)


def test_labels_of_other_rows_are_refused() -> None:
    batch = batches()[0]
    data = [batch | {"labels": batch["labels"][:, 1:]}]
    reptile = Reptile(Tagger(0), Tagger(1), fused_linear=True)
    with pytest.raises(ValueError, match=r"labels must have the shape of.*\[4, 6\]; got \[4, 5\]"):
        reptile.evaluate(data)
    with pytest.raises(ValueError, match=r"labels must.*\[4, 6\].*\[4, 5\]"):
        reptile.fit(data, until=Until(steps=1), progress_bar=False)


def raise_out_of_memory(*_: Any, **__: Any) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 2 GiB")


def test_a_model_s_own_error_is_its_own() -> None:
    with pytest.raises(IndexError, match="out of range"):
        trained(Tagger(0), Tagger(1), [{"input_ids": torch.full((2, 2), CLASSES)}], fused_linear=True)
    crowded = Tagger(0)
    crowded.register_forward_hook(raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        trained(crowded, Tagger(1), fused_linear=True)
    nameless = Tagger(0)
    nameless.register_forward_hook(lambda module, inputs, output: (output.logits,))
    with pytest.raises(TypeError, match=r"Tagger must return a tensor of logits.*got tuple"):
        trained(nameless, Tagger(1), fused_linear=True)


def test_what_was_in_the_place_of_the_head_s_forward_is_put_back() -> None:
    """Accelerate's hooks are there, too."""
    student = Tagger(0)

    def hooked(input: Tensor) -> Tensor:
        return F.linear(input, student.head.weight, student.head.bias)

    student.head.forward = hooked  # type: ignore[method-assign]
    head = Head("student", student)
    head.hidden_states(lambda: logits_of(student, batches()[0]["input_ids"]))
    assert student.head.forward is hooked


# ------------------------------------------------------------------------------------------------ what it saves


def test_the_measurement_leaves_everything_as_it_was() -> None:
    student = Tagger(0, dropout=0.5)
    student.body = nn.Sequential(student.body, nn.BatchNorm1d(6))  # over the positions
    teacher = Tagger(1, width=24)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, numbers, modes = copy.deepcopy(student.state_dict()), random_state()["torch"], student.training
    reptile = Reptile(student, teacher, hard_weight=0.5)  # also of a loop that does not have it on
    measured = reptile.measure_fused_linear(batches()[0], repeats=2)

    assert (measured["rows"], measured["classes"]) == (24, CLASSES)
    assert measured["milliseconds"].keys() == measured["peak_bytes"].keys() == {"logits", "fused_linear"}
    assert all(value > 0 for value in measured["milliseconds"].values())
    assert reptile.objective.student_head is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all((parameter.grad == 7.0).all() for parameter in student.parameters() if parameter.grad is not None)
    assert torch.equal(random_state()["torch"], numbers)
    assert student.training == modes
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux tells it")
def test_the_measurement_finds_what_is_saved() -> None:
    """33 million logits: 131 MB each of student's and teacher's, against chunks of 1 MB.

    In a process of its own, as peaks of memory are a process's."""
    code = """
import torch
from reptile_ext.training import Reptile
from test_heads import Tagger

torch.set_num_threads(1)
student, teacher = Tagger(0, classes=4096), Tagger(1, classes=4096)
for budget in (1 << 20, None):
    reptile = Reptile(student, teacher, fused_linear=True, memory_budget=budget)
    measured = reptile.measure_fused_linear({"input_ids": torch.randint(4096, (8, 1024))}, repeats=1)
    print(measured["peak_bytes"]["logits"], measured["peak_bytes"]["fused_linear"])
"""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    of_logits, in_chunks, _, by_default = map(int, result.stdout.split())
    logits = 8 * 1024 * 4096 * 4
    assert of_logits > 1.9 * logits  # the student's, which their gradient is written over, and the teacher's
    assert in_chunks < 0.5 * logits
    # What is kept between calls counts: with the default budget the student's logits of 512 rows at least.
    assert by_default > 512 * 4096 * 4


def test_without_the_memory_for_one_of_the_two_the_other_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a training whose logits would not have fitted, the run still ends with its report."""
    reptile = Reptile(Tagger(0), Tagger(1), hard_weight=0.5, fused_linear=True)
    monkeypatch.setattr(Objective, "loss_of_logits", raise_out_of_memory)
    measured = reptile.measure_fused_linear(batches()[0], repeats=2)
    assert measured["failed"] == {"logits": "OutOfMemoryError: tried to allocate 2 GiB"}
    assert measured["milliseconds"]["logits"] is measured["peak_bytes"]["logits"] is None
    assert measured["milliseconds"]["fused_linear"] > 0
    assert (measured["rows"], measured["classes"]) == (24, CLASSES)
    header, times, *_, why = format_fused_linear(measured)
    assert header.split() == ["24", "×", "37", "all", "logits", "fused", "linear", "saved"]
    assert times.split() == ["fwd", "+", "bwd,", "ms", "-", f"{measured['milliseconds']['fused_linear']:.2f}", "-"]
    assert why == "logits: OutOfMemoryError: tried to allocate 2 GiB"


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch is built without gloo")
def test_two_processes_train_as_one() -> None:
    """DDP sees the head's gradient come from outside of its forward pass: of tied weights, both at once."""
    found = in_two_processes(fit_worker)
    for tied in (False, True):
        wanted = fitted_student(tied, fused_linear=False)
        for rank in range(2):
            for name, tensor in wanted.items():
                torch.testing.assert_close(torch.from_numpy(found[rank][tied][name]), tensor, rtol=1e-4, atol=1e-6)
