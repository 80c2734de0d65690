"""Watching the layers of a model on curvature steps, and only then.

While armed, a `TorchFunctionMode` is on inside the forward pass of the model (or of one of its layers, where
layers are called one by one). It sees every function call that takes a layer's weight, whoever makes it: the layer
itself, a subclass that wraps more around it, attention, or a functional use of another module's weight. The call's
output gets a tensor hook; when its gradient comes back, the sample's factors are reduced to L or R on the spot and
nothing is kept. Tensor hooks survive in-place activations, and a forward whose backward never comes leaves nothing
behind, since everything hangs on its graph.

Nothing is registered on the model itself, so that it can be copied and pickled at any time.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from ngplus import eager, gfim
from ngplus.calls import AttentionCall, Call, UnsupportedCall, read_call, weight_argument
from ngplus.gfim import Part, Shape
from ngplus.grouping import SampleIndex, rows_by_sample, rows_that_count
from ngplus.join import is_joinable
from ngplus.layers import Layer
from ngplus.mixed_precision import without_autocast
from ngplus.options import LossReduction, Samples
from ngplus.times import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sample is, how many are used and in which form their sum is kept.

    Attributes:
        samples: "batch" or "rows", see `NGPlus`.
        loss_reduction: "mean" or "sum".
        max_samples: most samples that a curvature step uses of each layer, or None.
        block_size: p of (18), or None.
        max_rank: most columns of U, as a fraction of the matrix's side, for which the sum of rank-one products is
            kept as U (14); 0 keeps none.
        sketch_size: columns of 𝒢ᵢ to draw (17) where U is not kept, or None for all.
    """

    samples: Samples
    loss_reduction: LossReduction
    max_samples: int | None
    block_size: int | None
    max_rank: float
    sketch_size: int | None


@dataclass(eq=False)
class Statistic:
    """Sums over the samples of one layer on one curvature step.

    Attributes:
        shape: of what is summed.
        moments: Σ of products of the gradients that backward returned, one tensor a stack of blocks.
        columns: the same sum as UUᵀ, while that is the cheaper form.
        seen: samples N that went through the layer.
        used: samples |S| that were summed.
    """

    shape: Shape
    moments: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    seen: int = 0
    used: int = 0

    def scale(self, loss_reduction: LossReduction) -> float:
        """Factor from the sum to (4): backward of a mean loss returns 𝒢ᵢ/N, so that (4) is N² Σ / |S|."""
        return (self.seen**2 if loss_reduction == "mean" else 1) / max(1, self.used)

    def tensors(self) -> list[Tensor]:
        """Everything that was gathered."""
        return [*self.moments, *self.columns]

    def is_zero(self) -> bool:
        """Whether every sample's gradient is zero. Waits for the device."""
        return all(is_zero(tensor) for tensor in self.tensors())

    def add(self, moments: list[Tensor]) -> None:
        """Add to the sum."""
        self.moments = gfim.added([self.moments, moments]) if self.moments else moments

    def densify(self) -> None:
        """Turn UUᵀ into moments."""
        if self.columns:
            self.add(gfim.product_of_columns(self.shape, torch.cat(self.columns, dim=1).unsqueeze(0)))
            self.columns = []


@dataclass(eq=False)
class _Use:
    """A call on its way: seen in forward, its gradient not back yet."""

    call: Call
    output: torch.Size
    accumulator: torch.autograd.graph.Node
    grouping: SampleIndex | None
    batch_dim: int
    returned: bool = False


@dataclass(eq=False)
class _Record:
    """What is known of a layer since the last `Capture.clear`."""

    layer: Layer
    statistic: Statistic
    pending: weakref.WeakSet[_Use] = field(default_factory=weakref.WeakSet)
    parts: list[Part] = field(default_factory=list)
    backward: int = -1
    opaque: str | None = None


class _Inside(threading.local):
    """Which watched module this thread is inside of: the outermost one, and how often."""

    module: nn.Module | None = None
    depth: int = 0
    mode: _Watcher | None = None


