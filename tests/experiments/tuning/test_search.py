import dataclasses
import math
import tomllib

import optuna
import pandas as pd
import pytest

from experiments.config.recipe import load_recipe
from experiments.errors import UserError
from experiments.tuning.search import Search
from experiments.tuning.trial import trial_recipe
from experiments.tuning.tune import pick_best, tune
from tests.experiments.cases import toy

TUNING = """
[tuning]
trials = { value = 9, source = "made up" }
epochs = { value = 4, source = "made up" }

[tuning.spaces.shared]
lr = { value = { low = 0.003, high = 3, log = true }, source = "made up" }
damping = { value = { low = 0.1, high = 3 }, source = "made up" }
"""


class KilledError(Exception):
    pass


@pytest.fixture
def path(recipes):
    path = recipes / "toy" / "tiny.toml"
    path.write_text(toy.RECIPE + TUNING)
    return path


@pytest.fixture
def recipe(path, load):
    return load()


def values(tried):
    return tried.number, tried.ended, dict(tried.settings), toy.reproducible_values(tried.run)


def test_a_trial_is_a_run_on_the_validation_split_with_the_schedule_in_miniature(recipe):
    trial = trial_recipe(recipe.override({"run.epochs": 8, "tuning.epochs": 2}), "sgd", {"lr": 0.5})
    assert (trial.run.report_split, trial.run.epochs) == ("validation", 2)
    assert trial.optimizers["sgd"].settings.lr == 0.5
    assert trial.optimizers["sgd"].schedule.max_epoch == 3 / 4
    assert trial.optimizers["sgd"].schedule.warmup_epochs == 0.5 / 4
    damping = trial_recipe(recipe, "ngplus", {}).optimizers["ngplus"].damping_schedule
    assert damping.every_epochs == pytest.approx(4 / 3)


def test_the_recipes_own_settings_are_tried_first_and_all_are_at_the_tuning_seed(recipe, options, tmp_path):
    tried = Search(recipe, "ngplus", options, tmp_path / "tuning").run(3)
    assert [each.number for each in tried] == [0, 1, 2]
    assert tried[0].settings == {"lr": 0.1, "damping": 0.5}
    for each in tried:
        assert each.run.manifest.seed == 100
        assert each.run.manifest.recipe["optimizer"]["lr"] == each.settings["lr"]
        assert 0.003 <= each.settings["lr"] <= 3
        assert float(f"{each.settings['damping']:.3g}") == each.settings["damping"]


def test_trials_that_were_run_ahead_of_their_turn_change_nothing(recipe, options, tmp_path):
    ahead = Search(recipe, "sgd", options, tmp_path / "ahead")
    for number in (3, 0, 4, 1, 2):
        ahead.run_ahead(number)
    expected = Search(recipe, "sgd", options, tmp_path / "in turn").run(7)
    assert list(map(values, ahead.run(7))) == list(map(values, expected))
    assert not list(tmp_path.rglob("*.pt"))


def test_the_next_trials_are_spread_and_the_same_for_every_optimizer(recipe, options, tmp_path):
    rates = {}
    for name in ("sgd", "ngplus"):
        tried = Search(recipe, name, options, tmp_path).run(5)
        rates[name] = [each.settings["lr"] for each in tried[1:]]
    assert rates["sgd"] == rates["ngplus"]
    quarters = [int(4 * math.log10(rate / 0.003) / 3) for rate in rates["sgd"]]
    assert sorted(quarters) == [0, 1, 2, 3]


def test_some_trials_are_stopped_and_the_best_is_one_that_was_not(recipe, options, tmp_path):
    tried = Search(recipe, "sgd", options, tmp_path / "tuning").run(9)
    stopped = [each for each in tried if each.ended == "pruned"]
    assert stopped
    for each in stopped:
        # Optuna's rule: worse, at its best, than the median of the complete trials before it at that epoch.
        last = each.run.epochs[-1].epoch
        before = [e.run for e in tried[: each.number] if e.ended == "complete"]
        medians = pd.Series([min(epoch.metric for epoch in run.epochs[1 : last + 1]) for run in before]).median()
        assert min(epoch.metric for epoch in each.run.epochs[1:]) > medians
        assert 2 <= last < 4
    whole = [each for each in tried if each.ended == "complete"]
    assert pick_best(tried).run.best_metric == min(each.run.best_metric for each in whole)


