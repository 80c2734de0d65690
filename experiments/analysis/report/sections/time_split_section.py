"""Where an epoch's seconds go: curvature, inversion, applying it, and all the rest."""

import math
from typing import Any

import altair as alt
import pandas as pd

from experiments.analysis.comparison_table import number
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Block, Chart, Figure, Key, Line, Table
from experiments.analysis.report.results_folder import Study

PARTS = (
    Key(name="rest", light="#8A8F98", dark="#6F7681"),
    Key(name="curvature", light="#D55E00", dark="#E8772E"),
    Key(name="inverse", light="#0072B2", dark="#4AA8E0"),
    Key(name="apply", light="#009E73", dark="#1FBF91"),
)
NAMES = tuple(part.name for part in PARTS)


def blocks(study: Study, id: str) -> list[Block]:
    """A bar an optimizer and the figures; a sentence if no record has the split.

    Args:
        study: the runs of a task at a scale.
        id: unique on the page.

    Returns:
        What stands on the page.
    """
    frame = study.frame
    if frame[["curvature_s_per_epoch", "inverse_s_per_epoch", "apply_s_per_epoch"]].isna().all(axis=None):
        return [Line(text="No optimizer here reports how its time splits.")]
    splits = {row["optimizer"]: split(row) for _, row in frame.iterrows()}
    first = frame.iloc[0]
    summary = "Seconds an epoch, medians over seeds: " + "; ".join(map(_describe_split, splits, splits.values())) + "."
    chart = Chart(
        id=f"{id}-1", title="seconds an epoch", summary=summary, spec=_spec(splits, summary), data=_table(splits)
    )
    rerun = (rerun_commands.train(first.task, first.scale), rerun_commands.table(first.task, first.scale))
    return [Figure(id=id, caption="Where an epoch's seconds go, medians over seeds", charts=[chart], rerun=rerun)]


def split(row: pd.Series) -> dict[str, float]:
    """Seconds an epoch by part; what is not reported is in the rest."""
    known = {name: row[f"{name}_s_per_epoch"] for name in NAMES[1:]}
    known = {name: 0.0 if math.isnan(seconds) else seconds for name, seconds in known.items()}
    return {NAMES[0]: max(row["time_per_epoch_s"] - sum(known.values()), 0.0), **known}


def _describe_split(name: str, parts: dict[str, float]) -> str:
    own = [f"{part} {number(parts[part])}" for part in NAMES[1:] if parts[part] > 0]
    inside = f", of it {', '.join(own)}" if own else ""
    return f"{name} {number(sum(parts.values()))}{inside}"


def _spec(splits: dict[str, dict[str, float]], summary: str) -> dict[str, Any]:
    rows = [
        {"optimizer": name, "part": part, "seconds": chart_theme.round_value(parts[part]), "place": place}
        for name, parts in splits.items()
        for place, part in enumerate(NAMES)
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", title="seconds an epoch"),
            y=alt.Y("optimizer:N", sort=list(splits), title=None, axis=alt.Axis(grid=False)),
            color=alt.Color("part:N", scale=chart_theme.colours(PARTS), legend=alt.Legend(orient="bottom", title=None)),
            order="place:Q",
            tooltip=["optimizer:N", "part:N", alt.Tooltip("seconds:Q", format=".3g")],
        )
    )
    return chart_theme.finish_chart(chart, summary, height=26 * len(splits) + 10)


def _table(splits: dict[str, dict[str, float]]) -> Table:
    rows = []
    for name, parts in splits.items():
        whole = sum(parts.values())
        share = (whole - parts[NAMES[0]]) / whole if whole > 0 else math.nan
        shown = "–" if math.isnan(share) else f"{share:.0%}"
        rows.append([name, *(number(parts[part]) for part in NAMES), number(whole), shown])
    header = ["optimizer", *NAMES, "whole", "for the preconditioner"]
    return Table(caption="Seconds an epoch by part, medians over seeds", header=header, rows=rows, folded=True)
