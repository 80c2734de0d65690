"""Sums over all rows and columns of a small matrix, and over its bias."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.comparison.coefficients import SHIFTS, coefficient_columns
from ngplus.comparison.entries import ComparedEntries, UseEntries, UseRows, bias_factor, for_statistics, in_rows
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.layers import Layer


@dataclass(kw_only=True, slots=True)
class MatrixSums:
    """Sums with random coefficients over all rows of a matrix and over all of its columns.

    Each of two vectors s of coefficients for the rows comes with two for the columns. One s would too often be nearly
    orthogonal to what a single sample brings, which is of rank one.

    Attributes:
        count: of the sums.
        row: shift of the rows' coefficients.
        column: shift of the columns' coefficients.
        height: rows of the matrix.
    """

    count: int
    row: int
    column: int
    height: int

    @classmethod
    def sample(cls, layer: Layer, generator: random.Random) -> MatrixSums:
        """Four sums."""
        row, column = (SHIFTS[generator.randrange(len(SHIFTS))] for _ in range(2))
        return cls(count=4, row=row, column=column, height=layer.weight.shape[0])

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """SᵀGᵢ, (samples·κ, 2), and the norm of Gᵢ's entries; of indices that of their coefficients."""
        rows = pair.rows
        sums = self._combine_rows(rows)
        size: Tensor = torch.linalg.vector_norm(rows.entries if isinstance(rows, Dense) else sums)
        return UseRows(sums, size=size)

    def _combine_rows(self, factor: Factor) -> Tensor:
        if isinstance(factor, Dense):
            entries = in_rows(factor.entries)
            return entries @ self.row_coefficients(entries.shape[1], entries, factor.first_row)
        if isinstance(factor, OneHot):
            return self.row_coefficients(self.height, factor).index_select(0, factor.index.flatten())
        assert isinstance(factor, Bags)
        coefficients = self.row_coefficients(self.height, factor.weight).index_select(
            0, factor.index
        ) * factor.weight.unsqueeze(1)
        return coefficients.new_zeros(factor.bags, 2).index_add_(0, factor.bag, coefficients)

    def row_coefficients(self, rows: int, like: Tensor | Factor, first: int = 0) -> Tensor:
        """S, (rows, 2), from the row ``first`` on, of a tensor's or a factor's kind."""
        return coefficient_columns(self.row + first, rows, 2, like.dtype, like.device)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """(Σᵢ Σ_κ (SᵀGᵢ)[·, κ] Aᵢ[·, κ]ᵀ) T, where a column of T has the coefficients of the columns.

        Its size is that of G and A, not of their sums, which cancel: the rows of a softmax's gradient add up to zero.
        """
        columns = pair.columns
        assert isinstance(columns, Dense)
        entries = in_rows(columns.entries)
        sizes = rows.size, torch.linalg.vector_norm(entries), max(1, len(entries)) ** -0.5
        return UseEntries(self._sum_columns(rows.values.T @ entries), 0, sizes)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of SᵀG T."""
        values = for_statistics(gradient if gradient.layout == torch.strided else gradient.to_dense())
        with without_autocast([values.device.type]):
            return self._sum_columns(self.row_coefficients(values.shape[0], values).T @ values)

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """The sums over the layer's bias with the coefficients of the rows."""
        return BiasSums(sums=self, part=layer.bias_slice)

    def _sum_columns(self, values: Tensor) -> Tensor:
        """The sums over all columns, (count,)."""
        return (values @ coefficient_columns(self.column, values.shape[1], 2, values.dtype, values.device)).flatten()


@dataclass(kw_only=True, slots=True)
class BiasSums:
    """The sums over a bias with random coefficients.

    Attributes:
        sums: of the matrix, over the same rows with the same coefficients.
        part: of the bias parameter that is the layer's.
    """

    sums: MatrixSums
    part: slice

    @property
    def count(self) -> int:
        """Two sums."""
        return 2

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Those of the matrix."""
        return self.sums.reduce_rows(pair)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (SᵀGᵢ)[·, κ] times the constant that the use multiplies the bias by; its size is that of the rows."""
        factor = bias_factor(pair.columns)
        total = rows.values.sum(dim=0)
        return UseEntries(total if factor == 1.0 else total * factor, 0, (rows.size, factor))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The sums over the bias's gradient."""
        values = for_statistics(gradient if self.part.stop - self.part.start == len(gradient) else gradient[self.part])
        with without_autocast([values.device.type]):
            return torch.mv(self.sums.row_coefficients(len(values), values).T, values)


__all__ = ["BiasSums", "MatrixSums"]
