"""The verdicts as a table, for a terminal or in Markdown."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.analysis.verdicts import headlines, tally

Format = Literal["terminal", "markdown"]
WIDTH = 140
_WHOLE = ("place", "claim", "paper", "ours", "measured on", "verdict", "why")
_SHORT = ("claim", "paper", "ours", "measured on", "verdict")


def render(frame: pd.DataFrame, format: Format = "terminal", *, short: bool = False) -> str:
    """The table that `verdicts.judge` made, and how often each verdict was given to all claims.

    Args:
        frame: a row a claim.
        format: where it is to stand.
        short: only the claims that the paper is read for.

    Returns:
        The table as text.

    Raises:
        ValueError: for another format.
    """
    names = _SHORT if short else _WHOLE
    claims = (headlines(frame) if short else frame).fillna({"seeds": 0}).to_dict("records")
    rows = [[(row | {"measured on": _measured_on(row)})[name] for name in names] for row in claims]
    match format:
        case "terminal":
            return _terminal(names, rows, summary(frame))
        case "markdown":
            return f"{markdown(names, rows)}\n\n{summary(frame)}"
    raise ValueError(f"format = {format!r}: must be one of terminal, markdown")


def summary(frame: pd.DataFrame) -> str:
    """How often each verdict was given, in one line."""
    counts = ", ".join(f"{count} {word}" for word, count in tally(frame).items())
    return f"{len(frame)} claims: {counts}"


def _measured_on(row: Mapping[str, Any]) -> str:
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else ""
    return ", ".join(part for part in (row["scale"], row["dataset"], seeds) if part)


def _terminal(names: Sequence[str], rows: list[list[str]], last: str) -> str:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    console = Console(file=StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(table)
    console.print(last)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        names: of the columns.
        rows: of cells.

    Returns:
        The lines of the table.
    """
    escaped = [[cell.replace("|", r"\|") for cell in cells] for cells in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *escaped))
