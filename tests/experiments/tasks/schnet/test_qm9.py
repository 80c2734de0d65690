import inspect
import json
import os
import sqlite3
from contextlib import closing

import ase.units
import numpy as np
import pytest
from schnetpack.datasets import QM9

from experiments.data_io import packages
from experiments.data_io.atoms.structures import Structures
from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.tasks.schnet import qm9
from tests.experiments.cases import molecules

ENTRIES = molecules.molecules(14)
SOURCES = ("package", "database", "xyz")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's tables, in the folder that pip would have put them into; their checksums are the code's."""
    folder = tmp_path / "wheel"
    folder.mkdir()
    paths = [folder / name for name in qm9.SHA256]
    molecules.write_qm9pack(ENTRIES, paths)
    monkeypatch.setattr(qm9, "SHA256", {path.name: compute_sha256(path) for path in paths})
    asked = []

    def fetch(requirement, member, scratch):
        asked.append((requirement, member))
        target = scratch / member.rpartition("/")[2]
        target.write_bytes((folder / target.name).read_bytes())
        return target

    monkeypatch.setattr(qm9, "pypi_file", fetch)
    return asked


def put(source, root, entries=ENTRIES, **options):
    if source == "database":
        molecules.write_database(entries, root / "qm9" / "qm9.db", "energy_U0", **options)
    if source == "xyz":
        molecules.write_xyz(entries, root / "qm9" / "xyz-files")


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_arrays(source, package, tmp_path):
    put(source, tmp_path, **({"unit": "Ha", "factor": molecules.HARTREE} if source == "database" else {}))
    qm9.prepare(tmp_path, source)
    loaded = qm9.load(tmp_path, source)
    expected = molecules.collect_entries(ENTRIES)
    for name, array in expected.arrays().items():
        found = loaded.structures.arrays()[name]
        if name == "target":
            np.testing.assert_allclose(found, array, rtol=1e-14)
        else:
            assert found.tolist() == array.tolist()
    assert loaded.structures.cells is None
    assert sorted(loaded.order) == list(range(len(ENTRIES)))


@pytest.mark.parametrize("unit", ["eV", "Ha", "kcal/mol"])
def test_a_database_may_have_any_unit_of_energy(unit, tmp_path):
    factor = {"eV": 1.0, "Ha": ase.units.Hartree, "kcal/mol": ase.units.kcal / ase.units.mol}[unit]
    put("database", tmp_path, unit=unit, factor=factor)
    found = qm9.load(tmp_path, "database").structures.target
    np.testing.assert_allclose(found, molecules.collect_entries(ENTRIES).target, rtol=1e-12)


def test_the_hartree_is_the_one_that_schnetpack_converts_with():
    assert ase.units.Hartree == qm9.HARTREE


def test_the_package_is_fetched_once_and_its_tables_are_not_kept(package, tmp_path):
    folder = qm9.prepare(tmp_path)
    assert package == [("qm9pack==1.0.3", f"qm9pack/data/qm9_part{k}.csv") for k in (1, 2, 3)]
    qm9.prepare(tmp_path)
    assert len(package) == 3
    assert not list(folder.parent.rglob("*.csv"))


def test_the_package_must_have_been_prepared(tmp_path):
    with pytest.raises(DataFileError, match=r"manifest\.json is missing: run `make data-qm9`"):
        qm9.load(tmp_path)


def test_another_package_of_that_name_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setattr(qm9, "SHA256", {**qm9.SHA256, "qm9_part2.csv": "0" * 64})
    with pytest.raises(DataFileError, match=r"qm9_part2\.csv is truncated or damaged"):
        qm9.prepare(tmp_path)
    assert not (tmp_path / "qm9" / "package").exists()


@pytest.mark.parametrize("column", ["Elements", "XYZ_Ang", "InternalEnergy_0K_au"])
def test_a_row_that_cannot_be_read_is_named(column, tmp_path):
    path = tmp_path / "table.csv"
    molecules.write_qm9pack(ENTRIES, [path])
    header, *rows = path.read_text().splitlines()
    names = header.split(",")
    rows[3] = f"dsgdb9nsd_000004.xyz,{','.join('?' for _ in names[1:])}"
    path.write_text("\n".join([header, *rows]))
    with pytest.raises(DataFileError, match=r"table\.csv: dsgdb9nsd_000004\.xyz cannot be read"):
        list(qm9._read_csv(path))
    path.write_text("\n".join([header.replace(column, "other"), *rows[:2]]))
    with pytest.raises(DataFileError, match=rf"dsgdb9nsd_000001\.xyz cannot be read: KeyError\('{column}'\)"):
        list(qm9._read_csv(path))


def test_uncharacterized_molecules_are_left_out_if_their_list_is_there(tmp_path):
    put("xyz", tmp_path)
    assert len(qm9.load(tmp_path, "xyz").structures) == len(ENTRIES)
    lines = ["", "List of molecules", "====", "#   Index  GDB17 SMILES", "====", "     2  C", "    14  O", "===="]
    (tmp_path / "qm9" / "uncharacterized.txt").write_text("\n".join(lines))
    kept = qm9.load(tmp_path, "xyz").structures
    assert kept.target.tolist() == molecules.collect_entries([*ENTRIES[:1], *ENTRIES[2:13]]).target.tolist()


def test_a_file_that_is_cut_short_is_named(tmp_path):
    put("xyz", tmp_path)
    path = tmp_path / "qm9" / "xyz-files" / "dsgdb9nsd_000006.xyz"
    path.write_text("\n".join(path.read_text().splitlines()[:5]))
    with pytest.raises(
        DataFileError, match=r"dsgdb9nsd_000006\.xyz, line 1: 6 atoms must be followed by 10 lines .*there are 4"
    ):
        qm9.prepare(tmp_path, "xyz")


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataFileError, match=r"qm9\.db is missing: it is put in place by the user"):
        qm9.load(tmp_path, "database")
    with pytest.raises(DataFileError, match=r"xyz-files holds no \.xyz file"):
        qm9.load(tmp_path, "xyz")
    assert not (tmp_path / "qm9" / "database").exists()


def test_a_database_in_place_of_another_is_read_again(tmp_path):
    put("database", tmp_path)
    qm9.prepare(tmp_path, "database")
    (tmp_path / "qm9" / "qm9.db").unlink()
    put("database", tmp_path, entries=molecules.molecules(40))
    assert len(qm9.load(tmp_path, "database").structures) == 40


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_an_update_of_a_database_is_seen(mode, tmp_path):
    """In the mode ``wal`` the change is in a file next to the database, whose own bytes and time stay."""
    put("database", tmp_path)
    before = qm9.load(tmp_path, "database")
    path = tmp_path / "qm9" / "qm9.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        qm9.load(tmp_path, "database")
        found, size = path.read_bytes(), path.stat().st_size
        (data,) = connection.execute("SELECT data FROM systems WHERE id = 3").fetchone()
        (changed,) = before.structures.target[[2]] + 0.5
        corrected = data.replace(before.structures.target[2].tobytes(), changed.tobytes())
        assert corrected != data
        connection.execute("UPDATE systems SET data = ? WHERE id = 3", (corrected,))
        connection.commit()
        assert path.stat().st_size == size
        assert (path.read_bytes() == found) == (mode == "wal")
        after = qm9.load(tmp_path, "database")
    expected = before.structures.target.copy()
    expected[2] = changed
    assert after.structures.target.tolist() == expected.tolist()
    assert after.sha256 != before.sha256
    assert qm9.load(tmp_path, "database").structures.target.tolist() == expected.tolist()


@pytest.mark.parametrize("place", ["xyz-files/dsgdb9nsd_000003.xyz", "uncharacterized.txt"])
def test_a_file_corrected_in_place_is_read_again(place, tmp_path):
    put("xyz", tmp_path)
    (tmp_path / "qm9" / "uncharacterized.txt").write_text("1")
    before = qm9.load(tmp_path, "xyz").structures
    path = tmp_path / "qm9" / place
    old, new = (
        ("1", "2") if place == "uncharacterized.txt" else (f"\t{before.target[1] / qm9.HARTREE:.6f}"[:6], "\t-1.23")
    )
    text = path.read_text()
    assert text.count(old) == 1
    assert len(new) == len(old)
    path.write_text(text.replace(old, new))
    after = qm9.load(tmp_path, "xyz").structures
    assert len(after) == len(before)
    assert after.target.tolist() != before.target.tolist()
    expected = molecules.collect_entries(ENTRIES).target
    if place == "uncharacterized.txt":
        np.testing.assert_allclose(after.target, np.delete(expected, 1), rtol=1e-12)
    else:
        assert -2 < after.target[1] / qm9.HARTREE < -1


def test_a_source_that_stays_is_read_once(tmp_path, monkeypatch):
    put("database", tmp_path)
    first = qm9.load(tmp_path, "database")
    monkeypatch.setattr(qm9, "read_ase_database", None)
    again = qm9.load(tmp_path, "database")
    assert again.sha256 == first.sha256


def test_a_time_alone_makes_no_other_data(tmp_path):
    put("database", tmp_path)
    first = qm9.load(tmp_path, "database")
    os.utime(tmp_path / "qm9" / "qm9.db")
    assert qm9.load(tmp_path, "database").sha256 == first.sha256


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    put("database", tmp_path)

    def read(*args, **options):
        os.utime(tmp_path / "qm9" / "qm9.db")
        return iter(ENTRIES)

    monkeypatch.setattr(qm9, "read_ase_database", read)
    with pytest.raises(DataFileError, match=r"the source of .*database was changed while it was read"):
        qm9.load(tmp_path, "database")
    assert not (tmp_path / "qm9" / "database").exists()


@pytest.mark.parametrize("source", ["database", "xyz"])
def test_what_an_earlier_version_read_is_read_again_and_keeps_its_checksum(source, tmp_path):
    """It took files that are refused now; nothing in its folder says whether it did."""
    put(source, tmp_path)
    before = qm9.load(tmp_path, source)
    mark = tmp_path / "qm9" / source / "source.json"
    old = json.loads(mark.read_text())
    del old["readers"]
    mark.write_text(json.dumps(old))
    after = qm9.load(tmp_path, source)
    assert json.loads(mark.read_text()) != old
    assert after.sha256 == before.sha256


def test_an_empty_database_is_named_and_stays_empty(tmp_path):
    path = tmp_path / "qm9" / "qm9.db"
    path.parent.mkdir()
    path.touch()
    with pytest.raises(DataFileError, match=r"qm9\.db cannot be read as an ASE database: it is empty"):
        qm9.load(tmp_path, "database")
    assert path.stat().st_size == 0


# --- the molecules that failed the consistency check


@pytest.fixture
def fourteen(monkeypatch):
    """As if the published set had 14 molecules, two of which failed the check."""
    monkeypatch.setattr(qm9, "PUBLISHED", 14)
    monkeypatch.setattr(qm9, "CHARACTERIZED", 12)


def test_a_database_of_all_that_was_published_is_refused(fourteen, tmp_path):
    """schnetpack's `QM9` makes it so by default; of what is left out there is no trace in it."""
    put("database", tmp_path)
    with pytest.raises(
        DataFileError, match=r"qm9\.db holds 14 molecules.* must be the 12 .*remove_uncharacterized=True"
    ):
        qm9.load(tmp_path, "database")
    assert not (tmp_path / "qm9" / "database").exists()


