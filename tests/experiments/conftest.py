import pytest

from experiments import tasks
from experiments.config import recipe
from experiments.training.run import RunOptions
from tests.experiments.cases import toy
from tests.experiments.cases.challenges import challenge, place, sign, task

__all__ = ["challenge", "load", "options", "place", "recipes", "sign", "task"]


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A recipe folder with the toy's recipe in it, and the toy among the tasks."""
    folder = tmp_path / "recipes"
    monkeypatch.setattr(recipe, "RECIPES", folder)
    monkeypatch.setitem(tasks.TASKS, "toy", toy.Toy)
    toy.install(folder)
    return folder


@pytest.fixture
def load(recipes):
    """The toy's recipe, with overrides."""
    return lambda *overrides: recipe.load_recipe("toy", "tiny", overrides=overrides)


@pytest.fixture
def options(tmp_path):
    return RunOptions(device="cpu", results_dir=tmp_path / "results")
