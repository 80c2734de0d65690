"""Sums over the samples of a layer, made as soon as the factors of its uses are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ngplus.capture.contractions import UnsupportedCall
from ngplus.capture.loss_reduction import Reduction
from ngplus.capture.op_handlers import OpCall
from ngplus.capture.sample_index import drop_uncounted_rows, group_rows
from ngplus.config import FunctionFallback, LayerwiseOptions, ModelCallSamples, PartialCapture, Samples
from ngplus.curvature.all_reduce import own_share
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.curvature.second_moment import add_stacks_, multiply_columns, scale_columns, second_moment
from ngplus.curvature.small_layers import group_equal, is_small, second_moments
from ngplus.dtensors import local_part
from ngplus.factors.dense import Dense
from ngplus.factors.pair import FactorPair, flatten_positions, sample_indices, sample_long_side
from ngplus.layers import Layer, MatrixShape, stored_values
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sample is, how many are used and in which form their sum is kept.

    Attributes:
        samples: "batch" or "rows", see `NGPlus`.
        model_calls: "separate", "joined" or "apart", see `NGPlus`.
        partial_capture: "base" or "accept", see `NGPlus`.
        function_fallback: "vmap" or "base", see `NGPlus`.
        max_samples: most samples that a curvature step uses of each layer, of all processes together, or None.
        block_size: p of (18), or None.
        max_rank: most columns of U, as a fraction of the matrix's side, for which the sum of rank-one products is
            kept as U (14); 0 keeps none.
        least_side: shortest side of a matrix for which it is.
        sketch_size: columns of 𝒢ᵢ to sample (17) where U is not kept, or None for all.
    """

    samples: Samples
    model_calls: ModelCallSamples
    partial_capture: PartialCapture
    max_samples: int | None
    function_fallback: FunctionFallback = "base"
    block_size: int | None = None
    max_rank: float = 0.0
    least_side: int = 1
    sketch_size: int | None = None

    def keeps_columns(self, rank: int, side: int) -> bool:
        """Whether U of so many columns is kept, of a matrix with the short side ``side``."""
        return side >= self.least_side and rank <= self.max_rank * side

    @classmethod
    def from_options(cls, options: LayerwiseOptions, **others: Any) -> Sampling:
        """The sampling of an optimizer with these options.

        Args:
            options: of the optimizer.
            **others: the attributes that are no options of all of them.

        Returns:
            The sampling.
        """
        return cls(
            samples=options.samples,
            model_calls=options.model_calls,
            partial_capture=options.partial_capture,
            max_samples=options.max_samples,
            **others,
        )


@dataclass(eq=False)
class Statistic:
    """Sums over the samples of one layer on one curvature step.

    Attributes:
        shape: of what is summed.
        moments: Σ of products of the gradients that backward returned, one tensor a stack of blocks.
        columns: the same sum as UUᵀ, while that is the cheaper form.
        samples: N that went through the layer.
        used: |S| of them that were summed.
        reduction: what the loss divides by: "mean" for N, "sum" for 1, or a number.
    """

    shape: MatrixShape
    moments: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    samples: int = 0
    used: int = 0
    reduction: Reduction = "mean"

    def scale(self) -> float:
        """Factor from the sum to (4).

        Backward of a mean over N samples returns 𝒢ᵢ/N, so that (4) is N² Σ / |S|. Where N is given and the layer saw
        n samples of which |S| were summed, the others' gradients are zero and (4) is N (n / |S|) Σ.
        """
        if self.reduction == "sum":
            return 1 / max(1, self.used)
        return (self.samples if self.reduction == "mean" else self.reduction) * self.samples / max(1, self.used)

    @property
    def weight(self) -> float:
        """How many samples it stands for in an average over processes."""
        return self.reduction if self.used and not isinstance(self.reduction, str) else self.used

    def tensors(self) -> list[Tensor]:
        """Everything that was summed."""
        return [*self.moments, *self.columns]

    def is_zero(self) -> bool:
        """Whether every sample's gradient is zero. Synchronizes with the device."""
        return all(is_zero(tensor) for tensor in self.tensors())

    def add_(self, moments: list[Tensor]) -> None:
        """Add to the sum, in place; ``moments`` are its own from then on."""
        self.moments = add_stacks_([self.moments, moments]) if self.moments else moments

    def densify_(self) -> None:
        """Replace UUᵀ by moments."""
        if self.columns:
            self.add_(multiply_columns(self.shape, torch.cat(self.columns, dim=1).unsqueeze(0)))
            self.columns = []


