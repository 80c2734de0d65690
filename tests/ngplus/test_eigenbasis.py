"""``basis="eigen"`` against a plain loop: coordinates as parameters of their own, one layer at a time, by numpy."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ngplus
from ngplus import NGPlus
from ngplus.base_rules import BaseRule, find_rule, register_base
from ngplus.curvature.eigenvectors import SHIFT, BasisRequest, find_bases
from tests.ngplus import oracle
from tests.ngplus.cases import parameters_equal, points, seed_cpu, through_a_file

MODES = ("output", "input", "kernel")


class PlainLoop:
    """Training in the eigenbasis, written out: W = Q_L Wʹ Q_Rᵀ, and a plain optimizer whose parameters are the Wʹ.

    Bases are of numpy; gradients of samples come one sample at a time; state is moved by Kronecker products. Since the
    eigenvectors of a matrix that lacks rank are not unique, the first ones are the optimizer's, which must be
    orthonormal eigenvectors.

    Args:
        model: trained in place.
        base: optimizer class.
        modes: of each weight that has a basis, the modes that are kept, and its shape (groups, m, i, k).
        curvature: as of `NGPlus`.
        updates: the numbers of the curvature steps.
        optimizer: that has made its step already, whenever this one makes one.
        linear: state that moves as gradients do.
        square: state that moves as their squares do.
        magnitude: state that moves as the roots of these.
        ema: as of `NGPlus`.
        **options: of the base.
    """

    def __init__(
        self,
        model,
        base,
        modes,
        curvature,
        updates,
        optimizer,
        *,
        linear=(),
        square=(),
        magnitude=(),
        ema=0.0,
        **options,
    ) -> None:
        self.model, self.modes, self.curvature, self.updates, self.ema = model, modes, curvature, set(updates), ema
        self.optimizer = optimizer
        self.kinds = {**dict.fromkeys(linear, 1), **dict.fromkeys(square, 2), **dict.fromkeys(magnitude, 3)}
        self.named = dict(model.named_parameters())
        self.coordinates = {name: nn.Parameter(self.named[name].detach().clone()) for name in modes}
        self.bases: dict[str, dict[str, np.ndarray]] = {}
        self.products: dict[tuple[str, str], list[np.ndarray]] = {}
        parameters = [self.coordinates.get(name, parameter) for name, parameter in self.named.items()]
        self.base = base(parameters, **options)
        self.steps = 0

    def step(self, losses: list[Callable[[nn.Module], Tensor]]) -> None:
        """One step on the mean of the samples' losses."""
        samples = {name: [] for name in self.named}
        for loss in losses:
            self.model.zero_grad()
            loss(self.model).backward()
            for name, parameter in self.named.items():
                samples[name].append(parameter.grad.to_dense().clone())
        means = {name: sum(each) / len(each) for name, each in samples.items()}
        if self.steps in self.updates:
            for name in self.modes:
                self._renew(name, samples[name], means[name])
        for name, mean in means.items():
            if name in self.coordinates:
                self.coordinates[name].grad = self._rotate(name, mean)
            else:
                self.named[name].grad = mean
        self.base.step()
        with torch.no_grad():
            for name, coordinates in self.coordinates.items():
                self.named[name].copy_(self._rotate(name, coordinates, back=True))
        self.steps += 1

    def _renew(self, name: str, samples: list[Tensor], mean: Tensor) -> None:
        used = [mean] if self.curvature == "mini_batch" else samples
        if self.curvature == "momentum":
            state = self.base.state[self.coordinates[name]]
            used = [self._rotate(name, state["exp_avg"], back=True)] if state else [mean]
        kept, shape = self.modes[name]
        before, after = self.bases.get(name), {}
        for mode in kept:
            S = sum(self._product(X.detach().numpy().reshape(shape), 1 + MODES.index(mode)) for X in used) / len(used)
            if self.ema:  # the corrected average, by its sum of all
                self.products.setdefault((name, mode), []).append(S)
                every = self.products[name, mode]
                weights = self.ema ** np.arange(len(every))[::-1]
                S = np.tensordot(weights / weights.sum(), np.stack(every), 1)
            if before is None:
                after[mode] = self.optimizer.curvature[name].preconditioner.bases[mode].numpy().copy()
                self._check_eigenvectors(S, after[mode])
            else:
                after[mode] = np.stack([self._iterate(s, q) for s, q in zip(S, before[mode], strict=True)])
        whole = self._rotate(name, self.coordinates[name], back=True)
        self.bases[name] = after
        with torch.no_grad():
            self.coordinates[name].copy_(self._rotate(name, whole))
        self._move_state(name, before, after)

    @staticmethod
    def _product(X: np.ndarray, mode: int) -> np.ndarray:
        groups = [np.moveaxis(x, mode - 1, 0).reshape(x.shape[mode - 1], -1) for x in X]
        return np.stack([x @ x.T for x in groups])

    @staticmethod
    def _check_eigenvectors(S: np.ndarray, Q: np.ndarray) -> None:
        transposed = Q.transpose(0, 2, 1)
        np.testing.assert_allclose(transposed @ Q, np.broadcast_to(np.eye(Q.shape[-1]), Q.shape), atol=1e-12)
        values = transposed @ S @ Q
        assert np.abs(values * (1 - np.eye(Q.shape[-1]))).max() < 1e-12 * np.abs(values).max()

    @staticmethod
    def _iterate(S: np.ndarray, Q: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.diag(Q.T @ S @ Q))
        sorted_back = np.argsort(order)
        return np.linalg.qr((S / S.trace() @ Q + SHIFT * Q)[:, order])[0][:, sorted_back]

    def _rotate(self, name: str, value: Tensor, back: bool = False) -> Tensor:
        return self._multiply(name, value, self.bases.get(name), transposed=not back)

    def _multiply(self, name: str, value: Tensor, bases, transposed: bool) -> Tensor:
        if bases is None:
            return value.detach().clone()
        _, (groups, *size) = self.modes[name]
        whole = []
        for g, x in enumerate(value.detach().numpy().reshape(groups, -1)):
            K = np.ones((1, 1))
            for mode, d in zip(MODES, size, strict=True):
                Q = bases[mode][g] if mode in bases else np.eye(d)
                K = np.kron(K, Q.T if transposed else Q)
            whole.append(K @ x)
        return torch.tensor(np.stack(whole)).reshape(value.shape)

    def _move_state(self, name: str, before, after) -> None:
        C = after if before is None else {m: np.einsum("gji,gjk->gik", before[m], after[m]) for m in after}
        squared = {mode: each**2 for mode, each in C.items()}
        for entry, value in self.base.state[self.coordinates[name]].items():
            kind = self.kinds.get(entry)
            if kind is None or not isinstance(value, Tensor):
                continue
            moved = {
                1: lambda v: self._multiply(name, v, C, transposed=True),
                2: lambda v: self._multiply(name, v, squared, transposed=True),
                3: lambda v: self._multiply(name, v.square(), squared, transposed=True).sqrt(),
            }[kind](value)
            value.copy_(moved)


