"""What a challenge asks, and the one file that says it: ``challenge.toml``.

Written by hand, it may have a few of its keys; as the challenge keeps it, it has all that it takes to run it again:

    schema = 1

    [challenge]
    optimizer = "pytorch_optimizer:Lion"
    name = "lion"
    scale = "tiny"
    tasks = ["schnet-qm9"]

    [settings]
    weight_decay = 0.01

    [search.lr]
    low = 1e-4
    high = 1e-1
    log = true

    [versions]
    torch = "2.14.1"

    [made.schnet-qm9]
    trials = 8
    seeds = [1, 2, 3]

Of an optimizer in a file, the file is in it too, with its SHA-256.
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tomlkit

from experiments.config.recipe import check_seed
from experiments.config.tuning_space import Range
from experiments.dataclass_io import SettingsError, read_settings, to_table
from experiments.errors import UserError

SCHEMA = 1
FILE = "challenge.toml"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Attributes:
        optimizer: where it is; a file by its name alone, in `code` or next to `FILE`.
        name: what its records are called.
        scale: of the recipes.
        tasks: names, or where they are.
        seeds: ``()`` for the recipes' own.
        trials: of the search on each task; ``None`` for the recipes' own number, 0 for no search.
        around: ``"ngplus"``, whose directions it steps along; ``None`` for the gradient.
        schedule: of the learning rate: that of each recipe's reference, or none.
        baselines: the optimizers it is compared with; ``()`` for all that are recorded, or that the recipe has.
        rerun_baselines: run them here, so that seconds compare.
        threads: CPU threads of each process: another number may change the last digits.
        settings: values that are not searched, by name.
        search: where to search, by name; the learning rate around its default if there is none.
    """

    optimizer: str
    name: str
    scale: str = "tiny"
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    trials: int | None = None
    around: Literal["ngplus"] | None = None
    schedule: Literal["recipe", "constant"] = "recipe"
    baselines: tuple[str, ...] = ()
    rerun_baselines: bool = False
    threads: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 0:
            raise ValueError(f"trials = {self.trials}: must be at least 1, or 0 for no search")
        if self.threads < 1:
            raise ValueError(f"threads = {self.threads}: must be at least 1")
        if not self.tasks:
            raise ValueError("tasks = []: must be one task at least")
        for name in ("tasks", "seeds", "baselines"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} = {list(getattr(self, name))}: must be different from each other")
        for seed in self.seeds:
            check_seed(seed)
        if both := sorted(self.settings.keys() & self.search.keys()):
            raise ValueError(f"{both[0]}: is given a value and a range to search: must be one of the two")


