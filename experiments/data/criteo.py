"""Criteo's click log of the Kaggle challenge: 45,840,617 lines of seven days, in the order of time.

A line has 40 columns between tabs: the label, 13 integers and 26 categories of eight hexadecimal digits; a column
may be empty. The user puts the file into ``<data_dir>/criteo/train.txt``. `prepare` reads it once and leaves columns
that runs map from the disk:

    prepared/dense.npy       float32, (N, 13): log(1 + x), negative and empty ones count as 0
    prepared/categories.npy  int32, (N, 26): ranks, see `experiments.data.clicks`; an empty one is the value 0
    prepared/labels.npy      uint8, (N,)
    prepared/values.npy, counts.npy, offsets.npy   the vocabulary, counted over the first six days
    prepared/manifest.json   version, sizes, checksums: a function of the log's text alone
    prepared/source.json     size and time of the log that they were made of
    prepared/checked.json    sizes and times of the files above when their checksums were right

The first six sevenths of the lines are for training, the last is the test. The DLRM's own code cuts the file at equal
numbers of lines too, but tests on the first half of the last part only, 3.27 million lines. It gives every value a row,
those of the test day among them: that is ``min_count = 0``; with a threshold values of the test day alone share the row
of the rare ones.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.checksum import DataFileError, sha256_of, verify
from experiments.data.clicks import Clicks, Vocabulary
from experiments.data.npy import write_bytes
from experiments.data.source_identity import SOURCE, identity_of, read_table

LICENCE = "Criteo's terms of the Kaggle challenge; not redistributed"
INTEGERS, CATEGORIES, DAYS = 13, 26, 7
OFFICIAL_LINES = 45_840_617
VERSION = 2

FILES = ("dense", "categories", "labels", "values", "counts", "offsets")
MANIFEST, CHECKED = "manifest.json", "checked.json"
REMEDY = "run `make data-criteo`"


def source_of(data_dir: Path) -> Path:
    """Where the user puts the log."""
    return data_dir / "criteo" / "train.txt"


def prepared_in(data_dir: Path) -> Path:
    """Where `prepare` leaves the columns."""
    return data_dir / "criteo" / "prepared"


def work_of(folder: Path) -> Path:
    """Where what a preparation has made lies until it is whole."""
    return folder.with_name(f".{folder.name}.work")


def test_lines(lines: int) -> int:
    """Lines of the last day: a seventh, rounded down; the days before have what is over."""
    return lines // DAYS


def prepare(data_dir: Path) -> Path:
    """Make the columns out of ``<data_dir>/criteo/train.txt`` unless they are there, and return their folder.

    A killed preparation goes on where it was; columns of another log than the one there now are replaced. Needs about
    20 GB of disk for the official file, of which 7.5 GB stay, and less than 4 GiB of memory.

    Raises:
        DataFileError: the file is missing, or a line of it is not as it should be; or the disk is full.
    """
    from experiments.data.criteo_columns import make_columns  # polars, which other datasets do not need

    source, folder = source_of(data_dir), prepared_in(data_dir)
    killed_at_the_end = work_of(folder.resolve()).exists()
    if killed_at_the_end or not is_prepared(source, folder):
        make_columns(source, folder)
    return folder


def is_prepared(source: Path, folder: Path) -> bool:
    """Whether the folder holds the whole columns of this log; of any log where that is not there any more."""
    try:
        check_files(folder)
        check_source(source, folder)
    except DataFileError:
        return False
    return True


def check_source(source: Path, folder: Path) -> None:
    """Raise `DataFileError` where the log is there, but is not the one that the columns were made of."""
    if source.is_file() and read_table(folder / SOURCE) != identity_of(source):
        raise DataFileError(f"{source} is not the file that {folder} was made of: {REMEDY}")


def load(data_dir: Path, *, validation_size: int = 0) -> tuple[Clicks, str]:
    """The columns, mapped from the disk, and the SHA-256 of their manifest.

    Args:
        data_dir: where `prepare` made them.
        validation_size: lines at the end of the six days that are not trained on.

    Raises:
        DataFileError: the folder is missing, of another version or of another log than the one there now; or a file
            in it is missing, cut short or changed.
        ValueError: ``validation_size`` leaves nothing to train on.
    """
    folder = prepared_in(data_dir)
    lines = check_files(folder)["lines"]
    check_source(source_of(data_dir), folder)
    if not test_lines(lines):
        raise DataFileError(f"{folder}: {lines} lines have no last seventh to test on; there must be {DAYS} at least")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
    stop = lines - test_lines(lines)
    if validation_size >= stop:
        raise ValueError(f"validation_size = {validation_size}: must be less than the {stop:,} lines of six days")
    middle = stop - validation_size
    clicks = Clicks(
        dense=arrays["dense"],
        categories=arrays["categories"],
        labels=arrays["labels"],
        vocabulary=Vocabulary(values=arrays["values"], counts=arrays["counts"], offsets=np.array(arrays["offsets"])),
        parts={"train": (0, middle), "validation": (middle, stop), "test": (stop, lines)},
    )
    return clicks, sha256_of(folder / MANIFEST)


def name_of(clicks: Clicks) -> str:
    """As tables name it; only the whole log is called Criteo Kaggle."""
    lines = len(clicks.labels)
    return "Criteo Kaggle" if lines == OFFICIAL_LINES else f"log in Criteo's format, {lines:,} lines"


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of prepared columns whose files are those that it says.

    A file whose size and time are those in ``checked.json`` is taken to be what it was then: hashing 7 GB would delay
    every run by several seconds. Others, of a copied folder for instance, are hashed, and written down there.

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


def mark_checked(folder: Path) -> None:
    """Write down that the files are what the manifest says; a folder that cannot be written to stays as it is."""
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
