"""What the front page says is what the records say, and what it points to is there."""

import re
from pathlib import Path

import pytest

from experiments.analysis.overview import overview
from experiments.analysis.verdict_table import render
from experiments.analysis.verdicts import judge_claims
from experiments.cli import listing
from experiments.records.provenance import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def block(name: str) -> str:
    """What stands on the front page between two comments of this name."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name}: .*? -->\n(.*?)\n<!-- end of {name} -->", text, flags=re.DOTALL)
    assert shown is not None
    return shown[1]


def test_the_verdicts_on_the_front_page_are_those_of_the_records():
    assert block("verdicts") == render(judge_claims(REPOSITORY / "results"), "markdown", short=True)


def test_the_overview_on_the_front_page_is_that_of_the_records():
    results = REPOSITORY / "results"
    assert block("overview") == overview(results, listing.tasks_with_runs(results, "small"), "small")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / Path(target)).exists()]
    assert not missing
