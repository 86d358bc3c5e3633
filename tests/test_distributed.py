"""Data parallelism: two processes over gloo give the gradient of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import (
    ROWS,
    LinearStudent,
    Student,
    gradients,
    in_two_processes,
    linear_loss,
    make_batch,
    make_teacher,
    worker,
)
from oracle import every_divergence, keywords_of
from torch import Tensor

import reptile_ext

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch is built without gloo"
)


def of_one_process(keywords: dict[str, Any]) -> dict[str, Tensor]:
    hidden, teacher, labels = make_batch()
    model = Student()
    reptile_ext.distillation_loss(model(hidden), teacher, labels, **keywords).backward()
    return gradients(model)


@needs_gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradient_of_one(kind: str) -> None:
    """For every divergence, with ignored rows, so that the processes' own means would be another objective."""
    of = [
        {"temperature": 2.0, "hard_weight": 0.5, "inplace": inplace, **keywords_of(divergence)}
        for divergence in reptile_ext.options.DIVERGENCES
        for inplace in (False, True)
    ]
    found = in_two_processes(worker, kind, of)
    for i, keywords in enumerate(of):
        right = of_one_process(keywords)
        for rank in range(2):
            assert found[rank][i].keys() == right.keys()
            for name, gradient in right.items():
                torch.testing.assert_close(torch.from_numpy(found[rank][i][name]), gradient, rtol=1e-5, atol=1e-6)


@needs_gloo
@pytest.mark.parametrize("kind", ["linear_ddp", "linear_fsdp2_inside", "linear_fsdp2_dtensor"])
def test_the_fused_linear_loss_in_two_processes(kind: str) -> None:
    """Outside of DDP's forward; inside of FSDP2's, where heads are whole; outside of it, where they are DTensors."""
    of: list[dict[str, Any]] = [
        {"temperature": 2.0, "hard_weight": 0.5},
        {"divergence": "jsd", "student_softcap": 3.0, "student_scale": 0.5},
    ]
    found = in_two_processes(worker, kind, of)
    hidden, _, labels = make_batch()
    teachers_head, of_teacher = make_teacher()
    for i, keywords in enumerate(of):
        model = LinearStudent()
        linear_loss(model(hidden), model.head, teachers_head, of_teacher, labels, **keywords).backward()
        right = gradients(model)
        for rank in range(2):
            assert found[rank][i].keys() == right.keys()
            for name, gradient in right.items():
                torch.testing.assert_close(torch.from_numpy(found[rank][i][name]), gradient, rtol=1e-5, atol=1e-6)


@every_divergence
def test_the_processes_own_means_are_another_objective(divergence: str) -> None:
    """So the test above can fail: without `denominator` its two halves do not average to the whole."""
    hidden, teacher, labels = make_batch()
    model, half = Student(), ROWS // 2
    whole = reptile_ext.distillation_loss(model(hidden), teacher, labels, **keywords_of(divergence))
    halves = [
        reptile_ext.distillation_loss(model(hidden[part]), teacher[part], labels[part], **keywords_of(divergence))
        for part in (slice(half), slice(half, None))
    ]
    assert abs(sum(halves) / 2 - whole) > 1e-4 * whole
