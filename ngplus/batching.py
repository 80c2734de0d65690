"""Small matrices across layers: their directions (6) with as few calls as can be.

The product of two small matrices takes less time than the calls around it, and a model may have dozens: the tables of a
DLRM, the 1×1 convolutions of a mobile network, the blocks of (18). Those of equal shape are one product. Of the
others each is one of its own, but they are written back, and looked at for NaN, together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngplus.gfim import Shape
from ngplus.layers import Layer, stored
from ngplus.preconditioner import DenseInverse, Preconditioner

Looks = dict[int, Tensor | None]
"""What to look at for NaN in place of the gradient of a weight or bias, by its id; None: it is part of another's."""

SMALL = 2**14
"""Most numbers of a gradient that is copied to lie beside others: about as long as the calls take that this saves."""


@dataclass(frozen=True, eq=False)
class Member:
    """A layer whose gradient is to be turned.

    Attributes:
        layer: it has a gradient.
        preconditioner: its (λI + L)⁻¹ or (λI + R)⁻¹.
        shape: of its matrix.
    """

    layer: Layer
    preconditioner: Preconditioner
    shape: Shape


@dataclass(frozen=True, eq=False)
class Batch:
    """Members of equal shape, whose directions are one product.

    Attributes:
        members: two at least.
        inverses: of all of them, (layers · blocks, p, p); each member's own is a part of it: none is kept twice.
    """

    members: Sequence[Member]
    inverses: Tensor

    def precondition(self) -> Looks:
        """Replace the gradients by their directions."""
        weights = [member.layer.weight for member in self.members]
        looks = self._replaced(weights)
        biases = [bias for member in self.members if (bias := member.layer.trained_bias) is not None]
        return looks | self._replaced(biases) if biases else looks

    def _replaced(self, parameters: Sequence[nn.Parameter]) -> Looks:
        inverses = self.inverses
        gradients = [stored(parameter.grad) for parameter in parameters if parameter.grad is not None]
        G = torch.stack(gradients)
        if self.members[0].shape.side == "left":
            D = torch.bmm(inverses, G.view(*inverses.shape[:2], -1))  # (layers · blocks, p, q)
        else:
            D = torch.bmm(G.view(len(inverses), -1, inverses.shape[1]), inverses)  # (layers, q, p)
        torch._foreach_copy_(gradients, D.view(G.shape).unbind())
        return _look(parameters, D)


@dataclass(frozen=True, eq=False)
class Series:
    """Members of whatever shapes: a product each, and the rest at once for all.

    Attributes:
        members: one at least.
        turns: of each, (layer, (λI + L)⁻¹ (p, p), whether that stands on the left).
    """

    members: Sequence[Member]
    turns: Sequence[tuple[Layer, Tensor, bool]]

    def precondition(self) -> Looks:
        """Replace the gradients by their directions."""
        parameters: list[nn.Parameter] = []
        gradients: list[Tensor] = []
        directions: list[Tensor] = []
        for layer, inverse, left in self.turns:
            weight, bias = layer.weight, layer.trained_bias
            G = stored(weight.grad)  # type: ignore[arg-type]
            parameters.append(weight)
            gradients.append(G)
            if bias is None:
                directions.append(_product(inverse, G, left))
            else:
                parameters.append(bias)
                gradients.append(bias.grad)  # type: ignore[arg-type]
                directions += _products(inverse, G, bias.grad, left)  # type: ignore[arg-type]
        torch._foreach_copy_(gradients, directions)
        return _look(parameters, torch.cat([direction.reshape(-1) for direction in directions]))


def _product(inverse: Tensor, gradient: Tensor, left: bool) -> Tensor:
    """Of (p, p) and a gradient of any shape, taken as a matrix."""
    G = gradient if gradient.dim() == 2 else gradient.flatten(1)
    D = torch.mm(inverse, G) if left else torch.mm(G, inverse)
    return D if gradient.dim() == 2 else D.view(gradient.shape)


