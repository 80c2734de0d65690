import pandas as pd
import pytest

from experiments.bench import cost_chart


def test_every_model_that_was_measured_is_drawn(tmp_path):
    for model in ("resnet50", "dlrm"):
        frame = pd.DataFrame(
            {"optimizer": ["sgd", "ngplus", "muon"], "model": model, cost_chart.COLUMN: [1.0, 1.3, None]}
        )
        frame.to_csv(tmp_path / f"steps-{model}-cpu.csv", index=False)
    path = cost_chart.draw(tmp_path, "cpu")
    svg = path.with_suffix(".svg").read_text()
    assert path.stat().st_size > 1000
    assert svg.count("<!-- NG+ on SGD -->") == 2
    assert "<!-- Muon -->" not in svg


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        cost_chart.draw(tmp_path, "cuda")


def test_the_command_says_it_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost_chart", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        cost_chart.main()
    assert f"{tmp_path}: no steps-<model>-cpu.csv there; `make bench` makes them" in capsys.readouterr().err
