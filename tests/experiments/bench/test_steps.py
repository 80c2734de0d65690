from dataclasses import replace

import pandas as pd
import pytest
import torch

from experiments.bench import steps
from experiments.bench.steps import compare, show_ratios, split_refresh
from experiments.bench.workloads import WORKLOADS, Workload, dlrm


@pytest.mark.parametrize(
    ("turn", "refresh", "plain"),
    [
        ([9.0, 2.0, 1.5, 1.25, 1.0], 9.0 + (2.0 + 1.5 + 1.25 + 1.0 - 4 * 1.125), 1.125),
        ([1.5, 9.0, 2.0, 1.25, 1.0], 9.0 + (2.0 + 1.25 + 1.0 - 3 * 1.125), 1.125),
        ([1.5, 1.0, 9.0, 2.0, 1.25], 9.0 + (2.0 + 1.25 - 2 * 1.0), 1.0),
        ([1.5, 1.0, 1.25, 9.0, 2.0], 9.0 + (2.0 - 1.125), 1.125),
        ([1.5, 1.0, 1.25, 1.0, 9.0], 9.0, 1.0),
    ],
)
def test_the_most_expensive_place_is_the_refresh_and_what_it_leaves_to_the_next_steps_is_added(turn, refresh, plain):
    """The first place counts only where it refreshes, and plain steps are as far behind that as a turn has them."""
    assert split_refresh([turn, turn]) == [(refresh, plain)] * 2


def test_one_slow_turn_does_not_move_the_refresh():
    assert split_refresh([[1.0, 1.0, 5.0, 1.0]] * 2 + [[1.0, 99.0, 5.0, 99.0]])[2] == (5.0, 99.0)


def test_ratios_are_to_the_reference_of_the_same_round(monkeypatch):
    """On a clock that is read twice a step and says how long each step took."""
    monkeypatch.setitem(WORKLOADS, "dlrm", lambda device: replace(dlrm(device, batch=4, largest=50), turn=4))
    costs = iter([3.0, 1.0, 1.0, 1.0, 4.0, 8.0, 2.5, 2.0] * 2 + [3.0, 1.0, 1.0, 1.0, 4.0, 9.0, 2.5, 2.0])
    monkeypatch.setattr(steps, "_seconds", lambda candidate, device: next(costs))
    first, frame = compare("dlrm", ["sgd", "ngplus"], rounds=2, device="cpu", memory=False)
    assert [set(first.rounds), set(frame.rounds)] == [{1}, {2}]
    assert isinstance(frame, pd.DataFrame)
    frame = frame.set_index("optimizer")
    assert frame.plain_step_s.to_dict() == {"sgd": 1.0, "ngplus": 2.0}
    assert frame.renewing_step_s["ngplus"] == 9.0
    assert frame.usual_over_sgd["ngplus"] == pytest.approx((199 * 2.0 + 9.0) / 200)
    assert frame.every_10_over_sgd["ngplus"] == pytest.approx((9 * 2.0 + 9.0) / 10)
    assert frame.every_1_over_sgd["ngplus"] == pytest.approx(9.0)
    assert frame.every_1_over_sgd_low["ngplus"] == pytest.approx(8.5)
    assert frame.every_1_over_sgd_high["ngplus"] == pytest.approx(9.5)
    assert "9.00 [8.50, 9.50]" in show_ratios(frame.reset_index())


def test_the_decoders_steps_are_compared_with_adamws(monkeypatch):
    seconds = []
    monkeypatch.setattr(steps, "_seconds", lambda candidate, device: candidate.step() or seconds.append(1.0) or 1.0)
    monkeypatch.setitem(WORKLOADS, "gpt", lambda device, make=WORKLOADS["gpt"]: replace(make(device), turn=3))
    names = ["adamw", "ngplus-adamw", "ngplus-adamw-batch"]
    (frame,) = compare("gpt", names, rounds=1, device="cpu", memory=False)
    assert frame.optimizer.tolist() == names
    assert frame.every_10_over_adamw.tolist() == frame.usual_over_adamw.tolist() == [1.0, 1.0, 1.0]
    assert len(seconds) == 3 * 2 * 3
    assert set(frame.model) == {"GPT, 8 × 128 tokens"}


def test_our_kfac_trains_what_that_of_asdfghjkl_cannot(monkeypatch):
    def attention(device: str) -> Workload:
        x = torch.randn(2, 3, 8, device=device)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(device)
        return Workload(name="attention", model=layer, inputs=(x,), loss=torch.Tensor.mean, interval=200)

    monkeypatch.setitem(WORKLOADS, "transformer", attention)
    monkeypatch.setattr(steps, "_seconds", lambda candidate, device: candidate.step() or 1.0)
    names = ["sgd", "kfac (asdfghjkl)", "kfac (ngplus.baselines)"]
    (frame,) = compare("transformer", names, rounds=1, device="cpu", memory=False)
    frame = frame.set_index("optimizer")
    assert "attention" in frame.why_not["kfac (asdfghjkl)"]
    assert frame.every_10_over_sgd.dropna().index.tolist() == ["sgd", "kfac (ngplus.baselines)"]