@pytest.mark.parametrize(
    ("listed", "message"),
    [(None, "is missing or lists none"), ("# none", "is missing or lists none"), ("2", "lists 1 molecules")],
)
def test_all_published_files_without_the_list_are_refused(listed, message, fourteen, tmp_path):
    put("xyz", tmp_path)
    if listed:
        (tmp_path / "qm9" / "uncharacterized.txt").write_text(listed)
    with pytest.raises(DataFileError, match=rf"14 molecules of QM9, .*txt {message}; it must list the 2 that failed"):
        qm9.load(tmp_path, "xyz")


def test_a_database_that_lost_a_row_is_refused_as_the_whole_one_is(fourteen, tmp_path):
    """One of 13 has failed the check, since 12 passed it."""
    put("database", tmp_path, ENTRIES[:13])
    with pytest.raises(DataFileError, match=r"qm9\.db holds 13 molecules, some that failed .* must be the 12 "):
        qm9.load(tmp_path, "database")


@pytest.mark.parametrize(
    ("listed", "message"), [(None, "is missing"), ("2", "lists 1 molecules"), ("2\n14\n5", "lists 3")]
)
def test_published_files_less_one_are_refused_without_the_list_too(listed, message, fourteen, tmp_path):
    put("xyz", tmp_path, ENTRIES[:13])
    if listed:
        (tmp_path / "qm9" / "uncharacterized.txt").write_text(listed)
    with pytest.raises(DataFileError, match=rf"13 molecules of QM9, .*txt {message}.*; it must list the 2 that failed"):
        qm9.load(tmp_path, "xyz")


