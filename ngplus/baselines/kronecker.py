"""The Kronecker-factored Fisher matrix: A from what goes into a layer, B from the gradient that comes back.

A layer's matrix is m × n with the bias as its last column, as everywhere in `ngplus`. One factor belongs to its rows
and one to its columns: for a matrix B to the rows and A to the columns, for a table of embeddings A to the rows (which
of them were looked up) and B to the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ngplus.batching import Member
from ngplus.calls import Call, UnsupportedCall
from ngplus.capture import Capture, Sampling, Statistic, _Record, _Returned, _Use, is_zero
from ngplus.curvature import Curvature, LayerState
from ngplus.factors import Bags, Factor, OneHot, statistics_dtype
from ngplus.gfim import Part, Shape, chunk_elements, without_tiny
from ngplus.grouping import SampleIndex, rows_that_count
from ngplus.inverse import Request
from ngplus.layers import Layer
from ngplus.options import Options
from ngplus.preconditioner import Entries, Preconditioner, find_column_major, restore_memory_order
from ngplus.times import Stopwatch
from ngplus.touched import TouchedRows

Split = Literal["trace", "equal"]


@dataclass(eq=False)
class KroneckerInverse:
    """G ↦ rows⁻¹ G columns⁻¹, group by group.

    Attributes:
        rows: (groups, m, m), or a diagonal as (groups·m, 1, 1).
        columns: (groups, n, n), or a diagonal as (groups·n, 1, 1).
    """

    rows: Tensor
    columns: Tensor

    @property
    def main(self) -> Tensor:
        """The factor of the columns."""
        return self.columns

    def apply(self, gradient: Tensor) -> Tensor:
        """The direction of G (groups, m, n)."""
        groups, m, n = gradient.shape
        left = self.rows @ gradient if self.rows.shape[0] == groups else self.rows.view(groups, m, 1) * gradient
        return left @ self.columns if self.columns.shape[0] == groups else left * self.columns.view(groups, 1, n)

    def apply_right(self, gradient: Tensor) -> Tensor:
        """The same: both sides are multiplied, whichever is the shorter."""
        return self.apply(gradient)

    def apply_to_rows(self, indices: Tensor, gradient: Tensor) -> Tensor:
        """The direction of some rows (k, n) of a table's gradient."""
        left = self.rows.view(-1, 1)[indices] * gradient
        return left @ self.columns[0] if self.columns.shape[0] == 1 else left * self.columns.view(1, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"rows": self.rows, "columns": self.columns}

    def entries(self) -> Entries:
        """The same, and which of them is column-major."""
        return {"column_major": find_column_major([self.rows, self.columns]), **self.tensors()}


