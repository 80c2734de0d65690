"""Mixed-precision training: its loss scale, and being outside of autocast."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch.amp import GradScaler

from ngplus._torch_internals import frames, is_autocast_enabled

_FRAMES = 24
"""Most frames between the scaler's ``step`` and `loss_scale`."""


def loss_scale() -> float:
    """Find the factor that the loss of this step was multiplied by, 1.0 without a `GradScaler`.

    `GradScaler` tells an optimizer its scale only where it has not unscaled the gradients yet, so that after
    ``scaler.unscale_(optimizer)`` (for clipping) no attribute holds it. But ``step`` is always called by the
    scaler's own ``step``, where it is found on the call stack. Called on curvature steps only; synchronizes with the
    device.

    No other frame's ``f_locals`` is read: up to Python 3.12 that keeps all of a function's variables, the loss and
    its graph among them, for as long as the function runs.
    """
    for frame in itertools.islice(frames(), _FRAMES):
        if frame.f_code is GradScaler.step.__code__:
            return float(frame.f_locals["self"].get_scale())
    return 1.0


def without_autocast(devices: Iterable[str]) -> AbstractContextManager[object]:
    """A context in which products are not rounded, whatever the loop around it is in.

    Where no autocast is on there is nothing to do, and to leave one takes as long as a small product does.

    Args:
        devices: types of devices, as "cuda".

    Returns:
        The context.
    """
    if not is_autocast_enabled():
        return nullcontext()
    stack = ExitStack()
    for device in set(devices):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


__all__ = ["loss_scale", "without_autocast"]
