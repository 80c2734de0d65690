import math

import pytest

from experiments.analysis.statistics import TimesToTarget

MISS = math.inf


def area(values, follow_up, until):
    """Under the product-limit curve, by its definition."""
    ends = [(v, True) if math.isfinite(v) else (w, False) for v, w in zip(values, follow_up, strict=True)]
    curve, alive, total, before = 1.0, len(ends), 0.0, 0.0
    for time in sorted({time for time, _ in ends}):
        total += curve * (min(time, until) - min(before, until))
        curve *= 1 - sum(end == (time, True) for end in ends) / alive
        alive -= sum(end[0] == time for end in ends)
        before = time
    return total + curve * max(0.0, until - before)


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([3, 1, 2], 2),  # all hit
        ([MISS, MISS, MISS], MISS),  # all miss
        ([2, 2, 2], 2),  # ties
        ([4], 4),
        ([MISS], MISS),
        ([3, MISS, 5], 5),
        ([3, MISS], 3),  # half have reached it by then
        ([3, MISS, MISS], MISS),
        ([0, 0, 4], 0),  # before the first epoch
        ([1, 2, 3, 4, 5, 5], 3),  # where the product of fractions is a little above a half
        ([1, 2, 3, MISS, MISS, MISS], 3),
        ([1, 2, 3, 3.5, 4, *[MISS] * 5], 4),
    ],
)
@pytest.mark.parametrize("until", [4, 5])
def test_median_and_restricted_mean(values, median, until):
    times = TimesToTarget(values=values, follow_up=[5] * len(values))
    assert times.median() == median
    plain = [min(value, until) for value in values]
    assert times.restricted_mean(until) == pytest.approx(sum(plain) / len(plain))


def test_a_run_that_was_over_sooner_counts_as_long_as_it_was_followed():
    values, follow_up = [4.0, MISS, 7.0, MISS, 9.0], [10.0, 5.0, 11.0, 8.0, 10.0]
    times = TimesToTarget(values=values, follow_up=follow_up)
    assert times.restricted_mean(10.0) == pytest.approx(area(values, follow_up, 10.0))
    # 4/5 after 4, of the three left then 2/3 after 7, and the last after 9.
    assert times.median() == 9.0


@pytest.mark.parametrize(
    ("values", "follow_up", "message"), [([], [], "one number"), ([math.nan], [1], "NaN"), ([1, 2], [1], "follow_up")]
)
def test_what_is_no_time_is_refused(values, follow_up, message):
    with pytest.raises(ValueError, match=message):
        TimesToTarget(values=values, follow_up=follow_up)
