"""What a single process keeps of a layer, saved and loaded by all of them: each has some rows of every block."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ngplus.sharded.sharding import Sharding, chunk


def scatter_stack(sharding: Sharding, keeper: int, stack: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """Shard a stack of blocks that one process has by rows. Every process must call this.

    Args:
        sharding: of the layer that it belongs to.
        keeper: the rank of the process that has it.
        stack: there (blocks, p, p); None on the others.
        like: of its shape and dtype, without memory.
        device: of the shards.

    Returns:
        A `DTensor`, of which each process has (blocks, p / W, p).
    """
    blocks, _, width = like.shape
    rows = chunk(like.shape[1], sharding.size)
    sizes = [blocks * (stop - start) * width for start, stop in rows]
    own = rows[sharding.rank]
    received = torch.empty(sizes[sharding.rank], dtype=like.dtype, device=device)
    sent, sent_sizes = received.new_empty(0), [0] * sharding.size
    if stack is not None:
        sent, sent_sizes = torch.cat([stack[:, start:stop].flatten() for start, stop in rows]), sizes
    received_sizes = [sizes[sharding.rank] if rank == keeper else 0 for rank in range(sharding.size)]
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=sharding.group)
    return _as_sharded(sharding, received.view(blocks, own[1] - own[0], width), like)


def zero_stack(sharding: Sharding, like: Tensor, device: torch.device) -> Tensor:
    """What `scatter_stack` gives of zeros, without communication.

    Args:
        sharding: of the layer that it belongs to.
        like: of its shape and dtype, without memory.
        device: of the shards.

    Returns:
        A `DTensor`.
    """
    blocks, height, width = like.shape
    start, stop = chunk(height, sharding.size)[sharding.rank]
    return _as_sharded(sharding, torch.zeros(blocks, stop - start, width, dtype=like.dtype, device=device), like)


def _as_sharded(sharding: Sharding, local: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate()] * (sharding.mesh.ndim - 1) + [Shard(1)]
    return DTensor.from_local(local, sharding.mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


__all__ = ["scatter_stack", "zero_stack"]
