"""The two factors of one use of a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ngplus.factors.factor import Factor
from ngplus.factors.sketch import Sampled
from ngplus.layers import MatrixShape


class FactorPair(NamedTuple):
    """One use of a layer: 𝒢ᵢ = rows · columnsᵀ summed over positions, rows of size m and columns of size n.

    Attributes:
        rows: (b, groups, m, κ).
        columns: (b, groups, n, κ).
        group: where the use multiplies by one of several matrices alone, its number; both factors have one group then.
    """

    rows: Factor
    columns: Factor
    group: int | None = None


def orient(shape: MatrixShape, pair: FactorPair) -> tuple[Factor, Factor]:
    """The short and the long factor."""
    return (pair.rows, pair.columns) if shape.side == "left" else (pair.columns, pair.rows)


def flatten_positions(pair: FactorPair) -> FactorPair:
    """Make every position a sample of its own (κ = 1)."""
    return FactorPair(pair.rows.flat(), pair.columns.flat(), pair.group)


def sample_long_side(shape: MatrixShape, pair: FactorPair, sampled: Tensor) -> FactorPair:
    """Keep some entries of the long side alone, scaled so that E ΩΩᵀ = I, equation (17).

    Args:
        shape: of the layer's matrix.
        pair: one use of the layer.
        sampled: (q,), entries of the long side, sampled uniformly with replacement.

    Returns:
        The factors.
    """
    scale = (shape.long / sampled.numel()) ** 0.5
    if shape.side == "left":
        return pair._replace(columns=Sampled(pair.columns, sampled, scale))
    return pair._replace(rows=Sampled(pair.rows, sampled, scale))


def sample_indices(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Sample indices below ``count`` uniformly with replacement.

    Args:
        count: how many there are.
        size: how many are sampled.
        generator: samples them.

    Returns:
        (size,), on the generator's device.
    """
    return torch.randint(count, (size,), generator=generator, device=generator.device)
