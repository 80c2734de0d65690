"""The path of a SLURM job, walked with submitit's executor for one machine."""

import dataclasses
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from experiments.errors import UserError
from experiments.launch.jobs import make_jobs
from experiments.launch.slurm import Resources, run_on_cluster, submit
from experiments.records.provenance import REPOSITORY
from experiments.records.run_record import read_run
from experiments.training.run import run
from tests.experiments.cases import division, toy


@pytest.fixture
def submitted(recipes, options, monkeypatch, tmp_path):
    """Submit the toy's runs with seed 0; the processes that submitit starts have the toy among their tasks too."""
    (tmp_path / "sitecustomize.py").write_text("import tests.experiments.cases.toy\n")
    paths = [tmp_path, REPOSITORY]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("TOY_RECIPES", str(recipes))
    own = dataclasses.replace(options, results_dir=tmp_path / "cluster", checkpoint_every_s=0.0)

    def submit_(optimizers, resources, *overrides):
        jobs = make_jobs("toy", "tiny", optimizers, [0], overrides, own)
        return [job for _, job in submit(jobs, resources, tmp_path / "slurm", cluster="local")]

    return submit_


def record(tmp_path, name):
    return tmp_path / "cluster" / "toy" / "tiny" / "runs" / f"{name}-seed0.jsonl"


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_ends_with_the_same_numbers(submitted, load, options, tmp_path):
    (job,) = submitted(["ngplus"], Resources(threads=1), "task.pause=0.3")
    path, deadline = record(tmp_path, "ngplus"), time.monotonic() + 120
    while not (path.exists() and '"epoch": 1' in path.read_text()):
        assert time.monotonic() < deadline
        assert not job.done(), job.stderr()
        time.sleep(0.05)
    # SLURM's signal that the time is over; the process that submitit trains in is the controller's child.
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)
    job.result()
    resumed = read_run(path)
    assert len(resumed.resumed) == 1
    assert toy.reproducible_values(resumed) == toy.reproducible_values(run(load(), "ngplus", 0, options))
    assert submitted(["ngplus"], Resources(), "task.pause=0.3") == []


@pytest.mark.slow
def test_processes_of_a_job_train_together(submitted, load, options, tmp_path, monkeypatch):
    # One process a GPU; that there is none here does not matter to a run on the CPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (job,) = submitted(["sgd"], Resources(gpus=2), "task.dropout=0.0")
    job.results()
    two, one = read_run(record(tmp_path, "sgd")), run(load("task.dropout=0.0"), "sgd", 0, options)
    assert two.manifest.world_size == 2
    assert [e.eval_loss for e in two.epochs] == pytest.approx([e.eval_loss for e in one.epochs], rel=1e-4)


def time_outs_left(job) -> int | None:
    """None while the file is written again."""
    try:
        return DelayedSubmission.load(job.paths.submitted_pickle)._timeout_countdown
    except (FileNotFoundError, EOFError, pickle.UnpicklingError):
        return None


@pytest.mark.slow
def test_a_job_may_run_out_of_time_more_often_than_submitit_would_let_it(submitted, tmp_path):
    """Four times; submitit's own limit is three."""
    (job,) = submitted(["sgd"], Resources(minutes=3), "task.pause=0.3", "run.epochs=5")
    limit, children = time_outs_left(job), Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    path, deadline = record(tmp_path, "sgd"), time.monotonic() + 400
    for stops in range(1, 5):
        while not (path.exists() and f'"epoch": {stops}' in path.read_text()):
            assert time.monotonic() < deadline
            assert not job.done(), job.stderr()
            time.sleep(0.05)
        os.kill(int(children.read_text().split()[0]), signal.SIGUSR2)
        while time_outs_left(job) != limit - stops:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    job.result()
    resumed = read_run(path)
    assert len(resumed.resumed) == 4
    assert [epoch.epoch for epoch in resumed.epochs] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("nodes", 0, 1), ("gpus", -1, 0), ("threads", 0, 1), ("minutes", 0, 3), ("minutes", 2, 3)],
)
def test_resources_that_are_none_are_refused(name, value, least):
    with pytest.raises(UserError, match=f"{name} = {value}: must be at least {least}"):
        Resources(**{name: value})
    Resources(**{name: least})


@pytest.mark.slow
def test_what_fails_on_the_cluster_is_named_and_the_rest_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    works = [division.Division(1), division.Division(0)]
    failed = run_on_cluster(works, Resources(threads=1), tmp_path, cluster="local")
    assert list(failed) == ["division by 0"]
    assert str(tmp_path) in failed["division by 0"]
