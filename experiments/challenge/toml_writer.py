"""Plain tables as TOML, which the standard library reads but does not write."""

import json
from collections.abc import Mapping
from typing import Any


def dump_toml(table: Mapping[str, Any]) -> str:
    """A table as TOML; what is ``None`` is left out.

    Args:
        table: of strings, numbers, truth values, lists of these, and tables, by name.

    Returns:
        The text.

    Example:
        >>> print(dump_toml({"a": 1, "b": {"c": [0.5, "x"]}}), end="")
        a = 1
        <BLANKLINE>
        [b]
        c = [0.5, "x"]
    """
    return "\n".join(_lines(table, ())).lstrip("\n") + "\n"


def format_value(value: Any) -> str:
    """One value as TOML.

    Args:
        value: a string, number, truth value, list or table.

    Returns:
        Its text, on one line unless a string has several.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _format_string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {format_value(each)}" for name, each in value.items()) + " }"
    return repr(value)


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    own = {name: value for name, value in table.items() if value is not None and not isinstance(value, Mapping)}
    parts = {name: value for name, value in table.items() if isinstance(value, Mapping)}
    lines = ["", f"[{'.'.join(map(_key, path))}]"] if path and (own or not parts) else []
    lines += [f"{_key(name)} = {format_value(value)}" for name, value in own.items()]
    for name, value in parts.items():
        lines += _lines(value, (*path, name))
    return lines


def _key(name: str) -> str:
    plain = name and all(each.isascii() and (each.isalnum() or each in "-_") for each in name)
    return name if plain else json.dumps(name, ensure_ascii=False)


def _format_string(text: str) -> str:
    # What has lines stays readable where nothing in it would end it.
    if "\n" in text and "'''" not in text and not text.endswith("'") and all(c in "\n\t" or c >= " " for c in text):
        return f"'''\n{text}'''"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
