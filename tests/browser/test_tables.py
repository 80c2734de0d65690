"""Tables that are wider than a phone scroll by themselves, and show that they do, in the report and in the docs."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.records.provenance import REPOSITORY

pytestmark = pytest.mark.browser

PHONE = 390


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """The documentation, built."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", str(REPOSITORY / "docs"), str(folder)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(params=["light", "dark"])
def open_on_phone(request, browser):
    contexts = []

    def call(path):
        contexts.append(browser.new_context(viewport={"width": PHONE, "height": 900}, color_scheme=request.param))
        page = contexts[-1].new_page()
        page.goto(path.as_uri())
        return page

    yield call
    for context in contexts:
        context.close()


def right_edge(box):
    """The usual brightness at the right of a box."""
    picture = np.asarray(Image.open(io.BytesIO(box.screenshot())).convert("L"), dtype=float)
    return np.median(picture[:, -8:-3])


def check_tables(page, selector):
    """The page fits the screen; the first table that does not has a shadow there, until it is moved to its end."""
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [box for box in page.locator(selector).all() if box.is_visible()]
    wide = [box for box in boxes if box.evaluate("box => box.scrollWidth > box.clientWidth + 40")]
    assert wide
    before = right_edge(wide[0])
    wide[0].evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert abs(before - right_edge(wide[0])) > 20


def test_a_table_of_the_report_shows_that_it_goes_on(open_on_phone, pages):
    check_tables(open_on_phone(pages["recorded"]), ".scroll")


@pytest.mark.parametrize("name", ["results", "costs", "claims"])
def test_a_table_of_the_docs_shows_that_it_goes_on(open_on_phone, docs, name):
    check_tables(open_on_phone(docs / f"{name}.html"), ".table-wrapper")
