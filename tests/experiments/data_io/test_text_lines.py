"""Lines of text files and what is listed in a folder: every fault is named."""

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text_lines import ends_its_last_line, read_lines, shown_files


def test_lines_end_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("eins\u2028noch\r\n\nzwei".encode())
    assert read_lines(path) == ["eins\u2028noch", "", "zwei"]


def test_bytes_that_are_not_utf8_are_named_by_line_and_column(tmp_path):
    path = tmp_path / "text.de"
    path.write_bytes(b"gut\nm\xfcde\n")
    with pytest.raises(DataFileError, match=r"text\.de, line 2: not UTF-8: byte 0xfc at column 2"):
        read_lines(path)


@pytest.mark.parametrize(("text", "ends"), [("", True), ("a\n", True), ("\n", True), ("a", False), ("a\nb", False)])
def test_a_last_line_that_may_be_cut_is_told(text, ends, tmp_path):
    (tmp_path / "text").write_text(text)
    assert ends_its_last_line(tmp_path / "text") == ends


def test_hidden_files_are_not_listed_and_what_is_no_file_is_named(tmp_path):
    for name in ("b.txt", "a.txt", "._a.txt"):
        (tmp_path / name).touch()
    assert shown_files(tmp_path.glob("*.txt")) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(DataFileError, match=r"c\.txt is a folder; must be a file"):
        shown_files(tmp_path.glob("*.txt"))


def test_a_path_that_is_no_file_is_named(tmp_path):
    with pytest.raises(DataFileError, match="absent is missing"):
        read_lines(tmp_path / "absent")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(DataFileError, match=r"link is a link to .*absent, where there is nothing; must be a file"):
        read_lines(tmp_path / "link")
