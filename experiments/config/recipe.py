"""Recipes: what a task is run with at a scale, every value with the source it was taken from.

``recipes/<task>/<scale>.toml`` has a table ``[task]``, which the task itself checks, a table ``[run]``, and
a table ``[optimizers.<name>]`` for each optimizer; tables ``[tuning]`` and ``[sensitivity]`` say where their
settings are searched (`tuning_space`, `sensitivity_grid`). Every value is written with its source:

    [run]
    epochs = { value = 52, source = "paper, appendix A" }

    [optimizers.ngplus]
    lr = { value = 0.18, source = "paper, appendix A" }

    [optimizers.ngplus.base]
    kind = { value = "sgd", source = "the authors' published code" }

A recipe that differs from another scale of the task in some values names that scale, and has these values alone:

    extends = { value = "small", source = "this repository: the same task" }

What it extends may extend another in turn. If it names an optimizer in ``[sensitivity]``, it has the grids of
that table alone.
"""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from experiments.config.sensitivity_grid import Sensitivity, read_sensitivity
from experiments.config.tuning_space import Tuning, read_tuning
from experiments.dataclass_io import SettingsError, list_allowed, read_settings, to_table
from experiments.errors import UserError
from experiments.optimizers.registry import Entry, find_outside
from experiments.optimizers.schedule_settings import Constant, DampingSchedule, LRSchedule
from experiments.records.run_record import Target
from experiments.tasks import TaskEntry, find_task
from experiments.tasks.protocol import Split, Task

RECIPES = Path(__file__).parent / "recipes"
SCALES = ("tiny", "small", "paper")
EXTENDS = "extends"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a task is run, whatever the optimizer.

    Attributes:
        epochs: passes over the training data.
        seeds: the seeds that are reported.
        tuning_seed: the seed at which settings were chosen; never one of `seeds`.
        target: the value of the metric that counts as reached; none if left out. ``"reference best"`` is the
            median over seeds of the best value of each of the reference's runs (`Comparable.target`).
        reference: the optimizer that the others are compared with; in a recipe that leaves it out, SGD if it is
            there, or else the first.
        report_split: the split that is evaluated after each epoch.
        precision: ``"bf16"`` runs the model under autocast; the optimizer always works in float32.
        accumulate: batches to one optimizer step.
        clip_norm: what a step's gradient is scaled down to where it is longer, over all parameters; no clipping if
            left out.
        decay: what weight decay is for: ``"matrices"``, the weights of linear layers, convolutions and attention that
            are tied to no embedding (`exempt_from_decay`); all parameters if left out.
    """

    epochs: int
    seeds: tuple[int, ...]
    tuning_seed: int
    target: Target | None = None
    reference: str | None = None
    report_split: Split = "test"
    precision: Literal["float32", "bf16"] = "float32"
    accumulate: int = 1
    clip_norm: float | None = None
    decay: Literal["matrices"] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm = {self.clip_norm}: must be positive, or left out for no clipping")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: must be a list of different integers")
        for seed in (*self.seeds, self.tuning_seed):
            check_seed(seed)
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed = {self.tuning_seed}: must not be one of the seeds reported")


def check_seed(seed: int) -> None:
    """Refuse what numpy's generators do not take.

    Args:
        seed: given by a recipe or on the command line.

    Raises:
        ValueError: names the seed and the range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: must be from 0 to {2**32 - 1}")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """An optimizer with its settings and schedules.

    Attributes:
        name: as in the recipe, with its suffix.
        entry: what builds it.
        settings: the registry's dataclass for it.
        schedule: of the learning rate.
        damping_schedule: of the damping, ``None`` to leave it as it is.
    """

    name: str
    entry: Entry
    settings: Any
    schedule: LRSchedule
    damping_schedule: DampingSchedule | None

    def __post_init__(self) -> None:
        if self.damping_schedule and not hasattr(self.settings, "damping"):
            raise ValueError(f"damping_schedule: {self.name} has no damping")

    @property
    def table(self) -> dict[str, Any]:
        """All settings, defaults and schedules included."""
        schedules = {"schedule": to_table(self.schedule), "damping_schedule": to_table(self.damping_schedule)}
        return to_table(self.settings) | schedules

    @property
    def searchable(self) -> dict[str, Any]:
        """`table` without the settings that make no difference to this optimizer."""
        unused = getattr(self.settings, "unused", ())
        return {key: value for key, value in self.table.items() if key not in unused}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as read and checked.

    Attributes:
        task_entry: the task: its name, what builds it.
        asked: what the task was asked for by: its name, or where it is.
        scale: one of `SCALES`, which may carry a suffix.
        path: the file.
        task_settings: the ``[task]`` table, for the task to check.
        run: the ``[run]`` table.
        optimizers: by name, in the file's order.
        sources: where each value comes from, by its dotted key, e.g. ``"optimizers.ngplus.lr"``.
        tuning: the ``[tuning]`` table, ``None`` without one.
        sensitivity: the ``[sensitivity]`` table, ``None`` without one.
        overrides: values that were given in place of the file's.
    """

    task_entry: TaskEntry
    asked: str
    scale: str
    path: Path
    task_settings: Mapping[str, Any]
    run: RunSettings
    optimizers: Mapping[str, OptimizerRecipe]
    sources: Mapping[str, str]
    tuning: Tuning | None
    sensitivity: Sensitivity | None
    overrides: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task's name."""
        return self.task_entry.name

    def build_task(self, data_dir: Path) -> Task:
        """The task, made with the ``[task]`` table; `data_dir` is where datasets are kept."""
        return self.task_entry.build(self.task_settings, scale=self.scale, data_dir=data_dir)

    def override(self, overrides: Mapping[str, Any]) -> "Recipe":
        """The recipe with other values, by dotted key."""
        given = (*self.overrides, *(f"{key}={value}" for key, value in overrides.items()))
        return load_recipe(self.asked, self.scale, overrides=given, folder=self.path.parents[1])

    def manifest_settings(self, optimizer: str) -> dict[str, Any]:
        """All settings of one optimizer's runs, defaults included, as a run's manifest keeps them."""
        return {
            "task": to_table(self.task_settings),
            "run": to_table(self.run),
            "optimizer": self.optimizers[optimizer].table,
        }


