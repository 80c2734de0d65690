"""The pages name tests that are there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent.parent / "docs"


@pytest.mark.parametrize(("page", "least"), [("supported.md", 40), ("options.md", 8), ("sharded.md", 8)])
def test_every_test_that_a_page_names_is_there(page, least):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / page).read_text())
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()]
    assert len(named) > least
    assert not missing
