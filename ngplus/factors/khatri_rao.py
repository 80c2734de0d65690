"""The factor of a bilinear layer: products of every entry of one input with every entry of another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngplus.factors.factor import Factor, append_row


@dataclass(frozen=True)
class KhatriRao:
    """The columns x₁ ⊗ x₂ of two factors' columns, the first's entries outermost.

    Attributes:
        one: with d₁ rows.
        other: with d₂ rows, of the same samples and positions.
        appended: as in `Dense`.
    """

    one: Factor
    other: Factor
    appended: float | None = None

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self.one.device

    @property
    def dtype(self) -> torch.dtype:
        """The factors'."""
        return self.one.dtype

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return self.one.samples

    @property
    def size(self) -> int:
        """Rows d₁d₂, and the constant row."""
        return self.one.size * self.other.size + (self.appended is not None)

    @property
    def positions(self) -> int:
        """Columns κ."""
        return self.one.positions

    @property
    def norm_elements(self) -> int:
        """Those of both."""
        return self.one.norm_elements + self.other.norm_elements

    def gram_cost(self) -> int:
        """Of both."""
        return self.one.gram_cost() + self.other.gram_cost()

    def dense(self) -> Tensor:
        """The entries, (b, groups, d₁d₂, κ)."""
        products = self.one.dense().unsqueeze(3) * self.other.dense().unsqueeze(2)  # (b, groups, d₁, d₂, κ)
        return append_row(products.flatten(2, 3), self.appended)

    def gram(self) -> Tensor:
        """The inner products of one times those of the other."""
        gram = self.one.gram() * self.other.gram()
        return gram + 1.0 if self.appended else gram

    def squared_norms(self) -> Tensor:
        """Those of one times those of the other."""
        norms = self.one.squared_norms() * self.other.squared_norms()
        return norms + 1.0 if self.appended else norms

    def slice(self, start: int, stop: int) -> KhatriRao:
        """The samples ``start`` to ``stop``."""
        return replace(self, one=self.one.slice(start, stop), other=self.other.slice(start, stop))

    def slice_positions(self, start: int, stop: int) -> KhatriRao:
        """The positions ``start`` to ``stop``."""
        one, other = self.one.slice_positions(start, stop), self.other.slice_positions(start, stop)
        return replace(self, one=one, other=other)

    def flat(self) -> KhatriRao:
        """Every position a sample."""
        return replace(self, one=self.one.flat(), other=self.other.flat())
