import pytest

from experiments.config.recipe import RECIPES, list_scales, load_recipe
from experiments.dataclass_io import SettingsError, read_settings
from experiments.errors import UserError
from experiments.optimizers.registry import NGPlusSettings, SGDBase
from experiments.optimizers.schedule_settings import Constant, Cosine, Exponential
from experiments.tasks import TASKS
from tests.experiments.cases import toy

pytestmark = pytest.mark.usefixtures("recipes")

SHIPPED = sorted(RECIPES.glob("*/*.toml"))


def changed(recipes, old: str, new: str):
    assert old in toy.RECIPE
    (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE.replace(old, new))


def test_every_value_is_read_with_its_source(load):
    recipe = load()
    assert recipe.task_settings == {"batch_size": 8, "dropout": 0.1}
    assert (recipe.run.epochs, recipe.run.seeds, recipe.run.target) == (3, (0, 1), 0.5)
    assert list(recipe.optimizers) == ["sgd", "adam", "ngplus"]
    assert recipe.optimizers["sgd"].schedule == Cosine(max_epoch=3.0, warmup_epochs=0.5)
    ngplus = recipe.optimizers["ngplus"]
    assert ngplus.settings == NGPlusSettings(lr=0.1, damping=0.5, update_every=4, base=SGDBase(momentum=0.9))
    assert ngplus.schedule == Constant()
    assert ngplus.damping_schedule == Exponential(rate=0.8, every_epochs=1.0)
    assert recipe.sources["optimizers.ngplus.damping_schedule.rate"] == "made up"


def test_a_value_given_on_the_command_line_replaces_the_files_and_says_so(load):
    recipe = load("optimizers.sgd.lr=0.25", "run.report_split=validation")
    assert recipe.optimizers["sgd"].settings.lr == 0.25
    assert recipe.run.report_split == "validation"
    assert recipe.sources["optimizers.sgd.lr"] == "given on the command line"


def test_the_settings_in_full_hold_the_defaults_too(load):
    settings = load().manifest_settings("ngplus")
    assert settings["run"]["precision"] == "float32"
    assert settings["optimizer"]["base"] == {"kind": "sgd", "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
    assert settings["optimizer"]["damping_schedule"] == {"kind": "exponential", "rate": 0.8, "every_epochs": 1.0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{ value = 3, source = "made up" }', "3", "run.epochs = 3: has no source; must be written epochs = { value"),
        ('epochs = { value = 3, source = "made up" }', "epochs = { value = 3 }", "run.epochs = {'value': 3}: has no"),
        ('value = 3, source = "made up"', 'value = 3, source = " "', "run.epochs: source = ' ': must say where"),
        ("epochs = { value = 3,", 'epochs = { value = "3",', "[run]: epochs = '3': must be an integer"),
        ("epochs = { value = 3,", "epochs = { value = 0,", "[run]: epochs = 0: must be at least 1"),
        (
            "[run]",
            "[run]\nclip_norm = { value = 0, source = 'x' }",
            "[run]: clip_norm = 0.0: must be positive, or left",
        ),
        ("[run]", "[run]\ndecay = { value = 'all', source = 'x' }", "[run]: decay = 'all': must be one of matrices"),
        ("tuning_seed = { value = 100", "tuning_seed = { value = 1", "tuning_seed = 1: must not be one of the seeds"),
        ("value = [0, 1]", "value = [0, -4]", "[run]: seed = -4: must be from 0 to 4294967295"),
        (
            "tuning_seed = { value = 100",
            "tuning_seed = { value = 4294967296",
            "seed = 4294967296: must be from 0",
        ),
        ("[optimizers.adam]", '[optimizers."sgd-../evil"]', "name = 'sgd-../evil': must be small letters and digits"),
        ("lr = { value = 0.1,", "lr = { value = inf,", "[optimizers.sgd]: lr = inf: must be finite"),
        ("target = { value = 0.5", "target = { value = nan", "target = nan: must be finite, or must be one of ref"),
        ("[task]", "x = " + "[" * 3000, "not TOML"),
        ("value = [0, 1]", "value = [0, 0]", "[run]: seeds = [0, 0]: must be a list of different integers"),
        ("tuning_seed", "tuned_at", "[run]: tuned_at = 100: unknown key; must be one of accumulate, clip_norm"),
        (
            "target = { value = 0.5",
            'target = { value = "best"',
            "target = 'best': must be a number, or must be one of ref",
        ),
        ("[run]", "[run]\nreference = { value = 'kfac', source = 'x' }", "[run]: reference = 'kfac': there is no such"),
        ("[run]", "[running]", "running = {'epochs': 3"),
        ("[optimizers.adam]", "[optimizers.nadam]", "[optimizers]: name = 'nadam': there is no such optimizer;"),
        ("[optimizers.adam]", "[optimizers.lion]", "must be one of adagrad, adam, "),
        ("damping = { value = 0.5", 'damping = { value = "a"', "[optimizers.ngplus]: damping = 'a': must be a number"),
        ('"sgd"', '"lion"', "[optimizers.ngplus]: base: kind = 'lion': must be one of adagrad, adam, adamw, sgd"),
        ('"cosine"', '"step"', "[optimizers.sgd]: schedule: kind = 'step': must be one of constant, cosine"),
        ("max_epoch = { value = 3", "max_epoch = { value = true", "[optimizers.sgd]: schedule: max_epoch = True"),
        ("lr = { value = 0.1,", "lr = { value = -0.1,", "[optimizers.sgd]: lr = -0.1: must be positive"),
        ("[optimizers.ngplus.damping_schedule]", "[optimizers.sgd.damping_schedule]", "sgd has no damping"),
        ("[task]", "[task", "not TOML"),
    ],
)
def test_an_error_names_the_file_the_key_and_the_value(recipes, load, old, new, message):
    changed(recipes, old, new)
    with pytest.raises(SettingsError) as error:
        load()
    assert str(recipes / "toy" / "tiny.toml") in str(error.value)
    assert message in str(error.value)


