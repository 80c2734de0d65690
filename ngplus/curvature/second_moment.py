"""Building the generalized Fisher information matrix L or R, equations (4) and (5), from factors.

With p = min(m, n) the short side, q the long side and κ positions, one sample's 𝒢ᵢ𝒢ᵢᵀ is made in the cheapest of
three ways, in chunks of samples and, where 𝒢ᵢ is formed of many positions, in chunks of those. No temporary has more
than about `Tuning.curvature_chunk` elements, or than 𝒢ᵢ where that has more.

A table of the ways:

=============  =====================================  =======================  ==================
way            formula (short side S, long side A)    operations a sample      when
=============  =====================================  =======================  ==================
scaled         Σ (‖a‖ s)(‖a‖ s)ᵀ                     2p²                      κ = 1
through Gram   S (AᵀA) Sᵀ                             gram + 2κ²p + 2κp²       κ small
direct         (S Aᵀ)(S Aᵀ)ᵀ                          2κpq + 2p²q              κ large
=============  =====================================  =======================  ==================

Where the backward pass can take Σᵢ 𝒢ᵢ for the weight's gradient (`GradientSum`), the direct way saves it 2κpq.
Gradients that come whole (`Formed`) go the direct way, without the product with the identity, their other factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.curvature.gradient_sum import GradientSum
from ngplus.devices import reads_without_sync
from ngplus.factors.dense import Dense
from ngplus.factors.factor import Factor
from ngplus.factors.formed import Identity
from ngplus.factors.im2col import Patches, round_to_rows
from ngplus.factors.pair import FactorPair, orient
from ngplus.factors.products import add_lower_, concatenate, gram, mirror_
from ngplus.layers import MatrixShape
from ngplus.tuning import DEFAULT, Tuning

Way = Literal["scaled", "gram", "direct"]


def cheapest_way(shape: MatrixShape, short: Sequence[Factor], long: Sequence[Factor], *, sums: bool = False) -> Way:
    """Find the way with the fewest operations a sample; see the module's table.

    Args:
        shape: of the layer's matrix.
        short: the factors of its short side, one a use.
        long: the factors of its long side.
        sums: whether Σᵢ 𝒢ᵢ is of use, so that to form 𝒢ᵢ saves the backward pass as many operations.

    Returns:
        The way.
    """
    kappa, p, q = sum(f.positions for f in short), shape.short, long[0].size
    if kappa == 1:
        return "scaled"
    if any(isinstance(factor, Identity) for factor in (*short, *long)):
        return "direct"
    through_gram = sum(f.gram_cost() for f in long) * len(long) + 2 * kappa**2 * p + 2 * kappa * p**2
    forming = 0 if sums else 2 * kappa * p * q
    return "gram" if through_gram < forming + 2 * p**2 * q else "direct"


def second_moment(
    shape: MatrixShape, pairs: Sequence[FactorPair], tuning: Tuning = DEFAULT, total: GradientSum | None = None
) -> list[Tensor]:
    """Σᵢ 𝒢ᵢ𝒢ᵢᵀ of (4), or Σᵢ 𝒢ᵢᵀ𝒢ᵢ of (5), block by block.

    Args:
        shape: of the layer's matrix.
        pairs: the factors of all uses by the same samples.
        tuning: sizes of temporaries.
        total: gets Σᵢ 𝒢ᵢ where 𝒢ᵢ is formed; of one pair.

    Returns:
        One tensor (blocks, size, size) for each entry of ``shape.stack_shapes``.
    """
    if shape.side == "right" and (disjoint := _split_disjoint_rows(pairs)):
        return add_stacks_([second_moment(shape, together, tuning) for together in disjoint])
    short, long = map(list, zip(*(orient(shape, pair) for pair in pairs), strict=True))
    way = cheapest_way(shape, short, long, sums=total is not None)
    limit = tuning.curvature_chunk(short[0].device)
    scaled_limit = max(2 * limit, shape.groups * shape.short * shape.long)  # smaller products take longer in all
    step = max(1, (scaled_limit if way == "scaled" else limit) // _elements_per_sample(shape, way, short, long))
    sums = _allocate_sums(shape, short[0].dtype, short[0].device)
    samples = short[0].samples
    is_halved = False
    for start in range(0, max(1, samples), step):
        stop = min(start + step, samples)
        chunk = short, long
        if stop - start < samples:
            chunk = [f.slice(start, stop) for f in short], [f.slice(start, stop) for f in long]
        left, right = _WAYS[way](*chunk, shape, limit)
        if total is not None and way == "direct":
            total.add_(left, shape.side)
            total.complete = stop == samples
        is_halved |= _add_outer_(sums, left, right, shape, beta=min(start, 1))
    if is_halved:
        mirror_(sums[0][0])
    return sums


def _allocate_sums(shape: MatrixShape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Sums not yet begun, made before what is needed for a while only: behind that they would keep a hole in memory."""
    return [torch.empty(size, dtype=dtype, device=device) for size in shape.stack_shapes]


