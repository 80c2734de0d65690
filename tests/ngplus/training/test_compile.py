"""`torch.compile`: the same results, and afterwards the compiler's stance is what it was."""

import copy
import gc

import pytest
import torch
from torch._dynamo import eval_frame

from ngplus import NGPlus
from tests.ngplus.training.problems import (
    SETTINGS,
    attentive,
    collect_optimizers,
    convolutional,
    distance,
    flat,
    perceptron,
)

pytestmark = [
    # Of torch, about every global hook, for a wrapper that is first called on a curvature step.
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning"),
    # Of torch, about the tensors that it traces itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    collect_optimizers()
    assert stance() == "default"


class Backend:
    """The compiler's own eager backend, counting the graphs it gets."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


def stance() -> str:
    return eval_frame._stance.stance


def wrapped_before(model, **options):
    compiled = torch.compile(model, **options)
    return NGPlus(compiled, **SETTINGS), compiled


def wrapped_before_and_model_given(model, **options):
    compiled = torch.compile(model, **options)
    return NGPlus(model, **SETTINGS), compiled


def wrapped_after(model, **options):
    optimizer = NGPlus(model, **SETTINGS)
    return optimizer, torch.compile(model, **options)


def in_place_before(model, **options):
    model.compile(**options)
    return NGPlus(model, **SETTINGS), model


def in_place_after(model, **options):
    optimizer = NGPlus(model, **SETTINGS)
    model.compile(**options)
    return optimizer, model


WAYS = [wrapped_before, wrapped_before_and_model_given, wrapped_after, in_place_before, in_place_after]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [perceptron, convolutional, attentive])
def test_a_compiled_model_trains_like_the_plain_one(way, make):
    problem, backend = make(), Backend()
    optimizer, compiled = way(problem.model, backend=backend)
    problem.train(optimizer, 4, through=compiled)
    assert distance(problem.model, make().plain_run(4)) < 1e-10
    assert backend.graphs > 0  # on the steps between curvature steps


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compiled_in_one_graph_trains_like_the_plain_one(way):
    problem = perceptron()
    optimizer, compiled = way(problem.model, backend="aot_eager", fullgraph=True)
    problem.train(optimizer, 4, through=compiled)
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


def test_a_compiled_layer_within_a_model_is_captured():
    problem = perceptron()
    problem.model[0] = torch.compile(problem.model[0], backend="aot_eager")
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.train(optimizer, 4)
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


def compiled_step(problem, optimizer, **options):
    """Only the optimizer's step is compiled."""
    step = torch.compile(optimizer.step, **options)

    def train_step():
        problem.loss(problem.model).backward()
        step()
        optimizer.zero_grad()

    return train_step


def compiled_train_step(problem, optimizer, **options):
    """Forward, backward, step and zero_grad in one function."""

    def train_step():
        problem.loss(problem.model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return torch.compile(train_step, **options)


def compiled_train_step_with_a_closure(problem, optimizer, **options):
    """The step evaluates the model itself."""

    def train_step():
        def closure():
            optimizer.zero_grad()
            loss = problem.loss(problem.model)
            loss.backward()
            return loss

        optimizer.step(closure)

    return torch.compile(train_step, **options)


STEPS = [compiled_step, compiled_train_step, compiled_train_step_with_a_closure]


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("way", STEPS)
def test_a_compiled_train_step_trains_like_the_plain_one(way, curvature):
    settings = {**SETTINGS, "update_every": 3, "momentum": 0.9, "curvature": curvature}
    plain, problem = perceptron(), perceptron()
    plain.train(NGPlus(plain.model, **settings), 8)
    train_step = way(problem, NGPlus(problem.model, **settings), backend="aot_eager")
    for _ in range(8):
        train_step()
    assert distance(problem.model, plain.model) < 1e-10


def test_what_of_a_compiled_train_step_is_not_the_optimizers_is_compiled():
    problem, backend = perceptron(), Backend()
    optimizer = NGPlus(problem.model, **{**SETTINGS, "update_every": 4})
    train_step, graphs = compiled_train_step(problem, optimizer, backend=backend), []
    for _ in range(5):
        train_step()
        graphs.append(backend.graphs)
    assert graphs[0] == 0  # the curvature step
    assert graphs[1] == graphs[-1] > 0
    assert stance() == "default"


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("way", STEPS)
def test_a_step_inside_one_graph_is_refused_before_anything_moves(way, curvature):
    problem = perceptron()
    train_step = way(problem, NGPlus(problem.model, **SETTINGS, curvature=curvature), backend="eager", fullgraph=True)
    before = flat(problem.model)
    with pytest.raises(RuntimeError, match=r"Optimizer\.step|backward"):
        train_step()
    assert torch.equal(flat(problem.model), before)


def test_a_step_inside_one_graph_is_refused_by_the_compiler_where_no_curvature_is_due():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.train(optimizer, 1)
    before = flat(problem.model)
    with pytest.raises(RuntimeError, match=r"Optimizer\.step"):
        compiled_step(problem, optimizer, backend="eager", fullgraph=True)()
    assert torch.equal(flat(problem.model), before)


@pytest.mark.slow
@pytest.mark.parametrize("way", STEPS)
def test_inductor_runs_a_compiled_train_step_like_the_plain_one(way):
    problem = perceptron()
    train_step = way(problem, NGPlus(problem.model, **SETTINGS))
    for _ in range(4):
        train_step()
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


@pytest.mark.slow
def test_inductor_trains_like_the_plain_model():
    problem = perceptron()
    optimizer, compiled = wrapped_before(problem.model)
    problem.train(optimizer, 4, through=compiled)
    assert distance(problem.model, perceptron().plain_run(4)) < 1e-10


@pytest.mark.parametrize("saved", ["compiled", "plain"])
def test_a_state_loads_with_and_without_the_wrapping(saved):
    wrapped, inner = torch.compile(perceptron().model, backend="eager"), perceptron().model
    model, other = (wrapped, inner) if saved == "compiled" else (inner, wrapped)
    optimizer, resumed = NGPlus(model, **SETTINGS), NGPlus(other, **SETTINGS)
    perceptron().train(optimizer, 3, through=model)
    resumed.load_state_dict(optimizer.state_dict())
    for parameter, value in zip(other.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(value)
    perceptron().train(optimizer, 3, through=model)
    perceptron().train(resumed, 3, through=other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_compiler_is_held_back_on_curvature_steps_only():
    problem = perceptron()
    optimizer, compiled = wrapped_before(problem.model, backend="eager")
    stances = []
    for _ in range(4):
        stances.append(stance())
        problem.train(optimizer, 1, through=compiled)
    assert stances == ["force_eager", "default"] * 2


def test_two_optimizers_hold_the_compiler_until_neither_captures():
    first, second = perceptron(), perceptron()
    ours, theirs = NGPlus(first.model, **SETTINGS), NGPlus(second.model, **SETTINGS)
    first.train(ours, 1)
    assert stance() == "force_eager"  # the second's curvature step is still to come
    second.train(theirs, 1)
    assert stance() == "default"


@pytest.mark.parametrize("end", ["deleted", "loaded", "copied"])
def test_deleting_an_optimizer_that_captures_restores_the_compilers_stance(end):
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    if end == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    if end == "copied":
        copy.deepcopy(optimizer)
    assert stance() == "force_eager"
    del optimizer
    gc.collect()
    assert stance() == "default"


def test_deleting_an_optimizer_before_its_loss_restores_the_compilers_stance():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **{**SETTINGS, "update_every": 1})
    loss = problem.loss(problem.model)
    loss.backward()
    optimizer.step()
    del optimizer
    gc.collect()
    assert stance() == "default"
    assert loss.isfinite()


def test_a_stance_that_was_set_before_is_restored():
    problem = perceptron()
    with torch.compiler.set_stance("eager_on_recompile"):
        problem.train(NGPlus(problem.model, **SETTINGS), 1)
        assert stance() == "eager_on_recompile"
