"""Tensors that are not plain and dense: jagged batches, sparse gradients, tables that grow, inputs overwritten."""

import copy
import warnings

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.capture.op_handlers import OpCall
from tests.ngplus import oracle
from tests.ngplus.cases import recorded_warnings, seed_cpu

DAMPING = 0.3


def jagged(*tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
        return torch.nested.nested_tensor(list(tensors), layout=torch.jagged)


class Ragged(nn.Module):
    def __init__(self, table, product):
        super().__init__()
        seed_cpu(0)
        self.inlet = nn.Embedding(9, 5) if table else nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)
        self.last = nn.Linear(4, 3, bias=False) if product else None
        self.double()

    def forward(self, x):
        out = self.head(self.inlet(x).tanh())
        return out if self.last is None else out @ self.last.weight


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_each_tensor_of_a_jagged_batch_is_a_sample(table, product, samples):
    model = Ragged(table, product)
    lengths = (2, 4, 1)
    rows = [torch.randint(9, (n,)) if table else torch.randn(n, 4, dtype=torch.float64) for n in lengths]
    each = rows if samples == "batch" else [row[i : i + 1] for row in rows for i in range(len(row))]
    gradients = oracle.sample_gradients(model, [lambda m, x=x: oracle.energy(m(x)) for x in each])
    oracle.descend(
        model, lambda m: oracle.energy(m(jagged(*rows)).values()) / len(each), damping=DAMPING, samples=samples
    )
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


def test_a_nested_tensor_of_the_older_layout_leaves_the_layer_to_the_base():
    model = nn.Linear(4, 3).double()
    optimizer = NGPlus(model, lr=1e-9, update_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.nested.nested_tensor([torch.randn(n, 4, dtype=torch.float64) for n in (2, 3)])
        out = model(batch)
    torch.nested.to_padded_tensor(out, 0.0).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^weight is used on a nested tensor whose layout is not torch.jagged"):
        optimizer.step()
    assert not optimizer.curvature


def test_an_unreadable_call_is_a_warning_and_no_error_in_backward(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("nothing reads this")

    monkeypatch.setattr(OpCall, "pairs", refuse)
    model = nn.Linear(4, 3).double()
    optimizer = NGPlus(model, lr=1e-9, update_every=1)
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^weight could not be read \(NotImplementedError: nothing reads this\)"):
        optimizer.step()
    assert not optimizer.curvature


class Own(torch.Tensor):
    """A tensor whose ``new_empty`` takes its sizes as one argument alone, as that of monai's MetaTensor does."""

    def new_empty(self, size, dtype=None, device=None):
        return self.as_subclass(torch.Tensor).new_empty(size, dtype=dtype, device=device).as_subclass(Own)


def test_a_batch_of_a_class_of_ones_own_is_read_as_a_tensor():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64)
    expected = oracle.directions(oracle.sample_gradients(model, oracle.sample_losses(x)), 0.3)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.batch_loss(x.as_subclass(Own))(model).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


SPARSE = {
    "both dimensions": lambda g: g.to_sparse(),
    "both dimensions, not coalesced": lambda g: torch.sparse_coo_tensor(
        g.to_sparse().indices().repeat(1, 2), g.to_sparse().values().repeat(2) / 2, g.shape, check_invariants=True
    ),
}


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
@pytest.mark.parametrize("build", [lambda: nn.Embedding(9, 5), lambda: nn.Embedding(5, 9), lambda: nn.Linear(4, 5)])
def test_gradients_of_other_sparse_layouts_have_the_dense_ones_direction(layout, curvature, build):
    seed_cpu(0)
    model = build().double()
    x = torch.randn(6, 4, dtype=torch.float64) if isinstance(model, nn.Linear) else torch.randint(5, (6, 2))
    twin = copy.deepcopy(model)
    for each, change in ((twin, lambda g: g), (model, SPARSE[layout])):
        optimizer = NGPlus(each, lr=1e-9, damping=DAMPING, update_every=1, curvature=curvature)
        (oracle.energy(each(x)) / 6).backward()
        each.weight.grad = change(each.weight.grad)
        optimizer.step()
    torch.testing.assert_close(model.weight.grad.to_dense(), twin.weight.grad.to_dense())


@pytest.mark.parametrize("width", [6, 64])
@pytest.mark.parametrize("update_every", [1, 3, 100])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_that_grows_drops_its_curvature_and_builds_it_again(width, update_every, sparse):
    seed_cpu(0)
    table = nn.Embedding(20, width, sparse=sparse).double()
    model = nn.Sequential(table, nn.Linear(width, 3).double())
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=update_every, solver="dense")
    for number in range(6):
        if number == 4:
            table.weight.data = torch.cat([table.weight.data, torch.randn(5, width, dtype=torch.float64)])
            table.weight.grad = None
        x = torch.randint(len(table.weight), (8, 4))
        x[0, 0] = len(table.weight) - 1
        gradients = oracle.sample_gradients(model, [lambda m, row=row: oracle.energy(m(row)) for row in x.split(1)])
        gradients = {matrix: g for matrix, g in gradients.items() if matrix.weight == "0.weight"}
        (oracle.energy(model(x)) / 8).backward()
        optimizer.step()
        if number == 5 and update_every != 3:  # built on the step after the one that found it dropped
            assert optimizer.curvature["0.weight"].shape.rows == 25
            assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-9
        optimizer.zero_grad()


