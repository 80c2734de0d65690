import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.statistics import holm, median_interval, paired_difference, paired_test

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


def flipped(differences) -> float:
    """How often a sum with other signs is as far from zero, over all signs."""
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return np.mean([each >= abs(sum(differences)) - 1e-12 for each in sums])


def test_the_exact_p_value_is_that_of_all_flips_of_sign():
    ours, reference = {1: 4.0, 2: 5.0, 3: 4.5, 4: 7.0, 5: 5.0}, {1: 6.0, 2: 8.0, 3: 4.0, 4: 6.5, 5: 9.0}
    assert paired_test(ours, reference).exact_p_value == pytest.approx(flipped([-2.0, -3.0, 0.5, 0.5, -4.0]))
    earlier = {seed: value - 1 - seed for seed, value in reference.items()}
    assert paired_test(earlier, reference).exact_p_value == pytest.approx(2 / 2**5)


def test_a_miss_makes_it_the_permutation_test_in_which_two_misses_are_a_tie():
    ours = {1: 3.0, 2: 3.0, 3: 4.0, 4: MISS, 5: 6.0, 6: 2.0}
    reference = {1: 5.0, 2: MISS, 3: 9.0, 4: MISS, 5: 6.0, 6: 3.0}
    found = paired_test(ours, reference, until=10)
    assert found.name == "sign-flip permutation test, 6 seeds"
    assert found.p_value == found.exact_p_value == pytest.approx(flipped([-2.0, -7.0, -5.0, 0.0, 0.0, -1.0]))


def test_equal_differences_have_no_variance_and_get_the_permutation_test():
    found = paired_test({1: 2.0, 2: 3.0, 3: 4.0}, {1: 3.0, 2: 4.0, 3: 5.0})
    assert found.name == "sign-flip permutation test, 3 seeds"
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
    found = paired_test(ours, reference, until=10)
    assert math.isnan(found.p_value)
    assert math.isnan(found.exact_p_value)
    assert found.reason == reason


def test_seeds_without_a_number_are_left_out():
    ours = {1: 4.0, 2: 5.0, 3: 4.0, 4: math.nan}
    reference = {1: 8.0, 2: 6.0, 3: 6.0, 4: 1.0}
    assert paired_test(ours, reference).name == "paired t-test, 3 seeds"
    assert paired_difference(ours, reference).seeds == 3


def test_the_difference_is_the_mean_over_common_seeds_with_a_bootstrap_interval():
    chance = np.random.default_rng(0)
    reference = dict(enumerate(chance.normal(10, 3, 60)))
    ours = {seed: value - 1 + chance.normal(0, 0.5) for seed, value in reference.items()} | {99: 1000.0}
    found = paired_difference(ours, reference)
    differences = np.array([ours[seed] - reference[seed] for seed in range(60)])
    assert found.mean == pytest.approx(differences.mean())
    # With so many seeds it is near the normal interval of the differences, which pairing makes narrow.
    half = 1.96 * differences.std(ddof=1) / math.sqrt(60)
    assert found.low == pytest.approx(found.mean - half, abs=0.03)
    assert found.high == pytest.approx(found.mean + half, abs=0.03)
    assert paired_difference(ours, reference) == found


def test_a_miss_is_as_late_as_the_run_was_followed_for():
    found = paired_difference({1: 3.0, 2: MISS, 3: MISS}, {1: 5.0, 2: 8.0, 3: MISS}, until=10)
    assert found.mean == pytest.approx((-2 + 2 + 0) / 3)
    assert (found.low, found.high) == (-2.0, 2.0)


@pytest.mark.parametrize(
    ("ours", "reference", "expected"),
    [
        ({1: 3.0, 2: 4.0}, {1: 5.0, 2: 6.0}, (-2.0, -2.0, -2.0, 2)),
        ({1: MISS, 2: MISS}, {1: MISS, 2: MISS}, (0.0, 0.0, 0.0, 2)),
        ({1: 3.0}, {1: 5.0, 2: 6.0}, (-2.0, math.nan, math.nan, 1)),
        ({1: 3.0}, {2: 5.0}, (math.nan, math.nan, math.nan, 0)),
    ],
)
def test_differences_that_do_not_vary_are_their_own_interval(ours, reference, expected):
    found = paired_difference(ours, reference, until=10)
    assert (found.mean, found.low, found.high, found.seeds) == pytest.approx(expected, nan_ok=True)


def test_holm_multiplies_the_smallest_most_and_never_changes_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    assert holm([math.nan, 0.01, 0.02]) == pytest.approx([math.nan, 0.02, 0.02], nan_ok=True)


def test_many_seeds_are_tested_without_every_flip():
    ours = {seed: float(seed % 7) for seed in range(40)}
    theirs = {seed: value + 1.0 + seed % 3 for seed, value in ours.items()}
    theirs[0] = math.inf
    found = paired_test(ours, theirs, until=20.0)
    assert found.p_value < 1e-3
    assert found == paired_test(ours, theirs, until=20.0)


def test_differences_equal_but_for_rounding_have_no_variance():
    ours = {seed: 0.1 * seed for seed in range(1, 6)}
    theirs = {seed: value + 0.1 for seed, value in ours.items()}
    found = paired_test(ours, theirs)
    assert (found.name, found.p_value) == ("sign-flip permutation test, 5 seeds", 0.0625)
    assert paired_difference(ours, theirs).low == pytest.approx(-0.1)
