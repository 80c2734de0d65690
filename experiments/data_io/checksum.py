"""Checksums of data files, and the error that a missing or damaged one raises."""

import hashlib
from pathlib import Path

from experiments.errors import UserError


class DataFileError(UserError):
    """A data file is missing, truncated or not the file it should be."""


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str, *, remedy: str) -> None:
    """Check that ``path`` is the very file whose SHA-256 is ``expected``.

    Args:
        path: the file.
        expected: its SHA-256 in hexadecimal.
        remedy: what the reader of the error can do about it, e.g. ``"run `make data-fashion-mnist`"``.

    Raises:
        DataFileError: the file is missing or its bytes differ. Names the file and both checksums.
    """
    if not path.is_file():
        raise DataFileError(f"{path} is missing (expected SHA-256 {expected}, found no file): {remedy}")
    found = compute_sha256(path)
    if found != expected:
        raise DataFileError(
            f"{path} is truncated or damaged (expected SHA-256 {expected}, "
            f"found {found} of {path.stat().st_size:,} bytes): {remedy}"
        )
