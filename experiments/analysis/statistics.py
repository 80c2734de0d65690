"""Medians, intervals and paired tests over seeds, in which a run that misses its target is infinitely late."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
MIN_PAIRS = 3


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
    """

    p_value: float
    name: str
    reason: str


def paired_test(ours: Mapping[int, float], reference: Mapping[int, float]) -> PairedTest:
    """Test whether values differ, seed by seed.

    With finite differences that vary it is Student's paired t-test. With a miss (infinite) or equal
    differences it is the sign test, which only asks which of the two was earlier; ties and seeds in which
    both missed do not count in it.

    Args:
        ours: value by seed; infinite for a miss.
        reference: the same of the reference.
    """
    seeds = sorted(set(ours) & set(reference))
    pairs = [(ours[seed], reference[seed]) for seed in seeds]
    if len(pairs) < MIN_PAIRS:
        return PairedTest(p_value=math.nan, name="", reason=f"fewer than {MIN_PAIRS} seeds in common")
    signs = [int(mine > other) - int(mine < other) for mine, other in pairs]
    if not any(signs):
        return PairedTest(p_value=math.nan, name="", reason="tied in every seed")
    differences = np.array([mine - other for mine, other in pairs if math.isfinite(mine) and math.isfinite(other)])
    if len(differences) == len(pairs) and np.ptp(differences) > 0:
        p_value = stats.ttest_rel(*zip(*pairs, strict=True)).pvalue
        return PairedTest(p_value=float(p_value), name=f"paired t-test, {len(pairs)} seeds", reason="")
    counted = [sign for sign in signs if sign]
    p_value = stats.binomtest(counted.count(1), len(counted)).pvalue
    return PairedTest(p_value=float(p_value), name=f"sign test, {len(counted)} untied seeds", reason="")
