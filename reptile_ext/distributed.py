"""Vocabulary-parallel losses: each process of a group holds a range of the classes of both logits.

A loss is made of two halves, `row_stats` and `row_gradient` (csrc/rows.h). Here the processes combine what the first
half finds of their own classes, and each goes on to the second half with the result:

    maxima          of each row, the largest over the processes
    sums            over the classes, from the common maxima, added up
    mixture sums    of divergences that go through a mixture of both distributions, added up
    loss, gradient  from these: the same loss in every process, and the gradient of the process's own classes

So a call communicates some 15 numbers a row, however many classes there are, and its backward pass nothing. The
gradient is neither summed nor averaged over the processes: all of them have the same loss, and each its own classes.
"""

from __future__ import annotations

import math
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from . import _C, autograd, compat, ops, reference
from .options import KERNELS, REDUCTIONS, Options

__all__ = ["own_classes", "vocabulary_parallel_loss"]

_MEAN, _NONE, _SUM = (REDUCTIONS.index(name) for name in ("mean", "none", "sum"))
_THROUGH_MIXTURE = frozenset(KERNELS.index(name) for name in _C.through_mixture())
_NO_LABEL_IS_IGNORED = -(2**63)  # ignored rows have weight 0 already
_ELSEWHERE, _WRONG = -1, -2  # labels, as the operators take them: of another process's class; of no class


class Ranges(NamedTuple):
    """Which classes this process holds."""

    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None  # of each process, student's and teacher's; None on a GPU
    first: Tensor  # 0-d: the first class of this process
    vocab_size: Tensor  # 0-d: how many classes are compared, over all processes
    agree: Tensor  # 0-d: whether the processes were called alike


def check_group(group: Any) -> Any:
    """A process group that this process is in.

    Raises:
        TypeError: something else; ValueError: this process is not in it.
    """
    if dist.is_available() and (
        group is dist.GroupMember.NON_GROUP_MEMBER
        or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0)
    ):
        raise ValueError("group must have this process in it; got one that this process is not a member of")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        wanted = "a torch.distributed.ProcessGroup (of a DeviceMesh, mesh.get_group())"
        raise TypeError(f"group must be {wanted} or None; got {type(group).__name__}")
    return group


# ------------------------------------------------------------------------------------------------------- DTensor


def is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it was not imported there is no DTensor
    return module is not None and isinstance(x, module.DTensor)


def own_classes(
    logits: tuple[Any, Any], constants: tuple[Any, Any, Any], dim: int, group: Any
) -> tuple[Any, Any, tuple[Any, Any, Any], Any]:
    """Student's and teacher's logits and the constants, with the local part of each DTensor in its place, and the group
    that the classes are sharded over; None: each process has all of them.

    Raises:
        ValueError: DTensors that are not sharded over their classes alone, or not alike; the message says what to do.
    """
    if group is not None:
        check_group(group)
    names = ("labels", "weight", "denominator")
    labels, weight, denominator = map(_whole_rows, names, constants)
    named = dict(zip(("student_logits", "teacher_logits"), logits, strict=True))
    sharded = {name: x for name, x in named.items() if is_dtensor(x) and not _is_replicated(x)}
    if sharded and group is not None:
        name = next(iter(sharded))
        raise ValueError(f"{name} is a sharded DTensor, which says its group itself; got a group too: pass group=None")
    for name, x in sharded.items():
        group = _group_of_classes(name, x, dim)
    if len(sharded) == 1:
        name, other = next(iter(sharded)), next(x for x in named if x not in sharded)
        raise ValueError(
            f"{other} must be a DTensor sharded as {name} is, {tuple(sharded[name].placements)}; got "
            f"{'a replicated DTensor' if is_dtensor(named[other]) else 'a plain tensor'}: distribute it, or pass "
            f"{name}.full_tensor()"
        )
    if sharded and (logits[0].device_mesh != logits[1].device_mesh or logits[0].placements != logits[1].placements):
        raise ValueError(
            f"teacher_logits must be sharded as student_logits is, {tuple(logits[0].placements)} on "
            f"{logits[0].device_mesh}; got {tuple(logits[1].placements)} on {logits[1].device_mesh}"
        )
    student, teacher = (x.to_local(grad_placements=x.placements) if is_dtensor(x) else x for x in logits)
    return student, teacher, (labels, weight, denominator), group


