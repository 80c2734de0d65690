"""Weights in functions that no handler reads: each sample's gradient comes from differentiating the function again."""

import copy
import math
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplus import NGPlus
from ngplus.baselines import KFAC, SENG
from ngplus.curvature.second_moment import second_moment
from ngplus.factors.dense import Dense
from ngplus.factors.formed import Formed, pair_formed
from ngplus.factors.pair import FactorPair, sample_long_side
from ngplus.layers import MatrixShape
from tests.ngplus import oracle
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import points, recorded_warnings, seed_cpu
from tests.ngplus.test_contractions import Product


def standardize(weight):
    """Zero mean and unit variance for each output channel, as in weight standardisation."""
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


def add_in_place(x, w):
    x = x * 1
    x += w
    return x


def attend(m, x):
    return F.scaled_dot_product_attention(m.w.expand(len(x), -1, -1), x, x)


def attend_to_both(m, x):
    return F.scaled_dot_product_attention(x, *(each.expand(len(x), -1, -1) for each in (m.w, m.v)))


def multiply_by_both(m, x):
    return torch.baddbmm(x.new_ones(()), x.expand(2, *x.shape), torch.stack([m.w, m.v])).movedim(0, 1)


# Shape of the input, shapes of parameters, the function.
FUNCTIONS = {
    "positions": ((3, 2, 4), {"w": (1, 2, 5)}, lambda m, x: x + m.w),
    "positions added in place": ((3, 2, 4), {"w": (2, 5)}, lambda m, x: add_in_place(x, m.w)),
    "some positions": ((3, 2, 4), {"w": (3, 5)}, lambda m, x: x + m.w[torch.tensor([0, 2])]),
    "a part of the positions": ((3, 2, 4), {"w": (3, 5)}, lambda m, x: x + m.w[:2].unsqueeze(0)),
    "relative positions": ((3, 2, 4), {"w": (2, 3)}, lambda m, x: x @ x.mT + m.w[:, [[0, 1], [2, 0]]].sum(0)),
    "decay": ((3, 4), {"w": (2, 5)}, lambda m, x: torch.exp(-m.w.exp()[None] * x.unsqueeze(1))),
    "cosines": ((3, 2, 4), {"w": (6, 5)}, lambda m, x: F.linear(x, F.normalize(m.w, dim=1))),
    "sorted columns": ((3, 2, 4), {"w": (6, 5)}, lambda m, x: F.linear(x, m.w.sort(dim=0).values)),
    "a product of two": ((3, 2, 4), {"w": (5, 2), "v": (2, 6)}, lambda m, x: x @ (m.w @ m.v)),
    "both halves of a split": ((3, 4), {"w": (10, 5)}, lambda m, x: F.linear(x, m.w.exp().chunk(2)[1])),
    "distances": ((3, 2, 4), {"w": (6, 5)}, lambda m, x: torch.cdist(x, m.w)),
    "distances to copies": ((3, 2, 4), {"w": (6, 5)}, lambda m, x: torch.cdist(x, m.w.expand(len(x), -1, -1))),
    "distances to a stack": ((3, 2, 4), {"w": (6, 5)}, lambda m, x: torch.cdist(x, torch.stack([m.w] * len(x)))),
    "several models": ((3, 4), {"w": (5, 6), "v": (5, 6)}, multiply_by_both),
    "as many models as samples": ((2, 4), {"w": (5, 6), "v": (5, 6)}, multiply_by_both),
    "bilinear": ((3, 2, 4), {"w": (3, 5, 5)}, lambda m, x: F.bilinear(x, x.tanh(), m.w)),
    "a query for each": ((3, 2, 4), {"w": (2, 5)}, attend),
    "keys and values for all": ((3, 2, 4), {"w": (6, 5), "v": (6, 5)}, attend_to_both),
    "a spectrum": (
        (3, 4),
        {"w": (2, 5)},
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x[:, None]) * torch.fft.rfft(m.w)),
    ),
    "a query by a layer": ((3, 2, 4), {"w": (2, 4)}, lambda m, x: m.inlet(m.w.expand(len(x), -1, -1)) * x),
    "used twice": ((3, 2, 4), {"w": (2, 5)}, lambda m, x: (x + m.w).tanh() * m.w),
    "used both ways": ((3, 2, 4), {"w": (5, 5)}, lambda m, x: (x @ m.w).tanh() @ m.w.exp()),
    "a bias added by hand": ((3, 4), {}, lambda m, x: F.linear(x, m.inlet.weight.mT) + m.inlet.bias.mean()),
    "a norm added to outputs": ((3, 4), {}, lambda m, x: x + m.inlet.weight.norm()),
    "a bias used once more": ((3, 4), {}, lambda m, x: x + m.inlet.bias.exp()),
    "a scaled addmm": ((3, 4), {"w": (5, 6)}, lambda m, x: torch.addmm(x[:, :1], x, m.w, alpha=2)),
    "a convolution of a bare kernel": ((3, 5, 4), {"w": (6, 5, 2)}, lambda m, x: F.conv1d(x, m.w)),
    "of two dimensions": ((3, 5, 6, 4), {"w": (6, 5, 2, 3)}, lambda m, x: F.conv2d(x, m.w, stride=2, padding=1)),
    "of three": ((3, 2, 4, 3, 4), {"w": (5, 2, 2, 3, 2)}, lambda m, x: F.conv3d(x, m.w)),
    "one in groups": ((3, 6, 5, 4), {"w": (4, 3, 2, 2)}, lambda m, x: F.conv2d(x, m.w, groups=2)),
    "one of each channel": ((3, 6, 5, 4), {"w": (6, 1, 3, 2)}, lambda m, x: F.conv2d(x, m.w, groups=6)),
    "one of one channel": ((3, 1, 5, 4), {"w": (1, 1, 2, 3)}, lambda m, x: F.conv2d(x, m.w)),
    "a transposed convolution": ((3, 5, 3, 4), {"w": (5, 6, 2, 3)}, lambda m, x: F.conv_transpose2d(x, m.w, stride=2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_weight_in_any_function_matches_the_oracle(name):
    shape, shapes, function = FUNCTIONS[name]
    optimizer = oracle.check(Product(function, **shapes), points(*shape))
    assert set(optimizer.curvature) == {"inlet.weight", *shapes}


def test_copies_of_a_weight_for_samples_that_are_one_go_to_the_base_with_a_warning():
    """A convolution whose groups are the samples: its output has one sample, and a copy of the kernel for each."""

    def fold(m, x):
        return F.conv1d(x.flatten(0, 1)[None], m.w.repeat(len(x), 1, 1), groups=len(x)).unflatten(1, (len(x), -1))[0]

    model, x = Product(fold, w=(6, 2, 2)), points(3, 2, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.batch_loss(x)(model).backward()
    with pytest.warns(UserWarning, match=r"^w is used by conv1d, where a single sample's gradient cannot be captured"):
        optimizer.step()
    assert set(optimizer.curvature) == {"inlet.weight"}


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, standardize(self.weight), self.bias, self.stride, self.padding)


@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"max_samples": 2}, {"solver": "low_rank"}])
def test_a_standardized_convolution_matches_the_oracle_with_its_bias(options):
    seed_cpu(0)
    optimizer = oracle.check(Standardized(2, 3, 3, padding=1).double(), points(3, 2, 4, 4), **options)
    assert list(optimizer.curvature) == ["weight"]


