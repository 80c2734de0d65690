"""What can be done on the device that a tensor is stored on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reads_without_sync(tensor: Tensor) -> bool:
    """Whether a tensor's values are there at once: on a CPU, and not for tensors that stand in for others."""
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def factor_dtype(matrix: Tensor) -> torch.dtype:
    """Float64, except on devices without it."""
    return matrix.dtype if matrix.device.type == "mps" else torch.float64
