"""The direction of large tables on a CPU, where rows of zeros are left alone, against the plain product."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.layer import _find_nonzero_rows, precondition_
from ngplus.baselines import KFAC, SENG, Shampoo
from ngplus.layers import MatrixShape, find_layers
from ngplus.solvers.dense import DenseInverse
from ngplus.solvers.low_rank import LowRankInverse
from tests.ngplus.cases import seed_cpu


@pytest.fixture(autouse=True)
def tuning(set_tuning):
    """Every table is large."""
    return set_tuning(apply_chunk=8, zero_rows_from=8, grouped_below=8)


def inverse_of(shape, dtype):
    factor = torch.randn(shape.short, shape.short, dtype=dtype)
    return torch.linalg.inv(torch.eye(shape.short, dtype=dtype) + factor @ factor.T)


def gradient(rows, dim, nonzero, dtype, offset=0):
    """A gradient with few rows, which begins ``offset`` elements into its memory, as one of DDP's bucket may."""
    memory = torch.zeros(offset + rows * dim, dtype=dtype)
    table = memory[offset:].view(rows, dim)
    chosen = torch.randperm(rows)[:nonzero]
    table[chosen] = torch.randn(nonzero, dim, dtype=dtype)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dim", [1, 2, 3, 16, 32])
@pytest.mark.parametrize("nonzero", [0, 1, 30, 200])
def test_zero_rows_stay_zero_and_nonzero_rows_are_preconditioned(tuning, dtype, offset, dim, nonzero):
    seed_cpu(0)
    layer = find_layers(nn.Sequential(nn.Embedding(200, dim, dtype=dtype)))[0]
    shape = layer.shape(None)
    inverse = inverse_of(shape, dtype)
    layer.weight.grad = gradient(200, dim, nonzero, dtype, offset)
    expected = layer.weight.grad.double() @ inverse.double()
    precondition_(PreconditionedLayer(layer, DenseInverse([inverse[None]], shape), shape), tuning)
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight.grad.any(1), expected.any(1))


def test_blocks_and_low_rank_precondition_nonzero_rows_alone(tuning):
    seed_cpu(0)
    layer = find_layers(nn.Sequential(nn.Embedding(200, 6, dtype=torch.float64)))[0]
    columns = torch.randn(6, 2, dtype=torch.float64) / 4
    dense = torch.eye(6, dtype=torch.float64) - columns @ columns.T
    blocks = torch.stack([torch.eye(3, dtype=torch.float64) * 2, torch.ones(3, 3, dtype=torch.float64)])
    for shape, preconditioner, product in [
        (layer.shape(None), LowRankInverse(columns, 1.0), dense),
        (layer.shape(3), DenseInverse([blocks], layer.shape(3)), torch.block_diag(*blocks)),
    ]:
        layer.weight.grad = gradient(200, 6, 9, torch.float64)
        expected = layer.weight.grad @ product
        precondition_(PreconditionedLayer(layer, preconditioner, shape), tuning)
        torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("block_size", [None, 3])
def test_a_gradient_without_nonzero_rows_stays_zero(sparse, block_size):
    model = nn.Embedding(200, 8, sparse=sparse)
    optimizer = NGPlus(model, lr=0.1, block_size=block_size, update_every=100)
    model(torch.randint(200, (6,))).square().sum().backward()
    optimizer.step()
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    (model(torch.arange(0 if sparse else 6)).sum() * 0).backward()
    optimizer.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45])
