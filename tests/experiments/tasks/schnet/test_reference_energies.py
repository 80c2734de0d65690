import numpy as np
import pytest

from experiments.tasks.schnet import qm9
from experiments.tasks.schnet.reference_energies import free_atoms, linear_fit
from tests.experiments.cases import molecules

STRUCTURES = molecules.collect_entries(molecules.molecules(60))


def test_free_atoms_and_mean_are_what_a_loop_takes_off():
    entries, energies = molecules.molecules(60), qm9.atom_energies()
    binding = [entry.target - sum(energies[z] for z in entry.numbers) for entry in entries]
    mean = np.mean([b / len(entry.numbers) for b, entry in zip(binding, entries, strict=True)])
    expected = [e.target - b + mean * len(e.numbers) for b, e in zip(binding, entries, strict=True)]
    np.testing.assert_allclose(free_atoms(STRUCTURES, energies).sum_over_atoms(STRUCTURES), expected, rtol=1e-13)


def test_an_element_without_a_free_atom_is_an_error():
    with pytest.raises(ValueError, match=r"no free atom's energy for the atomic numbers \[8, 11, 17, 26\]"):
        free_atoms(molecules.collect_entries(molecules.crystals()), np.full(100, np.nan))


def test_a_linear_law_is_fitted_exactly():
    law = np.random.default_rng(0).normal(size=100) * 1000
    counts = STRUCTURES.element_counts()
    structures = type(STRUCTURES)(**(STRUCTURES.arrays() | {"target": counts @ law}))
    np.testing.assert_allclose(linear_fit(structures).sum_over_atoms(structures), structures.target, rtol=1e-12)


def test_nothing_linear_is_left_after_the_fit():
    left = STRUCTURES.target - linear_fit(STRUCTURES).sum_over_atoms(STRUCTURES)
    counts = STRUCTURES.element_counts()
    np.testing.assert_allclose(counts.T @ left, 0, atol=1e-8)


def test_elements_that_were_not_fitted_count_nothing():
    fitted = linear_fit(molecules.collect_entries(molecules.crystals(2)))  # sodium alone
    assert np.flatnonzero(fitted.atoms).tolist() == [11]
