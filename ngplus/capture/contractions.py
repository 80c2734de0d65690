"""Products of a weight with one other tensor over any of their dimensions: `einsum`, `bmm`, `matmul`.

Dimensions have labels, as in `einsum`. Of a matrix W[r, c] one label is summed over and the other is left in the
output: the factors (8) are then the other tensor and the output's gradient. A batch of matrices W[g, r, c] has its
first label in all; where one of them lacks it, all matrices get the same of it. What is left over is in the other
tensor and in the output: one of these dimensions holds the samples, the rest are positions.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngplus.capture.function_mode import FunctionCall
from ngplus.factors.dense import Dense
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer


class UnsupportedCall(Exception):  # noqa: N818 (control flow, never seen by users)
    """A use of a layer's weight whose per-sample gradient is not known in the form (8)."""


class NoSampleGradient(UnsupportedCall):
    """A use in which a single sample has no gradient of its own, or nothing tells what a sample is."""


@dataclass(frozen=True, eq=False)
class Contraction:
    """A product of a weight with another tensor.

    Attributes:
        other: the other tensor.
        inside: labels of its dimensions.
        weight: labels of the weight's.
        outside: labels of the output's.
        scale: that the product is multiplied by.
    """

    other: Tensor
    inside: str
    weight: str
    outside: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class ContractionFactors:
    """How the factors are made of the other tensor and the output's gradient.

    Attributes:
        inside: how the other tensor's dimensions are ordered: samples, groups, features, then positions.
        outside: the same of the output's.
        groups: how many matrices there are, where the weight has a dimension of them, else 0.
        transposed: whether the other tensor belongs to the matrix's rows.
        scale: of the product.
        appended: see `Dense`.
        spread: of the other tensor and the output, whether it lacks the dimension of groups, which is put in front.
    """

    inside: list[int]
    outside: list[int]
    groups: int
    transposed: bool
    scale: float
    appended: float | None
    spread: tuple[bool, bool]

    @property
    def free(self) -> list[int]:
        """The other tensor's dimensions that may hold the samples, the one that does first."""
        free = [self.inside[0], *self.inside[3 if self.groups else 2 :]]
        return [each - self.spread[0] for each in free]

    @classmethod
    def of(cls, layer: Layer, weight: Tensor, contraction: Contraction, appended: float | None) -> ContractionFactors:
        """Find them.

        Args:
            layer: whose weight it is.
            weight: the weight, or a view of it.
            contraction: the product.
            appended: see `Dense`.

        Returns:
            How the factors are made.

        Raises:
            UnsupportedCall: where the product is no matrix product for each sample.
        """
        if len(set(contraction.weight)) < len(contraction.weight):
            raise UnsupportedCall("is used in a product with its diagonal alone")
        groups, rows, columns = _matrix_labels(layer, weight, contraction.weight)
        sides = contraction.inside, contraction.outside
        spread = tuple(bool(groups) and groups not in side for side in sides)
        inside, outside = (groups + side if lacks else side for side, lacks in zip(sides, spread, strict=True))
        transposed = rows in inside
        summed, left = (rows, columns) if transposed else (columns, rows)
        others = [label for label in inside if label not in (*groups, summed)]
        labels = [*groups, *others]
        fits = (
            sorted(inside) == sorted([*labels, summed])
            and sorted(outside) == sorted([*labels, left])
            and bool(others)
            and _sizes_agree(contraction, weight)
        )
        if not fits:
            raise UnsupportedCall("is used in a product that is no matrix product for each sample")
        at = sides[0][layer.batch_dim] if layer.batch_dim < len(sides[0]) else ""
        samples = at if at in others else others[0]
        positions = [label for label in others if label != samples]
        return cls(
            [inside.index(label) for label in (samples, *groups, summed, *positions)],
            [outside.index(label) for label in (samples, *groups, left, *positions)],
            layer.matrix[0] if groups else 0,
            transposed,
            contraction.scale,
            appended,
            (spread[0], spread[1]),
        )

    def pair(self, source: Tensor, gradient: Tensor) -> FactorPair:
        """The factors.

        Args:
            source: the other tensor.
            gradient: of the output.

        Returns:
            The pair.
        """
        inside = self._order(source, self.inside, self.spread[0])
        outside = self._order(gradient if self.scale == 1 else gradient * self.scale, self.outside, self.spread[1])
        if self.transposed:
            return FactorPair(Dense(inside), Dense(outside, appended=self.appended))
        return FactorPair(Dense(outside), Dense(inside, appended=self.appended))

    def _order(self, tensor: Tensor, order: list[int], spread: bool) -> Tensor:
        """(b, groups, features, κ)."""
        ordered = (tensor.expand(self.groups, *tensor.shape) if spread else tensor).permute(order)
        ordered = ordered if self.groups else ordered.unsqueeze(1)
        return ordered.unsqueeze(-1) if ordered.dim() == 3 else ordered.flatten(3)


