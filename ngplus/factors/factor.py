"""One factor of a per-sample gradient: 𝒢ᵢ = Gᵢ Aᵢᵀ, equation (8).

A factor is one side of that product for b samples at once: ``groups`` independent matrices of ``size`` rows
and κ = ``positions`` columns each, shape (b, groups, size, κ). What a curvature matrix needs of a factor is
either its entries, its Gram matrix over positions, or (κ = 1) its squared norm; the classes of this package give
each in the cheapest way that their structure allows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Factor(Protocol):
    """One side of 𝒢ᵢ = Gᵢ Aᵢᵀ for b samples."""

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries as `dense` gives them: float32 or float64."""
        ...

    @property
    def samples(self) -> int:
        """Number of samples b."""
        ...

    @property
    def size(self) -> int:
        """Rows d of the factor, a constant row for the bias included."""
        ...

    @property
    def positions(self) -> int:
        """Columns κ of the factor."""
        ...

    @property
    def norm_elements(self) -> int:
        """Elements of the temporaries of `squared_norms` for one position and group."""
        ...

    def gram_cost(self) -> int:
        """Floating-point operations of `gram` for one sample."""
        ...

    def dense(self) -> Tensor:
        """The entries, (b, groups, d, κ), at least in float32."""
        ...

    def gram(self) -> Tensor:
        """Inner products of every two positions, (b, groups, κ, κ)."""
        ...

    def squared_norms(self) -> Tensor:
        """Squared norm of every position, (b, groups, κ)."""
        ...

    def slice(self, start: int, stop: int) -> Factor:
        """The samples ``start`` to ``stop``."""
        ...

    def slice_positions(self, start: int, stop: int) -> Factor:
        """The positions ``start`` to ``stop`` of every sample."""
        ...

    def flat(self) -> Factor:
        """The same with every position a sample of its own: b·κ samples, κ = 1."""
        ...


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 stays, everything else (autocast's bf16 and fp16 too) is taken in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def append_row(entries: Tensor, appended: float | None) -> Tensor:
    """``entries`` (b, groups, d, κ) with one more row of a constant below."""
    if appended is None:
        return entries
    row = entries.new_full((), appended).expand(*entries.shape[:2], 1, entries.shape[3])
    if entries.stride(2) == 1:  # a position's entries lie side by side, and will
        return torch.cat([entries.mT, row.mT], dim=3).mT
    return torch.cat([entries, row], dim=2)
