"""Gradients of tables in the form whose step is cheaper for the base, where both forms give the same step.

SGD without momentum and AdaGrad, both without weight decay, move no entry whose gradient is zero, but pass over all of
them, AdaGrad several times. Where the rows that are not zeros are known, since they alone were multiplied, these bases
are lent a sparse gradient for the time of their step. The other way round AdaGrad's step with a sparse gradient makes
four sparse tensors, which takes longer than to pass over all of a small table: there it is lent a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

from ngplus.devices import can_ask

FEW = 8
"""A table is lent as sparse where at most one of so many of its rows is touched."""
SMALL = 2**13
"""Numbers of a table up to which AdaGrad's dense step is cheaper than its sparse one, from 32 rows that are touched."""


@dataclass(frozen=True, eq=False)
class TouchedRows:
    """The rows of a gradient that are not all zeros.

    Attributes:
        numbers: (k,), ascending.
        values: (k, d).
    """

    numbers: Tensor
    values: Tensor

    def as_sparse(self, table: Tensor) -> Tensor:
        """The gradient ``table`` (q, d) as a sparse one, of values that are its own."""
        return torch.sparse_coo_tensor(
            self.numbers.unsqueeze(0), self.values, table.shape, is_coalesced=True, check_invariants=False
        )


class Loan:
    """Gradients that the base sees in another form, until they are taken back.

    Args:
        base: whose step they are lent for.
    """

    def __init__(self, base: Optimizer) -> None:
        self._leaves_alone = _LEAVES_ZEROS_ALONE.get(type(base))
        self._sparse_is_dear = type(base) is Adagrad
        self._lent: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def give(self, touched: Mapping[nn.Parameter, TouchedRows], groups: list[dict[str, Any]]) -> None:
        """Put gradients of the other form in place of those that are dearer, where the base's ``groups`` allow it."""
        if self._leaves_alone is None or not (touched or self._sparse_is_dear):
            return
        for group in groups:
            if _is_plain(group) and self._leaves_alone(group):
                for parameter in group["params"]:
                    self._give_one(parameter, touched)

    def _give_one(self, parameter: nn.Parameter, touched: Mapping[nn.Parameter, TouchedRows]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            small = self._sparse_is_dear and parameter.numel() <= SMALL
            if small and can_ask(parameter) and _is_exact(parameter):
                self._lend(parameter, gradient, gradient.to_dense())
            return
        rows = touched.get(parameter) if touched else None
        if rows is not None and FEW * len(rows.numbers) <= len(parameter) and _is_exact(parameter):
            _say_that_invariants_are_not_checked()
            self._lend(parameter, gradient, rows.as_sparse(gradient))

    def _lend(self, parameter: nn.Parameter, gradient: Tensor, other: Tensor) -> None:
        self._lent.append((parameter, gradient, other))
        parameter.grad = other

    def take_back(self) -> None:
        """Put the gradients, which have the same values, back; not where a hook has put another."""
        while self._lent:
            parameter, gradient, other = self._lent.pop()
            if parameter.grad is other:
                parameter.grad = gradient


def _say_that_invariants_are_not_checked() -> None:
    """Which is torch's default; but not having said so makes AdaGrad's step warn of it."""
    check = torch.sparse.check_sparse_tensor_invariants
    if not check.is_enabled():  # type: ignore[no-untyped-call]
        check.disable()  # type: ignore[no-untyped-call]


def _is_exact(parameter: Tensor) -> bool:
    """Whether torch adds rows to it as a dense gradient: it rounds other dtypes twice, and misreads other strides."""
    return parameter.dtype in (torch.float32, torch.float64) and parameter.is_contiguous()


def _is_plain(group: Mapping[str, Any]) -> bool:
    """Whether the base's step is the one that takes sparse gradients."""
    chosen = any(group.get(name) for name in ("foreach", "fused", "differentiable", "capturable"))
    return not chosen and not isinstance(group["lr"], Tensor) and not group["weight_decay"]


_LEAVES_ZEROS_ALONE: Mapping[type[Optimizer], Callable[[Mapping[str, Any]], bool]] = {
    SGD: lambda group: not group["momentum"],
    Adagrad: lambda group: group["eps"] > 0,
}
"""Bases, and whether an entry whose gradient is zero stays where it is under a group's settings, but for its decay."""


__all__ = ["Loan", "TouchedRows"]
