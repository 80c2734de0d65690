"""What a recipe says of tuning: how many trials, how long each, and between which bounds.

    [tuning]
    trials = { value = 12, source = "this repository: the time there is" }

    [tuning.spaces.shared]
    weight_decay = { value = { low = 1e-5, high = 1e-2, log = true }, source = "this repository" }

    [tuning.spaces.ngplus]
    lr = { value = { low = 0.02, high = 0.6, log = true }, source = "this repository: around the paper's" }

The space ``shared`` holds for every optimizer that has such a setting and uses it; an optimizer's own space comes on
top of it. A setting that NG+ hands to its base is found there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.dataclass_io import SettingsError, list_allowed, read_settings, to_table

SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a setting is searched.

    Attributes:
        low: least value.
        high: greatest value.
        log: whether its logarithm is drawn evenly, or else the value itself.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low}: must be less than high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low = {self.low}: must be positive where log = true")

    def interpolate(self, share: float) -> float:
        """The value with this share, 0 to 1, of the range below it."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)

    def clip(self, value: float) -> float:
        """The value of the range that is nearest."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The ``[tuning]`` table.

    Attributes:
        trials: trials an optimizer.
        epochs: epochs a trial.
        spaces: for each optimizer, by dotted key below its table (``"base.weight_decay"``), where to search.
    """

    trials: int
    epochs: int
    spaces: Mapping[str, Mapping[str, Range]]


def read_tuning(table: Mapping[str, Any], settings: Mapping[str, Any], epochs: int, where: str) -> Tuning:
    """Check a ``[tuning]`` table.

    Args:
        table: its values.
        settings: each optimizer's settings, by name.
        epochs: of a run, which a trial has too if the table says nothing.
        where: the file and table, for error messages.

    Returns:
        The number of trials, their length, and the spaces by optimizer.

    Raises:
        SettingsError: for what is unknown, missing, mistyped or out of range.
    """
    read = read_settings(_Table, {"epochs": epochs} | dict(table), where)
    for name in read.spaces:
        if name not in (SHARED, *settings):
            raise SettingsError(f"{where}: spaces: {name} is no optimizer here; {list_allowed((SHARED, *settings))}")
    shared = _ranges(read.spaces, SHARED, where)
    spaces = {}
    for name, given in settings.items():
        own = _ranges(read.spaces, name, where)
        for key in own:
            if locate(given, key) is None:
                raise SettingsError(f"{where}: spaces.{name}: {key} is no setting of {name}")
        unused = getattr(given, "unused", ())
        taken = {key: each for key, each in shared.items() if key not in unused} | own
        found = {locate(given, key): each for key, each in sorted(taken.items(), key=_learning_rate_first)}
        spaces[name] = {key: each for key, each in found.items() if key is not None}
    return Tuning(trials=read.trials, epochs=read.epochs, spaces=spaces)


def locate(settings: Any, key: str) -> str | None:
    """Where an optimizer has a setting, ``key`` or ``base.key``; ``None`` if it has none of that name.

    Args:
        settings: the optimizer's settings.
        key: name of a setting.

    Returns:
        The dotted key.
    """
    table = to_table(settings)
    if key in table:
        return key
    return f"base.{key}" if key in table.get("base", {}) else None


def value_at(table: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key.

    Args:
        table: nested tables.
        key: dotted.

    Returns:
        The value.
    """
    for part in key.split("."):
        table = table[part]
    return table


@dataclass(frozen=True, kw_only=True)
class _Table:
    trials: int
    epochs: int
    spaces: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("trials", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


def _learning_rate_first(item: tuple[str, Range]) -> bool:
    return item[0] != "lr"


def _ranges(spaces: Mapping[str, Any], name: str, where: str) -> dict[str, Range]:
    table = spaces.get(name, {})
    if not isinstance(table, Mapping):
        raise SettingsError(f"{where}: spaces.{name} = {table!r}: must be a table")
    return {key: _range(value, f"{where}: spaces.{name}.{key}") for key, value in table.items()}


def _range(value: Any, where: str) -> Range:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{where} = {value!r}: must be a table of low, high and, if you like, log")
    return read_settings(Range, value, where)
