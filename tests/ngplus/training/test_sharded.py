"""`fully_shard` over two and four processes, compared with one process on the joint batch."""

import functools
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ngplus import NGPlus
from ngplus.baselines import KFAC
from ngplus.sharded import placement
from ngplus.tuning import DEFAULT
from tests.ngplus.allocations import LiveStorages
from tests.ngplus.cases import recorded_warnings, seed_cpu
from tests.ngplus.training.problems import SETTINGS, Problem, attentive, convolutional, flat, perceptron
from tests.ngplus.training.processes import Team
from tests.ngplus.training.sharding import counted, distance, own_samples, shard, train_sharded, whole_parameters

pytestmark = pytest.mark.slow  # starting the processes is

INVERSES = ("auto", "replicated", "sharded")


class Tied(nn.Module):
    """A table whose weight is the head's too, and a layer of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.score = nn.Linear(11, 1)
        self.head.weight = self.table.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.score(self.head(torch.tanh(self.mix(self.table(index)).sum(1))))


def tied(samples: int = 4) -> Problem:
    seed_cpu(0)
    return Problem(Tied().double(), torch.randint(11, (samples, 5)), torch.randn(samples, 1).double())


class Separate(nn.Module):
    """Attention whose projections are three weights with one packed bias, whose shards are not those of their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, self.key(x), self.value(x), need_weights=False)[0].mean(1)


def separate(samples: int = 4) -> Problem:
    seed_cpu(0)
    return Problem(Separate().double(), torch.randn(samples, 3, 8).double(), torch.randn(samples, 8).double())


def depthwise(samples: int = 4) -> Problem:
    """A depthwise convolution, whose groups are rows, and one of three groups that are higher than wide."""
    seed_cpu(0)
    model = nn.Sequential(
        nn.Conv1d(6, 6, 3, groups=6), nn.Tanh(), nn.Conv1d(6, 15, 1, groups=3), nn.Flatten(), nn.Linear(60, 2)
    ).double()
    return Problem(model, torch.randn(samples, 6, 6).double(), torch.randn(samples, 2).double())


class Mixer(nn.Module):
    """Matrices of its own: positions, a product, a batch of three, and one that is differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.scale = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(4))
        self.mix, self.heads = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4, 2))
        self.centres = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("bti,io->bto", x + self.positions * self.scale.exp(), self.mix).tanh()
        x = torch.einsum("bti,hio->btho", x, self.heads).flatten(2)
        return torch.cdist(x, self.centres)


class Bare(nn.Module):
    """Matrices of no supported module, in a part of the model and in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.matrix = Mixer(), nn.Parameter(torch.randn(7, 3))
        self.head = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.mixer(x).mean(1) @ self.matrix).tanh())


def bare(samples: int = 4) -> Problem:
    seed_cpu(0)
    return Problem(Bare().double(), torch.randn(samples, 5, 4).double(), torch.randn(samples, 3).double())


