import itertools
import subprocess
import sys

import pytest

from experiments.cli import app, listing
from experiments.data_io.checksum import DataFileError
from experiments.errors import UserError
from experiments.launch import jobs
from experiments.records.provenance import REPOSITORY
from experiments.records.run_record import read_run
from experiments.tasks import TASKS
from experiments.tasks.datasets import PREPARE
from tests.experiments.cases import toy

pytestmark = pytest.mark.usefixtures("recipes")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command line; returns its exit status and what it printed."""

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    monkeypatch.setenv("COLUMNS", "200")
    return call


def test_run_takes_the_optimizer_seed_and_epochs_it_is_given(command, tmp_path):
    status, out, _ = command(
        "run", "toy", "--optimizer", "sgd", "--seed", 4, "--epochs", 1, "--set", "optimizers.sgd.lr=0.3",
        "--results-dir", tmp_path, "--checkpoint-dir", tmp_path / "saved",
    )  # fmt: skip
    assert status == 0
    assert "sgd seed 4: epoch 1/1" in out
    record = read_run(tmp_path / "toy" / "tiny" / "runs" / "sgd-seed4.jsonl")
    assert (record.manifest.epochs, record.manifest.recipe["optimizer"]["lr"]) == (1, 0.3)
    assert (tmp_path / "saved" / "toy" / "tiny" / "sgd-seed4.pt").exists()


def test_optimizers_take_turns_seed_by_seed(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(jobs, "run_in_processes", lambda waiting, **how: asked.append((waiting, how)) or {})
    names = ("--optimizer", "sgd", "--optimizer", "adam", "--results-dir", tmp_path)
    assert command("run", "toy", *names)[0] == 0
    assert command("sweep", "toy", *names, "--workers", 3)[0] == 0
    for waiting, _ in asked:
        assert [(job.optimizer, job.seed) for job in waiting] == [("sgd", 0), ("adam", 0), ("sgd", 1), ("adam", 1)]
    assert [how for _, how in asked] == [{"workers": 1, "threads": None}, {"workers": 3, "threads": 1}]


def test_a_setting_of_a_finished_run_is_refused_before_anything_starts(command, monkeypatch, tmp_path):
    where = ("--seed", 0, "--results-dir", tmp_path)
    command("run", "toy", "--optimizer", "sgd", *where)
    monkeypatch.setattr(jobs, "run_in_processes", lambda *_, **__: pytest.fail("started"))
    status, _, err = command("sweep", "toy", *where, "--set", "optimizers.sgd.lr=0.3")
    assert status == 2
    assert "sgd-seed0.jsonl: was finished with other settings: optimizer.lr was 0.1 and is 0.3" in err
    assert "--variant" in err


def test_a_setting_of_an_interrupted_run_is_refused_before_anything_starts(command, monkeypatch, tmp_path):
    where, own = ("--seed", 0, "--results-dir", tmp_path), ("--optimizer", "sgd")
    with monkeypatch.context() as changes:
        calls, loss = itertools.count(), toy.Toy.loss

        def stop_half_way(*given):
            if next(calls) == 8:
                raise UserError("somebody stopped it")
            return loss(*given)

        changes.setattr(toy.Toy, "loss", stop_half_way)
        assert command("run", "toy", *own, *where)[0] == 2
    more = ("sweep", "toy", *own, "--seed", 0, "--seed", 1, "--results-dir", tmp_path)
    with monkeypatch.context() as changes:
        changes.setattr(jobs, "run_in_processes", lambda *_, **__: pytest.fail("started"))
        status, _, err = command(*more, "--set", "optimizers.sgd.lr=0.3")
    assert status == 2
    assert "sgd-seed0.jsonl: is unfinished, begun with other settings: optimizer.lr was 0.1 and is 0.3" in err
    assert "--variant" in err
    assert command("run", "toy", *own, *where)[0] == 0


def test_a_variant_stands_next_to_its_baseline(command, tmp_path):
    arguments = ("run", "toy", "--optimizer", "sgd", "--seed", 0, "--results-dir", tmp_path)
    command(*arguments)
    changed = (*arguments, "--set", "optimizers.sgd.lr=0.3", "--variant", "fast")
    assert command(*changed)[0] == 0
    assert "sgd-fast seed 0: finished before" in command(*changed)[1]
    runs = tmp_path / "toy" / "tiny" / "runs"
    own, other = (read_run(runs / f"{name}-seed0.jsonl").manifest for name in ("sgd", "sgd-fast"))
    assert (own.recipe["optimizer"]["lr"], other.recipe["optimizer"]["lr"]) == (0.1, 0.3)
    status, out, _ = command("table", "toy", "--results-dir", tmp_path)
    assert status == 0
    assert "sgd-fast" in out


def test_a_sweep_writes_tensorboard_files(command, tmp_path):
    names = ("--optimizer", "sgd", "--seed", 0, "--epochs", 1, "--results-dir", tmp_path)
    assert command("sweep", "toy", *names, "--tensorboard")[0] == 0
    assert list((tmp_path / "tensorboard" / "toy" / "tiny" / "sgd-seed0").glob("events.*"))


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_what_trains_does_not_write_into_the_recorded_results_by_itself(command, monkeypatch, name, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(name, "toy", "--optimizer", "sgd", "--seed", 0, "--epochs", 1)[0] == 0
    assert (tmp_path / "build" / "results" / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl").exists()
    assert not (tmp_path / "results").exists()


def test_outside_the_environment_it_says_how_to_get_in():
    """Without site-packages, as the system's own Python."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "experiments"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: typer is not installed for ")
    assert "make setup" in done.stderr


