"""``tuning.csv``: what was tried for each optimizer, and what came out best."""

from typing import Any

import altair as alt
import pandas as pd

from experiments.analysis.figures import curves
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Block, Chart, Figure, Line, Table, make_table
from experiments.analysis.report.results_folder import ResultsFolder, format_cell

# The columns that are no settings.
_COURSE = ("optimizer", "trial", "ended", "seed", "split", "epochs", "loss")


def blocks(results: ResultsFolder, task: str, scale: str, id: str) -> list[Block]:
    """The best of each optimizer, all trials as points over the learning rate, and all of them in words.

    Args:
        results: the results folder.
        task: the task's name.
        scale: a scale that it has a recipe for.
        id: unique on the page.

    Returns:
        What stands on the page.
    """
    place = f"{task}/{scale}/tuning.csv"
    trials = results.csv(place, columns=("optimizer", "split", "epochs"))
    if trials is None:
        return [Line(text="No settings were searched here.", rerun=(rerun_commands.tune(task, scale),))]
    rerun = (rerun_commands.tune(task, scale),)
    found: list[Block] = [_best(trials, rerun)]
    if _can_be_drawn(trials):
        found.append(_figure(trials, id, rerun))
    else:
        found.append(make_table(trials, "All trials", rerun, folded=True))
    return found


def _can_be_drawn(trials: pd.DataFrame) -> bool:
    drawn = {"lr", trials.columns[-1]} & set(trials.select_dtypes("number").columns)
    return len(drawn) == 2 and bool(trials["lr"].gt(0).any())


def _best(trials: pd.DataFrame, rerun: tuple[str, ...]) -> Table:
    """The first row of each optimizer: the file has the best first."""
    metric = trials.columns[-1]
    settings = [name for name in trials.columns[:-2] if name not in _COURSE]
    rows = []
    for name, own in trials.groupby("optimizer", sort=False):
        best = own.iloc[0]
        chosen = ", ".join(f"{key} {format_cell(best[key])}" for key in settings if format_cell(best[key]))
        rows.append([str(name), str(len(own)), chosen, format_cell(best[metric]), str(best["epochs"])])
    splits = ", ".join(sorted(set(map(str, trials["split"]))))
    return Table(
        caption=f"Best of the settings tried, on the {splits} split",
        header=["optimizer", "trials", "best settings", _spoken(metric), "epochs a trial"],
        rows=rows,
        rerun=rerun,
    )


def _figure(trials: pd.DataFrame, id: str, rerun: tuple[str, ...]) -> Figure:
    metric = trials.columns[-1]
    spread = trials.groupby("optimizer", sort=False)[metric].agg(["count", "min", "max"])
    said = "; ".join(
        f"{name} {row['count']:g} trials from {format_cell(float(row['min']))} to {format_cell(float(row['max']))}"
        for name, row in spread.iterrows()
    )
    summary = f"{_spoken(metric)} of each trial over its learning rate: {said}."
    names = list(map(str, spread.index))
    chart = Chart(
        id=f"{id}-1",
        title=_spoken(metric),
        summary=summary,
        spec=_spec(trials, names, metric, summary),
        data=make_table(trials, "All trials", (), folded=True),
    )
    return Figure(id=id, caption="What was tried", charts=[chart], rerun=rerun, legend=chart_theme.keys(names))


def _spec(trials: pd.DataFrame, names: list[str], metric: str, summary: str) -> dict[str, Any]:
    rows = [
        {
            "optimizer": str(row["optimizer"]),
            "lr": chart_theme.round_value(row["lr"]),
            "metric": chart_theme.round_value(row[metric]),
        }
        for _, row in trials.iterrows()
        if row["lr"] > 0
    ]
    values = [row["metric"] for row in rows if row["metric"] is not None]
    far = bool(values) and min(values) > 0 and max(values) > curves.FAR_APART * min(values)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter("indexof(shown, datum.optimizer) >= 0")
        .mark_point(filled=True, size=60, opacity=0.85)
        .encode(
            x=alt.X("lr:Q", scale=alt.Scale(type="log", padding=12), title="learning rate", axis=alt.Axis(grid=False)),
            y=alt.Y("metric:Q", scale=alt.Scale(type="log") if far else alt.Scale(zero=False), title=None),
            color=alt.Color("optimizer:N", scale=chart_theme.colours(chart_theme.keys(names)), legend=None),
            shape=alt.Shape("optimizer:N", scale=alt.Scale(domain=names), legend=None),
            tooltip=["optimizer:N", alt.Tooltip("lr:Q", format=".3g"), alt.Tooltip("metric:Q", format=".4g")],
        )
    )
    return chart_theme.finish_chart(chart, summary, alt.param(name="shown", value=names))


def _spoken(metric: str) -> str:
    return metric.replace("_", " ", 1)
