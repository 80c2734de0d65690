"""``verdicts.csv``: each claim of the paper compared with what was recorded here, with a verdict and a reason."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import singledispatchmethod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.analysis.claims import (
    Arithmetic,
    Claim,
    Comparison,
    Cost,
    CurveBelow,
    Figure,
    Formula,
    Theory,
    load_claims,
)
from experiments.analysis.comparable_runs import Comparable, load_comparable
from experiments.analysis.comparison import write_csv
from experiments.analysis.pairs import MIN_SEEDS, SECONDS, Pair, collect_values, compare_medians, number, too_few
from experiments.errors import UserError
from experiments.records.claim_checks import VERDICT_COLUMNS as COLUMNS
from experiments.records.claim_checks import Outcome as Word
from experiments.records.run_record import Run

WORDS: tuple[Word, ...] = ("reproduced", "not reproduced", "inconclusive", "not run")
SCALES = ("paper", "small-wide", "small", "tiny")
"""From the one that says most: at ``small-wide`` every optimizer was searched more widely than at ``small``."""
SHARED = frozenset({"small-wide"})
"""Those whose runs shared their processors with other programs, so that their seconds are no evidence."""
PAPER_DATA = {"resnet50-imagenet": "ImageNet-1k", "dlrm-criteo": "Criteo Kaggle"}
"""The names of the paper's data, up to a semicolon, where a task at scale ``paper`` takes what the user puts there."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is found for a claim: ours, where it comes from, the verdict and the reason.

    `optimizers` are joined by ", ", `records` by a space: files under the results folder.
    """

    verdict: Word
    why: str
    ours: str = ""
    scale: str = ""
    dataset: str = ""
    seeds: int | None = None
    optimizers: str = ""
    records: str = ""


def judge(results_dir: Path) -> pd.DataFrame:
    """Write ``verdicts.csv`` into the results: what `judge_claims` says.

    Args:
        results_dir: where the records are; ``verdicts.csv`` is written into it.

    Returns:
        A row a claim.

    Raises:
        UserError: ``paper.toml`` does not fit.
    """
    frame = judge_claims(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    write_csv(frame, results_dir / "verdicts.csv")
    return frame


def judge_claims(results_dir: Path) -> pd.DataFrame:
    """Judge every claim of ``paper.toml`` by what is recorded.

    A sentence about two optimizers is judged at the first of `SCALES` at which both have `MIN_SEEDS` seeds in common,
    or else where they have most; one about seconds not at those that are `SHARED`. It is ``reproduced`` if the paired
    difference over seeds goes the paper's way with p < `LEVEL`, its interval free of 0, and no smaller than the paper's
    ratio where it gives one; ``not reproduced`` if the difference is significant and goes the other way or falls short
    of that ratio, or if its interval shuts that ratio out; else ``inconclusive``. A p value here belongs to one claim
    and is not corrected for their number.

    Args:
        results_dir: where the records are.

    Returns:
        A row a claim, with `COLUMNS`.

    Raises:
        UserError: ``paper.toml`` does not fit.
    """
    evidence = Evidence(results_dir)
    frame = pd.DataFrame([_row(claim, evidence.judge(claim)) for claim in load_claims()], columns=list(COLUMNS))
    return frame.assign(seeds=frame["seeds"].astype("Int64"))


def headlines(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the claims that the paper is read for.

    Args:
        frame: a row a claim.

    Returns:
        Some of the rows.
    """
    chosen = [claim.id for claim in load_claims() if claim.headline]
    return frame[frame["id"].isin(chosen)]


def tally(frame: pd.DataFrame) -> dict[str, int]:
    """How many claims have each verdict, in the order of `WORDS`.

    Args:
        frame: a row a claim.

    Returns:
        Counts by verdict.
    """
    return {word: int((frame["verdict"] == word).sum()) for word in WORDS}


def _row(claim: Claim, finding: Finding) -> dict[str, Any]:
    said = {"id": claim.id, "place": claim.place, "claim": claim.claim, "paper": claim.paper}
    why = "; ".join(part for part in (finding.why, claim.note) if part)
    return said | asdict(finding) | {"why": why}


