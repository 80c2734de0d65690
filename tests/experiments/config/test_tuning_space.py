import pytest

from experiments.config.recipe import RECIPES, list_scales, load_recipe
from experiments.config.tuning_space import Range, join_elements
from experiments.dataclass_io import SettingsError
from experiments.tasks import TASKS
from tests.experiments.cases import toy

pytestmark = pytest.mark.usefixtures("recipes")

TUNING = """
[tuning]
trials = { value = 4, source = "made up" }

[tuning.spaces.shared]
lr = { value = { low = 0.001, high = 1, log = true }, source = "made up" }
weight_decay = { value = { low = 1e-6, high = 1e-2, log = true }, source = "made up" }
damping = { value = { low = 0.1, high = 3 }, source = "made up" }

[tuning.spaces.adam]
lr = { value = { low = 0.0001, high = 0.1, log = true }, source = "made up" }
"""
DECAY = Range(low=1e-6, high=1e-2, log=True)


@pytest.fixture
def write(recipes):
    def to_file(old: str = "", new: str = ""):
        assert old in TUNING
        (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE + TUNING.replace(old, new))

    return to_file


def test_what_is_shared_holds_for_whoever_has_it_and_the_own_space_comes_on_top(write, load):
    write()
    tuning = load().tuning
    assert (tuning.trials, tuning.epochs) == (4, 3)
    assert tuning.spaces["sgd"] == {"lr": Range(low=0.001, high=1.0, log=True), "weight_decay": DECAY}
    assert tuning.spaces["adam"] == {"lr": Range(low=0.0001, high=0.1, log=True), "weight_decay": DECAY}
    assert list(tuning.spaces["ngplus"]) == ["lr", "base.weight_decay", "damping"]
    assert list(tuning.spaces["adam"]) == ["lr", "weight_decay"]
    assert tuning.spaces["ngplus"]["damping"] == Range(low=0.1, high=3.0)


def test_without_a_table_there_is_no_tuning(load):
    assert load().tuning is None


def test_a_share_of_a_range_is_taken_of_its_logarithm_where_told():
    assert Range(low=1.0, high=9.0).interpolate(0.25) == 3.0
    assert Range(low=1.0, high=16.0, log=True).interpolate(0.25) == 2.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 4,", "value = 0,", "[tuning]: trials = 0: must be at least 1"),
        ("trials", "tries", "[tuning]: tries = 4: unknown key; must be one of epochs, spaces, trials"),
        ("spaces.adam", "spaces.adamw", "[tuning]: spaces: adamw is no optimizer here; must be one of adam, ngplus"),
        ("[tuning.spaces.adam]\nlr", "[tuning.spaces.adam]\ndamping", "spaces.adam: damping is no setting of adam"),
        (
            "low = 0.1, high = 3",
            "low = 3, high = 0.1",
            "spaces.shared.damping: low = 3.0: must be less than high = 0.1",
        ),
        ("low = 0.001", "low = 0", "spaces.shared.lr: low = 0.0: must be positive where log = true"),
        (
            "low = 0.001",
            "least = 0",
            "spaces.shared.lr: least = 0: unknown key; must be one of complement, high, log, low",
        ),
        ("value = { low = 0.1, high = 3 }", "value = 3", "spaces.shared.damping = 3: must be a table of low, high"),
    ],
)
def test_an_error_names_the_file_the_key_and_the_value(write, load, recipes, old, new, message):
    write(old, new)
    with pytest.raises(SettingsError) as error:
        load()
    assert str(recipes / "toy" / "tiny.toml") in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("task", [name for name in TASKS if (RECIPES / name).exists()])
def test_the_recipes_here_search_every_optimizers_learning_rate_over_a_decade_or_more(task):
    for scale in list_scales(task, RECIPES):
        tuning = load_recipe(task, scale, folder=RECIPES).tuning
        for space in tuning.spaces.values() if tuning else ():
            assert space["lr"].high >= 10 * space["lr"].low
            assert space["lr"].log


def test_an_element_of_a_list_and_a_length_of_a_schedule_are_searched_by_their_dotted_names(write, load):
    space = '"betas.1" = { value = { low = 0.9, high = 0.99 }, source = "x" }'
    write("[tuning.spaces.adam]", f"{space}\n[tuning.spaces.adam]")
    tuning = load().tuning
    assert tuning.spaces["adam"]["betas.1"] == Range(low=0.9, high=0.99)
    assert "betas.1" not in tuning.spaces["sgd"]


def test_of_a_complement_the_distance_from_one_is_spread():
    where = Range(low=0.9, high=0.999, log=True, complement=True)
    assert where.drawn == Range(low=0.001, high=0.1, log=True)
    assert where.interpolate(0.5) == pytest.approx(0.99)
    assert (where.interpolate(0), where.interpolate(1)) == (0.9, 0.999)
    assert where.to_drawn(where.to_drawn(0.95)) == 0.95
    with pytest.raises(ValueError, match=r"high = 1: must be less than 1"):
        Range(low=0.9, high=1, log=True, complement=True)


def test_elements_are_joined_to_the_list_that_they_are_of():
    table = {"lr": 0.1, "betas": [0.9, 0.999], "base": {"betas": (0.9, 0.98)}}
    assert join_elements(table, {"lr": 0.2, "betas.1": 0.95}) == {"lr": 0.2, "betas": [0.9, 0.95]}
    assert join_elements(table, {"betas.0": 0.8, "betas.1": 0.9}) == {"betas": [0.8, 0.9]}
    assert join_elements(table, {"base.betas.0": 0.8}) == {"base.betas": [0.8, 0.98]}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("betas", 'spaces.adam: betas is a list, [0.9, 0.999]: name an element, "betas.0" or "betas.1"'),
        ('"betas.5"', 'spaces.adam: betas.5 is no setting of adam, whose betas has "betas.0" or "betas.1"'),
    ],
)
def test_a_list_is_searched_by_its_elements_alone(write, load, key, message):
    write(
        "[tuning.spaces.adam]\nlr",
        f'[tuning.spaces.adam]\n{key} = {{ value = {{ low = 0.5, high = 0.9 }}, source = "x" }}\nlr',
    )
    with pytest.raises(SettingsError) as error:
        load()
    assert message in str(error.value)