def _is_replicated(x: Any) -> bool:
    return all(placement.is_replicate() for placement in x.placements)


def _whole_rows(name: str, x: Any) -> Any:
    if not is_dtensor(x):
        return x
    if not _is_replicated(x):
        raise ValueError(
            f"{name} must be the same in every process; got a DTensor with placements {tuple(x.placements)}: pass "
            f"{name}.full_tensor()"
        )
    return x.to_local()


def _group_of_classes(name: str, x: Any, dim: int) -> Any:
    """The group of the mesh dimension that the classes are sharded over."""
    class_dim, found = dim % max(x.ndim, 1), None
    for mesh_dim, placement in enumerate(x.placements):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise ValueError(
                f"{name} is a DTensor of sums that are still to be added up, {tuple(x.placements)}: pass "
                f"{name}.full_tensor(), or redistribute it over the classes"
            )
        if not placement.is_shard(class_dim):
            raise ValueError(
                f"{name} is a DTensor sharded over its rows, {tuple(x.placements)}: pass {name}.to_local(), and the "
                "labels of those rows; each process's loss is then that of its own rows (denominator= divides by a "
                "count of all)"
            )
        if found is not None:
            raise ValueError(
                f"{name} is a DTensor whose classes are sharded over two dimensions of its mesh, "
                f"{tuple(x.placements)}: redistribute it over one, or pass {name}.full_tensor()"
            )
        found = x.device_mesh.get_group(mesh_dim)
    return found


# ------------------------------------------------------------------------------------------------------ the loss


