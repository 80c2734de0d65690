"""Colours, dashes and figures in chart specifications, for a light and for a dark ground."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from experiments.analysis.figures.palette import lighten_colour, pick_colour, pick_dashes
from experiments.analysis.report.blocks import Key

DASHES = {"solid": (1, 0), "dashed": (6, 3), "dashdot": (7, 3, 2, 3), "dotted": (2, 3)}
HEIGHT = 240


def keys(names: Sequence[str]) -> list[Key]:
    """The legend of these optimizers."""
    return [
        Key(
            name=name,
            light=pick_colour(name),
            dark=lighten_colour(name),
            dashes=DASHES[pick_dashes(name, list(names))],
        )
        for name in names
    ]


def dark() -> alt.Parameter:
    """Whether the ground is dark; the page sets it."""
    return alt.param(name="dark", value=False)


def colours(legend: Sequence[Key]) -> alt.Scale:
    """The scale that gives each name its colour on either ground."""
    return alt.Scale(
        domain=[key.name for key in legend],
        range=[alt.expr(f"dark ? '{key.dark}' : '{key.light}'") for key in legend],
    )


def make_dash_scale(legend: Sequence[Key]) -> alt.Scale:
    """The scale that gives each name its dashes."""
    return alt.Scale(domain=[key.name for key in legend], range=[list(key.dashes) for key in legend])


def round_value(value: float) -> float | None:
    """To six significant digits: more cannot be seen, and are not the same on every machine."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def finish_chart(
    chart: alt.TopLevelMixin, summary: str, *parameters: alt.Parameter, height: int = HEIGHT
) -> dict[str, Any]:
    """The specification, as wide as the page lets it be and with a text in its place."""
    whole = chart.add_params(dark(), *parameters).properties(width="container", height=height, description=summary)
    return whole.to_dict()
