"""Every way to keep and to invert L or R, against plain loops and closed forms in float64."""

import copy

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import SENG
from ngplus.capture import accumulator
from ngplus.layers import MatrixShape
from ngplus.solvers.by_name import unpack_first_layout
from ngplus.solvers.dense import DenseInverse
from ngplus.solvers.low_rank import LowRankInverse, invert_low_rank, precondition_same_batch
from ngplus.solvers.sketched import SketchedInverse
from tests.ngplus import oracle
from tests.ngplus.cases import mlp, points, seed_cpu

DAMPING = 0.3


def images(dtype=torch.float64):
    seed_cpu(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 9, 3))
    return nn.Sequential(nn.Conv2d(2, 6, 3, groups=2, padding=1), nn.Tanh(), nn.MaxPool2d(2), *head).to(dtype)


def stepped(model, x, **options):
    """The optimizer after one step on the mean energy, its directions left in ``.grad``."""
    return oracle.descend(model, oracle.batch_loss(x), damping=DAMPING, **options)


# What a sample is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", ["auto", "dense", "low_rank"])
@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_a_sample_is_a_batch_element_or_a_row(samples, solver, dtype):
    model = mlp(5, 12, 7, dtype=dtype)
    oracle.check(model, points(2, 2, 5).to(dtype), samples=samples, solver=solver)


@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_a_summed_loss_has_the_curvature_of_single_samples(samples):
    """The curvature stays that of single samples; the gradient is as large as the sum's."""
    x = points(5, 3, 4)
    summed, mean = mlp(4, 6, 3), mlp(4, 6, 3)
    stepped(mean, x, samples=samples)
    expected = {m: 5 * oracle.gradient_matrix(mean, m) for m in oracle.matrices(mean)}
    if samples == "rows":  # κ positions more samples: a mean over them would be smaller than this sum by 5·3
        rows = oracle.row_gradients(summed, lambda m: oracle.energy(m(x)) / 15)
        sums = {matrix: sum(samples) for matrix, samples in rows.items()}
        expected = {
            matrix: oracle.direction(oracle.second_moment(rows[matrix]), G, DAMPING) for matrix, G in sums.items()
        }
    oracle.descend(summed, lambda m: oracle.energy(m(x)), damping=DAMPING, loss_reduction="sum", samples=samples)
    assert oracle.error(summed, expected) <= 1e-10


@pytest.mark.parametrize("used", [1, 4, 9])
@pytest.mark.parametrize("solver", ["dense", "low_rank"])
def test_max_samples_uses_the_first_ones(used, solver):
    oracle.check(mlp(4, 6, 3), points(6, 4), max_samples=used, solver=solver)


@pytest.mark.parametrize("solver", ["auto", "dense", "low_rank"])
def test_the_released_rule_adds_the_root_of_the_damping(solver):
    model, x = mlp(4, 30, 3), points(5, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), DAMPING**0.5)
    optimizer = stepped(model, x, damping_rule="released", solver=solver)
    assert oracle.error(model, expected) <= 1e-10
    assert optimizer.curvature["0.weight"].damping == DAMPING**0.5


# Over several steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update_every", [1, 3, 100])
@pytest.mark.parametrize("ema", [0.0, 0.7])
@pytest.mark.parametrize("block_size", [None, 2])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_several_steps_are_those_of_a_plain_loop(kind, block_size, ema, update_every):
    model = mlp(4, 6, 3) if kind == "dense" else images()
    plain = copy.deepcopy(model)
    optimizer = NGPlus(
        model, lr=0.1, damping=DAMPING, update_every=update_every, ema=ema, block_size=block_size, solver="dense"
    )
    loop = oracle.PlainLoop(plain, 0.1, DAMPING, update_every, ema, block_size)
    for step in range(7):
        x = points(5, 4, seed=step) if kind == "dense" else points(4, 2, 6, 6, seed=step)
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        loop.step(oracle.sample_losses(x))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_the_moving_average_starts_from_the_first_matrix_and_not_from_zero():
    model, x = mlp(4, 3), points(5, 4)
    (samples,) = oracle.energy_gradients(model, x).values()
    optimizer = stepped(model, x, ema=0.9)
    (average,) = optimizer.curvature["0.weight"].average
    torch.testing.assert_close(average, oracle.second_moment(samples), rtol=1e-12, atol=1e-12)


