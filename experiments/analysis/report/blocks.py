"""What the page is made of: tables, figures, pictures, and the lines that stand in for what is missing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd

from experiments.analysis.report.results_folder import format_cell

_FIGURE = re.compile(r"(?:missed|∞|[-–−]?[\d.,]+(?:e[-+]?\d+)?[×%]?)(?: ?[±\[].*)?")

# From here on a cell is a sentence, and its column is not squeezed.
_LONG = 28


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        caption: what it shows.
        header: names of the columns.
        rows: cells in words.
        rerun: the commands that make it again.
        notes: what a reader needs to know about it.
        folded: whether it is closed until it is asked for.
    """

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    rerun: Sequence[str] = ()
    notes: Sequence[str] = ()
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures only, and are set flush right."""
        return [
            any(cells) and all(not cell or cell == "–" or _FIGURE.fullmatch(cell) for cell in cells)
            for cells in self._columns
        ]

    @property
    def classes(self) -> list[str]:
        """The style of each column."""
        long = [any(len(cell) > _LONG for cell in cells) for cells in self._columns]
        return ["figure" if figures else "long" if far else "" for figures, far in zip(self.numeric, long, strict=True)]

    @property
    def _columns(self) -> list[tuple[str, ...]]:
        return list(zip(*self.rows, strict=True)) or [()] * len(self.header)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing, as a Vega-Lite specification.

    Attributes:
        id: unique on the page.
        title: what it shows.
        summary: the same for who cannot see it, with its main figures.
        spec: the specification.
        data: its figures as a table.
    """

    id: str
    title: str
    summary: str
    spec: Mapping[str, Any]
    data: Table


@dataclass(frozen=True, kw_only=True)
class Key:
    """One line of a legend: a name, its colours on a light and on a dark ground, its dashes."""

    name: str
    light: str
    dark: str
    dashes: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Charts that share a legend, and the choice of what they are drawn against.

    Attributes:
        id: unique on the page.
        caption: what they show together.
        charts: the drawings.
        rerun: the commands that make them again.
        legend: the optimizers, each of which can be left out; empty where a chart has its own legend.
        axes: what they can be drawn against, the first one at first.
        notes: what a reader needs to know about them.
    """

    kind: ClassVar = "figure"
    id: str
    caption: str
    charts: Sequence[Chart]
    rerun: Sequence[str]
    legend: Sequence[Key] = ()
    axes: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image inside the page, with a text that says what is on it."""

    kind: ClassVar = "picture"
    caption: str
    source: str
    alternative: str
    width: int
    height: int
    rerun: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A sentence, for the most part about what is missing."""

    kind: ClassVar = "line"
    text: str
    rerun: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Links:
    """Files next to the page, by their names and addresses."""

    kind: ClassVar = "links"
    text: str
    files: Sequence[tuple[str, str]]


Block = Table | Figure | Picture | Line | Links


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what is under it."""

    id: str
    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence["Section"] = field(default_factory=tuple)


def make_table(frame: pd.DataFrame, caption: str, rerun: Sequence[str], **more: Any) -> Table:
    """Every row and column of a CSV file.

    Args:
        frame: as pandas read it.
        caption: what it shows.
        rerun: the commands that make it again.
        **more: further fields of `Table`.

    Returns:
        The table.
    """
    rows = [[format_cell(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    header = [str(name).replace("_", " ") for name in frame.columns]
    return Table(caption=caption, header=header, rows=rows, rerun=rerun, **more)
