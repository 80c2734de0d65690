"""The best optimizers of each task, for a reader in a hurry: a table, and a picture a task.

The first of a task is the one with the best median over seeds of its runs' best values. Its lead over another is the
mean over the seeds that both have of the difference of these values, with a bootstrap interval over seeds and the p
value of the paired test, corrected by Holm over all optimizers of the task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from experiments.analysis.comparable_runs import Comparable, load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.comparison_table import number
from experiments.analysis.figures.curves import STYLE, figure, save
from experiments.analysis.pairs import LEVEL, MIN_SEEDS
from experiments.analysis.profiles import FORMS, entrants
from experiments.analysis.report.sections.task_section import TITLES
from experiments.table_formats import Format, render_table

SHOWN = 5
HEADER = ("task", "the best, by the median over seeds", "lead over NG+, (6)", "lead over what is usual there")
NOTES = (
    f"In brackets the number of an optimizer's seeds where it is under {MIN_SEEDS}. A lead is the mean of the paired "
    f"differences over seeds [95 % interval], p after Holm's correction; under {MIN_SEEDS} seeds in common nothing is "
    "shown. Each method counts once, around the base that is usual on the task: NG+ with the damped inverse, (6), with "
    "the better of its two kinds of samples (`-batch`: molecules, crystals, sentences or texts; else rows), in the "
    "eigenbasis with both sides and with one (`-short`).",
)


@dataclass(frozen=True, kw_only=True)
class Leaders:
    """The best optimizers of one task.

    Attributes:
        comparable: the runs of the task at a scale.
        rows: of `summarise` against the first: the best methods, the best first.
        ours: the row of NG+ with the damped inverse, as the paper has it; ``None`` where it was not run.
        usual: the row of the task's reference.
    """

    comparable: Comparable
    rows: Sequence[pd.Series]
    ours: pd.Series | None
    usual: pd.Series

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of the task's metric is better."""
        return self.comparable.runs[0].manifest.metric.higher_is_better

    @property
    def folder(self) -> Path:
        """Where the task's results at this scale are."""
        return self.comparable.folder


def find_leaders(comparable: Comparable) -> Leaders:
    """Rank the methods of a task.

    Args:
        comparable: its runs at a scale.

    Returns:
        The best of them.
    """
    higher = comparable.runs[0].manifest.metric.higher_is_better
    known = {name: row for name, row in _methods(comparable, None).items() if not math.isnan(row.best_metric)}
    names = sorted(known, key=lambda name: (-1 if higher else 1) * known[name].best_metric)
    against = _methods(comparable, known[names[0]].optimizer)
    usual = next(row for row in against.values() if row.optimizer == comparable.reference())
    return Leaders(
        comparable=comparable, rows=[against[name] for name in names[:SHOWN]], ours=against.get("ngplus"), usual=usual
    )


def _methods(comparable: Comparable, against: str | None) -> dict[str, pd.Series]:
    """The rows of `entrants`, each optimizer on the base that the task's reference is, of NG+ the better samples."""
    frame, reference = summarise(comparable, against), comparable.reference()
    found = entrants(frame.assign(reference=reference), FORMS)
    higher = comparable.runs[0].manifest.metric.higher_is_better
    variants = [
        row for _, row in frame.iterrows() if row.optimizer in (f"ngplus-{reference}", f"ngplus-{reference}-batch")
    ]
    if variants:
        found["ngplus"] = (max if higher else min)(variants, key=lambda row: row.best_metric)
    return found


def draw(leaders: Leaders) -> tuple[Path, Path]:
    """Write ``leaders.svg`` and ``leaders.png`` next to the runs: the metric by epochs and by seconds.

    Args:
        leaders: of a task.

    Returns:
        The SVG and the PNG file.
    """
    with mpl.rc_context(STYLE):
        made = figure(leaders.comparable, only=[row.optimizer for row in leaders.rows])
        return save(made, leaders.folder / "leaders")


def table(found: Sequence[Leaders], format: Format = "markdown") -> str:
    """A row a task.

    Args:
        found: of each task.
        format: where it is to stand.

    Returns:
        The table as text.
    """
    return render_table(HEADER, [_cells(leaders) for leaders in found], format, notes=NOTES, figures=False)


def load_leaders(results_dir: Path, tasks: Sequence[str], scale: str) -> list[Leaders]:
    """The best optimizers of several tasks.

    Args:
        results_dir: where the records are.
        tasks: that have finished runs.
        scale: of the runs.

    Returns:
        One a task.

    Raises:
        UserError: one of the tasks has none.
    """
    return [find_leaders(load_comparable(results_dir, task, scale)) for task in tasks]


def _cells(leaders: Leaders) -> list[str]:
    manifest = leaders.comparable.runs[0].manifest
    better = "higher" if leaders.higher_is_better else "lower"
    metric = f"{manifest.metric.name} ({manifest.metric.unit}), {better} is better"
    return [
        f"{TITLES.get(manifest.task, manifest.task)}: {metric}",
        ", ".join(_name(row) for row in leaders.rows),
        "not run" if leaders.ours is None else _lead(leaders, leaders.ours),
        _lead(leaders, leaders.usual),
    ]


def _name(row: pd.Series) -> str:
    seeds = "" if row.seeds >= MIN_SEEDS else f" ({row.seeds})"
    return f"`{row.optimizer}` {number(row.best_metric)}{seeds}"


def _lead(leaders: Leaders, behind: pd.Series) -> str:
    """How far the first is ahead of another."""
    first = leaders.rows[0]
    if behind.optimizer == first.optimizer:
        return "is the best"
    seeds = len(_seeds(leaders.comparable, first.optimizer) & _seeds(leaders.comparable, behind.optimizer))
    mean, low, high = (
        behind[f"best_metric_difference{end}"] * (-1 if leaders.higher_is_better else 1)
        for end in ("", "_low", "_high")
    )
    words = f"{number(mean)} over `{behind.optimizer}`"
    if seeds < MIN_SEEDS:
        return f"{words}, {seeds} {'seed' if seeds == 1 else 'seeds'} in common: not shown"
    low, high = sorted((low, high))
    words += f" [{number(low)}, {number(high)}], p = {behind.best_metric_p_value_holm:.2g}"
    return words if behind.best_metric_p_value_holm < LEVEL else f"{words}: not shown"


def _seeds(comparable: Comparable, optimizer: str) -> set[int]:
    return {run.manifest.seed for run in comparable.by_optimizer()[optimizer]}
