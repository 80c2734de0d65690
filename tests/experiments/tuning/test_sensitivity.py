import dataclasses

import pandas as pd
import pytest

from experiments.errors import UserError
from experiments.launch import jobs
from experiments.training.run import run
from experiments.tuning.sensitivity import measure
from tests.experiments.cases import toy

GRIDS = """
[sensitivity]
optimizer = { value = "ngplus", source = "made up" }
epochs = { value = 2, source = "made up" }

[sensitivity.grids.pair]
damping = { value = [0.7, "default"], source = "made up" }
lr = { value = [0.1, 0.3], source = "made up" }

[sensitivity.grids.rate]
damping = { value = [0.5], source = "as the recipe has it" }
lr = { value = [0.3, 0.9], source = "made up" }
"""


@pytest.fixture
def recipe(recipes, load, monkeypatch):
    (recipes / "toy" / "tiny.toml").write_text(toy.RECIPE + GRIDS)

    def here(works, **_):
        """In this process: what others do is for the pool's own tests to show."""
        failed = {}
        for work in works:
            try:
                work.run()
            except UserError as error:
                failed[work.name] = str(error)
        return failed

    monkeypatch.setattr(jobs, "run_in_processes", here)
    return load()


def test_every_cell_has_a_row_with_its_settings_and_is_run_once(recipe, options, tmp_path):
    csv = measure(recipe, options, folder=tmp_path / "grid")
    assert csv == options.results_dir / "toy" / "tiny" / "sensitivity.csv"
    table = pd.read_csv(csv)
    assert list(table.columns)[:4] == ["grid", "ended", "damping", "lr"]
    assert list(table.columns)[-3:] == ["loss", "mse", "best_mse"]
    assert table.grid.tolist() == ["pair"] * 4 + ["rate"] * 2
    assert table.lr.tolist() == [0.1, 0.3, 0.1, 0.3, 0.3, 0.9]
    assert set(table.damping.dropna()) == {0.7, 0.5}
    assert set(table.split) == {"validation"}
    assert set(table.seed) == {100}
    assert table.best_mse[3] == table.best_mse[4]
    # What the two grids share, and only that, is one run.
    assert len(list((tmp_path / "grid").glob("toy/tiny/*/toy/tiny/runs/*.jsonl"))) == 5
    for suffix in ("svg", "png"):
        assert csv.with_suffix(f".{suffix}").exists()


def test_a_cell_is_the_run_that_the_recipe_has_with_its_changes(recipe, options, tmp_path):
    table = pd.read_csv(measure(recipe, options, folder=tmp_path / "grid"))
    changed = recipe.override(
        {
            "run.epochs": 2,
            "run.report_split": "validation",
            "optimizers.ngplus.lr": 0.9,
            "optimizers.ngplus.damping_schedule.every_epochs": 2 / 3,
        }
    )
    own = run(changed, "ngplus", 100, dataclasses.replace(options, results_dir=tmp_path / "alone"))
    assert table.best_mse.iloc[-1] == pytest.approx(own.best_metric, rel=1e-5)


def test_what_is_finished_is_not_run_again(recipe, options, tmp_path):
    csv = measure(recipe, options, folder=tmp_path / "grid")
    before = csv.read_bytes()
    records = sorted((tmp_path / "grid").glob("toy/tiny/*/toy/tiny/runs/*.jsonl"))
    times = [record.stat().st_mtime_ns for record in records]
    records[2].unlink()
    assert measure(recipe, options, folder=tmp_path / "grid").read_bytes() == before
    assert [a == record.stat().st_mtime_ns for a, record in zip(times, records, strict=True)].count(False) == 1


def test_one_grid_alone_leaves_the_rows_of_the_others(recipe, options, tmp_path):
    whole = pd.read_csv(measure(recipe, options, folder=tmp_path / "grid"))
    measure(recipe, options, folder=tmp_path / "elsewhere", names=["pair"])
    csv = measure(recipe, options, folder=tmp_path / "elsewhere", names=["pair"])
    pd.testing.assert_frame_equal(pd.read_csv(csv), whole)
    csv.unlink()
    assert set(pd.read_csv(measure(recipe, options, folder=tmp_path / "grid", names=["rate"])).grid) == {"rate"}
    pd.testing.assert_frame_equal(
        pd.read_csv(measure(recipe, options, folder=tmp_path / "grid", names=["pair"])), whole
    )
    with pytest.raises(UserError, match=r"grid = 'rates': is not in .*; .*rate"):
        measure(recipe, options, folder=tmp_path / "grid", names=["rate", "rates"])


def test_a_cell_that_fails_leaves_its_row_out_and_the_exit_status_says_so(recipe, recipes, options, tmp_path, capsys):
    path = recipes / "toy" / "tiny.toml"
    path.write_text(path.read_text().replace("[0.3, 0.9]", "[0.3, -0.9]"))
    with pytest.raises(SystemExit) as exit_:
        measure(recipe.override({}), options, folder=tmp_path / "grid")
    assert exit_.value.code == 1
    assert "optimizers.ngplus.lr=-0.9" in capsys.readouterr().err
    assert len(pd.read_csv(options.results_dir / "toy" / "tiny" / "sensitivity.csv")) == 5


def test_an_interrupted_cell_has_no_row_and_goes_on(recipe, options, tmp_path, monkeypatch):
    expected = pd.read_csv(measure(recipe, options, folder=tmp_path / "whole"))
    real, left = toy.Toy.loss, iter(range(20))  # twelve steps a run

    def interrupted(self, model, batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, model, batch)

    monkeypatch.setattr(toy.Toy, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(recipe, options, folder=tmp_path / "grid")
    csv = options.results_dir / "toy" / "tiny" / "sensitivity.csv"
    assert len(pd.read_csv(csv)) == 1
    monkeypatch.setattr(toy.Toy, "loss", real)
    pd.testing.assert_frame_equal(pd.read_csv(measure(recipe, options, folder=tmp_path / "grid")), expected)


def test_without_a_grid_there_is_nothing_to_run(recipe, options, tmp_path):
    with pytest.raises(UserError, match=r"has no table \[sensitivity\]"):
        measure(dataclasses.replace(recipe, sensitivity=None), options, folder=tmp_path / "grid")