def scale_columns(shape: MatrixShape, pair: FactorPair) -> Tensor:
    """U of (14) but for its scale, for κ = 1.

    Args:
        shape: of the layer's matrix, which has one group.
        pair: the factors of a use, of one position each.

    Returns:
        The columns ‖a‖ s, one a sample, (p, b).
    """
    short, long = orient(shape, pair)
    return _scale_by_norms(short, long)[:, 0, :, 0].T


def multiply_columns(shape: MatrixShape, columns: Tensor) -> list[Tensor]:
    """UUᵀ, block by block.

    Args:
        shape: of the layer's matrix.
        columns: U, (groups, p, rank).

    Returns:
        One tensor (blocks, size, size) for each entry of ``shape.stack_shapes``.
    """
    columns = columns.unsqueeze(0)
    sums = _allocate_sums(shape, columns.dtype, columns.device)
    if _add_outer_(sums, columns, columns, shape, beta=0):
        mirror_(sums[0][0])
    return sums


def _elements_per_sample(shape: MatrixShape, way: Way, short: Sequence[Factor], long: Sequence[Factor]) -> int:
    """Elements of the temporaries of a way for one sample."""
    kappa = sum(f.positions for f in short)
    if way == "scaled":
        return shape.groups * (shape.short + long[0].norm_elements)
    if way == "gram":
        return shape.groups * kappa * (2 * kappa + shape.short + shape.long)
    return shape.groups * (shape.short * shape.long + kappa * (shape.short + shape.long))


def _split_disjoint_rows(pairs: Sequence[FactorPair]) -> list[list[FactorPair]]:
    """Pairs by the slice of rows they fill, where the slices do not overlap; none where they do.

    Rows of disjoint slices are orthogonal, so that R is the sum over slices.
    """
    slices: dict[tuple[int, int], list[FactorPair]] = {}
    for pair in pairs:
        if not isinstance(pair.rows, Dense) or pair.rows.full_size is None:
            return []
        first, count = pair.rows.first_row, pair.rows.entries.shape[2]
        whole = pair._replace(rows=Dense(pair.rows.entries))
        slices.setdefault((first, first + count), []).append(whole)
    edges = sorted(slices)
    overlap = any(second[0] < first[1] for first, second in itertools.pairwise(edges))
    return [] if overlap else [slices[edge] for edge in edges]


def _scale(short: Sequence[Factor], long: Sequence[Factor], _shape: MatrixShape, _limit: int) -> tuple[Tensor, Tensor]:
    columns = drop_tiny(_scale_by_norms(short[0], long[0]))
    return columns, columns


def _scale_by_norms(short: Factor, long: Factor) -> Tensor:
    """‖a‖ s, (b, groups, p, 1), for κ = 1."""
    return short.dense() * long.squared_norms().sqrt().unsqueeze(2)


