"""docs/errata.md and docs/method.md name checks and files that exist, and leave no check out."""

import re

import pytest

from experiments.records.provenance import REPOSITORY
from experiments.theory import convergence, errata, regret

DOCS = REPOSITORY / "docs"
CHECKS = (*errata.FORMULAS, *convergence.THEOREMS, *regret.THEOREM)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_stands_on_the_page(check):
    assert f"`{check.__name__}`" in (DOCS / "errata.md").read_text()


def test_every_named_check_exists():
    page = (DOCS / "errata.md").read_text()
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^Checks?: [^\[\n]*", page, flags=re.MULTILINE)))
    assert len(named) > 15
    for name in named:
        assert any(hasattr(module, name) for module in (errata, convergence, regret)), name


@pytest.mark.parametrize("page", ["errata.md", "method.md"])
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / target).resolve().exists(), target
