"""``results/bench``: what a step, the curvature, and reading the data cost."""

from typing import Any

import altair as alt
import pandas as pd

from experiments.analysis.comparison_table import number
from experiments.analysis.figures.palette import lighten_colour, pick_colour
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Block, Chart, Figure, Key, Line, Section, make_table
from experiments.analysis.report.results_folder import ResultsFolder

EQUAL = "every_10_over_sgd"


def section(results: ResultsFolder) -> Section:
    """A bar chart for each file of steps, then every file as a table.

    Args:
        results: the results folder.

    Returns:
        The section.
    """
    stems = sorted(path.stem for path in (results.root / "bench").glob("*.csv"))
    files = {stem: table for stem in stems if (table := results.csv(f"bench/{stem}.csv")) is not None}
    blocks: list[Block] = []
    charts = [_chart(table, f"costs-{place}") for place, table in enumerate(filter(_of_steps, files.values()), 1)]
    if charts:
        blocks.append(
            Figure(
                id="costs-steps",
                caption="A step when every method updates its preconditioner every 10 steps, over a step of SGD",
                charts=charts,
                rerun=("make bench",),
            )
        )
    blocks += [
        make_table(table, f"bench/{stem}.csv", (rerun_commands.bench(stem),), folded=True)
        for stem, table in files.items()
    ]
    return Section(
        id="costs",
        title="What a step costs",
        blocks=blocks or [Line(text="No bench was run here.", rerun=("make bench",))],
    )


def _of_steps(table: pd.DataFrame) -> bool:
    return {"model", "optimizer", EQUAL} <= set(table.columns) and pd.api.types.is_numeric_dtype(table[EQUAL])


def _chart(table: pd.DataFrame, id: str) -> Chart:
    known = table[table[EQUAL].notna()]
    title = ", ".join(dict.fromkeys(map(str, [*table["model"], *table.get("device", [])])))
    said = ", ".join(f"{row.optimizer} {number(getattr(row, EQUAL))}×" for row in known.itertuples())
    missing = ", ".join(map(str, table[table[EQUAL].isna()]["optimizer"]))
    summary = f"{title}: step over SGD's: {said}.{f' Cannot train it: {missing}.' if missing else ''}"
    shown = table[
        [name for name in ("optimizer", EQUAL, "usual_over_sgd", "peak_memory_mb", "why_not") if name in table]
    ]
    return Chart(
        id=id,
        title=title,
        summary=summary,
        spec=_spec(known, summary),
        data=make_table(shown, title, (), folded=True),
    )


def _spec(table: pd.DataFrame, summary: str) -> dict[str, Any]:
    names = list(dict.fromkeys(map(str, table["optimizer"])))
    legend = [Key(name=name, light=pick_colour(_family(name)), dark=lighten_colour(_family(name))) for name in names]
    rows = [
        {"optimizer": name, "ratio": chart_theme.round_value(ratio), "word": f"{number(ratio)}×"}
        for name, ratio in zip(map(str, table["optimizer"]), table[EQUAL], strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("ratio:Q", title="step over SGD's", scale=alt.Scale(domain=[0, 1.2 * float(table[EQUAL].max())])),
        y=alt.Y("optimizer:N", sort=names, title=None, axis=alt.Axis(grid=False, labelLimit=150)),
    )
    bars = base.mark_bar().encode(
        color=alt.Color("optimizer:N", scale=chart_theme.colours(legend), legend=None),
        tooltip=["optimizer:N", alt.Tooltip("ratio:Q", format=".3g")],
    )
    words = base.mark_text(align="left", dx=4).encode(text="word:N")
    return chart_theme.finish_chart(alt.layer(bars, words), summary, height=22 * len(names) + 10)


def _family(name: str) -> str:
    """``kfac`` of ``kfac (asdfghjkl)``."""
    return name.partition(" ")[0]
