"""N·V ≥ 2^31: where 32-bit offsets end. bfloat16, so that student and teacher fit into 9 GB."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import make_labels, make_logits, run
from torch import Tensor

from reptile_ext import distillation_loss


def available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.fixture(autouse=True)
def _one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in several processes (pytest -n): no two have their 9 GB at once, nor believe that they could."""
    with (tmp_path_factory.getbasetemp().parent / "large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if available_bytes() < 11e9:
            pytest.skip("needs 11 GB of free memory (as Linux tells it)")
        yield


class Produced(torch.autograd.Function):
    """Hands out a tensor as logits that may be overwritten, and looks at nothing that comes back."""

    @staticmethod
    def forward(ctx: object, trigger: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: object, _: Tensor) -> tuple[None, None]:
        return None, None


def repeated(block: Tensor, copies: int, dim: int) -> Tensor:
    """The block over and over along dim, written straight into its place."""
    shape = list(block.shape)
    shape[dim] *= copies
    whole = torch.empty(shape, dtype=block.dtype)
    for part in whole.split(block.shape[dim], dim):
        part.copy_(block)
    return whole


@pytest.mark.parametrize(
    ("dim", "rows", "copies", "vocab_size", "divergence"),
    [
        (1, 67, 250, 128_256, "forward_kl"),  # rows of a language model
        (0, 8192, 4100, 64, "jsd"),  # rows side by side: class v of a row is v · 33.6 million elements away
    ],
)
def test_beyond_2_to_the_31(dim: int, rows: int, copies: int, vocab_size: int, divergence: str) -> None:
    """Every row has the loss, and rows from all over the tensor the gradient, that the row has in a small batch."""
    torch.set_num_threads(2)
    assert rows * copies * vocab_size > 2**31
    student, teacher = make_logits("random", rows, vocab_size, torch.bfloat16)
    labels = make_labels(rows, vocab_size)
    if dim == 0:
        student, teacher = student.t().contiguous(), teacher.t().contiguous()
    keywords = {"divergence": divergence, "reduction": "none", "hard_weight": 0.5, "dim": dim}
    loss, gradient = run(distillation_loss, student, teacher, labels, **keywords)

    row_dim = 1 - dim
    logits = repeated(student, copies, row_dim)
    produced = Produced.apply(torch.ones((), requires_grad=True), logits)
    large = distillation_loss(
        produced, repeated(teacher, copies, row_dim), labels.repeat(copies), inplace=True, **keywords
    )
    large.backward(torch.ones_like(large))
    assert torch.equal(large.detach().view(copies, rows), loss.expand(copies, rows))
    for copy in {0, 1, copies // 2, copies - 2, copies - 1}:
        assert torch.equal(logits.narrow(row_dim, copy * rows, rows), gradient)
