"""Which calls of a model see the same samples: pieces of a batch, chains of calls, ``forward`` called directly."""

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from tests.ngplus import oracle
from tests.ngplus.cases import points, seed_cpu

DAMPING = 0.3


class Chain(nn.Module):
    """An encoder and a decoder that share a layer, and a cell."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.shared = nn.Linear(4, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), self.shared)
        self.decoder = nn.Sequential(self.shared, nn.Tanh(), nn.Linear(4, 3))
        self.cell = nn.Linear(4, 4)
        self.double()

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh()) + self.cell(x).sum(1, keepdim=True)

    def twice(self, x):
        return self.cell(x).tanh() * self.cell(2 * x)


def judge(run, samples, model=None, **options):
    """One step on ``run(model)``, judged against the losses of single samples."""
    model = model or Chain()
    losses = [(lambda m, i=i: run(m, slice(i, i + 1))) for i in range(samples)]
    gradients = {m: g for m, g in oracle.sample_gradients(model, losses).items() if any(each.any() for each in g)}
    oracle.descend(model, lambda m: run(m, slice(None)) / samples, damping=DAMPING, solver="dense", **options)
    return oracle.error(model, oracle.directions(gradients, DAMPING))


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2), (1, 1, 1, 1), (3, 2, 3)])
@pytest.mark.parametrize("build", [Chain, lambda: nn.Sequential(nn.Conv1d(4, 3, 2), nn.Tanh()).double()])
def test_pieces_of_a_batch_are_samples_of_their_own(sizes, build):
    model, total = build(), sum(sizes)
    x = points(total, 4) if isinstance(model, Chain) else points(total, 4, 5)
    gradients = oracle.energy_gradients(model, x)
    oracle.descend(model, lambda m: sum(oracle.energy(m(part)) for part in x.split(sizes)) / total, damping=DAMPING)
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


@pytest.mark.parametrize(
    "run",
    {
        "an encoder's and its decoder's": lambda m, x: m.decoder(m.encoder(x).tanh()),
        "with something between": lambda m, x: m.decoder((m.encoder(x).exp() + 1).log().sum(1, keepdim=True) * x),
        "a cell, step after step": lambda m, x: m.cell(m.cell(m.cell(x).tanh()).tanh()),
        "two heads on one trunk": lambda m, x: torch.cat([m.shared(h := m.encoder(x)), m.shared(h.tanh())], 1),
        "through a list": lambda m, x: m.decoder(torch.stack([m.encoder(x), x]).sum(0)),
        "forward called directly": lambda m, x: m.forward(x),
        "one module twice in a method, on what another made": lambda m, x: m.twice(m.encoder(x)),
    }.values(),
)
def test_calls_made_of_each_other_have_the_same_samples(run):
    x = points(5, 4)
    assert judge(lambda m, which: oracle.energy(run(m, x[which])), 5) <= 1e-10


class Direct(nn.Module):
    """One layer used twice on what goes in."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.a = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.a(x).tanh() * self.a(2 * x)


@pytest.mark.parametrize("pieces", [1, 2])
def test_forward_called_directly_is_one_call(pieces):
    x = points(6, 4)

    def run(model, which):
        return sum(oracle.energy(model.forward(part)) for part in x[which].chunk(pieces))

    assert judge(run, 6, Direct()) <= 1e-10


def test_a_discriminators_calls_on_real_and_on_generated_images_are_apart():
    """The generator's call belongs to the second of them, though both are of equal size."""
    model = nn.ModuleDict(
        {"g": nn.Linear(4, 4), "d": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))}
    ).double()
    real, noise = points(4, 4), points(4, 4)
    losses = [lambda m, i=i: oracle.energy(m["d"](real[i : i + 1])) for i in range(4)]
    losses += [lambda m, i=i: oracle.energy(m["d"](m["g"](noise[i : i + 1]))) for i in range(4)]
    gradients = oracle.sample_gradients(model, losses)
    generator = [matrix for matrix in gradients if matrix.weight == "g.weight"]
    gradients = {matrix: g for matrix, g in gradients.items() if matrix not in generator}

    def loss(m):
        return (oracle.energy(m["d"](real)) + oracle.energy(m["d"](m["g"](noise)))) / 8

    oracle.descend(model, loss, damping=DAMPING, solver="dense")
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


def test_halves_of_what_a_trunk_made_are_samples_of_their_own():
    x = points(6, 4)
    model = Chain()
    gradients = oracle.sample_gradients(
        model, [lambda m, i=i: oracle.energy(m.cell(m.encoder(x[i : i + 1]))) for i in range(6)]
    )
    gradients = {m: g for m, g in gradients.items() if any(each.any() for each in g)}

    def loss(m):
        one, other = m.encoder(x).chunk(2)
        return (oracle.energy(m.cell(one)) + oracle.energy(m.cell(other))) / 6

    oracle.descend(model, loss, damping=DAMPING, solver="dense")
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


@pytest.mark.parametrize("model_calls", ["separate", "joined"])
def test_branches_of_a_siamese_network_are_one_sample_with_joined_model_calls(model_calls):
    x, y = points(5, 4), points(5, 4)

    def run(model, which):
        return (model.cell(x[which]) - model.cell(y[which])).square().sum()

    error = judge(run, 5, model_calls=model_calls)
    assert error <= 1e-10 if model_calls == "joined" else error > 0.1


def test_a_recurrent_cell_called_from_the_loop_has_one_sample_a_sequence():
    """The weights see a sequence as one sample: what multiplies the inputs is joined by what multiplies the state."""
    x = points(5, 7, 3)
    cell = nn.ModuleDict({"x": nn.Linear(3, 4), "h": nn.Linear(4, 4, bias=False)}).double()

    def run(m, which):
        h = torch.zeros(len(x[which]), 4, dtype=torch.float64)
        for t in range(7):
            h = (m["x"](x[which][:, t]) + m["h"](h)).tanh()
        return oracle.energy(m["h"](h))

    assert judge(run, 5, cell) <= 1e-10


def test_nothing_of_a_direct_forward_is_kept_after_backward():
    """The frame that tells direct calls apart goes with the backward pass."""
    model, x = Direct(), points(6, 4)
    optimizer = NGPlus(model, lr=1e-9, update_every=1)
    oracle.energy(model.forward(x)).backward()
    assert optimizer._recorder._model_calls._thread.frame is None
