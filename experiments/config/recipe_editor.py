"""Putting values into a recipe's file: the lines of exactly these values change, every other byte stays."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.dataclass_io import SettingsError


def write_values(path: Path, values: Mapping[str, float], source: str) -> None:
    """Set values, by dotted key, each with its source.

    A value that the file does not have is put at the end of its table.

    Args:
        path: a recipe's file, changed in place.
        values: by dotted key.
        source: what is written next to each of them.

    Raises:
        SettingsError: for a table that is not in the file under a header of its own.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for key, value in values.items():
        _set(lines, key, f'{{ value = {value}, source = "{source}" }}', path)
    text = "".join(lines)
    _check(text, values, path)
    partial = path.with_suffix(".toml.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def check_writable(path: Path, keys: Iterable[str]) -> None:
    """Check that each value has a table to stand in, before it costs something to find it.

    Args:
        path: a recipe's file.
        keys: dotted.

    Raises:
        SettingsError: for a table that is not in the file under a header of its own.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for dotted in keys:
        _find_table(lines, dotted, path)


def _find_table(lines: list[str], dotted: str, path: Path) -> int:
    """The number of the header's line."""
    table, _, key = dotted.rpartition(".")
    header = re.compile(rf"\[{re.escape(table)}\]\s*(#.*)?$")
    start = next((number for number, line in enumerate(lines) if header.match(line)), None)
    if start is None:
        raise SettingsError(f"{path}: there is no line [{table}], below which {key} would stand")
    return start


def _set(lines: list[str], dotted: str, item: str, path: Path) -> None:
    start, key = _find_table(lines, dotted, path), dotted.rpartition(".")[2]
    end = next((number for number in range(start + 1, len(lines)) if lines[number].startswith("[")), len(lines))
    found = next((number for number in range(start, end) if re.match(rf"{re.escape(key)}\s*=", lines[number])), None)
    new = f"{key} = {item}\n"
    if found is not None:
        lines[found] = new
        return
    while not lines[end - 1].strip():
        end -= 1
    lines.insert(end, new)


def _check(text: str, values: Mapping[str, float], path: Path) -> None:
    """That the file now says what it should, whatever way it was written in."""
    try:
        written = {dotted: _value(tomllib.loads(text), dotted) for dotted in values}
    except tomllib.TOMLDecodeError:
        written = {}
    for dotted, value in values.items():
        if written.get(dotted) != value:
            raise SettingsError(f"{path}: {dotted} could not be set to {value}: is it on a line of its own?")


def _value(table: Mapping[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        table = table[part]
    return table["value"]
