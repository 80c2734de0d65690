"""`NGPlus` as an optimizer: the step, its base, groups, schedulers, closures, layers that come and go."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from tests.ngplus import oracle
from tests.ngplus.cases import mlp, parameters_equal, points, recorded_warnings, seed_cpu, training_step

# The update ---------------------------------------------------------------------------------------------------------


def test_it_is_an_optimizer_that_others_can_use():
    optimizer = NGPlus(mlp(4, 3), lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.base, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert "NGPlus(1 layers" in repr(optimizer)


def test_a_weight_moves_by_minus_lr_times_the_direction():
    model, x = mlp(4, 6, 3), points(5, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    before = copy.deepcopy(model)
    training_step(model, NGPlus(model, lr=0.7, damping=0.3, update_every=1), x)
    for after, start in zip(model.parameters(), before.parameters(), strict=True):
        start.grad = (start - after).detach() / 0.7
    assert oracle.error(before, expected) <= 1e-10


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (torch.optim.Adam, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
        (torch.optim.AdamW, {}),
        (torch.optim.Adagrad, {"lr_decay": 0.1}),
        (torch.optim.RMSprop, {"momentum": 0.5}),
        (torch.optim.SGD, {"foreach": True, "maximize": True}),
    ],
)
def test_the_base_gets_the_directions_as_its_gradients(base, options):
    """Weight decay and moments come after preconditioning; the directions are the oracle's, step by step."""
    model, x = mlp(4, 6, 3), points(5, 4)
    plain = copy.deepcopy(model)
    by_hand = base(plain.parameters(), lr=0.05, **options)
    optimizer = NGPlus(model, base=base, lr=0.05, damping=0.3, update_every=1, **options)
    for _ in range(4):
        expected = oracle.directions(oracle.energy_gradients(plain, x), 0.3)
        for matrix, D in expected.items():
            plain.get_parameter(matrix.weight).grad = D[0, :, :-1].clone()
            plain.get_parameter(matrix.bias).grad = D[0, :, -1].clone()
        by_hand.step()
        training_step(model, optimizer, x)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_larger_damping_makes_a_shorter_step():
    lengths = []
    for damping in (0.01, 1.0, 100.0):
        model, x = mlp(4, 6, 3), points(5, 4)
        oracle.descend(model, oracle.batch_loss(x), damping=damping)
        lengths.append(sum(p.grad.norm() for p in model.parameters()))
    assert lengths[0] > lengths[1] > lengths[2]


def test_lr_may_be_a_tensor():
    model, x = mlp(4, 3), points(5, 4)
    other = copy.deepcopy(model)
    training_step(model, NGPlus(model, lr=torch.tensor(0.1), update_every=1), x)
    training_step(other, NGPlus(other, lr=0.1, update_every=1), x)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_times_are_measured_when_tracking_is_on():
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, update_every=1)
    training_step(model, optimizer, x)
    assert (optimizer.times.curvature, optimizer.times.inverse, optimizer.times.apply) == (0, 0, 0)
    optimizer.track_times()
    training_step(model, optimizer, x)
    assert min(optimizer.times.curvature, optimizer.times.inverse, optimizer.times.apply) > 0


# Groups and schedulers ----------------------------------------------------------------------------------------------


def test_groups_have_their_own_lr_weight_decay_and_damping():
    model, x = mlp(4, 6, 3), points(5, 4)
    settings = [{"lr": 0.1, "damping": 0.2, "weight_decay": 0.5}, {"lr": 0.3}]
    groups = [{"params": list(m.parameters()), **s} for m, s in zip((model[0], model[2]), settings, strict=True)]
    before = copy.deepcopy(model)
    gradients = oracle.energy_gradients(model, x)
    training_step(model, NGPlus(model, lr=9.0, damping=0.7, update_every=1, params=groups), x)
    for layer, lr, damping, decay in ((0, 0.1, 0.2, 0.5), (2, 0.3, 0.7, 0.0)):
        (matrix,) = (m for m in gradients if m.weight == f"{layer}.weight")
        direction = oracle.directions({matrix: gradients[matrix]}, damping)[matrix][0, :, :-1]
        moved = (before[layer].weight - model[layer].weight).detach()
        torch.testing.assert_close(moved, lr * (direction + decay * before[layer].weight.detach()))


