"""What models do besides calling their layers one after the other, compared with the oracle's loop."""

import copy
import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG, Shampoo
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import (
    SETTINGS,
    Problem,
    attentive,
    collect_optimizers,
    convolutional,
    distance,
    flat,
    perceptron,
)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    if nn.modules.module._global_forward_pre_hooks:
        collect_optimizers()
    assert _len_torch_function_stack() == 0
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


def with_model(model: nn.Module, inputs: torch.Tensor | None = None) -> Problem:
    """The perceptron's data with another model."""
    problem = perceptron()
    problem.model = model.double()
    problem.inputs = problem.inputs if inputs is None else inputs
    return problem


def assert_follows_the_oracle(problem: Problem, steps: int = 3, **settings) -> NGPlus:
    expected = problem.plain_run(steps)
    optimizer = NGPlus(problem.model, **{**SETTINGS, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.train(optimizer, steps)
    assert distance(problem.model, expected) < 1e-10
    return optimizer


# Activation checkpointing ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Two checkpointed segments; with ``reused`` the first one's layer works twice within it."""

    def __init__(self, reentrant: bool, reused: bool = False, across: bool = False) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.middle, self.outlet = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant, self.reused, self.across = reentrant, reused, across

    def first(self, x):
        x = self.middle(x).tanh()
        return self.middle(x).tanh() if self.reused else x

    def second(self, x):
        return self.outlet(self.middle(x).tanh() if self.across else x)

    def forward(self, x):
        x = self.inlet(x).tanh()
        for segment in (self.first, self.second):
            x = checkpoint(segment, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_captures_every_layer_once(reentrant, reused):
    assert_follows_the_oracle(with_model(Checkpointed(reentrant, reused)))


def test_a_layer_in_two_checkpoints_that_are_not_reentrant_matches_the_oracle():
    assert_follows_the_oracle(with_model(Checkpointed(reentrant=False, across=True)))


def cached(loss: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """A loss of all outputs together whose gradients are made pair by pair, in a hook of what is returned."""
    pairs = inputs.split(2)
    with torch.no_grad():
        outputs = torch.cat([model(pair) for pair in pairs]).requires_grad_()
    value = loss(outputs)
    gradients = torch.autograd.grad(value, outputs)[0].split(2)

    def backward(_: torch.Tensor) -> None:
        with torch.enable_grad():
            for pair, gradient in zip(pairs, gradients, strict=True):
                (model(pair) * gradient).sum().backward()

    value = value.detach().requires_grad_()
    value.register_hook(backward)
    return value


@pytest.mark.parametrize("basis", [None, "eigen"])
def test_a_loss_with_cached_gradients_has_the_curvature_of_the_loss(basis):
    trained = []
    for caches in (False, True):
        problem = perceptron()

        def loss(outputs: torch.Tensor) -> torch.Tensor:
            return (outputs @ outputs.mT).exp().sum(1).log().mean()  # every output counts for all samples

        optimizer = NGPlus(problem.model, torch.optim.Adam, lr=0.05, damping=0.3, update_every=1, basis=basis)
        for _ in range(3):
            model, inputs = problem.model, problem.inputs
            (cached(loss, model, inputs) if caches else loss(model(inputs))).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert list(optimizer.curvature) == ["0.weight", "2.weight"]
        trained.append(problem.model)
    assert distance(*trained) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_whole_submodule_matches_the_oracle(reentrant):
    problem = convolutional()
    body, head = problem.model[:-1], problem.model[-1]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x):
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=reentrant))

    problem.model = Whole()
    problem.inputs = problem.inputs.clone()
    assert_follows_the_oracle(problem)


def test_a_curvature_step_keeps_the_layer_inputs_that_checkpointing_would_drop():
    kept = []

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

        def segment(self, x):
            for layer in self.layers:
                x = layer(x).tanh()
                kept.append(weakref.ref(x))
            return x

        def forward(self, x):
            return checkpoint(self.segment, x, use_reentrant=False).sum()

    def alive_after_forward() -> int:
        kept.clear()
        loss = model(torch.randn(3, 5))
        alive = sum(tensor() is not None for tensor in kept)
        loss.backward()
        return alive

    model = Deep()
    optimizer = NGPlus(model, **SETTINGS)
    assert alive_after_forward() == 3  # the inputs of all layers but the first
    optimizer.step()
    assert alive_after_forward() == 0


# Control flow ---------------------------------------------------------------------------------------------------------


class Skipping(nn.Module):
    """Leaves its middle layer out whenever it is told to."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.middle, self.outlet = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.skip = False

    def forward(self, x):
        x = self.inlet(x).tanh()
        return self.outlet(x if self.skip else self.middle(x).tanh())


def test_a_layer_skipped_in_steps_between_curvature_steps_keeps_its_curvature():
    problem = with_model(Skipping())
    optimizer = NGPlus(problem.model, lr=0.1, damping=0.3, update_every=4)
    problem.train(optimizer, 1)
    problem.model.skip = True
    before = problem.model.middle.weight.clone()
    problem.train(optimizer, 2)
    assert torch.equal(problem.model.middle.weight, before)
    problem.model.skip = False
    problem.train(optimizer, 1)
    assert not torch.equal(problem.model.middle.weight, before)
    assert optimizer.curvature["middle.weight"].updates == 1


def test_a_layer_skipped_on_the_curvature_step_gets_its_curvature_as_soon_as_it_is_used():
    problem = with_model(Skipping())
    optimizer = NGPlus(problem.model, lr=0.1, damping=0.3, update_every=1000)
    problem.model.skip = True
    problem.train(optimizer, 3)
    assert set(optimizer.curvature) == {"inlet.weight", "outlet.weight"}
    problem.model.skip = False
    problem.train(optimizer, 2)
    assert set(optimizer.curvature) == {"inlet.weight", "middle.weight", "outlet.weight"}
    assert optimizer.curvature["inlet.weight"].updates == 1


class Recursive(nn.Module):
    """Calls itself, once for the coarse half of the work."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.outlet = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, depth=2):
        if depth == 0:
            return x
        x = self(self.inlet(x).tanh(), depth - 1)
        # Not a call of the layer, which would be captured for its own sake.
        return F.linear(x, self.outlet.weight, self.outlet.bias) if depth == 2 else x


def test_a_model_that_calls_itself_is_captured_to_the_end():
    assert_follows_the_oracle(with_model(Recursive()))


def test_submodules_called_one_by_one_are_captured():
    problem = perceptron()
    expected = problem.plain_run(3)
    optimizer = NGPlus(problem.model, **SETTINGS)
    encoder, activation, head = problem.model
    problem.train(optimizer, 3, through=lambda x: head(activation(encoder(x))))
    assert distance(problem.model, expected) < 1e-10


def test_a_model_called_in_pieces_of_the_batch_before_one_backward_is_one_batch():
    problem = perceptron()
    start = copy.deepcopy(problem.model)
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.train(optimizer, 1, through=lambda x: torch.cat([problem.model(x[:2]), problem.model(x[2:])]))
    reference = perceptron()
    reference.train(NGPlus(reference.model, **SETTINGS), 1)
    assert distance(problem.model, reference.model, start) < 1e-10


# Weights that are used in other ways ----------------------------------------------------------------------------------


class Functional(nn.Module):
    """Uses its layers' weights without calling the layers."""

    def __init__(self, readable: bool) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.outlet = nn.Linear(5, 6), nn.Linear(6, 3)
        self.readable = readable

    def forward(self, x):
        if self.readable:
            x = F.linear(x, self.inlet.weight, self.inlet.bias)
        else:
            x = torch.einsum("bi,oi->bo", x, self.inlet.weight) + self.inlet.bias
        return self.outlet(x.tanh())


def test_functional_use_of_a_weight_is_the_same_as_calling_the_layer():
    assert_follows_the_oracle(with_model(Functional(readable=True)))


def test_a_weight_that_no_handler_reads_goes_to_the_base_with_one_warning_and_the_option_for_it():
    problem = with_model(Functional(readable=False))
    start = copy.deepcopy(problem.model)
    optimizer = NGPlus(problem.model, **SETTINGS, function_fallback="base")
    with pytest.warns(UserWarning, match=r"inlet\.weight is used .*untouched") as caught:
        problem.train(optimizer, 1)
    assert set(optimizer.curvature) == {"outlet.weight"}
    plain = copy.deepcopy(start)
    problem.loss(plain).backward()
    step = start.inlet.weight - SETTINGS["lr"] * plain.inlet.weight.grad
    assert torch.allclose(problem.model.inlet.weight, step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.train(optimizer, 4)
    assert len(caught) == 1


def per_sample(model, x):
    """Each sample's gradient with respect to the parameters, as for a log."""

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)


LOOKS = {
    "grad": lambda model, x: torch.func.grad(lambda inputs: model(inputs).sum())(x),
    "jacobian": lambda model, x: torch.func.vmap(torch.func.jacrev(model))(x),
    "per sample": per_sample,
    "vmap": lambda model, x: torch.vmap(model)(x),
    "trace": lambda model, x: torch.jit.trace(model, x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("look", LOOKS)
def test_a_transform_of_the_model_between_forward_passes_is_not_captured(look):
    problem = perceptron()
    plain = copy.deepcopy(problem)
    optimizer = NGPlus(problem.model, **SETTINGS)
    LOOKS[look](problem.model, problem.inputs)
    problem.train(optimizer, 2)
    plain.train(NGPlus(plain.model, **SETTINGS), 2)
    assert distance(problem.model, plain.model) == 0


class Transformed(nn.Module):
    """A model whose first layer is used inside `torch.func` alone, or by it and a plain call."""

    def __init__(self, transform: str, plainly: bool) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(5, 4), nn.Linear(5, 3)
        self.transform, self.plainly = transform, plainly

    def forward(self, x):
        def energy(sample):
            return self.inside(sample).sin().sum()

        transforms = {"grad": torch.func.vmap(torch.func.grad(energy)), "vmap": torch.vmap(energy)}
        seen = transforms[self.transform](x).view(len(x), -1).sum(1, keepdim=True)
        return self.outside(x) + seen + (self.inside(x).sum(1, keepdim=True) if self.plainly else 0)


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_weight_inside_a_transform_of_the_models_own_goes_to_the_base_with_one_warning(transform, plainly):
    problem = with_model(Transformed(transform, plainly))
    optimizer = NGPlus(problem.model, **SETTINGS)
    with pytest.warns(UserWarning, match=r"inside\.weight is used inside a transform of .*untouched") as caught:
        problem.train(optimizer, 1)
    assert len(caught) == 1
    assert set(optimizer.curvature) == {"outside.weight"}


class Ensemble(nn.Module):
    """Several linear functions by `torch.func.vmap` over a bare parameter, or over what is made of it."""

    def __init__(self, prepare, inside) -> None:
        super().__init__()
        self.members, self.outside = nn.Parameter(torch.randn(2, 5, 3)), nn.Linear(5, 3)
        self.prepare, self.inside = prepare, inside

    def forward(self, x):
        return self.outside(x) + torch.func.vmap(lambda w: x @ self.inside(w))(self.prepare(self.members)).sum(0)


@pytest.mark.parametrize("inside", [lambda w: w, torch.exp])
@pytest.mark.parametrize("prepare", [lambda w: w, torch.exp, lambda w: w.flip(0).mT.mT])
def test_a_bare_parameter_inside_a_transform_goes_to_the_base_with_one_warning_at_once(prepare, inside):
    seed_cpu(0)
    problem = with_model(Ensemble(prepare, inside))
    optimizer = NGPlus(problem.model, **SETTINGS)
    with pytest.warns(UserWarning, match=r"members is used inside a transform of .*untouched") as caught:
        problem.train(optimizer, 1)
    assert len(caught) == 1
    assert set(optimizer.curvature) == {"outside.weight"}


def test_functional_call_with_the_models_own_parameters_is_captured():
    problem = perceptron()
    expected = problem.plain_run(3)
    optimizer = NGPlus(problem.model, **SETTINGS)
    own = dict(problem.model.named_parameters())
    problem.train(optimizer, 3, through=lambda x: torch.func.functional_call(problem.model, own, x))
    assert distance(problem.model, expected) < 1e-10


class Tied(nn.Module):
    """An output layer that shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.table, self.mix = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 11)
        self.out.weight = self.table.weight

    def forward(self, index):
        return self.out(self.mix(self.table(index)).tanh()).mean(1)


def test_a_tied_weight_has_one_curvature_of_both_uses():
    seed_cpu(0)
    problem = Problem(Tied().double(), torch.randint(11, (5, 3)), torch.randn(5, 11).double())
    optimizer = assert_follows_the_oracle(problem)
    assert set(optimizer.curvature) == {"table.weight", "mix.weight"}


# Layouts --------------------------------------------------------------------------------------------------------------


def test_channels_last_changes_nothing():
    problem = convolutional()
    problem.model.to(memory_format=torch.channels_last)
    problem.inputs = problem.inputs.to(memory_format=torch.channels_last)
    assert_follows_the_oracle(problem)
    assert problem.model[3].weight.is_contiguous(memory_format=torch.channels_last)


OPTIMIZERS = {
    "per sample": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=4, momentum=0.9),
    "rows": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=4, samples="rows"),
    "moving average": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=2, ema=0.5),
    "blocks": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=4, block_size=3),
    "mini-batch": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=4, curvature="mini_batch"),
    "sketched": lambda model: NGPlus(model, lr=0.05, damping=0.5, update_every=4, solver="sketched", sketch_size=5),
    "on Adam": lambda model: NGPlus(model, torch.optim.Adam, lr=0.005, damping=0.5, update_every=4),
    "K-FAC": lambda model: KFAC(model, lr=0.01, damping=0.5, update_every=4, momentum=0.9),
    "SENG": lambda model: SENG(model, lr=0.01, damping=0.5, update_every=4, momentum=0.9),
    "Shampoo": lambda model: Shampoo(model, lr=0.01, damping=0.5, update_every=4, momentum=0.9),
}


@pytest.mark.parametrize("changes", [(2, 7), (4, 5)])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_that_change_their_memory_format_in_the_middle_of_training_change_nothing(make, changes):
    seed_cpu(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))]
    layers += [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Conv2d(6, 40, 2, padding=1)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()
    other = copy.deepcopy(model)
    optimizers = [(each, make(each)) for each in (model, other)]
    for step in range(9):
        if step in changes:
            other.to(memory_format=torch.channels_last if step == changes[0] else torch.contiguous_format)
            assert other[2].weight.is_contiguous() == (step == changes[1])
        images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
        for each, optimizer in optimizers:
            optimizer.zero_grad()
            each(images).square().mean().backward()
            optimizer.step()
    for ours, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_attention_with_the_batch_second_matches_the_oracle():
    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            x = x.transpose(0, 1)
            return self.head(self.attention(x, x, x)[0].mean(0))

    seed_cpu(1)
    assert_follows_the_oracle(with_model(Second(), torch.randn(6, 3, 4).double()))


# What goes wrong inside forward ---------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Raises in the middle of its forward pass, on demand."""

    def __init__(self) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.outlet = nn.Linear(5, 6), nn.Linear(6, 3)
        self.error: BaseException | None = None

    def forward(self, x):
        x = self.inlet(x).tanh()
        if self.error is not None:
            raise self.error
        return self.outlet(x)


def test_an_exception_in_forward_leaves_no_mode_and_the_next_step_is_the_oracles():
    problem = with_model(Failing())
    expected = problem.plain_run(3)
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.model.error = RuntimeError("out of memory, say")
    with pytest.raises(RuntimeError, match="out of memory"):
        problem.loss(problem.model)
    assert _len_torch_function_stack() == 0
    problem.model.error = None
    problem.train(optimizer, 3)
    assert distance(problem.model, expected) < 1e-10


def test_an_exception_in_a_pre_hook_leaves_no_mode():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS)
    expected = problem.plain_run(1)

    def refuse(*_):
        raise ValueError("not this one")

    handle = problem.model[2].register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="not this one"):
        problem.loss(problem.model)
    assert _len_torch_function_stack() == 0
    handle.remove()
    problem.train(optimizer, 1)
    assert distance(problem.model, expected) < 1e-10


def test_the_function_mode_of_an_interrupted_forward_ends_with_the_next_step():
    problem = with_model(Failing())
    expected = problem.plain_run(2)
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        problem.loss(problem.model)
    problem.model.error = None
    problem.train(optimizer, 2)
    assert _len_torch_function_stack() == 0
    assert distance(problem.model, expected) < 1e-10


# Threads --------------------------------------------------------------------------------------------------------------


class Meeting(nn.Module):
    """Has two threads in the middle of its forward pass at once; the one that was there first leaves ``first_leaves``.

    Attributes:
        first_leaves: "last", after the second, or "first".
    """

    def __init__(self, model: nn.Module, first_leaves: str) -> None:
        super().__init__()
        self.model = model
        self.first_leaves = first_leaves
        self.first_inside, self.second_inside = threading.Event(), threading.Event()
        self.first_done, self.second_done = threading.Event(), threading.Event()

    def forward(self, x):
        if threading.current_thread() is threading.main_thread():
            self.first_inside.set()
            (self.second_done if self.first_leaves == "last" else self.second_inside).wait(20)
        else:
            self.second_inside.set()
            if self.first_leaves == "first":
                self.first_done.wait(20)
        return self.model(x)


@pytest.mark.parametrize("first_leaves", ["first", "last"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_another_thread_running_the_model_does_not_change_the_curvature(with_gradients, first_leaves):
    problem = perceptron()
    expected = problem.plain_run(1)
    meeting = Meeting(problem.model, first_leaves)
    optimizer = NGPlus(meeting, **SETTINGS)
    failures = []

    def evaluate():
        meeting.first_inside.wait(20)
        try:
            with torch.set_grad_enabled(with_gradients):
                meeting(problem.inputs)
            if _len_torch_function_stack():
                failures.append("a mode is left")
        except Exception as error:
            failures.append(error)
        meeting.second_done.set()

    other = threading.Thread(target=evaluate)
    other.start()
    loss = problem.loss(meeting)
    assert _len_torch_function_stack() == 0
    meeting.first_done.set()
    other.join()
    assert not failures
    loss.backward()
    optimizer.step()
    assert distance(problem.model, expected) < 1e-10


def test_training_in_another_thread_than_the_optimizer_was_made_in_matches_the_oracle():
    problem = perceptron()
    expected = problem.plain_run(3)
    optimizer = NGPlus(problem.model, **SETTINGS)
    worker = threading.Thread(target=problem.train, args=(optimizer, 3))
    worker.start()
    worker.join()
    assert distance(problem.model, expected) < 1e-10


# Copies and places ----------------------------------------------------------------------------------------------------


def test_averaged_copies_follow_and_are_not_captured():
    problem = perceptron()
    expected = problem.plain_run(4)
    optimizer = NGPlus(problem.model, **SETTINGS)
    averaged = torch.optim.swa_utils.AveragedModel(problem.model)
    moving = torch.optim.swa_utils.AveragedModel(
        problem.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(4):
        problem.train(optimizer, 1)
        for copied in (averaged, moving):
            copied.update_parameters(problem.model)
            copied(problem.inputs).sum().backward()  # such as distillation from a teacher
    assert distance(problem.model, expected) < 1e-10
    assert not torch.equal(flat(averaged.module), flat(problem.model))


def test_shared_memory_and_loader_workers_change_nothing():
    problem = perceptron()
    expected = problem.plain_run(3)
    problem.model.share_memory()
    optimizer = NGPlus(problem.model, **SETTINGS)
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=len(data), num_workers=1, persistent_workers=True)
    for _ in range(3):
        for problem.inputs, problem.targets in loader:
            problem.train(optimizer, 1)
    assert distance(problem.model, expected) < 1e-10


@pytest.mark.parametrize("make", [perceptron, attentive])
def test_a_model_made_double_after_the_optimizer_goes_on_in_double(make):
    problem = make(torch.float32)
    double = Problem(copy.deepcopy(problem.model).double(), problem.inputs, problem.targets.double())
    optimizer = NGPlus(problem.model, **SETTINGS, ema=0.5, momentum=0.9)
    problem.train(optimizer, 1)
    problem.model.double()
    if problem.inputs.is_floating_point():
        problem.inputs = double.inputs = problem.inputs.double()
    problem.targets = problem.targets.double()
    problem.train(optimizer, 3)
    double.train(NGPlus(double.model, **SETTINGS, ema=0.5, momentum=0.9), 4)
    assert all(p.dtype == torch.float64 for p in problem.model.parameters())
    assert all(tensor.dtype == torch.float64 for state in optimizer.curvature.values() for tensor in state.tensors())
    assert distance(problem.model, double.model) < 1e-4


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight is on the meta device.*to_empty"):
        NGPlus(model)
