"""What a run is measured by: a training clock, the optimizer's own time split, and peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

_STATUS = Path("/proc/self/status")


class Clock:
    """Seconds of training: counts inside `running`, and synchronizes with the device at both ends.

    Args:
        device: the device that is trained on.
        seconds: where to carry on from.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self.device = device
        self.seconds = seconds
        self._started = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent inside."""
        self._started = self._now()
        yield
        self.seconds += self._now() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `running`: do not count the time spent inside this; `seconds` is up to date there."""
        self.seconds += self._now() - self._started
        yield
        self._started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Cumulative seconds inside the optimizer; each is ``None`` if it does not report them."""

    curvature_s: float | None = None
    inverse_s: float | None = None
    apply_s: float | None = None


class OptimizerTimes:
    """The optimizer's cumulative time split, carried on over resumed runs.

    Args:
        optimizer: reports its times if it has ``track_times``, as `ngplus.NGPlus` does.
        before: what the split was when the run was last saved.
    """

    def __init__(self, optimizer: Optimizer, before: TimeSplit | None = None) -> None:
        self._optimizer = optimizer
        self._reports = hasattr(optimizer, "track_times")
        if self._reports:
            optimizer.track_times(True)
        self._before = before or TimeSplit()
        self._start = self._read()

    def split(self) -> TimeSplit:
        """The split now."""
        if not self._reports:
            return TimeSplit()
        now, start, before = self._read(), self._start, self._before
        curvature_s, inverse_s, apply_s = (
            (getattr(before, name) or 0.0) + getattr(now, name) - getattr(start, name)
            for name in ("curvature_s", "inverse_s", "apply_s")
        )
        return TimeSplit(curvature_s=curvature_s, inverse_s=inverse_s, apply_s=apply_s)

    def _read(self) -> TimeSplit:
        if not self._reports:
            return TimeSplit()
        times = self._optimizer.times
        return TimeSplit(curvature_s=times.curvature, inverse_s=times.inverse, apply_s=times.apply)


def peak_memory_mb(device: torch.device) -> float:
    """MiB: the most that tensors took on a CUDA device, or the most that this whole process took.

    On Linux the figure is the kernel's high-water mark of this program alone; ``getrusage``, used elsewhere,
    also counts what the parent had in use when it started this process.

    Args:
        device: where tensors are.

    Returns:
        MiB since the process began, or since the statistics of the device were reset.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