class Recurrent(nn.Module):
    """Two layers of an LSTM, of which one process has more rows than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(4, 3, num_layers=2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x.transpose(0, 1))[0].mean(0))


def recurrent(samples: int = 4) -> Problem:
    seed_cpu(0)
    return Problem(Recurrent().double(), torch.randn(samples, 5, 4).double(), torch.randn(samples, 2).double())


@functools.cache
def alone(make, steps=4, oracle=False, size=4, **settings):
    """The model after one process trained on the joint batch; by the oracle, one sample at a time."""
    problem = make(samples=size)
    if oracle:
        return problem.plain_run(steps, **settings)
    problem.train(NGPlus(problem.model, **{**SETTINGS, **settings}), steps)
    return problem.model


def assert_equals_one_process(outcomes, model):
    for each in outcomes:
        assert torch.equal(each["parameters"], outcomes[0]["parameters"])
        assert distance(each["parameters"], model) < 1e-10


# Equality with one process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverses", INVERSES)
@pytest.mark.parametrize("make", [perceptron, convolutional, attentive, tied, separate, depthwise, bare, recurrent])
def test_two_processes_with_shards_are_one_on_the_joint_batch(team, make, inverses):
    made = functools.partial(make, samples=4)
    outcomes = team.run(train_sharded, made, {"inverses": inverses, "momentum": 0.9}, {})
    assert_equals_one_process(outcomes, alone(make, momentum=0.9))


@pytest.mark.parametrize("make", [perceptron, convolutional, attentive, bare, recurrent])
def test_two_processes_with_shards_match_the_oracle_of_single_samples(team, make):
    outcomes = team.run(train_sharded, functools.partial(make, samples=4), {}, {})
    assert_equals_one_process(outcomes, alone(make, oracle=True))


@pytest.mark.parametrize(
    ("wrapping", "inverses"),
    [
        ({}, "auto"),
        ({}, "replicated"),
        ({"placed": True}, "replicated"),
        ({"replicas": 2}, "sharded"),
        ({"replicas": 2, "placed": True}, "replicated"),
    ],
)
@pytest.mark.parametrize("make", [perceptron, convolutional, tied, bare])
def test_four_processes_in_one_or_two_mesh_dimensions_are_one_on_the_joint_batch(
    team_of_four, make, wrapping, inverses
):
    """Of the four, some have a shard without rows."""
    outcomes = team_of_four.run(train_sharded, functools.partial(make, samples=4), {"inverses": inverses}, wrapping)
    assert_equals_one_process(outcomes, alone(make))


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.7, "block_size": 3},
        {"base": torch.optim.Adam, "ema": 0.5},
        {"curvature": "mini_batch"},
        {"curvature": "mini_batch", "ema": 0.5, "block_size": 2},
        {"solver": "sketched", "sketch_size": 100},
        {"damping_rule": "released", "weight_decay": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [convolutional, attentive])
def test_the_other_variants_are_one_process_on_the_joint_batch_too(team, make, settings):
    for inverses in ("replicated", "sharded"):
        outcomes = team.run(train_sharded, functools.partial(make, samples=4), {**settings, "inverses": inverses}, {})
        assert_equals_one_process(outcomes, alone(make, **settings))


def message_of_a_batch_cut_inside():
    model = shard(bare().model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 and p.shape[1] == 4 else None)
    with recorded_warnings() as messages:
        optimizer = NGPlus(model, **SETTINGS)
    return messages, [layer.name for layer in optimizer._layers]


def test_a_batch_of_matrices_that_is_sharded_inside_them_goes_to_the_base_with_a_warning(team):
    for messages, layers in team.run(message_of_a_batch_cut_inside):
        assert len(messages) == 1
        assert "mixer.heads (" in messages[0]
        assert "let fully_shard shard it along dimension 0; it goes to SGD untouched" in messages[0]
        assert "mixer.heads" not in layers
        assert "mixer.mix" in layers


def train_through_a_retained_graph():
    problem = bare()
    model = shard(problem.model)
    optimizer = NGPlus(model, **SETTINGS)
    problem.loss(model, own_samples(problem)).backward(retain_graph=True)
    with recorded_warnings() as messages:
        optimizer.step()
    return messages, set(optimizer.curvature)


def test_functions_that_are_differentiated_again_through_a_retained_graph_leave_their_weights_to_the_base(team):
    for messages, curvature in team.run(train_through_a_retained_graph):
        assert len(messages) == 1
        assert "weights are sharded again before" in messages[0]
        assert all(name in messages[0] for name in ("mixer.positions", "mixer.centres"))
        assert curvature == {"mixer.mix", "mixer.heads", "matrix", "head.weight"}


def train_in_small_exchanges(make):
    with pytest.MonkeyPatch.context() as patch:
        sizes = ("exchanged_elements", "averaged_elements", "inverted_elements")
        patch.setattr(NGPlus, "tuning", replace(DEFAULT, **dict.fromkeys(sizes, 1)))
        return train_sharded(make, {"inverses": "sharded"}, {})


@pytest.mark.parametrize("make", [convolutional, attentive])
def test_layers_that_are_exchanged_averaged_and_inverted_one_by_one_are_the_same(team, make):
    assert_equals_one_process(team.run(train_in_small_exchanges, functools.partial(make, samples=4)), alone(make))


def train_from_meta():
    """Parameters that get their memory, and their values, after they were sharded."""
    problem = perceptron(samples=4)
    values = {name: value.clone() for name, value in problem.model.state_dict().items()}
    model = shard(problem.model.to("meta"))
    model.to_empty(device="cpu")
    set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
    problem.train(NGPlus(model, **SETTINGS), 4, samples=own_samples(problem))
    return {"parameters": whole_parameters(model)}


def test_a_model_may_be_sharded_on_the_meta_device(team):
    assert_equals_one_process(team.run(train_from_meta), alone(perceptron))


def train_with_a_new_group():
    """A layer that is added later, and one whose bias is frozen meanwhile."""
    problem = perceptron(samples=4)
    model = shard(problem.model)
    optimizer = NGPlus(model, **SETTINGS, params=list(model[0].parameters()), inverses="sharded")
    problem.train(optimizer, 1, samples=own_samples(problem))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    problem.train(optimizer, 2, samples=own_samples(problem))
    model[0].bias.requires_grad_(False)
    problem.train(optimizer, 3, samples=own_samples(problem))
    return {"parameters": whole_parameters(model)}


def new_group_alone():
    problem = perceptron(samples=4)
    model = problem.model
    optimizer = NGPlus(model, **SETTINGS, params=list(model[0].parameters()))
    problem.train(optimizer, 1)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    problem.train(optimizer, 2)
    model[0].bias.requires_grad_(False)
    problem.train(optimizer, 3)
    return model


def test_layers_that_are_added_and_biases_that_are_frozen_are_one_process_too(team):
    assert_equals_one_process(team.run(train_with_a_new_group), new_group_alone())


def train_rows(attention_apart):
    problem = attentive(samples=4)
    parts = [problem.model.table, problem.model.attention, problem.model.head] if attention_apart else []
    for part in parts:
        fully_shard(part)
    fully_shard(problem.model)
    problem.train(NGPlus(problem.model, **SETTINGS, samples="rows"), 4, samples=own_samples(problem))
    return {"parameters": whole_parameters(problem.model)}


def test_rows_of_attention_are_samples_as_long_as_its_three_inputs_stay_one_tensor(team):
    """`fully_shard` hands a part that is sharded by itself a view of its own for each input."""
    assert_equals_one_process(team.run(train_rows, False), alone(attentive, samples="rows"))
    apart = team.run(train_rows, True)[0]["parameters"]
    assert distance(apart, alone(attentive, samples="rows")) > 1e-3


def train_accumulating(make, syncs, policy):
    problem = make(samples=8)
    model = shard(problem.model, **policy)
    optimizer = NGPlus(problem.model, **SETTINGS)
    start = own_samples(problem).start
    for _ in range(4):
        for part, last in ((slice(start, start + 2), False), (slice(start + 2, start + 4), True)):
            model.set_requires_gradient_sync(syncs or last)
            (problem.loss(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": whole_parameters(model)}


@pytest.mark.parametrize("syncs", [True, False])
@pytest.mark.parametrize("make", [perceptron, attentive, bare, recurrent])
def test_accumulation_with_and_without_synchronizing_is_one_batch(team, make, syncs):
    assert_equals_one_process(team.run(train_accumulating, make, syncs, {}), alone(make, size=8))


def train_reducing_over_replicas_last(make):
    problem = make(samples=8)
    model = shard(problem.model, replicas=2)
    optimizer = NGPlus(problem.model, **SETTINGS)
    start = own_samples(problem).start
    for _ in range(4):
        for part, last in ((slice(start, start + 1), False), (slice(start + 1, start + 2), True)):
            model.set_requires_all_reduce(last)
            (problem.loss(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": whole_parameters(model)}


@pytest.mark.parametrize("make", [perceptron, attentive, bare, recurrent])
def test_accumulation_that_reduces_over_replicas_at_the_end_is_one_batch(team_of_four, make):
    assert_equals_one_process(team_of_four.run(train_reducing_over_replicas_last, make), alone(make, size=8))


def train_with(make, change):
    problem = make(samples=4)
    start, own = own_samples(problem).start, own_samples(problem)
    model = problem.model
    if change == "compiled":
        for child in model.children():
            child.compile(backend="eager")
    if change == "checkpointed":
        problem.loss = lambda through, samples: (
            (checkpoint(through, problem.inputs[samples], use_reentrant=False) - problem.targets[samples])
            .square()
            .mean(0)
            .sum()
        )
    shard(model)
    optimizer = NGPlus(model, **SETTINGS)
    for _ in range(4):
        problem.loss(model, own).backward()
        if change == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": whole_parameters(model), "start": start}


def clipped_alone():
    problem = perceptron(samples=4)
    optimizer = NGPlus(problem.model, **SETTINGS)
    for _ in range(4):
        problem.loss(problem.model).backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return problem.model


@pytest.mark.parametrize("change", ["compiled", "checkpointed", "clipped"])
def test_compiled_blocks_checkpoints_and_clipping_are_one_process_too(team, change):
    expected = clipped_alone() if change == "clipped" else alone(perceptron)
    assert_equals_one_process(team.run(train_with, perceptron, change), expected)


def train_in_bfloat16(syncs):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def make(samples: int) -> Problem:
        exact = perceptron(samples=samples)
        return Problem(exact.model.float(), exact.inputs.float(), exact.targets.float())

    with recorded_warnings() as said:
        outcome = train_accumulating(make, syncs, {"mp_policy": policy})
    return {**outcome, "said": said}


@pytest.mark.parametrize("syncs", [True, False])
def test_a_policy_of_bfloat16_has_curvature_in_float32_close_to_that_of_float64(team, syncs):
    start, trained = perceptron(samples=8).model, alone(perceptron, size=8)
    moved = distance(torch.cat([p.detach().flatten() for p in start.parameters()]), trained)
    for each in team.run(train_in_bfloat16, syncs):
        assert not each["said"]
        assert each["parameters"].dtype == torch.float32
        assert distance(each["parameters"].double(), trained) < 0.03 * moved


def train_after_evaluating():
    """An evaluation leaves the root's weights whole; what reads the model's parameters then must not lose them."""
    problem = perceptron(samples=4)
    model = fully_shard(problem.model)  # whose weights stay whole after a forward pass
    optimizer = NGPlus(model, **SETTINGS)
    problem.train(optimizer, 2, samples=own_samples(problem))
    with torch.no_grad():
        model(problem.inputs)
    optimizer.load_state_dict(optimizer.state_dict())
    problem.train(optimizer, 2, samples=own_samples(problem))
    return {"parameters": whole_parameters(model)}


def train_evaluating_before_the_step():
    problem = perceptron(samples=4)
    model = fully_shard(problem.model)  # whose weights stay whole after a forward pass
    optimizer = NGPlus(model, **SETTINGS)
    for _ in range(4):
        problem.loss(model, own_samples(problem)).backward()
        with torch.no_grad():
            model(problem.inputs)
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": whole_parameters(model)}


def test_an_evaluation_between_backward_and_step_changes_nothing(team):
    assert_equals_one_process(team.run(train_evaluating_before_the_step), alone(perceptron))


def train_in_low_precision(sharded):
    """Weights in bfloat16, which is also what moves."""
    exact = perceptron(samples=4)
    problem = Problem(exact.model.bfloat16(), exact.inputs.bfloat16(), exact.targets.bfloat16())
    model = shard(problem.model) if sharded else DistributedDataParallel(problem.model)
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.train(optimizer, 4, through=model, samples=own_samples(problem))
    return whole_parameters(model) if sharded else flat(problem.model)


def test_weights_in_bfloat16_move_as_under_ddp(team):
    start = flat(perceptron(samples=4).model.bfloat16())
    shards, _ = team.run(train_in_low_precision, True)
    replicas, _ = team.run(train_in_low_precision, False)
    assert (shards.double() - replicas).norm() < 0.02 * (replicas - start).norm()


def test_a_state_that_is_loaded_after_an_evaluation_keeps_every_layer(team):
    assert_equals_one_process(team.run(train_after_evaluating), alone(perceptron))


# NaN -----------------------------------------------------------------------------------------------------------------


def train_with_nan(rank, nonfinite):
    """The gradient of a shard of one process is not finite, on a curvature step and on another."""
    problem = perceptron(samples=4)
    model = shard(problem.model)
    optimizer = NGPlus(model, **{**SETTINGS, "update_every": 3}, nonfinite=nonfinite)
    errors = []
    for step in range(4):
        problem.loss(model, own_samples(problem)).backward()
        if step in (0, 2) and dist.get_rank() == rank:
            model[0].weight.grad.to_local()[0, 0] = float("nan")
        before = whole_parameters(model)
        try:
            optimizer.step()
        except FloatingPointError as error:
            errors.append(str(error))
        optimizer.zero_grad()
        assert torch.equal(whole_parameters(model), before) == (step in (0, 2))
    return {"parameters": whole_parameters(model), "skipped": optimizer.skipped_steps, "errors": errors}


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_nan_in_the_shard_of_one_process_makes_all_skip_or_raise(team, nonfinite):
    first, second = team.run(train_with_nan, 1, nonfinite)
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.isfinite(first["parameters"]).all()
    assert first["skipped"] == second["skipped"] == (2 if nonfinite == "skip" else 0)
    assert len(first["errors"]) == len(second["errors"]) == (0 if nonfinite == "skip" else 2)
    if nonfinite == "raise":
        assert "0.weight" in second["errors"][0]
        assert "another process" in first["errors"][0]


# What a step communicates --------------------------------------------------------------------------------------------


def step_communication(sizes, bias, settings, wrapping):
    """The collectives of a step that is no curvature step, and the elements that this process sends."""
    seed_cpu(0)
    model = nn.Sequential(*[nn.Linear(n, m, bias=bias) for n, m in sizes])
    shard(model, **wrapping)
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=10, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, sizes[0][0])).square().mean().backward()
        if optimizer.curvature_is_due:
            optimizer.step()
    debug = CommDebugMode()
    with counted() as found, debug:
        optimizer.step()
    assert debug.get_total_counts() == len(found.calls)
    return found


RIGHT, LEFT = [(4, 8), (8, 16)], [(16, 8), (8, 4)]
CHECK = "all_reduce"
EXCHANGE = ["all_to_all_single", "all_to_all_single"]


@pytest.mark.parametrize(
    ("sizes", "bias", "settings", "wrapping", "calls"),
    [
        (RIGHT, True, {"inverses": "replicated"}, {}, [CHECK]),
        (RIGHT, True, {}, {}, [CHECK]),
        (RIGHT, True, {"inverses": "sharded"}, {}, [*EXCHANGE, CHECK]),
        (LEFT, True, {"inverses": "replicated"}, {}, [*EXCHANGE, CHECK]),
        (LEFT, True, {"inverses": "sharded"}, {}, [*EXCHANGE, CHECK]),
        (LEFT, False, {}, {"placed": True}, [CHECK]),
        (LEFT, True, {}, {"placed": True}, [*EXCHANGE, CHECK]),
        ([*LEFT, *RIGHT], True, {"inverses": "replicated"}, {}, [*EXCHANGE, CHECK]),
    ],
)
def test_collectives_of_a_step_are_none_for_right_layers_and_two_for_all_others_together(
    team, sizes, bias, settings, wrapping, calls
):
    for found in team.run(step_communication, sizes, bias, settings, wrapping):
        assert found.calls == calls


def test_by_columns_only_biases_move(team):
    first, second = team.run(step_communication, LEFT, True, {"inverses": "replicated"}, {"placed": True})
    # The last process multiplies the biases' columns: it gets the other's rows, and sends their direction back.
    assert first.sent == second.sent == (8 + 4) / 2


@pytest.mark.parametrize("settings", [{"inverses": "replicated"}, {"inverses": "sharded"}], ids=str)
def test_an_exchange_moves_each_element_that_another_process_multiplies_there_and_back(team, settings):
    sent = sum(each.sent for each in team.run(step_communication, [(16, 8), (8, 8)], False, settings, {}))
    assert sent == 2 * (16 * 8 + 8 * 8) / 2


# What a process keeps ------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A layer that is four times as high as wide, or the other way round, between vectors of one size."""

    def __init__(self, size, right):
        super().__init__()
        self.layer = nn.Linear(size, 4 * size) if right else nn.Linear(4 * size, size)

    def forward(self, x):
        if self.layer.in_features > x.shape[1]:
            return torch.tanh(self.layer(x.repeat(1, 4)))
        return torch.tanh(self.layer(x)).unflatten(1, (4, -1)).mean(1)


