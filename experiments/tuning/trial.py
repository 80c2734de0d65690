"""One trial: an ordinary run, on the validation split at the tuning seed, with a trial's settings and length."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config.recipe import Recipe
from experiments.config.tuning_space import join_elements

# The fields of schedules that are lengths: a shorter trial goes through the whole schedule in miniature.
_LENGTHS = ("max_epoch", "warmup_epochs", "hold_epochs", "every_epochs", "warmup_updates")


def trial_recipe(recipe: Recipe, optimizer: str, values: Mapping[str, float]) -> Recipe:
    """The recipe with a trial's settings.

    Args:
        recipe: has a ``[tuning]`` table.
        optimizer: which one is tuned.
        values: of the tuned settings, by dotted key below the optimizer's table.

    Returns:
        The recipe to run.
    """
    return recipe.override(trial_changes(recipe, optimizer, values, recipe.tuning.epochs))


def trial_changes(recipe: Recipe, optimizer: str, values: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """What a trial changes in the recipe, by dotted key.

    Args:
        recipe: what is changed.
        optimizer: which one is tried.
        values: of its settings, by dotted key below its table.
        epochs: of the trial.

    Returns:
        Values by dotted key of the recipe.
    """
    changes: dict[str, Any] = {"run.report_split": "validation", "run.epochs": epochs}
    factor = epochs / recipe.run.epochs
    lengths = dict(_scale_schedules(recipe, optimizer, values, factor)) if factor != 1 else {}
    return changes | change_settings(recipe, optimizer, {**values, **lengths})


def change_settings(recipe: Recipe, optimizer: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to give an optimizer other settings.

    Args:
        recipe: what is changed.
        optimizer: whose settings they are.
        values: of its settings, by dotted key below its table; one may be an element of a list.

    Returns:
        Values by dotted key of the recipe; of a list that an element is changed in, all.
    """
    joined = join_elements(recipe.optimizers[optimizer].table, values)
    return {f"optimizers.{optimizer}.{key}": value for key, value in joined.items()}


def _scale_schedules(
    recipe: Recipe, optimizer: str, values: Mapping[str, Any], factor: float
) -> Iterator[tuple[str, float]]:
    for name in ("schedule", "damping_schedule"):
        table: dict[str, Any] = recipe.optimizers[optimizer].table[name] or {}
        for key in _LENGTHS:
            if key in table:
                dotted, whole = f"{name}.{key}", isinstance(table[key], int)
                length = values.get(dotted, table[key]) * factor
                yield dotted, max(1, round(length)) if whole else length