class Evidence:
    """The records of a results folder, asked claim by claim."""

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir
        self._known: dict[tuple[str, str], Comparable | None] = {}

    def judge(self, claim: Claim) -> Finding:
        """The verdict on one claim."""
        if claim.check is None:
            return Finding(verdict="not run", why="")
        try:
            return self._judge(claim.check)
        except UserError as error:  # a damaged table is named, and the other claims go on
            return Finding(verdict="not run", why=str(error))

    @singledispatchmethod
    def _judge(self, check: Any) -> Finding:
        raise TypeError(f"check = {check!r}: there is no way to judge it")

    @_judge.register
    def _(self, check: Figure) -> Finding:
        comparable = self.comparable(check.task, check.scale)
        runs = select_optimizer(comparable, check.optimizer)
        if comparable is None or not runs:
            return Finding(verdict="not run", why="needs the paper's data, model and hardware")
        if check.eval_loss is None:
            values = list(collect_values(comparable, runs, check.measure).values())
        else:
            values = [reaches(run, check.eval_loss, check.measure) for run in runs]
        median = float(np.median(values))
        source = self._source(runs, scale=check.scale)
        ours = f"{number(median)} (median of {len(values)})"
        if check.bound != "about":
            holds = median <= check.value if check.bound == "at most" else median >= check.value
            word: Word = "reproduced" if holds else "not reproduced"
            return Finding(verdict=word, why=f"the paper says {check.bound} {number(check.value)}", ours=ours, **source)
        off = abs(median - check.value) / abs(check.value) if math.isfinite(median) else math.inf
        if off <= check.within:
            return Finding(verdict="reproduced", why=f"within {check.within:.0%} of the paper's", ours=ours, **source)
        return Finding(verdict="not reproduced", why=f"off by {off:.0%}", ours=ours, **source)

    @_judge.register
    def _(self, check: Comparison) -> Finding:
        pair = self.pair(check)
        if pair is None:
            return _never_both(check)
        ours, theirs, until = pair.values(check.measure)
        compared = ours.keys() & theirs.keys()
        source = self._source(pair.select_runs(compared), scale=pair.scale, seeds=len(compared))
        if not ours:
            why = "no seed was trained with both on the same device, and seconds of two are no comparison"
            return Finding(verdict="inconclusive", why=why, **source)
        words, verdict, why = compare_medians(check, ours, theirs, until)
        return Finding(verdict=verdict, why=why, ours=words, **source)

    @_judge.register
    def _(self, check: CurveBelow) -> Finding:
        pair = self.pair(check)
        if pair is None:
            return _never_both(check)
        gaps = pair.gaps(check.value)  # (seeds, epochs)
        below = int((gaps < 0).sum())
        source = self._source(pair.select_runs(pair.seeds), scale=pair.scale, seeds=len(gaps))
        ours = f"below in {below} of {gaps.size} pairs of epoch and seed"
        if len(gaps) < MIN_SEEDS:
            return Finding(verdict="inconclusive", why=too_few(len(gaps)), ours=ours, **source)
        above = [epoch for epoch, gap in enumerate(np.median(gaps, axis=0), 1) if gap > 0]
        if above:
            named = ", ".join(map(str, above))
            return Finding(verdict="not reproduced", why=f"median above after epoch {named}", ours=ours, **source)
        if below == gaps.size:
            return Finding(verdict="reproduced", why="below after every epoch in every seed", ours=ours, **source)
        return Finding(
            verdict="inconclusive", why="below in the median after every epoch, not in every seed", ours=ours, **source
        )

    @_judge.register
    def _(self, check: Cost) -> Finding:
        path = self.results_dir / "bench" / check.file
        table = read_table(path)
        wants = ("device", check.column)
        row, over = select_row(table, check.row, wants), select_row(table, check.over, wants) if check.over else None
        if row is None or (check.over and over is None):
            return Finding(verdict="not run", why=f"bench/{check.file} has no such row")
        try:
            value = float(row[check.column]) / (1.0 if over is None else float(over[check.column]))
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not math.isfinite(value):
            return Finding(verdict="not run", why=f"bench/{check.file} has no number there")
        found = row.get("model", "")
        compared = [str(each["optimizer"]) for each in (row, over) if each is not None and "optimizer" in each]
        source = {
            "scale": "bench",
            "dataset": f"{found}, {row['device']}" if found else str(row["device"]),
            "optimizers": ", ".join(dict.fromkeys(compared)),
            "records": f"bench/{check.file}",
        }
        verdict: Word = "reproduced" if value <= check.at_most else "not reproduced"
        why = f"measured by bench/{check.file}; at most {number(check.at_most)} agrees with the claim"
        return Finding(verdict=verdict, why=why, ours=f"{number(value)}×", **source)

    @_judge.register
    def _(self, check: Theory) -> Finding:
        table = read_table(self.results_dir / "theory" / check.part / "verdicts.csv")
        row = select_row(table, {"claim": check.row}, ("ours", "verdict", "why", "scale", "dataset", "seeds"))
        if row is None:
            return Finding(verdict="not run", why=f"theory/{check.part} has no row {check.row!r}")
        return Finding(
            verdict=row["verdict"],
            why=row["why"],
            ours=str(row["ours"]),
            scale=row["scale"],
            dataset=row["dataset"],
            seeds=int(row["seeds"]),
            records=f"theory/{check.part}/verdicts.csv",
        )

    @_judge.register
    def _(self, check: Formula) -> Finding:
        wants = ("measure", "printed", "corrected", "printed_is_wrong", "corrected_is_right")
        row = select_row(read_table(self.results_dir / "theory" / "errata.csv"), {"place": check.place}, wants)
        if row is None:
            return Finding(verdict="not run", why=f"theory/errata.csv has no row {check.place!r}")
        ours = f"{row['measure']}: {number(row['printed'])} as printed, {number(row['corrected'])} corrected"
        source = {"scale": "theory", "dataset": "synthetic", "seeds": 1, "records": "theory/errata.csv"}
        if row["printed_is_wrong"]:
            right = "the corrected form is right" if row["corrected_is_right"] else "nor is the corrected form right"
            return Finding(verdict="not reproduced", why=f"wrong as printed; {right}", ours=ours, **source)
        return Finding(verdict="reproduced", why="right as printed", ours=ours, **source)

    @_judge.register
    def _(self, check: Arithmetic) -> Finding:
        value = math.prod(check.times) / math.prod(check.over)
        shown = " × ".join(map(number, check.times)) + "".join(f" / {number(each)}" for each in check.over)
        fits = abs(value - check.value) <= check.within * abs(check.value)
        return Finding(
            verdict="reproduced" if fits else "not reproduced",
            why="the paper's own figures fit together" if fits else "the paper's own figures do not fit together",
            ours=f"{shown} = {number(value)}",
            scale="arithmetic",
            dataset="the paper's figures",
            records="paper.toml",
        )

    def comparable(self, task: str, scale: str) -> Comparable | None:
        """The runs of a task at a scale, at the paper's only those of its data; ``None`` if there are none."""
        if (task, scale) not in self._known:
            self._known[task, scale] = self._load(task, scale)
        return self._known[task, scale]

    def _load(self, task: str, scale: str) -> Comparable | None:
        try:
            found = load_comparable(self.results_dir, task, scale)
        except UserError:
            return None
        if scale != "paper" or task not in PAPER_DATA:
            return found
        runs = tuple(run for run in found.runs if run.manifest.dataset.name.partition(";")[0] == PAPER_DATA[task])
        return replace(found, runs=runs) if runs else None

    def _source(self, runs: Sequence[Run], *, scale: str, seeds: int | None = None) -> dict[str, Any]:
        """Where a figure comes from; `runs` are the optimizer's first, then those that it is compared with."""
        first = runs[0] if runs else None
        return {
            "scale": scale,
            "dataset": first.manifest.dataset.name if first else "",
            "seeds": len(runs) if seeds is None else seeds,
            "optimizers": ", ".join(dict.fromkeys(run.manifest.optimizer for run in runs)),
            "records": " ".join(run.path.relative_to(self.results_dir).as_posix() for run in runs),
        }

    def pair(self, check: Comparison | CurveBelow) -> Pair | None:
        """The runs of a claim's two optimizers where they can be compared best.

        Args:
            check: of the claim.

        Returns:
            Their runs at one scale; ``None`` if they never ran on the same data.
        """
        left_out = SHARED if isinstance(check, Comparison) and check.measure == SECONDS else frozenset()
        pairs = [
            Pair(
                comparable=found,
                scale=scale,
                ours=select_optimizer(found, check.optimizer),
                theirs=select_optimizer(found, check.against),
            )
            for scale in SCALES
            if scale not in left_out and (found := self.comparable(check.task, scale)) is not None
        ]
        enough = next((pair for pair in pairs if len(pair.seeds) >= MIN_SEEDS), None)
        best = enough or max(pairs, key=lambda pair: len(pair.seeds), default=None)
        return best if best and best.seeds else None


