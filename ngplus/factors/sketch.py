"""Some rows of a factor, equation (17)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngplus.factors.factor import Factor


@dataclass(frozen=True)
class Sampled:
    """Some rows of a factor, scaled: Ωᵀ A for the Ω of (17).

    Attributes:
        factor: the whole.
        sampled: (q,), the rows.
        scale: √(d/q).
    """

    factor: Factor
    sampled: Tensor
    scale: float

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
        """Number of samples b."""
        return self.factor.samples

    @property
    def size(self) -> int:
        """Sampled rows, q."""
        return self.sampled.numel()

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.factor.positions

    @property
    def norm_elements(self) -> int:
        """The sampled rows, and those they are sampled from."""
        return self.factor.size + self.size

    def gram_cost(self) -> int:
        """2κ²q."""
        return 2 * self.positions**2 * self.size

    def dense(self) -> Tensor:
        """The sampled rows, (b, groups, q, κ)."""
        entries = self.factor.dense()
        return entries.index_select(2, self.sampled.to(entries.device)) * self.scale

    def gram(self) -> Tensor:
        """Inner products over the sampled rows."""
        entries = self.dense()
        return entries.mT @ entries

    def squared_norms(self) -> Tensor:
        """Sum of squares over the sampled rows."""
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
