"""Odd layouts, shared memory and other corners that a user can reach by accident; most of them once went wrong."""

from __future__ import annotations

import pytest
import torch
from oracle import INSTRUCTION_SETS
from torch.autograd import forward_ad

from reptile_ext import distillation_loss, ops, reference


def test_rows_that_overlap_in_memory() -> None:
    """A sliding window: rows share elements, and the gradient, which cannot, gets strides of its own."""
    student, teacher = torch.randn(1015, dtype=torch.float64), torch.randn(1015, dtype=torch.float64)
    s = student.unfold(0, 1000, 1).requires_grad_()
    t = teacher.unfold(0, 1000, 1)
    distillation_loss(s, t, temperature=2.0).backward()
    right = s.detach().clone().requires_grad_()
    reference.distillation_loss(right, t, temperature=2.0).backward()
    torch.testing.assert_close(s.grad, right.grad)


def test_no_rows_in_many_dimensions() -> None:
    s = torch.zeros([0] * 60 + [5], requires_grad=True)
    loss = distillation_loss(s, s.detach())
    loss.backward()
    assert loss.item() == 0.0
    assert s.grad is not None
    assert s.grad.shape == s.shape


def test_inplace_refuses_a_view_of_a_parameter() -> None:
    weight = torch.nn.Parameter(torch.randn(28))
    before = weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"inplace=True overwrites student_logits, which is a leaf .* or a view of one"
    ):
        distillation_loss(weight.view(4, 7), torch.randn(4, 7), inplace=True)
    assert torch.equal(weight, before)


def test_inplace_refuses_memory_that_is_shared() -> None:
    base = torch.randn(9, 7, requires_grad=True) * 1
    before = base.detach().clone()
    with pytest.raises(ValueError, match="inplace=True needs teacher_logits in memory of its own"):
        distillation_loss(base[1:], base[:-1].detach(), inplace=True)
    with pytest.raises(ValueError, match=r"inplace=True needs student_logits whose elements do not share memory"):
        distillation_loss(base.flatten().unfold(0, 7, 1), torch.randn(57, 7), inplace=True)
    assert torch.equal(base, before)


def test_inplace_allows_the_student_as_its_own_teacher() -> None:
    s = torch.randn(3, 40, requires_grad=True) * 1
    assert distillation_loss(s, s.detach(), inplace=True).item() == 0.0
    assert torch.equal(s, torch.zeros_like(s))


def test_inplace_notices_logits_that_change_before_backward() -> None:
    s = torch.randn(3, 7, requires_grad=True) * 1
    loss = distillation_loss(s, torch.randn(3, 7), inplace=True)
    with torch.no_grad():
        s.mul_(100)
    with pytest.raises(RuntimeError, match="were modified by an inplace operation"):
        loss.backward()


def test_instruction_sets_agree_on_which_class_has_mass() -> None:
    """Teacher weights around the smallest normal number, where some processors would keep denormals."""
    s = torch.tensor([[0.0, -torch.inf, 0.0]])
    before = ops.instruction_set()
    try:
        for logit in (-86.0, -87.0, -88.0, -90.0, -100.0):
            t = torch.tensor([[0.0, logit, 0.0]])
            losses = set()
            for name in INSTRUCTION_SETS:
                ops.instruction_set(name)
                losses.add(distillation_loss(s, t).item() == torch.inf)
            assert losses == {logit > -87.3}, logit
    finally:
        ops.instruction_set(before)


def test_dkd_label_in_a_whole_pair_of_vectors() -> None:
    """32 classes are one pair of AVX-512's float vectors, and no tail of it; the sanitizers would see a shift by 32."""
    before = ops.instruction_set()
    s, t, labels = 100 * torch.randn(2, 32), 100 * torch.randn(2, 32), torch.tensor([0, 31])
    right = reference.distillation_loss(s.double(), t.double(), labels, divergence="dkd")
    try:
        for name in INSTRUCTION_SETS:
            ops.instruction_set(name)
            torch.testing.assert_close(
                distillation_loss(s, t, labels, divergence="dkd").double(), right, rtol=1e-5, atol=0
            )
    finally:
        ops.instruction_set(before)


