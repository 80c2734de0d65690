"""Which calls of a model see the same samples: pieces of a batch, chains of calls, ``forward`` called directly."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from ngplus import NGPlus
from ngplus.capture.model_calls import AXIS, COUNT, ORDER, PASSES, PIECES, ROWS, SINGLE, SIZES
from tests.ngplus import oracle
from tests.ngplus.cases import points, recorded_warnings, seed_cpu

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


@pytest.mark.parametrize("cached", [False, True])
def test_calls_that_share_what_is_made_of_weights_alone_are_no_calls_of_each_other(cached):
    """A parametrized weight that `cached` makes in the first call comes from no sample of it."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    x = points(6, 4)
    gradients = oracle.energy_gradients(model, x)

    def loss(m):
        with nn.utils.parametrize.cached() if cached else contextlib.nullcontext():
            return sum(oracle.energy(m(part)) for part in x.chunk(2)) / 6

    with recorded_warnings() as messages:
        optimizer = oracle.descend(model, loss, damping=DAMPING)
    assert not messages
    assert "0.parametrizations.weight.original1" in optimizer.curvature
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10


def test_nothing_that_is_cached_is_kept_once_the_cache_is_off():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double()
    optimizer, x = NGPlus(model, lr=1e-9, update_every=1), points(6, 4)
    with nn.utils.parametrize.cached():
        model(x)
        kept = weakref.ref(next(iter(optimizer._recorder._expressions.known.values())).value)
    model(x)
    gc.collect()
    assert kept() is None
    assert not optimizer._recorder._expressions.known


# Samples without a batch dimension -----------------------------------------------------------------------------------


class Loop(nn.Module):
    """Goes through its batch in a loop, one sample after another, with a batch dimension or without."""

    def __init__(self, body, step=None):
        super().__init__()
        self.body, self.step, self.optimizer = body, step, None

    def forward(self, batch):
        outputs = []
        for number in range(0, len(batch), self.step or 1):
            if self.optimizer is not None:
                self.optimizer.sample_index = torch.tensor([number])
            outputs.append(self.body(batch[number : number + self.step] if self.step else batch[number]))
        return torch.cat(outputs) if self.step else torch.stack(outputs)


class OneOutput(nn.Module):
    """The output, or the last of the outputs, of a layer that returns several things."""

    def __init__(self, layer, features=3, mean=True):
        super().__init__()
        self.layer, self.head, self.mean = layer, nn.Linear(features, 2), mean

    def forward(self, x):
        y = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        return self.head(y.mean(0) if self.mean else y)


class Cell(nn.Module):
    """A cell over the times of a sequence (T, 4)."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x):
        h = x.new_zeros(3)
        for each in x:
            h = self.cell(each, h)
        return h


class Both(nn.Module):
    """A product of two linear functions of a vector."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.layer(x, x)


UNBATCHED = {
    "linear layers": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), (5, 4)),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(0), nn.Linear(27, 2)), (5, 2, 4, 4)),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(0)), (5, 2, 4)),
    "an LSTM": (lambda: OneOutput(nn.LSTM(4, 3)), (5, 6, 4)),
    "attention": (lambda: OneOutput(nn.MultiheadAttention(4, 2), features=4), (5, 6, 4)),
    "a table": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), None),
    "a bilinear layer": (Both, (5, 4)),
}


def unbatched(name):
    build, shape = UNBATCHED[name]
    return build().double(), torch.tensor([3, 0, 3, 6, 1]) if shape is None else points(*shape)


@pytest.mark.parametrize("name", UNBATCHED)
def test_single_samples_in_calls_of_their_own_are_batches_of_one(name):
    model, x = unbatched(name)
    assert judge(lambda m, which: sum(oracle.energy(m(each)) for each in x[which]), 5, model) <= 1e-10


def named_layers(run, model, reason, samples=5, **options):
    """The layers that a warning for this reason leaves to the base in a step; every one but these must be right."""
    losses = [(lambda m, i=i: run(m, slice(i, i + 1))) for i in range(samples)]
    expected = oracle.directions(oracle.sample_gradients(model, losses), DAMPING)
    with recorded_warnings() as messages:
        optimizer = oracle.descend(model, lambda m: run(m, slice(None)) / samples, damping=DAMPING, **options)
    right = {matrix: each for matrix, each in expected.items() if matrix.weight in optimizer.curvature}
    assert not right or oracle.error(model, right) <= 1e-10
    left = {matrix.weight for matrix in expected} - set(optimizer.curvature)
    assert len(messages) == bool(left)
    assert all(reason in message and name in message for message in messages for name in left)
    return left


