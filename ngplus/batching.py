"""Small matrices of equal shape, across layers: their directions (6) by one product for all.

The product of two small matrices takes less time than the calls around it, and a model may have dozens: the tables of a
DLRM, the 1×1 convolutions of a mobile network, the blocks of (18).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngplus.gfim import Shape
from ngplus.layers import Layer, stored
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
    """Members whose directions are one product.

    Attributes:
        members: two at least.
        inverses: of all of them, (layers · blocks, p, p); each member's own is a part of it: none is kept twice.
    """

    members: Sequence[Member]
    inverses: Tensor


def batches(members: Sequence[Member]) -> tuple[list[Batch], list[Member]]:
    """Those that one product can turn, two at least together; and the others."""
    alike: dict[Hashable, list[Member]] = {}
    for member in members:
        alike.setdefault(_likeness(member), []).append(member)
    alone = alike.pop(None, [])
    alone += [together[0] for together in alike.values() if len(together) == 1]
    return [_joined(together) for together in alike.values() if len(together) > 1], alone


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


def _likeness(member: Member) -> Hashable:
    """Equal for members of one batch; None for one that no batch takes."""
    layer, inverse, shape = member.layer, member.preconditioner, member.shape
    if layer.weight.grad is None or not isinstance(inverse, DenseInverse):
        return None
    numbers, sparse = stored(layer.weight.grad), layer.weight.grad.is_sparse
    bias, main, left = layer.trained_bias, inverse.main, shape.side == "left"
    one_stack = len(inverse.inverses) == 1 and (left or len(main) == 1)
    own_bias = bias is None or (left and bias.grad is not None and len(bias) == len(layer.weight))
    plain = numbers.layout == torch.strided and numbers.dtype == main.dtype and numbers.is_contiguous()
    whole_rows = not sparse or (not left and bias is None and numbers.dim() == 2)
    if numbers.numel() > SMALL or not (one_stack and own_bias and plain and whole_rows):
        return None
    return numbers.shape, main.shape, left, bias is None, main.dtype, main.device


def precondition(batch: Batch) -> dict[int, Tensor | None]:
    """Replace the gradients of a batch by their directions.

    Returns:
        What to look at for NaN in place of the gradient of each weight and bias, by its id: the first has that of all.
    """
    members, inverses = batch.members, batch.inverses
    weights = [member.layer.weight for member in members]
    looks = _replaced(weights, inverses, members[0].shape)
    biases = [bias for member in members if (bias := member.layer.trained_bias) is not None]
    return looks | _replaced(biases, inverses, members[0].shape) if biases else looks


def _replaced(parameters: Sequence[nn.Parameter], inverses: Tensor, shape: Shape) -> dict[int, Tensor | None]:
    gradients = [stored(parameter.grad) for parameter in parameters if parameter.grad is not None]
    G = torch.stack(gradients)
    if shape.side == "left":
        D = torch.bmm(inverses, G.view(*inverses.shape[:2], -1))  # (layers · blocks, p, q)
    else:
        D = torch.bmm(G.view(len(inverses), -1, inverses.shape[1]), inverses)  # (layers, q, p)
    torch._foreach_copy_(gradients, D.view(G.shape).unbind())
    looks: dict[int, Tensor | None] = dict.fromkeys(map(id, parameters))
    looks[id(parameters[0])] = D
    return looks


__all__ = ["Batch", "Member", "batches", "form", "precondition"]
