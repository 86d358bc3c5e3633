"""The loss inside everything that autograd, torch.compile, torch.export and torch.func do with it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracle import (
    DTYPES,
    EPSILON,
    assert_near,
    every_divergence,
    exact,
    keywords_of,
    make_labels,
    make_logits,
    name_of,
    plain,
    run,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reptile_ext
from reptile_ext import ops, reference
from reptile_ext.options import DIVERGENCES, REDUCTIONS, make_options

loss_of = reptile_ext.distillation_loss
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
# Every code path of the backward: row losses, divided ones, labels, weights, two temperatures, a dimension in front.
KEYWORDS: list[dict[str, Any]] = [
    {},
    {"temperature": (2.0, 0.5), "reduction": "sum"},
    {"reduction": "none", "temperature": 3.0},
    {"hard_weight": 0.7, "label_smoothing": 0.1, "reduction": "none"},
    {"hard_weight": 0.7, "denominator": 5.0},
    {"dim": 0, "hard_weight": 0.5},
]
every_keywords = pytest.mark.parametrize("keywords", KEYWORDS, ids=str)


def make_case(keywords: dict[str, Any], dtype: torch.dtype = torch.float64, vocab_size: int = 7, rows: int = 4):
    student, teacher = make_logits("random", rows, vocab_size, dtype)
    if keywords.get("dim") == 0:
        student, teacher = student.t().contiguous(), teacher.t().contiguous()
    return student, teacher, make_labels(rows, vocab_size)


# ------------------------------------------------------------------------------------------------- derivatives


@every_divergence
@every_keywords
@pytest.mark.parametrize("teacher_learns", [False, True])
@pytest.mark.parametrize("loss_of", [reptile_ext.distillation_loss, reference.distillation_loss])
def test_gradients_equal_finite_differences(
    loss_of: Any, keywords: dict, teacher_learns: bool, divergence: str
) -> None:
    """First and second derivatives in float64, of the student and of a teacher that learns too."""
    student, teacher, labels = make_case(keywords, vocab_size=5, rows=3)
    keywords = {**keywords, **keywords_of(divergence)}
    weight = torch.rand(3) + 0.5

    def f(*logits: Tensor) -> Tensor:
        return loss_of(logits[0], logits[1] if teacher_learns else teacher, labels, weight=weight, **keywords)

    inputs = (student.requires_grad_(), teacher.requires_grad_())[: 1 + teacher_learns]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@every_dtype
@every_divergence
@every_keywords
def test_a_teacher_that_requires_grad_gets_the_oracles(keywords: dict, dtype: torch.dtype, divergence: str) -> None:
    student, teacher, labels = make_case(keywords, dtype, vocab_size=700)
    keywords = {**keywords, **keywords_of(divergence)}

    def of_teacher(loss: Any, teacher: Tensor) -> Tensor:
        teacher = teacher.detach().requires_grad_()
        loss(student, teacher, labels, **keywords).sum().backward()
        assert teacher.grad is not None
        return teacher.grad

    right = of_teacher(exact, teacher.double())
    # 1: what the terms add up to before they cancel.
    allowed = (of_teacher(plain, teacher) - right).abs().max() + EPSILON[dtype] * (1 + right.abs().max())
    for student_learns in (False, True):
        student = student.detach().requires_grad_(student_learns)
        found = of_teacher(loss_of, teacher)
        assert found.dtype == dtype
        assert (found - right).abs().max() <= allowed
        assert (student.grad is not None) == student_learns


@every_divergence
def test_two_students_learn_from_each_other(divergence: str) -> None:
    """Mutual learning (Zhang et al. 2018): each is the other's teacher, and one loss trains both. Steps along the two
    gradients bring them together, with the kernels as with the oracle."""
    student, teacher, labels = make_case({}, torch.float64, vocab_size=40)
    keywords = {"temperature": 2.0, **keywords_of(divergence)}
    losses: dict[Any, list[float]] = {}
    for loss_fn in (loss_of, exact):
        pair = [z.clone().requires_grad_() for z in (student, teacher)]
        losses[loss_fn] = []
        for _ in range(5):
            loss = loss_fn(*pair, labels, **keywords)
            losses[loss_fn].append(loss.item())
            with torch.no_grad():
                for z, gradient in zip(pair, torch.autograd.grad(loss, pair), strict=True):
                    z -= 0.05 * gradient
    assert losses[loss_of] == pytest.approx(losses[exact], rel=1e-9)
    assert losses[loss_of] == sorted(losses[loss_of], reverse=True)


@every_dtype
@every_divergence
@every_keywords
def test_what_comes_from_above_scales_the_gradient(keywords: dict, dtype: torch.dtype, divergence: str) -> None:
    """loss·3, loss/7, −loss, 0·loss, and a different number for every row."""
    student, teacher, labels = make_case(keywords, dtype)
    keywords = {**keywords, **keywords_of(divergence)}
    none = keywords.get("reduction") == "none"
    for factor in (3.0, 1 / 7, -1.0, 0.0, 1e-3):
        grad_output = (
            torch.full((4,), factor, dtype=torch.float64) if none else torch.tensor(factor, dtype=torch.float64)
        )
        found = run(loss_of, student, teacher, labels, grad_output=grad_output, **keywords)
        assert_near({"": found}, student, teacher, labels, grad_output=grad_output, **keywords)
        leaf = student.clone().requires_grad_()
        (loss_of(leaf, teacher, labels, **keywords) * factor).sum().backward()
        torch.testing.assert_close(leaf.grad, found[1], rtol=torch.finfo(dtype).eps, atol=0)
    if none:
        grad_output = torch.randn(4)
        found = run(loss_of, student, teacher, labels, grad_output=grad_output, **keywords)
        assert_near({"": found}, student, teacher, labels, grad_output=grad_output, **keywords)


@every_dtype
@pytest.mark.parametrize("grad_output", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("way", ["eager", "inplace", "compiled", "batched", "reference", "create_graph"])
def test_what_is_out_stays_zero_whatever_grad_output_is(
    way: str, reduction: str, grad_output: float, dtype: torch.dtype
) -> None:
    """A mean over each sequence is 0/0 in one that is all padding. Rows by label and by weight, and the classes that
    the teacher does not have; the rows that count show what came."""
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 9, dtype)
    teacher = teacher[:, :7].contiguous()
    labels, weight = torch.arange(6), torch.ones(6)
    labels[0], weight[1] = -100, 0
    leaf = student.clone().requires_grad_()
    keywords = {"vocab": "truncate", "weight": weight, "reduction": reduction, "inplace": way == "inplace"}

    def f(s: Tensor) -> Tensor:
        loss_fn = reference.distillation_loss if way == "reference" else loss_of
        return loss_fn(s * 1, teacher, labels, **keywords)

    loss = (torch.compile(f, backend="inductor", fullgraph=True) if way == "compiled" else f)(leaf)
    above = torch.full_like(loss, grad_output)
    if way == "batched":
        gradient = torch.autograd.grad(loss, leaf, above.unsqueeze(0), is_grads_batched=True)[0][0]
    else:
        (gradient,) = torch.autograd.grad(loss, leaf, above, create_graph=way == "create_graph")
    assert (gradient[:2] == 0).all()
    assert (gradient[:, 7:] == 0).all()
    assert not gradient[2:, :7].isfinite().any()


@every_divergence
def test_a_teacher_that_the_loss_does_not_look_at_has_gradient_zero(divergence: str) -> None:
    """soft_weight=0 leaves the cross entropy alone."""
    student, teacher, labels = make_case({})
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    for hard_weight in (0.0, 1.0):
        loss = loss_of(student, teacher, labels, soft_weight=0.0, hard_weight=hard_weight, **keywords_of(divergence))
        for keywords in ({}, {"create_graph": True}):
            for wanted in ((student, teacher), (teacher,)):
                *_, of_teacher = torch.autograd.grad(loss, wanted, retain_graph=True, **keywords)
                assert (of_teacher == 0).all()
        (of_teacher,) = torch.autograd.grad(loss, teacher, torch.ones(3, dtype=loss.dtype), is_grads_batched=True)
        assert of_teacher.shape == (3, *teacher.shape)
        assert (of_teacher == 0).all()


@every_dtype
@every_divergence
@every_keywords
def test_a_second_backward_gives_the_same_gradient(keywords: dict, dtype: torch.dtype, divergence: str) -> None:
    """retain_graph=True: the first gives its gradient away, and has scaled it; the later ones must not notice."""
    student, teacher, labels = make_case(keywords, dtype)
    keywords = {**keywords, **keywords_of(divergence)}
    student.requires_grad_()
    loss = loss_of(student, teacher, labels, **keywords)
    grad_output = torch.full_like(loss, 1 / 3)
    first = torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0]
    third = torch.autograd.grad(loss, student, 3 * grad_output)[0]
    assert torch.equal(first, kept), "a later backward wrote over an earlier gradient"
    # Rounded twice in the first, once in the second.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6 if dtype != torch.float64 else 1e-15}
    torch.testing.assert_close(second, first, **tolerance)
    torch.testing.assert_close(third, 3 * second, **tolerance)


def test_gradients_accumulate() -> None:
    """Two losses of the same logits, and the same loss twice, add up."""
    student, teacher, labels = make_case({}, torch.float32)
    right = run(loss_of, student, teacher)[1] + run(loss_of, student, teacher, labels, hard_weight=1.0)[1]
    leaf = student.clone().requires_grad_()
    (loss_of(leaf, teacher) + loss_of(leaf, teacher, labels, hard_weight=1.0)).backward()
    torch.testing.assert_close(leaf.grad, right)
    loss = loss_of(leaf, teacher)
    leaf.grad = None
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * run(loss_of, student, teacher)[1])


def test_the_gradient_survives_the_logits() -> None:
    """Logits may be overwritten after the loss only if autograd is told; a frozen teacher too."""
    student, teacher, _ = make_case({}, torch.float32)
    leaf = student.clone().requires_grad_()
    loss = loss_of(leaf, teacher)
    loss.backward(retain_graph=True)
    teacher.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # computed anew, from a teacher that is gone


def test_create_graph_differentiates_a_gradient_penalty() -> None:
    student, teacher, labels = make_case({}, torch.float64)
    results = []
    for loss_fn in (loss_of, exact):
        leaf = student.clone().requires_grad_()
        loss = loss_fn(leaf, teacher, labels, hard_weight=0.5, temperature=2.0)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + gradient.square().sum()).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)


def test_float16_gradients_survive_a_loss_scaler() -> None:
    """Under a scale of 65,536, as under plain PyTorch, the gradient has float16's 11 bits."""
    for rows, vocab_size in ((3, 40), (64, 32_003)):
        student, teacher = make_logits("flat", rows, vocab_size, torch.float16)
        grad_output = torch.tensor(65536.0)
        _, gradient = run(loss_of, student, teacher, grad_output=grad_output)
        right = run(exact, student.double(), teacher, grad_output=grad_output)[1]
        relative = (gradient.double() - right).norm() / right.norm()
        assert gradient.isfinite().all()
        assert relative < 2**-10, (rows, vocab_size, relative)


