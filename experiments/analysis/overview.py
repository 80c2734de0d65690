"""Every optimizer on every task of a scale: the best value of the metric and the epochs to the reference's best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.analysis.comparable_runs import Comparable, load_comparable, name_data
from experiments.analysis.comparison import summarise
from experiments.analysis.profiles import FORMS, entrants, ratios, score, select_entries
from experiments.table_formats import Format, render_table

NOT_RUN = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One task.

    Attributes:
        dataset: that was really used.
        metric: its name.
        higher_is_better: or lower.
        rows: of its comparison, by optimizer without the suffix of its base, and the forms that are methods of their
            own; see `profiles.entrants`.
    """

    dataset: str
    metric: str
    higher_is_better: bool
    rows: Mapping[str, pd.Series]

    @classmethod
    def from_runs(cls, task: str, comparable: Comparable, frame: pd.DataFrame) -> "Column":
        """From a task's finished runs.

        Args:
            task: the task's name.
            comparable: its runs.
            frame: their comparison.

        Returns:
            The task's column.
        """
        manifest = comparable.runs[0].manifest
        return cls(
            dataset=name_data(task, manifest.dataset.name.partition(";")[0]),
            metric=manifest.metric.name,
            higher_is_better=manifest.metric.higher_is_better,
            rows=entrants(frame, FORMS),
        )

    def title(self) -> str:
        """The data, the metric and which way is better."""
        return f"{self.dataset}: {self.metric} {'↑' if self.higher_is_better else '↓'}"

    def best(self) -> str | None:
        """The optimizer with the best median, ``None`` where another is within the difference's standard error.

        That is √(s₁²/n₁ + s₂²/n₂), s the standard deviation over n seeds; that of one seed counts 0.
        """
        known = {name: row for name, row in self.rows.items() if math.isfinite(row.best_metric)}
        if not known:
            return None
        first = (max if self.higher_is_better else min)(known, key=lambda name: known[name].best_metric)
        best = known.pop(first)
        near = (
            abs(row.best_metric - best.best_metric) <= math.hypot(_standard_error(row), _standard_error(best))
            for row in known.values()
        )
        return None if any(near) else first

    def cell(self, name: str) -> str:
        """Median best ± standard deviation over seeds, and the epochs to the target."""
        if name not in self.rows:
            return NOT_RUN
        row = self.rows[name]
        spread = f" ± {row.best_metric_std:.2g}" if math.isfinite(row.best_metric_std) else ""
        epochs = f"{row.epochs_to_target:.3g}" if math.isfinite(row.epochs_to_target) else "missed"
        value = f"{row.best_metric:.3g}{spread}"
        return f"{f'**{value}**' if name == self.best() else value} ({epochs})"


def _standard_error(row: pd.Series) -> float:
    """Of the best metric, over seeds."""
    return row.best_metric_std / math.sqrt(row.seeds) if math.isfinite(row.best_metric_std) else 0.0


def overview(results_dir: Path, tasks: Sequence[str], scale: str, format: Format = "markdown") -> str:
    """A row an optimizer, a column a task, by falling score of the performance profiles (epochs).

    The score is over the paper's tasks, of the paper's NG+ and its peers; forms beyond the paper have one where they
    were run on all of these.

    Args:
        results_dir: where the records are.
        tasks: that have finished runs.
        scale: of the runs.
        format: where it is to stand.

    Returns:
        The table as text.

    Raises:
        UserError: one of the tasks has none.
    """
    runs = {task: load_comparable(results_dir, task, scale) for task in tasks}
    frames = {task: summarise(each) for task, each in runs.items()}
    columns = {task: Column.from_runs(task, runs[task], frames[task]) for task in tasks}
    names = {name for column in columns.values() for name in column.rows}
    entries = select_entries(frames)
    scores = {
        name: score(ratios(entries, name, "epochs")) for name in names if any(name in rows for rows in entries.values())
    }
    ordered = sorted(names, key=lambda name: (-scores.get(name, -1.0), name))
    head = ["optimizer", "profile", *(column.title() for column in columns.values())]
    shown = {name: f"{scores[name]:.2f}" if name in scores else NOT_RUN for name in names}
    body = [[name, shown[name], *(column.cell(name) for column in columns.values())] for name in ordered]
    return render_table(head, body, format, figures=False)
