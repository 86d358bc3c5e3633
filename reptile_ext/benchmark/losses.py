"""The contenders of a case, and the check that they compute the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._C import stream_limit
from ..eager import TEMPERATURE, eager_loss_of
from ..functional import distillation_loss
from ..timing import Contender, flush_caches, produced
from .data import Case, Data

BASELINES = ("eager", "eager fp32", "torch.compile")
NAMES = ("ours in place", "ours", *BASELINES, "limit")
COMPILE_VOCAB = 1000  # torch.compile takes seconds a case, and below this size has nothing to show

Found = tuple[Tensor, Tensor]  # a loss and the gradient that its backward pass left: what a step returns


def ours(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    inplace: bool = False,
) -> Tensor:
    return distillation_loss(student, teacher, labels, divergence=divergence, temperature=TEMPERATURE, inplace=inplace)


def contenders(case: Case, data: Data, compile: bool = True) -> list[Contender]:
    """Everything that `case` compares; without torch.compile where `compile` is False, or the classes are few."""
    student, teacher, buffer = data.logits(case)
    leaf, labels = data.leaf(case), data.labels(case)
    eager = eager_loss_of(case.divergence)
    prepare = flush_caches if case.is_large else lambda: None

    def of_leaf(name: str, loss_of: Callable[[], Tensor]) -> Contender:
        def setup() -> None:
            leaf.grad = None
            prepare()

        def step(_: None) -> Found:
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            return loss, leaf.grad

        return Contender(name, setup, step)

    def in_place() -> Contender:
        def setup() -> Tensor:
            logits = produced(buffer.copy_(student))
            prepare()
            return logits

        def step(logits: Tensor) -> Found:
            loss = ours(logits, teacher, labels, case.divergence, inplace=True)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss, buffer

        return Contender("ours in place", setup, step)

    def limit() -> Contender:
        num_bytes = case.pairs * student.element_size()

        def step(_: None) -> None:
            stream_limit(student.data_ptr(), teacher.data_ptr(), buffer.data_ptr(), num_bytes, torch.get_num_threads())

        return Contender("limit", prepare, step)

    chosen = [
        in_place(),
        of_leaf("ours", lambda: ours(leaf, teacher, labels, case.divergence)),
        of_leaf("eager", lambda: eager(leaf, teacher, labels)),
    ]
    if case.dtype != "float32":
        chosen.append(of_leaf("eager fp32", lambda: eager(leaf.float(), teacher.float(), labels)))
    if compile and case.vocab >= COMPILE_VOCAB:
        # One shape at a time: else the ninth would hit the limit of recompilations. What a case of the same shape
        # compiles is compiled at its first step, after this.
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        chosen.append(of_leaf("torch.compile", lambda: compiled(leaf, teacher, labels)))
    if case.is_large:
        chosen.append(limit())
    return chosen


def exact(case: Case, data: Data) -> Found:
    """Loss and gradient of eager PyTorch in float32 arithmetic."""
    student, teacher, _ = data.logits(case)
    leaf = student.detach().float().requires_grad_()
    loss = eager_loss_of(case.divergence)(leaf, teacher.float(), data.labels(case))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def check(case: Case, name: str, found: Found, wanted: Found) -> None:
    """Compare a contender's loss and gradient with the exact ones.

    Raises:
        RuntimeError: they differ by more than the contender's arithmetic explains. Where that is float32: 1e-3 for the
            loss, 5e-3 for the gradient (tvd's jumps where p = q), 1e-2 for one that is rounded to bfloat16. Where
            log-probabilities were rounded to bfloat16 on the way: 1e-1. A gradient's error is that of the whole
            tensor, in the Euclidean norm.
    """
    narrow = case.dtype != "float32"
    rounds_inside = narrow and name in ("eager", "torch.compile")
    errors = {
        "loss": (abs(found[0].item() / wanted[0].item() - 1), 1e-1 if rounds_inside else 1e-3),
        "gradient": (
            float((found[1].float() - wanted[1]).norm() / wanted[1].norm()),
            1e-1 if rounds_inside else 1e-2 if narrow else 5e-3,
        ),
    }
    for what, (error, tolerance) in errors.items():
        if not error <= tolerance:
            raise RuntimeError(
                f"{name} computes a wrong {what} for {case}: {error:.1e} off eager PyTorch in float32, "
                f"{tolerance:.0e} allowed; there is no point in timing it"
            )
