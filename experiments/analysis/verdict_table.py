"""The verdicts as a table."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.analysis.verdicts import headlines, tally
from experiments.table_formats import Format, render_table

WIDTH = 140
_WHOLE = ("id", "place", "claim", "paper", "ours", "measured on", "verdict", "why")
_SHORT = ("id", "claim", "paper", "ours", "measured on", "verdict")


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
    if format == "csv":
        return render_table(names, rows, format)
    return render_table(names, rows, format, notes=[summary(frame)], width=WIDTH, figures=False)


def summary(frame: pd.DataFrame) -> str:
    """How often each verdict was given, in one line."""
    counts = ", ".join(f"{count} {word}" for word, count in tally(frame).items())
    return f"{len(frame)} claims: {counts}"


def _measured_on(row: Mapping[str, Any]) -> str:
    seeds = f"{row['seeds']} seeds" if row["seeds"] > 1 else ""
    return ", ".join(part for part in (row["scale"], row["dataset"], seeds) if part)
