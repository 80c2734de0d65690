"""Autocast and `torch.amp.GradScaler`, compared with the same steps in full precision."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import SETTINGS, attentive, convolutional, distance, flat, perceptron

SCALE = 2.0**16
PROBLEMS = [perceptron, convolutional, attentive]


def scaler(**options) -> GradScaler:
    return GradScaler("cpu", **{"init_scale": SCALE, **options})


def scaled_step(problem, optimizer, scale, samples=slice(None), factor=1.0):
    scale.scale(problem.loss(problem.model, samples) * factor).backward()
    scale.step(optimizer)
    scale.update()


def after_three_full_steps(make, **settings):
    """A problem before, and its model after three steps in float32."""
    problem = make(torch.float32)
    start = copy.deepcopy(problem.model)
    full = make(torch.float32)
    full.train(NGPlus(full.model, **SETTINGS, **settings), 3)
    return problem, start, full.model


@pytest.mark.parametrize("make", PROBLEMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_moves_like_full_precision(make, dtype, tolerance):
    problem, start, full = after_three_full_steps(make)
    optimizer = NGPlus(problem.model, **SETTINGS)
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            loss = problem.loss(problem.model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(problem.model, full, start) < tolerance
    assert all(tensor.dtype == torch.float32 for state in optimizer.curvature.values() for tensor in state.tensors())


def wide(autocast, optimizer, closure, **options):
    """The weights after a curvature step and a plain one of layers that few samples leave of low rank."""
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 40))
    trained = optimizer(model, lr=0.1, damping=0.01, update_every=2, **options)

    def evaluate(x):
        trained.zero_grad()
        with torch.autocast("cpu", enabled=False):
            loss = model(x).square().mean()
            loss.backward()
        return loss

    for x in torch.randn(2, 6, 20):
        if not closure:
            evaluate(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            trained.step((lambda x=x: evaluate(x)) if closure else None)
    return flat(model)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (NGPlus, {}),
        (NGPlus, {"solver": "dense"}),
        (NGPlus, {"solver": "sketched", "sketch_size": 4}),
        (NGPlus, {"block_size": 8}),
        (NGPlus, {"curvature": "mini_batch"}),
        (KFAC, {}),
        (SENG, {}),
        (SENG, {"sketch_size": 50}),
        (Shampoo, {}),
    ],
)
def test_a_step_inside_autocast_is_the_same_step(optimizer, options, closure):
    assert torch.equal(wide(True, optimizer, closure, **options), wide(False, optimizer, closure, **options))


@pytest.mark.parametrize("make", PROBLEMS)
def test_a_scaled_loss_gives_the_same_steps(make):
    problem, start, full = after_three_full_steps(make)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler()
    for _ in range(3):
        scaled_step(problem, optimizer, scale)
        optimizer.zero_grad()
    assert scale.get_scale() == SCALE
    assert distance(problem.model, full, start) < 1e-5


@pytest.mark.parametrize("make", PROBLEMS)
def test_fp16_autocast_with_a_scaler_moves_like_full_precision(make):
    problem, start, full = after_three_full_steps(make)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler(init_scale=2.0**12)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = problem.loss(problem.model)
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
    assert scale.get_scale() == 2.0**12
    assert distance(problem.model, full, start) < 0.01


def test_a_scale_that_changes_every_step_gives_the_same_steps():
    problem, start, full = after_three_full_steps(perceptron)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler(growth_interval=1)
    for _ in range(3):
        scaled_step(problem, optimizer, scale)
        optimizer.zero_grad()
    assert scale.get_scale() == SCALE * 8
    assert distance(problem.model, full, start) < 1e-5


def test_unscaling_for_clipping_leaves_the_curvature_unscaled():
    problem, plain = perceptron(torch.float32), perceptron(torch.float32)
    start = copy.deepcopy(problem.model)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler()
    reference = NGPlus(plain.model, **SETTINGS)
    for _ in range(3):
        plain.loss(plain.model).backward()
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        scale.scale(problem.loss(problem.model)).backward()
        scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(problem.model.parameters(), 0.5)
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
    assert distance(problem.model, plain.model, start) < 1e-5


def test_a_disabled_scaler_changes_nothing():
    problem, start, full = after_three_full_steps(perceptron)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler(enabled=False)
    for _ in range(3):
        scaled_step(problem, optimizer, scale)
        optimizer.zero_grad()
    assert distance(problem.model, full, start) == 0


def test_scaled_micro_batches_are_one_batch():
    problem, start, full = after_three_full_steps(perceptron)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler()
    for _ in range(3):
        scale.scale(problem.loss(problem.model, slice(0, 3)) / 2).backward()
        scaled_step(problem, optimizer, scale, slice(3, None), factor=0.5)
        optimizer.zero_grad()
    assert distance(problem.model, full, start) < 1e-5


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("zero", ["optimizer", "model"])
def test_a_step_that_overflows_is_skipped_and_leaves_nothing_behind(curvature, zero):
    problem, start, full = after_three_full_steps(perceptron, curvature=curvature)
    optimizer, scale = NGPlus(problem.model, **SETTINGS, curvature=curvature), scaler()
    scaled_step(problem, optimizer, scale, factor=1e36)
    assert distance(problem.model, start) == 0
    assert scale.get_scale() == SCALE / 2
    assert not optimizer.curvature
    {"optimizer": optimizer, "model": problem.model}[zero].zero_grad()
    for _ in range(3):
        scaled_step(problem, optimizer, scale)
        {"optimizer": optimizer, "model": problem.model}[zero].zero_grad()
    assert distance(problem.model, full, start) < 1e-5


def test_a_later_overflowing_curvature_step_keeps_the_curvature_and_is_repeated():
    problem, start, full = after_three_full_steps(perceptron)
    optimizer, scale = NGPlus(problem.model, **SETTINGS), scaler()
    for _ in range(2):
        scaled_step(problem, optimizer, scale)
        optimizer.zero_grad()
    kept = {name: state.updates for name, state in optimizer.curvature.items()}
    before = flat(problem.model)
    scaled_step(problem, optimizer, scale, factor=1e36)  # step 2 is a curvature step
    optimizer.zero_grad()
    assert torch.equal(flat(problem.model), before)
    assert {name: state.updates for name, state in optimizer.curvature.items()} == kept
    scaled_step(problem, optimizer, scale)
    assert distance(problem.model, full, start) < 1e-5


def test_sums_that_overflow_while_gradients_do_not_are_built_again_on_the_next_step():
    problem = perceptron(torch.float32)
    optimizer = NGPlus(problem.model, lr=1e-30, damping=0.3, update_every=1000)
    (problem.loss(problem.model) * 1e25).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not optimizer.curvature
    assert torch.isfinite(flat(problem.model)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.train(optimizer, 1)
    assert {name: state.updates for name, state in optimizer.curvature.items()} == {"0.weight": 1, "2.weight": 1}


def test_a_model_in_bfloat16_keeps_its_curvature_in_float32():
    problem, full = perceptron(torch.float32), perceptron(torch.float32)
    start = copy.deepcopy(problem.model)
    problem.model.bfloat16()
    problem.inputs, problem.targets = problem.inputs.bfloat16(), problem.targets.bfloat16()
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.train(optimizer, 1)
    full.train(NGPlus(full.model, **SETTINGS), 1)
    assert optimizer.curvature["0.weight"].tensors()[0].dtype == torch.float32
    assert distance(problem.model, full.model, start) < 0.2  # bfloat16 weights resolve 2⁻⁸ of themselves