class Capture:
    """Sums the curvature statistics of a model's layers while it is armed.

    Args:
        model: whose forward passes are watched.
        layers: whose weights are looked for.
        sampling: see `Sampling`.
        stopwatch: gets the seconds spent on curvature.
        generator: draws the columns of (17).
    """

    _statistic: ClassVar[type[Statistic]] = Statistic

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        sampling: Sampling,
        stopwatch: Stopwatch,
        generator: torch.Generator,
    ) -> None:
        self._layers = {id(layer.weight): layer for layer in layers}
        self._model = model
        self._sampling = sampling
        self._stopwatch = stopwatch
        self._generator = generator
        self._records: dict[Layer, _Record] = {}
        self._watched: frozenset[int] = frozenset()
        self._wanted: frozenset[int] = frozenset()
        self._biases: dict[int, list[Layer]] = {}
        self._flattening: dict[int, Layer] = {}
        self._inside = _Inside()
        self._handles: list[RemovableHandle] = []
        self.sample_index: SampleIndex | None = None
        self.joinables: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def armed(self) -> bool:
        """Whether forward passes are watched now."""
        return bool(self._handles)

    def arm(self, layers: Iterable[Layer]) -> None:
        """Watch the forward passes from now on, for these layers."""
        self._wanted = frozenset(id(layer.weight) for layer in layers)
        modules = dict(self._model.named_modules())
        self._watched = frozenset(id(module) for module in modules.values())
        self._biases = {}
        for layer in self._layers.values():
            if layer.trained_bias is not None:
                self._biases.setdefault(id(layer.trained_bias), []).append(layer)
        self._flattening = {id(modules.get(layer.module)): layer for layer in self._layers.values() if layer.flattens}
        self._forget()
        if self.armed:
            return
        capture = weakref.ref(self)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (alive := capture()) is not None:
                alive._enter(module, args)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if (alive := capture()) is not None:
                alive._leave(module)

        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        eager.hold()
        self._finalizer = weakref.finalize(self, _release, self._handles)
        self._finalizer.atexit = False

    def disarm(self) -> None:
        """Stop watching and forget everything."""
        if self.armed:
            self._finalizer()
            self._handles = []
        self._forget()

    def clear(self) -> None:
        """Forget what was summed so far, but not the forward passes whose backward is still to come."""
        for record in self._records.values():
            record.statistic = self._statistic(record.statistic.shape)
            record.parts = []

    def _forget(self) -> None:
        """Forget forward passes too, and leave one that was cut short by something like `KeyboardInterrupt`."""
        self._records = {}
        inside = self._inside
        if inside.mode is not None and _get_current_function_mode() is inside.mode:  # type: ignore[no-untyped-call]
            inside.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        inside.module = inside.mode = None

    def collect(self) -> dict[Layer, Statistic]:
        """What was summed since the last `clear`, for the layers whose gradients came back."""
        with self._stopwatch.measure("curvature"):
            for record in self._records.values():
                self._reduce(record)
        return {
            layer: record.statistic
            for layer, record in self._records.items()
            if record.statistic.used and record.opaque is None
        }

    def opaque(self) -> dict[Layer, str]:
        """The layers whose weight was used in a way that is not understood, with the reason."""
        return {layer: record.opaque for layer, record in self._records.items() if record.opaque is not None}

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_joinable(module):
            self.joinables.add(module)
        if (flattening := self._flattening.get(id(module))) is not None:
            flattening.input_shape = args[0].shape if args and isinstance(args[0], Tensor) else None
        inside = self._inside
        if inside.module is module:
            inside.depth += 1
        elif inside.module is None and id(module) in self._watched and torch.is_grad_enabled() and not _transformed():
            inside.module, inside.depth, inside.mode = module, 1, _Watcher(self)
            inside.mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module) -> None:
        inside = self._inside
        if inside.module is not module or inside.mode is None:
            return
        inside.depth -= 1
        if inside.depth == 0:
            inside.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            inside.module = inside.mode = None

    def _layer_of(self, argument: Tensor) -> Layer | None:
        """The wanted layer whose weight this is, or is a view of."""
        owner = _owner(argument)
        return self._layers.get(id(owner)) if id(owner) in self._wanted and owner.requires_grad else None

    def _record(self, layer: Layer) -> _Record:
        if layer not in self._records:
            statistic = self._statistic(layer.shape(self._sampling.block_size))
            self._records[layer] = _Record(layer, statistic)
        return self._records[layer]

    def look(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        attention: AttentionCall | None,
    ) -> None:
        """See a function call that the forward pass made."""
        weight = weight_argument(function, args, kwargs)
        for argument in _flat((*args, *kwargs.values())):
            if not isinstance(argument, Tensor):
                continue
            layer, with_bias = self._layer_of(argument), self._biases.get(id(_owner(argument)), ())
            if not (layer or with_bias) or not (_has_gradient(output, argument) or _graph_is_elsewhere()):
                continue
            if layer is None:
                self._look_at_bias(with_bias, function, weight)
                continue
            try:
                if _transformed():
                    raise UnsupportedCall("is used inside a transform of torch.func")
                if argument is not weight:
                    raise UnsupportedCall(f"is used by {_name(function)}")
                call = read_call(layer, function, args, kwargs, argument, attention)
                grouping = None if attention and layer.of_attention else self.sample_index
                self._expect(call, output, grouping, 1 if attention else layer.batch_dim)
            except UnsupportedCall as reason:
                self._record(layer).opaque = str(reason)

    def _look_at_bias(self, layers: Sequence[Layer], function: Callable[..., Any], weight: Any) -> None:
        """See a bias that a call takes: a column of its layer's matrix only where the weight goes in with it.

        What ``torch.cat`` joins may be cut apart again for calls that take both.
        """
        taken_with = self._layers.get(id(_owner(weight))) if isinstance(weight, Tensor) else None
        if taken_with in layers or function is torch.cat:
            return
        for layer in layers:
            if id(layer.weight) in self._wanted:
                self._record(layer).opaque = f"is used apart from its bias, which {_name(function)} takes"

    def _expect(self, call: Call, output: Tensor, grouping: SampleIndex | None, batch_dim: int) -> None:
        accumulator = torch.autograd.graph.get_gradient_edge(call.layer.weight).node
        use = _Use(call, output.shape, accumulator, grouping, batch_dim)
        self._record(call.layer).pending.add(use)
        hook = partial(_receive, weakref.ref(self), use)  # weakly: a loss that is kept would keep the watch going
        _viewed(output).register_hook(hook)  # type: ignore[no-untyped-call]

    def _receive(self, use: _Use, gradient: Tensor) -> None:
        """Take the gradient of a call's output, in a backward that also reaches the weight."""
        layer = use.call.layer
        if use.returned or layer not in self._records:
            return
        if not _adds_to(use.accumulator):
            return
        use.returned = True
        record = self._records[layer]
        backward = torch._C._current_graph_task_id()
        if record.backward != backward:
            self._reduce(record)
            self._drop_stale(record)
            record.backward = backward
        record.pending.discard(use)
        if gradient.numel():  # an empty batch, or sequences of length zero, have nothing to sum
            with torch.no_grad(), without_autocast([gradient.device.type]):
                part = use.call.factors(use.call.source, gradient.detach().reshape(use.output))
                record.parts.append(part if use.grouping is None else self._grouped(part, use.grouping, use))
        use.call.source = None
        if not record.pending or self._sampling.samples == "rows":
            self._reduce(record)

    def _grouped(self, part: Part, grouping: SampleIndex, use: _Use) -> Part:
        """The part with its rows put to the samples that the user's index says."""
        layer = use.call.layer
        index = grouping.index_of(layer.module)
        if index is None:
            return part
        if self._sampling.samples == "rows":
            return rows_that_count(part, index, use.batch_dim, layer.name)
        return rows_by_sample(part, index, use.batch_dim, grouping.samples, layer.name)

    def _drop_stale(self, record: _Record) -> None:
        """Drop the sums of a backward whose gradients are gone: a skipped step, then ``model.zero_grad()``.

        Gradients of zeros beside sums that are not are gone too: ``set_to_none=False``. It waits for the device, on the
        second backward of a curvature step and those after it.
        """
        if not record.statistic.used:
            return
        gradient = record.layer.weight.grad
        if gradient is None or (is_zero(gradient) and not record.statistic.is_zero()):
            record.statistic = self._statistic(record.statistic.shape)

    def _reduce(self, record: _Record) -> None:
        """Sum the samples of the parts that are back; parts of equally many samples are uses by the same ones."""
        parts, record.parts = record.parts, []
        if not parts or record.opaque is not None:
            return
        device = record.layer.weight.device.type
        with torch.no_grad(), without_autocast([device]):
            if self._sampling.samples == "rows":
                for part in parts:
                    self._add_rows(record.statistic, part)
            else:
                for together in _by_samples(parts):
                    self._add_samples(record.statistic, together)

    def _room(self, statistic: Statistic, samples: int) -> int:
        """How many of ``samples`` more are to be used."""
        limit = self._sampling.max_samples
        return samples if limit is None else max(0, min(samples, limit - statistic.used))

    def _add_samples(self, statistic: Statistic, parts: list[Part]) -> None:
        samples = parts[0].rows.samples
        room = self._room(statistic, samples)
        statistic.seen += samples
        statistic.used += room
        if not room:
            return
        parts = [Part(part.rows.slice(0, room), part.columns.slice(0, room)) for part in parts]
        if len(parts) == 1 and parts[0].rows.positions == 1:
            self._add_rank_one(statistic, parts[0])
        else:
            statistic.densify()
            parts = [self._sketched(statistic.shape, part) for part in parts]
            statistic.add(gfim.second_moment(statistic.shape, parts))

    def _add_rows(self, statistic: Statistic, part: Part) -> None:
        part = gfim.positions_as_samples(part)
        samples = part.rows.samples
        room = self._room(statistic, samples)
        statistic.seen += samples
        statistic.used += room
        if room:
            self._add_rank_one(statistic, Part(part.rows.slice(0, room), part.columns.slice(0, room)))

    def _add_rank_one(self, statistic: Statistic, part: Part) -> None:
        shape = statistic.shape
        limit = self._sampling.max_rank * shape.short
        rank = part.rows.samples + sum(columns.shape[1] for columns in statistic.columns)
        if shape.groups == 1 and rank <= limit and not statistic.moments:
            statistic.columns.append(gfim.scaled_columns(shape, part))
            return
        statistic.densify()
        statistic.add(gfim.second_moment(shape, [part]))

    def _sketched(self, shape: Shape, part: Part) -> Part:
        """Draw columns of 𝒢ᵢ (rows, where R is built) uniformly with replacement, equation (17)."""
        size = self._sampling.sketch_size
        if size is None or size >= shape.long:
            return part
        return gfim.sample_long_side(shape, part, gfim.drawn(shape.long, size, self._generator))


