"""The direction (6) for Linear and convolutions of every kind, against gradients made one sample at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.ngplus import oracle
from tests.ngplus.cases import ActivatedLinear, seed_cpu

BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def stack(*layers, dtype=torch.float64):
    """Layers after each other with a nonlinearity between, so that no gradient is trivial."""
    seed_cpu(0)
    return nn.Sequential(*layers).to(dtype)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inside", "outside"), [(5, 3), (3, 7), (4, 4), (3, 4), (1, 1)])
def test_linear_of_either_side_matches_the_oracle(dtype, bias, inside, outside):
    model = stack(nn.Linear(inside, outside, bias=bias), nn.Tanh(), nn.Linear(outside, 2, bias=bias), dtype=dtype)
    oracle.check(model, torch.randn(6, inside, dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=2), st.booleans())
def test_linear_of_any_shape_matches_the_oracle(inside, outside, batch, between, bias):
    model = stack(nn.Linear(inside, outside, bias=bias))
    oracle.check(model, torch.randn(batch, *between, inside, dtype=torch.float64))


@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("batch_dim", [0, 1, {"": 1}, {"0": 1, "2": 1}])
def test_linear_with_another_batch_dimension_matches_the_oracle(batch_dim, samples):
    model = stack(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    place = batch_dim if isinstance(batch_dim, int) else 1
    batch = x.shape[place]
    if samples == "rows":
        gradients = oracle.row_gradients(model, lambda m: oracle.energy(m(x)) / batch)
    else:
        parts = [x.narrow(place, i, 1) for i in range(batch)]
        gradients = oracle.sample_gradients(model, [lambda m, p=p: oracle.energy(m(p)) for p in parts])
    oracle.descend(model, lambda m: oracle.energy(m(x)) / batch, damping=0.3, batch_dim=batch_dim, samples=samples)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_batch_dim_of_a_module_holds_for_its_submodules_alone():
    """A dict sends 3-D input of one branch along dimension 1 and leaves the other at 0."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_first, self.batch_first = nn.Sequential(nn.Linear(3, 4)), nn.Linear(3, 4)

        def forward(self, x):
            return self.time_first(x.transpose(0, 1)).transpose(0, 1) * self.batch_first(x)

    seed_cpu(0)
    model = Branches().double()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    losses = [lambda m, i=i: oracle.energy(m(x[i : i + 1])) for i in range(3)]
    gradients = oracle.sample_gradients(model, losses)
    oracle.descend(model, lambda m: oracle.energy(m(x)) / 3, damping=0.3, batch_dim={"time_first": 1})
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_batch_dim_that_the_input_does_not_have_is_refused():
    model = stack(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"batch_dim=2 is no sample dimension of 0.weight's input \(2, 5, 3\)"):
        oracle.descend(model, lambda m: m(torch.randn(2, 5, 3, dtype=torch.float64)).sum(), batch_dim=2)


def test_a_vector_is_a_batch_of_one():
    model = stack(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, dtype=torch.float64)
    gradients = oracle.sample_gradients(model, [lambda m: oracle.energy(m(x))])
    oracle.descend(model, lambda m: oracle.energy(m(x)), damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@BOTH
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_in_every_padding_mode_matches_the_oracle(dtype, samples, mode, dims):
    layer = CONVOLUTIONS[dims](2, 3, 3, padding=1, padding_mode=mode)
    oracle.check(stack(layer, dtype=dtype), torch.randn(2, 2, *[4] * dims, dtype=dtype), samples=samples)


@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), "same", "valid"])
@pytest.mark.parametrize("kernel", [1, 2, (3, 1)])
def test_convolution_with_every_form_of_padding_matches_the_oracle(samples, padding, kernel):
    layer = nn.Conv2d(2, 3, kernel, padding=padding, dilation=(1, 2))
    oracle.check(stack(layer), torch.randn(2, 2, 5, 4, dtype=torch.float64), samples=samples)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    inside, outside = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    each = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride, dilation = [[draw(st.integers(1, 2)) for _ in range(dims)] for _ in range(2)]
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    mode = draw(st.sampled_from(PADDING_MODES))
    size = [
        max(d * (k - 1) + 1, p + 1) + draw(st.integers(0, 2)) for k, d, p in zip(each, dilation, padding, strict=True)
    ]
    layer = CONVOLUTIONS[dims](
        inside, outside, each, stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode
    )
    return layer.double(), torch.randn(draw(st.integers(1, 3)), inside, *size, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(["batch", "rows"]))
def test_convolution_of_any_shape_matches_the_oracle(drawn, samples):
    layer, x = drawn
    oracle.check(layer, x, samples=samples)


@BOTH
@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_depthwise_convolution_has_one_matrix_a_channel(dtype, samples):
    model = stack(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Tanh(), nn.Conv2d(8, 2, 1), dtype=dtype)
    x = torch.randn(3, 4, 4, 4, dtype=dtype)
    optimizer = oracle.check(
        model, x, samples=samples, damping=3.0
    )  # at 0.3 one seed in seven rounds by more than 1e-5
    shape = optimizer.curvature["0.weight"].shape
    assert (shape.groups, shape.rows, shape.columns) == (4, 2, 10)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU(inplace=True)])
