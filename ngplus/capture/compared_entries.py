"""Which entries of a layer's gradient are compared with its captured uses, and what both have there.

A use that was not captured changes all entries of the gradient G, as a rule, so that a few entries (r, c) of the matrix
tell: Σᵢ Σ_κ Gᵢ[r, κ] Aᵢ[c, κ] against G[r, c]. Of a table, where such a use may reach few rows, a sixteenth of the rows
or more count together, with random coefficients s: Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ] against (sᵀG)[c]. Of a linear layer whose
output is small all rows and columns do, in a few sums with coefficients S for the rows and T for the columns:
(Σᵢ Σ_κ (SᵀGᵢ)[·, κ] Aᵢ[·, κ]ᵀ) T against SᵀG T.

A bias, which is one more column of its layer's matrix, is compared by itself in the same rows.

Of a small model on a CPU the calls cost more than what they compute, so that each way takes as few as can be.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ngplus.curvature.second_moment import form_gradients
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.im2col import Patches
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.layers import Layer, MatrixShape
from ngplus.tuning import DEFAULT, Tuning


class UseRows(NamedTuple):
    """What is needed of the rows of a use, for the entries of a weight and of its bias.

    Attributes:
        values: some of them, (samples, k, κ), or a sum over them, (samples·κ,).
        place: of the first of them among all that are compared.
        size: norm of what a sum is of; 1 where there is none.
    """

    values: Tensor
    place: int = 0
    size: Tensor | float = 1.0


class UseEntries(NamedTuple):
    """Some entries of what a use brings to a gradient.

    Attributes:
        values: (k,), k of all that are compared; () for one.
        place: of the first of them among all.
        sizes: scalars whose product is about the root sum of squares of what they are sums of, which tells how large
            rounding is.
    """

    values: Tensor
    place: int
    sizes: tuple[Tensor | float, ...]


def _sum_products(products: Tensor, place: int = 0) -> UseEntries:
    """The sums of (samples, k, κ) products over samples and positions."""
    return UseEntries(products.sum(dim=(0, 2)), place, (torch.linalg.vector_norm(products),))


class ComparedEntries(Protocol):
    """Some entries of a layer's matrix."""

    @property
    def count(self) -> int:
        """How many they are."""
        ...

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """What is needed of a use's rows."""
        ...

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """The entries of Σᵢ 𝒢ᵢ of a use."""
        ...

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of a weight's gradient, (count,), or () for one, perhaps in its memory."""
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

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Gᵢ[r, κ]."""
        rows = pair.rows
        if pair.group is not None:  # a use that has one of the groups alone
            assert isinstance(rows, Dense)
            inside, place = self.rows.inside(pair.group, 1)
            return UseRows(_for_statistics(rows.entries[:, inside, self.row]), place)
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
            return _sum_products(
                rows.values * _for_statistics(pair.columns.entries[:, inside, self.column]), rows.place
            )
        entries = self._column_entries(pair.columns)
        if rows.values.shape[1] < self.count:
            entries = entries[:, rows.place : rows.place + rows.values.shape[1]]
        return _sum_products(rows.values * entries, rows.place)

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


PERIOD = 2**16
"""Rows of a table after which their coefficients are the same again."""


BLOCK = 16
"""Rows of a long table that count or do not together: their gradients are neighbours in memory."""


@functools.cache
def _coefficients(long: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each row of a table, of two periods: ½ to 1½ with either sign; 0 for rows of a long one that do not count.

    Numbers, and not the signs alone, since two rows of signs are often the same where a matrix is small.
    """
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randint(0, 2, (PERIOD,), generator=generator) * 2.0 - 1
    coefficients *= 0.5 + torch.rand(PERIOD, generator=generator)
    if long:
        counts = torch.randint(0, 16, (PERIOD // BLOCK,), generator=generator) == 0
        coefficients *= counts.repeat_interleave(BLOCK)
    return coefficients.to(device, dtype).repeat(2)


@functools.cache
def _counting_rows(device: torch.device) -> Tensor:
    """The rows of a period of a long table that count, ascending."""
    return _coefficients(True, torch.float32, device)[:PERIOD].nonzero().flatten()


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
        column, shift = generator.randrange(width - count + 1), _SHIFTS[generator.randrange(len(_SHIFTS))]
        return cls(count=count, column=column, shift=shift, height=height, long=height >= long_from)

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """sᵀGᵢ."""
        return UseRows(self._combine_rows(pair.rows))

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ]; softmax over a long table, whose rows add up to zero, hardly cancels in them."""
        columns = pair.columns
        assert isinstance(columns, Dense)
        entries = self._columns(_in_rows(columns.entries))
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
        entries, first = _in_rows(factor.entries), factor.first_row
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
        values = _for_statistics(self._columns(values))
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
            return None, _coefficients_from(self.shift + first, count, dtype, device)
        rows = (_counting_rows(device) - (self.shift + first)) & (PERIOD - 1)
        if count > PERIOD:
            rows = (torch.arange(0, count, PERIOD, device=device).unsqueeze(1) + rows).flatten()
        rows = rows[rows < count]
        return rows, self._coefficients(rows + first, dtype)

    def _coefficients(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        rows = rows if self.height <= PERIOD else rows & (PERIOD - 1)
        return _coefficients_after(self.shift, self.long, dtype, rows.device).index_select(0, rows)


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
        row, column = (_SHIFTS[generator.randrange(len(_SHIFTS))] for _ in range(2))
        return cls(count=4, row=row, column=column, height=layer.weight.shape[0])

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """SᵀGᵢ, (samples·κ, 2), and the norm of Gᵢ's entries; of indices that of their coefficients."""
        rows = pair.rows
        sums = self._combine_rows(rows)
        size: Tensor = torch.linalg.vector_norm(rows.entries if isinstance(rows, Dense) else sums)
        return UseRows(sums, size=size)

    def _combine_rows(self, factor: Factor) -> Tensor:
        if isinstance(factor, Dense):
            entries = _in_rows(factor.entries)
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
        return _coefficient_columns(self.row + first, rows, 2, like.dtype, like.device)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """(Σᵢ Σ_κ (SᵀGᵢ)[·, κ] Aᵢ[·, κ]ᵀ) T, where a column of T has the coefficients of the columns.

        Its size is that of G and A, not of their sums, which cancel: the rows of a softmax's gradient add up to zero.
        """
        columns = pair.columns
        assert isinstance(columns, Dense)
        entries = _in_rows(columns.entries)
        sizes = rows.size, torch.linalg.vector_norm(entries), max(1, len(entries)) ** -0.5
        return UseEntries(self._sum_columns(rows.values.T @ entries), 0, sizes)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of SᵀG T."""
        values = _for_statistics(gradient if gradient.layout == torch.strided else gradient.to_dense())
        with without_autocast([values.device.type]):
            return self._sum_columns(self.row_coefficients(values.shape[0], values).T @ values)

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """The sums over the layer's bias with the coefficients of the rows."""
        return BiasSums(sums=self, part=layer.bias_slice)

    def _sum_columns(self, values: Tensor) -> Tensor:
        """The sums over all columns, (count,)."""
        return (values @ _coefficient_columns(self.column, values.shape[1], 2, values.dtype, values.device)).flatten()


def _in_rows(entries: Tensor) -> Tensor:
    """(samples, 1, d, κ) as (samples·κ, d), in the statistics' dtype."""
    samples, _, size, positions = entries.shape
    return _for_statistics(entries.reshape(samples, size) if positions == 1 else entries[:, 0].mT.flatten(0, 1))


def _for_statistics(values: Tensor) -> Tensor:
    """The same in the statistics' dtype."""
    dtype = values.dtype
    return values if (wanted := statistics_dtype(dtype)) == dtype else values.to(wanted)


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
        return _sum_products(rows.values * _bias_factor(pair.columns), rows.place)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of the bias's gradient."""
        values = gradient[self.part]
        shape = self.rows.shape
        if shape.groups > 1:
            return values.view(shape.groups, shape.rows)[self.rows.rows.as_slice, self.rows.row]
        return values[self.rows.rows.as_slice]


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
        factor = _bias_factor(pair.columns)
        total = rows.values.sum(dim=0)
        return UseEntries(total if factor == 1.0 else total * factor, 0, (rows.size, factor))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The sums over the bias's gradient."""
        values = _for_statistics(gradient if self.part.stop - self.part.start == len(gradient) else gradient[self.part])
        with without_autocast([values.device.type]):
            return torch.mv(self.sums.row_coefficients(len(values), values).T, values)


@dataclass(kw_only=True, slots=True)
class WholeSums:
    """Sums with random coefficients over all entries of a gradient of any shape, which is formed for that.

    That costs about as much as the backward pass takes for the gradient: for stacks of small matrices, and for layers
    whose gradient has had other sources.

    Attributes:
        count: of the sums.
        start: shift of the coefficients.
        groups: how many matrices there are.
        columns: of each, without the bias's.
        limit: elements of temporaries.
    """

    count: int
    start: int
    groups: int
    columns: int
    limit: int

    @classmethod
    def sample(cls, layer: Layer, generator: random.Random, limit: int) -> WholeSums:
        """Four sums."""
        start = _SHIFTS[generator.randrange(len(_SHIFTS))]
        return cls(count=4, start=start, groups=layer.matrix[0], columns=layer.matrix[2], limit=limit)

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Σᵢ 𝒢ᵢ, (groups, m, n), and the root of the sum of squares of all 𝒢ᵢ's entries."""
        rows, columns = pair.rows, pair.columns
        groups = 1 if pair.group is not None else self.groups
        total = torch.zeros(groups, rows.size, columns.size, dtype=rows.dtype, device=rows.device)
        squares = total.new_zeros(())
        step = max(1, self.limit // max(1, total.numel()))
        for start in range(0, rows.samples, step):
            part = form_gradients(
                [rows.slice(start, start + step)], [columns.slice(start, start + step)], groups, self.limit
            )
            total += part.sum(dim=0)
            squares += torch.linalg.vector_norm(part).square()
        return UseRows(total, size=squares.sqrt())

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """The sums over Σᵢ 𝒢ᵢ."""
        values = rows.values[..., : self.columns]
        first = 0 if pair.group is None else pair.group * values.numel()
        return UseEntries(self.sum_entries(values, first), 0, (rows.size,))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The sums over a gradient."""
        return self.sum_entries(_for_statistics(gradient if gradient.layout == torch.strided else gradient.to_dense()))

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """The sums over the layer's bias."""
        return WholeBias(sums=self, part=layer.bias_slice)

    def sum_entries(self, values: Tensor, first: int = 0) -> Tensor:
        """The sums over entries in their order, of which there are others in front."""
        flat = values.reshape(-1)
        shifts = [self.start + first + number * (PERIOD // 8 + 1) for number in range(self.count)]
        with without_autocast([flat.device.type]):
            return torch.stack(
                [torch.dot(flat, _window(shift, len(flat), flat.dtype, flat.device)) for shift in shifts]
            )


@dataclass(kw_only=True, slots=True)
class WholeBias:
    """The sums over a bias, of a weight that is compared in `WholeSums`.

    Attributes:
        sums: of the weight.
        part: of the bias parameter that is the layer's.
    """

    sums: WholeSums
    part: slice

    @property
    def count(self) -> int:
        """As many as of the weight."""
        return self.sums.count

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """Those of the matrix."""
        return self.sums.reduce_rows(pair)

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """The sums over the last column of Σᵢ 𝒢ᵢ."""
        return UseEntries(self.sums.sum_entries(rows.values[..., -1]), 0, (rows.size,))

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The sums over the bias's gradient."""
        return self.sums.sum_entries(_for_statistics(gradient[self.part]))


def _bias_factor(columns: Factor) -> float:
    """1 where a use adds the bias, else 0."""
    assert isinstance(columns, Dense | Patches | KhatriRao)
    return columns.appended or 0.0


_SHIFTS = range(0, PERIOD, 1021)
"""Where the coefficients of a matrix's rows and columns may start: so few that what is made of them can be kept."""


def _window(start: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of ``count`` rows or columns from ``start`` on."""
    coefficients, start = _coefficients(False, dtype, device), start % PERIOD
    if start + count <= 2 * PERIOD:
        return coefficients[start : start + count]
    return coefficients[torch.arange(start, start + count, device=device) & (PERIOD - 1)]


@functools.lru_cache(maxsize=2**10)
def _coefficients_after(start: int, long: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of a table's rows from ``start`` on."""
    return _coefficients(long, dtype, device)[start:]


_coefficients_from = functools.lru_cache(maxsize=2**13)(_window)
"""The same, kept: of a matrix's sums it is a view."""


@functools.lru_cache(maxsize=2**13)
def _coefficient_columns(start: int, length: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, count) coefficients for ``count`` sums: those of one are those of another from another column on."""
    between = PERIOD // 8 + 1
    coefficients = _coefficients_from(start, length + (count - 1) * between, dtype, device)
    return coefficients.as_strided((length, count), (1, between), coefficients.storage_offset())


def sample_entries(
    layer: Layer,
    shape: MatrixShape,
    output_size: int,
    generator: random.Random,
    tuning: Tuning = DEFAULT,
    *,
    doubted: bool = False,
) -> ComparedEntries:
    """Sample which entries of a layer's gradient are compared.

    Args:
        layer: whose gradient they are of.
        shape: of its matrix.
        output_size: elements of the output of its first use.
        generator: samples them.
        tuning: how many they are.
        doubted: whether its gradient has had other sources before, so that all of it is compared.

    Returns:
        The entries.
    """
    products = max(1, output_size // max(1, layer.matrix[1]))
    most = min(tuning.compared_entries, max(2, tuning.compared_products // products))
    small = output_size <= tuning.summed_outputs and layer.weight.numel() <= tuning.summed_weights
    if (
        layer.weight.dim() == 2
        and not (layer.row_sparse or doubted)
        and small
        and max(layer.weight.shape) <= PERIOD // 2
    ):
        return MatrixSums.sample(layer, generator)
    if layer.row_sparse:
        return TableEntries.sample(layer, most, tuning.long_table, generator)
    if doubted or (layer.batched and small):
        return WholeSums.sample(layer, generator, tuning.curvature_chunk(layer.weight.device))
    return MatrixEntries.sample(layer, shape, most, generator)


def choose_bias_entries(layer: Layer, entries: ComparedEntries) -> ComparedEntries | None:
    """Choose which entries of a layer's bias are compared.

    Args:
        layer: whose bias it is.
        entries: what is compared of its weight.

    Returns:
        The entries; None where the bias is no column of the matrix, or is not trained.
    """
    if layer.trained_bias is None or isinstance(entries, TableEntries):
        return None
    assert isinstance(entries, MatrixEntries | MatrixSums | WholeSums)
    return entries.bias_entries(layer)


__all__ = [
    "ComparedEntries",
    "MatrixEntries",
    "MatrixSums",
    "Spread",
    "TableEntries",
    "WholeSums",
    "choose_bias_entries",
    "sample_entries",
]
