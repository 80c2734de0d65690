"""What parsed data were made of: their source is known by the size and the time of its files, kept in ``source.json``.

Hashing the source would delay every run: Criteo's log has 11 GB, and QM9 as published is 133,885 files. A file that was
corrected in place has another time, though it may have its size; one that was copied without its time is only read
once more. What a run is known by is the checksum of the parsed data, of which ``source.json`` is no part.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.data_io.checksum import DataFileError
from experiments.data_io.npy import write_bytes

SOURCE = "source.json"
Identity = Mapping[str, int | str]


def identify(source: Path) -> dict[str, int]:
    """What a file is known by: its size and when it was written.

    Args:
        source: a file.

    Returns:
        Its bytes, and nanoseconds of its last change.
    """
    status = source.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def identify_jointly(files: Iterable[Path]) -> dict[str, int | str]:
    """What several files are known by: their number, and the SHA-256 of their names, sizes and times.

    Args:
        files: in a fixed order.

    Returns:
        Their number and a checksum.
    """
    lines = [f"{file.name} {' '.join(map(str, identify(file).values()))}\n" for file in files]
    return {"files": len(lines), "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}


def write_identity(folder: Path, identity: Identity) -> None:
    """Keep with parsed data what they were made of, as ``source.json``.

    Args:
        folder: of the parsed data.
        identity: of the source.
    """
    write_bytes(folder / SOURCE, json.dumps(identity).encode())


def read_table(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds a table; ``None`` where it is missing or does not.

    Args:
        path: the file.

    Returns:
        The table.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def require_table(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that must hold a table, if it is there.

    Args:
        path: the file.
        remedy: what the reader of an error can do about it.

    Returns:
        The table, an empty one where the file is missing.

    Raises:
        DataFileError: the file is there and holds no table; says why.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path} is damaged, must be a table of JSON: {error}: {remedy}") from None
    if not isinstance(found, dict):
        raise DataFileError(f"{path} holds {str(found)[:40]!r}, must be a table of JSON: {remedy}")
    return found


def check_unchanged(source: Path | str, before: Identity | None, after: Identity | None) -> None:
    """Raise `DataFileError` where a source, by its path or in words, is not what it was before it was read.

    Args:
        source: for the error.
        before: identity before it was read.
        after: identity now.
    """
    if after != before:
        raise DataFileError(f"{source} was changed while it was read: once it is whole, give the same command again")
