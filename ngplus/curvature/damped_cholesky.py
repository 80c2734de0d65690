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
        tuning: how often a damping is raised, how large a batch is, and up to which ‖L‖/λ its precision is L's.
    """
    batches: dict[tuple[int, torch.dtype, torch.device, bool], list[InverseRequest]] = {}
    well_conditioned = _find_well_conditioned(requests, tuning.float64_above)
    for request, is_well_conditioned in zip(requests, well_conditioned, strict=True):
        matrices = request.matrices
        dtype = matrices.dtype if is_well_conditioned else factor_dtype(matrices)
        key = matrices.shape[-1], dtype, matrices.device, is_well_conditioned
        batches.setdefault(key, []).append(request)
    for (side, dtype, _, is_well_conditioned), together in batches.items():
        for batch in _cut(together, max(1, tuning.inverted_elements // side**2)):
            if not (is_well_conditioned and _invert_in_blocks(batch, dtype, tuning)):
                _invert_batch(batch, dtype, tuning.cholesky_tries)


def _find_well_conditioned(requests: Sequence[InverseRequest], limit: float) -> list[bool]:
    """Whether ‖L‖ ≤ limit·λ in the Frobenius norm, for all matrices of each request. Synchronizes once."""
    if not requests:
        return []
    norms = [torch.linalg.vector_norm(request.matrices, dim=(1, 2)).amax() for request in requests]
    largest = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).tolist()
    return [norm <= limit * request.damping for norm, request in zip(largest, requests, strict=True)]


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


def _invert_batch(requests: Sequence[InverseRequest], dtype: torch.dtype, tries: int) -> None:
    """Invert matrices of one size with Cholesky factors of ``dtype``, raising the damping of those without so often."""
    dampings = _repeat_dampings(requests)
    matrices = _join(requests, dtype)
    damping = matrices.new_tensor(dampings)
    factors, failed = _factorise(matrices, damping)
    failures: list[bool] = failed.tolist()
    used = dampings
    for _ in range(tries):
        if not any(failures):
            break
        damping = torch.where(failed, damping * 10, damping)
        factors[failed], failed_again = _factorise(_join(requests, dtype)[failed], damping[failed])
        failed = failed.clone().masked_scatter_(failed, failed_again)
        failures, used = failed.tolist(), damping.tolist()
    _assign(requests, torch.cholesky_inverse(factors), failures, used)


def _assign(requests: Sequence[InverseRequest], inverses: Tensor, failures: Sequence[bool], used: list[float]) -> None:
    """Give each request its inverses and the largest λ that they needed, unless one of them failed."""
    dtypes = {request.matrices.dtype for request in requests}
    inverses = inverses.to(dtypes.pop()) if len(dtypes) == 1 else inverses
    start = 0
    for request in requests:
        stop = start + request.matrices.shape[0]
        if not any(failures[start:stop]):
            request.inverse = inverses[start:stop].to(request.matrices.dtype)
            raised = max(used[start:stop], default=request.damping)
            request.used_damping = raised if raised > 2 * request.damping else request.damping  # λ in float32 is not λ
        start = stop


def _repeat_dampings(requests: Sequence[InverseRequest]) -> list[float]:
    """λ of each matrix."""
    return [request.damping for request in requests for _ in range(request.matrices.shape[0])]


def _join(requests: Sequence[InverseRequest], dtype: torch.dtype) -> Tensor:
    """The matrices of all requests in ``dtype``, in memory of their own."""
    stacks = [request.matrices for request in requests]
    joined = stacks[0] if len(stacks) == 1 else torch.cat(stacks)
    return joined.to(dtype, copy=len(stacks) == 1)


def _factorise(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which of them are not to be used. The damping is added to ``matrices`` in place."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factors, info = torch.linalg.cholesky_ex(matrices)
    # An entry that is not finite makes the diagonal's of its row so too.
    finite = factors.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=1)
    return factors, (info != 0) | ~finite


def _invert_in_blocks(requests: Sequence[InverseRequest], dtype: torch.dtype, tuning: Tuning) -> bool:
    """Invert well conditioned matrices of one size block by block, unless it is no faster or one is indefinite."""
    dampings = _repeat_dampings(requests)
    first, size = requests[0].matrices, requests[0].matrices.shape[-1]
    large = size > tuning.inverted_block and len(dampings) * size**3 >= tuning.inverted_multiplications
    if not (large and first.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"):
        return False
    matrices = _join(requests, dtype)
    matrices.diagonal(dim1=-2, dim2=-1).add_(matrices.new_tensor(dampings).unsqueeze(-1))
    if not _invert_blocks_(matrices, tuning.inverted_block):
        return False
    _assign(requests, matrices, [False] * len(dampings), dampings)
    return True


def _invert_blocks_(matrices: Tensor, block: int) -> bool:
    """Overwrite (b, p, p) by its inverses, see the module; unless one is not positive definite, which spoils it."""
    size = matrices.shape[-1]
    if size <= block:
        factors, info = torch.linalg.cholesky_ex(matrices)
        matrices.copy_(torch.cholesky_inverse(factors))
        return not bool(info.any())
    half = size // 2
    A, B, C = matrices[:, :half, :half], matrices[:, :half, half:], matrices[:, half:, half:]
    if not _invert_blocks_(A, block):
        return False
    W = torch.bmm(A, B)
    C.baddbmm_(B.mT, W, alpha=-1)
    if not _invert_blocks_(C, block):
        return False
    WC = torch.bmm(W, C)
    A.baddbmm_(WC, W.mT)
    torch.neg(WC, out=B)
    matrices[:, half:, :half] = B.mT
    return True


__all__ = ["InverseRequest", "invert", "invert_one"]