def test_an_optimizers_name_may_carry_a_suffix(recipes, load):
    changed(recipes, "optimizers.ngplus", "optimizers.ngplus-rows")
    assert isinstance(load().optimizers["ngplus-rows"].settings, NGPlusSettings)


def test_an_unknown_task_or_scale_lists_what_there_is():
    with pytest.raises(SettingsError, match=r"task = 'toys': there is no such task; must be one of .*toy"):
        load_recipe("toys", "tiny")
    with pytest.raises(SettingsError, match="scale = 'huge': toy has no recipe for it; must be one of tiny"):
        load_recipe("toy", "huge")


def test_the_reference_is_the_one_named_or_sgd_or_the_first(recipes, load):
    assert load().run.reference == "sgd"
    assert load("run.reference=adam").run.reference == "adam"
    changed(recipes, "optimizers.sgd", "optimizers.lars")
    assert load().run.reference == "lars"
    assert load().manifest_settings("adam")["run"]["reference"] == "lars"


def test_a_target_may_be_the_references_best(load):
    assert load('run.target="reference best"').run.target == "reference best"


def test_a_scale_may_carry_a_suffix(recipes):
    for name in ("paper-4096", "paper-2048", "paper", "small", "notes"):
        (recipes / "toy" / f"{name}.toml").write_text(toy.RECIPE)
    assert list_scales("toy") == ["tiny", "small", "paper", "paper-2048", "paper-4096"]
    assert load_recipe("toy", "paper-2048").scale == "paper-2048"


@pytest.mark.parametrize("override", ["optimizers.sgd.lr", "=3"])
def test_an_override_that_is_no_assignment_is_refused(load, override):
    with pytest.raises(UserError, match="must be written key=value"):
        load(override)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_here_is_whole(path):
    assert path.parent.name in TASKS
    assert path.stem in list_scales(path.parent.name, RECIPES)
    recipe = load_recipe(path.parent.name, path.stem, folder=RECIPES)
    assert recipe.optimizers


def test_the_run_settings_of_a_table_can_be_read_again(load):
    recipe = load()
    assert read_settings(type(recipe.run), recipe.manifest_settings("sgd")["run"], "here") == recipe.run


def write_extending(recipes, text: str):
    (recipes / "toy" / "tiny-wide.toml").write_text(text)


