"""How many rows there are logits of at a time.

On the CPU, products of fewer rows take their time to read the head, and more fit no cache; all sizes as measured
(docs/performance.md).
"""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

import torch

DEFAULT_BUDGET = 120 << 20  # bytes of logits
STUDENT_ROWS = 512
TEACHER_ROWS = 256, 1024  # at least, at most
GPU_BUDGET_SHARE = 128  # of a GPU's memory, one part in so many
SMALLEST_GPU_CHUNK = 2048
GPU_TILE = 128  # rows of a result that a block of cuBLAS computes: those of a chunk that are left over take as long


def split(first: int, last: int, most: int, step: int = 1) -> list[slice]:
    """The range from first to last in parts of at most `most`, of equal size but for a step. All but the last are
    multiples of a step, of which `most` is one."""
    steps = -(-(last - first) // step)
    count = -(-steps * step // most)
    ends = [first + steps * i // count * step for i in range(count)]
    return [slice(start, stop) for start, stop in itertools.pairwise([*ends, last] if ends else [])]


class ChunkSizes(NamedTuple):
    """Rows: of the student's products, and of the teacher's, which may be others, as they are not needed any more after
    the loss; how many of these go into the loss in one go, if that makes copies; and what chunks are multiples of."""

    student: int
    teacher: int
    loss: int
    step: int = 1


def chunk_sizes(
    product_bytes: tuple[int, int], copy_bytes: int, alike: bool, memory_budget: int | None, device: torch.device
) -> ChunkSizes:
    """From the bytes of a row. The default budget gives way to what products need to be fast; a budget that was asked
    for to nothing but a row.

    alike: both the same, so that equal models have equal logits: a product of other rows may be rounded otherwise.
    """
    of_student, of_teacher = product_bytes
    budget = memory_budget or (DEFAULT_BUDGET if device.type == "cpu" else memory_of(device) // GPU_BUDGET_SHARE)
    at_once = max(budget // 4 // copy_bytes, 1) if copy_bytes else sys.maxsize
    budget -= budget // 4 if copy_bytes else 0
    if device.type != "cpu":
        rows = max(budget // (of_student + of_teacher), 1 if memory_budget else SMALLEST_GPU_CHUNK)
        step = GPU_TILE if rows >= GPU_TILE else 1
        return ChunkSizes(rows - rows % step, rows - rows % step, at_once, step)
    student, least = STUDENT_ROWS, TEACHER_ROWS[0]
    if memory_budget is not None:
        student, least = max(min(budget // (of_student + of_teacher), STUDENT_ROWS), 1), 1
    teacher = min(max((budget - student * of_student) // max(of_teacher, 1), least), TEACHER_ROWS[1])
    if alike:
        student = teacher = min(student, teacher)
    return ChunkSizes(student, teacher, at_once)


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


class Plan(NamedTuple):
    """Chunks of rows, of which a model's products are computed at a time, and parts, of which the loss is: each lies
    within one chunk of either model."""

    student_chunks: list[slice]
    teacher_chunks: list[slice]  # none, if there is no product
    parts: list[slice]


def plan(num_rows: int, sizes: ChunkSizes, teacher_has_product: bool) -> Plan:
    student = split(0, num_rows, sizes.student, sizes.step)
    teacher = split(0, num_rows, sizes.teacher, sizes.step) if teacher_has_product else []
    ends = sorted({0, *(chunk.stop for chunk in (*student, *teacher))})
    parts = [part for start, stop in itertools.pairwise(ends) for part in split(start, stop, sizes.loss)]
    return Plan(student, teacher, parts)
