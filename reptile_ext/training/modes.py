"""What a model is put back to: its modes, what of it wants a gradient, its gradients and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .data import random_state, set_random_state


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module in train or eval mode; give every part its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    if all(mode == training for _, mode in modes):
        yield
        return
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def being_trained(student: nn.Module) -> Iterator[None]:
    """A student's parts in the modes to train it in; afterwards each in its own.

    A student in train mode has parts in eval mode on purpose, such as BatchNorms: they stay as they are. One in eval
    mode, as pretrained models come, is put in train mode, all but its frozen parts: those whose parameters want no
    gradient, with all that is inside them.
    """
    with contextlib.ExitStack() as stack:
        if not student.training:
            resting = [part for part in student.modules() if not part.training and _is_frozen(part)]
            stack.enter_context(in_mode(student, training=True))
            for part in resting:
                part.train(False)
        yield


def _is_frozen(part: nn.Module) -> bool:
    parameters = list(part.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


@contextlib.contextmanager
def frozen(teachers: Iterable[Any]) -> Iterator[None]:
    """Teachers in eval mode whose parameters want no gradient; afterwards as they were."""
    modules = [teacher for teacher in teachers if isinstance(teacher, nn.Module)]
    wanted = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(in_mode(module, training=False))
            for parameter in module.parameters():
                if not parameter.is_inference():  # which no graph is made of, and may not be told so
                    parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, requires_grad in wanted:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Gradients, buffers (a BatchNorm's statistics) and random numbers are afterwards as they were."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    random_numbers = random_state()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        set_random_state(random_numbers)
