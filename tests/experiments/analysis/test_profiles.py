import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.analysis.comparable_runs import load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.profiles import COLUMNS, FORMS, entrants, profile, score
from tests.experiments.cases.handwritten_records import HIT_1, HIT_2, HIT_4, MISS, SCALE, TASK, write_run

TASKS = (TASK, "schnet-qm9", "dlrm-criteo")


def put(results, task, optimizer, reference, metrics, **changes):
    for seed in (1, 2, 3):
        recipe = {"task": {}, "run": {"reference": reference}, "optimizer": {}}
        write_run(results, optimizer, seed, metrics, task=task, recipe=recipe, **changes)


@pytest.fixture
def results(tmp_path):
    """NG+ is 4 and 2 times as fast and misses once; the reference is another on each task."""
    put(tmp_path, TASKS[0], "sgd", "sgd", HIT_4)
    put(tmp_path, TASKS[0], "ngplus", "sgd", HIT_1, seconds_per_epoch=4.0)
    put(tmp_path, TASKS[1], "adam", "adam", HIT_2)
    put(tmp_path, TASKS[1], "ngplus-adam", "adam", HIT_1)
    put(tmp_path, TASKS[1], "ngplus-sgd", "adam", MISS)
    put(tmp_path, TASKS[2], "adagrad", "adagrad", HIT_2)
    put(tmp_path, TASKS[2], "ngplus-adagrad", "adagrad", MISS)
    put(tmp_path, TASKS[2], "adam", "adagrad", HIT_4)
    return tmp_path


def rows(results, measure="epochs"):
    table = profile(results, TASKS, SCALE)
    return table[table.measure == measure].set_index("optimizer")


def test_speed_up_is_the_geometric_mean_over_the_tasks_that_both_reach(results):
    ngplus = rows(results).loc["ngplus"]
    assert (ngplus.tasks, ngplus.tasks_run, ngplus.tasks_reached, ngplus.speed_up_tasks) == (3, 3, 2, 2)
    assert ngplus.speed_up == pytest.approx(math.sqrt(4 * 2))
    assert 2 <= ngplus.speed_up_low <= ngplus.speed_up <= ngplus.speed_up_high <= 4
    # The miss counts as the four epochs that were followed, against two.
    assert ngplus.speed_up_restricted == pytest.approx(stats.gmean([4, 2, 0.5]))
    assert rows(results, "steps").loc["ngplus"].speed_up == ngplus.speed_up


def test_seconds_count_what_an_epoch_takes(results):
    # 4 and 8 seconds on the first task, 2 and 4 on the second.
    assert rows(results, "seconds").loc["ngplus"].speed_up == pytest.approx(math.sqrt(2 * 2))


def test_the_reference_of_a_task_has_no_speed_up_there(results):
    table = rows(results)
    assert table.loc["sgd"].speed_up == 1
    assert table.loc["adam"].speed_up == pytest.approx(stats.gmean([1, 2 / 4]))


def test_the_profile_score_is_the_area_under_the_profile(results):
    # Ratios to the fastest: NG+ 1, 1 and never; Adam not run, 2 and 2; on a fine grid of factors.
    factors = np.linspace(1, 4, 30001)
    table = rows(results)
    assert table.loc["ngplus"].profile_score == pytest.approx(2 / 3)
    expected = np.mean([np.mean([each <= factor for each in (math.inf, 2, 2)]) for factor in factors])
    assert table.loc["adam"].profile_score == pytest.approx(expected, abs=1e-4)


def test_a_factor_at_the_end_scores_nothing_and_one_is_all():
    assert score(np.array([4.0, 7.0, math.inf])) == 0
    assert score(np.array([1.0])) == 1


def test_nobody_reaches_the_target(tmp_path):
    for name in ("sgd", "ngplus"):
        put(tmp_path, TASKS[0], name, "sgd", MISS)
    table = profile(tmp_path, TASKS[:1], SCALE).set_index(["measure", "optimizer"])
    row = table.loc["epochs", "ngplus"]
    assert (row.tasks_reached, row.profile_score, row.speed_up_restricted) == (0, 0, 1)
    assert math.isnan(row.speed_up)


def test_a_task_that_the_paper_does_not_have_does_not_enter(results):
    before = profile(results, TASKS, SCALE)
    put(results, "gpt-text", "ngplus-adamw", "adamw", HIT_1)
    put(results, "gpt-text", "adamw", "adamw", HIT_4)
    pd.testing.assert_frame_equal(profile(results, (*TASKS, "gpt-text"), SCALE), before)


def test_the_files_hold_the_same_table_and_are_the_same_when_made_again(results):
    table = profile(results, TASKS, SCALE)
    paths = [results / f"profiles-{SCALE}.{suffix}" for suffix in ("csv", "svg", "png")]
    first = [path.read_bytes() for path in paths]
    profile(results, TASKS, SCALE)
    assert [path.read_bytes() for path in paths] == first
    read = pd.read_csv(paths[0])
    assert tuple(read.columns) == COLUMNS
    assert read.optimizer.tolist() == table.optimizer.tolist()


def test_who_enters_comes_in_the_order_of_the_comparison(results):
    for family in ("kfac", "lars", "muon", "seng", "shampoo", "soap"):
        put(results, TASKS[1], family, "adam", HIT_2)
    frame = summarise(load_comparable(results, TASKS[1], SCALE))
    expected = ["adam", "kfac", "lars", "muon", "ngplus", "seng", "shampoo", "soap"]
    assert list(entrants(frame)) == list(entrants(frame, FORMS)) == expected


def test_by_seconds_only_what_ran_on_the_references_device_enters(results):
    put(results, TASKS[0], "lars", "sgd", HIT_1, device="another")
    by_epochs, by_seconds = rows(results), rows(results, "seconds")
    assert (by_epochs.loc["lars"].tasks_run, by_seconds.loc["lars"].tasks_run) == (1, 0)
    assert by_epochs.loc["lars"].speed_up == 4
    assert (by_seconds.loc["lars"].profile_score, math.isnan(by_seconds.loc["lars"].speed_up)) == (0, True)
    assert by_seconds.loc["ngplus"].tasks_run == 3


def test_a_form_of_its_own_enters_where_it_was_run_on_all_tasks(results):
    """On some alone it would count as missing what nobody asked it for; but it changes who is the fastest."""
    before = rows(results)
    for task, reference in zip(TASKS[:2], ("sgd", "adam"), strict=True):
        put(results, task, "ngplus-eigen", reference, HIT_1)
    assert rows(results).profile_score.equals(before.profile_score)
    put(results, TASKS[2], "ngplus-eigen", "adagrad", HIT_1)
    after = rows(results)
    assert after.loc["ngplus-eigen"].profile_score == 1.0
    assert after.loc["adam"].profile_score < before.loc["adam"].profile_score
