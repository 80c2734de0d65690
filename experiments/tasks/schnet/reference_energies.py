"""What is taken off an energy before a network learns the rest, in float64."""

from dataclasses import dataclass

import numpy as np

from experiments.data_io.atoms.structures import Structures


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """An energy a structure that is known without a network: a sum over its atoms.

    Attributes:
        atoms: eV by atomic number, float64, (100,).
        mean: eV an atom, on top.
    """

    atoms: np.ndarray
    mean: float

    def sum_over_atoms(self, structures: Structures) -> np.ndarray:
        """Σ over a structure's atoms, in eV, float64, (N,)."""
        return np.add.reduceat(self.atoms[structures.numbers] + self.mean, structures.starts[:-1])


def free_atoms(structures: Structures, energies: np.ndarray) -> Baseline:
    """The free atoms' energies, and the mean energy an atom that binding leaves, as schnetpack removes them.

    Args:
        structures: those trained on.
        energies: of the free atoms in eV by atomic number, (100,), NaN where unknown.

    Returns:
        Each element's energy, and the mean that is left.

    Raises:
        ValueError: a structure has an element whose energy is unknown.
    """
    unknown = np.unique(structures.numbers[np.isnan(energies[structures.numbers])])
    if len(unknown):
        raise ValueError(f"there is no free atom's energy for the atomic numbers {unknown.tolist()}")
    bare = Baseline(atoms=energies, mean=0.0)
    binding = structures.target - bare.sum_over_atoms(structures)
    return Baseline(atoms=energies, mean=float(np.mean(binding / structures.n_atoms)))


def linear_fit(structures: Structures) -> Baseline:
    """The energies by element whose sums fit the targets best, in least squares; 0 for absent elements.

    Args:
        structures: those trained on.

    Returns:
        Each element's energy.
    """
    counts = structures.element_counts()
    present = np.flatnonzero(counts.any(axis=0))
    energies = np.zeros(counts.shape[1])
    energies[present] = np.linalg.lstsq(counts[:, present].astype(np.float64), structures.target, rcond=None)[0]
    return Baseline(atoms=energies, mean=0.0)
