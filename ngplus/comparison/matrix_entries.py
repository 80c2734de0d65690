"""Single entries of a matrix, and of its bias in the same rows."""

from __future__ import annotations

import math
import operator
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.comparison.entries import ComparedEntries, UseEntries, UseRows, bias_factor, for_statistics, sum_products
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.im2col import Patches
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer, MatrixShape


@dataclass(slots=True)
class Spread:
    """A sequence of evenly spaced indices.

    Attributes:
        start: the first.
        step: from one to the next.
        count: how many there are.
    """

    start: int
    step: int
    count: int

    @classmethod
    def sample(cls, size: int, count: int, generator: random.Random) -> Spread:
        """``count`` of the indices below ``size``, as far apart as can be, so that each large slice has one."""
        step = size // count
        return cls(generator.randrange(size - step * (count - 1)), step, count)

    @property
    def as_slice(self) -> slice:
        """For indexing."""
        return slice(self.start, self.start + self.step * (self.count - 1) + 1, self.step)

    def inside(self, first: int, length: int) -> tuple[slice, int]:
        """Those in [first, first + length), counted from there, and the place of the first of them."""
        skipped = min(self.count, max(0, -(-(first - self.start) // self.step)))
        end = min(self.count, max(skipped, -(-(first + length - self.start) // self.step)))
        start = self.start + skipped * self.step - first
        return slice(start, start + (end - skipped) * self.step, self.step), skipped


@dataclass(kw_only=True, slots=True)
class MatrixEntries:
    """Entries (r, c) of a matrix that is multiplied, in pairs of evenly spaced r and neighbouring c.

    Attributes:
        count: of the pairs.
        rows: of the matrix; or groups of a convolution that has several, with one row of each.
        row: the row within its group, where there are several groups.
        column: the first input channel or column, of the same number in each group.
        offset: into a convolution's kernel, the same for all.
        kernel: sizes of a convolution's kernel.
        shape: of the matrix.
    """

    count: int
    rows: Spread
    row: int
    column: int
    offset: tuple[int, ...]
    kernel: tuple[int, ...]
    shape: MatrixShape

    @classmethod
    def sample(cls, layer: Layer, shape: MatrixShape, most: int, generator: random.Random) -> MatrixEntries:
        """Up to ``most`` entries."""
        width, kernel = layer.weight.shape[1], tuple(layer.weight.shape[2:])
        if layer.batched:
            width, kernel = layer.matrix[2], ()
        grouped = shape.groups > 1
        count = min(most, shape.groups) if grouped else min(most, shape.rows, width)
        return cls(
            count=count,
            rows=Spread.sample(shape.groups if grouped else shape.rows, count, generator),
            row=generator.randrange(shape.rows),
            column=generator.randrange(width if grouped else width - count + 1),
            offset=tuple(generator.randrange(size) for size in kernel),
            kernel=kernel,
            shape=shape,
        )

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Gᵢ[r, κ]."""
        rows = pair.rows
        if pair.group is not None:  # a use that has one of the groups alone
            assert isinstance(rows, Dense)
            inside, place = self.rows.inside(pair.group, 1)
            return UseRows(for_statistics(rows.entries[:, inside, self.row]), place)
        if isinstance(rows, OneHot):  # a table that is a linear layer's weight too
            numbers = torch.arange(rows.size, device=rows.device)[self.rows.as_slice]
            return UseRows((rows.index.unsqueeze(1) == numbers.view(1, -1, 1)).to(rows.dtype))
        if isinstance(rows, Bags):
            numbers = torch.arange(rows.size, device=rows.device)[self.rows.as_slice]
            return UseRows(rows.at(numbers.expand(rows.bags, -1)).unsqueeze(2))
        assert isinstance(rows, Dense)
        entries, place = rows.entries, 0
        if self.shape.groups > 1:
            entries = entries[:, self.rows.as_slice, self.row]
        elif rows.full_size is None:
            entries = entries[:, 0, self.rows.as_slice]
        else:
            inside, place = self.rows.inside(rows.first_row, entries.shape[2])
            entries = entries[:, 0, inside]
        return UseRows(entries.to(statistics_dtype(entries.dtype)), place)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ Gᵢ[r, κ] Aᵢ[c, κ]."""
        if pair.group is not None:
            assert isinstance(pair.columns, Dense)
            inside, _ = self.rows.inside(pair.group, 1)
            return sum_products(rows.values * for_statistics(pair.columns.entries[:, inside, self.column]), rows.place)
        entries = self._column_entries(pair.columns)
        if rows.values.shape[1] < self.count:
            entries = entries[:, rows.place : rows.place + rows.values.shape[1]]
        return sum_products(rows.values * entries, rows.place)

    def _column_entries(self, factor: Factor) -> Tensor:
        if isinstance(factor, Patches):
            if len(self.offset) != len(factor.kernel):  # the kernel is a bare parameter, as a matrix first × rest
                return torch.cat([self._patch_entries(factor, self.column + place) for place in range(self.count)], 1)
            return factor.at_offset(factor.images[:, self._channels(factor.channels)], self.offset)
        if isinstance(factor, KhatriRao):
            assert isinstance(factor.one, Dense)
            assert isinstance(factor.other, Dense)
            one = factor.one.entries[:, 0, self.column : self.column + self.count]
            dtype = statistics_dtype(one.dtype)
            return one.to(dtype) * factor.other.entries[:, :1, self.offset[0]].to(dtype)
        assert isinstance(factor, Dense)
        area, place = math.prod(self.kernel), 0
        for size, at in zip(self.kernel, self.offset, strict=True):
            place = place * size + at
        column = self.column * area + place
        if self.shape.groups > 1:
            entries = factor.entries[:, self.rows.as_slice, column]
        else:
            entries = factor.entries[:, 0, column : column + self.count * area : area]
        return entries.to(statistics_dtype(entries.dtype))

    def _patch_entries(self, factor: Patches, column: int) -> Tensor:
        """Aᵢ[c, κ] of a column that counts the kernel's places, (samples, 1, κ)."""
        channel, place = divmod(column, math.prod(factor.kernel))
        offset: list[int] = []
        for size in reversed(factor.kernel):
            place, at = divmod(place, size)
            offset.insert(0, at)
        return factor.at_offset(factor.images[:, channel : channel + 1], tuple(offset))

    def _channels(self, in_group: int) -> slice:
        """Which input channels they are, over all groups."""
        if self.shape.groups == 1:
            return slice(self.column, self.column + self.count)
        first, step = self.rows.start * in_group + self.column, self.rows.step * in_group
        return slice(first, first + step * (self.count - 1) + 1, step)

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """Those of the layer's bias in the same rows."""
        return BiasEntries(count=self.count, rows=self, part=layer.bias_slice)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of a weight's gradient, which are evenly spaced in its memory."""
        dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
        if not self.kernel and dense.dim() != 2:  # a batch of matrices
            dense = dense.reshape(self.shape.groups * self.shape.rows, -1)
        to_row, to_column, *to_offset = dense.stride()
        grouped = self.shape.groups > 1
        first, step = self.rows.start, self.rows.step
        if grouped:
            first, step = first * self.shape.rows + self.row, step * self.shape.rows
        start = first * to_row + self.column * to_column + sum(map(operator.mul, self.offset, to_offset))
        stride = step * to_row + (0 if grouped else to_column)
        return dense.as_strided((self.count,), (stride,), dense.storage_offset() + start)


@dataclass(kw_only=True, slots=True)
class BiasEntries:
    """Entries of a bias, which is one more column of its matrix.

    Attributes:
        count: how many they are.
        rows: entries of the matrix in the same rows.
        part: of the bias parameter that is the layer's.
    """

    count: int
    rows: MatrixEntries
    part: slice

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Those of the matrix."""
        return self.rows.reduce_rows(pair)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ Gᵢ[r, κ] times the constant that the use multiplies the bias by."""
        return sum_products(rows.values * bias_factor(pair.columns), rows.place)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of the bias's gradient."""
        values = gradient[self.part]
        shape = self.rows.shape
        if shape.groups > 1:
            return values.view(shape.groups, shape.rows)[self.rows.rows.as_slice, self.rows.row]
        return values[self.rows.rows.as_slice]


__all__ = ["BiasEntries", "MatrixEntries", "Spread"]
