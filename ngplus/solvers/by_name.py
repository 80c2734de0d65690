"""The solvers by name. A new one is a module beside this one and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ngplus.factors.pair import sample_indices
from ngplus.layers import MatrixShape
from ngplus.sharded.remote_inverse import RemoteInverse
from ngplus.solvers.dense import DenseInverse
from ngplus.solvers.eigenbasis import EigenBasis
from ngplus.solvers.low_rank import LowRankInverse, invert_low_rank
from ngplus.solvers.preconditioner import Entries, Preconditioner
from ngplus.solvers.sketched import SketchedInverse, invert_sketched
from ngplus.tuning import Tuning

SolverName = Literal["auto", "dense", "low_rank", "sketched"]


@dataclass(frozen=True, kw_only=True)
class ColumnsRequest:
    """A curvature matrix in the form UUᵀ, to be inverted.

    Attributes:
        columns: U, (p, rank).
        damping: λ.
        sketch_size: q of (16), or None.
        generator: samples the rows of (16).
        tuning: see `Tuning`.
    """

    columns: Tensor
    damping: float
    sketch_size: int | None
    generator: torch.Generator
    tuning: Tuning


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What a choice of ``solver`` means.

    Attributes:
        max_rank: takes `Tuning` to the most columns of U, as a fraction of p, for which the curvature is kept as UUᵀ.
        invert: makes the preconditioner of UUᵀ, or None where it cannot be made.
    """

    max_rank: Callable[[Tuning], float]
    invert: Callable[[ColumnsRequest], Preconditioner | None]


def _low_rank(request: ColumnsRequest) -> Preconditioner | None:
    return invert_low_rank(request.columns, request.damping, request.tuning)


def _sketched(request: ColumnsRequest) -> Preconditioner | None:
    size, rows = request.sketch_size, len(request.columns)
    if size is None or size >= rows:
        return _low_rank(request)
    return invert_sketched(request.columns, request.damping, sample_indices(rows, size, request.generator))


SOLVERS: Mapping[SolverName, Solver] = {
    "auto": Solver(max_rank=lambda tuning: tuning.low_rank_up_to, invert=_low_rank),
    "dense": Solver(max_rank=lambda _: 0.0, invert=_low_rank),
    "low_rank": Solver(max_rank=lambda _: 1.0, invert=_low_rank),
    "sketched": Solver(max_rank=lambda _: 1.0, invert=_sketched),
}
"""What is not kept as UUᵀ is inverted explicitly, whatever the solver."""


FORMS_OF_INVERSES: tuple[type[Preconditioner], ...] = (DenseInverse, LowRankInverse, SketchedInverse)
"""Those that ``basis=None`` has."""

FORMS: tuple[type[Preconditioner], ...] = (*FORMS_OF_INVERSES, EigenBasis)
"""The classes that are saved, by the number that is saved with them."""


def pack(preconditioner: Preconditioner) -> Entries:
    """What is saved of a preconditioner, and which form it is."""
    if isinstance(preconditioner, RemoteInverse):
        return {}
    return {"form": FORMS.index(type(preconditioner)), **preconditioner.entries()}


def check_form(entries: Mapping[str, Any], name: str, *allowed: type[Preconditioner]) -> None:
    """Refuse what was saved with another ``basis``.

    Args:
        entries: what `pack` gave, or those of a layer without curvature.
        name: of the layer.
        *allowed: the forms that this optimizer has.

    Raises:
        ValueError: another form.
    """
    form = entries.get("form")
    if isinstance(form, int) and entries.get("updates") and FORMS[form] not in allowed:
        theirs, ours = ("None", '"eigen"') if EigenBasis in allowed else ('"eigen"', "None")
        raise ValueError(f"the state of {name} was saved with basis={theirs}, this optimizer has basis={ours}")


def unpack(entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
    """Restore what `pack` gave.

    Args:
        entries: what `pack` gave; its tensors may have been padded with zeros.
        shape: of the layer's matrix.
        damping: λ.

    Returns:
        The preconditioner, on the device of the entries.

    Raises:
        KeyError: an entry is missing.
        ValueError: a tensor has another size than the layer's.
    """
    form: int = entries["form"]
    entries["rank"]  # of every form: a missing one is an error
    return FORMS[form].from_entries(entries, shape, damping)


def blank_entries(shape: MatrixShape, sketch_size: int | None, dtype: torch.dtype) -> Entries:
    """`pack` of nothing: tensors without memory, as large as in any form, since a rank is at most p.

    Args:
        shape: of the layer's matrix.
        sketch_size: q of (16), where the solver is the sketched one.
        dtype: of what is kept.

    Returns:
        Numbers, and tensors on the meta device.
    """
    sizes: dict[str, tuple[int, ...]] = {f"inverse{i}": stack for i, stack in enumerate(shape.stack_shapes)}
    sizes["refinement"] = (2, shape.short)
    sampled = {}
    if sketch_size is not None and sketch_size < shape.short:
        sizes["core"] = (shape.short, sketch_size)
        sampled["drawn"] = torch.empty(sketch_size, dtype=torch.long, device="meta")
    tensors = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    return {"form": 0, "rank": 0, "column_major": 0, "refined": 0, **tensors, **sampled}


def unpack_first_layout(tensors: Mapping[str, Tensor], shape: MatrixShape) -> Preconditioner:
    """Restore a preconditioner from a file of the first layout, which had its tensors alone.

    Args:
        tensors: what `Preconditioner.tensors` gave.
        shape: of the layer's matrix.

    Returns:
        The preconditioner.
    """
    if "drawn" in tensors:
        return SketchedInverse(tensors["columns"], tensors["drawn"], tensors["core"], float(tensors["damping"]))
    if "columns" in tensors:
        return LowRankInverse(tensors["columns"], float(tensors["damping"]), tensors.get("refinement"))
    return DenseInverse([tensors[f"inverse{i}"] for i in range(len(tensors))], shape)


__all__ = [
    "FORMS_OF_INVERSES",
    "SOLVERS",
    "ColumnsRequest",
    "Solver",
    "SolverName",
    "blank_entries",
    "check_form",
    "pack",
    "unpack",
    "unpack_first_layout",
]