@pytest.mark.parametrize("rows", [2, 7])
def test_sketched_columns_of_formed_gradients_are_those_of_factors(rows):
    shape, outside, inside = MatrixShape(groups=1, rows=rows, columns=5), points(6, 1, rows, 3), points(6, 1, 5, 3)
    gradients = outside @ inside.mT
    formed = Formed(lambda at: gradients[at[:, 0]], torch.arange(6).unsqueeze(1), (1, rows, 5), torch.float64)
    sampled = torch.tensor([1, 0, 1, 4])
    pairs = [FactorPair(Dense(outside), Dense(inside)), pair_formed(formed)]
    (expected,), (found,) = (second_moment(shape, [sample_long_side(shape, pair, sampled)]) for pair in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (both,), (twice,) = second_moment(shape, pairs), second_moment(shape, [pairs[0], pairs[0]])
    torch.testing.assert_close(both, twice, rtol=1e-12, atol=1e-12)


def test_micro_batches_are_one_batch():
    model, x = Product(lambda m, x: x + m.w, w=(2, 5)), points(4, 2, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    for part in x.split(2):
        (oracle.energy(model(part)) / 4).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


@pytest.mark.parametrize("retain", [False, True])
def test_two_losses_through_one_graph(retain):
    model, x = Product(lambda m, x: (x * m.w).tanh(), w=(2, 5)), points(3, 2, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    out = model(x)
    losses = [out.sin().sum() / 3, 0.5 * out.square().sum() / 3]
    if retain:
        losses[0].backward(retain_graph=True)
        losses[1].backward()
    else:
        sum(losses).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


def test_inputs_are_released_in_the_backward_pass_though_the_loss_is_kept():
    model, inputs = Product(lambda m, x: remember(x) + m.w, w=(2, 5)), []

    def remember(x):
        inputs.append(weakref.ref(x := x * 1))
        return x

    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    loss = oracle.batch_loss(points(3, 2, 4))(model)
    assert inputs[0]() is not None
    loss.backward()
    assert inputs[0]() is None
    optimizer.step()
    assert "w" in optimizer.curvature


def test_calls_on_several_threads_do_not_mix():
    model, x = Product(lambda m, x: F.linear(x, m.w.exp()), w=(6, 5)), points(8, 2, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda part: oracle.energy(model(part)) / 8, x.split(2)))
    sum(losses).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


def test_rows_are_grouped_by_the_index_that_the_user_gives():
    model, x = Product(lambda m, x: torch.cdist(x, m.w), w=(6, 5)), points(5, 4)
    index = torch.tensor([0, 1, 0, 2, 1])
    samples = [x[index == i] for i in range(3)]
    gradients = oracle.sample_gradients(model, [lambda m, s=s: oracle.energy(m(s)) for s in samples])
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = index
    (oracle.energy(model(x)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


def test_an_index_of_every_position_names_the_sample_of_each_element():
    """As for padded sentences: positions of the batch have no gradient of their own here, elements have."""
    model, x = Product(lambda m, x: x + m.w, w=(2, 5)), points(3, 2, 4)
    expected = oracle.directions(oracle.energy_gradients(model, x), 0.3)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    optimizer.sample_index = torch.tensor([[0, 0], [1, 1], [2, 2]])
    (oracle.energy(model(x)) / 3).backward()
    optimizer.step()
    assert oracle.error(model, expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_statistics_are_of_full_precision(dtype):
    """W of float32, its function computed in bfloat16: the direction is within bfloat16's rounding of float64's."""
    model = Product(lambda m, x: F.linear(x, m.w.exp() / 3), w=(6, 5)).float()
    x = points(4, 2, 4, dtype=torch.float32)
    expected = oracle.directions(oracle.energy_gradients(model, x.double()), 0.3)

    def loss(m):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = m(x)
        return oracle.energy(out.float()) / 4

    optimizer = oracle.descend(model, loss, damping=0.3)
    assert "w" in optimizer.curvature
    assert oracle.error(model, expected) <= (1e-4 if dtype == torch.float32 else 0.3)


# Parametrizations -----------------------------------------------------------------------------------------------------


def old(norm, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: it is deprecated
        return norm(layer)


NORMED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm, old": lambda layer: old(nn.utils.weight_norm, layer),
    "spectral_norm, old": lambda layer: old(nn.utils.spectral_norm, layer),
    "weight_norm of all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "orthogonal": lambda layer: nn.utils.parametrizations.orthogonal(layer, use_trivialization=False),
}


@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 5), lambda: nn.Conv1d(2, 3, 2)])
@pytest.mark.parametrize("norm", [norm for norm in NORMED if norm != "weight_norm, old"])  # it cannot be copied
def test_what_a_parametrization_trains_has_the_gradients_of_single_samples(norm, layer):
    """In evaluation, where the power iteration of spectral_norm stands still."""
    seed_cpu(0)
    model = nn.Sequential(NORMED[norm](layer().double()), nn.Tanh()).double().eval()
    optimizer = oracle.check(model, points(3, 2, 4))
    assert len(optimizer.curvature) == 1


@pytest.mark.parametrize("norm", NORMED)
def test_parametrized_layers_train_without_a_warning(norm):
    seed_cpu(0)
    model = nn.Sequential(NORMED[norm](nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))
    optimizer, x = NGPlus(model, lr=0.05, damping=1.0, update_every=2), points(8, 4, dtype=torch.float32)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :2]).square().sum() / 8
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(optimizer.curvature) == 2
    assert losses[-1] < losses[0]


