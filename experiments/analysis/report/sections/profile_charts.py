"""Performance profiles over the tasks of a scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from experiments.analysis import profiles
from experiments.analysis.comparison_table import number
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Block, Chart, Figure, Line, Table
from experiments.analysis.report.results_folder import Study

AXES = ("epochs", "seconds")


def blocks(studies: Mapping[str, Study], scale: str) -> list[Block]:
    """The profile of a scale and its table; a sentence if there are fewer than two tasks to compare over.

    Args:
        studies: runs by task.
        scale: a scale that it has a recipe for.

    Returns:
        What stands on the page.
    """
    entries = profiles.select_entries({task: study.frame for task, study in studies.items()})
    if len(entries) < 2:
        count = "no task has" if not entries else "one task alone has"
        return [Line(text=f"Scale {scale}: {count} runs with a target here; a profile needs two.")]
    return [_figure(entries, scale), _table(entries, scale)]


def _figure(entries: Mapping[str, Mapping[str, pd.Series]], scale: str) -> Figure:
    names = profiles.names_in(entries)
    rows = [row for axis in AXES for name in names for row in _steps(entries, name, axis)]
    table = profiles.tabulate(entries, scale)
    scores = table[table["measure"] == AXES[0]].set_index("optimizer")["profile_score"]
    summary = (
        f"Share of {len(entries)} tasks on which an optimizer reaches the target within a factor of the fastest. "
        f"Mean share over factors 1 to {profiles.MAX_FACTOR:g}, by epochs: "
        + ", ".join(f"{name} {number(scores[name], digits=2)}" for name in names)
        + "."
    )
    id = f"profile-{scale}"
    chart = Chart(
        id=f"{id}-1",
        title="share of tasks within a factor of the fastest",
        summary=summary,
        spec=_spec(rows, names, summary),
        data=_factors(entries, names, scale),
    )
    return Figure(
        id=id,
        caption=f"Performance profile, scale {scale}: {', '.join(entries)}",
        charts=[chart],
        rerun=(rerun_commands.profiles(scale),),
        legend=chart_theme.keys(names),
        axes=AXES,
        notes=("NG+ enters with the variant on the base that the task compares with, or else under its plain name.",),
    )


def _steps(entries: Mapping[str, Mapping[str, pd.Series]], name: str, axis: str) -> list[dict[str, Any]]:
    factors, shares = profiles.curve(profiles.ratios(entries, name, axis))
    pairs = zip(factors, shares, strict=True)
    return [
        {"optimizer": name, "by": axis, "x": chart_theme.round_value(x), "share": chart_theme.round_value(y)}
        for x, y in pairs
    ]


def _spec(rows: Sequence[Mapping[str, Any]], names: Sequence[str], summary: str) -> dict[str, Any]:
    legend = chart_theme.keys(names)
    chart = (
        alt.Chart(alt.Data(values=list(rows)))
        .transform_filter("datum.by == by && indexof(shown, datum.optimizer) >= 0")
        .mark_line(interpolate="step-after", strokeWidth=2, point=alt.OverlayMarkDef(filled=True, size=30))
        .encode(
            x=alt.X(
                "x:Q",
                scale=alt.Scale(domain=[1, profiles.MAX_FACTOR]),
                title="time to the target, over the fastest's",
                axis=alt.Axis(grid=False),
            ),
            y=alt.Y("share:Q", scale=alt.Scale(domain=[0, 1]), title=None),
            color=alt.Color("optimizer:N", scale=chart_theme.colours(legend), legend=None),
            strokeDash=alt.StrokeDash("optimizer:N", scale=chart_theme.make_dash_scale(legend), legend=None),
            tooltip=[
                "optimizer:N",
                alt.Tooltip("x:Q", title="factor", format=".3g"),
                alt.Tooltip("share:Q", format=".2f"),
            ],
        )
    )
    parameters = alt.param(name="by", value=AXES[0]), alt.param(name="shown", value=list(names))
    return chart_theme.finish_chart(chart, summary, *parameters)


def _factors(entries: Mapping[str, Mapping[str, pd.Series]], names: Sequence[str], scale: str) -> Table:
    """Each optimizer's factor on each task, by epochs and by seconds."""
    by = {axis: {name: profiles.ratios(entries, name, axis) for name in names} for axis in AXES}
    return Table(
        caption=f"Time to the target over the fastest's, scale {scale}: by epochs / by seconds",
        header=["task", *names],
        rows=[
            [task, *(" / ".join(number(by[axis][name][place]) for axis in AXES) for name in names)]
            for place, task in enumerate(entries)
        ],
        folded=True,
    )


def _table(entries: Mapping[str, Mapping[str, pd.Series]], scale: str) -> Table:
    header = ["optimizer", "by", "tasks reached", "profile score", "speed-up", "interval", "speed-up, misses counted"]
    rows = [
        [
            row.optimizer,
            row.measure,
            f"{row.tasks_reached}/{row.tasks}",
            number(row.profile_score),
            number(row.speed_up, suffix="×"),
            f"[{number(row.speed_up_low)}, {number(row.speed_up_high)}]",
            number(row.speed_up_restricted, suffix="×"),
        ]
        for row in profiles.tabulate(entries, scale).itertuples()
    ]
    return Table(
        caption=f"Scores and speed-ups over the reference, scale {scale}",
        header=header,
        rows=rows,
        rerun=(rerun_commands.profiles(scale),),
        notes=(
            "Speed-up: geometric mean over the tasks on which both reach the target; with misses counted, from the "
            "restricted means over all tasks it was run on.",
        ),
    )
