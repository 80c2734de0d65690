"""`DistributedDataParallel` over two processes, compared with one process on the joint batch."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from ngplus import NGPlus
from tests.ngplus import oracle
from tests.ngplus.cases import recorded_warnings, seed_cpu
from tests.ngplus.training.problems import SETTINGS, Problem, attentive, convolutional, distance, flat, perceptron

pytestmark = pytest.mark.slow  # starting the processes is


def share(problem: Problem, first: int | None = None) -> slice:
    """This process's samples: ``first`` of them for process 0, by default half."""
    cut = len(problem.inputs) // 2 if first is None else first
    return slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)


def outcome(model: nn.Module, optimizer: NGPlus) -> dict:
    """What the processes must agree on, to the bit."""
    curvature = {
        name.removeprefix("module."): [tensor.clone() for tensor in state.tensors()]
        for name, state in optimizer.curvature.items()
    }
    return {"model": model, "curvature": curvature, "skipped": optimizer.skipped_steps}


def agree(outcomes: list[dict]) -> dict:
    """The outcome of all processes, which must be the same to the bit."""
    first, second = outcomes
    assert torch.equal(flat(first["model"]), flat(second["model"]))
    assert first["curvature"].keys() == second["curvature"].keys()
    for name, tensors in first["curvature"].items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, second["curvature"][name], strict=True)), name
    assert first["skipped"] == second["skipped"]
    return first


def train_together(make, settings, wrapping, steps=4, given="whole"):
    problem = make()
    parallel = DistributedDataParallel(problem.model, **wrapping)
    optimizer = NGPlus(parallel if given == "whole" else problem.model, **{**SETTINGS, **settings})
    problem.train(optimizer, steps, through=parallel, samples=share(problem))
    return outcome(problem.model, optimizer)


def train_alone(problem, settings, steps=4):
    optimizer = NGPlus(problem.model, **{**SETTINGS, **settings})
    problem.train(optimizer, steps)
    return problem.model


@pytest.mark.parametrize("make", [perceptron, convolutional, attentive])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.7}, {"ema": 0.7, "block_size": 3}], ids=str)
def test_two_processes_are_one_on_the_joint_batch(team, make, settings):
    together = agree(team.run(train_together, make, settings, {}))
    assert distance(together["model"], make().plain_run(4, **settings)) < 1e-10


def step_with_few_samples(make, settings):
    """The directions, which are left in ``.grad``."""
    problem = make()
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(problem.model, **{**SETTINGS, **settings})
    problem.loss(parallel, share(problem)).backward()
    optimizer.step()
    return problem.model, {name: p.grad for name, p in problem.model.named_parameters()}


@pytest.mark.parametrize(("most", "used"), [(1, [0]), (3, [0, 1, 3]), (100, range(6))])
@pytest.mark.parametrize("solver", ["dense", "low_rank"])
def test_the_samples_of_the_curvature_are_shared_out_over_the_processes(team, most, used, solver):
    """Of six samples each process has three, and uses its share of the most, the first one more where it is odd."""
    problem = perceptron()
    samples = oracle.sample_gradients(problem.model, problem.sample_losses())
    for model, directions in team.run(step_with_few_samples, perceptron, {"max_samples": most, "solver": solver}):
        for name, parameter in model.named_parameters():
            parameter.grad = directions[name]
        for matrix, gradients in samples.items():
            moment = oracle.second_moment([gradients[number] for number in used])
            expected = oracle.direction(moment, sum(gradients) / 6, SETTINGS["damping"])
            assert oracle.error(model, {matrix: expected}) < 1e-10


@pytest.mark.parametrize(
    "wrapping",
    [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.0001},
    ],
    ids=str,
)
def test_the_options_of_ddp_do_not_matter(team, wrapping):
    together = agree(team.run(train_together, attentive, {}, wrapping))
    assert distance(together["model"], attentive().plain_run(4)) < 1e-10


def test_the_optimizer_may_be_made_of_the_model_inside(team):
    together = agree(team.run(train_together, perceptron, {}, {}, 4, "inner"))
    assert distance(together["model"], perceptron().plain_run(4)) < 1e-10


