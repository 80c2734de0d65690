"""Intervals, differences and tests over seeds, in which a run that misses its target is infinitely late.

Times to a target are censored where a run was over before it got there (Kaplan and Meier, 1958).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from lifelines import KaplanMeierFitter
from lifelines.utils import restricted_mean_survival_time
from scipy import stats

LEVEL = 0.95
MIN_PAIRS = 3
# The same records give the same intervals.
RESAMPLING_SEED = 0
# All sign flips of up to so many seeds, 2¹⁴, as many drawn ones of more.
MAX_FLIPS = 2**14
# The curve is a product of fractions: a half may come out a little above one half.
_HALF = 0.5 + 1e-9


@dataclass(frozen=True, kw_only=True)
class MedianInterval:
    """A median with a distribution-free interval.

    Attributes:
        median: of the values; infinite if half of them or more are.
        low: lower end, an order statistic.
        high: upper end, an order statistic; infinite where too many runs missed.
        coverage: the probability with which the interval covers the true median.
    """

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float]) -> MedianInterval:
    """The median and the narrowest pair of order statistics ``x₍ₖ₎, x₍ₙ₊₁₋ₖ₎`` that covers 95 %.

    The pair covers the median with probability ``1 − 2 P(Bin(n, ½) ≤ k − 1)``. Under six values not even
    the extremes reach 95 %; then they are the interval, and ``coverage`` says what they are worth (75 % for
    three values). Infinite values are misses and sort last.

    Args:
        values: one a seed; infinite for a miss.

    Returns:
        Median, interval and its coverage.

    Raises:
        ValueError: there is no value, or one is NaN.
    """
    if not len(values) or np.isnan(values).any():
        raise ValueError(f"values = {list(values)}: must be one number or more, none of them NaN")
    ordered, count = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1.0 - 2.0 * float(stats.binom.cdf(k - 1, count, 0.5))

    k = max((k for k in range(1, (count + 1) // 2 + 1) if coverage(k) >= LEVEL), default=1)
    return MedianInterval(
        median=_median(ordered), low=ordered[k - 1], high=ordered[count - k], coverage=max(coverage(k), 0.0)
    )


def _median(ordered: Sequence[float]) -> float:
    """Half-way between the middle two for an even number: infinite if the upper one is."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A two-sided test of one optimizer against the reference, paired over seeds.

    Attributes:
        p_value: NaN where there is nothing to test.
        name: the test, with the number of pairs.
        reason: why `p_value` is NaN, else empty.
        exact_p_value: of the sign-flip permutation test; with n seeds it is never under ``2 / 2ⁿ``, which is
            .0625 for five.
    """

    p_value: float = math.nan
    name: str = ""
    reason: str = ""
    exact_p_value: float = math.nan


def paired_test(ours: Mapping[int, float], reference: Mapping[int, float], *, until: float = math.inf) -> PairedTest:
    """Test whether values differ, seed by seed.

    With finite differences that vary it is Student's paired t-test. With a miss (infinite) or equal differences
    it is the permutation test that flips the sign of each seed's difference, over all flips (`MAX_FLIPS` drawn ones
    where there are more); a miss then counts as `until`, so that two misses are a tie.

    Args:
        ours: value by seed; infinite for a miss.
        reference: the same of the reference.
        until: how long runs were followed for, finite if one missed.

    Returns:
        The p value, and which test it is from.
    """
    pairs = _pairs(ours, reference)
    if len(pairs) < MIN_PAIRS:
        return PairedTest(reason=f"fewer than {MIN_PAIRS} seeds in common")
    restricted = np.minimum(pairs, until)  # (seeds, 2)
    differences = restricted[:, 0] - restricted[:, 1]
    if not differences.any():
        return PairedTest(reason="tied in every seed")
    exact = stats.permutation_test(
        tuple(restricted.T),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=MAX_FLIPS,
        rng=RESAMPLING_SEED,
    ).pvalue
    if np.isfinite(pairs).all() and not _alike(differences):
        p_value, name = stats.ttest_rel(*restricted.T).pvalue, "paired t-test"
    else:
        p_value, name = exact, "sign-flip permutation test"
    return PairedTest(p_value=float(p_value), name=f"{name}, {len(pairs)} seeds", exact_p_value=float(exact))


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean difference over the seeds that both have, with its bootstrap interval.

    Attributes:
        mean: ours less the reference's; NaN without a seed in common.
        low: lower end of the 95 % interval; NaN for one seed.
        high: upper end.
        seeds: how many pairs.
    """

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0


