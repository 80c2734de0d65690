"""Rows that belong to samples by an index: atoms of molecules, nodes of graphs, tokens that are no padding.

A batch of graphs comes as one long list of rows, and a list of numbers that says which graph each row belongs to. Rows
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

from ngplus import gfim
from ngplus.factors import Bags, Dense, Factor, Gathered, OneHot
from ngplus.gfim import Part
from ngplus.patches import Patches


@dataclass(frozen=True)
class SampleIndex:
    """Which sample each row of the layers' inputs belongs to.

    Attributes:
        indices: by pattern of module names (as in `fnmatch`), the first that fits counts: integers of shape (b,), or
            of the input's shape without its features. A negative number leaves the row out.
    """

    indices: Mapping[str, Tensor]

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

    @cached_property
    def samples(self) -> int:
        """Number of samples: the largest number given, and one. Waits for the device."""
        largest = [index.max() for index in self.indices.values() if index.numel()]
        return 1 + int(torch.stack([each.cpu() for each in largest]).max()) if largest else 0

    def index_of(self, module: str) -> Tensor | None:
        """The index for a module's input, if one of the patterns fits its name."""
        return next((index for pattern, index in self.indices.items() if fnmatchcase(module, pattern)), None)


def rows_by_sample(part: Part, index: Tensor, batch_dim: int, samples: int, name: str) -> Part:
    """One sample an index: its rows side by side as positions, (samples, groups, d, κ).

    Args:
        part: of a call.
        index: see `SampleIndex`.
        batch_dim: the dimension of the call's input that holds the part's samples.
        samples: number of samples.
        name: the layer's, for errors.
    """
    index, rows = _numbered(part, index, batch_dim, name)
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=samples)
    place = torch.arange(index.numel(), device=index.device) - (counts.cumsum(0) - counts)[index[order]]
    numbers = order.new_full((samples, int(counts.max()) if index.numel() else 1), -1)
    numbers[index[order], place] = order if rows is None else rows[order]
    return Part(_gathered(part.rows, numbers, name), _gathered(part.columns, numbers, name))


def rows_that_count(part: Part, index: Tensor, batch_dim: int, name: str) -> Part:
    """Every row a sample, but those with a negative index."""
    _, rows = _numbered(part, index, batch_dim, name)
    if rows is None:
        return gfim.positions_as_samples(part)
    return Part(*(_gathered(factor, rows.unsqueeze(1), name) for factor in part))


def _numbered(part: Part, index: Tensor, batch_dim: int, name: str) -> tuple[Tensor, Tensor | None]:
    """The sample of every row that belongs to one, and the numbers of these rows; None for all rows."""
    batch, positions = part.rows.samples, part.rows.positions
    if index.dim() > 1 and index.numel() == batch * positions:
        index = index.movedim(min(batch_dim, index.dim() - 1), 0).flatten()
    elif index.shape == (batch,):
        index = index.repeat_interleave(positions)
    if index.numel() != batch * positions or index.dim() > 1:
        raise ValueError(
            f"sample_index for {name} has shape {tuple(index.shape)}, but the layer's input has {batch:,} elements of "
            f"{positions:,} positions; give its module name a pattern with an index of its own"
        )
    index = index.to(part.rows.device).long()
    rows = (index >= 0).nonzero().squeeze(1)
    return (index, None) if rows.numel() == index.numel() else (index[rows], rows)


def _gathered(factor: Factor, numbers: Tensor, name: str) -> Factor:
    """The factor's rows of these numbers (samples, κ), −1 for rows whose gradient is zero."""
    if isinstance(factor, Bags):
        raise ValueError(f"{name} is an embedding bag, whose bags are samples already: leave it out of sample_index")
    if isinstance(factor, OneHot):  # any row of the table will do for a gradient of zero
        return replace(factor, index=factor.index.flatten()[numbers.clamp_min(0)])
    assert isinstance(factor, Dense | Patches)
    return Gathered(factor, numbers)


__all__ = ["SampleIndex", "rows_by_sample", "rows_that_count"]
