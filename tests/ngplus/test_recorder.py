"""What is captured, when, and that nothing is left behind: uses of a layer, backward passes, hooks."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import prune

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from ngplus.capture.model_calls import SIZES
from tests.ngplus import oracle
from tests.ngplus.cases import mlp, points, recorded_warnings, seed_cpu


@pytest.fixture
def hooks():
    """The hooks that any module's forward meets, but for those that were there before the test."""
    gc.collect()

    def all_hooks():
        return {**nn_module._global_forward_hooks, **nn_module._global_forward_pre_hooks}

    before = all_hooks()
    return lambda: {key: hook for key, hook in all_hooks().items() if key not in before}


class Wired(nn.Module):
    """A model whose forward is a function of itself and its inputs."""

    def __init__(self, forward, **modules):
        super().__init__()
        seed_cpu(0)
        self.wiring = forward
        for name, module in modules.items():
            self.add_module(name, module)
        self.double()

    def forward(self, *inputs):
        return self.wiring(self, *inputs)


def tied(model, index):
    hidden = model.table(index).tanh()
    return F.linear(hidden, model.table.weight, model.bias)


USES = {
    "twice, one after the other": (
        lambda: Wired(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(4, 4)),
        lambda: [points(5, 4)],
    ),
    "twice, different positions": (
        lambda: Wired(lambda m, x, y: m.a(x).tanh().sum(1) * m.a(y).sum(1), a=nn.Linear(4, 3)),
        lambda: [points(5, 2, 4), points(5, 7, 4)],
    ),
    "with and without positions": (
        lambda: Wired(lambda m, x, y: m.a(x).tanh() * m.a(y).sum(1), a=nn.Linear(4, 3)),
        lambda: [points(5, 4), points(5, 7, 4)],
    ),
    "a convolution at two sizes": (
        lambda: Wired(lambda m, x, y: m.a(x).mean((2, 3)).tanh() * m.a(y).mean((2, 3)), a=nn.Conv2d(2, 3, 2)),
        lambda: [points(3, 2, 4, 4), points(3, 2, 5, 3)],
    ),
    "an embedding twice": (
        lambda: Wired(lambda m, x, y: m.a(x).tanh().sum(1) * m.a(y).sum(1), a=nn.Embedding(7, 3)),
        lambda: [torch.randint(7, (5, 2)), torch.randint(7, (5, 3))],
    ),
    "a bag twice": (
        lambda: Wired(lambda m, x, y: m.a(x).tanh() * m.a(y), a=nn.EmbeddingBag(7, 3)),
        lambda: [torch.randint(7, (5, 2)), torch.randint(7, (5, 3))],
    ),
    "two layers with one weight and two biases": (
        lambda: shared_weight(Wired(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))),
        lambda: [points(5, 4)],
    ),
    "an embedding tied to a linear layer": (
        lambda: shared_weight(Wired(lambda m, x: m.b(m.a(x).tanh()), a=nn.Embedding(7, 4), b=nn.Linear(4, 7))),
        lambda: [torch.randint(7, (5, 3))],
    ),
    "a small embedding tied to a linear layer": (
        lambda: shared_weight(Wired(lambda m, x: m.b(m.a(x).tanh()), a=nn.Embedding(3, 4), b=nn.Linear(4, 3))),
        lambda: [torch.randint(3, (5, 3))],
    ),
    "a functional use of an embedding": (
        lambda: Wired(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight), a=nn.Embedding(7, 4)),
        lambda: [torch.randint(7, (5, 3))],
    ),
    "a functional use of a linear layer": (
        lambda: Wired(lambda m, x: F.linear(input=x, bias=m.a.bias, weight=m.a.weight).tanh(), a=nn.Linear(4, 3)),
        lambda: [points(5, 4)],
    ),
    "a slice of a weight": (
        lambda: Wired(lambda m, x: F.linear(x, m.a.weight[1:3]).tanh() + m.a(x)[:, :2], a=nn.Linear(4, 3)),
        lambda: [points(5, 4)],
    ),
    "a layer whose output is thrown away": (
        lambda: Wired(lambda m, x: (m.a(x * 2), m.a(x))[1], a=nn.Linear(4, 3)),
        lambda: [points(5, 4)],
    ),
    "a branch without a gradient": (
        lambda: Wired(lambda m, x: m.a(x) * m.a(x).detach(), a=nn.Linear(4, 3)),
        lambda: [points(5, 4)],
    ),
    "changed in place, with positions": (
        lambda: Wired(lambda m, x: m.a(x).mul_(2).tanh_(), a=nn.Linear(4, 3)),
        lambda: [points(5, 2, 4)],
    ),
    "changed in place, with several dimensions of positions": (
        lambda: Wired(lambda m, x: m.a(x).sigmoid_(), a=nn.Linear(4, 3)),
        lambda: [points(5, 2, 3, 4)],
    ),
    "a part changed in place, with positions": (
        lambda: Wired(lambda m, x: zeroed(m.a(x)), a=nn.Linear(4, 3)),
        lambda: [points(5, 2, 4)],
    ),
    "an embedding changed in place": (
        lambda: Wired(lambda m, x: m.a(x).mul_(2).tanh_(), a=nn.Embedding(7, 3)),
        lambda: [torch.randint(7, (5, 2))],
    ),
    "changed in place": (
        lambda: Wired(lambda m, x: m.a(x).mul_(2).add_(1).tanh_(), a=nn.Linear(4, 3)),
        lambda: [points(5, 4)],
    ),
}