def paired_difference(
    ours: Mapping[int, float], reference: Mapping[int, float], *, until: float = math.inf
) -> PairedDifference:
    """How far values differ, seed by seed: the mean and its BCa bootstrap interval over seeds.

    Args:
        ours: value by seed; infinite for a miss, which counts as `until`.
        reference: the same of the reference.
        until: how long runs were followed for, finite if one missed.

    Returns:
        The mean difference, its interval, and over how many seeds.
    """
    pairs = np.minimum(_pairs(ours, reference), until)
    if not len(pairs):
        return PairedDifference()
    differences = pairs[:, 0] - pairs[:, 1]
    mean = float(differences.mean())
    if len(pairs) == 1:
        return PairedDifference(mean=mean, seeds=1)
    if _alike(differences):  # no resample differs, and the method has nothing to correct
        return PairedDifference(mean=mean, low=mean, high=mean, seeds=len(pairs))
    interval = stats.bootstrap(
        tuple(pairs.T), _mean_difference, paired=True, vectorized=True, confidence_level=LEVEL, rng=RESAMPLING_SEED
    ).confidence_interval
    return PairedDifference(mean=mean, low=float(interval.low), high=float(interval.high), seeds=len(pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values that stay under α only if the family's error rate does (Holm, 1979).

    The i-th smallest of m, from 0, becomes ``(m − i) p``, at least what a smaller one became and at most 1.
    A NaN is no test: it stays and does not count.

    Args:
        p_values: of one family; NaN is left as it is.

    Returns:
        Corrected, in the same order.
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]
    corrected = np.full(len(values), math.nan)
    scaled = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected.tolist()


def _pairs(ours: Mapping[int, float], reference: Mapping[int, float]) -> np.ndarray:
    """Ours and the reference's value for each seed that both have and that is no NaN, (seeds, 2)."""
    found = [(ours[seed], reference[seed]) for seed in sorted(ours.keys() & reference.keys())]
    pairs = np.array(found, dtype=float).reshape(-1, 2)
    return pairs[~np.isnan(pairs).any(axis=1)]


def _alike(differences: np.ndarray) -> bool:
    """Whether they are equal but for rounding."""
    return bool(np.ptp(differences) <= 1e-12 * np.abs(differences).max())


def _mean_difference(ours: np.ndarray, reference: np.ndarray, axis: int) -> np.ndarray:
    return (ours - reference).mean(axis=axis)


@dataclass(frozen=True, kw_only=True)
class TimesToTarget:
    """One time a seed, in epochs, steps or seconds.

    Attributes:
        values: when the target was reached; infinite for a miss.
        follow_up: how long each run was followed for, which a miss is censored at.
    """

    values: Sequence[float]
    follow_up: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.values) or np.isnan(self.values).any():
            raise ValueError(f"values = {list(self.values)}: must be one number or more, none of them NaN")
        if len(self.values) != len(self.follow_up):
            raise ValueError(f"follow_up = {list(self.follow_up)}: must be as many as there are values")

    def median(self) -> float:
        """The Kaplan-Meier median: the least time by which half of the runs have reached the target.

        Infinite if fewer than half ever do.
        """
        curve = self._fit().survival_function_.iloc[:, 0]
        return float(min(curve.index[curve <= _HALF], default=math.inf))

    def restricted_mean(self, until: float) -> float:
        """The mean of the times, each at most `until`: the area under the Kaplan-Meier curve up to there.

        It has a value where most runs miss, and is then a lower bound of the mean time.
        """
        return float(restricted_mean_survival_time(self._fit(), t=until)) if until > 0 else 0.0

    def _fit(self) -> KaplanMeierFitter:
        reached = tuple(math.isfinite(value) for value in self.values)
        durations = (v if hit else w for v, w, hit in zip(self.values, self.follow_up, reached, strict=True))
        return _fit_curve(tuple(durations), reached)


@lru_cache(maxsize=10_000)
def _fit_curve(durations: tuple[float, ...], reached: tuple[bool, ...]) -> KaplanMeierFitter:
    """The curve of some runs, which a table asks for several times: a fit takes ten milliseconds. To be read only."""
    return KaplanMeierFitter().fit(durations, event_observed=reached)
