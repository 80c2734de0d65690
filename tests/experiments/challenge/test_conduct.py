"""A challenge from its question to its page, and what stands in its way."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from experiments.challenge import conduct
from experiments.challenge.probe import read_probed
from experiments.challenge.question import read_file
from experiments.challenge.result import read_result
from experiments.config.recipe import load_recipe
from experiments.errors import UserError
from experiments.records import record_writer
from experiments.records.record_writer import RecordWriter
from experiments.records.run_record import read_run
from experiments.training.run import RunOptions, run
from tests.experiments.cases.toy import reproducible_values


class KilledError(BaseException):
    pass


def records(folder) -> dict[str, list]:
    """What is in every record but what a clock says, by its path."""
    paths = sorted(folder.root.rglob("*.jsonl"))
    return {path.relative_to(folder.root).as_posix(): reproducible_values(read_run(path)) for path in paths}


def figures(folder) -> dict:
    """The result without what a clock says."""

    def strip(value):
        if isinstance(value, dict):
            gauges = ("records", "seconds_per_epoch", "seconds_to_target")
            return {key: strip(each) for key, each in value.items() if key not in gauges}
        return [strip(each) for each in value] if isinstance(value, list) else value

    return strip(json.loads(folder.result.read_text()))


def test_it_is_tuned_run_and_compared(sign):
    result = read_result(sign.result)
    (task,) = result.tasks
    assert (task.task, task.dataset, task.trials, task.seeds) == ("spirals", "two spirals, made up", 6, (1, 2))
    assert [each.optimizer for each in task.optimizers] == ["sign", "adam"]
    assert [(each.optimizer, each.is_reference, each.seeds) for each in result.against] == [("adam", True, 2)]
    assert (task.same_machine, task.optimizers[0].seconds_per_epoch > 0) == (True, True)
    # The settings are those of the best of the trials, on the validation split at the tuning seed.
    trials = [read_run(path) for path in sorted(sign.tuning.rglob("*.jsonl"))]
    assert len(trials) == 6
    assert {(run.manifest.seed, run.manifest.recipe["run"]["report_split"]) for run in trials} == {(0, "validation")}
    best = max((run for run in trials if run.end), key=lambda run: run.best_metric)
    assert task.settings["lr"] == best.manifest.recipe["optimizer"]["lr"]
    assert 0.003 / 10**0.76 < task.settings["lr"] < 0.003 * 10**0.76


def test_the_figures_are_those_of_the_records(sign):
    (task,) = read_result(sign.result).tasks
    own = [read_run(path).best_metric for path in sorted(sign.results.rglob("sign-seed*.jsonl"))]
    theirs = [read_run(path).best_metric for path in sorted(sign.results.rglob("adam-seed*.jsonl"))]
    assert task.optimizers[0].best_metric == pytest.approx(sum(own) / 2, rel=1e-5)
    (against,) = read_result(sign.result).against
    assert against.best_metric.mean == pytest.approx(sum(own) / 2 - sum(theirs) / 2, rel=1e-5, abs=1e-9)
    assert against.best_metric.verdict in ("ahead", "behind", "tied")  # two seeds show nothing


def test_the_page_stands_alone_and_says_where_it_wins(sign):
    page = sign.page.read_text()
    assert "where it wins, where it does not, how sure" in page
    assert "A difference counts from 5 seeds on; some tasks have 2 here" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page


def test_killed_anywhere_it_ends_with_the_same_numbers(challenge, sign, tmp_path, monkeypatch):
    operations = {"left": 0}

    def dying(real):
        def wrapper(*args, **kwargs):
            operations["left"] -= 1
            if operations["left"] == 0:
                raise KilledError
            return real(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(RecordWriter, "write", dying(RecordWriter.write))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    kills = 0
    for life in (2, 9, 20, 25, 21, 23, 10**9):
        operations["left"] = life
        try:
            folder, problems = challenge(None, "sign", root=tmp_path, path=sign.file)
        except KilledError:
            kills += 1
    assert (kills, problems) == (6, [])
    assert records(folder) == records(sign)
    assert figures(folder) == figures(sign)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_optimizer_with_a_hidden_state_begins_an_interrupted_run_again(challenge, tmp_path, monkeypatch):
    expected, _ = challenge("Hidden", "whole", root=tmp_path, trials=0)
    assert read_probed(expected.probe("spirals")).resumes is False
    real, left = RecordWriter.write, iter(range(100))

    def dying(self, event):
        if next(left) == 3:
            raise KilledError
        real(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", dying)
        with pytest.raises(KilledError):
            challenge("Hidden", "broken", root=tmp_path, trials=0)
    broken, _ = challenge("Hidden", "broken", root=tmp_path, trials=0)
    own = [read_run(next(each.results.rglob("*-seed1.jsonl"))) for each in (expected, broken)]
    assert reproducible_values(own[0]) == reproducible_values(own[1])


SOAP = """
[optimizers.soap]
lr = { value = 0.01, source = "made up" }
weight_decay = { value = 0.001, source = "made up" }
precondition_frequency = { value = 3, source = "made up" }
"""


def test_soap_through_the_door_has_the_numbers_of_the_suites_own_to_the_bit(challenge, place, task, tmp_path):
    recipe = load_recipe(task, "tiny")
    own = tmp_path / "recipes" / "spirals" / "tiny.toml"
    own.parent.mkdir(parents=True)
    own.write_text(recipe.path.read_text() + SOAP)
    registered = load_recipe(task, "tiny", folder=tmp_path / "recipes")
    expected = run(registered, "soap", 1, RunOptions(device="cpu", results_dir=tmp_path / "own"))
    settings = ["lr=0.01", "weight_decay=0.001", "precondition_frequency=3", "max_precondition_dim=2048"]
    folder, _ = challenge("pytorch_optimizer:SOAP", None, root=tmp_path, trials=0, seeds=[1], settings=settings)
    found = read_run(next(folder.results.rglob("soap-challenger-seed1.jsonl")))  # `soap` is the suite's own
    assert reproducible_values(found) == reproducible_values(expected)


def test_around_ngplus_it_gets_ngplus_directions_and_the_recipes_settings(challenge, tmp_path):
    folder, problems = challenge("Sign", None, root=tmp_path, around="ngplus", trials=0, seeds=[1])
    assert problems == []
    found = read_run(next(folder.results.rglob("ngplus-sign-seed1.jsonl"))).manifest.recipe["optimizer"]
    assert (found["damping"], found["update_every"], found["lr"]) == (0.3, 8, 0.003)
    assert found["base"] == {"kind": "../../mine.py:Sign", "decay": 0.0}


def test_a_function_is_challenged_and_another_setting_searched(challenge, tmp_path):
    folder, problems = challenge(
        "momentum", "heavy", root=tmp_path, seeds=[1], trials=2, search=["momentum=0.5:0.99"], settings=["lr=0.02"]
    )
    assert problems == []
    trials = [read_run(path).manifest.recipe["optimizer"] for path in folder.tuning.rglob("*.jsonl")]
    assert {each["lr"] for each in trials} == {0.02}
    assert len({each["momentum"] for each in trials}) == 2


@pytest.mark.parametrize(
    ("optimizer", "problem"),
    [
        ("Poison", "the search failed: poison: no trial came to its end: 2 diverged"),
        ("Refusing", "RuntimeError: I need a closure, and no sparse gradients"),
    ],
)
def test_an_optimizer_that_cannot_train_is_said_and_the_result_is_written(challenge, tmp_path, optimizer, problem):
    folder, problems = challenge(optimizer, None, root=tmp_path, trials=2, seeds=[1])
    assert problem in problems[0]
    assert problem in read_result(folder.result).problems["spirals"]
    assert problem in folder.page.read_text()


def test_a_task_that_it_cannot_train_does_not_stop_the_others(challenge, place, task, tmp_path):
    source = (place / "spirals" / "spirals" / "spirals.py").read_text()
    other = tmp_path / "broken.py"
    other.write_text(source.replace('"spirals"', '"broken"').replace("def loss(", "def other("))
    other.write_text(
        other.read_text() + "\n    def loss(self, model, batch):\n        raise ValueError('no such loss')\n"
    )
    recipe = tmp_path / "recipes" / "broken" / "tiny.toml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text((place / "spirals" / "spirals" / "recipes" / "spirals" / "tiny.toml").read_text())
    folder, problems = challenge("Sign", "sign", root=tmp_path, tasks=[f"{other}:Spirals", task], trials=0, seeds=[1])
    assert len(problems) == 1
    assert "broken: ValueError: no such loss" in problems[0]
    assert [each.task for each in read_result(folder.result).tasks] == ["spirals"]


def test_a_full_disk_is_said_and_the_same_command_goes_on(challenge, tmp_path, monkeypatch):
    real, left = os.write, iter(range(1000))

    def full(descriptor, data):
        if 3 <= next(left) < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(record_writer.os, "write", full)
        folder, problems = challenge("Sign", "sign", root=tmp_path, trials=0)
    assert "the disk is full; nothing written before is lost" in problems[0]
    _, problems = challenge("Sign", "sign", root=tmp_path, trials=0)
    assert problems == []
    assert read_result(folder.result).tasks[0].seeds == (1, 2)


def test_two_at_once_of_one_name_are_refused(challenge, tmp_path):
    (tmp_path / "sign").mkdir()
    with FileLock(tmp_path / "sign" / "lock"), pytest.raises(UserError, match="another process is at work"):
        challenge("Sign", "sign", root=tmp_path)


def test_another_question_of_the_same_name_is_refused(challenge, sign, place):
    with pytest.raises(UserError, match="is of another challenge: trials was 6 and is 7"):
        challenge("Sign", "sign", trials=7)
    source = place / "mine.py"
    before = source.read_text()
    try:
        source.write_text(before + "\n# changed\n")
        with pytest.raises(UserError, match=r"mine.py: is not what this challenge began with"):
            challenge("Sign", "sign")
    finally:
        source.write_text(before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": ["speed=1"]}, "--set speed: .* has no such setting; must be one of decay, lr"),
        ({"settings": ["lr=fast"]}, "lr = 'fast': must be a number"),
        ({"search": ["speed=1:2"]}, "--search speed: .* has no such setting; must be one of decay, lr"),
        ({"search": ["lr=0.1:0.1"]}, "search: lr: low = 0.1: must be less than high = 0.1"),
        ({"search": ["lr=1:0.1:log"]}, "search: lr: low = 1.0: must be less than high = 0.1"),
        ({"search": ["lr=0:0.1:log"]}, "search: lr: low = 0.0: must be positive where log = true"),
        ({"search": ["lr=fast"]}, "--search 'lr=fast': must be name=low:high or name=low:high:log"),
        ({"settings": ["lr=1", "lr=2"]}, "--set 'lr=2': lr is given twice"),
        ({"search": ["lr=1:2", "lr=1:3"]}, "--search 'lr=1:3': lr is given twice"),
        ({"tasks": []}, r"tasks = \[\]: must be one task at least"),
        ({"search": ["lr=1:2"], "settings": ["lr=1"]}, "lr: is given a value and a range to search"),
        ({"seeds": [0, 1]}, "tuning_seed = 0: must not be one of the seeds reported"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: must be different from each other"),
        ({"tasks": ["spirality"]}, "task = 'spirality': there is no such task; must be one of"),
        ({"baselines": ["lion"]}, "--baselines lion: .* has no such optimizer; must be one of adam, ngplus-adam"),
        ({"name": "adam"}, "--name adam: is one of the suite's own optimizers: must be another"),
        ({"name": "A b"}, "--name = 'A b': must be small letters and digits"),
        ({"around": "sgd"}, "around = 'sgd': must be one of ngplus"),
        ({"scale": "huge"}, "scale = 'huge': spirals has no recipe for it; must be one of tiny"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(challenge, tmp_path, given, message):
    name = given.pop("name", "x") if "name" in given else "x"
    with pytest.raises(UserError, match=message):
        challenge("Sign", name, root=tmp_path, **given)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_recorded_baselines_are_taken_and_run_here_if_asked(challenge, sign, tmp_path, monkeypatch):
    monkeypatch.setattr(conduct, "RECORDED", sign.results)
    first = {"root": tmp_path, "trials": 0, "baselines": []}
    folder, _ = challenge("Sign", "other", **first)
    (task,) = read_result(folder.result).tasks
    assert [each.optimizer for each in task.optimizers] == ["other", "adam"]  # what is recorded, and no other
    assert (task.same_machine, task.optimizers[1].seconds_per_epoch) == (False, None)
    name = "spirals/tiny/runs/adam-seed1.jsonl"
    assert (folder.results / name).read_bytes() == (sign.results / name).read_bytes()
    assert read_file(folder.file).made["spirals"]["recorded"] == ["adam-seed1.jsonl", "adam-seed2.jsonl"]
    folder, _ = challenge("Sign", "other", **first | {"baselines": ["adam"], "rerun_baselines": True})
    assert read_result(folder.result).tasks[0].same_machine
    assert (folder.results / name).read_bytes() != (sign.results / name).read_bytes()
    assert reproducible_values(read_run(folder.results / name)) == reproducible_values(read_run(sign.results / name))


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 1), (8, 2)])
def test_a_processor_that_the_first_trials_leave_idle_runs_a_baseline(
    challenge, sign, tmp_path, capsys, workers, ahead
):
    folder, problems = challenge(None, "sign", root=tmp_path, path=sign.file, workers=workers)
    said = capsys.readouterr().out
    assert f"the first trials of each search: 5, runs of baselines: {ahead}\n" in said
    assert f"searches: 1, runs of baselines: {2 - ahead}\n" in said
    assert problems == []
    assert records(folder) == records(sign)


def test_its_file_says_all_that_it_takes_to_run_it_again(sign):
    file = read_file(sign.file)
    assert file.asked["optimizer"] == "mine.py:Sign"
    assert "class Sign" in file.code["mine.py"]
    assert file.versions["torch"] == torch.__version__.partition("+")[0]
    assert (file.made["spirals"]["trials"], file.made["spirals"]["seeds"]) == (6, [1, 2])
    text = sign.file.read_text()
    sign_edited = sign.root.parent / "edited.toml"
    sign_edited.write_text(text.replace("class Sign", "class Sine"))
    with pytest.raises(UserError, match=r"code: mine.py: is not what its SHA-256 says: it was edited"):
        read_file(sign_edited)
