"""Which entries of a layer's gradient are compared with its captured uses, and what both have there.

A use that was not captured changes all entries of the gradient G, as a rule, so that a few entries (r, c) of the matrix
tell: Σᵢ Σ_κ Gᵢ[r, κ] Aᵢ[c, κ] against G[r, c]. Of a table, where such a use may reach few rows, a sixteenth of the rows
or more count together, with random signs s: Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ] against (sᵀG)[c]. Of a linear layer whose output
is small all rows and columns do, in a few sums with signs T for the columns: Σᵢ Σ_κ (sᵀGᵢ)[κ] (TᵀAᵢ)[·, κ] against
sᵀG T.

A bias, which is one more column of its layer's matrix, is compared by itself in the same rows.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import weakref
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.im2col import Patches
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.layers import Layer, MatrixShape
from ngplus.tuning import DEFAULT, Tuning


class UseEntries(NamedTuple):
    """Some entries of what a use brings to a gradient.

    Attributes:
        values: (k,), k of all that are compared.
        place: of the first of them among all.
        size: root sum of squares of what they are sums of, which tells how large rounding is; a scalar.
    """

    values: Tensor
    place: int
    size: Tensor


def _sum_products(products: Tensor, place: int = 0) -> UseEntries:
    """The sums of (samples, k, κ) products over samples and positions."""
    return UseEntries(products.sum(dim=(0, 2)), place, torch.linalg.vector_norm(products))


class ComparedEntries(Protocol):
    """Some entries of a layer's matrix."""

    @property
    def count(self) -> int:
        """How many they are."""
        ...

    def of_use(self, pair: FactorPair) -> UseEntries:
        """The entries of Σᵢ 𝒢ᵢ of a use."""
        ...

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of a weight's gradient, (count,), perhaps in its memory."""
        ...


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
    """ComparedEntries (r, c) of a matrix that is multiplied, in pairs of evenly spaced r and neighbouring c.

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

    def of_use(self, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ Gᵢ[r, κ] Aᵢ[c, κ]."""
        if pair.group is not None:
            return self._of_group(pair, pair.group)
        rows, place = self._row_entries(pair.rows)
        columns = self._column_entries(pair.columns)
        if rows.shape[1] < self.count:
            columns = columns[:, place : place + rows.shape[1]]
        return _sum_products(rows * columns, place)

    def _of_group(self, pair: FactorPair, group: int) -> UseEntries:
        """The entries of a use that has one of the groups alone."""
        assert isinstance(pair.rows, Dense)
        assert isinstance(pair.columns, Dense)
        inside, place = self.rows.inside(group, 1)
        rows, columns = pair.rows.entries[:, inside, self.row], pair.columns.entries[:, inside, self.column]
        dtype = statistics_dtype(rows.dtype)
        return _sum_products(rows.to(dtype) * columns.to(dtype), place)

    def _row_entries(self, factor: Factor) -> tuple[Tensor, int]:
        if isinstance(factor, OneHot):  # a table that is a linear layer's weight too
            rows = torch.arange(factor.size, device=factor.device)[self.rows.as_slice]
            return (factor.index.unsqueeze(1) == rows.view(1, -1, 1)).to(factor.dtype), 0
        if isinstance(factor, Bags):
            rows = torch.arange(factor.size, device=factor.device)[self.rows.as_slice]
            return factor.at(rows.expand(factor.bags, -1)).unsqueeze(2), 0
        assert isinstance(factor, Dense)
        entries, place = factor.entries, 0
        if self.shape.groups > 1:
            entries = entries[:, self.rows.as_slice, self.row]
        elif factor.full_size is None:
            entries = entries[:, 0, self.rows.as_slice]
        else:
            inside, place = self.rows.inside(factor.first_row, entries.shape[2])
            entries = entries[:, 0, inside]
        return entries.to(statistics_dtype(entries.dtype)), place

    def _column_entries(self, factor: Factor) -> Tensor:
        if isinstance(factor, Patches):
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


PERIOD = 2**16
"""Rows of a table after which their signs are the same again."""


BLOCK = 16
"""Rows of a long table that count or do not together: their gradients are neighbours in memory."""


