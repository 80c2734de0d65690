import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.statistics import median_interval, paired_test

MISS = math.inf


def brute_coverage(k: int, count: int) -> float:
    """How often x₍ₖ₎ ≤ median ≤ x₍ₙ₊₁₋ₖ₎, by counting which of 2ⁿ equally likely sides the values fall on."""
    sides = [sum(side) for side in product((0, 1), repeat=count)]
    return np.mean([k <= below <= count - k for below in sides])


@pytest.mark.parametrize("count", range(1, 13))
def test_interval_is_the_narrowest_pair_of_order_statistics_that_covers_95_percent(count):
    values = list(np.random.default_rng(count).permutation(count).astype(float))
    found = median_interval(values)
    k = int(found.low) + 1
    assert found.high == count - k
    assert found.coverage == pytest.approx(brute_coverage(k, count))
    narrower = k + 1 <= (count + 1) // 2 and brute_coverage(k + 1, count) >= 0.95
    assert not narrower
    assert found.coverage >= 0.95 or k == 1
    assert found.median == np.median(values)


def test_median_is_infinite_when_half_the_runs_miss():
    assert median_interval([3, MISS, 5]).median == 5
    assert median_interval([3, MISS]).median == MISS
    assert median_interval([3, 4, MISS, MISS]).median == MISS
    assert median_interval([MISS, MISS]).median == MISS


def test_median_of_one_value_claims_no_coverage():
    found = median_interval([7.0])
    assert (found.median, found.low, found.high, found.coverage) == (7.0, 7.0, 7.0, 0.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_interval_of_nothing_or_of_nan_is_an_error(values):
    with pytest.raises(ValueError, match="must be one number or more"):
        median_interval(values)


def test_all_hits_are_compared_by_the_paired_t_test_over_common_seeds():
    ours, reference = {1: 4.0, 2: 5.0, 3: 4.0, 9: 1.0}, {3: 6.0, 1: 8.0, 2: 6.0, 7: 2.0}
    found = paired_test(ours, reference)
    assert found.p_value == pytest.approx(stats.ttest_1samp([-4.0, -1.0, -2.0], 0).pvalue)
    assert found.name == "paired t-test, 3 seeds"


def test_a_miss_makes_it_a_sign_test_in_which_ties_do_not_count():
    ours = {1: 3.0, 2: 3.0, 3: 4.0, 4: MISS, 5: 6.0, 6: 2.0}
    reference = {1: 5.0, 2: MISS, 3: 9.0, 4: MISS, 5: 6.0, 6: 3.0}
    found = paired_test(ours, reference)
    assert found.name == "sign test, 4 untied seeds"
    assert found.p_value == pytest.approx(2 * 0.5**4)


def test_equal_differences_have_no_variance_and_get_the_sign_test():
    found = paired_test({1: 2.0, 2: 3.0, 3: 4.0}, {1: 3.0, 2: 4.0, 3: 5.0})
    assert found.name == "sign test, 3 untied seeds"
    assert found.p_value == pytest.approx(2 * 0.5**3)


@pytest.mark.parametrize(
    ("ours", "reference", "reason"),
    [
        ({1: 2.0, 2: 3.0}, {1: 3.0, 2: 4.0}, "fewer than 3 seeds in common"),
        ({1: 2.0, 2: 3.0, 3: 4.0}, {4: 3.0, 5: 4.0, 6: 1.0}, "fewer than 3 seeds in common"),
        ({1: 2.0, 2: 3.0, 3: MISS}, {1: 2.0, 2: 3.0, 3: MISS}, "tied in every seed"),
        ({1: MISS, 2: MISS, 3: MISS}, {1: MISS, 2: MISS, 3: MISS}, "tied in every seed"),
    ],
)
def test_where_there_is_nothing_to_test_the_reason_is_given(ours, reference, reason):
    found = paired_test(ours, reference)
    assert math.isnan(found.p_value)
    assert found.reason == reason
