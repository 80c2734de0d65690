"""Token files as nanoGPT writes them, and every way in which they may be something else."""

import json

import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text import token_folder
from experiments.data_io.text.byte_bpe import SEPARATOR, learn_bpe
from experiments.data_io.text.documents import Document
from experiments.data_io.text.token_folder import read_token_folder, write_token_folder

SPLITS = {
    "train": [Document("a", "the cat sat on the mat. " * 9), Document("b", "the dog and the cat. " * 5)],
    "val": [Document("c", "the cat. ü")],
    "test": [Document("d", "a dog sat on a cat"), Document("e", "the end")],
}


def nanogpt(folder, *, dtype=np.uint16, **splits):
    """As nanoGPT's ``prepare.py`` writes its files."""
    folder.mkdir(exist_ok=True)
    for split, tokens in splits.items():
        np.array(tokens, dtype=dtype).tofile(folder / f"{split}.bin")
    return folder


def read(folder, vocabulary=50):
    return read_token_folder(folder, vocabulary, "make it again")


def test_documents_follow_one_another_with_a_separator_before_each(tmp_path):
    write_token_folder(SPLITS, 280, tmp_path / "tokens")
    folder = read(tmp_path / "tokens", 280)
    tokenizer = learn_bpe((each.text for each in SPLITS["train"]), 280)
    separator = tokenizer.token_to_id(SEPARATOR)
    for split, documents in SPLITS.items():
        tokens = folder.tokens[split]
        assert tokens.dtype == np.uint16
        starts = np.flatnonzero(tokens == separator)
        assert starts[0] == 0
        texts = [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert texts == [each.text for each in documents]
        assert folder.longest[split] == max(len(part) - 1 for part in np.split(tokens, starts[1:]))
    assert folder.documents == {"train": 2, "val": 1, "test": 2}
    assert folder.text_bytes == {"train": 9 * 24 + 5 * 21, "val": 11, "test": 25}
    assert folder.vocabulary == tokenizer.get_vocab_size() <= 280


def test_nanogpts_own_files_are_read_as_they_are(tmp_path):
    folder = read(nanogpt(tmp_path / "tokens", train=[1, 2, 49, 0], val=[3]))
    assert {split: tokens.tolist() for split, tokens in folder.tokens.items()} == {"train": [1, 2, 49, 0], "val": [3]}
    assert (folder.vocabulary, folder.text_bytes, folder.longest) == (50, {}, {})


def test_the_digest_is_of_the_content(tmp_path):
    first = read(nanogpt(tmp_path / "a", train=[1, 2], val=[3])).sha256
    assert read(nanogpt(tmp_path / "b", train=[1, 2], val=[3])).sha256 == first
    assert read(nanogpt(tmp_path / "c", train=[1, 2], val=[4])).sha256 != first


def test_files_are_checked_once_and_again_when_they_change(tmp_path, monkeypatch):
    folder = nanogpt(tmp_path / "tokens", train=[1, 2], val=[3])
    first = read(folder).sha256
    checked = []
    own = token_folder._check_file
    monkeypatch.setattr(token_folder, "_check_file", lambda *given: checked.append(given[0].name) or own(*given))
    assert read(folder).sha256 == first
    assert checked == []
    nanogpt(folder, train=[1, 2, 3])
    assert read(folder).sha256 != first
    assert checked == ["train.bin", "val.bin"]
    with pytest.raises(DataFileError, match="is not of a vocabulary of 3"):
        read(folder, 3)


@pytest.mark.parametrize("chunk", [2**24, 3])
def test_a_token_of_another_vocabulary_is_named_with_its_place(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(token_folder, "_CHUNK", chunk)
    folder = nanogpt(tmp_path / "tokens", train=[1, 2, 3, 49, 50, 7], val=[3])
    with pytest.raises(DataFileError, match=r"train\.bin: token 50 at place 4 is not of a vocabulary of 50; give"):
        read(folder)
    assert read(folder, 51).vocabulary == 51


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_wider_numbers_are_refused(tmp_path, dtype):
    folder = nanogpt(tmp_path / "tokens", train=[5, 6, 7], val=[3, 4], dtype=dtype)
    with pytest.raises(DataFileError, match=r"every second number is 0, as in uint32, where it must be uint16"):
        read(folder)


def test_an_array_file_and_half_a_number_are_refused(tmp_path):
    folder = nanogpt(tmp_path / "tokens", val=[3])
    with (folder / "train.bin").open("wb") as file:
        np.save(file, np.array([1, 2], np.uint16))
    with pytest.raises(DataFileError, match=r"train\.bin: is not uint16 alone"):
        read(folder)
    (folder / "train.bin").write_bytes(b"\1\0\2")
    with pytest.raises(DataFileError, match=r"train\.bin: is not uint16 alone, as nanoGPT writes it \(3 bytes\)"):
        read(folder)


def test_a_missing_and_an_empty_file_are_named(tmp_path):
    folder = nanogpt(tmp_path / "tokens", train=[1])
    with pytest.raises(DataFileError, match=r"val\.bin is missing: make it again"):
        read(folder)
    nanogpt(folder, val=[])
    with pytest.raises(DataFileError, match=r"val\.bin: is empty: make it again"):
        read(folder)


def test_a_folder_that_says_it_is_of_more_tokens_is_refused(tmp_path):
    folder = nanogpt(tmp_path / "tokens", train=[1], val=[2])
    (folder / "about.json").write_text(json.dumps({"vocabulary": 60}))
    with pytest.raises(DataFileError, match=r"is of 60 tokens, where vocabulary = 50 is asked for"):
        read(folder)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "is damaged, must be a table of JSON: .*: make it again"),
        ("[]", "holds .* must be a table of JSON: make it again"),
        ('{"vocabulary": "50"}', "vocabulary = '50': must be a positive integer: make it again"),
        ('{"vocabulary": 0}', "vocabulary = 0: must be a positive integer: "),
        ('{"text_bytes": 7}', "text_bytes = 7: must be a positive integer for each split: "),
        ('{"text_bytes": {"val": null}}', "text_bytes = .*None.: must be a positive integer for each split"),
        ('{"documents": {"val": "many"}}', "documents = .*many.*: must be a positive integer for each split"),
    ],
)
def test_what_a_folder_says_of_itself_must_be_sizes(about, message, tmp_path):
    """Else bits a byte would be left out of the records, for want of the bytes."""
    folder = nanogpt(tmp_path, train=[1, 2, 3], val=[4, 5])
    (folder / "about.json").write_text(about)
    with pytest.raises(DataFileError, match=rf"about\.json:? {message}"):
        read(folder)


def test_a_folder_that_was_left_half_written_is_made_again(tmp_path, monkeypatch):
    target = tmp_path / "tokens"
    monkeypatch.setattr(token_folder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_token_folder(SPLITS, 280, target)
    assert not target.exists()
    monkeypatch.undo()
    write_token_folder(SPLITS, 280, target)
    assert read(target, 280).documents["train"] == 2
