"""Help pages in the layout of the Debian packages, and the embedded sample."""

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.parallel_text import Pair
from experiments.tasks.transformer import libreoffice_help

PAGE = '<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>{}</body></html>'


def page(root, name, body):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(body), encoding="utf-8")


@pytest.fixture
def trees(tmp_path):
    return tmp_path / "de", tmp_path / "en"


def test_paragraphs_of_one_id_are_paired_sentence_by_sentence(trees):
    german, english = trees
    page(
        german,
        "scalc/a.html",
        '<h1 id="hd_id1">Öffnen einer Datei</h1>'  # no sentence
        '<p id="par_id1" class="paragraph">Wählen Sie <span class="emph">Öffnen</span>\n im Menü. '
        "Die Datei wird geöffnet.</p>"
        '<p id="par_id2">Diesen Satz gibt es nur hier.</p>'
        "<p>Ohne Kennung steht dieser Satz da.</p>",
    )
    page(
        english,
        "scalc/a.html",
        '<h1 id="hd_id1">Opening a file</h1>'
        '<p id="par_id1">Choose <span>Open</span> in the menu. The file is opened.</p>'
        "<p>This sentence has no id either.</p>",
    )
    page(german, "nur-deutsch.html", '<p id="par_id1">Diese Seite ist nicht übersetzt.</p>')
    assert libreoffice_help.read_pairs(german, english) == [
        Pair("scalc/a.html", "Wählen Sie Öffnen im Menü.", "Choose Open in the menu."),
        Pair("scalc/a.html", "Die Datei wird geöffnet.", "The file is opened."),
    ]


def test_of_hidden_variants_the_default_one_is_read(trees):
    switch = (
        'Choose <span class="switchinline"><span hidden="true" id="MACx_1">{}</span>'
        '<span hidden="true" id="defaultx_1">{}</span></span> and wait.'
    )
    for root, words in zip(trees, [("Einstellungen", "Optionen"), ("Preferences", "Options")], strict=True):
        page(root, "a.html", f'<p id="p">{switch.format(*words)}<!-- no text --></p>')
    assert libreoffice_help.read_pairs(*trees) == [
        Pair("a.html", "Choose Optionen and wait.", "Choose Options and wait.")
    ]


@pytest.mark.parametrize(
    ("de", "en"),
    [
        ("Ein Satz ist dies. Und noch ein zweiter.", "This is one sentence only."),
        ("Wählen Sie das Menü aus", "Choose one of the menus."),
        ("Sub Main call it now.", "Sub Main call it now."),
        ("Nur drei Wörter.", "Just three words."),
        (
            "Das ist ein kurzer Satz.",
            "This is by far too long a sentence to be the translation of that, is it not, my friend.",
        ),
    ],
)
def test_what_is_no_translated_sentence_is_left_out(trees, de, en):
    for root, text in zip(trees, (de, en), strict=True):
        page(root, "a.html", f'<p id="1">{text}</p><p id="2">Dieser ist gut {root.name}.</p>')
    assert [pair.de for pair in libreoffice_help.read_pairs(*trees)] == ["Dieser ist gut de."]


def test_trees_without_a_common_page_are_refused(trees):
    page(trees[0], "a.html", "")
    page(trees[1], "b.html", "")
    with pytest.raises(DataFileError, match="no page in common"):
        libreoffice_help.read_pairs(*trees)


def test_preparing_fetches_both_packages_and_freezes_the_pairs(tmp_path, monkeypatch):
    def package(name, scratch):
        language = {"libreoffice-help-de": "de", "libreoffice-help-en-us": "en-US"}[name]
        text = "Das ist ein Satz." if language == "de" else "This is a sentence."
        page(scratch / name / "usr/share/libreoffice/help" / language / "text", "a.html", f'<p id="1">{text}</p>')
        return scratch / name

    monkeypatch.setattr(libreoffice_help, "debian_package", package)
    with pytest.raises(DataFileError, match="of another version than"):
        libreoffice_help.prepare(tmp_path)
    made = tmp_path / "libreoffice-help" / "pairs.tsv"
    monkeypatch.setattr(libreoffice_help, "SHA256", libreoffice_help.compute_sha256(made))
    made.write_text("damaged")
    assert libreoffice_help.prepare(tmp_path) == made
    assert libreoffice_help.load(tmp_path) == [Pair("a.html", "Das ist ein Satz.", "This is a sentence.")]
    monkeypatch.setattr(libreoffice_help, "debian_package", None)
    assert libreoffice_help.prepare(tmp_path) == made  # it is there: nothing is fetched


def test_missing_pairs_are_named_with_what_fetches_them(tmp_path):
    with pytest.raises(DataFileError, match="make data-libreoffice-help"):
        libreoffice_help.load(tmp_path)


def test_the_embedded_sample_is_whole():
    pairs = libreoffice_help.load_embedded()
    assert len(pairs) >= libreoffice_help.EMBEDDED_PAIRS
    assert len({pair.de for pair in pairs}) == len(pairs)


def test_the_sample_is_whole_pages_and_makes_the_same_file_again(tmp_path, monkeypatch):
    pairs = [Pair(f"page {d}", f"de {d} {i}", f"en {d} {i}") for d in range(9) for i in range(5)]
    monkeypatch.setattr(libreoffice_help, "load", lambda _: pairs)
    monkeypatch.setattr(libreoffice_help, "EMBEDDED_PAIRS", 12)
    drawn = libreoffice_help.draw_embedded(tmp_path)
    pages = {pair.document for pair in drawn}
    assert len(pages) == 3
    assert drawn == [pair for pair in pairs if pair.document in pages]
    digests = {libreoffice_help.write_embedded(drawn, tmp_path / name) for name in ("a", "b")}
    monkeypatch.setattr(libreoffice_help, "EMBEDDED", tmp_path / "a")
    monkeypatch.setattr(libreoffice_help, "EMBEDDED_SHA256", *digests)
    assert libreoffice_help.load_embedded() == drawn
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(DataFileError, match="restore it from version control"):
        libreoffice_help.load_embedded()
