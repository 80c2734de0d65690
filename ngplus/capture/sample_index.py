"""Rows that belong to samples by an index: atoms of molecules, nodes of graphs, tokens that are no padding.

A batch of graphs comes as one long list of rows, and a list of integers that says which graph each row belongs to. Rows
of one sample are its positions κ; samples with fewer rows than the largest get positions whose gradient is zero, which
add nothing to 𝒢ᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor
from ngplus.factors.formed import Formed, Identity
from ngplus.factors.gathered import Gathered
from ngplus.factors.im2col import Patches
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair, flatten_positions


@dataclass(frozen=True)
class SampleIndex:
    """Which sample each row of the layers' inputs belongs to.

    Attributes:
        indices: by pattern of module names (as in `fnmatch`), the first that fits counts: integers of shape (b,), or
            of the input's shape without its features. A negative number leaves the row out.
        count: number of samples, where it is known.
    """

    indices: Mapping[str, Tensor]
    count: int | None = None

    def __post_init__(self) -> None:
        for pattern, index in self.indices.items():
            if not isinstance(pattern, str) or not isinstance(index, Tensor):
                raise TypeError(
                    "sample_index must be a tensor, or a dict from patterns of module names to tensors, got "
                    f"{pattern!r}: {type(index).__name__}"
                )
            if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool or index.dim() == 0:
                raise TypeError(
                    f"sample_index of {pattern!r} must hold integers, one a row, got {index.dtype} of shape "
                    f"{tuple(index.shape)}"
                )

    @classmethod
    def of(cls, given: Any) -> SampleIndex | None:
        """From what a user gives: a tensor for all layers, a dict, or None."""
        if given is None:
            return None
        return cls(given if isinstance(given, Mapping) else {"*": given})

    @classmethod
    def of_jagged(cls, tensor: Tensor) -> SampleIndex:
        """One for a jagged nested tensor, of which each tensor in its list is a sample; for its values' rows."""
        lengths = tensor.offsets().diff()  # type: ignore[attr-defined]
        return cls({"*": torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)})

    @cached_property
    def samples(self) -> int:
        """Number of samples, or the largest number given and one, for which it synchronizes with the device."""
        if self.count is not None:
            return self.count
        largest = [index.max() for index in self.indices.values() if index.numel()]
        return 1 + int(torch.stack([each.cpu() for each in largest]).max()) if largest else 0

    def is_one(self, module: str) -> bool:
        """Whether a module's input is one sample, or none of any."""
        index = self.find_index(module)
        return index is not None and index.numel() == 1

    def find_index(self, module: str) -> Tensor | None:
        """The index for a module's input, if one of the patterns fits its name."""
        return next((index for pattern, index in self.indices.items() if fnmatchcase(module, pattern)), None)


def group_rows(pair: FactorPair, index: Tensor, batch_dim: int, samples: int, name: str) -> FactorPair:
    """Make the rows that belong to one sample its positions, (samples, groups, d, κ).

    Args:
        pair: of one use.
        index: see `SampleIndex`.
        batch_dim: the dimension of the use's input that holds the samples.
        samples: number of samples.
        name: of the layer, for errors.

    Returns:
        The same factors, row by row, as those of ``samples`` samples.

    Raises:
        ValueError: an index for another number of rows, or for bags.
    """
    index, rows = _find_counted_rows(pair, index, batch_dim, name)
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=samples)
    place = torch.arange(index.numel(), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
    places = order.new_full((samples, int(counts.max()) if index.numel() else 1), -1)
    places[index[order], place] = order if rows is None else rows[order]
    return pair._replace(rows=_gather(pair.rows, places, name), columns=_gather(pair.columns, places, name))


def drop_uncounted_rows(pair: FactorPair, index: Tensor, batch_dim: int, name: str) -> FactorPair:
    """Make every row a sample, but those with a negative index.

    Args:
        pair: of one use.
        index: see `SampleIndex`.
        batch_dim: the dimension of the use's input that holds the samples.
        name: of the layer, for errors.

    Returns:
        The factors of the rows that count, each with one position.

    Raises:
        ValueError: an index for another number of rows, or for bags.
    """
    _, rows = _find_counted_rows(pair, index, batch_dim, name)
    if rows is None:
        return flatten_positions(pair)
    at = rows.unsqueeze(1)
    return pair._replace(rows=_gather(pair.rows, at, name), columns=_gather(pair.columns, at, name))


def _find_counted_rows(pair: FactorPair, index: Tensor, batch_dim: int, name: str) -> tuple[Tensor, Tensor | None]:
    """The sample of every row that belongs to one, and the indices of these rows; None for all rows."""
    batch, positions = pair.rows.samples, 1 if isinstance(pair.rows, Formed) else pair.rows.positions
    if index.dim() > 1 and index.numel() == batch * positions:
        index = index.movedim(min(batch_dim, index.dim() - 1), 0).flatten()
    elif index.shape == (batch,):
        index = index.repeat_interleave(positions)
    if index.numel() != batch * positions or index.dim() > 1:
        raise ValueError(
            f"sample_index for {name} has shape {tuple(index.shape)}, but the layer's input has {batch:,} elements of "
            f"{positions:,} positions; give its module name a pattern with an index of its own"
        )
    index = index.to(pair.rows.device).long()
    rows = (index >= 0).nonzero().squeeze(1)
    return (index, None) if rows.numel() == index.numel() else (index[rows], rows)


def _gather(factor: Factor, rows: Tensor, name: str) -> Factor:
    """The factor's rows at these indices (samples, κ), −1 for rows whose gradient is zero."""
    if isinstance(factor, Bags):
        raise ValueError(f"{name} is an embedding bag, whose bags are samples already: leave it out of sample_index")
    if isinstance(factor, Formed):
        return factor.regroup(rows)
    if isinstance(factor, Identity):
        return replace(factor, samples=len(rows))
    if isinstance(factor, KhatriRao):
        return replace(factor, one=_gather(factor.one, rows, name), other=_gather(factor.other, rows, name))
    if isinstance(factor, OneHot):  # any row of the table will do for a gradient of zero
        return replace(factor, index=factor.index.flatten()[rows.clamp_min(0)])
    assert isinstance(factor, Dense | Patches)
    return Gathered(factor, rows)


__all__ = ["SampleIndex", "drop_uncounted_rows", "group_rows"]
