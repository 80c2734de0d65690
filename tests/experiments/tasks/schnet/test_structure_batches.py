import numpy as np
import pytest
import torch
from ase import Atoms
from schnetpack import properties
from schnetpack.data import ASEAtomsData, AtomsLoader
from schnetpack.transform import CastTo32, MatScipyNeighborList

from experiments.data_io.atoms.neighbours import find_neighbours
from experiments.tasks.schnet.structure_batches import TARGET, assemble
from tests.experiments.cases import molecules

INDICES = np.array([7, 2, 5, 0])


def schnetpacks_batch(entries, path, cutoff):
    """The same batch made by schnetpack's own database, neighbour list and loader."""
    dataset = ASEAtomsData.create(str(path), distance_unit="Ang", property_unit_dict={TARGET: "eV"})
    atoms = [Atoms(numbers=e.numbers, positions=e.positions, cell=e.cell, pbc=e.cell is not None) for e in entries]
    dataset.add_systems([{TARGET: np.array([e.target])} for e in entries], atoms)
    dataset.transforms = [MatScipyNeighborList(cutoff=cutoff), CastTo32()]
    return next(iter(AtomsLoader(dataset.subset(INDICES.tolist()), batch_size=len(INDICES))))


def pairs(batch):
    rows = torch.cat(
        [batch[properties.idx_i][:, None], batch[properties.idx_j][:, None], (batch[properties.offsets] * 1e3).round()],
        dim=1,
    )
    return sorted((rows + 0.0).tolist())


@pytest.mark.parametrize("entries", [molecules.molecules(), molecules.crystals()], ids=["molecules", "crystals"])
def test_a_batch_is_the_one_that_schnetpack_loads(entries, tmp_path):
    structures = molecules.collect_entries(entries)
    batch = assemble(structures, find_neighbours(structures, 3.0), structures.target, INDICES)
    theirs = schnetpacks_batch(entries, tmp_path / "some.db", 3.0)
    for key, value in batch.items():
        if key not in (properties.idx_i, properties.idx_j, properties.offsets):
            assert value.dtype == theirs[key].dtype, key
            torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pairs(batch), pairs(theirs), atol=1)
