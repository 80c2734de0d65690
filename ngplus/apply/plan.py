"""Which layers' gradients are preconditioned together, and preconditioning them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from ngplus.apply.grouped import EqualShapes, MixedShapes, PreconditionedLayer, gradient_forms, group_small
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.store import CurvatureStore
from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import Layer
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which layers' gradients are preconditioned together.

    Attributes:
        layers: of the optimizer.
        states: of those that have a preconditioner.
        parameters: their weights and biases, but for those of tiny gradients, which are stacked.
        forms: what the parameters' gradients are like; from this and the states the rest follows.
        tiny: groups of tiny gradients, among ``together``.
        together: small ones, several at a time.
        alone: the others that have a gradient and a preconditioner.
    """

    layers: Sequence[Layer]
    states: list[LayerState]
    parameters: list[nn.Parameter]
    forms: list[Hashable]
    tiny: list[EqualShapes]
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
        plan = self._plan
        if plan is None or plan.layers is not layers or not self._holds(plan):
            plan = self._plan = self._make_plan(layers)
            self.has_changed = True
        return plan

    def _holds(self, plan: _Plan) -> bool:
        same = plan.states == list(self._curvature.states.values())
        return same and gradient_forms(plan.parameters) == plan.forms and all(group.stack() for group in plan.tiny)

    def _make_plan(self, layers: Sequence[Layer]) -> _Plan:
        found = [(layer, state) for layer in layers if (state := self._curvature.find_ready(layer)) is not None]
        members = [PreconditionedLayer(layer, state.preconditioner, state.shape) for layer, state in found]
        together, alone = group_small(members, self._tuning)
        tiny = [group for group in together if isinstance(group, EqualShapes) and group.is_tiny]
        stacked = {id(p) for group in tiny for p in group.parameters}
        known = [p for layer in self._curvature.states for p in (layer.weight, layer.bias) if p is not None]
        parameters = [parameter for parameter in known if id(parameter) not in stacked]
        states = list(self._curvature.states.values())
        return _Plan(layers, states, parameters, gradient_forms(parameters), tiny, together, alone)


__all__ = ["ApplyPlan"]
