"""``result.json``: what a challenge came to, computed of its records and nothing else."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.comparable_runs import Comparable, load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.pairs import LEVEL, MIN_SEEDS
from experiments.analysis.profiles import entrants, ratios, score
from experiments.analysis.statistics import holm
from experiments.challenge.folder import Folder
from experiments.challenge.question import Question, make_question, read_file
from experiments.dataclass_io import SettingsError, read_settings, to_table
from experiments.errors import UserError
from experiments.plugins import hash_file
from experiments.records.run_record import Run, record_path

SCHEMA = 1
REFERENCE = "reference"
"""In the profile: each task's own reference."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One optimizer on one task; medians over seeds.

    Attributes:
        optimizer: its name.
        seeds: how many.
        reached: how many reached the target.
        diverged: how many diverged.
        epochs_to_target: ``None`` if fewer than half reach it, or there is no target.
        best_metric: median of each run's best.
        best_metric_std: over seeds.
        seconds_per_epoch: ``None`` where the baselines were not run here: seconds of two machines do not compare.
        seconds_to_target: the same.
    """

    optimizer: str
    seeds: int
    reached: int
    diverged: int
    epochs_to_target: float | None
    best_metric: float | None
    best_metric_std: float | None
    seconds_per_epoch: float | None
    seconds_to_target: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The challenger less a baseline by one measure, paired over seeds.

    Attributes:
        mean: of the differences.
        low: lower end of the 95 % bootstrap interval.
        high: upper end.
        p_value: ``None`` where there is nothing to test.
        p_holm: corrected over all comparisons of the challenge by this measure.
        test: its name, or why there is none.
        verdict: ``"wins"`` or ``"loses"`` with at least `MIN_SEEDS` seeds, corrected p under `LEVEL` and an interval
            free of 0; else ``"ahead"``, ``"behind"`` or ``"tied"``, which is not shown, or ``"no figure"``.
    """

    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None
    test: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Against:
    """The challenger compared with one baseline on one task.

    Attributes:
        task: the task's name.
        optimizer: the baseline.
        is_reference: whether it is the task's reference.
        seeds: that both have.
        epochs: to the target; fewer are better; ``None`` without a target.
        best_metric: which way is better is the task's.
    """

    task: str
    optimizer: str
    is_reference: bool
    seeds: int
    epochs: Difference | None
    best_metric: Difference


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task.

    Attributes:
        task: its name.
        dataset: the data really used.
        dataset_sha256: of them.
        metric: its name.
        unit: of the metric.
        higher_is_better: which way is better.
        target: the metric's value that counts as reached.
        epochs: of a run.
        seeds: that the challenger was run with.
        trials: of the search; 0 without one.
        settings: the challenger's, with what the search chose.
        same_machine: whether all runs were made here, so that seconds compare.
        optimizers: the challenger first.
        records: SHA-256 of each record by its path in the folder, trials too.
        warnings: a line for each record that was left out.
    """

    task: str
    dataset: str
    dataset_sha256: str
    metric: str
    unit: str
    higher_is_better: bool
    target: float | None
    epochs: int
    seeds: tuple[int, ...]
    trials: int
    settings: Mapping[str, Any]
    same_machine: bool
    optimizers: tuple[Measured, ...]
    records: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An optimizer over the tasks with a target.

    Attributes:
        optimizer: the challenger, ``"reference"`` for each task's own, ``"ngplus"``, or one that all tasks have.
        tasks: how many there are.
        tasks_reached: on how many it reached the target.
        score: of its performance profile in epochs, 0 to 1.
    """

    optimizer: str
    tasks: int
    tasks_reached: int
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A challenge.

    Attributes:
        schema: version of this format.
        name: the challenger's.
        optimizer: where it is.
        around: what it was put into.
        scale: of the recipes.
        versions: of Python and the packages, by name.
        tasks: what was done.
        against: every comparison.
        profile: over the tasks.
        problems: why a task could not be done, by its name.
    """

    schema: int
    name: str
    optimizer: str
    around: str | None
    scale: str
    versions: Mapping[str, str]
    tasks: tuple[TaskResult, ...]
    against: tuple[Against, ...]
    profile: tuple[Profile, ...]
    problems: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema = {self.schema}: this version reads schema {SCHEMA}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of one task, and their comparison with the reference and with the challenger."""

    made: Mapping[str, Any]
    comparable: Comparable
    frame: pd.DataFrame
    against: pd.DataFrame


