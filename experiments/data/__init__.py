"""The datasets, by name. A new one is one module here and one line in `PREPARE`."""

from collections.abc import Callable
from pathlib import Path

from experiments.data import criteo, ding, fashion_mnist, flights, iwslt14, libreoffice_help, materials, qm9
from experiments.data.checksum import DataFileError

PREPARE: dict[str, Callable[[Path], Path]] = {
    "criteo": criteo.prepare,
    "ding": ding.prepare,
    "fashion-mnist": fashion_mnist.prepare,
    "flights": flights.prepare,
    "iwslt14": iwslt14.prepare,
    "libreoffice-help": libreoffice_help.prepare,
    "materials-project": materials.prepare,
    "qm9": qm9.prepare,
}
"""Name to function: put the dataset into a data folder (no network if it is there), return where it lies."""

__all__ = ["PREPARE", "DataFileError"]
