"""How a function call that takes a layer's weight gives the factors (8) of each sample's gradient, by function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus._torch_internals import grouped_mm
from ngplus.capture.contractions import (
    CONTRACTIONS,
    Contraction,
    ContractionFactors,
    NoSampleGradient,
    UnsupportedCall,
)
from ngplus.capture.function_mode import FunctionCall, TimeMajor, find_owner
from ngplus.factors.dense import Dense
from ngplus.factors.embedding import Bags, OneHot
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.im2col import patches, per_direction
from ngplus.factors.khatri_rao import KhatriRao
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer


def _released(*_: Any) -> FactorPair:
    raise AssertionError("the call has been released")


@dataclass(eq=False)
class OpCall:
    """One use of a layer in a forward pass; with its output's gradient it gives the factors of 𝒢ᵢ.

    Attributes:
        layer: whose weight was used.
        source: what multiplied the weight: input, or indices.
        factors: takes ``source`` and the gradient of the call's output to `FactorPair`.
        samples: how many the input has.
        unbatched: whether that is one, without a batch dimension.
        leading: dimensions of the input of which ``batch_dim`` says which one the samples are in.
        transposed: whether the input belongs to the matrix's rows and the output to its columns, as in x W.
        parts: takes ``source`` to the slices of its rows that have factors of their own; None for one pair of all.
        is_read: whether the factors are read off the call; they are not where its function is differentiated again.
        dim: the dimension of the input that the samples are along.
    """

    layer: Layer
    source: Any
    factors: Callable[..., FactorPair]
    samples: int
    unbatched: bool = False
    leading: Sequence[int] = ()
    transposed: bool = False
    parts: Callable[[Any], list[tuple[int, slice]]] | None = None
    is_read: bool = True
    dim: int = 0

    def release(self) -> None:
        """Let go of the input, and of what the factors are made with: a loss that is kept would keep them."""
        self.source, self.factors = None, _released

    def pairs(self, source: Any, gradient: Tensor) -> list[tuple[FactorPair, slice | None]]:
        """The factors, and which rows of the input they are of; None for all.

        Args:
            source: what multiplied the weight.
            gradient: of the call's output.

        Returns:
            One pair or several.
        """
        if self.parts is None:
            return [(self.factors(source, gradient), None)]
        return [
            (self.factors(source[rows], gradient[rows])._replace(group=group), rows)
            for group, rows in self.parts(source)
            if rows.stop > rows.start
        ]


@dataclass(frozen=True, eq=False)
class WeightArgument:
    """What a function call takes as its weight, and what is known around the call.

    Attributes:
        layer: whose weight it is.
        weight: the layer's weight, or a view of it.
        time_major: the attention or the recurrent layer that the call is a part of, or None.
        input_shape: of the module's input, where the module changes it before the call; else None.
    """

    layer: Layer
    weight: Tensor
    time_major: TimeMajor | None
    input_shape: torch.Size | None

    @property
    def is_unbatched(self) -> bool:
        """Whether attention or the recurrent layer that the call is a part of has no batch dimension."""
        if self.time_major is None:
            return False
        shape = self.input_shape if self.time_major.input_shape is None else self.time_major.input_shape
        return shape is not None and len(shape) < self.time_major.dimensions


@dataclass(frozen=True)
class OpHandler:
    """How the calls of a function are parsed.

    Attributes:
        parse: takes the `WeightArgument` and the call's other arguments to an `OpCall`.
        position: of the weight among the function's arguments.
        keyword: its name.
    """

    parse: Callable[..., OpCall]
    position: int = 1
    keyword: str = "weight"


def find_weights(call: FunctionCall) -> Sequence[Any]:
    """The arguments that the called function may take as weight; none for functions without a handler."""
    handler = OP_HANDLERS.get(call.function)
    if handler is None or call.function in CONTRACTIONS:
        return call.tensors if call.function in CONTRACTIONS else ()
    if handler.keyword in call.kwargs:
        return (call.kwargs[handler.keyword],)
    return (call.args[handler.position],) if len(call.args) > handler.position else ()


def parse_call(layer: Layer, call: FunctionCall, weight: Tensor, input_shape: torch.Size | None) -> OpCall:
    """Parse a function call that takes a layer's weight.

    Args:
        layer: whose weight it is.
        call: of a function that has a handler.
        weight: one of those that `find_weights` found: the layer's weight, or a view of it.
        input_shape: see `WeightArgument`.

    Returns:
        The call's input, and how its factors are made.

    Raises:
        UnsupportedCall: where the gradient of one sample cannot be told from what goes in and out.
        ValueError: a ``batch_dim`` that is no dimension of the input.
    """
    given = WeightArgument(layer, weight, call.time_major, input_shape)
    handler, args = OP_HANDLERS.get(call.function), call.args
    if handler is None or not _is_at(handler, call, weight):
        return _parse_contraction(given, CONTRACTIONS[call.function](call, weight))
    others = {name: value for name, value in call.kwargs.items() if name != handler.keyword}
    return handler.parse(given, *args[: handler.position], *args[handler.position + 1 :], **others)


def _is_at(handler: OpHandler, call: FunctionCall, weight: Tensor) -> bool:
    """Whether the handler takes this argument, and has no more than a matrix to read it as."""
    at = call.kwargs.get(handler.keyword, None)
    if at is None:
        at = call.args[handler.position]
    return at is weight and not (call.function in CONTRACTIONS and weight.dim() != 2)


def _parse_contraction(given: WeightArgument, contraction: Contraction) -> OpCall:
    """Parse a product of the weight with one other tensor, see `Contraction`."""
    if isinstance(find_owner(contraction.other), nn.Parameter):
        raise UnsupportedCall("is multiplied by another parameter, which has no samples")
    factors = ContractionFactors.of(given.layer, given.weight, contraction, _appended_value(given.layer, None))
    shape, dim = contraction.other.shape, factors.free[0]
    return OpCall(
        given.layer,
        contraction.other,
        factors.pair,
        shape[dim],
        leading=[shape[each] for each in factors.free],
        transposed=factors.transposed,
        dim=dim,
    )


def _count_samples(input: Tensor, leading: Sequence[int], batch_dim: int) -> int:
    """Length of a call's batch dimension, which is the only one of its leading dimensions or ``batch_dim`` of them."""
    if input.is_nested:
        return len(input)
    return leading[batch_dim if len(leading) > 1 else 0] if leading else 1


