"""Which entries of a layer's gradient are compared with its captured uses, and what both have there.

A use that was not captured changes all entries of the gradient G, as a rule, so that a few entries (r, c) of the matrix
tell: Σᵢ Σ_κ Gᵢ[r, κ] Aᵢ[c, κ] against G[r, c]. Of a table, where such a use may reach few rows, a sixteenth of the rows
or more count together, with random coefficients s: Σᵢ Σ_κ (sᵀGᵢ)[κ] Aᵢ[c, κ] against (sᵀG)[c]. Of a linear layer whose
output is small all rows and columns do, in a few sums with coefficients S for the rows and T for the columns:
(Σᵢ Σ_κ (SᵀGᵢ)[·, κ] Aᵢ[·, κ]ᵀ) T against SᵀG T.

A bias, which is one more column of its layer's matrix, is compared by itself in the same rows.

Of a small model on a CPU the calls cost more than what they compute, so that each way takes as few as can be.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ngplus.factors.dense import Dense
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.im2col import Patches
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair


class UseRows(NamedTuple):
    """What is needed of the rows of a use, for the entries of a weight and of its bias.

    Attributes:
        values: some of them, (samples, k, κ), or a sum over them, (samples·κ,).
        place: of the first of them among all that are compared.
        size: norm of what a sum is of; 1 where there is none.
    """

    values: Tensor
    place: int = 0
    size: Tensor | float = 1.0


class UseEntries(NamedTuple):
    """Some entries of what a use brings to a gradient.

    Attributes:
        values: (k,), k of all that are compared; () for one.
        place: of the first of them among all.
        sizes: scalars whose product is about the root sum of squares of what they are sums of, which tells how large
            rounding is.
    """

    values: Tensor
    place: int
    sizes: tuple[Tensor | float, ...]


def sum_products(products: Tensor, place: int = 0) -> UseEntries:
    """The sums of (samples, k, κ) products over samples and positions."""
    return UseEntries(products.sum(dim=(0, 2)), place, (torch.linalg.vector_norm(products),))


class ComparedEntries(Protocol):
    """Some entries of a layer's matrix."""

    @property
    def count(self) -> int:
        """How many they are."""
        ...

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """What is needed of a use's rows."""
        ...

    def of_use(self, rows: UseRows, pair: FactorPair) -> UseEntries:
        """The entries of Σᵢ 𝒢ᵢ of a use."""
        ...

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """The entries of a weight's gradient, (count,), or () for one, perhaps in its memory."""
        ...


def in_rows(entries: Tensor) -> Tensor:
    """(samples, 1, d, κ) as (samples·κ, d), in the statistics' dtype."""
    samples, _, size, positions = entries.shape
    return for_statistics(entries.reshape(samples, size) if positions == 1 else entries[:, 0].mT.flatten(0, 1))


def for_statistics(values: Tensor) -> Tensor:
    """The same in the statistics' dtype."""
    dtype = values.dtype
    return values if (wanted := statistics_dtype(dtype)) == dtype else values.to(wanted)


def bias_factor(columns: Factor) -> float:
    """1 where a use adds the bias, else 0."""
    assert isinstance(columns, Dense | Patches | KhatriRao)
    return columns.appended or 0.0


__all__ = ["ComparedEntries", "UseEntries", "UseRows", "bias_factor", "for_statistics", "in_rows", "sum_products"]
