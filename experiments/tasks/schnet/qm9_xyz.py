"""The files of QM9 as published, a molecule each, and the list of those that failed the authors' consistency check.

    5                                         number of atoms n
    gdb 1  157.7118  157.70997  …  6.469      molecule's number and 15 properties, the eleventh is U0 in hartree
    C  -0.0126981  1.0858042  0.008  -0.5357  n lines: element, x, y, z in Å, charge
    1341.307  1341.3284  …                    frequencies
    C  C                                      SMILES
    InChI=1S/CH4/h1H4  InChI=1S/CH4/h1H4      InChI

Some numbers are written as ``1.5*^-6``. A file that differs from this form is refused by its line: with a property too
few or too many the energy would be another's.
"""

import math
import re
from pathlib import Path

import numpy as np

from experiments.data_io.atoms.structures import Entry
from experiments.data_io.checksum import DataFileError
from experiments.data_io.text_lines import BYTE_ORDER_MARK, read_lines, shown_files

PUBLISHED = 133_885
"""Molecules of the data set as published."""

HARTREE = 27.211386024367243
"""eV, CODATA 2014: the value that schnetpack converts with."""

NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}

_TAG, _PROPERTIES, _U0 = "gdb", 15, 11
_CLOSING = ("frequencies", "SMILES", "InChI")
_WHOLE = re.compile(r"[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)((e|E|\*\^)[+-]?[0-9]+)?")
_LARGEST = float(np.finfo(np.float32).max)


def xyz_files(folder: Path) -> list[Path]:
    """The files of a folder in the order of the molecules' numbers; hidden ones are left out.

    Args:
        folder: with files such as ``dsgdb9nsd_000001.xyz``.

    Returns:
        Paths.

    Raises:
        DataFileError: one is no file, or is named otherwise, or two have the same number.
    """
    numbers: dict[int, Path] = {}
    for path in shown_files(folder.glob("*.xyz")):
        first = numbers.setdefault(molecule_number(path), path)
        if first is not path:
            raise DataFileError(f"{path} has the number of {first}; each molecule must have one file")
    return [numbers[number] for number in sorted(numbers)]


def molecule_number(path: Path) -> int:
    """133885 of ``dsgdb9nsd_133885.xyz``.

    Args:
        path: a file of that form.

    Returns:
        The number.

    Raises:
        DataFileError: it has another name.
    """
    digits = path.stem.rpartition("_")[2]
    if not _WHOLE.fullmatch(digits):
        raise DataFileError(f"{path}: must be named like dsgdb9nsd_000001.xyz")
    return int(digits)


def read_xyz(path: Path) -> Entry:
    """One molecule, its energy in eV.

    Args:
        path: the file, whose name ends in the molecule's number.

    Returns:
        The molecule.

    Raises:
        DataFileError: the file is no UTF-8 or not of the form above; names it, its line, the value and what is allowed.
    """
    lines = "\n".join(read_lines(path)).removeprefix(BYTE_ORDER_MARK).rstrip().splitlines()
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    count = _count_atoms(path, lines)
    target = _read_energy(places[1], lines[1], molecule_number(path))
    stop = 2 + count
    atoms = [_read_atom(place, line) for place, line in zip(places[2:stop], lines[2:stop], strict=True)]
    _check_closing(places[stop:], lines[stop:])
    return Entry(
        name=path.name,
        numbers=np.array([number for number, _ in atoms]),
        positions=np.array([position for _, position in atoms]),
        target=target * HARTREE,
    )


def _count_atoms(path: Path, lines: list[str]) -> int:
    """The first line, which the number of lines must fit."""
    if not lines:
        raise DataFileError(f"{path} is empty")
    word = lines[0].strip()
    if not _WHOLE.fullmatch(word) or not int(word):
        raise DataFileError(f"{path}, line 1: {word[:40]!r}: must be the number of atoms")
    count, following = int(word), 1 + int(word) + len(_CLOSING)
    if len(lines) - 1 != following:
        raise DataFileError(
            f"{path}, line 1: {count} atoms must be followed by {following} lines (properties, {count} of atoms, "
            f"{', '.join(_CLOSING)}), there are {len(lines) - 1}: the file is cut short, or the number is wrong"
        )
    return count


def _read_energy(place: str, line: str, number: int) -> float:
    """U0 in hartree."""
    words = line.split()
    if len(words) != 2 + _PROPERTIES:
        raise DataFileError(
            f"{place}: {len(words)} words, must be {2 + _PROPERTIES}: {_TAG}, the molecule's number and "
            f"{_PROPERTIES} properties: {line[:40]!r}"
        )
    if words[0] != _TAG or not _WHOLE.fullmatch(words[1]) or int(words[1]) != number:
        raise DataFileError(f"{place}: begins with {' '.join(words[:2])!r}, must begin with '{_TAG} {number}'")
    properties = [_read_number(place, f"property {k}", word) for k, word in enumerate(words[2:], 1)]
    return properties[_U0 - 1]


def _read_atom(place: str, line: str) -> tuple[int, list[float]]:
    words = line.split()
    if len(words) != 5:
        raise DataFileError(f"{place}: {len(words)} columns, must be 5: element, x, y, z, charge: {line[:80]!r}")
    if words[0] not in NUMBERS:
        raise DataFileError(f"{place}: element = {words[0]!r}: must be one of {', '.join(NUMBERS)}")
    _read_number(place, "charge", words[4])
    return NUMBERS[words[0]], [_read_number(place, axis, word) for axis, word in zip("xyz", words[1:4], strict=True)]


def _read_number(place: str, what: str, word: str) -> float:
    value = float(word.replace("*^", "e")) if _NUMBER.fullmatch(word) else math.nan
    if not abs(value) <= _LARGEST:
        raise DataFileError(f"{place}: {what} = {word[:40]!r}: must be a number of at most {_LARGEST:.2g} in size")
    return value


def _check_closing(places: list[str], lines: list[str]) -> None:
    """What follows the atoms is not used, but tells that the lines above are whole."""
    for word in lines[0].split():
        _read_number(places[0], "frequency", word)
    for place, line, what in zip(places, lines, _CLOSING, strict=True):
        if not line.strip():
            raise DataFileError(f"{place}: is blank, must hold {what}")
    if not lines[2].lstrip().startswith("InChI="):
        raise DataFileError(f"{places[2]}: {lines[2][:40]!r}: must begin with InChI=")


def read_uncharacterized(path: Path) -> set[int]:
    """The molecules that failed the consistency check, if their published list is there.

    A molecule's line begins with its number. Before the first there may be a heading, in which no line begins with a
    word that has a digit; rules such as ``====`` may be anywhere.

    Args:
        path: of the list.

    Returns:
        Their numbers; none if there is no list.

    Raises:
        DataFileError: a line is neither; names it.
    """
    if not path.exists() and not path.is_symlink():
        return set()
    found: set[int] = set()
    for number, line in enumerate(read_lines(path), 1):
        words = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).split()
        if not words or not words[0].strip("=-#"):
            continue
        if _WHOLE.fullmatch(words[0]) and 1 <= int(words[0]) <= PUBLISHED:
            found.add(int(words[0]))
        elif found or any(letter.isdigit() for letter in words[0]):
            raise DataFileError(
                f"{path}, line {number}: begins with {words[0][:40]!r}, must begin with a molecule's number, "
                f"1 to {PUBLISHED}, as 58 is one"
            )
    return found
