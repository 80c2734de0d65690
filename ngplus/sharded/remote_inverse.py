"""What a process has of an inverse that another one keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngplus.factors.factor import statistics_dtype
from ngplus.layers import MatrixShape, Side
from ngplus.solvers.preconditioner import Entries, Preconditioner
from ngplus.tuning import DEFAULT, Tuning


@dataclass(eq=False)
class RemoteInverse(Preconditioner):
    """Stands for the inverse of a layer that another process keeps, which makes the direction.

    Attributes:
        empty: no elements, of the inverse's dtype and on its device.
    """

    empty: Tensor

    @classmethod
    def like(cls, weight: Tensor) -> RemoteInverse:
        """One for a weight."""
        return cls(torch.empty(0, dtype=statistics_dtype(weight.dtype), device=weight.device))

    @property
    def main(self) -> Tensor:
        """No elements."""
        return self.empty

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Raise: there is nothing to multiply by."""
        raise RuntimeError("another process keeps the inverse of this layer")

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def to(self, device: torch.device) -> RemoteInverse:
        """The same for another device."""
        return RemoteInverse(self.empty.to(device))

    def entries(self) -> Entries:
        """None: the process that keeps it saves it."""
        return {}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> RemoteInverse:
        """Raise: it is not saved."""
        raise KeyError("inverse0")


__all__ = ["RemoteInverse"]
