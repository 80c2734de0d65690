"""Batches of structures in the form that schnetpack's models take."""

import numpy as np
import torch
from schnetpack import properties
from torch import Tensor

from experiments.data_io.atoms.neighbours import Neighbours
from experiments.data_io.atoms.structures import Structures, gather_ranges

TARGET = "target"

Batch = dict[str, Tensor]


def assemble(structures: Structures, neighbours: Neighbours, target: np.ndarray, indices: np.ndarray) -> Batch:
    """One batch, gathered from the flat arrays without a loop over structures.

    Args:
        structures: N structures.
        neighbours: their pairs.
        target: what the model is to predict, (N,).
        indices: of the structures in the batch, (B,).

    Returns:
        Tensors by schnetpack's keys, for A atoms and P pairs: atomic numbers int64 (A,), positions float32
        (A, 3), the batch's index of each atom's structure (A,), centre and neighbour of each pair among the
        batch's atoms (P,), offsets float32 (P, 3), numbers of atoms (B,); and the target, float32 (B,).
    """
    atoms, atom_starts = gather_ranges(structures.starts, indices)
    pairs, pair_starts = gather_ranges(neighbours.starts, indices)
    first_atom = np.repeat(atom_starts[:-1], np.diff(pair_starts))  # (P,)
    n_atoms = np.diff(atom_starts)
    arrays = {
        properties.Z: structures.numbers[atoms].astype(np.int64),
        properties.R: structures.positions[atoms],
        properties.idx_m: np.repeat(np.arange(len(indices)), n_atoms),
        properties.idx_i: neighbours.centres[pairs] + first_atom,
        properties.idx_j: neighbours.others[pairs] + first_atom,
        properties.offsets: (
            np.zeros((len(pairs), 3), np.float32) if neighbours.offsets is None else neighbours.offsets[pairs]
        ),
        properties.n_atoms: n_atoms,
        TARGET: target[indices].astype(np.float32),
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
