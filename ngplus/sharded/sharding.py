"""Which part of each layer's matrix a process has, and which processes keep its inverse.

`fully_shard` cuts a weight into as many rows, or columns, as there are processes. From the right, G(λI + R)⁻¹, every
row of the direction needs that row of G alone, and a process that has the inverse multiplies its own rows. From the
left, (λI + L)⁻¹G, the same is true of columns. Whatever a process multiplies and does not have comes from the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ngplus.dtensors import is_sharded
from ngplus.layers import Layer, MatrixShape
from ngplus.tuning import DEFAULT, Tuning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Inverses = Literal["auto", "replicated", "sharded"]


@dataclass(frozen=True)
class Block:
    """Rows and columns of a layer's matrix, (groups · m, n) with the bias's column, as half-open intervals.

    Attributes:
        rows: the first, and the one after the last.
        columns: the same.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def numel(self) -> int:
        """Elements of it."""
        (top, bottom), (left, right) = self.rows, self.columns
        return max(0, bottom - top) * max(0, right - left)

    def within(self, columns: tuple[int, int]) -> Block:
        """The part of it in these columns."""
        return Block(self.rows, (max(self.columns[0], columns[0]), min(self.columns[1], columns[1])))


def chunk(size: int, parts: int) -> list[tuple[int, int]]:
    """The intervals that ``torch.chunk`` cuts ``size`` into, and empty ones behind them where it cuts fewer."""
    length = -(-size // parts)
    edges = [min(size, length * part) for part in range(parts + 1)]
    return list(pairwise(edges))


class Sharding:
    """The sharded layers of a model.

    Args:
        mesh: that they are sharded over; with two dimensions they are replicated over the first.
        inverses: see `NGPlus`.
        tuning: from which shape on an inverse is kept everywhere.

    Attributes:
        mesh: as given.
        group: the processes that the shards of a weight are on.
        size: how many these are.
        rank: this process's among them.
    """

    def __init__(self, mesh: DeviceMesh, inverses: Inverses, tuning: Tuning = DEFAULT) -> None:
        self.mesh = mesh
        self.group: ProcessGroup = mesh.get_group(mesh.ndim - 1)
        self.size: int = mesh.size(mesh.ndim - 1)
        self.rank: int = mesh.get_local_rank(mesh.ndim - 1)
        self._inverses = inverses
        self._tuning = tuning
        self._load = [0] * self.size
        self._keepers: dict[int, tuple[MatrixShape, int | None]] = {}

    # Who keeps an inverse -----------------------------------------------------------------------------------------

    def keeper(self, layer: Layer) -> int | None:
        """The rank of the only process, of those with a replica's shards, that keeps a layer's inverse.

        It changes where the layer's matrix has another shape, as when its bias is frozen.

        Args:
            layer: any layer.

        Returns:
            The rank; None where every process keeps it.
        """
        if not is_sharded(layer.weight):
            return None
        self.assign([layer])
        return self._keepers[id(layer.weight)][1]

    def is_elsewhere(self, layer: Layer) -> bool:
        """Whether another process alone keeps a layer's inverse."""
        return self.keeper(layer) not in (None, self.rank)

    def assign(self, layers: Iterable[Layer]) -> None:
        """Decide who keeps an inverse; the largest first, to the process that keeps the fewest elements.

        Args:
            layers: sharded ones, in the same order on every process; those that are decided stay.
        """
        shapes = {layer: layer.shape(None) for layer in layers}
        shapes = {layer: shape for layer, shape in shapes.items() if not self._is_decided(layer, shape)}
        for layer, shape in sorted(shapes.items(), key=lambda pair: -_kept_elements(pair[1])):
            before, keeper = self._keepers.get(id(layer.weight)), None
            if before is not None and before[1] is not None:
                self._load[before[1]] -= _kept_elements(before[0])
            if not self._is_kept_everywhere(layer, shape):
                keeper = self._load.index(min(self._load))
                self._load[keeper] += _kept_elements(shape)
            self._keepers[id(layer.weight)] = shape, keeper

    def _is_decided(self, layer: Layer, shape: MatrixShape) -> bool:
        known = self._keepers.get(id(layer.weight))
        return known is not None and known[0] == shape

    def _is_kept_everywhere(self, layer: Layer, shape: MatrixShape) -> bool:
        if self.size == 1 or self._inverses == "sharded":
            return self.size == 1
        by_columns = shape.side == "left"  # what bias there is, moves
        if self._inverses == "replicated":
            return by_columns or self.multiplies_own_rows(layer, shape)
        free = self.multiplies_own_rows(layer, shape) or (by_columns and _shard_dim(layer) == 1)
        small = _kept_elements(shape) <= self._tuning.grouped_below
        return free and (small or shape.long >= shape.short * self._tuning.replicated_from)

    # Who has what, and who multiplies what ------------------------------------------------------------------------

    def multiplies_own_rows(self, layer: Layer, shape: MatrixShape) -> bool:
        """Whether each process that has the inverse can make the direction of its rows without any communication.

        From the left, that is where the rows of a group of a convolution are all on one process.

        Args:
            layer: the layer.
            shape: of its matrix.

        Returns:
            Whether it can.
        """
        if self.size == 1:
            return True
        bias = layer.trained_bias
        if _shard_dim(layer) != 0 or not (bias is None or len(bias) == len(layer.weight)):
            return False
        return shape.side == "right" or -(-len(layer.weight) // self.size) * layer.rows_each % shape.rows == 0

    def multiplies_own_columns(self, layer: Layer, shape: MatrixShape) -> bool:
        """Whether each process that has the inverse can make the direction of its columns without any communication.

        Args:
            layer: the layer.
            shape: of its matrix.

        Returns:
            Whether it can: a bias, which is one more column, is on all of them.
        """
        return shape.side == "left" and _shard_dim(layer) == 1 and layer.trained_bias is None

    def rows(self, layer: Layer) -> tuple[int, int]:
        """The rows of its matrices, one below the other, that this process has of a weight sharded by rows."""
        return self._rows(layer)[self.rank]

    def _rows(self, layer: Layer) -> list[tuple[int, int]]:
        """The same for each rank."""
        each = layer.rows_each
        return [(start * each, stop * each) for start, stop in chunk(len(layer.weight), self.size)]

    def bias_start(self, layer: Layer) -> int:
        """Where the layer's first row is in what this process has of its bias; negative where it is before that."""
        assert layer.bias is not None
        start, _ = chunk(len(layer.bias), self.size)[self.rank]
        return layer.bias_start - start

    def sources(self, layer: Layer) -> list[list[Block]]:
        """What each process has of a layer's matrix.

        Args:
            layer: a sharded layer.

        Returns:
            For each rank the block of the weight, and that of its trained bias.
        """
        weight, bias = layer.weight, layer.trained_bias
        height, width = len(weight) * layer.rows_each, layer.shape(None).columns - (bias is not None)
        if _shard_dim(layer) == 0:
            blocks = [[Block(rows, (0, width))] for rows in self._rows(layer)]
        else:
            inner = width // weight.shape[1]
            parts = chunk(weight.shape[1], self.size)
            blocks = [[Block((0, height), (start * inner, stop * inner))] for start, stop in parts]
        if bias is not None:
            for own, (start, stop) in zip(blocks, chunk(len(bias), self.size), strict=True):
                rows = max(0, start - layer.bias_start), min(height, stop - layer.bias_start)
                own.append(Block(rows, (width, width + 1)))
        return blocks

    def targets(self, layer: Layer, shape: MatrixShape) -> list[tuple[int, int]]:
        """The columns of a layer's matrix that each process multiplies, all of their rows.

        Args:
            layer: a sharded layer of which not every process multiplies its own rows.
            shape: of its matrix.

        Returns:
            For each rank an interval.
        """
        keeper = self.keeper(layer)
        if keeper is not None:
            return [(0, shape.columns) if rank == keeper else (0, 0) for rank in range(self.size)]
        if _shard_dim(layer) == 0:
            return chunk(shape.columns, self.size)
        *others, (start, _) = [own[0].columns for own in self.sources(layer)]
        return [*others, (start, shape.columns)]


def _sharded(weight: Tensor) -> Any:
    assert is_sharded(weight)
    return weight


def find_cut_matrices(layers: Iterable[Layer]) -> list[Layer]:
    """Find the batches of matrices of which each process has some rows of every one.

    Args:
        layers: of a model.

    Returns:
        Those that are sharded along another dimension than their first.
    """
    batches = [layer for layer in layers if layer.batched and layer.weight.dim() > 2]
    return [layer for layer in batches if is_sharded(layer.weight) and _shard_dim(layer) > 0]


def _shard_dim(layer: Layer) -> int:
    dim: int = _sharded(layer.weight).placements[-1].dim
    return dim


def _kept_elements(shape: MatrixShape) -> int:
    return shape.groups * shape.short**2


__all__ = ["Block", "Inverses", "Sharding", "chunk", "find_cut_matrices"]
