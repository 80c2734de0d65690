"""The curvature whose eigenvectors are a basis for the base, of every mode of a weight (beyond the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngplus.capture.accumulator import Accumulator, Sampling, Statistic
from ngplus.capture.contractions import UnsupportedCall
from ngplus.config import Options
from ngplus.curvature.all_reduce import find_shared_bases, pack_triangles, unpack_triangles, world_size
from ngplus.curvature.eigenvectors import BasisRequest, find_bases
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.second_moment import form_gradients, second_moment
from ngplus.curvature.update import LayerCurvature
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.pair import FactorPair
from ngplus.factors.products import multiply_by_transpose
from ngplus.layers import Layer, MatrixShape, Side, to_row_sparse
from ngplus.solvers.by_name import check_form
from ngplus.solvers.eigenbasis import EigenBasis, Mode, Modes, find_modes
from ngplus.solvers.preconditioner import Entries
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class ModeStatistic(Statistic):
    """Sums over samples: ``moments`` has one tensor (groups, d, d) for every mode that is kept.

    Attributes:
        in_basis: whether they are QᵀSQ, in the basis Q that the layer has, in place of S.
        modes: of the layer, known from the first use on.
    """

    in_basis: bool = False
    modes: Modes | None = None


class ModeAccumulator(Accumulator):
    """Sums the products of single samples' gradients, of every mode.

    Args:
        sampling: see `Sampling`.
        generator: see `Accumulator`.
        tuning: sizes of temporaries.
        options: of the optimizer.
    """

    statistic = ModeStatistic
    adds_together = False

    def __init__(self, sampling: Sampling, generator: torch.Generator, tuning: Tuning, *, options: Options) -> None:
        super().__init__(sampling, generator, tuning)
        self._options = options

    def add_(
        self, layer: Layer, statistic: Statistic, pairs: Sequence[FactorPair], total: GradientSum | None = None
    ) -> None:
        """Add to a layer's statistic, in place; see `Accumulator.add_`.

        Args:
            layer: the layer.
            statistic: its sums so far.
            pairs: factors of uses by the same samples.
            total: see `Addition`.

        Raises:
            UnsupportedCall: of a use that multiplies by one of several matrices.
        """
        assert isinstance(statistic, ModeStatistic)
        if any(pair.group is not None for pair in pairs):
            raise UnsupportedCall("is one of several matrices of a weight")
        statistic.modes = find_modes(layer, self._options.sides, self._options.max_side)
        super().add_(layer, statistic, pairs, total)

    def _add_used_(self, statistic: Statistic, pairs: list[FactorPair], total: GradientSum | None = None) -> None:
        assert isinstance(statistic, ModeStatistic)
        assert statistic.modes is not None
        statistic.add_(sum_sample_products(statistic.shape, statistic.modes, pairs, self._tuning, total))


_SIDES: dict[Mode, Side] = {"output": "left", "input": "right"}


def sum_sample_products(
    shape: MatrixShape,
    modes: Modes,
    pairs: Sequence[FactorPair],
    tuning: Tuning = DEFAULT,
    total: GradientSum | None = None,
) -> list[Tensor]:
    """Σᵢ of the products of 𝒢ᵢ as a matrix with one mode first, for every mode that is kept.

    Args:
        shape: of the layer's matrix.
        modes: of the layer.
        pairs: the factors of all uses by the same samples.
        tuning: sizes of temporaries.
        total: gets Σᵢ 𝒢ᵢ where 𝒢ᵢ is formed; of one pair.

    Returns:
        A tensor (groups, d, d) for each of ``modes.kept``.
    """
    if modes.kernel == 1:
        sides = [replace(shape, chosen_side=_SIDES[mode]) for mode in modes.kept]
        totals = [total] + [None] * len(sides)
        return [second_moment(side, pairs, tuning, each)[0] for side, each in zip(sides, totals, strict=False)]
    rows, columns = [pair.rows for pair in pairs], [pair.columns for pair in pairs]
    limit = tuning.curvature_chunk(rows[0].device)
    step = max(1, limit // max(1, shape.groups * shape.rows * shape.columns))
    sums: list[Tensor] = []
    for start in range(0, rows[0].samples, step):
        stop = min(start + step, rows[0].samples)
        G = form_gradients(
            [f.slice(start, stop) for f in rows], [f.slice(start, stop) for f in columns], shape.groups, limit
        )
        if total is not None:
            total.add_(G, "left")
            total.complete = stop == rows[0].samples
        products = multiply_modes(modes, G.transpose(0, 1).reshape(modes.groups, -1, modes.inputs, modes.kernel))
        sums = [total.add_(product) for total, product in zip(sums, products, strict=True)] if sums else products
    return sums


def multiply_modes(modes: Modes, tensor: Tensor) -> list[Tensor]:
    """The product with itself of a tensor as a matrix with one mode first, for every mode that is kept.

    Args:
        modes: of the layer.
        tensor: (groups, b · m, i, k): b tensors one after another, whose products are summed.

    Returns:
        A tensor (groups, d, d) for each of ``modes.kept``.
    """
    groups, rows = tensor.shape[:2]
    m, i, k = modes.shape[1:]
    products = []
    for mode in modes.kept:
        if mode == "output":
            first = tensor.reshape(groups, rows // m, m, i * k).transpose(1, 2).reshape(groups, m, -1)
            products.append(multiply_by_transpose(first))
        else:
            last = tensor.reshape(groups, rows * i, k) if mode == "kernel" else tensor.mT.reshape(groups, rows * k, i)
            products.append(multiply_by_transpose(last.mT))
    return products


class EigenState(LayerState):
    """What is kept of one layer with ``basis="eigen"``."""

    preconditioner: EigenBasis

    def __repr__(self) -> str:
        modes = self.preconditioner.modes
        size = f"{modes.groups}×" if modes.groups > 1 else ""
        sides = ", ".join(f"{mode} {modes.size(mode)}" for mode in modes.kept)
        return (
            f"EigenState(matrix {size}{self.shape.rows}×{self.shape.columns}, eigenvectors of {sides}, "
            f"{self.updates} updates, {self.numel():,} elements kept)"
        )


class EigenCurvature(LayerCurvature):
    """The eigenvectors of every layer's curvature.

    Args:
        options: of the optimizer.
        momentum: name of the base's first moment, where its product is the curvature.
        tuning: see `Tuning`.
    """

    state_class = EigenState
    states: dict[Layer, EigenState]  # type: ignore[assignment]

    def __init__(self, options: Options, momentum: str | None, tuning: Tuning = DEFAULT) -> None:
        super().__init__(ema=options.ema, tuning=tuning)
        self._options = options
        self._momentum = momentum

    def modes(self, layer: Layer) -> Modes:
        """The modes of a layer's weight."""
        return find_modes(layer, self._options.sides, self._options.max_side)

    def find_basis(self, layer: Layer) -> EigenBasis | None:
        """The basis that a layer's gradient, which it has, is given to the base in."""
        state = self.find_ready(layer)
        return state.preconditioner if isinstance(state, EigenState) else None

    # From sums to eigenvectors --------------------------------------------------------------------------------------

    def _scale_(self, layer: Layer, statistic: Statistic, loss_scale: float) -> None:
        scale = statistic.scale() / loss_scale**2
        statistic.moments = [moment * scale for moment in statistic.moments]

    def _empty_moments(self, layer: Layer) -> list[Tensor]:
        modes, dtype, device = self.modes(layer), statistics_dtype(layer.weight.dtype), layer.weight.device
        return [torch.zeros(modes.matrix_shape(mode), dtype=dtype, device=device) for mode in modes.kept]

    def _update_states_(self, sums: Mapping[Layer, Statistic], damping: Mapping[Layer, float]) -> None:
        requests = {layer: self._requests(layer, statistic) for layer, statistic in sums.items()}
        every = [request for of_layer in requests.values() for request in of_layer]
        if world_size() > 1 and every:
            find_shared_bases(every)
        else:
            find_bases(every)
        for layer, of_layer in requests.items():
            self._finish(layer, sums[layer], of_layer, damping[layer])

    def _requests(self, layer: Layer, statistic: Statistic) -> list[BasisRequest]:
        moments, modes = self._update_average(layer, statistic), self.modes(layer)
        before = self._current_basis(layer)
        in_basis = isinstance(statistic, ModeStatistic) and statistic.in_basis
        return [
            BasisRequest(moment, None if before is None else before.bases[mode].to(moment), in_basis)
            for mode, moment in zip(modes.kept, moments, strict=True)
        ]

    def _current_basis(self, layer: Layer) -> EigenBasis | None:
        """The basis that the layer has; None where its modes are others, as those of a weight that has grown."""
        state = self.states.get(layer)
        return None if state is None or state.preconditioner.modes != self.modes(layer) else state.preconditioner

    def _finish(self, layer: Layer, statistic: Statistic, requests: Sequence[BasisRequest], damping: float) -> None:
        modes = self.modes(layer)
        bases = {
            mode: request.basis for mode, request in zip(modes.kept, requests, strict=True) if request.basis is not None
        }
        if len(bases) < len(requests):
            warnings.warn(
                f"the eigenvectors of the curvature of {layer.name} were not found; what it had before is kept",
                stacklevel=4,
            )
            return
        before = self.states.get(layer)
        average = [_pack_average(request.matrices) for request in requests] if self._ema else None
        updates = 1 + (before.updates if before else 0)
        self.states[layer] = EigenState(statistic.shape, EigenBasis(modes, bases), average, damping, updates)

    # From gradients alone -------------------------------------------------------------------------------------------

    def sum_gradients(
        self, layers: Iterable[Layer], base_state: Mapping[Tensor, MutableMapping[str, Any]]
    ) -> dict[Layer, Statistic]:
        """The products of every mode of each layer's gradient, (12), or of the base's first moment in its place.

        Args:
            layers: those without a gradient are left out.
            base_state: of the base; its first moment is in the layer's basis already. Where it has none yet, the
                gradient's products are taken.

        Returns:
            The statistics.
        """
        sums: dict[Layer, Statistic] = {}
        for layer in layers:
            gradient = layer.weight.grad
            if gradient is None:
                continue
            momentum = None if self._momentum is None else base_state.get(layer.weight, {}).get(self._momentum)
            if momentum is None:
                sums[layer] = self._sum_products(layer, to_row_sparse(gradient), in_basis=False)
            elif (basis := self._current_basis(layer)) is None:
                sums[layer] = self._sum_products(layer, momentum, in_basis=False)
            elif self._ema or world_size() > 1:  # what is averaged, over steps or with others' zeros, is in no basis
                whole = basis.rotate_back(momentum.to(basis.main.dtype).reshape(basis.modes.shape))
                sums[layer] = self._sum_products(layer, whole, in_basis=False)
            else:
                sums[layer] = self._sum_products(layer, momentum, in_basis=True)
        return sums

    def _update_average(self, layer: Layer, statistic: Statistic) -> list[Tensor]:
        """Equation (11) with its start corrected: of k matrices the j-th counts β^(k−j) (1 − β) / (1 − β^k)."""
        before, beta = self.states.get(layer), self._ema
        if not beta or before is None or before.average is None or self._current_basis(layer) is None:
            return statistic.moments
        weight = (1 - beta) / (1 - beta ** (before.updates + 1))
        averages = [
            unpack_triangles(old.to(new).flatten(), new.shape)
            for old, new in zip(before.average, statistic.moments, strict=True)
        ]
        return [old.lerp_(new, weight) for old, new in zip(averages, statistic.moments, strict=True)]

    def _sum_products(self, layer: Layer, used: Tensor, *, in_basis: bool) -> Statistic:
        modes, shape = self.modes(layer), layer.shape(None)
        dtype = statistics_dtype(used.dtype)
        if used.is_sparse and modes.kept == ("input",) and modes.kernel == 1:
            used, modes = _rows_alone(used, modes)
        dense = used.to_dense() if used.is_sparse else used
        X = dense.to(dtype).reshape(modes.shape)
        if X.numel() and not self._ema:  # so that no square under- or overflows; the eigenvectors are the same
            X = X / X.abs().amax().clamp_min(torch.finfo(dtype).tiny)
        return ModeStatistic(shape, moments=multiply_modes(modes, X), samples=1, used=1, in_basis=in_basis)

    # What is saved --------------------------------------------------------------------------------------------------

    def _blank_entries(self, layer: Layer) -> Entries:
        modes, dtype = self.modes(layer), statistics_dtype(layer.weight.dtype)
        blanks: Entries = {
            mode: torch.empty(modes.matrix_shape(mode), dtype=dtype, device="meta") for mode in modes.kept
        }
        averages: Entries = {}
        if self._keeps_average:
            shapes = [modes.matrix_shape(mode) for mode in modes.kept]
            averages = {f"average{i}": _blank_average(shape, dtype) for i, shape in enumerate(shapes)}
        return {"form": 0, "rank": 0, "inputs": modes.inputs, **blanks, **averages}

    def unpack(self, layer: Layer, entries: Mapping[str, Any]) -> EigenState | None:
        """Restore what `pack` gave, see `CurvatureStore.unpack`.

        Args:
            layer: the layer.
            entries: what `pack` gave.

        Returns:
            The layer's state; None where there was no curvature yet.

        Raises:
            ValueError: an entry is missing, is of another matrix, or was saved with other sides or another basis.
        """
        check_form(entries, layer.name, EigenBasis)
        state = super().unpack(layer, entries)
        if state is None:
            return None
        assert isinstance(state, EigenState)
        theirs, ours = state.preconditioner.modes, self.modes(layer)
        if theirs != ours:
            raise ValueError(
                f"the state of {layer.name} has eigenvectors of {', '.join(theirs.kept)}, this optimizer of "
                f"{', '.join(ours.kept)}: it was saved with other sides or max_side"
            )
        return state


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the average of curvature matrices is kept: bfloat16 for those in float32.

    It rounds an entry by 2⁻⁹ of itself, which is less than what a mean over fewer than 2¹⁸ samples is off by.
    """
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _pack_average(matrices: Tensor) -> Tensor:
    """The lower triangles, (groups, p (p + 1) / 2)."""
    return pack_triangles(matrices).view(len(matrices), -1).to(average_dtype(matrices.dtype))


def _blank_average(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    groups, size, _ = shape
    return torch.empty(groups, size * (size + 1) // 2, dtype=average_dtype(dtype), device="meta")


def _rows_alone(gradient: Tensor, modes: Modes) -> tuple[Tensor, Modes]:
    """The rows of a table's sparse gradient that are stored, and the modes of a table of these alone."""
    rows = gradient.coalesce()._values()
    return rows, replace(modes, outputs=len(rows))


__all__ = ["EigenCurvature", "EigenState", "ModeAccumulator", "ModeStatistic", "multiply_modes", "sum_sample_products"]
