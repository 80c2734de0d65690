"""Sentence pairs: every fault of a file named with its line, and splits that share no document."""

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.parallel_text import (
    Pair,
    drop_repeats,
    parse_tsv_line,
    read_tsv,
    split_by_document,
    write_tsv,
)


def test_what_was_written_is_read_again(tmp_path):
    pairs = [Pair("a.html", "Öl ist da.", "There is oil."), Pair("b.html", "Ja.", "Yes.")]
    write_tsv(pairs, tmp_path / "pairs.tsv")
    assert read_tsv(tmp_path / "pairs.tsv") == pairs
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]


@pytest.mark.parametrize("line", ["a.html\tnur Deutsch", "a.html\t \tempty German", "a\tb\tc\td", ""])
def test_a_line_without_two_sentences_is_refused(line):
    with pytest.raises(DataFileError, match=r"pairs\.tsv, line 7"):
        parse_tsv_line(line, "pairs.tsv, line 7")


def test_a_sentence_that_came_before_is_left_out_whatever_its_numbers():
    pairs = [
        Pair("a", "Siehe Seite 1.", "See page 1."),
        Pair("b", "siehe Seite 22!", "Look at page 22."),
        Pair("c", "Gehe zu Seite 3.", "See page 3."),
        Pair("d", "Nein.", "No."),
    ]
    assert drop_repeats(pairs) == [pairs[0], pairs[3]]


def documents(count, each):
    return [Pair(f"page {d}", f"de {d} {i}", f"en {d} {i}") for d in range(count) for i in range(each)]


def test_no_document_is_in_two_splits():
    splits = split_by_document(documents(40, 5), train_size=60, validation_size=23, test_size=31)
    names = [{pair.document for pair in part} for part in (splits.train, splits.valid, splits.test)]
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (60, 23, 31)
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]


def test_a_split_depends_on_the_documents_and_not_on_their_order():
    pairs = documents(20, 1)
    sizes = {"train_size": None, "validation_size": 4, "test_size": 5}
    assert split_by_document(pairs, **sizes) == split_by_document(pairs[::-1], **sizes)


def test_the_training_split_is_all_that_is_left():
    splits = split_by_document(documents(20, 1), train_size=None, validation_size=4, test_size=5)
    assert len(splits.train) == 11


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"train_size": None, "validation_size": 4, "test_size": 99}, "test_size = 99"),
        ({"train_size": None, "validation_size": 99, "test_size": 4}, "validation_size = 99"),
        ({"train_size": 99, "validation_size": 4, "test_size": 4}, "train_size = 99"),
        ({"train_size": None, "validation_size": 10, "test_size": 10}, "train_size = None"),
    ],
)
def test_too_few_pairs_are_refused_by_the_size_that_asks_for_them(sizes, name):
    with pytest.raises(ValueError, match=name):
        split_by_document(documents(20, 1), **sizes)