class Windowed(Product):
    """A table of positions that is looked up by a buffer, which is a view of another tensor."""

    def __init__(self):
        super().__init__(lambda m, x: x @ x.mT + m.w[m.places].view(2, 2, 3).mean(2), w=(3, 3))
        self.register_buffer("places", torch.tensor([[0, 1], [2, 0]]).flatten())


def test_a_table_that_is_looked_up_by_a_view_matches_the_oracle():
    model = Windowed()
    assert model.places._base is not None
    assert "w" in oracle.check(model, points(3, 2, 4)).curvature


# Where it cannot be --------------------------------------------------------------------------------------------------


def change_in_place(m, x):
    w = m.w.clone()
    w[0] = 0.0
    return x @ w


MIXING = {
    "a norm over the batch": ((6, 5), lambda m, x: F.layer_norm(x.T, x.T.shape, m.w.T).T),
    "a weight changed in place": ((5, 5), change_in_place),
    "dropout of a weight": ((5, 5), lambda m, x: x @ F.dropout(m.w, 0.5)),
    "a sparse input": ((5, 5), lambda m, x: torch.sparse.mm(x.to_sparse(), m.w)),
    "two outputs": ((5, 5), lambda m, x: torch.ops.aten.native_layer_norm(x, (5,), m.w[0], None, 1e-5)[0]),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_cannot_be_differentiated_sample_by_sample_goes_to_the_base_with_one_warning(name):
    shape, function = MIXING[name]
    model, x = Product(function, w=shape), points(6, 4)
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.energy(model(x)).backward()
    before = model.w.grad.clone()
    with pytest.warns(UserWarning, match=r"^w .*goes to SGD untouched") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert set(optimizer.curvature) == {"inlet.weight"}
    assert torch.equal(model.w.grad, before)


def test_the_option_turns_it_off():
    model, x = Product(lambda m, x: torch.cdist(x, m.w) + m.inlet.weight.norm(), w=(6, 5)), points(3, 4)
    with pytest.warns(UserWarning, match=r"does not precondition w \(Product\): .* it goes"):
        optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1, function_fallback="base")
    oracle.energy(model(x)).backward()
    with pytest.warns(UserWarning, match=r"inlet\.weight is used by .*norm.*, where a single sample's gradient"):
        optimizer.step()
    assert not optimizer.curvature


