"""The recipes of a challenge: each task's own, with the challenger, its schedule and its search put in."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tomlkit
from tomlkit.items import InlineTable

from experiments.challenge.folder import Folder
from experiments.challenge.question import FILE, Question
from experiments.config.recipe import Recipe, load_recipe
from experiments.config.recipe_editor import write_values
from experiments.config.tuning_space import Range
from experiments.dataclass_io import SettingsError, list_allowed, to_table
from experiments.errors import UserError
from experiments.optimizers.outside import OutsideOptimizer, load_outside
from experiments.optimizers.registry import OPTIMIZERS, NGPlusSettings, check_name
from experiments.plugins import find_file, is_spec

# Of a recipe without a table [tuning].
TRIALS = 8
# A learning rate is searched a decade and a half wide around its default, as the recipes' own are.
_DECADES = 1.5
_SOURCE = FILE


def load_challenger(question: Question, folder: Path) -> OutsideOptimizer:
    """The optimizer that is challenged.

    Args:
        question: what is asked.
        folder: that has its code, if it is a file.

    Returns:
        Its settings and what builds it.

    Raises:
        UserError: it cannot be had, or takes no setting of one of these names or kinds.
    """
    found = load_outside(question.optimizer, given=question.settings, where="optimizer", folder=folder)
    own = {each.name for each in fields(found.settings)}
    allowed = own | ({each.name for each in fields(NGPlusSettings)} - {"base"} if question.around else set())
    for option, names in (("--set", question.settings), ("--search", question.search)):
        for name in names:
            if name not in allowed:
                raise SettingsError(
                    f"{option} {name}: {question.optimizer} has no such setting; {list_allowed(allowed)}"
                )
    for name in question.search:
        hint = get_type_hints(found.settings if name in own else NGPlusSettings)[name]
        if float not in (hint, *get_args(hint)):
            raise SettingsError(f"--search {name}: is no number with decimals: must be given with --set")
    return found


def choose_name(optimizer: str, around: str | None, taken: Iterable[str]) -> str:
    """What a challenger is called if nobody says: its class's name, with a suffix where that is taken.

    Args:
        optimizer: where it is.
        around: what it is put into.
        taken: names of the recipes' optimizers.

    Returns:
        Small letters and digits, with hyphens between.
    """
    last = optimizer.rpartition(":")[2] if is_spec(optimizer) else optimizer
    plain = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-") or "challenger"
    name = f"{around}-{plain}" if around else plain
    return f"{name}-challenger" if name in {*taken, *OPTIMIZERS} else name


def check_challenger_name(name: str, taken: Iterable[str]) -> None:
    """Refuse a name that cannot be that of a file, or is one of the recipes'.

    Args:
        name: of the challenger.
        taken: names of the recipes' optimizers.

    Raises:
        UserError: names it.
    """
    check_name(name, "--name")
    if name in {*taken, *OPTIMIZERS}:
        raise UserError(f"--name {name}: is one of the suite's own optimizers: must be another")


def write_recipe(question: Question, task: str, challenger: OutsideOptimizer, folder: Folder) -> Recipe:
    """Write the recipe of one task with the challenger in it.

    Args:
        question: what is asked.
        task: one of its tasks, as it is asked for.
        challenger: as it was loaded.
        folder: of the challenge.

    Returns:
        The recipe that was written, checked.

    Raises:
        UserError: the task has no such recipe, or a setting is out of range.
    """
    original = load_recipe(task, question.scale)
    tables = dict(_optimizer_tables(question, original, challenger))
    if question.trials != 0 and (space := _space(question, challenger)):
        tables[f"tuning.spaces.{question.name}"] = {name: to_table(each) for name, each in space.items()}
    text = original.path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    if original.tuning is None:
        tables = {"tuning": {"trials": question.trials or TRIALS}} | tables
    text += "".join(f"\n[{name}]\n{tomlkit.dumps(_with_sources(values))}" for name, values in tables.items())
    path = folder.recipes / original.task / f"{question.scale}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: a recipe that is half written is never read.
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    changes: dict[str, Any] = {"run.seeds": list(question.seeds)} if question.seeds else {}
    changes |= {"tuning.trials": question.trials} if question.trials else {}
    write_values(draft, changes, _SOURCE)
    draft.replace(path)
    recipe = load_recipe(task, question.scale, folder=folder.recipes)
    for name in question.baselines:
        if name not in recipe.optimizers or name == question.name:
            raise UserError(
                f"--baselines {name}: {original.path} has no such optimizer; {list_allowed(original.optimizers)}"
            )
    return recipe


def _with_sources(values: Mapping[str, Any]) -> dict[str, InlineTable]:
    """Each value as a recipe has it, on one line with its source."""
    lines = {}
    for key, value in values.items():
        lines[key] = tomlkit.inline_table()
        lines[key].update({"value": value, "source": _SOURCE})
    return lines


def _optimizer_tables(
    question: Question, recipe: Recipe, challenger: OutsideOptimizer
) -> Iterable[tuple[str, dict[str, Any]]]:
    name, where = question.name, f"optimizers.{question.name}"
    kind = {"kind": f"../../{question.optimizer}" if find_file(question.optimizer, Path()) else question.optimizer}
    values = _start(question, challenger) | dict(question.settings)
    if question.around is None:
        yield where, kind | values
    else:
        ngplus = _choose_ngplus(recipe)
        taken = {each.name for each in fields(NGPlusSettings)} - {"base"}
        own = {key: value for key, value in to_table(ngplus.settings).items() if key in taken and value is not None}
        yield where, own | {key: value for key, value in values.items() if key in taken}
        yield f"{where}.base", kind | {key: value for key, value in values.items() if key not in taken}
        if ngplus.damping_schedule:
            yield f"{where}.damping_schedule", to_table(ngplus.damping_schedule)
    if question.schedule == "recipe":
        schedule = recipe.optimizers[recipe.run.reference or name].schedule
        yield f"{where}.schedule", {key: each for key, each in to_table(schedule).items() if each is not None}


def _choose_ngplus(recipe: Recipe) -> Any:
    """The recipe's NG+ around its reference, or else the plain one, or the first."""
    forms = [
        name
        for name, each in recipe.optimizers.items()
        if name.partition("-")[0] == "ngplus" and each.settings.basis is None
    ]
    if not forms:
        raise UserError(f"--around ngplus: {recipe.path} has no NG+ whose settings it could take")
    wanted = (f"ngplus-{recipe.run.reference}", "ngplus")
    return recipe.optimizers[next((name for name in wanted if name in forms), forms[0])]


