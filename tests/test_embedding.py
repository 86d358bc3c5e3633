"""The losses inside other people's programs: compilers with sizes that change, inference mode, modules whose keywords
are set from step to step, heads that are more than a weight, tracers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import make_labels, make_logits, name_of
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import reptile_ext
from reptile_ext import binary_distillation_loss, distillation_loss, linear_distillation_loss

# ------------------------------------------------------------------------------------------------ compilers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    ("shape", "keywords"),
    [((6, 40), {}), ((2, 3, 40), {}), ((6, 40), {"reduction": "none"}), ((6, 40), {"vocab": "truncate"})],
    ids=str,
)
def test_compiled_for_any_size(shape: tuple[int, ...], keywords: dict[str, Any], dtype: torch.dtype) -> None:
    """The function itself, of plain tensors, forward and backward."""
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 40, dtype)
    student, teacher = student.reshape(shape), teacher.reshape(shape)
    if "vocab" in keywords:
        teacher = teacher[..., :38].contiguous()

    def both(f: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = f(leaf, teacher, temperature=2.0, **keywords)
        loss.sum().backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    compiled = torch.compile(distillation_loss, dynamic=True, fullgraph=True)
    torch.testing.assert_close(both(compiled), both(distillation_loss))


def test_compiled_where_rows_and_classes_change() -> None:
    """What is compiled for one size, and then for a size that changes by itself."""
    torch.compiler.reset()
    compiled = torch.compile(distillation_loss)
    for rows, classes in ((6, 40), (8, 44), (9, 51), (12, 60)):
        student, teacher = make_logits("random", rows, classes, torch.float32)
        found, right = (
            torch.autograd.grad(f(s, teacher), s)
            for f, s in ((f, student.clone().requires_grad_()) for f in (compiled, distillation_loss))
        )
        torch.testing.assert_close(found, right)


def test_the_binary_loss_compiled_for_any_size_and_of_a_teacher_in_inference_mode() -> None:
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 40, torch.float32)

    def gradient(f: Callable[..., Tensor], t: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        return torch.autograd.grad(3 * f(leaf, t, temperature=2.0), leaf)[0]

    right = gradient(binary_distillation_loss, teacher)
    compiled = torch.compile(binary_distillation_loss, dynamic=True, fullgraph=True)
    torch.testing.assert_close(gradient(compiled, teacher), right)
    (lent,) = made_in_inference_mode(teacher)
    torch.testing.assert_close(gradient(binary_distillation_loss, lent), right, rtol=0, atol=0)
    criterion = reptile_ext.BinaryDistillationLoss()
    criterion.temperature = 2.0
    torch.testing.assert_close(gradient(lambda s, t, temperature: criterion(s, t), teacher), right)


def test_the_linear_loss_compiled_for_any_size() -> None:
    """Of a head that is a plain tensor, with classes that are not compared and a bias."""
    torch.compiler.reset()
    torch.manual_seed(0)
    tensors = [torch.randn(6, 8), torch.randn(43, 8), torch.randn(6, 5), torch.randn(40, 5)]
    bias = torch.randn(43)

    def both(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        hidden, weight, b = (x.clone().requires_grad_() for x in (*tensors[:2], bias))
        loss = f(hidden, weight, *tensors[2:], student_bias=b, vocab="truncate")
        return (loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight, b)))

    compiled = torch.compile(linear_distillation_loss, dynamic=True)
    torch.testing.assert_close(both(compiled), both(linear_distillation_loss))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch, of what it makes fakes of
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_in_place_under_compiled_autograd(backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 40, dtype)
    leaf, right = (student.clone().requires_grad_() for _ in range(2))
    distillation_loss(right * 2, teacher).backward()
    loss = distillation_loss(leaf * 2, teacher, inplace=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
        loss.backward()
    torch.testing.assert_close(leaf.grad, right.grad)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "logits": lambda s, t: distillation_loss(s, t, torch.arange(6), hard_weight=0.3),
    "rows": lambda s, t: distillation_loss(s, t, reduction="none").sum(),
    "inplace": lambda s, t: distillation_loss(s * 2, t, inplace=True),
    "float16": lambda s, t: distillation_loss(s.half(), t),
    "linear": lambda s, t: linear_distillation_loss(s[:, :8] * 2, s[:, 8:16], t[:, :8], t[:, 8:16], memory_budget=64),
}


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("loss", LOSSES)
def test_make_fx(loss: str, mode: str, pre_dispatch: bool) -> None:
    student, teacher = make_logits("random", 6, 40, torch.float32)
    student.requires_grad_()

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(LOSSES[loss](s, t), s)[0]

    with torch.inference_mode():
        teacher = teacher.clone()
    traced = make_fx(gradient, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(
        student, teacher
    )
    other, other_teacher = make_logits("random", 6, 40, torch.float32, 1)
    other.requires_grad_()
    torch.testing.assert_close(traced(other, other_teacher), gradient(other, other_teacher))


def test_make_fx_for_any_number_of_rows() -> None:
    """No number of rows may be taken into the graph of the linear loss's mean."""

    def loss(hidden: Tensor, teacher: Tensor) -> Tensor:
        return linear_distillation_loss(hidden, torch.ones(7, 3).cumsum(0), teacher)

    traced = make_fx(loss, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(6, 3), torch.randn(6, 7))
    for rows in (6, 11):
        hidden, teacher = torch.randn(rows, 3), torch.randn(rows, 7)
        torch.testing.assert_close(traced(hidden, teacher), loss(hidden, teacher))


