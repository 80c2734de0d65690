import re
import shlex
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


@pytest.mark.parametrize("command", sorted(set(SAID)))
def test_every_command_the_page_names_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[2] == "experiments":
        assert CliRunner().invoke(app.app, [words[3], "--help"]).exit_code == 0
    else:
        assert find_spec(words[2]) is not None
        assert find_spec(words[2]).submodule_search_locations is None or find_spec(f"{words[2]}.__main__") is not None


def test_a_task_that_nobody_knows_is_run_by_name():
    assert rerun_commands.train("mine", "tiny") == "python -m experiments run mine --scale tiny"
