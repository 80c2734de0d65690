import pytest

from experiments.bench import own_work
from experiments.bench.steps import EQUAL_INTERVAL
from experiments.bench.workloads import WORKLOADS, dlrm


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
    assert frame.own_s.tolist() == pytest.approx((frame.step_s + frame.outside_s).tolist())


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
