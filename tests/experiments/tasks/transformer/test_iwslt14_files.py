"""Files of the archive in miniature: well-formed ones as the recipe takes them, others read or refused by line."""

import re

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.tasks.transformer.iwslt14_files import evaluation_pairs, training_pairs

GERMAN = ["Das ist eins.", "Das ist zwei.", "Und drei."]
ENGLISH = ["That is one.", "That is two.", "And three."]
PAIRS = list(zip(GERMAN, ENGLISH, strict=True))
SET = "TED.tst2010"


def plain(sentences):
    return "".join(f'<seg id="{number}"> {text} </seg>\n' for number, text in enumerate(sentences, 1))


def put_set(folder, german, english=None, *, documents=(7, 7)):
    """The two files of a set; a segment's line is the fourth at first."""
    english = plain(ENGLISH) if english is None else english
    for language, segments, document in zip(("de", "en"), (german, english), documents, strict=True):
        text = (
            f'<?xml version="1.0"?>\n<mteval>\n<doc docid="{document}" genre="lectures">\n{segments}</doc>\n</mteval>\n'
        )
        (folder / f"IWSLT14.{SET}.de-en.{language}.xml").write_bytes(text.encode())


def put_training(folder, german, english):
    for language, text in (("de", german), ("en", english)):
        (folder / f"train.tags.de-en.{language}").write_bytes(text.encode())


# --- dev and test sets

ALIKE = {
    "one quote": lambda text: text.replace('"', "'"),
    "no quotes": lambda text: text.replace('"', ""),
    "capitals": lambda text: text.replace("seg id", "SEG ID").replace("/seg", "/SEG"),
    "blanks": lambda text: text.replace("seg id=", "seg  id = ").replace('">', '" >').replace("</seg>", "</seg >"),
    "other attributes": lambda text: text.replace("id=", 'docid="x" id=').replace('">', '" type="talk">'),
    "two on a line": lambda text: text.replace("\n", " "),
    "side by side": lambda text: text.replace(" </seg>\n", "</seg>"),
    "over two lines": lambda text: text.replace(" ist ", " \n ist\n"),
    "tags on lines of their own": lambda text: text.replace("> ", ">\n").replace(" </", "\n</"),
    "indented": lambda text: text.replace("<seg", "\t  <seg"),
    "of Windows": lambda text: text.replace("\n", "\r\n"),
    "with a byte-order mark": lambda text: "\ufeff" + text,
    "with a comment": lambda text: text.replace("<seg", '<!-- <seg id="0"> not this </seg>\n-->\n<seg', 1),
}


@pytest.mark.parametrize("way", ALIKE)
def test_a_segment_may_be_written_in_other_ways(way, tmp_path):
    put_set(tmp_path, ALIKE[way](plain(GERMAN)))
    assert evaluation_pairs(tmp_path, SET) == PAIRS


def test_entities_and_apostrophes_are_those_of_the_recipe(tmp_path):
    """It changes one kind of apostrophe, and no entity: ``&amp;`` stays as it is before it is tokenised."""
    put_set(tmp_path, plain(["Er hat’s, R&amp;D.", "b", "c"]))
    assert evaluation_pairs(tmp_path, SET)[0][0] == "Er hat's, R&amp;D."


