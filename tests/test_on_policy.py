"""On-policy distillation: what is sampled, which rows count, and what the loss of them is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reptile_ext.cache import TeacherCache
from reptile_ext.training import Reptile
from reptile_ext.training.on_policy import OnPolicy, completed, prompts_of

transformers = pytest.importorskip("transformers")
V, EOS = 23, 1
IGNORED = -100


def model(seed: int, kind: str = "llama", vocab: int = V, **options: Any) -> Any:
    torch.manual_seed(seed)
    if kind == "gpt2":  # absolute positions: the padding's side would show
        of_gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
        config = transformers.GPT2Config(vocab_size=vocab, bos_token_id=0, eos_token_id=EOS, **(of_gpt2 | options))
        made = transformers.GPT2LMHeadModel(config)
    else:
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        small |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": EOS}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab, **(small | options)))
    with torch.no_grad():  # far from uniform, so that a wrong position shows
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    return made


def batches(side: str = "right", count: int = 3) -> list[dict[str, Tensor]]:
    """Prompts of 2, 4 and 5 tokens, one with an end of text inside, and completions of the data's."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        rows = []
        for length in (2, 4, 5):
            ids = torch.randint(2, V, (length + 3,), generator=generator)
            if length == 4:
                ids[1] = EOS
            pad = torch.zeros(8 - len(ids), dtype=torch.long)
            labels = torch.where(torch.arange(len(ids)) < length, IGNORED, ids)
            parts = [(ids, pad + EOS), (torch.ones_like(ids), pad), (labels, pad + IGNORED)]
            rows.append([torch.cat(x if side == "right" else x[::-1]) for x in parts])
        named = zip(("input_ids", "attention_mask", "labels"), zip(*rows, strict=True), strict=True)
        found.append({name: torch.stack(x) for name, x in named})
    return found


def sampled(student: Any, batch: Any, **generate: Any) -> Any:
    reptile = Reptile(student, model(9), on_policy=1.0, generate={"max_new_tokens": 6} | generate)
    return OnPolicy(reptile.objective, {"max_new_tokens": 6} | generate).sample(batch)


def divergence(x: Tensor, y: Tensor, name: str, beta: float = 0.3) -> Tensor:
    """Each row's divergence of log-probabilities of the student x and the teacher y."""
    if name == "forward_kl":
        return (y.exp() * (y - x)).sum(-1)
    if name == "reverse_kl":
        return (x.exp() * (x - y)).sum(-1)
    mean = (beta * y.exp() + (1 - beta) * x.exp()).log()
    return (beta * y.exp() * (y - mean) + (1 - beta) * x.exp() * (x - mean)).sum(-1)


