"""The loop over chunks of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import Constants
from ..checks import check_weight_values
from ..functional import LogitsLoss
from ..options import REDUCTIONS, Options
from ..reference import counted_rows
from ..sparse import SparseLoss
from .gradients import Gradients
from .logits import LogitsSource
from .plan import chunk_sizes, plan
from .rows import can_look, kept_rows
from .scratch import Scratch

NONE = REDUCTIONS.index("none")


class LinearConfig(NamedTuple):
    """What is the same for all chunks."""

    options: Options  # reduction "none" or "sum"
    memory_budget: int | None
    softcaps: tuple[float | None, float | None]  # of student and teacher, as the next
    scales: tuple[float, float]
    num_rows_in: int | None = None
    is_sparse: bool = False  # the teacher is log-probabilities in the place of hidden states, and indices in the head's

    def sources(self, tensors: tuple[Any, ...]) -> tuple[LogitsSource, LogitsSource]:
        """Of hidden states, head and bias of the student, and of the teacher."""
        hidden, weight, bias, *of_teacher = tensors
        student = LogitsSource(hidden, weight, bias, self.softcaps[0], self.scales[0])
        hidden, weight, bias = of_teacher
        if self.is_sparse:
            return student, LogitsSource(hidden, None, None, None, 1.0, indices=weight)
        return student, LogitsSource(hidden, weight, bias, self.softcaps[1], self.scales[1])


class Products:
    """One model's products of hidden states and head, of a chunk of rows at a time, in one buffer."""

    def __init__(self, source: LogitsSource, chunks: list[slice], scratch: Scratch) -> None:
        self.source, self.chunks = source, iter(chunks)
        self.buffer = scratch.cut(*_shape(source, chunks), source.hidden.dtype) if chunks else None
        self.chunk = slice(0, 0)
        self.of_chunk: Tensor | None = None

    def of(self, part: slice) -> Tensor | None:
        """Of some rows; computes the next chunk's where it begins. None: there are none, the logits are given."""
        if self.buffer is None:
            return None
        if part.start == self.chunk.stop:
            self.chunk = next(self.chunks)
            self.of_chunk = self.source.product(self.chunk, self.buffer)
        assert self.of_chunk is not None
        return self.of_chunk[part.start - self.chunk.start : part.stop - self.chunk.start]

    def add_gradient_to(self, gradients: Gradients, part: slice) -> None:
        """If these are the last rows of a chunk, over whose products their gradient has been written."""
        if part.stop == self.chunk.stop:
            assert self.of_chunk is not None
            gradients.add(self.chunk, self.of_chunk)


def _shape(source: LogitsSource, chunks: list[slice]) -> tuple[int, int]:
    return max((chunk.stop - chunk.start for chunk in chunks), default=0), source.num_classes()


