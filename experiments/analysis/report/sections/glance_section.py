"""NG+ compared with each task's reference, a row a task: the page in a minute."""

from collections.abc import Mapping

import pandas as pd

from experiments.analysis import profiles
from experiments.analysis.comparison_table import number
from experiments.analysis.report import rerun_commands
from experiments.analysis.report.blocks import Block, Line, Table
from experiments.analysis.report.results_folder import Study
from experiments.analysis.report.sections.task_section import TITLES

# What matters first: a phone shows three columns.
HEADER = (
    "task",
    "epochs to target",
    "time to target",
    "best metric",
    "p (epochs, Holm)",
    "seeds",
    "NG+ against",
    "data",
)
TIME = profiles.MEASURES["seconds"]


def block(studies: Mapping[str, Mapping[str, Study]]) -> Block:
    """One row for each task, at the first scale of the page that has runs.

    Args:
        studies: runs by task and scale.

    Returns:
        A table, or a line that says that there is nothing.
    """
    rows = [row for task, own in studies.items() for study in list(own.values())[:1] for row in _rows(task, study)]
    if not rows:
        return Line(text="No task has runs of NG+ and of what it is compared with.")
    return Table(
        caption="NG+ beside the optimizer that each task compares with",
        header=HEADER,
        rows=rows,
        rerun=(rerun_commands.PAGE,),
        notes=(
            "Ratios are of medians over seeds; below 1× NG+ is sooner. Missed: fewer than half of the seeds reached "
            "the target. Fewer than five seeds, or p of 0.05 and more, show no difference.",
        ),
    )


def _rows(task: str, study: Study) -> list[list[str]]:
    entries = profiles.entrants(study.frame)
    reference = study.frame.iloc[0]
    ours = entries.get("ngplus")
    if ours is None or ours["optimizer"] == reference["optimizer"]:
        return []
    best, theirs = (number(row["best_metric"], digits=4) for row in (ours, reference))
    return [
        [
            TITLES.get(task, task),
            _ratio(ours, reference, "epochs_to_target"),
            _ratio(ours, reference, TIME) if profiles.ran_on_same_device(ours, reference) else "on other devices",
            f"{best} against {theirs} {ours['metric']}",
            number(ours["p_value_holm"], digits=2),
            f"{ours['seeds']} and {reference['seeds']}",
            f"{ours['optimizer']} against {reference['optimizer']}",
            f"{ours['dataset']} ({ours['scale']})",
        ]
    ]


def _ratio(ours: pd.Series, reference: pd.Series, column: str) -> str:
    """Our time over theirs; in words where one of them missed."""
    if pd.isna(ours[column]) or pd.isna(reference[column]):
        return "no target"
    missed = [name for name, row in (("NG+", ours), (reference["optimizer"], reference)) if row[column] == float("inf")]
    if missed:
        return f"missed by {' and '.join(missed)}"
    return number(ours[column] / reference[column], suffix="×") if reference[column] > 0 else "–"