@pytest.mark.parametrize(
    "settings",
    [
        {"curvature": "mini_batch"},
        {"curvature": "mini_batch", "ema": 0.5, "block_size": 2},
        {"samples": "rows"},
        {"solver": "low_rank"},
        {"damping_rule": "released"},
    ],
    ids=str,
)
def test_the_other_variants_are_one_process_on_the_joint_batch_too(team, settings):
    together = agree(team.run(train_together, perceptron, settings, {}))
    assert distance(together["model"], train_alone(perceptron(), settings)) < 1e-10


def train_with_unequal_shares(make):
    problem = make()
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, lr=1e-9, damping=0.3, update_every=1)
    problem.loss(parallel, share(problem, first=1)).backward()
    optimizer.step()
    return outcome(problem.model, optimizer)


def test_every_sample_counts_the_same_where_batches_are_unequal(team):
    together = agree(team.run(train_with_unequal_shares, perceptron))
    joint = perceptron()
    optimizer = NGPlus(joint.model, lr=1e-9, damping=0.3, update_every=1, solver="dense")
    joint.loss(joint.model).backward()
    optimizer.step()
    for name, [inverse] in together["curvature"].items():
        assert torch.allclose(inverse, optimizer.curvature[name].tensors()[0], rtol=1e-9)


class Branches(nn.Module):
    """A trunk, and a branch that some batches leave out: those whose first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x) if x[0, 0] > 0 else self.trunk(x) + self.branch(x)


def branching(signs: tuple[int, ...]) -> Problem:
    """Six samples; the sign of each one's first number."""
    problem = perceptron()
    seed_cpu(1)
    problem.model = Branches().double()
    problem.inputs[:, 0] = problem.inputs[:, 0].abs() * torch.tensor(signs).double()
    return problem


def train_branches(signs, steps=4, **settings):
    problem = branching(signs)
    parallel = DistributedDataParallel(problem.model, find_unused_parameters=True)
    optimizer = NGPlus(parallel, **{**SETTINGS, **settings})
    problem.train(optimizer, steps, through=parallel, samples=share(problem))
    return outcome(problem.model, optimizer)


def test_a_layer_that_no_process_uses_has_no_curvature_and_blocks_no_process(team):
    together = agree(team.run(train_branches, (1, 1, 1, 1, 1, 1)))
    assert set(together["curvature"]) == {"trunk.weight"}
    assert torch.equal(together["model"].branch.weight, branching((1,) * 6).model.branch.weight)


def test_a_layer_that_one_process_uses_gets_the_curvature_of_its_samples(team):
    together = agree(team.run(train_branches, (-1, -1, -1, 1, 1, 1), 1))
    assert set(together["curvature"]) == {"trunk.weight", "branch.weight"}
    alone = branching((-1, -1, -1, 1, 1, 1))
    alone.inputs, alone.targets = alone.inputs[:3], alone.targets[:3]
    optimizer = NGPlus(alone.model, **SETTINGS, solver="dense")
    alone.loss(alone.model).backward()
    optimizer.step()
    [ours], [theirs] = together["curvature"]["branch.weight"], optimizer.curvature["branch.weight"].tensors()
    assert torch.allclose(ours, theirs, rtol=1e-9)


