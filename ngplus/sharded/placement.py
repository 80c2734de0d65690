"""How to shard a model so that the fewest elements of its gradients have to move before they are multiplied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from ngplus.dtensors import is_sharded
from ngplus.layers import find_layers

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def placement(model: nn.Module, shards: int | None = None) -> Callable[[nn.Parameter], Shard | None]:
    """Make the ``shard_placement_fn`` of `fully_shard` by which each weight is sharded along its longer side.

    A matrix that is not higher than wide, m ≤ n, is multiplied from the left, (λI + L)⁻¹G, which mixes its rows:
    sharded by columns, each process has all that its part of the direction needs, and only a bias has to move. One
    that is higher than wide is multiplied from the right and stays sharded by rows, as `fully_shard` does by itself.
    So does one whose second dimension is not a multiple of the number of shards, which torch does not shard.

    Args:
        model: before any part of it is sharded.
        shards: processes that a weight is sharded over: the size of the mesh, of its second dimension where it has
            two. By default all processes.

    Returns:
        What `fully_shard` takes as ``shard_placement_fn``, for the model and for each of its parts.

    Raises:
        TypeError: where ``shards`` is no integer.
        ValueError: where ``shards`` is not positive, or a part of the model is sharded already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
        >>> place = placement(model, shards=2)
        >>> place(model[0].weight), place(model[1].weight), place(model[0].bias)
        (Shard(dim=1), None, None)
    """
    from torch.distributed.tensor import Shard

    if shards is None:
        shards = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if isinstance(shards, bool) or not isinstance(shards, int):
        raise TypeError(f"shards must be an integer ≥ 1 or None, got {shards!r}")
    if shards < 1:
        raise ValueError(f"shards must be an integer ≥ 1 or None, got {shards!r}")
    layers = find_layers(model)
    if sharded := [layer.name for layer in layers if is_sharded(layer.weight)]:
        raise ValueError(f"{sharded[0]} is sharded already: call placement before the first fully_shard")
    # Weakly: fully_shard replaces the parameters, whose memory is free then.
    wide = {
        id(layer.weight): weakref.ref(layer.weight)
        for layer in layers
        if layer.shape(None).side == "left" and layer.weight.shape[1] % shards == 0
    }

    def place(parameter: nn.Parameter) -> Shard | None:
        known = wide.get(id(parameter))
        return Shard(1) if known is not None and known() is parameter else None

    return place


__all__ = ["placement"]
