"""Keeping NaN and Inf away from parameters, without synchronizing with the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ngplus.devices import reads_without_sync
from ngplus.dtensors import local_part
from ngplus.layers import stored_values
from ngplus.tuning import DEFAULT, Tuning


def _local_values(gradient: Tensor) -> Tensor:
    """`_values`, of a sharded gradient those of this process's shard."""
    return _values(local_part(gradient))


def _values(gradient: Tensor) -> Tensor:
    """The elements of a gradient, in its own memory; of a complex one its real and imaginary parts."""
    values = stored_values(gradient)
    if not values.is_complex():
        return values
    return torch.view_as_real(values.conj() if values.is_conj() else values)


class FiniteCheck:
    """Whether any of several gradients holds NaN or Inf.

    On a CPU each is checked when it is added, while it is still in the cache, by its sum, which is read at the memory's
    speed and which every NaN or Inf survives; where a sum of finite elements has overflowed, each element is checked.
    On other devices all are checked together at the end, without synchronizing.

    Args:
        tuning: up to which length vectors are checked together.
        collective_device: where every process has other gradients, the device of the collective by which they agree;
            else None.

    Attributes:
        checked: ids of the parameters whose gradients need not be added any more.
    """

    def __init__(self, tuning: Tuning = DEFAULT, collective_device: torch.device | None = None) -> None:
        self.checked: set[int] = set()
        self._short_vector = tuning.short_vector
        self._found = False
        self._collective_device = collective_device
        self._short: list[Tensor] = []
        self._elsewhere: dict[torch.device, list[Tensor]] = {}

    def add(self, gradient: Tensor) -> None:
        """Add a gradient, which must not change until `find_nonfinite`."""
        values = _values(gradient) if self._collective_device is None else _local_values(gradient)
        if not reads_without_sync(values):
            if values.numel():
                self._elsewhere.setdefault(values.device, []).append(values)
        elif values.dim() == 1 and len(values) <= self._short_vector:
            self._short.append(values)
        else:
            self._check(values)

    def add_unchecked(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """Add the gradients of all parameters that are not in `checked`."""
        checked = self.checked
        for group in param_groups:
            for parameter in group["params"]:
                if id(parameter) not in checked and parameter.grad is not None:
                    self.add(parameter.grad)

    def _check(self, values: Tensor) -> None:
        if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
            self._found = True

    def find_nonfinite(self) -> Tensor | None:
        """Whether any element is NaN or Inf; with sharded gradients, whether any process has one.

        Returns:
            A bool scalar on the device of a gradient; None where it is known that all are finite.
        """
        if self._short:
            self._check(torch.cat(self._short))
        flags = [
            torch.stack(torch._foreach_norm(values, float("inf"))).isfinite().all().logical_not()
            for values in self._elsewhere.values()
        ]
        if self._found:
            flags.append(torch.tensor(True))
        if self._collective_device is not None:
            flags = [_find_anywhere(flags, self._collective_device)]
            if reads_without_sync(flags[0]) and not bool(flags[0]):
                return None
        if len(flags) < 2:
            return flags[0] if flags else None
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def _find_anywhere(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether any flag of any process is true: one all-reduce of a scalar.

    Args:
        flags: bool scalars.
        device: of the collective.

    Returns:
        A bool scalar.
    """
    found = torch.zeros((), dtype=torch.int32, device=device)
    for flag in flags:
        found |= flag.to(device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.bool()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_where_(nonfinite: Tensor, gradients: Iterable[Tensor]) -> None:
    """Set all gradients to zero in place where ``nonfinite`` is true, without synchronizing.

    By an "and" of their bits with all ones or all zeros: as cheap as a product, and NaN becomes zero too.

    Args:
        nonfinite: a bool scalar on any device.
        gradients: dense or sparse.
    """
    masks: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for gradient in gradients:
        values = _local_values(gradient)
        bits = _BITS[values.element_size()]
        key = (values.device, bits)
        if key not in masks:
            masks[key] = nonfinite.to(values.device, bits) - 1  # 0 where nonfinite, else −1: every bit set
        values.view(bits).bitwise_and_(masks[key])


def raise_if_nonfinite(check: FiniteCheck, what: str, named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise where a gradient holds NaN or Inf. Synchronizes with the device.

    Args:
        check: that all gradients were added to.
        what: they are, in words.
        named: the parameters by name.

    Raises:
        FloatingPointError: it names the parameters.
    """
    nonfinite = check.find_nonfinite()
    if nonfinite is None or not bool(nonfinite):
        return
    names = [
        name
        for name, parameter in named
        if parameter.grad is not None and not bool(_local_values(parameter.grad).isfinite().all())
    ] or ["another process"]
    raise FloatingPointError(f"the {what} of {', '.join(names)} holds NaN or Inf; no parameter was changed")


__all__ = ["FiniteCheck", "raise_if_nonfinite", "zero_where_"]
