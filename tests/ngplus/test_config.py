"""Every argument that cannot be right is refused by name and value, with what is allowed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ngplus import NGPlus, suggest
from tests.ngplus.cases import seed_cpu

REFUSED = {
    "update_every zero": ({"update_every": 0}, ValueError, "update_every must be an integer ≥ 1, got 0"),
    "update_every negative": ({"update_every": -3}, ValueError, "update_every must be an integer ≥ 1, got -3"),
    "update_every a fraction": ({"update_every": 2.5}, TypeError, "update_every must be an integer ≥ 1, got 2.5"),
    "update_every a flag": ({"update_every": True}, TypeError, "update_every must be an integer ≥ 1, got True"),
    "update_every none": ({"update_every": None}, TypeError, "update_every must be an integer ≥ 1, got None"),
    "block_size": ({"block_size": 0}, ValueError, "block_size must be an integer ≥ 1 or None, got 0"),
    "sketch_size": ({"sketch_size": "8"}, TypeError, "sketch_size must be an integer ≥ 1 or None, got '8'"),
    "max_samples": ({"max_samples": -1}, ValueError, "max_samples must be an integer ≥ 1 or None, got -1"),
    "lr negative": ({"lr": -0.1}, ValueError, "lr must be a finite number ≥ 0, got -0.1"),
    "lr nan": ({"lr": float("nan")}, ValueError, "lr must be a finite number ≥ 0, got nan"),
    "lr a word": ({"lr": "fast"}, TypeError, "lr must be a number ≥ 0, got 'fast'"),
    "lr a flag": ({"lr": True}, TypeError, "lr must be a number ≥ 0, got True"),
    "lr a tensor": ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a finite number ≥ 0, got -1.0"),
    "lr two numbers": ({"lr": torch.ones(2)}, TypeError, "lr must be a number ≥ 0, got tensor([1., 1.])"),
    "damping zero": ({"damping": 0.0}, ValueError, "damping must be a finite number > 0, got 0.0"),
    "damping zero in a tensor": (
        {"damping": torch.tensor(0.0)},
        ValueError,
        "damping must be a finite number > 0, got 0.0",
    ),
    "damping complex": ({"damping": 1j}, TypeError, "damping must be a number > 0, got 1j"),
    "damping two numbers": ({"damping": np.ones(2)}, TypeError, "damping must be a number > 0, got array([1., 1.])"),
    "damping infinite": ({"damping": float("inf")}, ValueError, "damping must be a finite number > 0, got inf"),
    "damping none": ({"damping": None}, TypeError, "damping must be a number > 0, got None"),
    "ema one": ({"ema": 1.0}, ValueError, "ema must be in [0, 1), got 1.0"),
    "ema negative": ({"ema": -0.1}, ValueError, "ema must be in [0, 1), got -0.1"),
    "ema a word": ({"ema": "0.9"}, TypeError, "ema must be a number in [0, 1), got '0.9'"),
    "curvature": (
        {"curvature": "kfac"},
        ValueError,
        "curvature must be one of 'per_sample', 'mini_batch', 'momentum', got 'kfac'",
    ),
    "solver": (
        {"solver": "cg"},
        ValueError,
        "solver must be one of 'auto', 'dense', 'low_rank', 'sketched', got 'cg'",
    ),
    "samples": ({"samples": "tokens"}, ValueError, "samples must be one of 'batch', 'rows', got 'tokens'"),
    "loss_reduction": (
        {"loss_reduction": "none"},
        ValueError,
        'loss_reduction must be "mean", "sum", the number that the loss divides by, a dict of these by module name, '
        "or a function of these, got 'none'",
    ),
    "negative loss_reduction": ({"loss_reduction": -3.0}, ValueError, "a finite number ≥ 0, got -3.0"),
    "loss_reduction of no kind": ({"loss_reduction": [3]}, TypeError, "or a function of these, got [3]"),
    "loss_reduction by number": ({"loss_reduction": {0: "mean"}}, TypeError, "patterns of module names, got 0 as one"),
    "model_calls": (
        {"model_calls": "one"},
        ValueError,
        "model_calls must be one of 'separate', 'joined', 'apart', got 'one'",
    ),
    "partial_capture": (
        {"partial_capture": "no"},
        ValueError,
        "partial_capture must be one of 'base', 'accept', got 'no'",
    ),
    "damping_rule": (
        {"damping_rule": "code"},
        ValueError,
        "damping_rule must be one of 'paper', 'released', got 'code'",
    ),
    "nonfinite": ({"nonfinite": None}, ValueError, "nonfinite must be one of 'skip', 'raise', got None"),
    "batch_dim negative": ({"batch_dim": -1}, ValueError, "batch_dim must be ≥ 0, got -1"),
    "batch_dim of a module": ({"batch_dim": {"0": -1}}, ValueError, "batch_dim must be ≥ 0, got -1"),
    "batch_dim a word": (
        {"batch_dim": {"0": "first"}},
        TypeError,
        "batch_dim must be an integer ≥ 0 or a dict of them by module name, got 'first'",
    ),
    "sketched without a size": ({"solver": "sketched"}, ValueError, 'solver="sketched" needs sketch_size'),
    "a size without sketched": (
        {"sketch_size": 3},
        ValueError,
        "sketch_size=3 is for solver=\"sketched\", got solver='auto'",
    ),
    "low rank with blocks": (
        {"solver": "low_rank", "block_size": 2},
        ValueError,
        'solver="low_rank" has no blocks, got block_size=2',
    ),
    "base an instance": (
        {"base": "SGD"},
        TypeError,
        "base must be a torch.optim.Optimizer class, such as torch.optim.SGD, got 'SGD'",
    ),
    "base no optimizer": ({"base": nn.Linear}, TypeError, "base must be a torch.optim.Optimizer class"),
    "unknown option": (
        {"momentun": 0.9},
        TypeError,
        "momentun is an option of neither NGPlus nor its base SGD, which takes momentum, dampening, weight_decay",
    ),
    "option of another base": (
        {"base": torch.optim.Adam, "momentum": 0.9},
        TypeError,
        "momentum is an option of neither NGPlus nor its base Adam, which takes betas",
    ),
    "differentiable": (
        {"differentiable": True},
        ValueError,
        "differentiable=True is not supported: the preconditioned gradient is made without a graph",
    ),
    "value that the base refuses": ({"momentum": -1.0}, ValueError, "Invalid momentum value: -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error) as raised:
        NGPlus(nn.Linear(3, 2), **options)
    assert message in str(raised.value)


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), None, "1"])
def test_a_wrong_damping_of_a_group_is_refused(damping):
    model = nn.Linear(3, 2)
    with pytest.raises((TypeError, ValueError), match=f"damping of a parameter group must be .*{damping!r}"):
        NGPlus(model, params=[{"params": model.parameters(), "damping": damping}])


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), "1"])
def test_a_damping_set_out_of_range_is_refused_on_the_next_curvature_step(damping):
    model = nn.Linear(3, 2)
    optimizer = NGPlus(model, update_every=1)
    optimizer.param_groups[0]["damping"] = damping
    before = model.weight.clone()
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises((TypeError, ValueError), match="damping of the parameter group of weight must be"):
        optimizer.step()
    assert torch.equal(model.weight, before)


ONE_STEP = {"lr": 0.25, "damping": 0.5, "ema": 0.5, "update_every": 2}


def moved(**options) -> torch.Tensor:
    """The weight after two steps with ``ONE_STEP``, some of it given in another form."""
    seed_cpu(0)
    model = nn.Linear(3, 2)
    optimizer = NGPlus(model, **{**ONE_STEP, **options})
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = optimizer.state_dict()
    assert type(saved["param_groups"][0]["damping"]) is float
    return model.weight.detach()


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.float16, np.array, torch.tensor, lambda x: torch.tensor([x])]
)
@pytest.mark.parametrize("name", ["lr", "damping", "ema"])
def test_a_number_may_be_numpys_or_a_tensor(name, kind):
    assert torch.equal(moved(**{name: kind(ONE_STEP[name])}), moved())


@pytest.mark.parametrize("name", ["update_every", "block_size", "max_samples"])
def test_a_count_may_be_numpys(name):
    assert torch.equal(moved(**{name: np.int64(2)}), moved(**{name: 2}))


def test_a_rate_of_zero_moves_nothing_but_what_the_base_keeps():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    optimizer = NGPlus(model, lr=0.0, momentum=0.9)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert optimizer.state[model.weight]["momentum_buffer"].any()
    assert set(optimizer.curvature) == {"weight"}


def test_batch_dim_may_be_numpys():
    assert torch.equal(moved(batch_dim=np.int64(0)), moved(batch_dim=0))
    with pytest.raises(TypeError, match="batch_dim must be an integer"):
        moved(batch_dim=np.float64(0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_model_or_part_is_refused_by_name():
    part = torch.jit.script(nn.Linear(3, 2))
    for model, name in ((part, "the model"), (nn.Sequential(nn.Linear(2, 3), part), "1")):
        with pytest.raises(TypeError, match=f"^{name} is a torch.jit.ScriptModule"):
            NGPlus(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("options", [{"damping": 0.3}, {"base": torch.optim.Adam, "basis": "eigen"}], ids=str)
def test_a_scripted_part_without_trained_parameters_is_a_function(options):
    parts = {"activation": nn.SiLU(), "norm": nn.BatchNorm1d(4, affine=False), "frozen": nn.Linear(4, 4)}
    parts["frozen"].requires_grad_(requires_grad=False)
    plain = nn.Sequential(nn.Linear(3, 4), *parts.values(), nn.Linear(4, 2))
    scripted = nn.Sequential(*[torch.jit.script(m) if m in parts.values() else copy.deepcopy(m) for m in plain])
    x = torch.randn(8, 3)
    for model in (plain, scripted):
        optimizer = NGPlus(model, lr=0.01, update_every=1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        assert set(optimizer.curvature) == {"0.weight", "4.weight"}
    torch.testing.assert_close(scripted[0].weight, plain[0].weight)
    assert suggest(scripted, lambda: scripted(x).square().mean()).settings["damping"] > 0


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_a_group_and_a_scheduler_may_set_the_damping_to_a_number_of_any_kind(kind):
    model = nn.Linear(3, 2)
    optimizer = NGPlus(model, params=[{"params": model.parameters(), "damping": kind(0.25)}], update_every=1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.curvature["weight"].damping == 0.25
    optimizer.param_groups[0]["damping"] = kind(0.75)
    optimizer.zero_grad()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.curvature["weight"].damping == 0.75


def test_a_group_of_its_own_may_not_be_differentiable():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        NGPlus(model, params=[{"params": model.parameters(), "differentiable": True}])
    optimizer = NGPlus(model, params=model[0].parameters())
    with pytest.raises(ValueError, match="differentiable=True is not supported"):
        optimizer.add_param_group({"params": model[1].parameters(), "differentiable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{}, {"curvature": "mini_batch"}])
def test_a_bare_tensor_is_no_list_of_its_rows(options):
    weight = nn.Parameter(torch.ones(4, 3, 2))
    with pytest.raises(
        TypeError, match=r"the first argument must be .* got a tensor of shape \(4, 3, 2\): put it into"
    ):
        NGPlus(weight, **options)
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"params must be .* got a tensor of shape \(2, 3\): put it into a list"):
        NGPlus(model, params=model.weight)


def test_parameters_without_a_model_need_the_mini_batch_form():
    model = nn.Linear(3, 2)
    with pytest.raises(
        TypeError,
        match=r'"per_sample" captures the uses of a model.s layers: .* got generator: give the model, .*"mini_batch"',
    ):
        NGPlus(model.parameters())
    with pytest.raises(TypeError, match=r"params is for an nn\.Module"):
        NGPlus(model.parameters(), curvature="mini_batch", params=[model.weight])


@pytest.mark.parametrize("model", [nn.LayerNorm(3), nn.Sequential(nn.BatchNorm1d(2), nn.PReLU(2))])
def test_a_model_without_a_supported_layer_is_refused(model):
    with pytest.raises(
        ValueError, match=r"no layer that NG\+ preconditions .* supported are Linear, Conv1d, .*Attention"
    ):
        NGPlus(model)


def test_a_model_whose_layers_are_not_among_the_parameters_given_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="with its weight among the parameters given"):
        NGPlus(model, params=model[1].parameters())


def test_lazy_layers_need_a_shape_first():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet: run the model once"):
        NGPlus(nn.Sequential(nn.LazyLinear(3)))


def test_layers_of_unsupported_kinds_are_named_once_with_where_they_go():
    mixed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    model = nn.ModuleDict({"mix": mixed, "out": nn.Linear(2, 1)})
    model.table = nn.Parameter(torch.zeros(3, 2))
    with pytest.warns(UserWarning, match="does not precondition") as caught:
        NGPlus(model, base=torch.optim.Adam, lr=0.1, function_fallback="base")
    assert [str(warning.message) for warning in caught] == [
        "NG+ does not precondition table (ModuleDict), mix.parametrizations.weight.original1 (ParametrizationList): "
        'function_fallback="base" is for supported modules alone; they go to Adam untouched'
    ]


def test_norms_and_frozen_layers_go_to_the_base_without_a_warning(recwarn):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.PReLU(4), nn.Bilinear(2, 2, 2))
    model[4].requires_grad_(False)
    NGPlus(model)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_dim", {"layers.0": 1}),
        ("batch_dim", {"0": 1, "encoder.*": 1}),
        ("loss_reduction", {"layers.*": 3}),
    ],
)
def test_a_name_that_fits_no_module_is_refused_with_those_that_there_are(name, value):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=rf"{name} has '(layers|encoder).*it has '', '0', '1'"):
        NGPlus(model, **{name: value})


def test_an_index_for_no_module_is_refused():
    optimizer = NGPlus(nn.Sequential(nn.Linear(6, 5), nn.Tanh()))
    optimizer.sample_index = {"1": torch.arange(3), "*": torch.arange(3)}
    with pytest.raises(ValueError, match="sample_index has 'nope'"):
        optimizer.sample_index = {"nope": torch.arange(3)}
    assert list(optimizer.sample_index) == ["1", "*"]


@pytest.mark.parametrize("given", [1, {"0": 1, "1": 1}, {"*": 1}, {"": 1}, {"*": 0, "0": 1, "1": 1}])
def test_batch_dim_takes_names_and_patterns(given):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    assert [layer.batch_dim for layer in NGPlus(model, batch_dim=given)._layers] == [1, 1]


@pytest.mark.parametrize("name", ["update_every", "ema", "curvature", "samples"])
def test_a_setting_of_all_groups_is_refused_in_one(name):
    model = nn.Linear(6, 5)
    group = {"params": [model.weight], name: 3}
    with pytest.raises(ValueError, match=f"{name}=3 of a parameter group would have no effect"):
        NGPlus(model, params=[group])
    optimizer = NGPlus(
        model,
        params=[{"params": [model.bias]}, {"params": [nn.Parameter(torch.ones(2, 2))]}, {"params": [model.weight]}],
    )
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], name: 3})


def test_integers_that_are_too_large_and_booleans_are_refused_by_name():
    model = nn.Linear(6, 5)
    for name in ("lr", "damping", "update_growth", "ema", "loss_reduction"):
        with pytest.raises(ValueError, match=name):
            NGPlus(model, **{name: 10**400})
    with pytest.raises(ValueError, match="block_size"):
        NGPlus(model, block_size=10**400)
    for value in (np.True_, torch.tensor(True)):
        with pytest.raises(ValueError, match="loss_reduction"):
            NGPlus(model, loss_reduction=value)


def test_a_group_without_a_damping_is_named_on_the_next_curvature_step():
    model = nn.Linear(6, 5)
    optimizer = NGPlus(model)
    del optimizer.param_groups[0]["damping"]
    model(torch.randn(3, 6)).sum().backward()
    with pytest.raises(TypeError, match="damping of the parameter group of weight must be a number > 0, got None"):
        optimizer.step()


def test_names_of_modules_are_strings():
    with pytest.raises(TypeError, match="batch_dim must map names of modules, or patterns of them, got 0 as one"):
        NGPlus(nn.Sequential(nn.Linear(3, 2)), batch_dim={0: 1})
