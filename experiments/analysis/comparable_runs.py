"""The finished, mutually comparable runs of a task at a scale."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_high, median_low
from typing import Any

from experiments.errors import UserError
from experiments.records.run_record import REFERENCE_BEST, Run, read_runs, select_numeric_settings

BEYOND_PAPER = frozenset({"gpt-text"})
"""Tasks that the paper does not have."""


def name_data(task: str, dataset: str) -> str:
    """What a task's data are called where results are shown: tasks that the paper does not have say so.

    Args:
        task: its name.
        dataset: as its manifests have it.

    Returns:
        The name.
    """
    return f"{dataset} (beyond the paper)" if task in BEYOND_PAPER else dataset


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What may stand in one table.

    Attributes:
        runs: finished runs of the same data, metric, target and length, by optimizer and seed; at least one.
        warnings: a line for each record that was left out, with the reason.
        folder: where the task's results at this scale are.
    """

    runs: tuple[Run, ...]
    warnings: tuple[str, ...]
    folder: Path

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty: there must be one run at least")

    def by_optimizer(self, first: str | None = None) -> dict[str, list[Run]]:
        """The runs of each optimizer, the reference or `first` first, the rest by name; seeds ascending."""
        names = sorted({run.manifest.optimizer for run in self.runs})
        first = first or self.reference()
        names.sort(key=lambda name: name != first)
        return {name: [run for run in self.runs if run.manifest.optimizer == name] for name in names}

    def reference(self) -> str:
        """The optimizer that the others are compared with: the one that most runs name.

        If none of its runs is there it is SGD where there is one, or else the first by name that is no variant
        of NG+, or else the first.
        """
        names = sorted({run.manifest.optimizer for run in self.runs})
        ((named, _),) = Counter(run.manifest.recipe.get("run", {}).get("reference") for run in self.runs).most_common(1)
        if named in names:
            return named
        if "sgd" in names:
            return "sgd"
        return next((name for name in names if name.partition("-")[0] != "ngplus"), names[0])

    @cached_property
    def target(self) -> float | None:
        """The value of the metric that counts as reached.

        For ``"reference best"`` it is the median over seeds of the best value of each of the reference's runs, of
        an even number the worse of the middle two, so that half of them reach it; ``None`` without a target, or if
        no such run has a value.
        """
        said = self.runs[0].manifest.target
        if said != REFERENCE_BEST:
            return said
        bests = [run.best_metric for run in self.runs if run.manifest.optimizer == self.reference()]
        known = [best for best in bests if not math.isnan(best)]
        middle = median_low if self.runs[0].manifest.metric.higher_is_better else median_high
        return middle(known) if known else None


def load_comparable(results_dir: Path, task: str, scale: str) -> Comparable:
    """Read the records of a task at a scale and set aside what does not belong together.

    A record is left out, and named, when it is damaged, unfinished, of another task or scale, or when its
    data, metric, target, length, model or optimizer settings are not those of the majority.

    Args:
        results_dir: where the records are.
        task: the task's name.
        scale: a scale that it has a recipe for.

    Returns:
        The runs that are left, with a warning for each that was set aside.

    Raises:
        UserError: no run is left; says what was wrong with those there are.
    """
    folder = results_dir / task / scale
    found, warnings = read_runs(folder / "runs")
    runs = []
    for run in found:
        if (run.manifest.task, run.manifest.scale) != (task, scale):
            warnings.append(f"{run.path}: is a run of {run.manifest.task} at scale {run.manifest.scale}; left out")
        elif run.end is None:
            warnings.append(f"{run.path}: is unfinished; left out")
        else:
            runs.append(run)
    runs = _majority(runs, _question, "data, model, metric or target", warnings)
    alike = []
    for name in sorted({run.manifest.optimizer for run in runs}):
        own = [run for run in runs if run.manifest.optimizer == name]
        alike += _majority(own, _optimizer_settings, "optimizer settings", warnings)
    if not alike:
        reasons = "".join(f"\n  {warning}" for warning in warnings)
        raise UserError(f"{folder / 'runs'}: there is no finished run to compare{reasons}")
    alike.sort(key=lambda run: (run.manifest.optimizer, run.manifest.seed))
    return Comparable(runs=tuple(alike), warnings=tuple(warnings), folder=folder)


def _question(run: Run) -> Mapping[str, Any]:
    """What two runs must share to be answers to one question."""
    manifest = run.manifest
    shared = {name: getattr(manifest, name) for name in ("dataset", "metric", "target", "epochs", "world_size")}
    return shared | select_numeric_settings({name: manifest.recipe.get(name, {}) for name in ("task", "run")})


def _optimizer_settings(run: Run) -> Mapping[str, Any]:
    return select_numeric_settings(run.manifest.recipe.get("optimizer", {}))


def _majority(runs: list[Run], key: Callable[[Run], Mapping[str, Any]], what: str, warnings: list[str]) -> list[Run]:
    """The runs whose values are the commonest; the first of equally common ones.

    What a run does not have, as it was no choice yet when it was made, is what most of the others have.
    """
    keys = [key(run) for run in runs]
    usual = {
        name: _commonest([repr(each[name]) for each in keys if name in each]) for name in sorted(set().union(*keys))
    }
    values = [{name: repr(each[name]) if name in each else usual[name] for name in usual} for each in keys]
    kept, kind = [], _commonest([repr(each) for each in values]) if runs else ""
    first = next((each for each in values if repr(each) == kind), {})
    for run, own in zip(runs, values, strict=True):
        if own == first:
            kept.append(run)
        else:
            named = ", ".join(name for name in usual if own[name] != first[name])
            warnings.append(f"{run.path}: has other {what} than most of its kind ({named}); left out")
    return kept


def _commonest(values: Sequence[str]) -> str:
    """The first of equally common ones."""
    ((value, _),) = Counter(values).most_common(1)
    return value