def test_a_change_of_damping_takes_effect_on_the_next_curvature_step():
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=2)
    seen = []
    for damping in (0.3, 5.0, 5.0, 7.0, 7.0):
        optimizer.param_groups[0]["damping"] = damping
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        seen.append(optimizer.curvature["0.weight"].damping)
    assert seen == [0.3, 0.3, 5.0, 5.0, 7.0]


# Blocks (18) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 6, 7, 100])
@pytest.mark.parametrize("sizes", [(4, 6, 3), (9, 6, 8)])
def test_blocks_of_every_size_and_the_rest(block_size, sizes):
    oracle.check(mlp(*sizes), points(5, sizes[0]), block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_blocks_of_every_group_of_a_convolution(block_size, samples):
    oracle.check(images(), points(4, 2, 6, 6), block_size=block_size, samples=samples)


def test_a_block_as_large_as_the_matrix_is_the_whole_of_it():
    whole, blocked, x = mlp(4, 6, 3), mlp(4, 6, 3), points(5, 4)
    stepped(whole, x, solver="dense")
    stepped(blocked, x, solver="dense", block_size=6)
    for a, b in zip(whole.parameters(), blocked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=1e-13)


# Low rank (14) ------------------------------------------------------------------------------------------------------


def kinds(optimizer):
    return [type(state.preconditioner) for state in optimizer.curvature.values()]


@pytest.mark.parametrize("sizes", [(19, 12), (12, 25), (5, 40, 30)])
def test_every_exact_solver_gives_the_same_direction(sizes):
    x = points(4, sizes[0])
    models = {solver: mlp(*sizes) for solver in ("dense", "low_rank", "auto")}
    for solver, model in models.items():
        stepped(model, x, solver=solver)
    for solver in ("low_rank", "auto"):
        for a, b in zip(models[solver].parameters(), models["dense"].parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-11 * b.grad.norm()


def test_auto_takes_low_rank_where_the_batch_is_small_compared_with_the_matrix(set_tuning):
    set_tuning(low_rank_from=11)
    for batch, kind in ((4, LowRankInverse), (5, LowRankInverse), (6, DenseInverse), (40, DenseInverse)):
        optimizer = stepped(mlp(19, 11), points(batch, 19))
        assert kinds(optimizer) == [kind], batch


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"ema": 0.5}, (2, 19)), ({"block_size": 5}, (2, 19)), ({"solver": "dense"}, (2, 19)), ({}, (2, 3, 19))],
)
def test_auto_is_dense_where_low_rank_would_not_be_exact(options, shape):
    assert kinds(stepped(mlp(19, 12), points(*shape), **options)) == [DenseInverse]


def test_low_rank_is_dense_where_there_are_more_samples_than_rows():
    assert kinds(stepped(mlp(19, 11), points(11, 19), solver="low_rank")) == [LowRankInverse]
    assert kinds(stepped(mlp(19, 11), points(12, 19), solver="low_rank")) == [DenseInverse]


def test_low_rank_counts_micro_batches_together():
    model, x = mlp(19, 11), points(6, 19)
    gradients = oracle.energy_gradients(model, x)
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1)
    for part in x.split(3):
        (oracle.energy(model(part)) / 6).backward()
    optimizer.step()
    assert kinds(optimizer) == [DenseInverse]
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e8, 1e12, 1e20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_low_rank_of_samples_that_repeat_is_exact_however_large_they_are(scale, dtype):
    """Three directions in twenty samples, up to ‖L‖/λ = 1e28: 17 eigenvalues of UᵀU are rounding of either sign."""
    U = (points(30, 3, seed=1) @ points(3, 20, seed=2) * scale).to(dtype)
    G = points(1, 30, 5, seed=3)
    Q, S, _ = torch.linalg.svd(U.double(), full_matrices=False)
    Q, S = Q[:, :3], S[:3].square()
    expected = G[0] - Q @ ((S / (S + DAMPING))[:, None] * (Q.T @ G[0]))
    made = invert_low_rank(U, DAMPING)
    direction = made.apply(G.to(dtype).clone(), None, "left")[0][0].double() * DAMPING
    assert float((direction - expected).norm() / expected.norm()) < (1e-10 if dtype == torch.float64 else 1e-5)


