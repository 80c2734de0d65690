"""Small matrices of equal shape preconditioned in one batch, compared with each alone and with dense solves."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.apply.grouped import EqualShapes, MixedShapes, PreconditionedLayer, group_small
from ngplus.baselines import KFAC
from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import find_layers, stored_values
from ngplus.solvers.dense import DenseInverse
from tests.ngplus.cases import seed_cpu


class Tables(nn.Module):
    """Two tables of one shape, one of another, and linear layers of equal shapes with and without a bias."""

    def __init__(self, dtype=torch.float64, linear_dim=6):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 6, dtype=dtype) for rows in (9, 9, 20))
        self.flat = nn.ModuleList(nn.Linear(6, linear_dim, dtype=dtype) for _ in range(3))
        self.bare = nn.ModuleList(nn.Linear(6, linear_dim, bias=False, dtype=dtype) for _ in range(2))
        self.mix = nn.MultiheadAttention(6, 2, batch_first=True, dtype=dtype)

    def forward(self, index):
        x = sum(table(index) for table in self.tables)
        x = x + self.mix(x, x, x)[0]
        return sum(layer(x).tanh() for layer in [*self.flat, *self.bare])


def gradients_after_a_step(make, index, small, set_tuning, change=None, **options):
    """What the base gets on the second step."""
    return gradients_of_steps(make, index, small, set_tuning, [change, change], **options)[-1]


def gradients_of_steps(make, index, small, set_tuning, changes, **options):
    """What the base gets on each step, after ``changes`` to the model's gradients."""
    set_tuning(grouped_below=small)
    seed_cpu(0)
    model = make()
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, **{"update_every": 100} | options)
    given = []
    for change in changes:
        optimizer.zero_grad()
        model(index).square().mean().backward()
        if change is not None:
            change(model)
        optimizer.step()
        given.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return given


@pytest.mark.parametrize("linear_dim", [3, 12])  # the left side and the right
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 3}, {"block_size": 4}, {"block_size": 2, "ema": 0.5}, {"curvature": "mini_batch"}]
)
def test_layers_preconditioned_in_one_batch_get_the_directions_of_each_alone(set_tuning, linear_dim, options):
    index = torch.randint(9, (5, 4))
    both = [
        gradients_after_a_step(lambda: Tables(linear_dim=linear_dim), index, small, set_tuning, **options)
        for small in (2**14, -1)
    ]
    assert both[0].keys() == both[1].keys()
    for name, gradient in both[0].items():
        torch.testing.assert_close(gradient, both[1][name], rtol=1e-10, atol=1e-12)


def test_batches_with_frozen_biases_missing_gradients_and_views_match_each_layer_alone(set_tuning):
    def change(model):
        model.flat[0].bias.grad = None
        model.tables[0].weight.grad = None
        bucket = torch.zeros(2, *model.bare[0].weight.shape, dtype=torch.float64)
        bucket[1] = model.bare[0].weight.grad
        model.bare[0].weight.grad = bucket[1]

    def make():
        model = Tables()
        model.flat[1].bias.requires_grad_(False)
        return model

    index = torch.randint(9, (5, 4))
    together, alone = (gradients_after_a_step(make, index, small, set_tuning, change) for small in (2**14, -1))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-10, atol=1e-12)


def missing(model):
    model.flat[1].weight.grad = model.flat[1].bias.grad = None


def bias_missing(model):
    model.flat[1].bias.grad = None


def frozen(model):
    model.flat[1].bias.requires_grad_(False)
    model.flat[1].bias.grad = None


def freed(model):
    model.flat[1].bias.requires_grad_(True)


def transposed(model):
    model.bare[0].weight.grad = model.bare[0].weight.grad.T.contiguous().T


def sparse(model):
    model.tables[0].weight.grad = model.tables[0].weight.grad.to_sparse(1)


@pytest.mark.parametrize("change", [missing, bias_missing, frozen, transposed, sparse])
@pytest.mark.parametrize("linear_dim", [3, 12])
def test_batches_that_change_between_steps_match_each_layer_alone(set_tuning, change, linear_dim):
    index = torch.randint(9, (5, 4))
    steps = [None, None, change, change, freed, None]
    together, alone = (
        gradients_of_steps(lambda: Tables(linear_dim=linear_dim), index, small, set_tuning, steps)
        for small in (2**14, -1)
    )
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient.to_dense(), theirs[name].to_dense(), rtol=1e-10, atol=1e-12)


def test_new_curvature_and_a_loaded_state_are_used_on_the_next_step(set_tuning):
    index = torch.randint(9, (5, 4))
    steps = [None] * 5
    together, alone = (
        gradients_of_steps(Tables, index, small, set_tuning, steps, update_every=2) for small in (2**14, -1)
    )
    for name, gradient in together[-1].items():
        torch.testing.assert_close(gradient, alone[-1][name], rtol=1e-10, atol=1e-12)

    model = Tables()
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=100)
    directions = []
    for step in range(4):
        optimizer.zero_grad()
        model(index).square().mean().backward()
        optimizer.step()
        directions.append(model.bare[0].weight.grad.clone())
        if step == 1:
            state = optimizer.state_dict()
            for entries in state["state"].values():
                entries.update({name: 2 * each for name, each in entries.items() if name.startswith("ngplus_inverse")})
            optimizer.load_state_dict(state)
    torch.testing.assert_close(directions[2], 2 * directions[1])


