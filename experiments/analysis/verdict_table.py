"""The verdicts as a table, for a terminal or in Markdown."""

from io import StringIO
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.analysis.verdicts import tally

Format = Literal["terminal", "markdown"]
WIDTH = 140
_SHOWN = ("place", "claim", "paper", "ours", "verdict", "why")


def render(frame: pd.DataFrame, format: Format = "terminal") -> str:
    """The table that `verdicts.judge` made, with how often each verdict was given.

    Raises:
        ValueError: for another format.
    """
    match format:
        case "terminal":
            return _terminal(frame)
        case "markdown":
            return _markdown(frame)
    raise ValueError(f"format = {format!r}: must be one of terminal, markdown")


def summary(frame: pd.DataFrame) -> str:
    """How often each verdict was given, in one line."""
    counts = ", ".join(f"{count} {word}" for word, count in tally(frame).items())
    return f"{len(frame)} claims: {counts}"


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    """What is shown of each row; beside our figure, where it comes from."""
    rows = []
    for row in frame.fillna({"seeds": 0}).to_dict("records"):
        where = ", ".join(part for part in (row["scale"], row["dataset"]) if part)
        seeds = f", {row['seeds']} seeds" if row["seeds"] > 1 else ""
        ours = f"{row['ours']} [{where}{seeds}]" if row["ours"] else ""
        shown = row | {"ours": ours}
        rows.append([shown[name] for name in _SHOWN])
    return rows


def _terminal(frame: pd.DataFrame) -> str:
    table = Table(*_SHOWN, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for cells in _cells(frame):
        table.add_row(*cells)
    console = Console(file=StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(table)
    console.print(summary(frame))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _markdown(frame: pd.DataFrame) -> str:
    rows = [[cell.replace("|", r"\|") for cell in cells] for cells in _cells(frame)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(_SHOWN), ["---"] * len(_SHOWN), *rows)]
    return "\n".join([*lines, "", summary(frame)])
