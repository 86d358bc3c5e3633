"""Training from a teacher cache: its rows are the live teacher's of the same positions; what does not fit is named."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import reptile_ext
from reptile_ext import TeacherCache, cli
from reptile_ext.training import Objective, Reptile, Until
from reptile_ext.training.weights import load_weights

V, K = 37, 8
MAX_KL = 1e-6
# Sum of the errors of a row's probabilities, and with them of the gradient in its logits (Pinsker; docs/cache.md).
L1 = (2 * MAX_KL) ** 0.5


class Language(nn.Module):
    """Token ids [B, T] to logits [B, T, V] that depend on position and all tokens so far."""

    def __init__(self, seed: int, vocab_size: int = V) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(V, 12)
        self.recurrent = nn.GRU(12, 12, batch_first=True)
        self.output = nn.Linear(12, vocab_size)
        with torch.no_grad():
            self.output.weight.mul_(6)  # so that rows differ

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.output(self.recurrent(self.embedding(input_ids))[0]))


TEACHER = Language(1)
LENGTHS = (5, 9, 2, 7, 9, 4)
SAMPLES = {
    f"text-{i}": torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(i))
    for i, length in enumerate(LENGTHS)
}


@torch.no_grad()
def answers(ids: Tensor, temperature: float = 1.0, k: int = K) -> tuple[Tensor, Tensor]:
    return reptile_ext.top_k_targets(TEACHER(ids[None]).logits[0], k, temperature)


def written(
    folder: Path, samples: dict[Any, Tensor] = SAMPLES, temperature: float = 1.0, k: int = K, **more: Any
) -> TeacherCache:
    with TeacherCache.write(folder, vocab_size=V, k=k, temperature=temperature, max_kl=MAX_KL, **more) as writer:
        for name, ids in samples.items():
            writer.add(name, *answers(ids, temperature, k))
    return TeacherCache.open(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return written(tmp_path_factory.mktemp("cache") / "T1")


@pytest.fixture(scope="module")
def cache_at_2(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return written(tmp_path_factory.mktemp("cache") / "T2", temperature=2.0)


def padded(names: Sequence[str], side: str, width: int = 0) -> dict[str, Any]:
    """A batch as tokenizers make it: padded on a side, with a mask; labels are the inputs."""
    width = max(width, *(len(SAMPLES[name]) for name in names))
    rows, masks = [], []
    for name in names:
        ids = SAMPLES[name]
        pad = (0, width - len(ids)) if side == "right" else (width - len(ids), 0)
        rows.append(F.pad(ids, pad))
        masks.append(F.pad(torch.ones_like(ids), pad))
    ids, mask = torch.stack(rows), torch.stack(masks)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "sample_id": [*names]}


def live(
    batch: dict[str, Any],
    student: nn.Module,
    temperature: Any = 1.0,
    hard_weight: float = 0.5,
    cache: TeacherCache | None = None,
) -> Tensor:
    """The loss of the live teacher's top k, sample by sample: each alone, without padding, in plain PyTorch. Or that of
    the rows of a cache in its place, which are the same but for their coding."""
    of_teacher = temperature[1] if isinstance(temperature, tuple) else temperature
    total, count = torch.zeros(()), 0
    logits = student(batch["input_ids"]).logits
    for row, mask in zip(range(len(logits)), batch["attention_mask"], strict=True):
        ids = batch["input_ids"][row][mask != 0]
        indices, log_probs = answers(ids, of_teacher) if cache is None else cache[batch["sample_id"][row]]
        own = logits[row][mask != 0]
        # Position t has the label t + 1; the last has none.
        total = total + reptile_ext.reference.sparse_distillation_loss(
            own[:-1], indices[:-1], log_probs[:-1], ids[1:],
            temperature=temperature, hard_weight=hard_weight, reduction="sum",
        )  # fmt: skip
        count += len(ids) - 1
    return total / count


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------ the same rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fused_linear", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, (0.5, 2.0)])
def test_a_cache_gives_the_loss_of_the_live_teacher_s_top_k(
    cache: TeacherCache, cache_at_2: TeacherCache, side: str, fused_linear: bool, temperature: Any
) -> None:
    """Whatever the order, the size of the batch and the side of the padding; one position off would show."""
    used = cache if temperature == 1.0 else cache_at_2
    student, reference = Language(2), Language(2)
    objective = Objective(
        student, used, shift_labels=True, temperature=temperature, hard_weight=0.5, fused_linear=fused_linear
    )
    for names in (("text-0",), ("text-4", "text-2", "text-1"), tuple(reversed(SAMPLES))):
        batch = padded(names, side, 11)
        # Under left padding a recurrent student has read padding first: the student's own logits are what is compared.
        wanted = live(batch, reference, temperature)
        found = objective(student, batch)
        decoded = live(batch, reference, temperature, cache=used)
        torch.testing.assert_close(found, decoded, rtol=1e-5, atol=1e-6)
        student.zero_grad()
        reference.zero_grad()
        found.backward()
        wanted.backward()
        # x has at most |log q| nats to make of an error in p.
        torch.testing.assert_close(found, wanted, rtol=0, atol=20 * L1)
        torch.testing.assert_close(gradients(student), gradients(reference), rtol=0, atol=20 * L1)
        apart = live({**batch, "input_ids": batch["input_ids"].roll(1, 0)}, reference, temperature)
        assert len(names) == 1 or (apart - wanted).abs() > 100 * L1  # or nothing would be shown


def test_a_row_is_that_of_its_position(cache: TeacherCache) -> None:
    """Exactly: the loss of one position alone, for each of them, is that of the cache's row of that number."""
    student = Language(2)
    objective = Objective(student, cache, shift_labels=False)
    ids = SAMPLES["text-1"]
    indices, log_probs = cache["text-1"]
    logits = student(ids[None]).logits[0].detach()
    for t in range(len(ids)):
        labels = torch.full_like(ids, -100)
        labels[t] = 3
        with torch.no_grad():
            found = objective(student, {"input_ids": ids[None], "labels": labels[None], "sample_id": ["text-1"]})
        wanted = reptile_ext.sparse_distillation_loss(logits[t : t + 1], indices[t : t + 1], log_probs[t : t + 1])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_packed_samples_and_parts(cache: TeacherCache) -> None:
    pieces = [[("text-1", 2, 6), ("text-3", 0, 7)], [("text-4", 0, 9), ("text-2", 0, 2)]]
    student = Language(2)
    ids = torch.stack([torch.cat([SAMPLES[name][a:b] for name, a, b in row]) for row in pieces])
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "sample_id": pieces}
    found = Objective(student, cache, shift_labels=False)(student, batch)
    rows = [torch.cat([cache[name][part][a:b] for row in pieces for name, a, b in row]) for part in (0, 1)]
    wanted = reptile_ext.sparse_distillation_loss(student(ids).logits.flatten(0, 1), *rows)
    torch.testing.assert_close(found, wanted)