def _appended_value(layer: Layer, bias: Tensor | None) -> float | None:
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


@dataclass(frozen=True)
class _Part:
    """What of a layer's matrices a two-dimensional argument is.

    Attributes:
        transposed: whether it is the transpose.
        first_row: where its rows begin.
        full_size: rows of the whole matrix where these are some of them, else None.
        group: the matrix's number where there are several.
    """

    transposed: bool = False
    first_row: int = 0
    full_size: int | None = None
    group: int | None = None


_WHOLE = _Part()


def _find_part(layer: Layer, weight: Tensor) -> _Part:
    """What of a layer's weight a linear function takes."""
    whole = layer.weight
    if weight is whole and whole.dim() == 2:
        return _WHOLE
    if whole.dim() == 2:
        if _is_transpose(weight, whole):
            return _Part(transposed=True)
        first_row, full_size = _row_slice(layer, weight)
        return _Part(first_row=first_row, full_size=full_size)
    groups, m, n = layer.matrix
    group, left = divmod(int(weight.storage_offset() - whole.storage_offset()), m * n)
    if left == 0 and whole.is_contiguous():
        for transposed, shape, stride in ((False, (m, n), (n, 1)), (True, (n, m), (1, n))):
            if weight.shape == shape and weight.stride() == stride:
                return _Part(transposed=transposed, group=group if groups > 1 else None)
    raise UnsupportedCall("is used through a view that is not one of its matrices")


def _row_slice(layer: Layer, weight: Tensor) -> tuple[int, int | None]:
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


def _parse_linear(given: WeightArgument, input: Tensor, bias: Tensor | None = None, **_: Any) -> OpCall:
    """Parse x Wᵀ + b, where the weight is the layer's, a slice of its rows, or its transpose."""
    layer, time_major = given.layer, given.time_major
    part = _find_part(layer, given.weight)
    if part.transposed and bias is not None and bias is layer.trained_bias:
        raise UnsupportedCall("is used transposed, with a bias that is a column of it")
    appended = _appended_value(layer, bias)
    leading = _leading_shape(given, input)
    rows = leading or input.shape[:-1]
    if time_major is None and len(rows) > 1:
        _check_batch_dim(layer, input, len(rows))

    def positions_last(tensor: Tensor) -> Tensor:
        """(b, 1, features, κ), whatever the layout of a linear layer's input or output."""
        features = tensor.shape[-1]
        if time_major is not None and tensor.dim() == 2:
            tensor = tensor.view(-1, time_major.batch, features)  # (T·B, E) -> (T, B, E)
        if leading is not None:
            tensor = tensor.reshape(*leading, features)
        batch_dim = 1 if time_major is not None else layer.batch_dim
        if tensor.dim() <= 2:
            return tensor.reshape(-1, 1, features, 1)
        return tensor.movedim(batch_dim, 0).flatten(1, -2).mT.unsqueeze(1)

    def factors(source: Tensor, gradient: Tensor) -> FactorPair:
        inside, outside = positions_last(source), positions_last(gradient)
        if part.transposed:
            return FactorPair(Dense(inside), Dense(outside, appended=appended), part.group)
        rows = Dense(outside, first_row=part.first_row, full_size=part.full_size)
        return FactorPair(rows, Dense(inside, appended=appended), part.group)

    samples = _count_samples(input, rows, layer.batch_dim) if time_major is None else time_major.batch
    unbatched = given.is_unbatched or not rows
    named = rows if time_major is None and len(rows) > 1 and not input.is_nested else ()
    dim = layer.batch_dim if len(rows) > 1 else 0
    return OpCall(layer, input, factors, samples, unbatched, named, part.transposed, dim=dim)


