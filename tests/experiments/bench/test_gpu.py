import sys

import pytest

from experiments.bench import gpu
from experiments.bench.gpu import Part, parts, run_part, train


def test_a_part_whose_packages_are_missing_is_left_out_by_name():
    part = Part(name="x", command=(sys.executable, "-c", "raise SystemExit(9)"), needs=("torch", "no_such_module"))
    assert run_part(part) == "left out: no_such_module is not installed"


def test_a_part_that_fails_or_runs_over_its_time_is_reported_and_no_error():
    assert run_part(Part(name="x", command=(sys.executable, "-c", "raise SystemExit(9)"))).startswith("failed (9), ")
    assert run_part(Part(name="x", command=(sys.executable, "-c", "pass"))).startswith("done, ")
    endless = (sys.executable, "-c", "import time; time.sleep(60)")
    assert run_part(Part(name="x", command=endless, seconds=0.1)).startswith("stopped after ")


def test_every_part_is_a_module_that_exists():
    modules = {part.command[2] for part in parts(gpu.Path("out"), "cuda")}
    assert {
        "pytest",
        "experiments.bench.plain_step",
        "experiments.bench.curvature_step",
        "experiments.bench.steps",
    } == modules
    assert all(gpu.find_spec(module) is not None for module in modules)


@pytest.fixture
def turns(monkeypatch):
    """What was run in turn, and what each call returns."""
    called, status = [], {}

    def run(command, seconds):
        name = command[command.index("--optimizer") + 1]
        called.append((name, seconds))
        return status.get(len(called))

    monkeypatch.setattr(gpu, "_run", run)
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    return called, status


def test_the_two_are_trained_in_turn_until_the_time_is_up(turns, tmp_path):
    called, _ = turns
    assert train(tmp_path, tmp_path, "cuda", 300.0) == f"{len(called)} turns"
    assert [name for name, _ in called] == ["adam", "ngplus-adam"] * (len(called) // 2) + ["adam"] * (len(called) % 2)
    assert len(called) > 3
    assert all(seconds <= gpu.TURN_S for _, seconds in called)


def test_what_has_finished_gets_no_further_turn(turns, tmp_path):
    called, status = turns
    status[1] = 0
    train(tmp_path, tmp_path, "cuda", 300.0)
    assert [name for name, _ in called][1:] == ["ngplus-adam"] * (len(called) - 1)


def test_what_cannot_run_ends_the_training_and_is_named(turns, tmp_path):
    _, status = turns
    status[2] = 2
    assert train(tmp_path, tmp_path, "cuda", 300.0) == "ngplus-adam failed (2)"
