"""Gradients of single samples that come whole, and not as a product of two factors.

A function of a weight that nothing is known of gives 𝒢ᵢ itself, (m, n). As a pair (8) that is 𝒢ᵢ · I with κ = n. It is
computed again wherever it is asked for, for those samples alone that are asked for: all of them would take b times the
memory of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngplus.factors.pair import FactorPair


@dataclass(frozen=True)
class Formed:
    """The gradients of single samples, with the columns of their matrices as positions.

    Attributes:
        form: takes elements of the call's batch (c, k), −1 for none, to the sums over k of their gradients, (c, groups,
            m, n).
        elements: (b, k), the elements that make up each sample.
        shape: groups, m and n.
        dtype: of the gradients.
    """

    form: Callable[[Tensor], Tensor]
    elements: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self.elements.device

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return len(self.elements)

    @property
    def size(self) -> int:
        """Rows m."""
        return self.shape[1]

    @property
    def positions(self) -> int:
        """Columns n."""
        return self.shape[2]

    @property
    def norm_elements(self) -> int:
        """The rows of a column."""
        return self.size

    def gram_cost(self) -> int:
        """2n²m."""
        return 2 * self.positions**2 * self.size

    def dense(self) -> Tensor:
        """The gradients, (b, groups, m, n)."""
        return self.form(self.elements)

    def gram(self) -> Tensor:
        """𝒢ᵢᵀ𝒢ᵢ."""
        gradients = self.dense()
        return gradients.mT @ gradients

    def squared_norms(self) -> Tensor:
        """Of each column."""
        return self.dense().square().sum(dim=2)

    def slice(self, start: int, stop: int) -> Formed:
        """The samples ``start`` to ``stop``."""
        return replace(self, elements=self.elements[start:stop])

    def slice_positions(self, start: int, stop: int) -> Formed:
        """All of it: a gradient is formed whole, see `Identity`."""
        raise NotImplementedError("a gradient that is formed whole has no positions")

    def flat(self) -> Formed:
        """Itself: nothing is known of what a sample's gradient is a sum of."""
        return self

    def add_up(self, limit: int) -> tuple[Tensor, Tensor]:
        """Σᵢ 𝒢ᵢ, and the sum of squares of all their entries.

        Args:
            limit: elements of all temporaries.

        Returns:
            (groups, m, n) and a scalar.
        """
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        squares = total.new_zeros(())
        step = max(1, limit // max(1, 4 * total.numel()))  # what leads to a gradient is as large, and there is more
        for start in range(0, self.samples, step):
            gradients = self.slice(start, start + step).dense()
            total += gradients.sum(0)
            squares += torch.linalg.vector_norm(gradients).square()
        return total, squares

    def regroup(self, elements: Tensor) -> Formed:
        """The gradients of other samples, (samples, k) elements of the batch each, −1 for none."""
        return replace(self, elements=elements)


@dataclass(frozen=True)
class Identity:
    """The identity matrix, the other factor of `Formed`.

    Attributes:
        samples: number of samples b.
        groups: of the layer's matrix.
        size: n.
        device: of the gradients.
        dtype: of the gradients.
    """

    samples: int
    groups: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def positions(self) -> int:
        """Columns n."""
        return self.size

    @property
    def norm_elements(self) -> int:
        """A norm is one."""
        return 1

    def gram_cost(self) -> int:
        """Nothing is computed."""
        return 0

    def dense(self) -> Tensor:
        """The matrix once, seen from every sample and group."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return eye.expand(self.samples, self.groups, -1, -1)

    def gram(self) -> Tensor:
        """Itself."""
        return self.dense()

    def squared_norms(self) -> Tensor:
        """Ones."""
        return torch.ones(self.samples, self.groups, self.size, dtype=self.dtype, device=self.device)

    def slice(self, start: int, stop: int) -> Identity:
        """Of so many samples."""
        return replace(self, samples=stop - start)

    def slice_positions(self, start: int, stop: int) -> Identity:
        """See `Formed`."""
        raise NotImplementedError("a gradient that is formed whole has no positions")

    def flat(self) -> Identity:
        """Itself, see `Formed`."""
        return self


def pair_formed(formed: Formed) -> FactorPair:
    """𝒢ᵢ · I.

    Args:
        formed: the gradients.

    Returns:
        The pair.
    """
    groups, _, columns = formed.shape
    return FactorPair(formed, Identity(formed.samples, groups, columns, formed.device, formed.dtype))


__all__ = ["Formed", "Identity", "pair_formed"]
