"""NaN and Inf at every place: no parameter ever holds them, names are told, and training goes on afterwards."""

import copy

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from ngplus.capture.recorder import Recorder
from ngplus.guards.finite_check import FiniteCheck, raise_if_nonfinite, zero_where_
from tests.ngplus import oracle
from tests.ngplus.cases import mlp_with_norm, points, seed_cpu, train

NONFINITE = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


def make(**options):
    model = mlp_with_norm()
    return model, NGPlus(model, **{"lr": 0.1, "damping": 0.3, "update_every": 2, **options})


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def finite(model, optimizer):
    kept = [tensor for state in optimizer.curvature.values() for tensor in state.tensors()]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in [*model.parameters(), *kept])


def in_input(model, value):
    x = points(5, 4)
    x[1, 2] = value
    oracle.batch_loss(x)(model).backward()


def in_loss(model, value):
    (oracle.batch_loss(points(5, 4))(model) * value).backward()


def in_one_gradient(model, value):
    oracle.batch_loss(points(5, 4))(model).backward()
    model[0].weight.grad[1, 2] = value


def in_a_gradient_outside_layers(model, value):
    oracle.batch_loss(points(5, 4))(model).backward()
    model[1].bias.grad[1] = value


def in_one_sample_of_one_layer(model, value):
    """Only what comes back to the first layer's output is nonfinite, so that its gradient and its sums are."""
    handle = model[0].register_forward_hook(lambda *args: args[2].register_hook(lambda grad: grad * value) and None)
    oracle.batch_loss(points(5, 4))(model).backward()
    handle.remove()


PLACES = [in_input, in_loss, in_one_gradient, in_a_gradient_outside_layers, in_one_sample_of_one_layer]
OPTIONS = [
    {"momentum": 0.9},
    {"ema": 0.5},
    {"base": torch.optim.Adam},
    {"solver": "dense"},
    {"curvature": "mini_batch"},
]


@NONFINITE
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_with_a_nonfinite_gradient_is_a_step_of_zeros(options, at, place, value):
    model, optimizer = make(**options)
    train(model, optimizer, range(at))
    before, skipped = parameters(model), optimizer.skipped_steps
    optimizer.zero_grad()
    place(model, value)
    optimizer.step()
    assert optimizer.skipped_steps == skipped + 1
    assert all(not parameter.grad.any() for parameter in model.parameters())
    if not optimizer.base.state:
        assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))
    assert finite(model, optimizer)
    train(model, optimizer, range(3))
    assert finite(model, optimizer)
    assert set(optimizer.curvature) == {"0.weight", "3.weight"}


@NONFINITE
@pytest.mark.parametrize(("place", "names"), [
    (in_one_gradient, "0.weight"),
    (in_a_gradient_outside_layers, "1.bias"),
    (in_loss, "0.weight, 0.bias, 1.weight, 1.bias, 3.weight, 3.bias"),
])  # fmt: skip
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_raising_names_the_nonfinite_parameters_and_changes_nothing(options, place, names, value):
    model, optimizer = make(nonfinite="raise", **options)
    train(model, optimizer, range(2))
    before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    place(model, value)
    with pytest.raises(
        FloatingPointError, match=f"^the gradient of {names} holds NaN or Inf; no parameter was changed"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))
    now = optimizer.state_dict()
    names = [each["param_groups"][0]["ngplus"].pop("base") for each in (now, state)]
    assert names[0] == names[1]
    torch.testing.assert_close(now, state, rtol=0, atol=0)
    train(model, optimizer, range(2))
    assert finite(model, optimizer)


@NONFINITE
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
def test_nonfinite_sums_are_dropped_and_built_again_on_the_next_step(options, nonfinite, value, monkeypatch):
    """The gradients are fine, and so is the step: with what the layer had before."""
    model, optimizer = make(nonfinite=nonfinite, update_every=100, **options)
    spoil(monkeypatch, value)
    train(model, optimizer, range(1))
    assert not optimizer.curvature
    assert optimizer.skipped_steps == 0
    assert finite(model, optimizer)
    monkeypatch.undo()
    train(model, optimizer, range(1))
    assert set(optimizer.curvature) == {"0.weight", "3.weight"}
    assert finite(model, optimizer)


def spoil(monkeypatch, value):
    """Sums over samples come out nonfinite, in whichever form they are kept."""
    collect = Recorder.collect

    def collected(self):
        sums = collect(self)
        for statistic in sums.values():
            for tensor in (*statistic.moments, *statistic.columns):
                tensor.flatten()[0] = value
                tensor[..., 0, 0] = value
        return sums

    monkeypatch.setattr(Recorder, "collect", collected)


def test_nonfinite_sums_keep_the_earlier_curvature(monkeypatch):
    model, optimizer = make(ema=0.5)
    train(model, optimizer, range(2))
    before = optimizer.curvature
    spoil(monkeypatch, float("nan"))
    train(model, optimizer, range(1))
    assert all(optimizer.curvature[name] is state for name, state in before.items())
    assert finite(model, optimizer)


@NONFINITE
def test_a_nonfinite_inverse_never_reaches_a_parameter(value, monkeypatch):
    model, optimizer = make(solver="dense")
    spoil_inverses(monkeypatch, value)
    before = parameters(model)
    train(model, optimizer, range(1))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))
    monkeypatch.undo()
    train(model, optimizer, range(3))
    assert finite(model, optimizer)
    assert not torch.equal(parameters(model)[0], before[0])


