"""The direction (6) for Embedding and EmbeddingBag, dense and sparse, against gradients made one sample at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from tests.ngplus import oracle
from tests.ngplus.cases import seed_cpu


def table(kind=nn.Embedding, rows=9, dim=4, dtype=torch.float64, **options):
    seed_cpu(0)
    return kind(rows, dim, **options).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("rows", [9, 3])
def test_embedding_of_either_side_matches_the_oracle(dtype, samples, shape, rows):
    model = nn.Sequential(table(rows=rows, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    oracle.check(model, torch.randint(rows, shape), samples=samples)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 8),
    dim=st.integers(1, 5),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sparse=st.booleans(),
    padded=st.booleans(),
    samples=st.sampled_from(["batch", "rows"]),
)
def test_embedding_of_any_shape_matches_the_oracle(rows, dim, shape, sparse, padded, samples):
    layer = table(rows=rows, dim=dim, sparse=sparse, padding_idx=-1 if padded else None)
    nn.init.normal_(layer.weight)
    oracle.check(layer, torch.randint(rows, shape), samples=samples)


def test_embedding_with_its_samples_along_the_second_dimension():
    model = nn.Sequential(table(), nn.Linear(4, 2).double())
    oracle.check(model, torch.randint(9, (5, 3)), batch_dim=1)


def test_embedding_refuses_a_batch_dim_that_its_indices_do_not_have():
    with pytest.raises(ValueError, match=r"batch_dim=2 is no sample dimension of weight's input \(4, 3\)"):
        oracle.descend(table(), lambda m: m(torch.randint(9, (4, 3))).sum(), batch_dim=2)


@pytest.mark.parametrize("rows", [9, 3])
def test_sparse_gradient_stays_sparse_and_may_name_a_row_twice(rows):
    model = table(rows=rows, sparse=True)
    index = torch.tensor([[1, 1, 2], [2, 0, 1]])
    oracle.check(model, index)
    assert model.weight.grad.is_sparse


@pytest.mark.parametrize("rows", [9, 3])
def test_a_sparse_gradient_of_a_single_row_moves_that_row(rows):
    """Torch takes the stride of a single row for its length where the values are a transposed view."""
    model = table(rows=rows, sparse=True)
    before = model.weight.detach().clone()
    index = torch.tensor([2])
    gradients = oracle.sample_gradients(model, [lambda m: oracle.energy(m(index))])
    optimizer = NGPlus(model, lr=1.0, damping=0.3, update_every=1)
    oracle.energy(model(index)).backward()
    optimizer.step()
    (D,) = oracle.directions(gradients, 0.3).values()
    torch.testing.assert_close(before - model.weight, D[0], rtol=1e-10, atol=1e-12)


class Tied(nn.Module):
    """A table that is a linear layer's weight too, and that layer's bias; the layer is used on demand."""

    def __init__(self, rows, sparse):
        super().__init__()
        self.table, self.layer = table(rows=rows, sparse=sparse), nn.Linear(4, rows, dtype=torch.float64)
        self.layer.weight = self.table.weight

    def forward(self, index, both=False):
        return self.layer(self.table(index)) if both else self.table(index)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rows", [9, 3])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(NGPlus, {}), (NGPlus, {"block_size": 2}), (NGPlus, {"curvature": "mini_batch"}), (KFAC, {}), (SENG, {})],
)
def test_a_sparse_lookup_of_a_weight_whose_matrix_has_a_bias_is_as_a_dense_one(optimizer, options, rows, both):
    """The curvature from a lookup alone, or from a use of both kinds; then a step on another lookup alone."""
    if both and optimizer is KFAC:
        pytest.skip("K-FAC has no factors of a weight that is used in both ways")
    index = torch.randint(rows, (5, 2))
    moved = []
    for sparse in (False, True):
        model = Tied(rows, sparse)
        trained = optimizer(model, lr=0.1, damping=0.3, update_every=2, **options)
        for x, kind in ((index, both), (index[:2], False)):
            trained.zero_grad()
            oracle.energy(model(x, kind)).backward()
            trained.step()
        assert trained.curvature["table.weight"].shape.columns == 5
        moved.append(model.table.weight.detach())
    # SENG's (G − Uy)/λ is a small difference of large numbers where a lookup and a product are one layer.
    tolerance = {"rtol": 1e-8, "atol": 2e-9} if optimizer is SENG and both else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(moved[1], moved[0], **tolerance)


def test_padding_index_is_no_part_of_the_curvature():
    model = table(padding_idx=0)
    oracle.check(model, torch.tensor([[0, 1], [0, 0], [2, 3]]))
    assert not model.weight.grad[0].any()


def test_embedding_with_gradients_scaled_by_frequency_goes_to_the_base():
    model = table(scale_grad_by_freq=True)
    plain = copy.deepcopy(model)
    index = torch.tensor([[1, 1], [2, 0]])
    oracle.energy(plain(index)).backward()
    with pytest.warns(UserWarning, match=r"weight is an embedding with scale_grad_by_freq.* goes to SGD untouched"):
        oracle.descend(model, lambda m: oracle.energy(m(index)))
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)


class Bags(nn.Module):
    """Bags of unequal length, cut from a flat list of indices, and weights for their members."""

    def __init__(self, bags, weights=None, rows=9, include_last_offset=False, **options):
        super().__init__()
        self.layer = table(nn.EmbeddingBag, rows, include_last_offset=include_last_offset, **options)
        self.bags, self.weights, self.last = bags, weights, include_last_offset

    def forward(self, chosen):
        bags = [self.bags[i] for i in chosen]
        flat = torch.tensor([member for bag in bags for member in bag], dtype=torch.long)
        ends = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
        weights = None
        if self.weights is not None:
            weights = torch.tensor([w for i in chosen for w in self.weights[i]], dtype=torch.float64)
        return self.layer(flat, ends if self.last else ends[:-1], per_sample_weights=weights)


@pytest.mark.parametrize("rows", [9, 3])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 1, -1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags_of_unequal_length(mode, last, padding_idx, sparse, rows):
    bags = [[0, 1, 1], [2], [], [1, 2, 0, 2], [1]]
    weights = [[0.5, -1.0, 2.0], [1.5], [], [1.0, 0.3, 0.2, 0.1], [3.0]] if mode == "weighted" else None
    kind = "sum" if mode == "weighted" else mode
    model = Bags(bags, weights, rows, last, mode=kind, padding_idx=padding_idx, sparse=sparse)
    losses = [lambda m, i=i: oracle.energy(m([i])) for i in range(len(bags))]
    gradients = oracle.sample_gradients(model, losses)
    oracle.descend(model, lambda m: oracle.energy(m(range(5))) / 5, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10
    assert model.layer.weight.grad.is_sparse == sparse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("members", [1, 3])
def test_bags_of_equal_length(members, mode, samples, dtype):
    model = nn.Sequential(table(nn.EmbeddingBag, mode=mode, dtype=dtype), nn.Linear(4, 2, dtype=dtype))
    oracle.check(model, torch.randint(9, (5, members)), samples=samples)


class SharedBags(nn.Module):
    """One table that two bags of each sample use, of one member and of several."""

    def __init__(self, widths, **options):
        super().__init__()
        self.layer, self.widths = table(nn.EmbeddingBag, **options), widths

    def forward(self, index):
        return sum(self.layer(part) * (i + 1) for i, part in enumerate(index.split(self.widths, dim=1)))


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"padding_idx": 2}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("widths", [[1, 3], [1, 1], [2, 1, 1]])
def test_bags_of_one_and_of_several_members_from_one_table(widths, mode, options):
    oracle.check(SharedBags(widths, mode=mode, **options), torch.randint(4, (5, sum(widths))))


def test_bag_of_maxima_is_differentiated_again():
    oracle.check(table(nn.EmbeddingBag, mode="max"), torch.randint(9, (4, 3)))


def test_bag_of_maxima_goes_to_the_base_with_the_option_for_it():
    model = table(nn.EmbeddingBag, mode="max")
    with pytest.warns(UserWarning, match=r"weight is an embedding bag with mode='max'.* goes to SGD untouched"):
        optimizer = oracle.descend(
            model, lambda m: oracle.energy(m(torch.randint(9, (4, 3)))), function_fallback="base"
        )
    assert not optimizer.curvature


def test_max_norm_shrinks_rows_before_the_curvature_step():
    model = table(max_norm=0.5)
    index = torch.randint(9, (4, 3))
    with torch.no_grad():
        model(index)
    oracle.check(model, index)


def test_a_table_of_a_million_rows_keeps_a_small_matrix():
    model = table(nn.EmbeddingBag, rows=10**6, dim=3, sparse=True, mode="sum")
    optimizer = oracle.descend(model, lambda m: oracle.energy(m(torch.randint(10**6, (4, 3)))))
    assert optimizer.curvature["weight"].numel() <= 9 + 1
