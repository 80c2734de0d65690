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

import random
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
from ngplus.completeness import Comparison, draw, values_of
from ngplus.distributed import world_size
from ngplus.gfim import Part, Shape
from ngplus.grouping import SampleIndex, rows_by_sample, rows_that_count
from ngplus.join import is_joinable
from ngplus.layers import Layer
from ngplus.loss_reduction import Reduction
from ngplus.mixed_precision import without_autocast
from ngplus.model_calls import ModelCalls
from ngplus.options import ModelCallSamples, PartialCapture, Samples
from ngplus.times import Stopwatch

INCOMPLETE = (
    "has a gradient that is not the sum of its captured uses: it is used outside of the model's calls too "
    "(in the training loop, through model.forward, in a torch.autograd.Function, as a penalty or in derivatives)"
)
"""Why a layer is left to the base whose gradient has other sources than what was captured."""

BY_HAND = (
    "has a gradient that was put together by hand from several backward passes, some of which zero_grad has discarded"
)
"""Why all layers are left to the base where this is true of one of them."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sample is, how many are used and in which form their sum is kept.

    Attributes:
        samples: "batch" or "rows", see `NGPlus`.
        model_calls: "separate" or "joined", see `NGPlus`.
        partial_capture: "base" or "accept", see `NGPlus`.
        max_samples: most samples that a curvature step uses of each layer, or None.
        block_size: p of (18), or None.
        max_rank: most columns of U, as a fraction of the matrix's side, for which the sum of rank-one products is
            kept as U (14); 0 keeps none.
        sketch_size: columns of 𝒢ᵢ to draw (17) where U is not kept, or None for all.
    """

    samples: Samples
    model_calls: ModelCallSamples
    partial_capture: PartialCapture
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
        reduction: what the loss divides by: "mean" for N, "sum" for 1, or a number.
    """

    shape: Shape
    moments: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)
    seen: int = 0
    used: int = 0
    reduction: Reduction = "mean"

    def scale(self) -> float:
        """Factor from the sum to (4).

        Backward of a mean over N samples returns 𝒢ᵢ/N, so that (4) is N² Σ / |S|. Where N is given and the layer saw
        n samples of which |S| were summed, the others' gradients are zero and (4) is N (n / |S|) Σ.
        """
        if self.reduction == "sum":
            return 1 / max(1, self.used)
        return (self.seen if self.reduction == "mean" else self.reduction) * self.seen / max(1, self.used)

    @property
    def weight(self) -> float:
        """How many samples it stands for in an average over processes."""
        return self.reduction if self.used and not isinstance(self.reduction, str) else self.used

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


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Use:
    """A call on its way: seen in forward, its gradient not back yet.

    Attributes:
        call: with its source.
        output: shape of what it returned.
        dtype: that it was computed in.
        accumulator: of the weight's gradient.
        grouping: which rows belong to which sample, or None.
        batch_dim: where the samples are.
        model_call: number of the outermost call of the model that it is in.
        size: how long the batch dimension is.
        versions: of what went in, when it went in.
        gradient: of the output, while the graph is retained and more may come.
        returned: whether all of the gradient is back.
    """

    call: Call
    output: torch.Size
    dtype: torch.dtype
    accumulator: torch.autograd.graph.Node
    grouping: SampleIndex | None
    batch_dim: int
    model_call: int
    size: int
    versions: list[tuple[Tensor, int]]
    gradient: Tensor | None = None
    returned: bool = False

    def input_was_overwritten(self) -> bool:
        """Whether anything that went in has been changed in place since."""
        return any(tensor._version != version for tensor, version in self.versions)


@dataclass(eq=False, slots=True)
class _Returned:
    """The factors of a use whose gradient is back.

    Attributes:
        use: the use.
        part: the factors.
    """

    use: _Use
    part: Part


@dataclass(eq=False, slots=True)
class _Record:
    """What is known of a layer since the optimizer's last step.

    Attributes:
        layer: the layer.
        statistic: what was summed.
        comparison: of what was captured with the gradient; None where partial capture is accepted.
        pending: uses whose gradients have not come back.
        retained: uses whose gradients have, through a graph that is retained.
        parts: of uses to be summed.
        backward: number of the backward pass that the latest gradient came in.
        discarded: whether gradients of an earlier backward pass were thrown away.
        opaque: why the layer is not supported.
        accumulator: of the weight's gradient.
    """

    layer: Layer
    statistic: Statistic
    comparison: Comparison | None
    pending: weakref.WeakSet[_Use] = field(default_factory=weakref.WeakSet)
    retained: set[_Use] = field(default_factory=set)
    parts: list[_Returned] = field(default_factory=list)
    backward: int = -1
    discarded: bool = False
    opaque: str | None = None
    accumulator: torch.autograd.graph.Node | None = None

    def discard(self) -> None:
        """Forget what came back, but not the uses whose gradients may still come."""
        self.discarded |= bool(self.statistic.used or self.parts or self.retained)
        self.statistic = type(self.statistic)(self.statistic.shape)
        self.parts = []
        if self.comparison is not None:
            self.comparison = self.comparison.empty()
        for use in self.retained:
            use.gradient = None
            self.pending.add(use)
        self.retained = set()


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
    _unseen: ClassVar[str] = "where a single sample's gradient cannot be seen"

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
        self._model_calls = ModelCalls(sampling.model_calls == "joined")
        self._handles: list[RemovableHandle] = []
        self._weight_hooks: list[_WeightHook] = []
        self._random = random.Random(0)
        self._unsupported: dict[Layer, str] = {}
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
            if layer.bias is not None:
                self._biases.setdefault(id(layer.bias), []).append(layer)
        self._flattening = {id(modules.get(layer.module)): layer for layer in self._layers.values() if layer.flattens}
        self._forget()
        self._model_calls.follow(modules.values())
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
        self._finalizer = weakref.finalize(self, _release, self._handles, self._weight_hooks)
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
            record.discard()

    def _forget(self) -> None:
        """Forget forward passes too, and leave one that was cut short by something like `KeyboardInterrupt`."""
        self._records = {}
        self._unsupported = {}
        self._model_calls.clear()
        _remove(self._weight_hooks)
        inside = self._inside
        if inside.mode is not None and _get_current_function_mode() is inside.mode:  # type: ignore[no-untyped-call]
            inside.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        inside.module = inside.mode = None

    def collect(self) -> dict[Layer, Statistic]:
        """What was summed since the last `clear`, for the layers whose gradients came back and are complete."""
        with self._stopwatch.measure("curvature"):
            records = self._records
            for record in records.values():
                for use in list(record.retained):
                    self._finish(record, use)
                self._reduce(record, record.parts)
            self._unsupported = {
                layer: f"{record.opaque}, {self._unseen}"
                for layer, record in records.items()
                if record.opaque is not None
            }
            self._unsupported.update(self._find_incomplete())
        return {
            layer: record.statistic
            for layer, record in records.items()
            if record.statistic.used and layer not in self._unsupported
        }

    def _find_incomplete(self) -> dict[Layer, str]:
        """The layers whose gradient is not the sum of what was captured, with the reason. Synchronizes once."""
        compared = [
            (record, record.comparison)
            for layer, record in self._records.items()
            if record.comparison is not None and layer not in self._unsupported
        ]
        now = [_gradient_in_doubt(record) for record, _ in compared]
        values = values_of([each.vectors(gradient) for (_, each), gradient in zip(compared, now, strict=True)])
        incomplete: dict[Layer, str] = {}
        for (record, comparison), gradient, known in zip(compared, now, values, strict=True):
            if gradient is not None and not comparison.is_multiple(known):
                return dict.fromkeys(self._layers.values(), BY_HAND)
            if not comparison.is_empty and not comparison.is_complete(known):
                incomplete[record.layer] = INCOMPLETE
        return incomplete

    def unsupported(self) -> dict[Layer, str]:
        """The layers that the latest `collect` left out, with the reason."""
        return self._unsupported

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
            self._model_calls.begin()
            inside.mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module) -> None:
        inside = self._inside
        if inside.module is not module or inside.mode is None:
            return
        inside.depth -= 1
        if inside.depth == 0:
            inside.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            inside.module = inside.mode = None
            self._model_calls.end()

    def _layer_of(self, argument: Tensor) -> Layer | None:
        """The wanted layer whose weight this is, or is a view of."""
        owner = _owner(argument)
        return self._layers.get(id(owner)) if id(owner) in self._wanted and owner.requires_grad else None

    def _record(self, layer: Layer, output_size: int = 0) -> _Record:
        shape = layer.shape(self._sampling.block_size)
        record = self._records.get(layer)
        if record is None or record.statistic.shape != shape:
            comparison = None
            if self._sampling.partial_capture == "base":
                comparison = Comparison(draw(layer, shape, output_size, self._random))
                if record is None:
                    self._weight_hooks.append(_WeightHook(layer.weight, partial(_compare, weakref.ref(self), layer)))
            record = self._records[layer] = _Record(layer, self._statistic(shape), comparison)
        return record

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
            self._model_calls.use(argument)
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
                call = _read(layer, function, args, kwargs, argument, attention)
                grouping = None if attention and layer.of_attention else self.sample_index
                versions = [
                    (each, each._version)
                    for each in _flat((*args, *kwargs.values()))
                    if isinstance(each, Tensor)
                    and not isinstance(_owner(each), nn.Parameter)
                    and not each.is_inference()
                ]
                self._expect(call, output, versions, grouping, 1 if attention else layer.batch_dim)
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

    def _expect(
        self,
        call: Call,
        output: Tensor,
        versions: list[tuple[Tensor, int]],
        grouping: SampleIndex | None,
        batch_dim: int,
    ) -> None:
        accumulator = torch.autograd.graph.get_gradient_edge(call.layer.weight).node
        output_size = output.values().numel() if output.is_nested else output.numel()
        size = 1 if output.dim() <= batch_dim else len(output) if output.is_nested else output.shape[batch_dim]
        self._model_calls.has_samples(size)
        use = _Use(
            call,
            output.shape,
            output.dtype,
            accumulator,
            grouping,
            batch_dim,
            self._model_calls.current,
            size,
            versions,
        )
        record = self._record(call.layer, output_size)
        record.accumulator = accumulator  # of older uses too, if their graph is alive
        record.pending.add(use)
        hook = partial(_receive, weakref.ref(self), use)  # weakly: a loss that is kept would keep the watch going
        _viewed(output).register_hook(hook)  # type: ignore[no-untyped-call]

    def _receive(self, use: _Use, gradient: Tensor) -> None:
        """Take the gradient of a call's output, in a backward that also reaches the weight."""
        layer = use.call.layer
        if use.returned or layer not in self._records:
            return
        if not _adds_to(use.accumulator):
            return
        self._model_calls.release_frame()
        record = self._records[layer]
        backward = torch._C._current_graph_task_id()
        if record.backward != backward:
            self._reduce(record, record.parts)
            self._drop_stale(record)
            record.backward = backward
        record.pending.discard(use)
        use.gradient = gradient.detach() if use.gradient is None else use.gradient + gradient.detach()
        if torch._C._autograd._get_current_graph_task_keep_graph():
            record.retained.add(use)
        else:
            self._finish(record, use)

    def _finish(self, record: _Record, use: _Use) -> None:
        """Take a use whose gradient is complete to its factors, and sum those of the samples that are."""
        record.retained.discard(use)
        gradient, use.gradient, use.returned = use.gradient, None, True
        try:
            if gradient is not None and gradient.numel() and record.opaque is None:
                # An empty batch, or sequences of length zero, have nothing to sum.
                self._add_part(record, use, gradient)
            near = [part for part in record.parts if self._samples_of(part.use) == self._samples_of(use)]
            awaited = any(
                self._samples_of(other) == self._samples_of(use) for other in (*record.pending, *record.retained)
            )
            if self._sampling.samples == "rows" or not awaited:
                self._reduce(record, near)
        except UnsupportedCall as reason:
            record.opaque = str(reason)
        except torch.OutOfMemoryError:
            raise
        except _UNREADABLE as error:  # a layout or a dtype that no reader expects must not end the backward pass
            record.opaque = f"could not be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        finally:
            use.call.source, use.versions = None, []

    def _samples_of(self, use: _Use) -> int:
        """A number that uses share which are by the same samples; those of other sizes may have it too."""
        return self._model_calls.root(use.model_call, use.size)

    def _add_part(self, record: _Record, use: _Use, gradient: Tensor) -> None:
        if use.input_was_overwritten():
            raise UnsupportedCall("had its input overwritten in place between forward and backward")
        with torch.no_grad(), without_autocast([gradient.device.type]):
            grouping, source = use.grouping, use.call.source
            if source.is_nested:
                grouping = grouping or _one_sample_each(source, self._sampling.samples)
                part = use.call.factors(source.values(), gradient.values())
            else:
                part = use.call.factors(source, gradient.reshape(use.output))
            if record.comparison is not None:
                record.comparison.add_use(part, use.dtype)
            if grouping is not None:
                part = self._grouped(part, grouping, use)
            record.parts.append(_Returned(use, part))

    def compare(self, layer: Layer, gradient: Tensor) -> None:
        """Take the gradient that a backward pass brings to a layer's weight."""
        record = self._records.get(layer)
        if record is None or record.comparison is None or record.opaque is not None:
            return
        if record.accumulator is not None and _adds_to(record.accumulator):
            if record.comparison.is_empty and layer.weight.grad is not None:
                # What is there before the first backward pass of a captured use has another source, or is zero.
                record.comparison.add_gradient(layer.weight.grad.detach())
            record.comparison.add_gradient(gradient.detach())

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

        Gradients of zeros beside sums that are not are gone too: ``set_to_none=False``. It synchronizes with the
        device, on the second backward of a curvature step and those after it.
        """
        if not (record.statistic.used or record.retained):
            return
        gradient = record.layer.weight.grad
        if gradient is None or (is_zero(gradient) and not record.statistic.is_zero()):
            record.discard()

    def _reduce(self, record: _Record, parts: Sequence[_Returned]) -> None:
        """Sum the samples of ``parts``, which are among the record's.

        Of calls that see the same samples, those with equally many are uses by the same ones.
        """
        record.parts = [part for part in record.parts if part not in parts]
        if not parts or record.opaque is not None:
            return
        device = record.layer.weight.device.type
        with torch.no_grad(), without_autocast([device]):
            if self._sampling.samples == "rows":
                for returned in parts:
                    self._add_rows(record.statistic, returned.part)
            else:
                together: dict[tuple[int, int], list[Part]] = {}
                for returned in parts:
                    key = returned.part.rows.samples, self._samples_of(returned.use)
                    together.setdefault(key, []).append(returned.part)
                for alike in together.values():
                    self._add_samples(record.statistic, alike)

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


def _compare(capture: weakref.ref[Capture], layer: Layer, gradient: Tensor) -> None:
    if (alive := capture()) is not None:
        with alive._stopwatch.measure("curvature"):
            alive.compare(layer, gradient)


class _WeightHook:
    """A hook on a weight that gets the gradient of a backward pass before any other hook of the weight does.

    Args:
        weight: a leaf that requires a gradient.
        hook: takes the gradient.
    """

    __slots__ = ("_handle", "_weight")

    def __init__(self, weight: Tensor, hook: Callable[[Tensor], None]) -> None:
        self._weight = weight
        self._handle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
        hooks = weight._backward_hooks
        if hooks is not None and len(hooks) > 1:  # the engine calls them in the order in which they were put in
            others = {key: each for key, each in hooks.items() if key != self._handle.id}
            for key in others:
                del hooks[key]
            hooks.update(others)

    def remove(self) -> None:
        """Leave the weight as it was."""
        self._handle.remove()
        if not self._weight._backward_hooks:
            self._weight._backward_hooks = None


def _remove(hooks: list[_WeightHook]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _release(handles: Iterable[RemovableHandle], hooks: list[_WeightHook]) -> None:
    for handle in handles:
        handle.remove()
    _remove(hooks)
    eager.release()


_UNREADABLE = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError)


def _read(layer: Layer, function: Callable[..., Any], *call: Any) -> Call:
    """`read_call`, of which a call that no reader expects, whatever it is, is an `UnsupportedCall`."""
    args, kwargs, *_ = call
    given = [each for each in _flat((*args, *kwargs.values())) if isinstance(each, Tensor)]
    if any(each.is_nested and each.layout != torch.jagged for each in given):
        raise UnsupportedCall("is used on a nested tensor whose layout is not torch.jagged")
    try:
        return read_call(layer, function, *call)
    except _UNREADABLE as error:
        raise UnsupportedCall(f"is used by {_name(function)} in a way that is not known ({error})") from error


def _one_sample_each(nested: Any, samples: Samples) -> SampleIndex | None:
    """The index of a jagged tensor's rows, where each tensor of its list is a sample."""
    if samples == "rows":
        return None
    lengths = nested.offsets().diff()
    return SampleIndex.of(torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths))


def _gradient_in_doubt(record: _Record) -> Tensor | None:
    """A layer's gradient, where some that came before it were thrown away, so that it may be made of those.

    Several processes average their gradients, which are multiples of no single process's.
    """
    return record.layer.weight.grad if record.discarded and world_size() == 1 else None


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
