"""The costs of sharded models on paper are those that are counted at two and four processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.theory import sharded_costs
from experiments.theory.sharded_costs import Matrix, adamw, fully_sharded, keepers, muon, ngplus, shampoo, transformer
from ngplus import NGPlus
from tests.ngplus.training.processes import Team

# The table and the head are high enough that every process keeps their inverses; the others' are on one each.
MODEL = [*transformer(layers=1, width=160, hidden=432, vocabulary=2600), Matrix(name="biased", m=200, n=136, bias=True)]


@pytest.fixture(scope="module", params=[2, 4])
def team(request):
    team = Team(request.param)
    yield team
    team.close()


class SentBytes(TorchDispatchMode):
    """Counts what this process sends in the collectives inside the block; an all-reduce is a ring's."""

    def __init__(self):
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, others = func.name(), dist.get_world_size() - 1
        if name.startswith("c10d::"):
            tensor = args[1] if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_") else args[0]
            if name == "c10d::alltoall_base_":
                tensor = args[1]
            tensor = tensor[0] if isinstance(tensor, list | tuple) else tensor
            factor = {
                "c10d::_allgather_base_": others,
                "c10d::_reduce_scatter_base_": others / (others + 1),
                "c10d::allreduce_": 2 * others / (others + 1),
                "c10d::alltoall_base_": 1,
            }[name]
            self.sent += tensor.nbytes * factor
        return func(*args, **(kwargs or {}))


class Products(nn.Module):
    """A layer of each matrix, all on one input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(each.n, each.m, bias=each.bias) for each in MODEL)

    def forward(self, x):
        return sum(layer(x[:, : layer.in_features]).square().mean() for layer in self.layers)


def count(base):
    """Bytes that this process sends in the passes and in a step, and elements that its optimizer keeps."""
    torch.manual_seed(0)
    model = Products()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    if base == "ngplus":
        optimizer = NGPlus(model, lr=0.01, damping=0.3, update_every=3, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters())
    found = {}
    for step in range(2):
        with SentBytes() as passes:
            model(torch.randn(4, 432)).backward()
        with SentBytes() as update:
            optimizer.step()
        optimizer.zero_grad()
        found[step] = passes.sent, update.sent
    state = optimizer.base.state if base == "ngplus" else optimizer.state
    tensors = [each for of_one in state.values() for each in of_one.values() if torch.is_tensor(each) and each.dim()]
    kept = sum(each.to_local().numel() for each in tensors)
    if base == "ngplus":
        kept += sum(each.numel() for each in optimizer.curvature.values())
    return {"passes": found[1][0], "update": found[0][1], "step": found[1][1], "kept": 4 * kept}


@pytest.mark.slow
def test_ngplus_sends_and_keeps_what_is_counted(team):
    counted = team.run(count, "ngplus")
    world = len(counted)
    expected = ngplus(MODEL, world)
    check = 2 * 4 * (world - 1) / world  # the scalar by which all processes agree that all is finite
    steps = [each["step"] - check for each in counted]
    assert max(steps) == pytest.approx(expected.sent, abs=1e-6)
    assert sum(steps) / world == pytest.approx(expected.sent_mean, abs=1e-6)
    assert max(each["kept"] for each in counted) == expected.kept
    passes = fully_sharded(MODEL, world)["fully_shard_sent"]
    # Here the weights are gathered in float32 too, not in bfloat16.
    assert [each["passes"] for each in counted] == [pytest.approx(passes * 1.5)] * world
    # The processes also agree on numbers of steps, of samples and on dampings.
    updates = [each["update"] - each["step"] - expected.update_sent for each in counted]
    assert all(0 < update < 1000 for update in updates), updates


@pytest.mark.slow
def test_adamw_sends_nothing_and_keeps_two_moments(team):
    counted = team.run(count, "adamw")
    expected = adamw(MODEL, len(counted))
    assert [each["step"] for each in counted] == [0] * len(counted) == [expected.sent] * len(counted)
    assert max(each["kept"] for each in counted) == expected.kept


def test_the_model_has_seven_billion_parameters():
    assert sum(matrix.elements for matrix in transformer()) == 6_738_149_376


def test_inverses_are_spread_evenly_and_high_matrices_have_theirs_everywhere():
    ranks = keepers(transformer(), 8)
    assert sorted(map(ranks.count, range(8))) == [28, 28, 28, 28, 28, 28, 29, 29]
    assert keepers([Matrix(name="high", m=64000, n=4000), Matrix(name="low", m=63999, n=4000)], 2) == [None, 0]


def test_the_others_are_the_sums_of_their_descriptions():
    one = [Matrix(name="one", m=2048, n=1024)]
    assert muon(one, 4).sent == 2 * 3 * 2048 * 1024 / 4
    assert muon(one, 4).kept == 4 * 2048 * 1024 / 4
    # Two blocks with a factor and a root for each side, the grafting's sum of squares, and the weight itself.
    assert shampoo(one, 4).kept == 4 * (2 * 2 * 2 * 1024**2 + 2 * 2048 * 1024)
    assert shampoo(one, 4).sent == 4 * (3 / 4 + 3 / 4) * 2048 * 1024


def test_memory_falls_with_the_number_of_processes():
    table = sharded_costs.rows(transformer(), (8, 64, 512))
    kept = [row["kept"] for row in table if row["optimizer"] == "NG+"]
    assert math.prod(kept) > 0
    assert kept[0] > 7 * kept[1] > 35 * kept[2]
