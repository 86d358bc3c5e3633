"""The fused linear loss: from hidden states and head to the loss, with the logits of a few rows at a time.

Logits of N rows and V classes, their gradient and what plain PyTorch keeps between are what distillation needs its
memory for. Here rows go through in chunks: both products, the fused loss in place on the student's logits, and the
products back to the gradients of hidden states, head and bias, all in the forward pass. Nothing of size N·V exists.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .arguments import FLOATING, REDUCTIONS, Options, check_linear, check_memory_budget, check_rows, make_options
from .functional import for_operators, has_kernels, raise_better, warn_once

__all__ = ["linear_distillation_loss", "release_scratch"]

_NONE, _MEAN, _SUM = (REDUCTIONS.index(name) for name in ("none", "mean", "sum"))

# How many rows there are logits of at a time, unless a budget is asked for. On the CPU products of fewer take their
# time to read the head, and more fit no cache; all sizes as measured (docs/performance.md).
DEFAULT_BUDGET = 120 << 20  # bytes of logits
KEPT_AT_MOST = 256 << 20  # bytes: enough for the smallest chunks of 170,000 classes in 16 bits
STUDENT_ROWS = 512
TEACHER_ROWS = 256, 1024  # at least, at most
GPU_BUDGET_SHARE = 128  # of a GPU's memory, one part in so many
SMALLEST_GPU_CHUNK = 2048
# What the CPU's products are done in.
CLASSES_OF_A_PRODUCT = 1024  # logits in float32
BLOCK = 1024  # rows, columns and inner elements of the products that `_product_in_float32` does at a time
HALVED = range(384, 768)  # sizes of hidden states whose gradients in 16 bits take half the time in two halves
CLASSES_OF_A_SUM = 4096
# Gradients of a 16-bit head are added up in float32, but for so many chunks by products that add in float32 and round
# the sum to 16 bits. That has the error of 1.6 roundings; a float32 sum costs as much as a tenth of all products.
CHUNKS_IN_16_BITS = 4


class Side(NamedTuple):
    """How the logits of [N, H] hidden states come about. Of logits themselves, [..., V], `weight` is None, and `rows`
    says which of them count, if not all of a matrix."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    rows: Tensor | None = None

    def cut(self, vocab_size: int) -> Side:
        """The first `vocab_size` classes alone, which are then the only ones computed."""
        if self.weight is None:
            return self._replace(hidden=self.hidden[..., :vocab_size])
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)

    def num_classes(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def bytes_of_logits(self) -> int:
        """A row's in a buffer for the product."""
        return 0 if self.weight is None else self.num_classes() * self.hidden.dtype.itemsize

    def bytes_of_copies(self, needs_grad: bool) -> int:
        """What `logits_of` and `slope` allocate a row."""
        wide = 8 if self.hidden.dtype == torch.float64 else 4
        copies = wide * ((self.softcap is not None) + (self.softcap is not None and needs_grad))
        if self.weight is None:
            copies += self.hidden.dtype.itemsize * (self.rows is not None)
            copies += wide * (self.scale != 1.0 and self.softcap is None)
        return self.num_classes() * copies

    def where(self, rows: slice) -> Any:
        """Where rows of logits lie: an index."""
        if self.rows is None:
            return rows
        rest, index = self.rows[rows], []
        for size in reversed(self.hidden.shape[:-1]):  # torch.unravel_index would copy from the host to a GPU
            index.append(rest % size)
            rest = rest // size
        return tuple(reversed(index))

    def product(self, rows: slice, out: Tensor) -> Tensor:
        """Logits of some rows of hidden states, without the softcap, in `out`."""
        assert self.weight is not None
        hidden = self.hidden[rows]
        z = out[: hidden.shape[0]]
        blocks = z.device.type == "cpu" and z.dtype == torch.float32
        for classes in chunks(0, z.shape[1], CLASSES_OF_A_PRODUCT if blocks else z.shape[1]):
            bias = None if self.bias is None else self.bias[classes]
            _product(hidden, self.weight[classes].t(), self.scale, z[:, classes], bias)
        return z

    def logits_of(self, rows: slice, product: Tensor | None, of_product: slice) -> Tensor:
        """Of some rows; with a softcap, or a scale of logits that were given, in float32 (float64)."""
        z = self.hidden[self.where(rows)] if product is None else product[of_product]
        scale = self.scale if product is None else 1.0
        if self.softcap is None:
            return z if scale == 1.0 else _wide(z, scale)
        return _wide(z, scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z: Tensor, out: Tensor | None) -> Tensor | None:
        """Of the softcap, from what it made of logits; 0 where rows are out, whatever they hold."""
        if self.softcap is None:
            return None
        slope = (z / self.softcap).square_().neg_().add_(1)
        return slope if out is None else slope.masked_fill_(out.unsqueeze(1), 0.0)


def _wide(z: Tensor, factor: float) -> Tensor:
    """A copy in float32 (float64), times a factor."""
    return z * factor if z.dtype in (torch.float32, torch.float64) else z.float().mul_(factor)


def has_product(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a 16-bit dtype by instructions of this processor (oneDNN does; bfloat16
    needs AVX-512, AMX or the like), and not by plain loops, which are 5 to 70 times slower than float32 and make a
    float32 copy of some results."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except AttributeError:  # a torch without oneDNN
        return False


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """out = scale · (a b + bias), or with `add` (and no bias) out += scale · a b; rounded once."""
    if out.device.type == "cpu" and out.dtype.itemsize == 2 and not has_product(out.dtype):
        _product_in_float32(a, b, scale, out, bias, add)
    elif add:
        out.addmm_(a, b, alpha=scale)
    elif bias is None and scale == 1.0:
        torch.mm(a, b, out=out)  # addmm would copy `out` first, to multiply it by 0
    else:
        beta = 0.0 if bias is None else scale
        torch.addmm(out if bias is None else bias, a, b, beta=beta, alpha=scale, out=out)


def _product_in_float32(a: Tensor, b: Tensor, scale: float, out: Tensor, bias: Tensor | None, add: bool) -> None:
    """`_product` of 16-bit matrices on a processor that has no product of them: in float32, block by block, so that no
    float32 copy of a whole matrix exists."""
    for rows, columns in itertools.product(*(chunks(0, size, BLOCK) for size in out.shape)):
        block = out[rows, columns]
        total = torch.zeros(block.shape) if bias is None else bias[columns].float().repeat(block.shape[0], 1)
        for inner in chunks(0, a.shape[1], BLOCK):
            total.addmm_(a[rows, inner].float(), b[inner, columns].float())
        total.mul_(scale)
        block.copy_(total.add_(block) if add else total)


def chunks(first: int, last: int, most: int) -> list[slice]:
    """The rows from first to last in parts of at most `most`, of equal size but for one row."""
    count = -(-(last - first) // most)
    return [slice(first + (last - first) * i // count, first + (last - first) * (i + 1) // count) for i in range(count)]


def chunk_sizes(
    bytes_per_row: tuple[int, int], copies: int, alike: bool, memory_budget: int | None, device: torch.device
) -> tuple[int, int, int]:
    """How many rows there are logits of at a time: the student's, and the teacher's, which may be others, as they are
    not needed any more after the loss; and how many of these are looked at in one go, if that makes copies.

    bytes_per_row: of logits; copies: bytes a row. alike: both the same, so that equal models have equal logits: a
    product of other rows may be rounded otherwise. The default gives way to what products need to be fast; a budget
    that was asked for to nothing but a row.
    """
    of_student, of_teacher = bytes_per_row
    budget = memory_budget
    if budget is None:
        budget = DEFAULT_BUDGET
        if device.type == "cuda":
            budget = torch.cuda.get_device_properties(device).total_memory // GPU_BUDGET_SHARE
    at_once = max(budget // 4 // copies, 1) if copies else sys.maxsize
    budget -= budget // 4 if copies else 0
    if device.type != "cpu":
        rows = max(budget // (of_student + of_teacher), 1 if memory_budget else SMALLEST_GPU_CHUNK)
        return rows, rows, at_once
    rows, least = STUDENT_ROWS, TEACHER_ROWS[0]
    if memory_budget is not None:
        rows, least = max(min(budget // (of_student + of_teacher), STUDENT_ROWS), 1), 1
    of_rest = min(max((budget - rows * of_student) // max(of_teacher, 1), least), TEACHER_ROWS[1])
    if alike:
        rows = of_rest = min(rows, of_rest)
    return rows, of_rest, at_once


# To touch memory for the first time costs a process more than the loss does, so the CPU's scratch is kept for the next
# call, if it is not too large. A GPU's allocator does that by itself.
_kept: list[Tensor] = []


def release_scratch() -> None:
    """Give back the memory that the fused linear loss keeps between calls on the CPU, 256 MiB at most."""
    _kept.clear()


class Scratch:
    """Bytes that tensors are cut from, one after the other."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.used = 0
        # Tensors that are made within a dispatch mode may be none, such as fakes, and are of no use to others.
        self.lasts = device.type == "cpu" and torch._C._len_torch_dispatch_stack() == 0
        if self.lasts:
            try:  # one thread gets it
                self.bytes = _kept.pop()
                if self.bytes.numel() >= num_bytes:
                    return
            except IndexError:
                pass
        with torch.inference_mode(False):  # in such a mode it could not be written to outside
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    @staticmethod
    def size(*shape: int, dtype: torch.dtype) -> int:
        return -(-math.prod(shape) * dtype.itemsize // 64) * 64

    def cut(self, *shape: int, dtype: torch.dtype) -> Tensor:
        start, self.used = self.used, self.used + self.size(*shape, dtype=dtype)
        return self.bytes[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def give_back(self) -> None:
        if self.lasts and self.bytes.numel() <= KEPT_AT_MOST:
            _kept.append(self.bytes)
            del _kept[1:]
        del self.bytes


class Gradients:
    """Of one side's hidden states, head and bias: those that are needed, added up over the chunks."""

    def __init__(self, side: Side, needed: tuple[bool, bool, bool], vocab_size: int, out: Tensor | None) -> None:
        """out: rows whose hidden states must not be looked at: 0 · NaN is NaN."""
        self.side, self.vocab_size, self.out = side, vocab_size, out
        self.hidden = side.hidden.new_zeros(side.hidden.shape) if needed[0] else None
        self.needs_weight, self.needs_bias = needed[1:]
        # Sums over many chunks are not rounded to 16 bits in between.
        self.wide = torch.float64 if side.hidden.dtype == torch.float64 else torch.float32
        self.weight: Tensor | None = None  # of the classes that are compared, as the next two
        self.part: Tensor | None = None  # in 16 bits: the sum of a few chunks, rounded after each
        self.chunks_in_part = 0
        self.bias: Tensor | None = None

    def add_to_hidden(self, rows: slice, of_logits: Tensor) -> None:
        """From gradients with respect to the logits that are compared, before the softcap; as the next."""
        if self.hidden is None:
            return
        side = self.side
        if side.weight is None:
            g = (of_logits * side.scale if side.scale != 1.0 else of_logits).to(self.hidden.dtype)
            self.hidden[..., : self.vocab_size][side.where(rows)] = g
        else:
            hidden, head = self.hidden[rows], side.weight[: self.vocab_size]
            size, on_cpu = head.shape[1], head.device.type == "cpu"
            halves = 2 if on_cpu and head.dtype.itemsize == 2 and size in HALVED and has_product(head.dtype) else 1
            for part in chunks(0, size, -(-size // halves)):
                _product(of_logits, head[:, part], side.scale, hidden[:, part])

    def add_to_head(self, rows: slice, of_logits: Tensor) -> None:
        if self.needs_weight:
            hidden = self.side.hidden[rows]
            if self.out is not None:
                hidden = hidden.masked_fill(self.out[rows].unsqueeze(1), 0.0)
            self._add_to_weight(of_logits.t(), hidden, self.side.scale)
        if self.needs_bias:
            share = of_logits.sum(0, dtype=self.wide).mul_(self.side.scale)
            self.bias = share if self.bias is None else self.bias.add_(share)

    def _add_to_weight(self, g: Tensor, hidden: Tensor, scale: float) -> None:
        shape = (g.shape[0], hidden.shape[1])
        if self.wide == g.dtype:
            if self.weight is None:
                self.weight = g.new_empty(shape)
                _product(g, hidden, scale, self.weight)
            else:
                self.weight.addmm_(g, hidden, alpha=scale)
        elif g.is_cuda:
            if self.weight is None:
                self.weight = torch.mm(g, hidden, out_dtype=self.wide)
                if scale != 1.0:
                    self.weight.mul_(scale)
            else:
                try:
                    torch.addmm(self.weight, g, hidden, alpha=scale, out_dtype=self.wide, out=self.weight)
                except RuntimeError as error:
                    if "dtype" not in str(error):
                        raise
                    # Older versions want the sum in 16 bits too.
                    self.weight.add_(torch.mm(g, hidden, out_dtype=self.wide), alpha=scale)
        elif self.part is None:
            self.part, self.chunks_in_part = g.new_empty(shape), 1
            _product(g, hidden, scale, self.part)
        elif self.chunks_in_part < CHUNKS_IN_16_BITS:  # what is rounded is the new sum, not the product
            _product(g, hidden, scale, self.part, add=True)
            self.chunks_in_part += 1
        else:
            new = self.weight is None
            if new:
                self.weight = g.new_empty(shape, dtype=self.wide)
            assert self.weight is not None
            for classes in chunks(0, shape[0], CLASSES_OF_A_SUM):
                if new:
                    self.weight[classes] = self.part[classes]
                else:
                    self.weight[classes] += self.part[classes]
                _product(g[classes], hidden, scale, self.part[classes])
            self.chunks_in_part = 1

    def finished(self) -> list[Tensor | None]:
        of_weight = self.weight
        if self.part is not None:
            of_weight = self.part
            if self.weight is not None:
                for classes in chunks(0, of_weight.shape[0], CLASSES_OF_A_SUM):
                    of_weight[classes] = self.weight[classes].add_(of_weight[classes])
                self.weight = None
        return [
            self.hidden,
            self._whole(of_weight, self.side.weight) if self.needs_weight else None,
            self._whole(self.bias, self.side.bias) if self.needs_bias else None,
        ]

    def _whole(self, part: Tensor | None, like: Tensor | None) -> Tensor:
        """In the dtype and shape of what it is the gradient of: 0 for the classes that were not compared."""
        assert like is not None
        if part is not None and part.shape == like.shape:
            return part.to(like.dtype)
        whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        if part is not None:
            whole[: self.vocab_size] = part
        return whole


class Task(NamedTuple):
    """What is the same for all chunks."""

    options: Options  # reduction "none" or "sum"
    scale: float
    memory_budget: int | None
    softcaps: tuple[float | None, float | None]
    scales: tuple[float, float]

    def sides(self, tensors: tuple[Any, ...]) -> tuple[Side, Side]:
        student = Side(tensors[0], tensors[1], tensors[2], self.softcaps[0], self.scales[0])
        return student, Side(tensors[3], tensors[4], tensors[5], self.softcaps[1], self.scales[1])

    def computes_gradients_at_once(self, student_hidden: Tensor, needed: Sequence[bool]) -> bool:
        """In the forward pass: not where what comes from above has to be known first, nor for a teacher who learns."""
        one_factor = self.options.reduction != _NONE and student_hidden.dtype != torch.float16
        return one_factor and any(needed[:3]) and not any(needed[3:])

    def numbers(self) -> tuple[Any, ...]:
        """For the operator's schema, which knows no None among numbers."""
        caps = (cap or 0.0 for cap in self.softcaps)
        return (*self.options[:10], self.scale, self.memory_budget or 0, *caps, *self.scales)

    @staticmethod
    def of(numbers: Sequence[Any]) -> Task:
        options = Options._make((*numbers[:10], True, 1, False))
        budget, *others = numbers[11:]
        return Task(
            options, numbers[10], budget or None, (others[0] or None, others[1] or None), (others[2], others[3])
        )


def _run_chunks(
    task: Task,
    sides: tuple[Side, Side],
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_output: Tensor | None,
    needed: tuple[bool, ...],
    out: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """`run` of rows that are all to be computed, but for `out`, which are not to be looked at."""
    student, teacher = sides
    options, (labels, weight, denominator) = task.options, rows
    vocab_size = min(side.num_classes() for side in sides)
    cut_student, cut_teacher = student.cut(vocab_size), teacher.cut(vocab_size)
    num_rows, device = student.hidden.shape[0], student.hidden.device
    dtypes = student.hidden.dtype, teacher.hidden.dtype
    looks_at_teacher = options.soft_scale > 0
    needs_student, needs_teacher = any(needed[:3]), any(needed[3:]) and looks_at_teacher
    result = torch.float64 if torch.float64 in dtypes else torch.float32
    none = options.reduction == _NONE
    losses = torch.zeros(num_rows if none else (), dtype=result if none else torch.float64, device=device)
    gradients = (
        Gradients(student, needed[:3], vocab_size, out),  # type: ignore[arg-type]
        Gradients(teacher, needed[3:], vocab_size, out),  # type: ignore[arg-type]
    )

    logits_bytes = (cut_student.bytes_of_logits(), cut_teacher.bytes_of_logits() if looks_at_teacher else 0)
    copies = cut_student.bytes_of_copies(needs_student)
    if looks_at_teacher:
        copies += cut_teacher.bytes_of_copies(needs_teacher) + vocab_size * result.itemsize * needs_teacher
    alike = num_rows > 0 and _look_alike(student, teacher)
    *most, at_once = chunk_sizes(logits_bytes, copies, alike, task.memory_budget, device)
    student_chunks = chunks(0, num_rows, most[0])
    teacher_chunks = chunks(0, num_rows, most[1]) if logits_bytes[1] else []
    ends = sorted({0, *(x.stop for x in (*student_chunks, *teacher_chunks))})
    parts = [part for start, stop in itertools.pairwise(ends) for part in chunks(start, stop, at_once)]
    shapes = [(min(rows, num_rows), vocab_size) for rows in most]
    sizes = [n and Scratch.size(*x, dtype=d) for n, x, d in zip(logits_bytes, shapes, dtypes, strict=True)]
    scratch = Scratch(sum(sizes), device)
    buffers = [scratch.cut(*x, dtype=d) for n, x, d in zip(sizes, shapes, dtypes, strict=True) if n]

    numbers = options.operator_arguments(task.scale, 1)
    exchanged = options.exchanged().operator_arguments(task.scale, 1) if needs_teacher else ()

    def look_at(part: slice, of_student: slice, s_product: Tensor, of_teacher: slice, t_product: Tensor | None) -> None:
        """The loss of some rows of those that there are logits of, and the gradients written over these."""
        inside = slice(part.start - of_student.start, part.stop - of_student.start)
        of_product = slice(part.start - of_teacher.start, part.stop - of_teacher.start)
        s = t = cut_student.logits_of(part, s_product, inside)
        if looks_at_teacher:
            t = cut_teacher.logits_of(part, t_product, of_product)
        of_rows = tuple(x if x is None else x[part] for x in (labels, weight))
        above = grad_output if grad_output is None or grad_output.dim() == 0 else grad_output[part]
        out_here = None if out is None else out[part]
        if needs_teacher:
            g = ops.distillation_loss(t, s, *of_rows, denominator, above, *exchanged, True)[1]
            slope = cut_teacher.slope(t, out_here)
            g = g if slope is None else g.mul_(slope)
        if needs_student:
            slope = cut_student.slope(s, out_here)
            loss = ops.distillation_loss_(s, t, *of_rows, denominator, above, *numbers)
            if slope is not None:
                s_product[inside] = s.mul_(slope)
        else:
            loss = ops.distillation_loss(s, t, *of_rows, denominator, None, *numbers, False)[0]
        if needs_teacher and t_product is not None:
            t_product[of_product] = g  # its logits are not needed any more
        elif needs_teacher:
            gradients[1].add_to_hidden(part, g)
        if none:
            losses[part] = loss
        else:
            losses.add_(loss)

    def go_through_the_rows() -> None:
        of_student = of_teacher = slice(0, 0)  # the rows that there are logits of
        t_product = None
        for part in parts:
            if part.start == of_student.stop:
                of_student = student_chunks.pop(0)
                s_product = cut_student.product(of_student, buffers[0])
            if teacher_chunks and part.start == of_teacher.stop:
                of_teacher = teacher_chunks.pop(0)
                t_product = cut_teacher.product(of_teacher, buffers[1])
            look_at(part, of_student, s_product, of_teacher, t_product)
            if needs_student and part.stop == of_student.stop:
                gradients[0].add_to_hidden(of_student, s_product)
                gradients[0].add_to_head(of_student, s_product)
            if needs_teacher and t_product is not None and part.stop == of_teacher.stop:
                gradients[1].add_to_hidden(of_teacher, t_product)
                gradients[1].add_to_head(of_teacher, t_product)

    go_through_the_rows()
    buffers.clear()
    scratch.give_back()  # before there is another tensor of the size of a head
    return losses.to(result), [*gradients[0].finished(), *gradients[1].finished()]


def _look_alike(student: Side, teacher: Side) -> bool:
    """Whether two models may be one and the same, which has to give a divergence of exactly 0. On a GPU, where looking
    would make the host wait, they are treated alike anyway."""
    if teacher.weight is None or student.weight is None or not _can_look(student.hidden):
        return False
    pairs = ((student.hidden, teacher.hidden), (student.weight, teacher.weight))
    return all(a.dtype == b.dtype and a.shape[1] == b.shape[1] and torch.equal(a[0], b[0]) for a, b in pairs)


def _can_look(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a GPU: fakes have none."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


def run(
    task: Task,
    tensors: tuple[Any, ...],
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_output: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradients that are needed of the six tensors, times what comes from above."""
    student, teacher = task.sides(tensors)
    labels, weight, denominator = rows
    is_in = rows_in(labels, weight, task.options.ignore_index)
    if teacher.weight is None and teacher.hidden.dim() != 2:  # rows that no matrix has without a copy
        teacher = teacher._replace(rows=torch.arange(student.hidden.shape[0], device=student.hidden.device))
    if is_in is None:
        return _run_chunks(task, (student, teacher), rows, grad_output, needed)
    # Finding the rows that are in would make the host wait for a GPU. There they cost their products.
    if not _can_look(is_in):
        return _run_chunks(task, (student, teacher), rows, grad_output, needed, ~is_in)
    if weight is not None and not bool(((weight >= 0) & weight.isfinite()).all()):
        wrong = weight[~((weight >= 0) & weight.isfinite())][0].item()
        raise ValueError(f"weight must be finite and not negative; got {wrong}")
    if bool(is_in.all()):
        return _run_chunks(task, (student, teacher), rows, grad_output, needed)

    def put_back(part: Tensor | None) -> Tensor | None:
        return part if part is None else part.new_zeros(is_in.shape[0], *part.shape[1:]).index_copy_(0, kept, part)

    kept = is_in.nonzero().squeeze(1)
    student = student._replace(hidden=student.hidden.index_select(0, kept))
    if teacher.weight is None:  # logits are not copied
        teacher = teacher._replace(rows=kept)
    else:
        teacher = teacher._replace(hidden=teacher.hidden.index_select(0, kept))
    labels, weight = (x if x is None else x.index_select(0, kept) for x in (labels, weight))
    above = grad_output if grad_output is None or grad_output.dim() == 0 else grad_output.index_select(0, kept)
    loss, gradients = _run_chunks(task, (student, teacher), (labels, weight, denominator), above, needed)
    if task.options.reduction == _NONE:
        loss = put_back(loss)  # type: ignore[assignment]
    gradients[0] = put_back(gradients[0])
    if teacher.weight is not None:
        gradients[3] = put_back(gradients[3])
    return loss, gradients


def rows_in(labels: Tensor | None, weight: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows are in; None: all."""
    is_in = None if labels is None else labels != ignore_index
    if weight is not None:
        is_in = weight != 0 if is_in is None else is_in & (weight != 0)
    return is_in


class _FusedLinear(torch.autograd.Function):
    """Gradients are computed in the forward pass and given away in the first backward pass, as by
    `functional._FusedLoss`; in the backward pass where what comes from above has to be known first (a factor a row,
    float16), where the teacher learns too, and in a second one."""

    @staticmethod
    def forward(ctx: Any, task: Task, labels: Any, weight: Any, denominator: Any, *tensors: Any) -> Tensor:
        ctx.task, rows = task, (labels, weight, denominator)
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[4:]
        now = task.computes_gradients_at_once(tensors[0], needed)
        loss, gradients = run(task, tensors, rows, None, needed if now else (False,) * 6)
        ctx.gradients = gradients if now else None
        if now:  # what the first backward pass needs, so that it need not ask for what was saved
            ctx.vocab_size, ctx.mask = _vocab_size(task, tensors), _mask(task, rows)
        ctx.save_for_backward(*tensors, *rows)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 10
        needed = ctx.needs_input_grad[4:]
        gradients, ctx.gradients = ctx.gradients, None
        by_reference = torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_output)
        if gradients is not None and not by_reference:
            found = _scaled(gradients, grad_output, ctx.vocab_size, ctx.mask)
            return (None, None, None, None, *found)
        saved = ctx.saved_tensors
        tensors, rows = saved[:6], saved[6:]
        if by_reference:
            found = _reference_gradients(ctx.task, tensors, rows, grad_output, needed)
        else:
            grad_output = grad_output.to(torch.float64).contiguous()
            found = run(ctx.task, tensors, rows, grad_output, needed)[1]
        return (None, None, None, None, *found)


def _vocab_size(task: Task, tensors: tuple[Any, ...]) -> int:
    return min(side.num_classes() for side in task.sides(tensors))


def _mask(task: Task, rows: tuple[Any, Any, Any]) -> Tensor | None:
    """1 where rows are in, as weights. Of its own: labels may change before the backward pass."""
    is_in = rows_in(rows[0], rows[1], task.options.ignore_index)
    return None if is_in is None else is_in.to(torch.float64)


def _scaled(
    gradients: Sequence[Tensor | None], grad_output: Tensor, vocab_size: int, mask: Tensor | None
) -> list[Tensor | None]:
    """The student's gradients times what comes from above, where they lie. What is out, rows and classes, stays 0."""
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            part, of_part = (gradient, mask) if i == 0 else (gradient[:vocab_size], None)
            dim = part.dim() - 1
            ops.scale_gradient(part, grad_output, (None, of_part), 0, part.shape[dim], dim)
    return list(gradients)


@torch.library.custom_op("reptile_ext::linear_distillation_loss", mutates_args=())
def _operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: Tensor | None,
    grad_output: Tensor | None,
    kind: int,
    beta: float,
    one_minus_beta: float,
    student_temperature: float,
    teacher_temperature: float,
    soft_scale: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    scale: float,
    memory_budget: int,
    student_softcap: float,
    teacher_softcap: float,
    student_scale: float,
    teacher_scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What traced programs see: the loss, and the gradients of the six tensors, empty where they are not needed."""
    tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    of_options = (kind, beta, one_minus_beta, student_temperature, teacher_temperature, soft_scale, hard_weight)
    of_linear = (memory_budget, student_softcap, teacher_softcap, student_scale, teacher_scale)
    task = Task.of((*of_options, label_smoothing, ignore_index, reduction, scale, *of_linear))
    loss, gradients = run(task, tensors, (labels, weight, denominator), grad_output, tuple(needed))
    return (loss, *(student_hidden.new_empty(0) if g is None else g for g in gradients))  # type: ignore[return-value]


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, needed, reduction = arguments[:6], arguments[-1], arguments[19]
    student = tensors[0]
    double = torch.float64 in (student.dtype, tensors[3].dtype)
    shape = student.shape[:1] if reduction == _NONE else ()
    loss = student.new_empty(shape, dtype=torch.float64 if double else torch.float32)
    return (
        loss,
        *(x.new_empty(x.shape) if need else student.new_empty(0) for x, need in zip(tensors, needed, strict=True)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers, ctx.now = inputs[10:-1], tuple(inputs[-1])
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    saved, task = ctx.saved_tensors, Task.of(ctx.numbers)
    tensors, rows, gradients = saved[:6], saved[6:9], saved[9:]
    needed = tuple(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_loss):
        found = _reference_gradients(task, tensors, rows, grad_loss, needed)
    elif ctx.now == needed:
        # Copies: the operator's gradients are its outputs, and may be asked for again.
        copies = [g.clone() if need else None for g, need in zip(gradients, needed, strict=True)]
        found = _scaled(copies, grad_loss, _vocab_size(task, tensors), _mask(task, rows))
    else:
        grad_output = grad_loss.to(torch.float64).contiguous()
        results = _operator(*tensors, *rows, grad_output, *ctx.numbers, list(needed))[1:]
        found = [g if need else None for g, need in zip(results, needed, strict=True)]
    return (*found, *[None] * 21)


_operator.register_autograd(_backward, setup_context=_setup_context)


def _reference_loss(task: Task, tensors: tuple[Any, ...], rows: tuple[Any, Any, Any], check: bool) -> Tensor:
    is_in = rows_in(rows[0], rows[1], task.options.ignore_index)
    student, teacher = (
        reference.linear_logits(reference.only_rows(side.hidden.flatten(0, -2), is_in), *side[1:5])
        for side in task.sides(tensors)
    )
    # The sizes have been compared; the class dimension is the last.
    options = task.options._replace(truncate=True, dim=-1, inplace=False)
    loss = reference.with_options(student, teacher, *rows, options, check_values=check)
    return loss if task.scale == 1.0 else loss * task.scale


def _reference_gradients(
    task: Task,
    tensors: tuple[Tensor | None, ...],
    rows: tuple[Any, Any, Any],
    grad_output: Tensor,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """By plain PyTorch, with logits in full."""

    def loss_of(*tensors: Tensor | None) -> Tensor:
        return _reference_loss(task, tensors, rows, check=False)

    return ops.gradients_by_autograd(loss_of, tensors, grad_output, needed)


class _Gathered(torch.autograd.Function):
    """All of a DTensor, in every process. Back comes the mean of the processes' gradients, as in FSDP and DDP, in the
    shards of the DTensor."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        full: Tensor = sharded.full_tensor()
        return full

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        share = gradient / ctx.mesh.size()
        return DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim).redistribute(placements=ctx.placements)


def _is_dtensor(x: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    return distributed is not None and isinstance(x, distributed.DTensor)


def _whole_head(x: Any, hidden: Tensor) -> Any:
    if not _is_dtensor(x) or not isinstance(hidden, Tensor):  # which is an error
        return x
    return _Gathered.apply(x.to(hidden.dtype))  # type: ignore[no-untyped-call]


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    memory_budget: int | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | tuple[float, float] = 1.0,
    temperature_scaling: str = "t2",
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    vocab: str = "error",
) -> Tensor:
    """`distillation_loss` of the logits of two heads, without the logits: rows go through in chunks, both products, the
    fused loss and the products back to hidden states and head, all in the forward pass.

    Equivalent PyTorch, which needs several tensors of [rows, V]::

        def logits(hidden, weight, bias, softcap, scale):
            z = F.linear(hidden, weight, bias) * scale
            return z if softcap is None else softcap * torch.tanh(z / softcap)

        loss = distillation_loss(logits(student_hidden, student_weight, student_bias, student_softcap, student_scale),
                                 logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
                                 labels, ...)

    Args:
        student_hidden: [..., H_s], float32, bfloat16, float16 or float64; the leading shape is that of the rows.
        student_weight: the head, [V_s, H_s], as in `torch.nn.Linear`; of the dtype of the hidden states, as the bias.
        teacher_hidden: [..., H_t]; its dtype and H_t may differ from the student's.
        teacher_weight: [V_t, H_t], or None: `teacher_hidden` are the teacher's logits, [..., V_t].
        labels, weight: of the leading shape. On the CPU, rows that are out are left out of the products too.
        student_bias, teacher_bias: [V].
        student_softcap, teacher_softcap: c of c·tanh(z/c) (Gemma 2), after the scale and before the temperature;
            computed in float32.
        student_scale, teacher_scale: what the logits are multiplied with (Cohere's logit_scale).
        memory_budget: bytes for logits, of student and teacher together, copies for softcaps included. None: 120 MiB on
            the CPU, but never less than 512 rows of the student's logits and 256 of the teacher's (of both 256, if the
            models may be one and the same), below which products get slow; on a GPU a 128th of its memory, but never
            less than 2,048 rows of both. On the CPU more than 512 rows of the student's are of no use, and up to
            256 MiB are kept for the next call (`reptile_ext.linear.release_scratch()` gives them back).
        divergence ... denominator, vocab: as of `distillation_loss`. With vocab="truncate" the columns that only one of
            the heads has are not computed.

    Returns:
        A scalar, or the leading shape with reduction="none"; float32, or float64 if either side is.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it, what came and what is wanted.

    Gradients go to whichever of the six tensors requires one, the teacher's too; the others' products are not computed.
    Those of 16-bit heads are added up in float32, on the CPU after every four chunks, whose sum is rounded to 16 bits.
    With reduction="none", for float16, and where the teacher learns, gradients are computed in the backward pass, from
    logits that are computed once more. Under autocast, hidden states and heads are cast as `F.linear` would.
    Derivatives of derivatives, and torch.func, go through logits in full.

    Equal models give exactly 0. The products are torch's: the same bits come of the same machine with the same number
    of threads, and another number may round them otherwise.

    Heads and biases may be DTensors, as the parameters of a module that FSDP2 has sharded are outside of its forward:
    they are cast to the dtype of the hidden states and gathered, and get the mean of the processes' gradients, as FSDP2
    does by default. Each process's loss is that of its own rows.
    """
    options = make_options(
        divergence,
        beta,
        temperature,
        temperature_scaling,
        soft_weight,
        hard_weight,
        label_smoothing,
        ignore_index,
        reduction,
        vocab,
        -1,
        False,
    )
    if not isinstance(student_hidden, Tensor):
        raise TypeError(f"student_hidden must be a torch.Tensor; got {type(student_hidden).__name__}")
    device = student_hidden.device
    for name, x in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if _is_dtensor(x):
            raise TypeError(f"{name} must be this process's own rows; got a DTensor: pass {name}.to_local()")
    student_weight, student_bias = (_whole_head(x, student_hidden) for x in (student_weight, student_bias))
    teacher_weight, teacher_bias = (_whole_head(x, teacher_hidden) for x in (teacher_weight, teacher_bias))
    tensors: list[Any] = [student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias]
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        cast = (True,) * 3 + (teacher_weight is not None,) * 3
        tensors = [
            x.to(dtype) if of_head and isinstance(x, Tensor) and x.dtype in FLOATING[:3] else x
            for x, of_head in zip(tensors, cast, strict=True)
        ]
    student = check_linear("student", tensors[0], tensors[1], tensors[2], student_softcap, student_scale, device)
    teacher = check_linear("teacher", tensors[3], tensors[4], tensors[5], teacher_softcap, teacher_scale, device)
    budget = check_memory_budget(memory_budget)
    leading = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != leading:
        raise ValueError(
            f"teacher_hidden must have the shape of student_hidden but for the last dimension, {list(leading)}; "
            f"got {list(teacher_hidden.shape[:-1])}"
        )
    classes = (student_weight.shape[0], teacher_hidden.shape[-1] if teacher_weight is None else teacher_weight.shape[0])
    if classes[0] != classes[1] and not options.truncate:
        raise ValueError(
            f"teacher_weight has {classes[1]} classes and student_weight has {classes[0]}; both need the same number, "
            "or pass vocab='truncate' to compare the classes they share"
        )
    check_rows(labels, weight, denominator, options, student_hidden.shape, len(leading), device, "student_hidden")

    tensors[0] = tensors[0].reshape(-1, tensors[0].shape[-1])
    if teacher_weight is not None or _is_flat(tensors[3]):
        tensors[3] = tensors[3].reshape(-1, tensors[3].shape[-1])
    flat = tuple(tensors)
    rows = [x if x is None else x.reshape(-1) for x in (labels, weight)]
    task = Task(options, 1.0, budget, (student[0], teacher[0]), (student[1], teacher[1]))
    if not has_kernels(device) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        warn_once(device, "linear_distillation_loss")
        loss = _reference_loss(task, flat, (rows[0], rows[1], denominator), check=True)
    else:
        loss = _apply(task, flat, rows[0], rows[1], denominator, device)
    return loss.reshape(leading) if reduction == "none" else loss


def _is_flat(x: Tensor) -> bool:
    """Whether its rows are a matrix's without a copy. (A compiler decides on its own.)"""
    if torch.compiler.is_compiling():
        return True
    leading = [n for n in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n[0] != 1]
    return x.numel() == 0 or all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(leading))


def _apply(
    task: Task,
    tensors: tuple[Any, ...],
    labels: Tensor | None,
    weight: Tensor | None,
    denominator: float | Tensor | None,
    device: torch.device,
) -> Tensor:
    if not torch.is_grad_enabled():  # autograd's functions are asked for gradients of what requires one there too
        tensors = tuple(x if x is None else x.detach() for x in tensors)
    mean = task.options.reduction == _MEAN and denominator is None
    labels, weight, divisor, scale, options = for_operators(labels, weight, denominator, task.options, device)
    if mean:
        is_in = rows_in(labels, weight, options.ignore_index)
        if is_in is None and not torch.compiler.is_compiling():
            scale = 1.0 / max(tensors[0].shape[0], 1)
        elif is_in is None:  # the number of rows may be a symbol
            divisor = tensors[0].new_ones(tensors[0].shape[0], dtype=torch.float64).sum().clamp(min=1.0)
        else:
            total = is_in.sum(dtype=torch.float64) if weight is None else torch.where(is_in, weight, 0.0).sum()
            divisor = torch.where(total == 0, 1.0, total)
        options = options._replace(reduction=_SUM)
    task = task._replace(options=options, scale=scale)
    try:
        if not torch.compiler.is_compiling():
            fused: Tensor = _FusedLinear.apply(task, labels, weight, divisor, *tensors)  # type: ignore[no-untyped-call]
            return fused
        needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
        now = needed if task.computes_gradients_at_once(tensors[0], needed) else [False] * 6
        loss: Tensor = _operator(*tensors, labels, weight, divisor, None, *task.numbers(), now)[0]
        return loss
    except RuntimeError as error:
        raise_better(error, device)
        raise
