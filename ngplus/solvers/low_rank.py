"""Sherman-Morrison-Woodbury, equation (14) as corrected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ngplus.curvature.damped_cholesky import invert_one
from ngplus.devices import factor_dtype
from ngplus.layers import MatrixShape, Side
from ngplus.solvers.preconditioner import Entries, Preconditioner
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class LowRankInverse(Preconditioner):
    """Sherman-Morrison-Woodbury, equation (14) as corrected: (1/λ)[G − U (λI + UᵀU)⁻¹ UᵀG].

    With λI + UᵀU = V(λI + S)Vᵀ and W = UV(λI + S)^(−½) this is D = (1/λ)[G − WWᵀG]. No column of W is longer than one,
    so that rounding does not grow with U; with the core apart it is ten times as much.

    Where ‖L‖/λ is large and G is in the span of W, as that of the batch it was made of is, nearly all of G cancels, and
    its rounding stays. There WᵀD, which is known to be (λI + S)⁻¹WᵀG, is put right by one more step, of as many
    operations as the first: D + W (λI + S)S⁻¹ [(λI + S)⁻¹WᵀG − WᵀD].

    Attributes:
        columns: W, (p, rank).
        damping: λ.
        refinement: the diagonals (λI + S)⁻¹ and (λI + S)S⁻¹, (2, rank); None where directions are not refined.
    """

    rows_are_independent: ClassVar[bool] = True
    works_in_place: ClassVar[bool] = True

    columns: Tensor
    damping: float
    refinement: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The columns."""
        return self.columns

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Equation (14), never forming a p×p matrix, in place."""
        self.apply_(gradient[0], None if column is None else column[0, :, 0], side)
        return gradient, column

    def apply_(self, gradient: Tensor, column: Tensor | None, side: Side) -> None:
        """Overwrite G by (14) from the left, (p, q), or from the right, (q, p), in one pass over it, refined in two.

        A column c may be stored apart: from the left it is one more, (p,); from the right it is the last of G's, (q,).

        Args:
            gradient: G.
            column: c, or None.
            side: from which G is multiplied.
        """
        left = side == "left"
        if left and column is not None:
            self.apply_(column.unsqueeze(1), None, side)
            column = None
        scale = 1 / self.damping
        coefficients = self._coefficients(gradient, column, left=left)
        self._add_columns_(gradient, column, coefficients, left=left, beta=scale, alpha=-scale)
        if self.refinement is None:
            return
        inverse, ratio = self.refinement.unsqueeze(2) if left else self.refinement
        missing = coefficients.mul_(inverse).sub_(self._coefficients(gradient, column, left=left)).mul_(ratio)
        self._add_columns_(gradient, column, missing, left=left, beta=1.0, alpha=1.0)

    def _coefficients(self, gradient: Tensor, column: Tensor | None, *, left: bool) -> Tensor:
        """WᵀG, (rank, q); GW or (G, c)W, (q, rank)."""
        W = self.columns
        if left:
            return torch.mm(W.T, gradient)
        if column is None:
            return torch.mm(gradient, W)
        return torch.mm(gradient, W[:-1]).addr_(column, W[-1])

    def _add_columns_(
        self, gradient: Tensor, column: Tensor | None, coefficients: Tensor, *, left: bool, beta: float, alpha: float
    ) -> None:
        """G ← βG + αW·coefficients, or βG + α·coefficients·Wᵀ, and the column likewise."""
        W = self.columns
        if left:
            gradient.addmm_(W, coefficients, beta=beta, alpha=alpha)
        elif column is None:
            gradient.addmm_(coefficients, W.T, beta=beta, alpha=alpha)
        else:
            gradient.addmm_(coefficients, W[:-1].T, beta=beta, alpha=alpha)
            column.addmv_(coefficients, W[-1], beta=beta, alpha=alpha)

    def share(self, damping: float) -> float | None:
        """The columns of W are orthogonal, and of squared lengths s/(λ + s)."""
        return float(self.columns.square().sum(dim=0).max()) if self.columns.numel() else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """W and λ, and what refines directions."""
        kept = {"columns": self.columns, "damping": torch.tensor(self.damping, dtype=torch.float64)}
        return kept if self.refinement is None else {**kept, "refinement": self.refinement}

    def to(self, device: torch.device) -> LowRankInverse:
        """A copy on another device."""
        refinement = None if self.refinement is None else self.refinement.to(device)
        return LowRankInverse(self.columns.to(device), self.damping, refinement)

    def entries(self) -> Entries:
        """W as the first columns of what is p×p in the dense form; λ is an entry of the layer."""
        kept: Entries = {"rank": self.columns.shape[1], "column_major": 0, "inverse0": self.columns.unsqueeze(0)}
        return kept if self.refinement is None else {**kept, "refined": 1, "refinement": self.refinement}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> LowRankInverse:
        """Restore one, see `Preconditioner.from_entries`."""
        rank = entries["rank"]
        refinement = entries["refinement"][:, :rank].contiguous() if entries["refined"] else None
        return cls(entries["inverse0"][0, :, :rank].contiguous(), damping, refinement)


def invert_low_rank(columns: Tensor, damping: float, tuning: Tuning = DEFAULT) -> LowRankInverse | None:
    """Make the `LowRankInverse` of UUᵀ.

    With UᵀU = VSVᵀ, W = UV(λI + S)^(−½). Columns that do not count compared with I in U's precision, s/(λ + s) below
    its ε, are left out, which on a network in training is often most of them. So are those whose s is the rounding of
    the largest: where ‖L‖/λ is huge it may be more than λ, or less than −λ.

    This is done in float64, but in U's precision, in half the time, where ‖UᵀU‖ is a small multiple of λ: there its
    rounding changes no s/(λ + s) by more than a few ε.

    Args:
        columns: U, (p, rank).
        damping: λ.
        tuning: up to which ‖UᵀU‖/λ its precision is U's, and from which ‖L‖/λ on directions are refined.

    Returns:
        The inverse; None where UᵀU is not finite.
    """
    U, products, is_small = _multiply(columns, tuning.float64_above * damping)
    if not (is_small or bool(products.isfinite().all())):  # synchronizes, as for the explicit inverse
        return None
    S, V = torch.linalg.eigh(products)
    kept = S / (damping + S) > torch.finfo(columns.dtype).eps
    if not is_small:
        kept &= S.gt(S[-1:] * (S.numel() * torch.finfo(S.dtype).eps))
    S, V = S[kept], V[:, kept]
    W = (U @ V) / (damping + S).sqrt()
    refinement = None
    if not is_small and S.numel() and float(S[-1]) > tuning.refine_above * damping:
        refinement = torch.stack([1 / (damping + S), (damping + S) / S]).to(columns.dtype)
    return LowRankInverse(W.to(columns.dtype).contiguous(), damping, refinement)


def _multiply(columns: Tensor, limit: float) -> tuple[Tensor, Tensor, bool]:
    """U and UᵀU, in float64 unless ‖UᵀU‖ is at most ``limit``, and whether it is."""
    square = float(torch.linalg.vector_norm(columns)) ** 2
    if square <= limit * columns.shape[1] ** 0.5:  # over the root, it is at most ‖UᵀU‖
        products = columns.T @ columns
        if float(torch.linalg.vector_norm(products)) <= limit:
            return columns, products, True
    U = columns.to(factor_dtype(columns))
    return U, U.T @ U, False


def precondition_same_batch(columns: Tensor, sides: Tensor, damping: float) -> Tensor:
    """(λI + UUᵀ)⁻¹G for G = U G̃, cheaper than (14): U (λI + UᵀU)⁻¹G̃.

    Where G comes from the batch that U was made of and κ = 1, row i of G̃ is aᵢᵀ/(√b ‖aᵢ‖).

    Args:
        columns: U, (p, b).
        sides: G̃, (b, q).
        damping: λ.

    Returns:
        The direction, (p, q).

    Raises:
        ValueError: where λI + UᵀU will not factorise.
    """
    core = invert_one(columns.T @ columns, damping)
    if core is None:
        raise ValueError(f"λI + UᵀU is not positive definite at {damping=}")
    return columns @ (core @ sides)


__all__ = ["LowRankInverse", "invert_low_rank", "precondition_same_batch"]
