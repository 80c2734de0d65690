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


class Watch:
    """Whether any of the gradients that it is shown holds NaN or Inf.

    On a CPU each is looked at when it is shown, while it still lies in the cache, by its sum, which is read at the
    memory's speed and which every NaN or Inf survives; one whose sum overflowed by itself is cleared by a second look.
    On other devices all are looked at together in the end, and nothing waits.

    Attributes:
        seen: ids of the parameters whose gradients need not be shown any more.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self._found = False
        self._short: list[Tensor] = []
        self._elsewhere: dict[torch.device, list[Tensor]] = {}

    def look(self, gradient: Tensor) -> None:
        """Show it a gradient, which stays as it is until `bad`."""
        values = _values(gradient)
        if not can_ask(values):
            if values.numel():
                self._elsewhere.setdefault(values.device, []).append(values)
        elif values.dim() == 1 and len(values) <= SHORT:
            self._short.append(values)
        else:
            self._ask(values)

    def _ask(self, values: Tensor) -> None:
        if not math.isfinite(values.sum().item()) and not bool(values.isfinite().all()):
            self._found = True

    def bad(self) -> Tensor | None:
        """A bool scalar on the device of a gradient; None where it is known that all are finite."""
        if self._short:
            self._ask(torch.cat(self._short))
        flags = [
            torch.stack(torch._foreach_norm(values, float("inf"))).isfinite().all().logical_not()
            for values in self._elsewhere.values()
        ]
        if self._found:
            flags.append(torch.tensor(True))
        if len(flags) < 2:
            return flags[0] if flags else None
        return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_where(bad: Tensor, gradients: Iterable[Tensor]) -> None:
    """Set all gradients to zero if ``bad``, a bool scalar on a device, is true.

    By an "and" of their bits with all ones or all zeros: as cheap as a product, and NaN becomes zero too.
    """
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
