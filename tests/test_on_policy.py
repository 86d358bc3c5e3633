"""Distillation on what the student writes: which tokens are compared, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptile_ext.training import Reptile
from reptile_ext.training.objective import Objective
from reptile_ext.training.on_policy import OnPolicy, generated

transformers = pytest.importorskip("transformers")

V, EOS = 12, 1
PROMPTS = [[5, 6], [7, 8, 9], [3]]


def llama(seed: int, **sizes: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": V,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 64,
            "eos_token_id": EOS,
            "bos_token_id": None,
            "pad_token_id": EOS,  # as many have it
            "initializer_range": 0.5,
            **sizes,
        }
    )
    return transformers.LlamaForCausalLM(config)


def batch(side: str = "right") -> dict[str, Tensor]:
    """Prompts with completions of two tokens, padded on a side."""
    rows = [[*prompt, 10, 11] for prompt in PROMPTS]
    longest = max(map(len, rows))
    found: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        gap = longest - len(row)
        labels = [-100] * (len(row) - 2) + row[-2:]
        for name, values, fill in (
            ("input_ids", row, EOS),
            ("attention_mask", [1] * len(row), 0),
            ("labels", labels, -100),
        ):
            found[name].append([fill] * gap + values if side == "left" else values + [fill] * gap)
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_go_on_with_the_students_own_tokens(side: str) -> None:
    """Each row is what the student writes after its prompt alone, up to and with the end; labels are those tokens."""
    student = llama(0)
    objective = Objective(student, llama(1))
    sampler = OnPolicy(student, -100, {"do_sample": False, "max_new_tokens": 5})
    found = sampler.sampled(objective.split(batch(side)))
    for i, prompt in enumerate(PROMPTS):
        alone = student.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5, pad_token_id=EOS)[
            0
        ].tolist()
        wanted = alone[len(prompt) :]
        wanted = wanted[: wanted.index(EOS) + 1] if EOS in wanted else wanted
        kept = found.inputs["attention_mask"][i] == 1
        assert found.inputs["input_ids"][i][kept].tolist() == prompt + wanted
        labels = found.labels[i]
        assert labels[labels != -100].tolist() == wanted
        assert int((labels != -100).nonzero()[0]) == len(prompt) - 1  # the prompt's last token predicts the first
    assert found.num_rows_in == int((found.labels != -100).sum())


def test_an_end_that_is_the_padding_counts_once() -> None:
    class Ends(nn.Module):
        """Writes its rows: an end, and padding with the same id behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.generation_config = transformers.GenerationConfig(eos_token_id=EOS)

        def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
            return torch.cat([input_ids, torch.tensor([[4, EOS, EOS], [EOS, EOS, EOS]])], 1)

    labels = torch.tensor([[-100, 9, 9], [-100, 9, 9]])
    given = {"input_ids": torch.tensor([[5, 9, 9], [6, 9, 9]]), "labels": labels}
    student = Ends()
    found = OnPolicy(student, -100).sampled(Objective(student, nn.Identity(), shift_labels=True).split(given))
    assert [row[row != -100].tolist() for row in found.labels] == [[4, EOS], [EOS]]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("fused_linear", [False, True])