@pytest.mark.parametrize("kind", [KFAC, SENG])
def test_baselines_need_factors_and_leave_other_functions_to_the_base(kind):
    model, x = Product(lambda m, x: torch.cdist(x, m.w) + m.inlet.weight.norm(), w=(6, 5)), points(3, 4)
    with pytest.warns(UserWarning, match=r"does not precondition w \(Product\): .* it goes"):
        optimizer = kind(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.energy(model(x)).backward()
    with pytest.warns(UserWarning, match=r"inlet\.weight is used by .*norm"):
        optimizer.step()
    assert not optimizer.curvature


def test_vectors_go_to_the_base_without_a_warning(recwarn):
    """A class token, a scale for each channel: at most one dimension is of another size than one."""
    model = Product(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x * m.scale], 1), token=(1, 1, 5), scale=(5,)
    )
    optimizer = NGPlus(model, lr=1e-9, damping=0.3, update_every=1)
    oracle.energy(model(points(3, 2, 4))).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"inlet.weight"}
    assert not recwarn.list


@pytest.mark.parametrize("function", [lambda m, x: x + m.w, lambda m, x: F.linear(x, m.w.tanh())])
def test_a_curvature_step_takes_at_most_half_as_much_memory_again_as_sgds(function):
    seed_cpu(0)
    model = nn.Sequential(nn.Linear(64, 64), Wide(function), nn.Linear(64, 64))
    x = torch.randn(512, 64, 64)

    def run(optimizer):
        def step():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return peak_elements(step)

    plain = run(torch.optim.SGD(model.parameters(), lr=1e-9))
    ours = run(NGPlus(model, lr=1e-9, damping=1.0, update_every=1))
    assert ours <= 1.5 * plain


