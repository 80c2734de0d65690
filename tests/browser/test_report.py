"""The report in a headless Chromium, on a phone and on a desktop, light and dark."""

from itertools import pairwise, product
from urllib.parse import unquote

import pytest
from axe_playwright_python.sync_playwright import Axe

pytestmark = pytest.mark.browser

PHONE, DESKTOP = 390, 1280
VIEWS = [
    *product(("made",), (PHONE, DESKTOP), ("light", "dark")),
    ("recorded", PHONE, "dark"),  # large: each width and each scheme once
    ("recorded", DESKTOP, "light"),
]


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: "-".join(map(str, view)))
def opened(request, open_page):
    """One page in one view; its tests only look."""
    found = open_page(*request.param)
    yield found
    found.page.context.close()


@pytest.fixture
def fresh(open_page):
    """The made-up results on a desktop, for a test that changes something."""
    found = open_page("made", DESKTOP, "light")
    yield found
    found.page.context.close()


def test_it_loads_without_a_word_on_the_console(opened):
    assert opened.said == []


def test_nothing_is_asked_for_but_the_file_itself(opened):
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.path.as_uri()]


def test_every_figure_is_drawn_with_marks_and_has_a_name(opened):
    drawn = opened.page.evaluate("""() => [...document.querySelectorAll('[data-chart]')].map((chart) => {
        const svg = chart.querySelector('svg');
        return {
            id: chart.id,
            marks: chart.querySelectorAll('svg g[class*="mark-"]:not([class*="mark-group"]) :is(path, rect)').length,
            name: chart.getAttribute('aria-label'),
            width: svg ? svg.getBoundingClientRect().width : 0,
            room: chart.clientWidth,
        };
    })""")
    assert len(drawn) > 8
    for chart in drawn:
        assert chart["marks"] > 0, chart
        assert chart["name"], chart
        assert 0 < chart["width"] <= chart["room"] + 1, chart


def test_pictures_are_there_and_have_a_text(opened):
    pictures = opened.page.evaluate("""() => [...document.images].map((image) =>
        ({ alt: image.alt, width: image.naturalWidth, complete: image.complete }))""")
    assert pictures
    assert all(each["alt"] and each["width"] and each["complete"] for each in pictures)


def test_every_link_leads_somewhere(opened):
    addresses = opened.page.evaluate("() => [...document.querySelectorAll('a')].map((a) => a.getAttribute('href'))")
    ids = set(opened.page.evaluate("() => [...document.querySelectorAll('[id]')].map((each) => each.id)"))
    assert len(addresses) > 10
    for address in addresses:
        if address.startswith("#"):
            assert address[1:] in ids
        else:
            assert (opened.path.parent / unquote(address)).is_file(), address


def test_the_page_itself_does_not_scroll_sideways(opened):
    assert opened.page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_headings_go_down_one_level_at_a_time(opened):
    levels = opened.page.evaluate("""() => [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')]
        .map((heading) => Number(heading.tagName[1]))""")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


@pytest.mark.parametrize(
    "view",
    [
        ("recorded", DESKTOP, "light"),
        ("made", PHONE, "light"),
        ("made", PHONE, "dark"),
        ("made", DESKTOP, "dark"),
    ],
    ids=str,
)
def test_axe_finds_nothing(open_page, view):
    opened = open_page(*view)
    found = Axe().run(opened.page)
    assert found.violations_count == 0, found.generate_report()
    opened.page.context.close()


def test_the_first_screen_of_a_phone_has_the_verdicts(open_page):
    opened = open_page("made", PHONE, "light")
    place = opened.page.locator(".tally").bounding_box()
    assert place["y"] + place["height"] < 900
    opened.page.context.close()


def test_text_in_a_record_does_nothing(open_page):
    opened = open_page("spoilt", DESKTOP, "light")
    assert opened.said == []
    assert "alert(1)" in opened.page.locator("#schnet-qm9").inner_text()
    assert "bold" in opened.page.locator("#left-out").inner_text()
    opened.page.context.close()


def test_without_scripts_everything_can_be_read(open_page):
    opened = open_page("made", DESKTOP, "light", java_script_enabled=False)
    assert opened.page.locator("#verdicts tbody tr:visible").count() == 4
    assert opened.page.locator(".controls:visible").count() == 0
    assert opened.page.get_by_text("The drawing needs JavaScript").first.is_visible()
    opened.page.get_by_text("Data", exact=True).first.click()
    assert opened.page.locator(".chart details[open] td:visible").count() > 0
    opened.page.context.close()


def test_epochs_and_seconds_are_switched_by_keyboard(fresh):
    page = fresh.page
    chart = page.locator("#resnet50-imagenet-tiny-curves-1")
    lines = "g.mark-line path[stroke]"
    before, title = chart.locator(lines).first.get_attribute("d"), chart.get_by_text("epochs")
    assert title.count() == 1
    page.locator("#resnet50-imagenet-tiny-curves [data-by]:checked").focus()
    page.keyboard.press("ArrowRight")
    chart.get_by_text("seconds of training").wait_for()
    assert chart.locator(lines).first.get_attribute("d") != before


def test_an_optimizer_is_left_out_by_keyboard_and_comes_back(fresh):
    page = fresh.page
    lines = page.locator("#resnet50-imagenet-tiny-curves-2 g.mark-line path[stroke]")
    assert lines.count() == 3
    page.locator('#resnet50-imagenet-tiny-curves [data-shown][value="sgd"]').focus()
    page.keyboard.press("Space")
    page.wait_for_timeout(100)
    assert lines.count() == 2
    page.keyboard.press("Space")
    page.wait_for_timeout(100)
    assert lines.count() == 3


def test_verdicts_are_filtered_by_keyboard(fresh):
    page = fresh.page
    rows = page.locator("#verdicts tbody tr:visible")
    assert rows.count() == 4
    page.locator("#show-all").focus()
    page.keyboard.press("ArrowRight")
    assert rows.count() == 1
    assert "reproduced" in rows.first.inner_text()


def test_tab_reaches_every_control_and_the_skip_link_first(fresh):
    page = fresh.page
    reached = []
    for _ in range(400):
        page.keyboard.press("Tab")
        at = page.evaluate("() => { const e = document.activeElement; return e.id || e.name || e.className; }")
        reached.append(at)
        if "resnet50-imagenet-tiny-trials-shown" in reached:
            break
    assert reached[0] == "skip"
    assert "show-all" in reached
    assert "resnet50-imagenet-tiny-curves-by" in reached
    assert reached.count("resnet50-imagenet-tiny-curves-shown") == 3


def test_hovering_reads_out_a_point(fresh):
    page = fresh.page
    page.locator("#resnet50-imagenet-tiny-curves-2 svg").scroll_into_view_if_needed()
    page.locator("#resnet50-imagenet-tiny-curves-2 svg").hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    said = page.locator("#vg-tooltip-element").inner_text()
    assert "optimizer" in said
    assert "median" in said


def test_charts_follow_the_colour_scheme(fresh):
    page = fresh.page
    label = page.locator("#resnet50-imagenet-tiny-curves-1 g.role-axis-label text").first
    light = label.get_attribute("fill")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-charts=dark]", state="attached")
    assert label.get_attribute("fill") != light
    assert fresh.said == []
