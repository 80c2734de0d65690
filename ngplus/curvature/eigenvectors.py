"""Eigenvectors of curvature matrices: all of them at first, later by one step of orthogonal iteration from the last.

With S the matrix over its trace, and Q the last eigenvectors, a step is

    Y = S Q P + ε Q P,        Q″ R = Y (QR decomposition),        Q′ = Q″Pᵀ

P sorts by the Rayleigh quotients diag(QᵀSQ), the largest first, as the decomposition orthogonalises in this order; ε
keeps where they were those directions of which S says nothing. Every eigenvector so stays in its column, near where
it was.

Source: orthogonal iteration is in Golub & Van Loan, "Matrix Computations", section 8.2; for this purpose it is used by
SOAP (Vyas et al., arXiv 2409.11321, Algorithm 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplus.factors.products import multiply_by_transpose

SHIFT = 1e-5
"""ε: large against the rounding of Y in float32, small against the eigenvalues that are told apart."""


@dataclass(eq=False)
class BasisRequest:
    """A batch of matrices whose eigenvectors are wanted.

    Attributes:
        matrices: S, (groups, p, p), symmetric positive semidefinite but for rounding, in any scale.
        before: Q, (groups, p, p), the last eigenvectors; None where there are none.
        in_basis: whether ``matrices`` are QᵀSQ in place of S.
        basis: Q′, filled in by `find_bases`; None where it could not be made.
    """

    matrices: Tensor
    before: Tensor | None = None
    in_basis: bool = False
    basis: Tensor | None = None


def find_bases(requests: Sequence[BasisRequest]) -> None:
    """Fill in the eigenvectors, matrices of equal size as one batch.

    Synchronizes with the device once a size.

    Args:
        requests: changed in place.
    """
    together: dict[tuple[object, ...], list[BasisRequest]] = {}
    for request in requests:
        S = request.matrices
        key = S.shape[-1], S.device, S.dtype, request.before is None, request.in_basis
        together.setdefault(key, []).append(request)
    for equal in together.values():
        _find_batch(equal)


def _find_batch(requests: Sequence[BasisRequest]) -> None:
    S = _normalise(torch.cat([request.matrices for request in requests]))
    before = [request.before for request in requests if request.before is not None]
    found = _iterate(S, torch.cat(before), in_basis=requests[0].in_basis) if before else _decompose(S)
    if found is None:
        return
    counts = [len(request.matrices) for request in requests]
    finite = found.isfinite().flatten(1).all(1)
    for request, basis, fine in zip(requests, torch.split(found, counts), torch.split(finite, counts), strict=True):
        if bool(fine.all()):
            request.basis = basis


def _normalise(matrices: Tensor) -> Tensor:
    """Each matrix over its trace, which is the same in any basis."""
    traces = matrices.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(matrices.dtype).tiny)
    return matrices / traces[:, None, None]


def _decompose(S: Tensor) -> Tensor | None:
    """All eigenvectors, the largest eigenvalue's first; in float64 where float32 does not converge."""
    for dtype in (S.dtype, torch.float64):
        try:
            vectors: Tensor = torch.linalg.eigh(S.to(dtype)).eigenvectors
            return vectors.flip(-1).to(S.dtype).contiguous()
        except RuntimeError:  # torch.linalg.LinAlgError, or a device without float64
            continue
    return None


def _iterate(S: Tensor, Q: Tensor, *, in_basis: bool) -> Tensor:
    """One step of orthogonal iteration, on transposes: their rows, which are sorted, are contiguous."""
    groups, p, _ = S.shape
    Yt = torch.bmm(S, Q.mT) if in_basis else torch.bmm(Q.mT, S)
    quotients = S.diagonal(dim1=1, dim2=2) if in_basis else (Q.mT * Yt).sum(2)
    Yt = Yt.add_(Q.mT, alpha=SHIFT)
    order = quotients.argsort(dim=1, descending=True, stable=True)
    order = (order + p * torch.arange(groups, device=S.device).unsqueeze(1)).flatten()
    rows = orthonormalise(Yt.view(groups * p, p)[order].view(groups, p, p)).reshape(groups * p, p)
    return torch.empty_like(rows).index_copy_(0, order, rows).view(groups, p, p).mT.contiguous()


WELL_CONDITIONED = 0.3
"""Least diagonal entry of the Cholesky factor of a Gram matrix with ones on its diagonal, for which it is used."""


def orthonormalise(rows: Tensor) -> Tensor:
    """Gram-Schmidt of rows in their order, by the Cholesky factor of their Gram matrix where it is well conditioned.

    That is a few products, where Householder's reflections are many narrow ones. Rows that are nearly orthogonal, as
    those of a basis that moves slowly are, have a Gram matrix near the identity once they are of equal length.

    Args:
        rows: (groups, p, p).

    Returns:
        Orthonormal rows, (groups, p, p); not finite where ``rows`` are not.
    """
    rows = rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True)
    factors, info = torch.linalg.cholesky_ex(multiply_by_transpose(rows))
    fine = (info == 0) & (factors.diagonal(dim1=1, dim2=2).amin(1) > WELL_CONDITIONED)
    found = []
    for each, factor, is_fine in zip(rows, factors, fine.tolist(), strict=True):
        if is_fine:
            found.append(torch.linalg.solve_triangular(factor, each, upper=False))
        else:
            found.append(torch.linalg.qr(each.mT).Q.mT)
    return torch.stack(found)


__all__ = ["SHIFT", "BasisRequest", "find_bases", "orthonormalise"]
