"""The datasets, by name. A new one is one module here and one line in `PREPARE`."""

from collections.abc import Callable
from pathlib import Path

from experiments.data import fashion_mnist
from experiments.data.checksum import DataFileError

PREPARE: dict[str, Callable[[Path], Path]] = {
    "fashion-mnist": fashion_mnist.prepare,
}
"""Name to function: put the dataset into a data folder (no network if it is there), return where it lies."""

__all__ = ["PREPARE", "DataFileError"]