class Addition(NamedTuple):
    """Uses that are to be added to a layer's statistic.

    Attributes:
        layer: the layer.
        statistic: its sums so far.
        pairs: factors of uses by the same samples; with ``samples="rows"`` of one use.
        total: gets Σᵢ 𝒢ᵢ of the only use, where it is of use and found on the way.
    """

    layer: Layer
    statistic: Statistic
    pairs: Sequence[FactorPair]
    total: GradientSum | None = None


class Accumulator:
    """Sums Σᵢ 𝒢ᵢ𝒢ᵢᵀ, or Σᵢ 𝒢ᵢᵀ𝒢ᵢ, of a layer's captured uses.

    Args:
        sampling: see `Sampling`.
        generator: samples the columns of (17).
        tuning: sizes of temporaries.

    Attributes:
        sampling: as given.
    """

    statistic: ClassVar[type[Statistic]] = Statistic
    missing: ClassVar[str] = "where a single sample's gradient cannot be captured"
    """What a layer lacks that is not supported, for messages."""
    sums_gradients: ClassVar[bool] = True
    """Whether it may find Σᵢ 𝒢ᵢ on the way, see `Addition`."""
    adds_together: ClassVar[bool] = True
    """Whether its statistic is the sum of products of 𝒢ᵢ with itself, which those of several layers may share."""

    def __init__(self, sampling: Sampling, generator: torch.Generator, tuning: Tuning = DEFAULT) -> None:
        self.sampling = sampling
        self._generator = generator
        self._tuning = tuning

    @property
    def reads_any_function(self) -> bool:
        """Whether calls without a handler are differentiated again."""
        return self.sampling.function_fallback == "vmap"

    def check(self, call: OpCall) -> None:
        """Refuse a use that has no statistic.

        Args:
            call: the use.

        Raises:
            UnsupportedCall: of such a use.
        """

    def regroup(self, pair: FactorPair, index: Tensor, batch_dim: int, samples: int, name: str) -> FactorPair:
        """The factors with their rows assigned to the samples that the user's index names.

        Args:
            pair: of one use.
            index: (b,), or of the input's shape without its features; negative where a row counts as none.
            batch_dim: of the input.
            samples: how many there are.
            name: of the layer, for errors.

        Returns:
            The factors.

        Raises:
            ValueError: an index for another number of rows.
        """
        if self.sampling.samples == "rows":
            return drop_uncounted_rows(pair, index, batch_dim, name)
        return group_rows(pair, index, batch_dim, samples, name)

    def add_(
        self, layer: Layer, statistic: Statistic, pairs: Sequence[FactorPair], total: GradientSum | None = None
    ) -> None:
        """Add to a layer's statistic, in place.

        Args:
            layer: the layer.
            statistic: its sums so far.
            pairs: factors of uses by the same samples; with ``samples="rows"`` of one use.
            total: see `Addition`.

        Raises:
            UnsupportedCall: of uses that have no statistic together.
        """
        if used := self._take_used_(statistic, pairs):
            is_whole = len(used) == 1 and used[0] is pairs[0]
            self._add_used_(
                statistic, used if len(used) == 1 else _join_single_positions(used), total if is_whole else None
            )

    def waits(self, pair: FactorPair) -> bool:
        """Whether a use is so small that it is worth keeping until the step, to be added with other layers'."""
        return self.adds_together and is_small(pair, self._tuning)

    def add_together_(self, additions: Sequence[Addition]) -> list[Addition]:
        """Add to the statistics of several layers, in place: small ones of equal shapes in one product.

        Args:
            additions: of different statistics.

        Returns:
            Those that are left, for `add_`.
        """
        if not self.adds_together:
            return list(additions)
        single = [each for each in additions if self._is_single(each)]
        groups = group_equal([(each.statistic.shape, each.pairs[0]) for each in single])
        taken: set[int] = set()
        for places in groups:
            members = [single[place] for place in places]
            used = [self._take_used_(each.statistic, each.pairs) for each in members]
            moments = second_moments(members[0].statistic.shape, [pairs[0] for pairs in used])
            for each, moment in zip(members, moments, strict=True):
                each.statistic.add_([moment])
            taken.update(map(id, members))
        return [each for each in additions if id(each) not in taken]

    def _is_single(self, addition: Addition) -> bool:
        """Whether all samples of one use are added as moments."""
        statistic, pairs = addition.statistic, addition.pairs
        limit, rank = self._limit, pairs[0].rows.samples
        kept_as_columns = not statistic.moments and self.sampling.keeps_columns(rank, statistic.shape.short)
        within = limit is None or statistic.used + rank <= limit
        return len(pairs) == 1 and within and rank > 0 and not (kept_as_columns or statistic.columns)

    def _take_used_(self, statistic: Statistic, pairs: Sequence[FactorPair]) -> list[FactorPair]:
        """Count the samples of some uses in, and return the factors of those that are to be summed."""
        if self.sampling.samples == "rows":
            pairs = [flatten_positions(pair) if pair.rows.positions > 1 else pair for pair in pairs]
        count = pairs[0].rows.samples
        used = self._count_used(statistic, count)
        statistic.samples += count
        statistic.used += used
        if used == count:
            return list(pairs) if used else []
        return [FactorPair(p.rows.slice(0, used), p.columns.slice(0, used), p.group) for p in pairs] if used else []

    @property
    def _limit(self) -> int | None:
        """Most samples of each layer that this process uses."""
        limit = self.sampling.max_samples
        return None if limit is None else own_share(limit)

    def _count_used(self, statistic: Statistic, samples: int) -> int:
        """How many of ``samples`` more are to be used."""
        limit = self._limit
        return samples if limit is None else max(0, min(samples, limit - statistic.used))

    def _add_used_(self, statistic: Statistic, pairs: list[FactorPair], total: GradientSum | None = None) -> None:
        if pairs[0].group is not None or (len(pairs) > 1 and any(pair.group is not None for pair in pairs)):
            self._add_groups_(statistic, pairs)
            return
        shape = statistic.shape
        rank_one = len(pairs) == 1 and pairs[0].rows.positions == 1
        if rank_one and shape.groups == 1 and not statistic.moments:
            rank = pairs[0].rows.samples + sum(columns.shape[1] for columns in statistic.columns)
            if self.sampling.keeps_columns(rank, shape.short):
                statistic.columns.append(scale_columns(shape, pairs[0]))
                return
        statistic.densify_()
        if not rank_one and (size := self.sampling.sketch_size) is not None and size < shape.long:
            pairs = [sample_long_side(shape, p, sample_indices(shape.long, size, self._generator)) for p in pairs]
            total = None
        statistic.add_(second_moment(shape, pairs, self._tuning, total))

    def _add_groups_(self, statistic: Statistic, pairs: list[FactorPair]) -> None:
        """Add what single ones of the layer's matrices were multiplied by, each to its own sum."""
        shape = statistic.shape
        groups: dict[int, list[FactorPair]] = {}
        for pair in pairs:
            if pair.group is None:
                raise UnsupportedCall("is used as a whole and by single matrices of it, on the same samples")
            groups.setdefault(pair.group, []).append(pair._replace(group=None))
        if not statistic.moments:
            device, dtype = pairs[0].rows.device, pairs[0].rows.dtype
            statistic.moments = [torch.zeros(size, dtype=dtype, device=device) for size in shape.stack_shapes]
        for number, together in groups.items():
            alone = Statistic(replace(shape, groups=1))
            self._add_used_(alone, together)
            alone.densify_()
            for total, part in zip(statistic.moments, alone.moments, strict=True):
                total[number * len(part) : (number + 1) * len(part)] += part