@pytest.mark.parametrize("name", UNBATCHED)
def test_single_samples_that_one_call_goes_through_in_a_loop_leave_their_layers_to_the_base(name):
    body, x = unbatched(name)
    left = named_layers(lambda m, which: oracle.energy(m(x[which])), Loop(body), SINGLE)
    assert left == {matrix.weight for matrix in oracle.matrices(Loop(body))}


@pytest.mark.parametrize(("step", "reason"), [(1, PIECES), (2, SIZES), (3, SIZES)])
def test_pieces_that_a_call_cuts_its_batch_into_leave_their_layers_to_the_base(step, reason):
    """Also where the last is shorter, and where a layer is used twice on each."""
    x = points(5, 4)
    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), twice := nn.Linear(4, 4), nn.Tanh(), twice).double()
    left = named_layers(lambda m, which: oracle.energy(m(x[which])), Loop(body, step), reason)
    assert left == {"body.0.weight", "body.2.weight"}


def test_bags_of_offsets_are_samples_and_bags_one_by_one_are_not():
    class Bag(nn.EmbeddingBag):
        def forward(self, x):
            return super().forward(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))

    x = torch.randint(7, (5, 3))
    bag = Bag(7, 4, mode="sum").double()
    assert judge(lambda m, which: oracle.energy(m(x[which])), 5, bag) <= 1e-10
    assert named_layers(lambda m, which: oracle.energy(m(x[which])), Loop(bag, 1), PIECES) == {"body.weight"}


def test_a_list_of_sequences_that_a_call_goes_through_leaves_its_layers_to_the_base():
    sequences = [points(length, 1, 4) for length in (3, 5, 3)]
    model = Loop(unbatched("an LSTM")[0])
    left = named_layers(lambda m, which: oracle.energy(m(sequences[which])), model, PIECES, 3)
    assert left == {"body.layer.weight_ih_l0", "body.layer.weight_hh_l0", "body.head.weight"}


