import pandas as pd
import pytest

from experiments.bench import steps
from experiments.bench.steps import compare, renewing_and_plain
from experiments.bench.workloads import WORKLOADS, dlrm


@pytest.mark.parametrize(("renewing", "plain"), [(0, 2), (1, 2), (2, 1)])
def test_the_dearest_place_renews_and_the_first_counts_only_if_it_does(renewing, plain):
    turn = [2.0, 1.0, 1.5]
    turn[renewing] = 9.0
    assert renewing_and_plain([turn, turn]) == [(9.0, turn[plain])] * 2


def test_one_slow_turn_does_not_move_the_renewing_place():
    assert renewing_and_plain([[1.0, 5.0, 1.0], [1.0, 5.0, 1.0], [1.0, 5.0, 99.0]])[2] == (5.0, 99.0)


def test_ratios_are_to_the_reference_of_the_same_round(monkeypatch):
    """On a clock that is read twice a step and says how long each step took."""
    monkeypatch.setitem(WORKLOADS, "dlrm", lambda device: dlrm(device, batch=4, largest=50))
    costs = iter([3.0, 1.0, 1.0, 4.0, 8.0, 2.0] * 3)
    monkeypatch.setattr(steps, "_seconds", lambda peer, device: next(costs))
    frame = compare("dlrm", ["sgd", "ngplus"], rounds=2, device="cpu", memory=False).set_index("optimizer")
    assert isinstance(frame, pd.DataFrame)
    assert frame.plain_step_s.to_dict() == {"sgd": 1.0, "ngplus": 2.0}
    assert frame.renewing_step_s["ngplus"] == 8.0
    assert frame.usual_over_sgd["ngplus"] == pytest.approx((199 * 2.0 + 8.0) / 200)
    assert frame.every_10_over_sgd["ngplus"] == pytest.approx((9 * 2.0 + 8.0) / 10)