def _join_single_positions(pairs: list[FactorPair]) -> list[FactorPair]:
    """Uses of one position each, as those of a recurrent layer's steps, as one use of many: products of all at once."""
    alike: dict[Any, list[tuple[Dense, Dense, FactorPair]]] = {}
    joined = []
    for pair in pairs:
        rows, columns, group = pair
        if isinstance(rows, Dense) and isinstance(columns, Dense) and rows.positions == 1:
            shapes = rows.entries.shape, columns.entries.shape
            key = *shapes, rows.first_row, rows.full_size, columns.appended, group
            alike.setdefault(key, []).append((rows, columns, pair))
        else:
            joined.append(pair)
    for together in alike.values():
        every = [_join([rows for rows, _, _ in together]), _join([columns for _, columns, _ in together])]
        joined.append(together[0][2]._replace(rows=every[0], columns=every[1]))
    return joined


def _join(factors: Sequence[Dense]) -> Dense:
    """Factors of equal sizes as one of all their positions."""
    if len(factors) == 1:
        return factors[0]
    return replace(factors[0], entries=torch.cat([factor.entries.mT for factor in factors], dim=2).mT)


def is_zero(tensor: Tensor) -> bool:
    """Whether no entry differs from zero. Synchronizes with the device."""
    return not bool(stored_values(local_part(tensor)).any())


__all__ = ["Accumulator", "Addition", "Sampling", "Statistic", "is_zero"]
