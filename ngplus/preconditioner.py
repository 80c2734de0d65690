"""What is kept of a curvature matrix between curvature steps, and how it is applied: one class a solver.

Each takes G with the short side first, (groups, p, q), and gives (λI + L)⁻¹G. For the right side of (6) it is given Gᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ngplus.gfim import Shape
from ngplus.inverse import Request, factor_dtype, invert


class Preconditioner(Protocol):
    """(λI + L)⁻¹, in whatever form."""

    @property
    def main(self) -> Tensor:
        """The tensor whose dtype and device are those of all that is kept."""
        ...

    def apply(self, gradient: Tensor) -> Tensor:
        """(λI + L)⁻¹G for G (groups, p, q), in the dtype of the statistics."""
        ...

    def apply_right(self, gradient: Tensor) -> Tensor:
        """G(λI + R)⁻¹ for G (groups, q, p)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept, by name."""
        ...


@dataclass(eq=False)
class DenseInverse:
    """The explicit inverse, block by block: (6), and (18) where there are blocks.

    Attributes:
        inverses: one (blocks, size, size) for each of ``shape.stack_shapes``.
        shape: of the layer's matrix.
    """

    inverses: list[Tensor]
    shape: Shape

    @property
    def main(self) -> Tensor:
        """The first stack."""
        return self.inverses[0]

    def apply_right(self, gradient: Tensor) -> Tensor:
        """Each block times its columns of the gradient."""
        if self.shape.blocks == (1, 0):
            return gradient @ self.inverses[0]
        return self.apply(gradient.mT).mT

    def apply(self, gradient: Tensor) -> Tensor:
        """Each block times its rows of the gradient."""
        if len(self.inverses) == 1:
            inverse = self.inverses[0]
            return (inverse @ gradient.reshape(*inverse.shape[:2], -1)).reshape(gradient.shape)
        whole = self.shape.short - self.shape.blocks[1]
        rows = (gradient[:, :whole], gradient[:, whole:])
        parts = [
            (inverse @ part.reshape(*inverse.shape[:2], -1)).reshape(part.shape)
            for inverse, part in zip(self.inverses, rows, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """The stacks, numbered."""
        return {f"inverse{i}": inverse for i, inverse in enumerate(self.inverses)}


@dataclass(eq=False)
class LowRankInverse:
    """Sherman-Morrison-Woodbury, equation (14) as corrected: (1/λ)[G − U (λI + UᵀU)⁻¹ UᵀG].

    With λI + UᵀU = CCᵀ and W = UC⁻ᵀ this is (1/λ)[G − WWᵀG]. No column of W is longer than one, so that rounding
    grows with ‖L‖/λ no more than it does for the explicit inverse; with the core apart it is ten times as much.

    Attributes:
        columns: W, (p, rank).
        damping: λ.
    """

    columns: Tensor
    damping: float

    @property
    def main(self) -> Tensor:
        """The columns."""
        return self.columns

    def apply_right(self, gradient: Tensor) -> Tensor:
        """The same from the right, the matrix being symmetric."""
        return (gradient - (gradient @ self.columns) @ self.columns.T) / self.damping

    def apply(self, gradient: Tensor) -> Tensor:
        """Equation (14), never forming a p×p matrix."""
        return (gradient - self.columns @ (self.columns.T @ gradient)) / self.damping

    def tensors(self) -> dict[str, Tensor]:
        """W and λ."""
        return {"columns": self.columns, "damping": torch.tensor(self.damping, dtype=torch.float64)}


@dataclass(eq=False)
class SketchedInverse:
    """The sketched least squares (16) with its last step: D = argmin ‖ΩUD − ΩG‖² + λ‖D‖², direction (G − UD)/λ.

    Attributes:
        columns: U, (p, rank).
        drawn: (q,), the rows that Ω keeps, drawn uniformly with replacement.
        core: (λI + UᵀΩᵀΩU)⁻¹UᵀΩᵀ, (rank, q).
        damping: λ.
    """

    columns: Tensor
    drawn: Tensor
    core: Tensor
    damping: float

    @property
    def main(self) -> Tensor:
        """The columns."""
        return self.columns

    def apply_right(self, gradient: Tensor) -> Tensor:
        """G(I − …)/λ, sampling columns of G as `apply` samples rows."""
        coefficients = gradient.index_select(2, self.drawn) @ self.core.T
        return (gradient - coefficients @ self.columns.T) / self.damping

    def apply(self, gradient: Tensor) -> Tensor:
        """Equation (16); Ω's scale √(p/q) is in ``core``."""
        coefficients = self.core @ gradient.index_select(1, self.drawn)
        return (gradient - self.columns @ coefficients) / self.damping

    def tensors(self) -> dict[str, Tensor]:
        """U, the rows drawn, the core and λ."""
        damping = torch.tensor(self.damping, dtype=torch.float64)
        return {"columns": self.columns, "drawn": self.drawn, "core": self.core, "damping": damping}


def low_rank(columns: Tensor, damping: float) -> LowRankInverse | None:
    """`LowRankInverse` of UUᵀ for U (p, rank); None where λI + UᵀU will not factorise."""
    U = columns.to(factor_dtype(columns))
    damped = damping * torch.eye(U.shape[1], dtype=U.dtype, device=U.device) + U.T @ U
    factor, info = torch.linalg.cholesky_ex(damped)
    W = torch.linalg.solve_triangular(factor, U.T, upper=False).T
    if bool((info != 0) | ~W.isfinite().all()):  # waits for the device, as for the explicit inverse
        return None
    return LowRankInverse(W.to(columns.dtype).contiguous(), damping)


def sketched(columns: Tensor, damping: float, drawn: Tensor) -> SketchedInverse | None:
    """`SketchedInverse` of UUᵀ for U (p, rank), with the rows ``drawn``."""
    drawn = drawn.to(columns.device)
    rows = columns.index_select(0, drawn)  # (q, rank)
    square_scale = columns.shape[0] / drawn.numel()
    core = _core(square_scale * (rows.T @ rows), damping)
    return None if core is None else SketchedInverse(columns, drawn, square_scale * (core @ rows.T), damping)


def same_batch_direction(columns: Tensor, sides: Tensor, damping: float) -> Tensor:
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
    core = _core(columns.T @ columns, damping)
    if core is None:
        raise ValueError(f"λI + UᵀU is not positive definite at {damping=}")
    return columns @ (core @ sides)


def _core(products: Tensor, damping: float) -> Tensor | None:
    request = Request(products.unsqueeze(0), damping)
    invert([request])
    return None if request.inverse is None or request.used_damping != damping else request.inverse[0]


def from_tensors(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
    """A preconditioner from what `Preconditioner.tensors` gave."""
    if "drawn" in tensors:
        damping = float(tensors["damping"])
        return SketchedInverse(tensors["columns"], tensors["drawn"], tensors["core"], damping)
    if "columns" in tensors:
        return LowRankInverse(tensors["columns"], float(tensors["damping"]))
    return DenseInverse([tensors[f"inverse{i}"] for i in range(len(tensors))], shape)
