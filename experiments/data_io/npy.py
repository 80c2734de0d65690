"""Files that appear under their name only when they are whole; arrays larger than memory among them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np


def write_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
    """Write an ``.npy`` block by block.

    Through `write` rather than a map or `numpy.save`: where the disk is full that raises `OSError` with its reason,
    while a map ends the process and `numpy.save` loses the reason.

    Args:
        path: the file.
        shape: of the whole array.
        dtype: of the whole array.
        blocks: its parts along the first dimension.

    Raises:
        ValueError: the blocks do not make up the shape.
    """

    def write(file: BinaryIO) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        written = 0
        for block in blocks:
            written += file.write(np.ascontiguousarray(block, dtype).reshape(-1).view(np.uint8).data)
        if written != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{path.name}: {written:,} bytes do not make up shape {shape} of {dtype}")

    _write(path, write)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file.

    Args:
        path: the file.
        content: all of it.
    """
    _write(path, lambda file: file.write(content))


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
