import pytest

from experiments.analysis.overview import overview
from experiments.errors import UserError
from tests.experiments.cases.handwritten_records import HIT_1, HIT_2, HIT_4, MISS, SCALE, TASK, write_run

OTHER = "schnet-qm9"


def put(results, task, optimizer, metrics, seeds=(1, 2, 3)):
    for seed in seeds:
        recipe = {"task": {}, "run": {"reference": "adam"}, "optimizer": {}}
        write_run(results, optimizer, seed, metrics, task=task, recipe=recipe)


def table(results, *tasks):
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in overview(results, tasks, SCALE).splitlines()
    ]
    return head, {row[0]: row[1:] for row in rows}


@pytest.fixture
def results(tmp_path):
    """NG+ hits first on one task, where a variant of it misses; the other was run with Adam and SGD alone."""
    put(tmp_path, TASK, "adam", HIT_4)
    put(tmp_path, TASK, "ngplus-adam", HIT_1)
    put(tmp_path, TASK, "ngplus-sgd", MISS)
    put(tmp_path, OTHER, "adam", HIT_2)
    put(tmp_path, OTHER, "sgd", MISS)
    return tmp_path


def test_rows_are_optimizers_and_columns_tasks_as_they_were_asked_for(results):
    head, rows = table(results, OTHER, TASK)
    assert len(head) == 4
    assert set(rows) == {"adam", "ngplus", "sgd"}
    assert rows["ngplus"][1] == "–"
    assert rows["sgd"][2] == "–"


def test_epochs_to_the_target_stand_in_brackets_and_misses_are_said(results):
    _, rows = table(results, TASK, OTHER)
    assert rows["ngplus"][1].endswith("(1)")
    assert rows["adam"][1].endswith("(4)")
    assert rows["adam"][2].endswith("(2)")
    assert rows["sgd"][2].endswith("(missed)")


def test_the_best_of_a_column_is_bold_and_no_other(results):
    _, rows = table(results, TASK, OTHER)
    assert sum(row[2].startswith("**") for row in rows.values()) == 1
    assert rows["adam"][2].startswith("**")


def test_the_order_is_that_of_the_profiles(results):
    """Adam is four times as slow on the one task, which scores nothing, and alone on the other."""
    _, rows = table(results, TASK, OTHER)
    assert [(name, row[0]) for name, row in rows.items()] == [("adam", "0.50"), ("ngplus", "0.50"), ("sgd", "0.00")]


def test_a_task_that_the_paper_does_not_have_says_so(results):
    put(results, "gpt-text", "adamw", HIT_4)
    head, _ = table(results, TASK, "gpt-text")
    assert ["(beyond the paper)" in column for column in head[2:]] == [False, True]


def test_the_profile_is_over_the_papers_tasks(results):
    _, before = table(results, TASK, OTHER)
    put(results, "gpt-text", "adamw", HIT_4)
    put(results, "gpt-text", "ngplus-adamw", MISS)
    _, rows = table(results, TASK, OTHER, "gpt-text")
    scores = {name: row[0] for name, row in rows.items()}
    assert scores == {name: row[0] for name, row in before.items()} | {"adamw": "–"}
    assert list(scores)[-1] == "adamw"
    assert rows["adamw"][1:3] == ["–", "–"]


def test_one_seed_has_no_spread(tmp_path):
    put(tmp_path, TASK, "adam", HIT_4, seeds=(1,))
    _, rows = table(tmp_path, TASK)
    assert "±" not in rows["adam"][1]


def test_a_task_without_runs_is_an_error(results):
    with pytest.raises(UserError, match="no finished run"):
        overview(results, ["dlrm-criteo"], SCALE)


def test_nothing_is_bold_where_the_difference_is_within_its_standard_error(tmp_path):
    """The medians are .84 and .83; over three seeds, one of which is off by .1, the standard error is about .03."""
    for seed, off in ((1, 0.0), (2, 0.0), (3, 0.1)):
        put(tmp_path, TASK, "adam", [0.1, *[0.84 - off] * 4], seeds=[seed])
        put(tmp_path, TASK, "sgd", [0.1, *[0.83] * 4], seeds=[seed])
    _, rows = table(tmp_path, TASK)
    assert not [row for row in rows.values() if "**" in row[1]]