def _from_all(x: Tensor, group: Any) -> list[Tensor]:
    """This tensor of every process, in the order of their ranks."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, x, group=group)
    return everyone


def _num_rows(logits: Tensor, dim: int) -> int:
    return math.prod(size for d, size in enumerate(logits.shape) if d != dim)


def _checksum(x: Tensor | None, device: torch.device) -> Tensor:
    if x is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    bits = x.reshape(-1).to(torch.float64).view(torch.int64)
    position = torch.arange(1, bits.numel() + 1, device=device)
    return (bits ^ (bits >> 17)).mul(2 * position + 1).sum()


def _agree_on_ranges(
    student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor | None, options: Options, group: Any
) -> Ranges:
    """Exchange how many classes each process holds, and what has to be the same in all of them."""
    device, rank, dim = student.device, dist.get_rank(group), options.dim
    same = (
        (_num_rows(student, dim), "rows"),
        (zlib.crc32(repr((options._replace(inplace=False), labels is None, weight is None)).encode()), "options"),
    )
    mine = torch.tensor([student.shape[dim], teacher.shape[dim], *(value for value, _ in same)], device=device)
    # Labels and weights have to be the same everywhere; logits that are the same have not been sharded.
    first_row = tuple(slice(None) if d == dim else slice(1) for d in range(student.dim()))
    checks = torch.stack(
        [_checksum(x, device) for x in (labels, weight, student.detach()[first_row], teacher.detach()[first_row])]
    )
    mine = torch.cat([mine, checks])
    everyone = torch.stack(_from_all(mine, group))
    of_student, of_teacher = everyone[:, 0], everyone[:, 1]
    starts = (of_student.cumsum(0) - of_student, of_teacher.cumsum(0) - of_teacher)
    compared = torch.minimum(of_student, of_teacher)
    # Where a process compares classes, its two ranges begin at the same class; and no class is left out.
    fits = ((starts[0] == starts[1]) | (compared == 0)).all()
    alike = (everyone[:, 2:6] == everyone[0, 2:6]).all()
    vocab_size = torch.minimum(of_student.sum(), of_teacher.sum())
    agree = fits & alike & (vocab_size == compared.sum()) & (vocab_size > 0)
    if not options.truncate:
        agree = agree & (of_student == of_teacher).all()
    sizes = None
    if device.type == "cpu":  # elsewhere a look would make the host wait; there the loss becomes NaN
        sizes = (tuple(of_student.tolist()), tuple(of_teacher.tolist()))
        _complain(everyone, sizes, bool(agree), options, [what for _, what in same], rank)
    return Ranges(sizes, starts[0][rank], vocab_size, agree)


def agree_on_classes(
    student: Tensor,
    teacher: tuple[Tensor, Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
    group: Any,
) -> tuple[int, int]:
    """Of a sparse teacher, which is the same in every process: the first of the student's classes that this process
    holds, and how many there are in all. (On a GPU the host waits for these two.)"""
    options = options._replace(truncate=True)
    ranges = _agree_on_ranges(student, student, labels, weight, options, group)
    sums = torch.stack([_checksum(x, student.device) for x in teacher])
    if not bool((torch.stack(_from_all(sums, group)) == sums).all()):
        raise ValueError("every process of group must have the same teacher_indices and teacher_log_probs; they differ")
    return int(ranges.first), int(ranges.vocab_size)


def refuse_second_derivative(function: str = "sparse_distillation_loss", gathered: str = "logits") -> NoReturn:
    raise RuntimeError(
        f"{function}(group=...) has no double backward, and takes no batch of gradients: gather the student's "
        f"{gathered} for these"
    )


def _complain(
    everyone: Tensor,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    agree: bool,
    options: Options,
    same: list[str],
    rank: int,
) -> None:
    if len(everyone) > 1 and min(*sizes[0], *sizes[1]) > 1 and bool((everyone[:, 6:] == everyone[0, 6:]).all()):
        warnings.warn(
            "all processes of group hold the same first row of student_logits and of teacher_logits: group is for "
            "logits whose classes are sharded over its processes; where each process has all classes, pass group=None",
            stacklevel=5,
        )
    for i, what in enumerate([*same, "labels", "weights"], start=2):
        column = everyone[:, i].tolist()
        if len(set(column)) > 1:
            values = f": {column}" if what == "rows" else ""
            raise ValueError(f"every process of group must have the same {what}; they differ{values}")
    if agree:
        return
    if not options.truncate and sizes[0] != sizes[1]:
        raise ValueError(
            f"the processes of group hold {list(sizes[0])} classes of student_logits and {list(sizes[1])} of "
            "teacher_logits; each needs the same number of both, or pass vocab='truncate' to compare the classes they "
            "share"
        )
    if sum(sizes[0]) == 0 or sum(sizes[1]) == 0:
        raise ValueError("student_logits and teacher_logits need at least one class in some process of group; got none")
    raise ValueError(
        f"the processes of group hold {list(sizes[0])} classes of student_logits and {list(sizes[1])} of "
        "teacher_logits: with vocab='truncate' both ranges of a process must begin at the same class, so only the last "
        "that has classes may hold different numbers"
    )


@dataclass
class Call:
    """What the halves of a loss are called with in every process, and the row stats that they found."""

    labels: Tensor | None  # counted from this process's first class
    weight: Tensor | None
    denominator: Tensor
    options: Options  # reduction "none" or "sum"
    group: Any
    whole: Whole
    stats: tuple[Tensor, ...] = ()
    exchanged: Call | None = None  # with the roles exchanged, for a trainable teacher

    def numbers(self) -> tuple[Any, ...]:
        return ops.numbers(self.options)

    def find_stats(self, student: Tensor, teacher: Tensor) -> None:
        """Maxima, sums and mixture sums of the rows, over the classes of all processes."""
        given = (student, teacher, self.labels, self.weight, None, None, *self.numbers())
        maxima = ops.row_stats(*given, None, None)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group)
        sums = ops.row_stats(*given, maxima, None)
        dist.all_reduce(sums, group=self.group)
        if self.options.soft_scale > 0 and self.options.divergence in _THROUGH_MIXTURE:
            mixture_sums = ops.row_stats(*given, maxima, sums)
            dist.all_reduce(mixture_sums, group=self.group)
        else:
            mixture_sums = sums.new_zeros(sums.shape[0], ops.ROW_STATS_SIZES[2])
        self.stats = (maxima, sums, mixture_sums)

    def second_half(self, student: Tensor, teacher: Tensor, grad_output: Tensor | None, how: str) -> Tensor:
        """By `how`: "loss"; "gradient"; or "in place", the gradient over the student's logits."""
        given = (student, teacher, self.labels, self.weight, self.denominator, grad_output, *self.numbers())
        if how == "in place":
            ops.row_gradient_(*given, *self.stats)
            torch.autograd.graph.increment_version(student)
            return student.detach()
        return ops.row_gradient(*given, *self.stats, how == "gradient")[how == "gradient"]


