"""How the theory's figures are drawn: one style, PNG and SVG, the same bytes for the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "ngplus",
}


@contextmanager
def figure(folder: Path, name: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` inches, saved as ``name.png`` and ``name.svg`` when the block ends.

    Args:
        folder: where the files go.
        name: of the files.
        size: width and height in inches.

    Yields:
        The figure, to draw on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        drawn.savefig(folder / f"{name}.png", dpi=150)
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})