ADAM = {"linear": ["exp_avg"], "square": ["exp_avg_sq", "max_exp_avg_sq"]}

BASES = {
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1}, {"square": ["square_avg", "acc_delta"]}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}, {"square": ["sum"]}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}, ADAM),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "eps": 1e-4}, ADAM),
    "Adam, maximize": (torch.optim.Adam, {"lr": 0.01, "maximize": True, "weight_decay": 0.1, "eps": 1e-4}, ADAM),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-4}, ADAM),
    "AdamW, tensor lr": (
        torch.optim.AdamW,
        {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.3, "eps": 1e-4, "foreach": False},
        ADAM,
    ),
    "Adamax": (
        torch.optim.Adamax,
        {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4},
        {"linear": ["exp_avg"], "magnitude": ["exp_inf"]},
    ),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}, ADAM),
    "NAdam, decoupled": (
        torch.optim.NAdam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-4},
        ADAM,
    ),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4}, ADAM),
    "RMSprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1, "eps": 1e-4},
        {"linear": ["momentum_buffer", "grad_avg"], "square": ["square_avg"]},
    ),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}, {"linear": ["prev"]}),
}


class Mixed(nn.Module):
    """A table, convolutions with and without groups, attention, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.convolution = nn.Conv2d(2, 4, (2, 3))
        self.grouped = nn.Conv1d(4, 4, 2, groups=2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, index: Tensor, image: Tensor) -> Tensor:
        tokens = self.table(index)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        channels = self.convolution(image).flatten(2).tanh()
        signal = self.grouped(channels).mean(2)
        return self.second(self.first(tokens.mean(1) + signal).tanh())


MIXED = {
    "short": {
        "table.weight": (("input",), (1, 9, 4, 1)),
        "attention.in_proj_weight": (("input",), (1, 12, 4, 1)),
        "attention.out_proj.weight": (("output",), (1, 4, 4, 1)),
        "convolution.weight": (("output",), (1, 4, 12, 1)),
        "grouped.weight": (("output",), (2, 2, 4, 1)),
        "first.weight": (("output",), (1, 4, 4, 1)),
    },
    "both": {
        "table.weight": (("input",), (1, 9, 4, 1)),
        "attention.in_proj_weight": (("output", "input"), (1, 12, 4, 1)),
        "attention.out_proj.weight": (("output", "input"), (1, 4, 4, 1)),
        "convolution.weight": (("output", "input", "kernel"), (1, 4, 2, 6)),
        "grouped.weight": (("output", "input", "kernel"), (2, 2, 2, 2)),
        "first.weight": (("output", "input"), (1, 4, 4, 1)),
    },
}


def mixed(seed: int = 0) -> Mixed:
    seed_cpu(seed)
    return Mixed().double()


def batch(step: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    index = torch.randint(9, (samples, 3), generator=generator)
    return index, torch.randn(samples, 2, 4, 5, dtype=torch.float64, generator=generator)


def compare(
    base: str, sides: str, curvature: str, *, steps: int = 7, update_every: int = 3, ema: float = 0.0, samples: int = 16
) -> float:
    """The largest relative difference of a parameter after some steps of both."""
    cls, options, kinds = BASES[base]
    ours, theirs = mixed(), mixed()
    optimizer = NGPlus(
        ours, base=cls, basis="eigen", sides=sides, curvature=curvature, update_every=update_every, ema=ema,
        samples="batch", **copy.deepcopy(options),
    )  # fmt: skip
    updates = [n for n in range(steps) if n % update_every == 0]
    loop = PlainLoop(
        theirs, cls, MIXED[sides], curvature, updates, optimizer, ema=ema, **kinds, **copy.deepcopy(options)
    )
    for step in range(steps):
        inputs = batch(step, samples)
        optimizer.zero_grad()
        oracle.batch_loss(*inputs)(ours).backward()
        optimizer.step()
        loop.step(oracle.sample_losses(*inputs))
    return max(map(relative_difference, moved(ours), moved(theirs)))


def moved(model: nn.Module) -> list[Tensor]:
    """The parameters that the loss depends on: of attention's biases not the keys', whose gradient is rounding."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    values["attention.in_proj_bias"] = values["attention.in_proj_bias"].view(3, 4)[[0, 2]]
    return list(values.values())


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize("base", BASES)
def test_every_base_matches_the_plain_loop(base, sides):
    assert compare(base, sides, "per_sample") < 1e-10


