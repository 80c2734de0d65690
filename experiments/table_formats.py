"""Any table as text: for a terminal, in Markdown, in LaTeX, or as CSV."""

import csv
from collections.abc import Sequence
from io import StringIO
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

Format = Literal["terminal", "markdown", "latex", "csv"]
FORMATS = ("terminal", "markdown", "latex", "csv")
_LATEX = (
    ("\\", r"\textbackslash "),
    ("_", r"\_"),
    ("%", r"\%"),
    ("&", r"\&"),
    ("#", r"\#"),
    ("±", r"$\pm$"),
    ("×", r"$\times$"),
    ("∞", r"$\infty$"),
    ("–", "--"),
)


def render_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    format: str,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    width: int = 140,
    figures: bool = True,
) -> str:
    """A table as text.

    Args:
        header: names of the columns; the first names the rows.
        rows: cells in words.
        format: one of `FORMATS`.
        title: what it shows; CSV has none.
        notes: what a reader must know; CSV has none.
        width: of a terminal.
        figures: whether the columns but the first hold figures, which Markdown sets flush right.

    Returns:
        The text.

    Raises:
        ValueError: for another format.
    """
    match format:
        case "terminal":
            return _terminal(header, rows, title, notes, width)
        case "markdown":
            # Each note is a paragraph of its own.
            head = [f"**{title}**", ""] if title else []
            tail = ["", "\n\n".join(notes)] if notes else []
            return "\n".join([*head, *_markdown(header, rows, figures=figures), *tail])
        case "latex":
            return "\n".join(_latex(header, rows, title, notes))
        case "csv":
            text = StringIO()
            csv.writer(text, lineterminator="\n").writerows([header, *rows])
            return text.getvalue().rstrip("\n")
    raise ValueError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")


def render_frame(frame: pd.DataFrame, format: str) -> str:
    """A frame of figures as text: to three digits, but all of them as CSV.

    Args:
        frame: a row a row.
        format: one of `FORMATS`.

    Returns:
        The text.
    """
    if format == "csv":
        return frame.to_csv(index=False, float_format="%.6g").rstrip("\n")
    rows = [
        [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in frame.itertuples(index=False, name=None)
    ]
    return render_table([str(name).replace("_", " ") for name in frame.columns], rows, format)


def _terminal(
    header: Sequence[str], rows: Sequence[Sequence[str]], title: str, notes: Sequence[str], width: int
) -> str:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A string is asked for, so no colours: it may be piped or kept.
    console = Console(file=StringIO(), width=width, highlight=False, markup=False)
    for part in (*([title] if title else []), table, *notes):
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool) -> list[str]:
    rule = ["---"] + ["---:" if figures else "---"] * (len(header) - 1)
    body = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *body)]


def _latex(header: Sequence[str], rows: Sequence[Sequence[str]], title: str, notes: Sequence[str]) -> list[str]:
    return [
        *([f"% {title}"] if title else []),
        *(f"% {note}" for note in notes),
        r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
        r"\toprule",
        " & ".join(map(_escape, header)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_escape, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _escape(text: str) -> str:
    for plain, latex in _LATEX:
        text = text.replace(plain, latex)
    return text