def graded(p, q, rank, seed):
    """U and the gradient of the batch that it is made of, float32; entries of the short side span four decades."""
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randn(rank, q, generator=generator), torch.randn(rank, p, generator=generator)
    g *= 10 ** (-4 * torch.rand(p, generator=generator))
    return (g * a.norm(dim=1, keepdim=True)).T / rank**0.5, g.T @ a / rank


@pytest.mark.parametrize("ratio", [1e-3, 0.3, 1.0, 1.9, 9.0, 11.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("rank", [7, 32, 64])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_low_rank_is_as_exact_as_the_explicit_inverse(side, bias, same, rank, ratio):
    """In float32, for the batch that it was built from and for others, against float64."""
    errors = {"low rank": 0.0, "explicit inverse": 0.0}
    for seed in range(3):
        U, G = graded(64, 96, rank, seed)
        if not same:
            G = graded(64, 96, rank, seed + 10)[1]
        L = U.double() @ U.double().T
        damping = float(torch.linalg.matrix_norm(L, 2)) / ratio
        damped = L + damping * torch.eye(64, dtype=torch.float64)
        exact = torch.cholesky_solve(G.double(), torch.linalg.cholesky(damped))
        made, whole = invert_low_rank(U, damping), (G if side == "left" else G.T).contiguous()
        assert (made.refinement is None) == (ratio < 10)
        if bias:
            D, d = made.apply(whole[None, :, :-1].contiguous(), whole[None, :, -1:].contiguous(), side)
            direction = torch.cat([D, d], dim=2)[0]
        else:
            direction = made.apply(whole[None], None, side)[0][0]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()
        for name, found in (
            ("low rank", direction if side == "left" else direction.T),
            ("explicit inverse", inverse @ G),
        ):
            errors[name] += float((found.double() - exact).norm() / exact.norm()) / 3
    assert errors["low rank"] <= max(1.5 * errors["explicit inverse"], 1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-11, 1e-9, 1.0, 1e12])
@pytest.mark.parametrize("ratio", [0.5, 1.9, 5.0])
def test_low_rank_in_float32_is_exact_at_every_scale(scale, ratio):
    """As far as float32 has numbers: of small ones the squares underflow, which float64 is there for."""
    U, G = graded(64, 96, 20, seed=0)
    L = U.double() @ U.double().T
    unit = float(torch.linalg.matrix_norm(L, 2))
    exact = torch.linalg.solve(L / unit + torch.eye(64, dtype=torch.float64) / ratio, G.double())
    damping = scale**2 / ratio
    direction = invert_low_rank(U / unit**0.5 * scale, damping).apply(G[None] * scale, None, "left")[0][0]
    error = direction.double() * scale - exact
    assert float(error.norm() / exact.norm()) <= 1e-6


def test_refinement_of_a_low_rank_direction_is_saved_and_older_states_load_without_it():
    U, G = graded(20, 30, 8, seed=0)
    made = invert_low_rank(U, 1e-4 * float(torch.linalg.matrix_norm(U, 2)) ** 2)
    kept = made.tensors()
    shape = MatrixShape(groups=1, rows=20, columns=30)
    loaded = unpack_first_layout(kept, shape)
    refined = made.apply(G[None].clone(), None, "left")[0]
    assert torch.equal(loaded.apply(G[None].clone(), None, "left")[0], refined)
    older = unpack_first_layout({name: tensor for name, tensor in kept.items() if name != "refinement"}, shape)
    plain = LowRankInverse(made.columns, made.damping).apply(G[None].clone(), None, "left")[0]
    assert torch.equal(older.apply(G[None].clone(), None, "left")[0], plain)


def test_low_rank_of_no_samples_is_the_damping_alone():
    made = invert_low_rank(torch.empty(6, 0), 0.5)
    torch.testing.assert_close(made.apply(torch.ones(1, 6, 2), None, "left")[0], torch.full((1, 6, 2), 2.0))


def test_same_batch_direction_is_that_of_low_rank():
    seed_cpu(0)
    a, g = points(4, 9, seed=1), points(4, 7, seed=2)  # (b, n), (b, m)
    norms = a.norm(dim=1)
    U = (g * norms[:, None]).T / 4**0.5
    sides = a / (4**0.5 * norms[:, None])
    G = g.T @ a / 4
    torch.testing.assert_close(U @ sides, G)
    expected = oracle.direction((U @ U.T)[None], G[None], DAMPING)[0]
    torch.testing.assert_close(precondition_same_batch(U, sides, DAMPING), expected, rtol=1e-11, atol=1e-12)


def test_same_batch_direction_names_a_damping_that_is_too_small():
    U = torch.full((3, 2), float("nan"))
    with pytest.raises(ValueError, match=r"not positive definite at damping=0\.3"):
        precondition_same_batch(U, torch.ones(2, 4), DAMPING)


# Sketches (15)(16)(17) ----------------------------------------------------------------------------------------------


def sketched_least_squares(U, G, sampled, damping):
    """D = argmin ‖ΩUD − ΩG‖² + λ‖D‖², then (G − UD)/λ, with Ω the scaled sampled rows."""
    Omega = torch.eye(len(U), dtype=torch.float64)[sampled] * (len(U) / len(sampled)) ** 0.5
    stacked = torch.cat([Omega @ U, damping**0.5 * torch.eye(U.shape[1], dtype=torch.float64)])
    target = torch.cat([Omega @ G, torch.zeros(U.shape[1], G.shape[1], dtype=torch.float64)])
    return (G - U @ torch.linalg.lstsq(stacked, target).solution) / damping


@pytest.mark.parametrize("sizes", [(19, 12), (12, 25)])
@pytest.mark.parametrize("size", [1, 6, 11])
def test_sketched_solver_is_the_sketched_least_squares_with_the_same_rows(size, sizes):
    model, x = mlp(*sizes), points(4, sizes[0])
    ((matrix, samples),) = oracle.energy_gradients(model, x).items()
    optimizer = stepped(model, x, solver="sketched", sketch_size=size)
    kept = optimizer.curvature["0.weight"].preconditioner
    assert isinstance(kept, SketchedInverse)
    assert kept.sampled.shape == (size,)
    short_first = [G[0] if G.shape[1] <= G.shape[2] else G[0].T for G in samples]
    spectra = [torch.linalg.svd(G) for G in short_first]
    U = torch.stack([u[:, 0] * s[0] for u, s, _ in spectra], dim=1) / len(samples) ** 0.5  # κ = 1: each of rank one
    D = sketched_least_squares(U, sum(short_first) / len(samples), kept.sampled, DAMPING)
    ours = oracle.gradient_matrix(model, matrix)[0]
    torch.testing.assert_close(ours if len(ours) == len(D) else ours.T, D, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ["linear, left", "linear, right", "convolution", "mini-batch"])
def test_sampled_columns_give_the_matrix_on_average(case):
    """Equation (17): the mean over many samples is within a few standard errors of L (or R)."""
    if case == "convolution":
        model, x = nn.Conv2d(2, 3, 2).double(), points(3, 2, 5, 5)
    else:
        model = nn.Linear(9, 4).double() if case != "linear, right" else nn.Linear(3, 9).double()
        x = points(3, 4, model.in_features)
    ((_, samples),) = oracle.energy_gradients(model, x).items()
    if case == "mini-batch":
        samples = [sum(samples) / len(samples)]
    L = oracle.second_moment(samples)[0]
    curvature = "mini_batch" if case == "mini-batch" else "per_sample"
    optimizer = NGPlus(
        model, lr=1e-12, damping=1.0, update_every=1, solver="sketched", sketch_size=3, curvature=curvature
    )
    draws = []
    for _ in range(400):
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        (inverse,) = optimizer.curvature["weight"].preconditioner.inverses
        draws.append(torch.linalg.inv(inverse[0]) - torch.eye(len(L), dtype=torch.float64))
    draws = torch.stack(draws)
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - L).abs() <= 4.5 * standard_error + 1e-9).all()
    assert 0 < standard_error.norm() <= 0.2 * L.norm()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (NGPlus, {"solver": "sketched", "sketch_size": 2}),
        (NGPlus, {"solver": "sketched", "sketch_size": 2, "samples": "rows"}),
        (NGPlus, {"solver": "sketched", "sketch_size": 2, "curvature": "mini_batch"}),
        (SENG, {"sketch_size": 5}),
    ],
)
def test_sketches_are_sampled_on_the_generators_device_and_not_on_the_default_one(optimizer, options):
    moved = []
    for device in ("cpu", "meta"):
        model, x = mlp(4, 9, 3), points(5, 2, 4)
        trained = optimizer(model, lr=0.1, **options)
        oracle.batch_loss(x)(model).backward()
        with torch.device(device):
            trained.step()
        moved.append(model[0].weight.detach())
    assert torch.equal(*moved)


