"""Factors that are given by their entries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.factors.factor import Factor, append_row, statistics_dtype
from ngplus.factors.flat import Flat
from ngplus.factors.products import multiply_by_transpose


@dataclass(frozen=True)
class Dense:
    """A factor given by its entries.

    Attributes:
        entries: (b, groups, d, κ), any strides.
        appended: value of one more row: 1.0 where the bias is a column of the layer's matrix and this call added
            it, 0.0 where this call did not, None where there is no such column.
        first_row: where these rows stand in a factor of ``full_size`` rows; the others are zero. Used where
            a call multiplies by a slice of the weight only (the packed projections of attention).
        full_size: rows of the whole factor; None where ``entries`` is the whole.
    """

    entries: Tensor
    appended: float | None = None
    first_row: int = 0
    full_size: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
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
        return (self.full_size or self.entries.shape[2]) + (self.appended is not None)

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
        return append_row(entries, self.appended)

    def gram(self) -> Tensor:
        """AᵀA, to which a constant row adds its square."""
        entries = self._entries()
        gram = multiply_by_transpose(entries.mT)
        return gram + 1.0 if self.appended else gram

    def squared_norms(self) -> Tensor:
        """Sum of squares over the rows."""
        entries = self._entries()
        if entries.stride(2) == 1:
            norms: Tensor = torch.linalg.vector_norm(entries, dim=2).square_()
        else:  # for which a norm takes three to ten times as long
            norms = entries.square().sum(dim=2)
        return norms + 1.0 if self.appended else norms

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
        """Columns by their indices, see `Gathered`."""
        columns = self.entries.permute(0, 3, 1, 2)[index // self.positions, index % self.positions]
        return replace(self, entries=columns.permute(0, 2, 3, 1))
