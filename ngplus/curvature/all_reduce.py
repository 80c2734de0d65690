"""Curvature over several processes: one all-reduce of packed triangles, the inversions shared out and gathered.

Every process calls these in the same order with the same shapes, whether or not its own batch reached a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ngplus._torch_internals import announce, find_absent
from ngplus.curvature.damped_cholesky import InverseRequest, invert
from ngplus.curvature.eigenvectors import BasisRequest, find_bases
from ngplus.guards.join import JOIN_BOTH
from ngplus.tuning import DEFAULT, Tuning


def world_size() -> int:
    """Number of processes that train together; 1 where `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_share(count: int) -> int:
    """This process's share of ``count`` things; those that are left over go one each to the first processes."""
    if (processes := world_size()) == 1:
        return count
    each, left = divmod(count, processes)
    return each + (dist.get_rank() < left)


def check_processes(name: str, properties: Sequence[str], weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Make sure that every process is here, and trains the same layers, before anything is averaged.

    Without it processes would wait for each other forever, or average layers that have nothing to do with one another.

    Args:
        name: of the optimizer.
        properties: what must be the same on all processes, each in words that follow "has".
        weights: to be compared too, by name.
        device: of the collectives.

    Raises:
        RuntimeError: on every process that is here.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(properties).encode()).digest()[:7], "big")
    announce(str(digest))
    # A process that has run out of batches under `Join` is in a sum of this shape, to which it gives a zero.
    present = torch.ones(1, device=device)
    try:
        dist.all_reduce(present)
        is_complete = int(present) == dist.get_world_size()
    except RuntimeError as error:
        if absent := find_absent(str(digest), _ABSENT_AFTER):
            raise LostProcessError(f"{name}: {_listed(absent)} did not come to this curvature step: {error}") from error
        raise
    if not is_complete:
        raise RuntimeError(JOIN_BOTH.format(name=name))
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes.sum()) != 0:
        raise RuntimeError(f"{name} {_ONE_MODEL}, but {_describe_difference(properties)}; {_NO_SHARDS}")
    if weights and (differing := _find_different(weights, device)):
        others = f" and of {len(differing) - 1} more" if len(differing) > 1 else ""
        raise RuntimeError(f"{name} {_ONE_MODEL}, but the values of {differing[0]}{others} differ; {_NO_SHARDS}")


class LostProcessError(RuntimeError):
    """A process is gone; the message says which."""


@contextmanager
def name_lost_processes(name: str) -> Iterator[None]:
    """Have an error of a collective say which processes have not been heard from since.

    Every process that gets such an error says so to the others. Of more than three one may not have got it yet, as it
    waits for another than the one that is gone.

    Args:
        name: of the optimizer.

    Yields:
        Nothing.

    Raises:
        LostProcessError: a collective failed, and not on every process.
    """
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        announce(_LOST)
        if absent := find_absent(_LOST, _ABSENT_AFTER):
            ended = f"{_listed(absent)} ended within this curvature step, or waits for one that did"
            raise LostProcessError(f"{name}: {ended}: {error}") from error
        raise


_LOST = "lost another"


def _listed(ranks: Sequence[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"


_ABSENT_AFTER = 2.0
"""Seconds that a process which has lost another gives the others to come to the same step."""


def _describe_difference(properties: Sequence[str]) -> str:
    """What process 0 and the first that differs from it have, each of them alone."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, list(properties))
    rank = next(rank for rank, theirs in enumerate(every) if theirs != every[0])
    alone = {0: _without(every[0], every[rank]), rank: _without(every[rank], every[0])}
    parts = [f"process {number} alone has {', '.join(only[:4])}" for number, only in alone.items() if only]
    return " and ".join(parts) or f"processes 0 and {rank} have its layers in different orders"


def _without(these: Sequence[str], those: Sequence[str]) -> list[str]:
    return [each for each in these if each not in set(those)]


def _find_different(weights: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Names of the weights of which some elements differ by more than half of what they are."""
    values = torch.stack([_elements(weight).to(device) for weight in weights.values()])
    extremes = torch.stack([values, -values])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0], -extremes[1]
    size = torch.maximum(largest.abs(), smallest.abs()).amax(1)
    differs: list[bool] = ((largest - smallest).amax(1) > size / 2).tolist()
    return [name for name, different in zip(weights, differs, strict=True) if different]


def _elements(weight: Tensor) -> Tensor:
    """Sixteen elements of a weight, in float32."""
    positions = torch.arange(16, device=weight.device) * (weight.numel() - 1) // 15
    return weight.detach().take(positions).float()


_ONE_MODEL = (
    "averages curvature over all processes of the default process group, which must train one model with the same "
    "settings"
)


_NO_SHARDS = (
    "wrap the model in torch.nn.parallel.DistributedDataParallel. Optimizers that give every process parameters of its "
    "own, as ZeroRedundancyOptimizer does, are not supported"
)


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all processes. Synchronizes.

    Args:
        values: of this process.
        device: of the collectives.

    Returns:
        As many values.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    every: list[float] = tensor.tolist()
    return every


def pack_triangles(matrices: Tensor) -> Tensor:
    """The lower triangles of (blocks, p, p) symmetric matrices as one vector."""
    rows, columns = _triangle(matrices.shape[-1], matrices.device)
    return matrices[:, rows, columns].flatten()


def unpack_triangles(triangles: Tensor, shape: Sequence[int]) -> Tensor:
    """The symmetric matrices, of ``shape``, that `pack_triangles` was given."""
    blocks, size, _ = shape
    rows, columns = _triangle(size, triangles.device)
    matrices = triangles.new_empty(*shape)
    entries = triangles.view(blocks, -1)
    matrices[:, rows, columns] = entries
    matrices[:, columns, rows] = entries
    return matrices


def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows, columns


def sum_over_processes(rows: Sequence[Sequence[float]], device: torch.device) -> list[list[float]]:
    """Sum numbers over all processes. Synchronizes.

    Args:
        rows: of this process, all of one length.
        device: of the collectives.

    Returns:
        The sums, in the same rows.
    """
    tensor = torch.tensor(rows, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    sums: list[list[float]] = tensor.tolist()
    return sums


@dataclass(eq=False)
class Share:
    """What this process brings to the average of a layer's matrices.

    Attributes:
        moments: a tensor a stack of blocks; zeros where this process has no samples. Emptied where it is not wanted.
        weight: samples that they were made from.
        total: the samples of all processes together.
        wanted: whether this process needs the average.
    """

    moments: list[Tensor]
    weight: float
    total: float
    wanted: bool = True

    @property
    def triangles(self) -> int:
        """Elements of all triangles."""
        return sum(map(_count_triangles, self.moments))


def average_(shares: Sequence[Share], tuning: Tuning = DEFAULT) -> list[bool]:
    """Average matrices over processes in place, each process's weighted by its number of samples. Synchronizes.

    Args:
        shares: of each layer, the same layers on every process.
        tuning: how many elements are averaged at a time.

    Returns:
        Whether each layer's average is finite.
    """
    flags = [flag for together in _bucket(shares, tuning.averaged_elements) for flag in _average_bucket_(together)]
    return torch.stack(flags).tolist() if flags else []


def _bucket(shares: Sequence[Share], most: int) -> Iterator[list[Share]]:
    """Cut into lists of so many elements at most, or of a single layer."""
    together: list[Share] = []
    for share in shares:
        if together and sum(each.triangles for each in (*together, share)) > most:
            yield together
            together = []
        together.append(share)
    if together:
        yield together


def _average_bucket_(shares: Sequence[Share]) -> list[Tensor]:
    flat = torch.cat([pack_triangles(stack) * share.weight for share in shares for stack in share.moments])
    dist.all_reduce(flat)
    flags = []
    for share, triangles in zip(shares, torch.split(flat, [each.triangles for each in shares]), strict=True):
        triangles /= share.total
        flags.append(triangles.isfinite().all())
        if not share.wanted:
            share.moments.clear()
        parts = torch.split(triangles, [_count_triangles(stack) for stack in share.moments]) if share.wanted else ()
        for stack, part in zip(share.moments, parts, strict=True):
            stack.copy_(unpack_triangles(part, stack.shape))
    return flags


def _count_triangles(stack: Tensor) -> int:
    blocks, size, _ = stack.shape
    return blocks * size * (size + 1) // 2


def invert_shared(requests: Sequence[InverseRequest], tuning: Tuning = DEFAULT) -> None:
    """`invert` with the work divided among the processes by operation count; each ends with all inverses.

    Args:
        requests: the same on every process; changed in place.
        tuning: how often a damping is raised.
    """
    rank = dist.get_rank()
    owners = _assign(requests, dist.get_world_size())
    mine = [request for request, owner in zip(requests, owners, strict=True) if owner == rank]
    invert(mine, tuning)
    flat = torch.cat([_pack_result(request, owner == rank) for request, owner in zip(requests, owners, strict=True)])
    dist.all_reduce(flat)
    start = 0
    for request in requests:
        blocks, size, _ = request.matrices.shape
        length = blocks * size * (size + 1) // 2
        request.used_damping = float(flat[start])
        triangles = flat[start + 1 : start + 1 + length].to(request.matrices.dtype)
        request.inverse = unpack_triangles(triangles, (blocks, size, size)) if request.used_damping else None
        start += 1 + length


def find_shared_bases(requests: Sequence[BasisRequest]) -> None:
    """`find_bases` with the work divided among the processes as `invert_shared` does; each ends with all bases.

    Args:
        requests: the same on every process; changed in place.
    """
    rank = dist.get_rank()
    owners = _assign(requests, dist.get_world_size())
    find_bases([request for request, owner in zip(requests, owners, strict=True) if owner == rank])
    flat = torch.cat([_pack_basis(request, owner == rank) for request, owner in zip(requests, owners, strict=True)])
    dist.all_reduce(flat)
    sizes = [1 + request.matrices.numel() for request in requests]
    for request, part in zip(requests, torch.split(flat, sizes), strict=True):
        basis = part[1:].view_as(request.matrices).to(request.matrices.dtype)
        request.basis = basis if float(part[0]) else None


def _pack_basis(request: BasisRequest, mine: bool) -> Tensor:
    """Whether there is a basis, and its entries in float64; zeros where another process has it."""
    if not mine or request.basis is None:
        return request.matrices.new_zeros(1 + request.matrices.numel(), dtype=torch.float64)
    return torch.cat([request.basis.new_ones(1), request.basis.flatten()]).double()


def _assign(requests: Sequence[InverseRequest | BasisRequest], processes: int) -> list[int]:
    """A process for each request, the largest first to the process with the least work."""
    load = [0] * processes
    owners = [0] * len(requests)
    costs = [r.matrices.shape[0] * r.matrices.shape[1] ** 3 for r in requests]
    for place in sorted(range(len(requests)), key=lambda i: -costs[i]):
        owners[place] = load.index(min(load))
        load[owners[place]] += costs[place]
    return owners


def _pack_result(request: InverseRequest, mine: bool) -> Tensor:
    """λ that was used (0 for a failure) and the inverse's triangles in float64; zeros where another process has it."""
    blocks, size, _ = request.matrices.shape
    if not mine or request.inverse is None:
        length = 1 + blocks * size * (size + 1) // 2
        return request.matrices.new_zeros(length, dtype=torch.float64)
    used = request.matrices.new_tensor([request.used_damping], dtype=torch.float64)
    return torch.cat([used, pack_triangles(request.inverse).double()])


__all__ = [
    "LostProcessError",
    "Share",
    "average_",
    "check_processes",
    "find_shared_bases",
    "invert_shared",
    "largest",
    "name_lost_processes",
    "own_share",
    "pack_triangles",
    "sum_over_processes",
    "unpack_triangles",
    "world_size",
]
