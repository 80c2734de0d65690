"""Saving, loading and copying: at any step, in another process, and of what does not fit."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import oracle
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG

SETTINGS = {
    "sgd": {"base": SGD, "momentum": 0.9, "weight_decay": 0.01},
    "ema": {"base": SGD, "ema": 0.7, "block_size": 4},
    "adam": {"base": Adam},
    "low rank": {"base": SGD, "solver": "low_rank", "max_samples": 2},
    "sketched": {"base": SGD, "solver": "sketched", "sketch_size": 2},
    "sketched columns": {"base": SGD, "solver": "sketched", "sketch_size": 2, "curvature": "mini_batch"},
}


def mlp(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).double()


def optimizer_for(model, settings):
    return NGPlus(model, lr=0.01, damping=0.3, update_every=3, **SETTINGS[settings])


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn((5, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("settings", SETTINGS)
def test_saved_at_any_step_it_resumes_to_the_bit(settings):
    whole = mlp(4, 6, 3)
    train(whole, optimizer_for(whole, settings), range(8))
    for stop in range(8):
        model = mlp(4, 6, 3)
        optimizer = optimizer_for(model, settings)
        train(model, optimizer, range(stop))
        weights, state = through_a_file((model.state_dict(), optimizer.state_dict()))
        model = mlp(4, 6, 3, seed=5)
        optimizer = optimizer_for(model, settings)
        train(model, optimizer, range(20, 20 + stop % 3))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(stop, 8))
        assert same(model, whole), stop


def resume(folder, settings):
    """The end of a run, in a process that did not begin it."""
    saved = torch.load(f"{folder}/saved.pt", weights_only=True)
    model = mlp(4, 6, 3, seed=9)
    optimizer = optimizer_for(model, settings)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(4, 8))
    torch.save(model.state_dict(), f"{folder}/resumed.pt")


def test_a_fresh_process_goes_on_to_the_bit(tmp_path):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "ema")
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, range(4, 8))
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_saving; test_saving.resume({str(tmp_path)!r}, 'ema')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert all(torch.equal(value, resumed[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_beside_its_model_goes_on_identically(copied, settings):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, settings)
    train(model, optimizer, range(4))
    other_model, other = copied((model, optimizer))
    assert [id(p) for p in other_model.parameters()] == [id(p) for p in other.param_groups[0]["params"]]
    train(model, optimizer, range(4, 8))
    train(other_model, other, range(4, 8))
    assert same(model, other_model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_alone_brings_its_own_model(copied):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "adam")
    train(model, optimizer, range(4))
    other = copied(optimizer)
    train(model, optimizer, range(4, 8))
    assert not same(model, other._model)
    train(other._model, other, range(4, 8))
    assert same(model, other._model)


def test_a_copy_of_plain_parameters_goes_on_identically():
    model = mlp(4, 6, 3)
    optimizer = NGPlus(model.named_parameters(), lr=0.01, update_every=3, ema=0.5, curvature="mini_batch")
    train(model, optimizer, range(4))
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 8))
    train(other_model, other, range(4, 8))
    assert same(model, other_model)


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG])
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("event", ["frozen", "freed", "added"])
def test_a_bias_that_left_or_joined_its_matrix_is_no_hindrance(event, steps, copied, optimizer):
    """A copy made so many steps after it goes on identically, and so does what a state is loaded into."""
    model = mlp(4, 6, 3)
    bias = model[0].bias
    bias.requires_grad_(event != "freed")
    groups = [{"params": [p for p in model.parameters() if p is not bias]}, {"params": [bias]}]
    trained = optimizer(model, lr=0.01, update_every=5, params=groups[:1] if event == "added" else groups)
    train(model, trained, range(2))
    if event == "added":
        trained.add_param_group(groups[1])
    else:
        bias.requires_grad_(event == "freed")
        bias.grad = None
    train(model, trained, range(2, 2 + steps))
    if copied == "deepcopy":
        other_model, other = copy.deepcopy((model, trained))
    elif copied == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, trained)))
    else:
        other_model = copy.deepcopy(model)
        others = dict(zip(model.parameters(), other_model.parameters(), strict=True))
        same_groups = [{"params": [others[p] for p in group["params"]]} for group in groups]
        other = optimizer(other_model, lr=0.01, update_every=5, params=same_groups)
        other.load_state_dict(trained.state_dict())
    train(model, trained, range(2 + steps, 9))
    train(other_model, other, range(2 + steps, 9))
    assert same(model, other_model)
    assert trained.curvature["0.weight"].shape.columns == (4 if event == "frozen" else 5)


def test_a_state_does_not_change_with_what_goes_on():
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "ema")
    train(model, optimizer, range(4))
    kept = optimizer.state_dict()["ngplus"]["layers"]
    copied = copy.deepcopy(kept)
    train(model, optimizer, range(4, 8))
    for name, layer in copied.items():
        for a, b in zip(layer["average"], kept[name]["average"], strict=True):
            assert torch.equal(a, b)


def other_model_of_no_layer_more():
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()


FOREIGN = {
    "another shape": (lambda: mlp(4, 6, 5), "2.weight is for a matrix 1×5×7 .* but the model's is 1×3×7"),
    "more layers": (lambda: mlp(4, 6, 3, 2), "layers that this model does not: 4.weight; it has 0.weight, 2.weight"),
    "other names": (other_model_of_no_layer_more, "layers that this model does not: 1.weight"),
}


def refused(state, words):
    """Try to load it in the middle of a run, which must end as if nothing had happened."""
    model, plain = mlp(4, 6, 3), mlp(4, 6, 3)
    optimizer, reference = optimizer_for(model, "sgd"), optimizer_for(plain, "sgd")
    train(model, optimizer, range(4))
    train(plain, reference, range(4))
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    train(plain, reference, range(4, 8))
    assert same(model, plain)


@pytest.mark.parametrize("other", FOREIGN)
def test_a_state_of_another_model_is_refused_and_nothing_changes(other):
    make, words = FOREIGN[other]
    model = make()
    optimizer = NGPlus(model, lr=0.5, update_every=1)
    train(model, optimizer, range(2))
    refused(optimizer.state_dict(), words)


def test_a_state_of_another_optimizer_is_refused_and_nothing_changes():
    refused(SGD(mlp(4, 6, 3).parameters(), lr=0.1).state_dict(), r"no state of NGPlus: its keys are \['param_groups'")


def test_a_state_around_another_base_is_refused_and_nothing_changes():
    model = mlp(4, 6, 3)
    refused(optimizer_for(model, "adam").state_dict(), "is of NGPlus around Adam, but this one is around SGD")


def test_a_state_of_other_groups_is_refused_and_nothing_changes():
    model = mlp(4, 6, 3)
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    refused(NGPlus(model, update_every=1, params=groups).state_dict(), "parameter group")


@pytest.mark.parametrize("lost", ["steps", "layers", "generator"])
def test_a_state_with_a_part_missing_is_refused_and_nothing_changes(lost):
    model = mlp(4, 6, 3)
    optimizer = optimizer_for(model, "sgd")
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    del state["ngplus"][lost]
    refused(state, f"no {lost}")
