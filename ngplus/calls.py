"""How a call that takes a layer's weight gives the factors (8) of each sample's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus.factors import Bags, Dense, OneHot, statistics_dtype
from ngplus.gfim import Part
from ngplus.layers import Layer
from ngplus.patches import patches


class UnsupportedCall(Exception):  # noqa: N818 (control flow, never seen by users)
    """A use of a layer's weight whose per-sample gradient is not known in the form (8)."""


@dataclass(eq=False)
class Call:
    """One use of a layer in a forward pass; with its output's gradient it gives the factors of 𝒢ᵢ.

    Attributes:
        layer: whose weight was used.
        source: what multiplied the weight: input, or indices.
        factors: takes ``source`` and the gradient of the call's output to `Part`.
        turned: whether the input belongs to the matrix's rows and the output to its columns, as in x W.
    """

    layer: Layer
    source: Any
    factors: Callable[[Any, Tensor], Part]
    turned: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """What is known inside ``F.multi_head_attention_forward``: inputs are (T, B, E) or (T·B, E)."""

    batch: int


def read_call(
    layer: Layer,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weight: Tensor,
    attention: AttentionCall | None,
) -> Call:
    """The call ``function(*args, **kwargs)`` whose `weight_argument` is the layer's weight, or a view of it.

    Raises:
        UnsupportedCall: where the gradient of one sample cannot be told from what goes in and out.
    """
    reader = _READERS[function]
    others = {name: value for name, value in kwargs.items() if name != reader.keyword}
    return reader.read(layer, weight, attention, *args[: reader.place], *args[reader.place + 1 :], **others)


