"""Gradients of one model's hidden states, head and bias, added up over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import LogitsSource, has_product, product_into
from .plan import split

# Of the CPU's products and sums.
HALVED = range(384, 768)  # sizes of hidden states whose gradients in 16 bits take half the time in two halves
CLASSES_OF_A_SUM = 4096
# Gradients of a 16-bit head are added up in float32, but for so many chunks by products that add in float32 and round
# the sum to 16 bits. That has the error of 1.6 roundings; a float32 sum costs as much as a tenth of all products.
CHUNKS_IN_16_BITS = 4


class Gradients:
    """Those that are needed, from gradients with respect to the logits that are compared, before the softcap."""

    def __init__(self, source: LogitsSource, needed: tuple[bool, ...], vocab_size: int, ignored: Tensor | None) -> None:
        """needed: of hidden states, head, bias. ignored: rows whose hidden states must not be read: 0 · NaN is NaN."""
        self.source, self.vocab_size, self.ignored = source, vocab_size, ignored
        self.hidden = source.hidden.new_zeros(source.hidden.shape) if needed[0] else None
        self.needs_weight, self.needs_bias = needed[1:]
        # Sums over many chunks are not rounded to 16 bits in between.
        self.wide = torch.float64 if source.hidden.dtype == torch.float64 else torch.float32
        self.weight: Tensor | None = None  # of the classes that are compared, as the next two
        self.few_chunks: Tensor | None = None  # in 16 bits: the sum of a few chunks, rounded after each
        self.num_chunks = 0  # how many those are
        self.bias: Tensor | None = None

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
        shape = (g.shape[0], hidden.shape[1])
        if self.wide == g.dtype:
            if self.weight is None:
                self.weight = g.new_empty(shape)
                product_into(self.weight, g, hidden, scale)
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
        elif self.few_chunks is None:
            self.few_chunks, self.num_chunks = g.new_empty(shape), 1
            product_into(self.few_chunks, g, hidden, scale)
        elif self.num_chunks < CHUNKS_IN_16_BITS:  # what is rounded is the new sum, not the product
            product_into(self.few_chunks, g, hidden, scale, add=True)
            self.num_chunks += 1
        else:
            is_new = self.weight is None
            if is_new:
                self.weight = g.new_empty(shape, dtype=self.wide)
            assert self.weight is not None
            for classes in split(0, shape[0], CLASSES_OF_A_SUM):
                if is_new:
                    self.weight[classes] = self.few_chunks[classes]
                else:
                    self.weight[classes] += self.few_chunks[classes]
                product_into(self.few_chunks[classes], g[classes], hidden, scale)
            self.num_chunks = 1

    def finished(self) -> list[Tensor | None]:
        """Of hidden states, head and bias; None: not needed."""
        of_weight = self.weight
        if self.few_chunks is not None:
            of_weight = self.few_chunks
            if self.weight is not None:
                for classes in split(0, of_weight.shape[0], CLASSES_OF_A_SUM):
                    of_weight[classes] = self.weight[classes].add_(of_weight[classes])
                self.weight = None
        return [
            self.hidden,
            self._whole(of_weight, self.source.weight) if self.needs_weight else None,
            self._whole(self.bias, self.source.bias) if self.needs_bias else None,
        ]

    def _whole(self, compared: Tensor | None, like: Tensor | None) -> Tensor:
        """In the dtype and shape of what it is the gradient of: 0 for the classes that were not compared."""
        assert like is not None
        if compared is not None and compared.shape == like.shape:
            return compared.to(like.dtype)
        whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        if compared is not None:
            whole[: self.vocab_size] = compared
        return whole
