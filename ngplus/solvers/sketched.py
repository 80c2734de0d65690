"""The sketched least squares, equation (16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ngplus.curvature.damped_cholesky import invert_one
from ngplus.layers import MatrixShape, Side
from ngplus.solvers.preconditioner import Entries, Preconditioner, append_column, split_column
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class SketchedInverse(Preconditioner):
    """The sketched least squares (16) with its last step: D = argmin ‖ΩUD − ΩG‖² + λ‖D‖², direction (G − UD)/λ.

    Attributes:
        columns: U, (p, rank).
        sampled: (q,), the rows that Ω keeps, sampled uniformly with replacement.
        core: (λI + UᵀΩᵀΩU)⁻¹UᵀΩᵀ, (rank, q), Ω's scale √(p/q) included.
        damping: λ.
    """

    rows_are_independent: ClassVar[bool] = True

    columns: Tensor
    sampled: Tensor
    core: Tensor
    damping: float

    @property
    def main(self) -> Tensor:
        """The columns."""
        return self.columns

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Equation (16) from the left; from the right it samples columns of G in place of rows."""
        if side == "left":
            return self._apply_left_(gradient), None if column is None else self._apply_left_(column)
        G = append_column(gradient, column)
        coefficients = G.index_select(2, self.sampled) @ self.core.T
        return split_column(self._subtract_(G, coefficients[0], self.columns.T), column)

    def _apply_left_(self, gradient: Tensor) -> Tensor:
        coefficients = self.core @ gradient.index_select(1, self.sampled)
        return self._subtract_(gradient, self.columns, coefficients[0])

    def _subtract_(self, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Overwrite G (1, ·, ·) by (G − left·right)/λ in one pass over it."""
        gradient[0].addmm_(left, right, beta=1 / self.damping, alpha=-1 / self.damping)
        return gradient

    def tensors(self) -> dict[str, Tensor]:
        """U, the sampled rows, the core and λ."""
        damping = torch.tensor(self.damping, dtype=torch.float64)
        return {"columns": self.columns, "drawn": self.sampled, "core": self.core, "damping": damping}

    def to(self, device: torch.device) -> SketchedInverse:
        """A copy on another device."""
        return SketchedInverse(self.columns.to(device), self.sampled.to(device), self.core.to(device), self.damping)

    def entries(self) -> Entries:
        """U as the first columns of what is p×p in the dense form; the core, and the sampled rows."""
        form = {"rank": self.columns.shape[1], "column_major": 0}
        return {**form, "inverse0": self.columns.unsqueeze(0), "core": self.core, "drawn": self.sampled}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> SketchedInverse:
        """Restore one, see `Preconditioner.from_entries`."""
        rank = entries["rank"]
        columns = entries["inverse0"][0, :, :rank].contiguous()
        return cls(columns, entries["drawn"], entries["core"][:rank].contiguous(), damping)


def invert_sketched(columns: Tensor, damping: float, sampled: Tensor) -> SketchedInverse | None:
    """Make the `SketchedInverse` of UUᵀ.

    Args:
        columns: U, (p, rank).
        damping: λ.
        sampled: (q,), the rows that Ω keeps.

    Returns:
        The inverse; None where λI + UᵀΩᵀΩU does not factorise.
    """
    sampled = sampled.to(columns.device)
    rows = columns.index_select(0, sampled)  # (q, rank)
    square_scale = columns.shape[0] / sampled.numel()
    core = invert_one(square_scale * (rows.T @ rows), damping)
    return None if core is None else SketchedInverse(columns, sampled, square_scale * (core @ rows.T), damping)


__all__ = ["SketchedInverse", "invert_sketched"]
