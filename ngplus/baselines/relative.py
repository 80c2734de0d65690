"""What the baselines have in common: NG+'s handling of layers, base, steps and states, around another curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from ngplus.optimizer import NGPlus


class Relative(NGPlus):
    """An optimizer that is NG+ but for the matrix it multiplies gradients by.

    Args:
        settings: what it has beyond the options of `NGPlus`, a frozen dataclass.
        model: as for `NGPlus`.
        base: as for `NGPlus`.
        **options: the options it shares with `NGPlus`, and those of ``base``.
    """

    _shared: ClassVar[Sequence[str]] = ("update_every", "batch_dim", "loss_reduction", "nonfinite")

    def __init__(self, settings: Any, model: nn.Module, base: type[Optimizer], **options: Any) -> None:
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise TypeError(f"{name} finds its layers in a model: it needs an nn.Module, got {type(model).__name__}")
        self._settings = settings
        super().__init__(model, base, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings}

    def __repr__(self) -> str:
        shared = {name: getattr(self._options, name) for name in self._shared}
        options = ", ".join(f"{name}={value!r}" for name, value in {**shared, **asdict(self._settings)}.items())
        return f"{type(self).__name__}({len(self._layers)} layers, {options})\nbase {self._base!r}"