def test_a_sketch_of_all_columns_is_exact():
    oracle.check(mlp(4, 6, 3), points(5, 2, 4), solver="sketched", sketch_size=100)


# The mini-batch form (12) -------------------------------------------------------------------------------------------


def mini_batch_loop(model, losses, steps, damping=DAMPING, ema=0.0, lr=0.1):
    """Plain steps with the products of the mini-batch gradient, biases being columns."""
    averages = {}
    for loss in losses[:steps]:
        model.zero_grad()
        loss(model).backward()
        parameters = dict(model.named_parameters())
        for matrix in oracle.matrices(model):
            G = oracle.gradient_matrix(model, matrix)
            moment = oracle.second_moment([G])
            before = averages.get(matrix, moment)
            averages[matrix] = ema * before + (1 - ema) * moment
            D = oracle.direction(averages[matrix], G, damping)
            if matrix.bias is not None:
                parameters[matrix.bias].grad.copy_(D[:, :, -1].flatten())
                D = D[:, :, :-1]
            parameters[matrix.weight].grad = D.reshape(parameters[matrix.weight].shape)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_mini_batch_with_a_model_is_a_plain_loop_with_biases_as_columns(kind, ema):
    model = mlp(4, 6, 3) if kind == "dense" else images()
    shape = (5, 4) if kind == "dense" else (4, 2, 6, 6)
    losses = [oracle.batch_loss(points(*shape, seed=step)) for step in range(5)]
    plain = copy.deepcopy(model)
    mini_batch_loop(plain, losses, 5, ema=ema)
    optimizer = NGPlus(model, lr=0.1, damping=DAMPING, update_every=1, curvature="mini_batch", ema=ema)
    for loss in losses:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("form", ["parameters", "groups", "named"])