def _default(challenger: OutsideOptimizer, name: str) -> Any:
    return next((each.default for each in fields(challenger.settings) if each.name == name), None)


def _start(question: Question, challenger: OutsideOptimizer) -> dict[str, float]:
    """Where a search of what has no default begins, and the learning rate, which a recipe always has."""
    found = {}
    for name, each in question.search.items():
        default = _default(challenger, name)
        if not isinstance(default, int | float):
            found[name] = float(f"{each.interpolate(0.5):.3g}")
    rate = _default(challenger, "lr")
    return found | ({"lr": float(rate)} if isinstance(rate, int | float) and "lr" not in found else {})


def _space(question: Question, challenger: OutsideOptimizer) -> Mapping[str, Range]:
    rate = _default(challenger, "lr")
    if "lr" in {*question.search, *question.settings} or not isinstance(rate, int | float) or rate <= 0:
        return question.search
    factor = 10 ** (_DECADES / 2)
    low, high = (float(f"{value:.2g}") for value in (rate / factor, rate * factor))
    return {"lr": Range(low=low, high=high, log=True), **question.search}


def describe_space(recipe: Recipe, name: str) -> str:
    """Where the challenger is searched, in words.

    Args:
        recipe: with the challenger in it.
        name: of the challenger.

    Returns:
        A phrase.
    """
    space = recipe.tuning.spaces.get(name, {}) if recipe.tuning else {}
    return ", ".join(
        f"{key} from {each.low:g} to {each.high:g}{' (log)' if each.log else ''}" for key, each in space.items()
    )
