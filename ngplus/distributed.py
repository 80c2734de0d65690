"""Curvature over several processes: one all-reduce of packed triangles, the inversions shared out and gathered.

Every process calls these in the same order with the same shapes, whether or not its own batch reached a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ngplus.inverse import Request, invert


def world_size() -> int:
    """Number of processes that train together; 1 where `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def pack(matrices: Tensor) -> Tensor:
    """The lower triangles of (blocks, p, p) symmetric matrices as one vector."""
    rows, columns = _triangle(matrices.shape[-1], matrices.device)
    return matrices[:, rows, columns].flatten()


def unpack(triangles: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The symmetric matrices that `pack` was given."""
    blocks, size, _ = shape
    rows, columns = _triangle(size, triangles.device)
    matrices = triangles.new_empty(shape)
    entries = triangles.view(blocks, -1)
    matrices[:, rows, columns] = entries
    matrices[:, columns, rows] = entries
    return matrices


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows, columns


def totals(rows: Sequence[Sequence[float]], device: torch.device) -> list[list[float]]:
    """Sums of some numbers over all processes, row by row. Synchronizes."""
    numbers = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return cast(list[list[float]], numbers.tolist())


def average(moments: Sequence[list[Tensor]], weights: Sequence[float], sums: Sequence[float]) -> None:
    """Average matrices over processes in place, each process's weighted by its number of samples.

    Args:
        moments: of each layer, a tensor a stack of blocks; zeros where this process has no samples.
        weights: samples that each was made from here.
        sums: for each layer, the samples of all processes together.
    """
    if not moments:
        return
    stacks = [(stack, weight) for layer, weight in zip(moments, weights, strict=True) for stack in layer]
    flat = torch.cat([pack(stack) * weight for stack, weight in stacks])
    dist.all_reduce(flat)
    start = 0
    for layer, total in zip(moments, sums, strict=True):
        for stack in layer:
            blocks, size, _ = stack.shape
            length = blocks * size * (size + 1) // 2
            triangles = flat[start : start + length] / total
            stack.copy_(unpack(triangles, (blocks, size, size)))
            start += length


def invert_shared(requests: Sequence[Request]) -> None:
    """`ngplus.inverse.invert` with the work shared out by operation count; every process ends with all inverses."""
    rank = dist.get_rank()
    owners = _owners(requests, dist.get_world_size())
    mine = [request for request, owner in zip(requests, owners, strict=True) if owner == rank]
    invert(mine)
    flat = torch.cat([_packed_result(request, owner == rank) for request, owner in zip(requests, owners, strict=True)])
    dist.all_reduce(flat)
    start = 0
    for request in requests:
        blocks, size, _ = request.matrices.shape
        length = blocks * size * (size + 1) // 2
        request.used_damping = float(flat[start])
        triangles = flat[start + 1 : start + 1 + length].to(request.matrices.dtype)
        request.inverse = unpack(triangles, (blocks, size, size)) if request.used_damping else None
        start += 1 + length


def _owners(requests: Sequence[Request], processes: int) -> list[int]:
    """A process for each request, the largest first to whoever has least to do."""
    load = [0] * processes
    owners = [0] * len(requests)
    costs = [r.matrices.shape[0] * r.matrices.shape[1] ** 3 for r in requests]
    for place in sorted(range(len(requests)), key=lambda i: -costs[i]):
        owners[place] = load.index(min(load))
        load[owners[place]] += costs[place]
    return owners


def _packed_result(request: Request, mine: bool) -> Tensor:
    """λ that was used (0 for a failure) and the inverse's triangles in float64; zeros where another process has it."""
    blocks, size, _ = request.matrices.shape
    if not mine or request.inverse is None:
        length = 1 + blocks * size * (size + 1) // 2
        return request.matrices.new_zeros(length, dtype=torch.float64)
    used = request.matrices.new_tensor([request.used_damping], dtype=torch.float64)
    return torch.cat([used, pack(request.inverse).double()])