def peak_memory(right, is_sharded):
    """Of two curvature steps and one that is none; what moves at a time is as small a part as in a large model."""
    model = nn.Sequential(*[Wide(96, right) for _ in range(10)])
    if is_sharded:
        shard(model)
    x = torch.randn(8, 96)
    with pytest.MonkeyPatch.context() as patch:
        sizes = ("grouped_below", "exchanged_elements", "averaged_elements", "inverted_elements")
        patch.setattr(NGPlus, "tuning", replace(DEFAULT, **dict.fromkeys(sizes, 2**12)))
        optimizer = NGPlus(model, lr=0.01, damping=0.3, update_every=2, solver="dense", momentum=0.9)
    with LiveStorages() as live:
        for parameter in model.parameters():
            live.add(parameter)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


@pytest.mark.parametrize("right", [True, False], ids=["right", "left"])
def test_two_processes_take_at_most_three_fifths_of_the_memory_of_one_each(team, right):
    alone = peak_memory(right, is_sharded=False)
    assert max(team.run(peak_memory, right, True)) <= 0.6 * alone


# Bad input -----------------------------------------------------------------------------------------------------------


def message_of(error, make):
    with pytest.raises(error) as caught:
        make()
    return str(caught.value)


def refused_by_two():
    def linear():
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    mesh = init_device_mesh("cpu", (2,))
    parallel = parallelize_module(linear(), mesh, {"0": ColwiseParallel()})
    by_hand = linear()
    by_hand[0].weight = nn.Parameter(distribute_tensor(by_hand[0].weight.detach(), mesh, [Replicate()]))
    sharded = shard(linear())
    unusual = nn.Conv2d(4, 4, 2)
    fully_shard(unusual, shard_placement_fn=lambda parameter: Shard(2) if parameter.dim() > 2 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(mesh), "device_type", "cuda")
        offloaded = message_of(TypeError, lambda: NGPlus(sharded))
    return {
        "offloaded": offloaded,
        "parallel": message_of(TypeError, lambda: NGPlus(parallel)),
        "by hand": message_of(TypeError, lambda: NGPlus(by_hand)),
        "parameters alone": message_of(TypeError, lambda: NGPlus(sharded.parameters(), curvature="mini_batch")),
        "K-FAC": message_of(TypeError, lambda: KFAC(sharded)),
        "eigen": message_of(TypeError, lambda: NGPlus(sharded, torch.optim.Adam, basis="eigen")),
        "third dimension": message_of(TypeError, lambda: NGPlus(unusual)),
        "placed late": message_of(ValueError, lambda: placement(sharded)),
    }