def test_a_cell_over_the_times_of_one_sequence_without_a_batch_can_be_numbered():
    """Nothing tells times from samples; an index of one element does."""
    x, model = points(3, 6, 4), Cell().double()

    def run(m, which):
        total = 0
        for number in range(len(x))[which]:
            if m is model:
                optimizer.sample_index = torch.tensor([number])
            total = total + oracle.energy(m(x[number]))
        return total

    assert named_layers(lambda m, w: sum(oracle.energy(m(each)) for each in x[w]), copy.deepcopy(model), SINGLE, 3)
    expected = oracle.directions(
        oracle.sample_gradients(model, [lambda m, i=i: run(m, slice(i, i + 1)) for i in range(3)]), DAMPING
    )
    optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1, loss_reduction=3)
    (run(model, slice(None)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-9


@pytest.mark.parametrize("name", UNBATCHED)
def test_single_samples_in_a_loop_inside_a_call_can_be_numbered(name):
    body, x = unbatched(name)
    model = Loop(body)
    expected = oracle.directions(oracle.energy_gradients(model, x), DAMPING)
    model.optimizer = optimizer = NGPlus(model, lr=1e-12, damping=DAMPING, update_every=1, loss_reduction=5)
    oracle.batch_loss(x)(model).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-9


def test_rows_in_a_call_with_a_sequence_without_a_batch_dimension_leave_their_layers_to_the_base():
    """Attention takes (T, E) for one sample, and linear layers take it for T of them."""
    x, model = points(3, 6, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()

    def run(m, which):
        return sum(oracle.energy(m(each)) for each in x[which])

    assert named_layers(run, model, ROWS, 3) == {"linear1.weight", "linear2.weight"}
    assert not named_layers(lambda m, which: oracle.energy(m(x[which])), batch_first(model), ROWS, 3)


def batch_first(model):
    """The same layer, for sequences that are a batch."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    layer.load_state_dict(model.state_dict())
    return layer


class Again(nn.Module):
    """A layer that some of its samples use again, as those that have not come to an end yet."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x):
        x = self.layer(x).tanh()
        return x.index_add(0, chosen := (x[:, 0] > 0).nonzero().squeeze(1), self.layer(x[chosen]))


def test_a_layer_that_some_of_the_samples_use_again_goes_to_the_base():
    x = points(5, 4)
    assert named_layers(lambda m, which: oracle.energy(m(x[which])), Again(), SIZES) == {"layer.weight"}


@pytest.mark.parametrize("name", UNBATCHED)
def test_single_samples_in_a_loop_inside_a_call_are_apart_with_the_option_for_it(name):
    body, x = unbatched(name)
    assert judge(lambda m, which: oracle.energy(m(x[which])), 5, Loop(body), model_calls="apart") <= 1e-10


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("wrap", [lambda m, x: oracle.energy(m(x)), lambda m, x: oracle.energy(m.forward(x))])
def test_pieces_of_a_batch_are_apart_with_the_option_for_it(step, wrap):
    x, body = points(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    assert judge(lambda m, which: wrap(m, x[which]), 5, Loop(body, step), model_calls="apart") <= 1e-10


@pytest.mark.parametrize("options", [{"model_calls": "joined"}, {"samples": "rows"}])
def test_several_uses_of_a_layer_on_one_vector_are_no_doubt_where_an_option_tells(options):
    x, model = points(1, 4), Loop(nn.Linear(4, 3).double())
    optimizer = oracle.descend(model, lambda m: oracle.energy(m(torch.cat([x, 2 * x]))), damping=DAMPING, **options)
    assert "body.weight" in optimizer.curvature


def test_frames_of_a_time_major_sequence_are_no_pieces():
    """As many rows as the input has times, in other places: each step's rows are the same samples."""
    x = points(4, 2, 3)  # (T, B, C)
    cell = nn.ModuleDict({"x": nn.Linear(3, 4), "h": nn.Linear(4, 4, bias=False)}).double()

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            h = x.new_zeros(x.shape[1], 4)
            for each in x:
                h = (self.cell["x"](each) + self.cell["h"](h)).tanh()
            return h

    assert judge(lambda m, which: oracle.energy(m(x[:, which])), 2, Recurrent()) <= 1e-10


class Language(nn.Module):
    """A recurrent language model on (T, B), or on (B, T)."""

    def __init__(self, batch_first):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layer = nn.LSTM(4, 3, batch_first=batch_first)
        self.head = nn.Linear(3, 9)
        self.double()

    def forward(self, tokens):
        return self.head(self.layer(self.table(tokens))[0])


SEQUENCES = {
    "recurrent": (Language, torch.randint(9, (6, 4), generator=torch.Generator().manual_seed(0)), "table head"),
    "attention": (
        lambda batch_first: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first).double(),
        points(6, 4, 4, seed=0),
        "linear1 linear2",
    ),
}


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("options", [{}, {"batch_dim": 1}])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_whose_samples_lie_elsewhere_than_those_of_attention_and_recurrent_layers_go_to_the_base(
    kind, options, batch_first
):
    build, x, names = SEQUENCES[kind]
    x = x.transpose(0, 1) if batch_first else x  # four samples

    def run(m, which):
        return oracle.energy(m(x[which] if batch_first else x[:, which]))

    left = named_layers(run, build(batch_first), AXIS, 4, **options)
    agree = batch_first == (not options)
    assert left == (set() if agree else {f"{name}.weight" for name in names.split()})


class OverTimes(nn.Module):
    """A linear layer over the times of (B, T, C) that has the samples second, given by name or in a dict."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 2)
        self.double()

    def forward(self, x=None, given=None):
        return self.mix((given["x"] if x is None else x).permute(2, 0, 1))


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(x=x), lambda m, x: m(given={"x": x})])
@pytest.mark.parametrize("options", [{}, {"batch_dim": 1}])
def test_a_layer_whose_samples_lie_elsewhere_than_those_of_the_input_goes_to_the_base(call, options):
    x = points(5, 3, 4)
    left = named_layers(
        lambda m, which: sum(oracle.energy(each) for each in call(m, x[which]).unbind(1)), OverTimes(), AXIS, **options
    )
    assert left == (set() if options else {"mix.weight"})


class Distances(nn.Module):
    """Distances to points, or products with them, that see the batch second."""

    def __init__(self, function):
        super().__init__()
        seed_cpu(0)
        self.p, self.function = nn.Parameter(torch.randn(6, 4)), function
        self.double()

    def forward(self, x):
        return self.function(x.transpose(0, 1), self.p).tanh().transpose(0, 1)


@pytest.mark.parametrize("options", [{}, {"batch_dim": 1}])
@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize(
    "function", [torch.cdist, lambda x, p: x @ p.mT, lambda x, p: torch.einsum("tbi,oi->tbo", x, p)]
)
def test_a_parameter_in_any_function_whose_samples_lie_elsewhere_than_the_inputs_goes_to_the_base(
    function, samples, options
):
    x = points(samples, 3, 4)
    left = named_layers(lambda m, which: oracle.energy(m(x[which])), Distances(function), AXIS, samples, **options)
    assert left == (set() if options else {"p"})


class Counted(nn.Module):
    """A parameter that sees other rows than the samples of the input."""

    def __init__(self, function):
        super().__init__()
        seed_cpu(0)
        self.p, self.function, self.head = nn.Parameter(torch.randn(4, 3)), function, nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.function(x, self.p) + self.head(x)


OTHER_COUNTS = {
    "two views of each sample": lambda x, p: sum((torch.cat([x, x.cos()]) @ p).tanh().chunk(2)),
    "their distances": lambda x, p: sum(torch.cdist(torch.cat([x, x.cos()]), p.mT).chunk(2)),
    "one row for all": lambda x, p: (x[:1].detach() * 0 + 1) @ p,
}


@pytest.mark.parametrize("name", OTHER_COUNTS)
def test_a_parameter_with_another_number_of_samples_than_the_input_goes_to_the_base(name):
    x = points(4, 4)
    left = named_layers(lambda m, which: oracle.energy(m(x[which])), Counted(OTHER_COUNTS[name]), COUNT, 4)
    assert left == {"p"}


@pytest.mark.parametrize("name", ["two views of each sample", "their distances"])
def test_rows_of_another_number_can_be_numbered(name):
    x, model = points(4, 4), Counted(OTHER_COUNTS[name])
    expected = oracle.directions(oracle.energy_gradients(model, x), DAMPING)
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, loss_reduction=4)
    optimizer.sample_index = {"": torch.arange(4).repeat(2)}
    oracle.batch_loss(x)(model).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


def test_pieces_of_a_batch_that_is_given_by_name_leave_their_layers_to_the_base():
    class Named(Loop):
        def forward(self, *, batch):
            return super().forward(batch)

    x = points(6, 4)
    model = Named(nn.Sequential(nn.Linear(4, 3)).double(), 3)
    assert named_layers(lambda m, which: oracle.energy(m(batch=x[which])), model, PIECES, 6) == {"body.0.weight"}


@pytest.mark.parametrize("place", ["second", "by name"])
def test_a_list_of_pieces_is_found_at_any_place_among_the_arguments(place):
    class Scaled(Loop):
        def forward(self, scale, images):
            return scale * super().forward(images)

    images = [points(1, 4) for _ in range(3)]
    model = Scaled(nn.Linear(4, 3).double())

    def run(m, which):
        return oracle.energy(m(0.5, images[which]) if place == "second" else m(scale=0.5, images=images[which]))

    assert named_layers(run, model, PIECES, 3) == {"body.weight"}


class Crops(nn.Module):
    """The crops of each size are joined, and go through the body together, as in DINO's multi-crop training."""

    def __init__(self, joined):
        super().__init__()
        seed_cpu(0)
        self.body, self.head, self.joined = nn.Linear(4, 3).double(), nn.Linear(3, 2).double(), joined

    def forward(self, crops):
        parts = [crops[start : start + self.joined] for start in range(0, len(crops), self.joined)]
        return self.head(torch.cat([self.body(torch.cat(part)) for part in parts]).tanh())


@pytest.mark.parametrize("joined", [2, 4])
def test_crops_that_are_joined_in_several_pieces_leave_their_layers_to_the_base(joined):
    """Where all are one piece each crop of an image is a sample."""
    crops, model = [points(3, 4) for _ in range(4)], Crops(joined)
    rows = torch.cat(crops)
    alone = copy.deepcopy(model)
    alone.joined = 1
    expected = oracle.directions(
        oracle.sample_gradients(alone, [lambda m, i=i: oracle.energy(m([rows[i : i + 1]])) for i in range(12)]), DAMPING
    )
    with recorded_warnings() as messages:
        optimizer = oracle.descend(model, lambda m: oracle.energy(m(crops)) / 12, damping=DAMPING)
    right = {matrix: each for matrix, each in expected.items() if matrix.weight in optimizer.curvature}
    assert oracle.error(model, right) <= 1e-10
    assert [PIECES in message for message in messages] == [True] * (joined == 2)
    assert set(optimizer.curvature) == ({"head.weight"} if joined == 2 else {"body.weight", "head.weight"})


def test_a_head_on_each_tensor_of_a_list_gets_the_same_samples():
    """As those of a detector on the maps of a pyramid, whose rows are as many as all of the list's together."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            seed_cpu(0)
            self.head = nn.Linear(4, 3).double()

        def forward(self, maps):
            return torch.stack([self.head(each) for each in maps], dim=1)

    maps, model = [points(3, 4) for _ in range(2)], Pyramid()
    losses = [lambda m, i=i: oracle.energy(m([each[i : i + 1] for each in maps])) for i in range(3)]
    expected = oracle.directions(oracle.sample_gradients(model, losses), DAMPING)
    oracle.descend(model, lambda m: oracle.energy(m(maps)) / 3, damping=DAMPING)
    assert oracle.error(model, expected) <= 1e-10


class Chunks(nn.Module):
    """A recurrent layer with a head, called chunk by chunk with the state of the last."""

    def __init__(self, kind):
        super().__init__()
        seed_cpu(0)
        self.recurrent, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)
        self.double()

    def forward(self, x, state=None):
        outputs, state = self.recurrent(x, state)
        return self.head(outputs), state


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_called_chunk_by_chunk_has_one_sample_a_sequence(kind):
    x = points(5, 6, 3)

    def run(m, which):
        state, outputs = None, []
        for chunk in x[which].split(2, dim=1):
            output, state = m(chunk, state)
            outputs.append(output)
        return oracle.energy(tuple(outputs))

    assert judge(run, 5, Chunks(kind)) <= 1e-10


class Doubled(torch.autograd.Function):
    """Twice its input; no function mode sees it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_calls_whose_first_function_nobody_sees_have_the_same_samples():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, given):
            return self.linear(Doubled.apply(given["x"][0]).tanh())

    def run(m, which):
        y = x[which]
        for _ in range(3):
            y = m({"x": [y]})
        return oracle.energy(y)

    x = points(5, 4)
    assert judge(run, 5, Block()) <= 1e-10


class Last(nn.Module):
    """A head on the last state of a recurrent layer, (1, B, H), or on (1, B, C) of its own making."""

    def __init__(self, *, recurrent):
        super().__init__()
        self.body = nn.LSTM(4, 3, batch_first=True) if recurrent else nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        if isinstance(self.body, nn.LSTM):
            return self.head(self.body(x)[1][0])[0]
        return self.head(self.body(x[:, 0]).tanh().unsqueeze(0))[0]


@pytest.mark.parametrize(("recurrent", "options"), [(True, {}), (True, {"batch_dim": 1}), (False, {})])
def test_a_batch_behind_a_dimension_of_one_leaves_its_layer_to_the_base(recurrent, options):
    x = points(5, 3, 4)
    left = named_layers(lambda m, which: oracle.energy(m(x[which])), Last(recurrent=recurrent), AXIS, **options)
    assert left == (set() if options else {"head.weight"})


@pytest.mark.parametrize("first", [nn.Linear(4, 3), nn.LSTM(4, 3, batch_first=True)])
def test_a_call_that_has_the_samples_of_the_one_before_elsewhere_leaves_its_layer_to_the_base(first):
    x = points(5, 2, 4)
    model = nn.ModuleDict({"first": copy.deepcopy(first), "then": nn.Linear(3, 2)}).double()

    def run(m, which):
        made = m["first"](x[which])
        made = made[0] if isinstance(made, tuple) else made
        return oracle.energy(m["then"](made.transpose(0, 1)))

    assert named_layers(run, model, AXIS) == {"then.weight"}


CHAINS = {
    "recurrent": (nn.LSTM(4, 3), False),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), False),
    "draws": (nn.Linear(4, 3), True),
    "table": (nn.Embedding(9, 4), False),
}


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("told", [False, True])
def test_layers_called_one_by_one_after_one_that_has_the_samples_elsewhere_go_to_the_base(kind, told):
    """Samples come second, of a sequence, or of several draws for each sample."""
    first, draws = CHAINS[kind]
    layers = {"first": copy.deepcopy(first), **({"then": nn.LSTM(4, 4)} if kind == "table" else {})}
    width = 3 if kind in ("recurrent", "draws") else 4
    heads = {"head1": nn.Linear(width, 5), "head2": nn.Linear(5, 4), "head3": nn.Linear(4, 2)}
    model = nn.ModuleDict({**layers, **heads}).double()
    x = torch.randint(9, (6, 5)) if kind == "table" else points(6, 5, 4)
    noise = points(6, 5, 3)

    def run(m, which):
        made = m["first"](x[0, which]) + noise[:, which] if draws else m["first"](x[:, which])
        made = m["then"](made) if "then" in m else made
        made = made[0] if isinstance(made, tuple) else made
        for name in heads:
            made = m[name](made).tanh()
        return oracle.energy(made)

    elsewhere = {"table": ["first"], "attention": ["first.linear1", "first.linear2"]}.get(kind, [])
    names = [*elsewhere, *heads]
    left = named_layers(run, model, AXIS, **({"batch_dim": dict.fromkeys(names, 1)} if told else {}))
    assert left == (set() if told else {f"{name}.weight" for name in names})


