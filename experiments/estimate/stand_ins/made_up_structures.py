"""QM9 and the Materials Project without them: the embedded samples, drawn from again and again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.data_io.atoms.structure_cache import StructureSet
from experiments.data_io.atoms.structures import Structures, gather_ranges
from experiments.dataclass_io import read_settings
from experiments.tasks.schnet import materials_project, qm9, schnet_matproj, schnet_qm9
from experiments.tasks.schnet.schnet_task import SchNetTask, SplitSettings

# Molecules and crystals that the authors' runs were split from (experiments/config/recipes): 117,031 + 13,800 of
# qm9pack, 125,397 + 13,933 of schnetpack's database.
MOLECULES, CRYSTALS = 130_831, 139_330
ATOMS = 30
"""Atoms a crystal, assumed: the database is not here to count them. Seconds are proportional to them."""


class _Few(SchNetTask):
    """SchNet on a small sample with as many steps an epoch as the whole data have."""

    def _sample(self, chosen: SplitSettings, data: StructureSet, where: str, whole: int) -> None:
        sampled = replace(chosen, train_size=None, validation_size=0, test_size=0)
        SchNetTask.__init__(self, sampled, data, where=where)
        self.train_size = chosen.train_size or whole - chosen.validation_size - chosen.test_size
        self.dataset = replace(self.dataset, train_size=self.train_size)

    def steps_per_epoch(self) -> int:
        """Of the whole data."""
        return self.train_size // self.settings.batch_size


class FewMolecules(_Few, schnet_qm9.SchNetQM9):
    """SchNet on the embedded molecules of QM9."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        where = f"{self.name}/{scale}, [task]"
        chosen = read_settings(schnet_qm9.Settings, settings, where)
        self._references = chosen.references
        data = qm9.load_embedded()
        self._sample(chosen, data, where, MOLECULES)
        self.made_up = (
            f"{len(data.structures):,} embedded molecules of QM9 stand for its {self.train_size:,} "
            f"training molecules ({MOLECULES:,} in qm9pack)"
        )


class Supercells(_Few, schnet_matproj.SchNetMatProj):
    """SchNet on the embedded crystals, each repeated to about `ATOMS` atoms."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        where = f"{self.name}/{scale}, [task]"
        chosen = read_settings(schnet_matproj.Settings, settings, where)
        small = materials_project.load_embedded()
        data = replace(small, structures=supercells(small.structures, ATOMS))
        self._sample(chosen, data, where, CRYSTALS)
        self.made_up = (
            f"{len(small.structures):,} embedded crystals, repeated to {data.structures.n_atoms.mean():.0f} atoms a "
            f"cell (assumed; seconds are proportional), stand for the {self.train_size:,} training crystals "
            "(the authors' split)"
        )


def supercells(structures: Structures, atoms: int) -> Structures:
    """Each crystal repeated along its first lattice vector to about so many atoms: its density stays as it is."""
    assert structures.cells is not None
    times = np.maximum(1, np.rint(atoms / structures.n_atoms)).astype(np.int64)  # (N,)
    chosen, starts = gather_ranges(structures.starts, np.repeat(np.arange(len(structures)), times))
    copy = np.concatenate([np.arange(n) for n in times])  # (copies,): which copy of its crystal each one is
    shift = np.repeat(copy[:, None] * np.repeat(structures.cells[:, 0], times, axis=0), np.diff(starts), axis=0)
    cells = structures.cells.copy()
    cells[:, 0] *= times[:, None]
    return Structures(
        numbers=structures.numbers[chosen],
        positions=(structures.positions[chosen] + shift).astype(np.float32),
        starts=np.concatenate([[0], np.cumsum(structures.n_atoms * times)]),
        target=structures.target,
        cells=cells,
    )
