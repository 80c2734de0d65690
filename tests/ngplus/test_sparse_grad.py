"""Gradients of tables that are temporarily converted to sparse, compared with the same bases on dense ones."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, SparseAdam

from ngplus import NGPlus
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.processes import in_a_fresh_process

EVERY_TABLE_IS_LARGE = {"zero_rows_from": 8, "grouped_below": 8}


@pytest.fixture(autouse=True)
def tuning(set_tuning):
    return set_tuning(**EVERY_TABLE_IS_LARGE)


class Model(nn.Module):
    """Two tables, of which a batch looks up few rows, and a linear layer."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.words = nn.Embedding(200, 6, dtype=dtype)
        self.bags = nn.EmbeddingBag(300, 6, mode="sum", dtype=dtype)
        self.out = nn.Linear(6, 3, dtype=dtype)

    def forward(self, index):
        return self.out((self.words(index[:, 0]) + self.bags(index)).tanh())


class Layouts:
    """Names of the parameters whose gradients were sparse in each step of the base."""

    def __init__(self, optimizer):
        self.sparse = []
        names = {id(p): name for name, p in optimizer._model.named_parameters()}

        def note(base, args, kwargs):
            parameters = [p for group in base.param_groups for p in group["params"]]
            self.sparse.append({names[id(p)] for p in parameters if p.grad is not None and p.grad.is_sparse})

        optimizer.base.register_step_post_hook(note)


def batch(step):
    return torch.randint(200, (5, 2), generator=torch.Generator().manual_seed(step))


def trained(base, share, set_tuning, *, dtype=torch.float64, closure=False, steps=6, **options):
    """A model after some steps, and the layouts that the base got; none is converted where ``share`` is too small."""
    set_tuning(**EVERY_TABLE_IS_LARGE, sparse_step_share=share)
    seed_cpu(0)
    model = Model(dtype)
    optimizer = NGPlus(model, base, damping=0.3, update_every=3, **{"lr": 0.1, **options})
    layouts = Layouts(optimizer)
    for step in range(steps):

        def loss(step=step):
            optimizer.zero_grad()
            value = model(batch(step)).square().mean()
            value.backward()
            return value

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return model, layouts.sparse


ALLOWED = [
    (SGD, {}),
    (SGD, {"maximize": True}),
    (Adagrad, {}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "maximize": True}),
]


@pytest.mark.parametrize(("base", "options"), ALLOWED)
@pytest.mark.parametrize("closure", [False, True])
def test_converting_gradients_to_sparse_moves_parameters_as_dense_ones_do(base, options, closure, set_tuning):
    model, sparse = trained(base, 1 / 8, set_tuning, closure=closure, **options)
    other, none = trained(base, 0.0, set_tuning, closure=closure, **options)
    assert sparse == 6 * [{"words.weight", "bags.weight"}]
    assert none == 6 * [set()]
    for parameter, dense in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, dense, rtol=1e-12, atol=1e-14)
        assert parameter.grad.layout == torch.strided
        torch.testing.assert_close(parameter.grad, dense.grad, rtol=1e-12, atol=1e-14)
    rows = torch.cat([batch(step)[:, 0] for step in range(6)]).unique()
    seed_cpu(0)
    start = Model().words.weight
    others = torch.ones(200, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(model.words.weight[others], start[others])


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (SGD, {"momentum": 0.9}),
        (SGD, {"weight_decay": 1e-3}),
        (SGD, {"foreach": True}),
        (Adagrad, {"weight_decay": 1e-3}),
        (Adagrad, {"foreach": True}),
        (Adagrad, {"lr": torch.tensor(0.1)}),
        (Adam, {}),
    ],
)
def test_a_base_that_moves_every_row_or_takes_no_sparse_gradients_gets_dense_ones(base, options, set_tuning):
    model, sparse = trained(base, 1 / 8, set_tuning, **options)
    other, _ = trained(base, 0.0, set_tuning, **options)
    assert sparse == 6 * [set()]
    for parameter, dense in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, dense)


@pytest.mark.parametrize("change", ["bfloat16", "columns first"])
def test_tables_that_torch_would_round_or_read_otherwise_keep_dense_gradients(change):
    model = Model(torch.float32)
    if change == "bfloat16":
        model.to(torch.bfloat16)
    else:
        for table in (model.words, model.bags):
            table.weight = nn.Parameter(table.weight.detach().T.contiguous().T)
    optimizer = NGPlus(model, Adagrad, lr=0.1)
    layouts = Layouts(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch(0)).square().mean().backward()
        optimizer.step()
    assert layouts.sparse == 2 * [set()]