def zeroed(x):
    x[..., 0] *= 0.5
    x[:, 1].mul_(2)
    return x


def shared_weight(model):
    model.b.weight = model.a.weight
    return model


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_weight_counts(use):
    make, inputs = USES[use]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracle.check(make(), *inputs())


ROWS = [
    "twice, one after the other",
    "twice, different positions",
    "with and without positions",
    "a convolution at two sizes",
    "an embedding twice",
    "a bag twice",
]


@pytest.mark.parametrize("use", ROWS)
def test_every_position_of_every_use_is_a_row(use):
    make, inputs = USES[use]
    oracle.check(make(), *inputs(), samples="rows")


@pytest.mark.parametrize(
    ("wiring", "name"),
    [
        (lambda m, x: F.linear(x, m.a.weight * 2), "mul"),
        (lambda m, x: torch.cdist(x, m.a.weight) + m.b(x), "cdist"),
        (lambda m, x: m.a(x) + m.a.weight.norm(), "norm"),
    ],
)
def test_an_unsupported_use_is_named_and_its_layer_goes_to_the_base(wiring, name):
    model = Wired(wiring, a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    x = points(5, 4)
    oracle.energy(plain(x)).backward()
    optimizer = NGPlus(model, lr=1e-9, update_every=1, function_fallback="base")
    with recorded_warnings() as caught:
        for _ in range(3):
            optimizer.zero_grad()
            oracle.energy(model(x)).backward()
            optimizer.step()
    assert caught == [
        f"a.weight is used by {name}, where a single sample's gradient cannot be captured; it goes to SGD untouched"
    ]
    assert "a.weight" not in optimizer.curvature
    torch.testing.assert_close(model.a.weight.grad, plain.a.weight.grad, rtol=1e-5, atol=1e-6)


# When --------------------------------------------------------------------------------------------------------------


def test_hooks_live_on_curvature_steps_only(hooks):
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=3)
    armed = []
    for _ in range(7):
        armed.append(bool(hooks()))
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert armed == [True, False, False, True, False, False, True]


def test_nothing_is_registered_on_the_model(hooks):
    model = mlp(4, 3)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    assert hooks()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert optimizer is not None


def test_a_deleted_optimizer_takes_its_hooks_along(hooks):
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    assert hooks()
    del optimizer, loss
    gc.collect()
    assert not hooks()


@pytest.mark.parametrize("event", ["load_state_dict", "add_param_group"])
def test_rearming_the_capture_removes_its_earlier_hooks(event, hooks):
    """Though the graph of a captured forward pass is still alive."""
    model, x = mlp(4, 3, 2), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1, params=[{"params": list(model[0].parameters())}])
    output = model(x)
    before = hooks()
    if event == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.add_param_group({"params": list(model[2].parameters())})
    assert len(hooks()) == len(before)
    assert not set(hooks()) & set(before)
    assert output.requires_grad


def test_a_step_keeps_nothing_of_the_loop_that_makes_it():
    """The loss and its graph go when the loop lets go of them."""
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    graph = weakref.ref(loss)
    del loss
    assert graph() is None


