"""Keeping NaN and Inf away from parameters, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ngplus.devices import can_ask
from ngplus.layers import stored

SHORT = 2**12
"""Numbers of a vector that is copied to lie beside others in less time than its sum takes."""


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, in its own memory; of a complex one its real and imaginary parts."""
    values = stored(gradient)
    if not values.is_complex():
        return values
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def any_nonfinite(gradients: Iterable[Tensor]) -> Tensor | None:
    """Whether any entry is NaN or Inf: a bool scalar on the first gradient's device; None without gradients."""
    devices: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if (values := _values(gradient)).numel():
            devices.setdefault(values.device, []).append(values)
    flags = [_any_nonfinite(values) for values in devices.values()]
    if len(flags) < 2:
        return flags[0] if flags else None
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def _any_nonfinite(tensors: list[Tensor]) -> Tensor:
    """On a GPU one kernel for many tensors; on a CPU their sums first, which read at the memory's speed.

    Every NaN or Inf survives a sum. A sum that overflowed by itself is cleared by a second look.
    """
    if not can_ask(tensors[0]):
        return torch.stack(torch._foreach_norm(tensors, float("inf"))).isfinite().all().logical_not()
    short: list[Tensor] = []
    looks: list[Tensor] = []
    for tensor in tensors:
        (short if tensor.dim() == 1 and len(tensor) <= SHORT else looks).append(tensor)
    if short:
        looks.append(torch.cat(short))
    suspects = [tensor for tensor in looks if not math.isfinite(tensor.sum().item())]
    return torch.tensor(not all(bool(tensor.isfinite().all()) for tensor in suspects), device=tensors[0].device)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_where(bad: Tensor, gradients: Iterable[Tensor]) -> None:
    """Set all gradients to zero if ``bad``, a bool scalar on a device, is true.

    By an "and" of their bits with all ones or all zeros: as cheap as a product, and NaN becomes zero too. On a CPU,
    where the answer is there, nothing is passed over for nothing.
    """
    if can_ask(bad) and not bool(bad):
        return
    masks: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for gradient in gradients:
        values = _values(gradient)
        bits = _BITS[values.element_size()]
        key = (values.device, bits)
        if key not in masks:
            masks[key] = bad.to(values.device, bits) - 1  # 0 where bad, else −1: every bit set
        values.view(bits).bitwise_and_(masks[key])


def nonfinite_names(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient holds NaN or Inf. Waits for the device."""
    return [
        name
        for name, parameter in named
        if parameter.grad is not None and not bool(_values(parameter.grad).isfinite().all())
    ]
