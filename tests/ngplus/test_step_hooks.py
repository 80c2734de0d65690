"""Hooks around the step: those of every optimizer once a step, those of an optimizer where it was registered."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ngplus import NGPlus
from ngplus.baselines import KFAC
from tests.ngplus.cases import seed_cpu


@pytest.fixture
def calls():
    """The optimizers that hooks for every optimizer are called with, before and after their steps."""
    called = []
    before = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: called.append(("before", optimizer)))
    after = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: called.append(("after", optimizer)))
    with contextlib.ExitStack() as stack:
        stack.callback(before.remove)
        stack.callback(after.remove)
        yield called


def model_with_gradients() -> nn.Module:
    seed_cpu(0)
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().sum().backward()
    return model


class StepOfItsOwn(torch.optim.Optimizer):
    """A base that torch has not made."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("kind", [NGPlus, KFAC])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, StepOfItsOwn])
def test_hooks_of_every_optimizer_are_called_once_a_step(calls, base, kind):
    model = nn.Linear(3, 2)
    optimizer = kind(model, base, lr=0.1, update_every=2)
    for steps in (1, 2, 3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert calls == [("before", optimizer), ("after", optimizer)] * steps


def test_hooks_are_called_once_a_step_with_a_closure(calls):
    model = model_with_gradients()
    optimizer = NGPlus(model, lr=0.1)
    before = model.weight.clone()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert calls == [("before", optimizer), ("after", optimizer)]
    assert not torch.equal(model.weight, before)


def test_hooks_of_one_optimizer_are_called_with_it(calls):
    optimizer = NGPlus(model_with_gradients(), lr=0.1)
    for place in (optimizer, optimizer.base):
        place.register_step_pre_hook(lambda own, args, kwargs: calls.append(("own before", own)))
        place.register_step_post_hook(lambda own, args, kwargs: calls.append(("own after", own)))
    optimizer.step()
    names = {id(optimizer): "NG+", id(optimizer.base): "base"}
    assert [(when, names[id(whose)]) for when, whose in calls] == [
        ("before", "NG+"),
        ("own before", "NG+"),
        ("own before", "base"),
        ("own after", "base"),
        ("own after", "NG+"),
        ("after", "NG+"),
    ]


def test_other_optimizers_keep_theirs_meanwhile(calls):
    """A step in another thread, while the base makes its own."""
    optimizer = NGPlus(model_with_gradients(), lr=0.1)
    other = torch.optim.SGD(model_with_gradients().parameters(), lr=0.1)

    def step_elsewhere(*_):
        thread = threading.Thread(target=other.step)
        thread.start()
        thread.join()

    optimizer.base.register_step_pre_hook(step_elsewhere)
    optimizer.step()
    assert [whose for _, whose in calls] == [optimizer, other, other, optimizer]


def test_a_step_that_was_put_onto_the_base_is_the_one_that_is_called(calls):
    optimizer = NGPlus(model_with_gradients(), lr=0.1)
    optimizer.base.step = lambda: "mine"
    assert optimizer.step() == "mine"


def test_the_profiler_sees_both_steps():
    optimizer = NGPlus(model_with_gradients(), lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.step")}
    assert names == {"Optimizer.step#NGPlus.step": 1, "Optimizer.step#SGD.step": 1}