def _products(inverse: Tensor, gradient: Tensor, column: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """`_product` for a gradient with the column of a bias, apart again."""
    if left:
        return _product(inverse, gradient, left), torch.mv(inverse, column)
    D = torch.cat([gradient.flatten(1), column.unsqueeze(1)], dim=1).mm(inverse)
    return D[:, :-1].reshape(gradient.shape), D[:, -1]


def _look(parameters: Sequence[nn.Parameter], directions: Tensor) -> Looks:
    looks: Looks = dict.fromkeys(map(id, parameters))
    looks[id(parameters[0])] = directions
    return looks


def batches(members: Sequence[Member]) -> tuple[list[Batch | Series], list[Member]]:
    """Those that are turned together; and the others."""
    small = [member for member in members if _is_small(member)]
    batched = [alike for alike in _alike(small, _shapes) if len(alike) > 1]
    series = _alike(_without(small, batched), _place)
    return [*map(_joined, batched), *map(_series, series)], _without(members, [*batched, *series])


def _without(members: Sequence[Member], taken: Sequence[Sequence[Member]]) -> list[Member]:
    numbers = {id(member) for together in taken for member in together}
    return [member for member in members if id(member) not in numbers]


def _alike(members: Sequence[Member], likeness: Callable[[Member], Hashable]) -> list[list[Member]]:
    """Those of equal ``likeness`` together; without those that have none."""
    together: dict[Hashable, list[Member]] = {}
    for member in members:
        if (key := likeness(member)) is not None:
            together.setdefault(key, []).append(member)
    return list(together.values())


def form(layer: Layer) -> Hashable:
    """What decides how a gradient is turned: while it stays the same for all layers, so do their batches."""
    gradient, bias = layer.weight.grad, layer.trained_bias
    if gradient is None:
        return None
    size = ("rows", gradient._nnz(), gradient.dense_dim()) if gradient.is_sparse else gradient.shape
    return size, gradient.dtype, gradient.device, bias is not None and (id(bias), bias.grad is not None)


def _joined(members: Sequence[Member]) -> Batch:
    inverses = torch.cat([member.preconditioner.main for member in members])
    parts = torch.split(inverses, [len(member.preconditioner.main) for member in members])
    for member, part in zip(members, parts, strict=True):
        assert isinstance(member.preconditioner, DenseInverse)
        member.preconditioner.inverses[0] = part
    return Batch(members, inverses)


def _series(members: Sequence[Member]) -> Series:
    turns = [(member.layer, member.preconditioner.main[0], member.shape.side == "left") for member in members]
    return Series(members, turns)


def _is_small(member: Member) -> bool:
    """Whether its gradients are few numbers that lie in rows, to be multiplied by one stack of explicit inverses."""
    layer, inverse = member.layer, member.preconditioner
    if layer.weight.grad is None or not isinstance(inverse, DenseInverse) or len(inverse.inverses) > 1:
        return False
    numbers, sparse, dtype = stored(layer.weight.grad), layer.weight.grad.is_sparse, inverse.main.dtype
    bias = layer.trained_bias
    column = None if bias is None else bias.grad
    own_bias = bias is None or (column is not None and column.dtype == dtype and len(column) == len(layer.weight))
    plain = numbers.layout == torch.strided and numbers.dtype == dtype and numbers.is_contiguous()
    whole_rows = not sparse or (member.shape.side == "right" and bias is None and numbers.dim() == 2)
    return numbers.numel() <= SMALL and own_bias and plain and whole_rows


def _shapes(member: Member) -> Hashable:
    """Equal for members of one `Batch`; None for one that none takes."""
    layer, main, left = member.layer, member.preconditioner.main, member.shape.side == "left"
    assert layer.weight.grad is not None
    has_bias = layer.trained_bias is not None
    if not left and (has_bias or len(main) > 1):
        return None
    return stored(layer.weight.grad).shape, main.shape, left, has_bias, main.dtype, main.device


def _place(member: Member) -> Hashable:
    """Equal for members of one `Series`; None for one that none takes."""
    main = member.preconditioner.main
    return (main.dtype, main.device) if len(main) == 1 else None


__all__ = ["Batch", "Looks", "Member", "Series", "batches", "form"]
