"""Optimizers from outside: found, their settings read from the signature, built; and what is refused."""

import textwrap
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

from experiments import plugins
from experiments.dataclass_io import SettingsError, read_settings
from experiments.errors import UserError
from experiments.optimizers.outside import load_outside
from experiments.plugins import PluginError
from ngplus import NGPlus

LION = """
import torch

class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-3, beta=0.9, steps: int = 3, mode: str | None = None, clip=lambda x: x):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()

class Closed(Lion):
    def step(self, closure):
        return closure()

class Greedy(Lion):
    def __init__(self, params, inner: torch.optim.Optimizer, lr=1e-3):
        ...

class Tuned:
    pass

def make(model, lr=0.1, **more):
    return torch.optim.SGD(model.parameters(), lr=lr, **more)

def wrong(model):
    return model

number = 3
"""


@pytest.fixture
def lion(tmp_path):
    (tmp_path / "lion.py").write_text(LION)
    return lambda name, **more: load_outside(f"./lion.py:{name}", folder=tmp_path, **more)


@pytest.fixture
def model():
    return nn.Linear(3, 2)


def settings_of(found, **table):
    return read_settings(found.settings, table, "here")


def test_settings_and_their_kinds_are_those_of_the_signature(lion):
    found = lion("Lion")
    assert [field.name for field in fields(found.settings)] == [
        "lr",
        "beta",
        "steps",
        "mode",
    ]  # no setting is a function
    assert settings_of(found, lr=1, steps=5) == found.settings(lr=1.0, steps=5)
    for table, message in (
        ({"lrr": 0.1}, "lrr = 0.1: unknown key; must be one of beta, lr, mode, steps"),
        ({"lr": "fast"}, "lr = 'fast': must be a number"),
        ({"steps": 0.5}, "steps = 0.5: must be an integer"),
        ({"beta": True}, "beta = True: must be a number"),
    ):
        with pytest.raises(SettingsError, match=message):
            settings_of(found, **table)


def test_a_class_is_made_with_parameters_and_a_function_with_the_model(lion, model):
    found = lion("Lion")
    made = found.build(model, settings_of(found, lr=0.5))
    assert (type(made).__name__, made.param_groups[0]["lr"]) == ("Lion", 0.5)
    function = lion("make", given=["momentum"])
    made = function.build(model, settings_of(function, momentum=0.5))
    assert isinstance(made, torch.optim.SGD)
    assert made.param_groups[0]["momentum"] == 0.5


def test_a_class_that_takes_the_model_gets_it(model):
    found = load_outside("ngplus:NGPlus")
    assert isinstance(found.build(model, settings_of(found, lr=0.1)), NGPlus)


def test_torchs_own_and_installed_ones_are_found_with_their_versions():
    adam, lion = load_outside("torch.optim:Adam"), load_outside("pytorch_optimizer:Lion")
    assert adam.settings().lr == 1e-3
    assert settings_of(adam, betas=[0.5, 0.6], foreach=None).betas == (0.5, 0.6)
    assert list(lion.plugin.versions) == ["pytorch-optimizer"]
    with pytest.raises(SettingsError, match="weight_dcay"):  # which its ``**kwargs`` would swallow
        settings_of(lion, weight_dcay=0.1)


def test_an_entry_point_is_found_by_its_name(monkeypatch):
    entry = EntryPoint(name="mine", value="torch.optim:SGD", group="ngplus.optimizers")
    monkeypatch.setattr(
        plugins, "_find_entry_points", lambda group, places: {"mine": entry} if group == "ngplus.optimizers" else {}
    )
    assert load_outside("mine").plugin.value is torch.optim.SGD
    with pytest.raises(PluginError, match=r"no installed package has an entry point .*; there are mine; else"):
        load_outside("yours")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tuned", "is no optimizer: must inherit from torch.optim.Optimizer, not from object"),
        ("number", "must be a class of torch.optim.Optimizer, or a function .* not a int"),
        ("Closed", r"its step\(\) needs a closure, which training does not give"),
        ("Greedy", "needs inner, which no plain value can be"),
        ("Missing", "there is no Missing in .*lion.py; e.g. Closed, Greedy, Lion, Tuned"),
    ],
)
def test_what_is_no_optimizer_is_refused(lion, name, message):
    with pytest.raises(PluginError, match=message):
        lion(name)


def test_a_function_that_returns_no_optimizer_is_refused(lion, model):
    found = lion("wrong")
    with pytest.raises(TypeError, match=r"returned a Linear: must be a torch.optim.Optimizer"):
        found.build(model, found.settings())


def test_an_import_that_fails_shows_the_end_of_its_own_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def load():\n    return 1 / 0\n\nload()\n")
    with pytest.raises(PluginError, match=r"(?s)importing .*broken.py failed:.*in load\n.*ZeroDivisionError"):
        load_outside("broken.py:Lion", folder=tmp_path)
    with pytest.raises(PluginError, match=r"there is no file .*none.py"):
        load_outside("none.py:Lion", folder=tmp_path)
    with pytest.raises(PluginError, match="there is no module no_such_package"):
        load_outside("no_such_package.part:Lion")


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "twice.py"
    for lr in (0.1, 0.2):
        path.write_text(textwrap.dedent(f"import torch\ndef make(model, lr={lr}): ..."))
        assert load_outside("twice.py:make", folder=tmp_path).settings().lr == lr


def recipe_with(load, recipes, table):
    path = recipes / "toy" / "tiny.toml"
    path.write_text(path.read_text() + textwrap.dedent(table))
    (path.parent / "lion.py").write_text(LION)
    return load()


def test_a_recipe_names_an_optimizer_from_outside(load, recipes, model):
    recipe = recipe_with(
        load,
        recipes,
        """
        [optimizers.lion]
        kind = { value = "lion.py:Lion", source = "made up" }
        lr = { value = 0.25, source = "made up" }
        """,
    )
    chosen = recipe.optimizers["lion"]
    assert chosen.entry.build(model, chosen.settings).param_groups[0]["lr"] == 0.25
    kept = recipe.manifest_settings("lion")["optimizer"]
    assert (kept["kind"], kept["lr"], kept["steps"]) == ("lion.py:Lion", 0.25, 3)


def around(base: str) -> str:
    return f"""
        [optimizers.ngplus-lion]
        lr = {{ value = 0.1, source = "made up" }}
        update_every = {{ value = 2, source = "made up" }}

        [optimizers.ngplus-lion.base]
        kind = {{ value = "{base}", source = "made up" }}
        """


def test_ngplus_goes_around_a_class_from_outside(load, recipes, model):
    recipe = recipe_with(load, recipes, around("lion.py:Lion"))
    chosen = recipe.optimizers["ngplus-lion"]
    made = chosen.entry.build(model, chosen.settings)
    assert isinstance(made, NGPlus)
    assert type(made.base).__name__ == "Lion"


def test_ngplus_goes_around_no_function(load, recipes):
    with pytest.raises(UserError, match="a base must be a class that is made with parameters"):
        recipe_with(load, recipes, around("lion.py:make"))
