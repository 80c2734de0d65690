"""Where an optimizer's time goes: curvature, inverse, apply."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

Stage = Literal["curvature", "inverse", "apply"]


@dataclass
class StepTimes:
    """Seconds spent so far.

    Attributes:
        curvature: building L or R, inside backward, and recording the forward pass for it.
        inverse: all-reduce, moving average, factorisation.
        apply: multiplying gradients, and the check that they are finite.
    """

    curvature: float = 0.0
    inverse: float = 0.0
    apply: float = 0.0


class Stopwatch:
    """Adds up `StepTimes` where it is on; costs nothing, and never synchronizes, where it is off."""

    def __init__(self) -> None:
        self.times = StepTimes()
        self.on = False

    def measure(self, stage: Stage) -> AbstractContextManager[None]:
        """Count the seconds of the block to ``stage``, the device's queue drained before and after."""
        return self._measure(stage) if self.on else _NOTHING

    @contextmanager
    def _measure(self, stage: Stage) -> Iterator[None]:
        start = _now()
        yield
        setattr(self.times, stage, getattr(self.times, stage) + _now() - start)


_NOTHING = nullcontext()
"""For a stopwatch that is off: a hook of a small layer would take a tenth longer with a generator of its own."""


def _now() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