def test_a_bias_in_another_group_is_still_a_column_and_one_that_is_not_trained_is_none():
    model, x = mlp(4, 3), points(5, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    other = copy.deepcopy(model)
    split = [{"params": [model[0].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]
    training_step(model, NGPlus(model, lr=1e-9, damping=0.3, update_every=1, params=split), x)
    assert oracle.error(model, expected) <= 1e-10
    optimizer = NGPlus(other, lr=1e-9, update_every=1, params=[other[0].weight])
    training_step(other, optimizer, x)
    assert optimizer.curvature["0.weight"].shape.columns == 4


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.PolynomialLR(o, 5)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_rates_that_they_set_for_the_base(name):
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=2, momentum=0.9)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    for _ in range(6):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        buffer = optimizer.state[model[0].weight].get("momentum_buffer")
        momentum = 0.0 if buffer is None else optimizer.param_groups[0]["momentum"] * buffer.clone()
        optimizer.step()
        plain.step()
        lr = plain.param_groups[0]["lr"]
        assert (optimizer.param_groups[0]["lr"], optimizer.base.param_groups[0]["lr"]) == (lr, lr)
        torch.testing.assert_close(before - model[0].weight.detach(), lr * (momentum + model[0].weight.grad))
        ours.step()
        theirs.step()


def test_reduce_on_plateau_sets_the_rate_of_the_base():
    optimizer = NGPlus(mlp(4, 3), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_group_that_is_added_later_is_preconditioned_from_the_next_step():
    model, x = mlp(4, 6, 3), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=100, params=model[0].parameters())
    training_step(model, optimizer, x, times=2)
    optimizer.add_param_group({"params": list(model[2].parameters()), "damping": 0.5})
    training_step(model, optimizer, x)
    assert list(optimizer.curvature) == ["0.weight"]
    gradients = oracle.energy_gradients(model, x)
    training_step(model, optimizer, x)
    (last,) = (m for m in gradients if m.weight == "2.weight")
    assert oracle.error(model, oracle.directions({last: gradients[last]}, 0.5)) <= 1e-7  # moved by 1e-9 since
    with pytest.raises(ValueError, match="damping of a parameter group must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "damping": 0.0})


def test_a_module_that_the_model_got_later_can_be_added():
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    training_step(model, optimizer, x)
    model.append(nn.Linear(3, 2).double())
    optimizer.add_param_group({"params": list(model[2].parameters())})
    training_step(model, optimizer, x, times=2)
    assert set(optimizer.curvature) == {"0.weight", "2.weight"}


# Closures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_makes_the_same_steps(base, set_to_none):
    model, x = mlp(4, 6, 3), points(5, 4)
    other = copy.deepcopy(model)
    optimizer = NGPlus(model, base=base, lr=0.1, update_every=2)
    plain = NGPlus(other, base=base, lr=0.1, update_every=2)

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        value = oracle.batch_loss(x)(model)
        value.backward()
        return value

    for _ in range(4):
        expected = oracle.batch_loss(x)(other)
        assert optimizer.step(closure).item() == expected.item()
        training_step(other, plain, x)
    assert parameters_equal(model, other)


def test_lbfgs_steps_on_directions_with_the_curvature_of_its_first_evaluation():
    """With a history of one and one iteration it is gradient descent along the direction, of length min(1, 1/‖D‖₁)."""
    model, x = mlp(4, 3), points(5, 4)
    before = copy.deepcopy(model)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    optimizer = NGPlus(model, base=torch.optim.LBFGS, lr=0.5, damping=0.3, update_every=1, max_iter=1)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        value = oracle.batch_loss(x)(model)
        value.backward()
        evaluations.append(value)
        return value

    optimizer.step(closure)
    (D,) = expected.values()
    scale = 0.5 * min(1.0, 1.0 / float(D.abs().sum()))
    torch.testing.assert_close((before[0].weight - model[0].weight).detach(), scale * D[0, :, :-1])
    optimizer.param_groups[0].update(max_iter=5, max_eval=9)
    optimizer.step(closure)
    assert len(evaluations) >= 3
    assert optimizer.curvature["0.weight"].updates == 2
    assert evaluations[-1] < evaluations[0]


def test_evaluations_after_the_first_leave_nothing_for_the_next_curvature_step():
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, base=torch.optim.LBFGS, lr=1e-9, damping=0.3, update_every=1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = oracle.batch_loss(x)(model)
        value.backward()
        return value

    optimizer.step(closure)
    gradients = oracle.energy_gradients(model, x)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-6


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_either_kind_keeps_curvature_and_directions_right(set_to_none):
    model, x = mlp(4, 6, 3), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    for _ in range(3):
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        direction = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in model.parameters())
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    for parameter, grad in zip(model.parameters(), direction, strict=True):
        parameter.grad = grad
    assert oracle.error(model, expected) <= 1e-6


# Layers that come and go --------------------------------------------------------------------------------------------


def test_a_frozen_weight_stays_and_its_bias_goes_to_the_base():
    model, x = mlp(4, 6, 3), points(5, 4)
    model[0].weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    oracle.batch_loss(x)(plain).backward()
    optimizer = NGPlus(model, lr=0.1, damping=0.3, update_every=1)
    before = model[0].weight.clone()
    gradients = oracle.energy_gradients(model, x)
    training_step(model, optimizer, x)
    assert torch.equal(model[0].weight, before)
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10
    assert list(optimizer.curvature) == ["2.weight"]


def test_a_frozen_bias_is_no_column():
    model, x = mlp(4, 6, 3), points(5, 4)
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    gradients = oracle.energy_gradients(model, x)
    optimizer = NGPlus(model, lr=0.1, damping=0.3, update_every=1)
    training_step(model, optimizer, x)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10
    assert torch.equal(model[0].bias, before)
    assert optimizer.curvature["0.weight"].shape.columns == 4


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_parameter_that_is_freed_later_is_preconditioned_from_the_step_after(what):
    model, x = mlp(4, 6, 3), points(5, 4)
    getattr(model[0], what).requires_grad_(False)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=100)
    training_step(model, optimizer, x, times=2)
    getattr(model[0], what).requires_grad_(True)
    training_step(model, optimizer, x, times=2)
    assert oracle.error(model, oracle.directions(oracle.energy_gradients(model, x), 0.3)) <= 1e-6


def test_a_bias_that_is_frozen_later_leaves_the_matrix():
    model, x = mlp(4, 6, 3), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=100)
    training_step(model, optimizer, x, times=2)
    model[0].bias.requires_grad_(False)
    optimizer.zero_grad()
    training_step(model, optimizer, x, times=2)
    assert optimizer.curvature["0.weight"].shape.columns == 4
    assert oracle.error(model, oracle.directions(oracle.energy_gradients(model, x), 0.3)) <= 1e-6


