"""The datasets, by name. A new one is one module here and one line in `PREPARE`."""

from collections.abc import Callable
from pathlib import Path

from experiments.data import ding, fashion_mnist, iwslt14, libreoffice_help
from experiments.data.checksum import DataFileError

PREPARE: dict[str, Callable[[Path], Path]] = {
    "ding": ding.prepare,
    "fashion-mnist": fashion_mnist.prepare,
    "iwslt14": iwslt14.prepare,
    "libreoffice-help": libreoffice_help.prepare,
}
"""Name to function: put the dataset into a data folder (no network if it is there), return where it lies."""

__all__ = ["PREPARE", "DataFileError"]
