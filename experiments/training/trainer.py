"""The training loop: a task, an optimizer, its schedules, the clock; saved and restored as one."""

import copy
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from experiments.config.recipe import OptimizerRecipe, Recipe
from experiments.errors import UserError
from experiments.optimizers.decay_groups import exempt_from_decay
from experiments.optimizers.schedule_settings import Scheduler
from experiments.records.run_record import Epoch
from experiments.tasks.protocol import Evaluation, Task
from experiments.training.callbacks import Callback
from experiments.training.checkpoint import (
    Checkpointed,
    Position,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from experiments.training.distributed import Workers
from experiments.training.timing import Clock, OptimizerTimes, peak_memory_mb

# Steps apart at which several processes agree whether a checkpoint is due: agreeing synchronizes with the device.
_ASK_EVERY = 16


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """Where the checkpoints of a run go, how many seconds apart in mid-epoch, and whose they are."""

    path: Path
    every_s: float
    identity: Mapping[str, Any]


class Training:
    """A model being trained, epoch by epoch.

    The seed alone decides the initial weights and the order of batches, whatever the optimizer. With
    several workers each trains on its part of the joint batch and gradients are averaged.

    Args:
        recipe: what to run.
        name: the optimizer's name in the recipe.
        seed: of weights, batches and dropout.
        task: the recipe's task.
        device: where to train.
        workers: the processes that train together.
        shard: whether the model's parameters are sharded over them.

    Raises:
        UserError: for a setting that the optimizer refuses.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        seed: int,
        *,
        task: Task,
        device: torch.device,
        workers: Workers,
        shard: bool = False,
    ) -> None:
        self.task, self.run, self.seed, self.device, self.workers = task, recipe.run, seed, device, workers
        self.batches_per_epoch = task.steps_per_epoch()
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / self.run.accumulate)
        chosen = recipe.optimizers[name]
        _seed_everything(seed)
        self.model = task.build_model().to(device)
        # The first worker evaluates by itself: a whole model of its own where that of training is sharded.
        self.evaluated = copy.deepcopy(self.model) if shard and workers.is_first else self.model
        self.sharded = _import_shards().shard_model(self.model) if shard else None
        self.optimizer = _build_optimizer(self.model, chosen, f"{recipe.path}: [optimizers.{name}]")
        if self.run.decay == "matrices":
            exempt_from_decay(self.optimizer, self.model)
        self.schedules = _build_schedules(self.optimizer, chosen, self.steps_per_epoch)
        replicated = workers.size > 1 and not shard
        self.replica = DistributedDataParallel(self.model) if replicated else self.model
        _seed_everything(seed + workers.rank)
        self.position = Position()
        self.clock = Clock(device)
        self.times = OptimizerTimes(self.optimizer)
        # On the device, so that adding up the loss never synchronizes.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._loss_count = torch.zeros((), dtype=torch.int64, device=device)
        self._saved_at = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def train_epoch(self, plan: CheckpointPlan, callbacks: list[Callback]) -> float:
        """Train what is left of the epoch.

        Args:
            plan: says when a checkpoint is due; saving is off the clock.
            callbacks: told of each step.

        Returns:
            The mean loss over the epoch's batches whose loss is finite, NaN if none is.
        """
        batches = self._batches()
        self.replica.train()
        with self.clock.running():
            while (left := self.batches_per_epoch - self.position.batches) > 0:
                self._step(batches, min(self.run.accumulate, left))
                for callback in callbacks:
                    callback.on_step(self.position.batches // self.run.accumulate)
                if self.position.batches < self.batches_per_epoch and self._checkpoint_is_due(plan):
                    with self.clock.paused():
                        self.save(plan)
        mean = self._mean_loss()
        self._loss_sum.zero_()
        self._loss_count.zero_()
        self.position.epoch += 1
        self.position.batches = 0
        return mean

    def evaluate(self) -> Evaluation:
        """Loss and metric on the reported split; computed by the first worker, off the clock."""
        state = None if self.sharded is None else _import_shards().gather_model(self.model)

        def first() -> Evaluation:
            if state is not None:
                self.evaluated.load_state_dict(state)
            self.evaluated.eval()
            with torch.no_grad(), self._autocast(), _averaged_weights(self.optimizer):
                return self.task.evaluate(self.evaluated, self.run.report_split)

        return self.workers.from_first(first)

    def measure(self, train_loss: float | None, evaluation: Evaluation) -> Epoch:
        """The record of the epoch just trained."""
        self._measure()
        group = self.optimizer.param_groups[0]
        damping = group.get("damping")
        return Epoch(
            epoch=self.position.epoch,
            step=self.position.step,
            train_loss=train_loss,
            eval_loss=evaluation.loss,
            metric=evaluation.metric,
            seconds=self.position.seconds,
            peak_memory_mb=self.position.peak_memory_mb,
            **vars(self.position.times),
            lr=float(group["lr"]),
            damping=None if damping is None else float(damping),
            others=dict(evaluation.others),
        )

    def save(self, plan: CheckpointPlan) -> None:
        """Write a checkpoint; every worker must call this."""
        self._measure()
        own = {"rng": rng_state(), "loss_sum": self._loss_sum.cpu(), "loss_count": self._loss_count.cpu()}
        self.position.ranks = self.workers.gather(own)
        parts, first = self._parts(), self.workers.is_first
        if first or self.sharded is not None:
            save_checkpoint(plan.path, parts, self.position, plan.identity, writes=first)
        self._saved_at = time.monotonic()

    def restore(self, plan: CheckpointPlan) -> None:
        """Go on from the checkpoint.

        Args:
            plan: where the checkpoint is, and whose it must be.

        Raises:
            UserError: for a file that is no checkpoint, or one of another run or model.
        """
        self.position = load_checkpoint(plan.path, self._parts(), plan.identity)
        self.clock.seconds = self.position.seconds
        self.times = OptimizerTimes(self.optimizer, self.position.times)
        own = self.position.ranks[self.workers.rank]
        self._loss_sum.copy_(own["loss_sum"])
        self._loss_count.copy_(own["loss_count"])
        set_rng_state(own["rng"])

    def _step(self, batches: Iterator[Any], size: int) -> None:
        """One optimizer step on `size` batches, their losses averaged."""
        for number in range(1, size + 1):
            batch = self.task.to_device(self._next(batches), str(self.device))
            self._tell_samples(batch)
            with self._synchronised(number == size):
                with self._autocast():
                    loss = self.task.loss(self.replica, batch)
                (loss / size).backward()
            self._add_loss(loss.detach())
        if self.run.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for schedule in self.schedules:
            schedule.step()
        self.position.step += 1
        self.position.batches += size

    def _tell_samples(self, batch: Any) -> None:
        """Which rows belong to which sample, for an optimizer that asks, from a task that knows."""
        known = getattr(self.task, "sample_index", None)
        if known is not None and getattr(self.optimizer, "curvature_is_due", False):
            self.optimizer.sample_index = known(batch)

    def _batches(self) -> Iterator[Any]:
        """The epoch's batches but those already trained on, and the random state as it was behind them."""
        first, workers = self.position.batches, self.workers
        batches = iter(
            self.task.train_batches(self.position.epoch, self.seed, rank=workers.rank, world_size=workers.size)
        )
        if first:
            for _ in range(first):
                self._next(batches)
            set_rng_state(self.position.ranks[workers.rank]["rng"])
        return batches

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except StopIteration:
            raise RuntimeError(
                f"{self.task.name}: steps_per_epoch() is {self.batches_per_epoch}, but train_batches() ended before"
            ) from None

    def _add_loss(self, loss: Tensor) -> None:
        """A loss that is not finite is left out: an optimizer that skips its step has not diverged."""
        finite = torch.isfinite(loss)
        self._loss_sum += torch.where(finite, loss, 0.0)
        self._loss_count += finite

    def _mean_loss(self) -> float:
        sums = self.workers.gather((self._loss_sum.item(), self._loss_count.item()))
        total, count = (sum(column) for column in zip(*sums, strict=True))
        return total / count if count else math.nan

    def _measure(self) -> None:
        self.position.seconds = self.clock.seconds
        self.position.times = self.times.split()
        self.position.peak_memory_mb = max(self.position.peak_memory_mb, peak_memory_mb(self.device))

    def _checkpoint_is_due(self, plan: CheckpointPlan) -> bool:
        if self.workers.size > 1 and self.position.step % _ASK_EVERY:
            return False
        return self.workers.from_first(lambda: time.monotonic() - self._saved_at >= plan.every_s)

    def _parts(self) -> Checkpointed:
        kind = Checkpointed if self.sharded is None else _import_shards().ShardedParts
        return kind(model=self.model, optimizer=self.optimizer, schedules=self.schedules)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16")

    def _synchronised(self, wanted: bool) -> Any:
        """Average gradients over the workers in this backward, or leave that to a later one."""
        alone = self.workers.size == 1
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(wanted)
            return nullcontext()
        return nullcontext() if wanted or alone else self.replica.no_sync()


@contextmanager
def _averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are those to evaluate, for an optimizer that trains others, as Schedule-Free does."""
    # One that NG+ is around is its base.
    both = (optimizer, getattr(optimizer, "base", None))
    switched = next((each for each in both if hasattr(each, "eval") and hasattr(each, "train")), None)
    if switched is None:
        yield
        return
    switched.eval()
    try:
        yield
    finally:
        switched.train()


def _import_shards() -> ModuleType:
    """What trains a sharded model, which imports for half as long as torch."""
    from experiments.training import shards

    return shards


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 the global generator is what a library may use
    torch.manual_seed(seed)


def _build_optimizer(model: nn.Module, chosen: OptimizerRecipe, where: str) -> Optimizer:
    try:
        return chosen.entry.build(model, chosen.settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _build_schedules(optimizer: Optimizer, chosen: OptimizerRecipe, steps_per_epoch: int) -> list[Scheduler]:
    wanted = [chosen.schedule, chosen.damping_schedule]
    return [schedule.build(optimizer, steps_per_epoch) for schedule in wanted if schedule is not None]
