"""Inverting damped matrices: Cholesky, as batches of equal size across all layers.

`torch.linalg.inv` and `solve` of a batch have been found to be silently wrong on some CPUs with two threads, so that
only `cholesky_ex` and `cholesky_inverse` are used. The factorisation is in float64 where the device has it; the
explicit inverse is kept, since a product with it is the cheapest thing to do every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.devices import factor_dtype
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class InverseRequest:
    """A batch of matrices to invert after adding ``damping`` to their diagonals.

    Attributes:
        matrices: (blocks, p, p), symmetric positive semidefinite but for rounding.
        damping: λ > 0.
        inverse: (λI + matrices)⁻¹, filled in by `invert`; None where it could not be made.
        used_damping: λ that was needed, filled in by `invert`.
    """

    matrices: Tensor
    damping: float
    inverse: Tensor | None = None
    used_damping: float = 0.0


def invert(requests: Sequence[InverseRequest], tuning: Tuning = DEFAULT) -> None:
    """Fill in the inverses, matrices of equal size as one batch, or as several where they are many.

    Synchronizes with the device once a batch: whether a factorisation succeeded decides what is done next.

    Args:
        requests: changed in place.
        tuning: how often a damping is raised, and how large a batch is.
    """
    sizes: dict[tuple[int, torch.device], list[InverseRequest]] = {}
    for request in requests:
        sizes.setdefault((request.matrices.shape[-1], request.matrices.device), []).append(request)
    for (side, _), together in sizes.items():
        for batch in _cut(together, max(1, tuning.inverted_elements // side**2)):
            _invert_batch(batch, tuning.cholesky_tries)


def _cut(requests: Sequence[InverseRequest], matrices: int) -> Iterator[list[InverseRequest]]:
    """Lists of so many matrices at most, or of one request."""
    batch: list[InverseRequest] = []
    for request in requests:
        if batch and sum(len(each.matrices) for each in (*batch, request)) > matrices:
            yield batch
            batch = []
        batch.append(request)
    yield batch


def invert_one(matrix: Tensor, damping: float) -> Tensor | None:
    """Invert a single matrix.

    Args:
        matrix: (p, p), symmetric positive semidefinite but for rounding.
        damping: λ > 0.

    Returns:
        (λI + matrix)⁻¹; None where it does not factorise with this λ.
    """
    request = InverseRequest(matrix.unsqueeze(0), damping)
    invert([request])
    return None if request.inverse is None or request.used_damping != damping else request.inverse[0]


def _invert_batch(requests: Sequence[InverseRequest], tries: int) -> None:
    matrices = torch.cat([r.matrices.to(factor_dtype(r.matrices)) for r in requests])
    damping = torch.cat([matrices.new_full((r.matrices.shape[0],), r.damping) for r in requests])
    factors, failed = _factorise(matrices, damping)
    for _ in range(tries):
        if not bool(failed.any()):
            break
        damping = torch.where(failed, damping * 10, damping)
        factors[failed], failed_again = _factorise(matrices[failed], damping[failed])
        failed = failed.clone().masked_scatter_(failed, failed_again)
    inverses = torch.cholesky_inverse(factors)
    counts = [r.matrices.shape[0] for r in requests]
    for request, inverse, fails, used in zip(
        requests, torch.split(inverses, counts), torch.split(failed, counts), torch.split(damping, counts), strict=True
    ):
        if not bool(fails.any()):
            request.inverse = inverse.to(request.matrices.dtype)
            raised = float(used.max())
            request.used_damping = raised if raised > 2 * request.damping else request.damping  # λ in float32 is not λ


def _factorise(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which of them are not to be used."""
    damped = matrices + torch.diag_embed(damping.unsqueeze(-1).expand(-1, matrices.shape[-1]))
    factors, info = torch.linalg.cholesky_ex(damped)
    finite = torch.isfinite(factors).flatten(1).all(dim=1)
    return factors, (info != 0) | ~finite


__all__ = ["InverseRequest", "invert", "invert_one"]
