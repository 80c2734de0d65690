"""One claim followed: what is read from the records, what is computed of it, and the verdict, a line a step."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import singledispatch
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.claims import Claim, Comparison, Cost, CurveBelow, Figure, Formula, Theory, load_claims
from experiments.analysis.pairs import LEVEL, MIN_SEEDS, Pair, collect_values, estimate_median, number
from experiments.analysis.statistics import paired_difference, paired_test
from experiments.analysis.verdicts import Evidence, Finding, reaches, read_table, select_optimizer, select_row
from experiments.errors import UserError
from experiments.records.run_record import Run


def follow(results_dir: Path, name: str) -> tuple[list[str], list[str]]:
    """Judge one claim again from the records.

    Args:
        results_dir: where the records are.
        name: the claim's ``id``.

    Returns:
        A line a step, and a line for each column in which ``verdicts.csv`` says otherwise.

    Raises:
        UserError: there is no such claim, or a table cannot be read.
    """
    claim = _find(name)
    evidence = Evidence(results_dir)
    finding = evidence.judge(claim)
    lines = [f"{claim.id}: {claim.claim}", f"paper: {claim.paper} ({claim.place})"]
    if claim.check is not None:
        lines.append(f"check: {type(claim.check).kind}, {_settings(claim.check)}")
        lines += _steps(claim.check, evidence)
    if finding.ours:
        lines.append(f"ours: {finding.ours}")
    why = "; ".join(part for part in (finding.why, claim.note) if part)
    lines.append(f"verdict: {finding.verdict}: {why}")
    return lines, _differences(results_dir, claim, finding)


def _find(name: str) -> Claim:
    claims = {claim.id: claim for claim in load_claims()}
    if name not in claims:
        near = difflib.get_close_matches(name, claims, n=3) or list(claims)[:3]
        raise UserError(f"claim = {name!r}: there is no such id in verdicts.csv; e.g. {', '.join(near)}")
    return claims[name]


def _settings(check: Any) -> str:
    given = {field.name: getattr(check, field.name) for field in fields(check)}
    return ", ".join(f"{key} = {value!r}" for key, value in given.items() if value not in (None, {}, ()))


def _differences(results_dir: Path, claim: Claim, finding: Finding) -> list[str]:
    """Where ``verdicts.csv`` says otherwise than `finding`."""
    row = select_row(read_table(results_dir / "verdicts.csv"), {"id": claim.id}, ())
    if row is None:
        return [f"verdicts.csv has no row {claim.id}"]
    found = {name: value for name, value in asdict(finding).items() if name != "why"}
    before = {name: _cell(row.get(name)) for name in found}
    now = {name: _cell(value) for name, value in found.items()}
    return [f"{name}: {before[name]!r} there, {now[name]!r} now" for name in found if before[name] != now[name]]


def _cell(value: object) -> str:
    """As text, the same for what was read from a CSV and what was written there."""
    if value is None or value == "" or pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


@singledispatch
def _steps(check: Any, evidence: Evidence) -> Iterator[str]:
    """What lies between the check and its outcome; nothing where the outcome says it all."""
    yield from ()


@_steps.register
def _(check: Figure, evidence: Evidence) -> Iterator[str]:
    comparable = evidence.comparable(check.task, check.scale)
    runs = select_optimizer(comparable, check.optimizer)
    if comparable is None or not runs:
        return
    yield from comparable.warnings
    if check.eval_loss is None:
        values = collect_values(comparable, runs, check.measure)
    else:
        values = {run.manifest.seed: reaches(run, check.eval_loss, check.measure) for run in runs}
    yield from _records(runs, {(run.manifest.optimizer, seed): values[seed] for run in runs for seed in values}, check)


@_steps.register
def _(check: Comparison, evidence: Evidence) -> Iterator[str]:
    pair = evidence.pair(check)
    if pair is None:
        return
    yield from _context(pair)
    ours, theirs, until = pair.values(check.measure)
    seeds = sorted(ours.keys() & theirs.keys())
    values = {(check.optimizer, seed): ours[seed] for seed in seeds} | {
        (check.against, seed): theirs[seed] for seed in seeds
    }
    yield from _records(pair.select_runs(seeds), values, check)
    if not seeds:
        return
    ours, theirs = ({seed: each[seed] for seed in seeds} for each in (ours, theirs))
    for name, each in ((check.optimizer, ours), (check.against, theirs)):
        yield f"median of {name} over {len(seeds)} seeds: {number(estimate_median(list(each.values()), until))}"
    gap, test = paired_difference(ours, theirs, until=until), paired_test(ours, theirs, until=until)
    by_seed = ", ".join(f"seed {seed} {number(min(ours[seed], until) - min(theirs[seed], until))}" for seed in seeds)
    missed = f", a run that missed counts as {number(until)}" if until < max(*ours.values(), *theirs.values()) else ""
    yield f"differences: {by_seed}{missed}"
    yield f"their mean: {number(gap.mean)}, 95 % bootstrap interval [{number(gap.low)}, {number(gap.high)}]"
    yield f"test: {test.name}, p = {test.p_value:.2g}" + (f" ({test.reason})" if test.reason else "")
    yield (
        f"reproduced if there are {MIN_SEEDS} seeds, p < {LEVEL:g}, the interval is free of 0, the difference is "
        f"{'negative' if check.better == 'less' else 'positive'}"
        + (
            f", and the ratio of the medians at {'most' if check.better == 'less' else 'least'} {check.ratio:.3g}"
            if check.ratio
            else ""
        )
    )


@_steps.register
def _(check: CurveBelow, evidence: Evidence) -> Iterator[str]:
    pair = evidence.pair(check)
    if pair is None:
        return
    yield from _context(pair)
    yield from _records(pair.select_runs(pair.seeds), {}, check)
    for seed, gaps in zip(pair.seeds, pair.gaps(check.value), strict=True):
        yield f"seed {seed}: {check.value} less {check.against}'s after each epoch: {', '.join(map(number, gaps))}"


@_steps.register
def _(check: Cost, evidence: Evidence) -> Iterator[str]:
    table = read_table(evidence.results_dir / "bench" / check.file)
    for where in filter(None, (check.row, check.over)):
        row = select_row(table, where, (check.column,))
        if row is not None:
            yield f"read bench/{check.file}: {_where(where)}: {check.column} = {row[check.column]}"


@_steps.register
def _(check: Theory, evidence: Evidence) -> Iterator[str]:
    yield f"read theory/{check.part}/verdicts.csv: claim = {check.row!r}; `make reproduce-theory` computes it"


@_steps.register
def _(check: Formula, evidence: Evidence) -> Iterator[str]:
    yield f"read theory/errata.csv: place = {check.place!r}; `make reproduce-theory` computes it"


def _where(where: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in where.items())


def _context(pair: Pair) -> Iterator[str]:
    yield f"scale: {pair.scale}, the largest at which both have {MIN_SEEDS} seeds in common, or else the most"
    yield from (f"left out: {warning}" for warning in pair.comparable.warnings)
    target, metric = pair.comparable.target, pair.comparable.runs[0].manifest.metric
    if target is not None:
        yield f"target: {metric.name} {'at least' if metric.higher_is_better else 'at most'} {target:.6g}"


def _records(runs: Sequence[Run], values: Mapping[tuple[str, int], float], check: Any) -> Iterator[str]:
    """Each file that is read, what it ran on, and its value."""
    for run in runs:
        manifest = run.manifest
        threads = f"{manifest.threads} {'thread' if manifest.threads == 1 else 'threads'}"
        where = f"{', '.join(run.devices)}, {threads}, commit {(manifest.git_sha or 'unknown')[:8]}"
        value = values.get((manifest.optimizer, manifest.seed))
        shown = "" if value is None else f": {check.measure} = {number(value)}"
        yield f"read {run.path} ({where}){shown}"
