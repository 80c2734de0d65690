"""Processes with different numbers of batches, under `Join`; and processes that do not train the same layers."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ngplus import NGPlus
from ngplus.baselines import KFAC
from tests.ngplus.cases import seed_cpu
from tests.ngplus.oracle import PlainLoop
from tests.ngplus.training.problems import SETTINGS, distance, flat, perceptron
from tests.ngplus.training.processes import Team

pytestmark = pytest.mark.slow  # starting the processes is


# Uneven numbers of batches --------------------------------------------------------------------------------------------

BATCHES = [(slice(0, 3), slice(3, 6)), (slice(6, 9), slice(9, 12)), (slice(12, 14), None), (slice(14, 18), None)]
"""Of each step, what each process has."""
MADE = {
    "of the wrapper": lambda parallel, model, **settings: NGPlus(parallel, **settings),
    "of the model": lambda parallel, model, **settings: NGPlus(model, **settings),
    "mini_batch": lambda parallel, model, **settings: NGPlus(parallel, curvature="mini_batch", **settings),
    "sgd": lambda parallel, model, **settings: torch.optim.SGD(model.parameters(), **settings),
    "kfac": lambda parallel, model, **settings: KFAC(model, **settings),
}


def damping_of(step: int) -> float:
    """λ decays within an epoch, so that a process that ends first has a larger one."""
    return SETTINGS["damping"] * 0.5**step


def train_unevenly(made, settings, first_to_end):
    """Two epochs; gradients are averaged over the processes that have a batch."""
    problem = perceptron(samples=18)
    parallel = DistributedDataParallel(problem.model)
    optimizer = MADE[made](parallel, problem.model, **{**SETTINGS, **settings})
    place = dist.get_rank() if first_to_end == 1 else 1 - dist.get_rank()
    for _ in range(2):
        with Join([parallel, optimizer], divide_by_initial_world_size=False):
            for step, batch in enumerate(batches[place] for batches in BATCHES if batches[place] is not None):
                optimizer.param_groups[0]["damping"] = damping_of(step)
                problem.loss(parallel, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {
        "model": problem.model,
        "curvature": [tensor.clone() for state in optimizer.curvature.values() for tensor in state.tensors()],
        "damping": [state.damping for state in optimizer.curvature.values()],
        "updates": [state.updates for state in optimizer.curvature.values()],
        "due": optimizer.curvature_is_due,
    }


def plain_uneven_run(settings):
    problem = perceptron(samples=18)
    loop, losses = PlainLoop(problem.model, **{**SETTINGS, **settings}), problem.sample_losses()
    for _ in range(2):
        for step, batches in enumerate(BATCHES):
            if loop.steps % loop.update_every == 0:
                loop.damping = damping_of(step)
            loop.step([loss for batch in batches if batch is not None for loss in losses[batch]])
    return problem.model


def agree(first, second):
    assert torch.equal(flat(first["model"]), flat(second["model"]))
    assert all(torch.equal(*pair) for pair in zip(first["curvature"], second["curvature"], strict=True))
    assert all(first[name] == second[name] for name in ("damping", "updates", "due"))


@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize(
    "settings", [{"update_every": 1, "ema": 0.5}, {"update_every": 2}, {"update_every": 3}], ids=str
)
@pytest.mark.parametrize("made", ["of the wrapper", "of the model"])
def test_steps_of_those_that_have_a_batch_are_one_process_on_their_batches(team, made, settings, first_to_end):
    first, second = team.run(train_unevenly, made, settings, first_to_end)
    agree(first, second)
    assert distance(first["model"], plain_uneven_run(settings)) < 1e-10


@pytest.mark.parametrize("made", ["mini_batch", "kfac"])
def test_every_kind_of_curvature_is_the_same_on_all_processes(team, made):
    agree(*team.run(train_unevenly, made, {"update_every": 1, "ema": 0.5}, 1))


def join_the_model_alone(made, resume, **options):
    """What a step raises under a `Join` that was not given the optimizer, and whether something has moved."""
    problem = perceptron(samples=18)
    parallel = DistributedDataParallel(problem.model)
    optimizer = MADE[made](parallel, problem.model, **SETTINGS)
    if resume:  # no curvature is due on the first step under `Join`
        problem.loss(parallel).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = flat(problem.model)

    def epoch():
        with parallel.join(**options):
            for batches in BATCHES:
                if (batch := batches[dist.get_rank()]) is not None:
                    problem.loss(parallel, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    with pytest.raises(RuntimeError) as caught:
        epoch()
    return str(caught.value), torch.equal(flat(problem.model), before)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("made", ["of the wrapper", "of the model", "mini_batch", "kfac"])
def test_without_the_optimizer_the_first_step_is_refused_on_all_processes(team, made, resume):
    name = "KFAC" if made == "kfac" else "NGPlus"
    for message, unmoved in team.run(join_the_model_alone, made, resume):
        assert message.startswith(
            f"{name} averages curvature over all processes and would wait for one that has run out"
        )
        assert message.endswith("as in Join([model, optimizer])")
        assert unmoved


def end_together():
    return join_the_model_alone("of the wrapper", False, throw_on_early_termination=True)


def test_where_all_end_with_the_first_the_optimizer_may_be_left_out(team):
    for message, unmoved in team.run(end_together):
        assert "exhausted" in message
        assert not unmoved


def momentum_after_an_uneven_epoch(kind):
    problem = perceptron(samples=18)
    parallel = DistributedDataParallel(problem.model)
    optimizer = MADE[kind](parallel, problem.model, lr=0.1, momentum=0.9)
    with Join([parallel, optimizer] if isinstance(optimizer, NGPlus) else [parallel]):
        for batches in BATCHES:
            if (batch := batches[dist.get_rank()]) is not None:
                problem.loss(parallel, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return problem.model, optimizer.state[problem.model[0].weight]["momentum_buffer"]


@pytest.mark.parametrize("kind", ["sgd", "of the model"])
def test_momentum_of_a_process_that_has_ended_stays_behind_as_with_any_optimizer(team, kind):
    (first, momentum), (second, other_momentum) = team.run(momentum_after_an_uneven_epoch, kind)
    assert torch.equal(flat(first), flat(second))  # which `Join` copies
    assert not torch.allclose(momentum, other_momentum, rtol=0.01)


def join_an_unknown_model():
    parallel = DistributedDataParallel(nn.Linear(5, 3))
    optimizer = NGPlus(parallel.parameters(), curvature="mini_batch", lr=0.1, update_every=1)
    with parallel.join():
        for _ in range(1 if dist.get_rank() else 3):
            parallel(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_waiting_for_others_raises_where_the_optimizer_does_not_know_the_wrapper():
    """Both end: the one with batches raises why, the other loses its connection."""
    active, ended = Team().tracebacks(join_an_unknown_model)
    assert "RuntimeError: NGPlus averages curvature over all processes and would wait for one" in active
    assert "NGPlus averages" not in ended


# Processes that do not train the same ---------------------------------------------------------------------------------


def refused(function, *arguments):
    """What an optimizer's step raises, made by ``function(rank, …)`` with its model."""
    model, optimizer = function(dist.get_rank(), *arguments)
    with pytest.raises(RuntimeError) as caught:
        two_steps(model, optimizer)
    return str(caught.value)