def weight_argument(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument that ``function`` takes as weight; None for functions that are not read."""
    reader = _READERS.get(function)
    if reader is None:
        return None
    if reader.keyword in kwargs:
        return kwargs[reader.keyword]
    return args[reader.place] if len(args) > reader.place else None


def _tail(layer: Layer, bias: Tensor | None) -> float | None:
    """The constant in the bias's column for this call; see `Dense`."""
    if layer.trained_bias is None:
        return None
    used = bias is not None and (bias is layer.bias or bias._base is layer.bias or _is_piece(bias, layer.bias))
    return 1.0 if used else 0.0


def _is_piece(bias: Tensor, of: Tensor | None) -> bool:
    """Whether ``bias`` is cut out of several joined by ``torch.cat``, exactly where ``of`` went in.

    fairseq's attention joins the biases of its three projections, to have `F.multi_head_attention_forward` cut them
    apart again. Only pieces of equal length are told apart.
    """
    joined = bias._base
    node = None if joined is None else joined.grad_fn
    if joined is None or node is None or node.name() != "CatBackward0":
        return False
    pieces = [getattr(source, "variable", None) for source, _ in node.next_functions]
    place, left = divmod(int(bias.storage_offset() - joined.storage_offset()), bias.numel())
    equal = left == 0 and len(pieces) * bias.numel() == joined.numel()
    return equal and pieces[place] is of


def _rows_of(layer: Layer, weight: Tensor) -> tuple[int, int | None]:
    """First row and full size of a weight that is a slice of rows; (0, None) for the whole."""
    whole = layer.weight
    if weight is whole:
        return 0, None
    if weight.shape[1:] != whole.shape[1:] or weight.stride() != whole.stride():
        raise UnsupportedCall("is used through a view that is not a slice of rows")
    first = int(weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
    return (first, whole.shape[0]) if weight.shape[0] != whole.shape[0] else (0, None)


def _is_transpose(weight: Tensor, whole: Tensor) -> bool:
    """Whether ``weight`` is the transpose of the whole matrix, in the same memory; a 1 × 1 matrix is its own."""
    if weight is whole or not (weight.dim() == whole.dim() == 2) or tuple(whole.shape) == (1, 1):
        return False
    mirrored = (*whole.shape[::-1], *whole.stride()[::-1], whole.storage_offset())
    return (*weight.shape, *weight.stride(), weight.storage_offset()) == mirrored


def _linear(
    layer: Layer,
    weight: Tensor,
    attention: AttentionCall | None,
    input: Tensor,
    bias: Tensor | None = None,
    **_: Any,
) -> Call:
    """Read x Wᵀ + b, where ``weight`` is the layer's, a slice of its rows, or its transpose."""
    turned = _is_transpose(weight, layer.weight)
    first_row, full_size = (0, None) if turned else _rows_of(layer, weight)
    if turned and bias is not None and bias is layer.trained_bias:
        raise UnsupportedCall("is used transposed, with a bias that is a column of it")
    tail = _tail(layer, bias)
    leading = _leading(layer, input)
    if attention is None and (dimensions := len(leading or input.shape[:-1])) > 1:
        _check_batch_dim(layer, input, dimensions)

    def positions_last(tensor: Tensor) -> Tensor:
        """(b, 1, features, κ), whatever the layout of a linear layer's input or output."""
        features = tensor.shape[-1]
        if attention is not None and tensor.dim() == 2:
            tensor = tensor.view(-1, attention.batch, features)  # (T·B, E) -> (T, B, E)
        if leading is not None:
            tensor = tensor.reshape(*leading, features)
        batch_dim = 1 if attention is not None else layer.batch_dim
        if tensor.dim() <= 2:
            return tensor.reshape(-1, 1, features, 1)
        return tensor.movedim(batch_dim, 0).flatten(1, -2).mT.unsqueeze(1)

    def factors(source: Tensor, gradient: Tensor) -> Part:
        inside, outside = positions_last(source), positions_last(gradient)
        if turned:
            return Part(rows=Dense(inside), columns=Dense(outside, tail=tail))
        rows = Dense(outside, first_row=first_row, full_size=full_size)
        return Part(rows=rows, columns=Dense(inside, tail=tail))

    return Call(layer, input, factors, turned)


def _leading(layer: Layer, input: Tensor) -> torch.Size | None:
    """The shape of a module's input without its features, where the call sees it flattened; else None."""
    if not layer.flattens:
        return None
    shape = layer.input_shape
    if shape is None or shape[-1] != input.shape[-1] or shape.numel() != input.numel():
        raise UnsupportedCall("is used on flattened rows whose samples nothing tells")
    return shape[:-1]


def _matmul(layer: Layer, weight: Tensor, attention: AttentionCall | None, input: Tensor) -> Call:
    """Read x W, or x Wᵀ where W is transposed already."""
    if weight.dim() != 2:
        raise UnsupportedCall("is used in a product by a view that is no matrix")
    if isinstance(input if input._base is None else input._base, nn.Parameter):
        raise UnsupportedCall("is multiplied by another parameter, which has no samples")
    return _linear(layer, weight.mT, attention, input)


def _addmm(
    layer: Layer,
    weight: Tensor,
    attention: AttentionCall | None,
    input: Tensor,
    mat1: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Call:
    """Read b + x W; torch calls b ``input`` and x ``mat1``."""
    if beta != 1 or alpha != 1:
        raise UnsupportedCall(f"is used by addmm with {alpha=}, {beta=}")
    return _linear(layer, weight.mT, attention, mat1, bias=input)


def _check_batch_dim(layer: Layer, input: Tensor, dimensions: int) -> None:
    if not 0 <= layer.batch_dim < dimensions:
        raise ValueError(
            f"batch_dim={layer.batch_dim} is no sample dimension of {layer.name}'s input {tuple(input.shape)}"
        )


def _convolution(
    layer: Layer,
    weight: Tensor,
    _attention: AttentionCall | None,
    input: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call:
    if weight is not layer.weight or groups != layer.groups:
        raise UnsupportedCall("is used by a convolution with other groups or a part of the weight")
    kernel = tuple(weight.shape[2:])
    stride, dilation = _each(stride, kernel), _each(dilation, kernel)
    zeros = _zeros_around(padding, kernel, dilation)
    tail = _tail(layer, bias)

    def batched(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == len(kernel) + 2 else tensor.unsqueeze(0)

    def factors(source: Tensor, gradient: Tensor) -> Part:
        outputs = batched(gradient).flatten(2)  # (b, out, κ)
        rows = Dense(outputs.reshape(outputs.shape[0], groups, -1, outputs.shape[2]))
        columns = patches(batched(source), kernel, stride, dilation, zeros, groups, tail)
        return Part(rows=rows, columns=columns)

    return Call(layer, input, factors)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """An int or a sequence of one or more, for every spatial direction."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _zeros_around(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each direction, for every form that convolutions take padding in."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in _each(padding, kernel))


def _embedding(
    layer: Layer,
    weight: Tensor,
    _attention: AttentionCall | None,
    input: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    if scale_grad_by_freq:
        raise UnsupportedCall("is an embedding with scale_grad_by_freq, which no sample's gradient has")
    if weight is not layer.weight:
        raise UnsupportedCall("is an embedding of a part of the table")
    if input.dim() > 1:
        _check_batch_dim(layer, input, input.dim())
    tail = _tail(layer, None)
    rows_of_table = weight.shape[0]

    def factors(index: Tensor, gradient: Tensor) -> Part:
        if padding_idx is not None:
            kept = index != padding_idx % rows_of_table
            gradient = gradient * kept.unsqueeze(-1)
        index, gradient = _samples_first(index, gradient, layer.batch_dim)
        dtype = statistics_dtype(gradient.dtype)
        columns = Dense(gradient.mT.unsqueeze(1), tail=tail)  # (b, 1, d, κ)
        return Part(rows=OneHot(index, rows_of_table, dtype), columns=columns)

    return Call(layer, input, factors)


def _samples_first(index: Tensor, gradient: Tensor, batch_dim: int) -> tuple[Tensor, Tensor]:
    """Indices (b, κ) and gradients (b, κ, d) from indices of any number of dimensions."""
    if index.dim() == 0:
        return index.view(1, 1), gradient.view(1, 1, -1)
    if index.dim() == 1:
        return index.unsqueeze(1), gradient.unsqueeze(1)
    return index.movedim(batch_dim, 0).flatten(1), gradient.movedim(batch_dim, 0).flatten(1, -2)


def _embedding_bag(
    layer: Layer,
    weight: Tensor,
    _attention: AttentionCall | None,
    input: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Call:
    if scale_grad_by_freq or mode == "max":
        raise UnsupportedCall(f"is an embedding bag with {mode=}, {scale_grad_by_freq=}")
    if weight is not layer.weight:
        raise UnsupportedCall("is an embedding bag over a part of the table")
    tail = _tail(layer, None)
    rows_of_table = weight.shape[0]
    bags_of_one = offsets is None and input.shape[1] == 1 and per_sample_weights is None and padding_idx is None

    def factors(index: Tensor, gradient: Tensor) -> Part:
        dtype = statistics_dtype(gradient.dtype)
        if bags_of_one:
            columns = Dense(gradient.reshape(len(index), 1, -1, 1), tail=tail)
            return Part(rows=OneHot(index.long(), rows_of_table, dtype), columns=columns)
        bags = _bags(index, offsets, include_last_offset, rows_of_table)
        given = None if per_sample_weights is None else per_sample_weights.detach().flatten()
        weights = torch.ones_like(bags.weight, dtype=dtype) if given is None else given.to(dtype)
        if padding_idx is not None:
            weights = weights * (bags.index != padding_idx % rows_of_table)
        if mode == "mean":
            weights = weights / _members(bags, weights).clamp_min_(1.0)[bags.bag]
        rows = Bags(bags.index, bags.bag, weights, bags.bags, rows_of_table)
        return Part(rows=rows, columns=Dense(gradient.reshape(rows.bags, 1, -1, 1), tail=tail))

    return Call(layer, input, factors)


def _members(bags: Bags, weights: Tensor) -> Tensor:
    """How many members of each bag count."""
    return weights.new_zeros(bags.bags).index_add_(0, bags.bag, (weights != 0).to(weights.dtype))


def _bags(index: Tensor, offsets: Tensor | None, include_last_offset: bool, table_size: int) -> Bags:
    """The bags of a call as flat lists of members, each of weight one."""
    if offsets is None:
        bags, members = index.shape
        bag = torch.arange(bags, device=index.device).repeat_interleave(members)
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bags = starts.numel()
        place = torch.arange(index.numel(), device=index.device)
        bag = torch.searchsorted(starts.to(place.dtype), place, right=True) - 1
    flat = index.flatten().long()
    return Bags(flat, bag, torch.ones_like(flat, dtype=torch.float32), bags, table_size)


@dataclass(frozen=True)
class _Reader:
    """How a function is read: by what, and which of its arguments is the weight."""

    read: Callable[..., Call]
    place: int = 1
    keyword: str = "weight"


_READERS: Mapping[Any, _Reader] = {
    F.linear: _Reader(_linear),
    F.conv1d: _Reader(_convolution),
    F.conv2d: _Reader(_convolution),
    F.conv3d: _Reader(_convolution),
    F.embedding: _Reader(_embedding),
    F.embedding_bag: _Reader(_embedding_bag),
    torch.matmul: _Reader(_matmul, keyword="other"),
    Tensor.matmul: _Reader(_matmul, keyword="other"),
    Tensor.__matmul__: _Reader(_matmul, keyword="other"),
    torch.mm: _Reader(_matmul, keyword="mat2"),
    Tensor.mm: _Reader(_matmul, keyword="mat2"),
    torch.addmm: _Reader(_addmm, place=2, keyword="mat2"),
}


__all__ = ["AttentionCall", "Call", "UnsupportedCall", "read_call", "weight_argument"]
