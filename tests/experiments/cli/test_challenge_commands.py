"""The commands for what comes from outside, as they are typed."""

import sys

import pytest

from experiments.challenge import asking, conduct
from experiments.cli import app
from experiments.records.run_record import read_run


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command line in an empty folder; returns its exit status and what it printed."""

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["ngplus-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    monkeypatch.chdir(tmp_path)
    return call


def test_a_challenge_is_asked_as_it_is_typed(command, monkeypatch):
    asked = []

    def catch(given, **more):
        asked.append((given, more))
        raise asking.UserError("enough")

    monkeypatch.setattr(asking, "ask", catch)
    status, _, err = command(
        "challenge", "torch.optim:RMSprop", "--tasks", "gpt-text,schnet-qm9", "--seeds", "1,2", "--seeds", "3",
        "--trials", 0, "--set", "alpha=0.9", "--search", "lr=1e-4:1e-2:log", "--rerun-baselines",
    )  # fmt: skip
    assert (status, err) == (2, "error: enough\n")
    ((given, more),) = asked
    assert {key: value for key, value in given.items() if value is not None} == {
        "optimizer": "torch.optim:RMSprop",
        "tasks": ["gpt-text", "schnet-qm9"],
        "seeds": [1, 2, 3],
        "trials": 0,
        "rerun_baselines": True,
    }
    assert more == {"settings": ["alpha=0.9"], "search": ["lr=1e-4:1e-2:log"], "path": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: optimizer: is missing: must be package.module:Class, ./file.py:Class or an entry point's name"),
        (("torch.optim:Adama",), "error: optimizer = 'torch.optim:Adama': there is no Adama in "),
        (("torch.nn:Linear",), "is no optimizer: must inherit from torch.optim.Optimizer, not from Module, object"),
        (("./none.py:Lion",), "error: optimizer = './none.py:Lion': none.py cannot be read: No such file or directory"),
        (("torch.optim:Adam", "--seeds", "one"), "error: --seeds 'one': must be integers with commas between"),
        (("--from", "none.toml"), "error: none.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, arguments, message):
    status, _, err = command("challenge", *arguments)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import torch\n\nclass Lion(torch.optim.SGD):\n    pass\n", "Lionn", "there is no Lionn in "),
        ("def make(model:\n    pass\n", "make", "SyntaxError: '(' was never closed"),
        ("1 / 0\n", "make", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_said_of_its_own_file_and_leaves_no_folder(
    command, tmp_path, text, name, message
):
    (tmp_path / "mine.py").write_text(text)
    status, _, err = command("challenge", f"./mine.py:{name}", "--tasks", "dlrm-criteo")
    assert status == 2
    assert message in err
    assert "build/challenges" not in err.splitlines()[0]
    assert "plugins.py" not in err
    assert not list((tmp_path / "build" / "challenges").glob("*"))


def test_a_small_file_by_hand_and_a_task_of_ones_own(command, monkeypatch, tmp_path):
    from tests.experiments.cases.challenges import run_here

    monkeypatch.setattr(conduct, "run_in_processes", run_here)
    status, out, _ = command("new-task", "spirals")
    assert status == 0
    assert "spirals/spirals/recipes/spirals/tiny.toml" in out.splitlines()
    task = "spirals/spirals/spirals.py:Spirals"
    (tmp_path / "mine.toml").write_text(
        f'[challenge]\noptimizer = "torch.optim:RMSprop"\ntasks = ["{task}"]\ntrials = 0\nbaselines = ["adam"]\n'
        "seeds = [5]\n\n[settings]\nlr = 0.003\nmomentum = 0.5\n"
    )
    status, out, err = command("challenge", "--from", "mine.toml", "--set", "lr=0.01", "--format", "csv")
    assert (status, err) == (0, "")
    assert "\noptimizer,seeds,reached,diverged,epochs to target,best metric,s/epoch,s to target\nrmsprop,1," in out
    record = read_run(tmp_path / "build/challenges/rmsprop/results/spirals/tiny/runs/rmsprop-seed5.jsonl")
    chosen = record.manifest.recipe["optimizer"]
    assert (chosen["lr"], chosen["momentum"]) == (0.01, 0.5)
    status, out, _ = command("verify", "build/challenges/rmsprop")
    assert status == 0
    assert out.splitlines()[-1] == "build/challenges/rmsprop: the numbers follow from the records"
    record.path.write_text(record.path.read_text().replace('"seconds": ', '"seconds": 1'))
    status, _, err = command("verify", "build/challenges/rmsprop/challenge.toml")
    assert status == 1
    assert "rmsprop-seed5.jsonl: is not the record that result.json was made of: it was edited" in err