def test_convolution_without_a_batch_dimension_is_a_batch_of_one(activation):
    model = stack(nn.Conv2d(2, 3, 2), activation)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    gradients = oracle.sample_gradients(model, [lambda m: oracle.energy(m(x))])
    oracle.descend(model, lambda m: oracle.energy(m(x)), damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_convolution_in_channels_last_memory_matches_the_oracle():
    model = stack(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    oracle.check(model, x)


@BOTH
def test_linear_that_applies_its_activation_inside_matches_the_oracle(dtype):
    model = stack(ActivatedLinear(3, 5), ActivatedLinear(5, 2), dtype=dtype)
    oracle.check(model, torch.randn(5, 3, dtype=dtype))


def test_rows_of_a_linear_that_applies_its_activation_inside_match_the_oracle():
    wrapped = stack(ActivatedLinear(3, 5), ActivatedLinear(5, 2))
    plain = stack(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2), nn.SiLU())
    for target, source in zip(wrapped.parameters(), plain.parameters(), strict=True):
        target.data.copy_(source)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    oracle.check(plain, x, samples="rows")
    oracle.descend(wrapped, lambda m: oracle.energy(m(x)) / 4, damping=0.3, samples="rows")
    for target, source in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(target.grad, source.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_activation_in_place_after_a_layer_matches_the_oracle(activation):
    model = stack(
        nn.Conv2d(2, 4, 3), activation(inplace=True), nn.Flatten(), nn.Linear(16, 3), activation(inplace=True)
    )
    oracle.check(model, torch.randn(4, 2, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 2, 3)])
def test_activation_in_place_after_a_linear_layer_on_sequences_matches_the_oracle(shape, bias):
    """Its output is a view, which leaves the graph when it is changed."""
    x = torch.randn(*shape, dtype=torch.float64)
    for inputs in (x, x.mT.contiguous().mT):
        model = stack(nn.Linear(3, 5, bias=bias), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 2))
        assert len(oracle.check(model, inputs).curvature) == 2


def test_rows_before_an_activation_in_place_are_those_before_one_that_is_not():
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    models = [stack(nn.Linear(3, 5), nn.SiLU(inplace=inplace), nn.Linear(5, 2)) for inplace in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        oracle.descend(model, oracle.batch_loss(x), samples="rows")
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 2), nn.Conv2d(2, 3, 2), nn.Linear(4, 3)])
def test_activation_in_place_after_a_layer_without_a_batch_dimension_matches_the_oracle(layer):
    x = torch.randn((2, *(4,) * (layer.weight.dim() - 2)) if layer.weight.dim() > 2 else (4,), dtype=torch.float64)
    model = stack(layer, nn.ReLU(inplace=True))
    gradients = oracle.sample_gradients(model, [lambda m: oracle.energy(m(x))])
    oracle.descend(model, lambda m: oracle.energy(m(x)), damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_parameters_outside_supported_layers_reach_the_base_unchanged():
    model = stack(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = oracle.copy.deepcopy(model)
    (oracle.energy(plain(x)) / 5).backward()
    oracle.check(model, x)
    for name in ("1.weight", "1.bias", "2.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)


class SharedBias(nn.Module):
    """Two layers that add one bias, and a third whose bias is its own."""

    def __init__(self, inside, outside):
        super().__init__()
        seed_cpu(0)
        self.one, self.other = nn.Linear(inside, outside), nn.Linear(inside, outside)
        self.other.bias = self.one.bias
        self.last = nn.Linear(outside, 2)
        self.double()

    def forward(self, x):
        return self.last((self.one(x) + 2 * self.other(x.tanh())).tanh())


@pytest.mark.parametrize("solver", ["dense", "low_rank"])
@pytest.mark.parametrize(("inside", "outside"), [(5, 3), (3, 9)])
def test_a_bias_that_layers_of_different_weights_share_goes_to_the_base(inside, outside, solver):
    model = SharedBias(inside, outside)
    x = torch.randn(4, inside, dtype=torch.float64)
    samples = oracle.sample_gradients(model, oracle.sample_losses(x))
    whole = {oracle.Matrix("last.weight", "last.bias"): samples[oracle.Matrix("last.weight", "last.bias")]}
    weights = {
        oracle.Matrix(matrix.weight): [G[:, :, :-1] for G in gradients]
        for matrix, gradients in samples.items()
        if matrix.weight != "last.weight"
    }
    oracle.descend(model, oracle.batch_loss(x), damping=0.3, solver=solver)
    assert oracle.error(model, oracle.directions(weights | whole, 0.3)) <= 1e-10
    bias = sum(samples[oracle.Matrix("one.weight", "one.bias")])[0, :, -1] / 4
    torch.testing.assert_close(model.one.bias.grad, bias, rtol=1e-11, atol=1e-12)


def test_weight_norm_goes_to_the_base_with_the_option_for_it():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = stack(layer, nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"does not precondition 0\.parametrizations\.weight\.original1 \(ParametrizationList\)"
    ):
        optimizer = oracle.descend(model, lambda m: oracle.energy(m(x)) / 5, function_fallback="base")
    assert list(optimizer.curvature) == ["2.weight"]
