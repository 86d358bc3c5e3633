"""Where logits come from: from hidden states and a head, or they are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import split

CLASSES_OF_A_PRODUCT = 1024  # that the CPU computes at a time in float32


class LogitsSource(NamedTuple):
    """One model's logits: of [N, H] hidden states, softcap(scale · (h Wᵀ + b)); or given as `hidden`, [..., V], where
    `weight` is None."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    softcap: float | None
    scale: float
    row_numbers: Tensor | None = None  # of given logits: which rows to take; None: all rows of a matrix

    def first_classes(self, vocab_size: int) -> LogitsSource:
        """The first `vocab_size` classes alone, which are then the only ones computed."""
        if self.weight is None:
            return self._replace(hidden=self.hidden[..., :vocab_size])
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)

    def num_classes(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def product_bytes(self) -> int:
        """Of a row in the buffer that `product` writes to."""
        return 0 if self.weight is None else self.num_classes() * self.hidden.dtype.itemsize

    def copy_bytes(self, needs_grad: bool) -> int:
        """Of a row in what `logits` and `softcap_slope` allocate."""
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

    def softcap_slope(self, logits: Tensor, ignored: Tensor | None) -> Tensor | None:
        """d logits / d product, from the logits; 0 in ignored rows, whatever they hold. None: no softcap."""
        if self.softcap is None:
            return None
        slope = (logits / self.softcap).square_().neg_().add_(1)
        return slope if ignored is None else slope.masked_fill_(ignored.unsqueeze(1), 0.0)


def _wide(z: Tensor, factor: float) -> Tensor:
    """A copy in float32 (float64), times a factor."""
    return z * factor if z.dtype in (torch.float32, torch.float64) else z.float().mul_(factor)


def product_into(result: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None) -> None:
    """scale · (a b + bias), rounded once."""
    if bias is None and scale == 1.0:
        torch.mm(a, b, out=result)  # addmm would copy `result` first, to multiply it by 0
    else:
        beta = 0.0 if bias is None else scale
        torch.addmm(result if bias is None else bias, a, b, beta=beta, alpha=scale, out=result)
