"""Databases as schnetpack writes them: ASE's format, with the units of each property in the metadata.

They are the user's: opened to be read alone, since ASE makes the tables of a file that has none.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.atoms.structures import Entry
from experiments.data_io.checksum import DataFileError
from experiments.data_io.text_lines import check_file

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
            something else, or a row cannot be read, lacks the property, its positions or its cell, or is not periodic
            as it should be.
    """
    with _open(path) as database:
        energy, length = _factors(path, database.metadata, target)
        rows, last = database.select(), "none"
        while True:
            try:
                row = next(rows, None)
            except (ValueError, TypeError, KeyError) as error:
                raise DataFileError(f"{path}: the row after {last} cannot be read: {error!r}") from None
            if row is None:
                return
            last = f"row {row.id}"
            yield _entry(f"{path}: {last}", row, target, energy, length, periodic)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    from ase.db.sqlite import SQLite3Database  # ase takes a second to import

    class ReadOnly(SQLite3Database):
        def _connect(self) -> sqlite3.Connection:
            return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=20)

    if not path.exists() and not path.is_symlink():
        raise DataFileError(f"{path} is missing: it is put in place by the user")
    check_file(path)
    try:
        _check_pages(path)
        with ReadOnly(str(path), use_lock_file=False) as database:
            yield database
    except (sqlite3.DatabaseError, ValueError, TypeError, KeyError, OSError) as error:
        reason = str(error)
        if isinstance(error, sqlite3.OperationalError) and path.with_name(f"{path.name}-journal").is_file():
            reason += f"; a change was broken off, see {path.name}-journal: open it with `sqlite3`, which takes it back"
        raise DataFileError(f"{path} cannot be read as an ASE database: {reason}") from None


def _check_pages(path: Path) -> None:
    """SQLite takes zeros for what is cut off the last page, and ASE a file without tables for one to be filled."""
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        tables = connection.execute("SELECT name FROM sqlite_master WHERE name = 'systems'").fetchall()
    if size % page:
        raise ValueError(f"it is cut short: {size:,} bytes, must be pages of {page:,}")
    if not tables:
        raise ValueError("it has no table 'systems'")


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


def _entry(name: str, row: Any, target: str, energy: float, length: float, periodic: bool) -> Entry:
    try:
        data = row.data
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataFileError(f"{name} has properties that cannot be read: {error!r}") from None
    if target not in data:
        raise DataFileError(f"{name} has no {target}")
    needed = {"numbers": row.numbers, "positions": row.positions, **({"cell": row.cell} if periodic else {})}
    for what, array in needed.items():
        if array is None:
            raise DataFileError(f"{name} has no {what}")
    if not (all(row.pbc) if periodic else not any(row.pbc)):
        wanted = "in all three directions" if periodic else "in no direction"
        raise DataFileError(f"{name} has the periodic directions {row.pbc.tolist()}; must be periodic {wanted}")
    return Entry(
        name=name.rpartition(": ")[2],
        numbers=row.numbers,
        positions=row.positions * length,
        target=_read_value(name, target, data[target]) * energy,
        cell=row.cell * length if periodic else None,
    )


def _read_value(name: str, target: str, value: Any) -> float:
    try:
        values = np.asarray(value, np.float64).ravel()
    except (ValueError, TypeError):
        raise DataFileError(f"{name}: {target} = {value!r}: must be a number") from None
    if values.size != 1:
        raise DataFileError(f"{name} has {values.size} values of {target}, must have one")
    return float(values[0])
