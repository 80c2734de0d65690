"""Gram matrix, norms, slices and flat form of each factor, compared with its entries written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.flat import split_boxes
from ngplus.factors.gathered import Gathered
from ngplus.factors.im2col import Patches
from ngplus.factors.im2col import patches as patches_or_pixels
from ngplus.factors.products import concatenate, gram, multiply_by_transpose, symmetric_product
from ngplus.factors.sketch import Sampled
from tests.ngplus.cases import seed_cpu

APPENDED = st.sampled_from([None, 0.0, 1.0])


def dense(samples=3, groups=1, size=4, positions=5, appended=None, **options):
    return Dense(torch.randn(samples, groups, size, positions, dtype=torch.float64), appended, **options)


def one_hot(samples=3, positions=5, table_size=4):
    return OneHot(torch.randint(table_size, (samples, positions)), table_size, torch.float64)


def bags(samples=3, members=7, table_size=4):
    bag = torch.randint(samples, (members,)).sort().values
    weight = torch.randn(members, dtype=torch.float64)
    return Bags(torch.randint(table_size, (members,)), bag, weight, samples, table_size)


@st.composite
def patches(draw):
    dims = draw(st.integers(1, 3))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(dims)]
    least = [d * (k - 1) + 1 - sum(p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [max(1, length) + draw(st.integers(0, 2)) for length in least]
    groups = draw(st.integers(1, 2))
    images = torch.randn(2, groups * draw(st.integers(1, 2)), *size, dtype=torch.float64)
    return Patches(images, tuple(kernel), tuple(stride), tuple(dilation), tuple(padding), groups, draw(APPENDED))


@st.composite
def factors(draw):
    return draw(
        st.one_of(
            st.builds(dense, samples=st.integers(0, 3), groups=st.integers(1, 2), appended=APPENDED),
            st.builds(dense, appended=APPENDED, first_row=st.integers(0, 2), full_size=st.just(6)),
            st.builds(one_hot, positions=st.integers(1, 5)),
            st.builds(bags, members=st.integers(0, 9)),
            patches(),
        )
    )


@settings(max_examples=80, deadline=None)
@given(factors())
def test_factor_sizes_are_those_of_the_dense_form(factor):
    entries = factor.dense()
    assert (entries.shape[0], *entries.shape[2:]) == (factor.samples, factor.size, factor.positions)


@settings(max_examples=80, deadline=None)
@given(factors())
def test_gram_matrix_and_norms_are_those_of_the_dense_form(factor):
    entries = factor.dense()
    torch.testing.assert_close(factor.gram(), entries.mT @ entries)
    torch.testing.assert_close(factor.squared_norms(), entries.square().sum(dim=2))


@settings(max_examples=80, deadline=None)
@given(patches(), st.integers(1, 3))
def test_gradients_by_a_convolutions_backward_are_products_with_unfolded_patches(factor, rows):
    outputs = torch.randn(factor.samples, factor.groups, rows, factor.positions, dtype=torch.float64)
    torch.testing.assert_close(factor.multiply(outputs), outputs @ factor.dense().mT)


# Of p²k multiplications the smallest are whole, the next in two block rows, the others in four.
@pytest.mark.parametrize(("p", "k"), [(1, 3), (7, 5), (131, 1000), (130, 8200), (512, 600)])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_a_symmetric_product_by_block_rows_is_the_whole_product(p, k, batch):
    seed_cpu(0)
    shape = (p, k) if batch is None else (batch, p, k)
    x, scale = torch.randn(shape, dtype=torch.float64), torch.randn(k, dtype=torch.float64)
    core = torch.diag(scale.square()) if k < 1000 else None
    y = x * scale.square() if core is None else x @ core
    before = torch.randn(p, p, dtype=torch.float64)
    before = before + before.T
    flat = [each if batch is None else each.transpose(0, 1).flatten(1) for each in (x, y)]
    product = flat[0] @ flat[1].T
    torch.testing.assert_close(symmetric_product(x, y), product)
    torch.testing.assert_close(symmetric_product(x), flat[0] @ flat[0].T)
    out = before.clone()
    assert symmetric_product(x, y, out=out, beta=0.5, alpha=-2.0) is out
    torch.testing.assert_close(out, 0.5 * before - 2.0 * product)
    overwritten = torch.full((p, p), float("nan"), dtype=torch.float64)
    torch.testing.assert_close(symmetric_product(x, y, out=overwritten), product)
    if p > 400:
        assert torch.equal(out[256:, :256], out[:256, 256:].T)


def test_products_with_transposes_are_made_matrix_by_matrix():
    x = torch.randn(2, 3, 140, 1000, dtype=torch.float64)
    torch.testing.assert_close(multiply_by_transpose(x), x @ x.mT)
    torch.testing.assert_close(multiply_by_transpose(x[..., :20]), x[..., :20] @ x[..., :20].mT)


@settings(max_examples=80, deadline=None)
@given(factors(), st.integers(0, 3), st.integers(0, 3))
def test_slices_and_flat_forms_are_those_of_the_dense_form(factor, start, more):
    stop = min(start + more, factor.samples)
    start = min(start, stop)
    entries = factor.dense()
    torch.testing.assert_close(factor.slice(start, stop).dense(), entries[start:stop])
    flat = entries.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(-1)
    torch.testing.assert_close(factor.flat().dense(), flat)
    torch.testing.assert_close(factor.flat().squared_norms(), flat.square().sum(dim=2))
    torch.testing.assert_close(factor.flat().slice(start, stop).dense(), flat[start:stop])


@settings(max_examples=120, deadline=None)
@given(factors(), st.integers(0, 30), st.integers(1, 30), st.integers(0, 2), st.integers(1, 5))
def test_slices_of_positions_are_those_of_the_dense_form(factor, start, more, again, fewer):
    start %= factor.positions
    stop = min(start + more, factor.positions)
    entries, part = factor.dense()[..., start:stop], factor.slice_positions(start, stop)
    assert part.positions == stop - start
    for _ in range(2):
        torch.testing.assert_close(part.dense(), entries, rtol=0, atol=0)
        torch.testing.assert_close(part.gram(), entries.mT @ entries)
        torch.testing.assert_close(part.squared_norms(), entries.square().sum(dim=2))
        flat = entries.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(-1)
        torch.testing.assert_close(part.flat().dense(), flat, rtol=0, atol=0)
        again, end = again % part.positions, min(again % part.positions + fewer, part.positions)
        part, entries = part.slice_positions(again, end), entries[..., again:end]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_boxes_are_the_cells_of_a_range_in_order(grid, data):
    cells = torch.arange(torch.tensor(grid).prod().item()).view(grid)
    start = data.draw(st.integers(0, cells.numel()))
    stop = data.draw(st.integers(start, cells.numel()))
    found = [cells[box].flatten() for box in split_boxes(grid, start, stop)]
    assert torch.cat([torch.empty(0), *found]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(grid) - 1


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(patches(), st.builds(dense, groups=st.integers(1, 2), appended=APPENDED)),
    st.lists(st.lists(st.integers(-1, 200), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_gathered_positions_are_the_entries_and_zeros(factor, numbers):
    entries = factor.dense().permute(0, 3, 1, 2).flatten(0, 1)  # (b·κ, groups, d)
    index = torch.tensor(numbers).clamp_max(len(entries) - 1)
    expected = entries[index]  # −1 is the last, to be zero
    expected[index < 0] = 0.0
    if factor.appended is not None:
        expected[..., -1] = factor.appended
    expected = expected.permute(0, 2, 3, 1)
    gathered = Gathered(factor, index)
    torch.testing.assert_close(gathered.dense(), expected, rtol=0, atol=0)
    torch.testing.assert_close(gathered.gram(), expected.mT @ expected)
    torch.testing.assert_close(gathered.squared_norms(), expected.square().sum(dim=2))
    torch.testing.assert_close(gathered.slice(0, 1).slice_positions(1, 3).dense(), expected[:1, ..., 1:])
    flat = expected.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(-1)
    torch.testing.assert_close(gathered.flat().dense(), flat, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(patches())
def test_a_kernel_of_one_pixel_is_the_image_itself(factor):
    again = patches_or_pixels(
        factor.images, factor.kernel, factor.stride, factor.dilation, factor.padding, factor.groups, factor.appended
    )
    torch.testing.assert_close(again.dense(), factor.dense(), rtol=0, atol=0)
    is_plain = set(factor.kernel) == set(factor.stride) == {1} and factor.output_size == factor.images.shape[2:]
    assert isinstance(again, Dense) == (is_plain and not any(map(sum, factor.padding)))


@settings(max_examples=80, deadline=None)
@given(patches())
def test_shifted_products_give_the_gram_matrix_of_unfolded_patches(factor):
    entries = Patches(**{**vars(factor), "appended": None}).dense()
    torch.testing.assert_close(factor._shifted_gram(), entries.mT @ entries)


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 2)])
@pytest.mark.parametrize("padding", [0, 1, (1, 2)])
def test_patches_are_what_unfold_gives(stride, dilation, padding):
    pair = lambda value: value if isinstance(value, tuple) else (value, value)  # noqa: E731
    images = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    zeros = tuple((p, p) for p in pair(padding))
    factor = Patches(images, (3, 2), pair(stride), pair(dilation), zeros, groups=1)
    expected = F.unfold(images, (3, 2), dilation, padding, stride)
    torch.testing.assert_close(factor.dense()[:, 0], expected)


@pytest.mark.parametrize("kinds", [*itertools.product(["dense", "narrow", "hot", "bags"], repeat=2)], ids="-".join)
def test_gram_matrix_of_several_uses_is_that_of_their_entries_side_by_side(kinds):
    seed_cpu(0)
    make = {
        "dense": dense,
        "narrow": lambda: dense(size=2, first_row=1, full_size=4),
        "hot": one_hot,
        "bags": bags,
    }
    uses = [make[kind]() for kind in kinds]
    entries = concatenate(uses)
    torch.testing.assert_close(gram(uses), entries.mT @ entries)


def test_the_constant_row_counts_where_one_use_adds_the_bias_and_another_does_not():
    uses = [dense(appended=1.0), dense(appended=0.0)]
    entries = torch.cat([use.dense() for use in uses], dim=-1)
    torch.testing.assert_close(gram(uses), entries.mT @ entries)


@settings(max_examples=40, deadline=None)
@given(factors(), st.integers(1, 6))
def test_sampled_rows_are_scaled_rows(factor, count):
    rows = torch.randint(factor.size, (count,))
    sampled = Sampled(factor, rows, 1.5)
    entries = factor.dense()[:, :, rows] * 1.5
    torch.testing.assert_close(sampled.dense(), entries)
    torch.testing.assert_close(sampled.gram(), entries.mT @ entries)
    torch.testing.assert_close(sampled.squared_norms(), entries.square().sum(dim=2))
    torch.testing.assert_close(sampled.flat().dense(), entries.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_at_least_in_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert statistics_dtype(dtype) == expected
    assert Dense(torch.ones(1, 1, 2, 3, dtype=dtype)).gram().dtype == expected
    assert Patches(torch.ones(1, 1, 3, dtype=dtype), (2,), (1,), (1,), ((0, 0),), 1).gram().dtype == expected
