"""What a recipe says of tuning: how many trials, how long each, and between which bounds.

    [tuning]
    trials = { value = 12, source = "this repository: the time there is" }

    [tuning.spaces.shared]
    weight_decay = { value = { low = 1e-5, high = 1e-2, log = true }, source = "this repository" }

    [tuning.spaces.ngplus]
    lr = { value = { low = 0.02, high = 0.6, log = true }, source = "this repository: around the paper's" }

The space ``shared`` holds for every optimizer that has such a setting and uses it; an optimizer's own space comes on
top of it. A setting that NG+ hands to its base is found there. An element of a list is a setting by its number:
``betas.1``; one of a schedule is searched as ``schedule.warmup_epochs``. A number close to 1 is drawn by what it lacks:

    "betas.1" = { value = { low = 0.9, high = 0.9995, log = true, complement = true }, source = "this repository" }
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.dataclass_io import SettingsError, list_allowed, read_settings

SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a setting is searched.

    Attributes:
        low: least value.
        high: greatest value.
        log: whether its logarithm is drawn evenly, or else the value itself.
        complement: whether 1 − x is what is drawn, as suits a decay rate β: log = true then spreads .9, .99 and .999
            evenly.
    """

    low: float
    high: float
    log: bool = False
    complement: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low}: must be less than high = {self.high}")
        if self.log and not self.complement and self.low <= 0:
            raise ValueError(f"low = {self.low}: must be positive where log = true")
        if self.log and self.complement and self.high >= 1:
            raise ValueError(f"high = {self.high}: must be less than 1 where log = true and complement = true")

    @property
    def drawn(self) -> "Range":
        """The range of what is drawn: of 1 − x where `complement` is set."""
        if not self.complement:
            return self
        return Range(low=self.to_drawn(self.high), high=self.to_drawn(self.low), log=self.log)

    def to_drawn(self, value: float) -> float:
        """What stands for a value where values are drawn; its own inverse.

        Args:
            value: of the setting, or as drawn.

        Returns:
            1 − value where `complement` is set, or else the value; without the noise of the subtraction.
        """
        return round(1 - value, 12) if self.complement else value

    def interpolate(self, share: float) -> float:
        """The value with this share, 0 to 1, of the range below it."""
        if self.complement:
            return self.to_drawn(self.drawn.interpolate(1 - share))
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


def read_tuning(table: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], epochs: int, where: str) -> Tuning:
    """Check a ``[tuning]`` table.

    Args:
        table: its values.
        settings: by name of an optimizer the table of its settings that can be searched.
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
                raise SettingsError(
                    f"{where}: spaces.{name}: {key} is no setting of {name}{_describe_list(given, key)}"
                )
        for key in shared | own:
            if isinstance(elements := _value(given, key), list):
                names = _name_elements(key, elements)
                raise SettingsError(f"{where}: spaces.{name}: {key} is a list, {elements}: name an element, {names}")
        found = {locate(given, key): each for key, each in sorted((shared | own).items(), key=_learning_rate_first)}
        spaces[name] = {key: each for key, each in found.items() if key is not None}
    return Tuning(trials=read.trials, epochs=read.epochs, spaces=spaces)


def locate(settings: Mapping[str, Any], key: str) -> str | None:
    """Where an optimizer has a setting, ``key`` or ``base.key``; ``None`` if it has none of that name.

    Args:
        settings: the table of the optimizer's settings.
        key: name of a setting; with a number behind a dot, of an element of its list.

    Returns:
        The dotted key.
    """
    for dotted in (key, f"base.{key}"):
        try:
            value_at(settings, dotted)
        except (KeyError, IndexError, ValueError, TypeError):
            continue
        return dotted
    return None


def _value(settings: Mapping[str, Any], key: str) -> Any:
    place = locate(settings, key)
    return None if place is None else value_at(settings, place)


def _describe_list(settings: Mapping[str, Any], key: str) -> str:
    """What a list has, where ``key`` is an element that it does not have."""
    parent = key.rpartition(".")[0]
    elements = _value(settings, parent) if parent else None
    return f", whose {parent} has {_name_elements(parent, elements)}" if isinstance(elements, list) else ""


def _name_elements(key: str, elements: Sequence[Any]) -> str:
    return " or ".join(f'"{key}.{number}"' for number in range(len(elements)))


def value_at(table: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key.

    Args:
        table: nested tables and lists.
        key: dotted; a number stands for an element of a list.

    Returns:
        The value.
    """
    found: Any = table
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list | tuple) else found[part]
    return found


def short_name(key: str) -> str:
    """What the column of a setting is called: the last part of its key, with the part before where that is a number.

    Args:
        key: dotted.

    Returns:
        ``"lr"`` of ``"base.lr"``, ``"betas.1"`` of ``"base.betas.1"``.
    """
    parts = key.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def join_elements(table: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """Values with those of a list's elements put together into the list, which is what a recipe can be given.

    Args:
        table: the settings as they are, where the other elements come from.
        values: by dotted key below it.

    Returns:
        Values by dotted key; none is an element.
    """
    joined: dict[str, Any] = {}
    for key, value in values.items():
        parent, _, last = key.rpartition(".")
        if not last.isdigit():
            joined[key] = value
            continue
        elements = list(joined.get(parent, value_at(table, parent)))
        elements[int(last)] = value
        joined[parent] = elements
    return joined


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