@dataclass(frozen=True, kw_only=True)
class ChallengeFile:
    """``challenge.toml`` as read.

    Attributes:
        asked: the keys of `Question` that it has, ``settings`` and ``search`` among them.
        code: files by name.
        versions: of Python and the packages, by name; empty in a file written by hand.
        made: by task, what the recipe came to: seeds, trials, hashes.
    """

    asked: Mapping[str, Any]
    code: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> ChallengeFile:
    """Read a ``challenge.toml``.

    Args:
        path: the file.

    Returns:
        What it says.

    Raises:
        UserError: it cannot be read, is no TOML, has an unknown key, or code that is not what its hash says.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None
    if table.get("schema", SCHEMA) != SCHEMA:
        raise SettingsError(f"{path}: schema = {table['schema']!r}: this version reads schema {SCHEMA}")
    known = ("schema", "challenge", "settings", "search", "code", "versions", "made")
    for key, value in table.items():
        if key not in known:
            raise SettingsError(f"{path}: {key}: unknown key; must be one of {', '.join(sorted(known))}")
        if key != "schema" and not isinstance(value, dict):
            raise SettingsError(f"{path}: {key} = {value!r}: must be a table")
    own = {each.name for each in fields(Question)} - {"settings", "search"}
    for key, value in table.get("challenge", {}).items():
        if key not in own:
            raise SettingsError(
                f"{path}: challenge: {key} = {value!r}: unknown key; must be one of {', '.join(sorted(own))}"
            )
    asked = dict(table.get("challenge", {}))
    asked |= {key: table[key] for key in ("settings", "search") if key in table}
    return ChallengeFile(
        asked=asked,
        code=_read_code(table.get("code", {}), path),
        versions=table.get("versions", {}),
        made=table.get("made", {}),
    )


def write_file(path: Path, question: Question, file: ChallengeFile) -> None:
    """Write ``challenge.toml`` as a whole.

    Args:
        path: the file.
        question: what is asked.
        file: its code, versions, and what was made of it.
    """
    table = to_table(question)
    parts = {key: table.pop(key) for key in ("settings", "search")}
    code = {
        name: {"sha256": _hash(text), "text": tomlkit.string(text, multiline="\r" not in text)}
        for name, text in file.code.items()
    }
    whole = {
        "schema": SCHEMA,
        "challenge": {key: value for key, value in table.items() if value not in (None, [])},
        **{key: value for key, value in parts.items() if value},
        "versions": file.versions,
        "made": file.made,
        **({"code": code} if code else {}),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(tomlkit.dumps(_drop_none(whole)), encoding="utf-8")
    partial.replace(path)


def _drop_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without what TOML has no value for."""
    return {
        key: _drop_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def make_question(asked: Mapping[str, Any], where: str) -> Question:
    """The question that a table asks.

    Args:
        asked: its keys.
        where: who asks, for the error.

    Returns:
        The question.

    Raises:
        SettingsError: a key is missing, mistyped or out of range.
    """
    search = asked.get("search", {})
    ranges = {name: read_settings(Range, each, f"{where}: search: {name}") for name, each in search.items()}
    plain = {key: value for key, value in asked.items() if key != "search"}
    return read_settings(Question, plain | {"search": ranges}, where)


def parse_search(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ranges from the command line.

    Args:
        texts: each ``name=low:high`` or ``name=low:high:log``.

    Returns:
        Tables of `Range` by name.

    Raises:
        UserError: names what is not so.

    Example:
        >>> parse_search(["lr=1e-4:1e-1:log"])
        {'lr': {'low': 0.0001, 'high': 0.1, 'log': True}}
    """
    found = {}
    for text in texts:
        name, _, bounds = text.partition("=")
        low, *rest = bounds.split(":")
        try:
            if not name.strip() or len(rest) not in (1, 2) or rest[1:] not in ([], ["log"]):
                raise ValueError(bounds)
            ends = {"low": float(low), "high": float(rest[0])}
        except ValueError:
            raise UserError(f"--search {text!r}: must be name=low:high or name=low:high:log") from None
        _refuse_second(found, name.strip(), f"--search {text!r}")
        found[name.strip()] = ends | {"log": True} if rest[1:] else ends
    return found


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Values from the command line.

    Args:
        texts: each ``name=value``, the value written as in TOML, or else a string.

    Returns:
        Values by name.

    Raises:
        UserError: names what is not so.

    Example:
        >>> parse_settings(["betas=[0.9, 0.99]", "mode=fast"])
        {'betas': [0.9, 0.99], 'mode': 'fast'}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {text!r}: must be name=value")
        _refuse_second(found, name.strip(), f"--set {text!r}")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value.strip()
    return found


def _read_code(table: Mapping[str, Any], path: Path) -> dict[str, str]:
    code = {}
    for name, each in table.items():
        if not isinstance(each, dict) or set(each) != {"sha256", "text"} or Path(name).name != name:
            raise SettingsError(f"{path}: code: {name}: must be a file's name with sha256 and text")
        if _hash(each["text"]) != each["sha256"]:
            raise SettingsError(f"{path}: code: {name}: is not what its SHA-256 says: it was edited")
        code[name] = each["text"]
    return code


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_second(found: Mapping[str, Any], name: str, where: str) -> None:
    if name in found:
        raise UserError(f"{where}: {name} is given twice")
