"""One run from start to end: what is there already, the record, the checkpoints, the epochs in between."""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.config.recipe import Recipe
from experiments.dataclass_io import list_allowed
from experiments.errors import UserError
from experiments.records.provenance import device_name, git_state, machine_load, versions
from experiments.records.record_writer import RecordWriter
from experiments.records.run_record import (
    SCHEMA,
    End,
    Epoch,
    Event,
    Manifest,
    Resumed,
    Run,
    read_run,
    record_path,
    select_numeric_settings,
)
from experiments.training.callbacks import Callback, TensorBoard, make_terminal_callback
from experiments.training.checkpoint import CheckpointError, checkpoint_path
from experiments.training.distributed import choose_device, join_workers
from experiments.training.trainer import CheckpointPlan, Training


class OtherSettingsError(UserError):
    """A run was finished, or begun and interrupted, with other settings than those that are asked for."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How and where to run; nothing that changes a number.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        data_dir: where the datasets are kept.
        results_dir: records go to ``<task>/<scale>/runs`` below.
        checkpoint_dir: checkpoints go to ``<task>/<scale>`` below; by default ``<results_dir>/checkpoints``.
        checkpoint_every_s: seconds between checkpoints inside an epoch; each epoch's end has one anyway.
        force: run again what is finished, and start over what is not.
        tensorboard: also write TensorBoard files, below ``<results_dir>/tensorboard``.
        bar: show a progress bar where there is a terminal.
        shard: shard the model's parameters over the processes that train together.
        checkpoints: save a run on its way; without, one that was interrupted begins again, which an optimizer needs
            whose state dict does not hold all that it goes by.
    """

    device: str = "auto"
    data_dir: Path = Path("data")
    results_dir: Path = Path("build/results")
    checkpoint_dir: Path | None = None
    checkpoint_every_s: float = 60.0
    force: bool = False
    tensorboard: bool = False
    bar: bool = True
    shard: bool = False
    checkpoints: bool = True


def run(recipe: Recipe, optimizer: str, seed: int, options: RunOptions, callbacks: Sequence[Callback] = ()) -> Run:
    """Train one optimizer from one seed, or what is left of it, and return the record.

    A finished run is returned as it is. Under ``torchrun`` every process must call this. An exception that one
    of the `callbacks` raises ends the run where it is.

    Args:
        recipe: what to run.
        optimizer: its name in the recipe.
        seed: of weights and batches.
        options: how and where to run.
        callbacks: called besides those that the options ask for.

    Returns:
        The record, finished or diverged.

    Raises:
        UserError: for what the user can fix: an optimizer that the recipe does not have, a setting out of
            range, a damaged record, a run finished with other settings, a checkpoint of another run, a full
            disk.
    """
    workers = join_workers(choose_device(options.device).type)
    if options.shard and workers.size == 1:
        raise UserError(
            "--shard: needs several processes, as in torchrun --nproc-per-node 8 -m experiments run ... --shard"
        )
    done = workers.from_first(lambda: read_finished_run(recipe, optimizer, seed, options))
    if done:
        return done
    record = _record_path(recipe, optimizer, seed, options)
    starts_over = options.force or not options.checkpoints
    before = None if starts_over else workers.from_first(lambda: _read_previous(record))
    task = recipe.build_task(options.data_dir)
    device = choose_device(options.device, workers.local_rank)
    training = Training(recipe, optimizer, seed, task=task, device=device, workers=workers, shard=options.shard)
    manifest = workers.from_first(lambda: _manifest(recipe, optimizer, training))
    if before:
        manifest = replace(manifest, started_at=before.manifest.started_at)
    _Run(training, manifest, options, callbacks).go(record, before)
    return workers.from_first(lambda: read_run(record))


