"""The runs of a recipe's grids, each one an ordinary run on the validation split at the tuning seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.analysis.figures import heatmaps
from experiments.config.recipe import Recipe
from experiments.config.sensitivity_grid import Grid, Sensitivity
from experiments.config.tuning_space import short_name, value_at
from experiments.dataclass_io import list_allowed
from experiments.errors import UserError
from experiments.launch.jobs import Job, run_jobs
from experiments.records.run_record import Run, read_run, record_path
from experiments.training.run import RunOptions
from experiments.tuning.trial import trial_changes
from experiments.tuning.trials_table import summarise_course, write_rows


def measure(
    recipe: Recipe,
    options: RunOptions,
    *,
    folder: Path,
    names: Sequence[str] | None = None,
    workers: int = 1,
    threads: int | None = None,
) -> Path:
    """Run what is not finished of the grids, and write ``sensitivity.csv`` and heat maps next to the results.

    A run that fails, or is interrupted, leaves its row out; the file holds what there is in any case, and the rows that
    it had of the recipe's other grids.

    Args:
        recipe: has a ``[sensitivity]`` table.
        options: how to run; the file goes to ``<results_dir>/<task>/<scale>``.
        folder: where the runs are kept, to go on from.
        names: of the grids; by default all.
        workers: runs at a time.
        threads: CPU threads each, ``None`` for what the environment says.

    Returns:
        The file.

    Raises:
        UserError: the recipe has no grid, or none of such a name.
    """
    grids = _chosen(recipe, names)
    jobs = {job.options.results_dir: job for grid in grids for job in _jobs(recipe, grid, options, folder)}
    csv = options.results_dir / recipe.task / recipe.scale / "sensitivity.csv"
    try:
        run_jobs(list(jobs.values()), workers=workers, threads=threads)
    finally:
        _write([(grid, cell) for grid in grids for cell in _read_finished(recipe, grid, folder)], recipe, grids, csv)
    return csv


def _chosen(recipe: Recipe, names: Sequence[str] | None) -> list[Grid]:
    grids = {grid.name: grid for grid in _require_sensitivity(recipe).grids}
    for name in names or ():
        if name not in grids:
            raise UserError(f"grid = {name!r}: is not in {recipe.path}; {list_allowed(grids)}")
    return [grid for name, grid in grids.items() if not names or name in names]


def _write(cells: Sequence[tuple[Grid, Run]], recipe: Recipe, grids: Sequence[Grid], csv: Path) -> None:
    if not cells:
        return
    rows, course = [], []
    for grid, run in cells:
        course = summarise_course(run)
        settings = {short_name(key): value_at(run.manifest.recipe["optimizer"], key) for key in grid.axes}
        rows.append({"grid": grid.name, "ended": run.end.reason, **settings, **course})
    table = _with_others(pd.DataFrame(rows), recipe, grids, csv)
    # Each grid has settings of its own, which would otherwise come last.
    axes = [short_name(key) for grid in _require_sensitivity(recipe).grids for key in grid.axes]
    settings = [name for name in dict.fromkeys(axes) if name in table.columns]
    table = table[["grid", "ended", *settings, *course]]
    write_rows(table, csv)
    manifest = cells[0][1].manifest
    title = f"{manifest.task}, scale {manifest.scale}: {manifest.optimizer}, {manifest.dataset.name}"
    heatmaps.draw(csv, title, higher_is_better=manifest.metric.higher_is_better)


def _with_others(table: pd.DataFrame, recipe: Recipe, grids: Sequence[Grid], csv: Path) -> pd.DataFrame:
    """The table, with the file's rows of the recipe's other grids, in the recipe's order."""
    if not csv.exists():
        return table
    before = pd.read_csv(csv)
    order = [grid.name for grid in _require_sensitivity(recipe).grids]
    others = before[before.grid.isin(set(order) - {grid.name for grid in grids})]
    whole = pd.concat([each for each in (others, table) if len(each)], ignore_index=True)
    return whole.sort_values("grid", key=lambda names: names.map(order.index), kind="stable")


def _require_sensitivity(recipe: Recipe) -> Sensitivity:
    if recipe.sensitivity is None:
        raise UserError(f"{recipe.path}: has no table [sensitivity]")
    return recipe.sensitivity


def _jobs(recipe: Recipe, grid: Grid, options: RunOptions, folder: Path) -> list[Job]:
    asked = _require_sensitivity(recipe)
    return [
        Job(
            task=recipe.task,
            scale=recipe.scale,
            overrides=(*recipe.overrides, *(f"{key}={value}" for key, value in _changes(recipe, cell).items())),
            optimizer=asked.optimizer,
            seed=recipe.run.tuning_seed,
            options=replace(options, results_dir=_place(recipe, cell, folder), checkpoint_dir=None),
        )
        for cell in grid.cells()
    ]


def _changes(recipe: Recipe, cell: Mapping[str, Any]) -> dict[str, Any]:
    asked = _require_sensitivity(recipe)
    return trial_changes(recipe, asked.optimizer, cell, asked.epochs)


def _place(recipe: Recipe, cell: Mapping[str, Any], folder: Path) -> Path:
    """A folder for each set of changes, whichever grids it is in; what is as in the recipe is no change."""
    own = recipe.manifest_settings(_require_sensitivity(recipe).optimizer)["optimizer"]
    changed = sorted(key for key, value in cell.items() if value_at(own, key) != value)
    name = ",".join(f"{key}={cell[key]}" for key in changed) or "as-it-is"
    return folder / recipe.task / recipe.scale / name


def _read_finished(recipe: Recipe, grid: Grid, folder: Path) -> list[Run]:
    """The runs of a grid that are over."""
    optimizer, seed = _require_sensitivity(recipe).optimizer, recipe.run.tuning_seed
    places = [_place(recipe, cell, folder) for cell in grid.cells()]
    records = [record_path(place, recipe.task, recipe.scale, optimizer, seed) for place in places]
    runs = [read_run(record) for record in records if record.exists() and b"\n" in record.read_bytes()]
    return [run for run in runs if run.end]