@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize("base", [name for name, (cls, _, _) in BASES.items() if find_rule(cls).momentum is not None])
def test_momentum_matches_the_plain_loop(base, sides):
    assert compare(base, sides, "momentum") < 1e-10


def test_momentum_averaged_over_steps_matches_the_plain_loop():
    assert compare("Adam", "both", "momentum", ema=0.8) < 1e-10


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize("base", ["Adam", "AdamW", "Adagrad", "RMSprop"])
def test_mini_batch_matches_the_plain_loop(base, sides, ema):
    assert compare(base, sides, "mini_batch", ema=ema) < 1e-10


def test_per_sample_curvature_averaged_over_steps_matches_the_plain_loop():
    assert compare("AdamW", "both", "per_sample", ema=0.8) < 1e-10


def test_samples_in_parts_are_the_whole(set_tuning):
    set_tuning(curvature_chunk_cpu=200)
    assert compare("Adam", "both", "per_sample") < 1e-10


def test_small_weights_of_one_shape_are_those_one_by_one(set_tuning):
    """The layers of equal shape are rotated together, as they are not where none counts as small."""

    def trained() -> nn.Module:
        seed_cpu(0)
        model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(5, 5), nn.Tanh()))).double()
        optimizer = NGPlus(model, base=torch.optim.AdamW, basis="eigen", sides="both", update_every=2, weight_decay=0.1)
        for step in range(5):
            optimizer.zero_grad()
            oracle.batch_loss(points(8, 5, seed=step))(model).backward()
            optimizer.step()
        return model

    together = trained()
    set_tuning(grouped_below=0)
    for ours, theirs in zip(together.parameters(), trained().parameters(), strict=True):
        assert relative_difference(ours.detach(), theirs.detach()) < 1e-13


