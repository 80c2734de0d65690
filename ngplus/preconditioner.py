"""What is kept of a curvature matrix between curvature steps, and how it is applied: one class a solver.

Each takes G with the short side first, (groups, p, q), and gives (λI + L)⁻¹G. For the right side of (6) it is given Gᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ngplus.devices import factor_dtype
from ngplus.gfim import Shape
from ngplus.inverse import invert_one

Entries = dict[str, Tensor | int | float]
"""What is saved of a layer, by name."""

_FORMS = ("dense", "low_rank", "sketched")


class Preconditioner(Protocol):
    """(λI + L)⁻¹, in whatever form."""

    @property
    def main(self) -> Tensor:
        """The tensor whose dtype and device are those of all that is kept."""
        ...

    def apply(self, gradient: Tensor) -> Tensor:
        """(λI + L)⁻¹G for G (groups, p, q), in the dtype of the statistics. G may be overwritten."""
        ...

    def apply_right(self, gradient: Tensor) -> Tensor:
        """G(λI + R)⁻¹ for G (groups, q, p). G may be overwritten."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is kept, by name."""
        ...

    def entries(self) -> Entries:
        """Everything that is kept, under the names it is saved by."""
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
            return torch.bmm(gradient, self.inverses[0])
        for inverse, columns in zip(self.inverses, torch.split(gradient, self._lengths(), dim=2), strict=True):
            count, size = len(inverse) // self.shape.groups, inverse.shape[1]
            blocks = columns.view(*columns.shape[:2], count, size).transpose(1, 2)  # (groups, count, q, size)
            blocks.copy_(blocks @ inverse.view(*blocks.shape[:2], *inverse.shape[1:]))
        return gradient

    def apply_right_apart(self, gradient: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """`apply_right` for (G, c), of which the last column c (groups, q, 1) lies elsewhere.

        With the inverse [[A, r], [rᵀ, ρ]] it is (GA + crᵀ, Gr + ρc). There must be no blocks.
        """
        inverse = self.inverses[0]
        A, r, rho = inverse[:, :-1, :-1], inverse[:, :-1, -1:], inverse[:, -1:, -1:]
        return torch.bmm(gradient, A).baddbmm_(column, r.mT), torch.bmm(gradient, r).addcmul_(column, rho)

    def apply(self, gradient: Tensor) -> Tensor:
        """Each block times its rows of the gradient."""
        if self.shape.blocks == (1, 0):
            return torch.bmm(self.inverses[0], gradient)
        if len(self.inverses) == 1:
            return _times_rows(self.inverses[0], gradient)
        for inverse, rows in zip(self.inverses, torch.split(gradient, self._lengths(), dim=1), strict=True):
            rows.copy_(_times_rows(inverse, rows))
        return gradient

    def _lengths(self) -> list[int]:
        """How much of the short side each stack covers."""
        return [len(inverse) // self.shape.groups * inverse.shape[1] for inverse in self.inverses]

    def tensors(self) -> dict[str, Tensor]:
        """The stacks, numbered."""
        return {f"inverse{i}": inverse for i, inverse in enumerate(self.inverses)}

    def entries(self) -> Entries:
        """The same, which form it is, and which stacks are column-major."""
        form = {"form": _FORMS.index("dense"), "rank": 0, "column_major": find_column_major(self.inverses)}
        return {**form, **self.tensors()}


def _times_rows(inverse: Tensor, gradient: Tensor) -> Tensor:
    return (inverse @ gradient.reshape(*inverse.shape[:2], -1)).reshape(gradient.shape)


REFINE_ABOVE = 10.0
"""‖L‖/λ above which a low-rank direction is refined. Up to it both solvers' directions are within 1e-6 in float32."""


@dataclass(eq=False)
class LowRankInverse:
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

    columns: Tensor
    damping: float
    refinement: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The columns."""
        return self.columns

    def apply_right(self, gradient: Tensor) -> Tensor:
        """The same from the right, the matrix being symmetric."""
        self.turn(gradient[0], None, left=False)
        return gradient

    def apply(self, gradient: Tensor) -> Tensor:
        """Equation (14), never forming a p×p matrix."""
        self.turn(gradient[0], None, left=True)
        return gradient

    def turn(self, gradient: Tensor, column: Tensor | None, *, left: bool) -> None:
        """Overwrite G by (14) from the left, (p, q), or from the right, (q, p), in one pass over it, refined in two.

        A column c may lie beside it: from the left it is one more, (p,); from the right it is the last of G's, (q,).
        """
        if left and column is not None:
            self.turn(column.unsqueeze(1), None, left=True)
            column = None
        scale = 1 / self.damping
        coefficients = self._coefficients(gradient, column, left=left)
        self._add_columns(gradient, column, coefficients, left=left, beta=scale, alpha=-scale)
        if self.refinement is None:
            return
        inverse, ratio = self.refinement.unsqueeze(2) if left else self.refinement
        missing = coefficients.mul_(inverse).sub_(self._coefficients(gradient, column, left=left)).mul_(ratio)
        self._add_columns(gradient, column, missing, left=left, beta=1.0, alpha=1.0)

    def _coefficients(self, gradient: Tensor, column: Tensor | None, *, left: bool) -> Tensor:
        """WᵀG, (rank, q); GW or (G, c)W, (q, rank)."""
        W = self.columns
        if left:
            return torch.mm(W.T, gradient)
        if column is None:
            return torch.mm(gradient, W)
        return torch.mm(gradient, W[:-1]).addr_(column, W[-1])

    def _add_columns(
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

    def tensors(self) -> dict[str, Tensor]:
        """W and λ, and what refines directions."""
        kept = {"columns": self.columns, "damping": torch.tensor(self.damping, dtype=torch.float64)}
        return kept if self.refinement is None else {**kept, "refinement": self.refinement}

    def entries(self) -> Entries:
        """W as the first columns of what is p×p in the dense form; λ is an entry of the layer."""
        form = {"form": _FORMS.index("low_rank"), "rank": self.columns.shape[1], "column_major": 0}
        kept: Entries = {**form, "inverse0": self.columns.unsqueeze(0)}
        return kept if self.refinement is None else {**kept, "refined": 1, "refinement": self.refinement}


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
        return _minus_product(gradient, coefficients[0], self.columns.T, self.damping)

    def apply(self, gradient: Tensor) -> Tensor:
        """Equation (16); Ω's scale √(p/q) is in ``core``."""
        coefficients = self.core @ gradient.index_select(1, self.drawn)
        return _minus_product(gradient, self.columns, coefficients[0], self.damping)

    def tensors(self) -> dict[str, Tensor]:
        """U, the rows drawn, the core and λ."""
        damping = torch.tensor(self.damping, dtype=torch.float64)
        return {"columns": self.columns, "drawn": self.drawn, "core": self.core, "damping": damping}

    def entries(self) -> Entries:
        """U as the first columns of what is p×p in the dense form; the core, and the rows drawn."""
        form = {"form": _FORMS.index("sketched"), "rank": self.columns.shape[1], "column_major": 0}
        return {**form, "inverse0": self.columns.unsqueeze(0), "core": self.core, "drawn": self.drawn}


def _minus_product(gradient: Tensor, left: Tensor, right: Tensor, damping: float) -> Tensor:
    """(G − left·right)/λ for G (1, ·, ·), in G's own memory and one pass over it."""
    gradient[0].addmm_(left, right, beta=1 / damping, alpha=-1 / damping)
    return gradient


def largest_share(preconditioner: Preconditioner, damping: float) -> float | None:
    """s/(λ + s) for the largest eigenvalue s of L; None for a sketch, and for what is no (λI + L)⁻¹.

    Args:
        preconditioner: (λI + L)⁻¹.
        damping: λ.
    """
    if isinstance(preconditioner, DenseInverse):
        inverses = [inverse.to(factor_dtype(inverse)) for inverse in preconditioner.inverses]
        return max(0.0, *(1 - damping * float(torch.linalg.eigvalsh(inverse).min()) for inverse in inverses))
    if isinstance(preconditioner, LowRankInverse):  # whose columns are orthogonal, and as long as the root of theirs
        return float(preconditioner.columns.square().sum(dim=0).max()) if preconditioner.columns.numel() else 0.0
    return None


def low_rank(columns: Tensor, damping: float) -> LowRankInverse | None:
    """`LowRankInverse` of UUᵀ for U (p, rank); None where UᵀU has no eigenvalues.

    With UᵀU = VSVᵀ, W = UV(λI + S)^(−½); the columns that are not to be seen beside I in U's precision, s/(λ + s) below
    its ε, are left out, which on a network in training is often most of them. So are those whose s is the rounding of
    the largest: where ‖L‖/λ is huge it may be more than λ, or less than −λ.
    """
    U = columns.to(factor_dtype(columns))
    products = U.T @ U
    if not bool(products.isfinite().all()):  # waits for the device, as for the explicit inverse
        return None
    S, V = torch.linalg.eigh(products)
    seen_beside_one = S / (damping + S) > torch.finfo(columns.dtype).eps
    rounding = S[-1:] * (S.numel() * torch.finfo(S.dtype).eps)
    kept = seen_beside_one & S.gt(rounding)
    S, V = S[kept], V[:, kept]
    W = (U @ V) / (damping + S).sqrt()
    refinement = None
    if S.numel() and float(S[-1]) > REFINE_ABOVE * damping:
        refinement = torch.stack([1 / (damping + S), (damping + S) / S]).to(columns.dtype)
    return LowRankInverse(W.to(columns.dtype).contiguous(), damping, refinement)


def sketched(columns: Tensor, damping: float, drawn: Tensor) -> SketchedInverse | None:
    """`SketchedInverse` of UUᵀ for U (p, rank), with the rows ``drawn``."""
    drawn = drawn.to(columns.device)
    rows = columns.index_select(0, drawn)  # (q, rank)
    square_scale = columns.shape[0] / drawn.numel()
    core = invert_one(square_scale * (rows.T @ rows), damping)
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
    core = invert_one(columns.T @ columns, damping)
    if core is None:
        raise ValueError(f"λI + UᵀU is not positive definite at {damping=}")
    return columns @ (core @ sides)


def from_tensors(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
    """A preconditioner from what `Preconditioner.tensors` gave."""
    if "drawn" in tensors:
        damping = float(tensors["damping"])
        return SketchedInverse(tensors["columns"], tensors["drawn"], tensors["core"], damping)
    if "columns" in tensors:
        return LowRankInverse(tensors["columns"], float(tensors["damping"]), tensors.get("refinement"))
    return DenseInverse([tensors[f"inverse{i}"] for i in range(len(tensors))], shape)


def make_blank(shape: Shape, sketch_size: int | None, dtype: torch.dtype) -> Entries:
    """`Preconditioner.entries` of nothing: tensors without memory, as large as in any form, since a rank is at most p.

    Args:
        shape: of the layer's matrix.
        sketch_size: q of (16), where the solver is the sketched one.
        dtype: of what is kept.
    """
    sizes: dict[str, tuple[int, ...]] = {f"inverse{i}": stack for i, stack in enumerate(shape.stack_shapes)}
    sizes["refinement"] = (2, shape.short)
    drawn = {}
    if sketch_size is not None and sketch_size < shape.short:
        sizes["core"] = (shape.short, sketch_size)
        drawn["drawn"] = torch.empty(sketch_size, dtype=torch.long, device="meta")
    tensors = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    return {"form": 0, "rank": 0, "column_major": 0, "refined": 0, **tensors, **drawn}


def find_column_major(stacks: Sequence[Tensor]) -> int:
    """Which stacks of matrices are column-major in memory: bit i for the i-th.

    A product with them rounds otherwise than one with their row-major copies, which is what loading may make.
    """
    return sum(1 << i for i, stack in enumerate(stacks) if not stack.is_contiguous())


def restore_memory_order(stacks: Sequence[Tensor], column_major: int) -> list[Tensor]:
    """The same matrices, each stack in the order that `find_column_major` found."""
    return [stack.mT.contiguous().mT if column_major >> i & 1 else stack.contiguous() for i, stack in enumerate(stacks)]


def from_entries(entries: Mapping[str, Any], shape: Shape, damping: float) -> Preconditioner:
    """A preconditioner from what `Preconditioner.entries` gave, whose tensors may have been filled up with zeros.

    Raises:
        KeyError: an entry is missing.
        ValueError: a tensor has another size than the layer's.
    """
    form, rank = _FORMS[entries["form"]], entries["rank"]
    if form == "dense":
        stacks = [entries[f"inverse{i}"] for i in range(len(shape.stack_shapes))]
        inverses = restore_memory_order(stacks, entries["column_major"])
        sizes = [tuple(inverse.shape) for inverse in inverses]
        if sizes != shape.stack_shapes:
            raise ValueError(f"the inverses are of sizes {sizes} where the layer has {shape.stack_shapes}")
        return DenseInverse(inverses, shape)
    columns = entries["inverse0"][0, :, :rank].contiguous()
    if form == "low_rank":
        return LowRankInverse(
            columns, damping, entries["refinement"][:, :rank].contiguous() if entries["refined"] else None
        )
    return SketchedInverse(columns, entries["drawn"], entries["core"][:rank].contiguous(), damping)
