"""Building the generalized Fisher information matrix L or R, equations (4) and (5), from factors.

With p = min(m, n) the short side, q the long side and κ positions, one sample's 𝒢ᵢ𝒢ᵢᵀ is made in the cheapest of
three ways, in chunks of samples and, where 𝒢ᵢ is formed of many positions, in chunks of those. No temporary has more
than about `CHUNK` elements, or than 𝒢ᵢ where that has more.

A table of the ways:

=============  =====================================  =======================  ==================
way            formula (short side S, long side A)    operations a sample      when
=============  =====================================  =======================  ==================
scaled         Σ (‖a‖ s)(‖a‖ s)ᵀ                     2p²                      κ = 1
through Gram   S (AᵀA) Sᵀ                             gram + 2κ²p + 2κp²       κ small
direct         (S Aᵀ)(S Aᵀ)ᵀ                          2κpq + 2p²q              κ large
=============  =====================================  =======================  ==================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.devices import can_ask
from ngplus.factors import Dense, Factor, Sampled, concatenated, gram
from ngplus.patches import whole_rows

Side = Literal["left", "right"]
Way = Literal["scaled", "gram", "direct"]

CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Most numbers in the temporaries of the construction: on CPUs what stays near the cache, else 256 MiB in float32."""


class Part(NamedTuple):
    """One use of a layer: 𝒢ᵢ = rows · columnsᵀ summed over positions, rows of size m and columns of size n."""

    rows: Factor
    columns: Factor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is built for a layer.

    Attributes:
        groups: number of independent m×n matrices (a grouped convolution's groups).
        rows: m.
        columns: n, the bias's column counted.
        block_size: p of (18); None for whole matrices.
    """

    groups: int
    rows: int
    columns: int
    block_size: int | None = None

    @property
    def side(self) -> Side:
        """The smaller side: (4) where m ≤ n, else (5)."""
        return "left" if self.rows <= self.columns else "right"

    @property
    def short(self) -> int:
        """Side length p of L or R."""
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        """The other side q."""
        return max(self.rows, self.columns)

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of whole diagonal blocks of a matrix, and the size of the one that is left over."""
        return divmod(self.short, self._size)

    @property
    def _size(self) -> int:
        """Of a whole block, which is no longer than the matrix."""
        return min(self.block_size or self.short, self.short)

    @property
    def stack_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the batches of blocks: all whole blocks of all groups, then the left-over ones."""
        count, rest = self.blocks
        size = self._size
        shapes = [(self.groups * count, size, size)] if count else []
        return [*shapes, (self.groups, rest, rest)] if rest else shapes


def oriented(shape: Shape, part: Part) -> tuple[Factor, Factor]:
    """The short and the long factor of a part."""
    return (part.rows, part.columns) if shape.side == "left" else (part.columns, part.rows)


def cheapest_way(shape: Shape, short: Sequence[Factor], long: Sequence[Factor]) -> Way:
    """The way with the fewest operations a sample; see the module's table."""
    kappa, p, q = sum(f.positions for f in short), shape.short, long[0].size
    if kappa == 1:
        return "scaled"
    through_gram = sum(f.gram_cost() for f in long) * len(long) + 2 * kappa**2 * p + 2 * kappa * p**2
    return "gram" if through_gram < 2 * kappa * p * q + 2 * p**2 * q else "direct"


def second_moment(shape: Shape, parts: Sequence[Part]) -> list[Tensor]:
    """Σᵢ 𝒢ᵢ𝒢ᵢᵀ (or Σᵢ 𝒢ᵢᵀ𝒢ᵢ), block by block, over the samples that ``parts`` are all uses of.

    Returns:
        One tensor (blocks, size, size) for each entry of ``shape.stack_shapes``.
    """
    if shape.side == "right" and (apart := _disjoint_rows(parts)):
        return added([second_moment(shape, together) for together in apart])
    short, long = map(list, zip(*(oriented(shape, part) for part in parts), strict=True))
    way = cheapest_way(shape, short, long)
    sums = _room_for(shape, short[0].dtype, short[0].device)
    samples = short[0].samples
    step = max(1, _limit(shape, way, short[0].device) // _elements_a_sample(shape, way, short, long))
    if samples <= step:
        return _add_outer(sums, *_WAYS[way](short, long, shape), shape, beta=0)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        chunk = [f.slice(start, stop) for f in short], [f.slice(start, stop) for f in long]
        _add_outer(sums, *_WAYS[way](*chunk, shape), shape, beta=min(start, 1))
    return sums


def _room_for(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Sums not yet begun, made before what is needed for a while only: behind that they would keep a hole in memory."""
    return [torch.empty(size, dtype=dtype, device=device) for size in shape.stack_shapes]


def positions_as_samples(part: Part) -> Part:
    """The part with every position a sample of its own (κ = 1)."""
    return Part(part.rows.flat(), part.columns.flat())


def scaled_columns(shape: Shape, part: Part) -> Tensor:
    """U of (14) but for its scale, for κ = 1: the columns ‖a‖ s, one a sample, (p, b)."""
    short, long = oriented(shape, part)
    return _scaled_by_norms(short, long)[:, 0, :, 0].T


def product_of_columns(shape: Shape, columns: Tensor) -> list[Tensor]:
    """UUᵀ of (groups, p, rank) columns, block by block."""
    columns = columns.unsqueeze(0)
    return _add_outer(_room_for(shape, columns.dtype, columns.device), columns, columns, shape, beta=0)


def sample_long_side(shape: Shape, part: Part, drawn: Tensor) -> Part:
    """The part with the drawn entries of the long side only, scaled so that E ΩΩᵀ = I, equation (17).

    Args:
        shape: of the layer's matrix.
        part: one use of the layer.
        drawn: (q,), entries of the long side, drawn uniformly with replacement.
    """
    scale = (shape.long / drawn.numel()) ** 0.5
    if shape.side == "left":
        return part._replace(columns=Sampled(part.columns, drawn, scale))
    return part._replace(rows=Sampled(part.rows, drawn, scale))


def chunk_elements(device: torch.device) -> int:
    """Most elements of the temporaries of the construction on a device, see `CHUNK`."""
    return CHUNK.get(device.type, CHUNK["cuda"])


def _elements_a_sample(shape: Shape, way: Way, short: Sequence[Factor], long: Sequence[Factor]) -> int:
    """Elements of the temporaries of a way for one sample."""
    kappa = sum(f.positions for f in short)
    if way == "scaled":
        return shape.groups * (shape.short + long[0].norm_elements)
    if way == "gram":
        return shape.groups * kappa * (2 * kappa + shape.short + shape.long)
    return shape.groups * (shape.short * shape.long + kappa * (shape.short + shape.long))


def _limit(shape: Shape, way: Way, device: torch.device) -> int:
    """Elements of temporaries that are made at a time.

    Twice as many for the scaled way, and no fewer than the weight has: smaller products take longer in all.
    """
    chunk = chunk_elements(device)
    return max(2 * chunk, shape.groups * shape.short * shape.long) if way == "scaled" else chunk


def _disjoint_rows(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts by the slice of rows they fill, where the slices do not overlap; nothing where they do.

    Rows of disjoint slices are orthogonal, so that R is the sum over slices.
    """
    slices: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        if not isinstance(part.rows, Dense) or part.rows.full_size is None:
            return []
        first, count = part.rows.first_row, part.rows.entries.shape[2]
        whole = part._replace(rows=Dense(part.rows.entries))
        slices.setdefault((first, first + count), []).append(whole)
    edges = sorted(slices)
    overlap = any(second[0] < first[1] for first, second in itertools.pairwise(edges))
    return [] if overlap else [slices[edge] for edge in edges]


def _scaled(short: Sequence[Factor], long: Sequence[Factor], shape: Shape) -> tuple[Tensor, Tensor]:
    columns = without_tiny(_scaled_by_norms(short[0], long[0]))
    return columns, columns


def _scaled_by_norms(short: Factor, long: Factor) -> Tensor:
    """‖a‖ s, (b, groups, p, 1), for κ = 1."""
    return short.dense() * long.squared_norms().sqrt().unsqueeze(2)


def without_tiny(columns: Tensor) -> Tensor:
    """U (samples, …) with zeros in place of entries too small to be seen in UUᵀ, where a CPU multiplies it.

    For a product below the smallest normal number a CPU takes dozens of times as long, and radial basis functions bring
    many of them. Zeroed are entries below that number's root, but none above 2⁻⁴⁰ of U's largest entry, as far as some
    of the samples tell it; and only where some of those have any.
    """
    if not (can_ask(columns) and columns.numel()):
        return columns
    some = columns[:: 1 + len(columns) // 64].abs()
    least = min(torch.finfo(columns.dtype).tiny ** 0.5, 2.0**-40 * some.amax().item())
    found = bool(((some > 0) & (some < least)).any())
    return F.hardshrink(columns, least) if found else columns


def _through_gram(short: Sequence[Factor], long: Sequence[Factor], shape: Shape) -> tuple[Tensor, Tensor]:
    columns = concatenated(short)  # (b, groups, p, κ)
    return columns @ gram(long), columns


def _direct(short: Sequence[Factor], long: Sequence[Factor], shape: Shape) -> tuple[Tensor, Tensor]:
    gradients = per_sample_gradients(short, long, shape.groups)  # (b, groups, p, q)
    return gradients, gradients


_WAYS: dict[Way, Callable[[Sequence[Factor], Sequence[Factor], Shape], tuple[Tensor, Tensor]]] = {
    "scaled": _scaled,
    "gram": _through_gram,
    "direct": _direct,
}


def per_sample_gradients(left: Sequence[Factor], right: Sequence[Factor], groups: int) -> Tensor:
    """𝒢ᵢ = Σ left · rightᵀ of some samples, over their uses and positions, (b, groups, left's size, right's size).

    Uses of so many positions that they would have more than `chunk_elements` elements are written out in parts.
    """
    samples, rows, columns = left[0].samples, left[0].size, right[0].size
    elements = max(1, samples * groups * (rows + columns))
    gradients = torch.empty(samples * groups, rows, columns, dtype=left[0].dtype, device=left[0].device)
    chunks = _position_chunks(left, right, chunk_elements(left[0].device) // elements)
    for number, together in enumerate(chunks):
        outputs, inputs = (concatenated(factors).flatten(0, 1) for factors in zip(*together, strict=True))
        gradients.baddbmm_(outputs, inputs.mT, beta=min(number, 1))
    return gradients.view(samples, groups, rows, columns)


def _position_chunks(
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
        step = whole_rows(one, whole_rows(other, max(1, limit // 4)))
        for start in range(0, one.positions, step):
            stop = min(start + step, one.positions)
            yield [(one.slice_positions(start, stop), other.slice_positions(start, stop))]
    if together:
        yield together


def _add_outer(sums: list[Tensor], left: Tensor, right: Tensor, shape: Shape, *, beta: int) -> list[Tensor]:
    """Add to ``sums`` the diagonal blocks of Σᵢ left_i right_iᵀ, for ``left`` and ``right`` of shape (b, groups, p, c).

    Args:
        sums: one tensor for each entry of ``shape.stack_shapes``, changed in place.
        left: as said.
        right: as said.
        shape: of the layer's matrix.
        beta: 1, or 0 where ``sums`` are not yet begun.

    Returns:
        ``sums``.
    """
    if shape.groups == 1 and shape.blocks == (1, 0) and not left.is_cuda:
        _add_products(sums[0][0], left[:, 0], right[:, 0], beta)
        return sums
    first = _samples_last(left)
    second = first if right is left else _samples_last(right)
    whole = shape.short - shape.blocks[1]
    rows = [rows for rows in (slice(0, whole), slice(whole, shape.short)) if rows.stop > rows.start]
    for total, at in zip(sums, rows, strict=True):
        count, size, _ = total.shape
        total.baddbmm_(first[:, at].reshape(count, size, -1), second[:, at].reshape(count, size, -1).mT, beta=beta)
    return sums


def _add_products(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """Add Σᵢ left_i right_iᵀ for (b, p, c): without a copy where products are long, as one where they are short."""
    if left.shape[2] == 1:
        total.addmm_(left[:, :, 0].T, right[:, :, 0], beta=beta)
    else:
        total.addbmm_(left, right.mT, beta=beta)


def _samples_last(factor: Tensor) -> Tensor:
    """(b, groups, p, c) to (groups, p, b·c)."""
    return factor.permute(1, 2, 0, 3).flatten(2)


def drawn(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``size`` of ``count`` numbers, uniformly with replacement, (size,), on the generator's device."""
    return torch.randint(count, (size,), generator=generator, device=generator.device)


def added(sums: Sequence[list[Tensor]]) -> list[Tensor]:
    """The sum, stack by stack, made in the first."""
    first, *others = sums
    for other in others:
        for total, term in zip(first, other, strict=True):
            total += term
    return first
