"""An estimate on paper: a table, its assumptions, and the same as CSV."""

import csv
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.estimate.estimating import Estimate
from experiments.estimate.prediction import Prediction
from experiments.table_formats import Format, render_table

WIDTH = 130
COLUMNS = (
    *("optimizer", "steps/epoch", "s/step plain", "s/step refresh", "𝒯", "s/epoch", "epochs", "hours"),
    *("memory MiB", "kept MiB"),
)


def show(found: Estimate, format: Format = "terminal") -> None:
    """Print the table and the assumptions.

    Args:
        found: what is printed.
        format: how; CSV has every figure, as `write` writes it, and no assumptions.
    """
    at = [] if found.rate is None else [f"hours at {found.rate / 1e12:.3g} TFLOP/s"]
    title = f"{found.task}, scale {found.scale}, on {found.device}"
    columns = ["GPU hours" if found.on_gpu and name == "hours" else name for name in COLUMNS]
    rows = [_cells(row, found.rate) for row in found.predictions]
    assumptions = ["Assumptions:", *(f"- {sentence}" for sentence in found.assumptions)]
    if format == "csv":
        print(_csv(found), end="")
        return
    if format != "terminal":
        print(render_table([*columns, *at], rows, format, title=title, notes=assumptions))
        return
    console = Console(highlight=False)
    console.width = max(WIDTH, console.width)  # a table in a file or a pipe is not cut
    table = Table(title=title, title_justify="left")
    for index, name in enumerate((*columns, *at)):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in assumptions:
        console.print(line, markup=False, soft_wrap=True)


def write(found: Estimate, path: Path) -> None:
    """A row an optimizer.

    Args:
        found: what is written.
        path: the CSV file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_csv(found), encoding="utf-8", newline="")


def _csv(found: Estimate) -> str:
    text = StringIO()
    writer = csv.DictWriter(text, [*_row(found, found.predictions[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(found, row) for row in found.predictions)
    return text.getvalue()


def _cells(row: Prediction, rate: float | None) -> list[str]:
    shape = row.shape
    every = "–" if shape.update_every is None else str(shape.update_every)
    refresh = "–" if shape.update_every is None else _short(row.refresh_s)
    cells = [row.optimizer, f"{shape.steps:,}", _short(row.plain_s), refresh, every, _short(row.epoch_s)]
    cells += [str(shape.epochs), _short(row.hours)]
    cells += ["?" if row.memory_mib is None else f"{row.memory_mib:,.0f}", f"{row.kept_mib:,.0f}"]
    return [*cells, *([] if rate is None else [_short(row.hours_at(rate) or 0.0)])]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(found: Estimate, row: Prediction) -> dict[str, object]:
    return {
        "task": found.task,
        "scale": found.scale,
        "device": found.device,
        "optimizer": row.optimizer,
        "steps_per_epoch": row.shape.steps,
        "plain_step_s": row.plain_s,
        "renewing_step_s": row.refresh_s,
        "update_every": row.shape.update_every,
        "time_per_epoch_s": row.epoch_s,
        "epochs": row.shape.epochs,
        "hours": row.hours,
        "peak_memory_mb": row.memory_mib,
        "kept_memory_mb": row.kept_mib,
        "operations_per_epoch": row.epoch_operations,
    }