class KroneckerState(LayerState):
    """What K-FAC keeps of a layer.

    ``average`` holds the factors of rows and columns before they were inverted, ``damping`` is the larger of what was
    added to the two.
    """

    def __repr__(self) -> str:
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"KroneckerState(matrix {size}{self.shape.rows}×{self.shape.columns}, {self.updates} updates, "
            f"{self.numel():,} numbers kept)"
        )

    @staticmethod
    def _preconditioner(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
        return KroneckerInverse(**tensors)

    @staticmethod
    def _from_entries(entries: Mapping[str, Any], shape: Shape, damping: float) -> Preconditioner:
        return KroneckerInverse(*restore_memory_order([entries["rows"], entries["columns"]], entries["column_major"]))


def is_table(model: nn.Module, layer: Layer) -> bool:
    """Whether the layer's rows are looked up rather than multiplied."""
    return isinstance(model.get_submodule(layer.module), (nn.Embedding, nn.EmbeddingBag))


def moment(factor: Factor, max_side: int, groups: int) -> Tensor:
    """Σ over samples and positions of v vᵀ, v the columns of a factor of so many groups.

    Returns:
        (groups, d, d), or the diagonal as (groups·d, 1, 1): of one-hot factors, where there is nothing else, of bags,
        and where d is more than ``max_side``.
    """
    if isinstance(factor, OneHot):
        counts = factor.index.flatten().bincount(minlength=factor.table_size)
        return counts.to(factor.dtype).view(-1, 1, 1)
    if isinstance(factor, Bags):
        return _squares_of_bags(factor).view(-1, 1, 1)
    columns = factor.flat()
    step = max(1, chunk_elements(factor.device) // (groups * factor.size))
    chunks = (columns.slice(start, min(start + step, columns.samples)) for start in range(0, columns.samples, step))
    return reduce(Tensor.add_, (_moment_of_entries(chunk.dense(), factor.size > max_side) for chunk in chunks))


def _moment_of_entries(entries: Tensor, diagonal: bool) -> Tensor:
    if diagonal:
        return entries.square().sum(dim=(0, 3)).view(-1, 1, 1)
    vectors = without_tiny(entries).permute(1, 2, 0, 3).flatten(2)  # (groups, d, b·κ)
    return vectors @ vectors.mT


def _squares_of_bags(bags: Bags) -> Tensor:
    """For each row of the table Σ over bags of (its weight there)²."""
    rows, place = torch.unique(bags.bag * bags.table_size + bags.index, return_inverse=True)
    weights = bags.weight.new_zeros(rows.numel()).index_add_(0, place, bags.weight)
    return bags.weight.new_zeros(bags.table_size).index_add_(0, rows % bags.table_size, weights.square())


class FactorStatistic(Statistic):
    """The two factors as ``moments``."""

    def is_zero(self) -> bool:
        """Whether either is."""
        return any(is_zero(factor) for factor in self.moments)


class KroneckerCapture(Capture):
    """Sums the two factors of each layer: ``moments`` are those of its rows and its columns.

    The gradient's factor is divided by the number of positions as it is summed (Grosse & Martens, section 3): with
    Σ over samples i and positions t, A is Σ a aᵀ and B is Σ g gᵀ / T.

    Args:
        model: as for `Capture`, like the arguments not named here.
        max_side: the longest side that gets a whole matrix.
    """

    _statistic = FactorStatistic
    _unseen = "for which K-FAC has no factors"

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        sampling: Sampling,
        stopwatch: Stopwatch,
        generator: torch.Generator,
        max_side: int,
    ) -> None:
        super().__init__(model, layers, sampling, stopwatch, generator)
        self._tables = {layer for layer in layers if is_table(model, layer)}
        self._max_side = max_side

    def _expect(
        self,
        call: Call,
        output: Tensor,
        versions: list[tuple[Tensor, int]],
        grouping: SampleIndex | None,
        batch_dim: int,
    ) -> None:
        if call.turned:
            raise UnsupportedCall("is multiplied from the other side, as in x @ W")
        super()._expect(call, output, versions, grouping, batch_dim)

    def _grouped(self, part: Part, grouping: SampleIndex, use: _Use) -> Part:
        """Every row that counts as a sample: the factors sum over rows, whatever sample they belong to."""
        layer = use.call.layer
        index = grouping.index_of(layer.module)
        return part if index is None else rows_that_count(part, index, use.batch_dim, layer.name)

    def _reduce(self, record: _Record, parts: Sequence[_Returned]) -> None:
        table = record.layer in self._tables
        if any(isinstance(returned.part.rows, (OneHot, Bags)) != table for returned in parts):
            record.opaque = "is looked up as a table and multiplied as a matrix"
        super()._reduce(record, parts)

    def _add_samples(self, statistic: Statistic, parts: list[Part]) -> None:
        samples, positions = parts[0].rows.samples, sum(part.rows.positions for part in parts)
        statistic.seen += samples
        statistic.used += samples
        for part in parts:
            rows, columns = (moment(factor, self._max_side, statistic.shape.groups) for factor in part)
            gradient = columns if isinstance(part.rows, (OneHot, Bags)) else rows
            gradient /= positions
            statistic.add([rows, columns])


class KroneckerCurvature(Curvature):
    """The factors of all layers, damped and inverted.

    Args:
        options: of the optimizer.
        generator: as for `Curvature`.
        model: tells tables from matrices.
        max_side: as for `KroneckerCapture`.
        split: "trace" for π of (6.3), "equal" for π = 1.
    """

    state = KroneckerState

    def __init__(
        self, options: Options, generator: torch.Generator, model: nn.Module, max_side: int, split: Split
    ) -> None:
        super().__init__(options, generator)
        self._model = model
        self._max_side = max_side
        self._split = split

    def _scaled(self, layer: Layer, statistic: Statistic, loss_scale: float) -> Statistic:
        """A = 1/N Σ a aᵀ; B likewise, of gradients N times those that the backward of a mean returns."""
        gradient_side = 1 if is_table(self._model, layer) else 0
        statistic.moments[gradient_side] *= statistic.scale() / loss_scale**2
        statistic.moments[1 - gradient_side] /= max(1, statistic.used)
        return statistic

    def _empty(self, layer: Layer) -> Statistic:
        zeros = [torch.zeros_like(factor, device=layer.weight.device) for factor in self._blank_factors(layer)]
        return Statistic(layer.shape(None), moments=zeros)

    def _blank(self, layer: Layer) -> Entries:
        rows, columns = self._blank_factors(layer)
        averages = {"average0": rows, "average1": columns} if self._keeps_average else {}
        return {"column_major": 0, "rows": rows, "columns": columns, **averages}

    def _blank_factors(self, layer: Layer) -> list[Tensor]:
        """The factors of rows and columns, without memory."""
        shape, dtype = layer.shape(None), statistics_dtype(layer.weight.dtype)

        def blank(size: int, diagonal: bool) -> Tensor:
            dims = (shape.groups * size, 1, 1) if diagonal else (shape.groups, size, size)
            return torch.empty(dims, dtype=dtype, device="meta")

        rows = blank(shape.rows, is_table(self._model, layer) or shape.rows > self._max_side)
        return [rows, blank(shape.columns, shape.columns > self._max_side)]

    def _prepare(self, layer: Layer, statistic: Statistic, damping: float) -> list[Request]:
        rows, columns = self._moving_average(layer, statistic)
        pi = self._balance(rows, columns)
        return [Request(rows, damping**0.5 * pi), Request(columns, damping**0.5 / pi)]

    def _balance(self, rows: Tensor, columns: Tensor) -> float:
        """π = √(mean eigenvalue of the one / mean eigenvalue of the other). Waits for the device."""
        if self._split == "equal":
            return 1.0
        means = [float(factor.diagonal(dim1=1, dim2=2).mean()) for factor in (rows, columns)]
        return (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0

    def _made(self, statistic: Statistic, requests: Sequence[Request], damping: float) -> Preconditioner | None:
        rows, columns = (request.inverse for request in requests)
        return None if rows is None or columns is None else KroneckerInverse(rows, columns)

    def _replace(self, member: Member) -> TouchedRows | None:
        """As in `Curvature`; a table's sparse gradient stays sparse."""
        layer, inverse, gradient = member.layer, member.preconditioner, member.layer.weight.grad
        if gradient is None or not gradient.is_sparse or layer.trained_bias is not None:
            return super()._replace(member)
        assert isinstance(inverse, KroneckerInverse)
        indices, values = gradient._indices(), gradient._values()
        direction = inverse.apply_to_rows(indices[0], values.to(inverse.main.dtype)).to(values.dtype)
        layer.weight.grad = torch.sparse_coo_tensor(indices, direction, gradient.shape, check_invariants=False)
        return None
