"""Token files in nanoGPT's format: written out of documents, and mapped from disk with every fault named.

``train.bin``, ``val.bin`` and, if there is one, ``test.bin`` are token numbers, uint16, one document after the other
and nothing else. A folder that was written here also has ``tokenizer.json`` and ``about.json``; in one from elsewhere
nothing says how many bytes of text its tokens stand for.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.checksum import DataFileError
from experiments.data_io.npy import write_bytes
from experiments.data_io.source_identity import identify_jointly, read_table, require_table
from experiments.data_io.text.byte_bpe import SEPARATOR, encode, learn_bpe
from experiments.data_io.text.documents import SPLITS, Document, count_bytes

LARGEST_VOCABULARY = 2**16
ABOUT, CHECKED = "about.json", "checked.json"

_DTYPE = np.dtype("<u2")
_CHUNK = 2**24
_NEEDED = ("train", "val")
_TABLES = ("text_bytes", "longest", "documents")


@dataclass(frozen=True, kw_only=True)
class TokenFolder:
    """Tokens of each split.

    Attributes:
        path: where they are.
        sha256: of the lines that ``sha256sum`` would print for the token files.
        vocabulary: every token is below it.
        tokens: by split, uint16, mapped from disk.
        text_bytes: of the texts of each split, the separators not counted; empty where nobody says.
        longest: tokens of the longest document of each split, its separator not counted; empty where nobody says.
        documents: of each split; empty where nobody says.
    """

    path: Path
    sha256: str
    vocabulary: int
    tokens: Mapping[str, np.ndarray]
    text_bytes: Mapping[str, int] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    documents: Mapping[str, int] = field(default_factory=dict)


def write_token_folder(splits: Mapping[str, Sequence[Document]], vocabulary: int, target: Path) -> None:
    """Learn the tokens on the training split and write every split; the folder appears when it is whole.

    Args:
        splits: documents of "train", "val" and "test".
        vocabulary: most tokens there may be.
        target: the folder to make; replaced if it is there.
    """
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = learn_bpe((each.text for each in splits["train"]), vocabulary)
    separator = tokenizer.token_to_id(SEPARATOR)
    longest = {}
    for split, documents in splits.items():
        encoded = encode(tokenizer, [each.text for each in documents])
        longest[split] = max(map(len, encoded))
        stream = chain.from_iterable((separator, *tokens) for tokens in encoded)
        write_bytes(_file(partial, split), np.fromiter(stream, _DTYPE).tobytes())
    about = {
        "vocabulary": tokenizer.get_vocab_size(),
        "text_bytes": {split: count_bytes(documents) for split, documents in splits.items()},
        "longest": longest,
        "documents": {split: len(documents) for split, documents in splits.items()},
    }
    tokenizer.save(str(partial / "tokenizer.json"))
    write_bytes(partial / ABOUT, json.dumps(about, indent=1).encode())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def read_token_folder(path: Path, vocabulary: int, remedy: str) -> TokenFolder:
    """Map the token files of a folder, each checked from end to end once.

    Args:
        path: the folder.
        vocabulary: that its tokens must be of; a folder that says another number itself may say a smaller one.
        remedy: what the reader of an error can do about it.

    Returns:
        The folder.

    Raises:
        DataFileError: a file is missing, empty, not uint16, or of another vocabulary; or what the folder says of itself
            is no table of sizes.
    """
    about = _read_about(path, remedy)
    files = {split: _file(path, split) for split in SPLITS if split in _NEEDED or _file(path, split).is_file()}
    for file in files.values():
        if not file.is_file():
            raise DataFileError(f"{file} is missing: {remedy}")
    vocabulary = _check_vocabulary(path, vocabulary, about)
    digest = _check_once(path, files, vocabulary, remedy)
    return TokenFolder(
        path=path,
        sha256=digest,
        vocabulary=vocabulary,
        tokens={split: np.memmap(file, _DTYPE, mode="r") for split, file in files.items()},
        **{key: about[key] for key in _TABLES if key in about},
    )


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.bin"


def _read_about(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_token_folder` says of a folder: integers, and tables of integers by split."""
    about = require_table(path / ABOUT, remedy)
    for key in ("vocabulary", *_TABLES):
        value = about.get(key, 1 if key == "vocabulary" else {})
        sizes = [value] if key == "vocabulary" else value.values() if isinstance(value, dict) else [None]
        if not all(type(size) is int and size > 0 for size in sizes):
            allowed = "a positive integer" + " for each split" * (key in _TABLES)
            raise DataFileError(f"{path / ABOUT}: {key} = {value!r}: must be {allowed}: {remedy}")
    return about


def _check_vocabulary(path: Path, vocabulary: int, about: Mapping[str, Any]) -> int:
    own = about.get("vocabulary", vocabulary)
    if own > vocabulary:
        raise DataFileError(f"{path / ABOUT}: is of {own:,} tokens, where vocabulary = {vocabulary:,} is asked for")
    return own


def _check_once(path: Path, files: Mapping[str, Path], vocabulary: int, remedy: str) -> str:
    """The digest of the files, from ``checked.json`` where they are the same files as when it was written."""
    known = {"vocabulary": vocabulary, **identify_jointly(files.values())}
    before = read_table(path / CHECKED) or {}
    if before.get("identity") == known:
        return before["digest"]
    lines = [f"{_check_file(file, vocabulary, remedy)}  {file.name}\n" for file in files.values()]
    digest = sha256("".join(lines).encode()).hexdigest()
    write_bytes(path / CHECKED, json.dumps({"identity": known, "digest": digest}).encode())
    return digest


def _check_file(file: Path, vocabulary: int, remedy: str) -> str:
    """SHA-256 of a file whose numbers are tokens of the vocabulary."""
    size = file.stat().st_size
    if not size:
        raise DataFileError(f"{file}: is empty: {remedy}")
    with file.open("rb") as opened:
        if size % _DTYPE.itemsize or opened.read(6) == b"\x93NUMPY":
            raise DataFileError(f"{file}: is not uint16 alone, as nanoGPT writes it ({size:,} bytes): {remedy}")
    tokens, digest, wide = np.memmap(file, _DTYPE, mode="r"), sha256(), True
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        wide = wide and not chunk[1::2].any()
        if (beyond := np.flatnonzero(chunk >= vocabulary)).size:
            place = start + int(beyond[0])
            raise DataFileError(
                f"{file}: token {tokens[place]:,} at place {place:,} is not of a vocabulary of {vocabulary:,}; give "
                "the number of tokens that it was made with"
            )
        digest.update(chunk.tobytes())
    if wide and len(tokens) > 1:
        raise DataFileError(f"{file}: every second number is 0, as in uint32, where it must be uint16: {remedy}")
    return digest.hexdigest()
