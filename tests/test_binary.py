"""`binary_distillation_loss`: every logit is a distribution of its own (docs/contract.md, "One logit, many labels")."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import BETAS, DTYPES, INSTRUCTION_SETS, name_of
from torch import Tensor

import reptile_ext
from reptile_ext import BinaryDistillationLoss, DistillationLoss, binary_distillation_loss, functional, ops, reference
from reptile_ext.options import BINARY_DIVERGENCES, DIVERGENCES

loss_of = reptile_ext.binary_distillation_loss
every_divergence = pytest.mark.parametrize("divergence", BINARY_DIVERGENCES)
# As in oracle.py: what 60 roundings may do to a term of order 1.
EPSILON = {torch.float32: 4e-6, torch.float64: 4e-14}


def keywords_of(divergence: str) -> dict[str, Any]:
    return {"divergence": divergence, "beta": BETAS.get(divergence)}


def logits(kind: str, shape: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "near_equal":
        s = t + 1e-4 * s
    elif kind == "certain":  # both models, mostly of the same: probabilities a few ulps from 1
        s, t = 15 + s.abs(), 17 + t
    elif kind == "large":
        s, t = 3e3 * s, 3e3 * t
    else:
        s, t = 3 * s, 3 * t
    return s.to(dtype), t.to(dtype)


def targets(shape: Any, seed: int = 2) -> Tensor:
    """From 0 to 1, some of them exactly so, some ignored."""
    y = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.25).clamp(0, 1)
    y.view(-1)[1::5] = -100
    return y


def value_and_gradient(of: Any, s: Tensor, t: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    leaf = s.detach().requires_grad_()
    loss = of(leaf, t, *args, **keywords)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    return loss.detach(), torch.autograd.grad(loss, leaf, weights)[0]


def assert_right(s: Tensor, t: Tensor, *args: Any, of: Any = loss_of, scale: float = 1.0, **keywords: Any) -> None:
    """As the reference in float64. An error is relative to the terms that are subtracted: of the loss, 1 and itself; of
    the gradient, what the models give to the class that the student finds less likely, times the exponents. `scale`:
    what the divergence is a multiple of."""
    found, gradient = value_and_gradient(of, s, t, *args, **keywords)
    right, exact = value_and_gradient(reference.binary_distillation_loss, s.double(), t.double(), *args, **keywords)
    arithmetic = torch.float64 if torch.float64 in (s.dtype, t.dtype) else torch.float32
    assert found.dtype == arithmetic
    assert gradient.dtype == s.dtype
    t_s, t_t = keywords["temperature"]
    epsilon = EPSILON[arithmetic]
    assert ((found.double() - right).abs() <= epsilon * (scale * t_s * t_t + right.abs())).all()

    a, b = s.double() / t_s, t.double() / t_t
    apart = torch.where(a > 0, -b, b)  # of the teacher, minor against major class of the student
    terms = (-a.abs()).sigmoid() + apart.sigmoid()
    size = scale * t_t * (terms * (1 + a.abs() + b.abs()))
    if keywords.get("divergence") == "mse":
        size = 2 * t_t * (a.abs() + b.abs())
    if keywords.get("hard_weight"):
        size = size + 10 * (-s.double().abs()).sigmoid() + 10
    if keywords.get("divergence") == "tvd":  # its subgradient jumps where p = q to all digits that there are
        size = size + torch.where((a - b).abs() <= 10 * epsilon * (1 + a.abs() + b.abs()), 1 / epsilon, 0.0)
    # Twice rounded, by kernel and grad_output; and the reference has 1 − q, not q, of a class that is all but certain.
    rounding = 1.1 * torch.finfo(s.dtype).eps * exact.abs() + (2.0**-24 if s.dtype == torch.float16 else 1e-14 * scale)
    wrong = (gradient.double() - exact).abs() > epsilon * 2 * size + rounding
    assert not wrong.any(), (s[wrong][:4], t[wrong][:4], gradient[wrong][:4], exact[wrong][:4])


# ------------------------------------------------------------------------------------------------ what it computes


@every_divergence
def test_equals_the_loss_of_two_classes(divergence: str) -> None:
    """[z, 0], in float64, kernel and reference; the mse, of the logit alone, is twice that of the two classes."""
    s, t = logits("random", (5, 7), torch.float64)
    keywords = keywords_of(divergence) | {"temperature": (2.0, 1.5)}

    def dense(s: Tensor, t: Tensor) -> Tensor:
        rows = [torch.stack([z, torch.zeros_like(z)], -1) for z in (s, t)]
        return (2 if divergence == "mse" else 1) * reptile_ext.distillation_loss(*rows, reduction="none", **keywords)

    right = value_and_gradient(dense, s, t)
    for of in (loss_of, reference.binary_distillation_loss):
        found = value_and_gradient(of, s, t, reduction="none", **keywords)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_mse_compares_logits() -> None:
    s, t = logits("random", (5, 7), torch.float64)
    found = loss_of(s, t, divergence="mse", temperature=(2.0, 3.0))
    torch.testing.assert_close(found, 6 * F.mse_loss(s / 2, t / 3), rtol=1e-13, atol=0)


@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_the_hard_part_is_pytorchs(with_pos_weight: bool) -> None:
    s, t = logits("random", (6, 4), torch.float64)
    y = targets((6, 4)).double().clamp(min=0)
    pos_weight = torch.tensor([1.0, 0.0, 2.5, 10.0], dtype=torch.float64) if with_pos_weight else None

    def pytorchs(s: Tensor, t: Tensor) -> Tensor:
        return 0.3 * F.binary_cross_entropy_with_logits(s, y, pos_weight=pos_weight)

    right = value_and_gradient(pytorchs, s, t)
    for of in (loss_of, reference.binary_distillation_loss):
        found = value_and_gradient(of, s, t, y, soft_weight=0.0, hard_weight=0.3, pos_weight=pos_weight)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["random", "near_equal", "certain", "large"])
def test_kernel(kind: str, dtype: torch.dtype, divergence: str, each_set: str) -> None:
    s, t = logits(kind, (37, 59), dtype)
    scale = 6.25 if divergence == "scaled_jsd" else 1.0
    scale = max(1.0, s.abs().max().item()) ** 2 if divergence == "mse" else scale
    assert_right(s, t, temperature=(1.7, 1.3), reduction="none", scale=scale, **keywords_of(divergence))


def test_the_gradient_has_its_digits_where_both_are_certain(each_set: str) -> None:
    """q − p of 1 − 2e−9 and 1 − 1e−11, in float32."""
    s, t = torch.tensor([20.0, -20.0, 60.0]), torch.tensor([25.0, -25.0, 70.0])
    gradient = value_and_gradient(loss_of, s, t, reduction="sum")[1]
    exact = value_and_gradient(
        reference.binary_distillation_loss, -s.double().abs(), -t.double().abs(), reduction="sum"
    )
    torch.testing.assert_close(gradient.double(), -exact[1] * s.sign(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_once(reduction: str, dtype: torch.dtype, each_set: str) -> None:
    """Labels, weights, pos_weight, ignored elements and what is in them, over several blocks."""
    s, t = logits("random", (41, 67), dtype)
    y = targets((41, 67))
    weight = torch.rand(67, generator=torch.Generator().manual_seed(3)) + 0.1
    weight[5] = 0
    t = t.clone()
    t[:, 5] = torch.nan
    s = s.clone()
    s[y == -100] = torch.inf
    keywords = {
        "temperature": (2.0, 2.0),
        "hard_weight": 0.4,
        "weight": weight,
        "pos_weight": torch.rand(41, 1, generator=torch.Generator().manual_seed(4)),
        "reduction": reduction,
    }
    found = value_and_gradient(loss_of, s, t, y, **keywords)
    right = value_and_gradient(reference.binary_distillation_loss, s.double(), t.double(), y, **keywords)
    torch.testing.assert_close(found[0].double(), right[0], rtol=2e-6, atol=1e-6)
    tolerance = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-13
    smallest = 2.0**-24 if dtype == torch.float16 else 0
    size = right[1].abs().max().item()
    torch.testing.assert_close(
        found[1].double(), right[1], rtol=2 * tolerance, atol=min(tolerance, 4e-6) * size + smallest
    )
    gradient = found[1]
    assert (gradient[y == -100] == 0).all()
    assert (gradient[:, 5] == 0).all()


@every_divergence
def test_equal_logits_give_exactly_zero(divergence: str, each_set: str) -> None:
    for dtype in DTYPES:
        z = torch.cat([torch.randn(3001) * 10, torch.tensor([0.0, -0.0, 1e4, -1e4, -torch.inf])]).to(dtype)
        loss, gradient = value_and_gradient(loss_of, z, z.clone(), temperature=1.7, **keywords_of(divergence))
        if divergence == "soft_cross_entropy":
            assert loss > 0
        else:
            assert loss == 0
        assert (gradient == 0).all()


def test_equal_denormal_logits_give_exactly_zero() -> None:
    """Found by tests/fuzz.sh: a denormal has a sign, and is not above 0 for AVX-512. tvd's gradient was ¼ there."""
    z = torch.tensor([2.9387358770557188e-39, -2.9e-39, 1e-45])
    for name in INSTRUCTION_SETS:
        ops.instruction_set(name)
        for divergence in ("forward_kl", "jsd", "skew_kl", "tvd", "hellinger"):
            loss, gradient = value_and_gradient(loss_of, z, z.clone(), **keywords_of(divergence))
            assert loss == 0
            assert (gradient == 0).all()


