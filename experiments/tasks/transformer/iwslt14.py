"""IWSLT14 German-English, as a folder of ``fairseq-preprocess`` in ``<data_dir>/iwslt14``.

`experiments.tasks.transformer.iwslt14_archive` puts it there.

Licence: Creative Commons BY-NC-ND, copyright TED; the user gets the archive, it is in no package.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing fairseq takes its time, and not everything here needs it
    from experiments.data_io.text.fairseq_folder import Folder

NAME = "iwslt14"
LICENCE = "CC BY-NC-ND 4.0, TED"
REMEDY = "run `make data-iwslt14 RAW=<de-en.tgz, or a folder of fairseq-preprocess>`"
OFFICIAL_SIZES = {"train": 160_239, "valid": 7_283, "test": 6_750}  # of fairseq's recipe


def prepare(data_dir: Path) -> Path:
    """The folder ``<data_dir>/iwslt14``, checked; it cannot be fetched.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The folder.

    Raises:
        DataFileError: it is not there or not whole.
    """
    return load(data_dir).path


def load(data_dir: Path) -> "Folder":
    """The folder, checked from end to end.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The folder with its sizes.

    Raises:
        DataFileError: it is not there or not whole.
    """
    from experiments.data_io.text.fairseq_folder import read_folder

    return read_folder(data_dir / NAME, REMEDY)


def name_folder(folder: "Folder") -> str:
    """What a folder may be called: only the campaign's own sentences are IWSLT14.

    Args:
        folder: as `load` gives it.

    Returns:
        A name for tables.
    """
    official = folder.about.get("source") == NAME or dict(folder.sizes) == OFFICIAL_SIZES
    return "IWSLT14 de-en" if official else "de-en folder of fairseq-preprocess"
