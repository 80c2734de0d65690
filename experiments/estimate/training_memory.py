"""How much memory training takes: the peak that was measured, and exactly what is kept between steps."""

import ctypes
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.training.timing import peak_memory_mb
from ngplus import NGPlus

_PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """MiB.

    Attributes:
        kept: parameters, buffers, gradients and the optimizer's state, counted.
        peak: the most that was in use, on a CPU beyond what the process had before; ``None`` where the system does
            not tell.
    """

    kept: float
    peak: float | None

    def extrapolate(self, factor: float) -> float | None:
        """The peak at a batch so many times as large: what is not kept (activations, work space) grows with it."""
        return None if self.peak is None else self.kept + max(0.0, self.peak - self.kept) * factor


def start_of_peak(device: torch.device) -> float | None:
    """Forget the peak so far; the MiB in use now that do not count, ``None`` where the system cannot tell.

    On a CPU it is the process that is measured. Memory that was freed is given back first, or it would be used again
    unseen.

    Args:
        device: that is trained on.

    Returns:
        MiB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text("5")  # the peak of the resident memory starts again, see proc(5)
    except (OSError, AttributeError):
        return None
    return peak_memory_mb(device)


def memory_use(model: nn.Module, optimizer: Optimizer, device: torch.device, baseline: float | None) -> MemoryUse:
    """What training took since `start_of_peak` returned ``baseline``.

    Args:
        model: that is trained.
        optimizer: that trains it.
        device: that is trained on.
        baseline: from `start_of_peak`.

    Returns:
        What is kept, and the peak.
    """
    peak = None if baseline is None else peak_memory_mb(device) - baseline
    return MemoryUse(kept=kept_bytes(model, optimizer) / 2**20, peak=peak)


def kept_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Parameters, buffers, gradients as large as their parameters unless they are sparse, and the optimizer's state."""
    sparse = {id(parameter) for module in model.modules() if getattr(module, "sparse", False)
              for parameter in module.parameters(recurse=False)}  # fmt: skip
    gradients = sum(each.nbytes for each in model.parameters() if id(each) not in sparse)
    own = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    return own + gradients + sum(each.nbytes for each in tensors_in(_kept_by(optimizer)))


def _kept_by(optimizer: Optimizer) -> Any:
    """The optimizer's state; what NG+ saves is padded to sizes that do not depend on the batch."""
    if isinstance(optimizer, NGPlus):
        return [optimizer.base.state_dict(), [each.tensors() for each in optimizer.curvature.values()]]
    return optimizer.state_dict()


def tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors_in(value)