def read_finished_run(recipe: Recipe, optimizer: str, seed: int, options: RunOptions) -> Run | None:
    """The record of this run if it is finished and not to be run again; one to go on with has the same settings.

    Args:
        recipe: what was run.
        optimizer: its name in the recipe.
        seed: of weights and batches.
        options: how and where it was run.

    Returns:
        The record, ``None`` if there is something to run.

    Raises:
        UserError: for an optimizer that the recipe does not have, a damaged record, or a run finished, or begun and
            interrupted, with other settings.
    """
    check_optimizer(recipe, optimizer)
    record = _record_path(recipe, optimizer, seed, options)
    before = None if options.force else _read_previous(record)
    if before is None:
        return None
    goes_on = options.checkpoints and _checkpoint_path(before.manifest, options).exists()
    if before.end or goes_on:
        _check_settings(before, recipe.manifest_settings(optimizer))
    return before if before.end else None


def check_optimizer(recipe: Recipe, optimizer: str) -> None:
    """Refuse an optimizer that the recipe does not have.

    Args:
        recipe: the recipe.
        optimizer: a name.
    """
    if optimizer not in recipe.optimizers:
        raise UserError(f"optimizer = {optimizer!r}: not in {recipe.path}; {list_allowed(recipe.optimizers)}")


def _record_path(recipe: Recipe, optimizer: str, seed: int, options: RunOptions) -> Path:
    return record_path(options.results_dir, recipe.task, recipe.scale, optimizer, seed)


def _checkpoint_path(manifest: Manifest, options: RunOptions) -> Path:
    folder = options.checkpoint_dir or options.results_dir / "checkpoints"
    return checkpoint_path(folder, manifest.task, manifest.scale, manifest.optimizer, manifest.seed)


def _read_previous(record: Path) -> Run | None:
    """The record of a run as it was left, ``None`` if there is none with a whole line in it."""
    if not record.exists() or b"\n" not in record.read_bytes():
        return None
    return read_run(record)


class _Run:
    """Takes a training through its epochs and writes down what happens."""

    def __init__(
        self, training: Training, manifest: Manifest, options: RunOptions, callbacks: Sequence[Callback]
    ) -> None:
        self.given = callbacks
        self.training, self.manifest, self.options = training, manifest, options
        self.plan = CheckpointPlan(
            path=_checkpoint_path(manifest, options),
            every_s=options.checkpoint_every_s if options.checkpoints else math.inf,
            identity=_identity(manifest) | ({"sharded": True} if options.shard else {}),
        )
        self.writer: RecordWriter | None = None
        self.callbacks: list[Callback] = []
        self.loads: list[float] = []

    def go(self, record: Path, before: Run | None) -> None:
        """Run to the end."""
        resumes = self.training.workers.from_first(lambda: self._can_resume(before))
        with ExitStack() as stack:
            if self.training.workers.is_first:
                self.writer = stack.enter_context(RecordWriter(record))
                self.callbacks = [stack.enter_context(closing(each)) for each in self._make_callbacks()]
            if resumes:
                self._resume(before)
            else:
                self._begin()
            self._write(self._train())

    def _can_resume(self, before: Run | None) -> bool:
        there = self.plan.path.exists()
        if before and not there and len(before.epochs) > 2:
            raise CheckpointError(
                f"{before.path}: is unfinished, and its checkpoint {self.plan.path} is missing; start over with --force"
            )
        return before is not None and there

    def _check_reaches(self, before: Run) -> None:
        """The record may be behind its checkpoint only if somebody cut it."""
        recorded, trained = len(before.epochs) - 1, self.training.position.epoch
        if recorded < trained:
            raise CheckpointError(
                f"{before.path}: ends after epoch {recorded}, its checkpoint {self.plan.path} is of epoch {trained}; "
                "start over with --force"
            )

    def _resume(self, before: Run | None) -> None:
        self.training.restore(self.plan)
        if before is not None:
            self._check_reaches(before)
        position = self.training.position
        if self.writer:
            self.writer.rewind(position.epoch)
        self._call_on_start()
        device = device_name(str(self.training.device))
        self._write(
            Resumed(
                epoch=position.epoch,
                step=position.step,
                seconds=position.seconds,
                at=_now(),
                device=device,
                threads=torch.get_num_threads(),
            )
        )

    def _begin(self) -> None:
        # First what may fail: the run before is lost only when this one has begun.
        untrained = self.training.evaluate()
        if self.writer:
            self.plan.path.unlink(missing_ok=True)
            self.writer.rewind(None)
        self._call_on_start()
        self._write(self.manifest)
        self._write(self.training.measure(None, untrained))

    def _train(self) -> End:
        training = self.training
        while training.position.epoch < self.manifest.epochs:
            train_loss = training.train_epoch(self.plan, self.callbacks)
            if (load := machine_load()) is not None:
                self.loads.append(load)
            evaluation = training.evaluate()
            self._write(training.measure(train_loss, evaluation))
            if not (math.isfinite(train_loss) and math.isfinite(evaluation.loss)):
                return self._end("diverged")
            if self.options.checkpoints:
                training.save(self.plan)
        return self._end("finished")

    def _end(self, reason: Literal["finished", "diverged"]) -> End:
        load = statistics.fmean(self.loads) if self.loads else None
        return End(reason=reason, seconds=self.training.clock.seconds, load=load)

    def _write(self, event: Event) -> None:
        if self.writer:
            self.writer.write(event)
        for callback in self.callbacks:
            if isinstance(event, Epoch):
                callback.on_epoch(event)
            if isinstance(event, End):
                callback.on_end(event)

    def _call_on_start(self) -> None:
        for callback in self.callbacks:
            callback.on_start(self.manifest, self.training.position.epoch, self.training.steps_per_epoch)

    def _make_callbacks(self) -> list[Callback]:
        manifest = self.manifest
        name = f"{manifest.optimizer}-seed{manifest.seed}"
        folder = self.options.results_dir / "tensorboard" / manifest.task / manifest.scale / name
        return [
            make_terminal_callback(bar=self.options.bar),
            *([TensorBoard(folder)] if self.options.tensorboard else []),
            *self.given,
        ]


