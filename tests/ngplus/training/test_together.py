"""NG+ together with others: other optimizers, parametrized weights, and an installation that has torch alone."""

import copy
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngplus import NGPlus
from tests.ngplus.cases import seed_cpu
from tests.ngplus.training.problems import SETTINGS, attentive, distance, flat, perceptron

# Two optimizers ------------------------------------------------------------------------------------------------------


def generator_and_critic() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    seed_cpu(0)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return generator, critic, torch.randn(6, 3).double(), torch.randn(6, 4).double()


def test_two_optimizers_take_turns_and_neither_counts_the_others_backward():
    """The loop of a GAN: in its own step each sees only the loss that it steps on."""
    generator, critic, noise, data = generator_and_critic()
    ours = NGPlus(generator, **SETTINGS), NGPlus(critic, **SETTINGS)
    twins = copy.deepcopy(generator), copy.deepcopy(critic)
    theirs = NGPlus(twins[0], **SETTINGS), NGPlus(twins[1], **SETTINGS)
    for _ in range(4):
        ours[1].zero_grad()
        loss = F.softplus(critic(generator(noise).detach())).mean() + F.softplus(-critic(data)).mean()
        loss.backward()
        ours[1].step()
        ours[0].zero_grad()
        F.softplus(-critic(generator(noise))).mean().backward()  # reaches the critic's weights too
        ours[0].step()

        # The same steps with nothing of the other's in sight: frozen copies stand in for it.
        frozen = copy.deepcopy(twins[0]).requires_grad_(False)
        theirs[1].zero_grad()
        (F.softplus(twins[1](frozen(noise))).mean() + F.softplus(-twins[1](data)).mean()).backward()
        theirs[1].step()
        judge = copy.deepcopy(twins[1]).requires_grad_(False)
        theirs[0].zero_grad()
        F.softplus(-judge(twins[0](noise))).mean().backward()
        theirs[0].step()
    assert distance(generator, twins[0]) < 1e-10
    assert distance(critic, twins[1]) < 1e-10


def test_a_part_of_a_model_under_ngplus_and_the_rest_under_another_optimizer():
    problem = attentive()
    start = copy.deepcopy(problem.model)
    ours = NGPlus(problem.model.head, **SETTINGS)
    rest = torch.optim.Adam([*problem.model.table.parameters(), *problem.model.attention.parameters()], lr=0.01)
    alone = copy.deepcopy(problem)
    adam = torch.optim.Adam([*alone.model.table.parameters(), *alone.model.attention.parameters()], lr=0.01)
    twin = NGPlus(alone.model, **SETTINGS, params=alone.model.head.parameters())  # the same, told another way
    for _ in range(3):
        for held, optimizers in ((problem, (ours, rest)), (alone, (twin, adam))):
            held.loss(held.model).backward()
            for optimizer in optimizers:
                optimizer.step()
            held.model.zero_grad()
    assert set(ours.curvature) == {"weight"}
    assert set(twin.curvature) == {"head.weight"}
    assert distance(problem.model, alone.model, start) < 1e-12


# Kinds of bases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop]
)
@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_every_implementation_of_a_base_makes_the_same_steps(base, way):
    if way == "fused" and base is torch.optim.RMSprop:
        pytest.skip("RMSprop has no fused implementation")
    one, other = perceptron(), perceptron()
    one.train(NGPlus(one.model, base, **{**SETTINGS, "lr": 0.01}, **{way: True}), 4)
    other.train(NGPlus(other.model, base, **{**SETTINGS, "lr": 0.01}, foreach=False), 4)
    assert distance(one.model, other.model, perceptron().model) < 1e-10