# ------------------------------------------------------------------------------------------------------ in place


@pytest.mark.parametrize("operation", [torch.tanh, torch.exp, torch.sigmoid], ids=lambda f: f.__name__)
def test_inplace_is_caught_where_the_logits_are_needed_again(operation: Any) -> None:
    """These save their result for backward; overwritten, it would give a wrong gradient in silence."""
    x = torch.randn(3, 5, requires_grad=True)
    logits = operation(x)
    loss = loss_of(logits, torch.randn(3, 5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("view", [lambda z: z, lambda z: z[:, :3], lambda z: z.view(15).view(3, 5)])
def test_inplace_is_caught_in_another_use_of_the_logits(view: Any) -> None:
    """Used before the loss by something that saves its input, through a view or not."""
    logits = torch.randn(3, 5, requires_grad=True) * 1
    other = logits.pow(2).sum()
    used = view(logits)
    loss = loss_of(used, torch.randn(used.shape), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@every_dtype
def test_inplace_supports_one_backward_and_says_so(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    loss = loss_of(x * 1, torch.randn(3, 5, dtype=dtype), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace=True.*one backward"):
        loss.backward()
    loss = loss_of(x * 1, torch.randn(3, 5, dtype=dtype), inplace=True)
    with pytest.raises(RuntimeError, match=r"inplace=True.*no double backward"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_inplace_through_a_linear_layer() -> None:
    """The common case: logits of a head, and the head's weight learns from the gradient that replaced them."""
    teacher = torch.randn(6, 11)
    hidden = torch.randn(6, 4)
    grads = []
    for inplace in (False, True):
        torch.manual_seed(1)
        head = torch.nn.Linear(4, 11)
        loss_of(head(hidden), teacher, inplace=inplace).mul(0.3).backward()
        grads.append((head.weight.grad, head.bias.grad))
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------------------ operators


def op_arguments(
    dtype: torch.dtype = torch.float32, *, labels: bool = False, weight: bool = False, denominator: bool = False,
    reduction: int = 1, dim: int = -1, shape: tuple[int, ...] = (3, 5), teacher_learns: bool = False,
    divergence: str = "forward_kl",
) -> tuple[Any, ...]:  # fmt: skip
    rows = [n for d, n in enumerate(shape) if d != dim % len(shape)]
    return (
        torch.randn(shape, dtype=dtype, requires_grad=True),
        torch.randn(shape, dtype=dtype, requires_grad=teacher_learns),
        torch.randint(shape[dim], rows) if labels else None,
        torch.rand(rows, dtype=torch.float64) if weight else None,
        torch.tensor(3.0, dtype=torch.float64) if denominator else None,
        None,
        *ops.numbers(
            make_options(
                **keywords_of(divergence),
                temperature=(2.0, 1.0),
                hard_weight=0.5 if labels else 0.0,
                label_smoothing=0.1,
                reduction=REDUCTIONS[reduction],
                dim=dim,
            )
        ),
    )


OP_SAMPLES = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 rows": {"dtype": torch.float16, "reduction": 0},
    "float64": {"dtype": torch.float64, "labels": True, "weight": True},
    "labels and weights": {"labels": True, "weight": True, "reduction": 0},
    "denominator": {"labels": True, "denominator": True, "reduction": 2},
    "dim 1 of 4": {"labels": True, "shape": (2, 5, 3, 2), "dim": 1, "reduction": 0},
    "no rows": {"shape": (0, 5)},
    "teacher learns": {"teacher_learns": True},
    **{name: {"labels": True, "teacher_learns": True, "divergence": name} for name in DIVERGENCES},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("sample", OP_SAMPLES.values(), ids=OP_SAMPLES.keys())
def test_opcheck(sample: dict[str, Any]) -> None:
    """Schema, aliasing, fakes, autograd registration and AOT dispatch of both operators."""
    arguments = op_arguments(**sample)
    torch.library.opcheck(torch.ops.reptile_ext.distillation_loss, (*arguments, True))
    frozen = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.reptile_ext.distillation_loss, (*frozen, False))
    if sample.get("dtype", torch.float32) is not torch.float16:
        torch.library.opcheck(torch.ops.reptile_ext.distillation_loss_, frozen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@every_dtype
def test_opcheck_of_the_backward_operator(dtype: torch.dtype) -> None:
    labels, weight = torch.randint(5, (3, 2)), torch.rand(3, 2, dtype=torch.float64)
    for factor in (torch.tensor(3.0), torch.rand(3, 2)):
        for rows in ((None, None), (labels, weight)):
            arguments = (torch.randn(3, 5, 2, dtype=dtype), factor, *rows, 1, 4, 1)
            torch.library.opcheck(torch.ops.reptile_ext.scale_gradient_, arguments)


@pytest.mark.parametrize("sample", OP_SAMPLES.values(), ids=OP_SAMPLES.keys())
def test_the_operators_autograd_is_the_functions(sample: dict[str, Any]) -> None:
    """torch.ops.reptile_ext.distillation_loss, which a traced program runs, has the gradient of the eager path."""
    arguments = op_arguments(**sample)
    student, teacher, labels, weight, denominator = arguments[:5]
    grad_output = None
    loss, _ = ops.distillation_loss(*arguments, True)
    grad_output = torch.rand_like(loss)
    wanted = [x for x in (student, teacher) if x.requires_grad]
    found = torch.autograd.grad(loss, wanted, grad_output)
    keywords = {"temperature": (2.0, 1.0), "hard_weight": 0.5 if labels is not None else 0.0, "label_smoothing": 0.1}
    given = dict(zip(ops.NAMES, arguments, strict=True))
    keywords |= {"reduction": REDUCTIONS[given["reduction"]], "dim": given["dim"], "weight": weight}
    keywords |= keywords_of(sample.get("divergence", "forward_kl"))
    right_loss = reference.distillation_loss(student, teacher, labels, denominator=denominator, **keywords)
    right = torch.autograd.grad(right_loss, wanted, grad_output.to(right_loss.dtype))
    torch.testing.assert_close(loss, right_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, right, rtol=2 * torch.finfo(student.dtype).eps, atol=1e-6)


def test_the_operators_themselves_refuse_what_would_be_unsafe() -> None:
    """Anybody may call torch.ops directly: nothing out of bounds may be read or written."""
    student, teacher, *rest = op_arguments(labels=True)
    labels = rest[0]
    op = ops.distillation_loss
    with pytest.raises(RuntimeError, match="labels must lie in"):
        op(student, teacher, labels + 100, *rest[1:], True)
    with pytest.raises(RuntimeError, match="labels must have one element a row"):
        op(student, teacher, labels[:2], *rest[1:], True)
    with pytest.raises(RuntimeError, match="labels must be int64"):
        op(student, teacher, labels.int(), *rest[1:], True)
    with pytest.raises(RuntimeError, match="teacher must have the shape of student"):
        op(student, teacher[:2], labels, *rest[1:], True)
    with pytest.raises(RuntimeError, match="weight must be float64"):
        op(student, teacher, labels, torch.rand(3), *rest[2:], True)
    with pytest.raises(RuntimeError, match="student must be float32"):
        op(student.int(), teacher, labels, *rest[1:], True)
    with pytest.raises(RuntimeError, match="teacher or dim does not fit student"):
        op(student, teacher, *rest[:-1], 2, True)
    with pytest.raises(RuntimeError, match="divergence is unknown"):
        op(student, teacher, *rest[:4], 99, *rest[5:], True)
    scale, factor, gradient = ops.scale_gradient_, torch.tensor(torch.nan), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="factor must have one element a row"):
        scale(gradient, torch.rand(2), None, None, -100, 5, 1)
    with pytest.raises(RuntimeError, match="labels must have one element a row"):
        scale(gradient, factor, torch.zeros(2, dtype=torch.int64), None, -100, 5, 1)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        scale(gradient, factor, None, torch.rand(6, dtype=torch.float64)[::2], -100, 5, 1)
    for vocab_size in (-3, 7):  # cut off at what there is
        scale(gradient, torch.tensor(2.0), None, None, -100, vocab_size, 1)


# ------------------------------------------------------------------------------------- torch.compile, torch.export


def step(student: Tensor, teacher: Tensor, labels: Tensor | None, **keywords: Any) -> Tensor:
    """Something before the loss and something after it, so that there is a graph to capture."""
    return loss_of(student * 2, teacher + 1, labels, **keywords) * 0.5


@every_dtype
@pytest.mark.parametrize("keywords", [*KEYWORDS, {"vocab": "truncate"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("with_labels", [False, True])
def test_compiled_equals_eager(keywords: dict, with_labels: bool, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    if not with_labels:
        keywords = {k: v for k, v in keywords.items() if k not in ("hard_weight", "label_smoothing")}
    student, teacher, labels = make_case(keywords, dtype)
    labels = labels if with_labels else None
    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    weight = torch.rand(4)
    found = run(compiled, student, teacher, labels, weight=weight, **keywords)
    right = run(step, student, teacher, labels, weight=weight, **keywords)
    torch.testing.assert_close(found, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher, labels, weight=weight, **keywords), right[0])


@every_divergence
def test_every_divergence_compiled_equals_eager(divergence: str) -> None:
    """With both gradients, one graph for a changing batch."""
    torch.compiler.reset()
    keywords = keywords_of(divergence)
    compiled = torch.compile(step, fullgraph=True, backend="inductor", dynamic=True)
    for rows in (4, 9):
        student, teacher, labels = make_case({}, torch.float32, rows=rows)
        results = []
        for f in (compiled, step):
            s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
            loss = f(s, t, labels, temperature=2.0, hard_weight=0.5, **keywords)
            results.append((loss.detach(), *torch.autograd.grad(loss, (s, t))))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@every_divergence
def test_every_divergence_exports(divergence: str) -> None:
    criterion = reptile_ext.DistillationLoss(temperature=2.0, **keywords_of(divergence))
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(5, 9), torch.randn(5, 9), make_labels(5, 9))
    exported = torch.export.export(criterion, example, dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    other = (torch.randn(8, 9), torch.randn(8, 9), make_labels(8, 9))
    assert torch.equal(exported.module()(*other), criterion(*other))


def test_compiled_with_a_changing_batch() -> None:
    """One graph for every number of rows but 0 and 1, and right results for those too."""
    torch.compiler.reset()
    for reduction in ("mean", "none"):

        def f(s: Tensor, t: Tensor, labels: Tensor, reduction: str = reduction) -> Tensor:
            return step(s, t, labels, hard_weight=0.5, reduction=reduction)

        compiled = torch.compile(f, fullgraph=True, backend="inductor", dynamic=True)
        for rows in (4, 9, 2, 1, 30):
            student, teacher, labels = make_case({}, torch.float32, rows=rows)
            found = run(compiled, student, teacher, labels)
            torch.testing.assert_close(found, run(f, student, teacher, labels))


def test_compiled_with_a_changing_temperature() -> None:
    """A schedule inside a compiled step: the number becomes symbolic, the loss must follow it."""
    torch.compiler.reset()

    def f(s: Tensor, t: Tensor, temperature: float) -> Tensor:
        return loss_of(s, t, temperature=temperature)

    student, teacher, _ = make_case({}, torch.float32)
    for dynamic in (None, True):
        compiled = torch.compile(f, fullgraph=True, backend="inductor", dynamic=dynamic)
        for temperature in (1.0, 2.0, 3.5, 2.0):
            right = run(f, student, teacher, temperature)
            torch.testing.assert_close(run(compiled, student, teacher, temperature), right)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_compiled_by_inductor() -> None:
    """The default backend, with a teacher that learns and a tensor as the denominator."""
    torch.compiler.reset()
    student, teacher, labels = make_case({}, torch.float32)

    def both(f: Any) -> tuple[Tensor, ...]:
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = f(s, t, labels, hard_weight=0.5, denominator=torch.tensor(5.0))
        return (loss.detach(), *torch.autograd.grad(loss, (s, t)))

    torch.testing.assert_close(both(torch.compile(step, fullgraph=True)), both(step))


class Model(torch.nn.Module):
    """A student with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 9)
        self.criterion = reptile_ext.DistillationLoss(temperature=2.0, hard_weight=0.5, label_smoothing=0.1)

    def forward(self, hidden: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.head(hidden), teacher_logits, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_no_traced_program_allocates_float32_of_the_logits_size(dtype: torch.dtype) -> None:
    """Factors of rows are float32, and a product with them would promote the gradient."""
    sizes: list[tuple[torch.dtype, int]] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend((x.dtype, x.numel()) for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    class Module(torch.nn.Module):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return loss_of(student, teacher, reduction="none")

    student, teacher = make_logits("random", 64, 1000, dtype)
    exported = torch.export.export(Module(), (student, teacher)).module()
    loss = exported(student.requires_grad_(), teacher)
    with Log():
        loss.backward(torch.rand(64))
    assert (dtype, student.numel()) in sizes
    assert (torch.float32, student.numel()) not in sizes


def test_exported_equals_eager() -> None:
    model = Model().eval()
    rows = torch.export.Dim("rows", min=2)
    example = (torch.randn(5, 4), torch.randn(5, 9), make_labels(5, 9))
    exported = torch.export.export(model, example, dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    other = (torch.randn(8, 4), torch.randn(8, 9), make_labels(8, 9))
    for arguments in (example, other):
        torch.testing.assert_close(exported.module()(*arguments), model(*arguments))
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.reptile_ext.distillation_loss.default in targets, "the fused operator is in the graph"


def test_the_module_is_the_function() -> None:
    """With its keywords, and weight and denominator from the call."""
    student, teacher, labels = make_case({}, torch.float32)
    keywords = {"temperature": (2.0, 3.0), "hard_weight": 0.5, "soft_weight": 0.3, "temperature_scaling": "none"}
    rows = {"weight": torch.rand(4), "denominator": 3.0}
    found = run(reptile_ext.DistillationLoss(**keywords), student, teacher, labels, **rows)
    right = run(loss_of, student, teacher, labels, **keywords, **rows)
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])
    assert "temperature=(2.0, 3.0)" in repr(reptile_ext.DistillationLoss(**keywords))


# ------------------------------------------------------------------------- checkpoint, autocast, torch.func, meta


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_checkpointed_equals_plain(dtype: torch.dtype, inplace: bool) -> None:
    teacher, labels = torch.randn(6, 9, dtype=dtype), make_labels(6, 9)
    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(2)
        hidden = torch.randn(6, 4, dtype=dtype, requires_grad=True)
        weight = torch.randn(9, 4, dtype=dtype, requires_grad=True)

        def f(hidden: Tensor, weight: Tensor) -> Tensor:
            return loss_of((hidden.tanh() @ weight.t()), teacher, labels, hard_weight=0.5, inplace=inplace)

        loss = wrap(f, hidden, weight) * 3
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_autocast_leaves_the_loss_in_float32() -> None:
    """Logits of an autocast head are bfloat16; their loss is float32, and the gradient reaches float32 weights."""
    head, hidden, teacher = torch.nn.Linear(4, 9), torch.randn(6, 4), torch.randn(6, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
        loss = loss_of(logits, teacher, temperature=2.0)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    right = run(exact, logits.detach().double(), teacher, temperature=2.0)
    torch.testing.assert_close(loss.double(), right[0], rtol=1e-6, atol=1e-7)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(head.weight.grad.double(), right[1].t() @ hidden.double(), rtol=0.02, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func.jvp's own imports
@every_divergence
@every_keywords
def test_torch_func(keywords: dict, divergence: str) -> None:
    """grad, vmap over a batch of problems, and jvp, which plain PyTorch serves."""
    student, teacher, labels = make_case(keywords, torch.float64)
    keywords = {**keywords, **keywords_of(divergence)}

    def f(s: Tensor) -> Tensor:
        return loss_of(s, teacher, labels, **keywords).sum()

    right = run(exact, student, teacher, labels, **keywords)
    torch.testing.assert_close(torch.func.grad(f)(student), right[1])
    batch = torch.stack([student, 2 * student, -student])
    each = torch.stack([exact(s, teacher, labels, **keywords).sum() for s in batch])
    torch.testing.assert_close(torch.func.vmap(f)(batch), each)
    tangent = torch.randn_like(student)
    value, derivative = torch.func.jvp(f, (student,), (tangent,))
    torch.testing.assert_close(value, right[0].sum())
    torch.testing.assert_close(derivative, (right[1] * tangent).sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])  # the way there is the same for all
def test_torch_func_compiled(divergence: str) -> None:
    """Transforms inside a compiled program, and a compiled program inside transforms and dual numbers: where the
    operator has no rule for them, plain PyTorch must take its place. A derivative of 0 would be silent."""
    torch.compiler.reset()
    student, teacher, labels = make_case({}, torch.float64)
    tangent, keywords = torch.randn_like(student), keywords_of(divergence)

    def f(s: Tensor) -> Tensor:
        return loss_of(s, teacher, labels, temperature=2.0, **keywords)

    def jvp(s: Tensor) -> Tensor:
        return torch.func.jvp(f, (s,), (tangent,))[1]

    batched = torch.func.vmap(torch.func.grad(f))
    for transformed, argument in (
        (jvp, student),
        (torch.func.grad(f), student),
        (torch.func.jacfwd(f), student),
        (torch.func.jacrev(f), student),
        (torch.func.hessian(f), student),
        (batched, torch.stack([student, 2 * student])),
    ):
        compiled = torch.compile(transformed, backend="inductor", fullgraph=True)
        torch.testing.assert_close(compiled(argument), transformed(argument))
    compiled = torch.compile(f, backend="inductor")
    compiled(student)  # in the cache, for a program without transforms
    torch.testing.assert_close(torch.func.jvp(compiled, (student,), (tangent,))[1], jvp(student))
    torch.testing.assert_close(torch.func.grad(compiled)(student), torch.func.grad(f)(student))
    right = jvp(student)
    with torch.autograd.forward_ad.dual_level():
        dual = compiled(torch.autograd.forward_ad.make_dual(student, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, right)


@every_divergence
def test_forward_mode_and_hessians(divergence: str) -> None:
    """Tangents of both models at once, forward over reverse, and the Hessian of one row."""
    student, teacher, labels = make_case({}, torch.float64)
    keywords = {"temperature": (2.0, 0.5), **keywords_of(divergence)}

    def f(s: Tensor, t: Tensor) -> Tensor:
        return loss_of(s, t, labels, **keywords)

    v, w = torch.randn_like(student), torch.randn_like(teacher)
    s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    of_student, of_teacher = torch.autograd.grad(f(s, t), (s, t), create_graph=True)
    _, derivative = torch.func.jvp(f, (student, teacher), (v, w))
    torch.testing.assert_close(derivative, (of_student * v + of_teacher * w).sum().detach())
    product = torch.autograd.grad((of_student * v).sum(), s)[0]
    _, forward_over_reverse = torch.func.jvp(torch.func.grad(lambda x: f(x, teacher)), (student,), (v,))
    torch.testing.assert_close(forward_over_reverse, product)


@every_divergence
def test_checkpointed_with_a_trainable_teacher(divergence: str) -> None:
    keywords, labels = keywords_of(divergence), make_labels(6, 9)
    student, teacher = make_logits("random", 6, 9)
    results = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = wrap(lambda a, b: loss_of(a.tanh(), b.tanh(), labels, **keywords), s, t)
        loss.backward()
        results.append((loss.detach(), s.grad, t.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_batched_grad_outputs() -> None:
    """torch.autograd.grad(is_grads_batched=True): the Jacobian of the row losses in one backward pass."""
    student, teacher, _ = make_case({}, torch.float64)
    student.requires_grad_()
    loss = loss_of(student, teacher, reduction="none")
    (jacobian,) = torch.autograd.grad(loss, student, torch.eye(4, dtype=torch.float64), is_grads_batched=True)
    right = torch.func.jacrev(lambda s: exact(s, teacher, reduction="none"))(student.detach())
    torch.testing.assert_close(jacobian, right)


def test_meta_tensors_carry_shapes_and_dtypes() -> None:
    """As a model is planned before it has memory."""
    student = torch.empty(3, 4, 50, device="meta", dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.empty(3, 4, 50, device="meta")
    for reduction, shape in (("mean", ()), ("none", (3, 4))):
        loss = loss_of(student, teacher, reduction=reduction)
        assert loss.shape == shape
        assert loss.dtype == torch.float32
        assert loss.is_meta


def test_no_warning_on_a_device_with_kernels() -> None:
    student, teacher, _ = make_case({}, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(loss_of, student, teacher)


@pytest.mark.parametrize(
    ("device", "why"),
    [("cuda", r"torch .* is built without CUDA"), ("xpu", "reptile_ext has no kernels for device type 'xpu'")],
)
@pytest.mark.skipif(ops.cuda_missing is None, reason="CUDA tensors have kernels here")
def test_one_warning_on_a_device_without_kernels(device: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reptile_ext.functional, "_warned_devices", set())
    with pytest.warns(UserWarning, match=f"{why}; distillation_loss runs in plain PyTorch there"):
        reptile_ext.functional.warn_once(torch.device(device, 0))
    reptile_ext.functional.warn_once(torch.device(device, 0))  # warnings are errors in this suite