def test_mini_batch_with_parameters_takes_each_as_out_times_rest(form):
    model, x = images(), points(4, 2, 6, 6)
    oracle.batch_loss(x)(model).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    convolution = [p for name, p in model.named_parameters() if name.startswith("0")]
    linear = [p for name, p in model.named_parameters() if not name.startswith("0")]
    dampings = (0.3, 0.3) if form != "groups" else (0.5, 0.2)
    given = {
        "parameters": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": convolution, "damping": 0.5}, {"params": linear, "damping": 0.2, "lr": 1e-8}],
    }[form]
    optimizer = NGPlus(given, lr=1e-9, damping=0.3, update_every=1, curvature="mini_batch")
    optimizer.step()
    for name, parameter in model.named_parameters():
        G = before[name]
        if G.dim() == 1:
            assert torch.equal(parameter.grad, G)
            continue
        G = G.flatten(1)[None]
        D = oracle.direction(oracle.second_moment([G]), G, dampings[0 if name.startswith("0") else 1])
        torch.testing.assert_close(parameter.grad.flatten(1), D[0], rtol=1e-10, atol=1e-12)
    expected = ["0.weight", "4.weight"] if form == "named" else None
    assert expected is None or list(optimizer.curvature) == expected


def test_mini_batch_curvature_captures_nothing():
    optimizer = NGPlus(mlp(4, 3), update_every=1, curvature="mini_batch")
    assert optimizer._recorder is None


@pytest.mark.parametrize("rows", [9, 3])
def test_mini_batch_of_a_sparse_gradient_is_that_of_the_dense_one(rows):
    seed_cpu(0)
    dense = nn.Embedding(rows, 4).double()
    sparse = nn.Embedding(rows, 4, sparse=True).double()
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        oracle.descend(
            model, oracle.batch_loss(torch.tensor([[1, 1], [2, 0]])), curvature="mini_batch", damping=DAMPING
        )
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad, rtol=1e-11, atol=1e-12)