class VocabularyParallelLoss:
    """`autograd.Loss` of (student, teacher), each process's own classes.

    The gradient is computed in the backward pass, from the row stats, which takes no communication.
    """

    names: ClassVar[tuple[str, ...]] = ("student_logits", "teacher_logits")

    @staticmethod
    def forward(
        call: Call, tensors: tuple[Any, ...], constants: autograd.Constants, needed: Sequence[bool]
    ) -> tuple[Tensor, Any]:
        student, teacher = tensors
        call.find_stats(student, teacher)
        # A trainable teacher's too, now: were it left to the backward pass, a process that runs none would hold up the
        # others.
        options = call.options.exchanged() if needed[1] and call.options.soft_scale > 0 else None
        if options is not None:
            call.exchanged = replace(call, options=options, stats=())
            call.exchanged.find_stats(teacher, student)
        return call.second_half(student, teacher, None, "loss"), None

    @staticmethod
    def by_kernel(
        call: Call,
        tensors: tuple[Any, ...],
        constants: autograd.Constants,
        grad_output: Tensor,
        needed: Sequence[bool],
    ) -> autograd.Gradients:
        student, teacher = tensors
        of_student = of_teacher = None
        if needed[1] and call.exchanged is not None:
            of_teacher = call.exchanged.second_half(teacher, student, grad_output, "gradient")
        elif needed[1] and call.options.soft_scale > 0:  # no kernel has it
            of_teacher = autograd.by_reference(
                VocabularyParallelLoss, call, tensors, constants, grad_output, (False, True)
            )[1]
        elif needed[1]:
            of_teacher = torch.zeros_like(teacher)
        if needed[0]:
            how = "in place" if call.options.inplace else "gradient"
            of_student = call.second_half(student, teacher, grad_output, how)
        return of_student, of_teacher

    @staticmethod
    def reference(call: Call, tensors: tuple[Any, ...], constants: autograd.Constants) -> Tensor:
        return call.whole.loss(*tensors)

    @staticmethod
    def keep(call: Call, gradients: autograd.Gradients, tensors: tuple[Any, ...], constants: autograd.Constants) -> Any:
        raise NotImplementedError("nothing is kept")

    @staticmethod
    def scaled(call: Call, kept: Any, grad_output: Tensor, is_ours: bool) -> autograd.Gradients:
        raise NotImplementedError("nothing is kept")

    @staticmethod
    def config_of(given: Mapping[str, Any]) -> Any:
        raise NotImplementedError("in traced programs there is no operator of this loss")


@compat.not_compiled  # collectives between operators: the compiler leaves them as they are
def vocabulary_parallel_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    options: Options,
    group: Any,
    by_reference: bool,
) -> Tensor:
    """`distillation_loss` of checked arguments, classes sharded over `group`; `by_reference`: in plain PyTorch."""
    options = options._replace(dim=options.dim % student.dim())
    ranges = _agree_on_ranges(student, teacher, labels, weight, options, group)
    whole = Whole(ranges, labels, weight, denominator, options, group)
    if by_reference:
        return whole.loss(student, teacher)
    own_labels, weights = _own_rows(
        ranges, labels, weight, options, min(student.shape[options.dim], teacher.shape[options.dim])
    )
    divisor = _divisor(weights, denominator, options, student)
    if ranges.sizes is None:
        divisor = torch.where(ranges.agree, divisor, torch.nan)
    of_rows = options._replace(
        reduction=_NONE if options.reduction == _NONE else _SUM, ignore_index=_NO_LABEL_IS_IGNORED
    )
    call = Call(own_labels, weights, divisor, of_rows, group, whole)
    if not (torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)):
        return VocabularyParallelLoss.forward(call, (student, teacher), (None, None, None), (False, False))[0]
    loss: Tensor = autograd.Fused.apply(VocabularyParallelLoss, call, None, None, None, student, teacher)  # type: ignore[no-untyped-call]
    return loss


