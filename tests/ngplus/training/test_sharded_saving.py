"""States of sharded models through `torch.distributed.checkpoint`, from some processes to more or fewer."""

import contextlib
import functools
import itertools
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ngplus import NGPlus
from tests.ngplus.training.problems import SETTINGS, attentive, convolutional, perceptron
from tests.ngplus.training.processes import FRESH, START_SECONDS, Team
from tests.ngplus.training.sharding import distance, own_samples, shard, whole_parameters
from tests.ngplus.training.test_sharded import bare

pytestmark = pytest.mark.slow  # starting the processes is

SAMPLES = 12
CASES = {
    "momentum": (perceptron, {"momentum": 0.9, "ema": 0.5, "inverses": "sharded"}),
    "adam": (convolutional, {"base": torch.optim.Adam, "inverses": "auto"}),
    "bare": (bare, {"ema": 0.5, "inverses": "sharded"}),
    "blocks": (attentive, {"base": torch.optim.AdamW, "block_size": 3, "inverses": "replicated"}),
}
FORMS = {"plain": {}, "flattened": {"flatten_optimizer_state_dict": True}}


@pytest.fixture(scope="module")
def teams(team):
    """Of one process to three, by their number."""
    one, three = Team(1), Team(3)
    yield {1: one, 2: team, 3: three}
    one.close()
    three.close()


def start(case, whole=False, replicas=1):
    make, settings = CASES[case]
    problem, settings = make(samples=SAMPLES), {**SETTINGS, "update_every": 3, **settings}
    if whole:
        del settings["inverses"]
    else:
        shard(problem.model, replicas=replicas)
    return problem, NGPlus(problem.model, **settings)


