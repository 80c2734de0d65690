"""Criteo's click log of the Kaggle challenge: 45,840,617 lines of seven days, in the order of time.

A line has 40 columns between tabs: the label, 13 integers and 26 categories of eight hexadecimal digits; a column
may be empty. The user puts the file into ``<data_dir>/criteo/train.txt``. `prepare` reads it once and leaves columns
that runs map from the disk:

    prepared/dense.npy       float32, (N, 13): log(1 + x), negative and empty ones count as 0
    prepared/categories.npy  int32, (N, 26): ranks, see `experiments.data.clicks`; an empty one is the value 0
    prepared/labels.npy      uint8, (N,)
    prepared/values.npy, counts.npy, offsets.npy   the vocabulary, counted over the first six days
    prepared/manifest.json   version, sizes, where they come from

The first six sevenths of the lines are for training, the last is the test, as in the DLRM's own code, which cuts
the file at equal numbers of lines. That code gives every value a row, those of the test day among them: that is
``min_count = 0``; with a threshold values of the test day alone share the row of the rare ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.checksum import DataFileError, sha256_of
from experiments.data.clicks import Clicks, Vocabulary

LICENCE = "Criteo's terms of the Kaggle challenge; not redistributed"
INTEGERS, CATEGORIES, DAYS = 13, 26, 7
OFFICIAL_LINES = 45_840_617
VERSION = 1

FILES = ("dense", "categories", "labels", "values", "counts", "offsets")
MANIFEST = "manifest.json"
REMEDY = "run `make data-criteo`"


def source_of(data_dir: Path) -> Path:
    """Where the user puts the log."""
    return data_dir / "criteo" / "train.txt"


def prepared_in(data_dir: Path) -> Path:
    """Where `prepare` leaves the columns."""
    return data_dir / "criteo" / "prepared"


def test_lines(lines: int) -> int:
    """Lines of the last day: a seventh, rounded down; the days before have what is over."""
    return lines // DAYS


def prepare(data_dir: Path) -> Path:
    """Make the columns out of ``<data_dir>/criteo/train.txt`` unless they are there, and return their folder.

    A killed preparation goes on where it was. Needs about 20 GB of disk for the official file, of which 7.5 GB
    stay, and less than 4 GiB of memory.

    Raises:
        DataFileError: the file is missing, or a line of it is not as it should be; or the disk is full.
    """
    from experiments.data.criteo_columns import make_columns  # polars, which other datasets do not need

    folder = prepared_in(data_dir)
    try:
        read_manifest(folder)
    except DataFileError:
        make_columns(source_of(data_dir), folder)
    return folder


def load(data_dir: Path, *, validation_size: int = 0) -> tuple[Clicks, str]:
    """The columns, mapped from the disk, and the SHA-256 of their manifest.

    Args:
        data_dir: where `prepare` made them.
        validation_size: lines at the end of the six days that are not trained on.

    Raises:
        DataFileError: the folder is missing, of another version, or a file in it is missing or cut short.
        ValueError: ``validation_size`` leaves nothing to train on.
    """
    folder = prepared_in(data_dir)
    manifest = read_manifest(folder)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
    lines = manifest["lines"]
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of prepared columns whose files have the sizes it says.

    Sizes only: hashing 7 GB would delay every run by half a minute.

    Raises:
        DataFileError: it is missing, damaged or of another version, or a file is missing or cut short.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataFileError(f"{path} is missing: {REMEDY}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, sizes = manifest["version"], manifest["bytes"]
    except (ValueError, KeyError, TypeError):
        raise DataFileError(f"{path} is damaged: {REMEDY}") from None
    if version != VERSION:
        raise DataFileError(f"{path}: version = {version!r}, must be {VERSION}: {REMEDY}")
    for name in FILES:
        _check_size(folder / f"{name}.npy", sizes.get(name))
    return manifest


def _check_size(path: Path, expected: int | None) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found is None or found != expected:
        what = "is missing" if found is None else f"is cut short or damaged: {found:,} bytes"
        raise DataFileError(f"{path} {what}, must be {expected or 0:,} bytes: {REMEDY}")
