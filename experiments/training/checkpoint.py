"""Checkpoints: everything a run needs to go on as if it had never been interrupted.

A checkpoint is replaced in one step, so that a kill while it is written leaves the one before. It is loaded
with ``weights_only=True``: only tensors and plain values, no code.
"""

import os
import random
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.errors import UserError, write_failure
from experiments.optimizers.schedule_settings import Scheduler
from experiments.training.timing import TimeSplit


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or belongs to another run; the message names the file."""


@dataclass(kw_only=True)
class Position:
    """Where a run is.

    Attributes:
        epoch: epochs trained and recorded.
        step: optimizer steps taken in all.
        batches: batches of the next epoch already trained on, a multiple of ``accumulate``.
        seconds: on the training clock.
        peak_memory_mb: the most so far.
        times: the optimizer's time split.
        ranks: what each process has for itself, in the order of ranks.
    """

    epoch: int = 0
    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    times: TimeSplit = field(default_factory=TimeSplit)
    ranks: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Checkpointed:
    """The parts of a run that change as it trains."""

    model: nn.Module
    optimizer: Optimizer
    schedules: list[Scheduler]

    def states(self) -> dict[str, Any]:
        """The state dicts of model and optimizer."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_states(self, states: Mapping[str, Any]) -> None:
        """Restore what `states` gave."""
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])


def checkpoint_path(folder: Path, task: str, scale: str, optimizer: str, seed: int) -> Path:
    """Where the checkpoint of a run is.

    Args:
        folder: of all checkpoints.
        task: the task's name.
        scale: a scale that it has a recipe for.
        optimizer: its name in the recipe.
        seed: of weights and batches.

    Returns:
        The file.
    """
    return folder / task / scale / f"{optimizer}-seed{seed}.pt"


def save_checkpoint(
    path: Path, parts: Checkpointed, position: Position, identity: Mapping[str, Any], *, writes: bool = True
) -> None:
    """Write a checkpoint; the one before stays until this one is whole and on the disk.

    Args:
        path: the file.
        parts: what to save the state of.
        position: where the run is.
        identity: plain values that a run must share to go on from here.
        writes: whether this process writes it; the others only bring what they have of the parts.

    Raises:
        CheckpointError: when the disk is full or fails.
    """
    state = {
        "identity": dict(identity),
        "position": asdict(position),
        **parts.states(),
        "schedules": [schedule.state_dict() for schedule in parts.schedules],
    }
    if not writes:
        return
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save_to_disk(state, partial)
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(write_failure(path, error)) from error


def load_checkpoint(path: Path, parts: Checkpointed, identity: Mapping[str, Any]) -> Position:
    """Restore the state of `parts` from a checkpoint, and return where the run is.

    Args:
        path: the file.
        parts: changed in place.
        identity: of the run that goes on from it.

    Returns:
        Where the run is.

    Raises:
        CheckpointError: for a file that is no checkpoint, or one of another run or model.
    """
    state = _read(path)
    _check_identity(path, state["identity"], identity)
    _check_model(path, state["model"], parts.model.state_dict())
    try:
        position = Position(**state["position"] | {"times": TimeSplit(**state["position"]["times"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: does not say where the run was: {error}{_REMEDY}") from error
    if len(state["schedules"]) != len(parts.schedules):
        raise CheckpointError(
            f"{path}: has {len(state['schedules'])} schedules where there are {len(parts.schedules)}{_REMEDY}"
        )
    try:
        parts.load_states(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: does not fit the optimizer: {error}{_REMEDY}") from error
    for schedule, saved in zip(parts.schedules, state["schedules"], strict=True):
        schedule.load_state_dict(saved)
    return position


def read_identity(path: Path) -> dict[str, Any]:
    """The identity a checkpoint was saved with.

    Args:
        path: the file.

    Returns:
        Plain values.

    Raises:
        CheckpointError: for a file that is no checkpoint.
    """
    return _read(path)["identity"]


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, as tensors and plain values.

    Returns:
        States by generator: Python's, NumPy's, torch's, CUDA's.
    """
    kind, key, *rest = np.random.get_state()  # noqa: NPY002 the global generator is what a library may use
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(key.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned.

    Args:
        state: from `rng_state`.
    """
    random.setstate(state["python"])
    kind, key, *rest = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


_REMEDY = "; start over with --force"


def _save_to_disk(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch 2.14 hides what ends a write, a full disk or the exit that a signal asks for, behind its own error.
            raise error.__context__ or error from None
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise CheckpointError(f"{path}: not a checkpoint, or damaged{_REMEDY}") from error
    kinds = {"identity": dict, "position": dict, "model": dict, "optimizer": dict, "schedules": list}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise CheckpointError(f"{path}: not a checkpoint of this program{_REMEDY}")
    return state


def _check_sums(path: Path) -> None:
    """Refuse a file that changed on its way: `torch.load` does not check the checksums that `torch.save` wrote."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def _check_identity(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    different = [
        f"{key} is {saved.get(key)!r} there and {own.get(key)!r} here"
        for key in sorted({*saved, *own})
        if saved.get(key) != own.get(key)
    ]
    if different:
        raise CheckpointError(f"{path}: is of another run: {'; '.join(different)}{_REMEDY}")


def _check_model(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    def shape(state: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(state[name].shape)) if name in state else "missing"

    different = [
        f"{name} is {shape(saved, name)} there and {shape(own, name)} here"
        for name in sorted({*saved, *own})
        if shape(saved, name) != shape(own, name)
    ]
    if different:
        shown = "; ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        raise CheckpointError(f"{path}: is of another model: {shown}{_REMEDY}")
