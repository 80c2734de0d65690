"""From a curvature step's sums to preconditioners: scale, average over processes and over time (11), invert."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ngplus.capture.accumulator import Statistic
from ngplus.curvature.all_reduce import Share, average_, invert_shared, largest, sum_over_processes, world_size
from ngplus.curvature.damped_cholesky import InverseRequest, invert
from ngplus.curvature.store import CurvatureStore
from ngplus.devices import reads_without_sync
from ngplus.factors.factor import statistics_dtype
from ngplus.layers import Layer
from ngplus.sharded.remote_inverse import RemoteInverse
from ngplus.solvers.preconditioner import Preconditioner
from ngplus.tuning import DEFAULT, Tuning


class LayerCurvature(CurvatureStore):
    """A curvature that is made of sums over samples, on curvature steps.

    A method is a subclass, which says what its matrices are and what is made of them.

    Args:
        block_size: p of (18), or None.
        ema: β of (11), in [0, 1).
        tuning: how often a damping is raised.
    """

    def __init__(self, *, block_size: int | None = None, ema: float = 0.0, tuning: Tuning = DEFAULT) -> None:
        super().__init__(block_size)
        self._ema = ema
        self._tuning = tuning

    # What a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def _scale_(self, layer: Layer, statistic: Statistic, loss_scale: float) -> None:
        """Scale a process's sums to its curvature matrices, in place."""

    @abstractmethod
    def _update_states_(self, sums: Mapping[Layer, Statistic], damping: Mapping[Layer, float]) -> None:
        """Update what is kept of some layers.

        Args:
            sums: the curvature matrices of each, finite.
            damping: λ of each.
        """

    def _empty_moments(self, layer: Layer) -> list[Tensor]:
        """The zeros that a process without samples brings to the average."""
        dtype, shape = statistics_dtype(layer.weight.dtype), layer.shape(self._block_size)
        return [torch.zeros(size, dtype=dtype, device=layer.weight.device) for size in shape.stack_shapes]

    @property
    def _keeps_average(self) -> bool:
        return self._ema > 0

    # The update ---------------------------------------------------------------------------------------------------

    def update(
        self,
        layers: Sequence[Layer],
        statistics: Mapping[Layer, Statistic],
        damping: Mapping[Layer, float],
        loss_scale: float,
        unsupported: Collection[Layer] = (),
    ) -> tuple[list[Layer], list[Layer]]:
        """Update the preconditioners with the sums of a curvature step.

        Args:
            layers: for which this is a curvature step, the same on every process.
            statistics: what was summed; a layer without samples may be missing. Changed in place.
            damping: λ of each layer.
            loss_scale: factor by which all gradients were larger than the loss's.
            unsupported: layers that this process has no statistic of, so that no process may have one.

        Returns:
            Layers whose sums were not finite, which keep what they had; and those that another process does not
            support.
        """
        sums = {layer: statistics[layer] for layer in layers if layer in statistics}
        for layer, statistic in sums.items():
            self._scale_(layer, statistic, loss_scale)
        elsewhere: list[Layer] = []
        if world_size() > 1:
            elsewhere, nonfinite = self._average_over_processes_(layers, sums, unsupported)
        else:
            nonfinite = _find_nonfinite(sums)
        self._update_states_({layer: each for layer, each in sums.items() if layer not in nonfinite}, damping)
        return nonfinite, elsewhere

    def _average_over_processes_(
        self, layers: Sequence[Layer], sums: dict[Layer, Statistic], unsupported: Collection[Layer]
    ) -> tuple[list[Layer], list[Layer]]:
        """Average over processes.

        Args:
            layers: as for `update`.
            sums: of this process, changed in place; afterwards it has the same layers on all processes.
            unsupported: as for `update`.

        Returns:
            Layers that another process does not support, and those whose sums were not finite.
        """
        weights = [sums[layer].weight if layer in sums else 0.0 for layer in layers]
        device = layers[0].weight.device
        totals, flags = sum_over_processes([weights, [float(layer in unsupported) for layer in layers]], device)
        used = [layer for layer, total, flag in zip(layers, totals, flags, strict=True) if total and not flag]
        ours = [sums[layer] if layer in sums else self._empty_statistic(layer) for layer in used]
        for statistic in ours:
            statistic.densify_()
        weight, total = (dict(zip(layers, each, strict=True)) for each in (weights, totals))
        shares = [
            Share(statistic.moments, weight[layer], total[layer], wanted=not self._is_elsewhere(layer))
            for layer, statistic in zip(used, ours, strict=True)
        ]
        finite = average_(shares, self._tuning)
        sums.clear()
        for layer, statistic in zip(used, ours, strict=True):
            statistic.used = int(total[layer])
            sums[layer] = statistic
        elsewhere = [layer for layer, flag in zip(layers, flags, strict=True) if flag and layer not in unsupported]
        return elsewhere, [layer for layer, fine in zip(used, finite, strict=True) if not fine]

    def _empty_statistic(self, layer: Layer) -> Statistic:
        return Statistic(layer.shape(self._block_size), moments=self._empty_moments(layer))

    def _update_average(self, layer: Layer, statistic: Statistic) -> list[Tensor]:
        """L̄ₖ = β L̄ₖ₋₁ + (1 − β) Lₖ, equation (11), which starts from L₀, and again where its form has changed."""
        before, moments, beta = self.states.get(layer), statistic.moments, self._ema
        if not beta or before is None or before.average is None or before.shape != statistic.shape:
            return moments
        if [old.shape for old in before.average] != [new.shape for new in moments]:  # a loaded K-FAC's other max_side
            return moments
        pairs = zip(before.average, moments, strict=True)
        return [old.to(new).mul(beta).add_(new, alpha=1 - beta) for old, new in pairs]

    def _is_elsewhere(self, layer: Layer) -> bool:
        """Whether another process alone keeps what is made for a layer."""
        return self.sharding is not None and self.sharding.is_elsewhere(layer)


