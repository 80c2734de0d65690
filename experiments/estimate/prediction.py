"""From measured steps to an epoch and a whole run; nothing is measured here.

With a batch c times as large as the one that was measured, a batches to a step, 𝒯 steps from one refresh to the next
and E epochs of n steps:

    step     = a c · batch + update                      for a plain and for a refresh step
    epoch    = start + n · plain + ⌈E n / 𝒯⌉ / E · (refresh − plain)
"""

import math
from dataclasses import dataclass

from experiments.estimate.measuring import Costs, Measured
from experiments.estimate.timed_steps import Parts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large the run is.

    Attributes:
        batches: of an epoch.
        accumulate: batches to a step.
        epochs: of the run.
        update_every: 𝒯; ``None`` for an optimizer that refreshes nothing.
        factor: c, the run's batch over the one that was measured.
    """

    batches: int
    accumulate: int
    epochs: int
    update_every: int | None
    factor: float

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.batches / self.accumulate)

    @property
    def refreshes(self) -> float:
        """Of an epoch, on average over the run."""
        if self.update_every is None:
            return 0.0
        return math.ceil(self.epochs * self.steps / self.update_every) / self.epochs


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one optimizer's run would take.

    Attributes:
        optimizer: its name in the recipe.
        shape: of the run.
        plain_s: seconds of a plain step.
        refresh_s: of a refresh step.
        epoch_s: of an epoch.
        memory_mib: at the peak; ``None`` where it could not be measured.
        kept_mib: of it, what is kept between steps.
        epoch_operations: multiply-adds of an epoch as two; ``None`` if they were not counted.
    """

    optimizer: str
    shape: Shape
    plain_s: float
    refresh_s: float
    epoch_s: float
    memory_mib: float | None
    kept_mib: float
    epoch_operations: float | None

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.shape.epochs * self.epoch_s / 3600

    def hours_at(self, rate: float) -> float | None:
        """Of the whole run on a machine that achieves so many operations a second."""
        if self.epoch_operations is None:
            return None
        return self.shape.epochs * self.epoch_operations / rate / 3600


def predict(optimizer: str, measured: Measured, shape: Shape) -> Prediction:
    """The run that was measured in part.

    Args:
        optimizer: its name in the recipe.
        measured: of some of its steps.
        shape: of the whole run.

    Returns:
        Seconds, hours, memory and operations.
    """
    operations = measured.operations
    return Prediction(
        optimizer=optimizer,
        shape=shape,
        plain_s=step(measured.seconds.plain, shape),
        refresh_s=step(measured.seconds.refresh, shape),
        epoch_s=measured.epoch_start_s + epoch(measured.seconds, shape),
        memory_mib=measured.memory.extrapolate(shape.factor),
        kept_mib=measured.memory.kept,
        epoch_operations=None if operations is None else epoch(operations, shape),
    )


def step(parts: Parts, shape: Shape) -> float:
    """One optimizer step at the run's batch."""
    return shape.accumulate * shape.factor * parts.batch + parts.update


def epoch(costs: Costs, shape: Shape) -> float:
    """All steps of an epoch."""
    plain, refresh = step(costs.plain, shape), step(costs.refresh, shape)
    return shape.steps * plain + shape.refreshes * (refresh - plain)
