"""The gradients 𝒢ᵢ of N samples of one layer, (groups, m, n) each, in the form that takes the least memory.

======================  =====================  =============================================
form                    numbers a sample       when
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

from ngplus.factors import Bags, OneHot, concatenated
from ngplus.gfim import Part, Shape, chunk_elements, per_sample_gradients


class SampleGradients(Protocol):
    """N matrices 𝒢ᵢ of shape (groups, m, n)."""

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        ...

    def inner(self, G: Tensor) -> Tensor:
        """⟨𝒢ᵢ, G⟩, (N,)."""
        ...

    def combined(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ𝒢ᵢ, of the shape of ``like``."""
        ...

    def gram(self) -> Tensor:
        """⟨𝒢ᵢ, 𝒢ⱼ⟩, (N, N)."""
        ...

    def entries(self, drawn: Tensor, shape: Shape) -> Tensor:
        """Some entries of each 𝒢ᵢ as a vector, (N, q)."""
        ...

    def scaled(self, factor: float) -> SampleGradients:
        """Every 𝒢ᵢ times a number."""
        ...

    def written(self, table_size: int) -> Written:
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
        """Where they lie."""
        return self.gradients.device

    def inner(self, G: Tensor) -> Tensor:
        """⟨𝒢ᵢ, G⟩."""
        return self.gradients @ G.flatten()

    def combined(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ𝒢ᵢ."""
        return (weights @ self.gradients).view_as(like)

    def gram(self) -> Tensor:
        """⟨𝒢ᵢ, 𝒢ⱼ⟩."""
        return self.gradients @ self.gradients.T

    def entries(self, drawn: Tensor, shape: Shape) -> Tensor:
        """Some columns."""
        return self.gradients[:, drawn]

    def scaled(self, factor: float) -> Written:
        """Times a number."""
        return Written(self.gradients * factor)

    def written(self, table_size: int) -> Written:
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
        """Where they lie."""
        return self.rows.device

    def inner(self, G: Tensor) -> Tensor:
        """Σ rᵀGc, by the side of G that leaves the shorter vectors."""
        if G.shape[1] <= G.shape[2]:
            products = (self.columns.flatten(1, 2) @ G.mT).view_as(self.rows) * self.rows
        else:
            products = (self.rows.flatten(1, 2) @ G).view_as(self.columns) * self.columns
        return products.sum(dim=(0, 2, 3))

    def combined(self, weights: Tensor, like: Tensor) -> Tensor:
        """Σ wᵢ r cᵀ."""
        weighted = self.rows * weights.view(1, -1, 1, 1)
        return weighted.flatten(1, 2).mT @ self.columns.flatten(1, 2)

    def gram(self) -> Tensor:
        """Σ over positions of (rᵢᵀrⱼ)(cᵢᵀcⱼ), or some rows of all 𝒢ᵢ after the other where that takes less."""
        groups, N, kappa, m = self.rows.shape
        n = self.columns.shape[3]
        if N * kappa**2 * (m + n) <= (N + kappa) * m * n:
            return _gram_of_positions(self.rows, self.columns)
        step = max(1, chunk_elements(self.device) // (groups * N * n))
        total = self.rows.new_zeros(N, N)
        for start in range(0, m, step):
            tile = (self.rows[..., start : start + step].mT @ self.columns).flatten(2)  # (groups, N, step·n)
            total += (tile @ tile.mT).sum(dim=0)
        return total

    def entries(self, drawn: Tensor, shape: Shape) -> Tensor:
        """Σ over positions of r and c at the drawn places."""
        m, n = shape.rows, shape.columns
        group, row, column = drawn // (m * n), drawn // n % m, drawn % n
        # Indices that a slice lies between put their own dimension first: (q, N, κ).
        return (self.rows[group, :, :, row] * self.columns[group, :, :, column]).sum(dim=2).T

    def scaled(self, factor: float) -> Factored:
        """Times a number."""
        return Factored(self.rows * factor, self.columns)

    def written(self, table_size: int) -> Written:
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
        """Where they lie."""
        return self.index.device

    def inner(self, G: Tensor) -> Tensor:
        """⟨c, the row of G⟩."""
        return (G[0][self.index] * self.columns).sum(dim=(1, 2))

    def combined(self, weights: Tensor, like: Tensor) -> Tensor:
        """Rows added up where they belong."""
        weighted = self.columns * weights.view(-1, 1, 1)
        return torch.zeros_like(like[0]).index_add_(0, self.index.flatten(), weighted.flatten(0, 1)).unsqueeze(0)

    def gram(self) -> Tensor:
        """Σ over positions of cᵢᵀcⱼ where both looked up the same row."""
        return _gram_of_positions(self.index.unsqueeze(0), self.columns.unsqueeze(0))

    def entries(self, drawn: Tensor, shape: Shape) -> Tensor:
        """C at the drawn column where the drawn row was looked up."""
        row, column = drawn // shape.columns, drawn % shape.columns
        hits = self.index.unsqueeze(2) == row  # (N, κ, q)
        return (self.columns[:, :, column] * hits).sum(dim=1)

    def scaled(self, factor: float) -> LookedUp:
        """Times a number."""
        return LookedUp(self.index, self.columns * factor)

    def factored(self, table_size: int) -> Factored:
        """The unit vectors written out."""
        hot = F.one_hot(self.index, table_size).to(self.columns.dtype)
        return Factored(hot.unsqueeze(0), self.columns.unsqueeze(0))

    def written(self, table_size: int) -> Written:
        """Whole tables."""
        N, _, n = self.columns.shape
        place = self.index + torch.arange(N, device=self.index.device).unsqueeze(1) * table_size
        table = self.columns.new_zeros(N * table_size, n)
        return Written(table.index_add_(0, place.flatten(), self.columns.flatten(0, 1)).view(N, -1))

    def tensors(self) -> dict[str, Tensor]:
        """Index and entries."""
        return {"index": self.index, "columns": self.columns}


def _gram_of_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """Σ over positions of (rᵢᵀrⱼ)(cᵢᵀcⱼ); ``rows`` holds r, or the numbers of the table's rows that r names."""
    groups, N, kappa, _n = columns.shape
    everyones, flat = rows.flatten(1, 2), columns.flatten(1, 2)
    step = max(1, chunk_elements(columns.device) // (groups * N * kappa))
    sums = []
    for ours, part in zip(torch.split(everyones, step, 1), torch.split(flat, step, 1), strict=True):
        same = ours.unsqueeze(2) == everyones.unsqueeze(1) if rows.dim() == 3 else ours @ everyones.mT
        products = same * (part @ flat.mT)  # (groups, step, N·κ)
        sums.append(torch.unflatten(products, 2, (N, kappa)).sum(dim=(0, 3)))
    return torch.cat(sums).view(N, kappa, N).sum(dim=1)


def gather(parts: Sequence[Part], groups: int) -> SampleGradients:
    """The gradients of samples that ``parts`` are all uses of; nothing is shared with what they were made of."""
    rows = [part.rows for part in parts]
    if all(isinstance(factor, OneHot | Bags) for factor in rows):
        uses = [_looked_up(part) for part in parts]
        return LookedUp(torch.cat([use.index for use in uses], 1), torch.cat([use.columns for use in uses], 1))
    kappa, m, n = sum(factor.positions for factor in rows), rows[0].size, parts[0].columns.size
    if kappa * (m + n) <= m * n or kappa == 1:
        return _factored(parts)
    step = max(1, chunk_elements(rows[0].device) // (groups * kappa * (m + n)))
    pieces = []
    for start in range(0, rows[0].samples, step):
        stop = min(start + step, rows[0].samples)
        left, right = ([factor.slice(start, stop) for factor in side] for side in zip(*parts, strict=True))
        pieces.append(per_sample_gradients(left, right, groups).flatten(1))
    return Written(torch.cat(pieces))


def _factored(parts: Sequence[Part]) -> Factored:
    rows, columns = concatenated([p.rows for p in parts]), concatenated([p.columns for p in parts])

    def positions_first(entries: Tensor) -> Tensor:
        return entries.permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)

    return Factored(positions_first(rows), positions_first(columns))


def _looked_up(part: Part) -> LookedUp:
    columns = part.columns.dense()[:, 0].mT  # (N, κ, n)
    if isinstance(part.rows, OneHot):
        return LookedUp(part.rows.index.clone(), columns.clone(memory_format=torch.contiguous_format))
    assert isinstance(part.rows, Bags)
    index, weights = _padded(part.rows)
    return LookedUp(index, weights.unsqueeze(2).to(columns.dtype) * columns)


def _padded(bags: Bags) -> tuple[Tensor, Tensor]:
    """Members of bags side by side and their weights, (bags, longest); zeros where a bag is shorter."""
    order = bags.bag.argsort(stable=True)
    counts = bags.bag.bincount(minlength=bags.bags)
    bag = bags.bag[order]
    place = torch.arange(bag.numel(), device=bag.device) - (counts.cumsum(0) - counts)[bag]
    width = max(1, int(counts.max())) if bag.numel() else 1
    index, weights = bags.index.new_zeros(bags.bags, width), bags.weight.new_zeros(bags.bags, width)
    index[bag, place], weights[bag, place] = bags.index[order], bags.weight[order]
    return index, weights


def joined(several: Sequence[SampleGradients], table_size: int) -> SampleGradients:
    """The gradients of several micro-batches as one, shorter ones filled up with positions of zeros."""
    if len(several) == 1:
        return several[0]
    kinds = {type(each) for each in several}
    if kinds == {Factored, LookedUp}:
        several = [each.factored(table_size) if isinstance(each, LookedUp) else each for each in several]
        kinds = {Factored}
    if kinds == {Factored}:
        factored = [each for each in several if isinstance(each, Factored)]
        longest = max(each.rows.shape[2] for each in factored)
        rows, columns = (
            torch.cat([_filled(getattr(each, side), 2, longest) for each in factored], dim=1)
            for side in ("rows", "columns")
        )
        return Factored(rows, columns)
    if kinds == {LookedUp}:
        tables = [each for each in several if isinstance(each, LookedUp)]
        longest = max(each.index.shape[1] for each in tables)
        index, entries = (
            torch.cat([_filled(getattr(each, side), 1, longest) for each in tables]) for side in ("index", "columns")
        )
        return LookedUp(index, entries)
    return Written(torch.cat([each.written(table_size).gradients for each in several]))


def _filled(tensor: Tensor, dim: int, length: int) -> Tensor:
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, length - tensor.shape[dim]])


def from_tensors(tensors: Mapping[str, Tensor]) -> SampleGradients:
    """The gradients from what `SampleGradients.tensors` gave."""
    if "gradients" in tensors:
        return Written(tensors["gradients"])
    if "index" in tensors:
        return LookedUp(tensors["index"], tensors["columns"])
    return Factored(tensors["rows"], tensors["columns"])
