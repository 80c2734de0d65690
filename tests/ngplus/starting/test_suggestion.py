import gc
import random
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ngplus import NGPlus, suggest
from tests.ngplus import oracle
from tests.ngplus.cases import mlp, mlp_with_norm, points, seed_cpu


def energy(model, *shape):
    """The mean energy of one batch, as a function without arguments."""
    inputs = points(*shape, seed=1)
    return lambda: oracle.batch_loss(inputs)(model)


def classifier(seed=0):
    """A convolutional model with everything that running it changes: a batch norm, dropout, a gradient, two modes."""
    seed_cpu(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 9, 3)
    )
    images, labels = torch.randn(8, 1, 5, 5), torch.randint(3, (8,))
    return model, lambda: F.cross_entropy(model(images), labels)


def snapshot(model):
    """Everything that is to be as it was, by value and by identity."""
    values = [value.clone() for value in model.state_dict().values()]
    objects = [id(each) for each in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    hooks += [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return values, objects, modes, hooks, torch.get_rng_state(), random.getstate()


def same(before, after):
    (values, *others), (new_values, *new_others) = before, after
    equal = all(map(torch.equal, values, new_values)) and torch.equal(others[3], new_others[3])
    return equal and others[:3] == new_others[:3] and others[4] == new_others[4]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_model_is_left_exactly_as_it_was(base):
    model, loss = classifier()
    loss().backward()
    model[1].eval()
    before = snapshot(model)

    def noisy():
        random.random()
        model.train()
        return loss()

    suggest(model, noisy, base=base, lr=0.1)
    assert same(before, snapshot(model))


def test_a_model_is_left_exactly_as_it_was_after_an_error():
    model, loss = classifier()
    calls = []

    def failing():
        calls.append(None)
        loss()
        if len(calls) == 2:
            raise RuntimeError("out of data")
        return loss()

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of data"):
        suggest(model, failing)
    assert same(before, snapshot(model))


class MakesABuffer(nn.Module):
    """Fills one buffer, and registers another, when it is called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", None)

    def forward(self, x):
        self.seen = x.detach()
        self.register_buffer("later", x.detach())
        return x


def test_what_a_forward_pass_changes_is_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 6, max_norm=0.5), nn.Flatten(), MakesABuffer(), nn.Linear(18, 3))
    indices, labels = torch.randint(30, (16, 3)), torch.arange(16) % 3
    before, version = {name: value.clone() for name, value in model.state_dict().items()}, model[3].weight._version
    suggest(model, lambda: F.cross_entropy(model(indices), labels))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model[2].seen is None
    assert model[3].weight._version == version


def test_nothing_of_the_model_is_kept():
    gc.disable()
    try:
        model, loss = classifier()
        suggestion = suggest(model, loss)
        known = weakref.ref(model)
        del model, loss
        assert known() is None
        assert suggestion.settings
    finally:
        gc.enable()


def test_the_largest_eigenvalues_are_those_of_single_samples():
    model = mlp(4, 6, 3)
    suggestion = suggest(model, energy(model, 16, 4), base=torch.optim.Adam, lr=1e-3)
    samples = oracle.energy_gradients(model, points(16, 4, seed=1))
    expected = {
        matrix.weight: float(torch.linalg.eigvalsh(oracle.second_moment(gradients)).max())
        for matrix, gradients in samples.items()
    }
    assert {layer.name: layer.largest for layer in suggestion.layers} == pytest.approx(expected, rel=1e-3)


def test_half_of_the_weights_have_a_share_of_three_quarters():
    model = mlp(4, 32, 32, 3)
    suggestion = suggest(model, energy(model, 16, 4), base=torch.optim.Adam, lr=1e-3)
    damping = suggestion.settings["damping"]
    above = sum(layer.elements for layer in suggestion.layers if layer.share(damping) > 0.74)
    strictly = sum(layer.elements for layer in suggestion.layers if layer.share(damping) > 0.76)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert strictly <= whole / 2 <= above


def test_the_shares_are_those_of_the_optimizer():
    model = mlp(4, 6, 3)
    loss = energy(model, 16, 4)
    suggestion = suggest(model, loss, base=torch.optim.Adam, lr=1e-3)
    optimizer = NGPlus(model, **suggestion.settings)
    loss().backward()
    optimizer.step()
    shares = {layer.name: layer.share(suggestion.settings["damping"]) for layer in suggestion.layers}
    assert shares == pytest.approx({name: state.share() for name, state in optimizer.curvature.items()}, rel=1e-3)


def test_a_first_step_on_sgd_is_as_long_as_that_of_sgd():
    lengths = []
    for kind in ("sgd", "ngplus"):
        model = mlp(4, 6, 3)
        loss = energy(model, 16, 4)
        settings = suggest(model, loss, base=torch.optim.SGD, lr=0.05).settings
        optimizer = NGPlus(model, **settings) if kind == "ngplus" else torch.optim.SGD(model.parameters(), lr=0.05)
        weights = [model[0].weight, model[2].weight]
        before = [weight.detach().clone() for weight in weights]
        loss().backward()
        optimizer.step()
        lengths.append(
            torch.cat([(new - old).flatten() for new, old in zip(weights, before, strict=True)]).norm().item()
        )
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)  # a learning rate of two digits


def test_every_parameter_is_in_one_place():
    model = mlp_with_norm()
    model.register_parameter("unused", nn.Parameter(points(3, 3)))
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    suggestion = suggest(model, energy(model, 5, 4), base=torch.optim.Adam, lr=1e-3)
    assert [(layer.name, layer.matrix) for layer in suggestion.layers] == [("3.weight", "3×7")]
    assert suggestion.to_base == {
        "has no gradient of this loss": ("unused",),
        "is frozen": ("0.weight", "0.bias"),
        "is a vector": ("1.weight", "1.bias"),
    }


def test_a_layer_that_cannot_be_preconditioned_is_named_with_the_reason():
    model = mlp(4, 6, 3)

    loss = energy(model, 5, 4)
    penalized = lambda: loss() + model[0].weight.square().sum()  # noqa: E731 which no call of the model brings
    suggestion = suggest(model, penalized, base=torch.optim.Adam, lr=1e-3)
    (reason,) = (reason for reason, names in suggestion.to_base.items() if names == ("0.weight", "0.bias"))
    assert "not the sum of its captured uses" in reason
    assert f"since it {reason}:\n  0.weight, 0.bias" in str(suggestion)


def test_the_report_has_every_setting_and_every_layer():
    model, loss = classifier()
    suggestion = suggest(model, loss, steps=1000)
    report = str(suggestion)
    assert report.startswith("2 layers with 151 parameters are preconditioned\n")
    for name in suggestion.settings:
        assert re.search(rf"^{name} +\S+", report, flags=re.MULTILINE)
    assert re.search(r"^0\.weight +4×10 +\S+ +0\.\d\d$", report, flags=re.MULTILINE)
    assert re.search(r"^5\.weight +3×37 +\S+ +0\.\d\d$", report, flags=re.MULTILINE)
    assert suggestion.settings["update_every"] == 50


def test_a_model_whose_layers_are_mostly_without_gradient_gets_the_damping_of_the_paper():
    model = mlp(4, 32, 3)
    nn.init.zeros_(model[2].weight)
    suggestion = suggest(model, energy(model, 5, 4), base=torch.optim.Adam, lr=1e-3)
    assert suggestion.settings["damping"] == 0.16
    assert "gradient of zero" in suggestion.notes[0]


class Pair(nn.Module):
    """Two branches that see inputs of other shapes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(4, 6, 3), mlp(4, 6, 3, seed=1)

    def forward(self, first, second):
        return self.first(first).sum() + self.second(second).sum()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((6, 4), (6, 4), {"samples": "batch"}),
        ((6, 5, 4), (6, 2, 4), {"samples": "batch"}),
        ((5, 6, 4), (2, 6, 4), {"samples": "batch", "batch_dim": 1}),
        ((30, 4), (7, 4), {"samples": "rows"}),
        ((6, 5, 4), (30, 4), {"samples": "batch"}),
        ((6, 5, 4), (2, 7, 4), {"samples": "rows"}),
    ],
    ids=["rows are samples", "batch first", "time first", "atoms and pairs", "flattened", "unlike"],
)
def test_what_a_sample_is_comes_from_the_shapes(first, second, expected):
    model, inputs = Pair(), (points(*first), points(*second))
    suggestion = suggest(model, lambda: model(*inputs), base=torch.optim.Adam, lr=1e-3)
    found = {name: value for name, value in suggestion.settings.items() if name in ("samples", "batch_dim")}
    assert found == expected
    assert any("sample_index" in note for note in suggestion.notes) == (expected == {"samples": "rows"})