@functools.cache
def _signs(long: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """±1 at random for each row of a table, (PERIOD,); for a long one 0 where the row does not count."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PERIOD,), generator=generator) * 2 - 1
    if long:
        counts = torch.randint(0, 16, (PERIOD // BLOCK,), generator=generator) == 0
        signs *= counts.repeat_interleave(BLOCK)
    return signs.to(device, dtype)


@dataclass(kw_only=True, slots=True)
class TableEntries:
    """Sums with random signs over rows of a table, in neighbouring columns.

    Attributes:
        count: of the columns.
        column: the first.
        shift: of the rows' signs.
        long: whether a sixteenth of the rows counts, in place of all.
    """

    count: int
    column: int
    shift: int
    long: bool

    @classmethod
    def sample(cls, layer: Layer, most: int, long_from: int, generator: random.Random) -> TableEntries:
        """Up to ``most`` columns; of a table with ``long_from`` rows or more a sixteenth of the rows counts."""
        height, width = layer.weight.shape
        count = min(most, width)
        column, shift = generator.randrange(width - count + 1), generator.randrange(PERIOD)
        return cls(count=count, column=column, shift=shift, long=height >= long_from)

    def of_use(self, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ]; softmax over a long table, whose rows add up to zero, hardly cancels in them."""
        assert isinstance(pair.columns, Dense)
        columns = pair.columns.entries[:, 0, self.column : self.column + self.count]
        return _sum_products(self._signed_rows(pair.rows).unsqueeze(1) * columns.to(statistics_dtype(columns.dtype)))

    def _signed_rows(self, factor: Factor) -> Tensor:
        """sᵀGᵢ, (samples, κ)."""
        if isinstance(factor, OneHot):
            return self._signs(factor.index, factor.dtype)
        if isinstance(factor, Bags):
            signs = self._signs(factor.index, factor.weight.dtype) * factor.weight
            return signs.new_zeros(factor.bags).index_add_(0, factor.bag, signs).unsqueeze(1)
        assert isinstance(factor, Dense)
        return self._signed_dense_rows(factor)

    def _signed_dense_rows(self, factor: Dense) -> Tensor:
        dtype, first, count = statistics_dtype(factor.entries.dtype), factor.first_row, factor.entries.shape[2]
        rows, signs = self._counting(first, count, dtype, factor.device)
        entries = factor.entries[:, 0].mT.index_select(2, rows - first).to(dtype)  # (samples, κ, rows)
        return entries @ signs

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """(sᵀG)[c]."""
        dtype = statistics_dtype(gradient.dtype)
        if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1:
            signs, values = self._signs(gradient._indices()[0], dtype), gradient._values()
        else:
            values = gradient if gradient.layout == torch.strided else gradient.to_dense()
            rows, signs = self._counting(0, len(values), dtype, values.device)
            values = values if len(rows) == len(values) else values.index_select(0, rows)
        values = values[:, self.column : self.column + self.count].to(dtype)
        with without_autocast([values.device.type]):
            return signs @ values

    def _counting(self, first: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Those of the ``count`` rows from ``first`` on that count, and their signs."""
        rows = torch.arange(first, first + count, device=device)
        signs = self._signs(rows, dtype)
        if self.long:
            rows = rows[signs != 0]
            signs = self._signs(rows, dtype)
        return rows, signs

    def _signs(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return _signs(self.long, dtype, rows.device)[(rows + self.shift) & (PERIOD - 1)]


@dataclass(kw_only=True, slots=True)
class MatrixSums(TableEntries):
    """Sums with random signs over all rows of a matrix and over each ``count``-th of its columns.

    Attributes:
        count: of the sums.
        column: shift of the columns' signs.
        shift: of the rows' signs.
        long: False.
    """

    _latest: tuple[weakref.ref[Factor], Tensor, Tensor] | None = None

    @classmethod
    def sample_sums(cls, layer: Layer, most: int, generator: random.Random) -> MatrixSums:
        """Up to ``most`` sums."""
        column, shift = generator.randrange(PERIOD), generator.randrange(PERIOD)
        return cls(count=min(most, layer.weight.shape[1]), column=column, shift=shift, long=False)

    def of_use(self, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (sᵀGᵢ)[κ] (TᵀAᵢ)[·, κ], where a column of T has the signs of the columns of one sum.

        Its size is that of G and A, not of their sums, which cancel: the rows of a softmax's gradient add up to zero.
        """
        assert isinstance(pair.columns, Dense)
        columns = pair.columns.entries[:, 0].mT.flatten(0, 1)  # (samples·κ, n)
        columns = columns.to(statistics_dtype(columns.dtype))
        sums, squares = self.sum_rows(pair.rows)
        size = (squares @ torch.linalg.vector_norm(columns, dim=1).square_()).sqrt()
        return UseEntries(sums @ self._sum_columns(columns), 0, size)

    def sum_rows(self, rows: Factor) -> tuple[Tensor, Tensor]:
        """Sum the rows of a factor with their signs.

        Args:
            rows: of a use; asked for several times in a row, it is summed once.

        Returns:
            sᵀGᵢ, and the squared norms of the rows' entries, (samples·κ,) both; of indices those of the sums.
        """
        if self._latest is not None and self._latest[0]() is rows:
            return self._latest[1:]
        sums = self._signed_rows(rows).flatten()
        if isinstance(rows, Dense):
            entries = rows.entries[:, 0].mT.flatten(0, 1)
            norms: Tensor = torch.linalg.vector_norm(entries.to(statistics_dtype(entries.dtype)), dim=1)
            squares = norms.square_()
        else:
            squares = sums.square()
        self._latest = weakref.ref(rows), sums, squares
        return sums, squares

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of sᵀG T."""
        dtype = statistics_dtype(gradient.dtype)
        values = gradient if gradient.layout == torch.strided else gradient.to_dense()
        values = values.to(dtype)
        with without_autocast([values.device.type]):
            return self._sum_columns(_signs_from(self.shift, len(values), values) @ values)

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """The sum over the layer's bias with the signs of the rows."""
        return BiasSum(sums=self, part=layer.bias_slice)

    def _signed_dense_rows(self, factor: Dense) -> Tensor:
        entries = factor.entries[:, 0].mT
        entries = entries.to(statistics_dtype(entries.dtype))
        return entries @ _signs_from(self.shift + factor.first_row, entries.shape[2], entries)

    def _sum_columns(self, values: Tensor) -> Tensor:
        """The sums over the last dimension, the columns."""
        return self._add_up(values * _signs_from(self.column, values.shape[-1], values))

    def _add_up(self, values: Tensor) -> Tensor:
        """Each ``count``-th column added up."""
        if values.shape[-1] % self.count:
            values = F.pad(values, (0, -values.shape[-1] % self.count))
        return values.reshape(*values.shape[:-1], -1, self.count).sum(-2)


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

    def of_use(self, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ Gᵢ[r, κ] times the constant that the use multiplies the bias by."""
        rows, place = self.rows._row_entries(pair.rows)
        return _sum_products(rows * _bias_factor(pair), place)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of the bias's gradient."""
        values = gradient[self.part]
        shape = self.rows.shape
        if shape.groups > 1:
            return values.view(shape.groups, shape.rows)[self.rows.rows.as_slice, self.rows.row]
        return values[self.rows.rows.as_slice]


@dataclass(kw_only=True, slots=True)
class BiasSum:
    """The sum over a bias with random signs.

    Attributes:
        sums: of the matrix, over the same rows with the same signs.
        part: of the bias parameter that is the layer's.
    """

    sums: MatrixSums
    part: slice

    @property
    def count(self) -> int:
        """One sum."""
        return 1

    def of_use(self, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (sᵀGᵢ)[κ] times the constant that the use multiplies the bias by; its size is that of the rows."""
        sums, squares = self.sums.sum_rows(pair.rows)
        factor = _bias_factor(pair)
        return UseEntries(sums.sum(0, keepdim=True) * factor, 0, squares.sum().sqrt() * factor)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The sum over the bias's gradient."""
        values = gradient[self.part]
        values = values.to(statistics_dtype(values.dtype))
        return (values * _signs_from(self.sums.shift, len(values), values)).sum(0, keepdim=True)


def _bias_factor(pair: FactorPair) -> float:
    """1 where a use adds the bias, else 0."""
    columns = pair.columns
    assert isinstance(columns, Dense | Patches | KhatriRao)
    return columns.appended or 0.0


def _signs_from(start: int, count: int, like: Tensor) -> Tensor:
    """The signs of ``count`` rows or columns from ``start`` on."""
    signs, start = _signs(False, like.dtype, like.device), start % PERIOD
    if start + count <= PERIOD:
        return signs[start : start + count]
    return signs[torch.arange(start, start + count, device=like.device) & (PERIOD - 1)]


def sample_entries(
    layer: Layer, shape: MatrixShape, output_size: int, generator: random.Random, tuning: Tuning = DEFAULT
) -> ComparedEntries:
    """Sample which entries of a layer's gradient are compared.

    Args:
        layer: whose gradient they are of.
        shape: of its matrix.
        output_size: elements of the output of its first use.
        generator: samples them.
        tuning: how many they are.

    Returns:
        The entries.
    """
    products = max(1, output_size // max(1, layer.matrix[1]))
    most = min(tuning.compared_entries, max(2, tuning.compared_products // products))
    small = output_size <= tuning.summed_outputs and layer.weight.numel() <= tuning.summed_weights
    if layer.weight.dim() == 2 and not layer.row_sparse and small:
        return MatrixSums.sample_sums(layer, most, generator)
    if layer.row_sparse:
        return TableEntries.sample(layer, most, tuning.long_table, generator)
    return MatrixEntries.sample(layer, shape, most, generator)


def choose_bias_entries(layer: Layer, entries: ComparedEntries) -> ComparedEntries | None:
    """Choose which entries of a layer's bias are compared.

    Args:
        layer: whose bias it is.
        entries: what is compared of its weight.

    Returns:
        The entries; None where the bias is no column of the matrix, or is not trained.
    """
    if layer.trained_bias is None or not isinstance(entries, MatrixEntries | MatrixSums):
        return None
    return entries.bias_entries(layer)


__all__ = [
    "ComparedEntries",
    "MatrixEntries",
    "MatrixSums",
    "Spread",
    "TableEntries",
    "choose_bias_entries",
    "sample_entries",
]