def train_late_branch():
    """The branch is first used on the second step, which is no curvature step."""
    problem = branching((1,) * 6)
    parallel = DistributedDataParallel(problem.model, find_unused_parameters=True)
    optimizer = NGPlus(parallel, **{**SETTINGS, "update_every": 3})
    for step in range(5):
        if step == 1:
            problem.inputs[:, 0] *= -1
        problem.loss(parallel, share(problem)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(problem.model, optimizer)


def test_a_layer_that_is_used_later_gets_its_curvature_on_the_next_curvature_step(team):
    together = agree(team.run(train_late_branch))
    assert set(together["curvature"]) == {"trunk.weight", "branch.weight"}


def train_with_nan(rank, curvature):
    problem = perceptron()
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, **{**SETTINGS, "update_every": 3}, curvature=curvature)
    for step in range(4):
        loss = problem.loss(parallel, share(problem))
        if step in (0, 2) and dist.get_rank() == rank:
            loss = loss * float("nan")
        before = flat(problem.model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(flat(problem.model), before) == (step in (0, 2))
    return outcome(problem.model, optimizer)


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_nan_in_one_process_makes_all_skip(team, rank, curvature):
    together = agree(team.run(train_with_nan, rank, curvature))
    assert together["skipped"] == 2
    assert set(together["curvature"]) == {"0.weight", "2.weight"}
    assert torch.isfinite(flat(together["model"])).all()


def train_with_no_sync():
    problem = perceptron(samples=8)
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, **SETTINGS)
    own = share(problem)
    first, second = slice(own.start, own.start + 2), slice(own.start + 2, own.start + 4)
    for _ in range(4):
        with parallel.no_sync():
            (problem.loss(parallel, first) / 2).backward()
        (problem.loss(parallel, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(problem.model, optimizer)


def test_accumulation_without_synchronising_is_one_batch(team):
    together = agree(team.run(train_with_no_sync))
    assert distance(together["model"], perceptron(samples=8).plain_run(4)) < 1e-10


def resume_together():
    problem = convolutional()
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, **SETTINGS, ema=0.5, momentum=0.9)

    def steps(count):
        problem.train(optimizer, count, through=parallel, samples=share(problem))

    steps(3)
    kept, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(problem.model.state_dict())
    steps(3)
    expected = flat(problem.model)
    problem.model.load_state_dict(weights)
    optimizer = NGPlus(parallel, **SETTINGS, ema=0.5, momentum=0.9)
    optimizer.load_state_dict(kept)
    steps(3)
    assert torch.equal(flat(problem.model), expected)
    return outcome(problem.model, optimizer)


def test_saved_and_loaded_processes_go_on_to_the_bit(team):
    agree(team.run(resume_together))


STATE_DICTS = {
    "plain": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}


def resume_by_distributed_checkpoint(form, settings, folder):
    """Save and load by torch's tools, into an optimizer that has made no step; without ``folder`` from memory."""
    options = StateDictOptions(**STATE_DICTS[form])

    def start():
        problem = convolutional()
        parallel = DistributedDataParallel(problem.model)
        return problem, parallel, NGPlus(parallel, **{**SETTINGS, "update_every": 3, **settings})

    def steps(problem, parallel, optimizer, count):
        problem.train(optimizer, count, through=parallel, samples=share(problem))

    problem, parallel, optimizer = start()
    steps(problem, parallel, optimizer, 5)
    model, state = get_state_dict(parallel, optimizer, options=options)
    if folder is None:
        model, state = copy.deepcopy((model, state))
    else:
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    steps(problem, parallel, optimizer, 4)
    expected = flat(problem.model)

    problem, parallel, optimizer = start()
    if folder is not None:
        model, state = get_state_dict(parallel, optimizer, options=options)
        filled = {"model": model, "optimizer": state}
        dcp.load(filled, checkpoint_id=folder)
        model, state = filled["model"], filled["optimizer"]
    if form == "broadcast" and dist.get_rank() > 0:
        model, state = {}, {}
    set_model_state_dict(parallel, model, options=options)
    set_optimizer_state_dict(parallel, optimizer, state, options=options)
    steps(problem, parallel, optimizer, 4)
    assert torch.equal(flat(problem.model), expected)
    return outcome(problem.model, optimizer)


@pytest.mark.parametrize("kept", ["in files", "in memory"])
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"base": torch.optim.Adam, "ema": 0.5}], ids=str)
@pytest.mark.parametrize("form", STATE_DICTS)
def test_processes_that_are_saved_by_torchs_own_tools_go_on_to_the_bit(team, form, settings, kept, tmp_path):
    folder = str(tmp_path) if kept == "in files" else None
    agree(team.run(resume_by_distributed_checkpoint, form, settings, folder))