def test_published_files_less_one_lose_those_of_the_list(fourteen, tmp_path):
    put("xyz", tmp_path, ENTRIES[:13])
    (tmp_path / "qm9" / "uncharacterized.txt").write_text("  2  C\n  14  O\n")
    loaded = qm9.load(tmp_path, "xyz")
    expected = molecules.collect_entries([ENTRIES[0], *ENTRIES[2:13]])
    np.testing.assert_allclose(loaded.structures.target, expected.target, rtol=1e-14)


def test_what_is_left_of_all_published_files_is_qm9(fourteen, tmp_path):
    put("xyz", tmp_path)
    (tmp_path / "qm9" / "uncharacterized.txt").write_text("  2  C\n  14  O\n")
    assert qm9.load(tmp_path, "xyz").name == "QM9"


def test_only_the_whole_set_is_called_qm9(fourteen, tmp_path):
    put("database", tmp_path, ENTRIES[:12])
    assert qm9.load(tmp_path, "database").name == "QM9"
    put("xyz", tmp_path, ENTRIES[:11])
    assert qm9.load(tmp_path, "xyz").name == "11 molecules in QM9's format"


def test_schnetpack_keeps_all_that_was_published_unless_told_otherwise():
    """What makes the refusal necessary, and the number that it goes by."""
    assert inspect.signature(QM9).parameters["remove_uncharacterized"].default is False
    assert str(qm9.PUBLISHED) in inspect.getsource(QM9.prepare_data)
    assert qm9.PUBLISHED - qm9.CHARACTERIZED == 3054