def test_positions_that_are_looked_up_are_no_samples():
    """As in GPT-2, whose table of positions is given (T,) or (1, T), and whose linear layers have (B, T, C)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model, tokens = transformers.GPT2LMHeadModel(config), torch.randint(20, (3, 8))
    suggestion = suggest(model, lambda: model(input_ids=tokens, labels=tokens).loss, base=torch.optim.AdamW, lr=1e-3)
    assert suggestion.settings["samples"] == "batch"
    assert suggestion.reasons["samples"] == "the layers see 3 samples, along dimension 0"
    assert {layer.name for layer in suggestion.layers} >= {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
    }


def test_a_sample_is_what_the_index_says():
    model, inputs = Pair(), (points(6, 4), points(4, 4))
    index = {"first.*": torch.tensor([0, 0, 0, 1, 1, 1]), "second.*": torch.tensor([0, 0, 1, 1])}
    options = {"base": torch.optim.Adam, "lr": 1e-3, "sample_index": index}
    suggestion = suggest(model, lambda: model(*inputs).sin() / 2, **options)
    assert suggestion.settings["samples"] == "batch"
    optimizer = NGPlus(model, **suggestion.settings)
    optimizer.sample_index = index
    (model(*inputs).sin() / 2).backward()
    optimizer.step()
    shares = {layer.name: layer.share(suggestion.settings["damping"]) for layer in suggestion.layers}
    assert shares == pytest.approx({name: state.share() for name, state in optimizer.curvature.items()}, rel=1e-3)


def test_images_are_started_on_sgd_and_all_else_on_adamw():
    model, loss = classifier()
    assert suggest(model, loss).settings["base"] is torch.optim.AdamW  # 148 of 184 weights are of the last layer
    images = torch.randn(8, 1, 5, 5)
    settings = suggest(model[0], lambda: model[0](images).square().mean()).settings
    assert (settings["base"], settings["momentum"]) == (torch.optim.SGD, 0.9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": [1]}, TypeError, "model must be an nn.Module, got list"),
        ({"loss": torch.ones(1)}, TypeError, "loss must be a function without arguments .* got Tensor"),
        ({"loss": nn.MSELoss()}, TypeError, "loss must be a function without arguments .* got MSELoss"),
        ({"loss": lambda: 1.0}, TypeError, "loss must return the loss, a tensor with one element, got float"),
        ({"loss": lambda: torch.ones(2, requires_grad=True)}, ValueError, r"one element, got one of shape \(2,\)"),
        ({"loss": lambda: torch.ones(())}, ValueError, "a tensor without a graph"),
        ({"loss": lambda: torch.ones((), requires_grad=True) * 2}, ValueError, "no gradient with respect to the model"),
        ({"loss": lambda: torch.ones((), requires_grad=True) / 0}, ValueError, "loss returned inf"),
        ({"base": "adam"}, TypeError, "base must be a torch.optim.Optimizer class, .* got 'adam'"),
        ({"base": torch.optim.RMSprop}, ValueError, "lr cannot be guessed for base=RMSprop"),
        ({"base": NGPlus, "lr": 0.1}, TypeError, "base must be what NGPlus is made around"),
        ({"model": nn.LazyLinear(3)}, ValueError, "weight has no shape yet"),
        ({"model": nn.Linear(4, 3, device="meta")}, ValueError, "weight is on the meta device"),
        ({"lr": 0.1}, ValueError, "lr=0.1 is of an optimizer: give its class as base too"),
        ({"lr": 0.0, "base": torch.optim.SGD}, ValueError, "lr must be a finite number > 0, got 0.0"),
        ({"steps": 0}, ValueError, "steps must be an integer ≥ 1 or None, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer ≥ 1 or None, got 1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_refused_by_name(arguments, error, message):
    model = mlp(4, 6, 3)
    given = {"model": model, "loss": energy(model, 5, 4), **arguments}
    with pytest.raises(error, match=message):
        suggest(**given)


def test_gradients_that_are_all_zero_are_refused():
    model = mlp(4, 6, 3)
    with pytest.raises(ValueError, match=r"0\.weight, 2\.weight: has a gradient of zero"):
        suggest(model, lambda: model(points(5, 4)).sum() * 0, base=torch.optim.Adam, lr=1e-3)


def test_a_model_of_which_nothing_can_be_captured_is_refused_with_the_reason():
    model, inputs = nn.Linear(4, 3), points(5, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no layer of the model has a curvature: weight: has a gradient that no call"):
        suggest(model, lambda: F.linear(inputs, model.weight, model.bias).sum())


def test_a_model_in_eval_mode_is_noted():
    model, loss = classifier()
    assert not any("eval mode" in note for note in suggest(model, loss).notes)
    assert any("eval mode" in note for note in suggest(model.eval(), loss).notes)


def test_a_model_without_a_supported_layer_is_refused():
    model = nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"the model has no layer that NG\+ preconditions"):
        suggest(model, lambda: model(torch.randn(5, 4)).sum())