def test_parameters_that_are_distributed_otherwise_are_refused_by_name(team):
    for said in team.run(refused_by_two):
        assert "0.weight" in said["parallel"]
        assert "tensor parallelism is not supported" in said["parallel"]
        assert "tensor parallelism is not supported" in said["by hand"]
        assert "with the model" in said["parameters alone"]
        assert "KFAC needs whole weights" in said["K-FAC"]
        assert "CPUOffloadPolicy is not supported" in said["offloaded"]
        assert "basis='eigen' needs whole weights" in said["eigen"]
        assert "dimension 2" in said["third dimension"]
        assert "0.weight is sharded already" in said["placed late"]


def refused_by_four():
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    half = nn.Sequential(nn.Linear(4, 6))
    fully_shard(half, mesh=two["data"])
    both = parallelize_module(nn.Sequential(nn.Linear(4, 6)), two["tensor"], {"0": ColwiseParallel()})
    fully_shard(both, mesh=two["data"])
    return [message_of(TypeError, lambda: NGPlus(half)), message_of(TypeError, lambda: NGPlus(both))]


def test_a_mesh_with_other_dimensions_is_refused_by_name(team_of_four):
    for half, both in team_of_four.run(refused_by_four):
        assert "2 of the 4 processes" in half
        assert "('data',)" in half
        assert "('data', 'tensor')" in both
        assert "tensor parallelism" in both