class Pair(nn.Module):
    """Both members of a pair go through one layer, the rows of the second in an order of their own."""

    def __init__(self, *, packed):
        super().__init__()
        seed_cpu(0)
        self.packed = packed
        self.layer = nn.LSTM(4, 3, batch_first=True) if packed else nn.Linear(4, 3)
        self.double()

    def encode(self, x, lengths):
        if not self.packed:
            order = lengths.argsort()
            return self.layer(x[order].tanh())[order.argsort()]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.layer(packed)[1][0][0]

    def forward(self, one, other, lengths):
        if self.packed:
            return self.encode(one, lengths) * self.encode(other, 7 - lengths)
        return self.layer(one) * self.encode(other, lengths)


@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_that_gets_the_batch_in_several_orders_goes_to_the_base(packed):
    x, lengths = points(2, 4, 6, 4), torch.tensor([3, 6, 2, 5])
    model = Pair(packed=packed)
    left = named_layers(lambda m, s: oracle.energy(m(x[0, s], x[1, s], lengths[s])), model, ORDER, 4)
    assert left == ({"layer.weight_ih_l0", "layer.weight_hh_l0"} if packed else {"layer.weight"})


def test_calls_on_packed_sequences_in_orders_of_their_own_leave_the_layer_to_the_base():
    x, lengths = points(2, 4, 6, 4), torch.tensor([3, 6, 2, 5])
    model = nn.ModuleDict({"one": Pair(packed=True), "head": nn.Linear(3, 2)}).double()
    model["one"].forward = model["one"].encode

    def run(m, s):
        return oracle.energy(m["head"](m["one"](x[0, s], lengths[s]) * m["one"](x[1, s], 7 - lengths[s])))

    assert named_layers(run, model, ORDER, 4) == {"one.layer.weight_ih_l0", "one.layer.weight_hh_l0"}


