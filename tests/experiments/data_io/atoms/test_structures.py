import dataclasses

import numpy as np
import pytest

from experiments.data_io.atoms.structures import Structures, collect, gather_ranges
from experiments.data_io.checksum import DataFileError
from tests.experiments.cases import molecules


def test_entries_are_joined_in_their_order():
    entries = molecules.molecules()
    joined = molecules.collect_entries(entries)
    assert len(joined) == len(entries)
    for k, entry in enumerate(entries):
        atoms = slice(joined.starts[k], joined.starts[k + 1])
        assert joined.numbers[atoms].tolist() == entry.numbers.tolist()
        assert joined.positions[atoms].tolist() == entry.positions.astype(np.float32).tolist()
        assert joined.target[k] == entry.target


def test_a_selection_is_what_joining_those_entries_gives():
    entries = molecules.crystals()
    indices = np.array([5, 0, 5, 3])
    chosen = molecules.collect_entries(entries).select(indices)
    for k, index in enumerate(indices):
        alone = molecules.collect_entries([entries[index]])
        atoms = slice(chosen.starts[k], chosen.starts[k + 1])
        assert chosen.positions[atoms].tolist() == alone.positions.tolist()
        assert chosen.cells[k].tolist() == alone.cells[0].tolist()


def test_ranges_are_gathered_as_a_loop_would_gather_them():
    starts = np.array([0, 3, 3, 4, 9])
    indices = np.array([3, 1, 0])
    positions, new_starts = gather_ranges(starts, indices)
    assert positions.tolist() == [4, 5, 6, 7, 8, 0, 1, 2]
    assert new_starts.tolist() == [0, 5, 5, 8]


def test_elements_are_counted_by_structure():
    entries = molecules.molecules()
    counts = molecules.collect_entries(entries).element_counts()
    assert counts.tolist() == [[(entry.numbers == z).sum() for z in range(100)] for entry in entries]


GOOD = molecules.crystals(1)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": np.nan}, "has the target nan"),
        ({"target": np.inf}, "has the target inf"),
        ({"positions": GOOD.positions * np.nan}, "has the coordinate nan, must be finite in float32"),
        ({"positions": GOOD.positions + 1e39}, r"has the coordinate 1e\+39, must be finite in float32"),
        ({"target": -1e39}, r"has the target -1e\+39, must be finite in float32"),
        ({"positions": GOOD.positions[:, :2]}, r"has coordinates of shape \(1, 2\) for 1 atoms"),
        ({"numbers": np.array([0])}, "has an atomic number outside of 1 to 99"),
        ({"numbers": np.array([100])}, "has an atomic number outside of 1 to 99"),
        ({"numbers": np.array([], int), "positions": np.empty((0, 3))}, "has no atoms"),
        ({"cell": np.zeros((3, 3))}, "has a degenerate cell"),
        ({"cell": np.array([[4.0, 0, 0], [0, 4, 0], [4, 4, 1e-9]])}, "has a degenerate cell"),
        ({"cell": np.full((3, 3), np.nan)}, "has the length in its cell nan, must be finite in float32"),
        ({"cell": np.diag([1, -1e39, 1])}, r"has the length in its cell -1e\+39, must be finite in float32"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_with_its_source(change, message):
    with pytest.raises(DataFileError, match=f"^some file: mp-1 {message}"):
        collect([dataclasses.replace(GOOD, **change)], "some file")


def test_an_entry_that_is_there_twice_is_named_with_the_first():
    first, second = molecules.molecules(2)
    again = dataclasses.replace(first, name="other", target=0.0)
    with pytest.raises(DataFileError, match=r"some file: other is the same structure as dsgdb9nsd_000001\.xyz"):
        collect([first, second, again], "some file")


def test_mirrored_molecules_are_two():
    one = molecules.molecules(3)[2]
    mirrored = dataclasses.replace(one, name="mirrored", positions=-one.positions)
    assert len(collect([one, mirrored], "some file")) == 2


def test_no_entry_is_an_error():
    with pytest.raises(DataFileError, match="some file: holds no structure"):
        collect([], "some file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((3, 3))}, r"positions must be float32 of shape \(3, 3\), got float64"),
        ({"starts": np.array([0, 2])}, r"starts must go from 0 to 3, got 0 to 2"),
        ({"target": np.zeros(2)}, r"starts must be int64 of shape \(3,\), got int64 of shape \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    good = {
        "numbers": np.ones(3, np.uint8),
        "positions": np.zeros((3, 3), np.float32),
        "starts": np.array([0, 3]),
        "target": np.zeros(1),
    }
    Structures(**good)
    with pytest.raises(ValueError, match=message):
        Structures(**(good | change))
