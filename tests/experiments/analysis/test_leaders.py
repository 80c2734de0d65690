import re

import pytest

from experiments.analysis.leaders import draw, load_leaders, table
from experiments.errors import UserError
from tests.experiments.cases.handwritten_records import SCALE, TASK, write_run

BESTS = {"adam": 0.5, "sgd": 0.3, "ngplus-adam": 0.6, "ngplus-sgd": 0.9, "soap": 0.7, "muon": 0.65, "lars": 0.1}


def put(results, bests, seeds):
    """Each optimizer's best value is what is asked for, plus what its seed makes of it."""
    for optimizer, best in bests.items():
        recipe = {"task": {}, "run": {"reference": "adam"}, "optimizer": {}}
        for seed in seeds:
            noise = 0.001 * seed + 0.0001 * (seed * len(optimizer) % 3)
            write_run(results, optimizer, seed, [0.0, *([best / 2] * 3), best + noise], task=TASK, recipe=recipe)


@pytest.fixture
def found(tmp_path):
    put(tmp_path, BESTS, seeds=range(1, 7))
    return load_leaders(tmp_path, [TASK], SCALE)


def test_the_best_come_first_each_family_on_the_base_of_the_reference(found):
    assert [row.optimizer for row in found[0].rows] == ["soap", "muon", "ngplus-adam", "adam", "sgd"]
    assert (found[0].ours.optimizer, found[0].usual.optimizer) == ("ngplus-adam", "adam")


def test_a_lead_is_the_mean_of_paired_differences_with_interval_and_corrected_p(found):
    row = table(found).splitlines()[2]
    assert re.search(r"\| 0\.1\d* over `ngplus-adam` \[0\.\d+, 0\.\d+\], p = \d\.?\de-\d+ \|", row)
    assert re.search(r"\| 0\.200? over `adam` \[", row)


def test_few_seeds_show_nothing_and_are_said(tmp_path):
    put(tmp_path, BESTS, seeds=(1, 2))
    row = table(load_leaders(tmp_path, [TASK], SCALE)).splitlines()[2]
    assert "`soap` 0.702 (2), `muon`" in row
    assert "over `adam`, 2 seeds in common: not shown" in row


def test_the_best_may_be_ngplus_itself_or_the_usual_one(tmp_path):
    put(tmp_path, {"adam": 0.5, "ngplus-adam": 0.6}, seeds=range(1, 7))
    assert "| is the best |" in table(load_leaders(tmp_path, [TASK], SCALE)).splitlines()[2]
    put(tmp_path / "without", {"adam": 0.5, "sgd": 0.3}, seeds=range(1, 7))
    assert (
        table(load_leaders(tmp_path / "without", [TASK], SCALE)).splitlines()[2].endswith("| not run | is the best |")
    )


def test_the_picture_has_the_metric_of_the_five_best_alone(found):
    svg, png = draw(found[0])
    text = svg.read_text()
    assert png.stat().st_size > 10_000
    assert all(f">{name}<" in text for name in ("soap", "muon", "ngplus-adam", "adam", "sgd"))
    assert ">lars<" not in text
    assert "training loss" not in text


def test_a_task_without_runs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        load_leaders(tmp_path, [TASK], SCALE)
