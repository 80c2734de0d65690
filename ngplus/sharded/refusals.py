"""Which ways of distributing parameters over processes are supported."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ngplus.curvature.all_reduce import world_size
from ngplus.dtensors import is_sharded

_SUPPORTED = "NG+ supports DistributedDataParallel, and fully_shard over all processes, in one or two mesh dimensions"


def check_sharding(model: nn.Module | None, named: Sequence[tuple[str, Tensor]], owner: str) -> None:
    """Refuse parameters that are distributed otherwise than by `fully_shard` over all processes.

    Args:
        model: of the optimizer, if there is one.
        named: its parameters by name.
        owner: the optimizer's class, for errors.

    Raises:
        TypeError: where a parameter is.
    """
    sharded = [(name, parameter) for name, parameter in named if is_sharded(parameter)]
    if not sharded:
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard

    if model is None:
        raise TypeError(f"{sharded[0][0]} is a DTensor: {owner} takes the parameters of a sharded model with the model")
    managed = {id(p) for module in model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
    first = sharded[0][1].device_mesh
    for name, parameter in sharded:
        mesh, placements = parameter.device_mesh, parameter.placements
        if id(parameter) not in managed:
            raise TypeError(
                f"{name} is a DTensor that no fully_shard has made, placed {placements}: tensor parallelism is not "
                f"supported. {_SUPPORTED}"
            )
        *others, last = placements
        if type(last) is not Shard or len(others) > 1 or not all(isinstance(each, Replicate) for each in others):
            raise TypeError(
                f"{name} is placed {placements} on the mesh dimensions {mesh.mesh_dim_names}: tensor parallelism, and "
                f"whatever else shards a weight besides fully_shard, is not supported. {_SUPPORTED}"
            )
        if last.dim > 1:
            raise TypeError(
                f"{name} is sharded along its dimension {last.dim}: NG+ takes weights that are sharded along dimension "
                "0, as fully_shard does by itself, or 1, as ngplus.sharded.placement does"
            )
        if mesh.size() != world_size():
            raise TypeError(
                f"{name} is sharded over {mesh.size()} of the {world_size()} processes, in mesh dimensions "
                f"{mesh.mesh_dim_names}, and what the others have is not known: curvature is averaged over all. "
                f"{_SUPPORTED}"
            )
        if mesh.device_type != parameter.device.type:
            raise TypeError(
                f"{name} is kept on {parameter.device.type} and used on {mesh.device_type}: a CPUOffloadPolicy is not "
                "supported"
            )
        if mesh != first:
            raise TypeError(f"{name} is sharded over another mesh than {sharded[0][0]}: {mesh} and {first}")


__all__ = ["check_sharding"]
