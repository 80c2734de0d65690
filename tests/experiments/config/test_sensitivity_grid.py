import pytest

from experiments.dataclass_io import SettingsError
from tests.experiments.cases import toy

pytestmark = pytest.mark.usefixtures("recipes")

GRIDS = """
[sensitivity]
optimizer = { value = "ngplus", source = "made up" }

[sensitivity.grids.pair]
lr = { value = [0.1, 0.3], source = "made up" }
damping = { value = [0.5, "default"], source = "made up" }

[sensitivity.grids.sketch]
solver = { value = ["sketched"], source = "made up" }
sketch_size = { value = [2, 4], source = "made up" }
weight_decay = { value = [0.1], source = "made up" }
"""


@pytest.fixture
def write(recipes):
    def to_file(old: str = "", new: str = ""):
        assert old in GRIDS
        (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE + GRIDS.replace(old, new))

    return to_file


def test_a_grid_is_every_combination_and_default_changes_nothing(write, load):
    write()
    sensitivity = load().sensitivity
    pair, sketch = sensitivity.grids
    assert (sensitivity.optimizer, sensitivity.epochs) == ("ngplus", 3)
    assert (pair.name, len(pair)) == ("pair", 4)
    assert pair.cells() == [{"lr": 0.1, "damping": 0.5}, {"lr": 0.1}, {"lr": 0.3, "damping": 0.5}, {"lr": 0.3}]
    sketched = {"solver": "sketched", "base.weight_decay": 0.1}
    assert sketch.cells() == [sketched | {"sketch_size": 2}, sketched | {"sketch_size": 4}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"ngplus"', '"lion"', "[sensitivity]: optimizer = 'lion': is not in the recipe; must be one of adam, ngplus"),
        ("[0.1, 0.3]", "0.1", "grids.pair: lr = 0.1: must be a list of different values"),
        ("[0.1, 0.3]", "[0.1, 0.1]", "grids.pair: lr = [0.1, 0.1]: must be a list of different values"),
        ("lr =", "rate =", "grids.pair: rate = [0.1, 0.3]: there is no such setting"),
        ("[2, 4]", "[2]", "grids.sketch: 0 settings have several values: must be 1 or 2"),
        ("optimizer =", "of =", "[sensitivity]: of = 'ngplus': unknown key"),
    ],
)
def test_an_error_names_the_grid_the_key_and_the_value(write, load, old, new, message):
    write(old, new)
    with pytest.raises(SettingsError) as error:
        load()
    assert message in str(error.value)


def test_three_settings_with_several_values_do_not_fit_a_map(write, load):
    write(
        "weight_decay = { value = [0.1]",
        'samples = { value = ["batch", "rows"], source = "x" }\nema = { value = [0.0, 0.1]',
    )
    with pytest.raises(SettingsError, match=r"grids\.sketch: 3 settings have several values: must be 1 or 2"):
        load()