def test_workers_decode_what_the_loop_would(cache: TeacherCache) -> None:
    data = [
        {"input_ids": SAMPLES[name][:4], "labels": SAMPLES[name][:4], "sample_id": [(name, 0, 4)]}
        for name in SAMPLES
        if len(SAMPLES[name]) >= 4
    ]
    student = Language(2)
    objective = Objective(student, cache, shift_labels=True)
    loader: DataLoader[Any] = DataLoader(data, 2, num_workers=1, collate_fn=cache.collate())  # type: ignore[arg-type]
    losses = []
    for batch, start in zip(loader, itertools.count(0, 2), strict=False):
        assert {"input_ids", "labels", "sample_id", "teacher_rows"} == set(batch)
        part = data[start : start + 2]
        by_hand = {name: torch.stack([x[name] for x in part]) for name in ("input_ids", "labels")}  # type: ignore[misc]
        losses.append(
            (objective(student, batch), objective(student, {**by_hand, "sample_id": [x["sample_id"] for x in part]}))
        )
    assert len(losses) == 3
    for found, wanted in losses:
        assert torch.equal(found, wanted)


def test_samples_that_are_one_row(tmp_path: Path) -> None:
    """Images: logits [B, V], integer ids in a tensor."""
    torch.manual_seed(0)
    inputs, teacher, student = torch.randn(10, 6), nn.Linear(6, V), nn.Linear(6, V)
    labels = torch.randint(0, V, (10,))
    with TeacherCache.write(tmp_path / "top_k", vocab_size=V, k=K) as writer, torch.no_grad():
        for i, x in enumerate(inputs):
            writer.add(i, *reptile_ext.top_k_targets(teacher(x[None]), K))
    with TeacherCache.write(tmp_path / "logits", vocab_size=V, kind="logits") as writer, torch.no_grad():
        for i, x in enumerate(inputs):
            writer.add(i, teacher(x[None]))
    order = torch.tensor([7, 2, 9])
    batch = {"student_inputs": inputs[order], "labels": labels[order], "sample_id": order}
    cache = TeacherCache.open(tmp_path / "top_k")
    found = Objective(student, cache, hard_weight=0.5)(student, batch)
    rows = [torch.cat([cache[int(i)][part] for i in order]) for part in (0, 1)]
    wanted = reptile_ext.sparse_distillation_loss(student(inputs[order]), *rows, labels[order], hard_weight=0.5)
    torch.testing.assert_close(found, wanted)
    # Logits in 16 bits are a dense teacher, at any temperature.
    found = Objective(student, TeacherCache.open(tmp_path / "logits"), temperature=3.0)(student, batch)
    rounded = teacher(inputs[order]).detach().half().float()
    torch.testing.assert_close(found, reptile_ext.distillation_loss(student(inputs[order]), rounded, temperature=3.0))


