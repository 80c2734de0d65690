"""Criteo's log to pieces of arrays, 64 MiB of text at a time; pieces that are there are not made again."""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.progress import track

from experiments.data_io.checksum import DataFileError
from experiments.data_io.npy import write_bytes, write_npy
from experiments.data_io.source_identity import SOURCE, identify
from experiments.tasks.dlrm.criteo_format import CATEGORIES, INTEGERS, VERSION
from experiments.tasks.dlrm.criteo_lines import LineError, Lines, parse

PIECE = 64 * 2**20
WORKERS = 2
"""Pieces in work at a time, half a gigabyte of memory each; polars has threads of its own besides."""
LONGEST_LINE = 2**16
ARCHIVES = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\xfd7": "xz", b"BZ": "bzip2"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the log as arrays on disk: ``<stem>.dense.npy``, ``.categories.npy`` and ``.labels.npy``.

    Attributes:
        stem: path without the endings.
        lines: how many it holds.
    """

    stem: Path
    lines: int

    def array(self, name: str) -> np.ndarray:
        """One of its arrays, mapped from the disk."""
        return np.load(self.stem.with_suffix(f".{name}.npy"), mmap_mode="r", allow_pickle=False)


def make_pieces(source: Path, folder: Path, *, size: int = PIECE) -> list[Piece]:
    """Parse the log into pieces; those that an earlier, interrupted call made of the same file are kept.

    Args:
        source: the log.
        folder: where the pieces go; all that is in it is thrown away where it was made of another file.
        size: bytes of text a piece. A piece has the lines that begin in its stretch.

    Returns:
        The pieces in the order of the log.

    Raises:
        DataFileError: a line is not as it should be; names file and line.
    """
    _discard_other_pieces(source, folder, size)
    count = -(-source.stat().st_size // size)
    pieces: list[Piece] = []
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            made = pool.map(lambda k: _piece(source, folder / f"{k:06d}", k * size, (k + 1) * size), range(count))
            for piece in track(made, total=count, description=f"Reading {source.name}"):
                pieces.append(piece)
    except LineError as error:
        line = error.line + sum(piece.lines for piece in pieces)
        raise DataFileError(f"{source}, line {line:,}: {error.what}") from None
    return [piece for piece in pieces if piece.lines]


def check_log(source: Path) -> None:
    """Raise `DataFileError` where there is no log, an empty one, or a compressed one.

    Args:
        source: the log.
    """
    if not source.is_file():
        raise DataFileError(
            f"{source} is missing: put train.txt of the Criteo Kaggle display advertising challenge there, unpacked "
            f"(1 label, {INTEGERS} integers and {CATEGORIES} categories a line, between tabs)"
        )
    with source.open("rb") as file:
        start = file.read(2)
    if not start:
        raise DataFileError(f"{source} is empty")
    if start in ARCHIVES:
        raise DataFileError(f"{source} is compressed ({ARCHIVES[start]}): unpack it and put the text in its place")


def _discard_other_pieces(source: Path, folder: Path, size: int) -> None:
    """Start over where what is there was made of another file, size or version."""
    own = {"version": VERSION, **identify(source), "piece": size}
    mark = folder / SOURCE
    if mark.is_file() and mark.read_text(encoding="utf-8") == json.dumps(own):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_bytes(mark, json.dumps(own).encode())


def _piece(source: Path, stem: Path, start: int, stop: int) -> Piece:
    """The lines that begin in bytes ``[start, stop)``; made unless they are there.

    Args:
        source: the log.
        stem: of the files that the piece is kept in.
        start: first byte.
        stop: byte after the last.

    Returns:
        The piece.

    Raises:
        LineError: a line is not as it should be, counted from the piece's first.
    """
    if done := _read_finished(stem):
        return done
    with source.open("rb") as file:
        text = _text(file, source, start, stop)
    lines = parse(text) if text else _NO_LINES
    for name, array in vars(lines).items():
        write_npy(stem.with_suffix(f".{name}.npy"), array.shape, array.dtype, [array])
    mark = {"lines": len(lines.labels)}
    write_bytes(stem.with_suffix(".json"), json.dumps(mark).encode())  # last: it says that the others are whole
    return Piece(stem=stem, **mark)


def _read_finished(stem: Path) -> Piece | None:
    mark = stem.with_suffix(".json")
    if not mark.is_file():
        return None
    piece = Piece(stem=stem, **json.loads(mark.read_text(encoding="utf-8")))
    try:
        lengths = {len(piece.array("dense")), piece.array("categories").shape[1], len(piece.array("labels"))}
    except (OSError, ValueError):  # missing or cut short: make it again
        return None
    return piece if lengths == {piece.lines} else None


_NO_LINES = Lines(
    dense=np.empty((0, INTEGERS), np.float32),
    categories=np.empty((CATEGORIES, 0), np.uint32),
    labels=np.empty(0, np.uint8),
)


def _text(file: BinaryIO, source: Path, start: int, stop: int) -> bytes:
    """The lines that begin in ``[start, stop)``, whole."""
    if start:
        file.seek(start - 1)
        _read_rest_of_line(file, source)
    else:
        file.seek(0)
    text = file.read(max(stop - file.tell(), 0))
    return text if not text or text.endswith(b"\n") else text + _read_rest_of_line(file, source)


def _read_rest_of_line(file: BinaryIO, source: Path) -> bytes:
    rest = file.readline(LONGEST_LINE)
    if len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
        raise DataFileError(f"{source}: a line at byte {file.tell():,} is longer than {LONGEST_LINE:,} bytes")
    return rest


def iterate_array(pieces: Iterable[Piece], name: str) -> Iterator[np.ndarray]:
    """One array of every piece, in order.

    Args:
        pieces: in the order of the log.
        name: of the array.

    Returns:
        An iterator over arrays mapped from disk.
    """
    return (piece.array(name) for piece in pieces)