def run_chunks(
    config: LinearConfig,
    sources: tuple[LogitsSource, LogitsSource],
    constants: Constants,
    grad_output: Tensor | None,
    needed: tuple[bool, ...],
    ignored: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """`run` of rows that are all to be computed, but for the ignored ones, which are not to be read."""
    options, (labels, weight, denominator) = config.options, constants
    vocab_size = min(source.num_classes() for source in sources)
    student, teacher = (source.first_classes(vocab_size) for source in sources)
    num_rows, device = student.hidden.shape[0], student.hidden.device
    dtype = torch.float64 if torch.float64 in (student.hidden.dtype, teacher.hidden.dtype) else torch.float32
    uses_teacher = options.soft_scale > 0
    needs_student, needs_teacher = any(needed[:3]), any(needed[3:]) and uses_teacher
    of_student = Gradients(sources[0], needed[:3], vocab_size, ignored)
    of_teacher = Gradients(sources[1], needed[3:], vocab_size, ignored)
    by_row = options.reduction == NONE
    losses = torch.zeros(num_rows if by_row else (), dtype=dtype if by_row else torch.float64, device=device)

    product_bytes = (student.product_bytes(), teacher.product_bytes() if uses_teacher else 0)
    copy_bytes = student.copy_bytes(needs_student)
    if uses_teacher:
        copy_bytes += teacher.copy_bytes(needs_teacher) + vocab_size * dtype.itemsize * needs_teacher
    alike = num_rows > 0 and _may_be_equal(*sources)
    sizes = chunk_sizes(product_bytes, copy_bytes, alike, config.memory_budget, device)
    student_chunks, teacher_chunks, parts = plan(num_rows, sizes, teacher_has_product=product_bytes[1] > 0)
    buffers = ((student, student_chunks), (teacher, teacher_chunks))
    scratch = Scratch(sum(_shape(x, chunks)[0] * x.product_bytes() for x, chunks in buffers), device)

    def loop() -> None:
        students, teachers = (Products(source, chunks, scratch) for source, chunks in buffers)
        for part in parts:
            s_product = students.of(part)
            t_product = teachers.of(part)
            s = student.logits(part, s_product)
            t = teacher.logits(part, t_product) if uses_teacher or config.is_sparse else s
            indices = teacher.indices_of(part)
            loss_of = LogitsLoss if indices is None else SparseLoss
            models = (s, t) if indices is None else (s, t, indices)
            of_part: Constants = (_rows_of(labels, part), _rows_of(weight, part), denominator)
            grad_of_part = grad_output if grad_output is None or grad_output.dim() == 0 else grad_output[part]
            ignored_here = _rows_of(ignored, part)

            # The teacher's gradient first: the student's is written over the logits.
            t_gradient = None
            if needs_teacher:
                t_gradient = LogitsLoss.by_kernel(options, (s, t), of_part, grad_of_part, (False, True))[1]
                assert t_gradient is not None
                t_slope = teacher.softcap_slope(t, ignored_here)
                if t_slope is not None:
                    t_gradient.mul_(t_slope)
            if needs_student:
                s_slope = student.softcap_slope(s, ignored_here)
                loss = loss_of.in_place(options, models, of_part, grad_of_part)
                if s_slope is not None:
                    s_product[:] = s.mul_(s_slope)  # type: ignore[index]
                students.add_gradient_to(of_student, part)
            else:
                loss = loss_of.call(options, models, of_part, None, False)[0]
            if t_gradient is not None and t_product is None:
                of_teacher.set_given(part, t_gradient)
            elif t_gradient is not None and t_product is not None:
                t_product[:] = t_gradient  # the logits are not needed any more
                teachers.add_gradient_to(of_teacher, part)

            if by_row:
                losses[part] = loss
            else:
                losses.add_(loss)

    loop()
    scratch.give_back()  # before there is another tensor of the size of a head
    return losses.to(dtype), [*of_student.finished(), *of_teacher.finished()]


def _rows_of(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def _may_be_equal(student: LogitsSource, teacher: LogitsSource) -> bool:
    """Whether two models may be one and the same, which has to give a divergence of exactly 0. On a GPU, where looking
    would make the host wait, their chunks are alike anyway."""
    if teacher.weight is None or student.weight is None or not can_look(student.hidden):
        return False
    pairs = ((student.hidden, teacher.hidden), (student.weight, teacher.weight))
    return all(a.dtype == b.dtype and a.shape[1] == b.shape[1] and torch.equal(a[0], b[0]) for a, b in pairs)


def run(
    config: LinearConfig,
    tensors: tuple[Any, ...],
    constants: Constants,
    grad_output: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradients that are needed of the six tensors, times grad_output."""
    student, teacher = config.sources(tensors)
    labels, weight, denominator = constants
    counted = counted_rows(labels, weight, config.options.ignore_index)
    if teacher.weight is None and teacher.hidden.dim() != 2:  # rows that no matrix has without a copy
        numbers = torch.arange(student.hidden.shape[0], device=student.hidden.device)
        teacher = teacher._replace(row_numbers=numbers)
    if counted is None:
        return run_chunks(config, (student, teacher), constants, grad_output, needed)
    if weight is not None and can_look(counted):
        check_weight_values(weight)
    kept = kept_rows(counted, config.num_rows_in)
    if kept is None:
        ignored = None if can_look(counted) else ~counted
        return run_chunks(config, (student, teacher), constants, grad_output, needed, ignored)

    student = student._replace(hidden=kept.hidden_taken(student.hidden))
    if teacher.weight is None:  # logits are not copied
        teacher = teacher._replace(row_numbers=kept.numbers)
    else:
        teacher = teacher._replace(hidden=teacher.hidden.index_select(0, kept.numbers))
    of_kept: Constants = (kept.taken(labels), kept.taken(weight), denominator)
    grad_of_kept = kept.taken(grad_output) if grad_output is not None and grad_output.dim() else grad_output
    loss, gradients = run_chunks(config, (student, teacher), of_kept, grad_of_kept, needed, kept.ignored)
    if config.options.reduction == NONE:
        loss = kept.put_back(loss)  # type: ignore[assignment]
    gradients[0] = kept.put_back(gradients[0])
    if teacher.weight is not None:
        gradients[3] = kept.put_back(gradients[3])
    if kept.nan is not None and kept.numbers.shape[0] == 0:  # no row is there to carry the NaN
        loss, gradients = loss + kept.nan.to(loss.dtype), [g if g is None else g.add_(kept.nan) for g in gradients]
    return loss, gradients