def test_a_search_that_is_interrupted_ends_with_the_same_trials(recipe, options, tmp_path, monkeypatch):
    expected = Search(recipe, "ngplus", options, tmp_path / "whole").run(7)
    options = dataclasses.replace(options, checkpoint_every_s=0.0)
    real = toy.Toy.loss
    for call in (1, 20, 3, 40):
        left = iter(range(call))

        def loss(self, model, batch, left=left):
            if next(left, None) is None:
                raise KilledError
            return real(self, model, batch)

        monkeypatch.setattr(toy.Toy, "loss", loss)
        with pytest.raises(KilledError):
            Search(recipe, "ngplus", options, tmp_path / "broken").run(7)
    monkeypatch.setattr(toy.Toy, "loss", real)
    found = Search(recipe, "ngplus", options, tmp_path / "broken").run(7)
    assert [values(each) for each in found] == [values(each) for each in expected]


@pytest.mark.parametrize("place", ["suggest_float", "report"])
def test_a_kill_between_drawing_and_training_or_after_an_epochs_record(recipe, options, tmp_path, monkeypatch, place):
    expected = Search(recipe, "sgd", options, tmp_path / "whole").run(7)
    real = getattr(optuna.Trial, place)
    for call in (1, 4):
        left = iter(range(call))

        def dies(*arguments, left=left, **named):
            if next(left, None) is None:
                raise KilledError
            return real(*arguments, **named)

        monkeypatch.setattr(optuna.Trial, place, dies)
        with pytest.raises(KilledError):
            Search(recipe, "sgd", options, tmp_path / "broken").run(7)
    monkeypatch.setattr(optuna.Trial, place, real)
    found = Search(recipe, "sgd", options, tmp_path / "broken").run(7)
    assert [values(each) for each in found] == [values(each) for each in expected]


def test_more_trials_may_be_asked_for_later(recipe, options, tmp_path):
    first = Search(recipe, "sgd", options, tmp_path / "tuning").run(2)
    more = Search(recipe, "sgd", options, tmp_path / "tuning").run(3)
    assert [values(each) for each in more[:2]] == [values(each) for each in first]
    assert len(more) == 3


def test_a_search_does_not_go_on_with_other_settings(recipe, options, tmp_path):
    Search(recipe, "sgd", options, tmp_path).run(1)
    for changed in ({"optimizers.sgd.momentum": 0.5}, {"run.target": 0.1, "optimizers.sgd.momentum": 0.5}):
        with pytest.raises(UserError, match=r"has trials with other settings: optimizer\.momentum; remove it"):
            Search(recipe.override(changed), "sgd", options, tmp_path).run(1)
    # What is tuned, and what changes no number, may have changed: the search has written the one itself.
    Search(recipe.override({"optimizers.sgd.lr": 0.5, "run.target": 0.1}), "sgd", options, tmp_path).run(1)


def test_a_trial_that_diverges_counts_and_is_never_the_best(recipe, options, tmp_path):
    broken = recipe.override({"task.poison": 2, "task.dropout": 0.0})
    tried = Search(broken, "sgd", options, tmp_path).run(2)
    assert [each.ended for each in tried] == ["diverged", "diverged"]
    with pytest.raises(UserError, match="sgd: no trial came to its end"):
        pick_best(tried)


def test_without_a_space_there_is_nothing_to_tune(load, options, tmp_path):
    with pytest.raises(UserError, match="there is no space to tune sgd in"):
        Search(load(), "sgd", options, tmp_path)


def test_the_best_settings_go_into_the_recipe_and_all_trials_into_the_csv(recipe, path, options, load, tmp_path):
    for name in ("sgd", "ngplus", "sgd"):
        best = tune(recipe, name, options, folder=tmp_path / "tuning", trials=3)
    csv = options.results_dir / "toy" / "tiny" / "tuning.csv"
    table = pd.read_csv(csv)
    settings = ["lr", "damping", "seed", "split", "epochs", "loss", "mse", "best_mse"]
    assert list(table.columns) == ["optimizer", "trial", "ended", *settings]
    assert list(table.optimizer) == ["ngplus"] * 3 + ["sgd"] * 3
    assert set(table.seed) == {100}
    assert set(table.split) == {"validation"}
    own = table[table.optimizer == "sgd"]
    assert own.best_mse.tolist() == sorted(own.best_mse)
    assert load().optimizers["sgd"].settings.lr == own.lr.iloc[0] == best.settings["lr"]
    written = tomllib.loads(path.read_text())["optimizers"]
    assert written["sgd"]["lr"]["source"] == f"tuned on the validation split at seed 100, 3 trials: {csv}"
    assert written["ngplus"]["damping"]["value"] == table[table.optimizer == "ngplus"].damping.iloc[0]
    assert written["adam"]["lr"] == {"value": 0.01, "source": "made up"}


