"""What a model is put back to: its modes, what of it wants a gradient, its gradients and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .batches import random_state, set_random_state


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
def frozen(teacher: nn.Module | None) -> Iterator[None]:
    """A teacher in eval mode whose parameters want no gradient; afterwards as it was."""
    if teacher is None:
        yield
        return
    wanted = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    with in_mode(teacher, training=False):
        teacher.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, requires_grad in wanted:
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