def test_forward_passes_between_steps_leave_nothing_behind():
    """Evaluation, no_grad, inference mode, and a forward whose backward does not come."""
    seed_cpu(1)
    x, other = points(5, 4), points(9, 4)
    model = mlp(4, 6, 3)
    quiet = copy.deepcopy(model)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    model.eval()
    with torch.no_grad():
        model(other)
    with torch.inference_mode():
        model(other)
    model.train()
    model(other)
    kept = model(other)
    for m, o in ((model, optimizer), (quiet, NGPlus(quiet, lr=0.1, update_every=1))):
        for _ in range(2):
            m(x).square().mean().backward()
            o.step()
            o.zero_grad()
    assert kept.requires_grad
    for a, b in zip(model.parameters(), quiet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_forward_that_raises_leaves_no_function_mode():
    model = Wired(lambda m, x: m.a(x) if x.shape[1] == 4 else 1 / 0, a=nn.Linear(4, 3))
    x = points(5, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    with pytest.raises(ZeroDivisionError):
        model(points(5, 3))
    assert torch.overrides._get_current_function_mode() is None
    gradients = oracle.energy_gradients(model, x)
    (oracle.energy(model(x)) / 5).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_layers_called_one_by_one_are_captured_without_a_forward_of_the_model():
    model, x = mlp(4, 6, 3), points(5, 4)
    gradients = oracle.energy_gradients(model, x)

    def run(m):
        for layer in m:
            value = layer(x if layer is m[0] else value)  # noqa: F821
        return oracle.energy(value) / 5

    oracle.descend(model, run, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


# Backward passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_with_respect_to_inputs_do_not_contaminate(create_graph):
    model, x = mlp(4, 6, 3), points(5, 4).requires_grad_()
    gradients = oracle.energy_gradients(model, x.detach())

    def run(m):
        output = m(x)
        torch.autograd.grad(output.sum(), x, retain_graph=True, create_graph=create_graph)
        return oracle.energy(output) / 5

    oracle.descend(model, run, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_returned_are_not_those_of_the_step(create_graph):
    """Those of the weights themselves too, as for the norm of one loss's gradient together with that of another."""
    model, x = mlp(4, 6, 3), points(5, 4)
    gradients = oracle.energy_gradients(model, x)

    def run(m):
        output = m(x)
        torch.autograd.grad(output.sum(), list(m.parameters()), retain_graph=True, create_graph=create_graph)
        return oracle.energy(output) / 5

    oracle.descend(model, run, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_gradients_put_in_place_by_hand_go_to_the_base_with_a_warning():
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.5, damping=0.3)
    with recorded_warnings() as caught:
        for _ in range(5):
            before = [p.detach().clone() for p in model.parameters()]
            returned = torch.autograd.grad(oracle.energy(model(x)), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), returned, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
            for parameter, old, gradient in zip(model.parameters(), before, returned, strict=True):
                torch.testing.assert_close(parameter.detach(), old - 0.5 * gradient)
    assert sum("no backward pass through the model was captured" in warning for warning in caught) == 1


def test_backward_to_inputs_only_does_not_contaminate():
    model, x = mlp(4, 6, 3), points(5, 4).requires_grad_()
    gradients = oracle.energy_gradients(model, x.detach())

    def run(m):
        oracle.energy(m(x)).backward(inputs=[x])
        return oracle.energy(m(x)) / 5

    oracle.descend(model, run, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("zeroed", [False, True])
def test_two_losses_through_one_retained_graph_are_one_loss(zeroed):
    """The gradients of a layer's output add up before they are squared; those that `zero_grad` discards do not."""
    model, x = mlp(4, 6, 3), points(5, 4)
    gradients = oracle.sample_gradients(
        model, [lambda m, x=x: m(x).sin().sum() + (0 if zeroed else 1) * m(x).square().sum() for x in x.split(1)]
    )
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    out = model(x)
    (out.square().sum() / 5).backward(retain_graph=True)
    if zeroed:
        optimizer.zero_grad()
    (out.sin().sum() / 5).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3), (5, 1)])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("samples", ["batch", "rows"])
def test_accumulated_micro_batches_are_one_batch(sizes, joint, samples):
    """One backward a micro-batch, or one for the sum of unequal ones; the loss is divided by all samples."""
    model = mlp(4, 6, 3)
    x = points(sum(sizes), 4)
    gradients = oracle.energy_gradients(model, x)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, samples=samples, solver="dense")
    losses = [oracle.energy(model(part)) / len(x) for part in x.split(sizes)]
    if joint:
        sum(losses).backward()
    else:
        for loss in losses:
            loss.backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("solver", ["auto", "dense", "low_rank"])
@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (1, 3, 1, 2)])
def test_micro_batches_with_and_without_positions_are_one_batch(solver, lengths):
    """A sequence of length one comes in as vectors would, and its samples count like those of longer ones."""
    model = Wired(lambda m, x: m.a(x).tanh().mean(1), a=nn.Linear(12, 12))
    xs = [points(2, length, 12) for length in lengths]
    losses = [lambda m, x=x, i=i: oracle.energy(m(x[i : i + 1])) for x in xs for i in range(len(x))]
    gradients = oracle.sample_gradients(model, losses)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, solver=solver)
    for x in xs:
        (oracle.energy(model(x)) / len(losses)).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_max_samples_holds_over_micro_batches():
    model, x = mlp(4, 6, 3), points(6, 4)
    gradients = oracle.energy_gradients(model, x)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, max_samples=4)
    for part in x.split([3, 2, 1]):
        (oracle.energy(model(part)) / 6).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3, used=4)) <= 1e-10


