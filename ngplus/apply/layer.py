"""A layer's gradients replaced by its direction (6).

On a CPU this is bounded by how often memory is passed over. So a gradient that is contiguous is overwritten in its own
memory, a bias is multiplied apart though it is one more column, and rows of zeros, which most of an embedding's
gradient is, are left as they are (nor are they checked for NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngplus._torch_internals import shares_memory
from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.devices import reads_without_sync
from ngplus.layers import Layer, to_matrix, to_row_sparse
from ngplus.solvers.preconditioner import Preconditioner
from ngplus.tuning import DEFAULT, Tuning


def precondition_(member: PreconditionedLayer, tuning: Tuning = DEFAULT) -> NonzeroRows | None:
    """Replace the gradients of a layer's weight and bias by the direction (6), in place where that can be.

    Args:
        member: the layer, which has a gradient, and its preconditioner.
        tuning: sizes of products.

    Returns:
        The rows of the weight's direction, where only those that are not zeros were multiplied.
    """
    layer, preconditioner, shape = member.layer, member.preconditioner, member.shape
    assert layer.weight.grad is not None
    gradient = layer.weight.grad = to_row_sparse(layer.weight.grad)
    bias, dtype = layer.trained_bias, preconditioner.main.dtype
    if gradient.is_sparse and bias is not None:  # a table tied to a linear layer with one
        gradient = layer.weight.grad = gradient.to_dense()
    if gradient.is_sparse:
        layer.weight.grad = _precondition_sparse_(member, gradient, tuning)
        return None
    apart = preconditioner.rows_are_independent
    if bias is None and shape.side == "right" and apart and _may_have_zero_rows(layer, gradient, tuning):
        rows = _precondition_nonzero_rows_(preconditioner, gradient, tuning)
        if rows is not None:
            return rows
    bias_gradient = _bias_gradient(layer)
    if preconditioner.works_in_place and _is_plain(gradient, bias_gradient, bias is not None, dtype):
        G = gradient if gradient.dim() == 2 else gradient.view(shape.groups * shape.rows, -1)
        preconditioner.apply_(G, bias_gradient, shape.side)
        return None
    column = None
    if bias is not None and not (
        bias_gradient is None and shape.side == "left" and preconditioner.rows_are_independent
    ):
        values = gradient.new_zeros(shape.groups * shape.rows) if bias_gradient is None else bias_gradient
        column = values.to(dtype).reshape(shape.groups, shape.rows, 1)
    D, d = preconditioner.apply(to_matrix(layer, gradient, dtype), column, shape.side, tuning)
    layer.weight.grad = _replace(gradient, D)
    if bias_gradient is not None and d is not None and not shares_memory(d, bias_gradient):
        bias_gradient.copy_(d.flatten())
    return None


def _is_plain(gradient: Tensor, bias_gradient: Tensor | None, has_bias: bool, dtype: torch.dtype) -> bool:
    """Whether the direction can be computed in the gradients' own memory."""
    if gradient.layout != torch.strided or gradient.dtype != dtype or not gradient.is_contiguous():
        return False
    return not has_bias or (bias_gradient is not None and bias_gradient.dtype == dtype)


def _may_have_zero_rows(layer: Layer, gradient: Tensor, tuning: Tuning) -> bool:
    """Whether to search for rows of zeros: it is one pass over memory, and a product with all rows is several."""
    if not layer.row_sparse:
        return False
    large = gradient.numel() >= tuning.zero_rows_from and len(gradient) >= 4 * gradient.shape[1]
    return large and reads_without_sync(gradient) and gradient.is_contiguous()


def _precondition_nonzero_rows_(preconditioner: Preconditioner, table: Tensor, tuning: Tuning) -> NonzeroRows | None:
    """Precondition in place the rows of a gradient that are not zeros.

    Args:
        preconditioner: whose rows are independent.
        table: the gradient, (q, p).
        tuning: sizes of products.

    Returns:
        Them; None, and nothing is done, where they are half of the rows or more.
    """
    rows = _find_nonzero_rows(table)
    if 2 * len(rows) >= len(table):
        return None
    G = table[rows].to(preconditioner.main.dtype).unsqueeze(0)
    D, _ = preconditioner.apply(G, None, "right", tuning)
    values = D[0].to(table.dtype)
    table.index_copy_(0, rows, values)
    return NonzeroRows(rows, values)


def _find_nonzero_rows(table: Tensor) -> Tensor:
    """Numbers of the rows of a contiguous (q, p) that are not all zero, eight bytes at a time."""
    size = table.element_size()
    in_words = table.shape[1] * size % 8 == 0 and table.storage_offset() * size % 8 == 0
    flags = (table.view(torch.int64) if in_words else table).bool()
    while flags.shape[1] % 8 == 0:
        flags = flags.view(torch.int64).bool()
    return (flags[:, 0] if flags.shape[1] == 1 else flags.any(dim=1)).nonzero()[:, 0]


def _bias_gradient(layer: Layer) -> Tensor | None:
    """The gradient of the layer's part of its bias, in its own memory; None where there is none."""
    bias = layer.trained_bias
    if bias is None or bias.grad is None:
        return None
    return bias.grad if len(bias) == len(layer.weight) else bias.grad[layer.bias_slice]


def _replace(gradient: Tensor, direction: Tensor) -> Tensor:
    """``gradient`` with the direction's entries; the direction itself where nobody holds the gradient's memory.

    DDP's gradients are views of its buckets, which have to stay.
    """
    if shares_memory(direction, gradient):
        return gradient
    if gradient._is_view() or direction.dtype != gradient.dtype or not direction.is_contiguous():
        return gradient.copy_(direction.reshape(gradient.shape))
    replacement = direction.view(gradient.shape)
    return replacement if replacement.stride() == gradient.stride() else gradient.copy_(replacement)


def _precondition_sparse_(member: PreconditionedLayer, gradient: Tensor, tuning: Tuning) -> Tensor:
    """The direction for a table's sparse gradient, which stays sparse: each row times (λI + R)⁻¹."""
    preconditioner, side = member.preconditioner, member.shape.side
    dtype = preconditioner.main.dtype
    if side == "right" and preconditioner.rows_are_independent:
        values = gradient._values()
        D, _ = preconditioner.apply(values.to(dtype).unsqueeze(0), None, side, tuning)
        values.copy_(D[0])
        return gradient
    indices = torch.arange(gradient.shape[0], device=gradient.device).unsqueeze(0)
    dense = gradient.to_dense()
    D, _ = preconditioner.apply(dense.to(dtype).unsqueeze(0), None, side, tuning)
    # A copy in rows: of a transposed view, torch's dense-sparse sums read a single row with a wrong stride.
    rows = torch.empty_like(dense).copy_(D[0])
    return torch.sparse_coo_tensor(indices, rows, gradient.shape, check_invariants=False)


__all__ = ["precondition_"]
