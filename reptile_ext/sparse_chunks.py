"""`sparse_distillation_loss` by torch's own operations, with no copy of [N, V] in float32: some rows at a time. Of
classes that are sharded over the processes of a group.

What is computed first is the row of few classes that a tail compares (reference.py): the student's logits at the K
listed classes and one number for all others. With a group, each listed class comes from the process that has it, and
the number is added up over the processes; from there on every process does the same, and each has the gradient of its
own classes. So O(N · K) numbers are communicated, and nothing in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import compat, reference
from .distributed import agree_on_classes, refuse_second_derivative
from .options import TAILS, Options

_CHUNK_BYTES = 1 << 24  # of a copy of logits in the dtype of the arithmetic


class Shard(NamedTuple):
    """What is the same for all rows of a process's classes [N, V_own]."""

    ids: Tensor  # [N, K] of its own classes, −1 for others'
    label: Tensor | None  # [N], −1 for others' and for ignored rows
    counted: Tensor  # [N]: an ignored row is not read
    options: Options
    dtype: torch.dtype  # of the arithmetic
    group: Any  # None: this process has all classes


def _chunks(student: Tensor, shard: Shard) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, their logits in the dtype of the arithmetic, and which of these are listed."""
    rows = max(1, _CHUNK_BYTES // max(1, student.shape[1] * shard.dtype.itemsize))
    for start in range(0, student.shape[0], rows):
        part = slice(start, start + rows)
        s = torch.where(shard.counted[part].unsqueeze(-1), student[part].to(shard.dtype), 0.0)
        ids = shard.ids[part]
        listed = s.new_zeros(s.shape[0], s.shape[1] + 1, dtype=torch.bool)  # one class more, for those of others
        listed.scatter_(1, torch.where(ids < 0, s.shape[1], ids), True)
        yield part, s, listed[:, :-1]


def _at(s: Tensor, index: Tensor) -> Tensor:
    """s at indices [n, k], −inf where they are −1."""
    if s.shape[1] == 0:
        return s.new_full(index.shape, -torch.inf)
    return torch.where(index < 0, -torch.inf, s.gather(1, index.clamp(min=0)))


def _largest(s: Tensor) -> Tensor:
    """The largest of each row, +inf for a NaN, which a maximum over processes may lose; −inf of none."""
    if s.shape[1] == 0:
        return s.new_full((s.shape[0],), -torch.inf)
    top = s.amax(-1)
    return torch.where(top.isnan(), torch.inf, top)


def _log_of_sum(top: Tensor, total: Tensor) -> Tensor:
    """From reference points and sums over all processes; NaN of a broken row, −inf of nothing."""
    found = torch.where(total == 0, 1.0, total).log() + torch.where(top == -torch.inf, 0.0, top)
    return torch.where(top == torch.inf, torch.nan, torch.where(total == 0, -torch.inf, found))


class Few(torch.autograd.Function):
    """Of the student's classes in all processes, in float64: [N, K + 1], logits over T_s of the listed classes and the
    logarithm of the sum of the others' exponentials; and for hard labels [N, 3], the logarithm of the sum of all
    exponentials at T = 1, the label's logit, and the mean of the logits that are not masked."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        n, k = shard.ids.shape
        t, hard = shard.options.student_temperature, shard.label is not None
        maxima = student.new_full((n, k + 3), -torch.inf, dtype=torch.float64)
        for part, s, listed in _chunks(student, shard):
            at_ids = _at(s, shard.ids[part])
            maxima[part, :k] = torch.where(at_ids.isnan(), torch.inf, at_ids).double()
            maxima[part, k] = _largest(s.masked_fill(listed, -torch.inf) / t).double()
            if shard.label is not None:
                maxima[part, k + 1] = _largest(s).double()
                maxima[part, k + 2] = _at(s, shard.label[part].unsqueeze(-1)).squeeze(-1).double()
        if shard.group is not None:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
        tops = torch.where(maxima[:, k : k + 2].isfinite(), maxima[:, k : k + 2], 0.0).to(shard.dtype)
        sums = maxima.new_zeros(n, 4)
        for part, s, listed in _chunks(student, shard):
            rest = s.masked_fill(listed, -torch.inf) / t
            sums[part, 0] = (rest - tops[part, :1]).exp().sum(-1, dtype=torch.float64)
            if hard:
                sums[part, 1] = (s - tops[part, 1:]).exp().sum(-1, dtype=torch.float64)
                masked = s == -torch.inf
                sums[part, 2] = s.masked_fill(masked, 0.0).sum(-1, dtype=torch.float64)
                sums[part, 3] = (~masked).sum(-1)
        if shard.group is not None:
            dist.all_reduce(sums, group=shard.group)
        others = _log_of_sum(maxima[:, k], sums[:, 0])
        few = torch.cat([maxima[:, :k] / t, others.unsqueeze(-1)], -1)
        log_z = _log_of_sum(maxima[:, k + 1], sums[:, 1]) if hard else torch.zeros_like(others)
        of_label = torch.stack([log_z, maxima[:, k + 2], sums[:, 2] / sums[:, 3].clamp(min=1)], -1)
        ctx.shard, ctx.counts = shard, sums[:, 3].clamp(min=1)
        ctx.save_for_backward(student, others, log_z)
        return few, of_label

    @staticmethod
    def backward(ctx: Any, of_few: Tensor, of_label: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() or compat.is_batched(of_few):
            refuse_second_derivative()
        student, others, log_z = ctx.saved_tensors
        shard: Shard = ctx.shard
        t, k = shard.options.student_temperature, shard.ids.shape[1]
        student = student.detach()
        gradient = student if shard.options.inplace else torch.empty_like(student)
        finite = [torch.where(x == -torch.inf, 0.0, x).to(shard.dtype).unsqueeze(-1) for x in (others, log_z)]
        factors = torch.cat([of_few[:, k:] / t, of_label[:, :1], of_label[:, 2:] / ctx.counts.unsqueeze(-1)], -1)
        factors = factors.to(shard.dtype)
        broken = others.isnan() | of_few.isnan().any(-1)
        for part, s, listed in _chunks(student, shard):
            g = (s / t - finite[0][part]).exp().masked_fill_(listed, 0.0) * factors[part, :1]
            here = shard.ids[part]
            wide = torch.cat([g, g.new_zeros(g.shape[0], 1)], -1)  # one class more, for those of others
            wide.scatter_(1, torch.where(here < 0, g.shape[1], here), (of_few[part, :k] / t).to(g.dtype))
            if shard.label is not None:
                wide[:, :-1] += (s - finite[1][part]).exp() * factors[part, 1:2]
                wide[:, :-1] += torch.where(s == -torch.inf, 0.0, factors[part, 2:])
                label = shard.label[part].unsqueeze(-1)
                wide.scatter_add_(1, torch.where(label < 0, g.shape[1], label), of_label[part, 1:2].to(g.dtype))
            g = torch.where(broken[part].unsqueeze(-1), torch.nan, wide[:, :-1])
            gradient[part] = torch.where(shard.counted[part].unsqueeze(-1), g, 0.0).to(gradient.dtype)
        return gradient, None


@compat.not_compiled  # collectives: the compiler leaves them as they are
def vocabulary_parallel_sparse_loss(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    group: Any,
) -> Tensor:
    """`sparse_distillation_loss` of checked arguments, the student's classes sharded over `group`."""
    options = options._replace(dim=options.dim % student.dim())
    classes = agree_on_classes(student, (indices, log_probs), labels, weight, options, group)
    given = (student, indices, log_probs, labels, weight, denominator, options)
    return loss_in_chunks(*given, student.device.type == "cpu", group, *classes)


def loss_in_chunks(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    may_check: bool,
    group: Any = None,
    first: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """The same of the classes from `first` on, of `vocab_size`; None: these are all."""
    vocab_size = student.shape[options.dim] if vocab_size is None else vocab_size
    own = student.movedim(options.dim, -1)
    leading, n = own.shape[:-1], math.prod(own.shape[:-1])
    own = own.reshape(n, own.shape[-1])
    double = torch.float64 in (student.dtype, log_probs.dtype)
    # Rows of all classes, of which the shape alone is used.
    shape = student.new_empty(1, dtype=torch.float64).expand(n, vocab_size)
    labels, w, counted, wrong = reference._rows_that_count(shape, labels, weight, options, may_check)
    teacher, wrong_list = reference._sparse_rows(shape, indices, log_probs, counted, options, may_check)

    def of_own(x: Tensor) -> Tensor:
        x = x - first
        return torch.where((x >= 0) & (x < own.shape[1]), x, -1)

    own_ids = torch.where(teacher.ids < 0, -1, of_own(teacher.ids))
    own_label = None
    if options.hard_weight > 0:
        assert labels is not None
        own_label = torch.where(counted, of_own(labels), -1)
    shard = Shard(own_ids, own_label, counted, options, torch.float64 if double else torch.float32, group)
    few, of_label = Few.apply(own, shard)  # type: ignore[no-untyped-call]
    losses: Tensor = few.new_zeros(n)
    if options.soft_scale > 0:
        tail = TAILS[options.tail]
        of_teacher = reference.few_classes_of_teacher(teacher, tail, vocab_size, few.detach()[:, -1])
        # A broken row is NaN whatever its tail looks at.
        broken = few.detach()[:, -1].isnan() | (few.detach() == torch.inf).any(-1)
        few = few * torch.where(broken, torch.nan, 1.0).unsqueeze(-1)
        if tail == "restrict":
            few = torch.cat([few[:, :-1], torch.full_like(few[:, -1:], -torch.inf)], -1)
        losses = reference.loss_of_few_classes(few, of_teacher, teacher, options)
        losses = torch.where(teacher.is_cut & broken, torch.nan, losses)
    if options.hard_weight > 0:
        log_z, at_label, mean = of_label.unbind(-1)
        smoothing = options.label_smoothing
        hard = log_z - at_label if smoothing == 0 else (1 - smoothing) * (log_z - at_label) + smoothing * (log_z - mean)
        losses = losses + options.hard_weight * (hard if smoothing < 1 else log_z - mean)
    losses = torch.where(counted, w * losses, 0.0) * torch.where(wrong | wrong_list, torch.nan, 1.0)
    loss = reference._reduced(losses.reshape(leading), w, counted, denominator, options, may_check)
    return loss.to(shard.dtype)
