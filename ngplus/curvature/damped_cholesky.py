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
    size = 0
    for request in requests:
        count = len(request.matrices)
        if batch and size + count > matrices:
            yield batch
            batch, size = [], 0
        batch.append(request)
        size += count
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
    counts = [len(request.matrices) for request in requests]
    dampings = [request.damping for request, count in zip(requests, counts, strict=True) for _ in range(count)]
    matrices = _join(requests)
    damping = matrices.new_tensor(dampings)
    factors, failed = _factorise(matrices, damping)
    failures: list[bool] = failed.tolist()
    used = dampings
    for _ in range(tries):
        if not any(failures):
            break
        damping = torch.where(failed, damping * 10, damping)
        factors[failed], failed_again = _factorise(_join(requests)[failed], damping[failed])
        failed = failed.clone().masked_scatter_(failed, failed_again)
        failures, used = failed.tolist(), damping.tolist()
    dtypes = {request.matrices.dtype for request in requests}
    inverses = torch.cholesky_inverse(factors)
    inverses = inverses.to(dtypes.pop()) if len(dtypes) == 1 else inverses
    start = 0
    for request, count, inverse in zip(requests, counts, torch.split(inverses, counts), strict=True):
        stop = start + count
        if not any(failures[start:stop]):
            request.inverse = inverse.to(request.matrices.dtype)
            raised = max(used[start:stop], default=request.damping)
            request.used_damping = raised if raised > 2 * request.damping else request.damping  # λ in float32 is not λ
        start = stop


def _join(requests: Sequence[InverseRequest]) -> Tensor:
    """The matrices of all requests in the dtype of the factorisation, in memory of their own."""
    stacks = [request.matrices for request in requests]
    joined = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
    return joined.to(factor_dtype(joined), copy=len(stacks) == 1)


def _factorise(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which of them are not to be used. The damping is added to ``matrices`` in place."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factors, info = torch.linalg.cholesky_ex(matrices)
    # An entry that is not finite makes the diagonal's of its row so too.
    finite = factors.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=1)
    return factors, (info != 0) | ~finite


__all__ = ["InverseRequest", "invert", "invert_one"]
