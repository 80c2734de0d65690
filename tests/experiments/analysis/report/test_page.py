import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import vl_convert

from experiments.analysis import comparison_table
from experiments.analysis.comparable_runs import load_comparable
from experiments.analysis.comparison import summarise
from experiments.analysis.report import build
from experiments.analysis.report.results_folder import SCALES
from experiments.analysis.report.sections.task_section import TITLES
from experiments.errors import UserError
from experiments.tasks import TASKS
from tests.experiments.cases import whole_results
from tests.experiments.cases.handwritten_records import HIT_1, SCALE, TASK, write


class Page(HTMLParser):
    """The page as a browser's parser would take it apart."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.grids: list[tuple[str, list[list[str]]]] = []
        self.texts: list[str] = []
        self.specs: list[dict] = []
        self._open: list[str] = []
        self._caption, self._in_cell = "", False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "thead":
            self.grids.append((self._caption, []))
        elif tag == "tr":
            self.grids[-1][1].append([])
        elif tag in ("td", "th"):
            self.grids[-1][1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            if dict(self.tags[-1][1]).get("type") == "application/json":
                self.specs.append(json.loads(data))
        elif inside != "style":
            self.texts.append(data)
            if "caption" in self._open:
                self._caption += data
            elif self._in_cell:
                self.grids[-1][1][-1][-1] += data

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for own, rows in self.grids if own.startswith(caption))

    def found(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return whole_results.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def page(results):
    return Page(build(results))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    return Page(build(whole_results.spoilt(tmp_path_factory.mktemp("spoilt"))))


def test_the_same_records_give_the_same_bytes_wherever_they_lie(results, page, tmp_path, monkeypatch):
    first = (results / "report" / "index.html").read_bytes()
    moved = tmp_path / "elsewhere"
    shutil.copytree(results, moved, ignore=shutil.ignore_patterns("report"))
    monkeypatch.chdir(tmp_path)
    assert build(Path("elsewhere")).read_bytes() == first
    assert build(moved).read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_the_page_shows_the_numbers_of_the_terminal_table(results, page):
    frame = summarise(load_comparable(results, TASK, SCALE))
    header, rows = comparison_table.cells(frame)
    assert page.table(comparison_table.title(frame)) == [header, *rows]


def test_every_row_of_every_table_is_as_long_as_its_header(page):
    for caption, rows in page.grids:
        assert len({len(row) for row in rows}) == 1, caption


def test_every_chart_compiles_and_has_its_table(page):
    charts = [attributes for attributes in page.found("div") if "data-chart" in attributes]
    assert len(charts) == len(page.specs) > 8
    for spec in page.specs:
        assert vl_convert.vegalite_to_vega(spec)["marks"]
        assert spec["description"]
    assert len(page.found("details")) >= len(charts)


def test_verdicts_are_counted(page):
    claims = page.table("Claims of the paper")
    assert [row[1] for row in claims[1:]] == ["reproduced", "not reproduced", "inconclusive", "not run"]
    assert "Numbers and claims of the paper, 4 in all" in page.text


def test_what_is_missing_is_said(page):
    targets = {"schnet-qm9": "qm9", "schnet-matproj": "matproj", "transformer-iwslt14": "iwslt14", "gpt-text": "gpt"}
    for task in set(TASKS) - {TASK, whole_results.OTHER_TASK}:
        for scale in SCALES:
            command = f"reproduce-{targets[task]} SCALE={scale}"
            assert f"Scale {scale}: nothing is recorded here. Rerun: make {command}" in page.text
    assert "No sensitivity grid was run here." in page.text
    assert "No settings were searched here." in page.text
    assert "every record and file could be read" in page.text


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path):
    found = Page(build(tmp_path)).text
    for sentence in ("There are no verdicts here", "No bench was run here", "The errata were not checked here"):
        assert sentence in found


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        build(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "message",
    [
        f"{TASK}/tiny/runs/junk-seed1.jsonl, line 1: not JSON",
        f"{TASK}/tiny/runs/binary-seed1.jsonl, line 1: not JSON",
        f"{TASK}/tiny/runs/cut-seed1.jsonl, line 1: not a run record",
        f"{TASK}/tiny/runs/foreign-seed1.jsonl: is a run of another at scale tiny; left out",
        f"{TASK}/tiny/runs/unfinished-seed1.jsonl: is unfinished; left out",
        f"{TASK}/tiny/tuning.csv: has no column split, epochs; left out",
        "bench/torn.csv: cannot be read",
        "theory/figure1/broken.png: is no image that can be read",
        "verdicts.csv: five: 'maybe' is no verdict; left out",
        "<b>bold: is no task of this repository",
    ],
)
def test_what_is_damaged_or_foreign_is_named_and_the_rest_goes_on(spoilt, message):
    assert message in spoilt.text


def test_the_rest_is_as_if_the_damaged_were_not_there(spoilt, page):
    assert spoilt.table(f"{TASK}, scale") == page.table(f"{TASK}, scale")


def test_text_in_a_record_stays_text(spoilt):
    assert whole_results.HOSTILE in spoilt.text
    assert len([each for each in spoilt.found("script") if each.get("type") != "application/json"]) == 2
    assert not [attributes for _, attributes in spoilt.tags if any(name.startswith("on") for name in attributes)]
    assert all(attributes["src"].startswith("data:image/webp;base64,") for attributes in spoilt.found("img"))
    assert not spoilt.found("b")


def test_text_in_a_chart_cannot_end_its_script(tmp_path):
    record = write(tmp_path, "ngplus", 1, HIT_1)
    record.write_text(record.read_text().replace('"top1"', json.dumps(whole_results.HOSTILE)))
    found = Page(build(tmp_path))
    assert any(
        whole_results.HOSTILE in json.dumps(spec, ensure_ascii=False).replace('\\"', '"') for spec in found.specs
    )
    assert len([each for each in found.found("script") if each.get("type") != "application/json"]) == 2


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"seconds": 8.0', '"seconds": NaN'),
        ('"seconds": 8.0', '"seconds": Infinity'),
        ('"metric": 0.84', '"metric": 1e308'),
        ('"run": {"report_split": "test"}', '"run": 3'),
        ('"versions": {"torch": "2"}', '"versions": {"torch": ["2"]}'),
        ('"epochs": 4', '"epochs": -4'),
    ],
)
def test_a_record_with_odd_values_does_not_keep_the_page_from_being_made(tmp_path, written, instead):
    record = write(tmp_path, "ngplus", 1, HIT_1)
    write(tmp_path, "sgd", 1, HIT_1)
    assert written in record.read_text()
    record.write_text(record.read_text().replace(written, instead))
    assert "Left out" in Page(build(tmp_path)).text


def test_links_and_labels_lead_somewhere(results, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.found("a"):
        address = attributes["href"]
        if address.startswith("#"):
            assert address[1:] in ids
        else:
            assert (results / "report" / unquote(address)).exists(), address
    for _, attributes in page.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids


def test_every_task_has_a_section():
    assert set(TITLES) == set(TASKS)


def test_the_load_of_the_machine_is_said_of_the_runs_that_know_it(tmp_path):
    paths = [write(tmp_path, "sgd", seed, [0.1, 0.2, 0.3, 0.7, 0.9]) for seed in (1, 2, 3)]
    for path, load in zip(paths, (0.5, 1.25), strict=False):
        path.write_text(path.read_text().replace('"finished"', f'"finished", "load": {load}'))
    page = build(tmp_path).read_text()
    assert "Of 2 of 3 the machine&#39;s load is known: 0.5 to 1.2 processes to a processor." in page
