import copy

import pytest
import torch
from torch import nn

from experiments.optimizers.decay_groups import exempt_from_decay
from experiments.optimizers.muon import MuonAndAdamW
from experiments.optimizers.registry import OPTIMIZERS, AdamWBase
from experiments.tasks.gpt.gpt_model import GPT, ModelSettings

DECAYED = {"attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight"}
AROUND_BASE = {"damping": 1.0, "update_every": 1, "base": AdamWBase(weight_decay=0.5)}
SETTINGS = {
    "adamw": {"weight_decay": 0.5},
    "sgd": {"weight_decay": 0.5},
    "muon": {"weight_decay": 0.5},
    "soap": {"weight_decay": 0.5},
    "ngplus": AROUND_BASE,
    "kfac": AROUND_BASE,
    "seng": AROUND_BASE,
    "shampoo": AROUND_BASE,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(ModelSettings(layers=1, dim=8, heads=2), vocabulary=20, context=5).double()
    for parameter in model.parameters():  # so that what is decayed moves, biases too
        nn.init.normal_(parameter)
    return model


def is_decayed(name):
    return name.removeprefix("blocks.0.") in DECAYED


@pytest.mark.filterwarnings("ignore:.* is looked up as a table and multiplied as a matrix:UserWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_matrices_of_layers_are_decayed_and_nothing_else(model, name):
    """Two models of the same gradients, one with decay: they differ by one step's decay of the matrices alone."""
    entry, moved = OPTIMIZERS[name], []
    tokens = torch.randint(20, (3, 5))
    for with_decay in (True, False):
        own = copy.deepcopy(model)
        given = dict(SETTINGS[name])
        if not with_decay:
            given |= {"base": AdamWBase(weight_decay=0.0)} if "base" in given else {"weight_decay": 0.0}
        optimizer = entry.build(own, entry.settings(lr=0.1, **given))
        exempt_from_decay(optimizer, own)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        assert {id(each) for each in parameters} == {id(each) for each in own.parameters()}
        assert len(parameters) == len(list(own.parameters()))
        for _ in range(2 if name == "soap" else 1):  # SOAP's first step only gathers
            own(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(dict(own.named_parameters()))
    for key, weight in moved[0].items():
        assert torch.equal(weight, moved[1][key]) != is_decayed(key), key
        if is_decayed(key) and name not in ("sgd", "soap"):  # decoupled, and before the step
            torch.testing.assert_close(weight, moved[1][key] - 0.05 * dict(model.named_parameters())[key])


def test_groups_keep_everything_else(model):
    optimizer = OPTIMIZERS["adamw"].build(model, OPTIMIZERS["adamw"].settings(lr=0.1, beta2=0.97, weight_decay=0.5))
    exempt_from_decay(optimizer, model)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.5, 0.0)
    others = [
        {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        for group in (first, second)
    ]
    assert others[0] == others[1]
    assert others[0]["betas"] == (0.9, 0.97)


def test_without_decay_the_groups_stay_as_they_are(model):
    optimizer = torch.optim.Adam(model.parameters())
    exempt_from_decay(optimizer, model)
    assert len(optimizer.param_groups) == 1


def test_parameters_added_to_muon_are_adamws_and_move():
    model = nn.ModuleDict({"hidden": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    optimizer = MuonAndAdamW(model, lr=0.1, adamw=["head.weight"], weight_decay=0.5)
    exempt_from_decay(optimizer, model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    before = copy.deepcopy(model)
    model["head"](model["hidden"](torch.ones(2, 3))).square().sum().backward()
    optimizer.step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new)
