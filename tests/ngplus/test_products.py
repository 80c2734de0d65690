"""On a curvature step a weight's gradient is the sum of the samples' gradients, which is not computed twice."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ngplus import NGPlus
from ngplus.curvature import second_moment as module
from ngplus.curvature.gradient_sum import GradientSum
from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu

CASES = {
    "left": (partial(nn.Conv2d, 3, 4, 3), (5, 3, 9, 8)),
    "right": (partial(nn.Conv2d, 2, 20, 2), (5, 2, 9, 8)),
    "no bias": (partial(nn.Conv2d, 3, 4, 3, bias=False), (5, 3, 9, 8)),
    "groups": (partial(nn.Conv2d, 4, 6, 3, groups=2), (5, 4, 9, 8)),
    "depthwise": (partial(nn.Conv2d, 4, 4, 3, groups=4), (5, 4, 9, 8)),
    "stride, padding": (partial(nn.Conv2d, 3, 4, 3, stride=(2, 1), padding=(1, 2)), (5, 3, 9, 8)),
    "dilation": (partial(nn.Conv2d, 3, 4, 3, dilation=2), (5, 3, 9, 8)),
    "same": (partial(nn.Conv2d, 3, 4, 3, padding="same"), (5, 3, 9, 8)),
    "signal": (partial(nn.Conv1d, 3, 4, 3), (5, 3, 30)),
    "volume": (partial(nn.Conv3d, 2, 3, 2, padding=1), (5, 2, 4, 5, 3)),
    "unbatched": (partial(nn.Conv2d, 3, 4, 3), (3, 9, 8)),
    "linear": (partial(nn.Linear, 6, 5), (5, 40, 6)),
    "linear, right": (partial(nn.Linear, 4, 7), (5, 40, 4)),
    "linear, no bias": (partial(nn.Linear, 6, 5, bias=False), (5, 40, 6)),
    "linear, two dimensions of positions": (partial(nn.Linear, 6, 5), (5, 4, 10, 6)),
    "linear, few positions": (partial(nn.Linear, 6, 5), (5, 1, 6)),
    "linear, rows": (partial(nn.Linear, 6, 5), (5, 6)),
}
SUMMED = [name for name in CASES if name not in ("same", "unbatched", "linear, few positions", "linear, rows")]


@pytest.fixture
def taken(monkeypatch):
    """The sums that backward passes took."""
    found = []
    take = GradientSum.take

    def recorded(*args):
        if (total := take(*args)) is not None:
            found.append(total.clone())
        return total

    monkeypatch.setattr(GradientSum, "take", recorded)
    return found


@pytest.fixture
def formed(monkeypatch):
    """Have every sample's gradient formed, whatever costs least."""
    monkeypatch.setattr(module, "cheapest_way", lambda *_, **__: "direct")


def pair(make):
    """A layer and its copy, in float64."""
    seed_cpu(0)
    layer = make().double()
    return layer, copy.deepcopy(layer)


def optimize(model, **options):
    return NGPlus(model, lr=1e-3, damping=0.1, update_every=1, **options)


def assert_same_gradients(model, plain):
    """Also where there is none."""
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("limit", [2**24, 1], ids=["at once", "a sample at a time"])
@pytest.mark.parametrize("name", CASES)
def test_a_curvature_steps_gradients_are_those_of_a_plain_step(name, limit, formed, taken, set_tuning):
    set_tuning(curvature_chunk_cpu=limit)
    make, shape = CASES[name]
    layer, plain = pair(make)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    _optimizer = optimize(layer, batch_dim=0)
    F.relu_(layer(x)).square().mean().backward()
    F.relu(plain(other)).square().mean().backward()
    assert_same_gradients(layer, plain)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)
    assert len(taken) == (name in SUMMED)


