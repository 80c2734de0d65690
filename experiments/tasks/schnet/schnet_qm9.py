"""SchNet on QM9 (section 5.2, Figure 3): the energy U0 of small organic molecules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.dataclass_io import read_settings
from experiments.tasks.protocol import Metric
from experiments.tasks.schnet import qm9
from experiments.tasks.schnet.reference_energies import free_atoms, linear_fit
from experiments.tasks.schnet.schnet_task import SchNetTask, SplitSettings


@dataclass(frozen=True, kw_only=True)
class Settings(SplitSettings):
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample; the 130,831 molecules of the package; or what the user put in place, the
            database of schnetpack or the published xyz files.
        references: what is taken off an energy: ``"free-atoms"``, the published energies of the free atoms
            and the mean binding energy an atom of the training split, as schnetpack does; or
            ``"linear-fit"``, the energies by element that fit the training split best.
    """

    data: Literal["embedded", "package", "database", "xyz"]
    references: Literal["free-atoms", "linear-fit"] = "free-atoms"


class SchNetQM9(SchNetTask):
    """Energies of molecules; the mean absolute error in eV on the test split is what counts.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range, or does not fit the data.
        DataFileError: a data file is missing or damaged.
    """

    name = "schnet-qm9"
    metric = Metric(name="MAE", unit="eV", higher_is_better=False)
    aggregation = "sum"
    kind = "molecules"

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        where = f"{self.name}/{scale}, [task]"
        chosen = read_settings(Settings, settings, where)
        self._references = chosen.references
        data = qm9.load_embedded() if chosen.data == "embedded" else qm9.load(data_dir, chosen.data)
        super().__init__(chosen, data, where=where)

    def baseline(self, train: np.ndarray) -> np.ndarray:
        """See `Settings.references`; in eV."""
        known = self._structures.select(train)
        if self._references == "linear-fit":
            return linear_fit(known).sum_over_atoms(self._structures)
        return free_atoms(known, qm9.atom_energies()).sum_over_atoms(self._structures)