def test_a_run_that_cannot_begin_does_not_stop_the_others(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        jobs, "run_in_processes", lambda waiting, **_: asked.extend(waiting) or {"toy adam seed 0": "killed"}
    )
    (tmp_path / "toy" / "tiny" / "runs").mkdir(parents=True)
    (tmp_path / "toy" / "tiny" / "runs" / "sgd-seed0.jsonl").write_text("{}\n")
    status, _, err = command("sweep", "toy", "--seed", 0, "--results-dir", tmp_path)
    assert status == 1
    assert [job.optimizer for job in asked] == ["adam", "ngplus"]
    first, *named = err.splitlines()
    assert first == "2 of 3 runs failed; the same command tries them again:"
    assert named[0].startswith("  toy sgd seed 0: ")
    assert named[1] == "  toy adam seed 0: killed"


def test_where_there_is_no_slurm_it_is_said(command, tmp_path):
    status, _, err = command("sweep", "toy", "--slurm", "--results-dir", tmp_path)
    assert status == 2
    assert err.startswith("error: slurm: ")


def test_a_finished_run_is_said_to_be_finished(command, tmp_path):
    arguments = ("run", "toy", "--optimizer", "sgd", "--seed", 0, "--results-dir", tmp_path)
    command(*arguments)
    status, out, _ = command(*arguments)
    assert status == 0
    assert out == f"sgd seed 0: finished before on toy numbers, see {tmp_path}/toy/tiny/runs/sgd-seed0.jsonl\n"
    _, out, _ = command(*arguments, "--force")
    assert "epoch 3/3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "toys"], "error: task = 'toys': there is no such task; must be one of "),
        (["run", "toy", "--scale", "big"], "error: scale = 'big': toy has no recipe for it; must be one of tiny"),
        (["run", "toy", "--optimizer", "lion"], "must be one of adam, ngplus, sgd"),
        (["run", "toy", "--set", "optimizers.sgd.size=1"], "[optimizers.sgd]: size = 1: unknown key"),
        (["run", "toy", "--variant", "A b"], "variant = 'sgd-A b': must be small letters and digits"),
        (["run", "toy", "--seed", "-1"], "seed = -1: must be from 0 to 4294967295"),
        (["run", "toy", "--epochs", "0"], "[run]: epochs = 0: must be at least 1"),
        (["run", "toy", "--optimizer", "sgd", "--seed", "0", "--device", "tpu"], "must be one of auto, cpu, cuda"),
        (["data", "mnist"], "error: data = 'mnist': there is no such dataset; must be one of "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, tmp_path, arguments, message):
    status, _, err = command(*arguments, *(["--results-dir", tmp_path] if arguments[0] == "run" else []))
    assert status == 2
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_missing_data_file_is_one_line_and_status_2(command, monkeypatch):
    def missing(_):
        raise DataFileError("x.gz is missing")

    monkeypatch.setitem(PREPARE, "fashion-mnist", missing)
    assert command("data", "fashion-mnist") == (2, "", "error: x.gz is missing\n")


