"""Training and evaluation curves against epochs and against seconds, as SVG and PNG."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.analysis.comparable_runs import Comparable, load_comparable, name_data
from experiments.analysis.figures.palette import pick_colour, pick_dashes
from experiments.analysis.outcomes import STANDARD_ERROR
from experiments.records.run_record import Epoch, Run

# The same records give the same bytes: element ids from a fixed salt, no date, text as text.
STYLE: dict[str, Any] = {
    "svg.hashsalt": "ngplus",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


# The greatest value over the least from which on an axis is better logarithmic.
FAR_APART = 4.0
# How opaque all bands would be on top of each other, at most.
BANDS = 0.6
LEGEND_COLUMNS = 4
# Of a line of the title, which is as wide as the figure.
TITLE_CHARACTERS = 106


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One optimizer's course over its seeds; a point an epoch.

    Attributes:
        epochs: epoch numbers, (E,).
        seconds: median over seeds of the training clock, (E,).
        median: of the value over the seeds that have one, (E,).
        low: the least of any seed, (E,).
        high: the most of any seed, (E,).
    """

    epochs: np.ndarray
    seconds: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw(results_dir: Path, task: str, scale: str) -> tuple[Path, Path]:
    """Write ``curves.svg`` and ``curves.png`` next to the runs: medians over seeds, their range as a band.

    Args:
        results_dir: where the records are.
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        The SVG and the PNG file.

    Raises:
        UserError: there is no finished run.
    """
    comparable = load_comparable(results_dir, task, scale)
    with mpl.rc_context(STYLE):
        return save(figure(comparable), comparable.folder / "curves")


def save(made: Figure, path: Path) -> tuple[Path, Path]:
    """Write a figure as ``.svg`` and ``.png``, the same bytes for the same figure.

    Args:
        made: the figure.
        path: without a suffix.

    Returns:
        The SVG and the PNG file.
    """
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    made.savefig(svg, metadata={"Date": None, "Creator": None})
    made.savefig(png, dpi=160, metadata={"Software": None})
    return svg, png


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One row of a figure: what it shows of an epoch."""

    label: str
    value: Callable[[Epoch], float | None]
    lower_is_better: bool


def panels(comparable: Comparable) -> list[Panel]:
    """Training loss, the metric, and the task's further figures but standard errors, which are no curves.

    Args:
        comparable: the runs of a task at a scale.

    Returns:
        A panel a figure.
    """
    manifest = comparable.runs[0].manifest
    split = manifest.recipe.get("run", {}).get("report_split", "test")
    metric = f"{split} {manifest.metric.name} ({manifest.metric.unit})"
    own = [
        Panel(label="training loss", value=lambda epoch: epoch.train_loss, lower_is_better=True),
        Panel(label=metric, value=lambda epoch: epoch.metric, lower_is_better=not manifest.metric.higher_is_better),
    ]
    names = dict.fromkeys(name for run in comparable.runs for epoch in run.epochs for name in epoch.others)
    return own + [_further(split, name) for name in names if not name.endswith(STANDARD_ERROR)]


def _further(split: str, name: str) -> Panel:
    """A further figure; its unit stands behind a blank, and nobody says which way it is better."""
    figure, _, unit = name.rpartition(" ")
    label = f"{split} {figure} ({unit})" if figure else f"{split} {name}"
    return Panel(label=label, value=lambda epoch: epoch.others.get(name), lower_is_better=False)


def figure(comparable: Comparable, *, seconds: bool = True, only: Sequence[str] | None = None) -> Figure:
    """A row for the training loss, the metric and each further figure, against epochs and against seconds.

    Args:
        comparable: the runs of a task at a scale.
        seconds: whether those of all runs compare, and are drawn.
        only: the optimizers to draw, in the order of the legend, and then the metric alone; all if left out.

    Returns:
        The figure.
    """
    manifest, shown, runs = comparable.runs[0].manifest, panels(comparable), comparable.by_optimizer()
    metric = shown[1]
    if only is not None:
        shown, runs = [metric], {name: runs[name] for name in only}
    made = Figure(figsize=(9.0, 3.1 * len(shown)), layout="constrained")
    FigureCanvasAgg(made)
    title = f"{manifest.task}, scale {manifest.scale}: {name_data(manifest.task, manifest.dataset.name)}"
    made.suptitle(fill(title, TITLE_CHARACTERS), fontsize=11)
    labels = ("epochs", "seconds of training")[: 2 if seconds else 1]
    axes = made.subplots(len(shown), len(labels), sharex="col", sharey="row", squeeze=False)
    for row, panel in zip(axes, shown, strict=True):
        _draw_row(row, runs, panel)
        row[0].set_ylabel(panel.label)
    _mark_target(axes[shown.index(metric)], comparable.target)
    for ax, label in zip(axes[-1], labels, strict=True):
        ax.set_xlabel(label)
        ax.set_xlim(left=0)
    legend_below(made, axes[0, 0], title=f"median and range of seeds ({_seeds(runs)})")
    return made


def legend_below(made: Figure, ax: Axes, title: str | None = None) -> None:
    """What ``ax`` shows, named below the whole figure, where no curve is hidden, in as many columns as fit.

    Args:
        made: the figure.
        ax: whose lines are named.
        title: of the legend.
    """
    handles, labels = ax.get_legend_handles_labels()
    for columns in range(min(LEGEND_COLUMNS, max(1, len(labels))), 0, -1):
        legend = made.legend(handles, labels, loc="outside lower center", ncols=columns, title=title)
        if columns == 1 or legend.get_window_extent().width <= made.bbox.width:
            break
        legend.remove()


def _draw_row(row: np.ndarray, runs: dict[str, list[Run]], panel: Panel) -> None:
    curves = {name: summarise_curve(own, panel.value) for name, own in runs.items()}
    others = other_devices(runs)
    lost, opacity = count_diverged(runs), min(0.18, BANDS / len(runs))
    for name, curve in curves.items():
        label = name
        if name in lost:
            label += f" ({lost[name]} diverged)"
        if name in others:
            label += f" (on {others[name]})"
        style = {"color": pick_colour(name), "linestyle": pick_dashes(name, list(runs))}
        for ax, x in zip(row, (curve.epochs, curve.seconds), strict=False):
            ax.fill_between(x, curve.low, curve.high, color=style["color"], alpha=opacity, linewidth=0)
            ax.plot(x, curve.median, label=label, linewidth=1.6, **style)
    # The untrained model and a divergence would squeeze what matters into a corner.
    _limit(row[0], find_span(list(curves.values()), logarithmic=panel.lower_is_better))


def other_devices(runs: dict[str, list[Run]]) -> dict[str, str]:
    """The devices of each optimizer that did not run on those of the first: its seconds are others.

    Args:
        runs: by optimizer, the reference first.

    Returns:
        Devices by optimizer.
    """
    found = {
        name: " and ".join(sorted({device for run in own for device in run.devices})) for name, own in runs.items()
    }
    first = next(iter(found.values()))
    return {name: devices for name, devices in found.items() if devices != first}


def count_diverged(runs: dict[str, list[Run]]) -> dict[str, str]:
    """``"3 of 5"`` for each optimizer of which runs diverged: from there on they are in no median.

    Args:
        runs: by optimizer.

    Returns:
        Counts in words, by optimizer.
    """
    counts = {
        name: sum(run.end is not None and run.end.reason == "diverged" for run in own) for name, own in runs.items()
    }
    return {name: f"{count} of {len(runs[name])}" for name, count in counts.items() if count}


def summarise_curve(runs: list[Run], value: Callable[[Epoch], float | None]) -> Curve:
    """Median and range over seeds of one value; an epoch in which no seed has it is left out.

    Args:
        runs: an optimizer's.
        value: what is drawn of an epoch.

    Returns:
        The curve.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for epoch in run.epochs:
            if (point := value(epoch)) is not None:
                found.setdefault(epoch.epoch, []).append((epoch.seconds, point))
    epochs = sorted(found)
    points = [np.array(found[epoch]) for epoch in epochs]  # (E, seeds, 2)
    return Curve(
        epochs=np.array(epochs),
        seconds=np.array([np.median(each[:, 0]) for each in points]),
        median=np.array([np.median(each[:, 1]) for each in points]),
        low=np.array([each[:, 1].min() for each in points]),
        high=np.array([each[:, 1].max() for each in points]),
    )


