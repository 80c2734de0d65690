"""Every optimizer of torch and of pytorch-optimizer as the base: it trains and resumes as it does by itself."""

import importlib
import io
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ngplus import NGPlus
from tests.ngplus.cases import mlp_with_norm, seed_cpu

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
numpy = pytest.importorskip("numpy")


def classes(package: str) -> dict[str, type[Optimizer]]:
    """The optimizers that a package exports."""
    module = importlib.import_module(package)
    return {
        name: each
        for name, each in sorted(vars(module).items())
        if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
        if each.__module__.startswith(package)
    }


BASES = {
    **{f"torch.optim.{name}": each for name, each in classes("torch.optim").items()},
    **classes("pytorch_optimizer"),
}


def matrices(dtype: torch.dtype, seed: int) -> nn.Module:
    seed_cpu(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).to(dtype)


def table(dtype: torch.dtype, seed: int) -> nn.Module:
    seed_cpu(seed)
    return nn.Sequential(nn.Embedding(11, 4, sparse=True)).to(dtype)


def all_at_once(model: nn.Module) -> list[Any]:
    return list(model.parameters())


def muon_groups(model: nn.Module) -> list[Any]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "use_muon": True},
        {"params": [p for p in parameters if p.dim() < 2], "use_muon": False},
    ]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a base needs beyond a learning rate.

    Attributes:
        network: makes a model that it can train, of a dtype and a seed.
        params: its parameter groups.
        options: its other arguments.
        closure: whether its step wants one.
        create_graph: whether it differentiates the gradient.
    """

    network: Callable[[torch.dtype, int], nn.Module] = mlp_with_norm
    params: Callable[[nn.Module], list[Any]] = all_at_once
    options: dict[str, Any] = field(default_factory=dict)
    closure: bool = False
    create_graph: bool = False


MUON = Setup(params=muon_groups)
SETUPS = {
    "torch.optim.LBFGS": Setup(closure=True),
    "torch.optim.Muon": Setup(network=matrices),
    "torch.optim.SparseAdam": Setup(network=table),
    "AdaGO": MUON,
    "AdaHessian": Setup(create_graph=True),
    "AdaMuon": MUON,
    "AliG": Setup(closure=True),
    "BSAM": Setup(closure=True, options={"num_data": 100}),
    "DistributedMuon": MUON,
    "Muon": MUON,
    "MuonClip": MUON,
    "NorMuon": MUON,
    "Ranger21": Setup(options={"num_iterations": 20}),
    "SophiaH": Setup(create_graph=True),
    "SpectralSphere": Setup(network=matrices),
}
IT_WRAPS = "takes an optimizer, not parameters"
IT_IS_GIVEN_MODELS = "takes a model, not parameters"
NO_BASE = {
    **dict.fromkeys(["Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC"], IT_WRAPS),
    **dict.fromkeys(["FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"], IT_WRAPS),
    **dict.fromkeys(["AdaLOMO", "AdamMini", "LOMO"], IT_IS_GIVEN_MODELS),
}
"""Optimizers that are no base, and why; the reasons stand in docs/supported.md."""
NOT_IN_BFLOAT16 = {"torch.optim.NAdam", "Adai", "Kron", "LoRARite", "QHAdam"}
"""Optimizers that do not step, or do not resume to the bit, with weights in bfloat16, by themselves or as a base."""
NEEDS = {"DeMo": "einops"}
"""Packages without which an optimizer does not run."""


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A group of one process, for what asks for a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(setup: Setup, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for seed in (seed_cpu, random.seed, numpy.random.seed):
            seed(step)
        x = torch.randint(11, (8,)) if setup.network is table else torch.randn(8, 4)
        x = x if x.dtype == torch.long else x.to(next(model.parameters()).dtype)

        @torch.enable_grad()
        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward(create_graph=setup.create_graph)
            return loss

        closure()
        optimizer.step(*([closure] if setup.closure else []))


def resumes(setup: Setup, make: Callable[[nn.Module], Optimizer], dtype: torch.dtype) -> bool:
    """Whether what is saved at any of some steps goes on to the bit, into an optimizer that has steps behind it too."""
    whole = setup.network(dtype, 0)
    run(setup, whole, make(whole), range(7))
    for stop, made in ((1, 0), (4, 2)):
        model = setup.network(dtype, 0)
        optimizer = make(model)
        run(setup, model, optimizer, range(stop))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=False)  # some save objects
        other = setup.network(dtype, 3)
        resumed = make(other)
        run(setup, other, resumed, range(20, 20 + made))
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        run(setup, other, resumed, range(stop, 7))
        if not all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True)):
            return False
    return True


def outcome(setup: Setup, make: Callable[[nn.Module], Optimizer], dtype: torch.dtype) -> bool | type[Exception]:
    """Of `resumes`: what it returned, or what it raised."""
    try:
        return resumes(setup, make, dtype)
    except Exception as error:
        return type(error)


def around(name: str, **options: Any) -> Callable[[nn.Module], NGPlus]:
    setup = SETUPS.get(name, Setup())

    def make(model: nn.Module) -> NGPlus:
        return NGPlus(
            model,
            BASES[name],
            lr=0.01,
            damping=0.1,
            update_every=3,
            params=setup.params(model),
            **setup.options,
            **options,
        )

    return make


# Of torch, about the bases that differentiate the gradient.
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in BASES if name not in NO_BASE])
def test_a_base_resumes_to_the_bit_as_it_does_by_itself(name, dtype):
    setup = SETUPS.get(name, Setup())
    if needed := NEEDS.get(name):
        pytest.importorskip(needed)
    if dtype == torch.bfloat16 and name in NOT_IN_BFLOAT16:  # at some rates the rounding happens to agree
        rates = (0.01, 0.02, 0.05)
        alone = [lambda m, lr=lr: BASES[name](setup.params(m), lr=lr, **setup.options) for lr in rates]
        assert any(outcome(setup, make, dtype) is not True for make in alone)
    else:
        assert outcome(setup, around(name), dtype) is True


@pytest.mark.parametrize("name", NO_BASE)
def test_unsupported_bases_are_refused(name):
    model = mlp_with_norm(torch.float32)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        NGPlus(model, BASES[name], lr=0.01)


def test_the_document_names_the_unsupported_bases_and_why():
    text = (Path(__file__).parents[2] / "docs" / "supported.md").read_text()
    rows = dict(re.findall(r"^\| (`.+`) \| no: (.+?) \|", text, flags=re.MULTILINE))
    named = {name: reason for names, reason in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert named == NO_BASE


@pytest.mark.parametrize("name", ["SPAM", "MADGRAD", "StableSPAM", "Magma", "FlashAdamW", "Ranger21", "AdaFactor"])
def test_groups_and_state_are_those_of_a_base_that_keeps_more_than_entries_of_parameters(name):
    setup = SETUPS.get(name, Setup())
    model = mlp_with_norm(torch.float32)
    optimizer = around(name)(model)
    run(setup, model, optimizer, range(2))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    assert optimizer.base.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


@pytest.mark.parametrize("name", ["torch.optim.Adam", "SaRA", "Magma", "ScheduleFreeAdamW"])
def test_a_group_that_is_added_is_added_as_the_base_does(name):
    """SaRA gives each parameter a mask then, and Magma has the groups of an optimizer inside it."""
    model = mlp_with_norm(torch.float32)
    optimizer = NGPlus(model, BASES[name], lr=0.01, update_every=2, damping=0.3, params=list(model[0].parameters()))
    added = list(model[3].parameters())
    optimizer.add_param_group({"params": added, "lr": 0.02})
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.param_groups[1]["damping"] == 0.3
    run(Setup(), model, optimizer, range(3))
    assert set(optimizer.curvature) == {"0.weight", "3.weight"}
    assert all(optimizer.base.state[parameter] for parameter in added)


def test_a_bases_modes_are_those_of_the_optimizer():
    """Wrappers ask whether there are ``train`` and ``eval``, and call them around evaluations."""
    model = nn.Linear(4, 3)
    optimizer = NGPlus(model, pytorch_optimizer.ScheduleFreeAdamW, lr=0.1, damping=0.1)
    optimizer.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    trained = model.weight.clone()
    optimizer.eval()
    assert not torch.equal(model.weight, trained)
    optimizer.train()
    torch.testing.assert_close(model.weight, trained)
    assert not hasattr(NGPlus(model), "train")
    with pytest.raises(AttributeError, match="no attribute 'trains'"):
        optimizer.trains  # noqa: B018
