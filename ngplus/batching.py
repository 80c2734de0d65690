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
from ngplus.nonfinite import Watch
from ngplus.preconditioner import DenseInverse, Preconditioner

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

    def precondition(self, watch: Watch) -> None:
        """Replace the gradients by their directions, and show these to ``watch``."""
        self._replace([member.layer.weight for member in self.members], watch)
        biases = [bias for member in self.members if (bias := member.layer.trained_bias) is not None]
        if biases:
            self._replace(biases, watch)

    def _replace(self, parameters: Sequence[nn.Parameter], watch: Watch) -> None:
        inverses = self.inverses
        gradients = [stored(parameter.grad) for parameter in parameters if parameter.grad is not None]
        G = torch.stack(gradients)
        if self.members[0].shape.side == "left":
            D = torch.bmm(inverses, G.view(*inverses.shape[:2], -1))  # (layers · blocks, p, q)
        else:
            D = torch.bmm(G.view(len(inverses), -1, inverses.shape[1]), inverses)  # (layers, q, p)
        torch._foreach_copy_(gradients, D.view(G.shape).unbind())
        watch.look(D)
        watch.seen.update(map(id, parameters))


@dataclass(frozen=True, eq=False)
class Turn:
    """Where one member of a `Series` gets its direction.

    Attributes:
        layer: of the member.
        inverse: (λI + L)⁻¹, (p, p).
        left: whether that stands on the left.
        product: the matrix's direction; on the right with the column of a bias, if there is one.
        column: on the left the direction of a bias, if there is one.
    """

    layer: Layer
    inverse: Tensor
    left: bool
    product: Tensor
    column: Tensor | None

    def make(self) -> list[Tensor]:
        """Fill them in; returns the gradients, of the weight and, if there is one, of the bias."""
        gradients = _gradients(self.layer)
        G = gradients[0] if gradients[0].dim() == 2 else gradients[0].flatten(1)
        if self.left:
            torch.mm(self.inverse, G, out=self.product)
            if self.column is not None:
                torch.mv(self.inverse, gradients[1], out=self.column)
        else:
            GB = G if len(gradients) == 1 else torch.cat([G, gradients[1].unsqueeze(1)], dim=1)
            torch.mm(GB, self.inverse, out=self.product)
        return gradients

    def directions(self) -> list[Tensor]:
        """What belongs in the gradients that `make` returns, in their shapes."""
        shapes = [gradient.shape for gradient in _gradients(self.layer)]
        if len(shapes) == 1:
            return [self.product.view(shapes[0])]
        if self.column is not None:
            return [self.product.view(shapes[0]), self.column]
        return [self.product[:, :-1].view(shapes[0]), self.product[:, -1]]


def _gradients(layer: Layer) -> list[Tensor]:
    """Of its weight and, if that is trained, its bias, which must be there; of a sparse one the rows."""
    weight, bias = layer.weight.grad, layer.trained_bias
    assert weight is not None
    if bias is None:
        return [stored(weight)]
    assert bias.grad is not None
    return [stored(weight), bias.grad]


def _turn(member: Member, place: Tensor) -> Turn:
    """To have its direction in ``place``, as many numbers as its gradients."""
    layer, inverse, left = member.layer, member.preconditioner.main[0], member.shape.side == "left"
    if not left:
        return Turn(layer, inverse, left, place.view(-1, len(inverse)), None)
    places = torch.split(place, [gradient.numel() for gradient in _gradients(layer)])
    column = places[1] if len(places) > 1 else None
    return Turn(layer, inverse, left, places[0].view(len(inverse), -1), column)


class Series:
    """Members of whatever shapes: a product each, and the rest at once for all.

    Args:
        members: one at least, with gradients as `precondition` will find them.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        sizes = [sum(gradient.numel() for gradient in _gradients(member.layer)) for member in members]
        # Kept, as are all views of it, since to make them takes about as long as the products do.
        self._numbers = members[0].preconditioner.main.new_empty(sum(sizes))
        places = torch.split(self._numbers, sizes)
        self._turns = [_turn(member, place) for member, place in zip(members, places, strict=True)]
        self._directions = [direction for turn in self._turns for direction in turn.directions()]
        layers = [member.layer for member in members]
        self._parameters = {id(p) for layer in layers for p in (layer.weight, layer.trained_bias) if p is not None}

    def precondition(self, watch: Watch) -> None:
        """Replace the gradients by their directions, and show these to ``watch``."""
        gradients = [gradient for turn in self._turns for gradient in turn.make()]
        torch._foreach_copy_(gradients, self._directions)
        watch.look(self._numbers)
        watch.seen |= self._parameters


def batches(members: Sequence[Member]) -> tuple[list[Batch | Series], list[Member]]:
    """Those that are turned together; and the others."""
    small = [member for member in members if _is_small(member)]
    batched = [alike for alike in _alike(small, _shapes) if len(alike) > 1]
    series = _alike(_without(small, batched), _place)
    return [*map(_joined, batched), *map(Series, series)], _without(members, [*batched, *series])


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
    size: Hashable
    if gradient.is_sparse:
        size = gradient.shape, gradient._nnz(), gradient.dense_dim()
    else:
        size = gradient.shape, gradient.is_contiguous()  # which a weight that changes its memory format changes
    return size, gradient.dtype, gradient.device, bias is not None and (id(bias), bias.grad is not None)


def _joined(members: Sequence[Member]) -> Batch:
    inverses = torch.cat([member.preconditioner.main for member in members])
    parts = torch.split(inverses, [len(member.preconditioner.main) for member in members])
    for member, part in zip(members, parts, strict=True):
        assert isinstance(member.preconditioner, DenseInverse)
        member.preconditioner.inverses[0] = part
    return Batch(members, inverses)


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


__all__ = ["Batch", "Member", "Series", "batches", "form"]
