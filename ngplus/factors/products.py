"""Products of several factors side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor
from ngplus.factors.flat import cat


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


def concatenate(factors: Sequence[Factor]) -> Tensor:
    """The entries of several factors side by side, (b, groups, d, Σκ)."""
    return cat([f.dense() for f in factors], dim=-1)