def test_ignored_elements_are_zero_even_where_factors_are_infinite(each_set: str) -> None:
    """Found by tests/fuzz.sh: T² left float32, and what was ignored came out as NaN, 0 times that."""
    s, t, y = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]), torch.tensor([-100.0, -100.0])
    with pytest.warns(UserWarning, match="temperature"):
        loss, gradient = value_and_gradient(loss_of, s, t, y, temperature=1e20)
    assert loss == 0
    assert (gradient == 0).all()


@every_divergence
def test_infinite_and_broken_logits(divergence: str, each_set: str) -> None:
    """−inf is a probability of 0; +inf and NaN are NaN there and nowhere else; as of the row [z, 0]."""
    values = [0.5, -3.0, torch.inf, -torch.inf, torch.nan, 30.0]
    s, t = (x.reshape(-1).contiguous() for x in torch.meshgrid(*[torch.tensor(values)] * 2, indexing="ij"))
    keywords = keywords_of(divergence) | {"reduction": "none"}
    found = value_and_gradient(loss_of, s, t, **keywords)
    right = value_and_gradient(reference.binary_distillation_loss, s.double(), t.double(), **keywords)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True)
    broken = s.isnan() | t.isnan() | (s == torch.inf) | (t == torch.inf)
    assert (found[0].isnan() == broken).all()
    assert (found[1].isnan() == broken).all()