# The basis ----------------------------------------------------------------------------------------------------------


def linear_steps(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 6) -> nn.Module:
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        oracle.batch_loss(points(8, 5, seed=step))(model).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("base", BASES)
def test_a_layer_whose_sides_are_too_long_makes_the_bases_own_step_to_the_bit(base):
    cls, options, _ = BASES[base]

    def trained(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
        seed_cpu(0)
        model = nn.ModuleDict({"long": nn.Linear(7, 9), "short": nn.Linear(3, 2)}).double()
        optimizer = optimizer_of(model)
        for step in range(8):  # RAdam scales by the second moment from the sixth on
            optimizer.zero_grad()
            for layer in model.values():
                layer(points(8, layer.in_features, seed=step)).sin().sum(1).mean().backward()
            optimizer.step()
        return model

    ours = trained(
        lambda m: NGPlus(
            m, base=cls, basis="eigen", sides="both", curvature="mini_batch", max_side=4, **copy.deepcopy(options)
        )
    )
    theirs = trained(lambda m: cls(m.parameters(), **copy.deepcopy(options)))
    assert parameters_equal(ours["long"], theirs["long"])
    assert not torch.equal(ours["short"].weight, theirs["short"].weight)
    with pytest.raises(ValueError, match="no layer"):
        NGPlus(ours["long"], base=cls, basis="eigen", sides="both", max_side=6, **copy.deepcopy(options))


@pytest.mark.parametrize("sides", ["short", "both"])
def test_a_basis_of_the_identity_gives_the_bases_own_steps_to_the_bit(sides, monkeypatch):
    def identity(requests):
        for request in requests:
            request.basis = torch.eye(request.matrices.shape[-1], dtype=torch.float64).expand_as(request.matrices)

    monkeypatch.setattr("ngplus.curvature.eigen.find_bases", identity)
    options = {"lr": 0.01, "weight_decay": 0.1}
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        ours = linear_steps(
            lambda m, cls=cls: NGPlus(m, base=cls, basis="eigen", sides=sides, update_every=2, **options)
        )
        theirs = linear_steps(lambda m, cls=cls: cls(m.parameters(), **options))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert relative_difference(a.detach(), b.detach()) < 1e-15


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch", "momentum"])
def test_a_rotation_of_the_problem_rotates_the_steps(curvature):
    """f(UᵀW V) from UW₀Vᵀ has the steps of f from W₀, rotated, whatever the base does with single entries."""
    seed_cpu(0)
    U, V = (torch.linalg.qr(points(6, 6)).Q for _ in range(2))
    W0, scale, data = points(6, 6), points(6, 6).square() + 0.1, points(20, 6)

    def trained(left: Tensor, right: Tensor) -> Tensor:
        layer = nn.Linear(6, 6, bias=False).double()
        layer.weight.data = left @ W0 @ right.T
        optimizer = NGPlus(
            layer, base=torch.optim.Adam, basis="eigen", sides="both", curvature=curvature, update_every=2, lr=0.05,
            eps=1e-3,
        )  # fmt: skip
        for step in range(6):
            optimizer.zero_grad()
            output = layer(data[step : step + 12] @ right.T) @ left
            (scale[:2].sum(0) * output.square() + output.sin()).sum(1).mean().backward()
            optimizer.step()
        return left.T @ layer.weight.detach() @ right

    identity = torch.eye(6, dtype=torch.float64)
    assert relative_difference(trained(U, V), trained(identity, identity)) < 1e-9


def test_curvature_steps_come_early_and_then_every_so_often():
    early = (0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 19, 24, 30, 38)
    model = nn.Linear(3, 2).double()
    optimizer = NGPlus(model, base=torch.optim.Adam, basis="eigen", update_every=10, update_growth=0.25)
    due = []
    for step in range(60):
        if optimizer.curvature_is_due:
            due.append(step)
        optimizer.zero_grad()
        model(points(4, 3)).square().mean().backward()
        optimizer.step()
    assert due == [*early, 48, 58]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["mini_batch", "momentum"])