class Residual(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        seed_cpu(0)
        self.inlet, self.layer, self.in_place = nn.Linear(6, 6), nn.Linear(6, 6), in_place

    def forward(self, x):
        x = self.inlet(x).float().tanh() * 1.0
        change = self.layer(x)
        if self.in_place:
            x += change
            return x
        return x + change


@pytest.mark.parametrize("in_place", [False, True])
def test_an_input_overwritten_under_autocast_leaves_the_layer_to_the_base(in_place):
    model, x = Residual(in_place), torch.randn(16, 6)
    optimizer = NGPlus(model, lr=1e-9, damping=0.01, update_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().square().mean().backward()
    gradient = model.layer.weight.grad.clone()
    with recorded_warnings() as caught:
        optimizer.step()
    messages = caught
    if in_place:
        assert messages[0].startswith("layer.weight had its input overwritten in place between forward and backward")
        assert torch.equal(model.layer.weight.grad, gradient)
    else:
        assert not messages
    assert ("layer.weight" in optimizer.curvature) != in_place


@pytest.mark.parametrize("what", ["index", "weights"])
def test_a_bags_arguments_overwritten_before_backward_leave_it_to_the_base(what):
    """Saved tensors that are packed by a hook may be overwritten: autograd has its own copy."""
    model = nn.EmbeddingBag(9, 4, mode="sum").double()
    optimizer = NGPlus(model, lr=1e-9, update_every=1)
    index, weights = torch.randint(9, (5, 3)), torch.rand(5, 3, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda packed: packed):
        out = model(index, per_sample_weights=weights)
    (index if what == "index" else weights).zero_()
    out.square().sum().backward()
    with pytest.warns(UserWarning, match="^weight had its input overwritten in place"):
        optimizer.step()


class Small(nn.Module):
    """Layers on what the loop gives: so small that they are summed together."""

    def __init__(self, first):
        super().__init__()
        seed_cpu(0)
        self.first = {
            "linear": lambda: nn.Linear(4, 5),
            "table": lambda: nn.Embedding(4, 5),
            "bags": lambda: nn.EmbeddingBag(4, 5, mode="sum"),
        }[first]()
        self.same = copy.deepcopy(self.first)  # of one shape with the first
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.first(x).tanh() * self.same(x).tanh())


def some_inputs(first):
    seed_cpu(1)
    shapes = {"linear": (6, 4), "table": (6,), "bags": (6, 2)}
    if first == "linear":
        return [torch.randn(shapes[first], dtype=torch.float64) for _ in range(2)]
    return [torch.randint(4, shapes[first]) for _ in range(2)]


@pytest.mark.parametrize("shared", ["tensor", "numpy"])
@pytest.mark.parametrize("first", ["linear", "table", "bags"])
def test_an_input_may_be_overwritten_once_backward_has_returned(first, shared):
    """As a buffer is that every micro-batch is copied into, or the observation that an environment overwrites."""
    model, batches = Small(first), some_inputs(first)
    gradients = oracle.sample_gradients(
        model, [lambda m, x=x[i : i + 1]: oracle.energy(m(x)) for x in batches for i in range(len(x))]
    )
    optimizer = NGPlus(model, base=torch.optim.SGD, lr=1.0, damping=DAMPING, update_every=1, loss_reduction=12)
    array = batches[0].numpy().copy()
    buffer = torch.from_numpy(array)
    for batch in batches:
        if shared == "tensor":
            buffer.copy_(batch)
        else:
            array[...] = batch.numpy()
        (oracle.energy(model(buffer)) / 12).backward()
    array[...] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.head = nn.Linear(4, 3).double()

    def forward(self, one, other):
        return self.head(one), self.head(other)


@pytest.mark.parametrize("overwritten", [False, True])
def test_an_input_overwritten_before_the_other_use_by_its_samples_leaves_the_layer_to_the_base(overwritten):
    """The gradients of one call come in two backward passes; a sample's is the sum of both."""
    model, (one, other) = TwoViews(), some_inputs("linear")
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1)
    first, second = model(one, other)
    first.square().mean().backward()
    if overwritten:
        one.zero_()
    second.square().mean().backward()
    gradient = model.head.weight.grad.clone()
    with recorded_warnings() as caught:
        optimizer.step()
    if overwritten:
        assert caught[0].startswith("head.weight had an input, or the gradient of an output, overwritten in place")
        assert torch.equal(model.head.weight.grad, gradient)
    else:
        assert not caught
    assert ("head.weight" in optimizer.curvature) != overwritten


class ScaledInPlace(torch.autograd.Function):
    """The identity, whose backward changes the gradient that it gets, as some kernels do to save memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(3.0)


class SharedGradient(nn.Module):
    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.one, self.other = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        one = ScaledInPlace.apply(self.one(x))
        return one + self.other(x)  # made last, so that its gradient, the same tensor as the other's, is read first


def test_a_gradient_that_is_overwritten_after_it_was_read_leaves_the_layer_to_the_base():
    model, (x, _) = SharedGradient(), some_inputs("linear")
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1)
    oracle.energy(model(x)).backward()
    with recorded_warnings() as caught:
        optimizer.step()
    assert [message.partition(" ")[0] for message in caught] == ["other.weight"]
    assert set(optimizer.curvature) == {"one.weight"}