def _leading_shape(given: WeightArgument, input: Tensor) -> torch.Size | None:
    """The shape of a module's input without its features, where the call gets it flattened; else None."""
    if not given.layer.flattens:
        return None
    shape = given.input_shape
    if shape is None or shape[-1] != input.shape[-1] or shape.numel() != input.numel():
        raise NoSampleGradient("is used on flattened rows whose samples nothing tells")
    return shape[:-1]


def _parse_matmul(given: WeightArgument, input: Tensor) -> OpCall:
    """Parse x W, or x Wᵀ where W is transposed already."""
    if given.weight.dim() != 2:
        raise UnsupportedCall("is used in a product by a view that is no matrix")
    if isinstance(find_owner(input), nn.Parameter):
        raise UnsupportedCall("is multiplied by another parameter, which has no samples")
    return _parse_linear(replace(given, weight=given.weight.mT), input)


def _parse_addmm(given: WeightArgument, input: Tensor, mat1: Tensor, *, beta: float = 1, alpha: float = 1) -> OpCall:
    """Parse b + x W; torch calls b ``input`` and x ``mat1``."""
    if beta != 1 or alpha != 1:
        raise UnsupportedCall(f"is used by addmm with {alpha=}, {beta=}")
    return _parse_linear(replace(given, weight=given.weight.mT), mat1, bias=input)


def _check_batch_dim(layer: Layer, input: Tensor, dimensions: int) -> None:
    if not 0 <= layer.batch_dim < dimensions:
        raise ValueError(
            f"batch_dim={layer.batch_dim} is no sample dimension of {layer.name}'s input {tuple(input.shape)}"
        )


