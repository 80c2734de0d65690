"""``sensitivity.csv`` as heat maps: one a grid, the best metric of each pair of settings."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.analysis.figures.curves import STYLE, save

# The columns of the file that are no settings.
_COURSE = ("grid", "ended", "seed", "split", "epochs", "loss")
_CHARACTERS_PER_INCH = 11  # of the title


def draw(csv: Path, title: str, *, higher_is_better: bool) -> tuple[Path, Path]:
    """Write ``sensitivity.svg`` and ``.png`` next to the file.

    Args:
        csv: what `tuning.sensitivity` wrote.
        title: of the figure.
        higher_is_better: of the metric; darker cells are better.

    Returns:
        The SVG and the PNG file.
    """
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        return save(figure(pd.read_csv(csv), title, higher_is_better=higher_is_better), csv.with_suffix(""))


def figure(table: pd.DataFrame, title: str, *, higher_is_better: bool) -> Figure:
    """A panel a grid; all have the same colours, of which the last are also those of values far out."""
    maps = [heat_map(own) for _, own in table.groupby("grid", sort=False)]
    made = Figure(figsize=(max(4.5, 3.4 * len(maps)), 3.4), layout="constrained")
    FigureCanvasAgg(made)
    width = round(_CHARACTERS_PER_INCH * made.get_figwidth())
    made.suptitle(textwrap.fill(title, width, break_on_hyphens=False), fontsize=11)
    axes = made.subplots(1, len(maps), squeeze=False)[0]
    values = np.concatenate([each.best.ravel() for each in maps])
    colours = Normalize(*colour_range(values))
    for ax, each in zip(axes, maps, strict=True):
        _draw(ax, each, colours, "viridis_r" if higher_is_better else "viridis")
    made.colorbar(
        axes[-1].images[0],
        ax=axes,
        extend=_extend(values, colours),
        label=table.columns[-1].replace("_", " ", 1),
    )
    return made


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The best metric of a grid's cells.

    Attributes:
        down: the setting that changes from row to row, empty if only one changes.
        across: the setting that changes from column to column.
        rows: its labels, (R,).
        columns: its labels, (C,).
        best: (R, C), NaN where a run diverged or is not there.
        ended: how each run ended, empty where there is none, (R, C).
    """

    down: str
    across: str
    rows: list[str]
    columns: list[str]
    best: np.ndarray
    ended: np.ndarray


def heat_map(own: pd.DataFrame) -> HeatMap:
    """Lay a grid's rows out; values ascend, the recipe's own ``default`` comes last, or alone under the grid's name.

    Args:
        own: rows of ``sensitivity.csv`` of one grid.

    Returns:
        Axes and values.
    """
    settings = [name for name in own.columns[:-2] if name not in _COURSE and own[name].notna().any()]
    changing = [name for name in settings if len(_values(own[name])) > 1]
    down, across = changing if len(changing) == 2 else ("", (changing or settings or ["grid"])[0])
    rows, columns = (_values(own[down]) if down else [""], _values(own[across]))
    best = np.full((len(rows), len(columns)), math.nan)
    ended = np.full(best.shape, "", dtype=object)
    for _, row in own.iterrows():
        place = rows.index(_label(row[down]) if down else ""), columns.index(_label(row[across]))
        ended[place] = row["ended"]
        if row["ended"] == "finished":
            best[place] = row.iloc[-1]
    return HeatMap(down=down, across=across, rows=rows, columns=columns, best=best, ended=ended)


def colour_range(best: np.ndarray) -> tuple[float, float]:
    """Between which values the colours go: all but those beyond Tukey's outer fences, three interquartile ranges out.

    One run that was lost would make all others look alike.

    Args:
        best: values of all cells.

    Returns:
        The least and the greatest.
    """
    known = best[np.isfinite(best)]
    if not len(known):
        return 0.0, 1.0
    low, high = np.quantile(known, [0.25, 0.75])
    reach = 3 * (high - low) or math.inf
    within = known[(known >= low - reach) & (known <= high + reach)]
    return float(within.min()), float(within.max())


def _extend(values: np.ndarray, colours: Normalize) -> str:
    """At which ends of the colour bar there are values beyond."""
    below, above = bool((values < colours.vmin).any()), bool((values > colours.vmax).any())
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]


def _values(column: pd.Series) -> list[str]:
    """The labels of a column's different values in their order."""
    return list(dict.fromkeys(_label(each) for each in column.sort_values(na_position="last")))


def _label(value: object) -> str:
    if isinstance(value, float):
        return "default" if math.isnan(value) else f"{value:g}"
    return str(value)


def _draw(ax: Axes, found: HeatMap, colours: Normalize, palette: str) -> None:
    image = ax.imshow(found.best, norm=colours, cmap=mpl.colormaps[palette].with_extremes(bad="#dddddd"), aspect="auto")
    ax.set_xlabel(found.across)
    ax.set_ylabel(found.down)
    ax.set_xticks(range(len(found.columns)), found.columns)
    ax.set_yticks(range(len(found.rows)), found.rows)
    for (row, column), value in np.ndenumerate(found.best):
        known = math.isfinite(value)
        dark = known and np.mean(image.cmap(colours(value))[:3]) < 0.5
        text = f"{value:.4g}" if known else found.ended[row, column]
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
