"""The directions (6) of layers whose gradients are sharded, in the shards' own memory.

What a process multiplies and does not have comes in one all-to-all for many layers, and its product goes back in
another. No element of a gradient moves more than once each way, so that of a matrix m × n over W processes each one
sends and receives about mn/W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.dtensors import local_part
from ngplus.layers import Layer
from ngplus.sharded.sharding import Block, Sharding
from ngplus.tuning import DEFAULT, Tuning


class ShardedDirections:
    """Replaces the sharded gradients of layers by their directions.

    Args:
        sharding: of the layers.
        tuning: how many elements are exchanged at a time.
    """

    def __init__(self, sharding: Sharding, tuning: Tuning = DEFAULT) -> None:
        self._sharding = sharding
        self._tuning = tuning
        self._exchanges: list[_Exchange] = []
        self._exchanged: list[object] = []

    def precondition_(self, members: Sequence[PreconditionedLayer]) -> None:
        """Replace the gradients by their directions, in place. Each process must call this with the same layers.

        Args:
            members: sharded layers that have a gradient, and their preconditioners.
        """
        sharding, exchanged = self._sharding, list[PreconditionedLayer]()
        for member in members:
            if sharding.keeper(member.layer) is not None:
                exchanged.append(member)
            elif sharding.multiplies_own_rows(member.layer, member.shape):
                _precondition_own_rows_(member, sharding, self._tuning)
            elif sharding.multiplies_own_columns(member.layer, member.shape):
                gradient = _as_matrix(member.layer)
                gradient.copy_(_multiply(member, gradient, self._tuning))
            else:
                exchanged.append(member)
        forms = [(m.layer, m.shape, sharding.keeper(m.layer), _dtype(m)) for m in exchanged]
        if forms != self._exchanged:
            self._exchanged = list(forms)
            self._exchanges = [_Exchange(sharding, together) for together in self._bucket(exchanged)]
        by_layer = {member.layer: member for member in exchanged}
        for exchange in self._exchanges:
            exchange.precondition_(by_layer, self._tuning)

    def _bucket(self, members: Sequence[PreconditionedLayer]) -> Iterator[list[PreconditionedLayer]]:
        """Cut into lists of one dtype each, whose elements are few enough to be exchanged at a time."""
        together: list[PreconditionedLayer] = []
        for member in sorted(members, key=lambda each: str(_dtype(each))):  # a stable sort
            numel = sum(each.layer.weight.numel() for each in (*together, member))
            large = numel > self._tuning.exchanged_elements * self._sharding.size
            if together and (large or _dtype(together[0]) != _dtype(member)):
                yield together
                together = []
            together.append(member)
        if together:
            yield together


def _dtype(member: PreconditionedLayer) -> torch.dtype:
    assert member.layer.weight.grad is not None
    return member.layer.weight.grad.dtype


def _as_matrix(layer: Layer) -> Tensor:
    """This process's part of the weight's gradient as rows of its matrices, in its own memory."""
    assert layer.weight.grad is not None
    gradient, each = local_part(layer.weight.grad), layer.rows_each
    return gradient.view(len(gradient) * each, math.prod(gradient.shape[1:]) // each)


def _multiply(member: PreconditionedLayer, matrix: Tensor, tuning: Tuning) -> Tensor:
    """The direction of all rows of some columns, (groups · m, ·); from the right of all columns."""
    shape = member.shape
    G = matrix.to(member.preconditioner.main.dtype).view(shape.groups, shape.rows, -1)
    D, _ = member.preconditioner.apply(G, None, shape.side, tuning)
    return D.reshape(matrix.shape)


def _precondition_own_rows_(member: PreconditionedLayer, sharding: Sharding, tuning: Tuning) -> None:
    """Replace the gradients of the rows that this process has, filled up with zeros to whole groups of a convolution.

    The rows of zeros change no others: from the right rows are independent, and from the left groups are whole.
    """
    layer, shape = member.layer, member.shape
    start, stop = sharding.rows(layer)
    if start == stop:
        return
    weight, bias = _as_matrix(layer), layer.trained_bias
    column = None if bias is None or bias.grad is None else local_part(bias.grad)
    preconditioner, groups, rows = member.preconditioner, 1, stop - start
    skipped = 0
    if shape.groups > 1:
        first, last = start // shape.rows, -(-stop // shape.rows)
        preconditioner = preconditioner.select_groups(first, last)
        groups, rows, skipped = last - first, shape.rows, start - first * shape.rows
    G = weight.new_zeros(groups * rows, shape.columns, dtype=preconditioner.main.dtype)
    inside = slice(skipped, skipped + stop - start)
    G[inside, : weight.shape[1]] = weight
    if column is not None:
        G[inside, -1] = column
    D, _ = preconditioner.apply(G.view(groups, rows, -1), None, shape.side, tuning)
    D = D.reshape(G.shape)[inside]
    weight.copy_(D[:, : weight.shape[1]])
    if column is not None:
        column.copy_(D[:, -1])


@dataclass(frozen=True)
class _Part:
    """A block of a layer's matrix that one process has and one multiplies.

    Attributes:
        layer: the layer.
        source: 0 for a part of the weight, 1 for one of its bias.
        block: the part.
        start: of its elements in the buffer that it is sent or received in.
    """

    layer: Layer
    source: int
    block: Block
    start: int = 0

    def find(self, buffer: Tensor) -> Tensor:
        """Its elements in a buffer, in the block's shape."""
        (top, bottom), (left, right) = self.block.rows, self.block.columns
        return buffer[self.start : self.start + self.block.numel].view(bottom - top, right - left)


