"""Whether the captured uses of a weight make up its gradient.

The factors of the captured uses give Σᵢ 𝒢ᵢ, and a backward pass brings the gradient that this sum should be. Both are
compared in a few entries, or sums of entries, of the matrix, which are sampled again on every curvature step. A use
that was not captured changes them: a functional use in the training loop, a custom `torch.autograd.Function`, a penalty
on the weight.

The gradients are taken from hooks on weight and bias, before accumulation, clipping, unscaling or averaging over
processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.comparison.entries import ComparedEntries, UseRows
from ngplus.comparison.matrix_sums import BiasSums, MatrixSums
from ngplus.comparison.whole_sums import WholeBias, WholeSums
from ngplus.devices import factor_dtype, reads_without_sync
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.pair import FactorPair

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
"""Difference, relative to the sums that are compared, from which on a gradient has another source.

Several times the rounding of a gradient in this dtype; it grows with the root of the number of uses, each of which is
rounded."""


_REDUCED = 1.5e-2
"""The same for float32 where torch may compute its products in TF32 or bfloat16."""


_CPU = torch.device("cpu")

_OF_ALL = MatrixSums | BiasSums | WholeSums | WholeBias
"""What is compared in sums over all of a gradient."""


class Comparison:
    """The compared entries of a layer's gradient, as captured and as they came.

    Args:
        entries: which they are.
    """

    __slots__ = ("_captured", "_device", "_dtypes", "_entries", "_gradient", "_sizes")

    def __init__(self, entries: ComparedEntries) -> None:
        self._entries = entries
        self._captured: list[Tensor | list[float]] = []
        self._sizes: list[tuple[Tensor | float, ...]] = []
        self._gradient: list[Tensor | list[float]] = []
        self._device = _CPU
        self._dtypes: set[torch.dtype] = set()

    def empty(self) -> Comparison:
        """One of the same entries that knows nothing yet."""
        return Comparison(self._entries)

    @property
    def is_empty(self) -> bool:
        """Whether no backward pass has brought a gradient yet."""
        return not self._gradient

    def reduce_rows(self, pair: FactorPair) -> UseRows:
        """What `add_use` needs of a use's rows, the same for a weight and its bias."""
        return self._entries.reduce_rows(pair)

    def add_use(self, rows: UseRows, pair: FactorPair, dtype: torch.dtype) -> None:
        """Add what a captured use brings.

        Args:
            rows: of `reduce_rows`.
            pair: all of its samples.
            dtype: that it was computed in.
        """
        captured, place, sizes = self._entries.of_use(rows, pair)
        if captured.dim() and (count := self._entries.count) > len(captured):
            captured = F.pad(captured, (place, count - place - len(captured)))
        self._captured.append(_read(captured))
        self._sizes.append(sizes)
        self._dtypes.add(dtype)

    def add_sum(self, gradient: Tensor, squares: Tensor, dtype: torch.dtype) -> None:
        """Add what a captured use brings whose gradients are formed whole.

        Args:
            gradient: Σᵢ 𝒢ᵢ, in the parameter's shape.
            squares: the sum of squares of all their entries, a scalar.
            dtype: that the use was computed in.
        """
        share = 1.0 if isinstance(self._entries, _OF_ALL) else self._entries.count / gradient.numel()
        self._captured.append(_read(self._entries.of_gradient(gradient)))
        self._sizes.append(((squares * share).sqrt(),))
        self._dtypes.add(dtype)

    def add_gradient(self, gradient: Tensor) -> None:
        """Add what a backward pass brought to the weight's gradient."""
        self._gradient.append(_read(self._entries.of_gradient(gradient)))
        self._dtypes.add(gradient.dtype)
        self._device = gradient.device

    def vectors(self, now: Tensor | None) -> list[Tensor | list[float]]:
        """What `is_complete` and `is_multiple` need to know the values of; ``now`` is the weight's ``.grad``."""
        found = [] if now is None else [_read(self._entries.of_gradient(now))]
        return [*self._captured, *self._gradient, *found]

    def is_complete(self, values: Sequence[Sequence[float]]) -> bool:
        """Whether the captured uses make up the gradient but for rounding; also where anything is not finite.

        Where sums cancel, the size of what they are of tells how large rounding is. Only there it is read, which
        synchronizes with the device.
        """
        uses = len(self._captured)
        gradient = _total(values[uses : uses + len(self._gradient)])
        captured = _total(values[:uses]) if uses else [0.0] * len(gradient)
        difference = math.dist(gradient, captured)
        tolerance = self._tolerance * max(1, uses) ** 0.5
        tiny = len(gradient) * max(torch.finfo(dtype).tiny for dtype in self._dtypes)
        allowed = tolerance * (math.hypot(*gradient) + math.hypot(*captured)) + tiny
        if not difference > allowed:
            return True
        return not difference > allowed + tolerance * math.hypot(
            *(math.prod(map(float, sizes)) for sizes in self._sizes)
        )

    def is_sum(self, now: Tensor) -> bool:
        """Whether the parameter's ``.grad`` is what the backward passes brought, but for rounding. Synchronizes."""
        (values,) = read_values([[*self._gradient, _read(self._entries.of_gradient(now))]])
        *brought, found = values
        size = math.fsum(math.hypot(*each) for each in values)
        return not (brought and math.dist(_total(brought), found) > self._tolerance * size)

    @property
    def _tolerance(self) -> float:
        reduced = _reduced_precision(self._device)
        return max(
            _REDUCED if reduced and dtype == torch.float32 else _TOLERANCE.get(dtype, _REDUCED)
            for dtype in self._dtypes
        )

    def is_multiple(self, values: Sequence[Sequence[float]]) -> bool:
        """Whether the weight's ``.grad``, the last of ``values``, is a multiple of what the backward passes brought.

        Clipping by norm and unscaling multiply a gradient; putting one together from several does not.
        """
        brought, now = _total(values[len(self._captured) : -1]), values[-1]
        sizes = math.hypot(*brought), math.hypot(*now)
        if not all(0 < size < math.inf for size in sizes):
            return sizes[1] == 0 or not math.isfinite(sum(sizes))
        brought, now = ([each / size for each in vector] for vector, size in zip((brought, now), sizes, strict=True))
        cosine = sum(one * other for one, other in zip(brought, now, strict=True))
        away = math.hypot(*(one - cosine * other for one, other in zip(now, brought, strict=True)))
        return away <= max(self._tolerance, 1e-2)


