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


def batches(members: Sequence[Member]) -> tuple[list[list[Member]], list[Member]]:
    """Those that one product can turn, two at least together; and the others."""
    alike: dict[Hashable, list[Member]] = {}
    for member in members:
        alike.setdefault(_likeness(member), []).append(member)
    alone = alike.pop(None, [])
    alone += [together[0] for together in alike.values() if len(together) == 1]
    return [together for together in alike.values() if len(together) > 1], alone


def _likeness(member: Member) -> Hashable:
    """Equal for members of one batch; None for one that no batch takes."""
    layer, inverse, shape = member.layer, member.preconditioner, member.shape
    if layer.weight.grad is None or not isinstance(inverse, DenseInverse):
        return None
    numbers, sparse = stored(layer.weight.grad), layer.weight.grad.is_sparse
    bias, main, left = layer.trained_bias, inverse.main, shape.side == "left"
    one_stack = len(inverse.inverses) == 1 if left else len(main) == 1
    own_bias = bias is None or (left and bias.grad is not None and len(bias) == len(layer.weight))
    plain = numbers.layout == torch.strided and numbers.dtype == main.dtype and numbers.is_contiguous()
    whole_rows = not sparse or (not left and bias is None and numbers.dim() == 2)
    if numbers.numel() > SMALL or not (one_stack and own_bias and plain and whole_rows):
        return None
    return numbers.shape, main.shape, left, bias is None, main.dtype, main.device


def precondition(members: Sequence[Member]) -> dict[nn.Parameter, Tensor | None]:
    """Replace the gradients of a batch by their directions.

    Returns:
        What to look at for NaN in place of the gradient of each weight and bias: the first has that of all.
    """
    inverses = torch.cat([member.preconditioner.main for member in members])  # (layers · blocks, p, p)
    weights = [member.layer.weight for member in members]
    looks = _replaced(weights, inverses, members[0].shape)
    biases = [bias for member in members if (bias := member.layer.trained_bias) is not None]
    return looks | _replaced(biases, inverses, members[0].shape) if biases else looks


def _replaced(parameters: Sequence[nn.Parameter], inverses: Tensor, shape: Shape) -> dict[nn.Parameter, Tensor | None]:
    gradients = [stored(parameter.grad) for parameter in parameters if parameter.grad is not None]
    G = torch.stack(gradients)
    if shape.side == "left":
        D = torch.bmm(inverses, G.view(*inverses.shape[:2], -1))  # (layers · blocks, p, q)
    else:
        D = torch.bmm(G.view(len(inverses), -1, inverses.shape[1]), inverses)  # (layers, q, p)
    torch._foreach_copy_(gradients, D.view(G.shape).unbind())
    return dict.fromkeys(parameters) | {parameters[0]: D}


__all__ = ["Member", "batches", "precondition"]
