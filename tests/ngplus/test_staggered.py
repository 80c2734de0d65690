"""Curvature steps that each layer has in its own turn."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.config import Options
from tests.ngplus.cases import points


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def train(model, optimizer, steps, start=0):
    """Yield after each step."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(points(9, 5, seed=step)).square().sum(1).mean().backward()
        optimizer.step()
        yield step


@pytest.mark.parametrize("extra", [{}, {"basis": "eigen", "base": torch.optim.Adam}, {"curvature": "mini_batch"}])
def test_each_layer_has_the_curvature_of_the_batches_of_its_own_turn(extra):
    """With lr = 0 the gradients are those of an optimizer that builds all curvature on every step."""
    ours, every = make_model(), make_model()
    staggered = NGPlus(ours, lr=0.0, damping=0.1, update_every=4, staggered=True, **extra)
    reference = NGPlus(every, lr=0.0, damping=0.1, update_every=1, **extra)
    due = {name: [] for name, weight in ours.named_parameters() if weight.dim() == 2}
    for step, _ in zip(train(ours, staggered, 11), train(every, reference, 11), strict=True):
        for layer, state in staggered._curvature.states.items():
            of_step = reference.curvature[layer.name]
            if state.updates > len(due[layer.name]):
                due[layer.name].append(step)
                if not extra.get("basis"):  # a later basis follows from the one before
                    theirs, found = of_step.preconditioner.tensors(), state.preconditioner.tensors()
                    assert found.keys() == theirs.keys()
                    assert all(torch.equal(found[key], theirs[key]) for key in found)
    assert sorted(due.values()) == [[0, 1, 5, 9], [0, 2, 6, 10], [0, 4, 8]]


def test_a_resumed_run_goes_on_with_the_same_turns():
    settings = {"lr": 0.1, "damping": 0.1, "update_every": 3, "staggered": True}
    whole, first, second = make_model(), make_model(), make_model()
    list(train(whole, NGPlus(whole, **settings), 9))
    before = NGPlus(first, **settings)
    list(train(first, before, 4))
    second.load_state_dict(first.state_dict())
    after = NGPlus(second, **settings)
    after.load_state_dict(before.state_dict())
    list(train(second, after, 5, start=4))
    assert all(map(torch.equal, second.state_dict().values(), whole.state_dict().values()))


def test_with_growth_turns_begin_after_the_last_early_step():
    options = Options(update_every=4, update_growth=0.5, staggered=True)  # early: 0, 1, 2, 3, 5, 8
    due = [[step for step in range(18) if options.is_due(step, turn)] for turn in range(4)]
    early = [0, 1, 2, 3, 5, 8]
    assert due == [[*early, 12, 16], [*early, 9, 13, 17], [*early, 10, 14], [*early, 11, 15]]


@pytest.mark.parametrize("update_every", [1, 3, 10])
def test_turns_share_the_costs(update_every):
    costs = [7, 1, 1, 5, 3, 3, 9, 2, 2, 2, 4, 8]
    turns = Options(update_every=update_every, staggered=True).find_turns(costs)
    loads = [sum(c for c, t in zip(costs, turns, strict=True) if t == turn) for turn in range(update_every)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= max(sum(costs) / update_every + max(costs) / 2, max(costs))
    assert Options(update_every=update_every).find_turns(costs) == [0] * len(costs)


def test_staggered_is_true_or_false():
    with pytest.raises(TypeError, match="staggered must be True or False, got 'yes'"):
        NGPlus(make_model(), staggered="yes")
