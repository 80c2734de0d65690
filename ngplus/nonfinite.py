"""Keeping NaN and Inf away from parameters, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


def any_nonfinite(gradients: Iterable[Tensor]) -> Tensor | None:
    """Whether any entry is NaN or Inf: a bool scalar on the first gradient's device; None without gradients."""
    devices: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if (values := _values(gradient)).numel():
            devices.setdefault(values.device, []).append(values)
    flags = [
        torch.stack(torch._foreach_norm(values, float("inf"))).isfinite().all().logical_not()
        for values in devices.values()
    ]
    if not flags:
        return None
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def zero_where(bad: Tensor, gradients: Iterable[Tensor]) -> None:
    """Set all gradients to zero if ``bad``, a bool scalar on a device, is true."""
    flags: dict[torch.device, Tensor] = {}
    for gradient in gradients:
        values = _values(gradient)
        flag = flags.setdefault(values.device, bad.to(values.device))
        values.masked_fill_(flag, 0.0)


def nonfinite_names(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient holds NaN or Inf. Waits for the device."""
    return [
        name
        for name, parameter in named
        if parameter.grad is not None and not bool(_values(parameter.grad).isfinite().all())
    ]
