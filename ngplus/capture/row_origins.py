"""Which samples the rows of a flattened batch belong to: tokens of sentences, and those of them that an expert gets.

A router takes the tokens of all sentences as one long list, and each of its experts some of them. From the call that
flattens them on, the list is followed through calls that keep its rows, and through indexing that picks some.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngplus.capture.expressions import outputs_of
from ngplus.capture.function_mode import FunctionCall

_FLATTENING = frozenset({Tensor.reshape, torch.reshape, Tensor.view, Tensor.flatten, torch.flatten})
_REPEATING = frozenset({torch.repeat_interleave, Tensor.repeat_interleave})
_SPLITTING = frozenset({torch.split, Tensor.split, torch.chunk, Tensor.chunk})
_INDEXING = frozenset({Tensor.__getitem__})
_PICKING = _INDEXING | {torch.index_select, Tensor.index_select}
_MOVING = frozenset(
    {
        Tensor.permute,
        torch.permute,
        Tensor.transpose,
        torch.transpose,
        Tensor.t,
        torch.t,
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
        Tensor.movedim,
        torch.movedim,
        Tensor.flip,
        torch.flip,
        Tensor.roll,
        torch.roll,
        Tensor.sort,
        torch.sort,
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
    """

    value: Tensor
    leading: tuple[int, ...]
    rows: Tensor | None = None

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
        """Which of the flattened rows it has."""
        return torch.arange(len(self.value), device=self.value.device) if self.rows is None else self.rows

    def repeat(self, value: Tensor, times: int) -> RowOrigin:
        """That of a tensor with each row so many times in a row."""
        rows = self.rows if times == 1 else self.all_rows().repeat_interleave(times)
        return RowOrigin(value, self.leading, rows)


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
        if function in _FLATTENING and call.args and isinstance(call.output, Tensor):
            self._flatten(call.args[0], call.output)
        elif function in _PICKING:
            self._pick(call)
        elif self._known:
            if function in _REPEATING:
                self._repeat(call)
            elif function in _SPLITTING:
                self._split(call)
            elif function not in _MOVING:
                self._keep(call)

    def _flatten(self, source: Tensor, output: Tensor) -> None:
        """Of (d₁, d₂, …, features) to (d₁·d₂ …, features), or of rows that are followed already."""
        joined = source.dim() - output.dim() + 1
        fits = output.dim() and joined > 0 and source.shape[joined:] == output.shape[1:] and source.numel()
        origin = self._known.get(id(source))
        if not fits or (origin is None and joined == 1):
            return
        if origin is None:
            self._known[id(output)] = RowOrigin(output, tuple(source.shape[:joined]))
        else:
            self._known[id(output)] = origin.repeat(output, len(output) // len(source))

    def _repeat(self, call: FunctionCall) -> None:
        """Each row several times in a row."""
        origin = self._known.get(id(call.args[0])) if call.args else None
        times = call.args[1] if len(call.args) > 1 else call.kwargs.get("repeats")
        if origin is not None and isinstance(times, int) and len(call.output) == times * len(call.args[0]):
            self._known[id(call.output)] = origin.repeat(call.output, times)

    def _split(self, call: FunctionCall) -> None:
        """Rows one after the other, where it is the first dimension that is split."""
        origin = self._known.get(id(call.args[0])) if call.args else None
        pieces = list(outputs_of(call))
        if origin is None or sum(len(each) for each in pieces) != len(origin.value):
            self._keep(call)
            return
        every = torch.split(origin.all_rows(), [len(each) for each in pieces])
        for piece, rows in zip(pieces, every, strict=True):
            self._known[id(piece)] = RowOrigin(piece, origin.leading, rows)

    def _pick(self, call: FunctionCall) -> None:
        """Some rows, which where nothing has flattened them are samples by themselves."""
        source, *indices = call.args
        if not (indices and isinstance(source, Tensor) and isinstance(call.output, Tensor) and call.output.dim()):
            return
        if call.function in _INDEXING:
            index = indices[0][0] if isinstance(indices[0], tuple) else indices[0]
        else:
            index = indices[1] if len(indices) == 2 and indices[0] == 0 else None
        origin = self._known.get(id(source))
        is_tensor = isinstance(index, Tensor) and index.dim() == 1 and source.dim() > 0
        if not is_tensor and not (isinstance(index, slice) and origin is not None):
            return
        origin = origin or RowOrigin(source, (len(source),))
        rows = origin.all_rows()[index.detach() if isinstance(index, Tensor) else index]
        if len(rows) == len(call.output):
            self._known[id(call.output)] = RowOrigin(call.output, origin.leading, rows)

    def _keep(self, call: FunctionCall) -> None:
        """Rows stay rows where there are as many as in an argument."""
        origins = [self._known[id(each)] for each in call.tensors if id(each) in self._known]
        for output in outputs_of(call) if origins else ():
            for origin in origins:
                if output.dim() and len(output) == len(origin.value) and id(output) not in self._known:
                    self._known[id(output)] = RowOrigin(output, origin.leading, origin.rows)
                    break


__all__ = ["RowOrigin", "RowOrigins"]
