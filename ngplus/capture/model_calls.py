"""Which outermost calls of a model see the same samples.

Row i of two calls is the same sample where one call was computed from the other and both are of equally many samples:
a decoder that is called on what its encoder returned, a cell called once a time step; and so are calls that a third one
of as many samples joins, as two heads on one trunk. Other calls, on two halves of a batch or on real and on generated
images, see samples of their own.

Inside of one call, several uses of a layer are by the same samples. That is doubtful where the call may go through its
batch in a loop: where a layer gets single samples several times, or pieces that make up the rows of the call's input.

The autograd graph tells which call was computed from which. It numbers the nodes that a thread makes in ascending
order, so that each call owns the range of numbers between its start and its end, and the call that made a node is found
by the node's number.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ngplus._torch_internals import (
    at_end_of_backward,
    backward_pass_number,
    find_node,
    frames,
    keyword_arguments,
    next_node_number,
    node_number,
    runs_python_backward,
)
from ngplus.guards.wrappers import is_around_model
from ngplus.layers import Layer

if TYPE_CHECKING:
    from ngplus.capture.function_mode import TimeMajor
    from ngplus.config import ModelCallSamples

SINGLE = (
    "is called several times on single samples without a batch dimension inside one call of the model, which may be "
    "samples or uses by one sample; give it a batch, call the model once a sample, set sample_index, or set "
    'model_calls="apart" for the former'
)
"""Why nothing tells what the samples of a layer are that a model calls on one vector after another."""

PIECES = (
    "is called on pieces that make up the rows of the model's input, which may be samples of their own or uses by the "
    'same samples; call the model piece by piece, set sample_index, or set model_calls="apart" or "joined"'
)
"""The same where a model cuts its batch up."""

ROWS = (
    "gets several rows inside a call of the model in which another layer gets one sample without a batch dimension, so "
    "that they may be samples or positions of this one; give the model a batch, or set sample_index"
)
"""The same of the rows of a sequence without a batch dimension."""

SIZES = (
    "gets different numbers of samples inside one call of the model, which may be samples of their own or some of the "
    'same ones; call the model once for each, set sample_index, or set model_calls="apart" for the former'
)
"""The same where a layer sees a batch, and then a part of it, or another batch."""

AXIS = (
    "gets its samples along another dimension than the model's input, attention or a recurrent layer in the same call "
    "or in one that it is computed from; set batch_dim to that of this layer's input, 1 for (T, B, C)"
)
"""Why a layer is left to the base whose samples the input, or another layer which knows its own, has elsewhere."""

COUNT = (
    "gets another number of samples than the model's input has in the same call, so that nothing tells which sample a "
    "row belongs to; keep the batch a dimension of its own, first or at batch_dim, set sample_index, or set "
    'samples="rows" where each row is a sample'
)
"""The same of a parameter whose rows are neither the input's samples nor followed from them."""

ORDER = (
    "gets the rows of the batch in several orders, as those of packed sequences are sorted by length, so that nothing "
    "tells which of them are of the same sample; keep the order, pad sequences in place of packing them, or set "
    'model_calls="joined" where row i of each use is of the same sample, "apart" where each row is one'
)
"""The same of a layer that is used several times on rows that were put in another order in between."""

CHECKPOINTS = (
    "is used several times, some of them in checkpoints with use_reentrant=True, which bring their gradients one after "
    "the other, so that what belongs to a sample cannot be put together; take use_reentrant=False"
)
"""Why a layer is left to the base whose uses by the same samples are known one after the other alone."""

PASSES = (
    "is used several times by the same samples, and their gradients come in several backward passes, the first of them "
    "before the last use, so that what belongs to a sample cannot be put together; call backward once, on the sum of "
    "the losses"
)
"""The same where the model's forward, or the loop, calls backward between the uses of one call of the model."""

DOUBTS = frozenset({SINGLE, PIECES, ROWS, SIZES, AXIS, COUNT, ORDER, CHECKPOINTS, PASSES})
"""Why a layer is left to the base of which nothing tells what its samples are."""


