import sqlite3
import subprocess
import sys
from contextlib import closing

import ase.db
import numpy as np
import pytest

from experiments.data_io.atoms.ase_database import read_ase_database
from experiments.data_io.checksum import DataFileError
from tests.experiments.cases import molecules

TARGET = "energy_U0"


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "some.db"
    molecules.write_database(molecules.molecules(4), path, TARGET)
    return path


def read(path, target=TARGET, periodic=False):
    return list(read_ase_database(path, target, periodic=periodic))


def test_positions_in_bohr_become_ångström(database):
    before = read(database)
    with ase.db.connect(database) as connection:
        connection.metadata = {**connection.metadata, "_distance_unit": "Bohr"}
    after = read(database)
    np.testing.assert_allclose(after[3].positions, before[3].positions * ase.units.Bohr)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"_property_unit_dict": {TARGET: "Debye"}}, r"the unit of energy_U0 is 'Debye'; must be one of eV, "),
        ({"_property_unit_dict": {TARGET: "eV/Ang"}}, r"the unit of energy_U0 is 'eV/Ang'"),
        ({"_distance_unit": "fs"}, "the unit of distance is 'fs'; must be one of Ang, "),
        ({"_property_unit_dict": {"gap": "eV", "alpha": "a0"}}, "has no property 'energy_U0'; it has alpha, gap"),
        ({"_property_unit_dict": None}, "does not say in which units it is"),
    ],
)
def test_a_wrong_property_or_unit_is_named(database, metadata, message):
    with ase.db.connect(database) as connection:
        connection.metadata = {**connection.metadata, **metadata}
    with pytest.raises(DataFileError, match=message):
        read(database)


def test_molecules_are_no_crystals_and_crystals_no_molecules(database, tmp_path):
    with pytest.raises(DataFileError, match=r"row 1 has the periodic directions \[False, False, False\]"):
        read(database, periodic=True)
    molecules.write_database(molecules.crystals(2), tmp_path / "crystals.db", TARGET)
    with pytest.raises(DataFileError, match="must be periodic in no direction"):
        read(tmp_path / "crystals.db")


def test_a_row_without_the_property_or_with_several_values_is_named(database):
    with ase.db.connect(database) as connection:
        connection.update(2, data={TARGET: np.array([1.0, 2.0])})
    with pytest.raises(DataFileError, match="row 2 has 2 values of energy_U0"):
        read(database)
    with ase.db.connect(database) as connection:
        connection.write(ase.Atoms("H"), data={"other": np.zeros(1)})
        connection.update(2, data={TARGET: np.array([1.0])})
    with pytest.raises(DataFileError, match="row 5 has no energy_U0"):
        read(database)


@pytest.mark.parametrize("size", [4096, 100])
def test_a_database_that_is_cut_short_is_named(database, size):
    database.write_bytes(database.read_bytes()[:size])
    with pytest.raises(DataFileError, match=r"some\.db cannot be read as an ASE database"):
        read(database)


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "some.db"
    path.write_text("no database " * 100)
    with pytest.raises(DataFileError, match=r"some\.db cannot be read as an ASE database"):
        read(path)


def test_a_missing_file_is_named_and_not_made(tmp_path):
    with pytest.raises(DataFileError, match=r"some\.db is missing"):
        read(tmp_path / "some.db")
    assert not (tmp_path / "some.db").exists()


def execute(path, *statements):
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("content", [b"", None])
def test_a_file_without_tables_is_named_and_not_written_to(content, tmp_path):
    """ASE would make its tables in it."""
    path = tmp_path / "some.db"
    path.touch()
    if content is None:
        execute(path, "CREATE TABLE other (x)")
    before = path.read_bytes()
    message = "it has no table 'systems'" if before else "it is empty"
    with pytest.raises(DataFileError, match=rf"some\.db cannot be read as an ASE database: {message}"):
        read(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_reading_changes_no_byte_of_the_file(mode, database):
    execute(database, f"PRAGMA journal_mode={mode}")
    before, numbers = database.read_bytes(), [entry.numbers.tolist() for entry in molecules.molecules(4)]
    database.chmod(0o444)
    assert [entry.numbers.tolist() for entry in read(database)] == numbers
    assert database.read_bytes() == before


BREAK_OFF = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")
connection.execute("CREATE TABLE large (x)")
connection.executemany("INSERT INTO large VALUES (zeroblob(3000))", [()] * 200)
os._exit(0)
"""


def test_a_change_that_was_broken_off_is_not_taken_back_here(database):
    """That would be a write; and the file alone holds half of the change."""
    subprocess.run([sys.executable, "-c", BREAK_OFF, database], check=True)
    journal = database.with_name("some.db-journal")
    before = database.read_bytes(), journal.read_bytes()
    with pytest.raises(DataFileError, match=r"some\.db cannot be read .*a change was broken off, see some\.db-journal"):
        read(database)
    assert (database.read_bytes(), journal.read_bytes()) == before
    execute(database, "PRAGMA user_version = 1")
    assert len(read(database)) == 4


def test_a_database_that_lacks_its_last_byte_is_named(database):
    """SQLite reads a zero in its place, where a row's data may be."""
    size = database.stat().st_size
    database.write_bytes(database.read_bytes()[:-1])
    with pytest.raises(DataFileError, match=rf"it is cut short: {size - 1:,} bytes, must be pages of 4,096"):
        read(database)


@pytest.mark.parametrize("column", ["numbers", "positions", "cell"])
def test_a_row_that_lacks_an_array_is_named(column, tmp_path):
    path = tmp_path / "crystals.db"
    molecules.write_database(molecules.crystals(4), path, TARGET)
    execute(path, f"UPDATE systems SET {column} = NULL WHERE id = 2")
    with pytest.raises(DataFileError, match=rf"crystals\.db: row 2 has no {column}"):
        read(path, periodic=True)


def test_a_molecule_needs_no_cell(database):
    execute(database, "UPDATE systems SET cell = NULL WHERE id = 2")
    assert [entry.cell for entry in read(database)] == [None] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("positions = substr(positions, 1, 25)", "the row after row 1 cannot be read: "),
        ("positions = substr(positions, 1, 16)", "the row after row 1 cannot be read: "),
        ("data = x''", "row 2 has properties that cannot be read: "),
        ("""data = '{"energy_U0": "low"}'""", "row 2: energy_U0 = 'low': must be a number"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(change, message, database):
    execute(database, f"UPDATE systems SET {change} WHERE id = 2")
    with pytest.raises(DataFileError, match=rf"some\.db: {message}"):
        read(database)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(DataFileError, match="is a folder; must be a file"):
        read(tmp_path)
