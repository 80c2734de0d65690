"""Tuning an optimizer from its search to the recipe."""

from pathlib import Path

from filelock import FileLock

from experiments.config.recipe import Recipe
from experiments.config.recipe_editor import check_writable, write_values
from experiments.errors import UserError
from experiments.records.provenance import REPOSITORY
from experiments.training.run import RunOptions
from experiments.tuning.search import Search, Tried
from experiments.tuning.trial import change_settings
from experiments.tuning.trials_table import record_trials


def tune(
    recipe: Recipe, optimizer: str, options: RunOptions, *, folder: Path, trials: int | None = None, write: bool = True
) -> Tried:
    """Search the settings of an optimizer, keep the trials as CSV, and write the best ones into the recipe.

    Args:
        recipe: has a ``[tuning]`` table.
        optimizer: which one.
        options: how to run; ``tuning.csv`` goes to ``<results_dir>/<task>/<scale>``.
        folder: where searches are kept, to go on from.
        trials: how many, by default the recipe's number.
        write: whether to change the recipe's file.

    Returns:
        The best trial.

    Raises:
        UserError: there is no space to search in, the recipe's file has no table to write to, no trial came to its
            end, or another search is in the folder.
    """
    search = Search(recipe, optimizer, options, folder)
    if write:
        check_writable(recipe.path, change_settings(recipe, optimizer, dict.fromkeys(search.space, 0.0)))
    tried = search.run(recipe.tuning.trials if trials is None else trials)
    csv = options.results_dir / recipe.task / recipe.scale / "tuning.csv"
    best = pick_best(tried)
    source = (
        f"tuned on the validation split at seed {best.run.manifest.seed}, {len(tried)} trials: {_shorten_path(csv)}"
    )
    with FileLock(folder / "write.lock"):
        record_trials(csv, optimizer, tried)
        if write:
            write_values(recipe.path, change_settings(recipe, optimizer, best.settings), source)
    shown = ", ".join(f"{key} {value:g}" for key, value in best.settings.items())
    print(f"{optimizer}: best of {len(tried)} trials is trial {best.number}: {shown}; all are in {csv}")
    return best


def _shorten_path(path: Path) -> str:
    """A path as whoever has the repository finds it."""
    whole = path.resolve()
    return (whole.relative_to(REPOSITORY) if whole.is_relative_to(REPOSITORY) else path).as_posix()


def pick_best(tried: list[Tried]) -> Tried:
    """The trial with the best metric of those that came to their end; the first of equals.

    Args:
        tried: trials that are over.

    Returns:
        The best of them.

    Raises:
        UserError: none came to its end.
    """
    complete = [each for each in tried if each.ended == "complete"]
    if not complete:
        raise UserError(f"{tried[0].run.manifest.optimizer}: no trial came to its end: {len(tried)} diverged")
    sign = -1 if complete[0].run.manifest.metric.higher_is_better else 1
    return min(complete, key=lambda each: sign * each.run.best_metric)