def test_a_step_is_that_of_plain_pytorch(divergence: str, fused_linear: bool) -> None:
    """Loss and gradient of a step, in float64, over the sampled tokens' rows alone; labels have no weight."""
    student, teacher = llama(0), llama(1)
    found: list[Tensor] = []

    class Kept(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    losses: list[float] = []
    reptile = Reptile(
        student,
        teacher,
        divergence=divergence,
        hard_weight=0.5,
        on_policy=1.0,
        generate={"do_sample": False, "max_new_tokens": 4},
        fused_linear=fused_linear,
        clip=None,
        optimizer=lambda parameters: Kept(parameters, lr=1.0),
    )
    reptile.fit(
        [batch()], until=1, log_every=1, progress_bar=False, callback=lambda said: losses.append(float(said["loss"]))
    )
    oracle, answers = llama(0).double(), llama(1).double()
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for prompt, new in zip(
        PROMPTS, generated(llama(0), PROMPTS, {EOS}, do_sample=False, max_new_tokens=4), strict=True
    ):
        ids = torch.tensor([prompt + new])
        where = slice(len(prompt) - 1, ids.shape[1] - 1)
        x = F.log_softmax(oracle(ids).logits[0, where], -1)
        y = F.log_softmax(answers(ids).logits[0, where], -1).detach()
        if divergence == "forward_kl":
            total = total + (y.exp() * (y - x)).sum()
        elif divergence == "reverse_kl":
            total = total + (x.exp() * (x - y)).sum()
        else:
            m = ((x.exp() + y.exp()) / 2).log()
            total = total + ((y.exp() * (y - m)).sum() + (x.exp() * (x - m)).sum()) / 2
        rows += len(new)
    (total / rows).backward()
    assert losses == [pytest.approx(float(total.detach()) / rows, rel=1e-5)]
    for gradient, parameter in zip(found, oracle.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-3, atol=1e-6)


def weights(student: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in student.state_dict().items()}


def trained(folder: Path | None, steps: int, resume: bool = False, **more: Any) -> dict[str, Tensor]:
    student = llama(0, attention_dropout=0.1)
    reptile = Reptile(student, llama(1), learning_rate=0.01, accumulate=2, **more)
    reptile.fit(
        [batch(), batch("left"), batch()],
        until=steps,
        checkpoint_every=2,
        folder=folder,
        resume=resume,
        progress_bar=False,
    )
    return weights(student)


def test_none_of_it_is_the_training_without(tmp_path: Path) -> None:
    one, other = trained(None, 3), trained(None, 3, on_policy=0.0)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_resumed_run_samples_the_same(tmp_path: Path) -> None:
    more: dict[str, Any] = {"on_policy": "linear:0.3->0.9", "generate": {"max_new_tokens": 4}}
    wanted = trained(tmp_path / "whole", 4, **more)
    trained(tmp_path / "parts", 2, **{**more, "on_policy": lambda step: 0.3 + 0.2 * step})
    one = trained(tmp_path / "parts", 4, resume=True, **{**more, "on_policy": lambda step: 0.3 + 0.2 * step})
    other = trained(tmp_path / "again", 4, **{**more, "on_policy": lambda step: 0.3 + 0.2 * step})
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert all(torch.equal(x, other[name]) for name, x in wanted.items())  # the schedule is these very numbers


def test_the_share_is_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    sampled = OnPolicy.sampled

    def counted(self: OnPolicy, given: Any) -> Any:
        nonlocal calls
        calls += 1
        return sampled(self, given)

    monkeypatch.setattr(OnPolicy, "sampled", counted)
    trained(None, 40, on_policy=0.25, generate={"max_new_tokens": 1})
    assert 8 <= calls <= 34  # of 80, 20 are expected: four standard deviations


def test_the_student_writes_in_eval_mode_and_is_then_as_before() -> None:
    student = llama(0)
    student.train()
    modes: list[bool] = []
    student.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    out = generated(student, PROMPTS, {EOS}, max_new_tokens=3, do_sample=False)
    assert not any(modes)
    assert student.training
    assert all(1 <= len(one) <= 3 for one in out)


def test_the_context_ends_a_completion() -> None:
    student = llama(0, max_position_embeddings=6, eos_token_id=None)
    found = OnPolicy(student, -100).sampled(Objective(student, llama(1)).split(batch()))
    assert found.inputs["input_ids"].shape[1] == 6  # of 64 that were asked for
    short = llama(0, max_position_embeddings=3)
    with pytest.raises(ValueError, match="a prompt of 3 tokens leaves the student no room to write"):
        OnPolicy(short, -100).sampled(Objective(short, llama(1)).split(batch()))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"on_policy": 1.5}, "on_policy must be from 0 to 1; got 1.5"),
        ({"generate": {}}, "generate is for on_policy"),
        ({"on_policy": 1.0, "generate": {"input_ids": 1}}, "generate must not hold input_ids"),
        ({"on_policy": 1.0, "shift_labels": False}, "needs labels that are shifted"),
    ],
)
def test_what_is_refused(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Reptile(llama(0), llama(1), **keywords)


def test_who_cannot_write_or_be_asked() -> None:
    with pytest.raises(ValueError, match="generate"):
        Reptile(nn.Embedding(V, V), llama(1), on_policy=1.0, shift_labels=True)
    with pytest.raises(ValueError, match="needs a teacher that can be asked"):
        Reptile(llama(0), None, on_policy=1.0)
    student = llama(0)
    reptile = Reptile(student, llama(1), on_policy=1.0, shift_labels=True)
    with pytest.raises(ValueError, match="mappings with input_ids and labels"):
        reptile.fit([(torch.zeros(1, 3, dtype=torch.long),) * 2], until=1, progress_bar=False)
