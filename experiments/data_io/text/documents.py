"""Documents of plain text: read from a folder with every fault named, kept as one file, split by document."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.data_io.checksum import DataFileError
from experiments.data_io.npy import write_bytes
from experiments.data_io.text_lines import shown_files

SPLITS = ("train", "val", "test")


class Document(NamedTuple):
    """A text that is never cut by a split.

    Attributes:
        name: tells it from the others of its collection.
        text: all of it.
    """

    name: str
    text: str


def list_text_files(folder: Path, remedy: str) -> list[Path]:
    """The files ``*.txt`` of a folder and of all folders in it, by name; hidden ones are left out.

    Args:
        folder: where to look.
        remedy: what the reader of an error can do about it.

    Returns:
        At least one file.

    Raises:
        DataFileError: the folder is missing, has no such file, or a link of that name that leads nowhere.
    """
    if not folder.is_dir():
        raise DataFileError(f"{folder} is missing: {remedy}")
    files = shown_files(path for path in folder.rglob("*.txt") if not path.is_dir())
    if not files:
        raise DataFileError(f"{folder}: has no file *.txt: {remedy}")
    return files


def read_documents(folder: Path, files: Iterable[Path]) -> list[Document]:
    """A document a file, named by its path in the folder; blank files are left out.

    Args:
        folder: that names are relative to.
        files: in the folder.

    Returns:
        Documents, in the order of the files.

    Raises:
        DataFileError: a file is not UTF-8; names it and the place.
    """
    texts = ((path.relative_to(folder).as_posix(), _read_text(path)) for path in files)
    return [Document(name, text) for name, text in texts if text.strip()]


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataFileError(f"{path}, line {line}: not UTF-8: byte 0x{raw[error.start]:02x}") from None


def split_documents(
    documents: Sequence[Document], *, validation_share: float, test_share: float, where: str
) -> dict[str, list[Document]]:
    """Cut a collection into three by document.

    Documents are taken in the order of their names' SHA-256: for the test split until it has its share of the
    collection's bytes, then for validation; what is left is to train on. Each split gets one document at least.

    Args:
        documents: in any order.
        validation_share: of the bytes, above 0.
        test_share: of the bytes, above 0.
        where: what the collection is called in the error.

    Returns:
        Documents by split, "train", "val" and "test".

    Raises:
        DataFileError: there are fewer documents than splits.
    """
    if len(documents) < len(SPLITS):
        raise DataFileError(
            f"{where}: {len(documents)} document{'s' * (len(documents) != 1)}: there must be {len(SPLITS)} at least, "
            "to train, validate and test on, since a document is never cut"
        )
    rest = sorted(documents, key=lambda each: (hashlib.sha256(each.name.encode()).digest(), each.name))
    total = count_bytes(documents)
    test, rest = _take(rest, test_share * total, keep=2)
    val, rest = _take(rest, validation_share * total, keep=1)
    return {"train": rest, "val": val, "test": test}


def _take(documents: list[Document], size: float, *, keep: int) -> tuple[list[Document], list[Document]]:
    """The first ones, until they have `size` bytes, and the rest, at least `keep`."""
    count = taken = 0
    while taken < size and len(documents) - count > keep:
        taken += count_bytes(documents[count : count + 1])
        count += 1
    return documents[:count], documents[count:]


def count_bytes(documents: Iterable[Document]) -> int:
    """The bytes of the texts in UTF-8.

    Args:
        documents: any number.

    Returns:
        Their sum.
    """
    return sum(len(each.text.encode()) for each in documents)


def digest_documents(documents: Iterable[Document]) -> str:
    """SHA-256 of the lines that `to_lines` makes.

    Args:
        documents: in a fixed order.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(to_lines(documents)).hexdigest()


def to_lines(documents: Iterable[Document]) -> bytes:
    """A line of JSON each, name and text.

    Args:
        documents: in the order of the lines.

    Returns:
        UTF-8.
    """
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents).encode()


def from_lines(lines: bytes) -> list[Document]:
    """The documents that `to_lines` was given.

    Args:
        lines: what it made.

    Returns:
        Documents, in order.
    """
    # Not `splitlines`, which also cuts at characters that JSON leaves as they are.
    return [Document(*json.loads(line)) for line in lines.decode().split("\n") if line]


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """Write documents as one file, which appears under its name when it is whole.

    Args:
        documents: in the order of the lines.
        path: the file.
    """
    write_bytes(path, to_lines(documents))