# Single precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "dense"},
        {"solver": "low_rank"},
        {"solver": "auto"},
        {"block_size": 4},
        {"samples": "rows"},
        {"max_samples": 3},
        {"ema": 0.5},
        {"solver": "low_rank", "max_samples": 3},
    ],
)
@pytest.mark.parametrize("sizes", [(4, 6, 3), (19, 40, 7)])
def test_every_solver_matches_the_oracle_in_single_precision(sizes, options):
    oracle.check(mlp(*sizes, dtype=torch.float32), points(5, sizes[0]).float(), **options)


# What is kept -------------------------------------------------------------------------------------------------------


def test_a_layers_state_prints_its_form_and_counts_its_elements():
    optimizer = stepped(mlp(4, 6, 3), points(5, 4), ema=0.5, solver="dense")
    assert str(optimizer.curvature["0.weight"]) == (
        "LayerState(matrix 6×5, DenseInverse of λI + R, damping 0.3, 1 updates, 50 elements kept)"
    )
    optimizer = stepped(images(), points(4, 2, 6, 6))
    assert str(optimizer.curvature["0.weight"]).startswith("LayerState(matrix 2×3×10, DenseInverse of λI + L")
    optimizer = stepped(mlp(39, 30), points(4, 39), solver="low_rank")
    assert optimizer.curvature["0.weight"].numel() == 30 * 4 + 1 + 2 * 4  # W, λ and what refines


@pytest.mark.parametrize("options", [{"solver": "dense"}, {"solver": "low_rank"}, {"damping_rule": "released"}])
@pytest.mark.parametrize("samples", [3, 40])
def test_the_share_is_that_of_the_largest_eigenvalue(options, samples):
    model, x = mlp(9, 7, 12), points(samples, 9)
    moments = {m.weight: oracle.second_moment(G) for m, G in oracle.energy_gradients(model, x).items()}
    optimizer = stepped(model, x, **options)
    damping = DAMPING**0.5 if "damping_rule" in options else DAMPING
    for name, state in optimizer.curvature.items():
        largest = torch.linalg.eigvalsh(moments[name]).max()
        assert state.share() == pytest.approx(float(largest / (damping + largest)), rel=1e-9)


def test_the_share_is_zero_without_curvature_and_unknown_for_a_sketch():
    model, x = mlp(3, 3), points(4, 3)
    flat = oracle.descend(model, lambda m: 0 * m(x).sum(), damping=DAMPING)
    assert [state.share() for state in flat.curvature.values()] == [0.0]
    sketched = stepped(mlp(3, 9), x, solver="sketched", sketch_size=2).curvature.values()
    assert [state.share() for state in sketched] == [None]


class Branches(nn.Module):
    """Layers of equal shapes on either side of the matrix, with and without a bias, and tables, all with κ = 1."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.wide = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.tall = nn.ModuleList(nn.Linear(2, 6) for _ in range(2))
        self.bare = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in range(2))
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, 6, mode="sum") for rows in (9, 20))
        self.double()

    def forward(self, index):
        x = sum(table(index) for table in self.tables)
        x = x + sum(layer(x[:, :2]) for layer in self.tall)
        return sum(layer(x).tanh() for layer in [*self.wide, *self.bare])


@pytest.mark.parametrize("options", [{}, {"samples": "rows"}, {"max_samples": 4}, {"ema": 0.5}, {"block_size": 2}])
@pytest.mark.parametrize("backward_passes", [1, 2])
def test_matrices_of_small_layers_that_are_made_together_are_those_of_each_alone(options, backward_passes, set_tuning):
    index = torch.randint(9, (8, 1))
    states = []
    for small in (2**13, 0):
        set_tuning(small_use=small)
        model = Branches()
        optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=1, solver="dense", **options)
        for _ in range(2):
            for part in index.chunk(backward_passes):
                model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append({name: state.tensors() for name, state in optimizer.curvature.items()})
    together, alone = states
    assert len(together) == 9
    for name, tensors in together.items():
        torch.testing.assert_close(tensors, alone[name], rtol=1e-9, atol=1e-12)


def test_small_layers_of_equal_shapes_are_multiplied_in_one_product(monkeypatch):
    sizes = []
    made = accumulator.second_moments
    monkeypatch.setattr(accumulator, "second_moments", lambda *a: sizes.append(len(a[1])) or made(*a))
    model = Branches()
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=1, solver="dense")
    model(torch.randint(9, (8, 1))).square().mean().backward()
    optimizer.step()
    assert sorted(sizes) == [2, 2, 2, 3]
