"""Somebody's records are checked; what does not fit is named."""

import shutil
from pathlib import Path

import pytest

from experiments.challenge.folder import Folder
from experiments.challenge.verify import verify
from experiments.errors import UserError


@pytest.fixture
def copy(sign, tmp_path):
    """A copy of a challenge, to be spoilt."""
    shutil.copytree(sign.root, tmp_path / "copy")
    return Folder(tmp_path / "copy")


def faults(folder) -> list[str]:
    return verify(folder.root, Path("data"))[1]


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def test_what_was_left_alone_is_found_right(copy):
    lines, found = verify(copy.root, Path("data"))
    assert found == []
    assert "spirals: 10 records, seeds 1, 2, 6 trials at seed 0" in lines
    assert "spirals: the recipe is the one that is here" in lines
    assert "spirals: the data are those that are here" in lines


def test_an_edited_record_is_named(copy):
    record = next(copy.results.rglob("sign-seed2.jsonl"))
    edit(record, '"metric": 0.', '"metric": 0.9')
    assert faults(copy) == [
        "results/spirals/tiny/runs/sign-seed2.jsonl: is not the record that result.json was made of: it was edited"
    ]


def test_a_table_that_does_not_follow_from_the_records_is_named(copy):
    edit(copy.result, '"reached": 2', '"reached": 1')
    (fault,) = faults(copy)
    assert fault.startswith("result.json: tasks[0].optimizers[")
    assert fault.endswith("reached is 1, where the records give 2")


def test_a_missing_trial_and_one_too_many_are_named(copy):
    trials = copy.tuning / "spirals" / "tiny" / "sign" / "trials"
    shutil.copytree(trials / "000", trials / "006")
    shutil.rmtree(trials / "003")
    found = faults(copy)
    assert "tuning/spirals/tiny/sign/trials/003/spirals/tiny/runs/sign-seed0.jsonl: is missing" in found
    assert any("trials/006" in each and "is one trial more than the 6 claimed" in each for each in found)


@pytest.mark.parametrize(
    ("where", "old", "new", "message"),
    [
        ("sign-seed1", '"report_split": "test"', '"report_split": "validation"', "reports the validation split"),
        ("sign-seed1", '"lr": 0.0', '"lr": 0.1', "lr is not what the best of the trials has"),
        ("adam-seed1", '"sha256": "', '"sha256": "0', "was run on other data than spirals claims"),
        (
            "sign-seed0",
            '"report_split": "validation"',
            '"report_split": "test"',
            "not at the tuning seed on validation",
        ),
        ("adam-seed1", '{"event": "end"', '{"event": "ended"', "not a line of a run record"),
    ],
)
def test_a_record_of_something_else_is_named(copy, where, old, new, message):
    path = next(copy.root.rglob(f"{where}.jsonl"))
    edit(path, old, new)
    found = [each for each in faults(copy) if message in each]
    assert found
    assert all(f"{where}.jsonl" in each for each in found)


def test_other_claims_than_were_asked_for_are_named(copy):
    edit(copy.file, "seeds = [1, 2]", "seeds = [1, 3]")  # the question's, which comes first
    assert any("seeds = [1, 2], where [1, 3] were asked for" in each for each in faults(copy))


def test_what_is_claimed_but_not_the_recipes_is_named(copy):
    edit(copy.file, "epochs = 3", "epochs = 4")
    assert "challenge.toml: spirals: epochs = 4, where the recipe has 3" in faults(copy)


def test_other_data_here_are_named(copy):
    edit(copy.file, 'dataset_sha256 = "', 'dataset_sha256 = "0')
    assert any(each.startswith("challenge.toml: spirals: the data here have the SHA-256") for each in faults(copy))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema": 1', '"schema": 9', "schema = 9: this version reads schema 1"),
        ('"higher_is_better"', '"better"', "better = .*: unknown key"),
        ("{", "[", "not JSON"),
    ],
)
def test_a_result_of_another_schema_is_refused(copy, old, new, message):
    edit(copy.result, old, new)
    with pytest.raises(UserError, match=message):
        verify(copy.root, Path("data"))


def test_a_folder_without_a_challenge_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no challenge: there is no challenge.toml"):
        verify(tmp_path, Path("data"))
