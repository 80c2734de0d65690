"""SchNet on crystals of the Materials Project (section 5.2, Figure 3): the formation energy an atom."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.dataclass_io import read_settings
from experiments.tasks.protocol import Metric
from experiments.tasks.schnet import materials_project
from experiments.tasks.schnet.schnet_task import SchNetTask, SplitSettings


@dataclass(frozen=True, kw_only=True)
class Settings(SplitSettings):
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample; the 3,938 crystals of the package; or what the user put in place, the
            database of schnetpack.
    """

    data: Literal["embedded", "package", "database"]


class SchNetMatProj(SchNetTask):
    """Formation energies of crystals; the mean absolute error in eV an atom on the test split is what counts.

    No formula is in two of the splits.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range, or does not fit the data.
        DataFileError: a data file is missing or damaged.
    """

    name = "schnet-matproj"
    metric = Metric(name="MAE", unit="eV/atom", higher_is_better=False)
    aggregation = "avg"
    kind = "crystals"

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        where = f"{self.name}/{scale}, [task]"
        chosen = read_settings(Settings, settings, where)
        if chosen.data == "embedded":
            data = materials_project.load_embedded()
        else:
            data = materials_project.load(data_dir, chosen.data)
        super().__init__(chosen, data, where=where)

    def baseline(self, train: np.ndarray) -> np.ndarray:
        """The mean of the training split, as schnetpack does for a property that does not grow with the size."""
        target = self._structures.target
        return np.full(len(target), target[train].mean())