@pytest.mark.parametrize("columns", [3, 12, 40])  # a small layer of either side; a low rank one, 8 samples of 40
def test_a_bias_of_another_dtype_keeps_its_dtype(columns):
    """Under autocast, which casts both."""
    directions = []
    for dtype in (torch.float32, torch.bfloat16):
        seed_cpu(0)
        model = nn.Linear(columns, 40 if columns == 40 else 6)
        with torch.no_grad():
            model.bias = nn.Parameter(model.bias.bfloat16().to(dtype))
        optimizer = NGPlus(model, lr=1e-3, damping=0.3)
        x = torch.randn(8, columns)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).square().mean().backward()
        optimizer.step()
        assert "weight" in optimizer.curvature
        assert model.bias.grad.dtype == dtype
        directions.append([model.weight.grad, model.bias.grad.float()])
    for ours, expected in zip(*directions, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_stacked_inverses_are_stored_once():
    model = Tables()
    optimizer = NGPlus(model, lr=0.1, damping=0.3, update_every=100)
    model(torch.randint(9, (5, 4))).square().mean().backward()
    optimizer.step()
    inverses = [optimizer.curvature[f"bare.{i}.weight"].preconditioner.main for i in range(2)]
    assert inverses[0].untyped_storage().data_ptr() == inverses[1].untyped_storage().data_ptr()


def test_batched_groups_of_convolutions_match_each_layer_alone(set_tuning):
    def make():
        layers = [nn.Conv1d(4, 4, 3, padding=1, groups=2, dtype=torch.float64) for _ in range(3)]
        return nn.Sequential(*layers)

    x = torch.randn(5, 4, 7, dtype=torch.float64)
    together, alone = (gradients_after_a_step(make, x, small, set_tuning) for small in (2**14, -1))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "bias"), [(3, 5, True), (3, 5, False), (5, 3, False), (4, 4, False)])
def test_each_batched_direction_is_that_of_a_dense_solve(rows, columns, bias):
    seed_cpu(0)
    model = nn.Sequential(*[nn.Linear(columns, rows, bias=bias, dtype=torch.float64) for _ in range(4)])
    members, expected = [], []
    for layer in find_layers(model):
        shape = layer.shape(None)
        factor = torch.randn(shape.short, shape.short, dtype=torch.float64)
        matrix = torch.eye(shape.short, dtype=torch.float64) + factor @ factor.T
        G = torch.randn(shape.rows, shape.columns, dtype=torch.float64)
        layer.weight.grad = G[:, :columns].clone()
        if bias:
            layer.bias.grad = G[:, -1].clone()
        members.append(PreconditionedLayer(layer, DenseInverse([torch.linalg.inv(matrix)[None]], shape), shape))
        solved = torch.linalg.solve(matrix, G) if rows <= shape.columns else torch.linalg.solve(matrix, G.T).T
        expected.append(solved)
    together, alone = group_small(members)
    assert [len(batch.members) for batch in together] == [4]
    assert not alone
    together[0].precondition_(FiniteCheck())
    for layer, direction in zip(find_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.weight.grad, direction[:, :columns])
        if bias:
            torch.testing.assert_close(layer.bias.grad, direction[:, -1])


class Unlike(nn.Module):
    """Small layers of which no two have one shape: tables, linear layers and 1×1 convolutions, of both sides."""

    def __init__(self):
        super().__init__()
        double = {"dtype": torch.float64}
        self.tables = nn.ModuleList(nn.Embedding(rows, 6, **double) for rows in (3, 5, 9, 21))
        self.sparse = nn.EmbeddingBag(30, 6, mode="sum", sparse=True, **double)
        self.wide, self.narrow = nn.Linear(6, 4, **double), nn.Linear(4, 8, **double)
        self.bare, self.square = nn.Linear(8, 5, bias=False, **double), nn.Linear(5, 5, **double)
        self.mix, self.unmix = nn.Conv1d(5, 9, 1, **double), nn.Conv1d(9, 3, 1, bias=False, **double)

    def forward(self, index):
        x = sum(table(index % table.num_embeddings) for table in self.tables) + self.sparse(index).unsqueeze(1)
        x = self.square(self.bare(self.narrow(self.wide(x).tanh()).tanh()).tanh()).tanh()
        return self.unmix(self.mix(x.mT).tanh())