def test_gradients_of_any_size_have_a_basis(scale, dtype, curvature):
    layer = nn.Linear(6, 4).to(dtype)
    optimizer = NGPlus(layer, base=torch.optim.Adam, basis="eigen", sides="both", curvature=curvature, update_every=1)
    for step in range(4):
        optimizer.zero_grad()
        (layer(points(1, 6, dtype=dtype, seed=step)).square().sum() * scale).backward()
        optimizer.step()
    assert layer.weight.isfinite().all()
    for basis in optimizer.curvature["weight"].preconditioner.bases.values():
        identity = torch.eye(basis.shape[-1], dtype=dtype)
        torch.testing.assert_close(basis[0].mT @ basis[0], identity, atol=100 * torch.finfo(dtype).eps, rtol=0)


def test_a_step_of_orthogonal_iteration_keeps_directions_of_which_the_matrix_says_nothing():
    """A rank of one, the same again: what is orthogonal to it stays, every vector in its column."""
    v = points(8, 1)
    first = BasisRequest((v @ v.T).unsqueeze(0))
    find_bases([first])
    second = BasisRequest((v @ v.T).unsqueeze(0), first.basis)
    find_bases([second])
    C = (first.basis[0].mT @ second.basis[0]).abs()
    torch.testing.assert_close(C, torch.eye(8, dtype=torch.float64), atol=1e-9, rtol=0)


