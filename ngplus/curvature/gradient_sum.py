"""Σᵢ 𝒢ᵢ of a use, which its backward pass can then do without computing."""

from __future__ import annotations

from torch import Tensor

from ngplus.layers import Side


class GradientSum:
    """The sum of single samples' gradients that are formed for the curvature, for the weight's own gradient.

    Forming 𝒢ᵢ for every sample takes as many operations as the weight's gradient does, which is their sum. It is only
    handed on to the backward pass, and for the output's gradient, that the samples' were formed of, and once it is of
    all of them.

    Args:
        weight: of one matrix or kernel a row.

    Attributes:
        weight: as given.
        complete: whether all samples are in it.
    """

    __slots__ = ("_of", "_total", "complete", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._of: tuple[object, ...] | None = None
        self._total: Tensor | None = None
        self.complete = False

    def start(self, gradient: Tensor, backward_pass: int) -> None:
        """Begin the sum of a backward pass.

        Args:
            gradient: of the use's output.
            backward_pass: its number.
        """
        self._of, self._total, self.complete = _identify(gradient, backward_pass), None, False

    def add_(self, gradients: Tensor, side: Side) -> None:
        """Add what was formed of some samples.

        Args:
            gradients: (b, groups, m, n), or (b, groups, n, m) for the right side.
            side: which of them.
        """
        if self._of is None:
            return  # no backward pass waits for it
        part = gradients.sum(dim=0)
        part = part if side == "left" else part.mT
        self._total = part if self._total is None else self._total.add_(part)

    def take(self, gradient: Tensor, backward_pass: int) -> Tensor | None:
        """The sum as the weight's gradient; None where it is not known, or not for this. It is forgotten.

        Args:
            gradient: of the use's output.
            backward_pass: the number of the one that runs.

        Returns:
            A tensor like the weight.
        """
        of, total, complete = self._of, self._total, self.complete
        self._of, self._total, self.complete = None, None, False
        if total is None or not complete or of != _identify(gradient, backward_pass):
            return None
        columns = self.weight[0].numel()  # behind them is the bias's
        return total[..., :columns].reshape(self.weight.shape).to(self.weight.dtype)


def _identify(gradient: Tensor, backward_pass: int) -> tuple[object, ...]:
    """What no other gradient of the same backward pass has, and none that was changed since."""
    return backward_pass, gradient.data_ptr(), gradient._version, gradient.shape, gradient.stride()


__all__ = ["GradientSum"]
