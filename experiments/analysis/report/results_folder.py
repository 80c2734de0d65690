"""The results folder as the page reads it: what cannot be read is named, and the rest goes on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.comparable_runs import Comparable, load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.comparison_table import number
from experiments.errors import UserError

# In the order of the page; others, say ``paper-2048``, follow by name.
SCALES = ("small", "tiny", "paper")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a task at a scale.

    Attributes:
        comparable: the runs.
        frame: their comparison.
    """

    comparable: Comparable
    frame: pd.DataFrame


class ResultsFolder:
    """Reads under one folder and keeps, in ``warnings``, what could not be read; no absolute path is in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.warnings: list[str] = []

    def warn(self, text: object) -> None:
        """Keep a warning, once."""
        said = str(text).replace(f"{self.root}/", "")
        if said not in self.warnings:
            self.warnings.append(said)

    def study(self, task: str, scale: str) -> Study | None:
        """The runs of a task at a scale, ``None`` if none is left."""
        if not any((self.root / task / scale / "runs").glob("*.jsonl")):
            return None
        try:
            comparable = load_comparable(self.root, task, scale)
            frame = summarise(comparable)
        except UserError as error:
            self.warn(error)
            return None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A record in the right form can still hold what no statistics can be made of.
            self.warn(f"{task}/{scale}/runs: cannot be compared: {error}")
            return None
        for warning in comparable.warnings:
            self.warn(warning)
        return Study(comparable=comparable, frame=frame)

    def csv(self, place: str, columns: Iterable[str] = ()) -> pd.DataFrame | None:
        """A table by its path under the root; ``None`` if it is not there, is empty, or lacks one of `columns`."""
        path = self.root / place
        if not path.exists():
            return None
        try:
            table = pd.read_csv(path)
        except (OSError, ValueError) as error:
            self.warn(f"{place}: cannot be read: {error}")
            return None
        if missing := [name for name in columns if name not in table.columns]:
            self.warn(f"{place}: has no column {', '.join(missing)}; left out")
            return None
        return table if len(table) else None

    def scales(self, task: str) -> list[str]:
        """The scales at which anything of a task is recorded."""
        found = {path.parent.name for path in (self.root / task).glob("*/*") if path.name == "runs"}
        found |= {path.parent.name for path in (self.root / task).glob("*/*.csv")}
        return [*(name for name in SCALES if name in found), *sorted(found.difference(SCALES))]

    def foreign_tasks(self, known: Iterable[str]) -> list[str]:
        """Folders with run records that are of no task of this repository."""
        return sorted({path.parts[-4] for path in self.root.glob("*/*/runs/*.jsonl")}.difference(known))


def format_cell(value: Any) -> str:
    """A cell of a CSV file: numbers to three digits, nothing where nothing was recorded.

    Args:
        value: as pandas read it.

    Returns:
        Its text.
    """
    if isinstance(value, float):
        return "" if math.isnan(value) else number(value)
    return str(value)
