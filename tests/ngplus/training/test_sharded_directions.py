"""Directions of shards, of layers of random shapes, are those of whole gradients; who has and multiplies what."""

import random

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.layers import find_layers
from ngplus.sharded.directions import ShardedDirections
from ngplus.sharded.remote_inverse import RemoteInverse
from ngplus.sharded.sharding import Sharding
from ngplus.solvers.dense import DenseInverse
from tests.ngplus.cases import seed_cpu

pytestmark = pytest.mark.slow  # starting the processes is

LAYERS = 80


class Batch(nn.Module):
    """A bare parameter: a matrix, a batch of them, or one with a dimension of one in front."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


def random_module(chosen):
    """A module with up to 13 rows, some of which four processes cannot share evenly."""
    bias = chosen.random() < 0.6
    if chosen.random() < 0.3:
        first = chosen.choice([(), (1,), (chosen.randint(2, 9),)])
        return Batch(*first, chosen.randint(2, 9), chosen.randint(2, 9))
    if chosen.random() < 0.5:
        return nn.Linear(chosen.randint(1, 13), chosen.randint(1, 13), bias=bias)
    groups = chosen.randint(1, 4)
    inputs, outputs = (groups * chosen.randint(1, 4) for _ in range(2))
    return nn.Conv1d(inputs, outputs, chosen.randint(1, 3), groups=groups, bias=bias)


def shard_randomly(module, chosen):
    second = module.weight.shape[1] % 4 == 0 and chosen.random() < 0.9
    second = second and not (isinstance(module, Batch) and module.weight.dim() > 2)
    fully_shard(module, shard_placement_fn=lambda p: Shard(1) if second and p.dim() > 1 else None)


def expected_directions(shape, stacks, weight, bias):
    """Every group's (λI + L)⁻¹G or G(λI + R)⁻¹, the bias as the last column."""
    G = weight.reshape(shape.groups, shape.rows, -1)
    if bias is not None:
        G = torch.cat([G, bias.reshape(shape.groups, shape.rows, 1)], dim=2)
    [inverse] = stacks
    D = inverse @ G if shape.side == "left" else G @ inverse
    columns = weight.numel() // (shape.groups * shape.rows)
    return D[:, :, :columns].reshape(weight.shape), None if bias is None else D[:, :, -1].reshape(bias.shape)


def check_random_layers(inverses):
    """The kinds of layers that came up, by who keeps the inverse and along which dimension the weight is sharded."""
    chosen, kinds = random.Random(inverses), set()
    for _ in range(LAYERS):
        seed_cpu(chosen.randrange(1000))
        module = random_module(chosen).double()
        whole = {name: torch.randn_like(p) for name, p in module.named_parameters()}
        shard_randomly(module, chosen)
        [layer] = find_layers(module, every_matrix=True)
        for name, parameter in module.named_parameters():
            parameter.grad = distribute_tensor(whole[name], parameter.device_mesh, parameter.placements)
        sharding, shape = Sharding(module.weight.device_mesh, inverses), layer.shape(None)
        stacks = [torch.randn(size).double() for size in shape.stack_shapes]
        elsewhere = sharding.is_elsewhere(layer)
        kept = RemoteInverse.like(layer.weight) if elsewhere else DenseInverse(stacks, shape)
        ShardedDirections(sharding).precondition_([PreconditionedLayer(layer, kept, shape)])
        expected = expected_directions(shape, stacks, whole["weight"], whole.get("bias"))
        for parameter, direction in zip(module.parameters(), expected, strict=False):
            torch.testing.assert_close(parameter.grad.full_tensor(), direction)
        assert_parts_are_the_whole(sharding, layer, shape)
        own = sharding.multiplies_own_rows(layer, shape)
        kinds.add((shape.side, layer.weight.placements[0].dim, sharding.keeper(layer) is None, own, shape.groups > 1))
    return kinds


def assert_parts_are_the_whole(sharding, layer, shape):
    """The processes have every entry once, and of what is exchanged they multiply every column once."""
    entries = torch.zeros(shape.groups * shape.rows, shape.columns)
    for blocks in sharding.sources(layer):
        for block in blocks:
            if block.numel:
                entries[slice(*block.rows), slice(*block.columns)] += 1
    assert (entries == 1).all()
    if sharding.keeper(layer) is not None or not sharding.multiplies_own_rows(layer, shape):
        columns = torch.zeros(shape.columns)
        for start, stop in sharding.targets(layer, shape):
            columns[start:stop] += 1
        assert (columns == 1).all()


@pytest.mark.parametrize("inverses", ["auto", "replicated", "sharded"])
def test_directions_of_layers_of_random_shapes_are_those_of_whole_gradients(team_of_four, inverses):
    kinds = team_of_four.run(check_random_layers, inverses)
    assert all(each == kinds[0] for each in kinds)
    sides, dims, everywhere, own, groups = map(set, zip(*kinds[0], strict=True))
    assert sides == {"left", "right"}
    assert dims == {0, 1}
    assert own == groups == {True, False}
    assert everywhere == ({False} if inverses == "sharded" else {True, False})
