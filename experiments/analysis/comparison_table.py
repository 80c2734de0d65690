"""The comparison as a table: for a terminal of 100 columns, in Markdown, in LaTeX, or as CSV."""

import math
from io import StringIO
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.analysis.comparable_runs import name_data
from experiments.analysis.comparison import DEVICES
from experiments.records.run_record import REFERENCE_BEST
from experiments.table_formats import Format, render_table

WIDTH = 100
MISSED = "missed"


def render(frame: pd.DataFrame, format: Format = "terminal") -> str:
    """The table that `comparison.compare` made, ready to print.

    Args:
        frame: rows of one task at one scale.
        format: where it is to stand.

    Returns:
        The table as text, with what a reader must know below it.

    Raises:
        ValueError: for another format.
    """
    if format == "terminal":
        return _terminal(frame)
    if format == "csv":  # every column, as in comparison.csv
        return frame.to_csv(index=False, float_format="%.6g").rstrip("\n")
    return render_table(*cells(frame), format, title=title(frame), notes=notes(frame))


def title(frame: pd.DataFrame) -> str:
    """The task, the data really used, the target and the length.

    Args:
        frame: a comparison, a row an optimizer.

    Returns:
        One line.
    """
    first = frame.iloc[0]
    rule = f" ({first.reference}'s best)" if first.target_rule == REFERENCE_BEST else ""
    target = "no target" if math.isnan(first.target) else f"target {first.metric} {first.target:.4g}{rule}"
    return f"{first.task}, scale {first.scale}: {name_data(first.task, first.dataset)}; {target}, {first.epochs} epochs"


def notes(frame: pd.DataFrame) -> list[str]:
    """What a reader needs to know to read the table right.

    Args:
        frame: a comparison, a row an optimizer.

    Returns:
        A sentence or more each.
    """
    first = frame.iloc[0]
    coverage = frame.interval_coverage.min()
    worth = f", which cover the true median with {coverage:.0%} or more" if coverage > 0 else ""
    tests = {row.optimizer: row.p_test or row.p_reason for row in frame.iloc[1:].itertuples()}
    lines = [f"Medians over seeds; in brackets order statistics{worth}; ± is over seeds. {_devices(frame)}"]
    if not math.isnan(error := frame.metric_standard_error.iloc[0]):
        of = f"one run's {first.metric} a standard error of {number(error, digits=2)}"
        lines.append(f"The size of the test set gives {of} besides; all runs have the same test set.")
    if (frame.reached < frame.seeds).any():
        lines.append(f"A run that never reaches the target counts as later than all others ({MISSED}, ∞).")
    if tests:
        alike = len(set(tests.values())) == 1
        named = next(iter(tests.values())) if alike else "; ".join(f"{k}: {v}" for k, v in tests.items())
        lines.append(
            f"p: epochs to target against {first.reference}, paired over seeds ({named}), "
            "corrected after Holm for the number of optimizers."
        )
    return lines + [f"Left out: {warning}" for warning in frame.attrs.get("warnings", [])]


def _devices(frame: pd.DataFrame) -> str:
    """What the runs were made on, and for whom it was not what the reference's were."""
    named = frame.groupby("device", sort=False)["optimizer"].agg(", ".join)
    if len(named) == 1 and DEVICES not in named.index[0]:
        return f"Device: {named.index[0]}."
    listed = "; ".join(f"{device.replace(DEVICES, ' and ')} ({optimizers})" for device, optimizers in named.items())
    return f"Devices: {listed}. Seconds are tested only between runs on the same device."


def cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The header, and the rows in words: an optimizer each.

    Args:
        frame: a comparison, a row an optimizer.

    Returns:
        Header and rows.
    """
    first = frame.iloc[0]
    header = [
        "optimizer",
        "reached",
        "epochs to target",
        "s to target",
        "s/epoch",
        f"best {first.metric}",
        "MiB",
        f"epochs vs {first.reference}",
        "p Holm",
    ]
    return header, [_row(row) for row in frame.itertuples()]


def _row(row: Any) -> list[str]:
    return [
        row.optimizer,
        f"{row.reached}/{row.seeds}",
        _with_interval(row.epochs_to_target, row.epochs_to_target_low, row.epochs_to_target_high),
        number(row.wall_time_to_target_s),
        number(row.time_per_epoch_s),
        _with_spread(row.best_metric, row.best_metric_std),
        number(row.peak_memory_mb),
        "" if row.optimizer == row.reference else number(row.epochs_vs_reference, suffix="×"),
        "" if row.optimizer == row.reference else number(row.p_value_holm, digits=2),
    ]


def number(value: float, *, suffix: str = "", digits: int = 3) -> str:
    """Significant digits, thousands grouped; what there is not is a dash, what is infinite was missed.

    Args:
        value: finite, infinite or NaN.
        suffix: what follows the digits.
        digits: how many are significant.

    Returns:
        A cell.
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return MISSED
    decimals = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}{suffix}" if decimals <= 5 else f"{value:.1e}{suffix}"


def _with_interval(median: float, low: float, high: float) -> str:
    if math.isnan(median):
        return "–"
    if math.isinf(low):
        return MISSED
    shown = MISSED if math.isinf(median) else f"{median:g}"
    return f"{shown} [{low:g}, {'∞' if math.isinf(high) else f'{high:g}'}]"


def _with_spread(value: float, std: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if math.isnan(std) else f"{value:.4f} ± {std:.4f}"


def _terminal(frame: pd.DataFrame) -> str:
    header, rows = cells(frame)
    # Two spaces between columns and no wrapping within a cell: that is what fits into 100 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        heading = name.replace(" to ", " to\n").replace("best ", "best\n").replace(" vs ", "\nvs ")
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace(" ± ", "±") for cell in row))
    # A string is asked for, so no colours: it may be piped or kept.
    console = Console(file=StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(title(frame))
    console.print(table)
    for note in notes(frame):
        console.print(note)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
