"""Gradients of tables in the layout whose step is cheaper for the base, where both layouts give the same step.

SGD without momentum and AdaGrad, both without weight decay, move no entry whose gradient is zero, but pass over all of
them, AdaGrad several times. Where the nonzero rows are known, since they alone were multiplied, these bases get a
sparse gradient for the time of their step. The other way round AdaGrad's step with a sparse gradient makes four sparse
tensors, which takes longer than to pass over all of a small table: there it gets a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

from ngplus.devices import reads_without_sync
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, eq=False)
class NonzeroRows:
    """The rows of a gradient that are not all zeros.

    Attributes:
        index: (k,), ascending.
        values: (k, d).
    """

    index: Tensor
    values: Tensor

    def to_sparse(self, table: Tensor) -> Tensor:
        """The gradient ``table`` (q, d) as a sparse one, of values that are its own."""
        return torch.sparse_coo_tensor(
            self.index.unsqueeze(0), self.values, table.shape, is_coalesced=True, check_invariants=False
        )


class TemporaryLayout:
    """Gradients converted to the cheaper layout for the time of the base's step.

    Args:
        base: whose step it is.
        tuning: which layout is cheaper.
    """

    def __init__(self, base: Optimizer, tuning: Tuning = DEFAULT) -> None:
        self._leaves_zeros = _LEAVES_ZEROS.get(type(base))
        self._densify_small = type(base) is Adagrad
        self._tuning = tuning
        self._converted: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def convert_(self, nonzero_rows: Mapping[nn.Parameter, NonzeroRows], groups: list[dict[str, Any]]) -> None:
        """Convert gradients whose other layout is cheaper, where the base's settings allow it.

        Args:
            nonzero_rows: of the weights of which they are known.
            groups: parameter groups, whose gradients are replaced.
        """
        if self._leaves_zeros is None or not (nonzero_rows or self._densify_small):
            return
        for group in groups:
            if _is_plain(group) and self._leaves_zeros(group):
                for parameter in group["params"]:
                    self._convert_one_(parameter, nonzero_rows)

    def _convert_one_(self, parameter: nn.Parameter, nonzero_rows: Mapping[nn.Parameter, NonzeroRows]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            small = self._densify_small and parameter.numel() <= self._tuning.dense_step_up_to
            if small and reads_without_sync(parameter) and _is_exact(parameter):
                self._set_(parameter, gradient, gradient.to_dense())
            return
        rows = nonzero_rows.get(parameter) if nonzero_rows else None
        few = rows is not None and len(rows.index) <= self._tuning.sparse_step_share * len(parameter)
        if rows is not None and few and _is_exact(parameter):
            _declare_invariants_unchecked()
            self._set_(parameter, gradient, rows.to_sparse(gradient))

    def _set_(self, parameter: nn.Parameter, gradient: Tensor, other: Tensor) -> None:
        self._converted.append((parameter, gradient, other))
        parameter.grad = other

    def restore_(self) -> None:
        """Put the original gradients, which have the same values, back; not where a hook has put another."""
        while self._converted:
            parameter, gradient, other = self._converted.pop()
            if parameter.grad is other:
                parameter.grad = gradient


def _declare_invariants_unchecked() -> None:
    """Choose torch's default explicitly, without which AdaGrad's step warns."""
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


_LEAVES_ZEROS: Mapping[type[Optimizer], Callable[[Mapping[str, Any]], bool]] = {
    SGD: lambda group: not group["momentum"],
    Adagrad: lambda group: group["eps"] > 0,
}
"""Bases, and whether an entry whose gradient is zero stays where it is under a group's settings, but for its decay."""


__all__ = ["NonzeroRows", "TemporaryLayout"]
