"""What there is: tasks, scales, optimizers, runs, datasets."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.config.recipe import Recipe, load_recipe, scales_of
from experiments.records.run_record import read_runs
from experiments.tasks import TASKS
from experiments.tasks.datasets import PREPARE


def print_tasks(results_dir: Path) -> None:
    """Each task at each scale that has a recipe: its optimizers, and how many seeds of each have been run."""
    table = Table("task", "scale", "epochs", "target", "optimizer", "seeds run", title="Tasks", title_justify="left")
    complaints = []
    for task in TASKS:
        for scale in scales_of(task):
            recipe = load_recipe(task, scale)
            runs, damaged = read_runs(_runs_folder(results_dir, task, scale))
            complaints += damaged
            for index, name in enumerate(recipe.optimizers):
                done = [run.manifest.seed for run in runs if run.manifest.optimizer == name and run.end]
                table.add_row(*(_head(recipe) if index == 0 else [""] * 4), name, _seeds(done))
    console = Console(highlight=False)
    console.print(table)
    for complaint in complaints:
        console.print(f"warning: {complaint}", markup=False, soft_wrap=True)


def print_datasets() -> None:
    """The datasets that `data` can fetch."""
    Console(highlight=False).print("Datasets: " + ", ".join(sorted(PREPARE)))


def tasks_with_runs(results_dir: Path, scale: str) -> list[str]:
    """The tasks with at least one record at a scale."""
    return [task for task in TASKS if any(_runs_folder(results_dir, task, scale).glob("*.jsonl"))]


def _runs_folder(results_dir: Path, task: str, scale: str) -> Path:
    return results_dir / task / scale / "runs"


def _head(recipe: Recipe) -> list[str]:
    target = "–" if recipe.run.target is None else str(recipe.run.target)
    return [recipe.task, recipe.scale, str(recipe.run.epochs), target]


def _seeds(seeds: list[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "–"
