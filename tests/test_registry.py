"""What has to be there for every divergence: kernel, reference, name, mirror, a row in the docs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import BETAS, ZERO_AT_EQUALITY, every_divergence, keywords_of, make_labels, make_logits, run
from torch import Tensor

import reptile_ext
from reptile_ext import ops, options, reference
from reptile_ext.options import DIVERGENCE_TABLE, DIVERGENCES, KERNELS, Keywords, make_options

# Each in a traced program would take its time, and the way there is the same for all.
COMPILED = {"forward_kl", "dkd", *(name for name in DIVERGENCES if DIVERGENCE_TABLE[name].mirror is None)}
MATHS = Path(__file__).resolve().parent.parent / "docs" / "maths.md"


@every_divergence
def test_a_name_has_a_kernel_a_reference_and_a_row_in_the_docs(divergence: str) -> None:
    kernel = make_options(divergence=divergence, beta=BETAS.get(divergence)).kernel()
    assert kernel in KERNELS
    assert kernel in reference.ROW_DIVERGENCES
    rows = re.findall(r"^\| `(\w+)` \|", MATHS.read_text(encoding="utf-8"), re.M)
    assert rows.count(divergence) == 1, f"docs/maths.md needs a row in its table for {divergence}"


def test_every_kernel_has_a_name_and_a_reference() -> None:
    """A kernel is a name's, or that of a name's trainable teacher."""
    of_names = {divergence.kernel or name for name, divergence in DIVERGENCE_TABLE.items()}
    of_teachers = {divergence.mirror for divergence in DIVERGENCE_TABLE.values()} - {None}
    assert set(KERNELS) == of_names | of_teachers
    assert set(reference.ROW_DIVERGENCES) == set(KERNELS)
    assert len(set(KERNELS)) == len(KERNELS)
    for divergence in DIVERGENCE_TABLE.values():
        assert set(divergence.limits.values()) <= set(KERNELS)


def rows_of(loss: Any, student: Tensor, teacher: Tensor, **keywords: Any) -> Any:
    return run(loss, student, teacher, make_labels(9, 50).clamp(min=0), reduction="none", **keywords)


@every_divergence
@pytest.mark.parametrize("temperature", [(1.0, 1.0), (2.0, 0.5)])
def test_the_mirror_is_the_divergence_with_the_roles_exchanged(
    temperature: tuple[float, float], divergence: str
) -> None:
    """D(student, teacher) is the mirror's D(teacher, student): of the kernels and of the reference."""
    asked = make_options(**keywords_of(divergence), temperature=temperature, reduction="none")
    exchanged = asked.exchanged()
    if exchanged is None:
        assert DIVERGENCE_TABLE[divergence].mirror is None
        return
    student, teacher = make_logits("random", 9, 50, torch.float64)
    constants = (make_labels(9, 50).clamp(min=0), None, None)
    there = reference.with_options(student, teacher, *constants, asked)
    back = reference.with_options(teacher, student, *constants, exchanged)
    torch.testing.assert_close(back, there, rtol=1e-12, atol=1e-13)
    for by, logits, number in ((asked, (student, teacher), there), (exchanged, (teacher, student), there)):
        loss = ops.distillation_loss(*logits, *constants, None, *ops.numbers(by), False)[0]
        torch.testing.assert_close(loss, number, rtol=1e-12, atol=1e-13)
    twice = exchanged.exchanged()
    assert twice is not None
    assert ops.numbers(twice) == ops.numbers(asked)


@every_divergence
def test_a_trainable_teacher_without_a_known_mirror_gets_its_gradient(
    divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the reference, by autograd of its value: in eager programs, with a second derivative, in a traced program,
    in the fused linear loss, and under torch.func."""
    torch.compiler.reset()
    student, teacher = make_logits("random", 4, 9, torch.float64)
    labels, head = torch.tensor([3, 0, -100, 8]), torch.randn(9, 9, dtype=torch.float64)
    keywords = {"temperature": (2.0, 0.5), "hard_weight": 0.5, **keywords_of(divergence)}

    def loss_of(s: Tensor, t: Tensor) -> Tensor:
        return reptile_ext.distillation_loss(s * 1, t * 1, labels, **keywords)

    def linear_loss_of(s: Tensor, t: Tensor) -> Tensor:
        return reptile_ext.linear_distillation_loss(s, head, t, head, labels, memory_budget=300, **keywords)

    def results() -> list[Tensor]:
        found = []
        ways = [loss_of, linear_loss_of]
        if divergence in COMPILED:
            ways.append(torch.compile(loss_of, backend="inductor", fullgraph=True))
        for f in ways:
            s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
            found += torch.autograd.grad(f(s, t), (s, t))
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        first = torch.autograd.grad(loss_of(s, t), (s, t), create_graph=True)
        found += torch.autograd.grad(sum(x.square().sum() for x in first), (s, t))
        found += torch.func.grad(loss_of, (0, 1))(student, teacher)
        found.append(torch.func.jvp(lambda t: loss_of(student, t), (teacher,), (torch.ones_like(teacher),))[1])
        return found

    right = results()
    monkeypatch.setattr(options, "MIRRORS", {})
    assert make_options(**keywords).exchanged() is None
    torch.compiler.reset()
    torch.testing.assert_close(results(), right, rtol=1e-9, atol=1e-12)


@every_divergence
def test_a_trainable_teacher_without_a_known_mirror_in_broken_and_masked_rows(
    divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in a broken row, finite where a class is masked, and 0 at equality."""
    monkeypatch.setattr(options, "MIRRORS", {})
    student, teacher = make_logits("random", 5, 9, torch.float64)
    student[1, 2], teacher[2, 4], student[3, 5] = -torch.inf, -torch.inf, torch.nan
    teacher[4] = student[4]
    teacher.requires_grad_()
    keywords = {**keywords_of(divergence), "reduction": "sum"}
    reptile_ext.distillation_loss(student, teacher, torch.zeros(5).long(), **keywords).backward()
    gradient = teacher.grad
    assert gradient.isnan().all(-1).tolist() == [False, False, False, True, False]
    assert gradient[:3].isfinite().all()
    assert (gradient[:3] != 0).any(-1)[0]
    if divergence in ZERO_AT_EQUALITY:  # but for rounding, which the formulas that are written out have not
        assert (gradient[4].abs() <= 1e-14).all()


def test_all_functions_and_modules_have_the_same_keywords() -> None:
    """Written out for readers and editors in the functions' signatures; with one set of defaults."""
    of_logits = inspect.signature(reptile_ext.distillation_loss).parameters
    defaults = {name: p.default for name, p in of_logits.items() if name in Keywords.__annotations__}
    assert list(defaults) == list(Keywords.__annotations__)
    assert make_options(**defaults) == make_options()
    for function in (
        reptile_ext.linear_distillation_loss,
        reptile_ext.DistillationLoss,
        reptile_ext.LinearDistillationLoss,
    ):
        parameters = inspect.signature(function).parameters
        of_logits_alone = {"dim", "inplace"} if "inear" in function.__name__ else set()
        assert {name: p.default for name, p in parameters.items() if name in defaults} == {
            name: default for name, default in defaults.items() if name not in of_logits_alone
        }
    with pytest.raises(TypeError, match=r"DistillationLoss\(\) got an unexpected keyword argument 'temprature'"):
        reptile_ext.DistillationLoss(temprature=2.0)
    with pytest.raises(TypeError, match="temprature"):
        reference.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temprature=2.0)
    assert len(DIVERGENCES) == len(set(DIVERGENCES))
