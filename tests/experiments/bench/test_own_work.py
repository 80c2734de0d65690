import pytest

from experiments.bench import own_work
from experiments.bench.steps import EQUAL_INTERVAL
from experiments.bench.workloads import WORKLOADS, dlrm, linear_layers


def test_seconds_inside_step_and_of_curvature_outside_of_it(monkeypatch):
    """On a clock that goes on by one second each time it is read for a step."""
    monkeypatch.setitem(WORKLOADS, "dlrm", lambda device: dlrm(device, batch=4, largest=50))
    ticks = iter(range(10**6))
    monkeypatch.setattr(own_work.time, "perf_counter", lambda: float(next(ticks)))
    names = ["sgd", "ngplus", "kfac (ngplus.baselines)"]
    frame = own_work.compare("dlrm", names, intervals=2, device="cpu").set_index("optimizer")
    assert set(frame.steps) == {2 * EQUAL_INTERVAL}
    assert frame.outside_s["sgd"] == 0
    assert frame.step_s["sgd"] == 1
    assert (frame.outside_s[names[1:]] > 0).all()
    assert (frame.step_s[names[1:]] > 1).all()
    assert frame.plain_over_sgd["sgd"] == frame.refresh_over_plain["sgd"] == 1
    assert (frame.refresh_over_plain[names[1:]] > 1).all()
    assert frame.own_s.tolist() == pytest.approx((frame.step_s + frame.outside_s).tolist())


def test_the_refresh_is_the_longest_call_of_each_interval():
    seconds = [9.0, *[2.0] * 8, 1.0, 7.0, *[3.0] * 9]
    assert own_work._plain_steps(seconds) == [2.0, 3.0]


def test_many_small_layers_make_a_step():
    candidate = own_work.CANDIDATES["ngplus"](linear_layers("cpu", layers=3, width=4, batch=2), 10)
    candidate.step()
    assert sorted(candidate.optimizer.curvature) == ["0.weight", "1.weight", "2.weight"]


def test_the_command_writes_a_row_for_each_optimizer(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(WORKLOADS, "schnet", lambda device: dlrm(device, batch=4, largest=50))
    monkeypatch.setattr(
        "sys.argv",
        ["own_work", "--optimizer", "sgd", "ngplus", "--intervals", "1", "--device", "cpu", "--out", str(tmp_path)],
    )
    own_work.main()
    assert "ngplus" in capsys.readouterr().out
    assert len((tmp_path / "own-work-schnet-cpu.csv").read_text().splitlines()) == 3


def test_no_intervals_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["own_work", "--intervals", "0"])
    with pytest.raises(SystemExit):
        own_work.main()
    assert "--intervals 0: must be 1 or more" in capsys.readouterr().err
