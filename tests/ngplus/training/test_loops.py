"""Loops that call forward, backward, step and zero_grad in the orders that people do."""

import copy
import warnings

import oracle
import pytest
import torch
from problems import SETTINGS, attentive, convolutional, distance, flat, perceptron, train
from torch import nn

from ngplus import NGPlus


@pytest.mark.parametrize("make", [perceptron, convolutional, attentive])
def test_the_plain_loop_is_the_oracle(make):
    problem = make()
    expected = problem.plain_run(4)
    train(problem, NGPlus(problem.model, **SETTINGS), 4)
    assert distance(problem.model, expected) < 1e-10


def zero_first(problem, optimizer):
    optimizer.zero_grad()
    problem.loss(problem.model).backward()
    optimizer.step()


def zero_between_forward_and_backward(problem, optimizer):
    loss = problem.loss(problem.model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_the_model(problem, optimizer):
    problem.loss(problem.model).backward()
    optimizer.step()
    problem.model.zero_grad()


def zero_in_place(problem, optimizer):
    problem.loss(problem.model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def closure(problem, optimizer):
    def evaluate():
        optimizer.zero_grad()
        loss = problem.loss(problem.model)
        loss.backward()
        return loss

    assert optimizer.step(evaluate) is not None


def closure_that_zeroes_after_forward(problem, optimizer):
    def evaluate():
        loss = problem.loss(problem.model)
        optimizer.zero_grad()
        loss.backward()
        return loss

    optimizer.step(evaluate)


def evaluation_before_each_step(problem, optimizer):
    problem.model(problem.inputs)  # with gradients on, and thrown away
    with torch.no_grad():
        problem.model(problem.inputs)
    zero_the_model(problem, optimizer)


@pytest.mark.parametrize(
    "step",
    [
        zero_first,
        zero_between_forward_and_backward,
        zero_the_model,
        zero_in_place,
        closure,
        closure_that_zeroes_after_forward,
        evaluation_before_each_step,
    ],
)
def test_the_order_of_calls_does_not_matter(step):
    problem = perceptron()
    expected = problem.plain_run(4)
    optimizer = NGPlus(problem.model, **SETTINGS)
    for _ in range(4):
        step(problem, optimizer)
    assert distance(problem.model, expected) < 1e-10


@pytest.mark.parametrize("make", [perceptron, convolutional, attentive])
def test_accumulated_micro_batches_are_one_batch(make):
    problem = make()
    expected = problem.plain_run(3)
    optimizer = NGPlus(problem.model, **SETTINGS)
    half = len(problem.inputs) // 2
    for _ in range(3):
        for samples in (slice(0, half), slice(half, None)):
            (problem.loss(problem.model, samples) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(problem.model, expected) < 1e-10


@pytest.mark.parametrize("zero", ["optimizer", "model"])
def test_a_step_that_is_left_out_leaves_nothing_behind(zero):
    problem = perceptron()
    expected = problem.plain_run(2)
    optimizer = NGPlus(problem.model, **SETTINGS)
    (100 * problem.loss(problem.model)).backward()  # a loop that finds this batch wanting
    {"optimizer": optimizer, "model": problem.model}[zero].zero_grad()
    train(problem, optimizer, 2)
    assert distance(problem.model, expected) < 1e-10


def test_clipping_before_the_step_scales_the_direction_and_not_the_curvature():
    clipped, whole = perceptron(), perceptron()
    start = copy.deepcopy(whole.model)
    train(whole, NGPlus(whole.model, **SETTINGS), 1)
    optimizer = NGPlus(clipped.model, **SETTINGS)
    clipped.loss(clipped.model).backward()
    norm = nn.utils.clip_grad_norm_(clipped.model.parameters(), 0.1)
    optimizer.step()
    assert norm > 0.2
    moved = flat(clipped.model) - flat(start)
    assert torch.allclose(moved, (flat(whole.model) - flat(start)) * 0.1 / norm, rtol=1e-4)


def test_clipping_after_preconditioning_is_a_hook_of_the_base():
    problem = perceptron()
    start = copy.deepcopy(problem.model)
    optimizer = NGPlus(problem.model, **SETTINGS)
    optimizer.base.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(problem.model.parameters(), 0.01) and None
    )
    train(problem, optimizer, 1)
    assert torch.isclose(
        (flat(problem.model) - flat(start)).norm() / SETTINGS["lr"], torch.tensor(0.01).double(), rtol=1e-3
    )


def test_step_hooks_of_the_optimizer_run_once_a_step():
    problem, calls = perceptron(), []
    optimizer = NGPlus(problem.model, **SETTINGS)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before") or None)
    optimizer.register_step_post_hook(lambda *_: calls.append("after") or None)
    train(problem, optimizer, 2)
    assert calls == ["before", "after"] * 2


class Adapted(nn.Module):
    """A frozen layer with two adapters of low rank, of which one is in use at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 4)
        self.adapters = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 4)) for name in "ab"}
        )
        self.use("a")
        self.double()

    def use(self, name):
        self.name = name
        self.requires_grad_(False)
        self.adapters[name].requires_grad_(True)

    def forward(self, x):
        return self.layer(x) + self.adapters[self.name](x)


def test_adapters_whose_steps_alternate_while_the_other_is_in_use_have_their_curvature():
    """Backward of both, then the step of each: one of them is frozen at the moment of its step."""
    model, expected = Adapted(), {}
    optimizers = {}
    for name in "ab":
        model.use(name)
        optimizers[name] = NGPlus(
            model, params=list(model.adapters[name].parameters()), lr=1e-9, damping=0.3, update_every=2, solver="dense"
        )
    for step in range(3):
        inputs = {name: torch.randn(6, 5, dtype=torch.float64) for name in "ab"}
        for name, x in inputs.items():
            model.use(name)
            if step % 2 == 0:
                gradients = oracle.sample_gradients(model, [lambda m, r=r: oracle.energy(m(r)) for r in x.split(1)])
                expected[name] = oracle.directions(gradients, 0.3)
            (oracle.energy(model(x)) / 6).backward()
        for name, optimizer in optimizers.items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
            if step % 2 == 0:
                assert oracle.error(model, expected[name]) <= 1e-9
            assert {state.updates for state in optimizer.curvature.values()} == {1 + step // 2}
            optimizer.zero_grad()


def test_a_bias_frozen_after_backward_is_still_a_column_of_its_layer():
    problem = perceptron()
    expected = oracle.directions(oracle.sample_gradients(problem.model, problem.sample_losses()), 0.3)
    optimizer = NGPlus(problem.model, lr=1e-9, damping=0.3, update_every=1, solver="dense")
    problem.loss(problem.model).backward()
    problem.model.requires_grad_(False)
    optimizer.step()
    problem.model.requires_grad_(True)
    assert oracle.error(problem.model, expected) <= 1e-10