def load_studies(
    folder: Folder, question: Question, made: Mapping[str, Any]
) -> tuple[dict[str, Study], dict[str, str]]:
    """Read the records of each task.

    Args:
        folder: of the challenge.
        question: what is asked.
        made: what each task came to.

    Returns:
        Studies by task, and why there is none by task.
    """
    studies, problems = {}, {}
    for task, each in made.items():
        try:
            comparable = load_comparable(folder.results, task, question.scale)
        except UserError as error:
            problems[task] = str(error)
            continue
        if question.name not in comparable.by_optimizer():
            problems[task] = "; ".join(["there is no finished run of the challenger", *comparable.warnings])
            continue
        studies[task] = Study(
            made=each,
            comparable=comparable,
            frame=summarise(comparable),
            against=summarise(comparable, against=question.name),
        )
    return studies, problems


def make_result(folder: Folder, problems: Mapping[str, str]) -> Result:
    """Compute the result of what is in the folder.

    Args:
        folder: of the challenge.
        problems: why a task could not be done, by its name.

    Returns:
        The result.
    """
    file = read_file(folder.file)
    question = make_question(file.asked, str(folder.file))
    studies, unread = load_studies(folder, question, file.made)
    return Result(
        schema=SCHEMA,
        name=question.name,
        optimizer=question.optimizer,
        around=question.around,
        scale=question.scale,
        versions=dict(sorted(file.versions.items())),
        tasks=tuple(_task(folder, question, task, study) for task, study in studies.items()),
        against=tuple(_compare(question, studies)),
        profile=tuple(_profile(question, studies)),
        problems=dict(problems) | unread,
    )


