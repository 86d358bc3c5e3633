"""Where the time of a small call goes: `python benchmarks/small_shapes.py [rows] [vocab]`, default 64 10.

Of so few logits the kernel takes a fraction; the rest is Python, the dispatcher and autograd. Each line is the median
over calls that take turns. The lines nest, and the differences at the end are what each layer adds.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reptile_ext import ops
from reptile_ext.benchmark import TEMPERATURE, Case, Data, contenders, environment
from reptile_ext.benchmark.losses import ours
from reptile_ext.checks import check_tensors
from reptile_ext.eager import forward_kl
from reptile_ext.options import make_options
from reptile_ext.timing import Contender, Turns, produced

ROUNDS, IN_A_ROW = 30, 100


class Nothing(torch.autograd.Function):
    """The least that an autograd.Function in Python can cost."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient, None, None


def microseconds(stages: Sequence[Contender]) -> dict[str, float]:
    """Median times of the stages, which take turns."""
    turns = Turns(stages)
    turns.take_turns(ROUNDS, warm_up=True, in_a_row=IN_A_ROW, enough_ns=math.inf)
    for one in turns.measured:
        if one.failed is not None:  # what the others add up to would be wrong
            raise RuntimeError(f"{one.name}: {one.failed}")
    return {one.name: 1e3 * one.ms[1] for one in turns.measured}


def main(rows: int = 64, vocab: int = 10) -> None:
    case = Case("float32", rows, vocab)
    data = Data(case.dtype, case.pairs)
    plain, teacher, buffer = data.logits(case)
    student = plain.detach().requires_grad_()
    one = torch.zeros(1, 1)
    numbers = ops.numbers(make_options(temperature=TEMPERATURE))
    gradient, zero = torch.zeros_like(plain), torch.zeros(())

    def nothing() -> None:
        return None

    def fresh(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def setup() -> Tensor:
            student.grad = None
            return forward()

        return setup

    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def empty() -> Tensor:
        result: Tensor = Nothing.apply(student, zero, gradient)  # type: ignore[no-untyped-call]
        return result

    def operator(a: Tensor, b: Tensor) -> Callable[[Any], Any]:
        return lambda _: ops.distillation_loss(a, b, None, None, None, None, *numbers, True)

    def below_autograd(_: Any) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            ops.distillation_loss(plain, teacher, None, None, None, None, *numbers, True)

    def without_grad(_: Any) -> None:
        with torch.no_grad():
            ours(plain, teacher)

    def make_options_and_check(_: Any) -> None:
        check_tensors(plain, teacher, None, None, None, make_options(temperature=TEMPERATURE))

    losses = {c.name: c for c in contenders(case, data, compile=False)}

    def whole(name: str) -> Contender:
        return dataclasses.replace(losses[name], name=f"{name}, forward + backward")

    us = microseconds(
        [
            Contender("checks of the arguments", nothing, make_options_and_check),
            Contender("operator on [1, 1]", nothing, operator(one, one)),
            Contender("operator", nothing, operator(plain, teacher)),
            Contender("operator below its autograd layer", nothing, below_autograd),
            Contender("ours, forward under no_grad", nothing, without_grad),
            Contender("ours, forward", nothing, lambda _: ours(student, teacher)),
            Contender("ours, backward", fresh(lambda: ours(student, teacher)), backward),
            whole("ours"),
            whole("ours in place"),
            Contender(
                "a producer alone, backward", lambda: produced(buffer), lambda x: torch.autograd.backward(x, gradient)
            ),
            Contender("empty autograd.Function, forward", nothing, lambda _: empty()),
            Contender("empty autograd.Function, backward", fresh(empty), backward),
            Contender("eager, forward", nothing, lambda _: forward_kl(student, teacher, None)),
            Contender("eager, backward", fresh(lambda: forward_kl(student, teacher, None)), backward),
            whole("eager"),
        ]
    )
    print("\n".join(f"{key:<16}{value}" for key, value in environment().items()))
    print(f"\n{case}, microseconds")
    for name, value in us.items():
        print(f"{name:<38}{value:8.1f}")
    total = us["ours, forward + backward"]
    layers = {
        "checks of the arguments": us["checks of the arguments"],
        "operator: its autograd layer": us["operator"] - us["operator below its autograd layer"],
        "operator: dispatcher, outputs": us["operator on [1, 1]"]
        - us["operator"]
        + us["operator below its autograd layer"],
        "operator: kernel": us["operator"] - us["operator on [1, 1]"],
        "autograd.Function, forward": us["ours, forward"] - us["operator"] - us["checks of the arguments"],
        "backward": us["ours, backward"],
    }
    print(f"\nours, {total:.1f} microseconds, {total / us['eager, forward + backward']:.2f} of eager's:")
    for name, value in layers.items():
        print(f"{name:<42}{value:8.1f} {value / total:5.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
