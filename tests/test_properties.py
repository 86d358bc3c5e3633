"""Hypothesis over shapes, dtypes, layouts and arguments, against the oracle and against the loss's own algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, INSTRUCTION_SETS, LAYOUTS, assert_near, check, make_logits, run
from torch import Tensor

import reptile_ext

# Long enough for whole vectors with a tail, and beyond the 512 classes in which the kernel looks for a maximum first.
vocab_sizes = st.one_of(st.integers(1, 70), st.integers(500, 1200))
temperatures = st.floats(0.1, 20.0)
weights = st.floats(0.0, 4.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Logits in any layout with the classes anywhere, labels with rows that are out, and keywords that go together."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2)))
    vocab_size, other_size = draw(vocab_sizes), draw(vocab_sizes)
    kind, seed = (
        draw(st.sampled_from(["random", "flat", "peaked", "near_equal", "rising"])),
        draw(st.integers(0, 2**20)),
    )
    truncate = draw(st.integers(0, 4)) == 0
    student, _ = make_logits(kind, shape, vocab_size, draw(st.sampled_from(DTYPES)), seed)
    teacher = make_logits(kind, shape, other_size if truncate else vocab_size, draw(st.sampled_from(DTYPES)), seed)[1]
    layouts = st.sampled_from(list(LAYOUTS.values()))
    if 0 not in shape:
        student, teacher = draw(layouts)(student), draw(layouts)(teacher)
    dim = draw(st.integers(-3, 2))
    student, teacher = student.movedim(-1, dim), teacher.movedim(-1, dim)

    generator = torch.Generator().manual_seed(seed)
    keywords: dict[str, Any] = {"dim": dim, "vocab": "truncate" if truncate else "error"}
    keywords["temperature"] = draw(st.one_of(temperatures, st.tuples(temperatures, temperatures)))
    keywords["temperature_scaling"] = draw(st.sampled_from(["t2", "none"]))
    keywords["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    keywords["soft_weight"] = draw(weights)
    labels = None
    if draw(st.booleans()):
        size = min(student.shape[dim], teacher.shape[dim])
        labels = torch.randint(size, shape, generator=generator)
        keywords["ignore_index"] = draw(st.sampled_from([-100, 0]))
        labels[torch.rand(shape, generator=generator) < 0.2] = keywords["ignore_index"]
        keywords["hard_weight"], keywords["label_smoothing"] = draw(weights), draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        keywords["weight"] = torch.rand(shape, generator=generator) * torch.randint(2, shape, generator=generator)
    if keywords["reduction"] != "none" and draw(st.booleans()):
        keywords["denominator"] = draw(st.floats(0.5, 100.0))
    return student, teacher, labels, keywords


@settings(max_examples=150)
@given(problems(), st.sampled_from(INSTRUCTION_SETS))
def test_any_call_equals_the_oracle(problem: tuple[Any, ...], name: str) -> None:
    student, teacher, labels, keywords = problem
    check(student, teacher, labels, sets=[name], **keywords)


@settings(max_examples=40)
@given(problems())
def test_inplace_equals_the_default(problem: tuple[Any, ...]) -> None:
    student, teacher, labels, keywords = problem
    if any(stride == 0 and size > 1 for stride, size in zip(student.stride(), student.shape, strict=True)):
        student = student.contiguous()
    right = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    leaf = student.detach().clone().requires_grad_()
    loss = reptile_ext.distillation_loss(leaf * 1, teacher, labels, inplace=True, **keywords)
    assert torch.equal(loss.detach(), right[0])
    loss.sum().backward()
    assert torch.equal(leaf.grad, right[1])


@settings(max_examples=40)
@given(st.integers(1, 6), vocab_sizes, st.sampled_from(["random", "flat", "peaked"]), st.integers(0, 2**20), st.data())
def test_algebra(rows: int, vocab_size: int, kind: str, seed: int, data: st.DataObject) -> None:
    """Adding a constant to a row changes nothing; permuted classes permute the gradient; its sum is 0; rows add up."""
    student, teacher = make_logits(kind, rows, vocab_size, torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    keywords = {"temperature": data.draw(temperatures), "reduction": "none"}
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, **keywords)
    close = {"rtol": 1e-9, "atol": 1e-11}
    assert gradient.sum(-1).abs().max() < 1e-12 * max(1.0, keywords["temperature"])

    constant = 100 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    moved = run(reptile_ext.distillation_loss, student + constant, teacher - constant, **keywords)
    torch.testing.assert_close(moved, (loss, gradient), **close)

    order = torch.randperm(vocab_size, generator=generator)
    permuted = run(reptile_ext.distillation_loss, student[:, order], teacher[:, order], **keywords)
    torch.testing.assert_close(permuted, (loss, gradient[:, order]), **close)

    keywords["reduction"] = "sum"
    torch.testing.assert_close(reptile_ext.distillation_loss(student, teacher, **keywords), loss.sum(), **close)


@settings(max_examples=30)
@given(vocab_sizes, st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_a_masked_tail_is_a_shorter_vocabulary(vocab_size: int, seed: int, dtype: torch.dtype) -> None:
    """−inf appended to both rows, up to any length, is as if it were not there."""
    student, teacher = make_logits("random", 3, vocab_size, dtype, seed)
    masked = torch.full((3, 1 + seed % 40), -torch.inf, dtype=dtype)
    long = torch.cat([student, masked], -1), torch.cat([teacher, masked], -1)
    loss, gradient = run(reptile_ext.distillation_loss, *long, temperature=2.0)
    assert (gradient[:, vocab_size:] == 0).all()
    assert_near({"masked": (loss, gradient[:, :vocab_size])}, student, teacher, temperature=2.0)


def test_the_strategy_reaches_what_it_is_for() -> None:
    """A strategy that never draws labels, truncation or a broken layout would pass everything."""
    seen: set[str] = set()

    @settings(max_examples=150)
    @given(problems())
    def draw(problem: tuple[Any, ...]) -> None:
        student, teacher, labels, keywords = problem
        dim = keywords["dim"]
        seen.update(k for k in ("weight", "denominator", "hard_weight") if k in keywords)
        seen.add(keywords["reduction"])
        seen.add("same dtype" if student.dtype == teacher.dtype else "mixed dtypes")
        seen.add("direct" if student.stride(dim) == 1 else "gathered")
        seen.add("truncated" if student.shape[dim] != teacher.shape[dim] else "whole")
        seen.add("empty" if 0 in student.shape else "full")
        seen.add("no labels" if labels is None else "labels")

    draw()
    wanted = "weight denominator hard_weight mean sum none direct gathered truncated whole empty full labels"
    assert seen >= {*wanted.split(), "same dtype", "mixed dtypes", "no labels"}, seen


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_any_place_of_a_broken_class_is_seen(bad: float) -> None:
    """In the body, the tail and the probe: no lane swallows it."""
    for vocab_size in (1, 15, 33, 600):
        for at in range(0, vocab_size, 1 if vocab_size < 100 else 37):
            student, teacher = make_logits("random", 2, vocab_size)
            student[0, at] = bad
            loss, gradient = run(reptile_ext.distillation_loss, student, teacher, reduction="none")
            assert loss.isnan().tolist() == [True, False]
            assert gradient[0].isnan().all()
            assert gradient[1].isfinite().all()
