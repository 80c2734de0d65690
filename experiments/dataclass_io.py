"""Tables of plain values (TOML, JSON) to checked frozen dataclasses, and back.

A field's annotation is the check: ``int``, ``float`` (an integer will do), ``bool``, ``str``, ``Literal``,
``tuple[X, ...]``, several of these (``float | Literal["all"]``) or ``None``, a mapping, or a settings
dataclass. Where several dataclasses are allowed, each has a ``kind`` and the table's own ``kind`` says which
one it is.
"""

import dataclasses
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments.errors import UserError


class SettingsError(UserError):
    """A table that does not fit its dataclass; the message names the place, the key and the value."""


def list_allowed(names: Iterable[str]) -> str:
    """The allowed names, for an error message.

    Args:
        names: in any order.

    Returns:
        ``"must be one of …"``, sorted.
    """
    return "must be one of " + ", ".join(sorted(names))


def read_settings[T](cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a `cls` from a table.

    Args:
        cls: a dataclass; what its ``__post_init__`` refuses with ``ValueError`` is reported too.
        table: its fields by name.
        where: the file and table, for error messages.

    Returns:
        An instance of ``cls``.

    Raises:
        SettingsError: for an unknown, missing or mistyped key, or a value out of range.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in table:
        if key not in known:
            raise SettingsError(f"{where}: {key} = {table[key]!r}: unknown key; {list_allowed(known)}")
    for name, field in known.items():
        if name not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise SettingsError(f"{where}: {name} is missing")
    values = {key: _read_value(hints[key], value, f"{where}: {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None


def to_table(settings: Any) -> Any:
    """The table that `read_settings` would make `settings` from, defaults included.

    Args:
        settings: a settings dataclass, or a value in one.

    Returns:
        Plain tables, lists and values.
    """
    if dataclasses.is_dataclass(settings):
        kind = {"kind": settings.kind} if hasattr(settings, "kind") else {}
        return kind | {f.name: to_table(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, tuple | list):
        return [to_table(item) for item in settings]
    if isinstance(settings, Mapping):
        return {key: to_table(value) for key, value in settings.items()}
    return settings


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return _read_table((hint,), value, where)
    if origin is Literal:
        return _expect(value in get_args(hint), value, where, list_allowed(map(str, get_args(hint))))
    if origin is tuple:
        item, *rest = get_args(hint)
        length = None if rest == [...] else 1 + len(rest)
        fits = isinstance(value, list | tuple) and length in (None, len(value))
        _expect(fits, value, where, f"must be a list of {length or 'any number of'} values")
        return tuple(_read_value(item, each, where) for each in value)
    if hint is float:
        fits = isinstance(value, float | int) and not isinstance(value, bool)
        _expect(fits, value, where, "must be a number")
        return float(_expect(abs(value) <= sys.float_info.max, value, where, "must be finite"))
    kinds = {
        int: "an integer",
        bool: "true or false",
        str: "a string",
    }
    if hint in kinds:
        return _expect(type(value) is hint, value, where, f"must be {kinds[hint]}")
    return _expect(isinstance(value, Mapping), value, where, "must be a table")


def _read_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = tuple(hint for hint in hints if hint is not type(None))
    if all(dataclasses.is_dataclass(hint) for hint in others):
        return _read_table(others, value, where)
    return _read_first(others, value, where)


def _read_first(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """The value as the first of several plain kinds that it fits."""
    refusals = []
    for hint in hints:
        try:
            return _read_value(hint, value, where)
        except SettingsError as error:
            refusals.append(str(error).removeprefix(f"{where} = {value!r}: "))
    raise SettingsError(f"{where} = {value!r}: {', or '.join(refusals)}")


def _read_table(choices: tuple[type, ...], value: Any, where: str) -> Any:
    _expect(isinstance(value, Mapping), value, where, "must be a table")
    if not hasattr(choices[0], "kind"):
        (cls,) = choices
        return read_settings(cls, value, where)
    by_kind = {cls.kind: cls for cls in choices}  # type: ignore[attr-defined]
    if "kind" not in value:
        raise SettingsError(f"{where}: kind is missing; {list_allowed(by_kind)}")
    kind = value["kind"]
    _expect(kind in by_kind, kind, f"{where}: kind", list_allowed(by_kind))
    return read_settings(by_kind[kind], {k: v for k, v in value.items() if k != "kind"}, where)


def _expect(fits: bool, value: Any, where: str, allowed: str) -> Any:
    if not fits:
        raise SettingsError(f"{where} = {value!r}: {allowed}")
    return value
