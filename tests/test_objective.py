"""`Objective` without `Reptile`: in a loop of one's own, and called as trainers of other libraries call it."""

from __future__ import annotations

import copy
import functools
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_heads import CLASSES, Tagger, batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from reptile_ext.training import Objective, Reptile
from reptile_ext.training.batches import Batch

Inputs = dict[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def parts_of(batch: Inputs, *cuts: int) -> list[Inputs]:
    """The batch in micro-batches that end before these samples."""
    starts = (0, *cuts[:-1])
    return [{name: x[start:end] for name, x in batch.items()} for start, end in zip(starts, cuts, strict=True)]


def unequal_batch(labelled: bool) -> Inputs:
    """Eight samples, of which the first have few rows that count."""
    (batch,) = batches(1, size=8)
    batch["labels"][:2, 1:] = -100
    return batch if labelled else {"input_ids": batch["input_ids"]}


either_loss = pytest.mark.parametrize("fused_linear", [False, True], ids=["logits", "fused"])


@either_loss
@pytest.mark.parametrize(
    ("taught", "labelled", "keywords"),
    [
        (True, False, {"temperature": 2.0}),
        (True, True, {"temperature": 2.0}),
        (True, True, {"temperature": 2.0, "hard_weight": 0.5}),
        (True, True, {"divergence": "dkd"}),
        (False, True, {}),
    ],
    ids=["teacher", "teacher, ignored rows", "teacher and labels", "dkd", "labels"],
)
def test_micro_batches_with_an_outside_count_are_one_batch(
    taught: bool, labelled: bool, keywords: dict[str, Any], fused_linear: bool
) -> None:
    teacher = Tagger(1, width=24) if taught else None
    found = []
    for cuts in ((8,), (2, 3, 8)):
        student = Tagger(0)
        objective = Objective(student, teacher, fused_linear=fused_linear, **keywords)
        window = parts_of(unequal_batch(labelled), *cuts)
        num_items = objective.count(window) if len(window) > 1 else None
        losses = [objective(student, batch, num_items) for batch in window]
        for loss in losses:
            loss.backward()
        found.append((sum(loss.item() for loss in losses), gradients(student)))
    (whole, whole_gradients), (parts, parts_gradients) = found
    assert whole > 0.1
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, wanted in whole_gradients.items():
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(parts_gradients[name], wanted, rtol=1e-5, atol=1e-7)


def test_the_loss_is_what_the_docstring_says() -> None:
    student, teacher, (batch,) = Tagger(0), Tagger(1), batches(1)
    logits, teacher_logits, labels = student(**_inputs(batch)).logits, teacher(**_inputs(batch)).logits, batch["labels"]
    x, y = F.log_softmax(logits / 2, -1), F.log_softmax(teacher_logits / 2, -1)
    soft = 4 * (y.exp() * (y - x)).sum(-1)[labels != -100].sum()
    hard = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    wanted = (soft + 0.5 * hard) / (labels != -100).sum()
    for fused_linear in (False, True):
        objective = Objective(student, teacher, temperature=2.0, hard_weight=0.5, fused_linear=fused_linear)
        torch.testing.assert_close(objective(student, batch), wanted)
        torch.testing.assert_close(objective(student, batch, num_items=7), wanted * (labels != -100).sum() / 7)


def _inputs(batch: Inputs) -> Inputs:
    return {"input_ids": batch["input_ids"]}


@either_loss
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_processes_whose_gradients_are_averaged_are_one_batch(labelled: bool, fused_linear: bool) -> None:
    """As DDP does it: a count over all processes, and the loss times their number."""
    keywords: dict[str, Any] = {"fused_linear": fused_linear, "hard_weight": 0.5 if labelled else 0.0}
    teacher, whole, shares = Tagger(1), unequal_batch(labelled), parts_of(unequal_batch(labelled), 2, 8)
    wanted = Tagger(0)
    Objective(wanted, teacher, **keywords)(wanted, whole).backward()

    counts = [Objective(Tagger(0), teacher, **keywords).count([share]) for share in shares]
    assert counts[0] != counts[1]
    found = []
    for mine, other in (0, 1), (1, 0):
        student = Tagger(0)
        objective = Objective(student, teacher, **keywords)
        num_items = objective.count([shares[mine]], reduce=lambda count, other=other: count + counts[other])
        (objective(student, shares[mine], num_items) * 2).backward()
        found.append(gradients(student))
    for name, gradient in gradients(wanted).items():
        torch.testing.assert_close((found[0][name] + found[1][name]) / 2, gradient, rtol=1e-5, atol=1e-7)


def example(begins_with: str, **names: Any) -> dict[str, Any]:
    """Run the example of the docstring that begins so, with these names; what there is afterwards."""
    blocks = [textwrap.dedent(block) for block in re.findall(r"::\n\n((?: {8}.*\n|\n)+)", Objective.__doc__ or "")]
    (code,) = [block for block in blocks if block.lstrip().startswith(begins_with)]
    exec(code, names)
    return names


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch is built without gloo")
@either_loss
def test_a_loop_of_one_s_own_under_ddp(fused_linear: bool, tmp_path: Path) -> None:
    """The one of the docstring, in one process; a model may be wrapped."""
    student, teacher, batch = Tagger(0), Tagger(1), unequal_batch(labelled=True)
    Objective(student, teacher, temperature=2.0, hard_weight=0.5)(student, batch).backward()
    wanted = gradients(student)
    student.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        example(
            "def summed",
            torch=torch,
            DistributedDataParallel=DistributedDataParallel,
            Objective=functools.partial(Objective, fused_linear=fused_linear),
            student=student,
            teacher=teacher,
            micro_batches=parts_of(batch, 2, 3, 8),
            world_size=1,
        )
    finally:
        dist.destroy_process_group()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@either_loss
def test_a_teacher_in_train_mode_is_run_in_eval_mode_and_learns_nothing(fused_linear: bool) -> None:
    """As it is where a trainer has called `.train()` on all it has."""
    student, teacher, (batch,) = Tagger(0), Tagger(1, dropout=0.5), batches(1)
    objective = Objective(student, teacher, fused_linear=fused_linear)
    teacher.eval()
    wanted = objective(student, batch)
    teacher.train()
    teacher.head.eval()  # a part with another mode
    loss = objective(student, batch)
    assert torch.equal(loss, wanted)
    loss.backward()
    assert gradients(teacher) == {}
    assert [part.training for part in (teacher, teacher.body, teacher.head)] == [True, True, False]
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_student_and_teacher_may_share_parameters() -> None:
    """A model that learns from itself without dropout; `Reptile`, which freezes its teacher, refuses that."""
    student, (batch,) = Tagger(0, dropout=0.5), batches(1)
    objective = Objective(student, student)
    objective(student, batch).backward()
    assert gradients(student)
    assert student.training
    with pytest.raises(ValueError, match="share 5 parameters"):
        Reptile(student, student)


@either_loss
def test_logits_are_those_of_the_model(fused_linear: bool) -> None:
    student, (batch,) = Tagger(0), batches(1, size=120)  # 720 rows: more than an evaluation has at a time
    objective = Objective(student, Tagger(1), fused_linear=fused_linear)
    loss, logits = objective.loss_and_logits(student, batch)
    assert torch.equal(loss, objective(student, batch))
    assert not logits.requires_grad
    torch.testing.assert_close(logits, student(**_inputs(batch)).logits.detach())


def test_logits_have_the_model_s_layout() -> None:
    image, labels = torch.randn(2, 3, 4, 5), torch.randint(6, (2, 4, 5))
    student = nn.Conv2d(3, 6, 1)
    loss, logits = Objective(student, nn.Conv2d(3, 6, 1), dim=1, hard_weight=1.0).loss_and_logits(
        student, (image, labels)
    )
    assert torch.equal(logits, student(image).detach())
    assert loss > 0


def test_in_place_there_are_no_logits_to_return() -> None:
    student, (batch,) = Tagger(0), batches(1)
    objective = Objective(student, Tagger(1), inplace=True)
    with pytest.raises(ValueError, match="inplace=True leaves no logits to return"):
        objective.loss_and_logits(student, batch)
    with torch.no_grad():
        _, logits = objective.loss_and_logits(student, batch)
    torch.testing.assert_close(logits, student(**_inputs(batch)).logits.detach())


@either_loss
def test_autocast_is_the_caller_s_unless_it_is_given(fused_linear: bool) -> None:
    student, teacher, (batch,) = Tagger(0), Tagger(1), batches(1)
    seen: list[torch.dtype] = []
    for model in (student, teacher):
        model.body.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def dtypes(autocast: torch.dtype | None, outside: bool) -> set[torch.dtype]:
        seen.clear()
        objective = Objective(student, teacher, autocast=autocast, fused_linear=fused_linear)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            assert objective(student, batch).dtype == torch.float32
        return set(seen)

    assert dtypes(None, False) == dtypes(torch.float32, True) == {torch.float32}
    assert dtypes(None, True) == dtypes(torch.bfloat16, False) == {torch.bfloat16}


def test_labels_are_shifted_once() -> None:
    student, ids = Tagger(0), torch.randint(CLASSES, (4, 6))
    objective = Objective(student, Tagger(1), hard_weight=1.0, shift_labels=True)
    batch = {"input_ids": ids, "labels": ids}
    split = objective.split(batch)
    assert isinstance(split, Batch)
    assert objective.split(split) is split
    assert objective.count([batch]) == objective.count([split]) == 4 * 5
    by_hand = {"input_ids": ids, "labels": F.pad(ids[:, 1:], (0, 1), value=-100)}
    wanted = Objective(student, objective.teacher, hard_weight=1.0)(student, by_hand)
    assert torch.equal(objective(student, batch), wanted)
    assert torch.equal(objective(student, split), wanted)


def test_a_step_whose_rows_are_all_ignored_has_a_loss_of_0() -> None:
    student, (batch,) = Tagger(0), batches(1)
    batch["labels"].fill_(-100)
    objective = Objective(student, Tagger(1), hard_weight=1.0)
    for num_items in (None, objective.count([batch]), 0):
        loss = objective(student, batch, num_items)
        loss.backward()
        assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(student).values())


