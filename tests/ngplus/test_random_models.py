"""Two hundred random small models of the supported layers train six steps as the plain float64 loop does."""

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from tests.ngplus import oracle
from tests.ngplus.cases import ActivatedLinear, seed_cpu

STEPS = 6
"""Two curvature steps at the longest interval of four, and a plain one after each."""


class Attention(nn.Module):
    """Self-attention with its input added."""

    def __init__(self, dim, heads, bias):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Crossing(nn.Module):
    """Attention of a sequence to two others made from it, with projections of their own sizes."""

    def __init__(self, dim, key, value):
        super().__init__()
        self.key, self.value = nn.Linear(dim, key), nn.Linear(dim, value)
        self.attention = nn.MultiheadAttention(dim, 1, kdim=key, vdim=value, batch_first=True)

    def forward(self, x):
        return self.attention(x, self.key(x), self.value(x).sin())[0]


class Repeated(nn.Module):
    """A layer that is used several times."""

    def __init__(self, layer, times):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x)) + x
        return x


class Tied(nn.Module):
    """An embedding whose weight also makes the output."""

    def __init__(self, rows, dim, bias):
        super().__init__()
        self.table, self.out = nn.Embedding(rows, dim), nn.Linear(dim, rows, bias=bias)
        self.out.weight = self.table.weight

    def forward(self, index):
        return self.out(self.table(index).tanh())


class Parallel(nn.Module):
    """Several layers of one shape on one input, which are preconditioned in one batch."""

    def __init__(self, make, count):
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(count))

    def forward(self, input):
        return sum(layer(input).tanh() for layer in self.layers)


def perhaps_parallel(rng, make):
    return Parallel(make, rng.randint(2, 3)) if rng.random() < 0.4 else make()


def convolution(rng, channels, dims):
    groups = rng.choice([g for g in (1, 2, channels) if channels % g == 0])
    outside = groups * rng.randint(1, 3)
    kernel = rng.randint(1, 3)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(
        channels,
        outside,
        kernel,
        stride=rng.randint(1, 2),
        padding=rng.randint(kernel // 2, 2),
        dilation=rng.randint(1, 2) if kernel == 2 else 1,
        groups=groups,
        bias=rng.random() < 0.7,
        padding_mode=rng.choice(["zeros", "zeros", "replicate", "circular"]),
    )
    return layer, outside


def activation(rng):
    return rng.choice([nn.Tanh(), nn.SiLU(inplace=True), nn.Softplus(), nn.Sigmoid()])


def vectors(rng, batch):
    dim = rng.randint(1, 6)
    return [], dim, torch.randn(batch, dim)


def sequences(rng, batch):
    dim = 2 * rng.randint(1, 3)
    x = torch.randn(batch, rng.randint(1, 5), dim)
    layers = []
    for _ in range(rng.randint(0, 2)):
        layers.append(
            rng.choice(
                [
                    lambda: Attention(dim, rng.choice([1, 2]), rng.random() < 0.7),
                    lambda: Crossing(dim, rng.randint(1, 5), rng.randint(1, 5)),
                    lambda: Repeated(nn.Linear(dim, dim), rng.randint(2, 3)),
                    lambda: nn.LayerNorm(dim),
                ]
            )()
        )
    return layers, dim, x


def images(rng, batch):
    dims, channels = rng.randint(1, 3), rng.randint(1, 4)
    size = [rng.randint(4, 6) if dims < 3 else rng.randint(3, 4) for _ in range(dims)]
    x = torch.randn(batch, channels, *size)
    layers = []
    for _ in range(rng.randint(1, 2)):
        layer, channels = convolution(rng, channels, dims)
        layers += [layer, activation(rng)]
        if rng.random() < 0.3:
            layers.append(nn.GroupNorm(1, channels))
    layers.append(nn.Flatten(1 if rng.random() < 0.5 else 2))
    with torch.no_grad():
        return layers, nn.Sequential(*layers)(x).shape[-1], x


def tokens(rng, batch):
    rows, dim = rng.randint(2, 9), 2 * rng.randint(1, 3)
    index = torch.randint(rows, (batch, rng.randint(1, 4)))
    kind = rng.choice(["embedding", "bag", "tied"])
    if kind == "tied":
        return [Tied(rows, dim, rng.random() < 0.5)], rows, index
    sparse, padding = rng.random() < 0.5, rng.choice([None, 0])
    if kind == "bag":
        make = partial(nn.EmbeddingBag, rows, dim, mode=rng.choice(["sum", "mean"]), sparse=sparse)
    else:
        make = partial(nn.Embedding, rows, dim, padding_idx=padding, sparse=sparse)
    return [perhaps_parallel(rng, make)], dim, index


def sample_run(seed):
    """A model, a batch for each step and the options of its optimizer."""
    rng = random.Random(seed)
    seed_cpu(seed)
    layers, dim, x = rng.choice([vectors, sequences, images, tokens])(rng, batch := rng.randint(1, 5))
    for _ in range(rng.randint(1, 2)):
        outside = rng.randint(1, 6)
        kind = rng.choice([nn.Linear, ActivatedLinear])
        layers += [perhaps_parallel(rng, partial(kind, dim, outside, bias=rng.random() < 0.7)), activation(rng)]
        dim = outside
    model = nn.Sequential(*layers).double()
    freeze(rng, model)
    x = x if x.dtype == torch.long else x.double()
    batches = [x[torch.randperm(batch)] if x.dtype == torch.long else torch.randn_like(x) for _ in range(STEPS)]
    block_size = rng.choice([None, None, 1, 2, 3, 4])
    options = {
        "lr": 0.02,
        "damping": rng.choice([0.1, 1.0]),
        "update_every": rng.choice([1, 2, 4]),
        "ema": rng.choice([0.0, 0.0, 0.5, 0.9]),
        "block_size": block_size,
    }
    solver = rng.choice(["auto", "dense"] if block_size else ["auto", "dense", "low_rank"])
    return model, batches, options, solver


def freeze(rng, model):
    """Sometimes one parameter that is not the only one of its kind."""
    names = [name for name, _ in model.named_parameters()]
    if rng.random() < 0.2 and len(names) > 2:
        model.get_parameter(rng.choice(names[:-2])).requires_grad_(False)


@pytest.mark.parametrize("seed", range(200))
def test_a_random_model_trains_like_the_plain_loop(seed):
    model, batches, options, solver = sample_run(seed)
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    loop = oracle.PlainLoop(plain, **options)
    optimizer = NGPlus(model, solver=solver, **options)
    for x in batches:
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        loop.step(oracle.sample_losses(x))
    assert optimizer.skipped_steps == 0
    for parameter, exact, before in zip(model.parameters(), plain.parameters(), start.parameters(), strict=True):
        moved = (exact - before).norm()
        assert (parameter - exact).norm() <= 1e-9 * moved + 1e-13


def test_the_models_are_of_every_kind():
    models = [sample_run(seed)[0] for seed in range(200)]
    seen = {type(module) for model in models for module in model.modules()}
    assert {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention} <= seen
    assert {Attention, Crossing, Repeated, Tied, ActivatedLinear, Parallel} <= seen
