"""What every solver makes of a layer's curvature: a preconditioner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ngplus.layers import MatrixShape, Side
from ngplus.tuning import DEFAULT, Tuning

Entries = dict[str, Tensor | int | float]
"""What is saved of a layer, by name."""


class Preconditioner(ABC):
    """The inverse of a layer's damped curvature, as it is kept between curvature steps.

    Attributes:
        rows_are_independent: whether a row of G(λI + R)⁻¹ needs that row of G alone, so that rows of zeros stay zeros.
        works_in_place: whether it has `apply_`.
    """

    rows_are_independent: ClassVar[bool] = False
    works_in_place: ClassVar[bool] = False

    @property
    @abstractmethod
    def main(self) -> Tensor:
        """The tensor whose dtype and device are those of all that is kept."""

    @property
    def matrices(self) -> Tensor | None:
        """(blocks, p, p), where one product with them is all there is to `apply`; None where it is not."""
        return None

    def set_matrices_(self, matrices: Tensor) -> None:
        """Keep other memory of the same values in place of `matrices`.

        Args:
            matrices: (blocks, p, p).

        Raises:
            NotImplementedError: where there are none.
        """
        raise NotImplementedError

    @abstractmethod
    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Precondition a layer's gradient, (6): (λI + L)⁻¹G from the left, G(λI + R)⁻¹ from the right.

        Args:
            gradient: G without the bias's column, (groups, m, n), in the dtype of `main`; may be overwritten.
            column: the bias's column of G, (groups, m, 1); None without a bias. May be overwritten.
            side: the short side of the matrix.
            tuning: sizes of products.

        Returns:
            The direction, and the bias's column of it.
        """

    def apply_(self, gradient: Tensor, column: Tensor | None, side: Side) -> None:
        """Overwrite the gradient of a layer with one group by its direction, with fewer views than `apply` takes.

        Args:
            gradient: G without the bias's column, (m, n), in the dtype of `main`.
            column: the bias's column of G, (m,); None without a bias.
            side: the short side of the matrix.

        Raises:
            NotImplementedError: where it does not work in place.
        """
        raise NotImplementedError

    def select_groups(self, start: int, stop: int) -> Preconditioner:
        """The preconditioner of some groups of a convolution, in the same memory.

        Args:
            start: the first of them.
            stop: the one after the last.

        Returns:
            It.

        Raises:
            NotImplementedError: where it is of one group.
        """
        raise NotImplementedError

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept, by name."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """A copy on another device."""

    @abstractmethod
    def entries(self) -> Entries:
        """Everything that is kept, under the names it is saved by."""

    @classmethod
    @abstractmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
        """Restore one.

        Args:
            entries: what `entries` gave; its tensors may have been padded with zeros.
            shape: of the layer's matrix.
            damping: λ.

        Returns:
            The preconditioner.

        Raises:
            KeyError: an entry is missing.
            ValueError: a tensor has another size than the layer's.
        """

    def share(self, damping: float) -> float | None:
        """s/(λ + s) for the largest eigenvalue s of L.

        Args:
            damping: λ.

        Returns:
            A number in [0, 1); None where it is not known.
        """
        return None


def append_column(gradient: Tensor, column: Tensor | None) -> Tensor:
    """(G, c), or G where there is no column."""
    return gradient if column is None else torch.cat([gradient, column], dim=2)


def split_column(direction: Tensor, column: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Undo `append_column`."""
    return (direction, None) if column is None else (direction[:, :, :-1], direction[:, :, -1:])


def find_column_major(stacks: Sequence[Tensor]) -> int:
    """Find which stacks of matrices are column-major in memory.

    A product with them rounds otherwise than one with their row-major copies, which is what loading may make.

    Args:
        stacks: (blocks, p, p) each.

    Returns:
        A number whose bit i stands for the i-th.
    """
    return sum(1 << i for i, stack in enumerate(stacks) if not stack.is_contiguous())


def restore_memory_order(stacks: Sequence[Tensor], column_major: int) -> list[Tensor]:
    """The same matrices, each stack in the order that `find_column_major` found."""
    return [stack.mT.contiguous().mT if column_major >> i & 1 else stack.contiguous() for i, stack in enumerate(stacks)]


__all__ = ["Entries", "Preconditioner", "append_column", "find_column_major", "restore_memory_order", "split_column"]