@NONFINITE
def test_a_nonfinite_inverse_is_raised_with_its_layers_name(value, monkeypatch):
    model, optimizer = make(solver="dense", nonfinite="raise")
    spoil_inverses(monkeypatch, value)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"^the direction of 0\.weight, 0\.bias, 3\.weight, 3\.bias holds NaN"):
        train(model, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))


def spoil_inverses(monkeypatch, nonfinite):
    monkeypatch.setattr(torch, "cholesky_inverse", lambda factors: torch.full_like(factors, nonfinite))


def test_an_overflow_of_the_product_is_caught_though_gradient_and_inverse_are_finite():
    model, optimizer = make(damping=1e-4, max_samples=1)
    model.float()
    oracle.batch_loss(points(5, 4).float())(model).backward()
    optimizer.step()
    assert finite(model, optimizer)
    before = parameters(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e35
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(parameters(model), before, strict=True))


# Complex numbers ----------------------------------------------------------------------------------------------------


class Complex(nn.Module):
    """A layer, and complex numbers of one and two dimensions, one of which gets its gradient as a conjugate."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.layer = nn.Linear(4, 3)
        self.rotation = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.mixing = nn.Linear(3, 3, bias=False, dtype=torch.complex64)

    def forward(self, x):
        return self.mixing(self.layer(x) * self.rotation.conj()).abs()


def complex_optimizers():
    def mini_batch(model, **options):
        return NGPlus(model.named_parameters(), curvature="mini_batch", **options)

    return [NGPlus, mini_batch, KFAC, SENG, Shampoo]


@pytest.mark.filterwarnings("ignore:.*does not precondition mixing:UserWarning")
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("optimizer", complex_optimizers())
def test_a_complex_parameter_goes_to_the_base_unchanged(optimizer, nonfinite):
    model = Complex()
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    trained = optimizer(model, lr=0.1, update_every=1, nonfinite=nonfinite)
    for each in (model, plain):
        each(x).square().mean().backward()
    trained.step()
    for one, other in ((model.rotation, plain.rotation), (model.mixing.weight, plain.mixing.weight)):
        assert torch.equal(one.grad, other.grad)
        torch.testing.assert_close(one, other - 0.1 * other.grad)
    assert not torch.equal(model.layer.weight.grad, plain.layer.weight.grad)


def found_nonfinite(gradients):
    check = FiniteCheck()
    for gradient in gradients:
        check.add(gradient)
    return check.find_nonfinite()


@NONFINITE
def test_a_nonfinite_imaginary_part_is_found_and_zeroed(value):
    gradients = [torch.ones(2), torch.tensor([complex(1, 2), complex(3, value)])]
    gradients.append(gradients[1].conj())
    for held in (gradients[:2], gradients[::2]):
        assert found_nonfinite(held).item() is True
    zero_where_(torch.tensor(True), gradients)
    assert not any(bool(gradient.resolve_conj().any()) for gradient in gradients)


# The parts ----------------------------------------------------------------------------------------------------------


@NONFINITE
@pytest.mark.parametrize("sparse", [False, True])
def test_one_nonfinite_entry_is_found_and_all_gradients_are_zeroed(value, sparse):
    good, other = torch.ones(3), torch.ones(2, 2)
    other[1, 0] = value
    other = other.to_sparse(1) if sparse else other
    flag = found_nonfinite([good, other])
    assert flag.item() is True
    zero_where_(flag, [good, other])
    assert not good.any()
    assert not other.to_dense().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_number_of_a_dtype_is_finite(dtype):
    gradients = [torch.full((3,), torch.finfo(dtype).max, dtype=dtype), torch.empty(0, dtype=dtype)]
    assert found_nonfinite(gradients) is None
    zero_where_(torch.tensor(False), gradients)
    assert gradients[0].all()


@NONFINITE
@pytest.mark.parametrize("place", range(3))
def test_gradients_may_be_of_several_dtypes(value, place):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    gradients = [torch.full((2,), torch.finfo(dtype).max, dtype=dtype) for dtype in dtypes]
    assert found_nonfinite(gradients) is None
    gradients[place][1] = value
    assert found_nonfinite(gradients).item() is True


def test_no_gradients_need_no_check():
    assert found_nonfinite([]) is None
    assert found_nonfinite([torch.empty(0)]) is None


def test_names_are_of_parameters_with_nonfinite_gradients():
    good, bad, none = (nn.Parameter(torch.ones(2)) for _ in range(3))
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, float("inf")])
    check = FiniteCheck()
    check.add_unchecked([{"params": [good, bad, none]}])
    with pytest.raises(FloatingPointError, match=r"^the gradient of bad holds NaN or Inf"):
        raise_if_nonfinite(check, "gradient", [("good", good), ("bad", bad), ("none", none)])


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_short_vectors_are_checked_together(value, place):
    """Finite ones whose sum is not, in two dtypes, together with a matrix."""
    vectors = [torch.full((3,), torch.finfo(torch.float32).max), torch.ones(4, dtype=torch.float64), torch.ones(2)]
    if value is not None:
        vectors[place][-1] = value
    assert (found_nonfinite([*vectors, torch.ones(2, 2), torch.ones(())]) is None) == (value is None)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scalar_parameter_is_checked_together_with_biases(overflows):
    model, _ = make()
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = NGPlus(model, lr=0.1, damping=0.3)
    before = parameters(model)
    (oracle.batch_loss(points(5, 4))(model) * model.scale).backward()
    if overflows:
        model.scale.grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == overflows
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) == overflows
