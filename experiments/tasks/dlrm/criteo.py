"""Criteo's click log of the Kaggle challenge: 45,840,617 lines of seven days, in the order of time.

Its format, and where its columns are kept: `criteo_format`.

The first six sevenths of the lines are for training, the last is the test. The DLRM's own code cuts the file at equal
numbers of lines too, but tests on the first half of the last part only, 3.27 million lines. It gives every value a row,
those of the test day among them: that is ``min_count = 0``; with a threshold values of the test day alone share the row
of the rare ones.
"""

from pathlib import Path

import numpy as np

from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.tasks.dlrm.clicks import Clicks, Vocabulary
from experiments.tasks.dlrm.criteo_format import (
    DAYS,
    FILES,
    MANIFEST,
    check_files,
    check_source,
    columns_path,
    count_test_lines,
    is_prepared,
    log_path,
    work_path,
)

LICENCE = "Criteo's terms of the Kaggle challenge; not redistributed"
OFFICIAL_LINES = 45_840_617


def prepare(data_dir: Path) -> Path:
    """Make the columns out of ``<data_dir>/criteo/train.txt`` unless they are there, and return their folder.

    A killed preparation goes on where it was; columns of another log than the one there now are replaced. Needs about
    20 GB of disk for the official file, of which 7.5 GB stay, and less than 4 GiB of memory.

    Args:
        data_dir: has ``criteo/train.txt``.

    Returns:
        ``<data_dir>/criteo/prepared``.

    Raises:
        DataFileError: the file is missing, or a line of it is not as it should be; or the disk is full.
    """
    from experiments.tasks.dlrm.criteo_columns import make_columns  # polars, which other datasets do not need

    source, folder = log_path(data_dir), columns_path(data_dir)
    killed_at_the_end = work_path(folder.resolve()).exists()
    if killed_at_the_end or not is_prepared(source, folder):
        make_columns(source, folder)
    return folder


def load(data_dir: Path, *, validation_size: int = 0) -> tuple[Clicks, str]:
    """The columns, mapped from the disk, and the SHA-256 of their manifest.

    Args:
        data_dir: where `prepare` made them.
        validation_size: lines at the end of the six days that are not trained on.

    Returns:
        The columns, and the checksum that names the data in a record.

    Raises:
        DataFileError: the folder is missing, of another version or of another log than the one there now; or a file
            in it is missing, cut short or changed.
        ValueError: ``validation_size`` leaves nothing to train on.
    """
    folder = columns_path(data_dir)
    lines = check_files(folder)["lines"]
    check_source(log_path(data_dir), folder)
    if not count_test_lines(lines):
        raise DataFileError(f"{folder}: {lines} lines have no last seventh to test on; there must be {DAYS} at least")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
    stop = lines - count_test_lines(lines)
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
    return clicks, compute_sha256(folder / MANIFEST)


def name_log(clicks: Clicks) -> str:
    """As tables name it; only the whole log is called Criteo Kaggle.

    Args:
        clicks: as `load` gives them.

    Returns:
        A name for tables.
    """
    lines = len(clicks.labels)
    return "Criteo Kaggle" if lines == OFFICIAL_LINES else f"log in Criteo's format, {lines:,} lines"