def oracle(student: Any, teacher: Any, prompts: list[Tensor], texts: list[Tensor], loss: str) -> tuple[Tensor, int]:
    """Of one text at a time, without padding, in float64."""
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for prompt, text in zip(prompts, texts, strict=True):
        predicts = slice(len(prompt) - 1, len(text) - 1)
        with torch.no_grad():
            y = F.log_softmax(teacher(text[None]).logits[0, predicts], -1)
        x = F.log_softmax(student(text[None]).logits[0, predicts], -1)
        total = total + divergence(x, y, loss).sum()
        rows += len(text) - len(prompt)
    return total / rows, rows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "loss", [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 0.3}, {"fused_linear": True}]
)
def test_a_steps_loss_and_gradient_are_those_of_the_definition(kind: str, side: str, loss: dict[str, Any]) -> None:
    student, teacher = model(1, kind), model(2)
    if kind == "gpt2":
        student.eval()
        for part in student.modules():
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
    own = copy.deepcopy(student).double().eval()
    reptile = Reptile(
        student,
        teacher,
        on_policy=1.0,
        generate={"max_new_tokens": 6},
        hard_weight=0.7,  # which has no part here
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        clip=None,
        **loss,
    )
    batch = batches(side, 1)[0]
    seen: list[dict[str, Any]] = []
    kept: list[Any] = []
    sampling: Any = reptile._sampling
    sample = sampling.sample
    sampling.sample = lambda batch: kept.append(sample(batch)) or kept[-1]
    before = [p.detach().clone().double() for p in student.parameters()]
    result = reptile.fit([batch], until=1, progress_bar=False, callback=seen.append)
    prompts, _ = prompts_of(batch, IGNORED)
    inputs = kept[0].inputs
    texts = [ids[mask != 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    expected, rows = oracle(
        own, copy.deepcopy(teacher).double().eval(), prompts, texts, loss.get("divergence", "forward_kl")
    )
    expected.backward()
    expected = expected.detach()
    assert result.rows == rows == sum(len(t) - len(p) for t, p in zip(texts, prompts, strict=True))
    assert float(seen[0]["loss"]) == pytest.approx(float(expected), rel=1e-4)
    biggest = max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None)
    for was, now, wanted in zip(before, student.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(was - now.detach().double(), wanted.grad, rtol=1e-3, atol=2e-4 * max(biggest, 1))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_sampled_does_not_depend_on_the_padding(kind: str) -> None:
    """Greedy completions of a batch are those of each prompt alone, in eval mode, whatever side the data pad."""
    student = model(1, kind).train()
    for side in ("left", "right"):
        batch = batches(side, 1)[0]
        found = sampled(student, batch, do_sample=False)
        for i, prompt in enumerate(prompts_of(batch, IGNORED)[0]):
            ids = prompt[None]
            with torch.no_grad():
                for _ in range(6):
                    student.eval()
                    ids = torch.cat([ids, student(ids).logits[:, -1].argmax(-1)[:, None]], -1)
                    student.train()
                    if int(ids[0, -1]) == EOS:
                        break
            mask = found.inputs["attention_mask"][i] != 0
            assert found.inputs["input_ids"][i][mask].tolist() == ids[0].tolist()
    assert all(part.training for part in student.modules())


def test_rows_end_with_the_first_end_of_text_also_where_padding_has_its_id() -> None:
    prompts = [torch.tensor([5, EOS, 6]), torch.tensor([7]), torch.tensor([8])]
    written = torch.tensor([[3, EOS, EOS, EOS], [EOS, EOS, EOS, EOS], [2, 3, 4, 5]])
    found = completed(prompts, written, [EOS], IGNORED)
    out = IGNORED
    assert found["labels"].tolist() == [[out, out, out, 3, EOS], [out, EOS, out, out, out], [out, 2, 3, 4, 5]]
    assert found["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    assert completed(prompts, written, [], IGNORED)["labels"][1].tolist()[1:5] == [EOS] * 4  # no end: all of it
    assert completed(prompts, written, [4, 3], IGNORED)["labels"][2].tolist()[:4] == [out, 2, 3, out]


def test_the_students_generation_config_does_not_bend_the_distribution() -> None:
    student, torch_state = model(1), torch.get_rng_state()
    plain = sampled(student, batches(count=1)[0])
    student.generation_config.top_k, student.generation_config.temperature = 1, 0.01
    student.generation_config.repetition_penalty, student.generation_config.do_sample = 5.0, True
    student.config.use_cache = False
    student.activation_checkpointing_enable()
    torch.set_rng_state(torch_state)
    bent = sampled(student, batches(count=1)[0])
    assert bent.inputs["input_ids"].tolist() == plain.inputs["input_ids"].tolist()
    torch.set_rng_state(torch_state)
    assert (
        sampled(student, batches(count=1)[0], top_k=1).inputs["input_ids"].tolist()
        != plain.inputs["input_ids"].tolist()
    )


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def trained(student: Any, steps: int = 4, folder: Path | None = None, resume: bool = False, **options: Any) -> Tensor:
    reptile = Reptile(student, model(2), learning_rate=1e-2, hard_weight=0.3, **options)
    reptile.fit(batches(), until=steps, folder=folder, resume=resume, progress_bar=False)
    return weights(student)


def test_a_probability_of_0_is_training_as_it_was_and_a_schedule_begins_there() -> None:
    generate = {"max_new_tokens": 4}
    without = trained(model(1, "gpt2").train())
    assert torch.equal(without, trained(model(1, "gpt2").train(), on_policy=0.0))
    never = trained(model(1, "gpt2").train(), on_policy=lambda step: 0.0, generate=generate)
    assert torch.equal(without, never)
    assert not torch.equal(without, trained(model(1, "gpt2").train(), on_policy=1.0, generate=generate))
    # The first of two steps has the share 0 and the second has 1.
    asked: list[int] = []
    reptile = Reptile(model(1), model(2), on_policy="linear:0->1", generate=generate)
    sampling: Any = reptile._sampling
    sample = sampling.sample
    sampling.sample = lambda batch: asked.append(1) or sample(batch)
    counts: list[int] = []
    reptile.fit(batches(), until=2, progress_bar=False, callback=lambda _: counts.append(len(asked)))
    assert counts == [0, 1]


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"fused_linear": True}, {"temperature": "linear:3->1"}])
def test_a_run_that_is_resumed_has_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    options = options | {"on_policy": 0.5, "generate": {"max_new_tokens": 4}}
    if "temperature" in options:
        options["temperature"] = lambda step: 3.0 - step / 3
    whole = trained(model(1, "gpt2").train(), 5, **options)
    trained(model(1, "gpt2").train(), 2, tmp_path, **options)
    assert torch.equal(whole, trained(model(1, "gpt2").train(), 5, tmp_path, resume=True, **options))