def test_the_recipe_is_left_alone_where_asked(recipe, path, options, tmp_path):
    before = path.read_text()
    tune(recipe, "sgd", options, folder=tmp_path / "tuning", trials=2, write=False)
    assert path.read_text() == before


def test_trials_recorded_without_numbers_keep_their_place(recipe, options, tmp_path):
    csv = options.results_dir / "toy" / "tiny" / "tuning.csv"
    csv.parent.mkdir(parents=True)
    csv.write_text("optimizer,lr,seed,split,epochs,loss,mse,best_mse\nadam,0.1,100,validation,4,1.0,1.0,1.0\n")
    tune(recipe, "sgd", options, folder=tmp_path / "tuning", trials=1)
    table = pd.read_csv(csv)
    assert list(table.columns) == [
        "optimizer",
        "trial",
        "ended",
        "lr",
        "seed",
        "split",
        "epochs",
        "loss",
        "mse",
        "best_mse",
    ]
    assert table.lr.tolist() == [0.1, 0.1]


def test_an_element_of_a_list_is_tuned_near_one_and_written_into_the_recipe(path, options, load, tmp_path):
    where = "{ low = 0.9, high = 0.9995, log = true, complement = true }"
    path.write_text(path.read_text() + f'"betas.1" = {{ value = {where}, source = "made up" }}\n')
    tried = Search(load(), "adam", options, tmp_path / "tuning").run(7)
    seconds = [each.settings["betas.1"] for each in tried]
    assert seconds[0] == 0.999
    assert all(0.9 <= each <= 0.9995 for each in seconds)
    assert sum(each > 0.99293 for each in seconds[1:5]) == 2
    for each in tried:
        assert each.run.manifest.recipe["optimizer"]["betas"] == [0.9, each.settings["betas.1"]]
    best = tune(load(), "adam", options, folder=tmp_path / "tuning", trials=7)
    assert load().optimizers["adam"].settings.betas == (0.9, best.settings["betas.1"])
    trials = pd.read_csv(options.results_dir / "toy" / "tiny" / "tuning.csv")
    assert set(trials["betas.1"]) == set(seconds)


def test_a_length_of_a_schedule_is_tuned_as_that_of_a_whole_run(path, options, load, tmp_path):
    space = '"schedule.warmup_epochs" = { value = { low = 0.1, high = 1 }, source = "made up" }\n'
    path.write_text(path.read_text() + f"[tuning.spaces.sgd]\n{space}")
    recipe = load().override({"run.epochs": 8, "tuning.epochs": 2})
    tried = Search(recipe, "sgd", options, tmp_path / "tuning").run(2)
    assert tried[0].settings["schedule.warmup_epochs"] == 0.5
    for each in tried:
        whole = each.settings["schedule.warmup_epochs"]
        assert each.run.manifest.recipe["optimizer"]["schedule"]["warmup_epochs"] == whole / 4


def test_a_recipe_without_a_table_to_write_to_is_refused_before_any_trial(recipes, options, tmp_path):
    (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE + TUNING)
    wide = recipes / "toy" / "tiny-wide.toml"
    wide.write_text('extends = { value = "tiny", source = "x" }\n')
    with pytest.raises(UserError, match=r"tiny-wide.toml: there is no line \[optimizers.adam\], below which lr would"):
        tune(load_recipe("toy", "tiny-wide"), "adam", options, folder=tmp_path / "tuning", trials=1)
    assert not (tmp_path / "tuning").exists()
    wide.write_text(wide.read_text() + "[optimizers.adam]\n")
    best = tune(load_recipe("toy", "tiny-wide"), "adam", options, folder=tmp_path / "tuning", trials=1)
    assert load_recipe("toy", "tiny-wide").optimizers["adam"].settings.lr == best.settings["lr"]
