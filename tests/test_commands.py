"""Every command of the documentation is one that there is, with options and settings that there are."""

import importlib
import os
import re
import shlex
import subprocess
from importlib.util import find_spec

import pytest
import typer
from typer.testing import CliRunner

from experiments.cli.app import app
from experiments.config.recipe import load_recipe
from experiments.tasks.datasets import PREPARE
from tests.pages import PAGES, REPOSITORY, find_commands

# What a reader replaces.
PLACEHOLDERS = {
    "TASK": "resnet50-imagenet",
    "my-task": "resnet50-imagenet",
    "tune-<task>": "tune-qm9",
    "<tuning_seed>": "0",
    "<folder>": "build/trials",
    "RAW=…": "RAW=de-en.tgz",
    "findings/NAME.sh": str(sorted((REPOSITORY / "findings").glob("*.sh"))[0].relative_to(REPOSITORY)),
}
COMMANDS = [command for page in PAGES for command in find_commands(page)]
# Of these, that there is such a command line is tested where it is run: by CI, or by a test of its own.
ELSEWHERE = [
    ("pip", "install", "."),
    ("pip", "install", "fairseq-fixed"),
    (".venv/bin/pre-commit", "install"),
    # What the challenge's page begins and ends with: tests of a package's contents and of the template are their own.
    ("python3.12", "-m", "venv", "suite"),
    ("suite/bin/pip", "install", "--find-links", "dist", "ngplus[suite]"),
    ("pip", "install", "./two-spirals"),
    ("pytest", "two-spirals"),
]


def filled(command):
    return [PLACEHOLDERS.get(word, word) for word in command.words]


def of_program(*programs):
    return pytest.mark.parametrize("command", [each for each in COMMANDS if each.words[0] in programs], ids=str)


def check_experiments(arguments):
    """Parse a command of `experiments` as it does itself, and read the recipe with its settings."""
    group = typer.main.get_command(app)
    if arguments == ["--help"]:
        assert CliRunner().invoke(app, arguments).exit_code == 0
        return
    with group.make_context("experiments", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        given = command.make_context(name, rest, parent=context).params
    tasks = given.get("task", [])
    for task in [tasks] if isinstance(tasks, str) else tasks or []:
        recipe = load_recipe(task, given["scale"], overrides=tuple(given.get("set_") or ()))
        assert set(given.get("optimizer") or ()) <= set(recipe.optimizers)
    if name == "data":
        assert given["name"] in PREPARE


def check_python(arguments):
    """What Python is told to run is there, and what `experiments` is told is right."""
    if arguments[0] != "-m":
        assert (REPOSITORY / arguments[0]).is_file()
    elif arguments[1] == "experiments":
        check_experiments(arguments[2:])
    else:
        assert find_spec(arguments[1]) is not None
        assert all((REPOSITORY / each).exists() for each in arguments[2:] if each.startswith("tests/"))


@of_program("python")
def test_a_command_of_python_is_right(command):
    check_python(filled(command)[1:])


@of_program("ngplus-bench", "suite/bin/ngplus-bench")
def test_a_command_of_the_installed_suite_is_right(command):
    check_experiments(filled(command)[1:])


@of_program("torchrun")
def test_what_torchrun_starts_is_right(command):
    words = filled(command)
    assert words[1:3] == ["--nproc-per-node", "8"]
    check_python(words[3:])


@of_program("make")
def test_make_has_the_target_and_what_it_runs_is_right(command):
    """``make -n`` prints what it would run."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", *filled(command)[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if re.match(r"\S*/python -m", line)]
    for words in lines:
        check_python(words[1:])


@of_program("bash")
def test_a_script_is_there(command):
    assert (REPOSITORY / filled(command)[1]).is_file()


@of_program("fairseq-train", "fairseq-generate")
def test_fairseq_knows_every_argument(command):
    """The plugin is imported as other tests import it; fairseq registers a name once."""
    from fairseq import options

    importlib.import_module("experiments.integrations.fairseq_plugin")
    parser = options.get_training_parser if command.words[0] == "fairseq-train" else options.get_generation_parser
    words = list(command.words[1:])
    plugin = words.index("--user-dir")
    assert words[plugin + 1] == "experiments/integrations/fairseq_plugin"
    del words[plugin : plugin + 2]
    options.parse_args_and_arch(parser(), input_args=words)


def test_every_command_is_checked_by_some_test():
    checked = {
        "python",
        "ngplus-bench",
        "suite/bin/ngplus-bench",
        "torchrun",
        "make",
        "bash",
        "fairseq-train",
        "fairseq-generate",
        "spktrain",
    }
    assert [each for each in COMMANDS if each.words[0] not in checked and each.words not in ELSEWHERE] == []
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("changed", ["reproduce-qm8", "reproduce-qm9 SCALE=big"])
def test_a_target_that_is_wrong_would_be_found(changed):
    done = subprocess.run(["make", "-n", *changed.split()], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    words = [shlex.split(line)[1:] for line in done.stdout.splitlines() if re.match(r"\S*/python -m", line)]
    if done.returncode == 0:
        with pytest.raises(Exception, match="big"):
            [check_python(each) for each in words]


def test_a_claim_is_verified_as_the_page_says():
    (command,) = (each for each in COMMANDS if "verify-claim" in each.words)
    done = CliRunner().invoke(app, list(command.words[3:]))
    assert done.exit_code == 0, done.output
    assert "reproduced" in done.output
