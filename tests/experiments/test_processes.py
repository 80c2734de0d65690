"""What only whole processes can show: a kill, several runs in a row, data-parallel training."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy

from experiments.records import read_run
from experiments.runner import run

ROOT = Path(__file__).parents[2]
GAUGES = {"seconds", "peak_memory_mb", "curvature_s", "inverse_s", "apply_s"}


def numbers(record):
    return [{k: v for k, v in vars(epoch).items() if k not in GAUGES} for epoch in record.epochs]


@pytest.fixture
def environment(recipes):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "experiments")])
    return os.environ | {"TOY_RECIPES": str(recipes), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def arguments(results: Path, *more: str) -> list[str]:
    return [toy.__file__, "run", "toy", "--device", "cpu", "--results-dir", str(results), *more]


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
    assert numbers(resumed) == numbers(run(load(), "ngplus", 0, options))
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
