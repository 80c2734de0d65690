"""Lines in the layout of Ding's dictionary file."""

import pytest

from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.data_io.text.parallel_text import Pair
from experiments.tasks.transformer import ding

TEXT = """# Version :: devel
Aal {m} [zool.] | Er mag Aal {m} nicht. :: eel | He does not [coll.] like eel <eels>.
Hund {m} | Der Hund bellt laut. :: dog | The dog barks loudly.
mögen | etw. mögen Sie sehr. :: to like | You like sth. a lot.

Wort {n} | Er nahm ihn/sie mit. | Der HUND bellt laut! :: word | He took him along. | Loud is the dog.
"""


def write(tmp_path, text):
    path = tmp_path / "de-en"
    path.write_text(text, encoding="utf-8")
    return path


def test_whole_sentences_are_taken_without_their_remarks(tmp_path):
    assert ding.read_pairs(write(tmp_path, TEXT)) == [
        Pair("line 2", "Er mag Aal nicht.", "He does not like eel."),
        Pair("line 3", "Der Hund bellt laut.", "The dog barks loudly."),
    ]


@pytest.mark.parametrize("line", ["nur Deutsch", "a :: b :: c", "a | b :: c"])
def test_a_line_with_unequal_sides_is_named(tmp_path, line):
    with pytest.raises(DataFileError, match="de-en, line 2"):
        ding.read_pairs(write(tmp_path, f"# Ding\n{line}\n"))


def test_preparing_freezes_the_pairs(tmp_path, monkeypatch):
    def package(_, scratch):
        path = scratch / "trans-de-en" / "usr/share/trans"
        path.mkdir(parents=True, exist_ok=True)
        write(path, TEXT)
        return scratch / "trans-de-en"

    monkeypatch.setattr(ding, "debian_package", package)
    with pytest.raises(DataFileError, match="of another version"):
        ding.prepare(tmp_path)
    made = tmp_path / "ding" / "pairs.tsv"
    monkeypatch.setattr(ding, "SHA256", compute_sha256(made))
    assert ding.prepare(tmp_path) == made
    assert len(ding.load(tmp_path)) == 2
