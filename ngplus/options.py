"""What a user of `NGPlus` can choose, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from ngplus.loss_reduction import LossReduction, check_loss_reduction

Curvature = Literal["per_sample", "mini_batch"]
Solver = Literal["auto", "dense", "low_rank", "sketched"]
Samples = Literal["batch", "rows"]
ModelCallSamples = Literal["separate", "joined"]
PartialCapture = Literal["base", "accept"]
DampingRule = Literal["paper", "released"]
NonFinite = Literal["skip", "raise"]


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """A number as a float: Python's, NumPy's, or a tensor with one element, which is read from its device.

    Args:
        name: of the argument, for the error.
        value: what was given.
        or_zero: whether 0 is allowed too.

    Raises:
        TypeError: where it is no number.
        ValueError: where it is not finite, or not above zero.
    """
    allowed = "≥ 0" if or_zero else "> 0"
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    if not (0 < number < float("inf") or (or_zero and number == 0)):
        raise ValueError(f"{name} must be a finite number {allowed}, got {number!r}")
    return number


def _as_float(value: Any) -> float | None:
    """A real number as a float, None for anything else."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one element, or a tensor without memory
            return None
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def check_count(name: str, value: Any, *, optional: bool = True) -> int | None:
    """An integer above zero (or None, if it is optional), Python's or NumPy's, as Python's.

    Raises:
        TypeError: where it is no integer.
        ValueError: where it is not above zero.
    """
    if optional and value is None:
        return None
    allowed = f"an integer ≥ 1{' or None' if optional else ''}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return int(value)


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise `ValueError` where ``value`` is none of the values of ``allowed``, a `Literal`."""
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices of `NGPlus` that hold for all parameter groups; see there for what each means."""

    update_every: int
    curvature: Curvature
    ema: float
    solver: Solver
    block_size: int | None
    sketch_size: int | None
    samples: Samples
    batch_dim: int | Mapping[str, int]
    loss_reduction: LossReduction
    model_calls: ModelCallSamples = "separate"
    partial_capture: PartialCapture = "base"
    damping_rule: DampingRule
    max_samples: int | None
    nonfinite: NonFinite

    def __post_init__(self) -> None:
        for name in ("update_every", "block_size", "sketch_size", "max_samples"):
            count = check_count(name, getattr(self, name), optional=name != "update_every")
            object.__setattr__(self, name, count)  # NumPy's as Python's
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        ema = _as_float(self.ema)
        if ema is None:
            raise TypeError(f"ema must be a number in [0, 1), got {self.ema!r}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")
        check_loss_reduction(self.loss_reduction)
        object.__setattr__(self, "ema", ema)
        self._check_batch_dim()
        self._check_together()

    def _check_batch_dim(self) -> None:
        dims = self.batch_dim.values() if isinstance(self.batch_dim, Mapping) else [self.batch_dim]
        for dim in dims:
            if isinstance(dim, bool) or not isinstance(dim, Integral):
                raise TypeError(f"batch_dim must be an integer ≥ 0 or a dict of them by module name, got {dim!r}")
            if dim < 0:
                raise ValueError(f"batch_dim must be ≥ 0, got {dim!r}")

    def _check_together(self) -> None:
        if self.solver == "sketched" and self.sketch_size is None:
            raise ValueError('solver="sketched" needs sketch_size (q in (16) and (17)), got None')
        if self.sketch_size is not None and self.solver != "sketched":
            raise ValueError(f'sketch_size={self.sketch_size} is for solver="sketched", got solver={self.solver!r}')
        if self.solver == "low_rank" and self.block_size is not None:
            raise ValueError(f'solver="low_rank" has no blocks, got block_size={self.block_size}')


_CHOICES = {
    "curvature": Curvature,
    "solver": Solver,
    "samples": Samples,
    "model_calls": ModelCallSamples,
    "partial_capture": PartialCapture,
    "damping_rule": DampingRule,
    "nonfinite": NonFinite,
}
