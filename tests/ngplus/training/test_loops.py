"""Loops that call forward, backward, step and zero_grad in the orders that people do."""

import contextlib
import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import SETTINGS, attentive, convolutional, distance, flat, perceptron


@pytest.mark.parametrize("make", [perceptron, convolutional, attentive])
def test_the_plain_loop_is_the_oracle(make):
    problem = make()
    expected = problem.plain_run(4)
    problem.train(NGPlus(problem.model, **SETTINGS), 4)
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
    problem.train(optimizer, 2)
    assert distance(problem.model, expected) < 1e-10


def test_clipping_before_the_step_scales_the_direction_and_not_the_curvature():
    clipped, whole = perceptron(), perceptron()
    start = copy.deepcopy(whole.model)
    whole.train(NGPlus(whole.model, **SETTINGS), 1)
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
    problem.train(optimizer, 1)
    assert torch.isclose(
        (flat(problem.model) - flat(start)).norm() / SETTINGS["lr"], torch.tensor(0.01).double(), rtol=1e-3
    )


def test_step_hooks_of_the_optimizer_run_once_a_step():
    problem, calls = perceptron(), []
    optimizer = NGPlus(problem.model, **SETTINGS)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before") or None)
    optimizer.register_step_post_hook(lambda *_: calls.append("after") or None)
    problem.train(optimizer, 2)
    assert calls == ["before", "after"] * 2


class Adapted(nn.Module):
    """A frozen layer with two adapters of low rank, of which one is in use at a time."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [range(4), (0, 2, 3)], ids=["always", "sometimes"])
def test_a_step_may_be_inside_any_mode_of_autograd(mode, inside):
    plain, problem = perceptron(), perceptron()
    plain.train(NGPlus(plain.model, **SETTINGS, momentum=0.9), 4)
    optimizer = NGPlus(problem.model, **SETTINGS, momentum=0.9)
    for step in range(4):
        problem.loss(problem.model).backward()
        with mode() if step in inside else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(flat(problem.model), flat(plain.model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_closure_has_gradients_inside_any_mode_of_autograd(mode):
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    with mode():
        for _ in range(4):
            closure(problem, optimizer)
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


def test_a_step_from_another_thread_is_the_same_step():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    for _ in range(4):
        problem.loss(problem.model).backward()
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
        optimizer.zero_grad()
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


def test_steps_inside_the_backward_pass_are_those_after_it():
    """One optimizer a layer, which steps as soon as its gradients are there."""
    plain, problem = perceptron(), perceptron()
    plain.train(NGPlus(plain.model, **SETTINGS, momentum=0.9), 4)
    layers = [problem.model[0], problem.model[2]]
    handles = [each for layer in layers for each in step_in_backward(layer, NGPlus(layer, **SETTINGS, momentum=0.9))]
    for _ in range(4):
        problem.loss(problem.model).backward()
    for handle in handles:  # a cycle through C++ otherwise, which keeps the optimizers
        handle.remove()
    assert torch.equal(flat(problem.model), flat(plain.model))


def step_in_backward(layer, optimizer):
    def arrived(_parameter):
        if all(parameter.grad is not None for parameter in layer.parameters()):
            optimizer.step()
            optimizer.zero_grad()

    return [parameter.register_post_accumulate_grad_hook(arrived) for parameter in layer.parameters()]


def test_after_a_step_the_gradient_is_the_direction():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    start = flat(problem.model)
    problem.loss(problem.model).backward()
    optimizer.step()
    direction = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    assert torch.allclose(flat(problem.model) - start, -SETTINGS["lr"] * direction, rtol=1e-12)


def test_averaged_weights_and_their_rate_are_those_of_any_optimizer():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    averaged = torch.optim.swa_utils.AveragedModel(problem.model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=SETTINGS["lr"] / 2, anneal_epochs=1)
    weights = []
    for _ in range(4):
        problem.train(optimizer, 1)
        averaged.update_parameters(problem.model)
        weights.append(flat(problem.model))
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"] / 2
    assert torch.allclose(flat(averaged.module), torch.stack(weights).mean(0), rtol=1e-12)


ROWS, COLUMNS = (slice(0, 2),), (slice(None), slice(0, 2))


def moved_where_frozen(shape, frozen, zeroed_by):
    """Whether a part of a weight moves in three steps; its gradient, or its direction, is zeroed in each."""
    seed_cpu(0)
    model = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = NGPlus(model, **SETTINGS, momentum=0.9)

    def zero_the_direction(_base, _args, _kwargs):
        model.weight.grad[frozen] = 0.0

    if zeroed_by == "a hook of the base":
        optimizer.base.register_step_pre_hook(zero_the_direction)
    start = model.weight.clone()
    for _ in range(3):
        model(torch.randn(8, shape[1])).square().mean(0).sum().backward()
        if zeroed_by == "the loop":
            model.weight.grad[frozen].zero_()
        optimizer.step()
        optimizer.zero_grad()
    moved = model.weight != start
    assert moved.any()
    return bool(moved[frozen].any())


@pytest.mark.parametrize("frozen", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_a_part_whose_gradient_is_zeroed_before_the_step_moves_along_the_side_that_is_preconditioned(shape, frozen):
    along = ROWS if shape[0] <= shape[1] else COLUMNS
    assert moved_where_frozen(shape, frozen, "the loop") == (frozen is along)


@pytest.mark.parametrize("frozen", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_a_part_whose_direction_is_zeroed_by_a_hook_of_the_base_stays(shape, frozen):
    assert not moved_where_frozen(shape, frozen, "a hook of the base")


def test_a_parameter_that_replaces_another_in_a_group_costs_no_other_layer_its_curvature():
    """On a curvature step too: the others' uses were recorded before anyone could know of it."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = NGPlus(model, lr=1e-3, damping=0.1, update_every=2)
    x = torch.randn(5, 4, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    step()
    old, new = model[0].weight, nn.Parameter(model[0].weight.detach().clone())
    group = optimizer.param_groups[0]["params"]
    group[next(place for place, each in enumerate(group) if each is old)] = new
    model[0].weight = new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        assert optimizer.curvature["2.weight"].updates == 2
        step()
        assert optimizer.curvature["0.weight"].updates == 1
    assert optimizer._layers[0].weight is new


def step_privately(optimizer):
    """As opacus' DPOptimizer steps the optimizer that it is around: ``summed_grad`` holds the clipped gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.summed_grad = parameter.grad.clamp(-0.1, 0.1)
            parameter.grad = parameter.summed_grad + 0.1
    optimizer.step()


PRIVATE = {
    "mini_batch": {"curvature": "mini_batch"},
    "momentum": {"curvature": "momentum", "basis": "eigen", "base": torch.optim.AdamW},
}


def test_a_private_step_is_refused_where_the_curvature_would_be_of_other_gradients():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    before = copy.deepcopy(problem.model.state_dict())
    problem.loss(problem.model).backward()
    with pytest.raises(RuntimeError, match=r'DPOptimizer .* take curvature="mini_batch"'):
        step_privately(optimizer)
    assert all(torch.equal(each, before[name]) for name, each in problem.model.state_dict().items())


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_step_with_the_curvature_of_the_private_gradient_is_made(name):
    problem = perceptron()
    optimizer = NGPlus(problem.model, lr=0.01, update_every=1, **PRIVATE[name])
    before = copy.deepcopy(problem.model.state_dict())
    problem.loss(problem.model).backward()
    step_privately(optimizer)
    assert not torch.equal(next(iter(problem.model.state_dict().values())), next(iter(before.values())))