def test_small_layers_of_any_shapes_share_one_series_and_match_each_layer_alone(monkeypatch, set_tuning):
    index = torch.randint(30, (5, 4))
    sizes = []
    precondition_ = MixedShapes.precondition_
    monkeypatch.setattr(
        MixedShapes, "precondition_", lambda self, check: sizes.append(len(self.members)) or precondition_(self, check)
    )
    together, alone = (gradients_after_a_step(Unlike, index, small, set_tuning) for small in (2**14, -1))
    assert sizes == [11, 11]
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        assert gradient.is_sparse == (name == "sparse.weight")
        torch.testing.assert_close(gradient.to_dense(), alone[name].to_dense(), rtol=1e-10, atol=1e-12)


def check_that_nan_skips_the_step(model, name, index):
    """After a step that is as it should be."""
    optimizer = NGPlus(model, lr=0.1, update_every=100)
    for nonfinite in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(index).square().mean().backward()
        if nonfinite:
            stored_values(model.get_parameter(name).grad).view(-1)[-1] = float("nan")
        optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) == nonfinite
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("name", [name for name, _ in Unlike().named_parameters()])
def test_nan_in_any_gradient_of_a_series_skips_the_step(name):
    check_that_nan_skips_the_step(Unlike(), name, torch.randint(30, (5, 4)))


def test_large_layers_are_not_batched(monkeypatch):
    seen = []
    monkeypatch.setattr(EqualShapes, "precondition_", lambda batch, _: seen.append(len(batch.members)))
    monkeypatch.setattr(MixedShapes, "precondition_", lambda self, _: seen.append([m.shape.rows for m in self.members]))
    model = nn.ModuleList(
        [
            nn.EmbeddingBag(rows, 4, mode="sum", sparse=sparse)
            for rows, sparse in 2 * [(6, False), (5000, False), (7, True)]
        ]
        + [nn.EmbeddingBag(11, 4, mode="sum")]
    )

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = model

        def forward(self, index):
            return sum(bag(index).tanh() for bag in self.bags)

    whole = Summed()
    optimizer = NGPlus(whole, lr=0.1)
    whole(torch.randint(6, (5, 2))).square().mean().backward()
    optimizer.step()
    assert seen == [2, 2, [11]]  # the two of six rows; the ten rows that each sparse gradient has; the small one


class SparseTables(nn.Module):
    """Sparse tables of several sizes, of which the last is looked up more often than the others."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, 4, mode="sum", sparse=True, dtype=torch.float64) for rows in (9, 30, 12, 9)
        )

    def forward(self, index):
        bags = [table(index).tanh() for table in self.tables]
        return sum(bags) + self.tables[3](index * 2 % 9).tanh()


def test_rows_of_sparse_gradients_are_batched_and_stay_sparse(set_tuning):
    index = torch.randint(9, (5, 2))
    together, alone = (gradients_after_a_step(SparseTables, index, small, set_tuning) for small in (2**14, -1))
    assert [gradient._values().shape[0] for gradient in together.values()][:3] == [10, 10, 10]
    for name, gradient in together.items():
        assert gradient.is_sparse
        torch.testing.assert_close(gradient.to_dense(), alone[name].to_dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("table", range(4))
def test_nan_in_a_row_of_any_sparse_gradient_skips_the_step(table):
    check_that_nan_skips_the_step(SparseTables(), f"tables.{table}.weight", torch.randint(9, (5, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "which",
    [
        "tables.0.weight",
        "tables.1.weight",
        "tables.2.weight",
        "flat.2.weight",
        "flat.1.bias",
        "bare.1.weight",
        "mix.in_proj_weight",
        "mix.out_proj.bias",
    ],
)
def test_nan_in_any_member_skips_the_step(value, which):
    model = Tables()
    optimizer = NGPlus(model, lr=0.1, update_every=100)
    index = torch.randint(9, (5, 4))
    model(index).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(index).square().mean().backward()
    dict(model.named_parameters())[which].grad.view(-1)[-1] = value
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_baseline_with_two_sides_is_not_batched(monkeypatch):
    for kind in (EqualShapes, MixedShapes):
        monkeypatch.setattr(kind, "precondition_", lambda *_: pytest.fail("K-FAC has no one-sided inverse"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()


class Twins(nn.Module):
    """Layers whose gradients are so small that they are stacked without a look at each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        return sum(layer(x).tanh() for layer in self.layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.layers[1].weight, "grad", None),
        lambda m: setattr(m.layers[1].bias, "grad", None),
        lambda m: setattr(m.layers[1].weight, "grad", m.layers[1].weight.grad.T.contiguous().T),
        lambda m: setattr(m.layers[1].weight, "grad", m.layers[1].weight.grad.to_sparse(1)),
    ],
    ids=["no gradient", "no gradient of a bias", "column-major", "sparse"],
)
def test_tiny_gradients_are_stacked_only_while_they_are_what_they_were(change, set_tuning):
    x = torch.randn(6, 4, dtype=torch.float64)
    steps = [None, None, change, None, None]
    together, alone = (gradients_of_steps(Twins, x, small, set_tuning, steps) for small in (2**14, -1))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient.to_dense(), theirs[name].to_dense(), rtol=1e-10, atol=1e-12)
