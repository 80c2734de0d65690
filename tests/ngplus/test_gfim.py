"""Every way to L or R gives the same matrix, in chunks too, and the cheapest way is taken."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ngplus import NGPlus
from ngplus.capture.function_mode import FunctionCall
from ngplus.capture.op_handlers import parse_call
from ngplus.curvature import second_moment as module
from ngplus.curvature.second_moment import cheapest_way, drop_tiny, second_moment
from ngplus.factors.dense import Dense
from ngplus.factors.im2col import Patches
from ngplus.factors.pair import FactorPair, flatten_positions
from ngplus.factors.sketch import Sampled
from ngplus.layers import MatrixShape, find_layers
from ngplus.tuning import Tuning
from tests.ngplus import oracle
from tests.ngplus.allocations import peak_elements
from tests.ngplus.cases import seed_cpu


@pytest.fixture
def ways(monkeypatch):
    """The ways that are taken, in order."""
    taken = []
    choose = module.cheapest_way

    def recorded(*args, **kwargs):
        taken.append(choose(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(module, "cheapest_way", recorded)
    return taken


@pytest.fixture(params=["whole", "a sample at a time", "uneven chunks"])
def chunked(request, set_tuning):
    size = {"whole": 2**24, "a sample at a time": 1, "uneven chunks": 700}[request.param]
    set_tuning(curvature_chunk_cpu=size)


def conv(*args, **options):
    seed_cpu(0)
    return nn.Conv2d(*args, **options).double()


def image(*shape):
    return torch.randn(shape, dtype=torch.float64)


CASES = {
    "scaled": lambda: (nn.Linear(6, 9).double(), image(5, 6)),
    "scaled, left": lambda: (nn.Linear(9, 3).double(), image(5, 9)),
    "gram": lambda: (nn.Linear(20, 30).double(), image(5, 3, 20)),
    "gram, left": lambda: (nn.Linear(30, 20).double(), image(5, 3, 30)),
    "gram, groups": lambda: (conv(12, 16, 3, groups=2), image(5, 12, 4, 4)),
    "gram, shifted": lambda: (conv(8, 12, 3, padding=1), image(5, 8, 3, 3)),
    "gram, shifted, dilation": lambda: (conv(8, 12, 3, stride=(1, 2), padding=2, dilation=2), image(5, 8, 3, 3)),
    "direct": lambda: (nn.Linear(4, 3).double(), image(5, 30, 4)),
    "direct, right": lambda: (nn.Linear(3, 7).double(), image(5, 30, 3)),
    "direct, groups": lambda: (conv(4, 6, 3, groups=2), image(5, 4, 9, 9)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_same_matrix_in_chunks_too(case, ways, chunked):
    model, x = CASES[case]()
    oracle.check(model, x)
    assert set(ways) == {case.partition(",")[0]}


@pytest.mark.parametrize("case", [case for case in CASES if "shifted" in case])
def test_gram_matrix_of_patches_is_summed_from_shifted_products_where_that_is_cheaper(case, monkeypatch):
    calls = []
    shifted = Patches._shifted_gram
    monkeypatch.setattr(Patches, "_shifted_gram", lambda self: calls.append(1) or shifted(self))
    model, x = CASES[case]()
    oracle.check(model, x)
    assert calls


LARGE = {
    "conv1d": (nn.Conv1d(3, 7, 5, stride=2, padding=3), (3, 3, 57)),
    "conv1d, one long signal": (nn.Conv1d(2, 3, 4, dilation=3), (1, 2, 211)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (2, 3, 11, 13)),
    "conv2d, right": (nn.Conv2d(1, 12, 3, stride=(2, 1), padding="valid", bias=False), (2, 1, 15, 9)),
    "conv2d, reflected": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 9, 7)),
    "conv2d, one pixel": (nn.Conv2d(5, 4, 1), (2, 5, 9, 7)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (1, 2, 5, 7, 6)),
    "conv3d, same": (nn.Conv3d(2, 3, (2, 3, 1), padding="same", dilation=(1, 2, 1)), (2, 2, 5, 4, 6)),
    "conv3d, more zeros than pixels": (nn.Conv3d(1, 2, 2, stride=2, padding=3), (2, 1, 2, 3, 1)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 7, 5)),
    "depthwise": (nn.Conv2d(5, 5, 3, groups=5, padding=1), (3, 5, 7, 9)),
    "linear": (nn.Linear(4, 3), (2, 61, 4)),
    "linear of two dimensions of positions": (nn.Linear(3, 5, bias=False), (2, 7, 9, 3)),
}


def statistics(model, x, **options):
    """L or R of every layer, by one curvature step."""
    for parameter in model.parameters():
        parameter.grad = None
    optimizer = NGPlus(model, lr=0.0001, damping=1.0, solver="dense", ema=0.5, **options)
    model(x).tanh().sum(dim=-1).square().mean().backward()
    sums = optimizer._recorder.collect()
    optimizer._recorder.disarm()
    return [stack for statistic in sums.values() for stack in statistic.moments]


@pytest.mark.parametrize("limit", [1, 97, 1000])
@pytest.mark.parametrize(
    "options",
    [{}, {"samples": "rows"}, {"block_size": 2}, {"max_samples": 1}, {"samples": "rows", "max_samples": 43}],
    ids=str,
)
@pytest.mark.parametrize("case", LARGE)
def test_chunks_of_positions_add_up_to_the_whole(case, options, limit, set_tuning):
    seed_cpu(0)
    model, shape = LARGE[case]
    model, x = model.double(), torch.randn(shape, dtype=torch.float64)
    set_tuning(curvature_chunk_cpu=2**30)
    whole = statistics(model, x, **options)
    set_tuning(curvature_chunk_cpu=limit)
    chunked = statistics(model, x, **options)
    assert whole
    for ours, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("limit", [1, 300, 2**30])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("case", LARGE)
def test_uninitialized_memory_never_enters_the_matrix(case, samples, limit, set_tuning):
    set_tuning(curvature_chunk_cpu=limit)
    model, shape = LARGE[case]
    model, x = model.double(), torch.randn(shape, dtype=torch.float64)
    expected = statistics(model, x, samples=samples)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1, dtype=torch.float64).isnan()
        found = statistics(model, x, samples=samples)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("limit", [1, 100])
def test_chunks_of_positions_of_sampled_columns_and_of_several_uses(limit, monkeypatch):
    seed_cpu(0)
    shape = MatrixShape(groups=2, rows=4, columns=19)
    images = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    uses = [
        FactorPair(
            Dense(torch.randn(3, 2, 4, patches.positions, dtype=torch.float64)),
            Sampled(patches, torch.randint(19, (11,)), 1.5),
        )
        for patches in (
            Patches(images, (3, 3), (1, 1), (1, 1), ((1, 1), (0, 0)), 2, 1.0),
            Patches(images[..., :5], (3, 3), (2, 1), (1, 1), ((0, 2), (1, 1)), 2, 0.0),
        )
    ]
    sampled = MatrixShape(groups=2, rows=4, columns=11)
    whole = sum(use.rows.dense() @ use.columns.dense().mT for use in uses)
    monkeypatch.setattr(module, "cheapest_way", lambda *_, **__: "direct")
    for each in (shape, sampled):
        (ours,) = second_moment(each, uses, Tuning(curvature_chunk_cpu=limit))
        torch.testing.assert_close(ours, (whole @ whole.mT).sum(dim=0), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("case", ["conv1d", "conv2d", "conv3d", "depthwise", "right", "linear", "head", "embedding"])
def test_temporaries_have_no_more_elements_than_a_few_chunks_and_weights(case, rows):
    """However large a sample is: the largest of these, unfolded, is 60 times as large as what is allowed."""
    limit = 2**13
    layer, x = {
        "conv1d": lambda: (nn.Conv1d(8, 8, 9, padding=4), torch.randn(2, 8, 6001)),
        "conv2d": lambda: (nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 81, 79)),
        "conv3d": lambda: (nn.Conv3d(8, 8, 3, padding=1), torch.randn(1, 8, 19, 23, 21)),
        "depthwise": lambda: (nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.randn(2, 16, 63, 65)),
        "right": lambda: (nn.Conv2d(1, 32, 3, padding=1), torch.randn(3, 1, 61, 67)),
        "linear": lambda: (nn.Linear(24, 16), torch.randn(2, 5000, 24)),
        "head": lambda: (nn.Linear(24, 2), torch.randn(9000, 24)),
        "embedding": lambda: (nn.Embedding(200, 6), torch.randint(200, (3, 5000))),
    }[case]()
    output = layer(x)
    gradient = torch.randn_like(output)
    found = find_layers(layer)[0]
    function = {nn.Linear: F.linear, nn.Embedding: F.embedding}.get(type(layer))
    arguments = (x, layer.weight)
    if function is None:
        function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        arguments = (*arguments, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    elif function is F.linear:
        arguments = (*arguments, layer.bias)
    call = parse_call(found, FunctionCall(function, arguments, {}, output, None), layer.weight, None)
    shape = found.shape(None)

    @torch.no_grad()
    def build():
        pair = call.factors(call.source, gradient)
        second_moment(shape, [flatten_positions(pair) if rows else pair], Tuning(curvature_chunk_cpu=limit))

    assert peak_elements(build) <= 6 * limit + 4 * shape.groups * shape.short * shape.long


@pytest.mark.parametrize("way", ["gram", "direct"])
@settings(max_examples=20, deadline=None)
@given(
    inside=st.integers(1, 5),
    outside=st.integers(1, 5),
    positions=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_a_layer_used_with_any_numbers_of_positions_by_either_way(way, inside, outside, positions, bias):
    model = ManyUses(inside, outside, bias)
    xs = [torch.randn(3, k, inside, dtype=torch.float64) for k in positions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cheapest_way", lambda *_, **__: way)
        oracle.check(model, *xs)


class ManyUses(nn.Module):
    """One linear layer applied to several inputs of different numbers of positions."""

    def __init__(self, inside, outside, bias):
        super().__init__()
        self.layer = nn.Linear(inside, outside, bias=bias).double()

    def forward(self, *xs):
        total = sum(self.layer(x).sum(dim=1).tanh() for x in xs)
        return total.square()


@pytest.mark.parametrize(
    ("kappa", "p", "q", "way"), [(1, 10, 10, "scaled"), (2, 100, 100, "gram"), (1000, 10, 20, "direct")]
)
def test_the_way_with_the_fewest_operations_is_taken(kappa, p, q, way):
    shape = MatrixShape(groups=1, rows=p, columns=q)
    short, long = (Dense(torch.empty(1, 1, size, kappa)) for size in (p, q))
    assert cheapest_way(shape, [short], [long]) == way


def test_the_choice_weighs_the_counts_of_the_design():
    """2κ²q + 2κ²p + 2κp² against 2κpq + 2p²q, on a grid of sizes."""
    for kappa in (2, 5, 20, 100):
        for p, q in ((3, 5), (10, 40), (64, 64)):
            shape = MatrixShape(groups=1, rows=p, columns=q)
            short, long = (Dense(torch.empty(1, 1, size, kappa)) for size in (p, q))
            through_gram = kappa**2 * (p + q) + kappa * p**2 < p * q * (kappa + p)
            assert cheapest_way(shape, [short], [long]) == ("gram" if through_gram else "direct")


@pytest.mark.parametrize(("short", "size", "stacks"), [
    (7, None, [(3, 7, 7)]),
    (6, 2, [(9, 2, 2)]),
    (7, 3, [(6, 3, 3), (3, 1, 1)]),
    (7, 9, [(3, 7, 7)]),
])  # fmt: skip
def test_equal_blocks_of_all_groups_form_one_stack(short, size, stacks):
    assert MatrixShape(groups=3, rows=short, columns=8, block_size=size).stack_shapes == stacks


@pytest.mark.parametrize(("size", "blocks"), [(None, (1, 0)), (7, (1, 0)), (9, (1, 0)), (4, (1, 3))])
def test_a_block_no_smaller_than_the_matrix_is_the_whole_matrix(size, blocks):
    assert MatrixShape(groups=3, rows=7, columns=8, block_size=size).blocks == blocks


@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("case", ["linear", "right", "conv", "groups", "two layers"])
def test_blocks_are_the_diagonal_of_the_whole(case, size, samples):
    model, x = {
        "linear": lambda: (nn.Linear(9, 5).double(), image(4, 2, 9)),
        "right": lambda: (nn.Linear(4, 9).double(), image(4, 2, 4)),
        "conv": lambda: (conv(2, 5, 3, padding=1), image(2, 2, 4, 4)),
        "groups": lambda: (conv(4, 10, 2, groups=2), image(2, 4, 3, 3)),
        "two layers": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double(), image(3, 5, 4)),
    }[case]()
    oracle.check(model, x, block_size=size, samples=samples)


@pytest.mark.parametrize("used", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("samples", ["batch", "rows"])
@pytest.mark.parametrize("case", ["linear", "conv", "embedding"])
def test_max_samples_takes_the_first_samples_for_the_curvature_and_all_for_the_gradient(case, samples, used):
    seed_cpu(0)
    model, x = {
        "linear": lambda: (nn.Linear(9, 5).double(), image(4, 2, 9)),
        "conv": lambda: (conv(2, 5, 3, padding=1), image(3, 2, 4, 4)),
        "embedding": lambda: (nn.Embedding(8, 3).double(), torch.randint(8, (4, 2))),
    }[case]()
    oracle.check(model, x, max_samples=used, samples=samples)


@pytest.mark.parametrize("largest", [1.0, 1e-8, 1e-17])
def test_dropping_tiny_entries_leaves_the_product_within_rounding(largest):
    """Entries from the largest down to below the smallest normal number, as radial basis functions have them."""
    seed_cpu(0)
    U = largest * 10 ** (-45 * torch.rand(300, 1, 20, 1, dtype=torch.float64))
    exact = (U[:, 0, :, 0].T @ U[:, 0, :, 0]).float()
    kept = drop_tiny(U.float())
    assert (kept == 0).float().mean() > 0.2
    torch.testing.assert_close(kept[:, 0, :, 0].T @ kept[:, 0, :, 0], exact, rtol=0, atol=1e-6 * exact.max().item())


def test_nonfinite_entries_are_not_dropped():
    U = torch.tensor([[1.0, 1e-30, 0.5], [float("nan"), float("inf"), -1e-30]])
    torch.testing.assert_close(
        drop_tiny(U), torch.tensor([[1.0, 0, 0.5], [float("nan"), float("inf"), 0]]), equal_nan=True
    )


def test_zeros_and_empty_tensors_are_kept_as_they_are():
    for U in (torch.zeros(3, 2), torch.zeros(0, 2)):
        torch.testing.assert_close(drop_tiny(U), U)


@pytest.mark.parametrize("outputs", [6, 40])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("limit", [2**21, 64])
def test_convolutions_in_float32_make_gradients_by_their_own_backward(outputs, padding, limit, monkeypatch):
    """In samples that are no larger than the limit, with a bias, on either side of the matrix."""
    calls = []
    multiply = Patches.multiply
    monkeypatch.setattr(Patches, "multiply", lambda self, *args: calls.append(1) or multiply(self, *args))
    layer = conv(3, outputs, 2, padding=padding)
    (found,) = find_layers(layer)
    x = image(4, 3, 9, 9)
    output = layer(x)
    call = parse_call(
        found, FunctionCall(F.conv2d, (x, layer.weight, layer.bias, 1, padding), {}, output, None), layer.weight, None
    )
    gradient = torch.randn_like(output)
    moments = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            pair = call.factors(x.to(dtype), gradient.to(dtype))
            moments += second_moment(found.shape(None), [pair], Tuning(curvature_chunk_cpu=limit))
    torch.testing.assert_close(moments[0].double(), moments[1], rtol=1e-4, atol=1e-4 * float(moments[1].max()))
    assert len(calls) == (limit > 64 and torch.backends.mkldnn.is_available())
