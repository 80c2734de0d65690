"""Parameters that were replaced in the model after the optimizer was made are named, on the next step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ngplus import NGPlus
from tests.ngplus.cases import recorded_warnings, seed_cpu


def three_layers() -> nn.Sequential:
    seed_cpu(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 2))


def step(model: nn.Module, optimizer: NGPlus) -> list[str]:
    """One step on a random batch; what it warned of."""
    with recorded_warnings() as caught:
        model(torch.randn(7, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return caught


def new_layer(model):
    model[2] = nn.Linear(6, 5)


def new_structure(model):
    model[2] = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5))


def new_weight(model):
    model[2].weight = nn.Parameter(torch.ones(5, 6))


def new_norm(model):
    model[1] = nn.LayerNorm(6)


def new_parametrization(model):
    nn.utils.parametrizations.weight_norm(model[2])


def loaded_in_place_of_the_old(model):
    model[2].load_state_dict({"weight": torch.ones(5, 6), "bias": torch.ones(5)}, assign=True)


PARTS = {
    new_layer: ("2.weight, 2.bias", "2.weight, 2.bias"),
    new_structure: ("2.weight, 2.bias", "2.0.weight, 2.0.bias, 2.1.weight, 2.1.bias"),
    new_weight: ("2.weight", "2.weight"),
    new_norm: ("1.weight, 1.bias", "1.weight, 1.bias"),
    new_parametrization: ("2.weight", "2.parametrizations.weight.original0, 2.parametrizations.weight.original1"),
    loaded_in_place_of_the_old: ("2.weight, 2.bias", "2.weight, 2.bias"),
}


@pytest.mark.parametrize("options", [{}, {"curvature": "mini_batch"}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("replace", PARTS)
def test_a_replaced_part_is_named_once_with_what_is_not_trained(replace, steps, options):
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, update_every=10, **options)
    for _ in range(steps):
        assert step(model, optimizer) == []
    replace(model)
    old, new = PARTS[replace]
    expected = (
        f"{old} {'were' if ',' in old else 'was'} replaced in the model after the optimizer was made, and nothing here "
        f"trains {new}: "
        "make the optimizer again, or give the new parameters to its add_param_group"
    )
    if replace is new_norm:  # which is no layer: on the next curvature step
        while not optimizer.curvature_is_due:
            assert step(model, optimizer) == []
    assert [warning for warning in step(model, optimizer) if "replaced" in warning] == [expected]
    for _ in range(10):
        assert not [warning for warning in step(model, optimizer) if "replaced" in warning]


def test_new_parameters_that_were_given_to_the_optimizer_train():
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, update_every=2)
    new_layer(model)
    optimizer.add_param_group({"params": model[2].parameters()})
    before = model[2].weight.clone()
    assert step(model, optimizer) == []
    assert not torch.equal(model[2].weight, before)
    for _ in range(2):
        assert step(model, optimizer) == []
    assert "2.weight" in optimizer.curvature


def frozen(model):
    model[2] = nn.Linear(6, 5).requires_grad_(False)


def left_out(model):
    model[2] = nn.Identity()
    model[3] = nn.Linear(6, 2).requires_grad_(False)


def added(model):
    model.append(nn.Linear(2, 2))


def same_weight_elsewhere(model):
    model[2] = copy.copy(model[2])


def moved(model):
    model.to(torch.float32)
    model.to("cpu", memory_format=torch.channels_last)


def pruned(model):
    prune.random_unstructured(model[2], "weight", 0.5)


@pytest.mark.parametrize("change", [frozen, left_out, added, same_weight_elsewhere, moved, pruned])
def test_what_leaves_nothing_untrained_in_place_of_something_trained_warns_of_nothing(change):
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, update_every=10)
    step(model, optimizer)
    change(model)
    assert not [warning for warning in step(model, optimizer) if "replaced" in warning]


def test_a_part_that_another_optimizer_trains_may_be_replaced():
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, params=[*model[0].parameters(), *model[3].parameters()])
    new_layer(model)
    assert step(model, optimizer) == []


def all_assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def emptied(model):
    model.to("meta")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("options", [{}, {"curvature": "mini_batch"}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("replace", [all_assigned, emptied])
def test_a_step_that_would_train_nothing_is_refused_every_time(replace, steps, options):
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, update_every=10, **options)
    for _ in range(steps):
        step(model, optimizer)
    replace(model)
    kept = optimizer.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"none of .* is the model's any more: 0\.weight, .* and 4 more were"):
            step(model, optimizer)
    assert optimizer.state_dict()["param_groups"][0]["ngplus"]["steps"] == kept["param_groups"][0]["ngplus"]["steps"]
    model.zero_grad()  # of the steps that were refused
    fresh = NGPlus(model, lr=0.1, update_every=10, **options)
    assert step(model, fresh) == []


def test_a_copied_and_a_loaded_optimizer_know_their_model():
    model = three_layers()
    optimizer = NGPlus(model, lr=0.1, update_every=10)
    step(model, optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert step(twin_model, twin) == []
    optimizer.load_state_dict(twin.state_dict())
    assert step(model, optimizer) == []
    new_layer(twin_model)
    assert "2.weight, 2.bias were replaced" in step(twin_model, twin)[0]
    assert step(model, optimizer) == []
