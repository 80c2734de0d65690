"""Some steps of the recipe's own training loop, each cut in two: read by a clock, or by a counter of operations."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.config.recipe import Recipe
from experiments.tasks.protocol import Task
from experiments.training.distributed import Workers
from experiments.training.trainer import CheckpointPlan, Training

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One step, in seconds or in operations.

    Attributes:
        batch: what is proportional to the batch: all that comes before the optimizer's ``step``.
        update: what is not: the optimizer's ``step`` and what follows.
    """

    batch: float
    update: float


def has_refresh(recipe: Recipe, name: str) -> bool:
    """Whether an optimizer has refresh steps: the first, and every ``update_every``-th after it.

    Args:
        recipe: what is run.
        name: of the optimizer in the recipe.

    Returns:
        Whether it has an interval.
    """
    return hasattr(recipe.optimizers[name].settings, "update_every")


def make_training(recipe: Recipe, name: str, task: Task, device: torch.device, every: int) -> Training:
    """The trainer's own loop, one batch to a step and without an end, refreshing every so many steps.

    Args:
        recipe: what is run.
        name: of the optimizer in the recipe.
        task: the recipe's, or a stand-in for it.
        device: where.
        every: steps from one refresh to the next.

    Returns:
        A training that has not taken a step yet.
    """
    changes: dict[str, Any] = {"run.accumulate": 1}
    if has_refresh(recipe, name):
        changes[f"optimizers.{name}.update_every"] = every
    return Training(recipe.override(changes), name, SEED, task=Endless(task), device=device, workers=Workers())


def take_steps(training: Training, read: Callable[[], float], enough: Callable[[list[Parts]], bool]) -> list[Parts]:
    """Train until there are enough steps.

    Args:
        training: from `make_training`.
        read: the gauge.
        enough: told of the steps so far after each one.

    Returns:
        The steps that were taken.
    """
    gauge = _Gauge(training, read, enough)
    # Only the loop is told: schedules go by the true length of an epoch. At a rate of next to nothing the weights that
    # start at zero would become denormal numbers, with which a product takes fifty times as long.
    training.batches_per_epoch = 10**9
    nowhere = CheckpointPlan(path=Path(), every_s=math.inf, identity={})
    with contextlib.suppress(_EnoughError):
        training.train_epoch(nowhere, [gauge])  # type: ignore[list-item]
    return gauge.steps


class Endless:
    """A task with one epoch that never ends, made of its own epochs."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """One epoch after the other."""
        for number in itertools.count(epoch):
            yield from self._task.train_batches(number, seed, rank=rank, world_size=world_size)


class _EnoughError(Exception):
    """There are enough steps."""


class _Gauge:
    """Reads at the end of each step and before the optimizer's part of it."""

    def __init__(self, training: Training, read: Callable[[], float], enough: Callable[[list[Parts]], bool]) -> None:
        self.steps: list[Parts] = []
        self._read, self._enough = read, enough
        self._hook = training.optimizer.register_step_pre_hook(self._before_update)
        self._start = self._middle = read()

    def _before_update(self, *_: Any) -> None:
        self._middle = self._read()

    def on_step(self, step_in_epoch: int) -> None:
        """As an `experiments.training.callbacks.Callback` is told."""
        now = self._read()
        self.steps.append(Parts(batch=self._middle - self._start, update=now - self._middle))
        if self._enough(self.steps):
            self._hook.remove()
            raise _EnoughError
        self._start = self._read()
