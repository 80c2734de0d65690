"""The Kronecker-factored Fisher matrix: A from what goes into a layer, B from the gradient that comes back.

A layer's matrix is m × n with the bias as its last column, as everywhere in `ngplus`. One factor belongs to its rows
and one to its columns: for a matrix B to the rows and A to the columns, for a table of embeddings A to the rows (which
of them were looked up) and B to the columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.layer import precondition_
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.capture.accumulator import Accumulator, Sampling, Statistic, is_zero
from ngplus.capture.contractions import UnsupportedCall
from ngplus.capture.op_handlers import OpCall
from ngplus.capture.sample_index import drop_uncounted_rows
from ngplus.curvature.damped_cholesky import InverseRequest
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.second_moment import drop_tiny
from ngplus.curvature.update import InverseCurvature
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer, MatrixShape, Side
from ngplus.solvers.preconditioner import (
    Entries,
    Preconditioner,
    append_column,
    find_column_major,
    restore_memory_order,
    split_column,
)
from ngplus.tuning import DEFAULT, Tuning

Split = Literal["trace", "equal"]


@dataclass(eq=False)
class KroneckerInverse(Preconditioner):
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

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply both sides, whichever is the shorter."""
        G = append_column(gradient, column)
        groups, m, n = G.shape
        left = self.rows @ G if self.rows.shape[0] == groups else self.rows.view(groups, m, 1) * G
        both = left @ self.columns if self.columns.shape[0] == groups else left * self.columns.view(groups, 1, n)
        return split_column(both, column)

    def apply_to_rows(self, indices: Tensor, gradient: Tensor) -> Tensor:
        """The direction of some rows (k, n) of a table's gradient."""
        left = self.rows.view(-1, 1)[indices] * gradient
        return left @ self.columns[0] if self.columns.shape[0] == 1 else left * self.columns.view(1, -1)

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"rows": self.rows, "columns": self.columns}

    def to(self, device: torch.device) -> KroneckerInverse:
        """A copy on another device."""
        return KroneckerInverse(self.rows.to(device), self.columns.to(device))

    def entries(self) -> Entries:
        """Both factors, and which of them is column-major."""
        return {"column_major": find_column_major([self.rows, self.columns]), **self.tensors()}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> KroneckerInverse:
        """Restore one, see `Preconditioner.from_entries`."""
        return cls(*restore_memory_order([entries["rows"], entries["columns"]], entries["column_major"]))


