"""Times to a target, some of them censored: the run was over before it got there (Kaplan and Meier, 1958)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lifelines import KaplanMeierFitter
from lifelines.utils import restricted_mean_survival_time

# The curve is a product of fractions: a half may come out a little above one half.
_HALF = 0.5 + 1e-9


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
        reached = [math.isfinite(value) for value in self.values]
        durations = [v if hit else w for v, w, hit in zip(self.values, self.follow_up, reached, strict=True)]
        return KaplanMeierFitter().fit(durations, event_observed=reached)
