"""``verdicts.csv``: each claim of the paper compared with what was measured, counted and in a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd

from experiments.analysis.report.results_folder import ResultsFolder
from experiments.records.claim_checks import VERDICT_COLUMNS as COLUMNS
from experiments.records.claim_checks import Outcome

FILE = "verdicts.csv"
WORDS: tuple[str, ...] = get_args(Outcome)
MEANINGS = {
    "reproduced": "measured here, and it agrees",
    "not reproduced": "measured here, and it does not agree",
    "inconclusive": "measured here, and the evidence does not decide",
    "not run": "not measured here",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row of the file; `source` says on what it was measured, `records` which files hold it."""

    id: str
    place: str
    claim: str
    paper: str
    ours: str
    source: str
    verdict: str
    why: str
    optimizers: str
    records: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many claims have a verdict, and what it means."""

    word: str
    count: int
    meaning: str


def read(results: ResultsFolder) -> list[Verdict]:
    """The claims in the order of the file; a verdict that is none of the four is named.

    Args:
        results: the results folder.

    Returns:
        The claims.
    """
    table = results.csv(FILE, columns=COLUMNS)
    if table is None:
        return []
    found = [_verdict(row) for _, row in table.iterrows()]
    for each in found:
        if each.verdict not in WORDS:
            results.warn(f"{FILE}: {each.id}: {each.verdict!r} is no verdict; left out")
    return [each for each in found if each.verdict in WORDS]


def tally(verdicts: Sequence[Verdict]) -> list[Tally]:
    """The four verdicts with their counts.

    Args:
        verdicts: of all claims.

    Returns:
        In the order of the four words.
    """
    said = [each.verdict for each in verdicts]
    return [Tally(word=word, count=said.count(word), meaning=MEANINGS[word]) for word in WORDS]


def _verdict(row: pd.Series) -> Verdict:
    cells = {name: "" if pd.isna(row[name]) else str(row[name]) for name in COLUMNS}
    seeds = (
        "" if pd.isna(row["seeds"]) else f"{row['seeds']:g}" if isinstance(row["seeds"], float) else str(row["seeds"])
    )
    counted = f"{seeds} {'seed' if seeds == '1' else 'seeds'}" if seeds else ""
    source = ", ".join(filter(None, (cells["scale"], cells["dataset"], counted)))
    names = ("id", "place", "claim", "paper", "ours", "verdict", "why", "optimizers")
    records = tuple(cells["records"].split())
    return Verdict(source=source, records=records, **{name: cells[name] for name in names})