def test_only_groups_whose_settings_allow_it_and_tables_with_few_nonzero_rows_are_converted():
    model = Model()
    groups = [{"params": [model.words.weight], "weight_decay": 1e-3}, {"params": [model.bags.weight]}]
    optimizer = NGPlus(model, Adagrad, lr=0.1, params=groups)
    layouts = Layouts(optimizer)
    for index in (batch(0), torch.arange(100).view(50, 2)):
        optimizer.zero_grad()
        model(index).square().mean().backward()
        optimizer.step()
    assert layouts.sparse == [{"bags.weight"}, set()]


def test_a_base_that_fails_leaves_the_dense_gradients(monkeypatch):
    model = Model()
    optimizer = NGPlus(model, Adagrad, lr=0.1)

    def fail(base):
        assert model.words.weight.grad.is_sparse
        raise MemoryError("full")

    monkeypatch.setattr(Adagrad, "step", fail)
    model(batch(0)).square().mean().backward()
    with pytest.raises(MemoryError, match="full"):
        optimizer.step()
    assert all(p.grad.layout == torch.strided for p in model.parameters())


def test_a_gradient_that_a_hook_of_the_base_removed_stays_removed():
    model = Model()
    optimizer = NGPlus(model, SGD, lr=0.1)
    optimizer.base.register_step_post_hook(lambda base, args, kwargs: base.zero_grad())
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("base", [SGD, Adagrad])
def test_nan_in_a_nonzero_row_reaches_no_parameter(base):
    model = Model()
    optimizer = NGPlus(model, base, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(batch(0)).square().mean().backward()
    model.bags.weight.grad[batch(0)[0, 0], 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class SparseModel(nn.Module):
    """Tables whose gradients are sparse, the last too long to be small, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(rows, 6, mode="sum", sparse=True, dtype=torch.float64) for rows in (7, 300, 2000)
        )
        self.out = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, index):
        return self.out(sum(table(index % 7) for table in self.tables).tanh())


def sparsely_trained(base, small, set_tuning, **options):
    """A model after some steps, its optimizer, and which tables' gradients the base saw as sparse ones."""
    set_tuning(**EVERY_TABLE_IS_LARGE, dense_step_up_to=small)
    seed_cpu(0)
    model = SparseModel()
    if base is SparseAdam:  # which takes no dense gradients
        model.out.requires_grad_(False)
        options["params"] = model.tables.parameters()
    optimizer = NGPlus(model, base, damping=0.3, update_every=3, **{"lr": 0.1, **options})
    layouts = Layouts(optimizer)
    for step in range(5):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        assert all(table.weight.grad.is_sparse for table in model.tables)
    return model, optimizer, layouts.sparse


ALL_TABLES = {f"tables.{i}.weight" for i in range(3)}


@pytest.mark.parametrize("options", [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.2}, {"maximize": True}])
def test_adagrad_gets_dense_gradients_of_small_sparse_tables_and_makes_the_same_step(set_tuning, options):
    (model, optimizer, seen), (plain, its, unconverted) = (
        sparsely_trained(Adagrad, small, set_tuning, **options) for small in (2000, -1)
    )
    assert seen == 5 * [{"tables.2.weight"}]
    assert unconverted == 5 * [ALL_TABLES]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state[ours]["sum"], its.state[theirs]["sum"], rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize(
    ("base", "options"), [(SGD, {}), (Adagrad, {"eps": 0.0}), (Adagrad, {"lr": torch.tensor(0.1)}), (SparseAdam, {})]
)
def test_other_bases_and_settings_get_sparse_gradients_as_they_are(set_tuning, base, options):
    model, optimizer, seen = sparsely_trained(base, 2000, set_tuning, **options)
    assert seen == 5 * [ALL_TABLES]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.skipped_steps == 0


def test_adagrad_refuses_sparse_gradients_with_weight_decay_as_by_itself():
    model = SparseModel()
    optimizer = NGPlus(model, Adagrad, lr=0.1, weight_decay=1e-3)
    model(batch(0)).square().mean().backward()
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
        optimizer.step()


def test_nan_in_a_small_table_reaches_no_parameter():
    model = SparseModel()
    optimizer = NGPlus(model, Adagrad, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(batch(0)).square().mean().backward()
    model.tables[0].weight.grad._values()[-1, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def layouts_with_warnings_as_errors():
    """Whether the base's gradient was sparse, in each step."""
    warnings.simplefilter("error")
    model = nn.EmbeddingBag(20_000, 16, mode="sum")
    optimizer = NGPlus(model, Adagrad, lr=0.1)
    seen = []
    optimizer.base.register_step_post_hook(lambda *_: seen.append(model.weight.grad.is_sparse))
    for _ in range(2):
        model(torch.randint(20_000, (4, 2))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_converting_the_layout_makes_torch_give_no_warning():
    """In a process of its own, since torch warns but once in each."""
    assert in_a_fresh_process(layouts_with_warnings_as_errors) == [True, True]
