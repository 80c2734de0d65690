"""Two optimizers of one task side by side: their runs at one scale, and what the difference says about a sentence."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.analysis.claims import Comparison
from experiments.analysis.comparable_runs import Comparable
from experiments.analysis.outcomes import select_same_device, summarise_run
from experiments.analysis.statistics import PairedDifference, TimesToTarget, paired_difference, paired_test
from experiments.records.claim_checks import Outcome as Word
from experiments.records.run_record import Run

# A difference counts from this many seeds on, and below this p value.
MIN_SEEDS = 5
LEVEL = 0.05
# The measure that depends on what the runs were made on.
SECONDS = "seconds_to_target"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The runs of two optimizers at one scale."""

    comparable: Comparable
    scale: str
    ours: Sequence[Run]
    theirs: Sequence[Run]

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds that both have."""
        return sorted({run.manifest.seed for run in self.ours} & {run.manifest.seed for run in self.theirs})

    def select_runs(self, seeds: Collection[int]) -> list[Run]:
        """Ours of these seeds, then theirs."""
        return [run for run in (*self.ours, *self.theirs) if run.manifest.seed in seeds]

    def values(self, measure: str) -> tuple[dict[int, float], dict[int, float], float]:
        """Each one's measure by seed, and how long both were followed for if it is a time to the target.

        Seconds are of the seeds that both trained on the same device.
        """
        sides = self._timed_alike() if measure == SECONDS else (self.ours, self.theirs)
        ours, theirs = (collect_values(self.comparable, runs, measure) for runs in sides)
        follow_up = {"epochs_to_target": "epochs", "steps_to_target": "steps", SECONDS: "seconds"}
        if measure not in follow_up:
            return ours, theirs, math.inf
        longest = (
            max(collect_values(self.comparable, runs, follow_up[measure]).values(), default=0.0) for runs in sides
        )
        return ours, theirs, min(longest)

    def _timed_alike(self) -> tuple[list[Run], list[Run]]:
        """The runs of seeds that both trained on the same device."""
        ours, theirs = ({run.manifest.seed: run for run in runs} for runs in (self.ours, self.theirs))
        return list(select_same_device(ours, theirs).values()), list(select_same_device(theirs, ours).values())

    def gaps(self, value: str) -> np.ndarray:
        """Ours less theirs after each epoch of training, (seeds, epochs); a run that diverged is infinitely high."""
        longest = max(run.manifest.epochs for run in (*self.ours, *self.theirs))

        def curves(runs: Sequence[Run]) -> np.ndarray:
            by_seed = {run.manifest.seed: run for run in runs}
            return np.array([_curve(by_seed[seed], value, longest) for seed in self.seeds])

        ours, theirs = curves(self.ours), curves(self.theirs)
        return np.subtract(ours, theirs, out=np.zeros_like(ours), where=np.isfinite(ours) | np.isfinite(theirs))


def _curve(run: Run, value: str, length: int) -> list[float]:
    found = {epoch.epoch: getattr(epoch, value) for epoch in run.epochs}
    points = (found.get(epoch) for epoch in range(1, length + 1))
    return [math.inf if point is None else point for point in points]


def compare_medians(
    check: Comparison, ours: Mapping[int, float], theirs: Mapping[int, float], until: float
) -> tuple[str, Word, str]:
    """The two medians over the seeds that both have in words, the verdict, and the reason.

    Args:
        check: what the paper says of the two.
        ours: value by seed.
        theirs: value by seed.
        until: how long runs were followed for.

    Returns:
        Words, verdict and reason.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    ours, theirs = ({seed: each[seed] for seed in seeds} for each in (ours, theirs))
    if not seeds:
        return "", "inconclusive", too_few(0)
    medians = [estimate_median(list(each.values()), until) for each in (ours, theirs)]
    ratio = medians[0] / medians[1] if all(map(math.isfinite, medians)) and medians[1] else math.nan
    gap, test = paired_difference(ours, theirs, until=until), paired_test(ours, theirs, until=until)
    times = "" if math.isnan(ratio) else f" ({ratio:.3f}×)"
    words = f"{number(medians[0])} against {number(medians[1])}{times}"
    if gap.seeds > 1:
        words += f", difference {number(gap.mean)} [{number(gap.low)}, {number(gap.high)}]"
    if without := [seed for seed in seeds if math.isnan(ours[seed]) or math.isnan(theirs[seed])]:
        where = ", ".join(map(str, without))
        return words, "inconclusive", f"no figure at seed {where}: the run diverged before it had one"
    if gap.seeds < MIN_SEEDS:
        return words, "inconclusive", too_few(gap.seeds)
    if math.isnan(test.p_value):
        return words, "inconclusive", test.reason
    evidence = f"{test.name}, p = {test.p_value:.2g}"
    if test.p_value >= LEVEL and _excludes_the_size(check, ours, theirs, gap):
        why = f"no direction is shown, but the size ({check.ratio:.3g}×) lies outside the interval of the difference"
        return words, "not reproduced", f"{evidence}: {why}"
    if test.p_value >= LEVEL and test.p_value == 2 / 2**gap.seeds:
        least = f"the least that {gap.seeds} seeds can show by this test; all go one way"
        return words, "inconclusive", f"{evidence}, {least}"
    if test.p_value >= LEVEL or gap.low <= 0 <= gap.high:
        return words, "inconclusive", f"{evidence}: no difference that these seeds can show"
    if (gap.mean < 0) != (check.better == "less"):
        return words, "not reproduced", f"{evidence}: the difference goes the other way"
    if check.ratio is not None and not (ratio <= check.ratio if check.better == "less" else ratio >= check.ratio):
        return words, "not reproduced", f"{evidence}: the direction holds, the size ({check.ratio:.3g}×) does not"
    return words, "reproduced", evidence


