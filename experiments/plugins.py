"""Objects from outside, by where they are: ``package.module:Class``, ``./file.py:Class``, or an entry point's name."""

import hashlib
import importlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.errors import UserError

OPTIMIZERS_GROUP = "ngplus.optimizers"
TASKS_GROUP = "ngplus.tasks"
# Of a traceback: enough to see where it broke.
_LAST_LINES = 8


class PluginError(UserError):
    """Something from outside that cannot be had; the message says where it was sought."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What was found.

    Attributes:
        spec: where it is, as it was asked for.
        value: the object.
        file: the Python file it was read from by its path; ``None`` for what is installed.
        versions: of the distribution that it is from, by name; empty for a file.
    """

    spec: str
    value: Any
    file: Path | None
    versions: Mapping[str, str]


def is_spec(text: str) -> bool:
    """Whether a text says where something is, and is not a mere name.

    Args:
        text: from a recipe or a command line.

    Returns:
        Whether it has a colon.
    """
    return ":" in text


def find_file(spec: str, folder: Path) -> Path | None:
    """The Python file that a spec names by its path.

    Args:
        spec: where something is.
        folder: that a relative path is seen from.

    Returns:
        The file, ``None`` where the spec names a module or an entry point.
    """
    place, _, _ = spec.rpartition(":")
    return folder / place if place.endswith(".py") else None


def load_plugin(spec: str, *, group: str, where: str, folder: Path = Path()) -> Plugin:
    """Import an object.

    Args:
        spec: ``package.module:Class``, ``path/file.py:Class``, or the name of an entry point.
        group: of entry points that a name is looked up in.
        where: what is asked for, for the error.
        folder: that a relative path is seen from.

    Returns:
        The object and what it is from.

    Raises:
        PluginError: it is not there, or its import failed; then with the last lines of its traceback.
    """
    place, _, name = spec.rpartition(":")
    if not is_spec(spec):
        return _load_entry_point(spec, group, where)
    if not place or not name:
        raise PluginError(f"{where} = {spec!r}: must be package.module:Class or path/file.py:Class")
    file = find_file(spec, folder)
    module = _import_module(place, spec, where) if file is None else _import_file(file, spec, where)
    return Plugin(
        spec=spec,
        value=_get_attribute(module, name, spec, where),
        file=file,
        versions={} if file else dict(_find_versions(place.partition(".")[0])),
    )


def hash_file(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_entry_points(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group.

    Args:
        group: its name.

    Returns:
        By name.
    """
    return dict(_find_entry_points(group, tuple(sys.path)))


@cache
def _find_entry_points(group: str, _places: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Those of the packages that are installed in some places, which takes a tenth of a second to read."""
    return {each.name: each for each in entry_points(group=group)}


def describe_failure(error: BaseException) -> str:
    """The last lines of an exception's own traceback, without the frames that lead to it from here.

    Args:
        error: as it was caught.

    Returns:
        Some lines, each indented.
    """
    described = traceback.TracebackException.from_exception(error)
    leading = (__file__, "<frozen importlib", importlib.__file__)
    own = itertools.dropwhile(lambda frame: frame.filename.startswith(leading), described.stack)
    described.stack = traceback.StackSummary.from_list(list(own))
    text = "".join(described.format()).rstrip().splitlines()
    return "\n".join(f"  {line}" for line in text[-_LAST_LINES:])


def _load_entry_point(name: str, group: str, where: str) -> Plugin:
    there = list_entry_points(group)
    if name not in there:
        known = f"; there are {', '.join(sorted(there))}" if there else ""
        raise PluginError(
            f"{where} = {name!r}: no installed package has an entry point of this name in the group {group}{known}; "
            "else it must be package.module:Class or path/file.py:Class"
        )
    entry = there[name]
    try:
        value = entry.load()
    except Exception as error:
        raise PluginError(f"{where} = {name!r}: importing it failed:\n{describe_failure(error)}") from None
    versions = {entry.dist.name: entry.dist.version} if entry.dist else {}
    return Plugin(spec=name, value=value, file=None, versions=versions)


def _import_module(place: str, spec: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise PluginError(
                f"{where} = {spec!r}: there is no module {error.name} for {sys.executable}; install its package there"
            ) from None
        raise PluginError(f"{where} = {spec!r}: importing {place} failed:\n{describe_failure(error)}") from None
    except Exception as error:
        raise PluginError(f"{where} = {spec!r}: importing {place} failed:\n{describe_failure(error)}") from None


def _import_file(file: Path, spec: str, where: str) -> ModuleType:
    if not file.is_file():
        raise PluginError(f"{where} = {spec!r}: there is no file {file}")
    # Under the name of its place and content: the same file is read once; a changed one, or a copy elsewhere, again.
    place = hashlib.sha256(bytes(file.resolve())).hexdigest()
    name = f"ngplus_plugin_{place[:8]}_{hash_file(file)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    description = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent.resolve()))  # as for a script: what lies next to it can be imported
    try:
        # Not by the loader: its cache takes a file that changed within a second for the one before.
        exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{where} = {spec!r}: importing {file} failed:\n{describe_failure(error)}") from None
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return module


def _get_attribute(module: ModuleType, name: str, spec: str, where: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = sorted(each for each in vars(module) if each[0].isupper())
            known = f"; e.g. {', '.join(public[:8])}" if public else ""
            raise PluginError(f"{where} = {spec!r}: there is no {name} in {module.__file__}{known}")
        value = getattr(value, part)
    return value


@cache
def _find_versions(package: str) -> Mapping[str, str]:
    """The distributions that a package is from; reading the lists of files of all that are there takes a second."""
    names = packages_distributions().get(package, [])
    return {name.lower().replace("_", "-"): version(name) for name in sorted(set(names))}