def ask_before_the_first_step(asked):
    problem = perceptron()
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, **{**SETTINGS, "update_every": 3})
    if asked:
        get_optimizer_state_dict(parallel, optimizer)
    problem.train(optimizer, 4, through=parallel, samples=share(problem))
    return outcome(problem.model, optimizer)


def test_reading_the_state_before_the_first_step_does_not_change_training(team):
    asked, plain = (agree(team.run(ask_before_the_first_step, each)) for each in (True, False))
    assert torch.equal(flat(asked["model"]), flat(plain["model"]))
    assert len(asked["curvature"]) == 2


def train_with_other_intervals():
    problem = perceptron(samples=2)
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, lr=0.1, update_every=2 + dist.get_rank())
    problem.loss(parallel, share(problem)).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_processes_with_other_settings_are_told_on_the_first_step(team):
    for said in team.run(train_with_other_intervals):
        assert "process 0 alone has update_every=2 and process 1 alone has update_every=3" in said


def train_unfactorisable():
    """Curvature of rank below its side, compared with which the damping is lost to rounding."""
    problem = perceptron(samples=2)
    parallel = DistributedDataParallel(problem.model)
    optimizer = NGPlus(parallel, lr=1e-300, damping=1e-18, update_every=1)
    with recorded_warnings() as caught:
        problem.loss(parallel, share(problem)).backward()
        optimizer.step()
    warned = [message for message in caught if "damping" in message]
    return {**outcome(problem.model, optimizer), "warned": warned}


def test_all_processes_raise_the_damping_alike(team):
    first, second = team.run(train_unfactorisable)
    agree([first, second])
    assert first["warned"] == second["warned"]
    assert first["warned"]


def flat_parameters():
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = FullyShardedDataParallel(perceptron().model, use_orig_params=True, device_id=torch.device("cpu"))
    errors = []
    for model in (old, old.module):
        with pytest.raises(TypeError) as caught:
            NGPlus(model)
        errors.append(str(caught.value))
    return errors


def test_the_flat_parameters_of_the_first_fsdp_are_refused_with_the_wrappings_that_work(team):
    for errors in team.run(flat_parameters):
        assert all("FullyShardedDataParallel" in error and "fully_shard" in error for error in errors), errors


def sharded_later(steps):
    """Errors of the step after the model of an optimizer was sharded, by either generation of FSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def first(model):
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
        return model

    def whole(model):
        return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

    def old(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    errors = []
    for shard in (first, whole, old):
        problem = perceptron()
        optimizer = NGPlus(problem.model, **{**SETTINGS, "update_every": 3})
        problem.train(optimizer, steps)
        problem.loss(shard(problem.model)).backward()
        with pytest.raises((TypeError, RuntimeError)) as caught:
            optimizer.step()
        errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_sharded_after_its_optimizer_was_made_is_refused_on_the_next_step(team, steps):
    for first, whole, old in team.run(sharded_later, steps):
        assert first.startswith("0.weight, 0.bias became a DTensor after the optimizer was made")
        assert whole.startswith("0.weight, 0.bias, 2.weight, 2.bias became a DTensor after the optimizer was made")
        assert all("make the optimizer after fully_shard" in error for error in (first, whole))
        assert old.startswith(
            "0.weight is a part of a FullyShardedDataParallel's flat parameter: NG+ needs weights that have rows"
        )


def train_after_one_has_loaded():
    problem = perceptron(samples=2)
    parallel = DistributedDataParallel(problem.model)
    settings = {"lr": 0.1, "damping": 0.1, "update_every": 3}
    optimizer = NGPlus(parallel, **settings)
    problem.train(optimizer, 4, through=parallel, samples=share(problem))
    state, optimizer = optimizer.state_dict(), NGPlus(parallel, **settings)
    if dist.get_rank() == 0:
        optimizer.load_state_dict(state)
    problem.loss(parallel, share(problem)).backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_a_process_that_has_loaded_a_state_alone_is_named_on_the_next_step(team):
    """Its step is no curvature step, where the others' is one."""
    for said in team.run(train_after_one_has_loaded):
        assert "process 0 alone has made 4 steps and process 1 alone has made 0 steps" in said