@dataclass(frozen=True, kw_only=True)
class Span:
    """What an axis shows: from `low` to `high`, logarithmic or not."""

    low: float
    high: float
    logarithmic: bool


def find_span(curves: list[Curve], *, logarithmic: bool) -> Span | None:
    """The medians from the first trained epoch on, with a margin; ``None`` if they are all the same.

    With `logarithmic` the axis is, if the values are positive and far apart: what falls by factors shows there.

    Args:
        curves: of one panel.
        logarithmic: whether a logarithmic axis is wanted.

    Returns:
        The limits of the axis, and of which kind it is.
    """
    trained = [curve.median[curve.epochs > 0] for curve in curves]
    values = np.concatenate(trained) if trained else np.array([])
    values = values[np.isfinite(values)]
    if not len(values) or np.ptp(values) == 0:
        return None
    if logarithmic and values.min() > 0 and values.max() > FAR_APART * values.min():
        factor = (values.max() / values.min()) ** 0.08
        return Span(low=values.min() / factor, high=values.max() * factor, logarithmic=True)
    margin = 0.08 * np.ptp(values)
    return Span(low=values.min() - margin, high=values.max() + margin, logarithmic=False)


def _limit(ax: Axes, span: Span | None) -> None:
    if span is None:
        return
    if span.logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(span.low, span.high)


def _mark_target(row: np.ndarray, target: float | None) -> None:
    if target is None:
        return
    for ax in row:
        ax.axhline(target, color="#333333", linestyle=(0, (4, 3)), linewidth=1.0)
    place = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom", "fontsize": 8}
    row[0].annotate(f"target {target:.4g}", (0.01, target), **place)


def _seeds(runs: Mapping[str, Sequence[Run]]) -> str:
    counts = {len(own) for own in runs.values()}
    return str(counts.pop()) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
