"""What each run came to: when it reached the target, its best metric, what an epoch cost."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from experiments.records.run_record import Epoch, Run

STANDARD_ERROR = "standard error"
"""What a task's further figure is called, behind the metric's name."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to.

    Attributes:
        epochs_to_target: infinite if it missed, NaN without a target.
        steps_to_target: the same in optimizer steps.
        seconds_to_target: the same on the training clock.
        epochs: how many it was asked for.
        steps: how many it took.
        seconds: how long it trained for.
        best_metric: over its epochs; NaN if it never was a number.
        standard_error: of that, from the number of samples that it is a mean over; NaN where the task does not say.
        seconds_per_epoch: median over its epochs, NaN if it has none.
        curvature_s: seconds an epoch spent on curvature, NaN if not reported.
        inverse_s: the same for inversions.
        apply_s: the same for applying the preconditioner.
        peak_memory_mb: the most of any epoch, MiB.
        diverged: whether it ended because its loss stopped being a number.
        devices: what it ran on. Seconds of two devices do not compare two optimizers.
    """

    epochs_to_target: float
    steps_to_target: float
    seconds_to_target: float
    epochs: int
    steps: int
    seconds: float
    best_metric: float
    standard_error: float
    seconds_per_epoch: float
    curvature_s: float
    inverse_s: float
    apply_s: float
    peak_memory_mb: float
    diverged: bool
    devices: tuple[str, ...]


def summarise_run(run: Run, target: float | None) -> Outcome:
    """Reduce a finished run to an `Outcome`.

    Args:
        run: that is over.
        target: value of the metric that counts as reached.

    Returns:
        What it came to.
    """
    hit = _first_hit(run, target)
    missed = math.inf if target is not None else math.nan
    seconds = np.diff([epoch.seconds for epoch in run.epochs])
    last = run.epochs[-1] if run.epochs else None
    return Outcome(
        epochs_to_target=hit.epoch if hit else missed,
        steps_to_target=hit.step if hit else missed,
        seconds_to_target=hit.seconds if hit else missed,
        epochs=run.manifest.epochs,
        steps=last.step if last else 0,
        seconds=last.seconds if last else 0.0,
        best_metric=run.best_metric,
        standard_error=_standard_error(run),
        seconds_per_epoch=float(np.median(seconds)) if len(seconds) else math.nan,
        curvature_s=_per_epoch(run, lambda epoch: epoch.curvature_s),
        inverse_s=_per_epoch(run, lambda epoch: epoch.inverse_s),
        apply_s=_per_epoch(run, lambda epoch: epoch.apply_s),
        peak_memory_mb=max((epoch.peak_memory_mb for epoch in run.epochs), default=math.nan),
        diverged=run.end is not None and run.end.reason == "diverged",
        devices=run.devices,
    )


def _standard_error(run: Run) -> float:
    """`Outcome.standard_error`."""
    name = f"{run.manifest.metric.name} {STANDARD_ERROR}"
    found = [epoch.others.get(name) for epoch in run.epochs if epoch.metric == run.best_metric]
    return math.nan if not found or found[0] is None else found[0]


class Timed(Protocol):
    """What has seconds: a run, or what it came to."""

    @property
    def devices(self) -> tuple[str, ...]:
        """What it ran on."""


def select_same_device[T: Timed](own: Mapping[int, T], others: Mapping[int, T]) -> dict[int, T]:
    """Those of the seeds that both have from one and the same device.

    Args:
        own: one optimizer's, by seed.
        others: another's, by seed.

    Returns:
        Of ``own``, by seed.
    """
    return {
        seed: each
        for seed, each in own.items()
        if seed in others and others[seed].devices == each.devices and len(each.devices) == 1
    }


def _first_hit(run: Run, target: float | None) -> Epoch | None:
    if target is None:
        return None
    sign = 1 if run.manifest.metric.higher_is_better else -1
    reached = (e for e in run.epochs if e.metric is not None and sign * e.metric >= sign * target)
    return next(reached, None)


def _per_epoch(run: Run, part: Callable[[Epoch], float | None]) -> float:
    """Mean seconds an epoch of a cumulative counter."""
    last = run.epochs[-1] if run.epochs else None
    total = part(last) if last and last.epoch else None
    return math.nan if total is None else total / last.epoch
