"""Pieces of Criteo's log to the columns that runs map: count the categories, rank them, put all lines together."""

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.progress import track

from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.data_io.npy import write_bytes, write_npy
from experiments.data_io.source_identity import check_unchanged, identify, write_identity
from experiments.tasks.dlrm.clicks import invert_order, order_by_frequency
from experiments.tasks.dlrm.criteo_format import (
    CATEGORIES,
    FILES,
    INTEGERS,
    MANIFEST,
    VERSION,
    count_test_lines,
    is_prepared,
    mark_checked,
    work_path,
)
from experiments.tasks.dlrm.criteo_pieces import PIECE, Piece, check_log, iterate_array, make_pieces

BLOCK = 250_000
"""Lines of `categories.npy` that are put together at a time."""


def make_columns(source: Path, folder: Path, *, piece_size: int = PIECE) -> None:
    """Read the log and leave the columns in ``folder``; what an interrupted call has made is kept.

    Args:
        source: the log.
        folder: where the columns go.
        piece_size: bytes of text parsed at a time.

    Raises:
        DataFileError: see `check_log` and `make_pieces`; the log was changed meanwhile; or the disk is full.
    """
    folder = folder.resolve()  # where a link to another disk leads: what is made is renamed in the end
    work = work_path(folder)
    if not is_prepared(source, folder):
        check_log(source)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_prepared(source, folder):  # another process has been here while this one waited, or was killed at the end
            shutil.rmtree(work, ignore_errors=True)
            return
        try:
            _make(source, work, piece_size)
            shutil.rmtree(folder, ignore_errors=True)
            (work / "whole").replace(folder)
            shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            raise DataFileError(_failure(source, work, error)) from error


def _make(source: Path, work: Path, piece_size: int) -> None:
    """``whole`` in ``work``, where all that was made of another log is thrown away."""
    before = identify(source)
    pieces = make_pieces(source, work, size=piece_size)
    _rank_columns(pieces, work)
    _put_together(pieces, work)
    write_identity(work / "whole", before)
    mark_checked(work / "whole")
    check_unchanged(source, before, identify(source))


def _failure(source: Path, work: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full: make room" if full else f"{error.strerror or error}"
    path = error.filename or work
    done = "read" if str(path) == str(source) else "written"
    return f"{path}: could not be {done}: {what}; the pieces in {work} are kept, the same command goes on from them"


# --- ranks, a column at a time


def _rank_columns(pieces: Sequence[Piece], work: Path) -> None:
    """``ranks-<j>.npy``, ``values-<j>.npy`` and ``counts-<j>.npy`` of every column, two columns at a time."""
    names = ("ranks", "values", "counts")
    wanted = [j for j in range(CATEGORIES) if not all(_column_file(work, name, j).is_file() for name in names)]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda j: _rank_column(pieces, work, j), wanted)
        for _ in track(made, total=len(wanted), description="Ranking categories"):
            pass


def _column_file(work: Path, name: str, j: int) -> Path:
    return work / f"{name}-{j:02d}.npy"


def _rank_column(pieces: Sequence[Piece], work: Path, j: int) -> None:
    column = np.concatenate([array[j] for array in iterate_array(pieces, "categories")])
    train = len(column) - count_test_lines(len(column))
    ranks, values, counts = rank_column(column, train)
    for name, array in {"values": values, "counts": counts, "ranks": ranks}.items():  # ranks last: they say "done"
        write_npy(_column_file(work, name, j), array.shape, array.dtype, [array])


def rank_column(column: np.ndarray, train: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of one column's values by their count in its first ``train`` rows; ties by the value.

    Sorts pairs (value, row) as one integer of 64 bits, which is several times as fast as sorting positions by
    value, and needs 24 bytes a row.

    Args:
        column: uint32, (N,), N < 2³².
        train: rows that are counted.

    Returns:
        Ranks, int32, (N,); values, uint32, and counts, uint32, in the order of ranks.
    """
    pairs = column.astype(np.uint64)
    pairs <<= np.uint64(32)
    pairs |= np.arange(len(column), dtype=np.uint64)
    pairs.sort()
    rows = pairs.astype(np.uint32)  # the lower half
    pairs >>= np.uint64(32)
    ordered = pairs.astype(np.uint32)
    del pairs
    firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.add.reduceat((rows < train).astype(np.uint32), firsts, dtype=np.uint32)
    values = ordered[firsts]
    del ordered
    order = order_by_frequency(counts)
    ranks = np.empty(len(column), np.int32)
    ranks[rows] = np.repeat(invert_order(order), np.diff(firsts, append=len(column)))
    return ranks, values[order], counts[order]


# --- all lines


def _put_together(pieces: Sequence[Piece], work: Path) -> None:
    """The folder that is left, still under another name."""
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    lines = sum(piece.lines for piece in pieces)
    with ThreadPoolExecutor(2) as pool:
        numbers = pool.submit(_write_numbers, pieces, whole, lines)
        blocks = _categories(work, lines)
        write_npy(whole / "categories.npy", (lines, CATEGORIES), np.dtype(np.int32), blocks)
        numbers.result()
    sizes = _write_vocabulary(work, whole)
    _write_manifest(whole, lines, sizes)


def _write_numbers(pieces: Sequence[Piece], whole: Path, lines: int) -> None:
    write_npy(whole / "dense.npy", (lines, INTEGERS), np.dtype(np.float32), iterate_array(pieces, "dense"))
    write_npy(whole / "labels.npy", (lines,), np.dtype(np.uint8), iterate_array(pieces, "labels"))


def _categories(work: Path, lines: int) -> Iterator[np.ndarray]:
    """The ranks of all columns, a block of lines at a time; maps are closed with their block, to stay out of memory."""
    for start in track(range(0, lines, BLOCK), description="Putting lines together"):
        columns = (np.load(_column_file(work, "ranks", j), mmap_mode="r") for j in range(CATEGORIES))
        yield np.stack([np.array(column[start : start + BLOCK]) for column in columns], axis=1)


def _write_vocabulary(work: Path, whole: Path) -> list[int]:
    """The columns' values and counts, one after the other; returns how many each has."""
    for name in ("values", "counts"):
        arrays = [np.load(_column_file(work, name, j), mmap_mode="r") for j in range(CATEGORIES)]
        sizes = [len(array) for array in arrays]
        write_npy(whole / f"{name}.npy", (sum(sizes),), np.dtype(np.uint32), arrays)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    write_npy(whole / "offsets.npy", offsets.shape, offsets.dtype, [offsets])
    return sizes


def _write_manifest(whole: Path, lines: int, sizes: list[int]) -> None:
    """A function of the log's text alone, so that its SHA-256 names the data."""
    with ThreadPoolExecutor(2) as pool:
        digests = pool.map(lambda name: compute_sha256(whole / f"{name}.npy"), FILES)
    manifest = {
        "version": VERSION,
        "lines": lines,
        "test_lines": count_test_lines(lines),
        "values": sizes,
        "sha256": dict(zip(FILES, digests, strict=True)),
        "bytes": {name: (whole / f"{name}.npy").stat().st_size for name in FILES},
    }
    write_bytes(whole / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