def load_recipe(task: str, scale: str, *, overrides: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """Read a recipe.

    Args:
        task: the task's name, or where it is (`find_task`).
        scale: one of `SCALES`, which may carry a suffix.
        overrides: values that replace the file's, e.g. ``"optimizers.sgd.lr=0.2"``.
        folder: where the recipes are, by default the task's own or this package's.

    Returns:
        The recipe, checked, with the overrides in it.

    Raises:
        SettingsError: for what is unknown, missing, mistyped or without a source; names the file, the key
            and the value, and lists what is allowed.
    """
    entry = find_task(task)
    path = _find_recipe(entry.name, scale, folder or entry.recipes or RECIPES)
    table = _read_tables(path)
    for override in overrides:
        _override(table, override)
    sources = dict(_sources(table, path))
    values = _values(table)
    _only_keys(values, ("task", "run", "optimizers"), ("tuning", "sensitivity"), str(path))
    optimizers = {name: _optimizer(name, own, path) for name, own in values["optimizers"].items()}
    run = _run(values, f"{path}: [run]")
    return Recipe(
        task_entry=entry,
        asked=task,
        scale=scale,
        path=path,
        task_settings=MappingProxyType(values["task"]),
        run=run,
        optimizers=optimizers,
        sources=sources,
        tuning=_search(read_tuning, values.get("tuning"), optimizers, run, f"{path}: [tuning]"),
        sensitivity=_search(read_sensitivity, values.get("sensitivity"), optimizers, run, f"{path}: [sensitivity]"),
        overrides=tuple(overrides),
    )


def list_scales(task: str, folder: Path | None = None) -> list[str]:
    """The scales that a task has a recipe for, small to large; one may carry a suffix, as ``paper-2048`` does.

    Args:
        task: the task's name.
        folder: where the recipes are, by default this package's own.

    Returns:
        Names of scales.
    """
    found = {path.stem: path.stem.partition("-")[0] for path in ((folder or RECIPES) / task).glob("*.toml")}
    return sorted((name for name in found if found[name] in SCALES), key=lambda name: (SCALES.index(found[name]), name))


def _find_recipe(task: str, scale: str, folder: Path) -> Path:
    there, path = list_scales(task, folder), folder / task / f"{scale}.toml"
    if scale not in there:
        if path.exists():
            raise SettingsError(
                f"{path}: a recipe {list_allowed(SCALES)}, or one of these with a suffix: {SCALES[0]}-fast"
            )
        raise SettingsError(f"scale = {scale!r}: {task} has no recipe for it; {list_allowed(there)}")
    return path


def _read_tables(path: Path, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's tables, on top of those of the recipe that it extends; `extending` are those that extend this one."""
    table = _read_toml(path)
    if below := [name for name, item in table.items() if isinstance(item, dict) and EXTENDS in item]:
        raise SettingsError(f"{path}: {EXTENDS} is in the table [{below[0]}]: must stand above all tables")
    if EXTENDS not in table:
        return table
    extended = table.pop(EXTENDS)
    if not _is_sourced(extended):
        raise SettingsError(f"{path}: {EXTENDS} = {extended!r}: has no source; must be written with value and source")
    scale = extended["value"]
    extending = (*extending, path.stem)
    others = [name for name in list_scales(path.parent.name, path.parents[1]) if name not in extending]
    if scale in extending:
        raise SettingsError(f"{path}: {EXTENDS} = {scale!r}: that recipe extends this one; {list_allowed(others)}")
    if scale not in others:
        raise SettingsError(f"{path}: {EXTENDS} = {scale!r}: there is no such recipe here; {list_allowed(others)}")
    below = _read_tables(path.with_name(f"{scale}.toml"), extending)
    if "optimizer" in table.get("sensitivity", {}):  # the grids below are another's
        below.pop("sensitivity", None)
    return _merge(below, table)


def _merge(below: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Tables in which what `top` has takes the place of what `below` has, value by value."""
    merged = dict(below)
    for key, item in top.items():
        both = isinstance(item, dict) and isinstance(below.get(key), dict)
        whole = _is_sourced(item) or _is_sourced(below.get(key))
        merged[key] = _merge(below[key], item) if both and not whole else item
    return merged


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None


def _is_sourced(item: Any) -> bool:
    return isinstance(item, dict) and set(item) == {"value", "source"}


def _sources(table: Mapping[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The source of each value by dotted key; a value without one is an error."""
    for key, item in table.items():
        dotted = f"{prefix}{key}"
        if _is_sourced(item):
            if not isinstance(item["source"], str) or not item["source"].strip():
                raise SettingsError(f"{path}: {dotted}: source = {item['source']!r}: must say where it is from")
            yield dotted, item["source"]
        elif isinstance(item, dict) and not {"value", "source"} & set(item):
            yield from _sources(item, path, f"{dotted}.")
        else:
            raise SettingsError(
                f'{path}: {dotted} = {item!r}: has no source; must be written {key} = {{ value = ..., source = "..." }}'
            )


def _values(table: Mapping[str, Any]) -> dict[str, Any]:
    """The same tables with the values alone."""
    return {key: item["value"] if _is_sourced(item) else _values(item) for key, item in table.items()}


def _override(table: dict[str, Any], override: str) -> None:
    """Put ``a.b.c=value``, the value written as in TOML, into a table."""
    dotted, equals, text = override.partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"] if equals else None
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not equals or not dotted.strip():
        raise UserError(f"{override!r}: must be written key=value, e.g. optimizers.sgd.lr=0.2")
    *parents, key = dotted.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[key] = {"value": value, "source": "given on the command line"}


def _only_keys(values: Mapping[str, Any], needed: tuple[str, ...], allowed: tuple[str, ...], where: str) -> None:
    for key, value in values.items():
        if key not in (*needed, *allowed):
            raise SettingsError(f"{where}: {key} = {value!r}: unknown key; {list_allowed((*needed, *allowed))}")
    for key in needed:
        if not isinstance(values.get(key), dict) or not values[key]:
            raise SettingsError(f"{where}: the table [{key}] is missing or empty")


def _run(values: Mapping[str, Any], where: str) -> RunSettings:
    run, names = read_settings(RunSettings, values["run"], where), list(values["optimizers"])
    reference = run.reference or ("sgd" if "sgd" in names else names[0])
    if reference not in names:
        raise SettingsError(
            f"{where}: reference = {reference!r}: there is no such optimizer here; {list_allowed(names)}"
        )
    return replace(run, reference=reference)


def _search[T](
    read: Callable[..., T], table: Any, optimizers: Mapping[str, OptimizerRecipe], run: RunSettings, where: str
) -> T | None:
    """A table that says what is searched, as `read` makes it."""
    if table is None:
        return None
    if not isinstance(table, dict):
        raise SettingsError(f"{where} = {table!r}: must be a table")
    return read(table, {name: each.searchable for name, each in optimizers.items()}, run.epochs, where)


def _optimizer(name: str, table: Any, path: Path) -> OptimizerRecipe:
    where = f"{path}: [optimizers.{name}]"
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: must be a table")
    entry = find_outside(name, table, f"{path}: [optimizers]", path.parent)
    schedules = {
        "schedule": table.get("schedule", {"kind": Constant.kind}),
        "damping_schedule": table.get("damping_schedule"),
    }
    own = {key: value for key, value in table.items() if key not in (*schedules, "kind")}
    settings = read_settings(entry.settings, own, where)
    read = read_settings(_Schedules, schedules, where)
    try:
        return OptimizerRecipe(
            name=name, entry=entry, settings=settings, schedule=read.schedule, damping_schedule=read.damping_schedule
        )
    except ValueError as error:
        raise SettingsError(f"{where}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Schedules:
    schedule: LRSchedule
    damping_schedule: DampingSchedule | None
