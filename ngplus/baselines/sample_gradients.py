"""The gradients 𝒢ᵢ of N samples of one layer, (groups, m, n) each, in the form that takes the least memory.

======================  =====================  =============================================
form                    elements a sample      when
======================  =====================  =============================================
`Written`               m·n                    κ(m + n) > m·n: convolutions of large images
`Factored`              κ(m + n)               else: 𝒢ᵢ = Σ over its κ positions of r cᵀ
`LookedUp`              κ(1 + n)               tables: r is a unit vector
======================  =====================  =============================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.curvature.second_moment import form_gradients
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.pair import FactorPair
from ngplus.factors.products import concatenate
from ngplus.layers import MatrixShape
from ngplus.tuning import DEFAULT, Tuning


class SampleGradients(Protocol):
    """N matrices 𝒢ᵢ of shape (groups, m, n)."""

    @property
    def device(self) -> torch.device:
        """Where they are stored."""
        ...

    def inner(self, G: Tensor) -> Tensor:
        """⟨𝒢ᵢ, G⟩, (N,)."""
        ...

    def combine(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ𝒢ᵢ, of the shape of ``like``."""
        ...

    def gram(self, tuning: Tuning = DEFAULT) -> Tensor:
        """⟨𝒢ᵢ, 𝒢ⱼ⟩, (N, N)."""
        ...

    def entries(self, sampled: Tensor, shape: MatrixShape) -> Tensor:
        """Some entries of each 𝒢ᵢ as a vector, (N, q)."""
        ...

    def scale(self, factor: float) -> SampleGradients:
        """Every 𝒢ᵢ times a number."""
        ...

    def write_out(self, table_size: int) -> Written:
        """The same, written out."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is kept."""
        ...


