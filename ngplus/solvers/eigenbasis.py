"""The eigenvectors of a layer's curvature, in which a base makes its step (beyond the paper)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from ngplus.layers import Layer, MatrixShape, Side
from ngplus.solvers.preconditioner import Entries, Preconditioner, append_column, split_column
from ngplus.tuning import DEFAULT, Tuning

Sides = Literal["short", "both"]
Mode = Literal["output", "input", "kernel"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Modes:
    """A weight as a tensor (groups, m, i, k), and which of its modes have a basis.

    A matrix m × n is (1, m, n, 1), a convolution's kernel with ``sides="both"`` (groups, out, in, kernel positions).

    Attributes:
        groups: tensors that are independent.
        outputs: m.
        inputs: i.
        kernel: k.
        kept: the modes that have a basis; the others keep the identity.
    """

    groups: int
    outputs: int
    inputs: int
    kernel: int
    kept: tuple[Mode, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the tensor."""
        return self.groups, self.outputs, self.inputs, self.kernel

    def size(self, mode: Mode) -> int:
        """The length of a mode."""
        return self.shape[1 + MODES.index(mode)]

    def matrix_shape(self, mode: Mode) -> tuple[int, int, int]:
        """Of the curvature matrices of a mode, and of its bases: (groups, d, d)."""
        return self.groups, self.size(mode), self.size(mode)

    def stack(self, count: int) -> Modes:
        """The modes of ``count`` layers of this shape, one after another."""
        return replace(self, groups=count * self.groups)