def drop_tiny(columns: Tensor) -> Tensor:
    """Zero the entries of U that are too small to count in UUᵀ, where a CPU multiplies it.

    For a product below the smallest normal number a CPU takes dozens of times as long, and radial basis functions bring
    many of them. Zeroed are entries below that number's root, but none above 2⁻⁴⁰ of U's largest entry, as far as some
    of the samples tell it; and only where some of those have any.
    """
    if not (reads_without_sync(columns) and columns.numel()):
        return columns
    some = columns[:: 1 + len(columns) // 64].abs()
    least = min(torch.finfo(columns.dtype).tiny ** 0.5, 2.0**-40 * some.amax().item())
    found = bool(((some > 0) & (some < least)).any())
    return F.hardshrink(columns, least) if found else columns


def _multiply_by_gram(
    short: Sequence[Factor], long: Sequence[Factor], _shape: MatrixShape, _limit: int
) -> tuple[Tensor, Tensor]:
    columns = concatenate(short)  # (b, groups, p, κ)
    return (gram(long) @ columns.mT).mT, columns  # in whose memory a position's entries lie side by side


def _form(short: Sequence[Factor], long: Sequence[Factor], shape: MatrixShape, limit: int) -> tuple[Tensor, Tensor]:
    gradients = form_gradients(short, long, shape.groups, limit)  # (b, groups, p, q)
    return gradients, gradients


_WAYS: dict[Way, Callable[[Sequence[Factor], Sequence[Factor], MatrixShape, int], tuple[Tensor, Tensor]]] = {
    "scaled": _scale,
    "gram": _multiply_by_gram,
    "direct": _form,
}


def form_gradients(left: Sequence[Factor], right: Sequence[Factor], groups: int, limit: int) -> Tensor:
    """𝒢ᵢ = Σ left · rightᵀ of (8), over uses and positions.

    Args:
        left: a factor of each use.
        right: the other factor of each use.
        groups: of the layer's matrix.
        limit: elements of temporaries. Uses of so many positions that they would have more are written out in parts.

    Returns:
        Gradients of single samples, (b, groups, left's size, right's size).
    """
    if len(left) == 1 and (made := _multiply_patches(left[0], right[0], limit)) is not None:
        return made
    samples, rows, columns = left[0].samples, left[0].size, right[0].size
    elements = max(1, samples * groups * (rows + columns))
    products: list[tuple[Factor, Factor]] = []
    whole: list[Tensor] = []
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Identity) or isinstance(other, Identity):
            whole.append(one.dense() if isinstance(other, Identity) else other.dense().mT)
        else:
            products.append((one, other))
    if not products:
        return sum(whole[1:], start=whole[0])
    gradients = torch.empty(samples * groups, rows, columns, dtype=left[0].dtype, device=left[0].device)
    left, right = [one for one, _ in products], [other for _, other in products]
    chunks = _split_positions(left, right, limit // elements)
    for number, together in enumerate(chunks):
        outputs, inputs = (concatenate(factors).flatten(0, 1) for factors in zip(*together, strict=True))
        gradients.baddbmm_(outputs, inputs.mT, beta=min(number, 1))
    return sum(whole, start=gradients.view(samples, groups, rows, columns))


def _multiply_patches(left: Factor, right: Factor, limit: int) -> Tensor | None:
    """The gradients of a convolution's use, where its backward pass makes them without unfolding; else None."""
    match left, right:
        case Dense(), Patches() if right.multiplies_at_once(left.entries, limit):
            return right.multiply(left.entries)
        case Patches(), Dense() if left.multiplies_at_once(right.entries, limit):
            return left.multiply(right.entries).mT
    return None


def _split_positions(
    left: Sequence[Factor], right: Sequence[Factor], limit: int
) -> Iterator[list[tuple[Factor, Factor]]]:
    """Both factors of all uses: several together up to ``limit`` positions, parts of those that have more.

    Parts are of a quarter of it: more than that is no faster, and leaves holes in memory that nothing else fits into.
    """
    together: list[tuple[Factor, Factor]] = []
    room = limit
    for one, other in zip(left, right, strict=True):
        if together and one.positions > room:
            yield together
            together, room = [], limit
        if one.positions <= room:
            together.append((one, other))
            room -= one.positions
            continue
        step = round_to_rows(one, round_to_rows(other, max(1, limit // 4)))
        for start in range(0, one.positions, step):
            stop = min(start + step, one.positions)
            yield [(one.slice_positions(start, stop), other.slice_positions(start, stop))]
    if together:
        yield together


def _add_outer_(sums: list[Tensor], left: Tensor, right: Tensor, shape: MatrixShape, *, beta: int) -> bool:
    """Add to ``sums`` the diagonal blocks of Σᵢ left_i right_iᵀ, which are symmetric but for rounding.

    Args:
        sums: one tensor for each entry of ``shape.stack_shapes``, changed in place.
        left: (b, groups, p, c).
        right: (b, groups, p, c).
        shape: of the layer's matrix.
        beta: 1, or 0 where ``sums`` are not yet begun.

    Returns:
        Whether the upper half of the only sum is left out, for `mirror_`.
    """
    if shape.groups == 1 and shape.blocks == (1, 0) and not left.is_cuda:
        return _add_products_(sums[0][0], left[:, 0], right[:, 0], beta)
    first = _move_samples_last(left)
    second = first if right is left else _move_samples_last(right)
    whole = shape.short - shape.blocks[1]
    rows = [rows for rows in (slice(0, whole), slice(whole, shape.short)) if rows.stop > rows.start]
    for total, at in zip(sums, rows, strict=True):
        count, size, _ = total.shape
        total.baddbmm_(first[:, at].reshape(count, size, -1), second[:, at].reshape(count, size, -1).mT, beta=beta)
    return False


def _add_products_(total: Tensor, left: Tensor, right: Tensor, beta: int) -> bool:
    """Add Σᵢ left_i right_iᵀ for (b, p, c): as one product where that takes no copy."""
    if left.shape[2] == 1 or all(each.mT.is_contiguous() for each in (left, right)):
        left, right = (each.mT.flatten(0, 1).T for each in (left, right))
    return add_lower_(total, left, right, beta=beta)


def _move_samples_last(factor: Tensor) -> Tensor:
    """(b, groups, p, c) to (groups, p, b·c)."""
    return factor.permute(1, 2, 0, 3).flatten(2)


def add_stacks_(sums: Sequence[list[Tensor]]) -> list[Tensor]:
    """Add all to the first, in place.

    Args:
        sums: lists of tensors of equal shapes, one at least.

    Returns:
        The first.
    """
    first, *others = sums
    for other in others:
        for total, term in zip(first, other, strict=True):
            total += term
    return first


__all__ = [
    "add_stacks_",
    "drop_tiny",
    "form_gradients",
    "multiply_columns",
    "scale_columns",
    "second_moment",
]
