"""Sums over rows of a table."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.comparison.coefficients import PERIOD, SHIFTS, coefficients_after, coefficients_from, counting_rows
from ngplus.comparison.entries import UseEntries, UseRows, for_statistics, in_rows
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.layers import Layer


@dataclass(kw_only=True, slots=True)
class TableEntries:
    """Sums with random coefficients over rows of a table, in neighbouring columns.

    Attributes:
        count: of the columns.
        column: the first.
        shift: of the rows' coefficients.
        height: rows of the table.
        long: whether a sixteenth of the rows counts, in place of all.
    """

    count: int
    column: int
    shift: int
    height: int
    long: bool

    @classmethod
    def sample(cls, layer: Layer, most: int, long_from: int, generator: random.Random) -> TableEntries:
        """Up to ``most`` columns, of a narrow table all; of ``long_from`` rows or more a sixteenth counts."""
        height, width = layer.weight.shape
        count = width if width <= 4 * most else most
        column, shift = generator.randrange(width - count + 1), SHIFTS[generator.randrange(len(SHIFTS))]
        return cls(count=count, column=column, shift=shift, height=height, long=height >= long_from)

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """sᵀGᵢ."""
        return UseRows(self._combine_rows(pair.rows))

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ]; softmax over a long table, whose rows add up to zero, hardly cancels in them."""
        columns = pair.columns
        assert isinstance(columns, Dense)
        entries = self._columns(in_rows(columns.entries))
        return UseEntries(rows.values @ entries, 0, (torch.linalg.vector_norm(entries), self._share**0.5))

    @property
    def _share(self) -> float:
        """Of the rows that count."""
        return 1 / 16 if self.long else 1.0

    def _combine_rows(self, factor: Factor) -> Tensor:
        """sᵀGᵢ, (samples·κ,)."""
        if isinstance(factor, OneHot):
            return self._coefficients(factor.index.flatten(), factor.dtype)
        if isinstance(factor, Bags):
            coefficients = self._coefficients(factor.index, factor.weight.dtype) * factor.weight
            return coefficients.new_zeros(factor.bags).index_add_(0, factor.bag, coefficients)
        assert isinstance(factor, Dense)
        entries, first = in_rows(factor.entries), factor.first_row
        rows, coefficients = self._counting(first, entries.shape[1], entries.dtype, entries.device)
        return (entries if rows is None else entries.index_select(1, rows)) @ coefficients

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """(sᵀG)[c]."""
        dtype = statistics_dtype(gradient.dtype)
        if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1:
            coefficients, values = self._coefficients(gradient._indices()[0], dtype), gradient._values()
        else:
            values = gradient if gradient.layout == torch.strided else gradient.to_dense()
            rows, coefficients = self._counting(0, values.shape[0], dtype, values.device)
            values = values if rows is None else values.index_select(0, rows)
        values = for_statistics(self._columns(values))
        with without_autocast([values.device.type]):
            return coefficients @ values

    def _columns(self, rows: Tensor) -> Tensor:
        """Those that are compared."""
        return rows if rows.shape[1] == self.count else rows[:, self.column : self.column + self.count]

    def _counting(
        self, first: int, count: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """Those of ``count`` rows from ``first`` on that count, from there, and their coefficients; None for all."""
        if not self.long:
            return None, coefficients_from(self.shift + first, count, dtype, device)
        rows = (counting_rows(device) - (self.shift + first)) & (PERIOD - 1)
        if count > PERIOD:
            rows = (torch.arange(0, count, PERIOD, device=device).unsqueeze(1) + rows).flatten()
        rows = rows[rows < count]
        return rows, self._coefficients(rows + first, dtype)

    def _coefficients(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        rows = rows if self.height <= PERIOD else rows & (PERIOD - 1)
        return coefficients_after(self.shift, self.long, dtype, rows.device).index_select(0, rows)


__all__ = ["TableEntries"]