class Classifier(nn.Module):
    """Texts with padding to logits [B, V]: a mask [B, T] that is of no rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.output = nn.Embedding(V, 12), nn.Linear(12, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.output((self.embedding(input_ids) * mask).sum(1) / mask.sum(1)))


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("kind", ["top_k", "logits"])
def test_a_classifier_of_texts(tmp_path: Path, kind: str, workers: bool) -> None:
    """One row a sample: the mask is of the inputs. A sample without a class does not count, with a label or without."""
    teacher, student = Classifier(1), Classifier(2)
    names = ["text-0", "text-1", "text-2", "text-4"]
    with TeacherCache.write(tmp_path / "c", vocab_size=V, k=K, kind=kind) as writer, torch.no_grad():
        for name in names:
            logits = teacher(SAMPLES[name][None], torch.ones(1, len(SAMPLES[name]))).logits
            pair: tuple[Tensor, ...] = reptile_ext.top_k_targets(logits, K) if kind == "top_k" else (logits,)
            if name == "text-2" and kind == "top_k":
                pair = (torch.full_like(pair[0], -1), torch.full_like(pair[1], -torch.inf))
            writer.add(name, *pair)
    cache = TeacherCache.open(tmp_path / "c")
    batch = padded(names, "left") | {"labels": torch.tensor([3, 1, 4, 1])}
    logits = student(batch["input_ids"], batch["attention_mask"]).logits
    rows = [cache[name] if kind == "top_k" else (cache[name],) for name in names]
    of_cache = [torch.cat(column) for column in zip(*rows, strict=True)]
    counted = torch.tensor([True, True, kind == "logits", True])
    loss_of: Any = reptile_ext.distillation_loss if kind == "logits" else reptile_ext.sparse_distillation_loss
    if workers:
        samples = [
            {"input_ids": batch["input_ids"][i], "attention_mask": batch["attention_mask"][i], "sample_id": name}
            | {"labels": batch["labels"][i]}
            for i, name in enumerate(names)
        ]
        batch = cache.collate()(samples)
    for labels in (True, False):
        hard = {"hard_weight": 0.5} if labels else {}
        objective = Objective(student, cache, **hard)
        found = objective(student, batch)
        given = [batch["labels"][counted]] if labels else []
        wanted = loss_of(logits[counted], *(x[counted] for x in of_cache), *given, **hard)
        torch.testing.assert_close(found, wanted)
        # A step of micro-batches counts the same rows.
        torch.testing.assert_close(objective(student, batch, objective.count([batch])), wanted)
        batch = {name: x for name, x in batch.items() if name != "labels"}


class Translator(nn.Module):
    """An encoder-decoder as transformers has them: logits of the labels' length, whatever the input's is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.embedding, self.output = nn.Embedding(V, 12), nn.Linear(24, V)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return F.pad(labels.clamp(min=0)[:, :-1], (1, 0))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Any = None
    ) -> SimpleNamespace:
        read = (self.embedding(input_ids) * attention_mask.unsqueeze(-1)).sum(1, keepdim=True)
        written = self.embedding(decoder_input_ids)
        return SimpleNamespace(logits=self.output(torch.cat([read.expand_as(written), written], -1)))


