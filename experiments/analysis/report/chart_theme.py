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
    """The legend of these optimizers.

    Args:
        names: of optimizers.

    Returns:
        A key each.
    """
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
    """The scale that gives each name its colour on either ground.

    Args:
        legend: from `keys`.

    Returns:
        For both grounds.
    """
    return alt.Scale(
        domain=[key.name for key in legend],
        range=[alt.expr(f"dark ? '{key.dark}' : '{key.light}'") for key in legend],
    )


def make_dash_scale(legend: Sequence[Key]) -> alt.Scale:
    """The scale that gives each name its dashes.

    Args:
        legend: from `keys`.

    Returns:
        For line charts.
    """
    return alt.Scale(domain=[key.name for key in legend], range=[list(key.dashes) for key in legend])


def round_value(value: float) -> float | None:
    """To six significant digits: more cannot be seen, and are not the same on every machine.

    Args:
        value: of a point.

    Returns:
        ``None`` if it is not finite.
    """
    return float(f"{value:.6g}") if math.isfinite(value) else None


def finish_chart(
    chart: alt.TopLevelMixin, summary: str, *parameters: alt.Parameter, height: int = HEIGHT
) -> dict[str, Any]:
    """The specification, as wide as the page lets it be and with a text in its place.

    Args:
        chart: as Altair makes it.
        summary: the text, for those who cannot see the chart.
        *parameters: that the page's controls set, besides the ground.
        height: in pixels.

    Returns:
        Vega-Lite's specification.
    """
    whole = chart.add_params(dark(), *parameters).properties(width="container", height=height, description=summary)
    return whole.to_dict()