@pytest.mark.parametrize("name", SUMMED)
def test_the_step_is_the_oracles(name, formed, taken):
    make, shape = CASES[name]
    layer, _ = pair(make)
    oracle.check(layer, torch.randn(shape, dtype=torch.float64))
    assert taken


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "eigen", "curvature": "per_sample", "sides": "both"},
        {"basis": "eigen", "curvature": "per_sample", "sides": "short"},
        {"block_size": 3},
        {"max_samples": 3},
        {"solver": "sketched", "sketch_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["left", "groups", "linear, right"])
def test_options_of_what_is_built(name, options, formed):
    make, shape = CASES[name]
    layer, plain = pair(make)
    base = {"base": torch.optim.Adam} if "basis" in options else {"damping": 0.1}
    _optimizer = NGPlus(layer, lr=1e-3, update_every=1, **base, **options)
    x = torch.randn(shape, dtype=torch.float64)
    layer(x).square().mean().backward()
    plain(x).square().mean().backward()
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize("make", [partial(nn.Conv2d, 3, 4, 3, padding=1), partial(nn.Linear, 8, 6)])
def test_second_derivatives_go_through(make, formed):
    layer, plain = pair(make)
    shape = (5, 3, 9, 8)
    gradients = []
    for each in (layer, plain):
        if each is layer:
            _optimizer = optimize(each, partial_capture="accept")
        x = torch.linspace(-1, 1, 1080, dtype=torch.float64).view(shape).requires_grad_()
        (slope,) = torch.autograd.grad(each(x).tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize("name", ["left", "linear, no bias"])
def test_a_gradient_that_a_later_hook_changes_is_that_of_what_it_returns(name, formed, taken):
    make, shape = CASES[name]
    layer, plain = pair(make)
    x = torch.randn(shape, dtype=torch.float64)
    _optimizer = optimize(layer)
    for each in (layer, plain):
        output = each(x)
        output.grad_fn.register_prehook(lambda gradients: (3 * gradients[0],))
        output.square().mean().backward()
    assert_same_gradients(layer, plain)
    assert not taken


@pytest.mark.parametrize("name", ["left", "linear"])
def test_backward_passes_through_one_graph_add_up(name, formed):
    make, shape = CASES[name]
    layer, plain = pair(make)
    x = torch.randn(shape, dtype=torch.float64)
    _optimizer = optimize(layer)
    for each in (layer, plain):
        loss = each(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        (gradient,) = torch.autograd.grad(each(x).sum(), each.weight)
        each.weight.grad += gradient
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["left", "linear"])
def test_checkpoints(name, reentrant, formed):
    make, shape = CASES[name]
    layer, plain = pair(make)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    _optimizer = optimize(layer)
    for each in (layer, plain):
        checkpoint(each, x, use_reentrant=reentrant).square().mean().backward()
    assert_same_gradients(layer, plain)


def test_a_weight_that_is_used_twice_gets_the_gradient_of_both(formed):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1).double()

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    model, plain = pair(Twice)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    _optimizer = optimize(model)
    for each in (model, plain):
        each(x).square().mean().backward()
    assert_same_gradients(model, plain)
    oracle.check(Twice(), x)


def test_a_sum_that_an_error_cut_short_is_not_taken(formed, taken, monkeypatch, set_tuning):
    """A layer that cannot be read goes to the base, with the gradient that it has."""
    set_tuning(curvature_chunk_cpu=1)
    make, shape = CASES["left"]
    layer, plain = pair(make)
    add, added = GradientSum.add_, []

    def fail(*args):
        add(*args)
        added.append(args)
        if len(added) == 3:
            raise RuntimeError("no more")

    monkeypatch.setattr(GradientSum, "add_", fail)
    x = torch.randn(shape, dtype=torch.float64)
    optimizer = optimize(layer)
    for each in (layer, plain):
        each(x).square().mean().backward()
    assert len(added) == 3
    assert not taken
    assert_same_gradients(layer, plain)
    with pytest.warns(UserWarning, match="no more"):
        optimizer.step()


def test_what_runs_without_it(formed, taken):
    """Autocast, forward-mode derivatives, `torch.func`, and models whose curvature is not of single samples."""
    make, shape = CASES["left"]
    layer, _ = pair(make)
    x = torch.randn(shape, dtype=torch.float64)
    _optimizer = optimize(layer, samples="rows")
    layer(x).square().mean().backward()
    layer, _ = pair(make)
    _optimizer = optimize(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.float()(x.float()).float().square().mean().backward()
    layer, _ = pair(make)
    _optimizer = optimize(layer)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, layer(torch.ones_like(x)) - layer(torch.zeros_like(x)))
    assert not taken


def test_wrong_arguments_raise_torchs_own_errors():
    layer, _ = pair(CASES["left"][0])
    _optimizer = optimize(layer)
    with pytest.raises(RuntimeError, match="channels"):
        layer(torch.randn(5, 2, 9, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="type"):
        layer(torch.randn(5, 3, 9, 8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 40, 6), (5, 4, 10, 6)])
def test_hooks_on_an_output_that_is_changed_in_place_do_what_they_do_without_it(shape, bias, formed, taken):
    """Of a view, which torch returns for some inputs, they do not run."""
    layer, plain = pair(partial(nn.Linear, 6, 5, bias=bias))
    x = torch.randn(shape, dtype=torch.float64)
    _optimizer = optimize(layer)
    for each in (layer, plain):
        output = each(x)
        output.register_hook(lambda gradient: 3 * gradient)
        output.tanh_().square().mean().backward()
    assert_same_gradients(layer, plain)
    assert taken


class WithBias(nn.Module):
    """A layer whose bias is made of another layer's weight."""

    def __init__(self, convolves, rows):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3) if convolves else torch.randn(8, 6))
        self.table = nn.Parameter(torch.randn(rows, 8))
        self.product = F.conv2d if convolves else F.linear

    def forward(self, x):
        return self.product(x, self.w, self.table[1])