def test_sparse_adam_steps_on_directions_that_stay_sparse():
    seed_cpu(0)
    table = nn.Embedding(30, 4, sparse=True).double()
    before = table.weight.detach().clone()
    optimizer = NGPlus(table, torch.optim.SparseAdam, lr=0.01, damping=0.3, update_every=2)
    index = torch.tensor([[1, 2], [2, 7], [7, 7]])
    for _ in range(3):
        table(index).square().sum(-1).mean().backward()
        assert table.weight.grad.is_sparse
        optimizer.step()
        assert table.weight.grad.is_sparse
        optimizer.zero_grad()
    moved = (table.weight.detach() != before).any(1).nonzero().flatten()
    assert moved.tolist() == [1, 2, 7]
    assert set(optimizer.curvature) == {"weight"}


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm, lambda size: nn.GroupNorm(1, size)])
def test_norms_go_to_the_base_unchanged_and_without_a_warning(norm):
    problem = perceptron()
    problem.model.insert(1, norm(7).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = NGPlus(problem.model, **SETTINGS)
        problem.loss(problem.model).backward()
        raw = [p.grad.clone() for p in problem.model[1].parameters()]
        optimizer.step()
    assert set(optimizer.curvature) == {"0.weight", "3.weight"}
    assert all(torch.equal(p.grad, old) for p, old in zip(problem.model[1].parameters(), raw, strict=True))


# Limits that docs/supported.md names ----------------------------------------------------------------------------------


def test_an_input_that_is_shared_by_the_batch_is_one_sample():
    """A table of positions, looked up once for the whole batch: the sum over the batch is one sample's gradient."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seed_cpu(0)
            self.table, self.head = nn.Embedding(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x.unsqueeze(1) + self.table(torch.arange(4).unsqueeze(0))).tanh().mean(1))

    problem = perceptron()
    problem.model = Positions().double()
    optimizer = NGPlus(problem.model, **SETTINGS, solver="dense")
    problem.loss(problem.model).backward()
    gradient = problem.model.table.weight.grad.clone()  # 4 × 5, so that L is kept
    optimizer.step()
    matrix = gradient @ gradient.T + SETTINGS["damping"] * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(problem.model.table.weight.grad, torch.linalg.solve(matrix, gradient))


def energy_and_force(inlet: nn.Module, activation: nn.Module, outlet: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's output, and a loss of the energy and of its derivatives."""
    hidden = inlet(x)
    energy = outlet(activation(hidden))
    (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return hidden, (energy.square().sum(1) + force.square().sum(1)).mean()


def test_a_loss_with_derivatives_of_the_model_goes_to_the_base_with_a_warning():
    """As with forces: the gradient has a second path to the weights that the curvature does not have."""
    problem = perceptron()
    plain, x = copy.deepcopy(problem.model), problem.inputs.clone().requires_grad_()
    optimizer = NGPlus(problem.model, **SETTINGS)
    energy_and_force(*problem.model, x)[1].backward()
    with pytest.warns(
        UserWarning, match=r"^0.weight, 2.weight: each has a gradient that is not the sum of its captured"
    ):
        optimizer.step()
    energy_and_force(*plain, x)[1].backward()
    for ours, theirs in zip(problem.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_partial_capture_of_a_loss_with_derivatives_is_that_of_the_path_of_first_order():
    problem = perceptron()
    plain, x = copy.deepcopy(problem.model), problem.inputs.clone().requires_grad_()
    optimizer = NGPlus(problem.model, **SETTINGS, solver="dense", partial_capture="accept")
    energy_and_force(*problem.model, x)[1].backward()
    optimizer.step()

    hidden, loss = energy_and_force(*plain, x)
    hidden.retain_grad()
    loss.backward()
    inputs = torch.cat([x.detach(), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    matrix = len(x) * (inputs.T * hidden.grad.square().sum(1)) @ inputs  # R = N Σ ‖g‖² a aᵀ
    matrix += SETTINGS["damping"] * torch.eye(6, dtype=x.dtype)
    gradient = torch.cat([plain[0].weight.grad, plain[0].bias.grad.unsqueeze(1)], dim=1)
    torch.testing.assert_close(problem.model[0].weight.grad, torch.linalg.solve(matrix, gradient.T).T[:, :-1])


def test_unscaled_gradients_without_the_scalers_own_step_have_the_curvature_of_the_scaled_loss():
    """(λI + s²L)⁻¹G is (λ/s² I + L)⁻¹G / s²: only `GradScaler.step` tells what s was."""
    scaled, expected = perceptron(), perceptron()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = NGPlus(scaled.model, **SETTINGS)
    scaler.scale(scaled.loss(scaled.model)).backward()
    scaler.unscale_(optimizer)
    optimizer.step()  # where scaler.step(optimizer) belongs
    settings = {**SETTINGS, "lr": SETTINGS["lr"] / 16, "damping": SETTINGS["damping"] / 16}
    expected.train(NGPlus(expected.model, **settings), 1)
    assert distance(scaled.model, expected.model, perceptron().model) < 1e-10


@pytest.mark.parametrize("plain", [0, 1, 2])
def test_a_layer_in_two_reentrant_checkpoints_goes_to_the_base_with_a_warning(plain):
    """Each brings its gradients in a backward pass of its own, as a micro-batch does."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seed_cpu(0)
            self.inlet, self.middle, self.outlet = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inlet(x).tanh()
            for number in (1, 2):  # one of them may be without a checkpoint
                if number == plain:
                    x = self.middle(x).tanh()
                else:
                    x = checkpoint(lambda x: self.middle(x).tanh(), x, use_reentrant=True)
            return self.outlet(x)

    problem = perceptron()
    problem.model = Across().double()
    optimizer = NGPlus(problem.model, **SETTINGS)
    problem.loss(problem.model).backward()
    gradient = problem.model.middle.weight.grad.clone()
    with pytest.warns(UserWarning, match=r"^middle\.weight is used several times, some of them in checkpoints"):
        optimizer.step()
    assert set(optimizer.curvature) == {"inlet.weight", "outlet.weight"}
    assert torch.equal(problem.model.middle.weight.grad, gradient)


def test_a_skipped_step_moves_parameters_by_the_bases_momentum_alone():
    problem = perceptron()
    optimizer = NGPlus(problem.model, **SETTINGS, momentum=0.9)
    problem.train(optimizer, 1)
    before, buffers = flat(problem.model), [optimizer.state[p]["momentum_buffer"] for p in problem.model.parameters()]
    buffers = torch.cat([buffer.flatten() for buffer in buffers]).clone()
    (problem.loss(problem.model) * float("nan")).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(flat(problem.model), before - SETTINGS["lr"] * 0.9 * buffers)


# torch alone ---------------------------------------------------------------------------------------------------------


def test_import_and_a_step_need_torch_alone():
    script = """
        import sys
        for name in ("numpy", "torchvision", "pandas", "scipy", "matplotlib"):
            sys.modules[name] = None  # importing it raises ImportError
        import torch
        from ngplus import NGPlus
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        before = model[0].weight.detach().clone()
        optimizer = NGPlus(model, update_every=2)
        for _ in range(3):
            model(torch.randn(3, 1, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert set(optimizer.curvature) == {"0.weight", "2.weight"}
        assert not torch.equal(before, model[0].weight)
    """
    # torch itself warns at its import that there is no numpy; nothing else may warn.
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Parts of the forward pass that the backward pass makes again ---------------------------------------------------------


def again(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


class RecomputedInHook(torch.autograd.Function):
    """Made again in a hook of what comes after it, as Megatron's checkpoints without output are."""

    @staticmethod
    def forward(ctx, made: dict[str, Tensor], block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.made = made
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, Tensor]:
        torch.autograd.backward(ctx.made["output"], gradient)
        return None, None, ctx.made["input"].grad


def again_in_hook(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    made: dict[str, Tensor] = {}

    def recompute(_: Tensor) -> None:
        made["input"] = x.detach().requires_grad_()
        with torch.enable_grad():
            made["output"] = block(made["input"])

    output = RecomputedInHook.apply(made, block, x) * 1.0
    output.register_hook(recompute)
    return output


class Remade(nn.Module):
    """Uses its first layer once or twice, in ways that the backward pass makes again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        seed_cpu(0)
        self.inlet, self.outlet = nn.Linear(5, 5), nn.Linear(5, 3)
        self.way = way
        self.double()

    def block(self, x: Tensor) -> Tensor:
        return self.inlet(x).tanh()

    def nested(self, x: Tensor) -> Tensor:
        return again(lambda y: again(self.block, y).tanh(), x)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "flat and nested":
            x = self.nested(again(self.block, x))
        elif self.way == "plain and nested":
            x = self.nested(self.block(x))
        elif self.way == "nested twice":
            x = self.nested(self.nested(x))
        elif self.way == "in hooks":
            x = again_in_hook(self.block, again_in_hook(self.block, x))
        elif self.way == "in a hook, and plain":
            x = again_in_hook(self.block, self.block(x))
        elif self.way == "another pass in a hook between":
            x = again(self.block, x) * 1.0
            x.register_hook(self.make_another_pass)
            x = again(self.block, x)
        else:
            x = again(self.block, x)
        return self.outlet(x)

    def make_another_pass(self, _: Tensor) -> None:
        with torch.enable_grad():
            self.inlet(torch.ones(4, 5).double()).square().sum(1).mean().backward()


WAYS = ["flat and nested", "plain and nested", "nested twice", "in hooks", "in a hook, and plain"]


@pytest.mark.parametrize("way", [*WAYS, "another pass in a hook between", "two losses"])
def test_a_layer_whose_samples_are_made_again_apart_goes_to_the_base_with_a_warning(way):
    model = Remade(way)
    optimizer = NGPlus(model, **SETTINGS)
    output = model(torch.randn(6, 5, dtype=torch.float64, requires_grad=True))
    output.square().sum(1).mean().backward(retain_graph=way == "two losses")
    if way == "two losses":
        output.exp().sum(1).mean().backward()
    with pytest.warns(UserWarning, match="inlet.weight is used several times, some of them in checkpoints"):
        optimizer.step()
    assert list(optimizer.curvature) == ["outlet.weight"]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_layer_in_one_nested_checkpoint_has_its_curvature(micro_batches):
    optimizers = []
    for nested in (False, True):
        model = Remade("")
        model.forward = lambda x, m=model, n=nested: m.outlet((m.nested if n else lambda y: m.block(y).tanh())(x))
        optimizer = NGPlus(model, **SETTINGS)
        x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for part in x.requires_grad_().chunk(micro_batches):
            (model(part).square().sum(1).mean() / micro_batches).backward()
        optimizer.step()
        optimizers.append(optimizer)
    plain, again = optimizers
    assert list(plain.curvature) == list(again.curvature) == ["inlet.weight", "outlet.weight"]
    for name in plain.curvature:
        torch.testing.assert_close(*(each.curvature[name].tensors() for each in optimizers), rtol=1e-10, atol=1e-12)


def test_a_model_that_is_called_in_a_checkpoint_has_its_curvature():
    optimizers = []
    for remade in (False, True):
        model = perceptron().model
        optimizer = NGPlus(model, **SETTINGS)
        x = torch.ones(6, 5, dtype=torch.float64).cumsum(0).requires_grad_()
        (again(model, x) if remade else model(x)).square().sum(1).mean().backward()
        optimizer.step()
        optimizers.append(optimizer)
    assert list(optimizers[1].curvature) == ["0.weight", "2.weight"]
    for name in optimizers[0].curvature:
        torch.testing.assert_close(*(each.curvature[name].tensors() for each in optimizers), rtol=1e-12, atol=0)
