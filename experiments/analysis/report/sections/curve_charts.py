"""The course of training as charts: a panel each for the training loss, the metric, and further figures."""

from collections.abc import Mapping
from typing import Any

import altair as alt

from experiments.analysis.comparable_runs import Comparable
from experiments.analysis.comparison_table import number
from experiments.analysis.figures import curves
from experiments.analysis.figures.curves import Curve, Panel
from experiments.analysis.report import chart_theme, rerun_commands
from experiments.analysis.report.blocks import Chart, Figure, Table

AXES = ("epochs", "seconds")


def figure(comparable: Comparable, id: str) -> Figure:
    """All panels, with one legend and one choice of epochs or seconds.

    Args:
        comparable: the runs of a task at a scale.
        id: unique on the page.

    Returns:
        The figure.
    """
    manifest = comparable.runs[0].manifest
    charts = [
        chart
        for place, panel in enumerate(curves.panels(comparable), 1)
        if (chart := _chart(comparable, panel, f"{id}-{place}", target=comparable.target if place == 2 else None))
    ]
    counts = {name: len(runs) for name, runs in comparable.by_optimizer().items()}
    seeds = ", ".join(f"{name} {count}" for name, count in counts.items())
    notes = [f"The line is the median over seeds, the band their range, from the first epoch on. Seeds: {seeds}."]
    if lost := curves.count_diverged(comparable.by_optimizer()):
        words = ", ".join(f"{name} {share}" for name, share in lost.items())
        notes.append(f"Diverged, and in no median from there on: {words}.")
    if others := curves.other_devices(comparable.by_optimizer()):
        words = ", ".join(f"{name} on {devices}" for name, devices in others.items())
        notes.append(f"Not on the device of {next(iter(counts))}, so that seconds do not compare: {words}.")
    return Figure(
        id=id,
        caption="Curves",
        charts=charts,
        rerun=(
            rerun_commands.train(manifest.task, manifest.scale),
            rerun_commands.table(manifest.task, manifest.scale),
        ),
        legend=chart_theme.keys(list(counts)),
        axes=AXES,
        notes=tuple(notes),
    )


def _chart(comparable: Comparable, panel: Panel, id: str, *, target: float | None) -> Chart | None:
    """One panel, ``None`` if no run has a figure for it."""
    found = {name: curves.summarise_curve(runs, panel.value) for name, runs in comparable.by_optimizer().items()}
    found = {name: curve for name, curve in found.items() if (curve.epochs > 0).any()}
    if not found:
        return None
    summary = _summary(panel, found, target)
    return Chart(
        id=id,
        title=panel.label,
        summary=summary,
        spec=_spec(found, panel, summary, target),
        data=_data(panel, found),
    )


def _summary(panel: Panel, found: Mapping[str, Curve], target: float | None) -> str:
    last = ", ".join(f"{name} {number(curve.median[-1])}" for name, curve in found.items())
    aim = "" if target is None else f" The target is {target:.4g}."
    return f"{panel.label}: median and range over seeds. After the last epoch: {last}.{aim}"


def _spec(found: Mapping[str, Curve], panel: Panel, summary: str, target: float | None) -> dict[str, Any]:
    legend, names = chart_theme.keys(list(found)), list(found)
    base = (
        alt.Chart(alt.Data(values=_values(found)))
        .transform_filter("indexof(shown, datum.optimizer) >= 0")
        .transform_calculate(x="by == 'seconds' ? datum.seconds : datum.epoch")
        .encode(
            x=alt.X(
                "x:Q",
                scale=alt.Scale(nice=False, zero=True),
                axis=alt.Axis(grid=False, tickMinStep=alt.expr("by == 'seconds' ? 0.001 : 1")),
            ),
            color=alt.Color("optimizer:N", scale=chart_theme.colours(legend), legend=None),
        )
    )
    hover = alt.selection_point(name="hover", nearest=True, on="pointerover", clear="pointerout", empty=False)
    line = base.mark_line(clip=True, strokeWidth=2).encode(
        y=alt.Y("median:Q", scale=_scale(found, panel), title=None),
        strokeDash=alt.StrokeDash("optimizer:N", scale=chart_theme.make_dash_scale(legend), legend=None),
    )
    band = base.mark_area(clip=True, opacity=0.16, line=False).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    points = (
        base.mark_point(clip=True, filled=True, size=70)
        .encode(
            y="median:Q",
            opacity=alt.condition(hover, alt.value(1), alt.value(0)),
            tooltip=[
                "optimizer:N",
                "epoch:Q",
                *(alt.Tooltip(f"{name}:Q", format=",.4g") for name in ("seconds", "median", "low", "high")),
            ],
        )
        .add_params(hover)
    )
    layers = [band, line, points] if target is None else [band, _target(target), line, points]
    parameters = alt.param(name="by", value=AXES[0]), alt.param(name="shown", value=names)
    spec = chart_theme.finish_chart(alt.layer(*layers), summary, *parameters)
    return _with_title(spec)


def _scale(found: Mapping[str, Curve], panel: Panel) -> alt.Scale:
    span = curves.find_span(list(found.values()), logarithmic=panel.lower_is_better)
    if span is None:
        return alt.Scale(zero=False)
    limits = [chart_theme.round_value(span.low), chart_theme.round_value(span.high)]
    return alt.Scale(domain=limits, type="log") if span.logarithmic else alt.Scale(domain=limits, zero=False)


def _with_title(spec: dict[str, Any]) -> dict[str, Any]:
    """With a title of the axis that says what is chosen: Vega-Lite takes an expression there, Altair does not."""
    spec["layer"][0]["encoding"]["x"]["axis"]["title"] = {"expr": "by == 'seconds' ? 'seconds of training' : 'epochs'"}
    return spec


def _target(value: float) -> alt.Chart:
    return (
        alt.Chart(alt.Data(values=[{"target": chart_theme.round_value(value)}]))
        .mark_rule(clip=True, strokeDash=[4, 3], color=alt.expr("dark ? '#cccccc' : '#444444'"))
        .encode(y="target:Q", tooltip=[alt.Tooltip("target:Q", format=".4g")])
    )


def _values(found: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """A row a point, from the first trained epoch on, as the axis is."""
    return [
        {
            "optimizer": name,
            "epoch": int(curve.epochs[place]),
            **{
                part: chart_theme.round_value(getattr(curve, part)[place])
                for part in ("seconds", "median", "low", "high")
            },
        }
        for name, curve in found.items()
        for place in range(len(curve.epochs))
        if curve.epochs[place] > 0
    ]


def _data(panel: Panel, found: Mapping[str, Curve]) -> Table:
    """A row an epoch, a column an optimizer."""
    cells = {name: dict(zip(curve.epochs, _cells(curve), strict=True)) for name, curve in found.items()}
    epochs = sorted({epoch for own in cells.values() for epoch in own})
    return Table(
        caption=f"{panel.label} by epoch: median over seeds [least, most], at median seconds",
        header=["epoch", *found],
        rows=[[str(epoch), *(own.get(epoch, "–") for own in cells.values())] for epoch in epochs],
        folded=True,
    )


def _cells(curve: Curve) -> list[str]:
    def figure(value: float) -> str:
        return number(value, digits=4)

    points = zip(curve.median, curve.low, curve.high, curve.seconds, strict=True)
    return [f"{figure(m)} [{figure(low)}, {figure(high)}], {number(s)} s" for m, low, high, s in points]
