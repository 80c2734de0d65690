"""What the front page says is what the records say, and what it points to is there."""

import re
from pathlib import Path

import pytest

from experiments.analysis.verdict_table import render
from experiments.analysis.verdicts import verdicts_of
from experiments.provenance import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_the_verdicts_on_the_front_page_are_those_of_the_records():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- verdicts: .*? -->\n(.*?)\n<!-- end of verdicts -->", text, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == render(verdicts_of(REPOSITORY / "results"), "markdown", short=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / Path(target)).exists()]
    assert not missing
