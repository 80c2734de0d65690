"""`torchrun ... --shard`: the same numbers as one process, and a run that goes on where it stopped."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from experiments.config import recipe
from experiments.errors import UserError
from experiments.records.run_record import read_run
from experiments.training.run import RunOptions, run
from experiments.training.trainer import Training
from tests.experiments.cases import toy
from tests.ngplus.training.processes import Team

OVERRIDES = ("task.dropout=0.0",)


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


@pytest.fixture(autouse=True)
def recipes_of_all_processes(tmp_path):
    toy.install(tmp_path / "recipes")


def recorded(folder, optimizer="ngplus"):
    return read_run(folder / "toy" / "tiny" / "runs" / f"{optimizer}-seed0.jsonl")


def run_here(folder, optimizer, *overrides, stop_at=None):
    """The run in this process of several, which ends before an epoch begins."""
    os.environ.update(WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    recipe.RECIPES = folder.parent / "recipes"
    toy.install(recipe.RECIPES)  # its recipe is there
    options = RunOptions(device="cpu", results_dir=folder, shard=True, bar=False)
    loaded = recipe.load_recipe("toy", "tiny", overrides=(*OVERRIDES, *overrides))

    def train_epoch(training, *arguments):
        if training.position.epoch == stop_at:
            raise InterruptedError
        return whole(training, *arguments)

    whole = Training.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train_epoch", train_epoch)
        if stop_at is None:
            run(loaded, optimizer, 0, options)
        else:
            with pytest.raises(InterruptedError):
                run(loaded, optimizer, 0, options)


@pytest.mark.slow
def test_the_command_line_shards_a_model_over_the_processes_of_torchrun(load, options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", toy.__file__]
    own = {"TOY_RECIPES": str(tmp_path / "recipes"), "PYTHONPATH": str(Path(__file__).parents[3])}
    arguments = ["--optimizer", "ngplus", "--seed", "0", "--results-dir", str(tmp_path), "--set", *OVERRIDES, "--shard"]
    done = subprocess.run(
        [*command, "run", "toy", *arguments, "--device", "cpu"],
        env=os.environ | own | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together, alone = recorded(tmp_path), run(load(*OVERRIDES), "ngplus", 0, options)
    assert together.manifest.world_size == 2
    assert [e.eval_loss for e in together.epochs] == pytest.approx([e.eval_loss for e in alone.epochs], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["ngplus", "adam"])
def test_a_run_with_shards_trains_like_one_process_and_goes_on_to_the_bit(team, load, options, tmp_path, optimizer):
    accumulated = "run.accumulate=2"
    team.run(run_here, tmp_path / "whole", optimizer, accumulated)
    whole, alone = recorded(tmp_path / "whole", optimizer), run(load(*OVERRIDES, accumulated), optimizer, 0, options)
    assert [e.eval_loss for e in whole.epochs] == pytest.approx([e.eval_loss for e in alone.epochs], rel=1e-5)
    for stop_at in (2, None):
        team.run(_run_until, tmp_path / "cut", optimizer, accumulated, stop_at)
    cut = recorded(tmp_path / "cut", optimizer)
    assert len(cut.resumed) == 1
    assert toy.reproducible_values(cut) == toy.reproducible_values(whole)


def _run_until(folder, optimizer, override, stop_at):
    run_here(folder, optimizer, override, stop_at=stop_at)


def kfac_in_several_processes():
    from experiments.training.shards import shard_model
    from ngplus.baselines import KFAC

    with pytest.raises(TypeError) as caught:
        KFAC(shard_model(nn.Sequential(nn.Linear(2, 2))))
    return str(caught.value)


@pytest.mark.slow
def test_an_optimizer_that_needs_whole_weights_says_so(team):
    assert all("KFAC needs whole weights" in said for said in team.run(kfac_in_several_processes))


def test_shards_need_several_processes(load, options):
    with pytest.raises(UserError, match=r"--shard: needs several processes, as in torchrun"):
        run(load(), "ngplus", 0, replace(options, shard=True))
