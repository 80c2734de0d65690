"""Run records: one JSON object a line, written so that a kill at any moment loses the line in flight at most.

A record is a `Manifest`, an `Epoch` for the untrained model (epoch 0) and for every epoch that was trained,
a `Resumed` wherever a run was taken up again, and an `End`. Every line carries its ``event``. Numbers that
are not finite are written as ``null``, which is what JSON has for them.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments.dataclass_io import read_settings
from experiments.errors import UserError
from experiments.tasks.protocol import DatasetInfo, Metric

SCHEMA = 1
REFERENCE_BEST = "reference best"
Target = float | Literal["reference best"]


# Settings that say which runs there are, or how a run is judged, but change no number in it.
_NOT_NUMERIC = ("run.seeds", "run.tuning_seed", "run.target", "run.reference")


class RecordError(UserError):
    """A record that cannot be read or written; the message names the file, and the line where it can."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was run, on what, and with which code: the first line.

    Attributes:
        schema: version of this format.
        task: the task's name.
        scale: ``"tiny"``, ``"small"`` or ``"paper"``.
        optimizer: the optimizer's name in the recipe, with its suffix.
        seed: of the initial weights and of the order of batches.
        recipe: the settings in full, defaults included: tables ``task``, ``run`` and ``optimizer``.
        git_sha: the commit, ``None`` outside a git checkout.
        git_dirty: whether tracked files other than results differed from it.
        versions: of Python and the packages that matter.
        device: the processor's name, or the GPU's; ``"cpu"`` in records made before it was written down.
        threads: CPU threads a process.
        world_size: number of data-parallel processes.
        dataset: the data really used.
        metric: what ``Epoch.metric`` is.
        target: the value of the metric that counts as reached, ``None`` for no target; ``"reference best"`` is
            what the reference's runs reach, known when they are all there.
        epochs: how many epochs the run was asked for.
        started_at: ISO 8601, UTC.
    """

    event: ClassVar = "manifest"
    schema: int
    task: str
    scale: str
    optimizer: str
    seed: int
    recipe: Mapping[str, Any]
    git_sha: str | None
    git_dirty: bool | None
    versions: Mapping[str, str]
    device: str
    threads: int
    world_size: int
    dataset: DatasetInfo
    metric: Metric
    target: Target | None
    epochs: int
    started_at: str

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema = {self.schema}: this version reads schema {SCHEMA}")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The state after ``epoch`` epochs; epoch 0 is the untrained model.

    Attributes:
        epoch: number of epochs trained.
        step: number of optimizer steps taken.
        train_loss: mean training loss over the epoch; ``None`` in epoch 0 and where it is not finite.
        eval_loss: mean loss on the reported split.
        metric: the task's metric on the reported split.
        seconds: on the training clock since the start: everything the optimizer does and the loading of
            data; not evaluation, not checkpoints. Carried on when a run is resumed.
        peak_memory_mb: MiB; on CUDA the most that tensors took, on a CPU the most the process took.
        curvature_s: cumulative seconds of ``seconds`` spent on curvature, ``None`` if not reported.
        inverse_s: the same for inversions.
        apply_s: the same for applying the preconditioner.
        lr: the first parameter group's learning rate for the next step.
        damping: its damping, ``None`` for an optimizer without one.
        others: the task's further figures on the reported split.
    """

    event: ClassVar = "epoch"
    epoch: int
    step: int
    train_loss: float | None
    eval_loss: float | None
    metric: float | None
    seconds: float
    peak_memory_mb: float
    curvature_s: float | None
    inverse_s: float | None
    apply_s: float | None
    lr: float
    damping: float | None
    others: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A run taken up again, ``step`` optimizer steps in, with ``seconds`` on its clock; on what."""

    event: ClassVar = "resumed"
    epoch: int
    step: int
    seconds: float
    at: str
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class End:
    """The last line: all epochs done, or the loss stopped being a number.

    Attributes:
        reason: which of the two.
        seconds: on the training clock.
        load: how busy the machine was: the mean over the ends of epochs of `provenance.machine_load`. ``None`` where
            that is not known, as in records made before it was written down.
    """

    event: ClassVar = "end"
    reason: Literal["finished", "diverged"]
    seconds: float
    load: float | None = None


Event = Manifest | Epoch | Resumed | End
_EVENTS: dict[str, type[Event]] = {cls.event: cls for cls in (Manifest, Epoch, Resumed, End)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One record file as read.

    Attributes:
        path: the file.
        manifest: its first line.
        epochs: in order, from epoch 0.
        resumed: where it was taken up again.
        end: ``None`` while it is unfinished.
        truncated: whether a cut-off last line was left out.
    """

    path: Path
    manifest: Manifest
    epochs: tuple[Epoch, ...]
    resumed: tuple[Resumed, ...]
    end: End | None
    truncated: bool

    @property
    def devices(self) -> tuple[str, ...]:
        """All that it ran on."""
        found = {self.manifest.device, *(each.device for each in self.resumed if each.device)}
        return tuple(sorted(found))

    @property
    def best_metric(self) -> float:
        """The best value of the metric over the epochs, NaN if it never was a number."""
        values = [epoch.metric for epoch in self.epochs if epoch.metric is not None]
        best = max if self.manifest.metric.higher_is_better else min
        return best(values, default=math.nan)