def different_models():
    model = shard(nn.Sequential(nn.Linear(4, 6 + dist.get_rank())))
    return message_of(RuntimeError, lambda: NGPlus(model))


def test_processes_with_different_models_are_told_before_the_first_forward_pass(team):
    for said in team.run(different_models):
        assert "process 0 alone has 0.weight (6, 4)" in said
        assert "process 1 alone has 0.weight (7, 4)" in said


def different_settings():
    rank, said = dist.get_rank(), []
    for settings in (
        {"update_every": 2 + rank},
        {"ema": 0.5 * rank},
        {"curvature": ("per_sample", "mini_batch")[rank]},
    ):
        model = shard(nn.Sequential(nn.Linear(4, 6)))
        said.append(message_of(RuntimeError, lambda: NGPlus(model, **settings)))  # noqa: B023
    model = shard(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)))
    model[0].weight.requires_grad_(rank == 0)
    return [*said, message_of(RuntimeError, lambda: NGPlus(model))]


def test_processes_with_other_settings_or_frozen_weights_are_told_before_the_first_forward_pass(team):
    for interval, ema, curvature, frozen in team.run(different_settings):
        assert "process 0 alone has update_every=2 and process 1 alone has update_every=3" in interval
        assert "process 0 alone has ema=0.0 and process 1 alone has ema=0.5" in ema
        assert "process 0 alone has curvature='per_sample' and process 1 alone" in curvature
        assert "process 1 alone has 0.weight frozen" in frozen


