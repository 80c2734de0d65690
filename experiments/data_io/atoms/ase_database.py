"""Databases as schnetpack writes them: ASE's format, with the units of each property in the metadata."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.atoms.structures import Entry
from experiments.data_io.checksum import DataFileError

ENERGY_UNITS = ("eV", "meV", "Ha", "Hartree", "kcal/mol", "kJ/mol")
LENGTH_UNITS = ("Ang", "Angstrom", "A", "Bohr", "a0", "nm")


def database_files(path: Path) -> list[Path]:
    """The files that a database is made of, as far as they are there.

    SQLite keeps changes in a file next to it, ``-wal``, as long as a program that writes in that mode has it open.

    Args:
        path: the ``.db`` file.

    Returns:
        Paths, the database first.
    """
    log = path.with_name(f"{path.name}-wal")
    return [file for file in (path, log) if file.is_file() and file.stat().st_size]


def count_rows(path: Path) -> int:
    """The number of structures of a database.

    Args:
        path: the ``.db`` file.

    Returns:
        How many rows it has.

    Raises:
        DataFileError: the file is missing or no database.
    """
    with _open(path) as database:
        return database.count()


def read_ase_database(path: Path, target: str, *, periodic: bool) -> Iterator[Entry]:
    """The structures of a database, in the order of its rows, energies in eV and lengths in Å.

    Args:
        path: the ``.db`` file.
        target: the property to learn, an energy.
        periodic: whether they must be crystals, periodic in all three directions, or molecules.

    Yields:
        One structure.

    Raises:
        DataFileError: the file is missing or no database, has no such property, no unit or a unit of
            something else, or a row lacks the property or is not periodic as it should be.
    """
    with _open(path) as database:
        energy, length = _factors(path, database.metadata, target)
        for row in database.select():
            yield _entry(path, row, target, energy, length, periodic)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    from ase.db import connect  # ase takes a second to import

    if not path.is_file():
        raise DataFileError(f"{path} is missing: it is put in place by the user")
    try:
        with connect(path, use_lock_file=False) as database:
            yield database
    except (sqlite3.DatabaseError, ValueError, KeyError) as error:
        raise DataFileError(f"{path} cannot be read as an ASE database: {error}") from None


def _factors(path: Path, metadata: dict[str, Any], target: str) -> tuple[float, float]:
    """What energies are multiplied with to be in eV, and lengths to be in Å."""
    from schnetpack.units import convert_units

    units = metadata.get("_property_unit_dict")
    if units is None or "_distance_unit" not in metadata:
        raise DataFileError(f"{path} does not say in which units it is; `spkconvert` adds them")
    if target not in units:
        raise DataFileError(f"{path} has no property {target!r}; it has {', '.join(sorted(units))}")
    for what, unit, allowed in (
        (target, units[target], ENERGY_UNITS),
        ("distance", metadata["_distance_unit"], LENGTH_UNITS),
    ):
        if unit not in allowed:
            raise DataFileError(f"{path}: the unit of {what} is {unit!r}; must be one of {', '.join(allowed)}")
    return convert_units(units[target], "eV"), convert_units(metadata["_distance_unit"], "Ang")


def _entry(path: Path, row: Any, target: str, energy: float, length: float, periodic: bool) -> Entry:
    name = f"row {row.id}"
    if target not in row.data:
        raise DataFileError(f"{path}: {name} has no {target}")
    if not (all(row.pbc) if periodic else not any(row.pbc)):
        wanted = "in all three directions" if periodic else "in no direction"
        raise DataFileError(f"{path}: {name} has the periodic directions {row.pbc.tolist()}; must be periodic {wanted}")
    values = np.asarray(row.data[target], np.float64).ravel()
    if values.size != 1:
        raise DataFileError(f"{path}: {name} has {values.size} values of {target}, must have one")
    return Entry(
        name=name,
        numbers=row.numbers,
        positions=row.positions * length,
        target=float(values[0]) * energy,
        cell=row.cell * length if periodic else None,
    )
