"""Positions of a factor as the positions of other samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ngplus.factors.dense import Dense
from ngplus.factors.factor import Factor


class Gatherable(Factor, Protocol):
    """A factor whose positions can be written out one by one."""

    def gather(self, index: Tensor) -> Dense:
        """The positions at ``index`` (samples, κ), in memory of their own."""
        ...


@dataclass(frozen=True)
class Gathered:
    """Positions of a factor, wherever they are, as those of other samples; written out for those that are asked for.

    Attributes:
        factor: a `Dense` or `Patches`.
        index: (samples, κ), indices of the factor's positions, counted over all of its samples; −1 for entries of zero
            above the constant row.
    """

    factor: Gatherable
    index: Tensor

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
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
