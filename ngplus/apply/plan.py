"""Which layers' gradients are preconditioned together, and preconditioning them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from ngplus.apply.grouped import EqualShapes, MixedShapes, PreconditionedLayer, gradient_form, group_small
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.curvature.store import CurvatureStore
from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import Layer
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which layers' gradients are preconditioned together.

    Attributes:
        forms: each layer's preconditioner and what its gradient is like, from which the rest follows.
        together: small ones, several at a time.
        alone: the others that have a gradient and a preconditioner.
    """

    forms: list[Hashable]
    together: list[EqualShapes | MixedShapes]
    alone: list[PreconditionedLayer]


class ApplyPlan:
    """Replaces the gradients of all layers that have a preconditioner by their directions (6).

    Args:
        curvature: of the layers.
        tuning: which gradients are small.

    Attributes:
        has_changed: whether layers have gained or lost a gradient or a curvature since somebody set it to False.
    """

    def __init__(self, curvature: CurvatureStore, tuning: Tuning = DEFAULT) -> None:
        self._curvature = curvature
        self._tuning = tuning
        self._plan: _Plan | None = None
        self.has_changed = True

    def forget(self) -> None:
        """Forget the plan, which holds preconditioners that are to be replaced."""
        self._plan = None

    def apply_(
        self,
        layers: Sequence[Layer],
        check: FiniteCheck,
        precondition_: Callable[[PreconditionedLayer, Tuning], NonzeroRows | None],
    ) -> dict[nn.Parameter, NonzeroRows]:
        """Replace the gradients of the layers that have a preconditioner by their directions, in place.

        Args:
            layers: of the optimizer.
            check: the directions are added to it.
            precondition_: replaces the gradients of a single layer; see `ngplus.apply.layer.precondition_`.

        Returns:
            The nonzero rows, of weights of which they are known.
        """
        plan = self._update_plan(layers)
        nonzero_rows: dict[nn.Parameter, NonzeroRows] = {}
        # Those of small layers last, since the calls for them take longer than what they do: large gradients, which
        # the backward pass has just written, do not leave the cache meanwhile.
        for member in plan.alone:
            weight = member.layer.weight
            rows = precondition_(member, self._tuning)
            if rows is not None:
                nonzero_rows[weight] = rows
            check.add(weight.grad if rows is None else rows.values)  # type: ignore[arg-type]
            check.checked.add(id(weight))
        for group in plan.together:
            group.precondition_(check)
        return nonzero_rows

    def _update_plan(self, layers: Sequence[Layer]) -> _Plan:
        """The plan of the step before, where nothing that decides it has changed."""
        if self._plan is None or self._plan.forms != self._forms(layers):
            found = [(layer, state) for layer in layers if (state := self._curvature.find_ready(layer)) is not None]
            members = [PreconditionedLayer(layer, state.preconditioner, state.shape) for layer, state in found]
            together, alone = group_small(members, self._tuning)
            self._plan = _Plan(self._forms(layers), together, alone)
            self.has_changed = True
        return self._plan

    def _forms(self, layers: Sequence[Layer]) -> list[Hashable]:
        states = self._curvature.states
        return [
            (state.preconditioner, gradient_form(layer)) if (state := states.get(layer)) is not None else None
            for layer in layers
        ]


__all__ = ["ApplyPlan"]
