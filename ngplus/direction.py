"""From a layer's gradients to its direction (6), in place of them.

On a CPU the apply is bounded by how often memory is passed over, so a gradient that lies in rows is overwritten where
it lies, a bias is taken by itself though it is one more column, rows of zeros, which most of an
embedding's gradient is, are left as they are (nor is NaN looked for in them), and other large tables go in chunks that
stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ngplus.batching import SMALL, Member
from ngplus.devices import can_ask
from ngplus.gfim import Shape
from ngplus.layers import Layer, as_matrix, sparse_in_rows
from ngplus.preconditioner import DenseInverse, LowRankInverse, Preconditioner, SketchedInverse
from ngplus.touched import TouchedRows

_ONE_SIDED = (DenseInverse, LowRankInverse, SketchedInverse)
"""What multiplies rows, or columns, whichever they are; a baseline's inverse may multiply both sides."""
CHUNK = 2**16
"""Numbers of a gradient that are multiplied at a time where it is longer than several of these."""
SMALL_TABLE = 2**17
"""Numbers of a gradient up to which a product with all of its rows is no dearer than to look for those of zeros."""


def precondition(member: Member) -> TouchedRows | None:
    """Replace the gradients of a layer's weight and bias by the direction (6).

    Returns:
        The rows of the weight's direction, where only those that are not zeros were multiplied.
    """
    layer, preconditioner, shape = member.layer, member.preconditioner, member.shape
    assert layer.weight.grad is not None
    gradient = layer.weight.grad = sparse_in_rows(layer.weight.grad)
    bias, dtype = layer.trained_bias, preconditioner.main.dtype
    if gradient.is_sparse and bias is not None:  # a table tied to a linear layer with one
        gradient = layer.weight.grad = gradient.to_dense()
    one_sided = isinstance(preconditioner, _ONE_SIDED)
    if bias is None and one_sided and shape.side == "right" and _may_have_rows_of_zeros(layer, gradient):
        rows = _rows_alone(preconditioner, gradient)
        if rows is not None:
            return rows
    if gradient.is_sparse:
        layer.weight.grad = _sparse(preconditioner, shape, gradient)
    elif isinstance(preconditioner, LowRankInverse) and (plain := _plain(layer, gradient, dtype)) is not None:
        preconditioner.turn(*plain, left=shape.side == "left")
    elif bias is None:
        G = as_matrix(layer, gradient, dtype)
        layer.weight.grad = _replaced(gradient, _direction(preconditioner, shape, G))
    elif one_sided and shape.side == "left":
        layer.weight.grad = _replaced(gradient, preconditioner.apply(as_matrix(layer, gradient, dtype)))
        if (column := _bias_gradient(layer)) is not None:
            _fill(column, preconditioner.apply(column.reshape(shape.groups, shape.rows, 1).to(dtype)))
    else:
        column = _bias_gradient(layer)
        last = gradient.new_zeros(len(gradient)) if column is None else column
        G, c = as_matrix(layer, gradient, dtype), last.to(dtype).reshape(shape.groups, shape.rows, 1)
        D, d = _direction_apart(preconditioner, shape, G, c)
        layer.weight.grad = _replaced(gradient, D)
        if column is not None:
            _fill(column, d)
    return None


def _plain(layer: Layer, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Its matrix and its bias's column in the gradients' own memory, where they lie so and nothing is missing."""
    if gradient.layout != torch.strided or gradient.dtype != dtype or not gradient.is_contiguous():
        return None
    column = _bias_gradient(layer)
    if layer.trained_bias is not None and (column is None or column.dtype != dtype):
        return None
    return gradient if gradient.dim() == 2 else gradient.view(len(gradient), -1), column


def _direction(preconditioner: Preconditioner, shape: Shape, G: Tensor) -> Tensor:
    """(λI + L)⁻¹G or G(λI + R)⁻¹, equation (6); G may be overwritten."""
    if shape.side == "left":
        return preconditioner.apply(G)
    whole = isinstance(preconditioner, DenseInverse) and shape.blocks == (1, 0)
    if G.numel() >= 4 * CHUNK and whole and len(G) == 1 and can_ask(G) and G.is_contiguous():
        return _chunk_by_chunk(G, preconditioner.main)
    return preconditioner.apply_right(G)


def _direction_apart(preconditioner: Preconditioner, shape: Shape, G: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`_direction` for (G, c), a bias's column c (groups, m, 1) beside G (groups, m, n); both may be overwritten.

    A small G is copied beside its column in less time than the products apart take.
    """
    if isinstance(preconditioner, LowRankInverse) and shape.side == "right":
        preconditioner.turn(G[0], c[0, :, 0], left=False)
        return G, c
    whole_right = shape.side == "right" and shape.blocks == (1, 0)
    if isinstance(preconditioner, DenseInverse) and whole_right and G.numel() > SMALL:
        return preconditioner.apply_right_apart(G, c)
    D = _direction(preconditioner, shape, torch.cat([G, c], dim=2))
    return D[:, :, :-1], D[:, :, -1:]


def _may_have_rows_of_zeros(layer: Layer, gradient: Tensor) -> bool:
    """Whether to look for them: it is one pass over memory, and a product with all rows is several."""
    if not layer.looked_up or gradient.is_sparse:
        return False
    large = gradient.numel() >= SMALL_TABLE and len(gradient) >= 4 * gradient.shape[1]
    return large and can_ask(gradient) and gradient.is_contiguous()


def _rows_alone(preconditioner: Preconditioner, table: Tensor) -> TouchedRows | None:
    """The direction of a gradient with rows of zeros, in place: of the others alone, which are returned.

    None, and nothing is done, where half of the rows or more are others.
    """
    rows = _rows_that_count(table)
    if 2 * len(rows) >= len(table):
        return None
    D = preconditioner.apply_right(table[rows].to(preconditioner.main.dtype).unsqueeze(0))[0].to(table.dtype)
    table.index_copy_(0, rows, D)
    return TouchedRows(rows, D)


def _rows_that_count(table: Tensor) -> Tensor:
    """Numbers of the rows of a contiguous (q, p) that are not all zero, eight bytes at a time."""
    size = table.element_size()
    in_words = table.shape[1] * size % 8 == 0 and table.storage_offset() * size % 8 == 0
    flags = (table.view(torch.int64) if in_words else table).bool()
    while flags.shape[1] % 8 == 0:
        flags = flags.view(torch.int64).bool()
    return (flags[:, 0] if flags.shape[1] == 1 else flags.any(dim=1)).nonzero()[:, 0]


def _chunk_by_chunk(G: Tensor, inverse: Tensor) -> Tensor:
    """G ← G·inverse for G (1, q, p), overwritten."""
    rows = max(1, CHUNK // G.shape[2])
    product = G.new_empty(rows, G.shape[2])
    for start in range(0, G.shape[1], rows):
        chunk = G[0, start : start + rows]
        chunk.copy_(torch.mm(chunk, inverse[0], out=product[: len(chunk)]))
    return G


def _bias_gradient(layer: Layer) -> Tensor | None:
    """The gradient of the layer's part of its bias, in its own memory; None where there is none."""
    bias = layer.trained_bias
    if bias is None or bias.grad is None:
        return None
    return bias.grad if len(bias) == len(layer.weight) else bias.grad[layer.bias_slice]


def _fill(column: Tensor, direction: Tensor) -> None:
    """Put a bias's direction (groups, m, 1) into its gradient, where it does not lie there already."""
    if not torch._C._is_alias_of(direction, column):  # type: ignore[attr-defined]
        column.copy_(direction.flatten())


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