def _adds_to(accumulator: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that is running adds to ``.grad``; `torch.autograd.grad` returns gradients instead."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # it returns this very weight's
        return False


class _Watcher(TorchFunctionMode):
    """Shows every function call of a forward pass to a `Capture`."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = weakref.ref(capture)
        self._attention: AttentionCall | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._inside_attention(args, kwargs)
        output = func(*args, **kwargs)
        if (capture := self._capture()) is not None and capture.armed:
            with capture._stopwatch.measure("curvature"):
                capture.look(func, args, kwargs, output, self._attention)
        return output

    def _inside_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run attention with this mode on inside it too, so that its projections are seen."""
        query = args[0] if args else kwargs["query"]
        outer, self._attention = self._attention, AttentionCall(query.shape[1] if query.dim() == 3 else 1)
        try:
            with self:
                return _undispatched(F.multi_head_attention_forward)(*args, **kwargs)
        finally:
            self._attention = outer


def _undispatched(function: Any) -> Callable[..., Any]:
    """``function`` without its first step, which hands the whole call to the mode that is on."""
    namespace = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def is_zero(tensor: Tensor) -> bool:
    """Whether no entry differs from zero. Waits for the device."""
    return not bool((tensor._values() if tensor.is_sparse else tensor).any())


def _transformed() -> bool:
    """Whether `torch.func` or `torch.jit.trace` looks through what is called now: it makes no graph of its own."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or torch._C._functorch.maybe_current_level() is not None


def _receive(capture: weakref.ref[Capture], use: _Use, gradient: Tensor) -> None:
    if (alive := capture()) is not None:
        with alive._stopwatch.measure("curvature"):
            alive._receive(use, gradient)


def _release(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    eager.release()


def _viewed(output: Tensor) -> Tensor:
    """The tensor to hook for an output that may be a view of another shape, as those of linear layers on sequences are.

    A view that is changed in place leaves the graph, and its hook with it; what it was a view of stays.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Arguments, and the members of those that are lists or tuples."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from argument
        else:
            yield argument


def _owner(argument: Tensor) -> Tensor:
    """What the tensor is a view of, or itself."""
    return argument if argument._base is None else argument._base


def _has_gradient(output: Any, argument: Tensor) -> bool:
    """Whether a gradient can come back through ``output``, which is not only a view of ``argument``."""
    owner = _owner(argument)
    return any(
        isinstance(tensor, Tensor) and tensor.requires_grad and tensor is not owner and tensor._base is not owner
        for tensor in _flat((output,))
    )


def _graph_is_elsewhere() -> bool:
    """Whether a transform keeps the graph of what is called now, so that no output says that it has one."""
    return _transformed() and torch.is_grad_enabled()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _by_samples(parts: Iterable[Part]) -> list[list[Part]]:
    """Parts together that have equally many samples."""
    groups: dict[int, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.rows.samples, []).append(part)
    return list(groups.values())