def _lengths(inputs: Any) -> Sequence[int]:
    """The shape of a call's first input, or how many tensors it is a list of.

    Args:
        inputs: the arguments of a call; where there are none, the keyword arguments count.

    Returns:
        Empty where it is neither.
    """
    first = next(iter(inputs or keyword_arguments().values()), None)
    if isinstance(first, Mapping):
        first = next(iter(first.values()), None)
    if isinstance(first, Tensor):
        return () if first.is_nested else first.shape
    return (len(first),) if isinstance(first, (list, tuple)) else ()


def _list_lengths(inputs: Sequence[Any]) -> set[int]:
    """How many tensors each list among a call's arguments has, as of images of several sizes."""
    lists = (each for each in (*inputs, *keyword_arguments().values()) if isinstance(each, list))
    return {len(each) for each in lists if each and all(isinstance(member, Tensor) for member in each)}


def find_counts(inputs: Any) -> set[int]:
    """The numbers of samples that a call may have: the length of its first input, and those of tensors in a list.

    Args:
        inputs: the arguments of the call; where there are none, the keyword arguments count.

    Returns:
        Empty where nothing tells.
    """
    return set(_list_rows(inputs)) | set(_lengths(inputs)[:1])


def _list_rows(inputs: Any) -> list[int]:
    """The length of each tensor in a call's first input, where that is a list."""
    first = next(iter(inputs or keyword_arguments().values()), None)
    members = first if isinstance(first, (list, tuple)) else ()
    return [len(each) for each in members if isinstance(each, Tensor) and each.dim()]


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are the same rows in the same order; None is all of them, as they come."""
    if one is None or other is None:
        given = other if one is None else one
        return given is None or torch.equal(given, torch.arange(len(given), device=given.device))
    return one is other or torch.equal(one, other)


@dataclass(eq=False, slots=True)
class _Uses:
    """The uses of a layer by equally many samples inside one call.

    Attributes:
        unbatched: whether any of them had no batch dimension.
        count: how many there are.
        inside: the last one's attention or recurrent layer, whose uses of a weight count once.
        leading: dimensions of the first one's input that may hold samples, where there are several.
        as_many: whether they must be as many as the input's or attention's: of a bare parameter, or differentiated.
        rows: which rows of a batch the last one got, in their order; None for all, as they come.
    """

    unbatched: bool
    count: int
    inside: TimeMajor | None
    leading: Sequence[int]
    as_many: bool
    rows: Tensor | None = None


@dataclass(eq=False, slots=True)
class _Call:
    """An outermost call, as it goes on.

    Attributes:
        number: of the call.
        lengths: of its first input.
        lists: how many tensors lists among its arguments have.
        list_rows: how many rows the tensors of a list have together that is its first input.
        counts: the numbers of samples that it may have.
        uses: of layers in it, by the numbers of samples that they get.
        sizes: the number of samples that each layer got first.
        repeats: whether there are several uses of any.
        batches: the numbers of samples that attention and recurrent layers got.
        has_axes: whether an input of any layer has several dimensions that may hold samples, or must have as many.
    """

    number: int = 0
    lengths: Sequence[int] = ()
    lists: set[int] = field(default_factory=set)
    list_rows: int = 0
    counts: set[int] = field(default_factory=set)
    uses: dict[tuple[Layer, int], _Uses] = field(default_factory=dict)
    sizes: dict[Layer, int] = field(default_factory=dict)
    repeats: bool = False
    batches: set[int] = field(default_factory=set)
    has_axes: bool = False

    def find_numbers(self, layer: Layer) -> set[int]:
        """The numbers of samples that a layer may get, as far as the call's input and its other layers tell."""
        return self.batches | self.counts | set(self.lengths[layer.batch_dim : layer.batch_dim + 1])


@dataclass(eq=False, slots=True)
class _Axes:
    """What later calls, computed from a call that has ended, are to know of where its samples are.

    Attributes:
        batches: the numbers of samples that attention and recurrent layers got.
        others: sizes of the dimension that holds the samples of no layer, as its samples are found to be elsewhere.
        leading: each layer whose samples may be along several dimensions, how many it got, and the dimensions.
    """

    batches: set[int]
    others: set[int] = field(default_factory=set)
    leading: list[tuple[Layer, int, Sequence[int]]] = field(default_factory=list)