class Wide(nn.Module):
    """A square weight in a function, behind a nonlinearity."""

    def __init__(self, function):
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(64, 64)), function

    def forward(self, x):
        return self.function(self, x.tanh()).tanh()


# Saved states, and the eigenbasis -----------------------------------------------------------------------------------


def test_a_state_saved_without_these_layers_loads_and_names_them():
    """As one does that was saved before they were preconditioned."""
    model, x = Product(lambda m, x: x + m.w, w=(2, 5)), points(3, 2, 4)

    def make(**options):
        return NGPlus(model, lr=1e-9, damping=0.3, update_every=1, **options)

    with pytest.warns(UserWarning, match="does not precondition"):
        old = make(function_fallback="base")
    oracle.batch_loss(x)(model).backward()
    old.step()
    new = make()
    with pytest.warns(UserWarning, match=r"the state says nothing of w: without curvature"):
        new.load_state_dict(old.state_dict())
    assert set(new.curvature) == {"inlet.weight"}
    new.zero_grad()
    oracle.batch_loss(x)(model).backward()
    new.step()
    assert set(new.curvature) == {"inlet.weight", "w"}


def test_the_curvature_of_bare_parameters_is_saved_and_loaded_to_the_bit():
    model, x = Product(lambda m, x: torch.bmm(x, m.w) * m.v, w=(2, 5, 6), v=(1, 3, 6)), points(2, 3, 4)

    def make():
        return NGPlus(model, lr=0.0, damping=0.3, update_every=2, batch_dim=1)

    first = make()
    oracle.batch_loss(x, batch_dim=1)(model).backward()
    first.step()
    second = make()
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        model.zero_grad()
        oracle.batch_loss(x.cos(), batch_dim=1)(model).backward()
        optimizer.step()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        if optimizer is first:
            expected = found
    assert set(second.curvature) == {"inlet.weight", "w", "v"}
    assert all(torch.equal(*both) for both in zip(expected, found, strict=True))


def test_in_the_eigenbasis_bare_parameters_go_to_the_base_and_standardized_layers_do_not():
    model = nn.Sequential(Standardized(2, 3, 3, padding=1), Product(lambda m, x: x + m.w, w=(4, 5))).double()
    with pytest.warns(UserWarning, match=r"does not precondition 1\.w \(Product\): basis='eigen'"):
        optimizer = NGPlus(model, base=torch.optim.Adam, lr=1e-3, damping=1.0, update_every=1, basis="eigen")
    oracle.batch_loss(points(3, 2, 4, 4))(model).backward()
    optimizer.step()
    assert set(optimizer.curvature) == {"0.weight", "1.inlet.weight"}


# Attention ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries, keys and values by one layer, and attention between heads by a function of torch."""

    def __init__(self, attend):
        super().__init__()
        seed_cpu(0)
        self.inside, self.outside, self.attend = nn.Linear(8, 24), nn.Linear(8, 8), attend

    def forward(self, x):
        q, k, v = self.inside(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.outside(self.attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}])
