"""Sums over all entries of a gradient of any shape, which is formed for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.comparison.coefficients import PERIOD, SHIFTS, window
from ngplus.comparison.entries import ComparedEntries, UseEntries, UseRows, for_statistics
from ngplus.curvature.second_moment import form_gradients
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.layers import Layer


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
        start = SHIFTS[generator.randrange(len(SHIFTS))]
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
        return self.sum_entries(for_statistics(gradient if gradient.layout == torch.strided else gradient.to_dense()))

    def bias_entries(self, layer: Layer) -> ComparedEntries:
        """The sums over the layer's bias."""
        return WholeBias(sums=self, part=layer.bias_slice)

    def sum_entries(self, values: Tensor, first: int = 0) -> Tensor:
        """The sums over entries in their order, of which there are others in front."""
        flat = values.reshape(-1)
        shifts = [self.start + first + number * (PERIOD // 8 + 1) for number in range(self.count)]
        with without_autocast([flat.device.type]):
            return torch.stack([torch.dot(flat, window(shift, len(flat), flat.dtype, flat.device)) for shift in shifts])


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
        return self.sums.sum_entries(for_statistics(gradient[self.part]))


__all__ = ["WholeBias", "WholeSums"]
