import dataclasses
import itertools

import numpy as np
import pytest

from experiments.data_io.array_folder import prepare_folder
from experiments.data_io.atoms import neighbours
from experiments.data_io.atoms.neighbours import find_neighbours, prepare_neighbours
from tests.experiments.cases import molecules


def brute_force(entry, cutoff):
    """All ordered pairs below the cutoff, through so many images that no farther one can matter."""
    positions = entry.positions.astype(np.float32).astype(np.float64)
    reach = range(-4, 5) if entry.cell is not None else range(1)
    cell = np.zeros((3, 3)) if entry.cell is None else entry.cell
    return {
        (i, j, *shift)
        for shift in itertools.product(reach, repeat=3)
        for i, j in itertools.product(range(len(positions)), repeat=2)
        if (i != j or any(shift)) and np.linalg.norm(positions[j] - positions[i] + np.array(shift) @ cell) < cutoff
    }


def pairs_of(structures, found, k):
    """Pairs of a structure with their offsets in lattice vectors."""
    part = slice(found.starts[k], found.starts[k + 1])
    shifts = np.zeros((part.stop - part.start, 3), int)
    if found.offsets is not None:
        shifts = np.rint(found.offsets[part] @ np.linalg.inv(structures.cells[k])).astype(int)
        assert np.allclose(shifts @ structures.cells[k], found.offsets[part], atol=1e-5)
    rows = zip(found.centres[part].tolist(), found.others[part].tolist(), shifts.tolist(), strict=True)
    return [(i, j, *shift) for i, j, shift in rows]


@pytest.mark.parametrize("entries", [molecules.molecules(), molecules.crystals()], ids=["molecules", "crystals"])
@pytest.mark.parametrize("cutoff", [1.5, 5.0])
def test_the_pairs_are_those_that_every_pair_of_images_gives(entries, cutoff):
    structures = molecules.collect_entries(entries)
    found = find_neighbours(structures, cutoff)
    for k, entry in enumerate(entries):
        pairs = pairs_of(structures, found, k)
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == brute_force(entry, cutoff)


def test_several_processes_find_the_same_in_the_same_order(monkeypatch):
    structures = molecules.collect_entries(molecules.crystals(20))
    alone = find_neighbours(structures, 4.0)
    monkeypatch.setattr(neighbours, "FEW", 10)
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    together = find_neighbours(structures, 4.0)
    for name, array in alone.arrays().items():
        assert together.arrays()[name].dtype == array.dtype
        assert together.arrays()[name].tolist() == array.tolist()


def test_atoms_and_molecules_without_a_neighbour_have_no_pairs():
    entries = molecules.molecules()
    structures = molecules.collect_entries(entries)
    found = find_neighbours(structures, 5.0)
    assert np.diff(found.starts)[structures.n_atoms == 1].tolist() == [0, 0]


def test_a_flat_molecule_has_its_pairs():
    entry = dataclasses.replace(molecules.molecules(6)[5], positions=np.arange(18.0).reshape(6, 3) * [1, 0, 0])
    assert np.diff(find_neighbours(molecules.collect_entries([entry]), 100.0).starts).tolist() == [30]


def test_indices_are_stored_as_small_as_the_largest_structure_allows():
    many = dataclasses.replace(
        molecules.molecules(1)[0], numbers=np.ones(300, int), positions=np.random.default_rng(0).random((300, 3))
    )
    assert find_neighbours(molecules.collect_entries([many]), 5.0).centres.dtype == np.uint16
    assert find_neighbours(molecules.collect_entries(molecules.molecules()), 5.0).centres.dtype == np.uint8


@pytest.mark.parametrize(
    ("cutoff", "message"),
    [
        (0.1, "cutoff = 0.1: no two atoms of any structure are so near to each other"),
        (0.0, "cutoff = 0.0: must be at least 0.1 Å"),
        (float("nan"), "cutoff = nan: must be at least 0.1 Å"),
    ],
)
def test_a_cutoff_that_leaves_no_pairs_is_refused(cutoff, message):
    with pytest.raises(ValueError, match=message):
        find_neighbours(molecules.collect_entries(molecules.molecules()), cutoff)


@pytest.fixture
def kept(tmp_path):
    structures = molecules.collect_entries(molecules.crystals())
    return prepare_folder(tmp_path / "package", {}, structures.arrays, remedy=""), structures


def test_pairs_are_found_once_for_a_cutoff(kept, monkeypatch):
    folder, structures = kept
    first = prepare_neighbours(folder, structures, 4.0, remedy="")
    monkeypatch.setattr(neighbours, "find_neighbours", None)
    again = prepare_neighbours(folder, structures, 4.0, remedy="")
    assert again.offsets.tolist() == first.offsets.tolist()
    assert again.centres.tolist() == find_neighbours(structures, 4.0).centres.tolist()


def test_pairs_of_other_structures_are_found_again(kept):
    folder, structures = kept
    prepare_neighbours(folder, structures, 4.0, remedy="")
    other = molecules.collect_entries(molecules.crystals(4, seed=1))
    prepare_folder(folder, {"other": True}, other.arrays, remedy="")
    assert len(prepare_neighbours(folder, other, 4.0, remedy="").starts) == 5


def test_a_damaged_file_of_pairs_is_made_again(kept):
    folder, structures = kept
    first = prepare_neighbours(folder, structures, 4.0, remedy="")
    path = folder.with_name("package-neighbours-4") / "others.npy"
    path.write_bytes(path.read_bytes()[:-1])
    again = prepare_neighbours(folder, structures, 4.0, remedy="")
    assert again.others.tolist() == find_neighbours(structures, 4.0).others.tolist()
    assert len(first.others) == len(again.others)