def test_mean_sum_none_and_denominator() -> None:
    s, t = logits("random", (5, 7))
    y, weight = targets((5, 7)), torch.rand(5, 1)
    keywords = {"hard_weight": 1.0, "weight": weight}
    each = loss_of(s, t, y, reduction="none", **keywords)
    counted = (weight * (y != -100)).sum()
    torch.testing.assert_close(loss_of(s, t, y, reduction="sum", **keywords), each.sum())
    torch.testing.assert_close(loss_of(s, t, y, **keywords), each.sum() / counted)
    for denominator in (12.5, torch.tensor(12.5)):
        torch.testing.assert_close(loss_of(s, t, y, denominator=denominator, **keywords), each.sum() / 12.5)
    for empty in (loss_of(s, t, torch.full_like(s, -100)), loss_of(s[:0], t[:0]), loss_of(s, t, weight=0 * weight)):
        assert empty == 0


# ---------------------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "transposed": lambda z: z.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels_last": lambda z: z.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "every_second": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "padded": lambda z: F.pad(z, (1, 2), value=float("nan"))[..., 1:-2],
    "misaligned": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view_as(z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("of_teacher", [None, *LAYOUTS])
@pytest.mark.parametrize("of_student", [None, *LAYOUTS])
def test_layouts(of_student: str | None, of_teacher: str | None, dtype: torch.dtype) -> None:
    s, t = logits("random", (6, 35, 31), dtype)
    y = targets((6, 35, 31))
    lie = [LAYOUTS.get(name, lambda z: z) for name in (of_student, of_teacher)]
    right = value_and_gradient(loss_of, s, t, y, hard_weight=0.5, reduction="none")
    found = value_and_gradient(loss_of, lie[0](s), lie[1](t), y, hard_weight=0.5, reduction="none")
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 2**-7, atol=1e-7)
    in_place = lie[0](s).clone().requires_grad_() * 1
    loss_of(in_place, lie[1](t), y, hard_weight=0.5, inplace=True)
    plain = value_and_gradient(loss_of, s, t, y, hard_weight=0.5)[1]
    torch.testing.assert_close(in_place.detach(), plain, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 4), (17,), (1024,), (1025,), (3, 1, 5, 1)])