def find_modes(layer: Layer, sides: Sides, max_side: int) -> Modes:
    """Find which modes of a layer's weight get a basis.

    The rows of an embedding get none, nor do modes of one entry or of more than ``max_side``.

    Args:
        layer: the layer.
        sides: "short": the shorter side of its matrix, of an embedding the columns; "both": both, and of a convolution
            the kernel's positions apart from its input channels.
        max_side: the longest mode that gets a basis.

    Returns:
        The modes; ``kept`` may be empty.
    """
    size = layer.weight.shape
    groups, outputs, columns = layer.groups, size[0] // layer.groups, math.prod(size[1:])
    kernel = math.prod(size[2:]) if sides == "both" else 1
    wanted: tuple[Mode, ...] = MODES
    if sides == "short":
        wanted = ("output",) if outputs <= columns and not layer.row_sparse else ("input",)
    elif layer.row_sparse:
        wanted = ("input", "kernel")
    modes = Modes(groups=groups, outputs=outputs, inputs=columns // kernel, kernel=kernel, kept=())
    return replace(modes, kept=tuple(mode for mode in wanted if 1 < modes.size(mode) <= max_side))


@dataclass(eq=False)
class EigenBasis(Preconditioner):
    """Orthonormal eigenvectors Q of the curvature of each mode: X ↦ X ×₁ Q_outᵀ ×₂ Q_inᵀ ×₃ Q_kernelᵀ.

    For a matrix that is Q_LᵀG Q_R, of which ``sides="short"`` has one factor.

    Attributes:
        modes: of the layer's weight, or of the weights of several layers.
        bases: of each mode that is kept, (groups, d, d), eigenvectors in columns.
    """

    modes: Modes
    bases: dict[Mode, Tensor]

    @property
    def main(self) -> Tensor:
        """The first mode's."""
        return next(iter(self.bases.values()))

    def rotate(self, tensor: Tensor) -> Tensor:
        """The coordinates of a tensor in this basis.

        Args:
            tensor: (groups, m, i, k), in the dtype of `main`.

        Returns:
            (groups, m, i, k); where k > 1 with the input channels last in memory.
        """
        output, inputs, kernel = (self.bases.get(mode) for mode in MODES)
        if self.modes.kernel == 1:
            matrix = tensor.reshape(self.modes.shape[:3])
            if output is not None:
                matrix = torch.bmm(output.mT, matrix)
            return (matrix if inputs is None else torch.bmm(matrix, inputs)).view(self.modes.shape)
        groups, m, i, k = self.modes.shape
        if kernel is not None:
            tensor = torch.bmm(tensor.reshape(groups, m * i, k), kernel).view(self.modes.shape)
        last = tensor.mT.reshape(groups, m * k, i)
        if inputs is not None:
            last = torch.bmm(last, inputs)
        if output is not None:
            last = torch.bmm(output.mT, last.reshape(groups, m, k * i))
        return last.view(groups, m, k, i).mT

    def rotate_back(self, tensor: Tensor) -> Tensor:
        """The tensor of these coordinates: `rotate` undone.

        Args:
            tensor: (groups, m, i, k), in the dtype of `main`; fastest where it is in memory as `rotate` leaves it.

        Returns:
            (groups, m, i, k), contiguous.
        """
        output, inputs, kernel = (self.bases.get(mode) for mode in MODES)
        groups, m, i, k = self.modes.shape
        if k == 1:
            matrix = tensor.reshape(groups, m, i)
            if output is not None:
                matrix = torch.bmm(output, matrix)
            return (matrix if inputs is None else torch.bmm(matrix, inputs.mT)).view(self.modes.shape)
        last = tensor.mT.reshape(groups, m, k * i)
        if output is not None:
            last = torch.bmm(output, last)
        if inputs is not None:
            last = torch.bmm(last.view(groups, m * k, i), inputs.mT)
        first = last.view(groups, m, k, i).mT.reshape(groups, m * i, k)
        return (first if kernel is None else torch.bmm(first, kernel.mT)).view(self.modes.shape)

    def add_back_(self, weight: Tensor, change: Tensor, factor: float) -> None:
        """Multiply a weight by ``factor`` and add `rotate_back` of ``change``, in the last product itself if it can be.

        Args:
            weight: as many elements as the modes have, any dtype.
            change: (groups, m, i, k), in the dtype of `main`.
            factor: of the weight, 1 − lr · decay.
        """
        inputs, output = self.bases.get("input"), self.bases.get("output")
        if self.modes.kernel > 1 or weight.dtype != self.main.dtype or not weight.is_contiguous():
            weight.mul_(factor) if factor != 1 else None
            weight.add_(self.rotate_back(change).view(weight.shape))
            return
        matrix, last = weight.view(self.modes.shape[:3]), change.reshape(self.modes.shape[:3])
        if output is None or inputs is None:
            left, right = (last, inputs.mT) if inputs is not None else (output, last)
        else:
            left, right = torch.bmm(output, last), inputs.mT
        assert left is not None
        matrix.baddbmm_(left, right, beta=factor)

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """The coordinates of a gradient, whichever side is short."""
        G = append_column(gradient, column)
        return split_column(self.rotate(G.reshape(self.modes.shape)).reshape(G.shape), column)

    def changed_to(self, other: EigenBasis | None) -> EigenBasis:
        """The change of basis C = QᵀQ′ of each mode: coordinates in ``other`` are `rotate` by it of those in this one.

        Args:
            other: of the same modes; None for the identity.

        Returns:
            C, as a basis.
        """
        if other is None:
            return EigenBasis(self.modes, {mode: Q.mT for mode, Q in self.bases.items()})
        return EigenBasis(
            self.modes,
            {mode: torch.bmm(Q.mT.to(other.main.dtype), other.bases[mode]) for mode, Q in self.bases.items()},
        )

    def squared(self) -> EigenBasis:
        """C∘C, by which second moments move."""
        return EigenBasis(self.modes, {mode: C.square() for mode, C in self.bases.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The bases, by mode."""
        return {str(mode): basis for mode, basis in self.bases.items()}

    def to(self, device: torch.device) -> Self:
        """A copy on another device."""
        return type(self)(self.modes, {mode: Q.to(device) for mode, Q in self.bases.items()})

    def entries(self) -> Entries:
        """The bases, and the length of the input's mode."""
        return {"rank": 0, "inputs": self.modes.inputs, **self.tensors()}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> EigenBasis:
        """Restore one, see `Preconditioner.from_entries`."""
        inputs = int(entries["inputs"])
        bases = {mode: entries[mode].contiguous() for mode in MODES if mode in entries}
        if not inputs or shape.columns % inputs:
            raise ValueError(
                f"the state has {inputs} input channels where the layer's matrix has {shape.columns} columns"
            )
        kernel, kept = shape.columns // inputs, tuple(bases)
        modes = Modes(groups=shape.groups, outputs=shape.rows, inputs=inputs, kernel=kernel, kept=kept)
        for mode, basis in bases.items():
            if tuple(basis.shape) != modes.matrix_shape(mode):
                raise ValueError(
                    f"the basis of mode {mode!r} is of shape {tuple(basis.shape)}, where the layer has "
                    f"{modes.matrix_shape(mode)}"
                )
        return cls(modes, bases)


def stack_bases(bases: list[EigenBasis]) -> EigenBasis:
    """One basis for several layers of equal modes, whose own become views of it: none is stored twice."""
    if len(bases) == 1:
        return bases[0]
    stacked = {mode: torch.cat([each.bases[mode] for each in bases]) for mode in bases[0].bases}
    for mode, Q in stacked.items():
        for each, part in zip(bases, torch.split(Q, bases[0].modes.groups), strict=True):
            each.bases[mode] = part
    return EigenBasis(bases[0].modes.stack(len(bases)), stacked)


__all__ = ["MODES", "EigenBasis", "Mode", "Modes", "Sides", "find_modes", "stack_bases"]