@dataclass
class _Thread(threading.local):
    """What one thread has called.

    Attributes:
        call: that is running, or the last one.
        start: number of its first node.
        backward: number of the backward pass that it is made in, or −1.
        free: numbers of nodes that were made of weights alone.
        visited: nodes before it that `ModelCalls.trace` has come by.
        starts: first nodes of the calls that have returned, ascending.
        ends: for each of them, the node after its last and the call's number.
        frame: of a ``forward`` that was called directly, and the calls inside of it as one.
    """

    call: _Call = field(default_factory=_Call)
    start: int = 0
    backward: int = -1
    free: set[int] = field(default_factory=set)
    visited: set[int] = field(default_factory=set)
    starts: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    frame: tuple[types.FrameType, _Call] | None = None


class ModelCalls:
    """Numbers the outermost calls of a model, and finds which were computed from which.

    Args:
        samples: "separate", "joined" or "apart", see `NGPlus`.
    """

    def __init__(self, samples: ModelCallSamples) -> None:
        self._joined = samples == "joined"
        self._told = samples != "separate"
        self._numbers = itertools.count(1)
        self._ancestors: dict[int, set[int]] = {}
        self._sizes: dict[int, set[int]] = {}
        self._axes: dict[int, _Axes] = {}
        self._roots: dict[int, dict[int, int]] = {}
        self._doubts: dict[tuple[int, Layer], str] = {}
        self._unbatched: set[int] = set()
        self._running: dict[int, _Call] = {}
        self._thread = _Thread()
        self._hiding: set[int] = set()
        self._passes: dict[int, int] = {}
        self._recomputing: set[int] = set()
        self._modules: frozenset[int] = frozenset()
        self._codes: frozenset[types.CodeType] = frozenset()

    def follow(self, modules: Iterable[nn.Module]) -> None:
        """Forget all calls; those of ``modules`` follow.

        A call from inside of a ``forward`` of one of them that was itself called directly (``model.forward(x)``) is a
        part of that call; what is around a model calls no more than the model.
        """
        modules = list(modules)
        methods = [getattr(type(module), "forward", None) for module in modules if not is_around_model(module)]
        self._modules = frozenset(map(id, modules))
        self._codes = frozenset(code for method in methods if (code := getattr(method, "__code__", None)) is not None)
        self.clear()

    def clear(self) -> None:
        """Forget all calls."""
        self._ancestors = {}
        self._sizes = {}
        self._axes = {}
        self._roots = {}
        self._doubts = {}
        self._unbatched = set()
        self._running = {}
        self._thread = _Thread()
        self._hiding = set()
        self._passes = {}
        self._recomputing = set()

    def begin(self, inputs: Sequence[Any]) -> None:
        """Start an outermost call on this thread.

        Args:
            inputs: what it is given.
        """
        thread = self._thread
        frame = self._find_forward_frame()
        if frame is not None and thread.frame is not None and thread.frame[0] is frame:
            thread.call = thread.frame[1]
        elif frame is not None:
            # Kept until the next call or the backward pass, so that no other frame gets its place in memory.
            thread.call = _Call(next(self._numbers))
            thread.frame = frame, thread.call
        else:
            number = next(self._numbers)
            rows = sum(_list_rows(inputs))
            thread.call = _Call(number, _lengths(inputs), _list_lengths(inputs), rows, find_counts(inputs))
            thread.frame = None
        self._running[thread.call.number] = thread.call
        thread.start, thread.backward = next_node_number(), self._find_outer_pass()
        thread.visited = set()

    def end(self, free: Iterable[Tensor]) -> None:
        """End the outermost call of this thread.

        Args:
            free: tensors that it has made of weights alone, so that another call with them is not computed from it.
        """
        thread = self._thread
        thread.free.update(node_number(node) for node in map(find_node, free) if node is not None)
        self._find_doubts(thread.call)
        self._running.pop(thread.call.number, None)
        stop = next_node_number()
        if stop > thread.start:
            thread.starts.append(thread.start)
            thread.ends.append((stop, thread.call.number))

    def note_hidden(self) -> None:
        """Note that the running call uses a weight without a gradient: checkpoints may make that use again."""
        if self._thread.backward < 0:
            self._hiding.add(self._thread.call.number)

    @property
    def recomputes_again(self) -> bool:
        """Whether more backward passes have made parts of calls again than there were calls to make parts of again."""
        return 0 < len(self._hiding) < len(self._recomputing)

    def note_pass(self) -> int:
        """Note the backward pass that is running, if one is, until its end.

        Returns:
            Number of the outermost one that runs, or −1.
        """
        number = backward_pass_number()
        if number >= 0 and number not in self._passes:
            self._passes[number] = min(self._passes.values(), default=number)  # those that run have begun before it
            passes = self._passes
            at_end_of_backward(lambda: passes.pop(number, None))
        return self._passes.get(number, -1)

    def _find_outer_pass(self) -> int:
        """Number of the outermost backward pass that the call which begins is made in, as a part of another; or −1.

        It is where a function that is written in Python runs, and in a hook where a call has used weights without a
        gradient before: so do all checkpoints whose backward makes a part of the forward again. Any other call in a
        hook is of its own, as those that make cached gradients are.
        """
        if backward_pass_number() < 0 or not (self._hiding or runs_python_backward()):
            return -1
        outer = self.note_pass()
        self._recomputing.add(outer)
        return outer

    def release_frame(self) -> None:
        """Release the frame of a ``forward`` that was called directly, and of its variables."""
        self._thread.frame = None

    @property
    def current(self) -> int:
        """Number of the call that is running on this thread."""
        return self._thread.call.number

    def may_be_samples(self, layer: Layer, size: int) -> bool:
        """Whether a layer may get so many samples in the call that is running, as far as anything tells."""
        call = self._thread.call
        numbers = set(call.lengths[layer.batch_dim :][:1]) if layer.batch_dim else call.counts
        return not (known := numbers | call.batches) or size in known

    @property
    def backward(self) -> int:
        """Number of the backward pass that it is made in, as those of reentrant checkpoints are, or −1."""
        return self._thread.backward

    def trace(self, tensor: Tensor) -> None:
        """Find the earlier calls that ``tensor``, which the running call uses, was computed from."""
        node = find_node(tensor)
        if node is not None and node_number(node) < self._thread.start:
            self._find_ancestors(node)

    def _find_ancestors(self, node: Node) -> None:
        """Walk from ``node`` to the calls that it was computed from; a call's own ancestors are known already."""
        thread = self._thread
        nodes = [node]
        while nodes:
            node = nodes.pop()
            number = node_number(node)
            if number >= thread.start or number in thread.visited or number in thread.free:
                continue  # a leaf has the largest number there is
            thread.visited.add(number)
            place = bisect.bisect_right(thread.starts, number) - 1
            if place >= 0 and number < thread.ends[place][0]:
                call = thread.ends[place][1]
                self._roots = {}
                self._ancestors.setdefault(thread.call.number, set()).update({call}, self._ancestors.get(call, ()))
            else:
                nodes.extend(before for before, _ in node.next_functions if before is not None)

    def add_use(
        self,
        layer: Layer,
        size: int,
        unbatched: bool,
        inside: TimeMajor | None,
        leading: Sequence[int],
        as_many: bool,
        rows: Tensor | None = None,
    ) -> None:
        """Note a use of a layer in the call that is running.

        Args:
            layer: the layer.
            size: how many samples it gets.
            unbatched: whether it gets one without a batch dimension.
            inside: the call of attention or of a recurrent layer that it is a part of, or None.
            leading: dimensions of its input that may hold samples, where there are several.
            as_many: whether these must be as many as the input's or attention's.
            rows: which rows of a batch it gets, in their order; None for all, as they come.
        """
        call = self._thread.call
        if inside is not None:
            call.batches.add(inside.batch)
        sizes = self._sizes.setdefault(call.number, set())
        if size not in sizes:
            sizes.add(size)
            self._roots = {}
        uses = call.uses.get((layer, size))
        if uses is None:
            call.uses[layer, size] = _Uses(unbatched, 1, inside, leading, as_many, rows)
            call.has_axes |= as_many or len(leading) > 1
            if call.sizes.setdefault(layer, size) != size:
                self._doubts[call.number, layer] = SIZES
        elif inside is None or inside is not uses.inside:
            uses.count, uses.inside, call.repeats = uses.count + 1, inside, True
            uses.as_many |= as_many
            if not _are_equal(uses.rows, rows):
                self._doubts[call.number, layer] = ORDER
            uses.rows = rows
            if unbatched or uses.unbatched:
                self._doubts[call.number, layer] = SINGLE

    def add_unbatched(self) -> None:
        """Note that a layer of the call that is running, which knows its batch dimension, got a sample without one."""
        self._unbatched.add(self._thread.call.number)

    def _find_doubts(self, call: _Call) -> None:
        """Find the layers of which nothing tells what their samples are, by all that a call has done until now."""
        if call.repeats:
            self._find_pieces(call)
        if call.has_axes or call.batches:
            self._find_other_axes(call)

    def _find_pieces(self, call: _Call) -> None:
        """Find the layers that got pieces of the batch, of whose dimensions some has as many rows as all together."""
        totals: dict[Layer, int] = {}
        for (layer, size), each in call.uses.items():
            totals[layer] = totals.get(layer, 0) + size * each.count
        cut = {
            size
            for (layer, size), each in call.uses.items()
            if each.count > 1
            and (
                totals[layer] in {*call.lengths[:1], *call.lengths[layer.batch_dim :][:1], *call.lists}
                or (totals[layer] == call.list_rows and size not in call.counts)  # crops that are joined by size
            )
        }
        for (layer, size), each in call.uses.items():
            if each.count > 1 and size in cut:
                self._doubts.setdefault((call.number, layer), PIECES)

    def _find_other_axes(self, call: _Call) -> None:
        """Find the layers whose samples are along another dimension than one with as many samples as others got.

        Those of the call's input are along its first dimension, unless the user says otherwise of a layer, or attention
        or a recurrent layer of an earlier call does. What of a bare parameter has another number of samples is doubtful
        wherever it comes from.
        """
        axes = self._axes.setdefault(call.number, _Axes(call.batches))
        axes.leading = [(layer, size, each.leading) for (layer, size), each in call.uses.items()]
        ancestors = self._ancestors.get(call.number, set())
        earlier = {number: self._axes[number] for number in ancestors if number in self._axes}
        known = call.batches or set().union(*(each.batches for each in earlier.values()))
        others = {number: each.others for number, each in earlier.items()}
        before = set().union(*(self._sizes.get(each, set()) - others.get(each, set()) for each in ancestors))
        for (layer, size), each in call.uses.items():
            batches = (known or (set() if layer.batch_dim else set(call.lengths[:1]))) - {1}
            elsewhere = set() if size in batches else batches
            if not (layer.batch_dim or size in known | before):
                elsewhere = elsewhere | (before - {1})
            if not elsewhere.isdisjoint(each.leading):
                self._doubts[call.number, layer] = AXIS
                axes.others.add(size)
            elif each.as_many:
                numbers = call.find_numbers(layer)
                if numbers - {1} and size not in numbers:
                    self._doubts[call.number, layer] = COUNT
        if call.batches:
            for number, of_earlier in earlier.items():
                self._find_earlier_axes(number, of_earlier, call.batches)

    def _find_earlier_axes(self, number: int, axes: _Axes, batches: set[int]) -> None:
        """Find the layers of an earlier call whose samples attention or a recurrent layer, later on, has elsewhere."""
        for layer, size, leading in axes.leading:
            if not (axes.batches or size in batches or (batches - {1}).isdisjoint(leading)):
                self._doubts[number, layer] = AXIS
                axes.others.add(size)

    def find_doubt(self, number: int, layer: Layer, size: int, followed: bool) -> str | None:
        """Why nothing tells which samples a use is by.

        Args:
            number: of the call that it is in.
            layer: whose use it is.
            size: how many samples it gets.
            followed: whether the sample of each of its rows was found by following them.

        Returns:
            The reason, or None.
        """
        if (running := self._running.get(number)) is not None:  # whose forward makes the backward pass
            self._find_doubts(running)
        doubt = self._doubts.get((number, layer))
        if followed:
            return doubt if doubt in (AXIS, COUNT) else None
        if size > 1 and number in self._unbatched:
            return ROWS
        return doubt if doubt in (AXIS, COUNT) or not self._told else None

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


__all__ = [
    "AXIS",
    "CHECKPOINTS",
    "COUNT",
    "DOUBTS",
    "ORDER",
    "PASSES",
    "PIECES",
    "ROWS",
    "SINGLE",
    "SIZES",
    "ModelCalls",
    "find_counts",
]
