"""Random training loops; ``python -m tests.ngplus.random_loops --count 1000`` tries more of them."""

import random

import pytest

from ngplus import NGPlus
from tests.ngplus import random_loops


@pytest.mark.parametrize("seed", range(100, 160))
def test_a_random_loop_has_the_curvature_of_its_loss_or_warns_of_each_layer_that_has_not(seed):
    assert sum(random_loops.run(random_loops.Habits.sample(random.Random(seed))).values()) > 0


def test_a_wrong_curvature_is_found(monkeypatch):
    """The loops can fail: with pieces of a batch taken for uses by the same samples, as they were once, many do."""
    monkeypatch.setattr(random_loops, "NGPlus", lambda *args, **options: NGPlus(*args, model_calls="joined", **options))
    assert random_loops.main(0, 30) > 3