# ------------------------------------------------------------------------------------------------ inference mode


def made_in_inference_mode(*tensors: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [x.clone() for x in tensors]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=name_of)
def test_a_teacher_labels_and_weights_made_in_inference_mode(dtype: torch.dtype, inplace: bool) -> None:
    student, teacher = make_logits("random", 6, 40, dtype)
    given = [teacher, make_labels(6, 40), torch.rand(6)]
    keywords = {"hard_weight": 0.5, "temperature": 2.0, "inplace": inplace}

    def gradient(tensors: list[Tensor]) -> Tensor:
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf * 1, *tensors[:2], weight=tensors[2], **keywords).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(made_in_inference_mode(*given)), gradient(given), rtol=0, atol=0)
    with torch.inference_mode():
        distillation_loss(student, teacher)  # all of it there


def test_what_a_second_backward_pass_lacks_is_named() -> None:
    student, teacher = make_logits("random", 6, 40, torch.float32)
    student.requires_grad_()
    (lent,) = made_in_inference_mode(teacher)
    loss = distillation_loss(student, lent)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"teacher_logits was made under torch.inference_mode\(\)"):
        loss.backward()
    with pytest.raises(RuntimeError, match="one backward pass, and no double backward"):
        torch.autograd.grad(distillation_loss(student, lent), student, create_graph=True)
    # Of float16 the backward pass computes the gradient, from a copy: nobody would notice that the original changes.
    half = student.detach().half().requires_grad_()
    loss = distillation_loss(half, lent)
    right = torch.autograd.grad(distillation_loss(half, teacher), half)
    with torch.inference_mode():
        lent.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, half), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_the_linear_loss_of_a_teacher_in_inference_mode(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (6, 40))
    teacher = [torch.randn(6, 8), torch.randn(40, 8)]
    found, right = (
        torch.autograd.grad(linear_distillation_loss(hidden, weight, *of, make_labels(6, 40)), (hidden, weight))
        for of in (made_in_inference_mode(*teacher), teacher)
    )
    torch.testing.assert_close(found, right, rtol=0, atol=0)
    loss = linear_distillation_loss(hidden, weight, *made_in_inference_mode(*teacher))
    loss.backward(retain_graph=True)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match=r"teacher_hidden and teacher_weight was made under"):
            loss.backward()