EMPTY = r"segment 2 of document 7 is empty; must hold a sentence"
FAULTS = [
    ('<seg id="2"> Das ist zwei. </seg>', '<seg id="2"> </seg>', f"line 5: {EMPTY}"),
    ('<seg id="2"> Das ist zwei. </seg>', '<seg id="2"></seg>', f"line 5: {EMPTY}"),
    ('<seg id="2"> Das ist zwei. </seg>', '<seg id="2"/>', f"line 5: {EMPTY}"),
    ('<seg id="2">', "<seg>", "line 5: a segment without an id"),
    ("zwei. </seg>", "zwei.", "line 5: a segment must begin with .* and end with </seg>"),
    ("drei. </seg>", "drei.", "line 6: a segment must begin with .* and end with </seg>"),
    ('<seg id="2">', '<!-- <seg id="2">', "line 5: <!-- has no end; must end with -->"),
    ('<seg id="2"> Das', "Das", "line 5: a segment must begin with "),
    (
        'id="2"',
        'id="4"',
        r"de\.xml, line 5 has segment 4 of document 7, but .*en\.xml, line 5 has segment 2 of document 7",
    ),
    ('<seg id="2"> Das ist zwei. </seg>\n', "", "line 5 has segment 3 .* line 5 has segment 2 "),
    ('<seg id="3"> Und drei. </seg>\n', "", r"en\.xml, line 6 has no counterpart: there are 2 German and 3 English"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_a_faulty_segment_is_named_by_file_and_line(old, new, message, tmp_path):
    text = plain(GERMAN)
    assert text.count(old) == 1
    put_set(tmp_path, text.replace(old, new))
    with pytest.raises(DataFileError, match=rf"IWSLT14\.{re.escape(SET)}\.de-en\..*{message}"):
        evaluation_pairs(tmp_path, SET)


def cut_sets(folder, stop):
    """Both languages' files up to the place where the text stands for the last time."""
    for path in folder.glob("*.xml"):
        text = path.read_text()
        path.write_text(text[: text.rindex(stop)])


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ('<seg id="2"', r"de\.xml, line 2: <mteval> has no end; must end with </mteval>: the file is cut short"),
        ("</doc>", r"de\.xml, line 2: <mteval> has no end"),
        ("</mteval>", r"de\.xml, line 2: <mteval> has no end"),
    ],
)
def test_sets_of_which_both_are_cut_between_segments_are_refused(stop, message, tmp_path):
    put_set(tmp_path, plain(GERMAN))
    assert evaluation_pairs(tmp_path, SET) == PAIRS
    cut_sets(tmp_path, stop)
    with pytest.raises(DataFileError, match=message):
        evaluation_pairs(tmp_path, SET)


def test_a_document_without_an_end_is_named_where_nothing_is_around_it(tmp_path):
    for language, segments in (("de", plain(GERMAN)), ("en", plain(ENGLISH))):
        path = tmp_path / f"IWSLT14.{SET}.de-en.{language}.xml"
        path.write_text(f'<doc docid="1">\n{segments}</doc>\n<DOC docid="2">\n{segments}</doc>\n')
    assert evaluation_pairs(tmp_path, SET) == PAIRS * 2
    cut_sets(tmp_path, '<seg id="3"')
    with pytest.raises(DataFileError, match=r"de\.xml, line 6: <doc> has no end; must end with </doc>"):
        evaluation_pairs(tmp_path, SET)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</doc>\n", '<doc docid="8">\n</doc>\n', "line 7: <doc> must come after the end of the one before, </doc>"),
        ("</doc>\n", "</mteval>\n", "line 7: </mteval> where </doc> is to end"),
        ("</mteval>\n", "</mteval>\n</refset>\n", "line 9: </refset> where nothing is to end"),
    ],
)
def test_an_end_that_does_not_fit_is_named(old, new, message, tmp_path):
    put_set(tmp_path, plain(GERMAN))
    for path in tmp_path.glob("*.xml"):
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataFileError, match=rf"de\.xml, {message}"):
        evaluation_pairs(tmp_path, SET)


def test_an_id_that_both_languages_have_twice_is_refused(tmp_path):
    put_set(tmp_path, *(plain(side).replace('id="3"', 'id="2"') for side in (GERMAN, ENGLISH)))
    with pytest.raises(
        DataFileError, match=r"de\.xml, line 6: segment 2 of document 7 is in .*de\.xml, line 5 already; must be there"
    ):
        evaluation_pairs(tmp_path, SET)


def test_documents_without_an_id_may_each_count_from_one(tmp_path):
    for language, segments in (("de", plain(GERMAN)), ("en", plain(ENGLISH))):
        path = tmp_path / f"IWSLT14.{SET}.de-en.{language}.xml"
        path.write_text(f"<mteval>\n<doc>\n{segments}</doc>\n<doc>\n{segments}</doc>\n</mteval>\n")
    assert evaluation_pairs(tmp_path, SET) == PAIRS * 2


def test_a_set_without_segments_is_not_taken_for_an_empty_one(tmp_path):
    put_set(tmp_path, "", "")
    with pytest.raises(DataFileError, match=r"de\.xml: no sentence in its 5 lines"):
        evaluation_pairs(tmp_path, SET)


def test_segments_of_different_talks_are_no_pairs(tmp_path):
    put_set(tmp_path, plain(GERMAN), documents=(7, 8))
    with pytest.raises(DataFileError, match=r"line 4 has segment 1 of document 7, but .* has segment 1 of document 8"):
        evaluation_pairs(tmp_path, SET)


# --- training

HEAD = (
    "<url>http://www.ted.com/talks/x.html</url>\n<keywords>talks, x</keywords>\n<talkid>{talk}</talkid>\n"
    "<title>Title {talk}</title>\n<description>About {talk}.</description>\n"
)