def two_steps(model, optimizer):
    for _ in range(2):
        model(torch.ones(3, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alike(*sizes) -> nn.Sequential:
    seed_cpu(0)
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes)))


def sharded_by_zero(_rank, sizes):
    model = alike(*sizes)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    settings = {"lr": 0.1, "damping": 0.3, "update_every": 1, "curvature": "mini_batch"}
    return model, ZeroRedundancyOptimizer(parameters, optimizer_class=NGPlus, **settings)


@pytest.mark.parametrize("sizes", [(5, 5, 5), (5, 4, 3, 2)], ids=str)
def test_layers_sharded_over_processes_are_refused(team, sizes):
    """Equally large ones differ by their values only."""
    first, second = team.run(refused, sharded_by_zero, sizes)
    assert first == second
    assert (
        "averages curvature over all processes of the default process group, which must train one model with" in first
    )
    assert "ZeroRedundancyOptimizer" in first
    assert ("the values of group 0 parameter 0 differ" in first) == (sizes == (5, 5, 5))


def other_layers(rank):
    model = alike(5, 4, 3) if rank == 0 else alike(5, 6, 3)
    return model, NGPlus(model, lr=0.1)


def other_values(rank):
    model = alike(5, 4, 3)
    with torch.no_grad():
        model[1].weight.add_(rank)
    return model, NGPlus(model, lr=0.1)


def other_frozen_layers(rank):
    model = alike(5, 4, 3)
    model[rank].requires_grad_(False)
    return model, NGPlus(model, lr=0.1)


def frozen_on_one(rank):
    model = alike(5, 4, 3)
    optimizer = NGPlus(model, lr=0.1)
    if rank == 0:
        model.requires_grad_(False)
        model[0].bias.requires_grad_(True)
    return model, optimizer


def one_step_ahead(rank):
    """Curvature is due on the second step of one and the third of the other."""
    model = alike(5, 4, 3)
    optimizer = NGPlus(model, lr=0.1, update_every=2)
    state = optimizer.state_dict()
    state["param_groups"][0]["ngplus"]["steps"] = 2 * rank
    optimizer.load_state_dict(state)
    return model, optimizer


DIFFERENT = {
    other_layers: "process 0 alone has 0.weight (4, 5) torch.float32 with a trained bias, 1.weight (3, 4) torch",
    other_values: "the values of 1.weight differ",
    other_frozen_layers: "process 0 alone has 0.weight (4, 5) torch.float32, 1.weight (3, 4) torch.float32 with a",
    frozen_on_one: "process 1 alone has 1.weight (3, 4) torch.float32 with a trained bias",
    one_step_ahead: "process 0 alone has made 0 steps and process 1 alone has made 2 steps",
}


@pytest.mark.parametrize("make", DIFFERENT, ids=lambda make: make.__name__)
def test_processes_that_train_different_models_are_refused_with_their_differences(team, make):
    first, second = team.run(refused, make)
    assert first == second
    assert DIFFERENT[make] in first


def drifted():
    """Weights as they are after local steps between averages."""
    model = alike(5, 4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * dist.get_rank())
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    two_steps(model, optimizer)
    return list(optimizer.curvature)


def test_weights_that_have_drifted_apart_a_little_are_of_one_model(team):
    assert team.run(drifted) == [["0.weight", "1.weight"]] * 2