def test_what_cannot_be_counted_together_is_refused() -> None:
    student, (batch,) = Tagger(0), batches(1)
    objective = Objective(student, Tagger(1))
    with pytest.raises(ValueError, match="must all have labels or all have none; got both kinds"):
        objective.count([batch, _inputs(batch)])
    shorter = {"input_ids": batch["input_ids"][:, :4]}
    objective(student, shorter)  # by itself, whatever there was before
    objective(student, _inputs(batch))
    num_items = objective.count([_inputs(batch), shorter])
    objective(student, _inputs(batch), num_items)
    with pytest.raises(ValueError, match="must have the same number of rows; got 6 and 4: give labels"):
        objective(student, shorter, num_items)


def test_keywords_of_the_step_are_refused() -> None:
    for name in ("reduction", "weight", "denominator"):
        with pytest.raises(ValueError, match=f"{name} is set by the training step"):
            Objective(Tagger(0), Tagger(1), **{name: None})
    with pytest.raises(ValueError, match=r"teacher=None leaves no meaning to \['hard_weight', 'temperature'\]"):
        Objective(Tagger(0), None, temperature=2.0, hard_weight=1.0)
    with pytest.raises(ValueError, match="memory_budget is for the chunks of fused_linear=True"):
        Objective(Tagger(0), Tagger(1), memory_budget=1000)