def save(case, form, folder, replicas=1):
    problem, optimizer = start(case, replicas=replicas)
    problem.train(optimizer, 5, samples=own_samples(problem))
    model, state = get_state_dict(problem.model, optimizer, options=StateDictOptions(**FORMS[form]))
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def resume(case, form, folder, whole=False, replicas=1):
    problem, optimizer = start(case, whole, replicas)
    options = StateDictOptions(**FORMS[form])
    model, state = get_state_dict(problem.model, optimizer, options=options)
    filled = {"model": model, "optimizer": state}
    dcp.load(filled, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(problem.model, filled["model"], options=options)
    set_optimizer_state_dict(problem.model, optimizer, filled["optimizer"], options=options)
    problem.train(optimizer, 4, samples=slice(None) if whole else own_samples(problem))
    return problem.model if whole else whole_parameters(problem.model)


@functools.cache
def uninterrupted(case):
    problem, optimizer = start(case, whole=True)
    problem.train(optimizer, 9)
    return problem.model


EVERY = [*itertools.permutations((1, 2, 3), 2), (2, 2)]
CHANGES = [("bare", *each) for each in EVERY] + [(case, *each) for case in CASES for each in ((1, 3), (3, 2), (2, 2))]


@pytest.mark.parametrize(("case", "before", "after"), sorted(set(CHANGES)))
def test_a_run_goes_on_with_more_or_fewer_processes(teams, tmp_path, case, before, after):
    form = list(FORMS)[(before + after) % 2]
    teams[before].run(save, case, form, str(tmp_path))
    for parameters in teams[after].run(resume, case, form, str(tmp_path)):
        assert distance(parameters, uninterrupted(case)) < 1e-12


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_not_sharded_goes_on_from_the_shards_of_others(teams, tmp_path, case):
    teams[3].run(save, case, "plain", str(tmp_path))
    model = resume(case, "plain", str(tmp_path), whole=True)
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert distance(parameters, uninterrupted(case)) < 1e-12


def test_replicas_of_shards_go_on_as_shards_alone_and_the_other_way_round(teams, team_of_four, tmp_path):
    team_of_four.run(save, "momentum", "plain", str(tmp_path / "four"), 2)
    teams[2].run(save, "momentum", "plain", str(tmp_path / "two"))
    resumed = teams[2].run(resume, "momentum", "plain", str(tmp_path / "four"))
    resumed += team_of_four.run(resume, "momentum", "plain", str(tmp_path / "two"), False, 2)
    assert all(distance(parameters, uninterrupted("momentum")) < 1e-12 for parameters in resumed)


def full_state(case, broadcast):
    """Save whole tensors, and load them, on the first process alone with ``broadcast``."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=broadcast, broadcast_from_rank0=broadcast)
    problem, optimizer = start(case)
    problem.train(optimizer, 5, samples=own_samples(problem))
    model, state = get_state_dict(problem.model, optimizer, options=StateDictOptions(full_state_dict=True))
    fresh, resumed = start(case)
    if broadcast and dist.get_rank() > 0:
        model, state = {}, {}
    set_model_state_dict(fresh.model, model, options=options)
    set_optimizer_state_dict(fresh.model, resumed, state, options=options)
    fresh.train(resumed, 4, samples=own_samples(fresh))
    return whole_parameters(fresh.model)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_whole_states_are_sharded_again(team, case, broadcast):
    for parameters in team.run(full_state, case, broadcast):
        assert distance(parameters, uninterrupted(case)) < 1e-12


def shares_of_the_state():
    """The elements of the inverse that each process saves, of a layer whose inverse a single one keeps."""
    problem, optimizer = start("momentum")
    problem.train(optimizer, 1, samples=own_samples(problem))
    state = get_optimizer_state_dict(problem.model, optimizer)["state"]
    inverse = state["0.weight"]["ngplus_inverse0"]
    return inverse.to_local().numel(), inverse.numel(), optimizer.curvature["0.weight"].numel()


def test_each_process_saves_its_rows_of_an_inverse_that_one_keeps(team):
    shares, sizes, kept = zip(*team.run(shares_of_the_state), strict=True)
    assert set(sizes) == {36}
    assert shares == (18, 18)
    assert sorted(kept) == [0, 2 * 36]  # the inverse, and its average


def plain_state(folder):
    """Each process's own state dict, as `torch.save` writes it."""
    problem, optimizer = start("adam")
    problem.train(optimizer, 4, samples=own_samples(problem))
    torch.save(optimizer.state_dict(), f"{folder}/{dist.get_rank()}.pt")


def load_plain_state(folder):
    _, optimizer = start("adam")
    state = torch.load(f"{folder}/0.pt", weights_only=True)
    with pytest.raises(ValueError, match="sharded over 2 processes, and the parameters here over 1") as caught:
        optimizer.load_state_dict(state)
    return str(caught.value)


def test_a_plain_state_of_other_processes_is_refused_with_what_shards_it_again(teams, tmp_path):
    teams[2].run(plain_state, str(tmp_path))
    [said] = teams[1].run(load_plain_state, str(tmp_path))
    assert "torch.distributed.checkpoint" in said


SHARDED_PAGE = Path(__file__).parents[3] / "docs" / "sharded.md"


def run_as_torchrun_does(script, folder, rank, world, port, steps):
    """Run a script with the environment that torchrun gives it; what it prints goes to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [script, str(steps)]
    with Path(f"{rank}.txt").open("a") as output, contextlib.redirect_stdout(output):
        runpy.run_path(script, run_name="__main__")


def run_script(script, folder, world, steps):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    arguments = [(str(script), str(folder), rank, world, port, steps) for rank in range(world)]
    processes = [FRESH.Process(target=run_as_torchrun_does, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(START_SECONDS)
    assert [process.exitcode for process in processes] == [0] * world


def test_the_script_of_the_page_goes_on_from_its_checkpoint_as_one_process_on_the_joint_batch(tmp_path):
    """Four steps, and two more by other processes; six by one."""
    [script] = re.findall(r"```python\n(.*?)```", SHARDED_PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    for name, world, steps in [("two", 2, 4), ("two", 2, 6), ("one", 1, 6)]:
        (tmp_path / name).mkdir(exist_ok=True)
        run_script(tmp_path / "train.py", tmp_path / name, world, steps)
    two, one = (
        [line.split() for line in (tmp_path / name / "0.txt").read_text().splitlines()] for name in ("two", "one")
    )
    assert [int(step) for step, _ in two] == [int(step) for step, _ in one] == list(range(6))
    assert [float(loss) for _, loss in two] == pytest.approx([float(loss) for _, loss in one], rel=1e-5)
