import pytest

from experiments.analysis.claims import load_claims
from experiments.analysis.verdicts import judge
from experiments.cli.claim_steps import follow
from experiments.errors import UserError
from experiments.records.provenance import REPOSITORY
from tests.experiments.cases.handwritten_records import HIT_1, HIT_2, HIT_4, MISS, write

RESULTS = REPOSITORY / "results"


@pytest.fixture
def results(tmp_path):
    """The median of SGD's runs is 4 epochs, NG+'s are 1, 2, 1, 2 and a miss, which counts as 4."""
    for seed, metrics in enumerate([HIT_1, HIT_2, HIT_1, HIT_2, MISS], 1):
        write(tmp_path, "ngplus", seed, metrics)
        write(tmp_path, "sgd", seed, HIT_4)
    return tmp_path


def test_every_file_value_and_difference_is_printed(results):
    lines, _ = follow(results, "epochs-sgd")
    shown = "\n".join(lines)
    read = [line for line in lines if line.startswith("read ")]
    assert len(read) == 10
    assert f"{results}/resnet50-imagenet/tiny/runs/ngplus-seed5.jsonl (cpu, 2 threads, commit unknown)" in shown
    assert read[4].endswith("epochs_to_target = missed")
    assert "differences: seed 1 -3, seed 2 -2, seed 3 -3, seed 4 -2, seed 5 0, a run that missed counts as 4" in lines
    assert any(line.startswith("their mean: -2, 95 % bootstrap interval [") for line in lines)
    assert lines[-1].startswith("verdict: ")


def test_what_the_file_says_otherwise_is_named(results):
    assert follow(results, "epochs-sgd")[1] == ["verdicts.csv has no row epochs-sgd"]
    judge(results)
    assert follow(results, "epochs-sgd")[1] == []
    write(results, "ngplus", 1, HIT_4)
    differences = follow(results, "epochs-sgd")[1]
    assert [line.partition(":")[0] for line in differences] == ["ours"]


def test_an_id_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"claim = 'epoch-sgd': there is no such id in verdicts\.csv; e\.g\. epochs-sgd"
    ):
        follow(RESULTS, "epoch-sgd")


@pytest.mark.parametrize("name", [claim.id for claim in load_claims() if claim.headline])
def test_the_headlines_are_those_of_the_records(name):
    assert follow(RESULTS, name)[1] == []
