"""Where logits come from: from hidden states and a head, or they are given."""

from __future__ import annotations

import itertools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import split
from .scratch import row_bytes

CLASSES_OF_A_PRODUCT = 1024  # that the CPU computes at a time in float32
BLOCK = 1024  # rows, columns and inner elements of the products that `_product_in_float32` does at a time


class LogitsSource(NamedTuple):
    """One model's logits: of [N, H] hidden states, softcap(scale · (h Wᵀ + b)); or given as `hidden`, [..., V], where
    `weight` is None. With `indices`, of a sparse teacher: `hidden` are log-probabilities [N, K] of these classes."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    row_numbers: Tensor | None = None  # of given logits: which rows to take; None: all rows of a matrix
    indices: Tensor | None = None

    def first_classes(self, vocab_size: int) -> LogitsSource:
        """The first `vocab_size` classes alone, which are then the only ones computed."""
        if self.indices is not None:
            return self
        if self.weight is None:
            return self._replace(hidden=self.hidden[..., :vocab_size])
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)

    def num_classes(self) -> int:
        if self.indices is not None:
            return sys.maxsize  # whatever the student has
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def product_bytes(self) -> int:
        """Of a row in the buffer that `product` writes to."""
        return 0 if self.weight is None else row_bytes(self.num_classes(), self.hidden.dtype)

    def copy_bytes(self, needs_grad: bool) -> int:
        """Of a row in what `logits` and `softcap_slope` allocate."""
        if self.indices is not None:
            return self.hidden.shape[-1] * (self.hidden.dtype.itemsize + 8) * (self.row_numbers is not None)
        wide = 8 if self.hidden.dtype == torch.float64 else 4
        copies = wide * ((self.softcap is not None) + (self.softcap is not None and needs_grad))
        if self.weight is None:
            copies += self.hidden.dtype.itemsize * (self.row_numbers is not None)
            copies += wide * (self.scale != 1.0 and self.softcap is None)
        return self.num_classes() * copies

    def index_of(self, part: slice) -> Any:
        """Where some rows of given logits lie in them."""
        if self.row_numbers is None:
            return part
        rest, index = self.row_numbers[part], []
        for size in reversed(self.hidden.shape[:-1]):  # torch.unravel_index would copy from the host to a GPU
            index.append(rest % size)
            rest = rest // size
        return tuple(reversed(index))

    def product(self, chunk: slice, buffer: Tensor) -> Tensor:
        """scale · (h Wᵀ + b) of some rows, in the first rows of a buffer."""
        assert self.weight is not None
        hidden = self.hidden[chunk]
        z = buffer[: hidden.shape[0]]
        in_blocks = z.device.type == "cpu" and z.dtype == torch.float32
        for classes in split(0, z.shape[1], CLASSES_OF_A_PRODUCT if in_blocks else z.shape[1]):
            bias = None if self.bias is None else self.bias[classes]
            product_into(z[:, classes], hidden, self.weight[classes].t(), self.scale, bias)
        return z

    def logits(self, part: slice, product: Tensor | None) -> Tensor:
        """Of some rows, from their product if the logits are not given; with a softcap, or a scale of given logits, a
        copy in float32 (float64)."""
        z = self.hidden[self.index_of(part)] if product is None else product
        scale = self.scale if product is None else 1.0
        if self.softcap is None:
            return z if scale == 1.0 else _wide(z, scale)
        return _wide(z, scale / self.softcap).tanh_().mul_(self.softcap)

    def indices_of(self, part: slice) -> Tensor | None:
        """Of some rows of a sparse teacher, whose `logits` are log-probabilities."""
        return None if self.indices is None else self.indices[self.index_of(part)]

    def softcap_slope(self, logits: Tensor, ignored: Tensor | None) -> Tensor | None:
        """d logits / d product, from the logits; 0 in ignored rows, whatever they hold. None: no softcap."""
        if self.softcap is None:
            return None
        slope = (logits / self.softcap).square_().neg_().add_(1)
        return slope if ignored is None else slope.masked_fill_(ignored.unsqueeze(1), 0.0)


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


def product_into(
    result: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """result = scale · (a b + bias), or with `add` (and no bias) result += scale · a b; rounded once."""
    if result.device.type == "cpu" and result.dtype.itemsize == 2 and not has_product(result.dtype):
        _product_in_float32(result, a, b, scale, bias, add)
    elif add:
        result.addmm_(a, b, alpha=scale)
    elif bias is None and scale == 1.0:
        torch.mm(a, b, out=result)  # addmm would copy `result` first, to multiply it by 0
    else:
        beta = 0.0 if bias is None else scale
        torch.addmm(result if bias is None else bias, a, b, beta=beta, alpha=scale, out=result)


def _product_in_float32(result: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None, add: bool) -> None:
    """`product_into` of 16-bit matrices on a processor that has no product of them: in float32, block by block, so that
    no float32 copy of a whole matrix exists. All blocks lie in the same memory: with memory for each, the allocator
    kept some that was free, and the peak varied by 16 MB."""
    height, width, depth = (min(size, BLOCK) for size in (*result.shape, a.shape[1]))
    memory = [torch.empty(size) for size in (height * width, height * depth, depth * width)]

    def in_float32(x: Tensor, part: int) -> Tensor:  # the transpose of a matrix stays one
        flat = memory[part][: x.numel()]
        return (flat.view(x.shape) if x.stride(1) == 1 else flat.view(x.shape[::-1]).t()).copy_(x)

    for rows, columns in itertools.product(*(split(0, size, BLOCK) for size in result.shape)):
        block = result[rows, columns]
        total = memory[0][: block.numel()].view(block.shape)
        if bias is None:
            total.zero_()
        else:
            total.copy_(bias[columns])
        for inner in split(0, a.shape[1], BLOCK):
            total.addmm_(in_float32(a[rows, inner], 1), in_float32(b[inner, columns], 2))
        total.mul_(scale)
        block.copy_(total.add_(block) if add else total)
