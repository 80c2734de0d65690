"""Which samples the rows of a flattened batch belong to: tokens of sentences, and those of them that an expert gets.

A router takes the tokens of all sentences as one long list, and each of its experts some of them; attention written by
hand folds its heads into the batch. From the call that flattens them on, or that moves the first dimension elsewhere,
the rows are followed through calls that keep them, move their dimension or reshape it, and through indexing that picks
some.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngplus.capture.expressions import outputs_of
from ngplus.capture.function_mode import FunctionCall

_RESHAPING = frozenset(
    {Tensor.reshape, torch.reshape, Tensor.view, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten}
)
_INTERLEAVING = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})
_REPEATING = frozenset({Tensor.repeat, Tensor.tile, torch.tile})
_SPLITTING = frozenset({torch.split, Tensor.split, torch.chunk, Tensor.chunk})
_SORTING = frozenset({torch.sort, Tensor.sort})
_INDEXING = frozenset({Tensor.__getitem__})
_PICKING = _INDEXING | {torch.index_select, Tensor.index_select}
_MOVING = frozenset(
    {
        Tensor.permute,
        torch.permute,
        Tensor.transpose,
        torch.transpose,
        Tensor.swapaxes,
        torch.swapaxes,
        Tensor.t,
        torch.t,
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
        Tensor.movedim,
        torch.movedim,
        Tensor.moveaxis,
        torch.moveaxis,
        Tensor.unsqueeze,
        torch.unsqueeze,
        Tensor.squeeze,
        torch.squeeze,
        Tensor.unbind,
        torch.unbind,
        Tensor.select,
        torch.select,
        Tensor.expand,
    }
)
"""Functions whose output is a view with the same rows, maybe along another dimension."""

_SHUFFLING = frozenset(
    {
        Tensor.flip,
        torch.flip,
        Tensor.roll,
        torch.roll,
        Tensor.argsort,
        torch.argsort,
        Tensor.scatter,
        torch.scatter,
        Tensor.gather,
        torch.gather,
    }
)
"""Functions whose output may have as many rows as an argument, and others."""


@dataclass(frozen=True, eq=False)
class RowOrigin:
    """Where the rows of a tensor were before it was flattened.

    Attributes:
        value: the tensor, which is kept so that no other gets its id.
        leading: the dimensions that became one.
        rows: which of the flattened rows it has; None for all, in order.
        dim: the dimension that the rows are along.
        times: how often each row comes in a row; all of them may come again and again.
    """

    value: Tensor
    leading: tuple[int, ...]
    rows: Tensor | None = None
    dim: int = 0
    times: int = 1

    @property
    def size(self) -> int:
        """Of the dimension."""
        return self.value.shape[self.dim]

    @property
    def count(self) -> int:
        """Of the rows, before they are repeated."""
        return math.prod(self.leading) if self.rows is None else len(self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether the rows are those of one dimension, in order."""
        return len(self.leading) == 1 and self.rows is None and self.count == self.size

    def find_samples(self, batch_dim: int) -> tuple[Tensor, int]:
        """The sample of each row, and how many there are.

        Args:
            batch_dim: which of the dimensions that became one holds the samples.

        Returns:
            (n,) and b.
        """
        size = self.leading[batch_dim]
        return self.all_rows() // math.prod(self.leading[batch_dim + 1 :]) % size, size

    def all_rows(self) -> Tensor:
        """Which of the flattened rows it has, as often as it has them."""
        places = torch.arange(self.size, device=self.value.device)
        places = places if self.count == self.size else places // self.times % self.count
        return places if self.rows is None else self.rows[places]

    def reshape(self, value: Tensor) -> RowOrigin | None:
        """That of the same elements in another shape, where the sample is told by the index of one dimension."""
        inner = math.prod(self.value.shape[self.dim + 1 :]) * self.times
        after = value.numel()
        for at, length in enumerate(value.shape):
            before, after = after, after // length  # elements of one index of the dimensions to here, without and with
            if inner % after == 0 and before % (inner * self.count) == 0:
                return replace(self, value=value, dim=at, times=inner // after)
        if self.rows is not None or len(self.leading) == 1:
            return None
        whole = replace(self, leading=self.leading[:-1], times=self.times * self.leading[-1])
        return whole.reshape(value)


class RowOrigins(threading.local):
    """The origins of the tensors that the model's call which runs on this thread has made."""

    def __init__(self) -> None:
        self._known: dict[int, RowOrigin] = {}

    def clear(self) -> None:
        """Forget the tensors."""
        self._known = {}

    def find(self, tensor: Any) -> RowOrigin | None:
        """The origin of a tensor's rows; None where they are as they came."""
        return self._known.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def follow(self, call: FunctionCall) -> None:
        """Note the origins of what a call returns."""
        function = call.function
        if not (call.args and isinstance(call.args[0], Tensor)):
            if self._known:
                self._keep(call)
        elif function in _RESHAPING:
            self._reshape(call.args[0], call.output)
        elif function in _MOVING:
            self._move(call)
        elif function in _PICKING:
            self._pick(call)
        elif self._known:
            if function in _INTERLEAVING or function in _REPEATING:
                self._repeat(call)
            elif function in _SPLITTING:
                self._split(call)
            elif function in _SORTING:
                self._sort(call)
            elif function not in _SHUFFLING:
                self._keep(call)

    def _reshape(self, source: Tensor, output: Tensor) -> None:
        """Of (d₁, d₂, …, features) to (d₁·d₂ …, features), or of rows that are followed already."""
        if not (output.dim() and source.numel() and source.numel() == output.numel()):
            return
        if (origin := self._known.get(id(source))) is not None:
            if (found := origin.reshape(output)) is not None:
                self._known[id(output)] = found
            return
        rows, leading = len(output), []
        for size in source.shape:
            if rows % size or rows == 1:
                break
            leading.append(size)
            rows //= size
        if len(leading) > 1 or (leading and rows > 1):
            self._known[id(output)] = RowOrigin(output, (*leading, rows) if rows > 1 else tuple(leading))

    def _move(self, call: FunctionCall) -> None:
        """Find the rows' dimension in views; those of a tensor that is not followed are along its first."""
        source, outputs = call.args[0], list(outputs_of(call))
        origin = self._known.get(id(source))
        if origin is None:
            first = source.shape[:1], source.stride()[:1]
            if source.dim() < 2 or all((each.shape[:1], each.stride()[:1]) == first for each in outputs):
                return
            origin = RowOrigin(source, tuple(source.shape[:1]))
        marks = [int(dim == origin.dim) for dim in range(source.dim())]
        marked = call.function(torch.empty_strided(source.shape, marks, device="meta"), *call.args[1:], **call.kwargs)
        for output, view in zip(outputs, [marked] if isinstance(marked, Tensor) else marked, strict=True):
            for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
                if stride == 1 and size == origin.size:
                    self._known[id(output)] = replace(origin, value=output, dim=dim)
                    break

    def _repeat(self, call: FunctionCall) -> None:
        """Each row several times in a row, or all of them again and again."""
        source, output = call.args[0], call.output
        origin = self._known.get(id(source))
        if origin is None:
            return
        if call.function in _REPEATING:
            self._known[id(output)] = replace(origin, value=output, dim=origin.dim + output.dim() - source.dim())
            return
        times = call.args[1] if len(call.args) > 1 else call.kwargs.get("repeats")
        same = output.shape[: origin.dim] + output.shape[origin.dim + 1 :]
        if same == source.shape[: origin.dim] + source.shape[origin.dim + 1 :] and isinstance(times, int):
            self._known[id(output)] = replace(origin, value=output, times=origin.times * times)

    def _split(self, call: FunctionCall) -> None:
        """Rows one after the other, where it is their dimension that is split."""
        origin = self._known.get(id(call.args[0]))
        pieces = list(outputs_of(call))
        if origin is None or sum(each.shape[origin.dim] for each in pieces) != origin.size:
            self._move(call)
            return
        every = torch.split(origin.all_rows(), [each.shape[origin.dim] for each in pieces])
        for piece, rows in zip(pieces, every, strict=True):
            self._known[id(piece)] = RowOrigin(piece, origin.leading, rows, origin.dim)

    def _sort(self, call: FunctionCall) -> None:
        """Rows in the order of a list of numbers, one a row."""
        origin, (values, places) = self._known.get(id(call.args[0])), call.output
        if origin is not None and values.dim() == 1:
            self._known[id(values)] = RowOrigin(values, origin.leading, origin.all_rows()[places])

    def _pick(self, call: FunctionCall) -> None:
        """Some rows, which where nothing has flattened them are samples by themselves."""
        source, *indices = call.args
        if not (indices and isinstance(call.output, Tensor) and call.output.dim()):
            return
        origin = self._known.get(id(source))
        if call.function in _INDEXING:
            every = indices[0] if isinstance(indices[0], tuple) else (indices[0],)
            index = every[0] if every else None
            is_view = all(each is None or each is ... or type(each) in (int, slice) for each in every)
            if is_view and (origin is None or origin.dim or not isinstance(index, slice)):
                self._move(call)
                return
        else:
            index = indices[1] if len(indices) == 2 and indices[0] == 0 else None
        is_tensor = isinstance(index, Tensor) and index.dim() == 1 and source.dim() > 0
        if not is_tensor and not (isinstance(index, slice) and origin is not None):
            return
        origin = origin or RowOrigin(source, (len(source),))
        if origin.dim:
            return
        rows = origin.all_rows()[index.detach() if isinstance(index, Tensor) else index]
        if len(rows) == len(call.output):
            self._known[id(call.output)] = RowOrigin(call.output, origin.leading, rows)

    def _keep(self, call: FunctionCall) -> None:
        """Rows stay rows where there are as many as in an argument."""
        origins = [self._known[id(each)] for each in call.tensors if id(each) in self._known]
        for output in outputs_of(call) if origins else ():
            for origin in origins:
                same = output.shape[: origin.dim + 1] == origin.value.shape[: origin.dim + 1]
                if same and output.dim() > origin.dim and id(output) not in self._known:
                    self._known[id(output)] = replace(origin, value=output)
                    break


__all__ = ["RowOrigin", "RowOrigins"]
