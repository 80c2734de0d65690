import pytest

from experiments.errors import UserError
from experiments.estimate import check, estimate_table
from experiments.estimate.check import Case, compare
from experiments.estimate.estimating import Options, estimate


def test_every_optimizer_of_the_recipe_has_a_row_and_what_was_assumed_is_said(load, tmp_path, capsys):
    found = estimate(load(), None, Options(device="cpu", steps=4, rate=1e9))
    estimate_table.show(found)
    printed = capsys.readouterr().out
    for shown in ("sgd", "adam", "ngplus", "s/epoch", "Assumptions:", "loading is counted", "TFLOP/s"):
        assert shown in printed
    estimate_table.write(found, tmp_path / "made" / "estimate.csv")
    header, *rows = (tmp_path / "made" / "estimate.csv").read_text().splitlines()
    assert header.startswith("task,scale,device,optimizer,steps_per_epoch,plain_step_s")
    assert [row.split(",")[3:5] for row in rows] == [["sgd", "6"], ["adam", "6"], ["ngplus", "6"]]
    estimate_table.show(found, "csv")
    assert capsys.readouterr().out.splitlines() == [header, *rows]
    estimate_table.show(found, "markdown")
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 5


def test_a_batch_that_was_scaled_is_said(load):
    found = estimate(load(), ["sgd"], Options(device="cpu", steps=4, batch=2))
    assert any("batch of 2 instead of 8" in sentence for sentence in found.assumptions)
    assert not any("TFLOP/s" in sentence for sentence in found.assumptions)


def test_forward_and_backward_are_one_figure_for_all_optimizers(load):
    first, second, third = estimate(load(), None, Options(device="cpu", steps=4)).measured.values()
    assert first.seconds.plain.batch == second.seconds.plain.batch == third.seconds.plain.batch
    assert third.seconds.refresh.batch > 0


def test_an_unknown_optimizer_is_refused(load):
    with pytest.raises(UserError, match=r"optimizer = 'lion': not in .*; must be one of adam, ngplus, sgd"):
        estimate(load(), ["lion"], Options(device="cpu"))


@pytest.mark.parametrize(("given", "message"), [({"steps": 0}, "steps = 0"), ({"rate": -1.0}, "flops = -1.0")])
def test_an_option_out_of_range_is_refused(given, message):
    with pytest.raises(UserError, match=f"{message}: must be"):
        Options(**given)


@pytest.mark.parametrize("cpu_time", [False, True])
def test_an_estimate_is_near_what_a_run_takes(recipes, tmp_path, cpu_time):
    """The layer is wide and the batches wait, so that neither processor nor wall seconds are all overhead."""
    changes = ("task.pause=0.004", "task.hidden=3000", "optimizers.ngplus.update_every=6")
    case = Case(task="toy", scale="tiny", optimizers=("ngplus",), epochs=4, changes=changes)
    frame = compare(case, rounds=3, options=Options(device="cpu", data_dir=tmp_path, steps=18, cpu_time=cpu_time))
    assert list(frame.seconds) == ["processor" if cpu_time else "wall"]
    most = 1.6 if cpu_time else 3.0  # wall seconds are also those of what else runs on the machine
    assert frame.ratio.between(1 / most, most).all(), frame


def test_the_cases_that_are_checked_are_recipes_with_these_optimizers():
    for case in check.CASES:
        assert set(case.optimizers) <= set(case.recipe.optimizers)
        assert case.recipe.run.epochs == case.epochs