def test_inverses_of_a_model_that_is_not_sharded_have_no_choice():
    with pytest.raises(ValueError, match=r"inverses='sharded' is for a model that .* has sharded"):
        NGPlus(nn.Linear(2, 2), inverses="sharded")
    with pytest.raises(ValueError, match="inverses must be one of 'auto', 'replicated', 'sharded', got 'here'"):
        NGPlus(nn.Linear(2, 2), inverses="here")


def die_in_a_curvature_step():
    problem = perceptron(samples=6)
    model = shard(problem.model)
    optimizer = NGPlus(model, **SETTINGS)
    for step in range(3):
        problem.loss(model, own_samples(problem)).backward()
        if step == 2 and dist.get_rank() == 1:
            raise KeyboardInterrupt("killed")
        optimizer.step()
        optimizer.zero_grad()


def end_inside_of_a_curvature_step(collectives):
    """At so many of its collectives."""
    problem = perceptron(samples=6)
    model = shard(problem.model)
    optimizer = NGPlus(model, **SETTINGS)
    left, all_reduce = collectives, dist.all_reduce

    def end(*given, **options):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt("killed")
        return all_reduce(*given, **options)

    problem.loss(model, own_samples(problem)).backward()
    if dist.get_rank() == 1:
        dist.all_reduce = end
    optimizer.step()


def stop_early():
    problem = perceptron(samples=4)
    model = shard(problem.model)
    optimizer = NGPlus(model, **SETTINGS)
    for step in range(3):
        if step == 1 and dist.get_rank() == 1:
            time.sleep(5)
            raise KeyboardInterrupt("out of batches")
        problem.loss(model, own_samples(problem)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_others_end_with_an_error_where_one_process_dies_or_runs_out_of_batches():
    killed = Team(3, seconds=20)
    first, _, third = killed.tracebacks(die_in_a_curvature_step)
    killed.close()
    assert "process 1 did not come to this curvature step" in first
    assert "process 1 did not come to this curvature step" in third
    for collectives in (1, 4):
        killed = Team(3, seconds=20)
        first, _, third = killed.tracebacks(functools.partial(end_inside_of_a_curvature_step, collectives))
        killed.close()
        assert "process 1 ended within this curvature step, or waits for one that did" in first
        assert "process 1 ended within this curvature step, or waits for one that did" in third
    waiting = Team(2, seconds=2)
    first, _ = waiting.tracebacks(stop_early)
    waiting.close()
    assert "RuntimeError" in first
