"""What only whole processes can show: a kill, several runs in a row, data-parallel training."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.launch import jobs
from experiments.records.provenance import REPOSITORY
from experiments.records.run_record import read_run
from experiments.training.run import run
from tests.experiments.cases import toy


@pytest.fixture
def environment(recipes):
    return os.environ | {"TOY_RECIPES": str(recipes), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def arguments(results: Path, *more: str) -> list[str]:
    return ["-m", toy.__name__, "run", "toy", "--device", "cpu", "--results-dir", str(results), *more]


def test_a_run_killed_in_mid_epoch_goes_on_and_ends_with_the_same_numbers(load, options, environment, tmp_path):
    slow = arguments(tmp_path / "killed", "--optimizer", "ngplus", "--seed", "0", "--checkpoint-every", "0")
    record = tmp_path / "killed" / "toy" / "tiny" / "runs" / "ngplus-seed0.jsonl"
    process = subprocess.Popen([sys.executable, *slow, "--set", "task.pause=0.3"], env=environment)
    deadline = time.monotonic() + 120
    while not (record.exists() and '"epoch": 1' in record.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.75)  # two or three of the second epoch's six batches
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_run(record).epochs) == 2
    subprocess.run([sys.executable, *slow, "--set", "task.pause=0.3"], env=environment, check=True)
    resumed = read_run(record)
    assert 6 < resumed.resumed[0].step < 12
    assert toy.reproducible_values(resumed) == toy.reproducible_values(run(load(), "ngplus", 0, options))
    assert resumed.end.seconds > 18 * 0.3


def test_several_runs_each_have_a_process_of_their_own(environment, tmp_path):
    more = ("--optimizer", "sgd", "--optimizer", "adam", "--seed", "0", "--epochs", "1")
    command = [sys.executable, *arguments(tmp_path, *more)]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert [line.partition(":")[0] for line in out.splitlines() if "finished" in line] == ["sgd seed 0", "adam seed 0"]


def test_two_processes_are_one_on_the_joint_batch(load, options, environment, tmp_path):
    overrides = ("task.dropout=0.0", "run.accumulate=2")
    names = ("sgd", "ngplus")
    more = [part for name in names for part in ("--optimizer", name)]
    more += [part for override in overrides for part in ("--set", override)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *arguments(tmp_path / "two", "--seed", "0", *more)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    for name in names:
        two = read_run(tmp_path / "two" / "toy" / "tiny" / "runs" / f"{name}-seed0.jsonl")
        assert two.manifest.world_size == 2
        one = run(load(*overrides), name, 0, options)
        assert [epoch.step for epoch in two.epochs] == [epoch.step for epoch in one.epochs]
        for figure in ("train_loss", "eval_loss"):
            ours, theirs = ([getattr(epoch, figure) for epoch in each.epochs[1:]] for each in (two, one))
            assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)  # some nine processes start one after the other
def test_a_sweep_killed_at_random_moments_ends_with_the_same_numbers(load, options, environment, tmp_path):
    more = ("--set", "task.pause=0.1", "--checkpoint-every", "0", "--workers", "2")
    more = (*more, "--optimizer", "sgd", "--optimizer", "ngplus", "--seed", "0")
    sweep = [sys.executable, *arguments(tmp_path / "swept", *more)]
    sweep[sweep.index("run")] = "sweep"
    chance = random.Random(7)
    runs = tmp_path / "swept" / "toy" / "tiny" / "runs"
    for number in (signal.SIGKILL, signal.SIGTERM):  # SIGINT: `test_local`
        process = subprocess.Popen(sweep, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines, deadline = sum(1 for _ in _lines(runs)), time.monotonic() + 120
        while process.poll() is None and sum(1 for _ in _lines(runs)) <= lines and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2))
        process.send_signal(number)
        process.wait(timeout=60)
    subprocess.run(sweep, env=environment, check=True, timeout=240)
    for name in ("sgd", "ngplus"):
        found = read_run(runs / f"{name}-seed0.jsonl")
        assert found.end.reason == "finished"
        assert found.manifest.threads == 1
        assert toy.reproducible_values(found) == toy.reproducible_values(run(load(), name, 0, options))


def _lines(runs: Path):
    for path in runs.glob("*.jsonl"):
        yield from path.read_text().splitlines()


def test_a_run_that_was_deleted_is_the_only_one_that_is_run_again(recipes, options, monkeypatch):
    started = []

    def run_here(works, **_):
        for work in works:
            started.append(work.optimizer)
            work.run()
        return {}

    monkeypatch.setattr(jobs, "run_in_processes", run_here)
    wanted = jobs.make_jobs("toy", "tiny", None, [0], ("run.epochs=1",), options)
    jobs.run_jobs(wanted)
    assert started == ["sgd", "adam", "ngplus"]
    runs = options.results_dir / "toy" / "tiny" / "runs"
    before = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    (runs / "adam-seed0.jsonl").unlink()
    jobs.run_jobs(wanted)
    assert started[3:] == ["adam"]
    after = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["adam-seed0.jsonl"]
    assert len(after) == 3
