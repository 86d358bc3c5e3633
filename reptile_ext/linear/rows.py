"""Ignored rows: they are left out before the products, and are zeros in the results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_rows_in


class KeptRows(NamedTuple):
    """The rows that are computed."""

    numbers: Tensor
    ignored: Tensor | None  # which of them are ignored all the same; None: none
    nan: Tensor | None  # NaN if rows that are in are not among them, which must be seen, else 0; None: they all are
    num_rows: int  # of all

    def taken(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.index_select(0, self.numbers)

    def hidden_taken(self, hidden: Tensor) -> Tensor:
        """The student's hidden states; NaN, as everything then is that comes of them, if rows would be lost."""
        taken = hidden.index_select(0, self.numbers)
        return taken if self.nan is None else taken.masked_fill_(self.nan.isnan(), torch.nan)

    def put_back(self, x: Tensor | None) -> Tensor | None:
        """Results of the rows that are computed, among those of all."""
        if x is None:
            return None
        nothing = x.new_zeros(()) if self.nan is None else self.nan.to(x.dtype)
        everything = nothing.expand(self.num_rows, *x.shape[1:]).clone(memory_format=torch.contiguous_format)
        return everything.index_copy_(0, self.numbers, x)


def kept_rows(counted: Tensor, num_rows_in: int | None) -> KeptRows | None:
    """Which rows to compute. None: all, for none is ignored, or nobody says how many are without a wait for a GPU."""
    num_rows = counted.shape[0]
    if can_look(counted):
        numbers = counted.nonzero().squeeze(1)
        if num_rows_in is not None:
            check_rows_in(num_rows_in, numbers.shape[0])
        return None if numbers.shape[0] == num_rows else KeptRows(numbers, None, None, num_rows)
    if num_rows_in is None or num_rows_in >= num_rows:
        return None
    # Those that are in first, in their order, then the others: where fewer are in than was said, the rest are ignored
    # rows, none of them twice. A sort has a size that is known beforehand, and runs on every device.
    numbers = torch.argsort(~counted, stable=True)[:num_rows_in]
    nan = torch.where(counted.sum() > num_rows_in, torch.nan, 0.0)
    return KeptRows(numbers, ~counted.index_select(0, numbers), nan, num_rows)


def can_look(x: Tensor) -> bool:
    """Whether values can be read without waiting for a GPU: fakes have none."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
