"""Which outermost calls of a model see the same samples.

Row i of two calls is the same sample where one call was computed from the other and both are of equally many samples:
a decoder that is called on what its encoder returned, a cell called once a time step; and so are calls that a third one
of as many samples joins, as two heads on one trunk. Other calls, on two halves of a batch or on real and on generated
images, see samples of their own.

The autograd graph tells which call was computed from which. It numbers the nodes that a thread makes in ascending
order, so that each call owns the range of numbers between its start and its end, and the call that made a node is found
by the node's number.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import Node

from ngplus._torch_internals import frames, next_node_number, node_number


@dataclass
class _Thread(threading.local):
    """What one thread has called.

    Attributes:
        number: of the call that is running.
        start: number of its first node.
        visited: nodes before it that `ModelCalls.trace` has come by.
        starts: first nodes of the calls that have returned, ascending.
        ends: for each of them, the node after its last and the call's number.
        frame: of a ``forward`` that was called directly, and the number of the calls inside of it.
    """

    number: int = 0
    start: int = 0
    visited: set[int] = field(default_factory=set)
    starts: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    frame: tuple[types.FrameType, int] | None = None


class ModelCalls:
    """Numbers the outermost calls of a model, and finds which were computed from which.

    Args:
        joined: whether all calls see the same samples, whatever the graph says.
    """

    def __init__(self, joined: bool) -> None:
        self._joined = joined
        self._numbers = itertools.count(1)
        self._ancestors: dict[int, set[int]] = {}
        self._sizes: dict[int, set[int]] = {}
        self._roots: dict[int, dict[int, int]] = {}
        self._thread = _Thread()
        self._modules: frozenset[int] = frozenset()
        self._codes: frozenset[types.CodeType] = frozenset()

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Forget all calls; those of ``modules`` follow.

        A call from inside of a ``forward`` of one of them that was itself called directly (``model.forward(x)``) is a
        part of that call.
        """
        modules = list(modules)
        methods = [getattr(type(module), "forward", None) for module in modules]
        self._modules = frozenset(map(id, modules))
        self._codes = frozenset(code for method in methods if (code := getattr(method, "__code__", None)) is not None)
        self.clear()

    def clear(self) -> None:
        """Forget all calls."""
        self._ancestors = {}
        self._sizes = {}
        self._roots = {}
        self._thread = _Thread()

    def begin(self) -> None:
        """Start an outermost call on this thread."""
        thread = self._thread
        frame = self._find_forward_frame()
        if frame is not None and thread.frame is not None and thread.frame[0] is frame:
            thread.number = thread.frame[1]
        else:
            thread.number = next(self._numbers)
            # Kept until the next call or the backward pass, so that no other frame gets its place in memory.
            thread.frame = None if frame is None else (frame, thread.number)
        thread.start = next_node_number()
        thread.visited = set()

    def end(self) -> None:
        """End the outermost call of this thread."""
        thread = self._thread
        stop = next_node_number()
        if stop > thread.start:
            thread.starts.append(thread.start)
            thread.ends.append((stop, thread.number))

    def release_frame(self) -> None:
        """Release the frame of a ``forward`` that was called directly, and of its variables."""
        self._thread.frame = None

    @property
    def current(self) -> int:
        """Number of the call that is running on this thread."""
        return self._thread.number

    def trace(self, tensor: Tensor) -> None:
        """Find the earlier calls that ``tensor``, which the running call uses, was computed from."""
        node = tensor.grad_fn
        if node is not None and node_number(node) < self._thread.start:
            self._find_ancestors(node)

    def _find_ancestors(self, node: Node) -> None:
        """Walk from ``node`` to the calls that it was computed from; a call's own ancestors are known already."""
        thread = self._thread
        nodes = [node]
        while nodes:
            node = nodes.pop()
            number = node_number(node)
            if number >= thread.start or number in thread.visited:  # a leaf has the largest number there is
                continue
            thread.visited.add(number)
            place = bisect.bisect_right(thread.starts, number) - 1
            if place >= 0 and number < thread.ends[place][0]:
                call = thread.ends[place][1]
                self._roots = {}
                self._ancestors.setdefault(thread.number, set()).update({call}, self._ancestors.get(call, ()))
            else:
                nodes.extend(before for before, _ in node.next_functions if before is not None)

    def add_size(self, size: int) -> None:
        """Note that a layer in the call that is running gets ``size`` samples."""
        sizes = self._sizes.setdefault(self._thread.number, set())
        if size not in sizes:
            sizes.add(size)
            self._roots = {}

    def root(self, number: int, size: int) -> int:
        """The number that all calls share which see the same ``size`` samples as call ``number``."""
        if self._joined:
            return 0
        if size not in self._roots:
            self._roots[size] = self._find_roots(size)
        return self._roots[size].get(number, number)

    def _find_roots(self, size: int) -> dict[int, int]:
        """The roots of all calls in which a layer gets ``size`` samples."""
        parents = {number: number for number, sizes in self._sizes.items() if size in sizes}

        def find(number: int) -> int:
            while (parent := parents[number]) != number:
                parents[number] = number = parents[parent]
            return number

        for number in parents:
            for ancestor in self._ancestors.get(number, ()):
                if ancestor in parents:
                    parents[find(number)] = find(ancestor)
        return {number: find(number) for number in parents}

    def _find_forward_frame(self) -> types.FrameType | None:
        """The outermost frame on this thread's stack that runs a followed module's ``forward``.

        ``f_locals`` are read of frames that run such code alone: up to Python 3.12 that keeps all of a function's
        variables for as long as it runs.
        """
        found: types.FrameType | None = None
        for frame in frames():
            code = frame.f_code
            if code in self._codes and code.co_argcount:
                module = frame.f_locals.get(code.co_varnames[0])
                found = frame if id(module) in self._modules else found
        return found


__all__ = ["ModelCalls"]
