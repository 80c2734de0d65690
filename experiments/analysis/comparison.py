"""``comparison.csv``: a row an optimizer, medians over seeds, misses censored, differences tested."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis.comparable_runs import Comparable, load_comparable
from experiments.analysis.outcomes import Outcome, select_same_device, summarise_run
from experiments.analysis.statistics import (
    MedianInterval,
    PairedTest,
    TimesToTarget,
    holm,
    median_interval,
    paired_difference,
    paired_test,
)
from experiments.records.run_record import Run

# Between the devices of a row.
DEVICES = "; "
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
    "epochs_to_target_restricted_mean",
    "steps_to_target",
    "steps_to_target_low",
    "steps_to_target_high",
    "steps_to_target_restricted_mean",
    "wall_time_to_target_s",
    "wall_time_to_target_s_low",
    "wall_time_to_target_s_high",
    "wall_time_to_target_s_restricted_mean",
    "restricted_to_epochs",
    "restricted_to_steps",
    "restricted_to_s",
    "time_per_epoch_s",
    "curvature_s_per_epoch",
    "inverse_s_per_epoch",
    "apply_s_per_epoch",
    "best_metric",
    "best_metric_low",
    "best_metric_high",
    "best_metric_std",
    "metric_standard_error",
    "peak_memory_mb",
    "interval_coverage",
    "reference",
    "epochs_vs_reference",
    "epochs_difference",
    "epochs_difference_low",
    "epochs_difference_high",
    "p_value",
    "p_value_holm",
    "p_value_exact",
    "p_test",
    "p_reason",
    "wall_time_difference_s",
    "wall_time_difference_s_low",
    "wall_time_difference_s_high",
    "wall_time_p_value",
    "wall_time_p_value_holm",
    "wall_time_p_value_exact",
    "wall_time_p_test",
    "best_metric_difference",
    "best_metric_difference_low",
    "best_metric_difference_high",
    "best_metric_p_value",
    "best_metric_p_value_holm",
    "best_metric_p_value_exact",
    "best_metric_p_test",
    "device",
    "dataset_sha256",
)


def compare(results_dir: Path, task: str, scale: str) -> pd.DataFrame:
    """Compare the optimizers of a task at a scale and write ``comparison.csv`` next to the runs.

    Args:
        results_dir: where the records are.
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        A row an optimizer, the reference first, with `COLUMNS`:

        - ``epochs_to_target``, ``steps_to_target``, ``wall_time_to_target_s``: the Kaplan-Meier median over
          seeds of the first epoch whose metric reaches the target; a run that misses, or diverges, is censored.
          Infinite if fewer than half of the seeds reach it, NaN without a target. ``_low`` and ``_high`` are
          order statistics, ``interval_coverage`` their coverage (`statistics.median_interval`).
        - ``..._restricted_mean``: the mean of these times, each at most ``restricted_to_...``, which is how long
          every optimizer was followed for.
        - ``time_per_epoch_s`` and the split ``curvature_s_per_epoch`` ...: medians, on the training clock.
        - ``best_metric``: median of each run's best epoch; ``best_metric_std`` is over seeds (n − 1),
          ``metric_standard_error`` one run's own, from the size of its test set, where the task records it.
        - ``epochs_vs_reference``: ratio of the two medians, NaN unless both are finite.
        - ``epochs_difference``, ``wall_time_difference_s``, ``best_metric_difference``: mean over the seeds that
          both have of the value less the reference's, with a bootstrap interval; times restricted as above,
          seconds over the seeds that both ran on the same device.
        - ``p_value`` of ``p_test``, the same for the other two; ``_holm`` is corrected over the optimizers of
          the table, ``_exact`` is of the sign-flip permutation test; NaN with ``p_reason``.
        - ``device``: those that its runs were made on, with `DEVICES` between them.

        ``attrs["warnings"]`` names the records that were left out.

    Raises:
        UserError: there is no finished run.
    """
    comparable = load_comparable(results_dir, task, scale)
    frame = summarise(comparable)
    write_csv(frame, comparable.folder / "comparison.csv")
    return frame


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Replace the file as a whole, so that a kill leaves the old table or the new one.

    Args:
        frame: a comparison, a row an optimizer.
        path: the file.
    """
    partial = path.with_suffix(".csv.partial")
    frame.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)


def summarise(comparable: Comparable, against: str | None = None) -> pd.DataFrame:
    """The table that `compare` writes.

    Args:
        comparable: the runs of a task at a scale.
        against: the optimizer that the others are compared with in place of the reference; the target stays.

    Returns:
        A row an optimizer, the reference first.
    """
    reference = against or comparable.reference()
    runs = comparable.by_optimizer(reference)
    outcomes = {
        name: {run.manifest.seed: summarise_run(run, comparable.target) for run in own} for name, own in runs.items()
    }
    horizon = _horizon(outcomes, reference)
    rows = [_row(own[0], outcomes[name], outcomes[reference], horizon) for name, own in runs.items()]
    frame = pd.DataFrame(rows).assign(
        reference=reference, target=math.nan if comparable.target is None else comparable.target
    )
    frame["epochs_vs_reference"] = _ratios(frame)
    for name in ("p_value", "wall_time_p_value", "best_metric_p_value"):
        frame[f"{name}_holm"] = holm(frame[name])
    frame = frame[list(COLUMNS)]
    frame.attrs["warnings"] = list(comparable.warnings)
    return frame


