"""Sharding small models by `fully_shard`, training them, and counting what their steps communicate."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ngplus import NGPlus
from ngplus.dtensors import reshard
from ngplus.sharded import placement
from tests.ngplus.training.problems import SETTINGS, Problem


def own_samples(problem: Problem) -> slice:
    """This process's samples, as many as every other's."""
    count = len(problem.inputs) // dist.get_world_size()
    return slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)


def shard(model: nn.Module, *, replicas: int = 1, placed: bool = False, **options: Any) -> nn.Module:
    """Shard a model in place: each child that has parameters, and the model itself.

    Args:
        model: the model.
        replicas: of the model; more than one is a mesh of two dimensions.
        placed: whether its left layers are sharded by columns.
        **options: of `fully_shard`.
    """
    world = dist.get_world_size()
    if replicas > 1:
        shape = replicas, world // replicas
        options["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if placed:
        options["shard_placement_fn"] = placement(model, world // replicas)
    for child in find_units(model):
        fully_shard(child, **options)
    return fully_shard(model, **options)


def find_units(model: nn.Module) -> list[nn.Module]:
    """What is sharded apart from the rest: the modules of the lists in a model, or its children if it has none.

    Modules that share a weight stay with the rest, since `fully_shard` takes it in one part alone.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    modules = [each for one in lists for each in one] or list(model.children())
    uses = Counter(id(parameter) for module in modules for parameter in module.parameters())
    return [m for m in modules if (own := list(m.parameters())) and all(uses[id(parameter)] == 1 for parameter in own)]


def whole_parameters(model: nn.Module) -> Tensor:
    """All parameters of a sharded model as one vector, the same on every process."""
    reshard(model)
    return torch.cat([parameter.full_tensor().flatten() for parameter in model.parameters()]).detach()


def distance(parameters: Tensor, model: nn.Module) -> float:
    """Relative distance of `whole_parameters` to a model's."""
    theirs = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return float((parameters - theirs).norm() / theirs.norm())


def train_sharded(make: Any, settings: dict, wrapping: dict, steps: int = 4) -> dict:
    """Parameters after some steps of several processes on the joint batch, and the optimizer's skipped steps."""
    problem = make()
    shard(problem.model, **wrapping)
    optimizer = NGPlus(problem.model, **{**SETTINGS, **settings})
    problem.train(optimizer, steps, samples=own_samples(problem))
    return {"parameters": whole_parameters(problem.model), "curvature": set(optimizer.curvature)}


@dataclass
class Communication:
    """What one process sends.

    Attributes:
        calls: the names of the collectives, in order.
        sent: elements that go to other processes, of all-to-alls.
        reduced: elements of all-reduces.
    """

    calls: list[str] = field(default_factory=list)
    sent: int = 0
    reduced: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Communication]:
    """Count the collectives inside the block."""
    found = Communication()
    names = ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "broadcast", "barrier")
    before = {name: getattr(dist, name) for name in names}

    def replace(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.calls.append(name)
            if name == "all_to_all_single":
                found.sent += args[1].numel()
            elif name == "all_reduce":
                found.reduced += args[0].numel()
            return before[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, replace(name))
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
