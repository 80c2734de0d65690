"""What a recipe says of sensitivity: which settings of one optimizer are changed, and to what.

    [sensitivity]
    optimizer = { value = "ngplus", source = "this repository" }

    [sensitivity.grids.lr-damping]
    lr = { value = [0.02, 0.05, 0.1], source = "this repository" }
    damping = { value = [0.3, 1.0, 3.0], source = "this repository" }

Each grid is every combination of its values, everything else being as the recipe has it. The value ``"default"``
leaves a setting as it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from experiments.config.tuning_space import locate
from experiments.dataclass_io import SettingsError, list_allowed, read_settings

DEFAULT = "default"
# What a heat map can show.
MAX_AXES = 2


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One grid.

    Attributes:
        name: as in the recipe.
        axes: values by dotted key below the optimizer's table; at most two have several values.
    """

    name: str
    axes: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        long = [key for key, values in self.axes.items() if len(values) > 1]
        if not 1 <= len(long) <= MAX_AXES:
            raise ValueError(f"{len(long)} settings have several values: must be 1 or {MAX_AXES}")

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def cells(self) -> list[dict[str, Any]]:
        """The changes of each cell, by dotted key below the optimizer's table."""
        combinations = product(*self.axes.values())
        return [
            {key: value for key, value in zip(self.axes, cell, strict=True) if value != DEFAULT}
            for cell in combinations
        ]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The ``[sensitivity]`` table.

    Attributes:
        optimizer: whose settings are changed.
        epochs: epochs a run.
        grids: at least one.
    """

    optimizer: str
    epochs: int
    grids: tuple[Grid, ...]


def read_sensitivity(
    table: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], epochs: int, where: str
) -> Sensitivity:
    """Check a ``[sensitivity]`` table.

    Args:
        table: its values.
        settings: by name of an optimizer the table of its settings that can be searched.
        epochs: of a run, which a cell has too if the table says nothing.
        where: the file and table, for error messages.

    Returns:
        The grids of one optimizer.

    Raises:
        SettingsError: for what is unknown, missing, mistyped or out of range.
    """
    read = read_settings(_Table, {"epochs": epochs} | dict(table), where)
    if read.optimizer not in settings:
        raise SettingsError(f"{where}: optimizer = {read.optimizer!r}: is not in the recipe; {list_allowed(settings)}")
    own = settings[read.optimizer]
    grids = tuple(_grid(name, axes, own, f"{where}: grids.{name}") for name, axes in read.grids.items())
    return Sensitivity(optimizer=read.optimizer, epochs=read.epochs, grids=grids)


@dataclass(frozen=True, kw_only=True)
class _Table:
    optimizer: str
    epochs: int
    grids: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs = {self.epochs}: must be at least 1")
        if not self.grids:
            raise ValueError("grids: must have one at least")


def _grid(name: str, axes: Any, settings: Mapping[str, Any], where: str) -> Grid:
    if not isinstance(axes, Mapping):
        raise SettingsError(f"{where} = {axes!r}: must be a table of lists")
    found = {}
    for key, values in axes.items():
        if (place := locate(settings, key)) is None:
            raise SettingsError(f"{where}: {key} = {values!r}: there is no such setting")
        if not isinstance(values, list) or not values or len({repr(each) for each in values}) < len(values):
            raise SettingsError(f"{where}: {key} = {values!r}: must be a list of different values")
        found[place] = values
    try:
        return Grid(name=name, axes=found)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None