class InverseCurvature(LayerCurvature):
    """A curvature whose damped matrices are inverted; see `LayerCurvature` for its arguments."""

    @abstractmethod
    def _requests(self, layer: Layer, statistic: Statistic, damping: float) -> list[InverseRequest]:
        """The matrices to invert for a layer; none where it needs no explicit inverse."""

    @abstractmethod
    def _make(self, statistic: Statistic, inverses: list[Tensor], damping: float) -> Preconditioner | None:
        """Make a layer's preconditioner of the inverses of `_requests`; None where it cannot be made."""

    def _shift(self, damping: float) -> float:
        """What is added to the diagonals."""
        return damping

    def _update_states_(self, sums: Mapping[Layer, Statistic], damping: Mapping[Layer, float]) -> None:
        requests = {
            layer: self._requests(layer, statistic, damping[layer])
            for layer, statistic in sums.items()
            if not self._is_elsewhere(layer)
        }
        needed = self._invert_(list(sums), requests)
        for layer, statistic in sums.items():
            self._finish(layer, statistic, requests.get(layer, []), damping[layer], needed.get(layer))

    def _invert_(
        self, layers: Sequence[Layer], requests: Mapping[Layer, Sequence[InverseRequest]]
    ) -> dict[Layer, float]:
        """Fill in the inverses of ``requests``.

        Args:
            layers: the same on every process.
            requests: of those whose inverses this process keeps.

        Returns:
            λ that was needed, 0 for a failure, of the layers whose inverses a single process keeps.
        """
        kept = [] if self.sharding is None else [layer for layer in layers if self.sharding.keeper(layer) is not None]
        alone = set(kept)
        mine = [request for layer in requests if layer in alone for request in requests[layer]]
        invert(mine, self._tuning)
        for request in mine:  # in rows, as the others' are, and as they are loaded
            request.inverse = None if request.inverse is None else request.inverse.contiguous()
        together = [request for layer in requests if layer not in alone for request in requests[layer]]
        if world_size() > 1 and together:
            invert_shared(together, self._tuning)
        else:
            invert(together, self._tuning)
        if not kept:
            return {}
        ours = [_needed_damping(requests.get(layer, ())) for layer in kept]
        return dict(zip(kept, largest(ours, kept[0].weight.device), strict=True))

    def _finish(
        self,
        layer: Layer,
        statistic: Statistic,
        requests: Sequence[InverseRequest],
        damping: float,
        needed: float | None,
    ) -> None:
        """Keep a layer's new preconditioner, or what it had where there is none.

        Args:
            layer: the layer.
            statistic: its sums.
            requests: its inverses; none where another process keeps them.
            damping: λ.
            needed: λ that the only process which keeps the inverses needed, 0 for a failure; None where all keep them.
        """
        inverses = [request.inverse for request in requests if request.inverse is not None]
        preconditioner: Preconditioner | None = None
        if self._is_elsewhere(layer):
            preconditioner = RemoteInverse.like(layer.weight) if needed else None
        elif len(inverses) == len(requests):
            preconditioner = self._make(statistic, inverses, damping)
        if preconditioner is None:
            warnings.warn(
                f"the curvature matrix of {layer.name} would not factorise, even with its damping raised from "
                f"{damping:g} tenfold several times; what it had before is kept",
                stacklevel=4,
            )
            return
        wanted = self._shift(damping)
        dampings = [(request.damping, request.used_damping) for request in requests]
        for given, raised in [(wanted, needed)] if needed else dampings:
            if raised > given:
                warnings.warn(
                    f"the damping of {layer.name} was raised from {given:g} to {raised:g} for this curvature step: the "
                    "matrix would not factorise with less",
                    stacklevel=4,
                )
        used = needed or max((raised for _, raised in dampings), default=wanted)
        before = self.states.get(layer)
        average = [request.matrices for request in requests] if self._ema else None
        updates = 1 + (before.updates if before else 0)
        self.states[layer] = self.state_class(statistic.shape, preconditioner, average, used, updates)


def _needed_damping(requests: Sequence[InverseRequest]) -> float:
    """The largest λ that was needed for a layer's inverses; 0 where there are none, or one could not be made."""
    needed = [request.used_damping if request.inverse is not None else 0.0 for request in requests]
    return max(needed) if needed and min(needed) > 0 else 0.0


def _find_nonfinite(sums: Mapping[Layer, Statistic]) -> list[Layer]:
    """Layers whose sums are not finite: NaN must not be factorised.

    On a CPU by the sum of each one's entries, as in `FiniteCheck`; on other devices it synchronizes once.
    """
    nonfinite: list[Layer] = []
    flags: dict[Layer, Tensor] = {}
    for layer, statistic in sums.items():
        tensors = statistic.tensors()
        if not all(reads_without_sync(stack) for stack in tensors):
            flags[layer] = torch.stack([stack.isfinite().all() for stack in tensors]).all().cpu()
        elif not all(math.isfinite(stack.sum().item()) or bool(stack.isfinite().all()) for stack in tensors):
            nonfinite.append(layer)
    if flags:
        known: list[bool] = torch.stack(list(flags.values())).tolist()
        nonfinite += [layer for layer, fine in zip(flags, known, strict=True) if not fine]
    return nonfinite


__all__ = ["InverseCurvature", "LayerCurvature"]
