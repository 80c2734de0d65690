"""What is kept of one layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ngplus.layers import Layer, MatrixShape
from ngplus.solvers import by_name
from ngplus.solvers.preconditioner import Entries, Preconditioner


@dataclass(eq=False)
class LayerState:
    """What NG+ keeps of one layer.

    Attributes:
        shape: of the layer's matrix.
        preconditioner: (λI + L)⁻¹.
        average: L̄ of (11), kept only with ``ema > 0``; without a tensor where another process keeps it.
        damping: λ that was added, which is more than the group's where a matrix would not factorise.
        updates: curvature steps so far.
    """

    shape: MatrixShape
    preconditioner: Preconditioner
    average: list[Tensor] | None = None
    damping: float = 0.0
    updates: int = 0

    def __repr__(self) -> str:
        side = "λI + L" if self.shape.side == "left" else "λI + R"
        kind = type(self.preconditioner).__name__
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"LayerState(matrix {size}{self.shape.rows}×{self.shape.columns}, {kind} of {side}, "
            f"damping {self.damping:.4g}, {self.updates} updates, {self.numel():,} elements kept)"
        )

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [*self.preconditioner.tensors().values(), *(self.average or [])]

    def numel(self) -> int:
        """Elements kept."""
        return sum(tensor.numel() for tensor in self.tensors())

    def share(self) -> float | None:
        """How much the curvature takes of the gradient where it takes most: s/(λ + s), s the largest eigenvalue of L.

        Near 0 the direction is G/λ, and NG+ is its base with another learning rate. Near 1 the damping does not count
        in that direction. Synchronizes with the device, and takes as long as an inverse does.

        Returns:
            A number in [0, 1); None where it is not known: for a sketch, and for other methods' curvature.
        """
        return self.preconditioner.share(self.damping)

    def fits(self, layer: Layer) -> bool:
        """Whether this is of the layer's matrix as it is now: its bias may have been frozen, freed or added since.

        That of a layer that is frozen as a whole may be with its bias or without.
        """
        return self.shape in layer.possible_shapes(self.shape.block_size)

    def entries(self) -> Entries:
        """What is saved: tensors and numbers by name."""
        averages = self.average or []
        return {
            "matrix": _pack_shape(self.shape),
            "updates": self.updates,
            "damping": self.damping,
            "averaged": int(self.average is not None),
            **{f"average{i}": stack for i, stack in enumerate(averages)},
            **self._pack(),
        }

    @classmethod
    def from_entries(cls, layer: Layer, entries: Mapping[str, Any]) -> Self:
        """Restore what `entries` gave.

        Args:
            layer: the layer.
            entries: what `entries` gave.

        Returns:
            The state, on the device of the layer's weight.

        Raises:
            KeyError: an entry is missing.
            ValueError: the layer's matrix has another shape.
        """
        shape = _check_shape(layer, *entries["matrix"].tolist())
        preconditioner = cls._unpack(entries, shape, entries["damping"])
        average = _collect_averages(entries) if entries["averaged"] else None
        state = cls(shape, preconditioner, average, entries["damping"], entries["updates"])
        return state.to_(layer.weight.device)

    @classmethod
    def from_first_layout(cls, layer: Layer, packed: Mapping[str, Any]) -> Self:
        """Restore one from a file of the first layout, which had a nested dictionary for each layer.

        Args:
            layer: the layer.
            packed: its dictionary.

        Returns:
            The state, on the device of the layer's weight.

        Raises:
            ValueError: the layer's matrix has another shape.
        """
        groups, rows, columns = packed["matrix"]
        shape = _check_shape(layer, groups, rows, columns, packed["block_size"] or 0)
        preconditioner = cls._unpack_first_layout(packed["preconditioner"], shape)
        state = cls(shape, preconditioner, packed["average"], packed["damping"], packed["updates"])
        return state.to_(layer.weight.device)

    def _pack(self) -> Entries:
        return by_name.pack(self.preconditioner)

    @staticmethod
    def _unpack(entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
        return by_name.unpack(entries, shape, damping)

    @staticmethod
    def _unpack_first_layout(tensors: Mapping[str, Tensor], shape: MatrixShape) -> Preconditioner:
        return by_name.unpack_first_layout(tensors, shape)

    def to_(self, device: torch.device) -> Self:
        """Move what is kept to the device of a model that was moved."""
        self.preconditioner = self.preconditioner.to(device)
        self.average = None if self.average is None else [stack.to(device) for stack in self.average]
        return self


def _pack_shape(shape: MatrixShape) -> Tensor:
    """Groups, rows, columns and block size (0 for whole matrices) of a matrix."""
    return torch.tensor([shape.groups, shape.rows, shape.columns, shape.block_size or 0])


def _check_shape(layer: Layer, groups: int, rows: int, columns: int, block_size: int) -> MatrixShape:
    """The shape of a saved matrix, which is to be the layer's."""
    shape = MatrixShape(groups=groups, rows=rows, columns=columns, block_size=block_size or None)
    ours = layer.shape(shape.block_size)
    if shape not in layer.possible_shapes(shape.block_size):
        raise ValueError(
            f"the state of {layer.name} is for a matrix {groups}×{rows}×{columns} (groups × rows × columns), "
            f"but the model's is {ours.groups}×{ours.rows}×{ours.columns}"
        )
    return shape


def _collect_averages(entries: Mapping[str, Any]) -> list[Tensor]:
    """The stacks ``average0``, ``average1`` and so on, as many as there are."""
    names = itertools.takewhile(entries.__contains__, (f"average{i}" for i in itertools.count()))
    return [entries[name] for name in names]


def empty_entries(shape: MatrixShape) -> Entries:
    """`LayerState.entries` of a layer without curvature."""
    return {"matrix": _pack_shape(shape), "updates": 0, "damping": 0.0, "averaged": 0}


def pad(entry: Tensor | float | None, like: Tensor | float, device: torch.device) -> Tensor | float:
    """Pad a tensor with zeros behind its elements in each dimension.

    Args:
        entry: to be padded; None for zeros alone.
        like: of the size and dtype wanted.
        device: of the result.

    Returns:
        The padded tensor; ``entry`` as it is where it does not fit, or is a number.
    """
    if not isinstance(like, Tensor):
        return like if entry is None else entry
    if not isinstance(entry, Tensor):
        return torch.zeros_like(like, device=device)
    entry = entry.to(device)
    if entry.dim() != like.dim() or any(ours > theirs for ours, theirs in zip(entry.shape, like.shape, strict=True)):
        return entry  # kept from a state that was saved with other options
    if entry.shape == like.shape:
        return entry
    whole = torch.zeros_like(like, device=device)
    whole[tuple(slice(size) for size in entry.shape)] = entry
    return whole


__all__ = ["LayerState", "empty_entries", "pad"]
