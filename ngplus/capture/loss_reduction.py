"""What the loss divides by: the N for which a backward pass returns 𝒢ᵢ/N."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor

Reduction = Literal["mean", "sum"] | float


LossReduction = Reduction | Tensor | Mapping[str, Any] | Callable[[], Any]


_ALLOWED = '"mean", "sum", the number that the loss divides by, a dict of these by module name, or a function of these'


def check_loss_reduction(value: Any) -> None:
    """Raise where ``value`` is no loss reduction: `TypeError`, `ValueError`."""
    if isinstance(value, Mapping):
        for pattern, each in value.items():
            if not isinstance(pattern, str):
                raise TypeError(f"loss_reduction must map patterns of module names, got {pattern!r} as one")
            check_loss_reduction(each)
    elif isinstance(value, str):
        if value not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be {_ALLOWED}, got {value!r}")
    elif not callable(value) or isinstance(value, Tensor):
        _number(value)


def _number(value: Any) -> float:
    """The number that a loss divides by; 0 where a batch has nothing to count. Synchronizes for a tensor's."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"loss_reduction must be {_ALLOWED}, got {value!r}") from None
    except OverflowError:  # an integer that is too large for one
        number = math.inf
    if isinstance(value.item() if hasattr(value, "item") else value, bool) or not 0 <= number < math.inf:
        raise ValueError(f"loss_reduction must be {_ALLOWED}: a finite number ≥ 0, got {value!r}")
    return number


def find_reduction(value: LossReduction, module: str) -> Reduction:
    """Find what the loss divides by for the layer of a module.

    Args:
        value: of the optimizer. Of a dict the first pattern that fits counts, "mean" where none does.
        module: name of the layer's module.

    Returns:
        "mean", "sum" or a number.

    Raises:
        TypeError: a function that returned no loss reduction.
        ValueError: a number that is negative or not finite.
    """
    if callable(value) and not isinstance(value, Tensor):
        value = value()
        check_loss_reduction(value)
    if isinstance(value, Mapping):
        value = next((each for pattern, each in value.items() if fnmatchcase(module, pattern)), "mean")
        return find_reduction(value, module)
    return value if isinstance(value, str) else _number(value)