def test_a_summed_loss_gives_the_same_curvature_and_a_larger_gradient():
    model, x = mlp(4, 6, 3), points(5, 4)
    gradients = oracle.energy_gradients(model, x)
    expected = {matrix: 5 * D for matrix, D in oracle.directions(gradients, 0.3).items()}
    oracle.descend(model, lambda m: oracle.energy(m(x)), damping=0.3, loss_reduction="sum")
    assert oracle.error(model, expected) <= 1e-10


def test_zero_grad_forgets_what_was_summed():
    model, x = mlp(4, 6, 3), points(5, 4)
    gradients = oracle.energy_gradients(model, x)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    model(points(5, 4)).sum().backward()
    optimizer.zero_grad()
    (oracle.energy(model(x)) / 5).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG])
@pytest.mark.parametrize("factor", [1.0, float("nan"), 0.0])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_models_zero_grad_forgets_a_backward_without_a_step(sparse, set_to_none, factor, optimizer):
    """As after a step that a scaler skipped."""
    seed_cpu(0)
    start = nn.Embedding(9, 3, sparse=sparse).double() if sparse else nn.Linear(4, 3).double()
    x, other = [torch.randint(9, (n, 4)) if sparse else points(n, 4) for n in (5, 3)]
    moved = []
    for skips in (False, True):
        model = copy.deepcopy(start)
        trained = optimizer(model, lr=0.1, update_every=1)
        if skips:
            (oracle.energy(model(other)) * factor).backward()
            model.zero_grad(set_to_none=set_to_none)
        (oracle.energy(model(x)) / 5).backward()
        trained.step()
        moved.append(model.weight.detach())
    if factor or set_to_none:
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-12, atol=1e-12)
    assert moved[1].isfinite().all()


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG])
def test_a_micro_batch_without_a_gradient_still_counts(optimizer):
    """Its samples are part of the mean, though the gradient is zero when the next one's backward comes."""
    start, x = mlp(4, 6, 3), points(6, 4)
    moved = []
    for order in ((0, 1), (1, 0)):
        model = copy.deepcopy(start)
        trained = optimizer(model, lr=0.1, update_every=1)
        for place in order:
            (oracle.energy(model(x[3 * place : 3 * place + 3])) * place / 6).backward()
        trained.step()
        moved.append(model[0].weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-10, atol=1e-12)


# Nothing to sum -----------------------------------------------------------------------------------------------------

EMPTY = {
    "vectors": (lambda: nn.Linear(4, 3), (4,), (0, 4)),
    "sequences": (lambda: nn.Linear(4, 3), (2, 4), (0, 2, 4)),
    "sequences of no length": (lambda: nn.Linear(4, 3), (2, 4), (3, 0, 4)),
    "images": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5), (0, 2, 5, 5)),
    "lookups": (lambda: nn.Embedding(9, 3), (4,), (0, 4)),
    "lookups of no length": (lambda: nn.Embedding(9, 3), (4,), (3, 0)),
    "bags": (lambda: nn.EmbeddingBag(9, 3), (4,), (0, 4)),
}


