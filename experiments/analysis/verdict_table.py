"""The verdicts as a table, for a terminal or in Markdown."""

from io import StringIO
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.analysis.verdicts import headlines, tally

Format = Literal["terminal", "markdown"]
WIDTH = 140
_SHOWN = ("place", "claim", "paper", "ours", "verdict", "why")


def render(frame: pd.DataFrame, format: Format = "terminal", *, short: bool = False) -> str:
    """The table that `verdicts.judge` made, and how often each verdict was given to all claims.

    Args:
        frame: a row a claim.
        format: where it is to stand.
        short: only the claims that the paper is read for.

    Raises:
        ValueError: for another format.
    """
    rows = _cells(headlines(frame) if short else frame)
    match format:
        case "terminal":
            return _terminal(rows, summary(frame))
        case "markdown":
            return _markdown(rows, summary(frame))
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


def _terminal(rows: list[list[str]], last: str) -> str:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in _SHOWN:
        table.add_column(name, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    console = Console(file=StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(table)
    console.print(last)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _markdown(rows: list[list[str]], last: str) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in cells] for cells in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(_SHOWN), ["---"] * len(_SHOWN), *escaped)]
    return "\n".join([*lines, "", last])