def test_shapes(shape: tuple[int, ...], each_set: str) -> None:
    s, t = logits("random", shape)
    assert_right(s, t, reduction="none", temperature=(1.0, 1.0))


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    s, t = (z.to(dtype) for z, dtype in zip(logits("random", (33, 40)), dtypes, strict=True))
    assert_right(s, t, targets((33, 40)), hard_weight=0.5, reduction="none", temperature=(1.0, 2.0))


def test_fresh_gradients_of_a_size_that_is_written_past_the_caches(each_set: str) -> None:
    for dtype in DTYPES:
        s, t = logits("random", (1 << 20) + 5, dtype)
        found = value_and_gradient(loss_of, s, t)
        for start in (0, 1024 * 511 + 3, (1 << 20) - 20):
            part = slice(start, start + 25)
            right = value_and_gradient(loss_of, s[part], t[part], denominator=s.numel())[1]
            torch.testing.assert_close(found[1][part], right[: found[1][part].numel()], rtol=1e-6, atol=0)


def test_same_bits_with_any_number_of_threads() -> None:
    s, t = logits("random", (300, 1000))
    y = targets((300, 1000))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(value_and_gradient(loss_of, s, t, y, hard_weight=0.5))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


# --------------------------------------------------------------------------------------------------------- autograd