class Optional(nn.Module):
    """Two layers, of which the second is used on demand."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x, both=False):
        x = self.always(x).tanh()
        return self.sometimes(x) if both else x


def test_an_unused_layer_stays_as_it_is():
    model, x = Optional(), points(5, 4)
    before = copy.deepcopy(model.sometimes)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_step(model, optimizer, x, times=5)
    assert parameters_equal(model.sometimes, before)
    assert list(optimizer.curvature) == ["always.weight"]


def test_a_layer_that_is_first_used_later_gets_its_curvature_on_the_step_after():
    model, x = Optional(), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=100)
    training_step(model, optimizer, x, times=3)
    use_both = lambda m: oracle.energy(m(x, True)) / 5  # noqa: E731
    for step in range(2):
        optimizer.zero_grad()
        use_both(model).backward()
        raw = model.sometimes.weight.grad.clone()
        optimizer.step()
        assert ("sometimes.weight" in optimizer.curvature) == (step == 1)
        assert torch.equal(raw, model.sometimes.weight.grad) == (step == 0)
    losses = [lambda m, i=i: oracle.energy(m(x[i : i + 1], True)) for i in range(5)]
    expected = oracle.directions(oracle.sample_gradients(model, losses), 0.3)
    (late,) = (m for m in expected if m.weight == "sometimes.weight")
    assert oracle.error(model, {late: expected[late]}) <= 1e-6


def test_a_layer_never_used_by_the_model_is_given_up_after_its_retries_with_a_warning():
    """A weight that is used outside of every captured forward."""
    model, x = Optional(), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, update_every=100)
    caught = []
    for _ in range(8):
        optimizer.zero_grad()
        (oracle.energy(model(x)) + (x @ model.sometimes.weight).sum()).backward()
        with recorded_warnings() as now:
            optimizer.step()
        caught += now
    assert len(caught) == 1
    assert caught[0].startswith("sometimes.weight has a gradient, but in 3 steps no backward pass")
    assert not optimizer._recorder.armed


def by_hand(model, loss):
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        parameter.grad = gradient


def backward(_model, loss):
    loss.backward()


LATER = {
    "a loop of its own": (lambda m, x: F.linear(x, m.weight, m.bias), backward),
    "gradients put in by hand": (lambda m, x: m(x), by_hand),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_layer_that_is_no_longer_captured_loses_its_curvature_with_a_warning(later, set_to_none):
    model, x = nn.Linear(4, 3), points(5, 4).float()
    optimizer = NGPlus(model, lr=1e-9, update_every=2)
    forward, bring = LATER[later]
    for step in range(3):
        optimizer.zero_grad(set_to_none)
        if step == 0:
            oracle.energy(model(x)).backward()
        else:
            bring(model, oracle.energy(forward(model, x)))
        before = model.weight.grad.clone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert [str(w.message).startswith("weight has a gradient on a curvature step, but") for w in caught] == (
            [True] if step == 2 else []
        )
    assert not optimizer.curvature
    assert torch.equal(model.weight.grad, before)


def test_a_layer_that_a_curvature_step_does_not_use_keeps_its_curvature_beside_a_gradient_of_zeros():
    model = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = NGPlus(model, lr=1e-9, update_every=1)
    for used in ([0, 1], [0]):
        optimizer.zero_grad(set_to_none=False)
        sum(oracle.energy(model[i](points(5, 4).float())) for i in used).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    assert {name: state.updates for name, state in optimizer.curvature.items()} == {"0.weight": 2, "1.weight": 1}


# Small batches ------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_matches_the_oracle():
    oracle.check(mlp(4, 6, 3), points(1, 4))


@pytest.mark.parametrize("update_every", [1, 100])
def test_an_empty_batch_changes_nothing(update_every):
    """Its sum has gradients of zero; a curvature step without samples keeps what there was."""
    model, x = mlp(4, 6, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=update_every)
    training_step(model, optimizer, x)
    before, kept = copy.deepcopy(model), optimizer.curvature
    optimizer.zero_grad()
    model(x[:0]).sum().backward()
    optimizer.step()
    assert parameters_equal(model, before)
    assert all(optimizer.curvature[name] is state for name, state in kept.items())


def test_the_mean_over_an_empty_batch_is_skipped():
    model, x = mlp(4, 6, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    before = copy.deepcopy(model)
    model(x[:0]).mean().backward()
    optimizer.step()
    assert parameters_equal(model, before)
    optimizer.zero_grad()
    oracle.batch_loss(x)(model).backward()
    optimizer.step()
    assert not parameters_equal(model, before)


def test_a_step_without_any_gradient_changes_nothing():
    model = mlp(4, 3)
    before = copy.deepcopy(model)
    NGPlus(model, lr=0.1, update_every=1).step()
    assert parameters_equal(model, before)


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG, Shampoo])
def test_an_optimizer_is_released_with_its_last_reference(optimizer):
    """So that what it records does not go on until a garbage collection."""
    model = mlp(4, 6, 3)
    trained = optimizer(model, lr=0.1, update_every=1)
    for _ in range(2):
        trained.zero_grad()
        model(points(5, 4)).square().mean().backward()
        trained.step()
    reference = weakref.ref(trained)
    gc.disable()
    try:
        del trained
        assert reference() is None
    finally:
        gc.enable()
