"""NG+'s curvature: the generalized Fisher information matrix (4)(5) of each layer, or its mini-batch form (12)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ngplus.capture.accumulator import Sampling, Statistic
from ngplus.config import Options
from ngplus.curvature.all_reduce import world_size
from ngplus.curvature.damped_cholesky import InverseRequest
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.second_moment import multiply_columns
from ngplus.curvature.update import InverseCurvature
from ngplus.dtensors import whole
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.pair import sample_indices
from ngplus.layers import Layer, to_matrix, to_row_sparse
from ngplus.solvers.by_name import FORMS_OF_INVERSES, SOLVERS, ColumnsRequest, blank_entries, check_form
from ngplus.solvers.dense import DenseInverse
from ngplus.solvers.preconditioner import Entries, Preconditioner
from ngplus.tuning import DEFAULT, Tuning


class GFIM(InverseCurvature):
    """The generalized Fisher information matrix L or R of each layer, (4) and (5), or of the mini-batch, (12).

    Args:
        options: of the optimizer.
        generator: samples the rows of (16) and the columns of (17).
        tuning: see `Tuning`.
    """

    def __init__(self, options: Options, generator: torch.Generator, tuning: Tuning = DEFAULT) -> None:
        super().__init__(block_size=options.block_size, ema=options.ema, tuning=tuning)
        self._options = options
        self._generator = generator

    def _scale_(self, layer: Layer, statistic: Statistic, loss_scale: float) -> None:
        scale = statistic.scale() / loss_scale**2
        for stack in statistic.moments:
            stack *= scale
        for columns in statistic.columns:
            columns *= scale**0.5

    def _requests(self, layer: Layer, statistic: Statistic, damping: float) -> list[InverseRequest]:
        """The stacks of blocks; none where the sum is kept as columns."""
        if statistic.columns:
            return []
        return [InverseRequest(stack, self._shift(damping)) for stack in self._update_average(layer, statistic)]

    def _shift(self, damping: float) -> float:
        """λ, or √λ as the released code has it."""
        return damping**0.5 if self._options.damping_rule == "released" else damping

    def _make(self, statistic: Statistic, inverses: list[Tensor], damping: float) -> Preconditioner | None:
        if not statistic.columns:
            return DenseInverse(inverses, statistic.shape)
        request = ColumnsRequest(
            columns=torch.cat(statistic.columns, dim=1),
            damping=self._shift(damping),
            sketch_size=self._options.sketch_size,
            generator=self._generator,
            tuning=self._tuning,
        )
        return SOLVERS[self._options.solver].invert(request)

    def _blank_entries(self, layer: Layer) -> Entries:
        shape, dtype = layer.shape(self._block_size), statistics_dtype(layer.weight.dtype)
        sketch_size = self._options.sketch_size if self._options.solver == "sketched" else None
        entries = blank_entries(shape, sketch_size, dtype)
        if self._keeps_average:
            stacks = [torch.empty(size, dtype=dtype, device="meta") for size in shape.stack_shapes]
            entries |= {f"average{i}": stack for i, stack in enumerate(stacks)}
        return entries

    def unpack(self, layer: Layer, entries: Mapping[str, Any]) -> LayerState | None:
        """Restore what `pack` gave, see `CurvatureStore.unpack`.

        Args:
            layer: the layer.
            entries: what `pack` gave.

        Returns:
            The layer's state; None where there was no curvature yet.

        Raises:
            ValueError: an entry is missing, is of another matrix, or was saved with a basis.
        """
        check_form(entries, layer.name, *FORMS_OF_INVERSES)
        return super().unpack(layer, entries)

    def sum_mini_batch(self, layers: Iterable[Layer]) -> dict[Layer, Statistic]:
        """The mini-batch form (12): G Gᵀ, or GᵀG, of each layer's gradient, as a statistic of one sample.

        Args:
            layers: those without a gradient are left out.

        Returns:
            The statistics.
        """
        return {layer: self._sum_gradient(layer) for layer in layers if layer.weight.grad is not None}

    def _sum_gradient(self, layer: Layer) -> Statistic:
        assert layer.weight.grad is not None
        gradient = to_row_sparse(whole(layer.weight.grad))
        shape, size = layer.shape(self._block_size), self._options.sketch_size
        dtype = statistics_dtype(gradient.dtype)
        if gradient.is_sparse and shape.side == "right" and layer.trained_bias is None:
            G = gradient.coalesce()._values().to(dtype).unsqueeze(0)
        else:
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            G = to_matrix(layer, dense, dtype)
        bias = layer.trained_bias
        if bias is not None:
            column = G.new_zeros(len(bias)) if bias.grad is None else whole(bias.grad)
            G = torch.cat([G, column[layer.bias_slice].reshape(*G.shape[:2], 1).to(dtype)], dim=2)
        short_first = G if shape.side == "left" else G.mT
        if size is not None and size < short_first.shape[2]:
            sampled = sample_indices(short_first.shape[2], size, self._generator)
            scale = (short_first.shape[2] / size) ** 0.5
            short_first = short_first.index_select(2, sampled.to(G.device)) * scale
        return Statistic(shape, moments=multiply_columns(shape, short_first), samples=1, used=1)


def sampling(options: Options, tuning: Tuning = DEFAULT) -> Sampling:
    """Say how NG+ samples a curvature step.

    Args:
        options: of the optimizer.
        tuning: up to which rank sums are kept as columns.

    Returns:
        The sampling. A sum is kept as columns only where it is inverted as it is: one process, no average, no blocks.
    """
    keeps_columns = options.ema == 0 and options.block_size is None and world_size() == 1
    return Sampling.from_options(
        options,
        function_fallback=options.function_fallback,
        block_size=options.block_size,
        max_rank=SOLVERS[options.solver].max_rank(tuning) if keeps_columns else 0.0,
        least_side=tuning.low_rank_from if options.solver == "auto" else 1,
        sketch_size=options.sketch_size,
    )


__all__ = ["GFIM", "sampling"]
