import pytest

from experiments.analysis.claims import Arithmetic, Comparison, load_claims
from experiments.errors import UserError

CLAIM = """
[[claims]]
id = "faster"
place = "Table 1"
claim = "NG+ is faster"
paper = "40 epochs"
"""


def written(tmp_path, text):
    path = tmp_path / "paper.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_claim_is_read_with_its_check(tmp_path):
    check = (
        'check = { kind = "comparison", task = "t", measure = "m", optimizer = "a", against = "b", better = "less" }'
    )
    (claim,) = load_claims(written(tmp_path, CLAIM + check))
    assert (claim.id, claim.paper) == ("faster", "40 epochs")
    assert claim.check == Comparison(task="t", measure="m", optimizer="a", against="b", better="less")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (CLAIM, "a claim without a check needs a note"),
        (CLAIM + 'note = "n"\n' + CLAIM + 'note = "n"\n', "id = 'faster' stands there twice"),
        (CLAIM + 'check = { kind = "guess" }', "claim 1 .faster.: check: kind = 'guess': must be one of"),
        (CLAIM + 'check = { kind = "formula", place = 3 }', "place = 3: must be a string"),
        (CLAIM + "pages = 3", "pages = 3: unknown key"),
        ("[[claims]", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        load_claims(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot be read"):
        load_claims(tmp_path / "nowhere.toml")


def test_the_papers_tables_figures_and_theorems_all_have_claims():
    claims = load_claims()
    places = " ".join(claim.place for claim in claims)
    for place in ("abstract", *(f"Figure {k}" for k in range(1, 6)), *(f"Table {k}" for k in range(1, 4))):
        assert place in places
    for place in (
        "Theorem 2",
        "Theorem 3",
        "Theorem 5",
        "Lemma 7",
        *(f"({k})" for k in (9, 11, 12, 13, 14, 15, 16, 17)),
    ):
        assert place in places
    figures = " ".join(f"{claim.claim} {claim.paper}" for claim in claims)
    numbers = "76 74 42 40 10.9 10.7 8.0 6.7 517 521 686 600 200k 25.6k 12.8k 34.79 34.75 79.175 79.149 0.025"
    for figure in numbers.split():
        assert figure in figures
    assert any(isinstance(claim.check, Arithmetic) for claim in claims)