def _parse_convolution(
    given: WeightArgument,
    input: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> OpCall:
    layer, weight = given.layer, given.weight
    if not _is_kernel(weight, layer, groups):
        raise UnsupportedCall("is used by a convolution with other groups or a part of the weight")
    kernel = tuple(weight.shape[2:])
    stride, dilation = per_direction(stride, len(kernel)), per_direction(dilation, len(kernel))
    zeros = _pad_amounts(padding, kernel, dilation)
    appended = _appended_value(layer, bias)

    def batched(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == len(kernel) + 2 else tensor.unsqueeze(0)

    def factors(source: Tensor, gradient: Tensor) -> FactorPair:
        outputs = batched(gradient).flatten(2)  # (b, out, κ)
        rows = Dense(outputs.reshape(outputs.shape[0], groups, -1, outputs.shape[2]))
        columns = patches(batched(source), kernel, stride, dilation, zeros, groups, appended)
        return FactorPair(rows=rows, columns=columns)

    return OpCall(layer, input, factors, len(batched(input)), input.dim() == len(kernel) + 1)


def _is_kernel(weight: Tensor, layer: Layer, groups: int) -> bool:
    """Whether a convolution's weight is a layer's, and its matrices are those of the layer."""
    return _is_whole(weight, layer) and layer.matrix == (groups, len(weight) // groups, weight[0].numel())


def _is_whole(weight: Tensor, layer: Layer) -> bool:
    """Whether a weight is a layer's, or a view of all of it in the same order."""
    whole = layer.weight
    layout = weight.shape, weight.stride(), weight.storage_offset()
    return weight is whole or layout == (whole.shape, whole.stride(), whole.storage_offset())


def _parse_transposed_convolution(
    given: WeightArgument,
    input: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> OpCall:
    """Parse the adjoint of a convolution: its input multiplies patches of the output's gradient."""
    layer, weight = given.layer, given.weight
    if not _is_kernel(weight, layer, groups):
        raise UnsupportedCall("is used by a transposed convolution with other groups or a part of the weight")
    kernel = tuple(weight.shape[2:])
    stride, dilation = per_direction(stride, len(kernel)), per_direction(dilation, len(kernel))
    before = per_direction(padding, len(kernel))
    appended = _appended_value(layer, None)  # of a convolution's weight that is used the other way round

    def batched(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == len(kernel) + 2 else tensor.unsqueeze(0)

    def factors(source: Tensor, gradient: Tensor) -> FactorPair:
        inputs, outputs, zeros = batched(source), batched(gradient), []
        for direction, length in enumerate(inputs.shape[2:]):  # as much of the output as a patch reaches
            reach = (length - 1) * stride[direction] + dilation[direction] * (kernel[direction] - 1) + 1
            needed = max(0, reach - before[direction])
            kept = min(needed, outputs.shape[2 + direction])
            outputs = outputs.narrow(2 + direction, 0, kept)
            zeros.append((before[direction], reach - before[direction] - kept))
        values = inputs.flatten(2)  # (b, in, κ)
        rows = Dense(values.reshape(values.shape[0], groups, -1, values.shape[2]))
        return FactorPair(rows, patches(outputs, kernel, stride, dilation, tuple(zeros), groups, appended))

    return OpCall(layer, input, factors, len(batched(input)), input.dim() == len(kernel) + 1, transposed=True)


def _parse_grouped_mm(given: WeightArgument, input: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> OpCall:
    """Parse x W, where the rows of x up to the first offset meet the first matrix, those up to the second the next."""
    layer, weight = given.layer, given.weight
    if offs is None or input.dim() != 2 or weight.dim() != 3 or layer.matrix[0] != len(weight):
        raise UnsupportedCall("is used by grouped_mm in another form than rows by groups of rows")
    stored = layer.weight.view(layer.matrix)
    same = [(each.shape, each.stride()) == (weight.shape, weight.stride()) for each in (stored, stored.mT)]
    if not any(same) or weight.storage_offset() != stored.storage_offset():
        raise UnsupportedCall("is used by grouped_mm through a view that is not all of its matrices")
    transposed = same[0]

    def parts(_: Tensor) -> list[tuple[int, slice]]:
        stops = offs.tolist()
        return [
            (group, slice(start, stop)) for group, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))
        ]

    def factors(source: Tensor, gradient: Tensor) -> FactorPair:
        inside, outside = (Dense(each[:, None, :, None]) for each in (source, gradient))
        return FactorPair(inside, outside) if transposed else FactorPair(outside, inside)

    return OpCall(layer, input, factors, len(input), transposed=transposed, parts=parts)


def _pad_amounts(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each direction, for every form that convolutions take padding in."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((amount, amount) for amount in per_direction(padding, len(kernel)))


def _parse_bilinear(
    given: WeightArgument, input1: Tensor, input2: Tensor, bias: Tensor | None = None, **_: Any
) -> OpCall:
    """Parse x₁ᵀ W x₂ + b for each row of W: a linear function of x₁ ⊗ x₂."""
    layer = given.layer
    if not _is_whole(given.weight, layer) or layer.batched:
        raise UnsupportedCall("is used by bilinear as a part of it")
    if (dimensions := input1.dim() - 1) > 1:
        _check_batch_dim(layer, input1, dimensions)
    appended = _appended_value(layer, bias)

    def positions_last(tensor: Tensor) -> Dense:
        if tensor.dim() <= 2:
            return Dense(tensor.reshape(-1, 1, tensor.shape[-1], 1))
        return Dense(tensor.movedim(layer.batch_dim, 0).flatten(1, -2).mT.unsqueeze(1))

    def factors(inputs: Sequence[Tensor], gradient: Tensor) -> FactorPair:
        columns = KhatriRao(positions_last(inputs[0]), positions_last(inputs[1]), appended)
        return FactorPair(positions_last(gradient), columns)

    samples = _count_samples(input1, input1.shape[:-1], layer.batch_dim)
    return OpCall(layer, [input1, input2], factors, samples, input1.dim() == 1)


def _parse_embedding(
    given: WeightArgument,
    input: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> OpCall:
    layer, weight = given.layer, given.weight
    if scale_grad_by_freq:
        raise NoSampleGradient("is an embedding with scale_grad_by_freq, which no sample's gradient has")
    if weight is not layer.weight:
        raise UnsupportedCall("is an embedding of a part of the table")
    if input.dim() > 1:
        _check_batch_dim(layer, input, input.dim())
    appended = _appended_value(layer, None)
    rows_of_table = weight.shape[0]

    def factors(index: Tensor, gradient: Tensor) -> FactorPair:
        if padding_idx is not None:
            kept = index != padding_idx % rows_of_table
            gradient = gradient * kept.unsqueeze(-1)
        index, gradient = _move_samples_first(index, gradient, layer.batch_dim)
        dtype = statistics_dtype(gradient.dtype)
        columns = Dense(gradient.mT.unsqueeze(1), appended=appended)  # (b, 1, d, κ)
        return FactorPair(rows=OneHot(index, rows_of_table, dtype), columns=columns)

    samples = _count_samples(input, input.shape, layer.batch_dim)
    named = input.shape if input.dim() > 1 and not input.is_nested else ()
    return OpCall(layer, input, factors, samples, input.dim() == 0, named)


def _move_samples_first(index: Tensor, gradient: Tensor, batch_dim: int) -> tuple[Tensor, Tensor]:
    """Indices (b, κ) and gradients (b, κ, d) from indices of any number of dimensions."""
    if index.dim() == 0:
        return index.view(1, 1), gradient.view(1, 1, -1)
    if index.dim() == 1:
        return index.unsqueeze(1), gradient.unsqueeze(1)
    return index.movedim(batch_dim, 0).flatten(1), gradient.movedim(batch_dim, 0).flatten(1, -2)


def _parse_embedding_bag(
    given: WeightArgument,
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
) -> OpCall:
    layer, weight = given.layer, given.weight
    if scale_grad_by_freq:
        raise NoSampleGradient("is an embedding bag with scale_grad_by_freq, which no sample's gradient has")
    if mode == "max":
        raise UnsupportedCall(f"is an embedding bag with {mode=}")
    if weight is not layer.weight:
        raise UnsupportedCall("is an embedding bag over a part of the table")
    appended = _appended_value(layer, None)
    rows_of_table = weight.shape[0]
    bags_of_one = offsets is None and input.shape[1] == 1 and per_sample_weights is None and padding_idx is None

    def factors(index: Tensor, gradient: Tensor) -> FactorPair:
        dtype = statistics_dtype(gradient.dtype)
        if bags_of_one:
            columns = Dense(gradient.reshape(len(index), 1, -1, 1), appended=appended)
            return FactorPair(rows=OneHot(index.long(), rows_of_table, dtype), columns=columns)
        bags = _list_members(index, offsets, include_last_offset, rows_of_table)
        given = None if per_sample_weights is None else per_sample_weights.detach().flatten()
        weights = torch.ones_like(bags.weight, dtype=dtype) if given is None else given.to(dtype)
        if padding_idx is not None:
            weights = weights * (bags.index != padding_idx % rows_of_table)
        if mode == "mean":
            counted = weights.new_zeros(bags.bags).index_add_(0, bags.bag, (weights != 0).to(weights.dtype))
            weights = weights / counted.clamp_min_(1.0)[bags.bag]
        rows = Bags(bags.index, bags.bag, weights, bags.bags, rows_of_table)
        return FactorPair(rows=rows, columns=Dense(gradient.reshape(rows.bags, 1, -1, 1), appended=appended))

    samples = len(input) if offsets is None else len(offsets) - include_last_offset
    return OpCall(layer, input, factors, samples)


def _list_members(index: Tensor, offsets: Tensor | None, include_last_offset: bool, table_size: int) -> Bags:
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


OP_HANDLERS: Mapping[Any, OpHandler] = {
    F.linear: OpHandler(_parse_linear),
    F.conv1d: OpHandler(_parse_convolution),
    F.conv2d: OpHandler(_parse_convolution),
    F.conv3d: OpHandler(_parse_convolution),
    F.conv_transpose1d: OpHandler(_parse_transposed_convolution),
    F.conv_transpose2d: OpHandler(_parse_transposed_convolution),
    F.conv_transpose3d: OpHandler(_parse_transposed_convolution),
    F.bilinear: OpHandler(_parse_bilinear, position=2),
    F.embedding: OpHandler(_parse_embedding),
    F.embedding_bag: OpHandler(_parse_embedding_bag),
    torch.matmul: OpHandler(_parse_matmul, keyword="other"),
    Tensor.matmul: OpHandler(_parse_matmul, keyword="other"),
    Tensor.__matmul__: OpHandler(_parse_matmul, keyword="other"),
    torch.mm: OpHandler(_parse_matmul, keyword="mat2"),
    Tensor.mm: OpHandler(_parse_matmul, keyword="mat2"),
    torch.addmm: OpHandler(_parse_addmm, position=2, keyword="mat2"),
    grouped_mm: OpHandler(_parse_grouped_mm, keyword="mat2"),
}
"""The functions whose calls are parsed, besides those of `CONTRACTIONS`."""

__all__ = ["OpCall", "find_weights", "parse_call"]
