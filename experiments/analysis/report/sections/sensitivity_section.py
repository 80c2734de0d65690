"""``sensitivity.csv`` as heat maps, one a grid, and in words."""

import math
from typing import Any

import altair as alt
import numpy as np

from experiments.analysis.comparison_table import number
from experiments.analysis.figures.heatmaps import HeatMap, colour_range, heat_map
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Block, Chart, Figure, Line, Table
from experiments.analysis.report.results_folder import ResultsFolder


def blocks(results: ResultsFolder, task: str, scale: str, id: str, *, higher_is_better: bool | None) -> list[Block]:
    """A heat map a grid; a sentence if no grid was run.

    Args:
        results: the results.
        task: the task.
        scale: its scale.
        id: unique on the page.
        higher_is_better: of the metric, ``None`` if no run says; better is darker.

    Returns:
        What stands on the page.
    """
    rerun = (rerun_commands.sensitivity(task, scale),)
    place = f"{task}/{scale}/sensitivity.csv"
    table = results.csv(place, columns=("grid", "ended", "split", "epochs"))
    if table is None:
        return [Line(text="No sensitivity grid was run here.", rerun=rerun)]
    metric = str(table.columns[-1])
    try:
        maps = {str(name): heat_map(own) for name, own in table.groupby("grid", sort=False)}
    except (IndexError, TypeError, ValueError) as error:
        results.warn(f"{place}: cannot be laid out: {error}")
        return [Line(text="The sensitivity grid here is damaged; see what was left out.", rerun=rerun)]
    charts = [
        _chart(name, each, metric, f"{id}-{number_}", higher_is_better=bool(higher_is_better))
        for number_, (name, each) in enumerate(maps.items(), 1)
    ]
    splits = ", ".join(sorted(set(map(str, table["split"]))))
    lengths = ", ".join(sorted(set(map(str, table["epochs"]))))
    note = f"One run a cell on the {splits} split, {lengths} epochs; darker is better."
    return [Figure(id=id, caption="Sensitivity to settings", charts=charts, rerun=rerun, notes=(note,))]


def _chart(name: str, found: HeatMap, metric: str, id: str, *, higher_is_better: bool) -> Chart:
    title = f"{metric.replace('_', ' ', 1)}: {' by '.join(filter(None, (found.down, found.across)))}"
    summary = _summary(title, found, higher_is_better=higher_is_better)
    return Chart(
        id=id,
        title=title,
        summary=summary,
        spec=_spec(found, summary, higher_is_better=higher_is_better),
        data=_table(name, found),
    )


def _summary(title: str, found: HeatMap, *, higher_is_better: bool) -> str:
    if not np.isfinite(found.best).any():
        return f"{title}: no run of the grid finished."
    lowest, highest = float(np.nanmin(found.best)), float(np.nanmax(found.best))
    if lowest == highest and np.isfinite(found.best).all() and found.best.size > 1:
        return f"{title}: {number(lowest)} in every cell."
    pick = np.nanargmax if higher_is_better else np.nanargmin
    row, column = np.unravel_index(pick(found.best), found.best.shape)
    where = " and ".join(
        f"{setting} {label}"
        for setting, label in ((found.down, found.rows[row]), (found.across, found.columns[column]))
        if setting
    )
    return f"{title}: from {number(lowest)} to {number(highest)}, best at {where}."


def _spec(found: HeatMap, summary: str, *, higher_is_better: bool) -> dict[str, Any]:
    domain = list(colour_range(found.best))
    scale = alt.Scale(scheme="viridis", reverse=higher_is_better, domain=domain, clamp=True)
    base = alt.Chart(alt.Data(values=_cells(found, higher_is_better=higher_is_better))).encode(
        x=alt.X("across:N", sort=found.columns, title=found.across, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("down:N", sort=found.rows, title=found.down or None),
    )
    known = base.transform_filter("isValid(datum.best)")
    cells = known.mark_rect().encode(
        color=alt.Color("best:Q", scale=scale, legend=None),
        tooltip=["down:N", "across:N", alt.Tooltip("best:Q", format=".4g"), "ended:N"],
    )
    words = base.mark_text(fontSize=11).encode(text="word:N", fill=alt.Fill("ink:N", scale=None))
    return chart_theme.finish_chart(alt.layer(cells, words), summary, height=44 * len(found.rows) + 10)


def _cells(found: HeatMap, *, higher_is_better: bool) -> list[dict[str, Any]]:
    low, high = colour_range(found.best)
    cells = []
    for (row, column), best in np.ndenumerate(found.best):
        share = 0.0 if high == low else (best - low) / (high - low)
        bright = math.isfinite(best) and ((1 - share) if higher_is_better else share) > 0.6
        cells.append(
            {
                "down": found.rows[row],
                "across": found.columns[column],
                "best": chart_theme.round_value(best),
                "word": number(best, digits=4) if math.isfinite(best) else found.ended[row, column] or "not run",
                "ended": found.ended[row, column],
                "ink": "#000000" if bright else "#ffffff" if math.isfinite(best) else "#808080",
            }
        )
    return cells


def _table(name: str, found: HeatMap) -> Table:
    def word(row: int, column: int) -> str:
        best = found.best[row, column]
        return number(best, digits=4) if math.isfinite(best) else found.ended[row, column] or "not run"

    return Table(
        caption=f"Grid {name}",
        header=[f"{found.down or ''} ↓ {found.across} →".strip("↓ ") if found.down else found.across, *found.columns],
        rows=[
            [label, *(word(row, column) for column in range(len(found.columns)))]
            for row, label in enumerate(found.rows)
        ],
        folded=True,
    )