def test_rows_in_another_order_than_they_came_are_samples_all_the_same():
    """Where the layers behind get one order alone, and where an option tells what the samples are."""
    x, order = points(5, 4), torch.tensor([3, 0, 4, 1, 2])
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    gradients = oracle.energy_gradients(model, x)
    oracle.descend(model, lambda m: oracle.energy(m(x[order])) / 5, damping=DAMPING)
    assert oracle.error(model, oracle.directions(gradients, DAMPING)) <= 1e-10
    pair, lengths = Pair(packed=False), torch.tensor([3, 6, 2, 5])
    with recorded_warnings() as messages:
        optimizer = NGPlus(pair, lr=1e-3, damping=DAMPING, model_calls="joined")
        oracle.energy(pair(*points(2, 4, 6, 4), lengths)).backward()
        optimizer.step()
    assert messages == []


class Towers(nn.Module):
    """Two towers with one head, whose losses come apart."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.one, self.other, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x):
        return self.head(self.one(x).tanh()), self.head(self.other(x).tanh())


class Ahead(nn.Module):
    """Two predictions of one head, on a trunk that gets its gradient after theirs."""

    def __init__(self):
        super().__init__()
        seed_cpu(0)
        self.trunk, self.heads, self.head = (
            nn.Linear(4, 5),
            nn.ModuleList(nn.Linear(5, 5) for _ in "ab"),
            nn.Linear(5, 6),
        )
        self.double()

    def forward(self, x):
        self.made = self.trunk(x).tanh()
        self.detached = self.made.detach().requires_grad_()
        return [self.head(head(self.detached).tanh()) for head in self.heads]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("how", ["each", "retained", "each, from the last"])
@pytest.mark.parametrize("build", [Towers, Ahead])
def test_losses_of_one_call_may_have_backward_passes_of_their_own(build, how, pieces):
    """The uses by one sample are put together, and those in another call of the model are not."""
    model, x = build(), points(6, 4)
    whole = copy.deepcopy(model)

    def loss(m, rows):
        losses = [oracle.energy(y) / 6 for y in m(rows)]
        return losses[::-1] if how.endswith("last") else losses

    def gradients():
        found = []
        for row in x.split(1):
            whole.zero_grad()
            made = loss(whole, row)
            sum(made).backward()
            if isinstance(whole, Ahead):
                whole.made.backward(whole.detached.grad)
            found.append({name: 6 * p.grad.clone() for name, p in whole.named_parameters()})
        return found

    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, ema=0.5)
    for rows in x.chunk(pieces):
        for each in loss(model, rows):
            each.backward(retain_graph=how == "retained")
        if isinstance(model, Ahead):
            model.made.backward(model.detached.grad)
    with recorded_warnings() as messages:
        optimizer.step()
    assert messages == []
    samples = gradients()
    for name, state in optimizer.curvature.items():
        matrices = [torch.cat([g[name], g[name.replace("weight", "bias")].unsqueeze(1)], 1) for g in samples]
        expected = sum(G @ G.T if state.shape.side == "left" else G.T @ G for G in matrices) / 6
        torch.testing.assert_close(state.average[0][0], expected, rtol=1e-9, atol=1e-12)
    assert len(optimizer.curvature) == len(list(model.parameters())) // 2


class Chunked(nn.Module):
    """A cell that goes through a sequence in two chunks, each with a backward pass in the middle of the call."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 4).double()

    def forward(self, x):
        state = x.new_zeros(len(x), 4)
        for chunk in x.chunk(2, dim=1):
            state = state.detach()
            for each in chunk.unbind(1):
                state = self.cell(each, state)
            (oracle.energy(state) / len(x)).backward()