def _total(vectors: Sequence[Sequence[float]]) -> Sequence[float]:
    """Their sum, entry by entry."""
    return vectors[0] if len(vectors) == 1 else [sum(each) for each in zip(*vectors, strict=True)]


def _read(vector: Tensor) -> Tensor | list[float]:
    """The entries of a short vector where they are there at once, else a copy of it in the statistics' dtype."""
    if reads_without_sync(vector):
        entries: list[float] | float = vector.tolist()
        return entries if isinstance(entries, list) else [entries]
    return vector.to(statistics_dtype(vector.dtype), copy=True).view(-1)


def read_values(lists: Sequence[Sequence[Tensor | list[float]]]) -> list[list[list[float]]]:
    """The entries of short vectors, list by list. Synchronizes with the device once, where there are tensors."""
    tensors = [each for vectors in lists for each in vectors if isinstance(each, Tensor)]
    if not tensors:
        return [list(vectors) for vectors in lists]  # type: ignore[arg-type]
    joined = torch.cat([each.to(tensors[0].device, factor_dtype(each)) for each in tensors]).tolist()
    ends = list(itertools.accumulate(map(len, tensors), initial=0))
    values = iter(joined[start:end] for start, end in itertools.pairwise(ends))
    return [[next(values) if isinstance(each, Tensor) else each for each in vectors] for vectors in lists]


def _reduced_precision(device: torch.device) -> bool:
    """Whether products of float32 may be computed with fewer bits."""
    convolutions = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return convolutions or torch.get_float32_matmul_precision() != "highest"


__all__ = ["Comparison", "read_values"]