def test_several_teachers_and_bfloat16() -> None:
    student = model(1)
    before = weights(student).clone()
    reptile = Reptile(
        student,
        [model(2), model(3)],
        teacher_weights=[0.25, 0.75],
        precision="bfloat16",
        on_policy=1.0,
        generate={"max_new_tokens": 4},
    )
    result = reptile.fit(batches(), until=2, progress_bar=False)
    assert result.steps == 2
    assert bool(weights(student).isfinite().all())
    assert not torch.equal(before, weights(student))


def test_completions_go_to_the_teacher_of_their_prompt() -> None:
    student, teachers = model(1), {"math": model(2), "code": model(3)}
    given: dict[str, list[list[int]]] = {"math": [], "code": []}
    for name, teacher in teachers.items():
        note = given[name]
        teacher.register_forward_pre_hook(
            lambda _, args, named, note=note: note.extend(x[:2].tolist() for x in named["input_ids"]), with_kwargs=True
        )
    reptile = Reptile(student, teachers, on_policy=1.0, generate={"max_new_tokens": 4})
    batch: dict[str, Any] = dict(batches(count=1)[0])
    begins = batch["input_ids"][:, :2].tolist()
    reptile.fit([batch | {"teacher": ["code", "math", "code"]}], until=1, progress_bar=False)
    assert given == {"math": [begins[1]], "code": [begins[0], begins[2]]}


def test_what_it_is_not_for_is_said(tmp_path: Path) -> None:
    generate = {"max_new_tokens": 4}
    with pytest.raises(ValueError, match="transformers' generate; Linear has none"):
        Reptile(nn.Linear(3, 3), nn.Linear(3, 3), on_policy=0.5, generate=generate, shift_labels=True)
    with pytest.raises(ValueError, match=r"from 0 to 1, or a schedule of it; got 1\.5"):
        Reptile(model(1), model(2), on_policy=1.5, generate=generate)
    with pytest.raises(ValueError, match="max_new_tokens': a whole number of at least 1"):
        Reptile(model(1), model(2), on_policy=0.5)
    with pytest.raises(ValueError, match="got it with on_policy=0"):
        Reptile(model(1), model(2), generate=generate)
    with pytest.raises(ValueError, match="num_return_sequences"):
        Reptile(model(1), model(2), on_policy=0.5, generate=generate | {"num_return_sequences": 2})
    with pytest.raises(ValueError, match="needs a teacher that is a model or a function"):
        Reptile(model(1), "batch", on_policy=0.5, generate=generate)
    with TeacherCache.write(tmp_path / "cache", vocab_size=V, kind="logits") as writer:
        writer.add(0, torch.zeros(2, V))
    cache = TeacherCache.open(tmp_path / "cache")
    with pytest.raises(ValueError, match="a TeacherCache holds no answers"):
        Reptile(model(1), cache, on_policy=0.5, generate=generate)
    sampling: Any = Reptile(model(1), model(2), on_policy=1.0, generate=generate)._sampling
    plain = batches(count=1)[0]
    with pytest.raises(ValueError, match="prompt in every sample"):
        sampling.sample(plain | {"labels": plain["input_ids"]})
    with pytest.raises(ValueError, match=r"got .*teacher_logits"):
        sampling.sample(plain | {"teacher_logits": torch.zeros(3, 8, V)})
    long = torch.full((1, 30), 5)
    with pytest.raises(ValueError, match="30 tokens and max_new_tokens=4 are more than the 32"):
        sampling.sample({"input_ids": long, "labels": torch.full_like(long, IGNORED)})
    small: Any = Reptile(model(1), model(2, vocab=3), on_policy=1.0, generate=generate, vocab="truncate")._sampling
    with pytest.raises(ValueError, match="LlamaForCausalLM knows 3: pass generate"):
        small.sample(plain)
