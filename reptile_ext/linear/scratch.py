"""The memory of the chunks' logits.

To touch memory for the first time costs a process more than the loss does, so the CPU's scratch is kept for the next
call, if it is not too large. A GPU's allocator does that by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import compat, ops

KEPT_AT_MOST = 256 << 20  # bytes: enough for the smallest chunks of 170,000 classes in 16 bits

# A cache line of a GPU, two of a CPU. Rows of an odd number of classes, one right behind the other, begin anywhere. On
# a GPU a product of 16-bit matrices is fast where rows are multiples of 16 bytes apart (where they are not, cuBLAS
# takes other kernels, without bulk copies), and reads and writes whole lines where it is 128.
ROW_ALIGNMENT = 128

_kept: list[Tensor] = []


def release_scratch() -> None:
    """Give back the memory that is kept between calls on the CPU: for gradients of logits, 1 GiB at most, and for the
    logits of the fused linear loss, 256 MiB at most. What a tensor still holds is not among it."""
    _kept.clear()
    ops.release_memory()


def row_bytes(size: int, dtype: torch.dtype) -> int:
    """From one row of logits to the next: a multiple of ROW_ALIGNMENT."""
    return -(-size * dtype.itemsize // ROW_ALIGNMENT) * ROW_ALIGNMENT


class Scratch:
    """Bytes that tensors are cut from, one after the other."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.used = 0
        # Tensors that are made within a dispatch mode may be none, such as fakes, and are of no use to others.
        self.lasts = device.type == "cpu" and not compat.in_dispatch_mode()
        if self.lasts:
            try:  # one thread gets it
                self.bytes = _kept.pop()
                if self.bytes.numel() >= num_bytes:
                    return
            except IndexError:
                pass
        with torch.inference_mode(False):  # in such a mode it could not be written to outside
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def cut(self, num_rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """A matrix, whose rows are `row_bytes` apart. What lies between them is 0: bfloat16 products of oneDNN with AMX
        (torch 2.13) read there, and multiply what they find with 0, which a NaN survives."""
        start, self.used = self.used, self.used + num_rows * row_bytes(size, dtype)
        rows = self.bytes[start : self.used].view(dtype).view(num_rows, row_bytes(size, dtype) // dtype.itemsize)
        rows[:, size:] = 0
        return rows[:, :size]

    def give_back(self) -> None:
        if self.lasts and self.bytes.numel() <= KEPT_AT_MOST:
            _kept.append(self.bytes)
            del _kept[1:]
        del self.bytes