def record_path(results_dir: Path, task: str, scale: str, optimizer: str, seed: int) -> Path:
    """Where the record of a run is.

    Args:
        results_dir: where the records are.
        task: the task's name.
        scale: a scale that it has a recipe for.
        optimizer: its name in the recipe.
        seed: of weights and batches.

    Returns:
        ``<results_dir>/<task>/<scale>/runs/<optimizer>-seed<seed>.jsonl``.
    """
    return results_dir / task / scale / "runs" / f"{optimizer}-seed{seed}.jsonl"


def select_numeric_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change a number in the record, by dotted key.

    Args:
        settings: tables of a recipe.

    Returns:
        Values by dotted key, without those that only say which runs there are or how they are judged.
    """
    return {key: value for key, value in _flat(settings) if key not in _NOT_NUMERIC}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_run(path: Path) -> Run:
    """Read one record, leaving out a last line that was cut off.

    Args:
        path: the file.

    Returns:
        The run.

    Raises:
        RecordError: for a file that is no record, or a damaged line.
    """
    lines = list(record_lines(path))
    truncated = bool(lines) and not lines[-1].endswith(b"\n")
    events = [parse_event(line, path, number) for number, line in enumerate(lines[: -1 if truncated else None], 1)]
    if not events or not isinstance(events[0], Manifest):
        raise RecordError(f"{path}, line 1: not a run record: it must begin with a manifest")
    _check_order(events, path)
    _check_name(events[0], path)
    last = events[-1]
    return Run(
        path=path,
        manifest=events[0],
        epochs=tuple(event for event in events if isinstance(event, Epoch)),
        resumed=tuple(event for event in events if isinstance(event, Resumed)),
        end=last if isinstance(last, End) else None,
        truncated=truncated,
    )


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """All records of a folder, in the order of their names, and a warning for each that is not whole.

    Args:
        folder: with ``*.jsonl``.

    Returns:
        Runs, and warnings.
    """
    runs, warnings = [], []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            run = read_run(path)
        except RecordError as error:
            warnings.append(str(error))
            continue
        runs.append(run)
        if run.truncated:
            warnings.append(f"{path}: the last line was cut off and is left out")
    return runs, warnings


def record_lines(path: Path) -> Iterator[bytes]:
    """The lines of a record with their ends; the last one lacks its end if it was cut off.

    Args:
        path: the file.

    Yields:
        One line.

    Raises:
        RecordError: for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error


def parse_event(line: bytes, path: Path, number: int) -> Event:
    """The event on line `number` of `path`.

    Args:
        line: one line of the file.
        path: the file, for the error.
        number: of the line, for the error.

    Returns:
        The event.

    Raises:
        RecordError: for a line that is not one.
    """
    where = f"{path}, line {number}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError(f"{where}: not JSON") from None
    event = fields.pop("event", None) if isinstance(fields, dict) else None
    if not isinstance(event, str) or event not in _EVENTS:
        raise RecordError(f"{where}: not a line of a run record (event = {event!r})")
    try:
        return read_settings(_EVENTS[event], fields, where)
    except UserError as error:
        raise RecordError(str(error)) from None


def _check_name(manifest: Manifest, path: Path) -> None:
    """A copy under another name would count as another seed."""
    own = record_path(Path(), manifest.task, manifest.scale, manifest.optimizer, manifest.seed).name
    if path.name != own:
        raise RecordError(f"{path}: is the record of {manifest.optimizer}, seed {manifest.seed}: must be called {own}")


def _check_order(events: list[Event], path: Path) -> None:
    epochs, seconds = 0, 0.0
    for number, event in enumerate(events, 1):
        where = f"{path}, line {number}"
        if number > 1 and isinstance(event, Manifest):
            raise RecordError(f"{where}: a second manifest")
        if isinstance(events[number - 2], End) and number > 1:
            raise RecordError(f"{where}: something follows the end")
        if isinstance(event, Epoch):
            if event.epoch != epochs:
                raise RecordError(f"{where}: epoch {event.epoch} where epoch {epochs} should be")
            epochs += 1
            if event.seconds < seconds:
                raise RecordError(f"{where}: seconds fall from {seconds} to {event.seconds}")
            seconds = event.seconds
    if isinstance(event, End) and event.reason == "finished" and epochs <= events[0].epochs:
        raise RecordError(f"{where}: finished after {epochs} of {events[0].epochs + 1} lines of epochs")
