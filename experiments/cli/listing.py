"""What there is: tasks, scales, optimizers, runs, datasets."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.analysis.comparable_runs import name_data
from experiments.config.recipe import list_scales, load_recipe
from experiments.records.run_record import read_runs
from experiments.tasks import TASKS
from experiments.tasks.datasets import PREPARE


def print_tasks(results_dir: Path) -> None:
    """Print each task at each scale that has a recipe: its optimizers, grouped by the seeds they have been run with.

    Args:
        results_dir: where the records are.
    """
    console = Console(highlight=False)
    warnings = []
    for task in TASKS:
        title = name_data(task, task)
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("scale", no_wrap=True, min_width=10)
        table.add_column("epochs", no_wrap=True, justify="right")
        table.add_column("target", no_wrap=True, min_width=14)
        table.add_column("seeds run", no_wrap=True)
        table.add_column("optimizers")
        for scale in list_scales(task):
            recipe = load_recipe(task, scale)
            runs, damaged = read_runs(_runs_folder(results_dir, task, scale))
            warnings += damaged
            target = "–" if recipe.run.target is None else str(recipe.run.target)
            head = (scale, str(recipe.run.epochs), target)
            groups: dict[str, list[str]] = {}
            for name in recipe.optimizers:
                seeds = [run.manifest.seed for run in runs if run.manifest.optimizer == name and run.end]
                groups.setdefault(join_seeds(seeds), []).append(name)
            for seeds, names in groups.items():
                table.add_row(*head, seeds, ", ".join(names))
                head = ("", "", "")
        console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def print_datasets() -> None:
    """Print the datasets that `data` can fetch."""
    Console(highlight=False).print("Datasets: " + ", ".join(sorted(PREPARE)))


def tasks_with_runs(results_dir: Path, scale: str) -> list[str]:
    """Find the tasks with at least one record at a scale.

    Args:
        results_dir: where the records are.
        scale: a recipe's scale.

    Returns:
        Names of tasks, in the order of `TASKS`.
    """
    return [task for task in TASKS if any(_runs_folder(results_dir, task, scale).glob("*.jsonl"))]


def join_seeds(seeds: Iterable[int]) -> str:
    """Write seeds in short, ascending.

    Args:
        seeds: in any order.

    Returns:
        Neighbours as ranges; a dash for none.

    Example:
        >>> join_seeds([5, 1, 2, 3])
        '1–3, 5'
        >>> join_seeds([])
        '–'
    """
    ordered = sorted(seeds)
    starts = [seed for before, seed in pairwise([None, *ordered]) if before is None or seed != before + 1]
    ends = [seed for seed, after in pairwise([*ordered, None]) if after is None or after != seed + 1]
    ranges = (str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
    return ", ".join(ranges) or "–"


def _runs_folder(results_dir: Path, task: str, scale: str) -> Path:
    return results_dir / task / scale / "runs"
