"""One trial: an ordinary run, on the validation split at the tuning seed, with a trial's settings and length."""

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.config.recipe import Recipe
from experiments.dataclass_io import to_table

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
    if factor != 1:
        changes |= dict(_scale_schedules(recipe, optimizer, factor))
    return changes | {f"optimizers.{optimizer}.{key}": value for key, value in values.items()}


def _scale_schedules(recipe: Recipe, optimizer: str, factor: float) -> Iterator[tuple[str, float]]:
    chosen = recipe.optimizers[optimizer]
    for name in ("schedule", "damping_schedule"):
        table: dict[str, Any] = to_table(getattr(chosen, name)) or {}
        for key in _LENGTHS:
            if key in table:
                length = table[key] * factor
                whole = isinstance(table[key], int)
                yield f"optimizers.{optimizer}.{name}.{key}", max(1, round(length)) if whole else length
