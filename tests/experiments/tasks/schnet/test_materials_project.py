import ase.db
import numpy as np
import pytest

from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.tasks.schnet import materials_project
from tests.experiments.cases import molecules

ENTRIES = molecules.crystals(10)


@pytest.fixture
def package(tmp_path, monkeypatch):
    path = tmp_path / "flla_2015.csv"
    molecules.write_flla(ENTRIES, path)
    monkeypatch.setattr(materials_project, "SHA256", compute_sha256(path))

    def fetch(requirement, member, scratch, *, source):
        assert (requirement, source) == ("matminer==0.3.9", True)
        target = scratch / path.name
        target.write_bytes(path.read_bytes())
        return target

    monkeypatch.setattr(materials_project, "pypi_file", fetch)
    return path


@pytest.mark.parametrize("source", ["package", "database"])
def test_every_source_gives_the_same_arrays(source, package, tmp_path):
    database = tmp_path / "materials-project" / "materials_project.db"
    molecules.write_database(ENTRIES, database, "formation_energy_per_atom")
    materials_project.prepare(tmp_path, source)
    loaded = materials_project.load(tmp_path, source)
    for name, array in molecules.collect_entries(ENTRIES).arrays().items():
        np.testing.assert_allclose(loaded.structures.arrays()[name], array, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.rglob(".download"))


def test_crystals_of_one_formula_are_one_group_and_follow_each_other(package, tmp_path):
    materials_project.prepare(tmp_path)
    loaded = materials_project.load(tmp_path)
    assert len(np.unique(loaded.groups)) == 4  # of one to four atoms
    assert np.count_nonzero(np.diff(loaded.groups[loaded.order])) == 3


def test_the_package_must_have_been_prepared(tmp_path):
    with pytest.raises(DataFileError, match=r"manifest\.json is missing: run `make data-matproj`"):
        materials_project.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'occu': 1", "'occu': 0.5", "mp-1 cannot be read: .*not always occupied"),
        ("'matrix'", "'other'", r"mp-1 cannot be read: KeyError\('matrix'\)"),
        ("{'lattice'", "{'lattice", "mp-1 cannot be read: SyntaxError"),
        ("'Na'", "'Xx'", r"mp-1 cannot be read: KeyError\('Xx'\)"),
        (",structure,", ",other,", r"mp-1 cannot be read: KeyError\('structure'\)"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(old, new, message, package):
    package.write_text(package.read_text().replace(old, new))
    with pytest.raises(DataFileError, match=message):
        list(materials_project._read_csv(package))


def test_a_crystal_without_volume_is_refused_and_nothing_is_kept(tmp_path):
    flat = molecules.crystals(2)
    flat[1].cell[2] = flat[1].cell[0]
    database = tmp_path / "materials-project" / "materials_project.db"
    molecules.write_database(flat, database, "formation_energy_per_atom", pbc=True)
    with pytest.raises(DataFileError, match="row 2 has a degenerate cell"):
        materials_project.load(tmp_path, "database")
    assert not (database.parent / "database").exists()


def test_an_update_of_a_database_is_seen(tmp_path):
    database = tmp_path / "materials-project" / "materials_project.db"
    molecules.write_database(ENTRIES, database, "formation_energy_per_atom")
    before = materials_project.load(tmp_path, "database")
    size = database.stat().st_size
    with ase.db.connect(database) as connection:
        connection.update(2, data={"formation_energy_per_atom": np.array([-1.5])})
    assert database.stat().st_size == size
    after = materials_project.load(tmp_path, "database")
    expected = before.structures.target.copy()
    expected[1] = -1.5
    assert after.structures.target.tolist() == expected.tolist()
    assert after.sha256 != before.sha256


def test_the_embedded_sample_is_whole_and_small(tmp_path):
    sample = materials_project.load_embedded()
    assert materials_project.EMBEDDED.stat().st_size <= 150_000
    assert len(sample.structures) == materials_project.EMBEDDED_SIZE
    assert sample.structures.n_atoms.max() <= 25
    assert np.isin(sample.structures.numbers, np.arange(1, 95)).all()
    assert (
        materials_project.write_embedded(sample.structures, tmp_path / "again.npz") == materials_project.EMBEDDED_SHA256
    )


def test_a_damaged_embedded_sample_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "materials_project.npz"
    copy.write_bytes(materials_project.EMBEDDED.read_bytes()[:-1])
    monkeypatch.setattr(materials_project, "EMBEDDED", copy)
    with pytest.raises(DataFileError, match=r"materials_project\.npz is truncated or damaged"):
        materials_project.load_embedded()
