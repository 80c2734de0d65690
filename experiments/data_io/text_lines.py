"""Lines of text files, every fault named by file and line; files that a folder holds without showing them."""

from collections.abc import Iterable
from pathlib import Path

from experiments.data_io.checksum import DataFileError

BYTE_ORDER_MARK = "\ufeff"


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; nothing but a line feed ends one.

    Args:
        path: the file.

    Returns:
        Lines without their line feeds.

    Raises:
        DataFileError: the file is missing, or its bytes are not UTF-8; names the line.
    """
    check_file(path)
    raw = path.read_bytes().split(b"\n")
    if raw[-1] == b"":
        raw.pop()
    return [_decode(line, path, number) for number, line in enumerate(raw, 1)]


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"{path}, line {number}: not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}"
        ) from None


def ends_its_last_line(path: Path) -> bool:
    """Whether a file ends in a line feed; one that does not may have been cut in its last line.

    Args:
        path: the file.

    Returns:
        True for an empty file too.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read() in (b"", b"\n")


def check_file(path: Path) -> None:
    """Raise `DataFileError` where a path is no file: nothing, a folder, or a link that leads nowhere.

    Args:
        path: that must be a file.
    """
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise DataFileError(f"{path} is a link to {path.readlink()}, where there is nothing; must be a file")
    raise DataFileError(f"{path} is a folder; must be a file" if path.is_dir() else f"{path} is missing")


def shown_files(paths: Iterable[Path]) -> list[Path]:
    """The paths but for those whose name begins with a point, as ``._x.xyz`` that macOS leaves next to ``x.xyz``.

    Args:
        paths: of which all that is left must be files.

    Returns:
        Paths, sorted.

    Raises:
        DataFileError: one is no file.
    """
    shown = sorted(path for path in paths if not path.name.startswith("."))
    for path in shown:
        check_file(path)
    return shown