@pytest.mark.parametrize(("convolves", "rows"), [(False, 6), (False, 4), (True, 27), (True, 4)])
def test_a_bias_that_is_another_layers_weight_has_its_own_gradient(convolves, rows):
    model, plain = pair(partial(WithBias, convolves, rows))
    x = torch.randn((8, 3, 20, 20) if convolves else (8, 200, 6), dtype=torch.float64)
    _optimizer = optimize(model)
    for each in (model, plain):
        each(x).sin().sum().backward()
    assert_same_gradients(model, plain)


class Halving(TorchFunctionMode):
    """Halves the weight of every product, as quantization in training may change it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d):
            args = (args[0], 0.5 * args[1], *args[2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["left", "linear"])
def test_a_function_mode_around_the_model_changes_the_gradient_too(name, formed):
    make, shape = CASES[name]
    layer, plain = pair(make)
    x = torch.randn(shape, dtype=torch.float64)
    _optimizer = optimize(layer)
    for each in (layer, plain):
        with Halving():
            loss = each(x).sin().sum()
        loss.backward()
    assert_same_gradients(layer, plain)


@pytest.mark.parametrize("bias", [(1, 5), (40, 5), (1, 40, 5)])
def test_a_bias_that_is_broadcast(bias, formed):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(bias))

        def forward(self, x):
            return F.linear(x, self.w, self.b)

    model, plain = pair(Shifted)
    x = torch.randn(4, 40, 6, dtype=torch.float64)
    _optimizer = optimize(model)
    for each in (model, plain):
        each(x).sin().sum().backward()
    assert_same_gradients(model, plain)


class NoGradient(torch.autograd.Function):
    """The identity, which brings no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("name", ["left", "linear", "linear, rows"])
def test_a_function_that_brings_no_gradient_leaves_none(name, formed):
    make, shape = CASES[name]
    layer, _ = pair(make)
    optimizer = optimize(layer, momentum=0.9)
    NoGradient.apply(layer(torch.randn(shape, dtype=torch.float64))).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    optimizer.step()


def test_a_first_layers_weight_may_change_before_a_second_pass(formed):
    """Torch saves no weight where the input needs no gradient, so that nothing is known to have changed."""
    layer, plain = pair(CASES["linear"][0])
    x = torch.randn(CASES["linear"][1], dtype=torch.float64)
    optimizer = optimize(layer)
    for each, step in ((layer, optimizer.step), (plain, torch.optim.SGD(plain.parameters(), 1e-3).step)):
        first, second = each(x).square().mean(), each(2 * x).square().mean()
        first.backward()
        step()
        second.backward()
    assert layer.weight.grad is not None


def test_a_weight_whose_memory_is_replaced_before_backward(formed):
    layer, plain = pair(CASES["linear"][0])
    x = torch.randn(CASES["linear"][1], dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    _optimizer = optimize(layer)
    for each, input in ((layer, x), (plain, other)):
        loss = each(input).square().mean()
        each.weight.data = 2 * each.weight.data
        loss.backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_a_function_in_a_checkpoint_saves_the_same_when_it_is_made_again(formed):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def run(self, x):
            return F.linear(x, self.layer.weight, self.layer.bias).tanh()

        def forward(self, x):
            return checkpoint(self.run, x, use_reentrant=False)

    model, plain = pair(Functional)
    x = torch.randn(4, 40, 6, dtype=torch.float64, requires_grad=True)
    _optimizer = optimize(model)
    for each in (model, plain):
        each(x).square().mean().backward()
    assert_same_gradients(model, plain)
