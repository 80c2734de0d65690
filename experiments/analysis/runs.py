"""The finished, mutually comparable runs of a task at a scale."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from experiments.errors import UserError
from experiments.records import REFERENCE_BEST, Run, read_runs


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What may stand in one table.

    Attributes:
        runs: finished runs of the same data, metric, target and length, by optimizer and seed; at least one.
        complaints: a line for each record that was left out, with the reason.
        folder: where the task's results at this scale lie.
    """

    runs: tuple[Run, ...]
    complaints: tuple[str, ...]
    folder: Path

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty: there must be one run at least")

    def by_optimizer(self) -> dict[str, list[Run]]:
        """The runs of each optimizer, the reference first, the rest by name; seeds ascending."""
        names = sorted({run.manifest.optimizer for run in self.runs})
        first = self.reference()
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

        For ``"reference best"`` it is the median over seeds of the best value of each of the reference's runs;
        ``None`` without a target, or if no such run has a value.
        """
        said = self.runs[0].manifest.target
        if said != REFERENCE_BEST:
            return said
        bests = [run.best_metric for run in self.runs if run.manifest.optimizer == self.reference()]
        known = [best for best in bests if not math.isnan(best)]
        return median(known) if known else None


def load_comparable(results_dir: Path, task: str, scale: str) -> Comparable:
    """Read the records of a task at a scale and set aside what does not belong together.

    A record is left out, and named, when it is damaged, unfinished, of another task or scale, or when its
    data, metric, target, length or optimizer settings are not those of the majority.

    Raises:
        UserError: no run is left; says what was wrong with those there are.
    """
    folder = results_dir / task / scale
    found, complaints = read_runs(folder / "runs")
    runs = []
    for run in found:
        if (run.manifest.task, run.manifest.scale) != (task, scale):
            complaints.append(f"{run.path}: is a run of {run.manifest.task} at scale {run.manifest.scale}; left out")
        elif run.end is None:
            complaints.append(f"{run.path}: is unfinished; left out")
        else:
            runs.append(run)
    runs = _majority(runs, _question, "data, metric, target or epochs", complaints)
    alike = []
    for name in sorted({run.manifest.optimizer for run in runs}):
        own = [run for run in runs if run.manifest.optimizer == name]
        alike += _majority(own, _settings, "optimizer settings", complaints)
    if not alike:
        reasons = "".join(f"\n  {complaint}" for complaint in complaints)
        raise UserError(f"{folder / 'runs'}: there is no finished run to compare{reasons}")
    alike.sort(key=lambda run: (run.manifest.optimizer, run.manifest.seed))
    return Comparable(runs=tuple(alike), complaints=tuple(complaints), folder=folder)


def _question(run: Run) -> Hashable:
    """What two runs must share to be answers to one question."""
    manifest = run.manifest
    return manifest.dataset, manifest.metric, manifest.target, manifest.epochs


def _settings(run: Run) -> Hashable:
    return repr(run.manifest.recipe.get("optimizer"))


def _majority(runs: list[Run], key: Callable[[Run], Hashable], what: str, complaints: list[str]) -> list[Run]:
    """The runs whose key is the commonest; the first of equally common ones."""
    if not runs:
        return []
    commonest, _ = Counter(map(key, runs)).most_common(1)[0]
    complaints += [
        f"{run.path}: has other {what} than most of its kind; left out" for run in runs if key(run) != commonest
    ]
    return [run for run in runs if key(run) == commonest]