def select_optimizer(comparable: Comparable | None, optimizer: str) -> list[Run]:
    """The runs of one optimizer.

    Args:
        comparable: the runs of a task at a scale, ``None`` if there are none.
        optimizer: its name in the recipe.

    Returns:
        By seed.
    """
    return [run for run in comparable.runs if run.manifest.optimizer == optimizer] if comparable else []


def reaches(run: Run, level: float, measure: str) -> float:
    """When a run's evaluated loss is `level` at most for the first time.

    Args:
        run: the run.
        level: of the loss.
        measure: ``"epochs_to_target"`` or ``"seconds_to_target"``.

    Returns:
        The epoch, or the seconds by then; infinite if there is none.
    """
    hit = next((epoch for epoch in run.epochs if epoch.eval_loss is not None and epoch.eval_loss <= level), None)
    if hit is None:
        return math.inf
    return hit.epoch if measure == "epochs_to_target" else hit.seconds


def _never_both(check: Comparison | CurveBelow) -> Finding:
    return Finding(verdict="not run", why=f"{check.optimizer} and {check.against} were not both run on {check.task}")


def read_table(path: Path) -> pd.DataFrame:
    """A table, an empty one if there is no such file.

    Args:
        path: the file.

    Returns:
        The table.

    Raises:
        UserError: it is there and cannot be read.
    """
    try:
        return pd.read_csv(path)
    except FileNotFoundError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def select_row(table: pd.DataFrame, where: Mapping[str, str], wants: Sequence[str]) -> "pd.Series[Any] | None":
    """The one row whose columns have these values.

    Args:
        table: the table.
        where: values by column.
        wants: columns that it must have too.

    Returns:
        The row; ``None`` for no row, several, or a table that lacks a column.
    """
    if not {*where, *wants} <= set(table.columns):
        return None
    alike = [table[column].astype(str) == value for column, value in where.items()]
    rows = table[np.logical_and.reduce(alike)]
    return rows.iloc[0] if len(rows) == 1 else None