# ------------------------------------------------------------------------------------------------ others' trainers


@either_loss
def test_hugging_faces_trainer(fused_linear: bool, tmp_path: Path) -> None:
    """The class of the docstring: a step of three unequal micro-batches is a step of one batch, and it evaluates."""
    transformers = pytest.importorskip("transformers")
    trainer_class = example("class DistillationTrainer", Trainer=transformers.Trainer)["DistillationTrainer"]
    batch, student, teacher = unequal_batch(labelled=True), Tagger(0), Tagger(1, width=24)
    samples = parts_of(batch, *range(1, 9))
    by_hand = copy.deepcopy(student)
    loss = Objective(by_hand, teacher, hard_weight=0.5)(by_hand, batch)
    loss.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            assert parameter.grad is not None
            parameter -= 0.5 * parameter.grad

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=1,
        label_names=["labels"],
    )
    trainer = trainer_class(
        student,
        arguments,
        data_collator=lambda found: {name: torch.cat([x[name] for x in found]) for name in found[0]},
        train_dataset=samples,
        eval_dataset=samples,
        objective=Objective(student, teacher, hard_weight=0.5, fused_linear=fused_linear),
        optimizers=(torch.optim.SGD(student.parameters(), lr=0.5), None),
        compute_metrics=lambda found: {"shape": list(found.predictions.shape)},
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    result = trainer.train()
    assert result.training_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=1e-5, atol=1e-6)
    measured = trainer.evaluate()
    assert measured["eval_shape"] == [8, 6, CLASSES]
    assert 0 < measured["eval_loss"] < loss.item() * 1.5
