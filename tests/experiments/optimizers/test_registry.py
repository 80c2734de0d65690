import copy
import io

import pytest
import torch
from torch import nn

from experiments.dataclass_io import SettingsError
from experiments.optimizers.registry import (
    OPTIMIZERS,
    AdagradBase,
    AdamBase,
    AdamWBase,
    AdamWSettings,
    LARSSettings,
    NGPlusSettings,
    SGDBase,
    SGDSettings,
    SOAPSettings,
    find_entry,
)
from ngplus import NGPlus


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    model(torch.randn(8, 3).double()).square().mean().backward()
    return model


AROUND_BASE = {"damping": 0.5, "update_every": 7, "base": SGDBase()}
NEEDED = dict.fromkeys(["kfac", "ngplus", "seng", "shampoo"], AROUND_BASE)


def ngplus(**changes) -> NGPlusSettings:
    return NGPlusSettings(**{"lr": 0.1} | AROUND_BASE | changes)


@pytest.mark.parametrize(
    ("base", "kind", "given"),
    [
        (SGDBase(momentum=0.9, weight_decay=1e-4), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-4}),
        (AdamBase(betas=(0.8, 0.98), eps=1e-6), torch.optim.Adam, {"betas": (0.8, 0.98), "eps": 1e-6}),
        (
            AdamWBase(beta1=0.8, beta2=0.97, weight_decay=0.1),
            torch.optim.AdamW,
            {"betas": (0.8, 0.97), "eps": 1e-8, "weight_decay": 0.1},
        ),
        (AdagradBase(initial_accumulator_value=0.1), torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    ],
)
def test_ngplus_gets_its_base_with_the_bases_own_settings(model, base, kind, given):
    optimizer = find_entry("ngplus-x").build(model, ngplus(base=base, samples="rows"))
    assert isinstance(optimizer, NGPlus)
    assert type(optimizer.base) is kind
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in given} == given
    assert (group["lr"], group["damping"]) == (0.1, 0.5)


def test_lars_is_its_formula(model):
    settings = LARSSettings(lr=0.5, momentum=0.9, weight_decay=1e-2, trust_coefficient=1e-3)
    before = copy.deepcopy(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer = find_entry("lars").build(model, settings)
    optimizer.step()
    w, g = before.weight, gradients[0]
    trust = 1e-3 * w.norm() / (g.norm() + 1e-2 * w.norm())
    torch.testing.assert_close(model.weight, w - 0.5 * trust * (g + 1e-2 * w), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(model.bias, before.bias - 0.5 * gradients[1], rtol=1e-12, atol=0.0)


def test_sgd_gets_every_setting(model):
    settings = SGDSettings(lr=0.2, momentum=0.8, weight_decay=1e-3, nesterov=True)
    (group,) = find_entry("sgd").build(model, settings).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.2, 0.8, 1e-3, True)


def test_adamw_gets_every_setting(model):
    settings = AdamWSettings(lr=0.2, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=1e-3)
    optimizer = find_entry("adamw").build(model, settings)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.2, (0.8, 0.97), 1e-6, 1e-3)


def test_every_entry_builds_an_optimizer_that_steps(model):
    for name, entry in OPTIMIZERS.items():
        own = copy.deepcopy(model)
        own.zero_grad()
        settings = entry.settings(lr=0.1, **NEEDED.get(name, {}))
        optimizer = entry.build(own, settings)
        for _ in range(2):  # SOAP's first step only gathers
            own(torch.ones(4, 3).double()).square().mean().backward()
            optimizer.step()
        assert not torch.equal(own.weight, model.weight)


def test_soap_loses_its_first_step(model):
    """As docs/baselines.md says, of the version that is installed."""
    optimizer = find_entry("soap").build(model, SOAPSettings(lr=0.1))
    moved = []
    for _ in range(3):
        before = model.weight.clone()
        model(torch.ones(4, 3).double()).square().mean().backward()
        optimizer.step()
        moved.append(not torch.equal(model.weight, before))
    assert moved == [False, True, True]


@pytest.mark.parametrize("name", ["adadelta", "", "nadam-x"])
def test_a_name_that_is_not_there_lists_what_is(name):
    with pytest.raises(
        SettingsError, match=r"must be one of adagrad, adam, .*, sgd, shampoo, soap, or one of these with"
    ):
        find_entry(name)


def test_a_soap_state_goes_on_to_the_bit(model):
    optimizer = find_entry("soap").build(model, SOAPSettings(lr=0.1, precondition_frequency=2))
    x = torch.randn(8, 3).double()

    def train(own, stepper, steps):
        for _ in range(steps):
            stepper.zero_grad()
            own(x).square().mean().backward()
            stepper.step()

    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = find_entry("soap").build(other, SOAPSettings(lr=0.3))
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(model, optimizer, 4)
    train(other, resumed, 4)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("name", ["adam", "muon", "shampoo", "soap"])
def test_what_takes_no_sparse_gradients_says_so_when_it_is_made(name):
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="takes no sparse gradients, which 0 has"):
        find_entry(name).build(model, find_entry(name).settings(lr=0.1, **NEEDED.get(name, {})))


def test_a_method_around_adam_takes_no_sparse_gradients_either():
    model = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    settings = ngplus(base=AdamBase())
    with pytest.raises(ValueError, match="NGPlus around Adam takes no sparse gradients, which 0 has"):
        find_entry("ngplus").build(model, settings)