def test_data_says_where_it_lies(command, monkeypatch, tmp_path):
    monkeypatch.setitem(PREPARE, "fashion-mnist", lambda folder: folder / "fashion-mnist")
    status, out, _ = command("data", "fashion-mnist", "--data-dir", tmp_path)
    assert (status, out) == (0, f"fashion-mnist: {tmp_path}/fashion-mnist\n")


def test_list_names_tasks_scales_optimizers_runs_and_datasets(command, monkeypatch, tmp_path):
    monkeypatch.setattr(listing, "TASKS", {"toy": TASKS["toy"]})
    command("run", "toy", "--optimizer", "sgd", "--seed", 4, "--results-dir", tmp_path)
    (tmp_path / "toy" / "tiny" / "runs" / "adam-seed0.jsonl").write_text("{}\n")
    status, out, _ = command("list", "--results-dir", tmp_path)
    assert status == 0
    for shown in ("toy", "tiny", "ngplus", "adam", "fashion-mnist", "warning: ", "adam-seed0.jsonl, line 1"):
        assert shown in out
    (row,) = [line.split() for line in out.splitlines() if line.split()[-1:] == ["sgd"]]
    assert row[-2:] == ["4", "sgd"]


def test_list_fits_80_columns_and_breaks_no_seeds(command, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(listing, "TASKS", {"toy": TASKS["toy"]})
    command("run", "toy", "--optimizer", "sgd", "--seed", 1, "--epochs", 1, "--results-dir", tmp_path)
    first = tmp_path / "toy" / "tiny" / "runs" / "sgd-seed1.jsonl"
    for seed in (2, 3, 5, 8, 9, 13):
        copy = first.read_text().replace('"seed": 1,', f'"seed": {seed},', 1)
        first.with_name(f"sgd-seed{seed}.jsonl").write_text(copy)
    _, out, _ = command("list", "--results-dir", tmp_path)
    assert max(map(len, out.splitlines())) <= 80
    assert "1–3, 5, 8–9, 13" in out


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "--help"], ["table", "--help"]])
def test_help_is_there(command, arguments):
    status, out, _ = command(*arguments)
    assert status == 0
    assert "Usage:" in out


def test_table_says_where_there_are_no_runs(command, tmp_path):
    status, _, err = command("table", "--results-dir", tmp_path)
    assert (status, err) == (2, f"error: {tmp_path}: there are no runs at scale tiny; `run` makes them\n")


def test_a_command_starts_without_what_only_some_runs_need():
    """Each takes seconds to import, and every run of a sweep is a process of its own."""
    assert _imported("experiments.cli.app", "{'torch', 'pandas', 'numpy', 'rich.table'}") == "[]\n"
    heavy = "{'pytorch_optimizer', 'transformers', 'matplotlib', 'optuna', 'schnetpack', 'fairseq', 'torchvision'}"
    assert _imported("experiments.launch.jobs, experiments.optimizers.registry", heavy) == "[]\n"


def _imported(modules, heavy):
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
