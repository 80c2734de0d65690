"""Weights in products over any dimensions: `einsum`, `bmm`, `baddbmm`, `matmul`, standing left or right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplus import NGPlus
from ngplus.capture.function_mode import FunctionCall
from ngplus.capture.op_handlers import find_weights, parse_call
from ngplus.factors.formed import Formed
from ngplus.layers import Layer
from tests.ngplus import oracle
from tests.ngplus.cases import points, seed_cpu


class Product(nn.Module):
    """A product of the model's own after a linear layer, with bare parameters of these shapes."""

    def __init__(self, product, **shapes):
        super().__init__()
        seed_cpu(0)
        self.inlet, self.product = nn.Linear(4, 5), product
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.double()

    def forward(self, x):
        return self.product(self, self.inlet(x))


# Shape of the input, shape of W, the product.
PRODUCTS = {
    "einsum": ((3, 2, 4), (5, 6), lambda m, x: torch.einsum("bti,io->bto", x, m.w)),
    "einsum, W first": ((3, 2, 4), (6, 5), lambda m, x: torch.einsum("oi,b...i->b...o", m.w, x)),
    "einsum without an output": ((3, 4), (5, 6), lambda m, x: torch.einsum("bi,io", x, m.w)),
    "einsum in a list": ((3, 4), (5, 6), lambda m, x: torch.einsum("bi,io->ob", [x, m.w]).T),
    "heads": ((3, 2, 2, 4), (2, 5, 6), lambda m, x: torch.einsum("bthi,hio->btho", x, m.w)),
    "heads of one input": ((3, 2, 4), (2, 5, 6), lambda m, x: torch.einsum("bti,hio->bhto", x, m.w)),
    "heads of one input, in front": (
        (3, 2, 4),
        (2, 5, 6),
        lambda m, x: torch.einsum("bti,hio->hbto", x, m.w).mT.sum(0),
    ),
    "heads of flat rows": ((3, 4, 4), (2, 5, 6), lambda m, x: (x.reshape(-1, 5) @ m.w).view(2, len(x), 4, -1)[0]),
    "heads of vectors": ((3, 4), (2, 5, 6), lambda m, x: torch.matmul(x, m.w).movedim(0, 1)),
    "heads of transposed vectors": ((3, 4), (2, 6, 5), lambda m, x: torch.matmul(m.w, x.T).movedim(2, 0)),
    "heads that are added up": ((3, 2, 4), (2, 5, 6), lambda m, x: torch.einsum("bhi,hio->bo", x, m.w)),
    "heads of one input, added up": ((3, 2, 4), (4, 5, 6), lambda m, x: torch.einsum("bti,hio->bto", x, m.w)),
    "x @ W of heads": ((3, 2, 3, 4), (2, 5, 6), lambda m, x: x @ m.w),
    "W @ x": ((3, 2, 4), (6, 5), lambda m, x: m.w @ x.mT),
    "W @ columns": ((3, 4), (6, 5), lambda m, x: (m.w @ x.mT).mT),
    "W.T @ x": ((3, 2, 4), (5, 6), lambda m, x: m.w.mT @ x.mT),
    "mm, W first": ((3, 4), (6, 5), lambda m, x: m.w.mm(x.T).T),
    "repeated W": ((3, 2, 4), (5, 6), lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1))),
    "the diagonal": ((3, 2, 4), (5, 5), lambda m, x: torch.einsum("bti,ii->bti", x, m.w)),
    "the trace": ((3, 4), (5, 5), lambda m, x: torch.einsum("bi,oo->bi", x, m.w)),
    "diagonals of heads": ((3, 2, 4), (2, 5, 5), lambda m, x: torch.einsum("bhi,hii->bhi", x, m.w)),
    "one of several": ((3, 2, 4), (4, 5, 6), lambda m, x: x @ m.w[1] + F.linear(x, m.w[3].mT)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weight_in_a_product_matches_the_oracle(name):
    shape, weight, product = PRODUCTS[name]
    assert "w" in oracle.check(Product(product, w=weight), points(*shape)).curvature


BATCHED = {
    "bmm": lambda m, x: torch.bmm(x, m.w),
    "bmm of the transpose": lambda m, x: torch.bmm(x, m.v.mT),
    "bmm, W first": lambda m, x: torch.bmm(m.v, x.mT).mT,
    "baddbmm": lambda m, x: torch.baddbmm(m.b, x, m.w),
    "baddbmm, scaled": lambda m, x: torch.baddbmm(x[..., :1], x, m.w, alpha=0.5, beta=2),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_weights_is_as_many_matrices(name):
    model = Product(BATCHED[name], w=(2, 5, 6), v=(2, 6, 5), b=(2, 1, 6))
    used = [parameter for parameter in (model.w, model.v, model.b) if parameter.requires_grad]
    oracle.energy(model(points(2, 3, 4))).backward()
    for parameter in used:
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()
    optimizer = oracle.check(model, points(2, 3, 4), batch_dim=1)
    assert len(optimizer.curvature) == 1 + sum(parameter.requires_grad for parameter in used)


OPTIONS = [{"samples": "rows"}, {"block_size": 2}, {"max_samples": 2}, {"solver": "low_rank"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_products_with_every_option(options):
    model = Product(lambda m, x: m.w @ x.mT, w=(6, 5))
    if "samples" in options:
        rows = oracle.directions({oracle.Matrix("w", rows=6): _rows_of_product(model)}, 0.3)
        oracle.descend(model, lambda m: oracle.energy(m(points(3, 2, 4, seed=1))) / 3, damping=0.3, samples="rows")
        assert oracle.error(model, rows) <= 1e-10
    else:
        oracle.check(model, points(3, 2, 4), **options)


def _rows_of_product(model):
    """6 times the share of each position in the gradient of W."""
    inside = model.inlet(points(3, 2, 4, seed=1)).detach()
    output = (model.w.detach() @ inside.mT).requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.energy(output) / 3, output)
    return [6 * torch.outer(gradient[i, :, t], inside[i, t]).unsqueeze(0) for i in range(3) for t in range(2)]


def test_a_product_with_two_dimensions_of_the_weight_in_the_output_is_differentiated_again():
    model = Product(lambda m, x: torch.einsum("bti,ihd->bthd", x, m.w), w=(5, 2, 3))
    assert "w" in oracle.check(model, points(3, 2, 4)).curvature


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_gives_each_group_of_rows_its_own_matrix(transposed):
    """What is read of the call, against the outer product of each row; in float64, which torch has no kernel for."""
    layer = Layer("w", nn.Parameter(points(3, 5, 4)), None, bare=True, batched=True)
    weight, x = layer.weight.mT if transposed else layer.weight, points(7, 4 if transposed else 5)
    gradient, ends = points(7, weight.shape[2]), torch.tensor([3, 3, 7], dtype=torch.int32)
    call = FunctionCall(torch._grouped_mm, (x, weight), {"offs": ends}, gradient, None)
    assert find_weights(call) == (weight,)
    pairs = parse_call(layer, call, weight, None).pairs(x, gradient)
    assert [(pair.group, rows) for pair, rows in pairs] == [(0, slice(0, 3)), (2, slice(3, 7))]
    for pair, rows in pairs:
        expected = torch.einsum("bi,bo->boi" if transposed else "bi,bo->bio", x[rows], gradient[rows])
        found = (pair.rows.dense() @ pair.columns.dense().mT)[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Experts(nn.Module):
    """Three experts, each for some of the rows, behind a linear layer."""

    def __init__(self, in_groups):
        super().__init__()
        seed_cpu(0)
        self.inlet, self.w, self.in_groups = nn.Linear(4, 8), nn.Parameter(torch.randn(3, 8, 16)), in_groups

    def forward(self, x, expert):
        inside = self.inlet(x).flatten(0, 1)
        order = expert.flatten().argsort(stable=True)
        inside, counts = inside[order], expert.flatten().bincount(minlength=3)
        if self.in_groups:
            out = F.grouped_mm(inside, self.w, offs=counts.cumsum(0).int())
        else:
            out = torch.cat([part @ self.w[i] for i, part in enumerate(inside.split(counts.tolist()))])
        return torch.empty_like(out).index_copy(0, order, out).view(*expert.shape, -1)


@pytest.mark.parametrize("in_groups", [False, True])
def test_rows_that_experts_get_belong_to_their_samples(in_groups):
    """Each sentence of tokens is a sample, wherever its tokens went."""
    model, x, expert = Experts(in_groups), points(4, 5, 4, dtype=torch.float32), torch.randint(3, (4, 5))
    exact = Experts(False).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    gradients = oracle.energy_gradients(exact, x.double(), expert)
    if not in_groups:
        model, x = exact, x.double()
    optimizer = oracle.descend(model, lambda m: oracle.energy(m(x, expert)) / 4, damping=0.3)
    assert set(optimizer.curvature) == {"inlet.weight", "w"}
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= (1e-4 if in_groups else 1e-10)


class Bare(nn.Module):
    """A function of the input and of bare parameters of these shapes, and of a linear layer."""

    def __init__(self, function, **shapes):
        super().__init__()
        seed_cpu(0)
        self.function, self.inlet = function, nn.Linear(8, 8)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.double()

    def forward(self, x):
        return self.function(self, x)


def flatten_heads(x):
    """(B, T, 8) to (B·T, 2, 4)."""
    return x.reshape(-1, 2, 4)


def fold_heads(x):
    """(B, T, 8) to (B · 2, T, 4), as attention that is written by hand does."""
    return x.view(len(x), -1, 2, 4).transpose(1, 2).reshape(len(x) * 2, -1, 4)


def unfold_heads(x):
    return x.view(-1, 2, *x.shape[1:]).transpose(1, 2).flatten(2)


def attend_from_learned_queries(m, x):
    keys = fold_heads(m.inlet(x))
    scores = torch.bmm(fold_heads(m.w.expand(len(x), -1, -1)), keys.transpose(1, 2))
    return unfold_heads(torch.bmm(scores.softmax(-1), keys))


def attend_with_biases_of_heads(m, x):
    keys = fold_heads(m.inlet(x))
    scores = torch.baddbmm(m.w.repeat(len(x), 1, 1), keys, keys.transpose(1, 2))
    return unfold_heads(scores.softmax(-1) @ keys)


def attend_in_windows(m, x):
    """Windows of 2 × 2 of (B, 4, 2, 8), whose scores get the same biases."""
    windows = m.inlet(x).view(len(x), 2, 2, 1, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
    q, k, v = windows.view(-1, 4, 1, 2, 4).expand(-1, -1, 3, -1, -1).permute(2, 0, 3, 1, 4)
    return ((q @ k.mT + m.w).softmax(-1) @ v).view(len(x), -1)


def sort_by_expert(m, x):
    """Each token plus a row of its expert's, in the order of experts and back."""
    rows = x.reshape(-1, 8)
    experts, order = (rows[:, 0] > 0).long().sort(stable=True)
    out = (rows[order] * m.w[experts]).tanh()
    return torch.empty_like(out).index_copy(0, order, out).view_as(x)


# Shape of the input, shapes of parameters, the function.
FLATTENED = {
    "bmm": (
        (3, 5, 8),
        {"w": (2, 4, 3)},
        lambda m, x: torch.bmm(flatten_heads(x).permute(1, 0, 2), m.w).transpose(0, 1).reshape(len(x), -1),
    ),
    "baddbmm": (
        (3, 5, 8),
        {"w": (2, 4, 3), "v": (2, 3)},
        lambda m, x: torch.baddbmm(m.v[:, None], flatten_heads(x).movedim(1, 0), m.w).movedim(1, 0).reshape(len(x), -1),
    ),
    "einsum": (
        (3, 5, 8),
        {"w": (2, 4, 3)},
        lambda m, x: torch.einsum("nhd,hde->nhe", flatten_heads(x), m.w).reshape(len(x), -1),
    ),
    "elementwise": (
        (3, 5, 8),
        {"w": (2, 4)},
        lambda m, x: (flatten_heads(x) * m.w).tanh().reshape(len(x), -1),
    ),
    "flattened after they were moved": (
        (3, 5, 8),
        {"w": (2, 4, 3)},
        lambda m, x: (
            torch.bmm(x.view(len(x), 5, 2, 4).permute(2, 0, 1, 3).reshape(2, -1, 4), m.w)
            .view(2, len(x), -1)
            .transpose(0, 1)
        ),
    ),
    "flattened and back": (
        (3, 5, 8),
        {"w": (4, 3)},
        lambda m, x: flatten_heads(x).transpose(0, 1).view(2, len(x), 5, 4).tanh().transpose(0, 1) @ m.w,
    ),
    "repeated for each of several matrices": (
        (3, 5, 8),
        {"w": (2, 8, 3)},
        lambda m, x: torch.bmm(x.flatten(0, 1).repeat(2, 1).view(2, -1, 8), m.w).transpose(0, 1).reshape(len(x), -1),
    ),
    "repeated one by one": (
        (3, 5, 8),
        {"w": (2, 8)},
        lambda m, x: (x.flatten(0, 1).repeat_interleave(2, dim=0) * m.w.repeat(5 * len(x), 1)).tanh().view(len(x), -1),
    ),
    "samples last": (
        (3, 5, 8),
        {"w": (3, 8)},
        lambda m, x: (m.w @ x.permute(2, 1, 0).reshape(8, -1)).view(-1, len(x)).T,
    ),
    "learned queries": ((3, 5, 8), {"w": (1, 2, 8)}, attend_from_learned_queries),
    "biases of heads": ((3, 5, 8), {"w": (2, 5, 5)}, attend_with_biases_of_heads),
    "biases of windows": ((3, 4, 2, 8), {"w": (2, 4, 4)}, attend_in_windows),
    "rows in the order of experts": ((3, 5, 8), {"w": (2, 8)}, sort_by_expert),
}


@pytest.mark.parametrize("options", [{}, {"max_samples": 2}])
@pytest.mark.parametrize("name", FLATTENED)
def test_rows_of_a_flattened_batch_belong_to_their_samples(name, options):
    shape, shapes, function = FLATTENED[name]
    optimizer = oracle.check(Bare(function, **shapes), points(*shape), **options)
    assert set(shapes) <= set(optimizer.curvature)


class AfterTimeMajor(nn.Module):
    """Rows of what attention or a recurrent layer returns, which see the batch second inside or outside."""

    def __init__(self, layer):
        super().__init__()
        seed_cpu(0)
        self.layer, self.w = layer, nn.Parameter(torch.randn(2, 2, 3))
        self.double()

    def forward(self, x):
        batch_first = self.layer.batch_first
        x = x if batch_first else x.transpose(0, 1)
        x = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        x = x if batch_first else x.transpose(0, 1)
        return torch.einsum("nhd,hde->nhe", x.reshape(-1, 2, 2), self.w).reshape(len(x), -1)


@pytest.mark.parametrize("times", [3, 5])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.GRU])
def test_rows_behind_attention_and_recurrent_layers_belong_to_their_samples(kind, batch_first, times):
    """Also where there are as many times as samples."""
    seed_cpu(0)
    model = AfterTimeMajor(kind(4, 2 if kind is nn.MultiheadAttention else 4, batch_first=batch_first))
    assert "w" in oracle.check(model, points(3, times, 4)).curvature


def test_heads_that_are_folded_into_the_batch_belong_to_their_samples_for_a_table_too():
    """Also in a model without bare parameters."""

    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.inlet, self.table = nn.Linear(8, 8), nn.Embedding(2, 8)
            self.double()

        def forward(self, x):
            self.w = self.table.weight.unsqueeze(0)
            return attend_from_learned_queries(self, x)

    assert set(oracle.check(Queries(), points(3, 5, 8)).curvature) == {"inlet.weight", "table.weight"}


def test_rows_of_a_flattened_time_major_batch_belong_to_their_samples():
    def multiply(m, x):
        return (
            torch.bmm(flatten_heads(torch.cdist(x, m.v)).transpose(0, 1), m.w).transpose(0, 1).reshape(*x.shape[:2], -1)
        )

    optimizer = oracle.check(Bare(multiply, w=(2, 4, 3), v=(8, 8)), points(5, 3, 8), batch_dim=1)
    assert {"w", "v"} <= set(optimizer.curvature)


def test_experts_of_rows_that_nothing_followed_count_rows_as_samples():
    model = Experts(False).double()
    x, expert = points(6, 1, 4), torch.tensor([[0], [2], [2], [0], [0], [2]])
    gradients = oracle.energy_gradients(model, x, expert)
    optimizer = NGPlus(
        model, lr=1e-9, damping=0.3, update_every=1, samples="rows", loss_reduction={"": 6, "inlet": 6, "*": 6}
    )
    (oracle.energy(model(x, expert)) / 6).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_formed_gradients_have_no_positions():
    formed = Formed(lambda at: torch.zeros(len(at), 1, 2, 3), torch.arange(4).unsqueeze(1), (1, 2, 3), torch.float32)
    with pytest.raises(NotImplementedError, match="no positions"):
        formed.slice_positions(0, 1)