def _manifest(recipe: Recipe, optimizer: str, training: Training) -> Manifest:
    git_sha, git_dirty = git_state()
    return Manifest(
        schema=SCHEMA,
        task=recipe.task,
        scale=recipe.scale,
        optimizer=optimizer,
        seed=training.seed,
        recipe=recipe.manifest_settings(optimizer),
        git_sha=git_sha,
        git_dirty=git_dirty,
        versions=versions() | recipe.optimizers[optimizer].entry.versions,
        device=device_name(str(training.device)),
        threads=torch.get_num_threads(),
        world_size=training.workers.size,
        dataset=training.task.dataset,
        metric=training.task.metric,
        target=recipe.run.target,
        epochs=recipe.run.epochs,
        started_at=_now(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint must share with a run that goes on from it."""
    named = {key: getattr(manifest, key) for key in ("task", "scale", "optimizer", "seed", "world_size")}
    own = {"started_at": manifest.started_at, "dataset.sha256": manifest.dataset.sha256}
    return named | own | select_numeric_settings(manifest.recipe)


def _check_settings(before: Run, settings: Mapping[str, Any]) -> None:
    """A setting that one of the two does not have is a difference: what it was by default may not be what it is.

    One that is None is not set: before it could be chosen, it was not either.
    """
    there, here = select_numeric_settings(before.manifest.recipe), select_numeric_settings(settings)
    different = [
        f"{key} {_describe_setting(there, key, 'was')} and {_describe_setting(here, key, 'is')}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if different:
        done, remedy = ("was finished", "run it again") if before.end else ("is unfinished, begun", "start over")
        raise OtherSettingsError(
            f"{before.path}: {done} with other settings: {'; '.join(different)}; "
            f"{remedy} with --force, name a --variant to stand next to it, or give another --results-dir"
        )


def _describe_setting(settings: Mapping[str, Any], key: str, verb: str) -> str:
    return f"{verb} {settings[key]!r}" if key in settings else f"{verb} not set"