class _Exchange:
    """An all-to-all of parts of several layers' gradients, and one of their directions back.

    Args:
        sharding: of the layers.
        members: the layers.
    """

    def __init__(self, sharding: Sharding, members: Sequence[PreconditionedLayer]) -> None:
        self._sharding = sharding
        layers = [member.layer for member in members]
        sources = {layer: sharding.sources(layer) for layer in layers}
        targets = {member.layer: sharding.targets(member.layer, member.shape) for member in members}
        me, ranks = sharding.rank, range(sharding.size)
        self._own = {layer: sources[layer][me] for layer in layers}
        self._columns = {layer: targets[layer][me] for layer in layers}
        sent = [[p for each in layers for p in _cut(each, sources[each][me], targets[each][rank])] for rank in ranks]
        kept = [[p for each in layers for p in _cut(each, sources[each][rank], targets[each][me])] for rank in ranks]
        self._local, sent[me], kept[me] = sent[me], [], []
        self._sent, self._sent_sizes = _place(sent)
        self._received, self._received_sizes = _place(kept)

    def precondition_(self, members: Mapping[Layer, PreconditionedLayer], tuning: Tuning) -> None:
        """Replace the gradients of the layers by their directions.

        Args:
            members: by layer, those of this exchange among them.
            tuning: sizes of products.
        """
        own = {layer: self._own_gradients(layer) for layer in self._own}
        gradient = next(iter(own.values()))[0]
        outgoing = gradient.new_empty(sum(self._sent_sizes))
        incoming = gradient.new_empty(sum(self._received_sizes))
        for part in self._sent:
            part.find(outgoing).copy_(self._view(part, own))
        self._send(incoming, outgoing, self._received_sizes, self._sent_sizes)
        places: dict[Layer, list[tuple[Block, Tensor]]] = {}
        for part in self._local:
            places.setdefault(part.layer, []).append((part.block, self._view(part, own)))
        for part in self._received:
            places.setdefault(part.layer, []).append((part.block, part.find(incoming)))
        for layer, parts in places.items():
            self._multiply_(members[layer], parts, tuning)
        self._send(outgoing, incoming, self._sent_sizes, self._received_sizes)
        for part in self._sent:
            self._view(part, own).copy_(part.find(outgoing))

    def _own_gradients(self, layer: Layer) -> list[Tensor]:
        """What this process has of a layer's gradient, block by block as (rows, columns), in its own memory."""
        weight, bias = _as_matrix(layer), layer.trained_bias
        if bias is None:
            return [weight]
        top, bottom = self._own[layer][1].rows
        if bias.grad is None or bottom <= top:
            return [weight, weight.new_zeros(max(0, bottom - top), 1)]
        column = local_part(bias.grad)
        first = self._sharding.bias_start(layer)
        return [weight, column[top + first : bottom + first].unsqueeze(1)]

    def _view(self, part: _Part, own: Mapping[Layer, list[Tensor]]) -> Tensor:
        """A part of this process's gradients, in their memory."""
        block = self._own[part.layer][part.source]
        left, right = (column - block.columns[0] for column in part.block.columns)
        return own[part.layer][part.source][:, left:right]

    def _multiply_(self, member: PreconditionedLayer, parts: Sequence[tuple[Block, Tensor]], tuning: Tuning) -> None:
        """Replace the parts of a gradient, which are all rows of this process's columns, by the direction's."""
        first, last = self._columns[member.layer]
        height = member.shape.groups * member.shape.rows
        matrix = parts[0][1].new_empty(height, last - first, dtype=member.preconditioner.main.dtype)
        places = [(slice(*block.rows), slice(block.columns[0] - first, block.columns[1] - first)) for block, _ in parts]
        for place, (_, values) in zip(places, parts, strict=True):
            matrix[place] = values
        direction = _multiply(member, matrix, tuning)
        for place, (_, values) in zip(places, parts, strict=True):
            values.copy_(direction[place])

    def _send(self, output: Tensor, given: Tensor, output_sizes: list[int], given_sizes: list[int]) -> None:
        dist.all_to_all_single(output, given, output_sizes, given_sizes, group=self._sharding.group)


def _cut(layer: Layer, sources: Sequence[Block], columns: tuple[int, int]) -> list[_Part]:
    """The parts of a process's blocks that are in another's columns."""
    if columns[0] == columns[1]:
        return []
    blocks = [block.within(columns) for block in sources]
    return [_Part(layer, source, block) for source, block in enumerate(blocks) if block.numel]


def _place(parts: Sequence[Sequence[_Part]]) -> tuple[list[_Part], list[int]]:
    """The parts one behind the other in one buffer, those of each rank together, and each rank's number of elements."""
    placed, sizes, start = list[_Part](), list[int](), 0
    for of_rank in parts:
        first = start
        for part in of_rank:
            placed.append(_Part(part.layer, part.source, part.block, start))
            start += part.block.numel
        sizes.append(start - first)
    return placed, sizes


__all__ = ["ShardedDirections"]