@pytest.mark.parametrize("workers", [False, True])
def test_rows_of_a_decoder_are_placed_by_its_own_mask(tmp_path: Path, workers: bool) -> None:
    """Inputs are padded on the left and labels on the right, to one width, and as many: no number tells them apart."""
    names = ["text-1", "text-3"]
    left, right = padded(names, "left"), padded(names, "right")
    student = Translator(2)
    batch = {**left, "labels": right["labels"], "decoder_attention_mask": right["attention_mask"]}
    cache = written(tmp_path / "cache")
    logits = student(
        left["input_ids"], left["attention_mask"], F.pad(right["labels"].clamp(min=0)[:, :-1], (1, 0))
    ).logits
    kept = right["attention_mask"] != 0
    rows = [torch.cat([cache[name][part] for name in names]) for part in (0, 1)]
    wanted = reptile_ext.sparse_distillation_loss(logits[kept], *rows, right["labels"][kept], hard_weight=0.5)
    objective = Objective(student, cache, hard_weight=0.5, shift_labels=False)

    def collated(batch: dict[str, Any]) -> Any:
        if not workers:
            return batch
        rows = range(len(names))
        return cache.collate()([{name: value[i] for name, value in batch.items()} for i in rows])

    torch.testing.assert_close(objective(student, collated(batch)), wanted)
    del batch["decoder_attention_mask"]
    with pytest.raises(ValueError, match=r"7 to 9 positions share a batch.* a decoder_attention_mask where"):
        objective(student, collated(batch))


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_drawn_classes_that_the_student_lacks(tmp_path: Path, hard_weight: float) -> None:
    """A row whose draws all lie beyond the student's classes teaches its label alone, and is no NaN."""
    few = V - 9
    ids, student = SAMPLES["text-1"] % few, Language(2, few)
    indices, log_probs = (x.clone() for x in answers(ids))
    indices[4] = torch.tensor([few, few + 3, V - 1, *[-1] * (K - 3)])
    log_probs[4] = torch.tensor([0.5, 0.25, 0.25, *[0.0] * (K - 3)]).log()
    with TeacherCache.write(tmp_path / "cache", vocab_size=V, k=K, kind="sampled") as writer:
        writer.add("text-1", indices, log_probs.log_softmax(-1))
    objective = Objective(
        student, TeacherCache.open(tmp_path / "cache"), vocab="truncate", hard_weight=hard_weight, shift_labels=False
    )
    labels = ids.roll(-1)
    found = objective(student, {"input_ids": ids[None], "labels": labels[None], "sample_id": ["text-1"]})
    x = student(ids[None]).logits[0].log_softmax(-1)
    losses = []
    for row, of_ids, y in zip(x, *TeacherCache.open(tmp_path / "cache")["text-1"], strict=True):
        kept = (of_ids >= 0) & (of_ids < few)
        y = y[kept] - y[kept].logsumexp(-1)
        losses.append((y.exp() * (y - row[of_ids[kept]])).sum())
    assert losses[4] == 0
    wanted = torch.stack(losses).mean() + hard_weight * F.nll_loss(x, labels)
    torch.testing.assert_close(found, wanted)


def test_sampled_targets_are_renormalized(tmp_path: Path) -> None:
    ids = SAMPLES["text-1"]
    with torch.no_grad():
        drawn = reptile_ext.sampled_targets(TEACHER(ids[None]).logits[0], 16, replacement=True)
    with TeacherCache.write(tmp_path / "cache", vocab_size=V, kind="sampled", k=16) as writer:
        writer.add("text-1", *drawn)
    cache, student = TeacherCache.open(tmp_path / "cache"), Language(2)
    batch = {"input_ids": ids[None], "labels": ids[None].roll(-1, 1), "sample_id": ["text-1"]}
    found = Objective(student, cache, shift_labels=False)(student, batch)
    wanted = reptile_ext.sparse_distillation_loss(
        student(ids[None]).logits, *cache.batch(["text-1"]), tail="renormalize"
    )
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="reverse_kl"):
        Objective(student, cache, divergence="reverse_kl")