@every_divergence
def test_gradients_equal_finite_differences(divergence: str) -> None:
    s, t = (z.requires_grad_() for z in logits("random", (3, 4), torch.float64))
    y = targets((3, 4)).double()
    keywords = keywords_of(divergence) | {"temperature": (1.5, 2.0), "hard_weight": 0.5}

    def of(s: Tensor, t: Tensor) -> Tensor:
        return loss_of(s, t, y, pos_weight=torch.tensor(2.0), **keywords)

    assert torch.autograd.gradcheck(of, (s, t))
    assert torch.autograd.gradgradcheck(of, (s, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_equals_the_default(reduction: str, dtype: torch.dtype) -> None:
    s, t = logits("random", (50, 41), dtype)
    y = targets((50, 41))
    keywords = {"hard_weight": 0.5, "reduction": reduction}
    right = value_and_gradient(loss_of, s, t, y, **keywords)[1]
    leaf = s.clone().requires_grad_()
    student = leaf * 1
    loss = loss_of(student, t, y, inplace=True, **keywords)
    factor = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    loss.backward(factor)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, right, rtol=1e-6, atol=0)
    assert student.data_ptr() != leaf.data_ptr()
    with pytest.raises(ValueError, match="leaf"):
        loss_of(leaf, t, inplace=True)


def test_a_second_backward_and_what_is_ignored_times_infinity() -> None:
    s, t = logits("random", (6, 5))
    y = targets((6, 5))
    leaf = s.requires_grad_()
    loss = loss_of(leaf, t, y)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(first, second)
    for factor in (torch.inf, torch.nan):
        (gradient,) = torch.autograd.grad(loss_of(leaf, t, y), leaf, torch.tensor(factor))
        assert (gradient[y == -100] == 0).all()
        assert not gradient[y != -100].isfinite().any()


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, needs_gradient: bool) -> None:
    from reptile_ext.options import make_binary_options

    s, t = logits("random", (4, 5), torch.float64)
    options = make_binary_options(hard_weight=0.5, reduction=reduction)
    y, weight = targets((4, 5)), torch.rand(5).expand(4, 5)
    numbers = ops.numbers(options)
    constants = (y, weight, None)
    torch.library.opcheck(
        torch.ops.reptile_ext.binary_distillation_loss.default,
        (s.clone().requires_grad_(needs_gradient), t, *constants, None, *numbers, weight, needs_gradient),
    )
    torch.library.opcheck(
        torch.ops.reptile_ext.binary_distillation_loss_.default,
        (s.clone(), t, *constants, None, *numbers, weight),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.reptile_ext.scale_elements_.default,
        (s.clone(), torch.tensor(2.0), y, weight, -100),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inside torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    torch.compiler.reset()

    def step(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return loss_of(s * 2, t, y, temperature=2.0, hard_weight=0.5, weight=torch.ones(1))

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 11):
        s, t = logits("random", (rows, 7))
        y = targets((rows, 7))
        right = value_and_gradient(step, s, t, y)
        for a, b in zip(value_and_gradient(compiled, s, t, y), right, strict=True):
            torch.testing.assert_close(a, b)


def test_exported_equals_eager() -> None:
    class Module(torch.nn.Module):
        def forward(self, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return loss_of(s, t, y, divergence="jsd", hard_weight=0.5)

    s, t = logits("random", (6, 7))
    y = targets((6, 7))
    program = torch.export.export(Module(), (s, t, y), strict=True)
    torch.testing.assert_close(program.module()(s, t, y), loss_of(s, t, y, divergence="jsd", hard_weight=0.5))


def test_torch_func() -> None:
    s, t = logits("random", (6, 7), torch.float64)
    y = targets((6, 7)).double()

    def of(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return loss_of(s, t, y, hard_weight=0.5, reduction="sum")

    each = torch.func.vmap(torch.func.grad(of))(s, t, y)
    torch.testing.assert_close(each, value_and_gradient(of, s, t, y)[1])


# -------------------------------------------------------------------------------------------------------- interface


def test_the_module_is_the_function() -> None:
    s, t = logits("random", (6, 7))
    y, weight = targets((6, 7)), torch.rand(7)
    module = reptile_ext.BinaryDistillationLoss(temperature=2.0, hard_weight=0.5, divergence="jsd")
    right = loss_of(s, t, y, temperature=2.0, hard_weight=0.5, divergence="jsd", weight=weight, pos_weight=weight)
    assert torch.equal(module(s, t, y, weight=weight, pos_weight=weight), right)
    with pytest.raises(ValueError, match="divergence must be one of"):
        reptile_ext.BinaryDistillationLoss(divergence="dkd")
    with pytest.raises(TypeError, match="label_smoothing"):
        reptile_ext.BinaryDistillationLoss(label_smoothing=0.1)


def test_every_divergence_but_dkd() -> None:
    assert set(DIVERGENCES) - set(BINARY_DIVERGENCES) == {"dkd"}


S = torch.zeros(3, 4)


@pytest.mark.parametrize("of", [loss_of, reference.binary_distillation_loss], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"student_logits": [0.5]}, TypeError, "student_logits must be a torch.Tensor; got list"),
        ({"student_logits": S.long()}, TypeError, "student_logits must be float32"),
        ({"teacher_logits": S[:2]}, ValueError, r"teacher_logits must have the shape of student_logits, \[3, 4\]"),
        ({"teacher_logits": S.flatten()}, ValueError, r"got \[12\]: pass teacher_logits.view_as\(student_logits\)"),
        ({"labels": S.long()}, TypeError, r"labels must be targets from 0 to 1.*got torch.int64: pass labels.float"),
        ({"labels": S + 2}, ValueError, "labels must lie between 0 and 1 or equal ignore_index=-100; got 2"),
        ({"labels": S * torch.nan}, ValueError, "labels must lie between 0 and 1 or equal ignore_index=-100; got nan"),
        ({"hard_weight": 1.0}, ValueError, "labels are needed for hard_weight=1.0"),
        ({"weight": S[:, :3]}, ValueError, r"weight must have a shape that broadcasts .* \[3, 4\]; got \[3, 3\]"),
        ({"weight": S - 1}, ValueError, "weight must be finite and not negative; got -1"),
        ({"weight": S.bool()}, TypeError, "weight must be float32"),
        (
            {"pos_weight": torch.tensor(-2.0), "labels": S, "hard_weight": 1.0},
            ValueError,
            "pos_weight must be finite and not negative; got -2",
        ),
        ({"denominator": 0.0}, ValueError, "denominator must be a positive"),
        ({"denominator": torch.tensor(-1.0)}, ValueError, "denominator must be positive and finite; got -1"),
        ({"divergence": "dkd"}, ValueError, "divergence must be one of 'forward_kl'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
        ({"labels": S.clone().requires_grad_()}, ValueError, "labels is a constant of the loss"),
    ],
)
def test_bad_input(keywords: dict[str, Any], error: type[Exception], message: str, of: Any) -> None:
    with pytest.raises(error, match=message):
        of(**{"student_logits": S, "teacher_logits": S, **keywords})


def test_the_operators_refuse_what_would_be_unsafe() -> None:
    from reptile_ext.options import make_binary_options

    numbers = ops.numbers(make_binary_options())
    with pytest.raises(RuntimeError, match="teacher must have the shape of student"):
        ops.binary_distillation_loss(S, S[:2], None, None, None, None, *numbers, None, True)
    with pytest.raises(RuntimeError, match="weight must have the shape"):
        ops.binary_distillation_loss(S, S, None, torch.ones(4), None, None, *numbers, None, True)
    with pytest.raises(RuntimeError, match="do not share memory"):
        ops.binary_distillation_loss_(torch.zeros(1, 4).expand(3, 4), S, None, None, None, None, *numbers, None)
    memory = torch.zeros(20)
    with pytest.raises(RuntimeError, match="memory of its own"):
        ops.binary_distillation_loss_(memory[:12], memory[4:16], None, None, None, None, *numbers, None)


def test_one_class_warns_once_and_names_this_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_warned_of_one_class", False)
    with pytest.warns(UserWarning, match="one class, whose softmax is always 1.*binary_distillation_loss"):
        reptile_ext.distillation_loss(torch.zeros(3, 1), torch.zeros(3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reptile_ext.distillation_loss(torch.zeros(3, 1), torch.zeros(3, 1))
        monkeypatch.setattr(functional, "_warned_of_one_class", False)
        reptile_ext.distillation_loss(torch.zeros(3, 2), torch.zeros(3, 2))


def test_wrong_values_under_vmap() -> None:
    """They are errors there, too, as without it."""
    student, teacher, labels = torch.randn(3, 6), torch.randn(3, 6), torch.rand(3, 6)
    f = torch.vmap(lambda s, t, y: binary_distillation_loss(s, t, y, hard_weight=0.5))
    right = [
        binary_distillation_loss(s, t, y, hard_weight=0.5) for s, t, y in zip(student, teacher, labels, strict=True)
    ]
    torch.testing.assert_close(f(student, teacher, labels), torch.stack(right))
    labels[2, 3] = 1.5
    with pytest.raises(ValueError, match=r"labels must .*; got 1.5"):
        f(student, teacher, labels)


def test_keywords_of_the_call_and_of_other_losses_are_named() -> None:
    with pytest.raises(TypeError, match="pos_weight goes to the call"):
        BinaryDistillationLoss(pos_weight=torch.ones(1))
    with pytest.raises(TypeError, match="unexpected keyword argument 'pos_weight'") as caught:
        DistillationLoss(pos_weight=torch.ones(1))
    assert "goes to the call" not in str(caught.value)
    criterion = BinaryDistillationLoss()
    criterion.temperature = 2.0
    s, t = torch.randn(3), torch.randn(3)
    assert torch.equal(criterion(s, t), binary_distillation_loss(s, t, temperature=2.0))