def test_backward_between_the_uses_of_one_call_leaves_their_layer_to_the_base():
    model = Chunked()
    optimizer = NGPlus(model, lr=1e-3, damping=DAMPING, update_every=1)
    with recorded_warnings() as messages:
        model(points(5, 4, 3))
        optimizer.step()
    (message,) = messages
    assert "cell.weight_ih" in message
    assert "cell.weight_hh" in message
    assert PASSES in message
    assert optimizer.curvature == {}


class Step(nn.Module):
    """A model that makes its own backward pass."""

    def __init__(self, made):
        super().__init__()
        self.layer, self.made = nn.Linear(4, 3).double(), made

    def forward(self, x):
        (sum(oracle.energy(self.layer(part)) for part in self.made(x)) / len(x)).backward()


@pytest.mark.parametrize(
    ("made", "reason"),
    [(lambda x: [x[:, 0]], None), (lambda x: x.chunk(2), PIECES), (lambda x: [x.transpose(0, 1)], AXIS)],
)
def test_doubts_are_known_where_a_model_makes_its_own_backward_pass(made, reason):
    model = Step(made)
    optimizer = NGPlus(model, lr=1e-3, damping=DAMPING, update_every=1)
    with recorded_warnings() as messages:
        model(points(6, 2, 4))
        optimizer.step()
    assert set(optimizer.curvature) == (set() if reason else {"layer.weight"})
    assert [reason in message for message in messages] == ([True] if reason else [])


