"""From what a person gives, on the command line and in a file, to the question."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.challenge.question import (
    ChallengeFile,
    Question,
    make_question,
    parse_search,
    parse_settings,
    read_file,
)
from experiments.challenge.recipe_files import check_challenger_name, choose_name
from experiments.config.recipe import load_recipe
from experiments.errors import UserError
from experiments.plugins import PluginError, find_file
from experiments.tasks import TASKS


def ask(
    given: Mapping[str, Any], *, settings: Sequence[str], search: Sequence[str], path: Path | None
) -> tuple[Question, ChallengeFile]:
    """Make the question.

    Args:
        given: keys of `Question`; ``None`` for what is not given.
        settings: ``name=value`` each.
        search: ``name=low:high[:log]`` each.
        path: a ``challenge.toml`` that has the rest.

    Returns:
        The question, and the file that it is from, with the code of an optimizer that is in one.

    Raises:
        UserError: something is missing, mistyped or out of range.
    """
    file = read_file(path) if path else ChallengeFile(asked={})
    asked = dict(file.asked) | {key: value for key, value in given.items() if value is not None}
    if "optimizer" not in asked:
        raise UserError("optimizer: is missing: must be package.module:Class, ./file.py:Class or an entry point's name")
    asked["settings"] = {**asked.get("settings", {}), **parse_settings(settings)}
    asked["search"] = {**asked.get("search", {}), **parse_search(search)}
    code = _read_code(asked["optimizer"], file, path)
    if code:
        asked["optimizer"] = _place_name(asked["optimizer"])
    asked.setdefault("tasks", sorted(TASKS))
    asked.setdefault("scale", "tiny")
    where = str(path) if path else "challenge"
    taken = _list_taken(make_question({"name": "x", **asked}, where))
    if asked.get("name") is None:
        asked["name"] = choose_name(asked["optimizer"], asked.get("around"), taken)
    check_challenger_name(asked["name"], taken)
    question = make_question(asked, where)
    return question, ChallengeFile(asked=file.asked, code=code, versions=file.versions, made=file.made)


def _place_name(optimizer: str) -> str:
    """A file by its name alone."""
    place, _, name = optimizer.rpartition(":")
    return f"{Path(place).name}:{name}"


def _read_code(optimizer: str, file: ChallengeFile, path: Path | None) -> dict[str, str]:
    """The optimizer's file: from the disk, or else as the challenge's file has it."""
    source = find_file(optimizer, Path())
    if source is None:
        return {}
    if source.name in file.code and optimizer == file.asked.get("optimizer"):
        return {source.name: file.code[source.name]}
    beside = path.parent / source if path and not source.exists() else source
    try:
        return {source.name: beside.read_bytes().decode("utf-8")}
    except OSError as error:
        raise PluginError(f"optimizer = {optimizer!r}: {beside} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PluginError(f"optimizer = {optimizer!r}: {beside} cannot be read: {error}") from None


def _list_taken(question: Question) -> set[str]:
    """The names of the optimizers in the recipes that are asked for."""
    return {name for task in question.tasks for name in load_recipe(task, question.scale).optimizers}