def test_models_built_in_inference_mode() -> None:
    from reptile_ext import training

    with torch.inference_mode():
        built = nn.Linear(4, 3)
    student, inputs = nn.Linear(4, 3), torch.randn(8, 4)
    before = student.weight.clone()
    assert training.Reptile(student, built).fit([inputs], until=1, progress_bar=False).steps == 1
    assert not torch.equal(student.weight, before)
    assert built.weight.requires_grad
    with pytest.raises(ValueError, match=r"the student's parameter 'weight' was made under torch.inference_mode\(\)"):
        training.Reptile(built, student)


# ------------------------------------------------------------------------------------------------ modules


def test_keywords_of_a_module_are_attributes() -> None:
    student, teacher = make_logits("random", 6, 40, torch.float32)
    criterion = reptile_ext.DistillationLoss(hard_weight=0.5)
    labels = make_labels(6, 40)
    for temperature in (4.0, (2.0, 1.0)):
        criterion.temperature = temperature
        right = distillation_loss(student, teacher, labels, temperature=temperature, hard_weight=0.5)
        assert criterion.temperature == temperature
        assert torch.equal(criterion(student, teacher, labels), right)
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(criterion)))(student, teacher, labels), right)
        assert repr(temperature) in repr(criterion)
    for name, value, message in (
        ("temperature", -1.0, "temperature must be a positive number"),
        ("divergence", "kl", "divergence must be one of"),
        ("reduction", "batchmean", "reduction must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(criterion, name, value)
        assert getattr(criterion, name) != value
    for name, also in (
        ("temprature", "did you mean temperature"),
        ("T", "temperature"),
        ("weight", "goes to the call"),
    ):
        with pytest.raises(AttributeError, match=f"DistillationLoss has no attribute {name!r}.*{also}"):
            setattr(criterion, name, 2.0)
    with pytest.raises(AttributeError, match="temprature"):
        criterion.temprature  # noqa: B018

    class Mine(reptile_ext.DistillationLoss):
        def __init__(self, alpha: float) -> None:
            super().__init__(temperature=2.0)
            self.alpha = alpha

    assert Mine(0.5).alpha == 0.5
    criterion.run_name = "mine"
    assert criterion.run_name == "mine"
    linear = reptile_ext.LinearDistillationLoss()
    with pytest.raises(ValueError, match="student_softcap must be"):
        linear.student_softcap = -3.0
    linear.student_softcap = 3
    assert linear.student_softcap == 3.0


def test_a_compiled_module_follows_its_attributes() -> None:
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 40, torch.float32)
    criterion = reptile_ext.DistillationLoss()
    compiled = torch.compile(lambda s, t: criterion(s, t), fullgraph=True)
    for temperature in (1.0, 4.0, 2.0):
        criterion.temperature = temperature
        torch.testing.assert_close(
            compiled(student, teacher), distillation_loss(student, teacher, temperature=temperature)
        )


# ------------------------------------------------------------------------------------------------ heads


class Adapted(nn.Linear):
    """A head with a low-rank adapter, as LoRA adds one."""

    def __init__(self, size: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__(size, classes)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(classes, 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * F.linear(F.linear(self.dropout(input), self.a), self.b)


class FakeQuantised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax() / 127
        quantised = torch.fake_quantize_per_tensor_affine(self.weight, float(step), 0, -127, 127)
        return F.linear(input, quantised, self.bias)


class Upcast(nn.Linear):
    """Logits in float32 of hidden states in 16 bits."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float())


HEADS: dict[str, tuple[Callable[[], nn.Module], torch.dtype]] = {
    "plain": (lambda: nn.Linear(8, 40), torch.float32),
    "without bias": (lambda: nn.Linear(8, 40, bias=False), torch.float32),
    "adapter": (lambda: Adapted(8, 40), torch.float32),
    "adapter in float64": (lambda: Adapted(8, 40).double(), torch.float64),
    "fake-quantised": (lambda: FakeQuantised(8, 40), torch.float32),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 40)), torch.float32),
    "two layers": (lambda: nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 40)), torch.float32),
    "upcast": (lambda: Upcast(8, 40), torch.bfloat16),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_module_as_head_is_what_its_forward_does(name: str) -> None:
    torch.manual_seed(0)
    make, dtype = HEADS[name]
    head = make()
    hidden = torch.randn(3, 5, 8).to(dtype).requires_grad_()
    teacher_hidden, teacher_head = torch.randn(3, 5, 4), Adapted(4, 40)
    labels = make_labels(15, 40).reshape(3, 5)
    keywords = {"temperature": 2.0, "hard_weight": 0.5}
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    found = linear_distillation_loss(
        hidden,
        teacher_hidden=teacher_hidden,
        labels=labels,
        student_head=head,
        teacher_head=teacher_head.requires_grad_(False),
        **keywords,
    )
    right = distillation_loss(head(hidden), teacher_head(teacher_hidden), labels, **keywords)
    torch.testing.assert_close(found, right)
    rounds = {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(right, wanted), strict=True):
        torch.testing.assert_close(a, b, **rounds)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["head"], "init_lora_weights": False},
        {"target_modules": ["head"], "init_lora_weights": False, "use_dora": True},
        {"target_modules": ["body"], "modules_to_save": ["head"]},
    ],
    ids=["LoRA", "DoRA", "modules_to_save"],
)
def test_a_head_of_peft(config: dict[str, Any]) -> None:
    import peft

    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 40)})
    head = peft.get_peft_model(model, peft.LoraConfig(**config)).base_model.model["head"]
    hidden, teacher = torch.randn(6, 8), torch.randn(6, 40)
    adapters = [p for p in head.parameters() if p.requires_grad]
    assert len(adapters) >= 2
    found = linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=head)
    right = distillation_loss(head(hidden), teacher)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, adapters), torch.autograd.grad(right, adapters))


def test_a_compiled_module_as_head() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    head, hidden, teacher = Adapted(8, 40), torch.randn(6, 8), torch.randn(6, 40)
    compiled = torch.compile(
        lambda h: linear_distillation_loss(h, teacher_hidden=teacher, student_head=head), fullgraph=True
    )
    right = distillation_loss(head(hidden), teacher)
    torch.testing.assert_close(compiled(hidden), right)


@pytest.mark.parametrize("masked", [-1e9, -torch.inf])
def test_a_head_that_masks_classes(masked: float) -> None:
    """A padded vocabulary: constants beside logits, in the forward or in the bias, hide nothing and are no NaN."""

    class Padded(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            logits = super().forward(input).clone()
            logits[..., 30:] = masked
            return logits

    class Capped(Padded):
        def forward(self, input: Tensor) -> Tensor:
            logits = super().forward(input)
            return torch.where(logits == masked, logits, torch.tanh(logits))

    torch.manual_seed(0)
    hidden, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    in_bias = nn.Linear(8, 32)
    with torch.no_grad():
        in_bias.bias[30:] = masked
    for make in (lambda: Padded(8, 32), lambda: nn.Sequential(in_bias)):
        heads = make(), make()
        found = linear_distillation_loss(
            hidden, teacher_hidden=teacher, student_head=heads[0], teacher_head=heads[1].requires_grad_(False)
        )
        right = distillation_loss(heads[0](hidden), heads[1](teacher).detach())
        torch.testing.assert_close(found, right)
        a, b = (torch.autograd.grad(x, hidden)[0] for x in (found, right))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="student_head must be a linear map"):
        linear_distillation_loss(hidden, teacher_hidden=torch.randn(5, 32), student_head=Capped(8, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_the_bias_of_a_module_gets_the_gradient_of_a_plain_head(dtype: torch.dtype) -> None:
    """It is left over between two large sums, which must not be rounded to nothing."""
    torch.manual_seed(0)
    head = nn.Linear(1024, 64).to(dtype)
    hidden, teacher = (torch.randn(64, 1024) + 1).to(dtype), torch.randn(64, 64)
    found, right = (
        torch.autograd.grad(linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=x), head.bias)[0]
        for x in (nn.Sequential(head), head)
    )
    assert (found - right).norm() <= {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-2}[
        dtype
    ] * right.norm()


def test_a_head_that_returns_float32_of_16_bits() -> None:
    class Up(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 32).to(dtype)

        def forward(self, input: Tensor) -> Tensor:
            return self.inner(input).float()

    torch.manual_seed(0)
    teacher = torch.randn(20, 32)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        head, hidden = Up(dtype), torch.randn(20, 16).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=head)
            right = distillation_loss(head(hidden), teacher)
        torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-3)


def test_a_head_that_wants_samples_and_positions() -> None:
    class Three(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            samples, positions, size = input.shape
            return super().forward(input.reshape(-1, size)).reshape(samples, positions, -1)

    head, hidden, teacher = Three(8, 40), torch.randn(2, 3, 8), torch.randn(2, 3, 40)
    found = linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=head)
    torch.testing.assert_close(found, distillation_loss(head(hidden), teacher))


def test_a_module_as_head_under_vmap() -> None:
    head, hidden, teacher = Adapted(8, 40), torch.randn(3, 6, 8), torch.randn(3, 6, 40)

    def loss(h: Tensor, t: Tensor) -> Tensor:
        return linear_distillation_loss(h, teacher_hidden=t, student_head=head)

    right = torch.stack([loss(h, t) for h, t in zip(hidden, teacher, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(hidden, teacher), right)


def test_a_head_on_the_meta_device_and_of_no_rows() -> None:
    head, no_rows = Adapted(8, 40), torch.randn(0, 8)
    assert linear_distillation_loss(no_rows, teacher_hidden=torch.randn(0, 40), student_head=head).item() == 0
    hidden, teacher = torch.randn(6, 8, device="meta"), torch.randn(6, 40, device="meta")
    assert linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=head.to("meta")).shape == ()


def test_heads_that_are_not_linear_are_refused() -> None:
    torch.manual_seed(0)
    hidden, teacher = torch.randn(6, 8), torch.randn(6, 40)

    def loss(head: Any, **keywords: Any) -> Tensor:
        return linear_distillation_loss(hidden, teacher_hidden=teacher, student_head=head, **keywords)

    for last in (nn.Tanh(), nn.ReLU(), nn.LayerNorm(40)):
        with pytest.raises(ValueError, match=r"student_head must be a linear map .*student_softcap"):
            loss(nn.Sequential(nn.Linear(8, 40), last))
    with pytest.raises(ValueError, match="student_head has dropout in train mode"):
        loss(Adapted(8, 40, dropout=0.1))
    loss(Adapted(8, 40, dropout=0.1).eval())
    with pytest.raises(TypeError, match=r"student_head must be a torch.nn.Module; got Tensor: pass a weight as"):
        loss(torch.randn(40, 8))
    with pytest.raises(ValueError, match="student_head takes the place of student_weight and student_bias; got both"):
        loss(nn.Linear(8, 40), student_bias=torch.zeros(40))
    with pytest.raises(TypeError, match=r"student_weight must be a torch.Tensor; got Linear: pass it as student_head"):
        linear_distillation_loss(hidden, nn.Linear(8, 40), teacher)  # type: ignore[arg-type]
    hooked = nn.Linear(8, 40)
    hooked.register_full_backward_pre_hook(lambda module, gradients: gradients)
    with pytest.raises(ValueError, match="student_head has backward hooks"):
        loss(hooked)
    with pytest.raises(ValueError, match="student_hidden must have a last dimension"):
        linear_distillation_loss(torch.tensor(1.0), teacher_hidden=teacher, student_head=nn.Linear(8, 40))
    with pytest.raises(ValueError, match=r"student_head must make floating-point logits \[1, 'V'\] of"):
        loss(nn.Flatten(0))


def test_tensor_subclasses_that_wrap_others_are_refused() -> None:
    hidden, weight = torch.randn(6, 8), torch.randn(40, 8)
    two = TwoTensor(weight, weight + 1)
    with pytest.raises(TypeError, match=r"student_weight must be a plain tensor; got a .*TwoTensor.* as student_head"):
        linear_distillation_loss(hidden, two, hidden, weight)
    with pytest.raises(TypeError, match="teacher_logits must be a plain tensor"):
        distillation_loss(weight, two)

    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(TypeError, match="labels must be a plain tensor"):
        linear_distillation_loss(hidden, weight, hidden, weight, TwoTensor(labels, labels))
    with pytest.raises(TypeError, match="weight must be a plain tensor"):
        distillation_loss(weight, weight, weight=TwoTensor(torch.ones(40), torch.ones(40)))

    class Named(torch.Tensor):
        """Its own memory, and nothing changed."""

    class Tagged(torch.Tensor):
        """Its own memory, and a look at every function, as libraries extend tensors."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    for kind in (Named, Tagged):
        torch.testing.assert_close(
            distillation_loss(weight.as_subclass(kind), weight + hidden.mean()).as_subclass(Tensor),
            distillation_loss(weight, weight + hidden.mean()),
        )


# ------------------------------------------------------------------------------------------------ and others


def test_in_place_on_logits_with_the_negative_bit() -> None:
    teacher = torch.randn(6, 40)
    leaf = torch.randn(6, 40, dtype=torch.complex64, requires_grad=True)

    def gradient(inplace: bool) -> Tensor:
        logits = (leaf * 1).conj().imag
        assert logits.is_neg()
        return torch.autograd.grad(distillation_loss(logits, teacher, inplace=inplace), leaf)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_temperature_too_large_for_float32_is_warned_of() -> None:
    student, teacher = make_logits("random", 6, 100, torch.float32)
    for function in (
        distillation_loss,
        binary_distillation_loss,
        lambda *x, **k: linear_distillation_loss(x[0], torch.eye(100), x[1], **k),
    ):
        with pytest.warns(UserWarning, match=r"temperature=10000 leaves a divergence of about 1/T²"):
            function(student, teacher, temperature=1e4)
        function(student, teacher, temperature=1e4, divergence="mse")
        function(student, teacher, temperature=300.0)
    variance = (student - teacher).double().var(-1, correction=0).mean() / 2
    found = distillation_loss(student.double(), teacher.double(), temperature=1e4)
    torch.testing.assert_close(found, variance, rtol=1e-3, atol=0.0)


def test_labels_and_weights_out_of_range_under_vmap() -> None:
    student, teacher = torch.randn(3, 6, 40), torch.randn(3, 6, 40)
    labels = torch.randint(40, (3, 6))
    weight = torch.rand(3, 6)
    labels[1, 2], weight[2, 1] = -100, 0

    def loss(s: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return distillation_loss(s, t, y, hard_weight=0.5, weight=w)

    batched = torch.vmap(loss)
    right = torch.stack([loss(*x) for x in zip(student, teacher, labels, weight, strict=True)])
    torch.testing.assert_close(batched(student, teacher, labels, weight), right)
    for f in (batched, torch.vmap(torch.func.grad(loss))):
        wrong = labels.clone()
        wrong[2, 3] = 99
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 40\) or equal ignore_index=-100; got 99"):
            f(student, teacher, wrong, weight)
        with pytest.raises(ValueError, match="weight must be finite and not negative; got -1"):
            f(student, teacher, labels, weight.index_fill(1, torch.tensor(4), -1.0))
