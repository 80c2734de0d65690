"""The template works as it is, under any name; the check of the protocol can fail."""

import subprocess
import sys

import pytest

from experiments.challenge.new_task import write_task
from experiments.errors import UserError
from experiments.tasks import find_task
from experiments.tasks.protocol_check import ProtocolError, check_task


def test_the_tests_that_it_writes_pass(tmp_path):
    write_task("my-spirals", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def make(task):
    entry = find_task(task)
    return lambda: entry.build({"batch_size": 32}, scale="tiny", data_dir=None)


def test_a_copy_of_a_task_has_the_recipes_next_to_it(tmp_path):
    for folder in ("one", "copy"):
        write_task("spirals", tmp_path / folder)
        file = tmp_path / folder / "spirals" / "spirals.py"
        assert find_task(f"{file}:Spirals").recipes == file.parent / "recipes"


def write_changed(folder, old, new):
    """The template's task with something else in it; returns its file."""
    write_task("spirals", folder)
    path = folder / "spirals" / "spirals.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1_000_003 * seed + epoch", "epoch", "the order of batches must depend on the seed"),
        ("1_000_003 * seed + epoch", "seed", "the order of batches must depend on the epoch"),
        ("manual_seed(1_000_003 * seed + epoch)", "manual_seed(torch.seed())", "an epoch must be the same"),
        ("return math.ceil(512 / self.settings.batch_size)", "return 15", "must yield steps_per_epoch"),
        ("hidden = self.settings.hidden\n", "hidden = 8\n        torch.seed()\n", "weights must depend on"),
        ("cross_entropy(model(x), y)", 'cross_entropy(model(x), y, reduction="none")', "one finite number"),
        ("metric=accuracy", 'metric=float("nan")', "evaluate.. of validation must give numbers"),
    ],
)
def test_a_task_that_does_not_keep_to_the_protocol_is_told(tmp_path, old, new, message):
    path = write_changed(tmp_path, old, new)
    with pytest.raises(ProtocolError, match=message):
        check_task(make(f"{path}:Spirals"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("protocol = 1", "protocol = 2", "Spirals.protocol = 2: this version reads protocol 1"),
        ("def steps_per_epoch", "def steps", "has no steps_per_epoch, which the protocol asks for"),
        ('name = "spirals"', 'name = "gpt-text"', "name = 'gpt-text': must be small letters"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path, old, new, message):
    path = write_changed(tmp_path, old, new)
    with pytest.raises(UserError, match=message):
        find_task(f"{path}:Spirals")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Task", "must be small letters and digits"),
        ("gpt-text", "is a task of the suite: must be another"),
        ("3d", "must begin with a letter"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        write_task(name, tmp_path)


def test_nothing_that_is_there_is_replaced(tmp_path):
    write_task("spirals", tmp_path)
    with pytest.raises(UserError, match="is there already"):
        write_task("spirals", tmp_path)
