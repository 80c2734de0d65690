from functools import partial

import pytest

from experiments.bench import convolution_memory
from experiments.bench.convolution_memory import MODELS, compare
from experiments.bench.peak_memory import peak_memory_mb
from experiments.bench.workloads import WORKLOADS, convolutions


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name in MODELS:
        for samples in ("batch", "rows"):
            size = (3,) * int(name[4])
            small = partial(convolutions, size=size, channels=2, depthwise="depthwise" in name, samples=samples)
            monkeypatch.setitem(WORKLOADS, name if samples == "batch" else f"{name}-rows", small)


def test_ratios_are_to_sgd_on_the_same_model_and_medians_over_rounds(monkeypatch):
    asked = []

    def peak(model, optimizer, device):
        asked.append((model, optimizer))
        return {"sgd": 100.0, "ngplus": 120.0}[optimizer] + 30.0 * model.endswith("-rows") + len(asked) % 3

    monkeypatch.setattr(convolution_memory, "peak_memory_mb", peak)
    frame = compare(MODELS, rounds=3, device="cpu")
    assert set(asked) == {(name + end, "ngplus") for name in MODELS for end in ("", "-rows")} | {
        (name, "sgd") for name in MODELS
    }
    assert frame.optimizer.tolist() == ["sgd", "ngplus", "ngplus-rows"] * len(MODELS)
    assert frame.peak_memory_mb.tolist() == [101.0, 121.0, 151.0] * len(MODELS)
    assert frame.over_sgd.tolist() == [1.0, 121.0 / 101.0, 151.0 / 101.0] * len(MODELS)
    assert frame.model.nunique() == len({WORKLOADS[name]("cpu").name for name in MODELS})


def test_the_command_writes_a_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(convolution_memory, "peak_memory_mb", lambda *_: 2.0)
    arguments = ["--model", "conv1d", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["convolution_memory", *arguments])
    convolution_memory.main()
    assert "Conv1d 3, 2 channels" in capsys.readouterr().out
    assert len((tmp_path / "convolution-memory-cpu.csv").read_text().splitlines()) == 4


def test_no_rounds_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convolution_memory", "--rounds", "0"])
    with pytest.raises(SystemExit):
        convolution_memory.main()
    assert "--rounds 0: must be 1 or more" in capsys.readouterr().err


def test_a_curvature_step_of_a_large_image_peaks_at_no_more_than_one_and_a_half_times_sgd():
    """The real thing, in processes of their own: 288 elements a pixel where it is unfolded whole, 3.7 times SGD's."""
    sgd, ngplus = (peak_memory_mb("conv2d", optimizer, "cpu") for optimizer in ("sgd", "ngplus"))
    assert ngplus < 1.5 * sgd
