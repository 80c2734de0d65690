"""A base's step in the eigenbasis of the curvature (beyond the paper): gradients there, and the changes back.

For the time of the base's step a layer's gradient is Gʹ, its coordinates in the basis, and its parameter is zero, so
that what the base makes of it is the change Δʹ, exactly. Afterwards the parameter is W + Δ, with Δ of these
coordinates, and its gradient the one that backward brought. A weight decay is taken out of the base's hands, which
sees a parameter of zero: it needs no product with the basis.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ngplus.apply.grouped import gradient_forms
from ngplus.base_rules import BaseRule
from ngplus.curvature.eigen import EigenCurvature
from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import Layer, to_row_sparse
from ngplus.solvers.eigenbasis import EigenBasis, stack_bases
from ngplus.tuning import DEFAULT, Tuning

Settings = Mapping[str, Any]
"""Those of a parameter group."""


@dataclass(frozen=True, eq=False)
class _Original:
    """What a layer's parameter was before the base's step."""

    weight: nn.Parameter
    data: Tensor
    gradient: Tensor

    def restore_(self) -> None:
        self.weight.data = self.data
        self.weight.grad = self.gradient


class RotatedWeights:
    """The weights of layers of equal modes in one parameter group, which are rotated together.

    Args:
        layers: one at least.
        basis: of all of them, one after another.
        settings: of their parameter group.
        rule: of the base.
    """

    def __init__(self, layers: Sequence[Layer], basis: EigenBasis, settings: Settings, rule: BaseRule) -> None:
        self._weights = [layer.weight for layer in layers]
        self._basis = basis
        self._settings = settings
        self._rule = rule
        self._originals: list[_Original] = []
        self._coordinates: Tensor | None = None
        self._before: Tensor | None = None

    def rotate_(self, check: FiniteCheck) -> None:
        """Give each weight its coordinates' gradient, and zero for its value.

        Args:
            check: the coordinates are added to it.
        """
        weights = self._weights
        decay, kind = self._settings.get("weight_decay", 0), self._rule.decay_kind(self._settings)
        if decay and kind == "none" and not self._rule.reads_parameters:
            raise ValueError(
                f"weight_decay={decay!r} of a parameter group would have no effect in the eigenbasis: the base's "
                'BaseRule has decay="none"; declare how it decays, by "coupled", "decoupled" or "flag"'
            )
        brought: list[Tensor] = [weight.grad for weight in weights if weight.grad is not None]
        self._originals = [_Original(w, w.data, g) for w, g in zip(weights, brought, strict=True)]
        gradients = [g.to_dense() if g.is_sparse else g for g in brought]
        if decay and kind == "coupled" and not self._rule.reads_parameters:
            sign = -1 if self._settings.get("maximize") else 1
            gradients = [torch.add(g, w.data, alpha=sign * decay) for w, g in zip(weights, gradients, strict=True)]
        rotated = self._basis.rotate(self._join(gradients))
        coordinates = torch.zeros_like(rotated, dtype=weights[0].dtype)
        if self._rule.reads_parameters:
            coordinates.copy_(self._basis.rotate(self._join([weight.data for weight in weights])))
            self._before = coordinates.clone()
        self._coordinates = coordinates
        rotated = rotated.to(gradients[0].dtype)  # in which an entry may overflow
        check.add(rotated)
        check.checked.update(map(id, weights))
        parts = zip(weights, self._split(rotated), self._split(coordinates), strict=True)
        for weight, gradient, value in parts:
            weight.data = value
            weight.grad = gradient

    def rotate_back_(self) -> None:
        """Add to each weight, as it was before `rotate_`, the change that its coordinates have had since."""
        change = self._coordinates
        assert change is not None
        if self._before is not None:
            change.sub_(self._before)
        factor = self._decay_factor()
        change = change.to(self._basis.main.dtype)
        originals = self._originals
        self.restore_()
        if isinstance(factor, Tensor):
            torch._foreach_mul_([each.data for each in originals], factor)
            factor = 1.0
        if len(originals) == 1:
            self._basis.add_back_(originals[0].data, change, factor)
            return
        weights = [each.data for each in originals]
        if factor != 1:
            torch._foreach_mul_(weights, factor)
        parts = self._basis.rotate_back(change).view(len(weights), *weights[0].shape)
        torch._foreach_add_(weights, parts.to(weights[0].dtype).unbind())

    def restore_(self) -> None:
        """Put the parameters and their gradients back as they were."""
        for original in self._originals:
            original.restore_()
        self._originals = []
        self._coordinates = self._before = None

    def _decay_factor(self) -> float | Tensor:
        """1 − lr · decay where that is decoupled; a scalar tensor where lr is a tensor, of any shape."""
        decay = self._settings.get("weight_decay", 0)
        if not decay or self._rule.reads_parameters or self._rule.decay_kind(self._settings) != "decoupled":
            return 1.0
        factor: float | Tensor = 1 - self._settings["lr"] * decay
        return factor.reshape(()) if isinstance(factor, Tensor) else factor

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Weight-shaped tensors as one of the basis's modes, in its dtype."""
        dtype, shape = self._basis.main.dtype, self._basis.modes.shape
        joined = tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))
        return joined.to(dtype).reshape(shape)

    def _split(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of the basis's modes as tensors in the weights' shape, views of it."""
        rows, shape = tensor.flatten(0, 1), self._weights[0].shape  # (all rows, i, k)
        return [_as_weight(part, shape) for part in torch.split(rows, shape[0])]


class RotatedRows:
    """A table whose gradient is sparse: the rows that are stored are given to the base in the basis of the columns.

    Args:
        layer: the table.
        basis: of its columns.
    """

    def __init__(self, layer: Layer, basis: EigenBasis) -> None:
        self._weight = layer.weight
        self._basis = basis.bases["input"][0]
        self._gradient: Tensor | None = None
        self._rows: Tensor | None = None
        self._index: Tensor | None = None

    def rotate_(self, check: FiniteCheck) -> None:
        """Give the rows their coordinates' gradient, and zero for their value; see `RotatedWeights.rotate_`.

        Args:
            check: the coordinates are added to it.
        """
        weight = self._weight
        assert weight.grad is not None
        gradient = to_row_sparse(weight.grad).coalesce()
        index, values = gradient._indices()[0], gradient._values()
        rotated = (values.to(self._basis.dtype) @ self._basis).to(values.dtype)
        self._gradient, self._index, self._rows = weight.grad, index, weight.data[index]
        weight.data.index_fill_(0, index, 0.0)
        weight.grad = torch.sparse_coo_tensor(
            index.unsqueeze(0), rotated, gradient.shape, is_coalesced=True, check_invariants=False
        )
        check.add(rotated)
        check.checked.add(id(weight))

    def rotate_back_(self) -> None:
        """Add to each row, as it was before `rotate_`, the change that its coordinates have had since."""
        assert self._index is not None
        assert self._rows is not None
        change = self._weight.data[self._index].to(self._basis.dtype) @ self._basis.T
        self._rows.add_(change.to(self._rows.dtype))
        self.restore_()

    def restore_(self) -> None:
        """Put the rows and the gradient back."""
        if self._index is not None and self._rows is not None:
            self._weight.data.index_copy_(0, self._index, self._rows)
            self._weight.grad = self._gradient
        self._gradient = self._rows = self._index = None


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which weights are rotated together, and what that follows from."""

    forms: list[Hashable]
    groups: list[RotatedWeights | RotatedRows]


class Rotation:
    """Has a base make its step in the bases of an `EigenCurvature`.

    Args:
        curvature: the bases.
        rule: of the base.
        tuning: which weights are small.
    """

    def __init__(self, curvature: EigenCurvature, rule: BaseRule, tuning: Tuning = DEFAULT) -> None:
        self._curvature = curvature
        self._rule = rule
        self._tuning = tuning
        self._plan: _Plan | None = None
        self._rotated: list[RotatedWeights | RotatedRows] = []

    def forget(self) -> None:
        """Forget the plan, which holds bases that are to be replaced."""
        self._plan = None

    def rotate_(
        self,
        groups: Mapping[Layer, Settings],
        check: FiniteCheck,
        base_state: Mapping[Tensor, MutableMapping[str, Any]],
    ) -> None:
        """Give the base the gradients of all layers that have a basis in it.

        Args:
            groups: the layers of the optimizer, and the parameter group of each.
            check: the coordinates are added to it.
            base_state: of the base; what is stored otherwise than the coordinates is replaced by a copy that is not.
        """
        before = self._plan
        plan = self._update_plan(groups)
        for group in plan.groups:
            self._rotated.append(group)
            group.rotate_(check)
        if plan is not before:
            for layer in groups:
                match_strides_(base_state.get(layer.weight, {}), layer.weight)

    def rotate_back_(self) -> None:
        """Add the changes that the base has made to the parameters."""
        while self._rotated:
            self._rotated[-1].rotate_back_()
            self._rotated.pop()

    def restore_(self) -> None:
        """Put parameters and gradients back as they were before `rotate_`, where no `rotate_back_` did."""
        while self._rotated:
            self._rotated.pop().restore_()

    def _update_plan(self, groups: Mapping[Layer, Settings]) -> _Plan:
        known = {layer: state for layer in groups if (state := self._curvature.states.get(layer)) is not None}
        forms: list[Hashable] = [(state.preconditioner, id(groups[layer])) for layer, state in known.items()]
        forms += gradient_forms([layer.weight for layer in known])
        if self._plan is None or self._plan.forms != forms:
            self._plan = _Plan(forms, self._group(groups))
        return self._plan

    def _group(self, groups: Mapping[Layer, Settings]) -> list[RotatedWeights | RotatedRows]:
        together: dict[Hashable, list[tuple[Layer, EigenBasis]]] = {}
        rotated: list[RotatedWeights | RotatedRows] = []
        for layer, settings in groups.items():
            basis, weight = self._curvature.find_basis(layer), layer.weight
            if basis is None or weight.grad is None:
                continue
            if weight.grad.is_sparse and "output" not in basis.bases:
                rotated.append(RotatedRows(layer, basis))
                continue
            small = weight.numel() <= self._tuning.grouped_below
            key: Hashable = id(layer)
            if small:
                key = basis.modes, weight.shape, weight.dtype, weight.grad.dtype, weight.device, id(settings)
            together.setdefault(key, []).append((layer, basis))
        for members in together.values():
            layers, bases = [layer for layer, _ in members], [basis for _, basis in members]
            rotated.append(RotatedWeights(layers, stack_bases(bases), groups[layers[0]], self._rule))
        return rotated

    # When the bases change --------------------------------------------------------------------------------------------

    def bases(self) -> dict[Layer, EigenBasis]:
        """The basis of each layer that has one."""
        return {layer: state.preconditioner for layer, state in self._curvature.states.items()}

    def move_state_(
        self, before: Mapping[Layer, EigenBasis], base_state: Mapping[Tensor, MutableMapping[str, Any]]
    ) -> None:
        """Move the base's state from the bases that there were to those that there are.

        Args:
            before: what `bases` gave.
            base_state: of the base, changed in place.
        """
        after = self.bases()
        for layer in {**before, **after}:
            old, new = before.get(layer), after.get(layer)
            if old is not new and (state := base_state.get(layer.weight)):
                move_state_(state, layer.weight, self._rule, _change(old, new))

    def check_state(self, layers: Iterable[Layer], base_state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Refuse a base with a state that its rule does not know.

        Args:
            layers: whose state is looked at.
            base_state: of the base.

        Raises:
            TypeError: an entry of a weight's shape that is not declared.
        """
        for layer in layers:
            for name, value in base_state.get(layer.weight, {}).items():
                if _moves(value, layer.weight) and name not in self._rule.declared:
                    raise TypeError(
                        f"the base has a state {name!r} of shape {tuple(value.shape)} for {layer.name}, of which its "
                        f"BaseRule says nothing: it declares {', '.join(self._rule.declared) or 'nothing'}"
                    )


def _moves(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape and value.dim() > 0


def _change(old: EigenBasis | None, new: EigenBasis | None) -> EigenBasis:
    """C of each mode, from the identity or to it where there is no basis; one of the two is not None."""
    if old is None or (new is not None and new.modes != old.modes):  # a table has grown, and its state with it
        assert new is not None
        return new
    return old.changed_to(new)


def move_state_(state: MutableMapping[str, Any], weight: Tensor, rule: BaseRule, change: EigenBasis) -> None:
    """Move what a base keeps of a weight by a change of basis, in place.

    Args:
        state: of the weight; entries of another shape stay.
        weight: the weight.
        rule: what its entries are.
        change: C of each mode.
    """
    squared: EigenBasis | None = None
    for name in (*rule.linear, *rule.square, *rule.magnitude):
        value = state.get(name)
        if value is None or not _moves(value, weight):
            continue
        X = value.to(change.main.dtype).reshape(change.modes.shape)
        if name in rule.linear:
            X = change.rotate(X)
        else:
            squared = squared or change.squared()
            X = squared.rotate(X.square()).sqrt_() if name in rule.magnitude else squared.rotate(X)
            X = X.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a square that has overflowed, times zero
        value.copy_(_as_weight(X.flatten(0, 1), value.shape))


def match_strides_(state: MutableMapping[str, Any], weight: Tensor) -> None:
    """Store what a base keeps of a weight in the order of the weight's elements, as a fused step assumes it is.

    Args:
        state: of the weight, changed in place.
        weight: with the value that the base is to see.
    """
    for name, value in state.items():
        if _moves(value, weight) and value.stride() != weight.stride():
            state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _as_weight(part: Tensor, shape: torch.Size) -> Tensor:
    """(rows, i, k) as a weight of ``shape``, a view where k = 1 or ``shape`` has that many positions."""
    return part.view(*part.shape[:2], *shape[2:]) if part.shape[2] > 1 else part.reshape(shape)


__all__ = ["RotatedRows", "RotatedWeights", "Rotation", "match_strides_", "move_state_"]
