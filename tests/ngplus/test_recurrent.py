"""Recurrent layers, which run step by step on curvature steps: W_ih and W_hh of each layer and direction."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from ngplus.capture.function_mode import CaptureMode
from tests.ngplus import oracle
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import points, seed_cpu


class Observer:
    """A `CallObserver` that keeps all calls, and awaits every weight or none."""

    armed = True

    def __init__(self, is_awaited=True):
        self.is_awaited, self.calls = is_awaited, []

    def record_call(self, call):
        self.calls.append(call)

    def awaits(self, arguments):
        return self.is_awaited

    def trains(self, arguments):
        return False

    def trace(self, arguments):
        pass

    def sums_gradients_of(self, product, time_major):
        return False


class Recurrent(nn.Module):
    """A recurrent layer, from a state of its own or from zeros, and perhaps on a packed sequence."""

    def __init__(self, kind, lengths=None, with_state=False, **options):
        super().__init__()
        seed_cpu(0)
        self.layer, self.lengths, self.with_state = kind(4, 5, **options), lengths, with_state
        self.double()

    def forward(self, x, lengths=None):
        state = None
        if self.with_state:
            count = len([name for name in self.layer._parameters if name.startswith("weight_hh")])
            sample = x[:, 0] if self.layer.batch_first else x[0]
            h = sample.mean(1, keepdim=True).sin().expand(count, -1, 5).contiguous()
            state = (h, h.cos()) if isinstance(self.layer, nn.LSTM) else h
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=self.layer.batch_first, enforce_sorted=False)
        out, last = self.layer(x, state)
        if isinstance(out, PackedSequence):
            out = pad_packed_sequence(out, batch_first=self.layer.batch_first)[0]
        last = last if isinstance(last, tuple) else (last,)
        # The last states have their batch second, the outputs may have it first.
        return (out, *(each.transpose(0, 1) if self.layer.batch_first else each for each in last))


KINDS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "without biases": {"bias": False},
    "from a state": {"with_state": True, "num_layers": 2},
}


def relu(*sizes, **options):
    return nn.RNN(*sizes, nonlinearity="relu", **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_match_the_oracle(kind, options):
    model = Recurrent(KINDS[kind], **OPTIONS[options])
    optimizer = oracle.check(model, points(3, 3, 4), batch_dim=0 if model.layer.batch_first else 1)
    assert set(optimizer.curvature) == {n for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize(
    "make", [lambda: Recurrent(relu), lambda: Recurrent(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True)]
)
def test_other_kinds_match_the_oracle(make):
    oracle.check(make(), points(2, 3, 4), batch_dim=1)


class Learned(nn.Module):
    """A recurrent layer that starts from learned states, which all samples share."""

    def __init__(self, kind, copy, **options):
        super().__init__()
        seed_cpu(0)
        self.layer, self.copy = kind(4, 5, batch_first=True, **options), copy
        rows = len([name for name in self.layer._parameters if name.startswith("weight_hh")])
        self.h, self.c = (nn.Parameter(torch.randn(rows, 1, 5)) for _ in range(2))
        self.double()

    def forward(self, x):
        h, c = (COPIES[self.copy](each, len(x)) for each in (self.h, self.c))
        return self.layer(x, (h, c) if isinstance(self.layer, nn.LSTM) else h + c)[0]


COPIES = {
    "expand": lambda p, batch: p.expand(-1, batch, -1).contiguous(),
    "repeat": lambda p, batch: p.repeat(1, batch, 1),
    "cat": lambda p, batch: torch.cat([p] * batch, 1),
    "add": lambda p, batch: p + torch.zeros(1, batch, 1, dtype=p.dtype),
}


@pytest.mark.parametrize("options", ["two layers, both directions", "two layers"])
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_learned_initial_states_match_the_oracle(kind, copy, options):
    model = Learned(KINDS[kind], copy, num_layers=2, bidirectional="both" in options)
    optimizer = oracle.check(model, points(3, 3, 4))
    assert set(optimizer.curvature) == {n for n, p in model.named_parameters() if p.dim() > 1}


def test_learned_states_of_a_frozen_layer_match_the_oracle():
    model = Learned(nn.LSTM, "repeat", num_layers=2)
    model.layer.requires_grad_(False)
    assert set(oracle.check(model, points(3, 3, 4)).curvature) == {"h", "c"}


def test_a_learned_state_of_a_cell_matches_the_oracle():
    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = (nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (3, 5)))
            self.cell = nn.GRUCell(4, 5)
            self.double()

        def forward(self, x):
            h = (self.w[:1] @ self.v).expand(len(x), -1)
            for each in x.unbind(1):
                h = self.cell(each, h)
            return h

    seed_cpu(0)
    assert {"w", "v"} < set(oracle.check(Start(), points(3, 2, 4)).curvature)


@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_match_the_oracle(kind, samples):
    model, x, lengths = Recurrent(KINDS[kind], num_layers=2, bidirectional=True), points(5, 4, 4), [3, 5, 1, 3]
    if samples == "rows":  # which has no oracle of single steps: the layer is right where each is of one step
        x, lengths = x[:1], [1, 1, 1, 1]
    parts = [(x[: lengths[i], i : i + 1], torch.tensor([lengths[i]])) for i in range(4)]
    gradients = oracle.sample_gradients(model, [lambda m, p=p: oracle.energy(m(*p)) for p in parts])
    optimizer = oracle.descend(
        model, lambda m: oracle.energy(m(x, torch.tensor(lengths))) / 4, damping=0.3, samples=samples
    )
    assert len(optimizer.curvature) == 8
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_that_a_loop_calls_match_the_oracle(kind):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.cell = kind(4, 5)
            self.double()

        def forward(self, x):
            state, outputs = None, []
            for inside in x.unbind(1):
                state = self.cell(inside, state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(outputs, 1)

    assert len(oracle.check(Loop(), points(3, 4, 4)).curvature) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_run_step_by_step_returns_what_the_fused_call_does(kind, options, packed):
    model, x, observer = Recurrent(KINDS[kind], **OPTIONS[options]), points(4, 4, 4), Observer()
    lengths = torch.tensor([4, 2, 3, 1]) if packed else None
    with CaptureMode(lambda: observer):
        stepwise = model(x, lengths)
    for found, expected in zip(stepwise, model(x, lengths), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_between_layers_drops_its_share_on_curvature_steps():
    seed_cpu(0)
    layer = nn.LSTM(4, 200, num_layers=2, dropout=0.4).double()
    observer = Observer()
    with CaptureMode(lambda: observer):
        layer(points(9, 20, 4))
        layer.eval()(points(9, 20, 4))
    inputs = [call.args[0] for call in observer.calls if call.name == "linear"]
    shares = [float((x == 0).double().mean()) for x in inputs if x.dim() == 3 and x.shape[2] == 200]
    assert shares == pytest.approx([0.4, 0.0], abs=0.02)


def test_a_recurrent_layer_trains_like_the_plain_loop_over_several_steps():
    model, x = Recurrent(nn.GRU, batch_first=True), points(3, 4, 4)
    loop = oracle.PlainLoop(copy.deepcopy(model), lr=0.05, damping=1.0, update_every=2)
    optimizer = NGPlus(model, lr=0.05, damping=1.0, update_every=2)
    for _ in range(4):
        optimizer.zero_grad()
        oracle.batch_loss(x)(model).backward()
        optimizer.step()
        loop.step(oracle.sample_losses(x))
    for found, expected in zip(model.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [KFAC, SENG])
def test_baselines_have_the_factors_of_recurrent_layers(kind):
    model = Recurrent(nn.LSTM, batch_first=True)
    optimizer = kind(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.batch_loss(points(3, 4, 4))(model).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"layer.weight_ih_l0", "layer.weight_hh_l0"}


def test_a_frozen_layer_stays_fused():
    model = nn.Sequential(nn.Linear(4, 4), Recurrent(nn.LSTM).requires_grad_(False)).double()
    observer = Observer(is_awaited=False)
    with CaptureMode(lambda: observer):
        model(points(3, 2, 4))
    assert "lstm" in [call.name for call in observer.calls]
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, batch_dim=1)
    oracle.batch_loss(points(3, 2, 4), batch_dim=1)(model).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"0.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_curvature_step_takes_at_most_half_as_much_memory_again_as_sgds(kind):
    seed_cpu(0)
    model, x = KINDS[kind](64, 128), torch.randn(20, 64, 64)

    def run(optimizer):
        def step():
            model(x)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return peak_elements(step)

    plain = run(torch.optim.SGD(model.parameters(), lr=1e-9))
    ours = run(NGPlus(model, lr=1e-9, damping=1.0, update_every=1, batch_dim=1))
    assert ours <= 1.5 * plain
