"""Gradients of one model's hidden states, head and bias, added up over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import LogitsSource, has_product, product_into
from .plan import split

# Of the CPU's products and sums.
HALVED = range(384, 768)  # sizes of hidden states whose gradients in 16 bits take half the time in two halves
CLASSES_OF_A_SUM = 4096
# The gradient of a 16-bit head is added up in its own memory for so many chunks, by products that add in float32 and
# round the sum to 16 bits, which has the error of 1.6 roundings; the sums of so many, in float32, in memory of twice
# that size, which is read and written each time (on a CPU, after every chunk that would be a tenth of all products).
CHUNKS_IN_16_BITS = 4


class Gradients:
    """Those that are needed, from gradients with respect to the logits that are compared, before the softcap."""

    def __init__(self, source: LogitsSource, needed: tuple[bool, ...], vocab_size: int, ignored: Tensor | None) -> None:
        """needed: of hidden states, head, bias. ignored: rows whose hidden states must not be read: 0 · NaN is NaN."""
        self.source, self.vocab_size, self.ignored = source, vocab_size, ignored
        self.hidden = source.hidden.new_zeros(source.hidden.shape) if needed[0] else None
        self.needs_weight, self.needs_bias = needed[1:]
        self.wide = torch.float64 if source.hidden.dtype == torch.float64 else torch.float32
        self.weight: Tensor | None = None  # the result: the sum of the last few chunks, rounded after each
        self.num_chunks = 0  # how many those are
        self.chunks_before: Tensor | None = None  # the sum of those before, not rounded; of the classes compared
        self.bias: Tensor | None = None  # of the classes compared

    def add(self, chunk: slice, of_product: Tensor) -> None:
        """Of some rows of hidden states."""
        self._set_hidden(chunk, of_product)
        self._add_to_head(chunk, of_product)

    def set_given(self, part: slice, of_logits: Tensor) -> None:
        """Of some rows of logits that were given."""
        if self.hidden is None:
            return
        scale = self.source.scale
        gradient = (of_logits * scale if scale != 1.0 else of_logits).to(self.hidden.dtype)
        self.hidden[..., : self.vocab_size][self.source.index_of(part)] = gradient

    def _set_hidden(self, chunk: slice, of_product: Tensor) -> None:
        if self.hidden is None:
            return
        assert self.source.weight is not None
        hidden, head = self.hidden[chunk], self.source.weight[: self.vocab_size]
        size, on_cpu = head.shape[1], head.device.type == "cpu"
        halves = 2 if on_cpu and head.dtype.itemsize == 2 and size in HALVED and has_product(head.dtype) else 1
        for features in split(0, size, -(-size // halves)):
            product_into(hidden[:, features], of_product, head[:, features], self.source.scale)

    def _add_to_head(self, chunk: slice, of_product: Tensor) -> None:
        if self.needs_weight:
            hidden = self.source.hidden[chunk]
            if self.ignored is not None:
                hidden = hidden.masked_fill(self.ignored[chunk].unsqueeze(1), 0.0)
            self._add_to_weight(of_product.t(), hidden, self.source.scale)
        if self.needs_bias:
            share = of_product.sum(0, dtype=self.wide).mul_(self.source.scale)
            self.bias = share if self.bias is None else self.bias.add_(share)

    def _add_to_weight(self, g: Tensor, hidden: Tensor, scale: float) -> None:
        if self.weight is None:
            assert self.source.weight is not None
            self.weight = g.new_empty(self.source.weight.shape)
            self.weight[self.vocab_size :] = 0
        weight = self.weight[: self.vocab_size]
        is_rounded = weight.dtype != self.wide
        if self.num_chunks == 0 or not is_rounded or self.num_chunks < CHUNKS_IN_16_BITS:
            product_into(weight, g, hidden, scale, add=self.num_chunks > 0)
            self.num_chunks += 1
            return
        before, is_new = self.chunks_before, self.chunks_before is None
        if before is None:
            before = self.chunks_before = torch.empty_like(weight, dtype=self.wide)
        for classes in self._parts_of_a_sum():
            if is_new:
                before[classes] = weight[classes]
            else:
                before[classes] += weight[classes]
            product_into(weight[classes], g[classes], hidden, scale)
        self.num_chunks = 1

    def _parts_of_a_sum(self) -> list[slice]:
        """All classes on a GPU; on the CPU, so few that they are still in a cache after one of two steps."""
        on_cpu = self.source.hidden.device.type == "cpu"
        return split(0, self.vocab_size, CLASSES_OF_A_SUM if on_cpu else self.vocab_size)

    def finished(self) -> list[Tensor | None]:
        """Of hidden states, head and bias; None: not needed."""
        if self.chunks_before is not None:
            assert self.weight is not None
            for classes in self._parts_of_a_sum():
                self.weight[classes] = self.chunks_before[classes].add_(self.weight[classes])
            self.chunks_before = None
        weight, bias = self.weight, None
        if self.needs_weight and weight is None:  # of no rows
            assert self.source.weight is not None
            weight = self.source.weight.new_zeros(self.source.weight.shape)
        if self.needs_bias:
            assert self.source.bias is not None
            bias = self.source.bias.new_zeros(self.source.bias.shape)
            if self.bias is not None:
                bias[: self.vocab_size] = self.bias
        return [self.hidden, weight, bias]
