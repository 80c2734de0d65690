"""The format of Criteo's log and of the columns made of it, and whether these are whole.

A line has 40 columns between tabs: the label, 13 integers and 26 categories of eight hexadecimal digits; a column
may be empty. The last line may lack its line feed only if its last category has all eight digits, since a line that was
cut in it looks the same.

The user puts the file into ``<data_dir>/criteo/train.txt``. `criteo.prepare` reads it once and leaves columns that runs
map from the disk:

    prepared/dense.npy       float32, (N, 13): log(1 + x), negative and empty ones count as 0
    prepared/categories.npy  int32, (N, 26): ranks, see `clicks`; an empty one is the value 0
    prepared/labels.npy      uint8, (N,)
    prepared/values.npy, counts.npy, offsets.npy   the vocabulary, counted over the first six days
    prepared/manifest.json   version, sizes, checksums: a function of the log's text alone
    prepared/source.json     size and time of the log that they were made of
    prepared/checked.json    sizes and times of the files above when their checksums were right
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.checksum import DataFileError, verify
from experiments.data_io.npy import write_bytes
from experiments.data_io.source_identity import SOURCE, identify, read_table

INTEGERS, CATEGORIES, DAYS = 13, 26, 7
VERSION = 2

FILES = ("dense", "categories", "labels", "values", "counts", "offsets")
MANIFEST, CHECKED = "manifest.json", "checked.json"
REMEDY = "run `make data-criteo`"


def log_path(data_dir: Path) -> Path:
    """Where the user puts the log.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        ``<data_dir>/criteo/train.txt``.
    """
    return data_dir / "criteo" / "train.txt"


def columns_path(data_dir: Path) -> Path:
    """Where `prepare` leaves the columns.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        ``<data_dir>/criteo/prepared``.
    """
    return data_dir / "criteo" / "prepared"


def work_path(folder: Path) -> Path:
    """Where what a preparation has made is kept until it is whole.

    Args:
        folder: where the columns go.

    Returns:
        A hidden folder next to it.
    """
    return folder.with_name(f".{folder.name}.work")


def count_test_lines(lines: int) -> int:
    """Lines of the last day: a seventh, rounded down; the days before have what is over.

    Args:
        lines: of the log.

    Returns:
        Lines to test on.
    """
    return lines // DAYS


def is_prepared(source: Path, folder: Path) -> bool:
    """Whether the folder holds the whole columns of this log; of any log where that is not there any more.

    Args:
        source: the log.
        folder: of the columns.

    Returns:
        Whether nothing is left to do.
    """
    try:
        check_files(folder)
        check_source(source, folder)
    except DataFileError:
        return False
    return True


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of prepared columns whose files are those that it says.

    A file whose size and time are those in ``checked.json`` is taken to be what it was then: hashing 7 GB would delay
    every run by several seconds. Others, of a copied folder for instance, are hashed, and written down there.

    Args:
        folder: from `criteo.prepare`.

    Returns:
        The manifest.

    Raises:
        DataFileError: the manifest is missing, damaged or of another version, or a file is missing, cut short or
            changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataFileError(f"{path} is missing: {REMEDY}")
    manifest = read_table(path)
    if manifest is None or "version" not in manifest:
        raise DataFileError(f"{path} is damaged: {REMEDY}")
    if manifest["version"] != VERSION:
        raise DataFileError(f"{path}: version = {manifest['version']!r}, must be {VERSION}: {REMEDY}")
    tables = [manifest.get("bytes"), manifest.get("sha256")]
    if "lines" not in manifest or not all(isinstance(table, dict) and {*FILES} <= table.keys() for table in tables):
        raise DataFileError(f"{path} is damaged: {REMEDY}")
    for name in FILES:
        _check_size(folder / f"{name}.npy", manifest["bytes"][name])
    known, marks = read_table(folder / CHECKED) or {}, _marks(folder)
    for name in FILES:
        if known.get(name) != marks[name]:
            verify(folder / f"{name}.npy", manifest["sha256"][name], remedy=REMEDY)
    if len(np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False)) != manifest["lines"]:
        raise DataFileError(f"{path} is damaged: it says {manifest['lines']} lines: {REMEDY}")
    if known != marks:
        mark_checked(folder)
    return manifest


def check_source(source: Path, folder: Path) -> None:
    """Raise `DataFileError` where the log is there, but is not the one that the columns were made of.

    Args:
        source: the log.
        folder: of the columns.
    """
    if source.is_file() and read_table(folder / SOURCE) != identify(source):
        raise DataFileError(f"{source} is not the file that {folder} was made of: {REMEDY}")


def mark_checked(folder: Path) -> None:
    """Write down that the files are what the manifest says; a folder that cannot be written to stays as it is.

    Args:
        folder: of the columns, whose checksums are right.
    """
    with suppress(OSError):
        write_bytes(folder / CHECKED, json.dumps(_marks(folder)).encode())


def _marks(folder: Path) -> dict[str, list[int]]:
    files = {name: (folder / f"{name}.npy").stat() for name in FILES}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in files.items()}


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None or found != expected:
        what = "is missing" if found is None else f"is cut short or damaged: {found:,} bytes"
        raise DataFileError(f"{path} {what}, must be {expected:,} bytes: {REMEDY}")