def test_a_recipe_may_extend_another_scale_and_then_has_what_differs_alone(recipes):
    write_extending(
        recipes,
        """
extends = { value = "tiny", source = "the same task" }

[run]
epochs = { value = 5, source = "longer" }

[optimizers.adam]

[optimizers.ngplus.base]
momentum = { value = 0.8, source = "tuned" }

[optimizers.adam-more]
lr = { value = 0.5, source = "untuned" }
""",
    )
    recipe, whole = load_recipe("toy", "tiny-wide"), load_recipe("toy", "tiny")
    assert (recipe.run.epochs, recipe.run.seeds) == (5, whole.run.seeds)
    assert recipe.optimizers["adam"] == whole.optimizers["adam"]
    assert recipe.optimizers["ngplus"].settings == NGPlusSettings(
        lr=0.1, damping=0.5, update_every=4, base=SGDBase(momentum=0.8)
    )
    assert list(recipe.optimizers) == [*whole.optimizers, "adam-more"]
    assert (recipe.sources["run.epochs"], recipe.sources["run.seeds"]) == ("longer", "made up")
    assert recipe.override({"run.epochs": 7}).run.epochs == 7
    assert list_scales("toy", recipes) == ["tiny", "tiny-wide"]


def test_what_a_recipe_extends_may_extend_another(recipes):
    write_extending(
        recipes,
        """
extends = { value = "tiny", source = "the same task" }

[run]
epochs = { value = 5, source = "longer" }

[optimizers.adam]
lr = { value = 0.5, source = "tuned" }
""",
    )
    more = '\n[run]\nseeds = { value = [8, 9], source = "others" }\n'
    (recipes / "toy" / "tiny-more.toml").write_text('extends = { value = "tiny-wide", source = "x" }\n' + more)
    recipe, whole = load_recipe("toy", "tiny-more"), load_recipe("toy", "tiny")
    assert (recipe.run.seeds, recipe.run.epochs, recipe.optimizers["adam"].settings.lr) == ((8, 9), 5, 0.5)
    assert recipe.optimizers["sgd"] == whole.optimizers["sgd"]


GRID = """
[sensitivity]
optimizer = {{ value = "{optimizer}", source = "made up" }}

[sensitivity.grids.{name}]
lr = {{ value = [0.1, 0.2], source = "made up" }}
"""


def test_grids_of_another_optimizer_take_the_place_of_those_that_are_extended(recipes):
    (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE + GRID.format(optimizer="ngplus", name="below"))
    extending = 'extends = { value = "tiny", source = "the same task" }\n'
    write_extending(recipes, extending)
    assert load_recipe("toy", "tiny-wide").sensitivity == load_recipe("toy", "tiny").sensitivity
    write_extending(recipes, extending + GRID.format(optimizer="adam", name="own"))
    found = load_recipe("toy", "tiny-wide").sensitivity
    assert (found.optimizer, [grid.name for grid in found.grids]) == ("adam", ["own"])


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"tiny"', "extends = 'tiny': has no source; must be written with value and source"),
        ('{ value = "small", source = "x" }', "extends = 'small': there is no such recipe here; must be one of tiny"),
        (
            '{ value = "tiny-wide", source = "x" }',
            "tiny-wide.toml: extends = 'tiny-wide': that recipe extends this one; must be one of",
        ),
        (
            '{ value = "tiny-more", source = "x" }',
            "tiny-more.toml: extends = 'tiny-wide': that recipe extends this one; must be one of tiny",
        ),
        (
            '{ value = "tiny", source = "x" }\n[run]\nextends = "tiny"',
            "extends is in the table [run]: must stand above",
        ),
    ],
)
def test_what_a_recipe_extends_is_another_recipe_of_the_task(recipes, extends, message):
    write_extending(recipes, f"extends = {extends}\n")
    if "tiny-more" in extends:
        (recipes / "toy" / "tiny-more.toml").write_text('extends = { value = "tiny-wide", source = "x" }\n')
    with pytest.raises(SettingsError) as error:
        load_recipe("toy", "tiny-wide")
    assert message in str(error.value)


def test_a_file_that_is_called_otherwise_is_no_recipe(recipes):
    (recipes / "toy" / "my-tiny.toml").write_text(toy.RECIPE)
    with pytest.raises(
        SettingsError, match=r"my-tiny.toml: a recipe must be one of paper, small, tiny, or one of these"
    ):
        load_recipe("toy", "my-tiny")