def test_a_row_with_one_nonzero_entry_is_preconditioned_whatever_the_entry_is(value):
    layer = find_layers(nn.Sequential(nn.Embedding(200, 8)))[0]
    layer.weight.grad = torch.zeros(200, 8)
    layer.weight.grad[17, 5] = value
    assert _find_nonzero_rows(layer.weight.grad).tolist() == [17]


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, Shampoo, SENG])
def test_every_optimizer_preconditions_a_large_table_as_a_small_one(set_tuning, optimizer):
    """K-FAC's direction depends on which row it is, SENG's leaves no row at zero."""

    def weights(chunk):
        set_tuning(apply_chunk=chunk, zero_rows_from=chunk, grouped_below=8)
        seed_cpu(0)
        model = nn.Sequential(nn.Embedding(200, 8), nn.Flatten(1), nn.Linear(16, 1)).double()
        trained = optimizer(model, lr=0.1, damping=0.1, update_every=2)
        for _ in range(4):
            trained.zero_grad()
            model(torch.randint(200, (8, 2))).square().mean().backward()
            trained.step()
        return model[0].weight.detach()

    torch.testing.assert_close(weights(8), weights(10**6))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_one_row_of_a_large_table_skips_the_step(value, dtype):
    """The finite check reads the nonzero rows alone."""
    model = nn.Embedding(200, 8, dtype=dtype)
    optimizer = NGPlus(model, lr=0.1, update_every=100)
    model(torch.tensor([3, 4])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model.weight.detach().clone()
    model(torch.tensor([3, 150])).square().sum().backward()
    model.weight.grad[150, 7] = value
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert optimizer.skipped_steps == 1
    assert not model.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_large_table_moves_as_in_a_small_one(set_tuning, dtype):
    def weight(size):
        set_tuning(apply_chunk=8, zero_rows_from=size, grouped_below=8)
        seed_cpu(0)
        model = nn.Embedding(200, 8, dtype=dtype)
        optimizer = NGPlus(model, lr=0.1, update_every=100)
        model(torch.tensor([3, 4, 199])).square().sum().backward()
        optimizer.step()
        return model.weight.detach()

    assert weight(8).dtype == dtype
    torch.testing.assert_close(weight(8), weight(10**6))


@pytest.mark.parametrize("kind", ["dense", "of a grouped convolution"])
def test_a_bias_stored_apart_is_preconditioned_as_a_column_of_the_matrix(tuning, kind):
    seed_cpu(0)
    groups = 2 if kind == "of a grouped convolution" else 1
    whole, c = torch.randn(groups, 9, 5, dtype=torch.float64), slice(-1, None)
    shape = MatrixShape(groups=groups, rows=9, columns=5)
    preconditioner = DenseInverse([torch.stack([inverse_of(shape, torch.float64) for _ in range(groups)])], shape)
    D, d = preconditioner.apply(whole[:, :, :-1].clone(), whole[:, :, c].clone(), "right", tuning)
    expected = preconditioner.apply(whole.clone(), None, "right", tuning)[0]
    torch.testing.assert_close(D, expected[:, :, :-1])
    torch.testing.assert_close(d, expected[:, :, c])


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_low_rank_in_place_is_the_product_with_the_dense_matrix(rank, column, side):
    seed_cpu(0)
    left = side == "left"
    W = torch.randn(5, rank, dtype=torch.float64) / 4
    dense = (torch.eye(5, dtype=torch.float64) - W @ W.T) / 0.3
    whole = torch.randn(5, 9, dtype=torch.float64) if left else torch.randn(9, 5, dtype=torch.float64)
    expected = dense @ whole if left else whole @ dense
    if column:
        G, c = whole[None, :, :-1].clone(), whole[None, :, -1:].clone()
        D, d = LowRankInverse(W, 0.3).apply(G, c, side)
        assert (D.data_ptr(), d.data_ptr()) == (G.data_ptr(), c.data_ptr())
        torch.testing.assert_close(torch.cat([D, d], dim=2)[0], expected)
    else:
        D, _ = LowRankInverse(W, 0.3).apply(whole[None], None, side)
        torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("kind", ["linear", "convolution", "table"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("change", ["none", "half", "transposed", "no bias gradient", "part of a bucket"])
def test_low_rank_preconditions_gradients_of_any_strides(tuning, kind, side, change):
    seed_cpu(0)
    m, n = (4, 9) if side == "left" else (9, 4)
    module = {
        "linear": lambda: nn.Linear(n, m, dtype=torch.float64),
        "convolution": lambda: nn.Conv2d(n, m, 1, dtype=torch.float64),
        "table": lambda: nn.Embedding(m, n, dtype=torch.float64),
    }[kind]()
    layer = replace(find_layers(nn.Sequential(module))[0], row_sparse=False)
    shape = layer.shape(None)
    W = torch.randn(shape.short, 2, dtype=torch.float64) / 4
    dense = (torch.eye(shape.short, dtype=torch.float64) - W @ W.T) / 0.3
    whole = torch.randn(shape.rows, shape.columns, dtype=torch.float64)
    if layer.bias is not None:
        layer.bias.grad = whole[:, -1].clone()
        if change == "no bias gradient":
            layer.bias.grad = None
            whole[:, -1] = 0
    gradient = whole[:, :n].clone().view(module.weight.shape)
    if change == "transposed":
        gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    if change == "part of a bucket":
        gradient = torch.stack([gradient, gradient])[1]
    layer.weight.grad = gradient
    if change == "half":
        module.bfloat16()
        layer.weight.grad = gradient.bfloat16()
        if layer.bias is not None:
            layer.bias.grad = layer.bias.grad.bfloat16()
    precondition_(PreconditionedLayer(layer, LowRankInverse(W, 0.3), shape), tuning)
    expected = dense @ whole if side == "left" else whole @ dense
    tolerance = {"rtol": 0.03, "atol": 0.1} if change == "half" else {}
    torch.testing.assert_close(layer.weight.grad.double().reshape(m, n), expected[:, :n], **tolerance)
    if layer.bias is not None and layer.bias.grad is not None:
        torch.testing.assert_close(layer.bias.grad.double(), expected[:, -1], **tolerance)


def test_low_rank_skips_zero_rows_and_returns_which_rows_it_preconditioned(tuning):
    seed_cpu(0)
    layer = find_layers(nn.Sequential(nn.Embedding(200, 6, dtype=torch.float64)))[0]
    layer.weight.grad = gradient(200, 6, 30, torch.float64)
    before = layer.weight.grad.any(1).nonzero()[:, 0]
    columns = torch.randn(6, 2, dtype=torch.float64) / 4
    rows = precondition_(PreconditionedLayer(layer, LowRankInverse(columns, 1.0), layer.shape(None)), tuning)
    assert rows is not None
    assert torch.equal(rows.index, before)