def test_projections_around_attention_match_the_oracle(options):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    oracle.check(Attention(attend).double(), points(3, 5, 8))


def test_a_function_of_a_weight_that_is_not_differentiated_is_the_reason_also_beside_a_bias():
    """Fake quantization, which ``torch.func.vmap`` does not know."""

    class Quantized(nn.Linear):
        def forward(self, x):
            return F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight, 0.1, 0, -128, 127), self.bias)

    model = Quantized(4, 3)
    optimizer = NGPlus(model, lr=1e-3, damping=0.3, update_every=1)
    oracle.energy(model(torch.randn(5, 4))).backward()
    with recorded_warnings() as messages:
        optimizer.step()
    assert ["weight is used by linear" in message for message in messages] == [True]


# What a function changes besides what it returns ---------------------------------------------------------------------


class Prototypes(nn.Module):
    """A norm whose running statistics are those of what is learned."""

    def __init__(self, norm):
        super().__init__()
        seed_cpu(0)
        self.inlet, self.norm = nn.Linear(4, 5), norm
        self.w = nn.Parameter(torch.randn(7, 5))
        self.double()

    def forward(self, x):
        w = self.norm(self.w.mT[None])[0].mT if isinstance(self.norm, nn.InstanceNorm1d) else self.norm(self.w)
        return F.linear(self.inlet(x), w)


