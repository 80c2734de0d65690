"""Which task and which batch an estimate is measured on: the recipe's own where that can be."""

from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.config.recipe import Recipe
from experiments.data_io.checksum import DataFileError
from experiments.errors import UserError
from experiments.estimate.measuring import Clock, measure_briefly
from experiments.estimate.stand_ins import STAND_INS
from experiments.estimate.timed_steps import Parts
from experiments.estimate.training_memory import MemoryUse
from experiments.tasks.protocol import Task

LIMIT_S = 60.0
"""What a batch's steps may take, an optimizer, where the batch can be chosen."""
STEPS = 8
MEMORY_SHARE = 0.6
SMALLEST_SHARE = 64
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured.

    Attributes:
        recipe: with the batch that is measured.
        task: the same.
        size: of that batch, in samples or tokens.
        whole_size: of the recipe's batch.
        factor: the recipe's batch over the one measured, by the number of batches that an epoch has.
        batches: of an epoch, at the recipe's batch.
        step_s: a plain step of the first optimizer, roughly.
        made_up: what stands for the data; ``None`` where they are here.
    """

    recipe: Recipe
    task: Task
    size: int
    whole_size: int
    factor: float
    batches: int
    step_s: float
    made_up: str | None


def choose_batch(
    recipe: Recipe, name: str, data_dir: Path, device: torch.device, clock: Clock, size: int | None = None
) -> Bench:
    """The recipe's batch, or the largest of its halves, quarters, … whose steps fit into time and memory.

    Args:
        recipe: what is to be run.
        name: an optimizer of it, to measure briefly.
        data_dir: where the datasets are kept.
        device: where it is measured.
        clock: that a first look is timed by.
        size: the batch to measure; ``None`` to choose.

    Returns:
        The task with the batch to measure, and how it relates to the whole one.

    Raises:
        UserError: a batch out of range.
        DataFileError: data are missing that nothing stands for.
    """
    key, whole_size = _read_batch(recipe)
    if size is not None and not 1 <= size <= whole_size:
        raise UserError(f"batch = {size}: must be from 1 to the recipe's {key} = {whole_size}")
    whole, made_up = load_task_or_stand_in(recipe, data_dir)
    _check_parameters(whole, device)
    least = _least(key, whole_size) if size is None else size
    small_recipe, small = _with_batch(recipe, key, least, whole, data_dir)
    step, memory = measure_briefly(small_recipe, name, small, device, clock)
    if size is None:
        factor = small.steps_per_epoch() / whole.steps_per_epoch()
        size = _largest(step, memory, factor, least, whole_size, available_mib(device))
    chosen_recipe, chosen = _with_batch(recipe, key, size, whole, data_dir)
    times = small.steps_per_epoch() / chosen.steps_per_epoch()
    return Bench(
        recipe=chosen_recipe,
        task=chosen,
        size=size,
        whole_size=whole_size,
        factor=chosen.steps_per_epoch() / whole.steps_per_epoch(),
        batches=whole.steps_per_epoch(),
        step_s=times * step.batch + step.update,
        made_up=made_up,
    )


def load_task_or_stand_in(recipe: Recipe, data_dir: Path) -> tuple[Task, str | None]:
    """The recipe's task, or a stand-in if its data are not here; and what that is made of."""
    try:
        return recipe.build_task(data_dir), None
    except DataFileError as missing:
        build = STAND_INS.get((recipe.task, recipe.task_settings.get("data", "")))
        if build is None:
            raise
        stand_in = build(recipe.task_settings, scale=recipe.scale)
        return stand_in, f"the data are not here ({missing}): {stand_in.made_up}"


def _with_batch(recipe: Recipe, key: str, size: int, whole: Task, data_dir: Path) -> tuple[Recipe, Task]:
    if size == recipe.task_settings[key]:
        return recipe, whole
    changed = recipe.override({f"task.{key}": size})
    return changed, load_task_or_stand_in(changed, data_dir)[0]


def _read_batch(recipe: Recipe) -> tuple[str, int]:
    key = "max_tokens" if "max_tokens" in recipe.task_settings else "batch_size"
    return key, recipe.task_settings[key]


def _least(key: str, whole_size: int) -> int:
    """A `SMALLEST_SHARE`-th; of tokens at least 512, which hold the longest sentence."""
    least = 512 if key == "max_tokens" else 4
    return min(whole_size, max(least, whole_size // SMALLEST_SHARE))


def _largest(
    step: Parts, memory: MemoryUse, factor: float, least: int, whole_size: int, available: float | None
) -> int:
    """The largest of whole_size/1, /2, /4, … above `least` that fits, from a measurement at `least`.

    Args:
        step: seconds at `least`.
        memory: at `least`.
        factor: the whole batch over `least`.
        least: the smallest batch to take.
        whole_size: the recipe's batch.
        available: MiB; ``None`` if it is not known.

    Returns:
        The number of samples.
    """
    size = whole_size
    while size // 2 >= least:
        times = factor * size / whole_size
        peak = memory.extrapolate(times)
        fits = available is None or peak is None or peak <= MEMORY_SHARE * available
        if fits and STEPS * (times * step.batch + step.update) <= LIMIT_S:
            return size
        size //= 2
    return max(size, least)


def _check_parameters(task: Task, device: torch.device) -> None:
    """Parameters and as much again, of gradients or state, must have room."""
    needed = 2 * parameter_mib(task)
    available = available_mib(device)
    if available is not None and needed > available:
        raise UserError(
            f"{task.name}: its parameters and the optimizer's state take {needed:,.0f} MiB, "
            f"but {available:,.0f} MiB are free here"
        )


def parameter_mib(task: Task) -> float:
    """Counted without making any; 0 for a model that cannot be made so, as schnetpack's, which is a small one."""
    try:
        with torch.device("meta"):
            return sum(each.nbytes for each in task.build_model().parameters()) / 2**20
    except (RuntimeError, TypeError):
        return 0.0


def available_mib(device: torch.device) -> float | None:
    """Memory that is free, in MiB; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    if not _MEMINFO.exists():
        return None
    line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 2**10
