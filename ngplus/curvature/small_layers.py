"""L or R of several small layers at once: as many calls as for one of them.

The matrix of a small layer with one position a sample (κ = 1) takes less time than the calls that make it, and a model
may have dozens of such layers: the tables of a DLRM, heads, adapters. The columns of those of equal shapes are scaled
and multiplied as one stack.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.curvature.second_moment import drop_tiny
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.pair import FactorPair, orient
from ngplus.layers import MatrixShape
from ngplus.tuning import DEFAULT, Tuning


def is_small(pair: FactorPair, tuning: Tuning = DEFAULT) -> bool:
    """Whether a use has few elements, and one position a sample.

    Args:
        pair: its factors.
        tuning: how many are few.

    Returns:
        Whether its matrix may be made together with others.
    """
    elements = 0
    for factor in (pair.rows, pair.columns):
        if isinstance(factor, Dense) and factor.full_size is None and factor.entries.shape[1] == 1:
            elements += factor.entries.numel()
        elif not isinstance(factor, OneHot):
            return False
    return pair.group is None and pair.rows.positions == 1 and elements <= tuning.small_use


def group_equal(uses: Sequence[tuple[MatrixShape, FactorPair]]) -> list[list[int]]:
    """Group uses whose matrices can be made together.

    Args:
        uses: the shape of a layer's matrix, and one use's factors.

    Returns:
        The places of those of a group, two at least.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, (shape, pair) in enumerate(uses):
        if shape.groups == 1 and shape.blocks == (1, 0) and pair.group is None and pair.rows.positions == 1:
            forms = tuple(map(_form, orient(shape, pair)))
            if None not in forms and isinstance(orient(shape, pair)[0], Dense):
                groups.setdefault((shape.short, shape.side, *forms), []).append(place)
    return [places for places in groups.values() if len(places) > 1]


def _form(factor: Factor) -> Hashable:
    """Equal for factors that can be stacked; None for those that cannot."""
    if isinstance(factor, Dense) and factor.full_size is None:
        return factor.entries.shape, factor.entries.dtype, factor.entries.device, factor.appended
    return (factor.samples, factor.device) if isinstance(factor, OneHot) else None


def second_moments(shape: MatrixShape, pairs: Sequence[FactorPair]) -> list[Tensor]:
    """Σᵢ 𝒢ᵢ𝒢ᵢᵀ of (4), or Σᵢ 𝒢ᵢᵀ𝒢ᵢ of (5), of several layers with κ = 1.

    Args:
        shape: of one of them; their short sides are equal.
        pairs: a use of each, of a group that `group_equal` found.

    Returns:
        (1, p, p) for each layer.
    """
    short, long = zip(*(orient(shape, pair) for pair in pairs), strict=True)
    columns = _stack(short)  # (layers, b, p)
    if isinstance(long[0], Dense):
        columns = columns * torch.linalg.vector_norm(_stack(long), dim=2, keepdim=True)
    columns = drop_tiny(columns)
    return list(torch.split(torch.bmm(columns.mT, columns), 1))


def _stack(factors: Sequence[Factor]) -> Tensor:
    """The entries of dense factors, (layers, b, d), the constant rows put in."""
    dense = [factor for factor in factors if isinstance(factor, Dense)]
    entries = torch.stack([factor.entries for factor in dense]).flatten(2)
    entries = entries.to(statistics_dtype(entries.dtype))
    appended = dense[0].appended
    return entries if appended is None else F.pad(entries, (0, 1), value=appended)


__all__ = ["group_equal", "is_small", "second_moments"]