class KroneckerState(LayerState):
    """What K-FAC keeps of a layer.

    ``average`` holds the factors of rows and columns before they were inverted, ``damping`` is the larger of what was
    added to the two.
    """

    def __repr__(self) -> str:
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"KroneckerState(matrix {size}{self.shape.rows}×{self.shape.columns}, {self.updates} updates, "
            f"{self.numel():,} elements kept)"
        )

    def _pack(self) -> Entries:
        return self.preconditioner.entries()

    @staticmethod
    def _unpack(entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
        return KroneckerInverse.from_entries(entries, shape, damping)

    @staticmethod
    def _unpack_first_layout(tensors: Mapping[str, Tensor], shape: MatrixShape) -> Preconditioner:
        return KroneckerInverse(**tensors)


def is_table(model: nn.Module, layer: Layer) -> bool:
    """Tell whether a layer is an embedding."""
    return isinstance(model.get_submodule(layer.module), (nn.Embedding, nn.EmbeddingBag))


def sum_outer_products(factor: Factor, max_side: int, groups: int, tuning: Tuning = DEFAULT) -> Tensor:
    """Σ over samples and positions of v vᵀ, v the columns of a factor.

    Args:
        factor: of one use.
        max_side: the longest side that gets a whole matrix.
        groups: of the factor.
        tuning: sizes of temporaries.

    Returns:
        (groups, d, d), or the diagonal as (groups·d, 1, 1): of one-hot factors, where there is nothing else, of bags,
        and where d is more than ``max_side``.
    """
    if isinstance(factor, OneHot):
        counts = factor.index.flatten().bincount(minlength=factor.table_size)
        return counts.to(factor.dtype).view(-1, 1, 1)
    if isinstance(factor, Bags):
        return _sum_squares_of_bags(factor).view(-1, 1, 1)
    columns = factor.flat()
    step = max(1, tuning.curvature_chunk(factor.device) // (groups * factor.size))
    chunks = (columns.slice(start, min(start + step, columns.samples)) for start in range(0, columns.samples, step))
    return reduce(Tensor.add_, (_sum_of_entries(chunk.dense(), factor.size > max_side) for chunk in chunks))


def _sum_of_entries(entries: Tensor, diagonal: bool) -> Tensor:
    if diagonal:
        return entries.square().sum(dim=(0, 3)).view(-1, 1, 1)
    vectors = drop_tiny(entries).permute(1, 2, 0, 3).flatten(2)  # (groups, d, b·κ)
    return vectors @ vectors.mT


def _sum_squares_of_bags(bags: Bags) -> Tensor:
    """For each row of the table Σ over bags of (its weight there)²."""
    rows, place = torch.unique(bags.bag * bags.table_size + bags.index, return_inverse=True)
    weights = bags.weight.new_zeros(rows.numel()).index_add_(0, place, bags.weight)
    return bags.weight.new_zeros(bags.table_size).index_add_(0, rows % bags.table_size, weights.square())


class FactorStatistic(Statistic):
    """The two factors as ``moments``."""

    def is_zero(self) -> bool:
        """Whether either is."""
        return any(is_zero(factor) for factor in self.moments)


class FactorAccumulator(Accumulator):
    """Sums the two factors of each layer: ``moments`` are those of its rows and its columns.

    The gradient's factor is divided by the number of positions as it is summed (Grosse & Martens, section 3): with
    Σ over samples i and positions t, A is Σ a aᵀ and B is Σ g gᵀ / T.

    Args:
        sampling: as for `Accumulator`.
        generator: as for `Accumulator`.
        tuning: as for `Accumulator`.
        tables: the layers that are embeddings.
        max_side: the longest side that gets a whole matrix.
    """

    statistic = FactorStatistic
    missing = "for which K-FAC has no factors"
    sums_gradients = False
    adds_together = False

    def __init__(
        self,
        sampling: Sampling,
        generator: torch.Generator,
        tuning: Tuning,
        *,
        tables: Collection[Layer],
        max_side: int,
    ) -> None:
        super().__init__(sampling, generator, tuning)
        self._tables = {id(layer.weight) for layer in tables}
        self._max_side = max_side

    def check(self, call: OpCall) -> None:
        """Refuse x @ W.

        Args:
            call: the use.

        Raises:
            UnsupportedCall: of such a use.
        """
        if call.transposed:
            raise UnsupportedCall("is multiplied from the other side, as in x @ W")

    def regroup(self, pair: FactorPair, index: Tensor, batch_dim: int, samples: int, name: str) -> FactorPair:
        """Every row that counts as a sample: the factors sum over rows, whatever sample they belong to."""
        return drop_uncounted_rows(pair, index, batch_dim, name)

    def add_(
        self, layer: Layer, statistic: Statistic, pairs: Sequence[FactorPair], total: GradientSum | None = None
    ) -> None:
        """Add the factors of uses by the same samples, in place.

        Args:
            layer: the layer.
            statistic: its sums so far.
            pairs: factors of the uses.
            total: nothing that is found here.

        Raises:
            UnsupportedCall: of an embedding that is multiplied, or a matrix that is looked up.
        """
        table = id(layer.weight) in self._tables
        if any(isinstance(pair.rows, (OneHot, Bags)) != table for pair in pairs):
            raise UnsupportedCall("is looked up as a table and multiplied as a matrix")
        samples, positions = pairs[0].rows.samples, sum(pair.rows.positions for pair in pairs)
        statistic.samples += samples
        statistic.used += samples
        for pair in pairs:
            rows, columns = (
                sum_outer_products(factor, self._max_side, statistic.shape.groups, self._tuning)
                for factor in (pair.rows, pair.columns)
            )
            gradient = columns if table else rows
            gradient /= positions
            statistic.add_([rows, columns])


class KroneckerCurvature(InverseCurvature):
    """The factors of all layers, damped and inverted.

    Args:
        model: tells tables from matrices.
        ema: as for `LayerCurvature`.
        max_side: as for `FactorAccumulator`.
        split: "trace" for π of (6.3), "equal" for π = 1.
        tuning: as for `LayerCurvature`.
    """

    state_class = KroneckerState
    averages_fit = False

    def __init__(self, model: nn.Module, *, ema: float, max_side: int, split: Split, tuning: Tuning) -> None:
        super().__init__(ema=ema, tuning=tuning)
        self._model = model
        self._max_side = max_side
        self._split = split

    def _scale_(self, layer: Layer, statistic: Statistic, loss_scale: float) -> None:
        """A = 1/N Σ a aᵀ; B likewise, of gradients N times those that the backward of a mean returns."""
        gradient_side = 1 if is_table(self._model, layer) else 0
        statistic.moments[gradient_side] *= statistic.scale() / loss_scale**2
        statistic.moments[1 - gradient_side] /= max(1, statistic.used)

    def _empty_moments(self, layer: Layer) -> list[Tensor]:
        return [torch.zeros_like(factor, device=layer.weight.device) for factor in self._blank_factors(layer)]

    def _blank_entries(self, layer: Layer) -> Entries:
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

    def _requests(self, layer: Layer, statistic: Statistic, damping: float) -> list[InverseRequest]:
        rows, columns = self._update_average(layer, statistic)
        pi = self._balance(rows, columns)
        return [InverseRequest(rows, damping**0.5 * pi), InverseRequest(columns, damping**0.5 / pi)]

    def _balance(self, rows: Tensor, columns: Tensor) -> float:
        """π = √(mean eigenvalue of the one / mean eigenvalue of the other). Synchronizes with the device."""
        if self._split == "equal":
            return 1.0
        means = [float(factor.diagonal(dim1=1, dim2=2).mean()) for factor in (rows, columns)]
        return (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0

    def _make(self, statistic: Statistic, inverses: list[Tensor], damping: float) -> Preconditioner:
        return KroneckerInverse(*inverses)


def precondition_factors_(member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
    """`ngplus.apply.layer.precondition_`, but that a table's sparse gradient stays sparse."""
    layer, inverse, gradient = member.layer, member.preconditioner, member.layer.weight.grad
    if gradient is None or not gradient.is_sparse or layer.trained_bias is not None:
        return precondition_(member, tuning)
    assert isinstance(inverse, KroneckerInverse)
    indices, values = gradient._indices(), gradient._values()
    direction = inverse.apply_to_rows(indices[0], values.to(inverse.main.dtype)).to(values.dtype)
    layer.weight.grad = torch.sparse_coo_tensor(indices, direction, gradient.shape, check_invariants=False)
    return None


__all__ = [
    "FactorAccumulator",
    "KroneckerCurvature",
    "KroneckerInverse",
    "KroneckerState",
    "Split",
    "is_table",
    "precondition_factors_",
    "sum_outer_products",
]
