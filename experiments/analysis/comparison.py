"""``comparison.csv``: a row an optimizer, medians over seeds, misses censored."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis.runs import Comparable, load_comparable
from experiments.analysis.statistics import MedianInterval, PairedTest, median_interval, paired_test
from experiments.records import Epoch, Run

COLUMNS = (
    "task",
    "scale",
    "dataset",
    "optimizer",
    "seeds",
    "reached",
    "diverged",
    "metric",
    "target",
    "target_rule",
    "epochs",
    "epochs_to_target",
    "epochs_to_target_low",
    "epochs_to_target_high",
    "wall_time_to_target_s",
    "wall_time_to_target_s_low",
    "wall_time_to_target_s_high",
    "time_per_epoch_s",
    "curvature_s_per_epoch",
    "inverse_s_per_epoch",
    "apply_s_per_epoch",
    "best_metric",
    "best_metric_low",
    "best_metric_high",
    "best_metric_std",
    "peak_memory_mb",
    "interval_coverage",
    "reference",
    "epochs_vs_reference",
    "p_value",
    "p_test",
    "p_reason",
    "best_metric_p_value",
    "best_metric_p_test",
    "device",
    "dataset_sha256",
)


def compare(results_dir: Path, task: str, scale: str) -> pd.DataFrame:
    """Compare the optimizers of a task at a scale and write ``comparison.csv`` beside the runs.

    Returns:
        A row an optimizer, the reference first, with `COLUMNS`:

        - ``epochs_to_target``, ``wall_time_to_target_s``: median over seeds of the first epoch whose metric
          reaches the target. A run that misses is infinitely late, so the median is infinite when half of
          the seeds or more missed, and NaN without a target. ``_low`` and ``_high`` are order statistics,
          ``interval_coverage`` their coverage (`statistics.median_interval`).
        - ``time_per_epoch_s`` and the split ``curvature_s_per_epoch`` ...: medians, on the training clock.
        - ``best_metric``: median of each run's best epoch; ``best_metric_std`` is over seeds (n − 1).
        - ``epochs_vs_reference``: ratio of the two medians, NaN unless both are finite.
        - ``p_value``: of ``p_test`` on the epochs to target against the reference; NaN with ``p_reason``.

        ``attrs["complaints"]`` names the records that were left out.

    Raises:
        UserError: there is no finished run.
    """
    comparable = load_comparable(results_dir, task, scale)
    frame = summarise(comparable)
    _write(frame, comparable.folder / "comparison.csv")
    return frame


def summarise(comparable: Comparable) -> pd.DataFrame:
    """The table that `compare` writes."""
    runs = comparable.by_optimizer()
    reference = comparable.reference()
    outcomes = {name: {run.manifest.seed: outcome(run, comparable.target) for run in own} for name, own in runs.items()}
    rows = [_row(own[0], outcomes[name], outcomes[reference], reference) for name, own in runs.items()]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame["target"] = math.nan if comparable.target is None else comparable.target
    frame.attrs["complaints"] = list(comparable.complaints)
    return frame


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to.

    Attributes:
        epochs_to_target: infinite if it missed, NaN without a target.
        seconds_to_target: the same on the training clock.
        best_metric: over its epochs; NaN if it never was a number.
        seconds_per_epoch: median over its epochs, NaN if it has none.
        curvature_s: seconds an epoch spent on curvature, NaN if not reported.
        inverse_s: the same for inversions.
        apply_s: the same for applying the preconditioner.
        peak_memory_mb: the most of any epoch, MiB.
        diverged: whether it ended because its loss stopped being a number.
    """

    epochs_to_target: float
    seconds_to_target: float
    best_metric: float
    seconds_per_epoch: float
    curvature_s: float
    inverse_s: float
    apply_s: float
    peak_memory_mb: float
    diverged: bool


