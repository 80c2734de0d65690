"""The example sentences of Ding, a German-English dictionary: short everyday sentences, nearest to IWSLT's talks.

They come from the Debian package ``trans-de-en``: lines ``German :: English`` whose sides are cut by ``|`` into
as many entries. What reads as a whole sentence on both sides is taken. The licence, GPL-2+, is not this
repository's, so that nothing of it is embedded.

Licence: GNU General Public License, version 2 or later, copyright Frank Richter.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.data_io.checksum import DataFileError
from experiments.data_io.packages import debian_package
from experiments.data_io.text.parallel_text import Pair, drop_repeats, load_frozen, prepare_frozen
from experiments.data_io.text_lines import read_lines

NAME = "ding"
LICENCE = "GPL-2.0-or-later"
PACKAGE = "trans-de-en"
FILE = Path("usr/share/trans/de-en")
SHA256 = "36b7df983f8bf483040a3856d1018c13361ca2f67d8231d6e7c0e2a68f50f1a2"
REMEDY = "run `make data-ding`"

_REMARKS = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|<[^>]*>)")
_UNCLEAN = ("/", "...", "…", ";", "etw.", "jdn.", "jdm.", "sth.", "sb.")
_WORDS = range(3, 81)


def prepare(data_dir: Path) -> Path:
    """Put the frozen pairs into ``<data_dir>/ding/pairs.tsv`` and return that file.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The file.

    Raises:
        DataFileError: the package cannot be had, or is of another version with other text.
    """
    return prepare_frozen(
        data_dir / NAME,
        SHA256,
        lambda scratch: read_pairs(debian_package(PACKAGE, scratch) / FILE),
        made_with="version 1.9-6 of the package",
    )


def load(data_dir: Path) -> list[Pair]:
    """All pairs, in the order of the file.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The pairs.

    Raises:
        DataFileError: the file is missing or not the one that `prepare` makes.
    """
    return load_frozen(data_dir / NAME, SHA256, remedy=REMEDY)


def read_pairs(path: Path) -> list[Pair]:
    """The sentence pairs of the dictionary file; each of its lines is a document.

    Args:
        path: the dictionary.

    Returns:
        The pairs.

    Raises:
        DataFileError: the file is missing or not UTF-8, or a line has not two sides of as many entries.
    """
    return drop_repeats(_entries(path, enumerate(read_lines(path), 1)))


def _entries(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Pair]:
    for number, line in lines:
        if line.startswith("#") or not line.strip():
            continue
        sides = line.split(" :: ")
        de, en = (side.split(" | ") for side in sides) if len(sides) == 2 else ([], [""])
        if len(de) != len(en):
            raise DataFileError(f"{path}, line {number}: must be two sides of as many entries: {line!r}")
        for pair in zip(map(_plain, de), map(_plain, en), strict=True):
            if all(_is_sentence(side) for side in pair):
                yield Pair(f"line {number}", *pair)


def _plain(entry: str) -> str:
    """An entry without its remarks on gender, field and spelling."""
    return _REMARKS.sub("", entry).strip()


def _is_sentence(text: str) -> bool:
    return (
        len(text.split()) in _WORDS
        and text[0].isupper()
        and text[-1] in ".!?"
        and not any(mark in text for mark in _UNCLEAN)
    )
