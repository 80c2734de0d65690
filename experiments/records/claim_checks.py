"""What a check of the theory leaves behind: errata, verdicts, and the tables they are written to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

Outcome = Literal["reproduced", "not reproduced", "inconclusive", "not run"]

VERDICT_COLUMNS = (
    "id",
    "place",
    "claim",
    "paper",
    "ours",
    "scale",
    "dataset",
    "seeds",
    "verdict",
    "why",
    "optimizers",
    "records",
)
"""Those of ``verdicts.csv``."""


@dataclass(frozen=True, kw_only=True)
class Erratum:
    """One point of the paper in its printed and in its corrected form, measured the same way.

    Attributes:
        place: equation, theorem or section.
        measure: what `printed` and `corrected` are, 0 being right.
        printed: how far the printed form is from an independent computation.
        corrected: the same for the corrected form.
        margin: the printed form counts as wrong beyond this.
        tolerance: the corrected form counts as right up to this.
    """

    place: str
    measure: str
    printed: float
    corrected: float
    margin: float
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < self.margin:
            raise ValueError(f"0 ≤ tolerance < margin is needed, got {self.tolerance=}, {self.margin=}")

    @property
    def printed_is_wrong(self) -> bool:
        """Whether the printed form misses by more than the margin (a NaN does not count)."""
        return self.printed > self.margin

    @property
    def corrected_is_right(self) -> bool:
        """Whether the corrected form is within the tolerance (a NaN is not)."""
        return self.corrected <= self.tolerance

    def row(self) -> dict[str, Any]:
        """The erratum as a row of a table."""
        return asdict(self) | {
            "printed_is_wrong": self.printed_is_wrong,
            "corrected_is_right": self.corrected_is_right,
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim of the paper compared with what was measured, in the columns of the report's verdict table."""

    claim: str
    paper: str
    ours: str
    verdict: Outcome
    why: str
    scale: str = "theory"
    dataset: str = "synthetic"
    seeds: int = 1


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV, numbers with nine digits (fewer repeat where the number of threads differs).

    Args:
        path: the file; its folder is made.
        rows: with the same keys each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.9g")


def write_verdicts(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write `verdicts.csv` of one part of the theory.

    Args:
        path: the file; its folder is made.
        verdicts: a row each.
    """
    write_rows(path, [asdict(verdict) for verdict in verdicts])
