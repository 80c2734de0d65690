"""The explicit inverse: (6), and (18) where there are blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ngplus.devices import factor_dtype, reads_without_sync
from ngplus.layers import MatrixShape, Side
from ngplus.solvers.preconditioner import (
    Entries,
    Preconditioner,
    append_column,
    find_column_major,
    restore_memory_order,
    split_column,
)
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class DenseInverse(Preconditioner):
    """The explicit inverse, block by block: (6), and (18) where there are blocks.

    Attributes:
        inverses: one (blocks, size, size) for each of ``shape.stack_shapes``.
        shape: of the layer's matrix.
    """

    rows_are_independent: ClassVar[bool] = True

    inverses: list[Tensor]
    shape: MatrixShape

    @property
    def main(self) -> Tensor:
        """The first stack."""
        return self.inverses[0]

    @property
    def matrices(self) -> Tensor | None:
        """The stack, if there is one."""
        return self.inverses[0] if len(self.inverses) == 1 else None

    def set_matrices_(self, matrices: Tensor) -> None:
        """Keep ``matrices`` in place of the stack."""
        (self.inverses[0],) = (matrices,)

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Each block times its rows of the gradient, or its columns."""
        if side == "left":
            return self._apply_left(gradient), None if column is None else self._apply_left(column)
        if self.shape.blocks == (1, 0):
            return self._apply_whole_right(gradient, column, tuning)
        return split_column(self._apply_blocks_right_(append_column(gradient, column)), column)

    def _apply_left(self, gradient: Tensor) -> Tensor:
        """(λI + L)⁻¹G for G (groups, m, ·), which is overwritten where there are blocks of two sizes."""
        if self.shape.blocks == (1, 0):
            return torch.bmm(self.inverses[0], gradient)
        if len(self.inverses) == 1:
            return _multiply_rows(self.inverses[0], gradient)
        for inverse, rows in zip(self.inverses, torch.split(gradient, self._lengths(), dim=1), strict=True):
            rows.copy_(_multiply_rows(inverse, rows))
        return gradient

    def _apply_whole_right(
        self, gradient: Tensor, column: Tensor | None, tuning: Tuning
    ) -> tuple[Tensor, Tensor | None]:
        """(G, c)(λI + R)⁻¹; with the inverse [[A, r], [rᵀ, ρ]] it is (GA + crᵀ, Gr + ρc).

        A small G is copied into one matrix with its column in less time than the separate products take.
        """
        inverse = self.inverses[0]
        if column is not None and gradient.numel() > tuning.grouped_below:
            A, r, rho = inverse[:, :-1, :-1], inverse[:, :-1, -1:], inverse[:, -1:, -1:]
            return torch.bmm(gradient, A).baddbmm_(column, r.mT), torch.bmm(gradient, r).addcmul_(column, rho)
        G = append_column(gradient, column)
        large = G.numel() >= 4 * tuning.apply_chunk
        if large and len(G) == 1 and reads_without_sync(G) and G.is_contiguous():
            return split_column(_multiply_in_chunks_(G, inverse, tuning.apply_chunk), column)
        return split_column(torch.bmm(G, inverse), column)

    def _apply_blocks_right_(self, gradient: Tensor) -> Tensor:
        """Overwrite G (groups, q, p) by G(λI + R)⁻¹, block by block."""
        for inverse, columns in zip(self.inverses, torch.split(gradient, self._lengths(), dim=2), strict=True):
            count, size = len(inverse) // self.shape.groups, inverse.shape[1]
            blocks = columns.view(*columns.shape[:2], count, size).transpose(1, 2)  # (groups, count, q, size)
            blocks.copy_(blocks @ inverse.view(*blocks.shape[:2], *inverse.shape[1:]))
        return gradient

    def _lengths(self) -> list[int]:
        """How much of the short side each stack covers."""
        return [len(inverse) // self.shape.groups * inverse.shape[1] for inverse in self.inverses]

    def select_groups(self, start: int, stop: int) -> DenseInverse:
        """Those blocks of each stack that are of these groups."""
        counts = [len(inverse) // self.shape.groups for inverse in self.inverses]
        parts = [inverse[start * n : stop * n] for inverse, n in zip(self.inverses, counts, strict=True)]
        return DenseInverse(parts, replace(self.shape, groups=stop - start))

    def share(self, damping: float) -> float | None:
        """From the inverse's smallest eigenvalue, 1/(λ + s)."""
        inverses = [inverse.to(factor_dtype(inverse)) for inverse in self.inverses]
        return max(0.0, *(1 - damping * float(torch.linalg.eigvalsh(inverse).min()) for inverse in inverses))

    def tensors(self) -> dict[str, Tensor]:
        """The stacks, numbered."""
        return {f"inverse{i}": inverse for i, inverse in enumerate(self.inverses)}

    def to(self, device: torch.device) -> DenseInverse:
        """A copy on another device."""
        return DenseInverse([inverse.to(device) for inverse in self.inverses], self.shape)

    def entries(self) -> Entries:
        """The stacks, and which of them are column-major."""
        return {"rank": 0, "column_major": find_column_major(self.inverses), **self.tensors()}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> DenseInverse:
        """Restore one, see `Preconditioner.from_entries`."""
        stacks = [entries[f"inverse{i}"] for i in range(len(shape.stack_shapes))]
        inverses = restore_memory_order(stacks, entries["column_major"])
        sizes = [tuple(inverse.shape) for inverse in inverses]
        if sizes != shape.stack_shapes:
            raise ValueError(f"the inverses are of sizes {sizes} where the layer has {shape.stack_shapes}")
        return cls(inverses, shape)


def _multiply_rows(inverse: Tensor, gradient: Tensor) -> Tensor:
    return (inverse @ gradient.reshape(*inverse.shape[:2], -1)).reshape(gradient.shape)


def _multiply_in_chunks_(gradient: Tensor, inverse: Tensor, elements: int) -> Tensor:
    """Overwrite G (1, q, p) by G·inverse, so many elements at a time, which stay in the cache."""
    rows = max(1, elements // gradient.shape[2])
    product = gradient.new_empty(rows, gradient.shape[2])
    for start in range(0, gradient.shape[1], rows):
        chunk = gradient[0, start : start + rows]
        chunk.copy_(torch.mm(chunk, inverse[0], out=product[: len(chunk)]))
    return gradient


__all__ = ["DenseInverse"]