NORMS = {
    "batch": lambda: nn.BatchNorm1d(5, momentum=0.3),
    "batch, their mean": lambda: nn.BatchNorm1d(5, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(5, track_running_stats=True, affine=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_of_weights_are_updated_once_a_step(name, training):
    model, x = Prototypes(NORMS[name]()), points(6, 4)
    model.train(training)
    expected = oracle.directions(oracle.energy_gradients(copy.deepcopy(model), x), 0.3)
    plain = copy.deepcopy(model)
    oracle.energy(plain(x)).backward()
    oracle.descend(model, oracle.batch_loss(x), damping=0.3)
    assert oracle.error(model, expected) <= 1e-10
    assert all(map(torch.equal, model.norm.buffers(), plain.norm.buffers()))


class FakeQuantized(nn.Linear):
    """As layers that are trained for quantization: the range of the weight is averaged over the steps."""

    def __init__(self, m, n):
        super().__init__(n, m)
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))

    def forward(self, x):
        on = torch.ones(1, dtype=torch.long)
        weight = torch.fused_moving_avg_obs_fake_quant(
            self.weight, on, on, self.low, self.high, self.scale, self.zero_point, 0.3, -128, 127, 0
        )
        return F.linear(x, weight, self.bias)


def test_a_function_that_changes_its_arguments_is_not_run_again():
    seed_cpu(0)
    model, x = nn.Sequential(nn.Linear(4, 5), FakeQuantized(3, 5)), points(6, 4, dtype=torch.float32)
    plain = copy.deepcopy(model)
    for each in (plain, model):
        optimizer = NGPlus(each, lr=1e-9, damping=0.3, update_every=1) if each is model else None
        for _ in range(2):
            each.zero_grad()
            oracle.energy(each(x)).backward()
            with recorded_warnings() as caught:
                _ = optimizer and optimizer.step()
            with torch.no_grad():
                each[1].weight.mul_(1.5)
    assert set(optimizer.curvature) == {"0.weight"}
    assert not caught  # the second time
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


class Cosines(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(F.normalize(x, dim=1), F.normalize(self.w, dim=1))


ON_ROWS = {
    "cosines": Cosines,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "a layer": lambda: nn.Linear(4, 3),
}


class Routed(nn.Module):
    def __init__(self, make):
        super().__init__()
        seed_cpu(0)
        self.inlet, self.experts = nn.Linear(4, 4), nn.ModuleList(make() for _ in range(2))
        self.double()

    def forward(self, x):
        hidden = self.inlet(x)
        out = hidden.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = torch.full((len(x),), number == 0)  # all go to the first
            out = out.index_put((rows,), expert(hidden[rows]))
        return out


@pytest.mark.parametrize("name", ON_ROWS)
def test_an_expert_without_rows_is_no_error(name):
    model, x = Routed(ON_ROWS[name]), points(5, 4)
    losses = oracle.sample_losses(x)
    expected = oracle.directions(oracle.sample_gradients(model, losses), 0.3)
    optimizer = oracle.descend(model, oracle.batch_loss(x), damping=0.3)
    used = {matrix: each for matrix, each in expected.items() if not matrix.weight.startswith("experts.1")}
    assert oracle.error(model, used) <= 1e-10
    assert not any(key.startswith("experts.1") for key in optimizer.curvature)
    optimizer.zero_grad()
    oracle.energy(model(x[:0])).backward()  # and a batch of none
    optimizer.step()


# Noise and constants on weights --------------------------------------------------------------------------------------


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Noisy(nn.Module):
    """W = μ + σ ∘ ε, as in noisy networks and variational layers: with as many outputs as samples, or not."""

    def __init__(self, make):
        super().__init__()
        seed_cpu(0)
        self.mu = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        self.sigma = nn.Parameter(torch.full((4, 5), 0.5, dtype=torch.float64))
        self.kept, self.several, self.named = drawn(4, 5), [drawn(4, 5)], {"noise": drawn(4, 5)}
        self.parts = drawn(4), drawn(5)
        self.make = make

    def forward(self, x):
        return F.linear(x, self.make(self))


def rescaled(m):
    """Noise whose scale is a vector, which is no layer of its own."""
    return m.mu + m.sigma.detach()[:, :1] * drawn(4, 5)


def normal(m):
    torch.manual_seed(3)
    return torch.distributions.Normal(m.mu, m.sigma).rsample()


NOISES = {
    "an attribute": lambda m: m.mu + m.sigma * m.kept,
    "in a list": lambda m: m.mu + m.sigma * m.several[0],
    "in a dict": lambda m: m.mu + m.sigma * m.named["noise"],
    "factorised": lambda m: m.mu + m.sigma * torch.outer(*m.parts),
    "drawn": lambda m: m.mu + m.sigma * drawn(4, 5),
    "in its memory": lambda m: m.mu + m.sigma * torch.empty(4, 5).double().normal_(generator=torch.Generator()),
    "a mask": lambda m: m.mu * (drawn(4, 5) > 0) + m.sigma * (drawn(4, 1) < 0),
    "scaled by a vector": rescaled,
    "a distribution": normal,
}


@pytest.mark.parametrize("samples", [4, 6])
@pytest.mark.parametrize("name", NOISES)
def test_noise_on_weights_is_no_batch(name, samples):
    model, x = Noisy(NOISES[name]), points(samples, 5)
    gradients = {m: g for m, g in oracle.energy_gradients(model, x).items() if any(each.any() for each in g)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracle.descend(model, oracle.batch_loss(x), damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10


class Codes(nn.Module):
    """Codes that are drawn in ``forward``, or kept by the module, are samples; positions are added to each."""

    def __init__(self, kept):
        super().__init__()
        seed_cpu(0)
        self.codes, self.kept = drawn(4, 3, 5), kept
        self.positions, self.scale = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
        self.inlet, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, which):
        codes = (self.codes if self.kept else drawn(4, 3, 5))[which]
        hidden = codes * self.scale + self.positions
        return self.head((self.inlet(hidden).tanh() + self.inlet(codes)).sin())


@pytest.mark.parametrize("kept", [False, True])
def test_codes_that_a_model_draws_or_keeps_are_samples(kept):
    model = Codes(kept)
    gradients = oracle.sample_gradients(model, [lambda m, i=i: oracle.energy(m(slice(i, i + 1))) for i in range(4)])
    oracle.descend(model, lambda m: oracle.energy(m(slice(None))) / 4, damping=0.3)
    assert oracle.error(model, oracle.directions(gradients, 0.3)) <= 1e-10
