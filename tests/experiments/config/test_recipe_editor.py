import difflib

import pytest

from experiments.config.recipe_editor import write_values
from experiments.dataclass_io import SettingsError
from tests.experiments.cases import toy

SOURCE = "tuned somewhere"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(
        "# A comment.\n" + toy.RECIPE + "\n[task.more] # the last\nlr = { value = 7, source = 'made up' }\n"
    )
    return file


def changes(path, values):
    before = path.read_text().splitlines()
    write_values(path, values, SOURCE)
    diff = difflib.ndiff(before, path.read_text().splitlines())
    return [line for line in diff if line.startswith(("-", "+"))]


def test_the_line_of_the_value_changes_and_no_other(path):
    assert changes(path, {"optimizers.adam.lr": 0.03}) == [
        '- lr = { value = 0.01, source = "made up" }',
        f'+ lr = {{ value = 0.03, source = "{SOURCE}" }}',
    ]


def test_a_value_that_is_not_there_is_put_at_the_end_of_its_table(path):
    new = f'weight_decay = {{ value = 1e-05, source = "{SOURCE}" }}'
    assert changes(path, {"optimizers.ngplus.base.weight_decay": 1e-5}) == [f"+ {new}"]
    lines = path.read_text().splitlines()
    assert lines[lines.index(new) - 1].startswith("momentum")
    assert lines[lines.index(new) + 1] == ""


def test_a_table_at_the_end_of_the_file_with_a_comment_behind_its_name(path):
    assert len(changes(path, {"task.more.lr": 8.0, "task.more.size": 2.0})) == 3


def test_a_table_that_is_not_there_is_an_error_and_nothing_is_written(path):
    before = path.read_text()
    with pytest.raises(SettingsError, match=r"tiny\.toml: there is no line \[optimizers\.lars\], below which lr would"):
        write_values(path, {"optimizers.adam.lr": 0.03, "optimizers.lars.lr": 1.0}, SOURCE)
    assert path.read_text() == before


def test_a_value_over_several_lines_is_refused_and_nothing_is_written(path):
    path.write_text(path.read_text() + '[a]\nlr = { value = [1,\n2], source = "x" }\n')
    before = path.read_text()
    with pytest.raises(SettingsError, match=r"a\.lr could not be set to 1\.0: is it on a line of its own\?"):
        write_values(path, {"a.lr": 1.0}, SOURCE)
    assert path.read_text() == before
