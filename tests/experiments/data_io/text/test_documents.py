import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.documents import (
    Document,
    count_bytes,
    from_lines,
    list_text_files,
    read_documents,
    split_documents,
    to_lines,
    write_documents,
)

SHARES = {"validation_share": 0.1, "test_share": 0.2, "where": "the collection"}


def write(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(text, encoding="utf-8", newline="")


def documents(count, length=100):
    return [Document(f"page {number}", f"{number:03}" * length) for number in range(count)]


def test_a_folder_is_a_document_a_file_those_in_folders_below_too(tmp_path):
    write(tmp_path, b="Second.\r\n", a="First: ü €.", below__c="Third.", blank=" \n\n")
    (tmp_path / "notes.md").write_text("no text file")
    found = read_documents(tmp_path, list_text_files(tmp_path, ""))
    assert found == [
        Document("a.txt", "First: ü €."),
        Document("b.txt", "Second.\r\n"),
        Document("below/c.txt", "Third."),
    ]
    assert count_bytes(found) == 14 + 9 + 6


def test_hidden_files_are_no_documents_and_a_link_that_leads_nowhere_is_named(tmp_path):
    write(tmp_path, a="First.")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    (tmp_path / "folder.txt").mkdir()
    assert list_text_files(tmp_path, "") == [tmp_path / "a.txt"]
    (tmp_path / "b.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(DataFileError, match=r"b\.txt is a link to .*absent, where there is nothing"):
        list_text_files(tmp_path, "")


def test_a_missing_folder_and_one_without_texts_say_what_to_do(tmp_path):
    with pytest.raises(DataFileError, match=r"absent is missing: put it there"):
        list_text_files(tmp_path / "absent", "put it there")
    (tmp_path / "notes.md").write_text("no text file")
    with pytest.raises(DataFileError, match=r"has no file \*\.txt: put it there"):
        list_text_files(tmp_path, "put it there")


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nf\xfcr\n")
    with pytest.raises(DataFileError, match=r"latin\.txt, line 3: not UTF-8: byte 0xfc"):
        read_documents(tmp_path, [tmp_path / "latin.txt"])


def test_documents_are_the_same_after_writing_and_reading(tmp_path):
    before = [Document("a", 'tab\t "quote"\nline'), Document("ü", "one\u2028two\x85three €")]
    write_documents(before, tmp_path / "documents.jsonl")
    assert from_lines((tmp_path / "documents.jsonl").read_bytes()) == before
    assert to_lines(before).count(b"\n") == 2


def test_no_document_is_cut_and_every_one_is_in_one_split():
    before = documents(40)
    splits = split_documents(before, **SHARES)
    assert sorted(each for split in splits.values() for each in split) == sorted(before)
    assert {name: len(split) for name, split in splits.items()} == {"train": 28, "val": 4, "test": 8}


def test_the_split_depends_on_names_alone():
    before = documents(40)
    splits = split_documents(before, **SHARES)
    assert split_documents(before[::-1], **SHARES) == splits
    other = split_documents([Document(f"other {name}", text) for name, text in before], **SHARES)
    assert {each.text for each in other["test"]} != {each.text for each in splits["test"]}


def test_one_large_document_leaves_one_for_each_other_split():
    for large in range(3):
        before = [Document(str(number), "x" * (10_000 if number == large else 1)) for number in range(3)]
        assert {name: len(split) for name, split in split_documents(before, **SHARES).items()} == {
            "train": 1,
            "val": 1,
            "test": 1,
        }


@pytest.mark.parametrize(("count", "said"), [(0, "0 documents"), (1, "1 document:"), (2, "2 documents")])
def test_too_few_documents_are_refused(count, said):
    with pytest.raises(DataFileError, match=f"the collection: {said}.* there must be 3 at least"):
        split_documents(documents(count), **SHARES)
