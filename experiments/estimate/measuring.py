"""A few steps of the recipe's own training loop, timed on the device at hand: what plain and refresh steps cost.

A step is cut in two: what comes before the optimizer's ``step`` (loading, forward, backward and, on a refreshing
step, building the curvature), whose operations are proportional to the batch; and the optimizer's ``step`` (inverse,
direction, the base's update), whose operations do not depend on it: `experiments.theory.costs.operations`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from scipy.stats import trim_mean
from torch.utils.flop_counter import FlopCounterMode

from experiments.config.recipe import Recipe
from experiments.estimate.timed_steps import SEED, Parts, has_refresh, make_training, take_steps
from experiments.estimate.training_memory import MemoryUse, memory_use, start_of_peak
from experiments.tasks.protocol import Task

Clock = Callable[[], float]

SECONDS = 10.0
"""How long an optimizer is measured, unless a number of steps is asked for."""
LEAST_ROUNDS = 3
ROUND_SECONDS = 0.25
TRIMMED = 0.25


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A plain and a refresh step; the same for an optimizer that refreshes nothing."""

    plain: Parts
    refresh: Parts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one optimizer.

    Attributes:
        seconds: of the steps.
        steps: how many were counted.
        epoch_start_s: what an epoch's first batch takes beyond the others.
        loading_s: what a batch takes to load, part of ``seconds`` unless it is loaded ahead.
        memory: at its peak.
        operations: of the steps, multiply-adds as two; ``None`` unless they were asked for.
    """

    seconds: Costs
    steps: int
    epoch_start_s: float
    loading_s: float
    memory: MemoryUse
    operations: Costs | None


def measure(
    recipe: Recipe,
    name: str,
    task: Task,
    device: torch.device,
    *,
    clock: Clock,
    round_length: int,
    steps: int | None = None,
    count_operations: bool = False,
) -> Measured:
    """Time some steps of one optimizer.

    Args:
        recipe: with the batch that is to be measured.
        name: of the optimizer in the recipe.
        task: the recipe's, or a stand-in for it.
        device: where.
        clock: from `make_clock`.
        round_length: steps from one refresh to the next, ≥ 2.
        steps: how many; ``None`` for `SECONDS`, and at least `LEAST_ROUNDS` rounds of plain steps and a refresh step.
        count_operations: whether to count operations too, on two more steps.

    Returns:
        Seconds and, where asked for, operations of plain and refresh steps.

    Raises:
        UserError: for a setting that the optimizer refuses.
    """
    every = round_length
    if has_refresh(recipe, name):
        every = max(2, min(every, recipe.optimizers[name].settings.update_every))
    baseline = start_of_peak(device)
    training = make_training(recipe, name, task, device, every)
    first = every if has_refresh(recipe, name) else 2  # steps that count for nothing: they make the optimizer's state
    taken = take_steps(training, clock, _enough(first, every, steps))
    memory = memory_use(training.model, training.optimizer, device, baseline)
    start, loading = measure_loading(task, clock)
    return Measured(
        seconds=_costs(taken[first:], every, refreshes=has_refresh(recipe, name), mean=_midmean),
        steps=len(taken) - first,
        epoch_start_s=start,
        loading_s=loading,
        memory=memory,
        operations=_operations(recipe, name, task, device) if count_operations else None,
    )


def measure_briefly(
    recipe: Recipe, name: str, task: Task, device: torch.device, clock: Clock
) -> tuple[Parts, MemoryUse]:
    """The seconds of a plain step, the second or third of all, and the memory at the peak.

    Args:
        recipe: what is run.
        name: of the optimizer in the recipe.
        task: the recipe's, or a stand-in for it.
        device: where.
        clock: from `make_clock`.

    Returns:
        The faster of two plain steps, and the memory.
    """
    baseline = start_of_peak(device)
    training = make_training(recipe, name, task, device, every=10**6)
    taken = take_steps(training, clock, lambda steps: len(steps) == 3)
    fastest = min(taken[1:], key=lambda step: step.batch + step.update)
    return fastest, memory_use(training.model, training.optimizer, device, baseline)


def round_length(step_s: float) -> int:
    """Steps of a round, one of them a refresh: `ROUND_SECONDS` or more, to spread a short disturbance over it.

    Args:
        step_s: seconds of a plain step.

    Returns:
        2 or more.
    """
    return max(2, math.ceil(ROUND_SECONDS / step_s))


def measure_loading(task: Task, clock: Clock, batches: int = 6) -> tuple[float, float]:
    """Seconds that the first batch of an epoch takes beyond the others, and that one of the others takes."""
    times, source = [], iter(task.train_batches(0, SEED))
    for _ in range(min(batches, task.steps_per_epoch())):
        start = clock()
        if next(source, None) is None:
            break
        times.append(clock() - start)
    usual = median(times[1:] or times)
    return max(0.0, times[0] - usual), usual


def _enough(first: int, every: int, steps: int | None) -> Callable[[list[Parts]], bool]:
    """Whether whole rounds behind the first steps hold `steps`, or `SECONDS` and `LEAST_ROUNDS`."""

    def enough(done: list[Parts]) -> bool:
        counted = done[first:]
        if not counted or len(counted) % every:
            return False
        if steps is not None:
            return len(counted) >= steps
        seconds = sum(step.batch + step.update for step in counted)
        return len(counted) // every >= LEAST_ROUNDS and seconds >= SECONDS

    return enough


def _costs(steps: list[Parts], every: int, *, refreshes: bool, mean: Callable[[list[float]], float]) -> Costs:
    """Means over rounds: each begins with its refresh step, if there is one."""
    rounds = [steps[start : start + every] for start in range(0, len(steps), every)]
    plain = _mean_parts([_mean_parts(each[refreshes:], fmean) for each in rounds], mean)
    return Costs(plain=plain, refresh=_mean_parts([each[0] for each in rounds], mean) if refreshes else plain)


def _mean_parts(steps: list[Parts], mean: Callable[[list[float]], float]) -> Parts:
    return Parts(batch=mean([step.batch for step in steps]), update=mean([step.update for step in steps]))


def _midmean(values: list[float]) -> float:
    """The mean of the middle half; of all, if there are fewer than four."""
    return float(trim_mean(values, TRIMMED))


def _count_product(*shapes: Any, out_shape: Any = None, **options: Any) -> int:
    """Of the last two, a matrix and a matrix or vector."""
    (rows, inner), right = shapes[-2:]
    return 2 * rows * inner * math.prod(right[1:])


_UNCOUNTED = dict.fromkeys(
    (torch.ops.aten.mv, torch.ops.aten.addmv_, torch.ops.aten.addmm_),
    _count_product,
)
"""Products that torch's counter does not know, which directions are made by."""


def _operations(recipe: Recipe, name: str, task: Task, device: torch.device) -> Costs:
    """Counted by torch on a refresh and a plain step: products and convolutions, no factorisations."""
    training = make_training(recipe, name, task, device, every=2)
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        taken = take_steps(training, lambda: float(counter.get_total_flops()), lambda steps: len(steps) == 2)
    return _costs(taken, 2, refreshes=has_refresh(recipe, name), mean=fmean)


def make_clock(device: torch.device, *, cpu_time: bool = False) -> Clock:
    """A clock that synchronizes with the device.

    Args:
        device: that is measured.
        cpu_time: count the seconds that this process had a processor, whatever else the machine is busy with.

    Returns:
        A function that returns seconds.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.process_time() if cpu_time else time.perf_counter()

    return now