def outcome(run: Run, target: float | None) -> Outcome:
    """Reduce a finished run to an `Outcome`."""
    hit = _first_hit(run, target)
    missed = math.inf if target is not None else math.nan
    seconds = np.diff([epoch.seconds for epoch in run.epochs])
    return Outcome(
        epochs_to_target=hit.epoch if hit else missed,
        seconds_to_target=hit.seconds if hit else missed,
        best_metric=run.best_metric,
        seconds_per_epoch=float(np.median(seconds)) if len(seconds) else math.nan,
        curvature_s=_per_epoch(run, lambda epoch: epoch.curvature_s),
        inverse_s=_per_epoch(run, lambda epoch: epoch.inverse_s),
        apply_s=_per_epoch(run, lambda epoch: epoch.apply_s),
        peak_memory_mb=max((epoch.peak_memory_mb for epoch in run.epochs), default=math.nan),
        diverged=run.end is not None and run.end.reason == "diverged",
    )


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


def _row(run: Run, own: Mapping[int, Outcome], reference: Mapping[int, Outcome], name: str) -> dict[str, Any]:
    """One optimizer's row; `own` and `reference` are by seed."""
    manifest, outcomes = run.manifest, list(own.values())
    epochs = _interval([each.epochs_to_target for each in outcomes])
    wall = _interval([each.seconds_to_target for each in outcomes])
    metric = _interval([each.best_metric for each in outcomes])
    test = _versus(own, reference, lambda each: each.epochs_to_target)
    metric_test = _versus(own, reference, lambda each: each.best_metric)
    return {
        "task": manifest.task,
        "scale": manifest.scale,
        "dataset": manifest.dataset.name,
        "optimizer": manifest.optimizer,
        "seeds": len(own),
        "reached": sum(math.isfinite(each.epochs_to_target) for each in outcomes),
        "diverged": sum(each.diverged for each in outcomes),
        "metric": manifest.metric.name,
        "target_rule": manifest.target if isinstance(manifest.target, str) else "",
        "epochs": manifest.epochs,
        **_named("epochs_to_target", epochs),
        **_named("wall_time_to_target_s", wall),
        "time_per_epoch_s": _median([each.seconds_per_epoch for each in outcomes]),
        "curvature_s_per_epoch": _median([each.curvature_s for each in outcomes]),
        "inverse_s_per_epoch": _median([each.inverse_s for each in outcomes]),
        "apply_s_per_epoch": _median([each.apply_s for each in outcomes]),
        **_named("best_metric", metric),
        "best_metric_std": _std([each.best_metric for each in outcomes]),
        "peak_memory_mb": _median([each.peak_memory_mb for each in outcomes]),
        "interval_coverage": epochs.coverage,
        "reference": name,
        "epochs_vs_reference": _ratio(epochs.median, [each.epochs_to_target for each in reference.values()]),
        "p_value": test.p_value,
        "p_test": test.name,
        "p_reason": test.reason,
        "best_metric_p_value": metric_test.p_value,
        "best_metric_p_test": metric_test.name,
        "device": manifest.device,
        "dataset_sha256": manifest.dataset.sha256,
    }


def _named(name: str, interval: MedianInterval) -> dict[str, float]:
    return {name: interval.median, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _interval(values: list[float]) -> MedianInterval:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return MedianInterval(median=math.nan, low=math.nan, high=math.nan, coverage=math.nan)
    return median_interval(known)


def _median(values: list[float]) -> float:
    return _interval(values).median


def _std(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def _ratio(median: float, reference: list[float]) -> float:
    other = _median(reference)
    return median / other if math.isfinite(median) and math.isfinite(other) and other else math.nan


def _versus(
    own: Mapping[int, Outcome], reference: Mapping[int, Outcome], value: Callable[[Outcome], float]
) -> PairedTest:
    if own is reference:
        return PairedTest(p_value=math.nan, name="", reason="is the reference")
    ours, theirs = (
        {seed: value(each) for seed, each in side.items() if not math.isnan(value(each))} for side in (own, reference)
    )
    return paired_test(ours, theirs)


def _write(frame: pd.DataFrame, path: Path) -> None:
    """Replace the file as a whole, so that a kill leaves the old table or the new one."""
    partial = path.with_suffix(".csv.partial")
    frame.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)