def test_nan_keeps_parameters_and_basis():
    layer = nn.Linear(6, 4)
    optimizer = NGPlus(
        layer, base=torch.optim.Adam, basis="eigen", sides="both", curvature="mini_batch", update_every=1
    )
    layer(points(8, 6, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    basis, weight = optimizer.curvature["weight"].preconditioner, layer.weight.detach().clone()
    layer.weight.grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.curvature["weight"].preconditioner is basis
    assert layer.weight.isfinite().all()
    assert layer.weight.grad.isnan().all()
    assert not torch.equal(layer.weight, weight)  # by the momentum of the step before


def test_an_error_in_the_bases_step_loses_nothing():
    class Failing(torch.optim.Adam):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise OSError("no space")

    register_base(Failing, find_rule(torch.optim.Adam))
    layer = nn.Linear(6, 4)
    optimizer = NGPlus(layer, base=Failing, basis="eigen", sides="both", update_every=2)
    layer(points(8, 6, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    weight, gradient = layer.weight.detach().clone(), layer.weight.grad
    optimizer.base.fails = True
    with pytest.raises(OSError, match="no space"):
        optimizer.step()
    assert torch.equal(layer.weight, weight)
    assert layer.weight.grad is gradient


# Sparse gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SparseAdam, torch.optim.Adagrad])
def test_a_sparse_gradient_stays_sparse_and_makes_the_dense_ones_steps(base):
    def trained(sparse: bool) -> tuple[nn.Module, list[bool]]:
        seed_cpu(0)
        model = nn.Embedding(50, 4, sparse=True).double()
        seen = []
        optimizer = NGPlus(model, base=base, basis="eigen", sides="both", update_every=2, lr=0.1)
        optimizer.base.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.is_sparse))
        for step in range(5):
            optimizer.zero_grad()
            index = torch.randint(50, (6, 2), generator=torch.Generator().manual_seed(step))
            model(index).sin().sum((1, 2)).mean().backward()
            if not sparse:
                model.weight.grad = model.weight.grad.to_dense()
            optimizer.step()
        return model, seen

    ours, seen = trained(True)
    assert all(seen)
    if base is torch.optim.Adagrad:
        theirs, _ = trained(False)
        assert relative_difference(ours.weight.detach(), theirs.weight.detach()) < 1e-13


# Saving -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch", "momentum"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_training_goes_on_to_the_bit_from_any_step(at, curvature):
    def make(model: nn.Module) -> NGPlus:
        return NGPlus(
            model, base=torch.optim.AdamW, basis="eigen", sides="both", curvature=curvature, update_every=3,
            update_growth=0.5, ema=0.5 if curvature == "per_sample" else 0.0,
        )  # fmt: skip

    def train(model: nn.Module, optimizer: NGPlus, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            oracle.batch_loss(*batch(step))(model).backward()
            optimizer.step()

    whole, parts = mixed(), mixed()
    train(whole, make(whole), range(8))
    before = make(parts)
    train(parts, before, range(at))
    again = mixed(seed=1)
    again.load_state_dict(parts.state_dict())
    after = make(again)
    after.load_state_dict(through_a_file(before.state_dict()))
    train(again, after, range(at, 8))
    assert parameters_equal(whole, again)
    copied = mixed(seed=2)
    copied.load_state_dict(parts.state_dict())
    optimizer = make(copied)
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    train(copied, optimizer, range(at, 8))
    assert parameters_equal(whole, copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_goes_on_to_the_bit_with_the_first_basis(dtype):
    """A product's rounding depends on the order in memory, which a file does not keep."""

    def make(seed: int) -> tuple[nn.Module, NGPlus]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 40)).to(dtype)
        return model, NGPlus(model, base=torch.optim.Adam, lr=0.01, basis="eigen", sides="both", update_every=9)

    def train(model: nn.Module, optimizer: NGPlus, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(points(16, 32, dtype=dtype, seed=step)).square().mean().backward()
            optimizer.step()

    (whole, before), (again, after) = make(0), make(1)
    train(whole, before, range(1))
    again.load_state_dict(whole.state_dict())
    after.load_state_dict(through_a_file(before.state_dict()))
    train(whole, before, range(1, 6))
    train(again, after, range(1, 6))
    assert parameters_equal(whole, again)


def test_states_of_another_form_are_refused():
    def state(**options) -> dict:
        model = nn.Linear(6, 4).double()
        optimizer = NGPlus(model, base=torch.optim.Adam, update_every=1, **options)
        model(points(8, 6)).square().mean().backward()
        optimizer.step()
        return optimizer.state_dict()

    eigen = {"basis": "eigen", "sides": "both"}
    ours = NGPlus(nn.Linear(6, 4).double(), base=torch.optim.Adam, **eigen)
    with pytest.raises(ValueError, match="saved with basis=None"):
        ours.load_state_dict(state())
    with pytest.raises(ValueError, match="sides or max_side"):
        ours.load_state_dict(state(basis="eigen"))
    with pytest.raises(ValueError, match='saved with basis="eigen"'):
        NGPlus(nn.Linear(6, 4).double(), base=torch.optim.Adam).load_state_dict(state(**eigen))


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Muon, torch.optim.ASGD, torch.optim.LBFGS])
def test_a_base_that_gains_nothing_or_cannot_step_in_a_basis_is_refused_by_name(base):
    with pytest.raises(ValueError, match=f"base={base.__name__}"):
        NGPlus(nn.Linear(3, 2), base=base, basis="eigen")


def test_a_base_that_nobody_declared_is_refused_by_name_until_it_is():
    class Other(torch.optim.Adam):
        pass

    with pytest.raises(TypeError, match="Other"):
        NGPlus(nn.Linear(3, 2), base=Other, basis="eigen")
    register_base(Other, BaseRule(linear=("exp_avg",), decay="flag"))
    layer = nn.Linear(3, 2)
    optimizer = NGPlus(layer, base=Other, basis="eigen")
    layer(points(4, 3, dtype=torch.float32)).sum().backward()
    with pytest.raises(TypeError, match="'exp_avg_sq'"):
        optimizer.step()


def test_a_state_that_nobody_declared_is_refused_before_it_would_move():
    """That of a layer which has its first gradient after the first step."""

    class Late(torch.optim.Adam):
        pass

    ngplus.register_base(Late, ngplus.BaseRule(linear=("exp_avg",), decay="flag"))
    model = nn.ModuleDict({"first": nn.Linear(1, 2), "second": nn.Linear(3, 2)})
    optimizer = NGPlus(model, base=Late, basis="eigen", curvature="mini_batch", update_every=2)
    model["first"](torch.ones(4, 1)).sum().backward()
    optimizer.step()
    model["second"](torch.ones(4, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(TypeError, match="'exp_avg_sq'"):
        optimizer.step()


def test_a_base_that_reads_its_parameters_sees_them_in_the_basis():
    """The same steps as where the decay, the one thing for which it reads them, is taken out of its hands."""

    class Reading(torch.optim.AdamW):
        pass

    register_base(
        Reading, BaseRule(linear=("exp_avg",), square=("exp_avg_sq",), momentum="exp_avg", reads_parameters=True)
    )
    options = {"lr": 0.05, "weight_decay": 0.3, "basis": "eigen", "sides": "both", "update_every": 2}
    ours = linear_steps(lambda model: NGPlus(model, base=Reading, **options))
    theirs = linear_steps(lambda model: NGPlus(model, base=torch.optim.AdamW, **options))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_difference(a.detach(), b.detach()) < 1e-13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "svd"}, "basis must be one of 'eigen'"),
        ({"basis": "eigen", "sides": "left"}, "sides must be one of 'short', 'both'"),
        ({"basis": "eigen", "solver": "low_rank"}, "solver='low_rank'"),
        ({"basis": "eigen", "block_size": 4}, "block_size=4"),
        ({"basis": "eigen", "damping_rule": "released"}, "damping_rule='released'"),
        ({"basis": "eigen", "max_side": 0}, "max_side"),
        ({"update_growth": 0}, "update_growth"),
        ({"curvature": "momentum"}, 'is for basis="eigen"'),
        ({"sides": "both"}, 'is for basis="eigen"'),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NGPlus(nn.Linear(3, 2), base=torch.optim.Adam, **options)


def test_momentum_needs_a_base_that_has_one():
    with pytest.raises(ValueError, match="base=Adagrad"):
        NGPlus(nn.Linear(3, 2), base=torch.optim.Adagrad, basis="eigen", curvature="momentum")


def test_what_is_kept_can_be_read():
    model = mixed()
    optimizer = NGPlus(model, base=torch.optim.Adam, basis="eigen", sides="both", update_every=1)
    oracle.batch_loss(*batch(0))(model).backward()
    optimizer.step()
    assert repr(optimizer.curvature["grouped.weight"]) == (
        "EigenState(matrix 2×2×4, eigenvectors of output 2, input 2, kernel 2, 1 updates, 24 elements kept)"
    )
    assert optimizer.curvature["table.weight"].share() is None


@pytest.mark.parametrize("base", [torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("curvature", ["per_sample", "mini_batch"])
def test_a_model_may_change_its_dtype(base, curvature):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = NGPlus(model, base, lr=0.01, update_every=2, basis="eigen", curvature=curvature)
    x = torch.randn(7, 6)
    for step in range(6):
        if step == 3:
            model.double()
            x = x.double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(state.preconditioner.main.dtype == torch.float64 for state in optimizer.curvature.values())


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"decay": "couple"}, ValueError, "decay must be one of 'coupled', 'decoupled', 'flag', 'none', got 'couple'"),
        ({"linear": "exp_avg"}, TypeError, "linear of a BaseRule must be a tuple of names of state entries"),
        ({"square": ("a",), "momentum": "a"}, ValueError, "momentum must be one of linear"),
    ],
)
def test_a_wrong_rule_is_refused(rule, error, message):
    with pytest.raises(error, match=message):
        BaseRule(**rule)


