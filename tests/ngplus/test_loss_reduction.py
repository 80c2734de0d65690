"""What the loss divides by: means over fewer or over more samples than a layer sees."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplus import NGPlus
from ngplus.capture.loss_reduction import find_reduction
from tests.ngplus import oracle
from tests.ngplus.cases import mlp, seed_cpu

DAMPING = 0.05


def judge(model, gradients, loss, **options):
    oracle.descend(model, loss, damping=DAMPING, solver="dense", **options)
    return oracle.error(model, oracle.directions(gradients, DAMPING))


def ignoring(samples):
    """Inputs, targets of which most are ignored, and the gradients of those that are not."""
    model = mlp(4, 6, 3)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6, 5))
    y[:, 2:] = -100
    y[0] = -100
    if samples == "batch":
        x, y = x[:, :1], y[:, :1]
    valid = [(i, t) for i in range(6) for t in range(y.shape[1]) if y[i, t] >= 0]
    losses = [lambda m, i=i, t=t: F.cross_entropy(m(x[i, t : t + 1]), y[i, t : t + 1]) for i, t in valid]
    return model, x, y, oracle.sample_gradients(model, losses), len(valid)


@pytest.mark.parametrize("samples", ["rows", "batch"])
@pytest.mark.parametrize("given", [float, torch.tensor, lambda n: lambda: n, lambda n: {"*": n}])
def test_a_mean_over_the_targets_that_are_not_ignored(samples, given):
    model, x, y, gradients, valid = ignoring(samples)
    assert valid < y.numel()

    def loss(m):
        return F.cross_entropy(m(x).flatten(0, 1), y.flatten(), ignore_index=-100)

    assert judge(copy.deepcopy(model), gradients, loss, samples=samples) > 0.1
    assert judge(model, gradients, loss, samples=samples, loss_reduction=given(valid)) <= 1e-10


def test_sample_index_is_the_other_way_to_leave_ignored_targets_out():
    model, x, y, gradients, _ = ignoring("rows")
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, samples="rows", solver="dense")
    optimizer.sample_index = torch.where(y >= 0, torch.arange(y.numel()).view_as(y), -1)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


def test_class_weights_divide_by_their_sum():
    model, weights = mlp(4, 6, 3), torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    total = weights[y].sum()
    # Sample i counts wᵢ times among Σw.
    losses = [lambda m, i=i: weights[y[i]] * F.cross_entropy(m(x[i : i + 1]), y[i : i + 1]) for i in range(7)]
    gradients = oracle.sample_gradients(model, losses)
    moments = {
        m: sum(g @ g.mT if g.shape[1] <= g.shape[2] else g.mT @ g for g in each) / total
        for m, each in gradients.items()
    }
    expected = {m: oracle.direction(moments[m], sum(each) / total, DAMPING) for m, each in gradients.items()}
    oracle.descend(
        model, lambda m: F.cross_entropy(m(x), y, weights), damping=DAMPING, solver="dense", loss_reduction=total
    )
    assert oracle.error(model, expected) <= 1e-10


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.inlet = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.double()

    def forward(self, x):
        route = (x[:, 0] > 0.7).long()
        hidden = self.inlet(x).tanh()
        out = hidden.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            chosen = (route == number).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, expert(hidden[chosen]))
        return out


@pytest.mark.parametrize("reduction", [16, {"experts.*": 16}])
@pytest.mark.parametrize("parts", [1, 2])
def test_experts_that_get_some_of_the_samples_match_the_oracle_with_their_reduction(reduction, parts):
    model = Experts()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    losses = [lambda m, i=i: F.mse_loss(m(x[i : i + 1]), y[i : i + 1]) for i in range(16)]
    gradients = oracle.sample_gradients(model, losses)
    expected = oracle.directions(gradients, DAMPING)
    plain = copy.deepcopy(model)
    assert judge(plain, gradients, lambda m: F.mse_loss(m(x), y)) > 0.1
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, solver="dense", loss_reduction=reduction)
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (F.mse_loss(model(a), b) / parts).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


def test_a_subset_of_the_samples_stands_for_all():
    """With ``max_samples`` n/|S| times the sum over S stands for the n that the layer saw."""
    model, x = mlp(4, 6, 3), torch.randn(8, 4, dtype=torch.float64)
    gradients = oracle.energy_gradients(model, x)
    first = oracle.directions(gradients, DAMPING, used=3)
    oracle.descend(
        model,
        lambda m: oracle.energy(m(x)) / 8,
        damping=DAMPING,
        solver="dense",
        max_samples=3,
        loss_reduction=8,
    )
    assert oracle.error(model, first) <= 1e-10


def test_it_can_be_set_before_any_step_and_a_batch_without_targets_builds_nothing():
    model, x, y, gradients, valid = ignoring("rows")
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, samples="rows", solver="dense")
    assert optimizer.loss_reduction == "mean"
    optimizer.loss_reduction = torch.tensor(valid)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10
    updates = {name: state.updates for name, state in optimizer.curvature.items()}
    optimizer.zero_grad()
    optimizer.loss_reduction = 0
    F.cross_entropy(model(x).flatten(0, 1), torch.full((30,), -100), ignore_index=-100, reduction="sum").backward()
    optimizer.step()
    assert {name: state.updates for name, state in optimizer.curvature.items()} == updates
    with pytest.raises(ValueError, match="a finite number ≥ 0, got -1"):
        optimizer.loss_reduction = -1
    assert optimizer.loss_reduction == 0


def test_the_first_pattern_that_fits_counts():
    value = {"experts.0": 3, "experts.*": "sum", "head": lambda: {"head": 5}}
    found = [find_reduction(value, module) for module in ("experts.0", "experts.1", "head", "inlet")]
    assert found == [3.0, "sum", 5.0, "mean"]


def test_a_function_that_returns_no_reduction_is_named():
    with pytest.raises(TypeError, match="or a function of these, got None"):
        find_reduction(lambda: None, "head")
