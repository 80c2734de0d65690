"""Training loops with ``basis="eigen"``: what people do around a step, compared with a plain loop that does not."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from ngplus import NGPlus
from tests.ngplus.cases import parameters_equal, points, recorded_warnings, seed_cpu
from tests.ngplus.training.problems import distance, flat, perceptron

CURVATURES = ["per_sample", "mini_batch", "momentum"]
SIDES = {"per_sample": "both", "mini_batch": "short", "momentum": "short"}
"""With these the small models' matrices have full rank, or lack one: their eigenvectors are unique."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    seed_cpu(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def images(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    seed_cpu(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    return model.to(memory_format=memory_format)


def eigen(model, curvature: str = "per_sample", **options) -> NGPlus:
    settings = {
        "base": torch.optim.AdamW, "lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "update_every": 3,
        "sides": SIDES[curvature],
    }  # fmt: skip
    return NGPlus(model, basis="eigen", curvature=curvature, **{**settings, **options})


def batch(step: int, model: nn.Module) -> Tensor:
    shape = (4,) if isinstance(model[0], nn.Linear) else (2, 3, 3)
    return points(24, *shape, dtype=model[0].weight.dtype, seed=step)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over samples of what is quadratic near zero and bounded far from it."""
    return (model(x) - 1).sin().square().sum(1).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(8)) -> nn.Module:
    for step in steps:
        optimizer.zero_grad()
        loss(model, batch(step, model)).backward()
        optimizer.step()
    return model


def plain(curvature: str, make=network, **options) -> nn.Module:
    model = make()
    return train(model, eigen(model, curvature, **options))


# Loops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_closure_makes_the_same_steps(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    for step in range(8):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            value = loss(model, batch(step, model))
            value.backward()
            return value

        assert optimizer.step(closure) > 0
    assert parameters_equal(model, plain(curvature))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_accumulated_micro_batches_are_one_batch(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    for step in range(8):
        optimizer.zero_grad()
        for part in batch(step, model).split(8):
            (loss(model, part) / 3).backward()
        optimizer.step()
    assert distance(model, plain(curvature)) < 1e-9


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_schedule_of_a_tensor_is_that_of_a_number(curvature, shape):
    def trained(lr: float | Tensor) -> nn.Module:
        model = network()
        optimizer = eigen(model, curvature, lr=lr, foreach=False)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for step in range(6):
            train(model, optimizer, range(step, step + 1))
            schedule.step()
        return model

    lr = torch.full(shape, 0.02, dtype=torch.float64)
    assert distance(trained(lr), trained(0.02)) < 1e-12


def test_one_cycle_changes_the_bases_betas_and_resumes():
    def make() -> tuple[nn.Module, NGPlus, torch.optim.lr_scheduler.OneCycleLR]:
        model = network()
        optimizer = eigen(model)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)

    def go_on(model, optimizer, schedule, steps: range) -> None:
        for step in steps:
            train(model, optimizer, range(step, step + 1))
            schedule.step()

    whole, parts, resumed = make(), make(), make()
    go_on(*whole, range(7))
    go_on(*parts, range(4))
    assert parts[1].base.param_groups[0]["betas"][0] != 0.9
    for ours, theirs in zip(resumed, parts, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    go_on(*resumed, range(4, 7))
    assert parameters_equal(whole[0], resumed[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_autocast_with_a_scaler_moves_like_full_precision(curvature, dtype):
    model, reference = network(torch.float32), network(torch.float32)
    optimizer = eigen(model, curvature)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            value = loss(model, batch(step, model))
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        scaler.step(optimizer)
        scaler.update()
    train(reference, eigen(reference, curvature), range(6))
    assert optimizer.skipped_steps == 0
    assert distance(model, reference, network(torch.float32)) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_weights_of_half_the_bytes_move_like_those_in_float32(curvature, dtype):
    model, reference = network().to(dtype), network().to(dtype).float()
    start = copy.deepcopy(reference)
    optimizer = eigen(model, curvature, eps=1e-2)
    train(model, optimizer, range(6))
    train(reference, eigen(reference, curvature, eps=1e-2), range(6))
    assert optimizer.curvature["0.weight"].preconditioner.main.dtype == torch.float32
    assert optimizer.base.state[model[0].weight]["exp_avg"].dtype == dtype
    assert distance(model, reference, start) < (0.2 if dtype == torch.bfloat16 else 0.05)


def test_coordinates_that_overflow_in_float16_are_no_step():
    """All entries of the gradient are finite, and its one coordinate is 64 times as large."""
    layer = nn.Linear(64, 64, bias=False).half()
    optimizer = eigen(layer, "mini_batch", sides="both")
    layer.weight.grad = torch.full_like(layer.weight, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_channels_last_makes_the_same_steps(curvature):
    ours = plain(curvature, lambda: images(torch.channels_last))
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    theirs = plain(curvature, images)
    assert (ours[0].weight - theirs[0].weight).norm() < 1e-9 * theirs[0].weight.norm()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_groups_have_their_own_rates_and_decays(curvature):
    """A group of lr 0 stays, one that comes later has its own settings."""
    model = network()
    optimizer = eigen(model, curvature, params=[{"params": list(model[0].parameters()), "lr": 0.0}])
    first, second = (copy.deepcopy(model[i]) for i in (0, 2))
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.05, "weight_decay": 0.5})
    assert parameters_equal(model[2], second)
    train(model, optimizer, range(2, 8))
    assert parameters_equal(model[0], first)
    assert set(optimizer.curvature) == {"0.weight", "2.weight"}
    assert not parameters_equal(model[2], second)
    optimizer.param_groups[1].update(lr=1e-9, weight_decay=1e8)  # the decay alone: W ← (1 − 0.1) W
    before = model[2].weight.detach().clone()
    train(model, optimizer, range(8, 9))
    torch.testing.assert_close(model[2].weight.detach(), 0.9 * before, atol=1e-7, rtol=0)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_weight_that_is_frozen_stays_and_goes_on_in_its_basis(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    train(model, optimizer, range(2))
    before, basis = copy.deepcopy(model[2]), optimizer.curvature["2.weight"].preconditioner
    model[2].requires_grad_(False)
    train(model, optimizer, range(2, 7))
    assert parameters_equal(model[2], before)
    assert optimizer.curvature["2.weight"].preconditioner is basis
    model[2].requires_grad_(True)
    train(model, optimizer, range(7, 12))
    assert not torch.equal(model[2].weight, before.weight)
    assert optimizer.curvature["2.weight"].updates == 2


class Branches(nn.Module):
    """A trunk that is always used, and a branch that is where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.trunk(x) + self.branch(x) if both else self.trunk(x)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_layer_that_is_unused_on_a_curvature_step_gets_its_basis_later(curvature):
    seed_cpu(0)
    model = Branches().double()
    optimizer = eigen(model, curvature, update_every=4)
    for step in range(6):
        optimizer.zero_grad()
        model(points(8, 4, seed=step), both=step not in (0, 4)).sin().sum(1).mean().backward()
        optimizer.step()
        assert ("branch.weight" in optimizer.curvature) == (step >= 2)
    assert model.branch.weight.isfinite().all()