def test_labels_of_rows_that_are_out_are_any_numbers() -> None:
    """Also such as overflow when multiplied with a stride; the sanitizers would see it."""
    s, t = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    labels = torch.randint(5, (2, 9))
    labels[0, ::2], labels[1, 1] = 2**63 - 1, -(2**63)
    weight = (labels >= 0).float()
    leaf = s.requires_grad_()
    loss = distillation_loss(leaf, t, labels, hard_weight=1.0, ignore_index=2**63 - 1, weight=weight, dim=1)
    loss.backward()
    out = (labels == 2**63 - 1) | (weight == 0)
    assert not leaf.grad.movedim(1, -1)[out].any()
    assert leaf.grad.movedim(1, -1)[~out].any(-1).all()


def test_dkd_of_a_teacher_without_other_classes() -> None:
    """Its NCKD is 0 whatever the student does, so it has no gradient either. (It had one, beta times a softmax.)"""
    s = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 5])
    t = torch.full((2, 6), -torch.inf, dtype=torch.float64).scatter_(-1, labels.unsqueeze(-1), 1.0)
    for loss in (distillation_loss, reference.distillation_loss):
        torch.autograd.gradcheck(lambda s, loss=loss: loss(s, t, labels, divergence="dkd"), s)


def test_forward_mode_keeps_the_tangent() -> None:
    s, t, v = torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    gradient = torch.autograd.grad(reference.distillation_loss(s.requires_grad_(), t), s)[0]
    with forward_ad.dual_level():
        loss = distillation_loss(forward_ad.make_dual(s.detach(), v), t)
        tangent = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(tangent, (gradient * v).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [distillation_loss, reference.distillation_loss])
def test_wrong_weights_and_denominators(dtype: torch.dtype, wrong: float, loss: type(distillation_loss)) -> None:
    s, t = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    with pytest.raises(ValueError, match=f"weight must be finite and not negative; got {wrong:.0f}"):
        loss(s, t, weight=torch.tensor([1.0, wrong, 1.0]))
    if dtype != torch.float16:
        with pytest.raises(ValueError, match=f"denominator must be positive and finite; got {wrong:.0f}"):
            loss(s, t, denominator=torch.tensor(wrong))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_in_and_nothing_to_divide_by(dtype: torch.dtype) -> None:
    s, t = torch.randn(3, 5).to(dtype).requires_grad_(), torch.randn(3, 5).to(dtype)
    loss = distillation_loss(s, t, torch.full((3,), -100), denominator=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_a_wrong_label_that_cannot_raise_spoils_its_row_alone() -> None:
    """In a compiled torch.func.grad, no error can depend on values: the row becomes NaN, and no other."""
    s, t, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 77, 2])
    f = torch.func.grad(lambda s: distillation_loss(s, t, labels, hard_weight=1.0, reduction="sum"))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\)"):
        f(s)
    torch.compiler.reset()
    gradient = torch.compile(f, backend="eager", fullgraph=True)(s)
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_temperatures_that_float32_cannot_divide_by() -> None:
    for temperature in (1e-40, 1e200, (1.0, 1e-35)):
        with pytest.raises(ValueError, match="temperature must be a positive number, 1e-30 to 1e30"):
            distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=temperature)


def test_sparse_and_nested_logits() -> None:
    dense = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"student_logits must be a dense tensor; got layout torch.sparse_coo"):
        distillation_loss(dense.to_sparse(), dense)
    with pytest.raises(TypeError, match=r"teacher_logits must be a dense tensor; got layout torch.sparse_coo"):
        distillation_loss(dense, dense.to_sparse())


def test_no_memory_for_the_gradient() -> None:
    huge = torch.zeros(1).expand(1 << 46, 2)
    with pytest.raises(RuntimeError, match=r"not enough memory for the gradient of student_logits, \d+ bytes"):
        ops.distillation_loss(huge, huge, *[None] * 4, 0, 0.0, *[1.0] * 4, 0.0, 0.0, -100, 1, 1.0, -1, True)


def test_full_smoothing_does_not_look_at_a_masked_label() -> None:
    """label_smoothing=1: nothing of the label's own term is left, not even of an infinite one."""
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    student[1, 2] = -torch.inf
    labels = torch.tensor([2, 2, 2])
    for loss_fn in (distillation_loss, reference.distillation_loss):
        leaf = student.clone().requires_grad_()
        loss = loss_fn(leaf, teacher, labels, soft_weight=0.0, hard_weight=1.0, label_smoothing=1.0, reduction="none")
        of_classes = student[1][student[1] > -torch.inf]
        torch.testing.assert_close(loss[1], -of_classes.log_softmax(0).mean())
        loss.sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1, 2] == 0