class Reordered(nn.Module):
    """Both members of a pair go through one layer, the second in another order."""

    def __init__(self, reorder):
        super().__init__()
        seed_cpu(0)
        self.layer, self.reorder = nn.Linear(4, 3).double(), reorder

    def forward(self, one, other, order):
        back = torch.arange(len(order))
        made = self.layer(self.reorder(other, order))
        places = self.reorder(back, order)
        return self.layer(one) * made[places.argsort()]


REORDERINGS = {
    "a list": lambda x, order: x[order.tolist()],
    "an array": lambda x, order: x[order.numpy()],
    "by name": lambda x, order: x.index_select(dim=0, index=order),
    "a function by name": lambda x, order: torch.index_select(x, dim=0, index=order),
    "a negative dimension": lambda x, order: x.index_select(-x.dim(), order),
    "flip": lambda x, order: x.flip(0),
    "flip of several": lambda x, order: x.flip(dims=(0,)).tanh(),
    "flipud": lambda x, order: torch.flipud(x),
    "roll": lambda x, order: x.roll(1, 0),
    "roll by name": lambda x, order: torch.roll(x, shifts=(2,), dims=(-x.dim(),)),
    "gather": lambda x, order: x.gather(0, order.view(-1, *[1] * (x.dim() - 1)).expand_as(x)),
    "take_along_dim": lambda x, order: torch.take_along_dim(x, order.view(-1, *[1] * (x.dim() - 1)), dim=0),
}