def test_free_atoms_have_an_energy_where_qm9_has_an_element():
    energies = qm9.atom_energies()
    assert np.flatnonzero(~np.isnan(energies)).tolist() == [1, 6, 7, 8, 9]
    assert energies[1] == pytest.approx(-13.613, abs=1e-3)


# --- the embedded sample


def test_the_embedded_sample_is_whole_and_small():
    sample = qm9.load_embedded()
    assert qm9.EMBEDDED.stat().st_size <= 900_000
    assert len(sample.structures) == qm9.EMBEDDED_SIZE
    assert set(sample.structures.numbers) == {1, 6, 7, 8, 9}
    assert sample.order.tolist() == list(range(qm9.EMBEDDED_SIZE))
    binding = sample.structures.target - np.add.reduceat(
        qm9.atom_energies()[sample.structures.numbers], sample.structures.starts[:-1]
    )
    assert (binding / sample.structures.n_atoms).max() < -2  # eV an atom: every molecule is bound


def test_the_embedded_sample_can_be_packed_again_to_the_byte(tmp_path):
    assert qm9.write_embedded(qm9.load_embedded().structures, tmp_path / "again.npz") == qm9.EMBEDDED_SHA256


def test_a_damaged_embedded_sample_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "qm9.npz"
    copy.write_bytes(qm9.EMBEDDED.read_bytes()[:-1])
    monkeypatch.setattr(qm9, "EMBEDDED", copy)
    with pytest.raises(DataFileError, match=r"qm9\.npz is truncated or damaged"):
        qm9.load_embedded()


def test_the_sample_is_the_first_of_the_drawn_order(package, tmp_path, monkeypatch):
    monkeypatch.setattr(qm9, "EMBEDDED_SIZE", 5)
    qm9.prepare(tmp_path)
    drawn, whole = qm9.draw_embedded(tmp_path), qm9.load(tmp_path)
    assert isinstance(drawn, Structures)
    assert drawn.target.tolist() == whole.structures.target[whole.order[:5]].tolist()


def test_pip_is_asked_for_the_exact_package(tmp_path, monkeypatch):
    commands = []

    def fails(folder, command):
        commands.append(command)
        raise DataFileError("no network")

    monkeypatch.setattr(packages, "run_in", fails)
    with pytest.raises(DataFileError, match="no network"):
        qm9.prepare(tmp_path)
    assert commands[0][-1] == "qm9pack==1.0.3"
    assert not (tmp_path / "qm9" / "package").exists()
