"""docs/supported.md names tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent.parent / "docs" / "supported.md"


def test_every_test_that_the_document_names_is_there():
    text = DOCUMENT.read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()]
    assert len(named) > 40
    assert not missing