@pytest.mark.parametrize("fused_linear", [False, True])
@pytest.mark.parametrize("classes", [V - 5, V + 7])
def test_padded_vocabularies_that_differ(tmp_path: Path, classes: int, fused_linear: bool) -> None:
    """With all classes listed the loss is that of the full teacher; the rest of the student has no part in it."""
    cache, student = written(tmp_path / "cache", k=V), Language(2, classes)
    names = ["text-1", "text-4"]
    ids = torch.stack([SAMPLES[name] for name in names])
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1) % (V - 5), "sample_id": names}
    with pytest.raises(ValueError, match=f"{classes} classes, and the cache in .* is of {V}: pass vocab='truncate'"):
        Objective(student, cache, shift_labels=False, fused_linear=fused_linear)(student, batch)
    objective = Objective(
        student, cache, shift_labels=False, vocab="truncate", hard_weight=0.5, fused_linear=fused_linear
    )
    loss = objective(student, batch)
    loss.backward()
    reference = copy.deepcopy(student)
    reference.zero_grad()
    wanted = reptile_ext.distillation_loss(
        reference(ids).logits, TEACHER(ids).logits.detach(), batch["labels"], vocab="truncate", hard_weight=0.5
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=0, atol=20 * L1)
    torch.testing.assert_close(gradients(student), gradients(reference), rtol=0, atol=20 * L1)
    if classes > V:
        assert student.output.weight.grad is not None
        assert not student.output.weight.grad[V:].any()
    metrics = Reptile(student, cache, metrics=("agreement",), vocab="truncate", shift_labels=False).evaluate([batch])
    shared = min(V, classes)
    first = [model(ids).logits[..., :shared].argmax(-1) for model in (student, TEACHER)]
    assert metrics["agreement"] == pytest.approx((first[0] == first[1]).float().mean().item())


def test_a_row_without_a_class_does_not_count(tmp_path: Path) -> None:
    """As of servers, which say nothing of the first token: its label is not learned from, and nothing is NaN."""
    ids, student = SAMPLES["text-1"], Language(2)
    indices, log_probs = answers(ids)
    indices[0], log_probs[0] = -1, -torch.inf
    with TeacherCache.write(tmp_path / "cache", vocab_size=V, k=K, max_kl=MAX_KL) as writer:
        writer.add("text-1", indices, log_probs)
    cache = TeacherCache.open(tmp_path / "cache")
    for tail in ("bucket", "renormalize"):
        logits, labels = student(ids[None]).logits, ids[None].roll(-1, 1)
        rows = [x[:, 1:] for x in cache.batch(["text-1"])]
        wanted = reptile_ext.sparse_distillation_loss(logits[:, 1:], *rows, labels[:, 1:], tail=tail, hard_weight=0.5)
        batch = {"input_ids": ids[None], "labels": labels, "sample_id": ["text-1"]}
        found = Objective(student, cache, shift_labels=False, tail=tail, hard_weight=0.5)(student, batch)
        torch.testing.assert_close(found, wanted)
        # Without labels there is only the mask to say so.
        del batch["labels"]
        found = Objective(student, cache, tail=tail)(student, batch)
        wanted = reptile_ext.sparse_distillation_loss(logits[:, 1:], *rows, tail=tail)
        torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------------------ the loop


def batches() -> list[dict[str, Any]]:
    names = list(SAMPLES)
    return [padded(names[i : i + 2], "right") for i in range(0, len(names), 2)]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_step_is_that_of_the_live_teacher(cache: TeacherCache) -> None:
    """And so is the evaluation, all K classes of it."""

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    student, by_hand = Language(2), Language(2)
    whole = padded(list(SAMPLES), "right")
    live(whole, by_hand).backward()
    sgd(by_hand.parameters()).step()
    reptile = Reptile(
        student,
        cache,
        metrics=("agreement",),
        optimizer=sgd,
        clip=None,
        accumulate=3,
        shift_labels=True,
        hard_weight=0.5,
    )
    result = reptile.fit(batches(), [whole], until=Until(steps=1), progress_bar=False)
    torch.testing.assert_close(weights(student), weights(by_hand), rtol=0, atol=10 * L1)
    assert result.metrics["loss"] == pytest.approx(live(whole, by_hand).item(), abs=20 * L1)
    is_last = torch.nn.functional.pad(whole["attention_mask"][:, 1:], (0, 1)) == 0
    agree = by_hand(whole["input_ids"]).logits.argmax(-1) == TEACHER(whole["input_ids"]).logits.argmax(-1)
    assert result.metrics["agreement"] == pytest.approx(agree[~is_last].float().mean().item())