def _matrix_labels(layer: Layer, weight: Tensor, labels: str) -> tuple[str, str, str]:
    """The labels of groups, empty where there are none, of rows and columns; those that a view repeats are dropped."""
    repeated = [dim for dim, stride in enumerate(weight.stride()) if stride == 0]
    for dim in reversed(repeated):
        weight, labels = weight.select(dim, 0), labels[:dim] + labels[dim + 1 :]
    if layer.batched or layer.weight.dim() == 2:
        groups, m, n = layer.matrix
        stored = layer.weight.detach().view(groups, m, n) if groups > 1 else layer.weight.detach().view(m, n)
        for order in itertools.permutations(range(stored.dim())) if weight.dim() == stored.dim() else ():
            view = stored.permute(order)
            if (view.shape, view.stride(), view.storage_offset()) == (
                weight.shape,
                weight.stride(),
                weight.storage_offset(),
            ):
                in_order = "".join(labels[order.index(dim)] for dim in range(stored.dim()))
                return in_order[:-2], in_order[-2], in_order[-1]
    raise UnsupportedCall("is used in a product through a view that is not all of its matrices")


def _sizes_agree(contraction: Contraction, weight: Tensor) -> bool:
    """Whether no dimension is repeated by broadcasting."""
    sizes = dict(zip(contraction.weight, weight.shape, strict=True))
    return all(
        sizes.get(label, size) == size for label, size in zip(contraction.inside, contraction.other.shape, strict=True)
    )


def _read_einsum(call: FunctionCall, weight: Tensor) -> Contraction:
    """``einsum("bti,io->bto", x, W)``."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or call.kwargs:
        raise UnsupportedCall("is used by einsum with other operands than two")
    sides, arrow, outside = equation.replace(" ", "").partition("->")
    labels = sides.split(",")
    if not arrow:
        every = "".join(labels).replace(".", "")
        outside = ("..." if "..." in sides else "") + "".join(sorted(each for each in every if every.count(each) == 1))
    free = [each for each in string.ascii_letters if each not in equation]
    length = max(each.dim() - len(one) + 3 if "..." in one else 0 for one, each in zip(labels, operands, strict=True))
    dots = "".join(free[:length])
    written = [
        one.replace("...", dots[length - (each.dim() - len(one) + 3) :]) if "..." in one else one
        for one, each in zip(labels, operands, strict=True)
    ]
    at = 0 if operands[0] is weight else 1
    return Contraction(operands[1 - at], written[1 - at], written[at], outside.replace("...", dots))


def _read_matmul(call: FunctionCall, weight: Tensor) -> Contraction:
    """``W @ x`` and ``x @ W``, with batch dimensions of either in front."""
    one, other = call.tensors
    if min(one.dim(), other.dim()) < 2:
        raise UnsupportedCall("is multiplied by a vector")
    batch = string.ascii_lowercase[: max(one.dim(), other.dim()) - 2]
    labels = [batch[len(batch) - each.dim() + 2 :] + last for each, last in ((one, "NK"), (other, "KM"))]
    at = 0 if one is weight else 1
    return Contraction((one, other)[1 - at], labels[1 - at], labels[at], batch + "NM")


def _read_baddbmm(call: FunctionCall, weight: Tensor) -> Contraction:
    """``baddbmm(bias, x, W)``."""
    named = dict(zip(("input", "batch1", "batch2"), call.args, strict=False)) | call.kwargs
    at = named["batch1"] is weight
    if not at and named["batch2"] is not weight:
        raise UnsupportedCall("is added to a product")
    labels = "gNK", "gKM"
    other = named["batch2" if at else "batch1"]
    return Contraction(other, labels[at], labels[not at], "gNM", float(named.get("alpha", 1)))


CONTRACTIONS: Mapping[Any, Callable[[FunctionCall, Tensor], Contraction]] = {
    torch.einsum: _read_einsum,
    torch.matmul: _read_matmul,
    Tensor.matmul: _read_matmul,
    Tensor.__matmul__: _read_matmul,
    torch.mm: _read_matmul,
    Tensor.mm: _read_matmul,
    torch.bmm: _read_matmul,
    Tensor.bmm: _read_matmul,
    torch.baddbmm: _read_baddbmm,
    Tensor.baddbmm: _read_baddbmm,
}
"""The functions whose calls are products of two tensors."""

__all__ = ["CONTRACTIONS", "Contraction", "ContractionFactors", "NoSampleGradient", "UnsupportedCall"]
