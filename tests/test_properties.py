"""Hypothesis over shapes, dtypes, layouts and arguments, against the oracle and against the loss's own algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BETAS,
    BFLOAT16_SET,
    DTYPES,
    EPSILON,
    INSTRUCTION_SETS,
    LAYOUTS,
    ZERO_AT_EQUALITY,
    assert_near,
    check,
    error,
    exact,
    keywords_of,
    labels_of,
    make_logits,
    mixture_terms,
    run,
)
from torch import Tensor

import reptile_ext
from reptile_ext import distillation_loss, ops
from reptile_ext.options import DIVERGENCES

# Long enough for whole vectors with a tail, and beyond the 512 classes in which the kernel looks for a maximum first.
vocab_sizes = st.one_of(st.integers(1, 70), st.integers(500, 1200))
temperatures = st.floats(0.1, 20.0)
weights = st.floats(0.0, 4.0)
# β of every divergence that has one: anything that is legal, its limits included.
between = st.floats(1e-6, 1 - 1e-6)
betas = {
    "symmetric_kl": st.floats(0.0, 1.0),
    "jsd": between,
    "scaled_jsd": st.one_of(between, st.sampled_from([0.0, 1.0])),
    "skew_kl": st.one_of(between, st.just(0.0)),
    "skew_reverse_kl": st.one_of(between, st.just(0.0)),
    "dkd": st.floats(0.0, 10.0),
}
betas |= {name: st.just(beta) for name, beta in BETAS.items() if name not in betas}


@st.composite
def divergences(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(DIVERGENCES))
    return {"divergence": name, "beta": draw(st.one_of(st.none(), betas[name])) if name in betas else None}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Logits in any layout with the classes anywhere, labels with ignored rows, and keywords that go together."""
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
    keywords: dict[str, Any] = {"dim": dim, "vocab": "truncate" if truncate else "error", **draw(divergences())}
    keywords["temperature"] = draw(st.one_of(temperatures, st.tuples(temperatures, temperatures)))
    keywords["temperature_scaling"] = draw(st.sampled_from(["t2", "none"]))
    keywords["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    keywords["soft_weight"] = draw(weights)
    labels = None
    if draw(st.booleans()) or keywords["divergence"] == "dkd":
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


@settings(max_examples=400)
@given(problems(), st.sampled_from(INSTRUCTION_SETS))
def test_any_call_equals_the_oracle(problem: tuple[Any, ...], name: str) -> None:
    student, teacher, labels, keywords = problem
    check(student, teacher, labels, sets=[name], **keywords)


@settings(max_examples=150)
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


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A few float64 rows of student and teacher, labels, and keywords with a divergence and a temperature."""
    count, vocab_size, seed = draw(st.integers(1, 6)), draw(vocab_sizes), draw(st.integers(0, 2**20))
    kind = draw(st.sampled_from(["random", "flat", "peaked"]))
    student, teacher = make_logits(kind, count, vocab_size, torch.float64, seed)
    labels = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    return student, teacher, labels, {"temperature": draw(temperatures), **draw(divergences())}


# Relative to what is computed, and to the terms it is computed from, which are of order 1 to T².
close = {"rtol": 1e-8, "atol": 1e-9}


@given(rows())
def test_a_constant_added_to_a_row_changes_nothing(problem: tuple[Any, ...]) -> None:
    """But for mse, which compares the logits themselves. And so every row of the gradient sums to 0."""
    student, teacher, labels, keywords = problem
    if keywords["divergence"] == "mse":
        return
    loss, gradient = run(distillation_loss, student, teacher, labels, reduction="none", **keywords)
    constant = 100 * torch.randn(len(labels), 1, dtype=torch.float64)
    moved = run(distillation_loss, student + constant, teacher - constant, labels, reduction="none", **keywords)
    torch.testing.assert_close(moved, (loss, gradient), **close)
    assert (gradient.sum(-1).abs() <= 1e-9 * (1 + gradient.abs().sum(-1))).all()


@given(rows())
def test_classes_may_be_permuted(problem: tuple[Any, ...]) -> None:
    student, teacher, labels, keywords = problem
    loss, gradient = run(distillation_loss, student, teacher, labels, hard_weight=0.5, **keywords)
    order = torch.randperm(student.shape[1])
    permuted = run(
        distillation_loss, student[:, order], teacher[:, order], order.argsort()[labels], hard_weight=0.5, **keywords
    )
    torch.testing.assert_close(permuted, (loss, gradient[:, order]), **close)


@given(rows(), st.integers(0, 6))
def test_rows_may_be_split_and_joined(problem: tuple[Any, ...], at: int) -> None:
    student, teacher, labels, keywords = problem
    keywords |= {"reduction": "sum", "hard_weight": 0.5}
    loss, gradient = run(distillation_loss, student, teacher, labels, **keywords)
    parts = [
        run(distillation_loss, student[part], teacher[part], labels[part], **keywords)
        for part in (slice(at), slice(at, None))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, **close)
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)


@given(rows(), st.floats(0.01, 100.0))
def test_weights_scale_the_sum_and_not_the_mean(problem: tuple[Any, ...], factor: float) -> None:
    student, teacher, labels, keywords = problem
    weight = torch.rand(len(labels), dtype=torch.float64) + 0.1
    keywords |= {"hard_weight": 0.5}
    for reduction, power in (("mean", 0), ("sum", 1), ("none", 1)):
        once = run(distillation_loss, student, teacher, labels, weight=weight, reduction=reduction, **keywords)
        more = run(distillation_loss, student, teacher, labels, weight=factor * weight, reduction=reduction, **keywords)
        torch.testing.assert_close(more, tuple(factor**power * x for x in once), **close)


@given(rows(), temperatures)
def test_temperatures_divide_the_logits(problem: tuple[Any, ...], other: float) -> None:
    """A temperature is a division of the logits, and temperature_scaling="t2" a product by T_s·T_t, in value and
    gradient alike."""
    student, teacher, labels, keywords = problem
    t_s, t_t = keywords["temperature"], other
    keywords |= {"temperature": (t_s, t_t), "temperature_scaling": "none"}
    loss, gradient = run(distillation_loss, student, teacher, labels, **keywords)
    divided = run(distillation_loss, student / t_s, teacher / t_t, labels, **{**keywords, "temperature": 1.0})
    torch.testing.assert_close((divided[0], divided[1] / t_s), (loss, gradient), **close)
    scaled = run(distillation_loss, student, teacher, labels, **{**keywords, "temperature_scaling": "t2"})
    torch.testing.assert_close(scaled, (t_s * t_t * loss, t_s * t_t * gradient), **close)


@given(st.integers(2, 40), st.integers(0, 2**20))
def test_the_gradient_keeps_its_size_at_high_temperature(vocab_size: int, seed: int) -> None:
    """Hinton et al. 2015, equation 4: T² times the gradient of KL tends to ((s − mean s) − (t − mean t)) / V."""
    student, teacher = make_logits("random", 3, vocab_size, torch.float64, seed)
    gradient = run(distillation_loss, student, teacher, temperature=1e5, reduction="sum")[1]
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / vocab_size
    torch.testing.assert_close(gradient, limit, rtol=1e-3, atol=1e-3)


@given(rows())
def test_scaled_jsd_tends_to_its_limits(problem: tuple[Any, ...]) -> None:
    """To forward KL as β → 0 and to reverse KL as β → 1, without a jump; skew KL to forward KL likewise."""
    student, teacher, _, keywords = problem
    student, teacher = student.clamp(-3, 3), teacher.clamp(-3, 3)  # p/q then is within e^±12
    keywords["temperature"] = max(1.0, keywords["temperature"])

    def of(divergence: str, beta: float | None = None) -> Any:
        return run(distillation_loss, student, teacher, **{**keywords, "divergence": divergence, "beta": beta})

    for limit, name, betas in (
        (of("forward_kl"), "scaled_jsd", (1e-12, 1e-9)),
        (of("reverse_kl"), "scaled_jsd", (1 - 1e-9,)),
        (of("forward_kl"), "skew_kl", (1e-12,)),
        (of("reverse_kl"), "skew_reverse_kl", (1e-12,)),
    ):
        for beta in betas:
            torch.testing.assert_close(of(name, beta), limit, rtol=1e-3, atol=1e-6)
    for beta, limit in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found, right = of("scaled_jsd", beta), of(limit)
        assert torch.equal(found[0], right[0])
        assert torch.equal(found[1], right[1])


@settings(max_examples=60)
@given(st.sampled_from([1e-30, 1e-12, 1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6]), st.sampled_from(DTYPES), st.integers(0, 99))
def test_extreme_betas_keep_the_tolerance_rule(beta: float, dtype: torch.dtype, seed: int) -> None:
    """Dividing by β (1−β) must not blow a rounding error up: ours is held to the rule of β = 1/2 here, without the
    error of plain PyTorch, which loses everything."""
    student, teacher = make_logits("random", 3, 700, dtype, seed)
    # A skewed loss is of order (1−β)² near β = 1, a difference of terms of order 1 − β: at 1e-6 it has not all digits.
    skewed = ("skew_kl", "skew_reverse_kl") if beta <= 1 - 1e-3 else ()
    tiny, half_unit = torch.finfo(dtype).tiny, torch.finfo(dtype).eps / 2  # what rounding the result may cost
    for divergence in ("scaled_jsd", "jsd", *skewed):
        keywords = {"divergence": divergence, "beta": beta}
        exact_loss, exact_gradient = run(exact, student.double(), teacher.double(), **keywords)
        size = mixture_terms(student.double(), teacher.double(), divergence, beta) / len(student)  # of the mean
        size = size.maximum(size.amax(-1, keepdim=True) * 2**-20)
        for name in INSTRUCTION_SETS:
            ops.instruction_set(name)
            loss, gradient = run(distillation_loss, student, teacher, **keywords)
            assert abs(loss.double() / exact_loss - 1) < (1e-12 if dtype == torch.float64 else 1e-5), (divergence, name)
            if exact_gradient.abs().max() >= tiny:  # not less than the logits' dtype can hold
                # The instruction that rounds to bfloat16 gives 0 for all that is below the smallest normal number.
                flushed = name == BFLOAT16_SET and dtype == torch.bfloat16
                found = error(gradient, exact_gradient, size, slack=tiny if flushed else tiny * half_unit)
                assert found <= EPSILON[dtype] + half_unit, (divergence, name)


@given(rows())
def test_bounds(problem: tuple[Any, ...]) -> None:
    """What is known of the divergences and between them, in every dtype."""
    student, teacher, _, keywords = problem
    for dtype in DTYPES:

        def of(divergence: str, beta: float | None = None, dtype: torch.dtype = dtype, swap: bool = False) -> Tensor:
            s, t = student.to(dtype), teacher.to(dtype)
            more = {"temperature": keywords["temperature"], "temperature_scaling": "none", "reduction": "none"}
            return distillation_loss(*((t, s) if swap else (s, t)), divergence=divergence, beta=beta, **more)

        e = 1e-12 if dtype == torch.float64 else 4e-6
        tvd, hellinger, forward = of("tvd"), of("hellinger"), of("forward_kl")
        assert ((tvd >= 0) & (tvd <= 1)).all()
        assert ((hellinger >= 0) & (hellinger <= 1)).all()
        assert (hellinger <= tvd + e).all()
        assert (tvd <= (hellinger * (2 - hellinger) + e).sqrt() + e).all()
        assert (tvd <= (forward / 2 + e).sqrt() + e).all(), "Pinsker"
        for beta in (0.1, 0.5, 0.9):
            entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
            assert (of("jsd", beta) <= entropy + e).all()
            assert (of("skew_kl", beta) <= -math.log(beta) + e).all()
            assert (of("skew_reverse_kl", beta) <= -math.log(beta) + e).all()
            torch.testing.assert_close(of("jsd", beta), of("jsd", 1 - beta, swap=True), rtol=1e-5, atol=e)
            torch.testing.assert_close(of("skew_kl", beta), of("skew_reverse_kl", beta, swap=True), rtol=1e-5, atol=e)
        for name, mirror in (("forward_kl", "reverse_kl"), ("tvd", "tvd"), ("hellinger", "hellinger"), ("mse", "mse")):
            torch.testing.assert_close(of(name), of(mirror, swap=True), rtol=1e-5, atol=e)
        torch.testing.assert_close(
            of("symmetric_kl", 0.25), 0.75 * forward + 0.25 * of("reverse_kl"), rtol=1e-5, atol=e
        )


@given(rows())
def test_dkd_is_kl_taken_apart(problem: tuple[Any, ...]) -> None:
    """Zhao et al. 2022, equation 7: KL = TCKD + (1 − p_label) NCKD, so β = 1 − p_label gives KL itself."""
    student, teacher, labels, keywords = problem
    of = {"temperature": keywords["temperature"], "temperature_scaling": "none"}
    p = (teacher / keywords["temperature"]).softmax(-1)
    for row, label in enumerate(labels):
        one = slice(row, row + 1)
        left = p[row].sum().item() - p[row, label].item()
        found = distillation_loss(student[one], teacher[one], labels[one], divergence="dkd", beta=max(0.0, left), **of)
        torch.testing.assert_close(found, distillation_loss(student[one], teacher[one], **of), rtol=1e-6, atol=1e-7)


@settings(max_examples=60)
@given(rows(), st.sampled_from(DTYPES), st.integers(1, 3))
def test_the_class_dimension_may_be_anywhere(problem: tuple[Any, ...], dtype: torch.dtype, inner: int) -> None:
    """The same rows in the lanes, side by side, gathered and with classes last."""
    student, teacher, labels, keywords = problem
    student, teacher = (z.to(dtype).unsqueeze(0).expand(inner, *z.shape).contiguous() for z in (student, teacher))
    labels = labels.expand(inner, -1)
    loss, gradient = run(distillation_loss, student, teacher, labels, **keywords)
    for dim in (0, 1):
        moved = (z.movedim(-1, dim).contiguous() for z in (student, teacher))
        found = run(distillation_loss, *moved, labels, dim=dim, **keywords)
        torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=1e-5)
        unit = torch.finfo(dtype).eps * gradient.abs().max().item()
        if keywords["divergence"] != "tvd":  # whose gradient jumps where p and q are equal but for rounding
            torch.testing.assert_close(found[1].movedim(dim, -1), gradient, rtol=1e-5, atol=unit + 1e-6)


@settings(max_examples=60)
@given(vocab_sizes, st.sampled_from(DTYPES), temperatures, st.sampled_from(ZERO_AT_EQUALITY), st.integers(0, 2**20))
def test_equal_logits_give_zero_whatever_they_are(
    vocab_size: int, dtype: torch.dtype, temperature: float, divergence: str, seed: int
) -> None:
    """Random bits, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    info = torch.iinfo(width)
    bits = torch.randint(info.min, info.max, (4, vocab_size), generator=generator, dtype=width).view(dtype)
    # Numbers that arithmetic can divide by T and multiply by log2 e; −inf masks.
    logits = torch.where(bits.isfinite() & (bits.abs() < torch.finfo(dtype).max / 64), bits, -torch.inf)
    logits[:, 0] = 0
    labels = torch.randint(vocab_size, (4,), generator=generator)
    keywords = {"temperature": temperature, **keywords_of(divergence)}
    loss, gradient = run(distillation_loss, logits.clone(), logits, labels, **keywords)
    assert loss == 0
    assert (gradient == 0).all()


@settings(max_examples=30)
@given(vocab_sizes, st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_a_masked_tail_is_a_shorter_vocabulary(vocab_size: int, seed: int, dtype: torch.dtype) -> None:
    """−inf appended to both rows, up to any length, is as if it were not there."""
    student, teacher = make_logits("random", 3, vocab_size, dtype, seed)
    masked = torch.full((3, 1 + seed % 40), -torch.inf, dtype=dtype)
    long = torch.cat([student, masked], -1), torch.cat([teacher, masked], -1)
    for divergence in DIVERGENCES:
        labels = labels_of(divergence, 3, vocab_size)
        keywords = {"temperature": 2.0, **keywords_of(divergence)}
        loss, gradient = run(reptile_ext.distillation_loss, *long, labels, **keywords)
        assert (gradient[:, vocab_size:] == 0).all()
        assert_near({"masked": (loss, gradient[:, :vocab_size])}, student, teacher, labels, **keywords)


def test_the_strategy_reaches_what_it_is_for() -> None:
    """A strategy that never draws labels, truncation or a broken layout would pass everything."""
    seen: set[str] = set()

    @settings(max_examples=1000)
    @given(problems())
    def draw(problem: tuple[Any, ...]) -> None:
        student, teacher, labels, keywords = problem
        dim = keywords["dim"]
        seen.update(k for k in ("weight", "denominator", "hard_weight") if k in keywords)
        seen.add(keywords["reduction"])
        seen.add(keywords["divergence"])
        seen.add("beta" if keywords["beta"] is not None else "no beta")
        seen.add("same dtype" if student.dtype == teacher.dtype else "mixed dtypes")
        seen.add("direct" if student.stride(dim) == 1 else "gathered")
        seen.add("truncated" if student.shape[dim] != teacher.shape[dim] else "whole")
        seen.add("empty" if 0 in student.shape else "full")
        seen.add("no labels" if labels is None else "labels")

    draw()
    wanted = "weight denominator hard_weight mean sum none direct gathered truncated whole empty full labels"
    assert seen >= {*wanted.split(), *DIVERGENCES, "beta", "no beta", "same dtype", "mixed dtypes", "no labels"}, seen


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
