"""Factors of tables: unit vectors, and weighted sums of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


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
        """Where it is stored."""
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
        """Where it is stored."""
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
