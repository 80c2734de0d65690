"""Recording the uses of a model's weights on curvature steps, and only then.

While armed, a function mode is on inside the calls of the model (or of one of its layers, where layers are called one
by one). It gets every function call that takes a layer's weight, whoever makes it: the layer itself, a subclass that
wraps more around it, attention, or a functional use of another module's weight. Where a handler reads the call, the
factors come from what goes in and out; any other function is differentiated again. The call's output gets a hook; when
its gradient comes back, the sample's factors are summed at once and nothing is kept. Tensor hooks survive in-place
activations, and a forward pass whose backward never comes leaves nothing behind, since everything hangs on its graph.

Nothing is registered on the model itself but hooks on its weights while their gradients are awaited, so that it can be
copied and pickled at any time.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngplus._torch_internals import (
    accumulates,
    backward_pass_number,
    is_current_mode,
    is_transformed,
    retains_graph,
    unwrap_transformed,
)
from ngplus.capture.accumulator import Accumulator, Addition, Sampling, Statistic, is_zero
from ngplus.capture.compared_entries import ComparedEntries, choose_bias_entries, sample_entries
from ngplus.capture.completeness import Comparison, read_values
from ngplus.capture.contractions import NoSampleGradient, UnsupportedCall
from ngplus.capture.expressions import CONSTANTS, Expressions, Source, outputs_of
from ngplus.capture.function_gradients import parse_function
from ngplus.capture.function_mode import CaptureMode, FunctionCall, TimeMajor, owner_of
from ngplus.capture.model_calls import CHECKPOINTS, DOUBTS, ORDER, ModelCalls, find_counts
from ngplus.capture.op_handlers import OpCall, find_weights, parse_call
from ngplus.capture.row_origins import RowOrigins
from ngplus.capture.sample_index import SampleIndex
from ngplus.capture.weight_use import CapturedPair, LayerRecord, WeightHook, WeightUse, record_versions
from ngplus.capture.whole_weights import WholeWeights
from ngplus.curvature.all_reduce import world_size
from ngplus.dtensors import is_sharded
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
from ngplus.guards.compile_guard import hold_eager, release_eager
from ngplus.guards.join import is_joinable
from ngplus.layers import Layer
from ngplus.profiling import Stopwatch
from ngplus.tuning import DEFAULT, Tuning

INCOMPLETE = (
    "has a gradient that is not the sum of its captured uses: it is used outside of the model's calls too "
    "(in the training loop, through model.forward, in a torch.autograd.Function, as a penalty or in derivatives), or "
    "goes into a function that mixes samples"
)
"""Why a layer is left to the base whose gradient has other sources than what was captured."""

INCOMPLETE_BIAS = (
    "has a bias whose gradient is not the sum of its captured uses: the bias is used outside of the model's calls too "
    "(in the training loop, as a penalty or in derivatives)"
)
"""The same of its bias."""

BY_HAND = (
    "has a gradient that was put together by hand from several backward passes, some of which zero_grad has discarded"
)
"""Why all layers are left to the base where this is true of one of them."""

_UNREADABLE = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError)
"""What a handler may raise of a layout or a dtype that it does not expect; it must not end the backward pass."""


class _OutermostCall(threading.local):
    """The outermost call of the model that is running on this thread, and how often its module is entered."""

    module: nn.Module | None = None
    depth: int = 0
    mode: CaptureMode | None = None


@dataclass(eq=False, slots=True)
class _Unread:
    """What no handler reads of a call.

    Attributes:
        weights: what it may take as weight, see `find_weights`.
        sources: the parameters that it carries a gradient to.
        reasons: why not, for the layers that it takes directly.
        is_view: whether it returns a view of a weight.
        together: the layers whose weight and bias it takes.
    """

    weights: Sequence[Any]
    sources: dict[tuple[int, int], Source] = field(default_factory=dict)
    reasons: dict[Layer, str] = field(default_factory=dict)
    is_view: bool = False
    together: list[Layer] = field(default_factory=list)

    def add(self, source: Source) -> None:
        """Add a parameter."""
        self.sources[source.key] = source


class Recorder:
    """Sums the curvature statistics of a model's layers while it is armed.

    Args:
        model: whose calls are recorded.
        layers: whose weights are recognised in them.
        sampling: see `Sampling`.
        accumulator: sums what is captured.
        stopwatch: gets the seconds spent on curvature.
        tuning: of the comparison with the gradient.

    Attributes:
        sample_index: which sample each row of a layer's input belongs to, or None.
        joinables: modules among those called that `torch.distributed.algorithms.Join` may have been given.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        sampling: Sampling,
        accumulator: Accumulator,
        stopwatch: Stopwatch,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._layers = {id(layer.weight): layer for layer in layers}
        self._model = model
        sharded = any(is_sharded(layer.weight) for layer in self._layers.values())
        self._whole = WholeWeights(model) if sharded else None
        self._sampling = sampling
        self._accumulator = accumulator
        self._stopwatch = stopwatch
        self._tuning = tuning
        self._records: dict[Layer, LayerRecord] = {}
        self._modules: frozenset[int] = frozenset()
        self._awaited: frozenset[int] = frozenset()
        self._biases: dict[int, list[Layer]] = {}
        self._shaping: dict[int, list[Layer]] = {}
        self._input_shapes: dict[Layer, torch.Size | None] = {}
        self._outermost = _OutermostCall()
        self._model_calls = ModelCalls(sampling.model_calls)
        self._expressions = Expressions()
        self._origins = RowOrigins()
        self._handles: list[RemovableHandle] = []
        self._weight_hooks: list[WeightHook] = []
        self._hooked: set[tuple[Layer, int]] = set()
        self._random = random.Random(0)
        self._unsupported: dict[Layer, str] = {}
        self.sample_index: SampleIndex | None = None
        self.joinables: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    # Arming -----------------------------------------------------------------------------------------------------

    @property
    def armed(self) -> bool:
        """Whether calls of the model are recorded now."""
        return bool(self._handles)

    def arm(self, layers: Iterable[Layer]) -> None:
        """Record the model's calls from now on, for these layers."""
        self._awaited = frozenset(id(layer.weight) for layer in layers)
        modules = dict(self._model.named_modules())
        self._modules = frozenset(id(module) for module in modules.values())
        self._biases = {}
        for layer in self._layers.values():
            if layer.bias is not None:
                self._biases.setdefault(id(layer.bias), []).append(layer)
        self._expressions = Expressions(modules.values())
        self._shaping = {}
        for layer in self._layers.values():
            if layer.flattens or layer.knows_samples:
                self._shaping.setdefault(id(modules.get(layer.module)), []).append(layer)
        self._forget()
        self._model_calls.follow(modules.values())
        if self.armed:
            return
        recorder = weakref.ref(self)

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (alive := recorder()) is not None:
                alive._enter(module, args)

        def leave(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            if (alive := recorder()) is not None:
                alive._leave(module, args)

        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        hold_eager()
        self._finalizer = weakref.finalize(self, _release, self._handles, self._weight_hooks)
        self._finalizer.atexit = False

    def disarm(self) -> None:
        """Record nothing any more, and forget everything."""
        if self.armed:
            self._finalizer()
            self._handles = []
            self._forget()

    def discard(self) -> None:
        """Forget what was summed so far, but not the forward passes whose backward is still to come."""
        for record in self._records.values():
            record.discard()

    def _forget(self) -> None:
        """Forget forward passes too, and leave one that was cut short by something like `KeyboardInterrupt`."""
        self._records = {}
        if self._whole is not None:
            self._whole.forget()
        self._unsupported = {}
        self._input_shapes = {}
        self._model_calls.clear()
        self._forget_call()
        _remove(self._weight_hooks)
        self._hooked = set()
        outermost = self._outermost
        if outermost.mode is not None and is_current_mode(outermost.mode):
            outermost.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        outermost.module = outermost.mode = None

    def _forget_call(self) -> None:
        """Forget what is known of tensors that the model's call has made."""
        self._expressions.clear()
        self._origins.clear()

    # Forward: calls of the model, and function calls in them ------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_joinable(module):
            self.joinables.add(module)
        if (layers := self._shaping.get(id(module))) is not None:
            shape = args[0].shape if args and isinstance(args[0], Tensor) else None
            self._input_shapes.update(dict.fromkeys(layers, shape))
        outermost = self._outermost
        if outermost.module is module:
            outermost.depth += 1
        elif (
            outermost.module is None
            and id(module) in self._modules
            and torch.is_grad_enabled()
            and not is_transformed()
        ):
            mode = CaptureMode(weakref.ref(self))
            outermost.module, outermost.depth, outermost.mode = module, 1, mode
            self._model_calls.begin()
            self.trace(args)
            self._origins.counts = find_counts(args)
            mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        outermost = self._outermost
        if outermost.module is not module or outermost.mode is None:
            return
        outermost.depth -= 1
        if outermost.depth == 0:
            outermost.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            outermost.module = outermost.mode = None
            self._model_calls.end(args, (each.value for each in self._expressions.known.values()))
            self._forget_call()

    def trace(self, arguments: Iterable[Any]) -> None:
        """Find the earlier calls that arguments were computed from, which no recorded function may take as they are."""
        for each in arguments:
            if isinstance(each, Tensor):
                self._model_calls.trace(each)
            elif isinstance(each, (list, tuple, Mapping)):
                self.trace(each.values() if isinstance(each, Mapping) else each)

    def awaits(self, arguments: Iterable[Any]) -> bool:
        """Whether the gradient of any of a call's arguments is awaited."""
        return torch.is_grad_enabled() and any(
            self._identify(each) in self._awaited and each.requires_grad
            for each in arguments
            if isinstance(each, nn.Parameter)
        )

    def trains(self, arguments: Iterable[Any]) -> bool:
        """Whether any of a call's arguments is a weight, or made of weights alone, and carries a gradient."""
        tensors = [each for each in arguments if isinstance(each, Tensor) and each.requires_grad]
        known = (self._expressions.find(each) for each in tensors)
        return self.awaits(tensors) or any(each is not None and each.sources for each in known)

    def record_call(self, call: FunctionCall) -> None:
        """Record the uses of weights in a function call that the forward pass made."""
        with self._stopwatch.measure("curvature"):
            self._record_call(call)

    def _record_call(self, call: FunctionCall) -> None:
        expressions = self._expressions
        unread: _Unread | None = None
        arguments, free, transformed = 0, True, is_transformed()
        for argument in call.tensors:
            self._model_calls.trace(argument)
            arguments += 1
            argument = unwrap_transformed(argument) if transformed else argument
            tensor = owner_of(argument)
            owner = id(tensor) if self._whole is None else self._whole.find(tensor)
            if owner in expressions.static:
                unread = unread or _Unread(find_weights(call))
                self._record_parameter(call, argument, owner, unread)
            elif expressions.known:
                if (known := expressions.find(argument)) is not None:
                    unread = unread or _Unread(find_weights(call))
                    unread.sources.update(known.sources)
                else:
                    free = free and expressions.is_free(argument, tensor)
            else:
                free = False
        if self._accumulator.reads_any_function:
            self._follow(call, unread, free and (arguments > 0 or call.function in CONSTANTS), transformed)
        elif unread is not None:
            for layer, reason in unread.reasons.items():
                self._record(layer).unsupported = reason

    def _follow(self, call: FunctionCall, unread: _Unread | None, free: bool, transformed: bool) -> None:
        """Note what is free of samples, and record what no handler reads.

        Args:
            call: the call.
            unread: what no handler reads of it.
            free: whether all of its arguments are free of samples.
            transformed: whether it runs inside of a transform of `torch.func`.
        """
        expressions = self._expressions
        if unread is not None and unread.reasons:
            for layer in unread.together:
                if layer in unread.reasons and layer.trained_bias is not None:
                    unread.add(Source(layer, layer.trained_bias))
        if transformed and unread is not None and unread.sources and torch.is_grad_enabled():
            self._record_function(call, unread)  # what it returns does not say that it carries a gradient
        elif free or (unread is not None and unread.is_view):
            expressions.follow(call, unread.sources if unread is not None else {})
        else:
            if expressions.known:
                expressions.drop(call)
            if unread is not None and unread.sources:
                self._record_function(call, unread)
        if not free and call.time_major is None:
            self._origins.follow(call)

    def _identify(self, tensor: Tensor) -> int:
        """The id of the optimizer's parameter that a tensor is, is a view of, or is all of."""
        owner = owner_of(tensor)
        return id(owner) if self._whole is None else self._whole.find(owner)

    def _as_used(self, layer: Layer) -> Layer:
        """The layer with the parameters that the running call of the model has."""
        return layer if self._whole is None else self._whole.of_layer(layer)

    def _original(self, layer: Layer) -> Layer:
        """The optimizer's layer for one that `_as_used` gave."""
        return layer if self._whole is None else self._whole.original(layer)

    def _record_parameter(self, call: FunctionCall, argument: Tensor, owner: int, unread: _Unread) -> None:
        """Record the use of a parameter, or note that no handler reads it.

        Args:
            call: the call.
            argument: the parameter among its arguments, or a view of it.
            owner: id of the optimizer's parameter that it is; it may be a buffer.
            unread: what no handler reads of this call, which gets more.
        """
        layer, biased = self._layers.get(owner), self._biases.get(owner, ())
        if layer is not None and not (owner in self._awaited and layer.weight.requires_grad):
            layer = None
        if not (layer or biased):
            return
        if layer is None:
            self._find_apart(biased, call, argument, unread)
            return
        layer = self._as_used(layer)
        used = call.passes_gradient_to(argument)
        try:
            if used:
                self._record_use(layer, call, argument, unread.weights)
                return
            unread.is_view = isinstance(call.output, Tensor) and call.output._base is owner_of(argument)
        except NoSampleGradient as reason:
            self._record(layer).unsupported = str(reason)
            return
        except UnsupportedCall as reason:
            unread.reasons[layer] = str(reason)
        unread.add(Source(layer, layer.weight))

    def _find_apart(self, layers: Sequence[Layer], call: FunctionCall, bias: Tensor, unread: _Unread) -> None:
        """Find the layers of a bias that a call takes without their weight, with which it is a column of the matrix.

        What ``torch.cat`` joins may be cut apart again for calls that take both.
        """
        if call.function is torch.cat:
            return
        weights = [self._layers.get(self._identify(each)) for each in unread.weights if isinstance(each, Tensor)]
        together = [layer for layer in layers if layer in weights]
        if together:
            unread.together += map(self._as_used, together)
            return
        used = call.passes_gradient_to(bias)
        for layer in layers:
            awaited = id(layer.weight) in self._awaited
            layer = self._as_used(layer)
            if awaited and layer.trained_bias is not None:
                unread.add(Source(layer, layer.trained_bias))
                if used:
                    unread.reasons.setdefault(layer, f"is used apart from its bias, which {call.name} takes")

    def _record_use(self, layer: Layer, call: FunctionCall, argument: Tensor, weights: Sequence[Any]) -> None:
        """Await the gradient of the output of a call that uses a layer's weight.

        Args:
            layer: whose weight it is.
            call: the call.
            argument: the tensor among its arguments that is the weight, or a view of it.
            weights: what the call may take as weight, see `find_weights`.

        Raises:
            UnsupportedCall: of which the factors are not known.
        """
        if is_transformed():
            raise UnsupportedCall("is used inside a transform of torch.func")
        if argument is not weights[0] if len(weights) == 1 else not any(argument is each for each in weights):
            raise UnsupportedCall(f"is used by {call.name}")
        if any(each.is_nested and each.layout != torch.jagged for each in call.tensors):
            raise UnsupportedCall("is used on a nested tensor whose layout is not torch.jagged")
        try:
            op_call = parse_call(layer, call, argument, self._input_shapes.get(self._original(layer)))
        except _UNREADABLE as error:
            raise UnsupportedCall(f"is used by {call.name} in a way that is not known ({error})") from error
        self._accumulator.check(op_call)
        batch_dim = layer.batch_dim if call.time_major is None else 1
        self._await_use(layer, call, op_call, op_call.source, batch_dim, call.output.dtype)

    def _record_function(self, call: FunctionCall, unread: _Unread) -> None:
        """Await the gradient of the output of a call that no handler reads, for every layer that it carries one to."""
        sources, reasons = unread.sources, unread.reasons
        carries = any(each.requires_grad for each in outputs_of(call))
        if not (carries or is_transformed() or reasons):
            return
        for layer in {source.layer: None for source in sources.values()}:
            own = [source for source in sources.values() if source.layer is layer]
            try:
                if is_transformed():
                    raise UnsupportedCall("is used inside a transform of torch.func")
                if any(each.is_nested for each in call.tensors):
                    raise UnsupportedCall(reasons.get(layer, f"is used by {call.name} on a nested tensor"))
                if any(each.layout != torch.strided for each in call.tensors):
                    raise UnsupportedCall(reasons.get(layer, f"is used by {call.name} on a sparse tensor"))
                if not isinstance(call.output, Tensor):
                    raise UnsupportedCall(f"is used by {call.name}, which returns several tensors")
                again = parse_function(call, own, self._expressions)
                self._await_use(layer, call, again.op_call, again.source, again.op_call.dim, again.dtype)
            except UnsupportedCall as reason:
                self._record(layer).unsupported = reasons.get(layer, str(reason))

    def _await_use(
        self,
        layer: Layer,
        call: FunctionCall,
        op_call: OpCall,
        source: Tensor,
        batch_dim: int,
        dtype: torch.dtype,
    ) -> None:
        """Await the gradient of a call's output.

        Args:
            layer: whose weight it is.
            call: the call.
            op_call: as it was parsed.
            source: what the samples are a dimension of.
            batch_dim: that dimension.
            dtype: that the call was computed in.
        """
        index, size = self.sample_index, op_call.samples
        knows_samples = layer.knows_samples and call.time_major is not None
        if index is not None and knows_samples and (size != 1 or not index.is_one(layer.module)):
            index = None
        named = index is not None and index.index_of(layer.module) is not None
        told = layer.bare or not op_call.is_read
        followed = None
        if told and not named and self._sampling.samples == "batch":
            followed = self._origins.find_samples(call, op_call, layer.batch_dim)
        if followed is not None:
            rows, size = followed
            index = SampleIndex({"*": rows}, count=size)
        as_many = told and self.sample_index is None
        picked = None if told or layer.batch_dim else self._origins.find_rows(source)
        self._model_calls.add_use(layer, size, op_call.unbatched, call.time_major, op_call.leading, as_many, picked)
        if op_call.unbatched and isinstance(source, Tensor) and source.dim() > 1:
            self._model_calls.add_unbatched()
        self._await_gradient(
            layer,
            call,
            WeightUse(
                call=op_call,
                output_shape=call.output.shape,
                dtype=dtype,
                accumulator=torch.autograd.graph.get_gradient_edge(layer.weight).node,
                sample_index=index,
                is_followed=followed is not None,
                batch_dim=batch_dim,
                size=size,
                inside=call.time_major,
                model_call=self._model_calls.current,
                recomputed_in=self._model_calls.backward,
                versions=record_versions(call),
            ),
        )

    def _await_gradient(self, layer: Layer, call: FunctionCall, use: WeightUse) -> None:
        record = self._record(layer, call.output)
        record.accumulator = use.accumulator  # of older uses too, if their graph is alive
        record.pending.add(use)
        hook = partial(_receive_gradient, weakref.ref(self), use)  # weakly: a loss that is kept would keep the recorder
        output = _hooked_tensor(call.output)
        if self._whole is None or use.call.is_read or output.grad_fn is None:
            output.register_hook(hook)  # type: ignore[no-untyped-call]
        else:  # the weights are needed, which a hook of `fully_shard` on the same tensor gathers before this one
            output.grad_fn.register_prehook(partial(_receive_one, hook, output.output_nr))

    def _record(self, layer: Layer, output: Tensor | None = None) -> LayerRecord:
        """The record of a layer; a new one where there is none, or where the layer's matrix has another shape now."""
        shape = layer.shape(self._sampling.block_size)
        record = self._records.get(layer)
        if record is None or record.statistic.shape != shape:
            record = self._records[layer] = LayerRecord(layer, self._accumulator.statistic(shape))
            if self._sampling.partial_capture == "base":
                elements = 0 if output is None else output.values().numel() if output.is_nested else output.numel()
                entries = sample_entries(layer, shape, elements, self._random, self._tuning)
                record.comparison = self._start_comparison(layer, layer.weight, entries)
                if layer.bias is not None and (bias_entries := choose_bias_entries(layer, entries)) is not None:
                    record.bias_comparison = self._start_comparison(layer, layer.bias, bias_entries)
                    if layer.bias.requires_grad and not is_transformed():
                        record.bias_accumulator = torch.autograd.graph.get_gradient_edge(layer.bias).node
        return record

    def _start_comparison(self, layer: Layer, parameter: Tensor, entries: ComparedEntries) -> Comparison:
        """Compare what is captured of a layer with the gradient that backward passes bring to one of its parameters."""
        if parameter.requires_grad and (layer, id(parameter)) not in self._hooked:
            self._hooked.add((layer, id(parameter)))
            hook = partial(_compare_gradient, weakref.ref(self), layer, parameter)
            self._weight_hooks.append(WeightHook(parameter, hook))
        return Comparison(entries)

    # Backward: gradients of outputs, and of weights ---------------------------------------------------------------

    def receive_gradient(self, use: WeightUse, gradient: Tensor) -> None:
        """Take the gradient of a call's output, in a backward pass that also reaches the weight."""
        record = self._records.get(use.call.layer)
        if use.returned or record is None or not accumulates(use.accumulator):
            return
        self._model_calls.release_frame()
        backward_pass = backward_pass_number()
        if record.backward_pass != backward_pass:
            self._reduce(record, record.captured)
            self._drop_stale(record)
            self._check_checkpoint(record, use, backward_pass)
            record.backward_pass = backward_pass
        record.pending.discard(use)
        use.add_gradient(gradient)
        if retains_graph():
            record.retained.add(use)
        else:
            self._finish(record, use)

    def compare_gradient(self, layer: Layer, parameter: Tensor, gradient: Tensor) -> None:
        """Take the gradient that a backward pass brings to a layer's weight or bias."""
        record = self._records.get(layer)
        if record is None or record.accumulator is None or record.unsupported is not None:
            return
        is_bias = parameter is not layer.weight
        comparison = record.bias_comparison if is_bias else record.comparison
        accumulator = record.bias_accumulator if is_bias else record.accumulator
        if comparison is None or accumulator is None or not accumulates(accumulator):
            return
        if comparison.is_empty and parameter.grad is not None:
            # What is there before the first backward pass of a captured use has another source, or is zero.
            comparison.add_gradient(parameter.grad.detach())
        comparison.add_gradient(gradient.detach() if gradient.requires_grad else gradient)

    def _finish(self, record: LayerRecord, use: WeightUse) -> None:
        """Capture the factors of a use whose gradient is complete, and sum those of the samples that are."""
        record.retained.discard(use)
        gradient = use.take_gradient()
        try:
            if gradient is not None and gradient.numel() and record.unsupported is None:
                # An empty batch, or sequences of length zero, have nothing to sum.
                self._capture(record, use, gradient)
            samples = self._samples_of(use)
            captured = [each for each in record.captured if self._samples_of(each.use) == samples]
            if self._sampling.samples == "batch" and self._sampling.model_calls == "separate":
                _check_order({each.use.inside for each in captured})
            awaited = any(self._samples_of(each) == samples for each in (*record.pending, *record.retained))
            waits = len(record.captured) == 1 and self._accumulator.waits(record.captured[0].pair)
            if (self._sampling.samples == "rows" or not awaited) and not waits:
                self._reduce(record, captured)
        except UnsupportedCall as reason:
            record.unsupported = str(reason)
        except torch.OutOfMemoryError:
            raise
        except _UNREADABLE as error:
            record.unsupported = f"could not be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        finally:
            use.release()

    def _capture(self, record: LayerRecord, use: WeightUse, gradient: Tensor) -> None:
        if use.input_was_overwritten():
            raise UnsupportedCall("had its input overwritten in place between forward and backward")
        with torch.no_grad(), without_autocast([gradient.device.type]):
            index, source = use.sample_index, use.call.source
            if isinstance(source, Tensor) and source.is_nested:
                if index is None and self._sampling.samples == "batch":
                    index = SampleIndex.of_jagged(source)
                pairs = use.call.pairs(source.values(), gradient.values())
            else:
                pairs = use.call.pairs(source, gradient.reshape(use.output_shape))
            numbers = None if index is None else index.index_of(record.layer.module)
            if (numbers is None or use.is_followed) and self._sampling.samples == "batch":
                doubt = self._model_calls.find_doubt(use.model_call, record.layer, use.size, use.is_followed)
                if doubt is not None:
                    raise UnsupportedCall(doubt)
            for pair, rows in pairs:
                record.compare_use(pair, use.dtype, self._tuning)
                if index is not None and numbers is not None:
                    pair = self._regroup(record.layer, use, pair, index, numbers if rows is None else numbers[rows])
                record.captured.append(CapturedPair(use, pair, rows is not None and numbers is None))

    def _regroup(
        self, layer: Layer, use: WeightUse, pair: FactorPair, index: SampleIndex, numbers: Tensor
    ) -> FactorPair:
        """A pair with its rows assigned to the samples that an index names."""
        if not use.call.is_read and numbers.dim() > 1:  # differentiated element by element of the batch
            numbers = numbers.movedim(min(use.batch_dim, numbers.dim() - 1), 0).flatten(1).amax(1)
        return self._accumulator.regroup(pair, numbers, use.batch_dim, index.samples, layer.name)

    def _samples_of(self, use: WeightUse) -> int:
        """A number that uses share which are by the same samples; those of other sizes may have it too."""
        return self._model_calls.root(use.model_call, use.size)

    def _check_checkpoint(self, record: LayerRecord, use: WeightUse, backward_pass: int) -> None:
        """Leave a layer to the base of which a backward pass brings some gradients in those of its checkpoints."""
        outer_pass = backward_pass if use.recomputed_in < 0 else use.recomputed_in
        together = self._sampling.samples == "batch" and self._sampling.model_calls != "apart"
        if together and outer_pass == record.outer_pass:
            record.unsupported = CHECKPOINTS
        record.outer_pass = outer_pass

    def _drop_stale(self, record: LayerRecord) -> None:
        """Drop the sums of a backward pass whose gradients are gone: a skipped step, then ``model.zero_grad()``.

        Gradients of zeros, where sums are not zero, are gone too: ``set_to_none=False``. It synchronizes with the
        device, on the second backward pass of a curvature step and those after it. Of a sharded weight, whose zeros
        another process may not have, only a gradient that is nowhere is gone; `fully_shard` keeps one of another
        dtype that awaits the next backward pass where nobody else finds it, and one to be reduced over replicas.
        """
        if not (record.statistic.used or record.retained):
            return
        gradient = record.layer.weight.grad
        if (original := self._original(record.layer)) is not record.layer:
            assert self._whole is not None
            may_be_gone = original.weight.dtype == record.layer.weight.dtype
            is_nowhere = gradient is None and original.weight.grad is None
            if may_be_gone and is_nowhere and not self._whole.is_kept_back(original, backward_pass_number()):
                record.discard()
            return
        if gradient is None or (is_zero(gradient) and not record.statistic.is_zero()):
            record.discard()

    def _reduce(self, record: LayerRecord, captured: Sequence[CapturedPair]) -> None:
        """Sum the samples of ``captured``, which are among the record's."""
        record.captured = [each for each in record.captured if each not in captured]
        if captured and record.unsupported is None:
            self._add_(record, self._find_additions(record, captured))

    def _reduce_all(self, records: Iterable[LayerRecord]) -> None:
        """Sum all that is captured, small layers together."""
        additions: dict[LayerRecord, list[Addition]] = {}
        for record in records:
            if record.captured and record.unsupported is None:
                additions[record] = self._find_additions(record, record.captured)
            record.captured = []
        single = [each[0] for each in additions.values() if len(each) == 1]
        with torch.no_grad(), without_autocast({each.layer.weight.device.type for each in single}):
            left = set(map(id, self._accumulator.add_together_(single))) if single else set()
        for record, of_record in additions.items():
            if len(of_record) > 1 or id(of_record[0]) in left:
                self._add_(record, of_record)

    def _find_additions(self, record: LayerRecord, captured: Sequence[CapturedPair]) -> list[Addition]:
        """The uses by the same samples: of calls that see the same, those with equally many are."""
        together: dict[tuple[object, int], list[FactorPair]] = {}
        for number, each in enumerate(captured):
            if self._sampling.samples == "rows" or each.is_apart:
                key: tuple[object, int] = number, 0
            elif self._sampling.model_calls == "apart" and each.use.sample_index is None:
                key = each.use.inside or number, 0
            else:
                key = each.pair.rows.samples, self._samples_of(each.use)
            together.setdefault(key, []).append(each.pair)
        return [Addition(record.layer, record.statistic, pairs) for pairs in together.values()]

    def _add_(self, record: LayerRecord, additions: Sequence[Addition]) -> None:
        try:
            with torch.no_grad(), without_autocast([record.layer.weight.device.type]):
                for addition in additions:
                    self._accumulator.add_(*addition)
        except UnsupportedCall as reason:
            record.unsupported = str(reason)

    # The end of the step ------------------------------------------------------------------------------------------

    def collect(self) -> dict[Layer, Statistic]:
        """What was summed since the last `discard`, for the layers whose gradients came back and are complete."""
        with self._stopwatch.measure("curvature"):
            records = self._records
            for record in records.values():
                for use in list(record.retained):
                    self._finish(record, use)
            self._reduce_all(records.values())
            self._unsupported = {
                layer: reason if reason in DOUBTS else f"{reason}, {self._accumulator.missing}"
                for layer, record in records.items()
                if (reason := record.unsupported) is not None
            }
            self._unsupported.update(self._find_incomplete())
        collected = {
            layer: record.statistic
            for layer, record in records.items()
            if record.statistic.used and layer not in self._unsupported
        }
        if self._whole is None:
            return collected
        self._unsupported = {self._whole.original(layer): reason for layer, reason in self._unsupported.items()}
        return {self._whole.original(layer): statistic for layer, statistic in collected.items()}

    def unsupported(self) -> dict[Layer, str]:
        """The layers that the latest `collect` left out, with the reason."""
        return self._unsupported

    def _find_incomplete(self) -> dict[Layer, str]:
        """The layers whose gradient is not the sum of what was captured, with the reason. Synchronizes once."""
        records = [record for layer, record in self._records.items() if layer not in self._unsupported]
        compared = [(record, comparison) for record in records for comparison in record.comparisons()]
        doubtful = [
            _doubtful_gradient(record) if comparison is record.comparison else None for record, comparison in compared
        ]
        values = read_values([each.vectors(gradient) for (_, each), gradient in zip(compared, doubtful, strict=True)])
        incomplete: dict[Layer, str] = {}
        for (record, comparison), gradient, known in zip(compared, doubtful, values, strict=True):
            if gradient is not None and not comparison.is_multiple(known):
                return dict.fromkeys(self._layers.values(), BY_HAND)
            if not comparison.is_empty and not comparison.is_complete(known):
                reason = INCOMPLETE if comparison is record.comparison else INCOMPLETE_BIAS
                incomplete.setdefault(record.layer, reason)
        return incomplete


def _check_order(inside: set[TimeMajor | None]) -> None:
    """Refuse uses by the same samples in several recurrent calls of which any is on packed sequences."""
    if len(inside) > 1 and any(each is not None and each.is_sorted for each in inside):
        raise UnsupportedCall(ORDER)


def _receive_gradient(recorder: weakref.ref[Recorder], use: WeightUse, gradient: Tensor) -> None:
    if (alive := recorder()) is not None:
        with alive._stopwatch.measure("curvature"):
            alive.receive_gradient(use, gradient)


def _receive_one(hook: Callable[[Tensor], None], place: int, gradients: tuple[Tensor | None, ...]) -> None:
    if (gradient := gradients[place]) is not None:
        hook(gradient)


def _compare_gradient(recorder: weakref.ref[Recorder], layer: Layer, parameter: Tensor, gradient: Tensor) -> None:
    if (alive := recorder()) is not None:
        with alive._stopwatch.measure("curvature"):
            alive.compare_gradient(layer, parameter, gradient)


def _release(handles: Iterable[RemovableHandle], hooks: list[WeightHook]) -> None:
    for handle in handles:
        handle.remove()
    _remove(hooks)
    release_eager()


def _remove(hooks: list[WeightHook]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _hooked_tensor(output: Tensor) -> Tensor:
    """The tensor to hook for an output that may be a view of another shape, as those of linear layers on sequences are.

    A view that is changed in place leaves the graph, and its hook with it; what it was a view of stays.
    """
    base = output._base
    if base is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base


def _doubtful_gradient(record: LayerRecord) -> Tensor | None:
    """A layer's gradient, where some that came before it were thrown away, so that it may be made of those.

    Several processes average their gradients, which are multiples of no single process's.
    """
    return record.layer.weight.grad if record.discarded and world_size() == 1 else None


__all__ = ["BY_HAND", "INCOMPLETE", "Recorder"]