def write_result(path: Path, result: Result) -> None:
    """Write ``result.json`` as a whole.

    Args:
        path: the file.
        result: what it says.
    """
    partial = path.with_suffix(".partial")
    text = json.dumps(to_table(result), indent=1, ensure_ascii=False, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_result(path: Path) -> Result:
    """Read ``result.json``.

    Args:
        path: the file.

    Returns:
        What it says.

    Raises:
        UserError: it is not there, or does not follow the schema.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"{path}: not JSON") from None
    if not isinstance(table, dict):
        raise SettingsError(f"{path}: must be a table")
    return read_settings(Result, table, str(path))


def _task(folder: Folder, question: Question, task: str, study: Study) -> TaskResult:
    manifest = study.comparable.by_optimizer()[question.name][0].manifest
    same_machine = not study.made["recorded"]
    return TaskResult(
        task=task,
        dataset=manifest.dataset.name,
        dataset_sha256=manifest.dataset.sha256,
        metric=manifest.metric.name,
        unit=manifest.metric.unit,
        higher_is_better=manifest.metric.higher_is_better,
        target=study.comparable.target,
        epochs=manifest.epochs,
        seeds=tuple(run.manifest.seed for run in study.comparable.by_optimizer()[question.name]),
        trials=study.made["trials"],
        settings=dict(manifest.recipe["optimizer"]),
        same_machine=same_machine,
        optimizers=tuple(_measure(row, same_machine) for _, row in study.against.iterrows()),
        records=_hash_records(folder, question, task, study),
        warnings=tuple(line.replace(f"{folder.root}/", "") for line in study.comparable.warnings),
    )


def _measure(row: pd.Series, same_machine: bool) -> Measured:
    return Measured(
        optimizer=row["optimizer"],
        seeds=int(row["seeds"]),
        reached=int(row["reached"]),
        diverged=int(row["diverged"]),
        epochs_to_target=_finite(row["epochs_to_target"]),
        best_metric=_finite(row["best_metric"]),
        best_metric_std=_finite(row["best_metric_std"]),
        seconds_per_epoch=_finite(row["time_per_epoch_s"]) if same_machine else None,
        seconds_to_target=_finite(row["wall_time_to_target_s"]) if same_machine else None,
    )


def _finite(value: float) -> float | None:
    """To six digits, as in the tables; ``None`` for what is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def list_records(folder: Folder, question: Question, task: str, made: Mapping[str, Any]) -> list[Path]:
    """All records that a task's figures follow from.

    Args:
        folder: of the challenge.
        question: what is asked.
        task: its name.
        made: what it came to.

    Returns:
        The runs, and the trials of the search.
    """
    runs = [
        record_path(folder.results, task, question.scale, name, seed)
        for name in (question.name, *made["baselines"])
        for seed in made["seeds"]
    ]
    trials = [trial_path(folder, question, task, number, made["tuning_seed"]) for number in range(made["trials"])]
    return [*runs, *trials]


def trial_path(folder: Folder, question: Question, task: str, number: int, seed: int) -> Path:
    """The record of a trial.

    Args:
        folder: of the challenge.
        question: what is asked.
        task: its name.
        number: of the trial, from 0.
        seed: of the search.

    Returns:
        The file.
    """
    trials = folder.tuning / task / question.scale / question.name / "trials"
    return record_path(trials / f"{number:03d}", task, question.scale, question.name, seed)


def _hash_records(folder: Folder, question: Question, task: str, study: Study) -> dict[str, str]:
    paths = [path for path in list_records(folder, question, task, study.made) if path.exists()]
    return {path.relative_to(folder.root).as_posix(): hash_file(path) for path in paths}


def _compare(question: Question, studies: Mapping[str, Study]) -> list[Against]:
    """Every baseline of every task; p corrected over all of them."""
    rows = [(study, row) for study in studies.values() for _, row in study.against.iloc[1:].iterrows()]
    epochs = holm([row["p_value"] for _, row in rows])
    metrics = holm([row["best_metric_p_value"] for _, row in rows])
    found = []
    for (study, row), p_epochs, p_metric in zip(rows, epochs, metrics, strict=True):
        manifest = study.comparable.runs[0].manifest
        runs = study.comparable.by_optimizer()
        seeds = len(_seeds(runs[question.name]) & _seeds(runs[row["optimizer"]]))
        has_target = study.comparable.target is not None
        found.append(
            Against(
                task=manifest.task,
                optimizer=row["optimizer"],
                is_reference=row["optimizer"] == study.comparable.reference(),
                seeds=seeds,
                epochs=_difference(row, "epochs_difference", "p", p_epochs, seeds, -1) if has_target else None,
                best_metric=_difference(
                    row,
                    "best_metric_difference",
                    "best_metric_p",
                    p_metric,
                    seeds,
                    1 if manifest.metric.higher_is_better else -1,
                ),
            )
        )
    return found


def _seeds(runs: Sequence[Run]) -> set[int]:
    return {run.manifest.seed for run in runs}


def _difference(row: pd.Series, name: str, test: str, p_holm: float, seeds: int, sign: int) -> Difference:
    """The row has the baseline less the challenger; `sign` is 1 where more is better."""
    mean, low, high = -row[name], -row[f"{name}_high"], -row[f"{name}_low"]
    return Difference(
        mean=_finite(mean + 0.0),
        low=_finite(low + 0.0),
        high=_finite(high + 0.0),
        p_value=_finite(row[f"{test}_value"]),
        p_holm=_finite(p_holm),
        test=row[f"{test}_test"] or (row["p_reason"] if test == "p" else "no test"),
        verdict=_judge(sign * mean, low, high, p_holm, seeds),
    )


def _judge(gain: float, low: float, high: float, p_holm: float, seeds: int) -> str:
    if math.isnan(gain) or gain == 0:
        return "tied" if gain == 0 else "no figure"
    shown = seeds >= MIN_SEEDS and p_holm < LEVEL and low * high > 0
    return ("wins" if gain > 0 else "loses") if shown else ("ahead" if gain > 0 else "behind")


def _profile(question: Question, studies: Mapping[str, Study]) -> list[Profile]:
    entries = profile_entries(question, studies)
    names = list(dict.fromkeys(name for own in entries.values() for name in own))
    return [
        Profile(
            optimizer=name,
            tasks=len(entries),
            tasks_reached=sum(name in own and math.isfinite(own[name]["epochs_to_target"]) for own in entries.values()),
            score=_finite(score(ratios(entries, name, "epochs"))),
        )
        for name in names
    ]


def profile_entries(question: Question, studies: Mapping[str, Study]) -> dict[str, dict[str, pd.Series]]:
    """Who enters the performance profile on each task with a target.

    Args:
        question: what is asked.
        studies: by task.

    Returns:
        Rows by task and optimizer: the challenger, the task's reference, and whoever is on every task.
    """
    found = {}
    for task, study in studies.items():
        if study.comparable.target is None:
            continue
        rows = {row["optimizer"]: row for _, row in study.frame.iterrows()}
        others = {name: row for name, row in entrants(study.frame).items() if row["optimizer"] != question.name}
        found[task] = {question.name: rows[question.name], REFERENCE: rows[study.comparable.reference()]} | others
    common = set.intersection(*(set(own) for own in found.values())) if found else set()
    # Where all tasks have one reference, it is called by its name.
    named = {row["optimizer"] for own in found.values() for name, row in own.items() if name == REFERENCE}
    if len(named) == 1 and named <= common:
        common -= {REFERENCE}
    return {task: {name: row for name, row in own.items() if name in common} for task, own in found.items()}
