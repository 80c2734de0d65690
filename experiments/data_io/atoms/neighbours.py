"""Who is near whom: pairs of atoms within a cutoff, through periodic boundaries, found once and kept."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matscipy.neighbours import neighbour_list
from rich.progress import track

from experiments.data_io.array_folder import folder_sha256, open_folder, prepare_folder
from experiments.data_io.atoms.structures import Structures

CHUNK = 2000
"""Structures that a process takes at a time."""

LEAST_CUTOFF = 0.1
"""Å; the search divides space into bins of this size."""

FEW = 5000
"""So many structures are done in this process: to start others takes longer."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """P ordered pairs (i, j) of atoms less than a cutoff apart, by structure.

    Attributes:
        centres: i, counted within the structure, the smallest unsigned type that holds it, (P,).
        others: j, likewise.
        offsets: in Å, float32, (P, 3): what is added to the position of j, a lattice vector; ``None`` for
            molecules.
        starts: int64, (N + 1,): structure k has the pairs ``starts[k]`` to ``starts[k + 1] - 1``.
    """

    centres: np.ndarray
    others: np.ndarray
    offsets: np.ndarray | None
    starts: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names, as they are stored."""
        return {name: array for name, array in vars(self).items() if array is not None}


def find_neighbours(structures: Structures, cutoff: float) -> Neighbours:
    """The pairs of every structure, with a progress bar if it takes several processes.

    An atom may have no pair; then it contributes what its element alone says.

    Args:
        structures: molecules, or crystals with their cells.
        cutoff: in Å.

    Returns:
        Pairs of atoms, and the offsets between the cells that they are in.

    Raises:
        ValueError: the cutoff is below `LEAST_CUTOFF`, or leaves no pair in any structure.
    """
    if not cutoff >= LEAST_CUTOFF:
        raise ValueError(f"cutoff = {cutoff}: must be at least {LEAST_CUTOFF} Å")
    found = list(_in_chunks(structures, cutoff))
    if not any(len(part.centres) for part in found):
        raise ValueError(f"cutoff = {cutoff}: no two atoms of any structure are so near to each other")
    index = np.min_scalar_type(int(structures.n_atoms.max()) - 1)
    sizes = np.concatenate([np.diff(part.starts) for part in found])
    starts = np.zeros(len(structures) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return Neighbours(
        centres=np.concatenate([part.centres for part in found]).astype(index),
        others=np.concatenate([part.others for part in found]).astype(index),
        offsets=None if structures.cells is None else np.concatenate([part.offsets for part in found]),
        starts=starts,
    )


def prepare_neighbours(folder: Path, structures: Structures, cutoff: float, *, remedy: str) -> Neighbours:
    """The pairs of the structures in a folder made by `prepare_folder`, kept in a folder next to it.

    Args:
        folder: of the structures.
        structures: what is there.
        cutoff: in Å.
        remedy: see `open_folder`.

    Returns:
        The pairs, mapped from disk.

    Raises:
        ValueError: see `find_neighbours`.
    """
    target = folder.with_name(f"{folder.name}-neighbours-{cutoff:g}")
    description = {"structures": folder_sha256(folder), "cutoff": cutoff}
    prepare_folder(target, description, lambda: find_neighbours(structures, cutoff).arrays(), remedy=remedy)
    arrays = open_folder(target, description, remedy=remedy)
    return Neighbours(**({"offsets": None} | arrays))


def _in_chunks(structures: Structures, cutoff: float) -> Iterator[Neighbours]:
    work = partial(_of_chunk, cutoff=cutoff)
    if len(structures) <= FEW:
        yield work(structures)
        return
    parts = [
        structures.select(np.arange(start, min(start + CHUNK, len(structures))))
        for start in range(0, len(structures), CHUNK)
    ]
    # Not forked: torch has started its threads, and a fork would inherit their locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(parts), os.cpu_count() or 1), context) as pool:
        yield from track(pool.map(work, parts), f"Neighbours within {cutoff:g} Å", total=len(parts), transient=True)


def _of_chunk(structures: Structures, cutoff: float) -> Neighbours:
    found = [_of_one(structures, k, cutoff) for k in range(len(structures))]
    starts = np.zeros(len(found) + 1, np.int64)
    np.cumsum([len(centres) for centres, _, _ in found], out=starts[1:])
    centres, others, offsets = (np.concatenate(each) for each in zip(*found, strict=True))
    return Neighbours(centres=centres, others=others, offsets=offsets, starts=starts)


def _of_one(structures: Structures, k: int, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs and lattice vectors of one structure: int32 (P,), int32 (P,), float32 (P, 3)."""
    positions = structures.positions[structures.starts[k] : structures.starts[k + 1]].astype(np.float64)
    periodic = structures.cells is not None
    # For a molecule the cell only sets up the search; any that spans a volume will do.
    cell = structures.cells[k] if periodic else np.eye(3)
    centres, others, shifts = neighbour_list(
        "ijS", positions=positions, cell=cell, pbc=np.full(3, periodic), cutoff=cutoff
    )
    return centres, others, (shifts @ cell).astype(np.float32)