def test_a_stopped_training_goes_on_to_the_same_bits(cache: TeacherCache, tmp_path: Path) -> None:
    data = [
        {"input_ids": SAMPLES[name][:4], "labels": SAMPLES[name][:4], "sample_id": [(name, 0, 4)]}
        for name in SAMPLES
        if len(SAMPLES[name]) >= 4
    ]

    def trained(steps: Sequence[int], folder: Path) -> Tensor:
        for step in steps:
            loader: DataLoader[Any] = DataLoader(data, 2, shuffle=True, collate_fn=cache.collate())  # type: ignore[arg-type]
            student = Language(2)
            reptile = Reptile(student, cache, shift_labels=True, hard_weight=0.5)
            with torch.random.fork_rng():
                reptile.fit(loader, until=Until(steps=step), folder=folder, resume=True, progress_bar=False)
        return weights(student)

    assert torch.equal(trained([5, 11], tmp_path / "stopped"), trained([11], tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------ what is refused


def test_wrong_use_is_named(cache: TeacherCache, cache_at_2: TeacherCache, tmp_path: Path) -> None:
    student = Language(2)
    at_2 = r"were written at temperature 2, .* pass temperature=2, or \(T_s, 2\)"
    for make, words in (
        (lambda: Reptile(student, cache_at_2, temperature=1.0), at_2),
        (lambda: Reptile(student, cache_at_2, temperature=(2.0, 1.0)), at_2),
        (lambda: Reptile(student, cache_at_2, temperature="linear:4->2"), "temperature: .* it may be no schedule"),
        (lambda: Reptile(student, cache, binary=True), "binary=True"),
        (lambda: Reptile(student, cache, teacher_inputs=lambda x: x), "teacher_inputs"),
        (lambda: Reptile(student, cache, teacher_weights=(1.0,)), "teacher_weights"),
        (lambda: Reptile(student, cache, tail="head"), "tail must be one of"),
        (lambda: Reptile(student, cache, divergence="mse"), "mse"),
        (lambda: Reptile(student, TEACHER, tail="bucket"), "tail is for a teacher of which K classes"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="must be the only teacher"):
        Reptile(student, [cache, TEACHER])  # type: ignore[list-item]
    assert Objective(student, cache_at_2).criterion.keywords["temperature"] == 2.0
    objective = Objective(student, cache_at_2, temperature=(1.0, 2.0))
    with pytest.raises(ValueError, match=at_2):
        objective.set_keywords(temperature=1.0)
    assert objective.criterion.keywords["temperature"] == (1.0, 2.0)

    with TeacherCache.write(tmp_path / "hidden", vocab_size=V, kind="hidden") as writer:
        writer.add(0, torch.zeros(3, 12))
    with pytest.raises(ValueError, match="holds hidden states, which need the teacher's head"):
        Reptile(student, TeacherCache.open(tmp_path / "hidden"))


def test_batches_that_do_not_fit_are_named(cache: TeacherCache) -> None:
    student = Language(2)
    objective = Objective(student, cache, shift_labels=True)
    good = padded(["text-1", "text-4"], "right")
    short = {name: x[:, :8] for name, x in good.items() if name != "sample_id"} | {"sample_id": good["sample_id"]}
    unmasked = {name: x for name, x in good.items() if name != "attention_mask"}
    uneven = padded(["text-1", "text-3"], "right")
    for batch, error, words in (
        ({name: x for name, x in good.items() if name != "sample_id"}, ValueError, "needs 'sample_id' in every batch"),
        ((good["input_ids"], good["labels"]), ValueError, "needs 'sample_id' in every batch"),
        (good | {"sample_id": ["text-1", "text-9"]}, KeyError, "text-9"),
        (good | {"sample_id": ["text-1"]}, ValueError, "of 2 samples, as attention_mask is; got 1"),
        (unmasked | {"sample_id": ["text-1"]}, ValueError, "of the batch's 2 samples; got 1 ids"),
        (
            good | {"sample_id": ["text-1", "text-3"]},
            ValueError,
            "'text-3' has 7 positions in the cache; the batch has 9",
        ),
        (short, ValueError, r"'text-1' has 9 positions in the cache; the batch has 8, .* list of \(id, begin, end\)"),
        (
            good | {"attention_mask": torch.ones(2, 1, 9, 9)},
            ValueError,
            r"attention_mask must be \[B, T\], 0 at padding.*; got \[2, 1, 9, 9\]",
        ),
        (short | {"attention_mask": None}, ValueError, "has 9 positions for each of 2 samples, and the student's"),
        (uneven | {"attention_mask": None}, ValueError, "samples of 7 to 9 positions share a batch"),
        (good | {"sample_id": [[("text-1", 0, 12)]] * 2}, IndexError, "'text-1' has positions 0 … 9; asked for 0 … 12"),
        (good | {"sample_id": [("text-1", 0, 9)] * 2}, ValueError, r"sample_id must be an id or a list of \(id, begin"),
        (good | {"sample_id": "text-1"}, TypeError, "sample_id must be a list or tensor of ids"),
        (good | {"sample_id": torch.zeros(2)}, TypeError, "sample_id must be whole numbers"),
        (
            good | {"teacher_logits": torch.zeros(2, 9, V)},
            ValueError,
            "has 'teacher_logits', and the teacher is a cache",
        ),
    ):
        with pytest.raises(error, match=words):
            objective(student, batch)
    # Another teacher, or none, has no use for them.
    assert torch.equal(
        Objective(student, TEACHER, shift_labels=True)(student, good),
        Objective(student, TEACHER, shift_labels=True)(student, {n: x for n, x in good.items() if n != "sample_id"}),
    )


# ------------------------------------------------------------------------------------------------ the commands

SMALL = [
    *("--vocabulary=300", "--length=16", "--transfer-tokens=2000", "--held-out-tokens=1000"),
    *("--teacher-width=16", "--student-width=16", "--teacher-steps=30", "--steps=20"),
    *("--eval-every=10", "--checkpoint-every=10", "--quiet"),
]


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from reptile_ext.training.recipes import code_lm

    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, json, subprocess)]
    monkeypatch.setattr(code_lm, "standard_library", lambda: (texts[:2], texts[2:]))


@pytest.mark.usefixtures("little_text")
def test_the_commands_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reptile_ext.training.recipes import code_lm, comparison

    folder, run, plain = tmp_path / "cache", tmp_path / "run", tmp_path / "plain"
    assert cli.main(["cache-teacher", *SMALL, "--kind", "top_k", "--k", "300", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "187 samples, 2,992 positions" in said
    assert "300 classes hold 1.000 of the mass" in said

    # Each sample's rows are the teacher's answers to that sample.
    cache = TeacherCache.open(folder, vocab_size=300, temperature=1.0)
    given = (flag.removeprefix("--").split("=") for flag in SMALL[:-1])
    settings = code_lm.CodeLM(**{name.replace("-", "_"): int(value) for name, value in given})
    task = code_lm.build(settings, folder / "teacher")
    load_weights(folder / "teacher" / "teacher" / "student.safetensors", task.teacher)
    ((ids, _),) = itertools.islice(iter(task.held_out), 1)
    with torch.no_grad():
        wanted = task.teacher.eval()(ids).softmax(-1)
    for i, row in enumerate(wanted):
        indices, log_probs = cache[f"held-out-{i}"]
        found = torch.zeros_like(row).scatter_(-1, indices.clamp(min=0), log_probs.exp())
        assert (found - row).abs().sum(-1).max() < (2 * 1e-3) ** 0.5 + 1e-6

    alive: list[weakref.ref[nn.Module]] = []
    found_alive: dict[str, int] = {}
    make, train = code_lm.Transformer.__init__, comparison._Stages.train

    def made(self: nn.Module, *arguments: Any) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(self))

    def trained(self: Any, name: str, *arguments: Any) -> None:
        gc.collect()
        found_alive[name] = sum(model() is not None for model in alive)
        train(self, name, *arguments)

    monkeypatch.setattr(code_lm.Transformer, "__init__", made)
    monkeypatch.setattr(comparison._Stages, "train", trained)
    del task
    assert cli.main(["distill", *SMALL, "--cache", str(folder), "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "distilled from cache, K = 300" in said
    assert "peak MB" in said
    assert found_alive == {"teacher": 1, "student": 1, "student alone": 1, "student from cache": 0}
    report = json.loads((run / "report.json").read_text())
    assert list(report["models"]) == ["teacher", "student", "student from cache", "student alone"]
    full, cached = report["models"]["student"], report["models"]["student from cache"]
    # All classes are kept, so that only the coding is between the two.
    assert cached["cross_entropy"] == pytest.approx(full["cross_entropy"], abs=0.02)
    assert cached["loss"] == pytest.approx(full["loss"], abs=0.02)
    assert cached["cross_entropy"] != full["cross_entropy"]
    assert report["cache"]["k"] == 300
    # The teacher is the cache's, not one that was trained again.
    name = "teacher/student.safetensors"
    assert (run / name).read_bytes() == (folder / "teacher" / name).read_bytes()
    if Path("/proc/self/clear_refs").exists():
        assert report["models"]["teacher"]["peak_bytes"] is None
        assert cached["peak_bytes"] > 0

    # Without the flag nothing is as it was not.
    assert cli.main(["distill", *SMALL, "--out", str(plain)]) == 0
    assert "peak MB" not in capsys.readouterr().out
    assert "cache" not in (plain / "config.toml").read_text()
    without = json.loads((plain / "report.json").read_text())
    assert without.keys() == report.keys() - {"cache"}
    assert without["models"]["student"]["cross_entropy"] == full["cross_entropy"]
    assert (plain / "student.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()

    # What is of other data, another tokenizer or another temperature is refused by name, before anything is trained.
    for flags, words in (
        ("--transfer-tokens 1984", "data: the cache in"),
        ("--vocabulary 301", "vocab_size: the cache in"),
        ("--temperature 2", "temperature: the cache in"),
    ):
        argv = ["distill", *SMALL, *flags.split(), "--cache", str(folder), "--out", str(tmp_path / "other")]
        assert cli.main(argv) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    monkeypatch.setattr(code_lm, "trained_tokenizer", _merged_otherwise(code_lm.trained_tokenizer))
    assert cli.main(["distill", *SMALL, "--cache", str(folder), "--out", str(tmp_path / "other")]) == 2
    assert "tokenizer: the cache in" in capsys.readouterr().err


def _merged_otherwise(make: Any) -> Any:
    """A tokenizer of the same size that differs."""

    def made(size: int, texts: list[str], path: Path) -> Any:
        return make(size, texts[:1], path)

    return made


@pytest.mark.usefixtures("little_text")
def test_a_stopped_cache_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reptile_ext.training.recipes import comparison

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main(["cache-teacher", *SMALL, "--k", "8", "--out", str(whole)]) == 0

    targets, calls = comparison.sampled_targets, itertools.count()

    def stop(*arguments: Any) -> Any:
        if next(calls) == 7 * 8:
            raise KeyboardInterrupt
        return targets(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "sampled_targets", stop)
        assert cli.main(["cache-teacher", *SMALL, "--k", "8", "--out", str(broken)]) == 130
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"reptile cache-teacher: stopped; go on with `reptile cache-teacher --resume {broken}`"
    ]
    assert cli.main(["distill", *SMALL, "--cache", str(broken), "--out", str(tmp_path / "run")]) == 2
    assert "is unfinished" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "sampled_targets", lambda *x: (next(calls), targets(*x))[1])
        assert cli.main(["cache-teacher", "--resume", str(broken), "--quiet"]) == 0
    assert next(calls) == 187 + 1  # of 187 samples 56 were there, and one was asked for twice
    one, other = (TeacherCache.open(folder) for folder in (whole, broken))
    assert set(one) == set(other)
    assert one.info()["teacher"] == other.info()["teacher"]
    for name in one:
        assert all(torch.equal(x, y) for x, y in zip(one[name], other[name], strict=True))
    assert cli.main(["cache-teacher", *SMALL, "--out", str(whole)]) == 2
    assert "is not empty" in capsys.readouterr().err
