import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from experiments.analysis.report import build
from experiments.records.provenance import REPOSITORY
from tests.experiments.cases import whole_results


@dataclass
class Opened:
    """A page as it was opened, with everything it said and asked for."""

    page: Page
    path: Path
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path: what `make test-browser` found, or what the script finds."""
    if found := os.environ.get("CHROMIUM"):
        return found
    done = subprocess.run(["sh", REPOSITORY / "scripts" / "chromium.sh"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stderr, pytrace=False)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def browser(chromium) -> Iterator[Browser]:
    # A container's root cannot have the sandbox; the page is our own.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of the recorded results, of made-up ones, and of damaged and hostile ones."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(REPOSITORY / "results", folder / "recorded", ignore=shutil.ignore_patterns("report"))
    return {
        "recorded": build(folder / "recorded"),
        "made": build(whole_results.whole(folder / "made")),
        "spoilt": build(whole_results.spoilt(folder / "spoilt")),
    }


@pytest.fixture(scope="session")
def open_page(browser, pages):
    """Open a page at a width and a colour scheme, and wait until its charts are drawn."""

    def call(name: str, width: int, scheme: str, **options) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        opened = Opened(page=context.new_page(), path=pages[name])
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.said.append(f"dialog: {dialog.message}"))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(pages[name].as_uri())
        if options.get("java_script_enabled", True):
            opened.page.wait_for_selector(f"html[data-charts={scheme}]", state="attached", timeout=60_000)
        return opened

    return call
