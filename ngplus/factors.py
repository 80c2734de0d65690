"""The two factors of a per-sample gradient: 𝒢ᵢ = Gᵢ Aᵢᵀ, equation (8).

A factor is one side of that product for b samples at once: ``groups`` independent matrices of ``size`` rows
and κ = ``positions`` columns each, shape (b, groups, size, κ). What a curvature matrix needs of a factor is
either its entries, its Gram matrix over positions, or (κ = 1) its squared norm; the classes here give each in
the cheapest way that their structure allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Factor(Protocol):
    """One side of 𝒢ᵢ = Gᵢ Aᵢᵀ for b samples."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries as `dense` gives them: float32 or float64."""
        ...

    @property
    def samples(self) -> int:
        """Number of samples b."""
        ...

    @property
    def size(self) -> int:
        """Rows d of the factor, a constant row for the bias included."""
        ...

    @property
    def positions(self) -> int:
        """Columns κ of the factor."""
        ...

    @property
    def norm_elements(self) -> int:
        """Elements of the temporaries of `squared_norms` for one position and group."""
        ...

    def gram_cost(self) -> int:
        """Floating-point operations of `gram` for one sample."""
        ...

    def dense(self) -> Tensor:
        """The entries, (b, groups, d, κ), at least in float32."""
        ...

    def gram(self) -> Tensor:
        """Inner products of every two positions, (b, groups, κ, κ)."""
        ...

    def squared_norms(self) -> Tensor:
        """Squared norm of every position, (b, groups, κ)."""
        ...

    def slice(self, start: int, stop: int) -> Factor:
        """The samples ``start`` to ``stop``."""
        ...

    def slice_positions(self, start: int, stop: int) -> Factor:
        """The positions ``start`` to ``stop`` of every sample."""
        ...

    def flat(self) -> Factor:
        """The same with every position a sample of its own: b·κ samples, κ = 1."""
        ...


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays, everything else (autocast's bf16 and fp16 too) is taken in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_tail(entries: Tensor, tail: float | None) -> Tensor:
    """``entries`` (b, groups, d, κ) with one more row of a constant below."""
    if tail is None:
        return entries
    row = entries.new_full((), tail).expand(*entries.shape[:2], 1, entries.shape[3])
    return torch.cat([entries, row], dim=2)


@dataclass(frozen=True)
class Dense:
    """A factor given by its entries.

    Attributes:
        entries: (b, groups, d, κ), any strides.
        tail: value of one more row: 1.0 where the bias is a column of the layer's matrix and this call added
            it, 0.0 where this call did not, None where there is no such column.
        first_row: where these rows stand in a factor of ``full_size`` rows; the others are zero. Used where
            a call multiplies by a slice of the weight only (the packed projections of attention).
        full_size: rows of the whole factor; None where ``entries`` is the whole.
    """

    entries: Tensor
    tail: float | None = None
    first_row: int = 0
    full_size: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.entries.device

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return statistics_dtype(self.entries.dtype)

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return self.entries.shape[0]

    @property
    def size(self) -> int:
        """Rows of the factor."""
        return (self.full_size or self.entries.shape[2]) + (self.tail is not None)

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.entries.shape[3]

    @property
    def norm_elements(self) -> int:
        """All rows, unless they are contiguous and in the statistics' dtype."""
        is_read_in_place = self.entries.dtype == self.dtype and self.entries.stride(2) == 1
        return 1 if is_read_in_place else self.entries.shape[2]

    def gram_cost(self) -> int:
        """2κ²d for a sample and group."""
        return 2 * self.positions**2 * self.entries.shape[2]

    def _entries(self) -> Tensor:
        return self.entries.to(self.dtype)

    def dense(self) -> Tensor:
        """The entries, zero rows and the constant row put in."""
        entries = self._entries()
        if self.full_size is not None:
            below = self.full_size - self.first_row - entries.shape[2]
            entries = F.pad(entries, (0, 0, self.first_row, below))
        return with_tail(entries, self.tail)

    def gram(self) -> Tensor:
        """AᵀA, to which a constant row adds its square."""
        entries = self._entries()
        gram = entries.mT @ entries
        return gram + 1.0 if self.tail else gram

    def squared_norms(self) -> Tensor:
        """Sum of squares over the rows."""
        entries = self._entries()
        if entries.stride(2) == 1:
            norms: Tensor = torch.linalg.vector_norm(entries, dim=2).square_()
        else:  # for which a norm takes three to ten times as long
            norms = entries.square().sum(dim=2)
        return norms + 1.0 if self.tail else norms

    def slice(self, start: int, stop: int) -> Dense:
        """The samples ``start`` to ``stop``."""
        return replace(self, entries=self.entries[start:stop])

    def slice_positions(self, start: int, stop: int) -> Dense:
        """The positions ``start`` to ``stop``."""
        return replace(self, entries=self.entries[..., start:stop])

    def flat(self) -> Factor:
        """Every position a sample: a view where there is one."""
        columns = self.entries.permute(0, 3, 1, 2)
        if self.positions == 1 or columns.stride(0) == self.positions * columns.stride(1):
            return replace(self, entries=columns.flatten(0, 1).unsqueeze(-1))
        return Flat.of(self)

    def gather(self, index: Tensor) -> Dense:
        """Columns by their numbers, see `Gathered`."""
        columns = self.entries.permute(0, 3, 1, 2)[index // self.positions, index % self.positions]
        return replace(self, entries=columns.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class OneHot:
    """Rows of an embedding table: position p of sample i is the unit vector of ``index[i, p]``.

    Attributes:
        index: (b, κ), integers.
        table_size: rows of the table.
        dtype: of the entries, when they are asked for.
    """

    index: Tensor
    table_size: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.index.device

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return self.index.shape[0]

    @property
    def size(self) -> int:
        """Rows of the table."""
        return self.table_size

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.index.shape[1]

    @property
    def norm_elements(self) -> int:
        """The norm."""
        return 1

    def gram_cost(self) -> int:
        """One comparison for every two positions."""
        return self.positions**2

    def dense(self) -> Tensor:
        """The unit vectors written out, (b, 1, table_size, κ)."""
        hot = torch.zeros(self.samples, self.table_size, self.positions, dtype=self.dtype, device=self.index.device)
        return hot.scatter_(1, self.index.unsqueeze(1), 1.0).unsqueeze(1)

    def gram(self) -> Tensor:
        """1 where two positions name the same row, else 0."""
        equal = self.index.unsqueeze(2) == self.index.unsqueeze(1)
        return equal.to(self.dtype).unsqueeze(1)

    def squared_norms(self) -> Tensor:
        """A unit vector's norm is 1."""
        return torch.ones(self.samples, 1, self.positions, dtype=self.dtype, device=self.index.device)

    def slice(self, start: int, stop: int) -> OneHot:
        """The samples ``start`` to ``stop``."""
        return replace(self, index=self.index[start:stop])

    def slice_positions(self, start: int, stop: int) -> OneHot:
        """The positions ``start`` to ``stop``."""
        return replace(self, index=self.index[:, start:stop])

    def flat(self) -> OneHot:
        """Every position a sample."""
        return replace(self, index=self.index.reshape(-1, 1))


@dataclass(frozen=True)
class Bags:
    """Weighted sums of table rows, one a sample (κ = 1): Σ_p w_p e_{index_p} over the members of a bag.

    Attributes:
        index: (members,), the table row of each member of all bags.
        bag: (members,), the bag each member is in.
        weight: (members,), floating point.
        bags: number of bags b.
        table_size: rows of the table.
    """

    index: Tensor
    bag: Tensor
    weight: Tensor
    bags: int
    table_size: int

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.index.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights'."""
        return self.weight.dtype

    @property
    def samples(self) -> int:
        """Number of bags b."""
        return self.bags

    @property
    def size(self) -> int:
        """Rows of the table."""
        return self.table_size

    @property
    def positions(self) -> int:
        """A bag is one position."""
        return 1

    @property
    def norm_elements(self) -> int:
        """About one a member."""
        return self.gram_cost()

    def gram_cost(self) -> int:
        """About one operation a member."""
        return max(1, self.index.numel() // max(1, self.bags))

    def dense(self) -> Tensor:
        """The weighted counts written out, (b, 1, table_size, 1)."""
        counts = torch.zeros(self.bags * self.table_size, dtype=self.weight.dtype, device=self.weight.device)
        counts.index_add_(0, self.bag * self.table_size + self.index, self.weight)
        return counts.view(self.bags, 1, self.table_size, 1)

    def gram(self) -> Tensor:
        """The squared norm as a 1×1 matrix."""
        return self.squared_norms().unsqueeze(-1)

    def squared_norms(self) -> Tensor:
        """Σ over distinct rows of (their weights' sum)², (b, 1, 1); no pass over the table."""
        return self.inner(self)

    def inner(self, other: Bags) -> Tensor:
        """Inner products with the same samples' bags of another call, (b, 1, 1)."""
        calls = (self, other)
        keys = torch.cat([call.bag * self.table_size + call.index for call in calls])
        rows, place = torch.unique(keys, return_inverse=True)
        split = self.index.numel()
        product = self._totals(rows, place[:split]) * other._totals(rows, place[split:])
        norms = torch.zeros(self.bags, dtype=self.weight.dtype, device=self.weight.device)
        norms.index_add_(0, rows // self.table_size, product)
        return norms.view(self.bags, 1, 1)

    def at(self, index: Tensor) -> Tensor:
        """Each bag's entries at the rows ``index`` (b, κ), which are the inner products with their unit vectors."""
        weights = self.weight.unsqueeze(1) * (index[self.bag] == self.index.unsqueeze(1))
        return weights.new_zeros(index.shape).index_add_(0, self.bag, weights)

    def _totals(self, rows: Tensor, place: Tensor) -> Tensor:
        """Sum of the weights that fall on each distinct (bag, row)."""
        return self.weight.new_zeros(rows.numel()).index_add_(0, place, self.weight)

    def slice(self, start: int, stop: int) -> Bags:
        """The bags ``start`` to ``stop``."""
        if (start, stop) == (0, self.bags):
            return self
        inside = (self.bag >= start) & (self.bag < stop)
        return replace(
            self,
            index=self.index[inside],
            bag=self.bag[inside] - start,
            weight=self.weight[inside],
            bags=stop - start,
        )

    def slice_positions(self, start: int, stop: int) -> Bags:
        """A bag is one position: all of it."""
        return self

    def flat(self) -> Bags:
        """A bag is one position already."""
        return self


@dataclass(frozen=True)
class Sampled:
    """Some rows of a factor, scaled: Ωᵀ A for the Ω of (17).

    Attributes:
        factor: the whole.
        drawn: (q,), the rows.
        scale: √(d/q).
    """

    factor: Factor
    drawn: Tensor
    scale: float

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.factor.device

    @property
    def dtype(self) -> torch.dtype:
        """The factor's."""
        return self.factor.dtype

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return self.factor.samples

    @property
    def size(self) -> int:
        """Rows drawn, q."""
        return self.drawn.numel()

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.factor.positions

    @property
    def norm_elements(self) -> int:
        """The rows drawn, and those they are drawn from."""
        return self.factor.size + self.size

    def gram_cost(self) -> int:
        """2κ²q."""
        return 2 * self.positions**2 * self.size

    def dense(self) -> Tensor:
        """The drawn rows, (b, groups, q, κ)."""
        entries = self.factor.dense()
        return entries.index_select(2, self.drawn.to(entries.device)) * self.scale

    def gram(self) -> Tensor:
        """Inner products over the drawn rows."""
        entries = self.dense()
        return entries.mT @ entries

    def squared_norms(self) -> Tensor:
        """Sum of squares over the drawn rows."""
        return self.dense().square().sum(dim=2)

    def slice(self, start: int, stop: int) -> Sampled:
        """The samples ``start`` to ``stop``."""
        return replace(self, factor=self.factor.slice(start, stop))

    def slice_positions(self, start: int, stop: int) -> Sampled:
        """The positions ``start`` to ``stop``."""
        return replace(self, factor=self.factor.slice_positions(start, stop))

    def flat(self) -> Sampled:
        """Every position a sample."""
        return replace(self, factor=self.factor.flat())


@dataclass(frozen=True)
class Flat:
    """Every position of a factor a sample of its own (κ = 1), which are written out for as many as are asked for.

    Attributes:
        factor: of b samples with κ positions each.
        start: number of the first position, counted over all samples.
        stop: number of the position after the last.
    """

    factor: Factor
    start: int
    stop: int

    @classmethod
    def of(cls, factor: Factor) -> Flat:
        """All positions of a factor."""
        return cls(factor, 0, factor.samples * factor.positions)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.factor.device

    @property
    def dtype(self) -> torch.dtype:
        """The factor's."""
        return self.factor.dtype

    @property
    def samples(self) -> int:
        """Number of positions."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Rows of the factor."""
        return self.factor.size

    @property
    def positions(self) -> int:
        """One a sample."""
        return 1

    @property
    def norm_elements(self) -> int:
        """The factor's."""
        return self.factor.norm_elements

    def gram_cost(self) -> int:
        """Of the squared norm."""
        return 2 * self.size

    def _boxes(self) -> Iterator[Factor]:
        """The positions in order, as parts of the factor: rests of samples, and whole samples between them."""
        if not self.samples:
            yield self.factor.slice(0, 0)
            return
        for samples, positions in boxes((self.factor.samples, self.factor.positions), self.start, self.stop):
            yield self.factor.slice(samples.start, samples.stop).slice_positions(positions.start, positions.stop)

    def dense(self) -> Tensor:
        """The entries, (samples, groups, d, 1)."""
        return _joined([box.dense().permute(0, 3, 1, 2).flatten(0, 1) for box in self._boxes()]).unsqueeze(-1)

    def gram(self) -> Tensor:
        """The squared norm as a 1×1 matrix."""
        return self.squared_norms().unsqueeze(-1)

    def squared_norms(self) -> Tensor:
        """Squared norm of every position, (samples, groups, 1)."""
        return _joined([box.squared_norms().transpose(1, 2).flatten(0, 1) for box in self._boxes()]).unsqueeze(-1)

    def slice(self, start: int, stop: int) -> Flat:
        """The positions ``start`` to ``stop``."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def slice_positions(self, start: int, stop: int) -> Flat:
        """A sample is one position: all of it."""
        return self

    def flat(self) -> Flat:
        """Positions are samples already."""
        return self


def boxes(grid: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """The cells ``start`` to ``stop`` of a grid, numbered row by row, as boxes in that order, at most 2·dims − 1."""
    if len(grid) == 1:
        yield (slice(start, stop),)
        return
    inner = math.prod(grid[1:])
    first, last = -(-start // inner), stop // inner  # the whole rows
    if first > last:  # inside of one row
        yield from _in_row(grid, last, start, stop)
        return
    if start < first * inner:
        yield from _in_row(grid, first - 1, start, first * inner)
    if first < last:
        yield slice(first, last), *(slice(0, size) for size in grid[1:])
    if last * inner < stop:
        yield from _in_row(grid, last, last * inner, stop)


def _in_row(grid: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    before = row * math.prod(grid[1:])
    for box in boxes(grid[1:], start - before, stop - before):
        yield slice(row, row + 1), *box


@dataclass(frozen=True)
class Gathered:
    """Positions of a factor, wherever they are, as those of other samples; written out for those that are asked for.

    Attributes:
        factor: a `Dense` or `Patches`.
        index: (samples, κ), numbers of the factor's positions, counted over all of its samples; −1 for entries of zero
            above the constant row.
    """

    factor: Gatherable
    index: Tensor

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.factor.device

    @property
    def dtype(self) -> torch.dtype:
        """The factor's."""
        return self.factor.dtype

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.index.shape[0]

    @property
    def size(self) -> int:
        """Rows of the factor."""
        return self.factor.size

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.index.shape[1]

    @property
    def norm_elements(self) -> int:
        """Of a position written out."""
        return self.size

    def gram_cost(self) -> int:
        """2κ²d."""
        return 2 * self.positions**2 * self.size

    def _written(self) -> Dense:
        written = self.factor.gather(self.index.clamp_min(0))
        written.entries.masked_fill_((self.index < 0)[:, None, None], 0.0)
        return written

    def dense(self) -> Tensor:
        """The entries, (samples, groups, d, κ)."""
        return self._written().dense()

    def gram(self) -> Tensor:
        """Inner products of the entries."""
        return self._written().gram()

    def squared_norms(self) -> Tensor:
        """Squared norms of the entries."""
        return self._written().squared_norms()

    def slice(self, start: int, stop: int) -> Gathered:
        """The samples ``start`` to ``stop``."""
        return replace(self, index=self.index[start:stop])

    def slice_positions(self, start: int, stop: int) -> Gathered:
        """The positions ``start`` to ``stop``."""
        return replace(self, index=self.index[:, start:stop])

    def flat(self) -> Gathered:
        """Every position a sample."""
        return replace(self, index=self.index.reshape(-1, 1))


class Gatherable(Factor, Protocol):
    """A factor whose positions can be written out one by one."""

    def gather(self, index: Tensor) -> Dense:
        """The positions of the numbers ``index`` (samples, κ), in memory of their own."""
        ...


def gram(factors: Sequence[Factor]) -> Tensor:
    """Gram matrix over the positions of several factors side by side, (b, groups, Σκ, Σκ)."""
    if len(factors) == 1:
        return factors[0].gram()
    rows = [torch.cat([_inner(left, right) for right in factors], dim=-1) for left in factors]
    return torch.cat(rows, dim=-2)


def _inner(left: Factor, right: Factor) -> Tensor:
    """Inner products of the positions of two factors, (b, groups, κ_left, κ_right)."""
    if left is right:
        return left.gram()
    if isinstance(left, Bags) and isinstance(right, Bags):
        return left.inner(right).unsqueeze(-1)
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        return (left.index.unsqueeze(2) == right.index.unsqueeze(1)).to(left.dtype).unsqueeze(1)
    if isinstance(left, OneHot) and isinstance(right, Bags):
        return right.at(left.index).unsqueeze(1).unsqueeze(-1)
    if isinstance(left, OneHot):
        entries = right.dense()  # (b, 1, size, κ)
        index = left.index[:, None, :, None].expand(-1, -1, -1, entries.shape[3])
        return entries.gather(2, index)
    if isinstance(right, OneHot):
        return _inner(right, left).mT
    return left.dense().mT @ right.dense()


def concatenated(factors: Sequence[Factor]) -> Tensor:
    """The entries of several factors side by side, (b, groups, d, Σκ)."""
    return _joined([f.dense() for f in factors], dim=-1)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors side by side; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