def estimate_median(values: Sequence[float], until: float) -> float:
    """The median over seeds, of times to a target as in ``comparison.csv``.

    Args:
        values: one a seed, infinite for a miss.
        until: how long runs were followed for, infinite for what is no time.

    Returns:
        The median; NaN where one value is.
    """
    if math.isinf(until) or np.isnan(values).any():
        return float(np.median(values))
    return TimesToTarget(values=values, follow_up=[until] * len(values)).median()


def _excludes_the_size(
    check: Comparison, ours: Mapping[int, float], theirs: Mapping[int, float], gap: PairedDifference
) -> bool:
    """Whether even the good end of the interval falls short of the paper's ratio; not asked where a run missed."""
    both = [*ours.values(), *theirs.values()]
    if check.ratio is None or not all(map(math.isfinite, both)):
        return False
    claimed = (check.ratio - 1) * float(np.median(list(theirs.values())))
    return claimed < gap.low if check.better == "less" else claimed > gap.high


def collect_values(comparable: Comparable, runs: Sequence[Run], measure: str) -> dict[int, float]:
    """A measure by seed; a further figure is taken where the metric was best.

    Args:
        comparable: the runs of a task at a scale.
        runs: an optimizer's.
        measure: a field of `Outcome`, or ``others.`` and the name of a further figure.

    Returns:
        Values by seed.
    """
    name = measure.removeprefix("others.")
    if name == measure:
        return {run.manifest.seed: getattr(summarise_run(run, comparable.target), name) for run in runs}
    return {run.manifest.seed: _at_best(run, name) for run in runs}


def _at_best(run: Run, name: str) -> float:
    best = (epoch for epoch in run.epochs if epoch.metric == run.best_metric)
    found = next((epoch.others.get(name) for epoch in best), None)
    return math.nan if found is None else found


def too_few(seeds: int) -> str:
    """Why nothing follows from that many seeds.

    Args:
        seeds: how many there are.

    Returns:
        A sentence.
    """
    return f"{seeds} {'seed' if seeds == 1 else 'seeds'} in common, {MIN_SEEDS} are needed"


def number(value: float) -> str:
    """Four significant digits, whole from 100,000 on; an infinite time was missed.

    Args:
        value: finite or infinite.

    Returns:
        In words.
    """
    if math.isinf(value):
        return "missed"
    return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
