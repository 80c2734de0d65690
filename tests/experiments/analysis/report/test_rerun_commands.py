import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from experiments.analysis.report import rerun_commands
from experiments.cli import app
from experiments.records.provenance import REPOSITORY
from experiments.tasks import TASKS

SAID = [
    rerun_commands.PAGE,
    rerun_commands.VERDICTS,
    rerun_commands.THEORY,
    *(
        command(task, "small")
        for task in TASKS
        for command in (rerun_commands.train, rerun_commands.tune, rerun_commands.table)
    ),
    rerun_commands.sensitivity("schnet-qm9", "small"),
    rerun_commands.profiles("tiny"),
    *(rerun_commands.theory(part) for part in ("figure1", "costs", "regret")),
    *(rerun_commands.bench(stem) for stem in ("curvature", "criteo-reader", "schnet-loading-cpu", "steps-dlrm-cpu")),
]

PATTERNS = {"reproduce-TASK", "tune-TASK", "data-NAME", "bench-NAME"}


@pytest.mark.parametrize("command", sorted(set(SAID)))
def test_every_command_the_page_names_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        dry = subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert "-m experiments" in dry.stdout
    elif words[2] == "experiments":
        assert CliRunner().invoke(app.app, [words[3], "--help"]).exit_code == 0
    else:
        assert find_spec(words[2]) is not None
        assert find_spec(words[2]).submodule_search_locations is None or find_spec(f"{words[2]}.__main__") is not None


def test_a_task_that_nobody_knows_is_run_by_name():
    assert rerun_commands.train("mine", "tiny") == "python -m experiments run mine --scale tiny"


def test_help_is_a_screen_that_names_every_target():
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    lines = shown.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    makefile = (REPOSITORY / "Makefile").read_text()
    named = {line.split()[0] for line in lines}
    assert set(re.findall(r"^([a-z0-9-]+):(?!=)", makefile, re.MULTILINE)) - {"force"} == named - PATTERNS
    assert named >= PATTERNS