def _own_rows(
    ranges: Ranges, labels: Tensor | None, weight: Tensor | None, options: Options, num_classes: int
) -> tuple[Tensor | None, Tensor | None]:
    """Labels counted from this process's first class, and weights that are 0 in ignored rows."""
    weights = None if weight is None else weight.detach().reshape(-1).to(torch.float64)
    if labels is None:
        return None, weights
    labels = labels.reshape(-1).to(torch.int64)
    counts = labels != options.ignore_index
    if weights is not None:
        counts = counts & (weights != 0)
    weights = torch.where(counts, 1.0 if weights is None else weights, 0.0).to(torch.float64)
    wrong = counts & ((labels < 0) | (labels >= ranges.vocab_size))
    if labels.device.type == "cpu" and bool(wrong.any()):
        raise ValueError(
            f"labels must lie in [0, {int(ranges.vocab_size)}) or equal ignore_index={options.ignore_index}; got "
            f"{labels[wrong][0].item()}"
        )
    own = labels - ranges.first
    own = torch.where((own >= 0) & (own < num_classes), own, _ELSEWHERE)
    return torch.where(wrong, _WRONG, own), weights


def _divisor(weights: Tensor | None, denominator: float | Tensor | None, options: Options, student: Tensor) -> Tensor:
    """What the sum over the rows is divided by; 1 if no row counts, so that the loss is 0."""
    if weights is None:
        rows = float(_num_rows(student, options.dim))
        count = torch.full((), rows, dtype=torch.float64, device=student.device)
    else:
        count = weights.sum()
    divisor = count
    if denominator is not None:
        divisor = torch.as_tensor(denominator, dtype=torch.float64).detach().to(student.device)
        if student.device.type == "cpu" and count > 0 and not 0 < float(divisor) < torch.inf:
            raise ValueError(f"denominator must be positive and finite; got {float(divisor)}")
    elif options.reduction != _MEAN:
        divisor = torch.ones_like(count)
    return torch.where(count == 0, 1.0, divisor)


# ------------------------------------------------------------------------------------------- derivatives of derivatives


class _Gathered(torch.autograd.Function):
    """The classes of all processes, in each of them. What follows is the same in all of them, and so is the gradient
    that comes back: each takes its own classes of it, and nothing is added up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: tuple[int, ...], dim: int, group: Any) -> Tensor:
        ctx.of = (sizes, dim, group)
        return _gather(own, *ctx.of)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Own.apply(gradient, *ctx.of), None, None, None  # type: ignore[no-untyped-call]


class _Own(torch.autograd.Function):
    """The other way round: a process's own classes."""

    @staticmethod
    def forward(ctx: Any, all_classes: Tensor, sizes: tuple[int, ...], dim: int, group: Any) -> Tensor:
        ctx.of, rank = (sizes, dim, group), dist.get_rank(group)
        return all_classes.narrow(dim, sum(sizes[:rank]), sizes[rank]).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Gathered.apply(gradient, *ctx.of), None, None, None  # type: ignore[no-untyped-call]


def _gather(own: Tensor, sizes: tuple[int, ...], dim: int, group: Any) -> Tensor:
    own = own.detach().movedim(dim, 0).contiguous()
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: own.shape[0]] = own
    parts = [part[:size] for part, size in zip(_from_all(padded, group), sizes, strict=True)]
    return torch.cat(parts).movedim(0, dim)


class Whole(NamedTuple):
    """The loss in plain PyTorch, of all classes: for derivatives of derivatives. It gathers the logits, which the loss
    itself and its first derivative never do."""

    ranges: Ranges
    labels: Tensor | None
    weight: Tensor | None
    denominator: float | Tensor | None
    options: Options
    group: Any

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.options.inplace and torch.is_grad_enabled():
            raise RuntimeError(
                "distillation_loss(inplace=True) supports one backward pass and no double backward; pass inplace=False"
            )
        sizes, dim = self.ranges.sizes, self.options.dim
        if sizes is None:  # here a look is worth the wait
            mine = torch.tensor([student.shape[dim], teacher.shape[dim]], device=student.device)
            of_student, of_teacher = torch.stack(_from_all(mine, self.group)).t().tolist()
            sizes = (tuple(of_student), tuple(of_teacher))
        student, teacher = (
            _Gathered.apply(x, size, dim, self.group)  # type: ignore[no-untyped-call]
            for x, size in zip((student, teacher), sizes, strict=True)
        )
        options = self.options._replace(truncate=True, inplace=False)
        rows = (self.labels, self.weight, self.denominator)
        return reference.with_options(student, teacher, *rows, options, check_values=False)
