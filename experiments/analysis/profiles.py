"""Optimizers over all tasks of a scale: performance profiles and geometric-mean speed-ups, as AlgoPerf has them.

A profile (Dolan and Moré, 2002) is the share of tasks on which an optimizer reaches the target within a factor of
the fastest; its score is the profile's mean over factors from 1 to 4 (Dahl et al., 2023). On every task an
optimizer enters with the variant on the base that the task compares with, ``ngplus-adam`` where that is Adam, or
else under its plain name; forms of NG+ that are methods of their own enter where they were run on all tasks. One that
was not run on a task, or missed the target, never reaches it there. By seconds only those enter that ran on the same
device as the reference.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from experiments.analysis.comparable_runs import BEYOND_PAPER, load_comparable
from experiments.analysis.comparison import DEVICES, summarise, write_csv
from experiments.analysis.figures.curves import STYLE, legend_below, save
from experiments.analysis.figures.palette import pick_colour, pick_dashes
from experiments.analysis.statistics import LEVEL, RESAMPLING_SEED

# The column of comparison.csv with the time to the target, by what it is counted in.
MEASURES = {
    "epochs": "epochs_to_target",
    "steps": "steps_to_target",
    "seconds": "wall_time_to_target_s",
}
MAX_FACTOR = 4.0
COLUMNS = (
    "scale",
    "measure",
    "optimizer",
    "tasks",
    "tasks_run",
    "tasks_reached",
    "profile_score",
    "speed_up",
    "speed_up_low",
    "speed_up_high",
    "speed_up_tasks",
    "speed_up_restricted",
)


def profile(results_dir: Path, tasks: Sequence[str], scale: str) -> pd.DataFrame:
    """Compare the optimizers over tasks; writes ``profiles-<scale>.csv``, ``.svg`` and ``.png`` into the results.

    Args:
        results_dir: where the records are.
        tasks: that have finished runs; see `select_entries` for what is left out.
        scale: of the runs.

    Returns:
        A row an optimizer and measure, with `COLUMNS`:

        - ``tasks`` with a target, those it was run on (by seconds: on the reference's device), and those on which
          it reached the target.
        - ``profile_score``: mean of its profile over factors from 1 to `MAX_FACTOR`.
        - ``speed_up``: geometric mean, over the ``speed_up_tasks`` on which both reached the target, of the
          reference's median time over its own; the interval is a bootstrap over tasks, NaN for fewer than two.
        - ``speed_up_restricted``: the same from the restricted means, over all tasks it was run on, where a miss
          counts as the time that the runs were followed for.

    Raises:
        UserError: there is no finished run of one of the tasks.
    """
    entries = select_entries({task: summarise(load_comparable(results_dir, task, scale)) for task in tasks})
    table = tabulate(entries, scale)
    write_csv(table, results_dir / f"profiles-{scale}.csv")
    with mpl.rc_context(STYLE):
        save(figure(entries, names_in(entries), scale), results_dir / f"profiles-{scale}")
    return table


def select_entries(frames: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, pd.Series]]:
    """The rows that enter, by task and optimizer, from each task's comparison.

    A task without a target is left out, and one that the paper does not have: its usual optimizers are others. So are
    `FORMS` that were not run on all of the others: they would count as missing what nobody asked them for.

    Args:
        frames: comparisons by task.

    Returns:
        Rows by task and optimizer.
    """
    chosen = {
        task: frame for task, frame in frames.items() if task not in BEYOND_PAPER and not frame["target"].isna().all()
    }
    forms = [form for form in FORMS if all(form in set(frame["optimizer"]) for frame in chosen.values())]
    return {task: entrants(frame, forms) for task, frame in chosen.items()}


def names_in(entries: Mapping[str, Mapping[str, pd.Series]]) -> list[str]:
    """The optimizers of any task.

    Args:
        entries: from `select_entries`.

    Returns:
        Names, sorted.
    """
    return sorted({name for own in entries.values() for name in own})


def tabulate(entries: Mapping[str, Mapping[str, pd.Series]], scale: str) -> pd.DataFrame:
    """The table that `profile` writes.

    Args:
        entries: from `select_entries`.
        scale: for the table.

    Returns:
        A row an optimizer and measure.
    """
    rows = [_row(entries, name, measure) for measure in MEASURES for name in names_in(entries)]
    table = pd.DataFrame(rows, columns=list(COLUMNS)[1:])
    table.insert(0, "scale", scale)
    return table


FORMS = ("ngplus-eigen", "ngplus-eigen-short")
"""Those of NG+ that are methods of their own, and not NG+ around another base or with another setting."""


def entrants(frame: pd.DataFrame, forms: Collection[str] = ()) -> dict[str, pd.Series]:
    """The rows of a task's comparison that enter, by the optimizer's name without a suffix.

    Args:
        frame: a comparison, a row an optimizer.
        forms: those of `FORMS` that enter too, under their whole names.

    Returns:
        Rows by optimizer, in the order of the comparison.
    """
    rows = {row["optimizer"]: row for _, row in frame.iterrows()}
    reference = frame["reference"].iloc[0]
    found = {}
    for family in dict.fromkeys(name.partition("-")[0] for name in rows):
        for name in (f"{family}-{reference}", family):
            if name in rows:
                found[family] = rows[name]
                break
    return found | {name: rows[name] for name in forms if name in rows}


def ran_on_same_device(row: pd.Series, reference: pd.Series) -> bool:
    """Whether all runs of two rows were made on one device.

    Args:
        row: an optimizer's.
        reference: the reference's.

    Returns:
        Whether their seconds can be compared.
    """
    return row["device"] == reference["device"] and DEVICES not in row["device"]


def entering(entries: Mapping[str, Mapping[str, pd.Series]], measure: str) -> dict[str, dict[str, pd.Series]]:
    """The rows that are compared by a measure: all, but by seconds those on the reference's device."""
    if measure != "seconds":
        return {task: dict(own) for task, own in entries.items()}
    found = {}
    for task, own in entries.items():
        reference = _reference(own)
        found[task] = {n: row for n, row in own.items() if reference is None or ran_on_same_device(row, reference)}
    return found


def ratios(entries: Mapping[str, Mapping[str, pd.Series]], name: str, measure: str) -> np.ndarray:
    """An optimizer's time over the fastest one's on each task, infinite where it never reaches the target.

    Args:
        entries: from `select_entries`.
        name: of the optimizer.
        measure: a column of times.

    Returns:
        One a task.
    """
    column, found = MEASURES[measure], []
    for own in entering(entries, measure).values():
        fastest = min((row[column] for row in own.values()), default=math.inf)
        time = own[name][column] if name in own else math.inf
        found.append(time / fastest if math.isfinite(time) and fastest > 0 else _at_once(time, fastest))
    return np.array(found)


def score(factors: np.ndarray) -> float:
    """Mean over 1 to `MAX_FACTOR` of the share of `factors` that are no greater.

    Args:
        factors: from `ratios`.

    Returns:
        0 to 1.
    """
    within = np.clip((MAX_FACTOR - factors) / (MAX_FACTOR - 1.0), 0.0, 1.0)
    return float(within.mean()) if len(within) else math.nan


def _at_once(time: float, fastest: float) -> float:
    """The ratio where one of the two is not a positive number: a target that the untrained model reaches."""
    return 1.0 if time == fastest == 0 else math.inf


def _row(entries: Mapping[str, Mapping[str, pd.Series]], name: str, measure: str) -> dict[str, Any]:
    column = MEASURES[measure]
    own = {task: rows[name] for task, rows in entering(entries, measure).items() if name in rows}
    references = {task: _reference(entries[task]) for task in own}
    speed, restricted = (
        _speed_ups([(references[task][each], row[each]) for task, row in own.items() if references[task] is not None])
        for each in (column, f"{column}_restricted_mean")
    )
    low, high = _interval(speed)
    return {
        "measure": measure,
        "optimizer": name,
        "tasks": len(entries),
        "tasks_run": len(own),
        "tasks_reached": sum(math.isfinite(row[column]) for row in own.values()),
        "profile_score": score(ratios(entries, name, measure)),
        "speed_up": _geometric_mean(speed),
        "speed_up_low": low,
        "speed_up_high": high,
        "speed_up_tasks": len(speed),
        "speed_up_restricted": _geometric_mean(restricted),
    }


def _reference(rows: Mapping[str, pd.Series]) -> pd.Series | None:
    return next((row for row in rows.values() if row["optimizer"] == row["reference"]), None)


def _speed_ups(pairs: Sequence[tuple[float, float]]) -> np.ndarray:
    """The reference's time over the own one, where both are positive numbers."""
    return np.array([theirs / ours for theirs, ours in pairs if 0 < theirs < math.inf and 0 < ours < math.inf])


def _geometric_mean(values: np.ndarray) -> float:
    return float(stats.gmean(values)) if len(values) else math.nan


def _interval(values: np.ndarray) -> tuple[float, float]:
    if len(values) < 2 or np.ptp(values) == 0:
        return math.nan, math.nan
    found = stats.bootstrap(
        (values,), stats.gmean, confidence_level=LEVEL, method="percentile", rng=RESAMPLING_SEED
    ).confidence_interval
    return float(found.low), float(found.high)


def figure(entries: Mapping[str, Mapping[str, pd.Series]], names: Sequence[str], scale: str) -> Figure:
    """The profiles in epochs and in seconds."""
    made = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(f"Performance profiles over {len(entries)} tasks, scale {scale}", fontsize=11)
    axes = made.subplots(1, 2, sharey=True)
    for ax, measure in zip(axes, ("epochs", "seconds"), strict=True):
        for name in names:
            factors, shares = curve(ratios(entries, name, measure))
            style = {"color": pick_colour(name), "linestyle": pick_dashes(name, list(names))}
            ax.step(factors, shares, where="post", label=name, linewidth=1.6, **style)
        ax.set_xlabel(f"{measure} to the target, over the fastest's")
        ax.set_xlim(1.0, MAX_FACTOR)
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("share of tasks")
    legend_below(made, axes[0])
    return made


def curve(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a profile: factors from 1 to `MAX_FACTOR`, and the share of tasks within each.

    Args:
        factors: from `ratios`.

    Returns:
        Factors and shares, of one length.
    """
    inside = np.sort(factors[factors <= MAX_FACTOR])
    at = np.concatenate([[1.0], inside, [MAX_FACTOR]])
    return at, np.array([np.mean(factors <= each) for each in at])