def talks(sentences, *, numbers=(1, 2)):
    return "".join(HEAD.format(talk=talk) + "".join(f"{text}\n" for text in sentences) for talk in numbers)


EXPECTED = [pair for talk in (1, 2) for pair in [(f"Title {talk}",) * 2, (f"About {talk}.",) * 2, *PAIRS]]

LEFT_OUT = {
    "as it is": lambda text: text,
    "after a byte-order mark": lambda text: "\ufeff" + text,
    "after a byte-order mark in the middle": lambda text: text.replace("<url>", "\ufeff<url>"),
    "after blanks": lambda text: re.sub(r"^<", "  \t<", text, flags=re.MULTILINE),
    "in capitals": lambda text: re.sub(r"<[^>]*>", lambda tag: tag[0].upper(), text),
    "of Windows": lambda text: text.replace("\n", "\r\n"),
    "with others": lambda text: (
        text.replace("<talkid>", "<speaker>A</speaker>\n<doc docid='3'>\n<talkid>") + "</doc>\n"
    ),
    "with attributes": lambda text: text.replace("<url>", '<reviewer href="x">B</reviewer>\n<translator/>\n<url>'),
    "within a line": lambda text: text.replace("<talkid>", "Talk: <talkid>"),
}


@pytest.mark.parametrize("way", LEFT_OUT)
def test_no_line_of_tags_is_trained_on(way, tmp_path):
    put_training(tmp_path, LEFT_OUT[way](talks(GERMAN)), talks(ENGLISH))
    assert training_pairs(tmp_path) == EXPECTED


def test_an_empty_line_stays_for_cleaning_as_in_the_recipe(tmp_path):
    put_training(tmp_path, talks(["", *GERMAN]), talks(["a", *ENGLISH]))
    assert ("", "a") in training_pairs(tmp_path)


TRAINING_FAULTS = [
    ("</keywords>", "", r"de, line 2: <keywords> has no end on its line; must end with </keywords> there"),
    (
        "Und drei.\n",
        "",
        r"de, line 11 has a sentence of talk 2, but its counterpart .*en, line 8 has a sentence of talk 1",
    ),
    ("<talkid>1<", "<talkid>9<", r"de, line 4 has a sentence of talk 9, but .*en, line 4 has a sentence of talk 1"),
]


@pytest.mark.parametrize(("old", "new", "message"), TRAINING_FAULTS)
def test_a_faulty_training_line_is_named(old, new, message, tmp_path):
    put_training(tmp_path, talks(GERMAN).replace(old, new, 1), talks(ENGLISH))
    with pytest.raises(DataFileError, match=rf"train\.tags\.de-en\.{message}"):
        training_pairs(tmp_path)


def test_a_line_too_many_is_named_where_its_talk_ends(tmp_path):
    """Where one language lacks a line in one talk and the other in the next, both have equally many."""
    german = talks(GERMAN, numbers=(1,)) + talks(GERMAN[:2], numbers=(2,))
    english = talks(ENGLISH[:2], numbers=(1,)) + talks(ENGLISH, numbers=(2,))
    put_training(tmp_path, german, english)
    with pytest.raises(
        DataFileError, match=r"de, line 8 has a sentence of talk 1, but .*en, line 11 has a sentence of"
    ):
        training_pairs(tmp_path)


@pytest.mark.parametrize("text", ["", "<talkid>1</talkid>\n"])
def test_a_file_without_a_sentence_is_refused(text, tmp_path):
    put_training(tmp_path, text, text)
    with pytest.raises(DataFileError, match=r"train\.tags\.de-en\.de: no sentence in its [01] lines"):
        training_pairs(tmp_path)


@pytest.mark.parametrize("cut", ["german", "english", "both", "the line feed alone"])
def test_a_last_sentence_that_may_be_cut_is_refused(cut, tmp_path):
    german, english = talks(GERMAN), talks(ENGLISH)
    stop = -1 if cut == "the line feed alone" else -4
    put_training(
        tmp_path, german if cut == "english" else german[:stop], english if cut == "german" else english[:stop]
    )
    side = "en" if cut == "english" else "de"
    with pytest.raises(
        DataFileError, match=rf"train\.tags\.de-en\.{side}, line 16: '.*' has no line feed after it: .*may be cut"
    ):
        training_pairs(tmp_path)


def test_a_line_of_tags_at_the_end_needs_no_line_feed(tmp_path):
    """It has an end of its own."""
    put_training(tmp_path, talks(GERMAN) + "</doc>", talks(ENGLISH) + "<talkid>3</talkid>")
    assert training_pairs(tmp_path) == EXPECTED