@pytest.mark.parametrize("name", REORDERINGS)
def test_rows_are_followed_however_they_are_put_in_another_order(name):
    x, order, model = points(2, 4, 4), torch.tensor([1, 2, 3, 0]), Reordered(REORDERINGS[name])
    optimizer = NGPlus(model, lr=1e-3, damping=DAMPING, update_every=1)
    with recorded_warnings() as messages:
        oracle.energy(model(x[0], x[1], order)).backward()
        optimizer.step()
    assert [ORDER in message for message in messages] == [True]
    assert optimizer.curvature == {}


@pytest.mark.parametrize(
    "flip", [lambda x: x.flip(-1), lambda x: torch.roll(x, 1, 1), lambda x: x.roll((1, 2), (1, 2))]
)
def test_entries_of_a_row_in_another_order_are_no_other_rows(flip):
    model, x = Reordered(lambda x, order: flip(x) if x.dim() > 1 else x[order]), points(5, 6, 4)
    assert judge(lambda m, which: oracle.energy(m(x[which], x[which], torch.arange(len(x[which])))), 5, model) <= 1e-10


class Positions(nn.Module):
    """A language model whose table of positions, and prompts, are looked up once for the whole batch."""

    def __init__(self, shape):
        super().__init__()
        seed_cpu(0)
        self.tokens, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 4)
        self.prompts, self.shape = nn.Linear(4, 4), shape
        self.register_buffer("prompt", points(3, 4))
        self.register_buffer("place", torch.arange(6))
        self.double()

    def forward(self, tokens):
        length = tokens.shape[1]
        places = self.place[:length] if self.shape == "a buffer" else torch.arange(length)
        if self.shape == "each pair":
            places = (places[:, None] - places).abs()
        elif self.shape == "a batch of one":
            places = places.unsqueeze(0)
        elif self.shape == "expanded":
            places = places.expand(len(tokens), -1)
        found = self.positions(places)
        prompts = self.prompts(self.prompt[None] if self.shape == "a batch of one" else self.prompt)
        return self.head(self.tokens(tokens) + (found.sum(-2) if self.shape == "each pair" else found)).tanh() + (
            prompts.sum(-2) if prompts.dim() == 2 else prompts.sum(-2).unsqueeze(1)
        )


@pytest.mark.parametrize("fallback", ["vmap", "base"])
@pytest.mark.parametrize("shape", ["a sequence", "a buffer", "a batch of one", "each pair", "expanded"])
def test_what_is_looked_up_once_for_the_batch_is_one_sample(shape, fallback):
    """Its gradient is the batch's; where every sample looks it up they are samples all the same."""
    model, tokens = Positions(shape), torch.randint(7, (4, 5))
    whole = copy.deepcopy(model)
    oracle.energy(whole(tokens)).backward()
    optimizer = NGPlus(model, lr=1e-9, damping=DAMPING, update_every=1, ema=0.5, function_fallback=fallback)
    (oracle.energy(model(tokens)) / 4).backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert messages == []
    for layer, name in ((whole.positions, "positions.weight"), (whole.prompts, "prompts.weight")):
        G = layer.weight.grad / 4
        if name.startswith("prompts"):
            G = torch.cat([G, layer.bias.grad.unsqueeze(1) / 4], 1)
        state = optimizer.curvature[name]
        expected = G @ G.T if state.shape.side == "left" else G.T @ G
        if shape == "expanded" and name.startswith("positions"):
            samples = oracle.sample_gradients(whole, oracle.sample_losses(tokens))
            expected = sum((G.mT @ G)[0] for each, s in samples.items() if each.weight == name for G in s) / 4
        torch.testing.assert_close(state.average[0][0], expected, rtol=1e-9, atol=1e-12)
