import re
import shlex

import pytest
from typer.testing import CliRunner

from experiments import cli
from experiments.analysis.report import commands
from experiments.provenance import REPOSITORY
from experiments.tasks import TASKS

SAID = [
    commands.PAGE,
    commands.VERDICTS,
    commands.THEORY,
    *(command(task, "small") for task in TASKS for command in (commands.train, commands.tune, commands.table)),
    commands.sensitivity("schnet-qm9", "small"),
    commands.profiles("tiny"),
    *(commands.theory(part) for part in ("figure1", "costs", "regret")),
    *(commands.bench(stem) for stem in ("curvature", "criteo-reader", "schnet-loading-cpu", "steps-dlrm-cpu")),
]


@pytest.mark.parametrize("command", sorted(set(SAID)))
def test_every_command_the_page_names_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[2] == "experiments":
        assert CliRunner().invoke(cli.app, [words[3], "--help"]).exit_code == 0
    else:
        assert (REPOSITORY / words[2].replace(".", "/")).with_suffix(".py").exists()


def test_a_task_that_nobody_knows_is_run_by_name():
    assert commands.train("mine", "tiny") == "python -m experiments run mine --scale tiny"
