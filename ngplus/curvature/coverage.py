"""Which layers are without curvature, and what becomes of them: they are captured again, or go to the base."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ngplus.layers import Layer, rekey_layers


@dataclass(eq=False)
class Coverage:
    """The layers that have a gradient, and no curvature.

    Attributes:
        base: name of the base's class, for messages.
        most_tries: steps in a row on which a layer is captured again.
        pending: layers that are captured again on the next step, which may be no curvature step.
        nonfinite: layers whose sums on this step were not finite.
        tries: how often a layer with a gradient was left without curvature.
        unsupported: layers whose last curvature step found a use that has no curvature.
    """

    base: str
    most_tries: int
    pending: list[Layer] = field(default_factory=list)
    nonfinite: list[Layer] = field(default_factory=list)
    tries: dict[Layer, int] = field(default_factory=dict)
    unsupported: set[Layer] = field(default_factory=set)
    _warned: set[tuple[Layer, str]] = field(default_factory=set)

    def rekey_(self, layers: Sequence[Layer]) -> None:
        """Know the layers of ``layers``, in place of others with the same weights."""
        by_weight = {id(layer.weight): layer for layer in layers}
        self.pending = [by_weight[id(layer.weight)] for layer in self.pending if id(layer.weight) in by_weight]
        self.nonfinite = [by_weight[id(layer.weight)] for layer in self.nonfinite if id(layer.weight) in by_weight]
        self.tries = rekey_layers(self.tries, layers)
        self.unsupported = set(rekey_layers(dict.fromkeys(self.unsupported), layers))
        self._warned = {(by_weight.get(id(layer.weight), layer), reason) for layer, reason in self._warned}

    def update(
        self,
        captured: Sequence[Layer],
        reasons: Mapping[Layer, str],
        nonfinite: Iterable[Layer],
        with_curvature: Collection[Layer],
    ) -> None:
        """Note what came of a curvature step, and warn of layers that are not supported.

        Args:
            captured: layers that it was made for.
            reasons: those of them that are not supported, and why.
            nonfinite: those whose sums were not finite.
            with_curvature: layers that have a curvature now.
        """
        by_reason: dict[str, list[Layer]] = {}
        for layer, reason in reasons.items():
            by_reason.setdefault(reason, []).append(layer)
        for reason, layers in by_reason.items():
            self._warn_once(layers, reason)
        self.unsupported = self.unsupported.difference(captured) | set(reasons)
        self.nonfinite = list(nonfinite)
        for layer in self._find_missing(captured, with_curvature):
            self.tries[layer] = self.tries.get(layer, 0) + 1

    def plan_pending(self, layers: Sequence[Layer], with_curvature: Collection[Layer]) -> None:
        """Choose at the end of a step which layers are captured again on the next, and warn of those given up.

        A layer whose sums were not finite is. So is one that has a gradient but no curvature yet: it was not used, or
        its use was not captured, when the others were.

        Args:
            layers: those of which this may be done; several processes must agree on what they average, and only the
                first kind is the same on all.
            with_curvature: layers that have a curvature now.
        """
        pending, given_up = list(self.nonfinite), list[Layer]()
        for layer in self._find_missing(layers, with_curvature):
            (pending if self.tries.get(layer, 0) < self.most_tries else given_up).append(layer)
        self._warn_once(
            given_up,
            f"has a gradient, but in {self.most_tries} steps no backward pass through the model was captured to bring "
            "it",
        )
        self.pending, self.nonfinite = pending, []

    def _find_missing(self, layers: Sequence[Layer], with_curvature: Collection[Layer]) -> list[Layer]:
        """The layers that have a gradient, and could have a curvature, but have none."""
        if all(map(with_curvature.__contains__, layers)):
            return []
        others = self.unsupported.union(self.nonfinite)
        return [
            layer
            for layer in layers
            if layer not in with_curvature and layer.weight.grad is not None and layer not in others
        ]

    def _warn_once(self, layers: Iterable[Layer], reason: str) -> None:
        """Say which layers go to the base, and why: one warning for all, and each layer once for a reason."""
        names = [layer.name for layer in layers if (layer, reason) not in self._warned]
        self._warned.update((layer, reason) for layer in layers)
        if names:
            one = len(names) == 1
            warnings.warn(
                f"{names[0] if one else ', '.join(names) + ': each'} {reason}; {'it goes' if one else 'they go'} to "
                f"{self.base} untouched",
                stacklevel=2,
            )


__all__ = ["Coverage"]
