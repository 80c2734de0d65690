"""Which samples the rows of a flattened batch belong to: tokens of sentences, and those of them that an expert gets.

A router takes the tokens of all sentences as one long list, and each of its experts some of them; attention written by
hand folds its heads into the batch. From the call that flattens them on, or that moves the first dimension elsewhere,
the rows are followed through calls that keep them, move their dimension or reshape it, and through indexing that picks
some.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.capture.expressions import find_outputs
from ngplus.capture.function_mode import FunctionCall
from ngplus.capture.op_handlers import OpCall

_RESHAPING = frozenset(
    {Tensor.reshape, torch.reshape, Tensor.view, Tensor.flatten, torch.flatten, Tensor.unflatten, torch.unflatten}
)
_INTERLEAVING = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})
_REPEATING = frozenset({Tensor.repeat, Tensor.tile, torch.tile})
_SPLITTING = frozenset({torch.split, Tensor.split, torch.chunk, Tensor.chunk})
_SORTING = frozenset({torch.sort, Tensor.sort})
_INDEXING = frozenset({Tensor.__getitem__})
_SELECTING = frozenset({torch.index_select, Tensor.index_select})
_FLIPPING = frozenset({Tensor.flip, torch.flip, Tensor.flipud, torch.flipud})
_ROLLING = frozenset({Tensor.roll, torch.roll})
_GATHERING = frozenset({Tensor.gather, torch.gather})
_TAKING = frozenset({Tensor.take_along_dim, torch.take_along_dim})
_PICKING = _INDEXING | _SELECTING | _FLIPPING | _ROLLING | _GATHERING | _TAKING
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
        Tensor.argsort,
        torch.argsort,
        Tensor.scatter,
        torch.scatter,
        Tensor.index_copy,
        torch.index_copy,
    }
)
"""Functions whose output may have as many rows as an argument, and others."""


class RowOrigin(NamedTuple):
    """Where the rows of a tensor were before it was flattened.

    Attributes:
        reference: to the tensor.
        shape: of it.
        leading: the dimensions that became one.
        rows: which of the flattened rows it has; None for all, in order.
        dim: the dimension that the rows are along.
        times: how often each row comes in a row; all of them may come again and again.
    """

    reference: weakref.ref[Tensor]
    shape: torch.Size
    leading: tuple[int, ...]
    rows: Tensor | None = None
    dim: int = 0
    times: int = 1

    @classmethod
    def of(cls, value: Tensor, leading: Iterable[int], rows: Tensor | None = None, dim: int = 0) -> RowOrigin:
        """That of a tensor with each row once."""
        return cls(weakref.ref(value), value.shape, tuple(leading), rows, dim)

    def move(self, value: Tensor, **changes: Any) -> RowOrigin:
        """That of another tensor, with these attributes."""
        return self._replace(reference=weakref.ref(value), shape=value.shape, **changes)

    @property
    def size(self) -> int:
        """Of the dimension."""
        return self.shape[self.dim]

    @property
    def length(self) -> int:
        """Number of the rows, before they are repeated."""
        return math.prod(self.leading) if self.rows is None else len(self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether the rows are those of one dimension, in order."""
        return len(self.leading) == 1 and self.rows is None and self.length == self.size

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
        value = self.reference()
        device = self.rows.device if self.rows is not None else None if value is None else value.device
        places = torch.arange(self.size, device=device)
        places = places if self.length == self.size else places // self.times % self.length
        return places if self.rows is None else self.rows[places]

    def reshape(self, value: Tensor) -> RowOrigin | None:
        """That of the same elements in another shape, where the sample is told by the index of one dimension."""
        inner = math.prod(self.shape[self.dim + 1 :]) * self.times
        after = value.numel()
        for at, length in enumerate(value.shape):
            before, after = after, after // length  # elements of one index of the dimensions to here, without and with
            if inner % after == 0 and before % (inner * self.length) == 0:
                return self.move(value, dim=at, times=inner // after)
        if self.rows is not None or len(self.leading) == 1:
            return None
        whole = self._replace(leading=self.leading[:-1], times=self.times * self.leading[-1])
        return whole.reshape(value)


class RowOrigins(threading.local):
    """The origins of the tensors that the model's call which runs on this thread has made.

    Attributes:
        counts: the numbers of samples that the call may have.
    """

    def __init__(self) -> None:
        self.counts: set[int] = set()
        self._known: dict[int, RowOrigin] = {}

    def clear(self) -> None:
        """Forget the tensors."""
        self._known = {}

    def find(self, tensor: Any) -> RowOrigin | None:
        """The origin of a tensor's rows; None where they are as they came."""
        origin = self._known.get(id(tensor))
        return origin if origin is not None and origin.reference() is tensor else None  # another may have got its id

    def find_samples(self, call: FunctionCall, op_call: OpCall, batch_dim: int) -> tuple[Tensor, int] | None:
        """Find the sample of each row of a use whose rows are not the samples themselves.

        What is differentiated inside of attention, where heads are folded into the batch behind the samples and times
        in front of them, is told by its function.

        Args:
            call: the call.
            op_call: what was parsed of it.
            batch_dim: the dimension, of those that became one, that has the samples.

        Returns:
            The samples' indices, and how many samples there are; None where nothing was followed.
        """
        if call.time_major is not None:
            batch = max(1, call.time_major.batch)
            copies, left = divmod(op_call.samples, batch)
            if op_call.is_read or left or op_call.dim or copies < 2:
                return None
            rows = torch.arange(op_call.samples, device=call.output.device)
            return (rows % batch if call.function is F.linear else rows // copies), batch
        inputs = op_call.source if isinstance(op_call.source, list) else [op_call.source]
        for origin in filter(None, map(self.find, inputs)):
            fits = (origin.dim, origin.size) == (op_call.dim, op_call.samples)
            if fits and batch_dim < len(origin.leading) and not origin.is_plain:
                return origin.find_samples(batch_dim)
        return None

    def find_rows(self, source: Any) -> Tensor | None:
        """Which rows of a batch an input's first dimension has, in their order; None where they are as they came."""
        origin = self.find(source)
        return None if origin is None or origin.dim or len(origin.leading) != 1 else origin.rows

    def follow(self, call: FunctionCall) -> None:
        """Note the origins of what a call returns."""
        function = call.function
        if not (call.args and isinstance(call.args[0], Tensor) and call.args[0].layout == torch.strided):
            if self._known:
                self._keep(call)
        elif function in _RESHAPING:
            self._reshape(call.args[0], call.output)
        elif function in _MOVING:
            self._move(call)
        elif function in _PICKING and call.args[0].dim():
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
        if (origin := self.find(source)) is not None:
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
            self._known[id(output)] = RowOrigin.of(output, [*leading, rows] if rows > 1 else leading)

    def _move(self, call: FunctionCall) -> None:
        """Find the rows' dimension in views.

        Those of a tensor that is not followed are along its first dimension, where that alone is as long as the batch.
        A view keeps a dimension's length and stride, which no other has but in copies; there another tensor is viewed.
        """
        source, outputs = call.args[0], list(find_outputs(call))
        origin = self.find(source)
        if origin is None:
            first = source.shape[:1], source.stride()[:1]
            is_batch = source.dim() > 1 and [size in self.counts for size in source.shape[:2]] == [True, False]
            if not is_batch or all((each.shape[:1], each.stride()[:1]) == first for each in outputs):
                return
            origin = RowOrigin.of(source, source.shape[:1])
        views = outputs
        mark = source.shape[origin.dim], source.stride(origin.dim)
        if mark[0] == 1 or list(zip(source.shape, source.stride(), strict=True)).count(mark) > 1:
            marks = [int(dim == origin.dim) for dim in range(source.dim())]
            view = call.function(torch.empty_strided(source.shape, marks, device="meta"), *call.args[1:], **call.kwargs)
            mark, views = (mark[0], 1), [view] if isinstance(view, Tensor) else view
        for output, view in zip(outputs, views, strict=True):
            sizes = list(zip(view.shape, view.stride(), strict=True))
            if mark in sizes:
                self._known[id(output)] = origin.move(output, dim=sizes.index(mark))

    def _repeat(self, call: FunctionCall) -> None:
        """Each row several times in a row, or all of them again and again."""
        source, output = call.args[0], call.output
        origin = self.find(source)
        if origin is None:
            return
        if call.function in _REPEATING:
            self._known[id(output)] = origin.move(output, dim=origin.dim + output.dim() - source.dim())
            return
        times = call.args[1] if len(call.args) > 1 else call.kwargs.get("repeats")
        same = output.shape[: origin.dim] + output.shape[origin.dim + 1 :]
        if same == source.shape[: origin.dim] + source.shape[origin.dim + 1 :] and isinstance(times, int):
            self._known[id(output)] = origin.move(output, times=origin.times * times)

    def _split(self, call: FunctionCall) -> None:
        """Rows one after the other, where it is their dimension that is split."""
        origin = self.find(call.args[0])
        pieces = list(find_outputs(call))
        if origin is None or sum(each.shape[origin.dim] for each in pieces) != origin.size:
            self._move(call)
            return
        every = torch.split(origin.all_rows(), [each.shape[origin.dim] for each in pieces])
        for piece, rows in zip(pieces, every, strict=True):
            self._known[id(piece)] = RowOrigin.of(piece, origin.leading, rows, origin.dim)

    def _sort(self, call: FunctionCall) -> None:
        """Rows in the order of a list of numbers, one a row."""
        origin, (values, places) = self.find(call.args[0]), call.output
        if origin is not None and values.dim() == 1:
            self._known[id(values)] = RowOrigin.of(values, origin.leading, origin.all_rows()[places])

    def _pick(self, call: FunctionCall) -> None:
        """Some rows, which where nothing has flattened them are samples by themselves."""
        source = call.args[0]
        if not (isinstance(call.output, Tensor) and call.output.dim()):
            return
        origin = self.find(source)
        if call.function in _INDEXING:
            every = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
            index = every[0] if every else None
            is_view = all(each is None or each is ... or type(each) in (int, slice) for each in every)
            if is_view and (origin is None or origin.dim or not isinstance(index, slice)):
                self._move(call)
                return
            if isinstance(index, list) or type(index).__module__ == "numpy":
                index = torch.as_tensor(index, device=source.device)
        else:
            index = _find_picked(call, source)
            if index is None and call.function not in _GATHERING | _TAKING:  # another dimension than the rows'
                self._keep(call)
                return
        is_tensor = isinstance(index, Tensor) and index.dim() == 1 and source.dim() > 0
        if not is_tensor and not (isinstance(index, slice) and origin is not None):
            return
        origin = origin or RowOrigin.of(source, source.shape[:1])
        if origin.dim:
            return
        rows = origin.all_rows()[index.detach() if isinstance(index, Tensor) else index]
        if len(rows) == len(call.output):
            self._known[id(call.output)] = RowOrigin.of(call.output, origin.leading, rows)

    def _keep(self, call: FunctionCall) -> None:
        """Rows stay rows where there are as many as in an argument, along the same dimension."""
        origins = [origin for each in call.tensors if (origin := self.find(each)) is not None]
        for output in find_outputs(call) if origins else ():
            shape = output.shape
            for origin in origins:
                first = origin.dim if len(shape) == len(origin.shape) else 0
                if shape[first : origin.dim + 1] == origin.shape[first : origin.dim + 1] and len(shape) > origin.dim:
                    if self.find(output) is None:  # what a call has changed in place has the rows that it had
                        self._known[id(output)] = origin.move(output)
                    break


def _find_picked(call: FunctionCall, source: Tensor) -> Tensor | None:
    """Which rows of its first argument a call returns, in their order; None where nothing tells, or all as they are."""
    function, first = call.function, (0, -source.dim())
    if function in _FLIPPING:
        dims = call.kwargs.get("dims", call.args[1:] or (0,))
        return torch.arange(len(source), device=source.device).flip(0) if _is_one_of(first, dims) else None
    if function in _ROLLING:
        shifts, dims = (_flatten(_argument(call, place, name)) for place, name in ((1, "shifts"), (2, "dims")))
        shift = sum(shift for shift, dim in zip(shifts, dims, strict=False) if dim in first)
        return torch.arange(len(source), device=source.device).roll(shift) if _is_one_of(first, dims) else None
    dim, index = (_argument(call, place, name) for place, name in ((1, "dim"), (2, "index")))
    if function in _TAKING:
        dim, index = _argument(call, 2, "dim"), _argument(call, 1, "indices")
    if dim not in first or not isinstance(index, Tensor):
        return None
    if function in _SELECTING:
        return index
    rows = index.reshape(len(index), -1) if index.numel() else index
    return rows[:, 0] if index.numel() and bool((rows == rows[:, :1]).all()) else None


def _argument(call: FunctionCall, place: int, name: str) -> Any:
    """A call's argument, by its place or by its name."""
    return call.args[place] if len(call.args) > place else call.kwargs.get(name)


def _flatten(numbers: Any) -> list[int]:
    """Numbers that may come alone, as several arguments or as a list."""
    if numbers is None:
        return []
    return (
        [each for number in numbers for each in _flatten(number)] if isinstance(numbers, (list, tuple)) else [numbers]
    )


def _is_one_of(first: Iterable[int], dims: Any) -> bool:
    """Whether the first dimension is among ``dims``."""
    return not set(first).isdisjoint(_flatten(dims))


__all__ = ["RowOrigin", "RowOrigins"]