@pytest.mark.parametrize("optimizer", [NGPlus, KFAC, SENG])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_batch_on_a_curvature_step_is_as_if_it_had_not_been(case, samples, optimizer):
    """Alone it gives no curvature; together with others, before or after them, it changes nothing of theirs."""
    make, shape, empty = EMPTY[case]
    options = {} if optimizer is KFAC else {"samples": samples}
    seed_cpu(0)
    start = make().double()
    whole = torch.randint(9, (5, *shape)) if isinstance(start, nn.Embedding | nn.EmbeddingBag) else points(5, *shape)
    nothing = torch.zeros(empty, dtype=whole.dtype)

    def direction(*batches):
        model = copy.deepcopy(start)
        trained = optimizer(model, lr=1e-9, update_every=1, **options)
        for x in batches:
            oracle.energy(model(x)).backward()
        trained.step()
        return model.weight.grad, list(trained.curvature)

    expected = direction(whole)
    assert expected[1] == ["weight"]
    for batches in ([nothing, whole], [whole, nothing]):
        torch.testing.assert_close(direction(*batches)[0], expected[0], rtol=1e-12, atol=1e-12)
    gradient, curvature = direction(nothing)
    assert not gradient.any()
    assert not curvature


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")  # of torch
@pytest.mark.parametrize("kind", ["model", "parameters"])
def test_a_weight_without_entries_is_no_layer(kind):
    model = nn.ModuleList([nn.Linear(0, 3), nn.Linear(4, 3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "model":
            optimizer = NGPlus(model, lr=0.1)
        else:
            optimizer = NGPlus(model.parameters(), lr=0.1, curvature="mini_batch")
    oracle.energy(model[0](torch.zeros(5, 0)) * model[1](torch.randn(5, 4))).backward()
    optimizer.step()
    assert len(optimizer.curvature) == 1


# Copies while armed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_model_can_be_copied_while_it_is_captured(way):
    model, x = mlp(4, 3), points(5, 4)
    optimizer = NGPlus(model, lr=0.1, update_every=1)
    model(x).sum().backward()
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(copied(x), model(x))
    optimizer.step()


@pytest.mark.parametrize(
    "view", [lambda w: w.view(len(w), -1), lambda w: w.T.mT, lambda w: w[:], lambda w: w.chunk(1)[0]]
)
def test_a_weight_may_be_changed_in_place_in_the_forward_pass_after_a_view_of_it(view):
    """A bound on the norm of its rows, without grad mode."""

    class Bounded(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                rows = view(self.weight)
                self.weight.div_(rows.norm(dim=1, keepdim=True).clamp_min(1))
                rows.norm()
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(Bounded(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight /= 10  # within the bound already, so that a step is all that moves it
    oracle.check(model, points(5, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: x + w[:, :5].to(x),
        lambda x, w: x + w[:, :5].type_as(x),
        lambda x, w: torch.cat([w.repeat(len(x), 1, 1).to(x), x], 1),
    ],
)
def test_a_tensor_that_tells_a_dtype_alone_is_no_argument(call):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.inlet, self.w = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 7, 6))

        def forward(self, x):
            return call(self.inlet(x), self.w).tanh()

    optimizer = oracle.check(Added().double(), points(3, 5, 4))
    assert set(optimizer.curvature) == {"inlet.weight", "w"}


class Merged(nn.Module):
    """A low-rank change of a frozen layer, scaled by the norm of both, as DoRA has it."""

    def __init__(self, detached):
        super().__init__()
        seed_cpu(0)
        self.frozen, self.detached = nn.Linear(6, 8).requires_grad_(False), detached
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.double()

    def forward(self, x):
        norm = (self.frozen.weight + self.b(self.a(torch.eye(6, dtype=x.dtype))).T).norm(dim=1)
        return (self.frozen(x) + self.b(self.a(x))) / (norm.detach() if self.detached else norm)


def test_uses_on_constants_whose_gradient_never_comes_are_none():
    assert set(oracle.check(Merged(detached=True), points(4, 6)).curvature) == {"a.weight", "b.weight"}


def test_a_layer_on_the_batch_and_on_constants_goes_to_the_base_where_both_have_a_gradient():
    model = Merged(detached=False)
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=1)
    oracle.energy(model(points(4, 6))).backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert [SIZES in message for message in messages] == [True]
    assert optimizer.curvature == {}


FROZEN = {
    "as it is": None,
    "apart": lambda layer, x: F.linear(x, layer.weight) + layer.bias,
    "scaled": lambda layer, x: F.linear(x, layer.weight * 2.0, layer.bias),
    "merged": lambda layer, x: F.linear(x, layer.weight + layer.B @ layer.A, layer.bias),
}


@pytest.mark.parametrize("use", FROZEN)
def test_the_bias_of_a_frozen_weight_is_trained_by_the_base(use):
    """Of adapters, of BitFit, and where the weight is stored in a form of its own."""

    class Frozen(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.weight.requires_grad_(requires_grad=False)
            if use == "merged":
                self.A, self.B = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

        def forward(self, x):
            return super().forward(x) if use == "as it is" else FROZEN[use](self, x)

    seed_cpu(0)
    model = nn.Sequential(Frozen(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    before = model[0].bias.detach().clone()
    optimizer = oracle.check(model, points(4, 6))
    assert set(optimizer.curvature) == {"2.weight"} | ({"0.A", "0.B"} if use == "merged" else set())
    assert not torch.equal(model[0].bias, before)


def test_nothing_is_said_of_the_frozen_weights_of_a_recurrent_layer_whose_biases_are_trained():
    seed_cpu(0)
    model = nn.ModuleDict({"body": nn.LSTM(4, 3, batch_first=True), "head": nn.Linear(3, 2)}).double()
    for name, parameter in model["body"].named_parameters():
        parameter.requires_grad_(requires_grad="bias" in name)
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=1)
    oracle.energy(model["head"](model["body"](points(5, 3, 4))[0])).backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert (messages, set(optimizer.curvature)) == ([], {"head.weight"})


class Dropping(nn.Module):
    """A linear layer whose weight is dropped out where ``drops`` is set, which no sample's gradient can be told of."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.drops = nn.Linear(6, 5), nn.Linear(5, 3), False

    def forward(self, x):
        weight = F.dropout(self.first.weight, 0.5) if self.drops else self.first.weight
        return self.last(F.linear(x, weight, self.first.bias).tanh())


@pytest.mark.parametrize("thrown_away", ["optimizer.zero_grad", "model.zero_grad", "no backward", "gradients of zeros"])
def test_a_use_that_cannot_be_captured_counts_where_its_gradient_does(thrown_away):
    """A warm-up pass, a probe, a batch that is skipped: what was thrown away takes no layer to the base."""
    model, x = Dropping(), torch.randn(7, 6)
    optimizer = NGPlus(model, lr=1e-3, damping=0.1)
    model.drops = True
    loss = model(x).square().mean()
    model.drops = False
    if thrown_away != "no backward":
        loss.backward()
        optimizer.zero_grad() if thrown_away == "optimizer.zero_grad" else model.zero_grad(
            set_to_none=thrown_away != "gradients of zeros"
        )
    model(x).square().mean().backward()
    optimizer.step()
    assert list(optimizer.curvature) == ["first.weight", "last.weight"]


@pytest.mark.parametrize("order", ["zero_grad, forward, backward", "forward, zero_grad, backward", "two passes"])
def test_a_use_that_cannot_be_captured_is_named_in_any_order_of_calls(order):
    model, x = Dropping(), torch.randn(7, 6)
    optimizer = NGPlus(model, lr=1e-3, damping=0.1)
    model.drops = True
    if order.startswith("zero_grad"):
        optimizer.zero_grad()
    loss = model(x).square().mean()
    if order.startswith("forward"):
        optimizer.zero_grad()
    loss.backward()
    if order == "two passes":
        model.drops = False
        model(x).square().mean().backward()
    with pytest.warns(UserWarning, match=r"first\.weight could not be read .*randomness"):
        optimizer.step()
    assert list(optimizer.curvature) == ["last.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        nn.utils.parametrizations.spectral_norm,
    ],
    ids=["pruning", "spectral_norm"],
)
def test_a_model_may_change_before_a_curvature_step(change):
    """What it consists of is read on the step's first call, and not when the step before has ended."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(7, 6)
    optimizer = NGPlus(model, lr=1e-3, damping=0.1, update_every=2)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    change(model[0])
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert len(optimizer.curvature) == 2


def test_a_layer_without_a_gradient_is_not_named():
    """What was thrown away may be the only use of a layer in a step."""
    model, x = Dropping(), torch.randn(7, 6)
    optimizer = NGPlus(model, lr=1e-3, damping=0.1)
    model.drops = True
    model(x).square().mean().backward()
    model.zero_grad()
    model.last(torch.randn(4, 5)).square().mean().backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert messages == []
