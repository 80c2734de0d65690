"""The tables of the front page and of the claims are those of the records, and what a page links to is there."""

import re
from collections import Counter
from pathlib import Path

import pytest

from experiments.analysis import comparison_table
from experiments.analysis.comparable_runs import load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.leaders import load_leaders, table
from experiments.analysis.overview import overview
from experiments.analysis.verdict_table import render
from experiments.analysis.verdicts import judge_claims
from experiments.cli import listing
from experiments.records.provenance import REPOSITORY

README = REPOSITORY / "README.md"
CLAIMS = REPOSITORY / "docs" / "claims.md"
RESULTS = REPOSITORY / "docs" / "results.md"
WHICH = REPOSITORY / "docs" / "which.md"
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


def block(page: Path, name: str) -> str:
    """What is on a page between two comments of this name, of which there is one pair."""
    text = page.read_text(encoding="utf-8")
    [shown] = re.findall(rf"<!-- {name}: .*? -->\n(.*?)\n<!-- end of {name} -->", text, flags=re.DOTALL)
    return shown


def anchors(page: Path) -> set[str]:
    """The anchors that the headings of a page have, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_verdicts_on_the_page_of_claims_are_those_of_the_records():
    assert block(CLAIMS, "verdicts") == render(judge_claims(REPOSITORY / "results"), "markdown", short=True)


def test_the_overviews_are_those_of_the_records():
    results = REPOSITORY / "results"
    for page, name, scale in ((README, "overview", "small-wide"), (RESULTS, "overview of the first round", "small")):
        assert block(page, name) == overview(results, listing.tasks_with_runs(results, scale), scale)


def test_the_leaders_are_those_of_the_records():
    results = REPOSITORY / "results"
    for page, name, scale in ((WHICH, "leaders", "small-wide"), (RESULTS, "leaders of the first round", "small")):
        found = load_leaders(results, listing.tasks_with_runs(results, scale), scale)
        assert block(page, name) == table(found, "markdown")


TABLES = {
    "small-wide": {
        "dlrm-criteo": "second round on flights",
        "schnet-matproj": "second round on crystals",
        "schnet-qm9": "second round on molecules",
        "transformer-iwslt14": "second round on sentences",
        "gpt-text": "second round on text",
    },
    "small-long": {"gpt-text": "long runs on text"},
}


@pytest.mark.parametrize("scale", TABLES)
def test_the_tables_of_a_scale_are_those_of_the_records(scale):
    results, names = REPOSITORY / "results", TABLES[scale]
    assert listing.tasks_with_runs(results, scale) == list(names)
    for task, name in names.items():
        comparison = summarise(load_comparable(results, task, scale))
        assert block(RESULTS, name) == comparison_table.render(comparison, "markdown")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_nothing_twice(page):
    """No long line stands on a page again, as those of a section that was put in a second time do.

    What a command has written is left out: `block` sees that it is there once.
    """
    text = re.sub(
        r"<!-- ([^:\n]+): .*? -->\n.*?<!-- end of \1 -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    lines = [line for line in text.splitlines() if len(line) > 100]
    assert not [line for line, count in Counter(lines).items() if count > 1 and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8"))
    own = [
        (page.parent / Path(target) if target else page, anchor) for target, anchor in targets if "://" not in target
    ]
    assert not [target for target, _ in own if not target.exists()]
    assert not [f"{target}#{anchor}" for target, anchor in own if anchor and anchor not in anchors(target)]


def test_the_front_page_counts_the_verdicts_as_the_page_of_claims_does():
    last = block(CLAIMS, "verdicts").splitlines()[-1]
    whole, reproduced, not_reproduced, inconclusive, not_run = re.findall(r"\d+", last)
    counts = (
        f"of {whole} claims {reproduced} are reproduced, {not_reproduced} not, {inconclusive} are inconclusive, "
        f"{not_run} not run"
    )
    assert counts in " ".join(README.read_text(encoding="utf-8").split())