# Bases in their implementations -------------------------------------------------------------------------------------


class PenalizedImages(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(2, 4, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).tanh().flatten(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize("way", [{"foreach": True}, {"fused": True}, {"fused": True, "amsgrad": True}], ids=str)
def test_implementations_of_adam_make_the_same_steps_where_a_layer_gains_and_loses_its_basis(way, sides, memory_format):
    """On steps where a penalty on the weight is not captured, its layer goes to the base, stored as the weight is."""

    def trained(**options) -> nn.Module:
        seed_cpu(0)
        model = PenalizedImages().double().to(memory_format=memory_format)
        optimizer = eigen(model, sides=sides, **options)
        has_basis = []
        for step in range(9):
            optimizer.zero_grad()
            value = loss(model, points(12, 2, 3, 3, seed=step))
            if step in (0, 1, 6, 7):
                value = value + model.convolution.weight.square().sum()
            value.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it goes to the base
                optimizer.step()
            has_basis.append("convolution.weight" in optimizer.curvature)
        assert has_basis == [*[False] * 3, *[True] * 3, *[False] * 3]
        return model

    assert distance(trained(**way), trained(foreach=False, amsgrad=way.get("amsgrad", False))) < 1e-9


def test_parameters_alone_are_those_of_a_model():
    """Without a model no layer is a table: both sides have a basis, and the shorter one alone with "short"."""
    for sides in ("short", "both"):
        ours, theirs = network(), network()
        of_parameters = eigen(list(ours.parameters()), "mini_batch", sides=sides)
        of_model = eigen(theirs, "mini_batch", sides=sides)
        train(ours, of_parameters, range(1))
        train(theirs, of_model, range(1))
        modes = [
            [state.preconditioner.modes for state in each.curvature.values()] for each in (of_parameters, of_model)
        ]
        assert modes[0] == modes[1]


def test_a_table_alone_stays_sparse_for_sparse_adam():
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = NGPlus(
        table.parameters(), base=torch.optim.SparseAdam, basis="eigen", sides="both", curvature="mini_batch", lr=0.1
    )
    before = table.weight.detach().clone()
    table(torch.tensor([1, 4, 4])).sin().sum().backward()
    optimizer.step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [1, 4]


def test_two_optimizers_take_turns():
    """Each as if the other's steps were a change of the weights by hand."""
    model = network()
    first, second = eigen(model), eigen(model, "momentum")
    train(model, first, range(2))
    train(model, second, range(2, 4))
    middle = copy.deepcopy(model.state_dict())
    alone = network()
    other = eigen(alone)
    train(alone, other, range(2))
    alone.load_state_dict(middle)
    train(model, first, range(4, 8))
    train(alone, other, range(4, 8))
    assert parameters_equal(model, alone)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_weight_that_has_grown_starts_again(curvature, ema):
    model = nn.Sequential(nn.Linear(4, 6)).double()
    optimizer = eigen(model, curvature, ema=ema, sides="both", update_every=2)
    train(model, optimizer, range(2))
    model[0].weight.data, model[0].bias.data = points(8, 4), points(8)
    model[0].out_features = 8
    optimizer.zero_grad()
    for parameter in model.parameters():
        state = optimizer.base.state[parameter]
        state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    train(model, optimizer, range(2, 6))
    assert optimizer.curvature["0.weight"].preconditioner.modes.outputs == 8
    assert model[0].weight.isfinite().all()


# Copies, files and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_copies_made_between_curvature_steps_go_on_to_the_bit(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    train(model, optimizer, range(5))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(5, 10))
    for each, other in copies:
        train(each, other, range(5, 10))
        assert parameters_equal(model, each)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_distributed_checkpoints_go_on_to_the_bit_between_curvature_steps(curvature, way, tmp_path):
    model = images()
    optimizer = eigen(model, curvature, sides="both", **way)
    train(model, optimizer, range(5))
    saved_model, saved = get_state_dict(model, optimizer)
    dcp.save({"model": saved_model, "optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    again = images()
    other = eigen(again, curvature, sides="both", **way)
    blank_model, blank = get_state_dict(again, other)
    state = {"model": blank_model, "optimizer": blank}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(5, 9))
    train(again, other, range(5, 9))
    assert parameters_equal(model, again)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_reading_the_state_at_any_time_changes_nothing(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    for step in range(8):
        len(optimizer.state)
        assert step == 0 or optimizer.state[model[0].weight]["ngplus_updates"] > 0
        train(model, optimizer, range(step, step + 1))
    assert parameters_equal(model, plain(curvature))


@pytest.mark.parametrize("options", [{"basis": None, "sides": "short"}, {"sides": "short"}, {"max_side": 5}], ids=str)
def test_a_state_that_is_refused_changes_nothing(options):
    def trained(**others) -> tuple[nn.Module, NGPlus]:
        model = network()
        settings = {"basis": "eigen", "sides": "both", "update_every": 3, **others}
        optimizer = NGPlus(model, base=torch.optim.AdamW, lr=0.02, **settings)
        return train(model, optimizer, range(2)), optimizer

    ours, theirs, reference = trained(), trained(**options), trained()
    for refusing, refused in ((ours, theirs), (theirs, ours)):
        with pytest.raises(ValueError, match=r"basis|sides|no layers here"):
            refusing[1].load_state_dict(refused[1].state_dict())
    train(*ours, range(2, 6))
    train(*reference, range(2, 6))
    assert parameters_equal(ours[0], reference[0])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_an_optimizer_is_released_with_its_last_reference(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    train(model, optimizer, range(4))
    gc.collect()
    gc.disable()
    try:
        references = [weakref.ref(each) for each in (optimizer, optimizer.base)]
        references += [weakref.ref(state) for state in optimizer.curvature.values()]
        del optimizer
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_no_memory_is_left_behind_by_a_step(curvature):
    model = network()
    optimizer = eigen(model, curvature, ema=0.5, partial_capture="accept")  # comparing keeps views of its signs

    def memory() -> int:
        gc.collect()
        storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    train(model, optimizer, range(40))
    before = memory()
    train(model, optimizer, range(40, 139))
    assert memory() <= before


# Hooks, compiled code, times ------------------------------------------------------------------------------------------


def test_hooks_run_once_a_step_and_see_the_gradient_in_its_own_place():
    """Those of the optimizer see what backward brought; those of the base coordinates, of equal length."""
    model = network()
    optimizer = eigen(model, sides="both")
    norms: dict[str, list[float]] = {}

    def record(name: str):
        return lambda *_: norms.setdefault(name, []).append(float(model[0].weight.grad.norm()))

    optimizer.register_step_pre_hook(record("before"))
    optimizer.register_step_post_hook(record("after"))
    optimizer.base.register_step_pre_hook(record("before the base"))
    optimizer.base.register_step_post_hook(record("after the base"))
    train(model, optimizer, range(3))
    assert list(norms) == ["before", "before the base", "after the base", "after"]
    for each in norms.values():
        assert each == pytest.approx(norms["before"], rel=1e-12)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(curvature):
    model = network()
    optimizer = eigen(model, curvature, nonfinite="raise")
    train(model, optimizer, range(3))  # the next is a curvature step
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss(model, batch(3, model)).backward()
    model[0].weight.grad[0, 0] = torch.nan
    gradient = model[0].weight.grad
    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        optimizer.step()
    assert model[0].weight.grad is gradient
    assert parameters_equal(model, before)
    after = optimizer.state_dict()
    for index, entries in state["state"].items():
        assert all(
            torch.equal(torch.as_tensor(each), torch.as_tensor(after["state"][index][name]))
            for name, each in entries.items()
        )
    train(model, optimizer, range(3, 8))
    assert parameters_equal(model, plain(curvature))


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_compiled_model_and_a_compiled_step_make_the_same_steps(curvature):
    model = network()
    optimizer = eigen(model, curvature)
    compiled, step = torch.compile(model, backend="eager"), torch.compile(optimizer.step, backend="eager")
    for number in range(8):
        optimizer.zero_grad()
        loss(compiled, batch(number, model)).backward()
        step()
    assert distance(model, plain(curvature)) < 1e-12


def test_times_has_every_stage():
    model = network()
    optimizer = eigen(model)
    optimizer.track_times()
    train(model, optimizer, range(2))
    assert all(seconds > 0 for seconds in (optimizer.times.curvature, optimizer.times.inverse, optimizer.times.apply))


def test_bare_parameters_go_to_the_base_with_a_warning():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.matrices = nn.Linear(4, 6), nn.Parameter(points(2, 6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x) @ self.matrices).sum(0)

    model = Scaled().double()
    with recorded_warnings() as messages:
        optimizer = eigen(model)
    assert len(messages) == 1
    assert "matrices (Scaled): basis=" in messages[0]
    before = model.matrices.detach().clone()
    loss(model, points(8, 4)).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"first.weight"}
    assert not torch.equal(model.matrices, before)


# Several processes ----------------------------------------------------------------------------------------------------


def train_parallel(curvature: str, first: int) -> dict:
    problem = perceptron(samples=12)
    parallel = DistributedDataParallel(problem.model)
    optimizer = eigen(parallel, curvature, update_every=2)
    mine = slice(0, first) if dist.get_rank() == 0 else slice(first, None)
    share = 2 * len(problem.inputs[mine]) / len(problem.inputs)
    for _ in range(6):
        optimizer.zero_grad()
        (share * problem.loss(parallel, mine)).backward()  # the mean of both is that of the joint batch
        optimizer.loss_reduction = 12 / 2
        optimizer.step()
    return {"model": problem.model, "bases": bases(optimizer)}


def bases(optimizer: NGPlus) -> list[Tensor]:
    return [tensor.clone() for state in optimizer.curvature.values() for tensor in state.tensors()]


@pytest.mark.slow
@pytest.mark.parametrize("first", [6, 3])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_two_processes_are_one_on_the_joint_batch(team, curvature, first):
    ours, theirs = team.run(train_parallel, curvature, first)
    assert torch.equal(flat(ours["model"]), flat(theirs["model"]))
    assert all(torch.equal(*pair) for pair in zip(ours["bases"], theirs["bases"], strict=True))
    joint = perceptron(samples=12)
    optimizer = eigen(joint.model, curvature, update_every=2)
    joint.train(optimizer, 6)
    assert distance(ours["model"], joint.model) < 1e-9


UNEVEN = [(slice(0, 3), slice(3, 6)), (slice(6, 9), slice(9, 12)), (slice(12, 15), None), (slice(15, 18), None)]
"""Of each step, what each process has."""


def train_unevenly(curvature: str, first_to_end: int) -> dict:
    problem = perceptron(samples=18)
    parallel = DistributedDataParallel(problem.model)
    optimizer = eigen(parallel, curvature, update_every=1)
    place = dist.get_rank() if first_to_end == 1 else 1 - dist.get_rank()
    with Join([parallel, optimizer], divide_by_initial_world_size=False):
        for mine in (step[place] for step in UNEVEN if step[place] is not None):
            optimizer.zero_grad()
            problem.loss(parallel, mine).backward()
            optimizer.step()
    return {"model": problem.model, "bases": bases(optimizer)}


@pytest.mark.slow
@pytest.mark.parametrize("first_to_end", [0, 1])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_processes_of_which_one_ends_first_are_one_on_their_batches(team, curvature, first_to_end):
    ours, theirs = team.run(train_unevenly, curvature, first_to_end)
    assert torch.equal(flat(ours["model"]), flat(theirs["model"]))
    assert all(torch.equal(*pair) for pair in zip(ours["bases"], theirs["bases"], strict=True))
    joint = perceptron(samples=18)
    optimizer = eigen(joint.model, curvature, update_every=1)
    for first, second in UNEVEN:
        optimizer.zero_grad()
        joint.loss(joint.model, slice(first.start, (second or first).stop)).backward()
        optimizer.step()
    assert distance(ours["model"], joint.model) < 1e-9


def train_a_table(base: type[torch.optim.Optimizer], curvature: str) -> dict:
    seed_cpu(0)
    table = nn.Embedding(20, 3, sparse=True).double()
    parallel = DistributedDataParallel(table)
    optimizer = NGPlus(
        parallel, base=base, basis="eigen", sides="both", curvature=curvature, update_every=2, lr=0.1, eps=1e-4
    )
    for step in range(4):
        optimizer.zero_grad()
        rows = table_batch(step).chunk(2)[dist.get_rank()]
        parallel(rows).sin().square().sum((1, 2)).mean().backward()
        optimizer.step()
    return {"model": table, "bases": bases(optimizer)}


def table_batch(step: int) -> Tensor:
    return torch.randint(20, (8, 2), generator=torch.Generator().manual_seed(step))


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("base", [torch.optim.SparseAdam, torch.optim.Adagrad])
def test_tables_with_sparse_gradients_over_two_processes_are_one_on_the_joint_batch(team, base, curvature):
    ours, theirs = team.run(train_a_table, base, curvature)
    assert torch.equal(flat(ours["model"]), flat(theirs["model"]))
    seed_cpu(0)
    table = nn.Embedding(20, 3, sparse=True).double()
    optimizer = NGPlus(
        table, base=base, basis="eigen", sides="both", curvature=curvature, update_every=2, lr=0.1, eps=1e-4
    )
    for step in range(4):
        optimizer.zero_grad()
        table(table_batch(step)).sin().square().sum((1, 2)).mean().backward()
        optimizer.step()
    assert distance(ours["model"], table) < 1e-9