def test_a_decay_that_would_be_lost_is_refused():
    class Undeclared(torch.optim.Adam):
        pass

    register_base(Undeclared, BaseRule(linear=("exp_avg",), square=("exp_avg_sq",)))
    model = nn.Linear(3, 2)
    optimizer = NGPlus(model, Undeclared, lr=0.1, basis="eigen", weight_decay=0.1)
    model(torch.randn(4, 3)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 of a parameter group would have no effect"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("growth", [1e-320, 1e-20, 1e-6, 1.0])
def test_any_share_of_growth_is_answered_at_once(growth):
    optimizer = NGPlus(nn.Linear(3, 2), update_growth=growth, update_every=500)
    assert [optimizer._options.is_due(step) for step in (0, 1, 2)] == [True, True, True]


def first_updates(update_every, growth):
    """One after the other, as the option is described."""
    steps = [0]
    while (ahead := max(1, math.ceil(steps[-1] * growth - 1e-9))) < update_every:
        steps.append(steps[-1] + ahead)
    return steps


@pytest.mark.parametrize(
    ("update_every", "growth"), [(10, 0.25), (50, 0.02), (7, 1 / 3), (3, 5.0), (1, 0.5), (120, 0.07)]
)
def test_updates_are_due_as_the_number_of_steps_grows(update_every, growth):
    options = NGPlus(nn.Linear(3, 2), update_growth=growth, update_every=update_every)._options
    early = first_updates(update_every, growth)
    last = early[-1] + 3 * update_every
    expected = {*early, *range(early[-1], last, update_every)}
    assert {step for step in range(last) if options.is_due(step)} == expected


def test_a_parameter_that_replaces_another_in_a_group_is_refused_with_a_basis():
    """What its state was moved over from is in the old one's basis. Without a basis it is a layer of its own."""
    for options in ({"basis": "eigen"}, {"damping": 0.1}):
        old, new = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(8, 3))
        optimizer = NGPlus([old], torch.optim.Adam, lr=0.01, update_every=4, curvature="mini_batch", **options)
        for _ in range(2):
            optimizer.zero_grad()
            old.square().sum().backward()
            optimizer.step()
        optimizer.param_groups[0]["params"][0] = new
        new.square().sum().backward()
        if "basis" in options:
            with pytest.raises(RuntimeError, match="were replaced by others"):
                optimizer.step()
            continue
        for _ in range(3):
            gradient = new.grad.clone()
            optimizer.step()
        assert optimizer._layers[0].weight is new
        assert not torch.equal(new.grad, gradient)