@dataclass(frozen=True)
class Written:
    """Gradients written out.

    Attributes:
        gradients: (N, groups·m·n).
    """

    gradients: Tensor

    @property
    def device(self) -> torch.device:
        """Where they are stored."""
        return self.gradients.device

    def inner(self, G: Tensor) -> Tensor:
        """⟨𝒢ᵢ, G⟩."""
        return self.gradients @ G.flatten()

    def combine(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ𝒢ᵢ."""
        return (weights @ self.gradients).view_as(like)

    def gram(self, tuning: Tuning = DEFAULT) -> Tensor:
        """⟨𝒢ᵢ, 𝒢ⱼ⟩."""
        return self.gradients @ self.gradients.T

    def entries(self, sampled: Tensor, shape: MatrixShape) -> Tensor:
        """Some columns."""
        return self.gradients[:, sampled]

    def scale(self, factor: float) -> Written:
        """Times a number."""
        return Written(self.gradients * factor)

    def write_out(self, table_size: int) -> Written:
        """Itself."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"gradients": self.gradients}


@dataclass(frozen=True)
class Factored:
    """Gradients as products over positions.

    Attributes:
        rows: r, (groups, N, κ, m).
        columns: c, (groups, N, κ, n).
    """

    rows: Tensor
    columns: Tensor

    @property
    def device(self) -> torch.device:
        """Where they are stored."""
        return self.rows.device

    def inner(self, G: Tensor) -> Tensor:
        """Σ rᵀGc, by the side of G that leaves the shorter vectors."""
        if G.shape[1] <= G.shape[2]:
            products = (self.columns.flatten(1, 2) @ G.mT).view_as(self.rows) * self.rows
        else:
            products = (self.rows.flatten(1, 2) @ G).view_as(self.columns) * self.columns
        return products.sum(dim=(0, 2, 3))

    def combine(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ r cᵀ."""
        weighted = self.rows * weights.view(1, -1, 1, 1)
        return weighted.flatten(1, 2).mT @ self.columns.flatten(1, 2)

    def gram(self, tuning: Tuning = DEFAULT) -> Tensor:
        """Σ over positions of (rᵢᵀrⱼ)(cᵢᵀcⱼ), or some rows of all 𝒢ᵢ after the other where that takes less."""
        groups, N, kappa, m = self.rows.shape
        n = self.columns.shape[3]
        if N * kappa**2 * (m + n) <= (N + kappa) * m * n:
            return _gram_of_positions(self.rows, self.columns, tuning)
        step = max(1, tuning.curvature_chunk(self.device) // (groups * N * n))
        total = self.rows.new_zeros(N, N)
        for start in range(0, m, step):
            tile = (self.rows[..., start : start + step].mT @ self.columns).flatten(2)  # (groups, N, step·n)
            total += (tile @ tile.mT).sum(dim=0)
        return total

    def entries(self, sampled: Tensor, shape: MatrixShape) -> Tensor:
        """Σ over positions of r and c at the sampled places."""
        m, n = shape.rows, shape.columns
        group, row, column = sampled // (m * n), sampled // n % m, sampled % n
        # Indices that a slice lies between put their own dimension first: (q, N, κ).
        return (self.rows[group, :, :, row] * self.columns[group, :, :, column]).sum(dim=2).T

    def scale(self, factor: float) -> Factored:
        """Times a number."""
        return Factored(self.rows * factor, self.columns)

    def write_out(self, table_size: int) -> Written:
        """Products written out."""
        return Written((self.rows.mT @ self.columns).transpose(0, 1).flatten(1))

    def tensors(self) -> dict[str, Tensor]:
        """Both sides."""
        return {"rows": self.rows, "columns": self.columns}


@dataclass(frozen=True)
class LookedUp:
    """Gradients of a table: c in the row that each position looked up.

    Attributes:
        index: (N, κ), rows of the table.
        columns: c, (N, κ, n).
    """

    index: Tensor
    columns: Tensor

    @property
    def device(self) -> torch.device:
        """Where they are stored."""
        return self.index.device

    def inner(self, G: Tensor) -> Tensor:
        """⟨c, the row of G⟩."""
        return (G[0][self.index] * self.columns).sum(dim=(1, 2))

    def combine(self, weights: Tensor, like: Tensor) -> Tensor:
        """Rows added up where they belong."""
        weighted = self.columns * weights.view(-1, 1, 1)
        return torch.zeros_like(like[0]).index_add_(0, self.index.flatten(), weighted.flatten(0, 1)).unsqueeze(0)

    def gram(self, tuning: Tuning = DEFAULT) -> Tensor:
        """Σ over positions of cᵢᵀcⱼ where both looked up the same row."""
        return _gram_of_positions(self.index.unsqueeze(0), self.columns.unsqueeze(0), tuning)

    def entries(self, sampled: Tensor, shape: MatrixShape) -> Tensor:
        """C at the sampled column where the sampled row was looked up."""
        row, column = sampled // shape.columns, sampled % shape.columns
        hits = self.index.unsqueeze(2) == row  # (N, κ, q)
        return (self.columns[:, :, column] * hits).sum(dim=1)

    def scale(self, factor: float) -> LookedUp:
        """Times a number."""
        return LookedUp(self.index, self.columns * factor)

    def factor(self, table_size: int) -> Factored:
        """The unit vectors written out."""
        hot = F.one_hot(self.index, table_size).to(self.columns.dtype)
        return Factored(hot.unsqueeze(0), self.columns.unsqueeze(0))

    def write_out(self, table_size: int) -> Written:
        """Whole tables."""
        N, _, n = self.columns.shape
        place = self.index + torch.arange(N, device=self.index.device).unsqueeze(1) * table_size
        table = self.columns.new_zeros(N * table_size, n)
        return Written(table.index_add_(0, place.flatten(), self.columns.flatten(0, 1)).view(N, -1))

    def tensors(self) -> dict[str, Tensor]:
        """Index and entries."""
        return {"index": self.index, "columns": self.columns}


def _gram_of_positions(rows: Tensor, columns: Tensor, tuning: Tuning) -> Tensor:
    """Σ over positions of (rᵢᵀrⱼ)(cᵢᵀcⱼ); ``rows`` holds r, or the numbers of the table's rows that r names."""
    groups, N, kappa, _n = columns.shape
    everyones, flat = rows.flatten(1, 2), columns.flatten(1, 2)
    step = max(1, tuning.curvature_chunk(columns.device) // (groups * N * kappa))
    sums = []
    for ours, part in zip(torch.split(everyones, step, 1), torch.split(flat, step, 1), strict=True):
        same = ours.unsqueeze(2) == everyones.unsqueeze(1) if rows.dim() == 3 else ours @ everyones.mT
        products = same * (part @ flat.mT)  # (groups, step, N·κ)
        sums.append(torch.unflatten(products, 2, (N, kappa)).sum(dim=(0, 3)))
    return torch.cat(sums).view(N, kappa, N).sum(dim=1)


def gather(pairs: Sequence[FactorPair], groups: int, tuning: Tuning = DEFAULT) -> SampleGradients:
    """Copy the gradients of samples out of the factors of all their uses.

    Args:
        pairs: the factors of uses by the same samples.
        groups: of the layer's matrix.
        tuning: sizes of temporaries.

    Returns:
        The gradients, which share no memory with the factors.
    """
    rows = [pair.rows for pair in pairs]
    if all(isinstance(factor, OneHot | Bags) for factor in rows):
        uses = [_look_up(pair) for pair in pairs]
        return LookedUp(torch.cat([use.index for use in uses], 1), torch.cat([use.columns for use in uses], 1))
    kappa, m, n = sum(factor.positions for factor in rows), rows[0].size, pairs[0].columns.size
    if kappa * (m + n) <= m * n or kappa == 1:
        return _factor(pairs)
    limit = tuning.curvature_chunk(rows[0].device)
    step = max(1, limit // (groups * kappa * (m + n)))
    pieces = []
    for start in range(0, rows[0].samples, step):
        stop = min(start + step, rows[0].samples)
        left = [pair.rows.slice(start, stop) for pair in pairs]
        right = [pair.columns.slice(start, stop) for pair in pairs]
        pieces.append(form_gradients(left, right, groups, limit).flatten(1))
    return Written(torch.cat(pieces))


def _factor(pairs: Sequence[FactorPair]) -> Factored:
    rows, columns = concatenate([p.rows for p in pairs]), concatenate([p.columns for p in pairs])

    def positions_first(entries: Tensor) -> Tensor:
        return entries.permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)

    return Factored(positions_first(rows), positions_first(columns))


def _look_up(pair: FactorPair) -> LookedUp:
    columns = pair.columns.dense()[:, 0].mT  # (N, κ, n)
    if isinstance(pair.rows, OneHot):
        return LookedUp(pair.rows.index.clone(), columns.clone(memory_format=torch.contiguous_format))
    assert isinstance(pair.rows, Bags)
    index, weights = _pad_bags(pair.rows)
    return LookedUp(index, weights.unsqueeze(2).to(columns.dtype) * columns)


def _pad_bags(bags: Bags) -> tuple[Tensor, Tensor]:
    """Members of bags side by side and their weights, (bags, longest); zeros where a bag is shorter."""
    order = bags.bag.argsort(stable=True)
    counts = bags.bag.bincount(minlength=bags.bags)
    bag = bags.bag[order]
    place = torch.arange(bag.numel(), device=bag.device) - (counts.cumsum(0) - counts)[bag]
    width = max(1, int(counts.max())) if bag.numel() else 1
    index, weights = bags.index.new_zeros(bags.bags, width), bags.weight.new_zeros(bags.bags, width)
    index[bag, place], weights[bag, place] = bags.index[order], bags.weight[order]
    return index, weights


def join(several: Sequence[SampleGradients], table_size: int) -> SampleGradients:
    """Join the gradients of several micro-batches, shorter ones padded with positions of zeros.

    Args:
        several: one a micro-batch.
        table_size: rows of the layer's matrix.

    Returns:
        The gradients of all samples.
    """
    if len(several) == 1:
        return several[0]
    kinds = {type(each) for each in several}
    if kinds == {Factored, LookedUp}:
        several = [each.factor(table_size) if isinstance(each, LookedUp) else each for each in several]
        kinds = {Factored}
    if kinds == {Factored}:
        factored = [each for each in several if isinstance(each, Factored)]
        longest = max(each.rows.shape[2] for each in factored)
        rows, columns = (
            torch.cat([_pad(getattr(each, side), 2, longest) for each in factored], dim=1)
            for side in ("rows", "columns")
        )
        return Factored(rows, columns)
    if kinds == {LookedUp}:
        tables = [each for each in several if isinstance(each, LookedUp)]
        longest = max(each.index.shape[1] for each in tables)
        index, entries = (
            torch.cat([_pad(getattr(each, side), 1, longest) for each in tables]) for side in ("index", "columns")
        )
        return LookedUp(index, entries)
    return Written(torch.cat([each.write_out(table_size).gradients for each in several]))


def _pad(tensor: Tensor, dim: int, length: int) -> Tensor:
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, length - tensor.shape[dim]])


def from_tensors(tensors: Mapping[str, Tensor]) -> SampleGradients:
    """The gradients from what `SampleGradients.tensors` gave."""
    if "gradients" in tensors:
        return Written(tensors["gradients"])
    if "index" in tensors:
        return LookedUp(tensors["index"], tensors["columns"])
    return Factored(tensors["rows"], tensors["columns"])


__all__ = ["Factored", "LookedUp", "SampleGradients", "Written", "from_tensors", "gather", "join"]
