"""Positions of a factor as samples of their own, κ = 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngplus.factors.factor import Factor


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
        """Where it is stored."""
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
        for samples, positions in split_boxes((self.factor.samples, self.factor.positions), self.start, self.stop):
            yield self.factor.slice(samples.start, samples.stop).slice_positions(positions.start, positions.stop)

    def dense(self) -> Tensor:
        """The entries, (samples, groups, d, 1)."""
        return cat([box.dense().permute(0, 3, 1, 2).flatten(0, 1) for box in self._boxes()]).unsqueeze(-1)

    def gram(self) -> Tensor:
        """The squared norm as a 1×1 matrix."""
        return self.squared_norms().unsqueeze(-1)

    def squared_norms(self) -> Tensor:
        """Squared norm of every position, (samples, groups, 1)."""
        return cat([box.squared_norms().transpose(1, 2).flatten(0, 1) for box in self._boxes()]).unsqueeze(-1)

    def slice(self, start: int, stop: int) -> Flat:
        """The positions ``start`` to ``stop``."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def slice_positions(self, start: int, stop: int) -> Flat:
        """A sample is one position: all of it."""
        return self

    def flat(self) -> Flat:
        """Positions are samples already."""
        return self


def split_boxes(grid: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
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
    for box in split_boxes(grid[1:], start - before, stop - before):
        yield slice(row, row + 1), *box


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors side by side; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
