"""From a layer's gradients to its direction (6), in place of them.

On a CPU the apply is bounded by how often memory is passed over, so a gradient that lies in rows is overwritten where
it lies, a bias that is one more column from the right of L⁻¹ is taken by itself, rows of zeros, which most of an
embedding's gradient is, are left as they are, and other large tables go in chunks that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngplus.gfim import Shape
from ngplus.layers import Layer, as_matrix
from ngplus.nonfinite import can_ask
from ngplus.preconditioner import DenseInverse, LowRankInverse, Preconditioner, SketchedInverse

_ONE_SIDED = (DenseInverse, LowRankInverse, SketchedInverse)
"""What multiplies rows, or columns, whichever they are; a baseline's inverse may multiply both sides."""
CHUNK = 2**16
"""Numbers of a gradient that are multiplied at a time where it is longer than several of these."""


def precondition(layer: Layer, preconditioner: Preconditioner, shape: Shape) -> None:
    """Replace the gradients of a layer's weight and bias by the direction (6)."""
    gradient = layer.weight.grad
    assert gradient is not None
    if gradient.is_sparse and layer.trained_bias is not None:  # a table tied to a linear layer with one
        gradient = layer.weight.grad = gradient.to_dense()
    if gradient.is_sparse:
        layer.weight.grad = _sparse(preconditioner, shape, gradient)
    elif layer.trained_bias is None:
        layer.weight.grad = _replaced(gradient, _matrix(layer, gradient, preconditioner, shape))
    elif shape.side == "left" and isinstance(preconditioner, _ONE_SIDED):
        column = _bias_column(layer, shape, preconditioner.main.dtype)
        layer.weight.grad = _replaced(gradient, _matrix(layer, gradient, preconditioner, shape))
        _set_bias(layer, preconditioner.apply(column))
    else:
        G = as_matrix(layer, gradient).to(preconditioner.main.dtype)
        whole = torch.cat([G, _bias_column(layer, shape, G.dtype)], dim=2)  # (groups, m, n + 1)
        D = _direction(preconditioner, shape, whole)
        gradient.copy_(D[:, :, :-1].reshape(gradient.shape))
        _set_bias(layer, D[:, :, -1:])


def _matrix(layer: Layer, gradient: Tensor, preconditioner: Preconditioner, shape: Shape) -> Tensor:
    """The direction of the weight alone, (groups, m, n)."""
    return _direction(preconditioner, shape, as_matrix(layer, gradient).to(preconditioner.main.dtype))


def _direction(preconditioner: Preconditioner, shape: Shape, G: Tensor) -> Tensor:
    """(λI + L)⁻¹G or G(λI + R)⁻¹, equation (6); G may be overwritten."""
    if shape.side == "left":
        return preconditioner.apply(G)
    if not (isinstance(preconditioner, _ONE_SIDED) and _is_long(G)):
        return preconditioner.apply_right(G)
    if _is_mostly_zero(G[0]):
        rows = _rows_that_count(G[0])
        G[0].index_copy_(0, rows, preconditioner.apply_right(G[:, rows])[0])
        return G
    if isinstance(preconditioner, DenseInverse) and shape.blocks == (1, 0):
        return _chunk_by_chunk(G, preconditioner.main)
    return preconditioner.apply_right(G)


def _is_long(G: Tensor) -> bool:
    return can_ask(G) and G.shape[0] == 1 and G.is_contiguous() and G.numel() >= 4 * CHUNK


def _is_mostly_zero(table: Tensor) -> bool:
    """Whether looking for the rows that are not zero pays: at most half of a few are, and there are many rows.

    Either answer gives the same direction.
    """
    if len(table) < 4 * table.shape[1]:
        return False
    few = table[:: max(1, len(table) // 256)]
    return 2 * int(few.any(dim=1).count_nonzero()) <= len(few)


def _rows_that_count(table: Tensor) -> Tensor:
    """Numbers of the rows of a contiguous (q, p) that are not all zero, eight bytes at a time."""
    size = table.element_size()
    in_words = table.shape[1] * size % 8 == 0 and table.storage_offset() * size % 8 == 0
    flags = (table.view(torch.int64) if in_words else table).bool()
    while flags.shape[1] % 8 == 0:
        flags = flags.view(torch.int64).bool()
    return flags.any(dim=1).nonzero()[:, 0]


def _chunk_by_chunk(G: Tensor, inverse: Tensor) -> Tensor:
    """G ← G·inverse for G (1, q, p), overwritten."""
    rows = max(1, CHUNK // G.shape[2])
    product = G.new_empty(rows, G.shape[2])
    for start in range(0, G.shape[1], rows):
        chunk = G[0, start : start + rows]
        chunk.copy_(torch.mm(chunk, inverse[0], out=product[: len(chunk)]))
    return G


def _bias_column(layer: Layer, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The bias's gradient as the matrix's last column, (groups, m, 1); zeros where there is none."""
    bias = layer.trained_bias
    assert bias is not None
    column = torch.zeros_like(bias) if bias.grad is None else bias.grad
    return column[layer.bias_slice].reshape(shape.groups, shape.rows, 1).to(dtype, copy=True)


def _set_bias(layer: Layer, direction: Tensor) -> None:
    bias = layer.trained_bias
    if bias is not None and bias.grad is not None:
        bias.grad[layer.bias_slice].copy_(direction.flatten())


def _replaced(gradient: Tensor, direction: Tensor) -> Tensor:
    """``gradient`` with the direction's entries; the direction itself where nobody holds the gradient's memory.

    DDP's gradients are views of its buckets, which have to stay.
    """
    if torch._C._is_alias_of(direction, gradient):  # type: ignore[attr-defined]
        return gradient
    if gradient._is_view() or direction.dtype != gradient.dtype or not direction.is_contiguous():
        return gradient.copy_(direction.reshape(gradient.shape))
    replacement = direction.view(gradient.shape)
    return replacement if replacement.stride() == gradient.stride() else gradient.copy_(replacement)


def _sparse(preconditioner: Preconditioner, shape: Shape, gradient: Tensor) -> Tensor:
    """The direction for a table's sparse gradient, which stays sparse: each row times (λI + R)⁻¹."""
    dtype = preconditioner.main.dtype
    if shape.side == "right":
        values = gradient._values()
        values.copy_(_direction(preconditioner, shape, values.to(dtype).unsqueeze(0))[0])
        return gradient
    indices = torch.arange(gradient.shape[0], device=gradient.device).unsqueeze(0)
    dense = gradient.to_dense()
    # A copy in rows: of a transposed view, torch's dense-sparse sums read a single row with a wrong stride.
    rows = torch.empty_like(dense).copy_(_direction(preconditioner, shape, dense.to(dtype).unsqueeze(0))[0])
    return torch.sparse_coo_tensor(indices, rows, gradient.shape, check_invariants=False)


__all__ = ["precondition"]