@dataclass(frozen=True, kw_only=True)
class _Horizon:
    """How long every optimizer was followed for."""

    epochs: float
    steps: float
    seconds: float


def _horizon(outcomes: Mapping[str, Mapping[int, Outcome]], reference: str) -> _Horizon:
    """The least, over optimizers, of the longest that a run was followed for, leaving out what diverged.

    Seconds are those on the reference's devices.
    """
    whole = [[each for each in own.values() if not each.diverged] for own in outcomes.values()]
    whole = [own for own in whole if own] or [list(own.values()) for own in outcomes.values()]
    devices = {each.devices for each in outcomes[reference].values()}
    timed = [[each for each in own if each.devices in devices] for own in whole]

    def least(value: Callable[[Outcome], float], of: Sequence[Sequence[Outcome]]) -> float:
        return min(max(map(value, own)) for own in of)

    return _Horizon(
        epochs=least(lambda each: each.epochs, whole),
        steps=least(lambda each: each.steps, whole),
        seconds=least(lambda each: each.seconds, [own for own in timed if own] or whole),
    )


def _row(run: Run, own: Mapping[int, Outcome], reference: Mapping[int, Outcome], horizon: _Horizon) -> dict[str, Any]:
    """One optimizer's row; `own` and `reference` are by seed."""
    manifest, outcomes = run.manifest, list(own.values())
    timed = own if own is reference else select_same_device(own, reference)
    coverage = _interval([each.epochs_to_target for each in outcomes]).coverage
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
        **_times("epochs_to_target", own, lambda each: (each.epochs_to_target, each.epochs), horizon.epochs),
        **_times("steps_to_target", own, lambda each: (each.steps_to_target, each.steps), horizon.steps),
        **_times("wall_time_to_target_s", own, lambda each: (each.seconds_to_target, each.seconds), horizon.seconds),
        "restricted_to_epochs": horizon.epochs,
        "restricted_to_steps": horizon.steps,
        "restricted_to_s": horizon.seconds,
        "time_per_epoch_s": _median([each.seconds_per_epoch for each in outcomes]),
        "curvature_s_per_epoch": _median([each.curvature_s for each in outcomes]),
        "inverse_s_per_epoch": _median([each.inverse_s for each in outcomes]),
        "apply_s_per_epoch": _median([each.apply_s for each in outcomes]),
        **_name_interval("best_metric", _interval([each.best_metric for each in outcomes])),
        "best_metric_std": _std([each.best_metric for each in outcomes]),
        "metric_standard_error": _median([each.standard_error for each in outcomes]),
        "peak_memory_mb": _median([each.peak_memory_mb for each in outcomes]),
        "interval_coverage": coverage,
        **_versus("epochs_difference", "p", own, reference, lambda each: each.epochs_to_target, horizon.epochs),
        **_versus(
            "wall_time_difference_s",
            "wall_time_p",
            timed,
            reference,
            lambda each: each.seconds_to_target,
            horizon.seconds,
        ),
        **_versus("best_metric_difference", "best_metric_p", own, reference, lambda each: each.best_metric, math.inf),
        "device": DEVICES.join(sorted({name for each in outcomes for name in each.devices})),
        "dataset_sha256": manifest.dataset.sha256,
    }


def _times(
    name: str, own: Mapping[int, Outcome], value: Callable[[Outcome], tuple[float, float]], until: float
) -> dict[str, float]:
    """Median, interval and restricted mean of a time; `value` is the time and how long the run was followed."""
    names = (name, f"{name}_low", f"{name}_high", f"{name}_restricted_mean")
    found = [value(each) for each in own.values()]
    if any(math.isnan(time) for time, _ in found):
        return dict.fromkeys(names, math.nan)
    # All runs were given as many epochs. One that was over sooner, as it was faster or diverged, did not reach the
    # target in what the others needed for theirs: it is followed no shorter than they.
    longest = max(until, *(follow_up for _, follow_up in found))
    times = TimesToTarget(values=[time for time, _ in found], follow_up=[longest] * len(found))
    interval = median_interval(times.values)
    return dict(zip(names, (times.median(), interval.low, interval.high, times.restricted_mean(until)), strict=True))


def _name_interval(name: str, interval: MedianInterval) -> dict[str, float]:
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


def _ratios(frame: pd.DataFrame) -> pd.Series:
    """Each optimizer's median epochs to the target over the reference's, NaN unless both are finite."""
    epochs = frame["epochs_to_target"].where(np.isfinite(frame["epochs_to_target"]))
    return epochs / (epochs.iloc[0] or math.nan)


def _versus(
    difference: str,
    test: str,
    own: Mapping[int, Outcome],
    reference: Mapping[int, Outcome],
    value: Callable[[Outcome], float],
    until: float,
) -> dict[str, Any]:
    """The columns of one value's paired difference and test."""
    ours, theirs = ({seed: value(each) for seed, each in side.items()} for side in (own, reference))
    same = own is reference
    found = PairedTest(reason="is the reference") if same else paired_test(ours, theirs, until=until)
    gap = paired_difference(ours if not same else {}, theirs, until=until)
    columns = {
        difference: gap.mean,
        f"{difference}_low": gap.low,
        f"{difference}_high": gap.high,
        f"{test}_value": found.p_value,
        f"{test}_value_exact": found.exact_p_value,
        f"{test}_test": found.name,
    }
    return columns | ({"p_reason": found.reason} if test == "p" else {})
