"""Recording the uses of a model's weights on curvature steps, and only then.

While armed, a function mode is on inside the calls of the model (or of one of its layers, where layers are called one
by one). It gets every function call that takes a layer's weight, whoever makes it: the layer itself, a subclass that
wraps more around it, attention, or a functional use of another module's weight. Where a handler reads the call, the
factors come from what goes in and out; any other function is differentiated again. What becomes of a use then is for
`CapturedUses` to say.

Nothing is registered on the model itself but hooks on its weights while their gradients are awaited, so that it can be
copied and pickled at any time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngplus._torch_internals import (
    find_accumulator,
    is_autocast_enabled,
    is_current_mode,
    is_dual,
    is_transformed,
    is_watched,
    keeps_parametrized,
    unwrap_transformed,
)
from ngplus.capture.accumulator import Accumulator, Sampling, Statistic
from ngplus.capture.captured_uses import UNREADABLE, CapturedUses, remove_hooks
from ngplus.capture.contractions import NoSampleGradient, UnsupportedCall
from ngplus.capture.expressions import CONSTANTS, LOOSE, Expressions, Source, find_outputs
from ngplus.capture.function_gradients import parse_function
from ngplus.capture.function_mode import CaptureMode, FunctionCall, TimeMajor, find_owner
from ngplus.capture.model_calls import ModelCalls, find_counts
from ngplus.capture.op_handlers import OpCall, find_weights, parse_call
from ngplus.capture.products import Product
from ngplus.capture.row_origins import RowOrigins
from ngplus.capture.sample_index import SampleIndex
from ngplus.capture.weight_use import WeightHook, WeightUse, record_versions
from ngplus.capture.whole_weights import WholeWeights
from ngplus.dtensors import is_sharded
from ngplus.guards.compile_guard import hold_eager, release_eager
from ngplus.guards.join import is_joinable
from ngplus.guards.wrappers import runs_other_method
from ngplus.layers import Layer
from ngplus.profiling import Stopwatch
from ngplus.tuning import DEFAULT, Tuning


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
        self._modules: frozenset[int] = frozenset()
        self._awaited: frozenset[int] = frozenset()
        self._biases: dict[int, list[Layer]] = {}
        self._shaping: dict[int, list[Layer]] = {}
        self._input_shapes: dict[Layer, torch.Size | None] = {}
        self._is_read = False
        self._reading = threading.Lock()
        self._outermost = _OutermostCall()
        self._model_calls = ModelCalls(sampling.model_calls)
        self._uses = CapturedUses(
            list(self._layers.values()), sampling, accumulator, self._model_calls, self._whole, stopwatch, tuning
        )
        self._expressions = Expressions()
        self._origins = RowOrigins()
        self._handles: list[RemovableHandle] = []
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
        self._modules = frozenset(map(id, self._model.modules()))
        self._forget()
        self._is_read = False
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
        self._finalizer = weakref.finalize(self, _release, self._handles, self._uses.weight_hooks)
        self._finalizer.atexit = False

    def _read_model(self) -> None:
        """Note what the model consists of: on its first call, since it may have changed after the step before."""
        with self._reading:
            if self._is_read:
                return
            modules = dict(self._model.named_modules())
            self._modules = frozenset(map(id, modules.values()))
            self._biases, self._shaping = {}, {}
            for layer in self._layers.values():
                if layer.bias is not None:
                    self._biases.setdefault(id(layer.bias), []).append(layer)
                if layer.flattens or layer.knows_samples:
                    self._shaping.setdefault(id(modules.get(layer.module)), []).append(layer)
            self._expressions = Expressions(modules.values())
            self._model_calls.follow(modules.values())
            self._is_read = True

    def disarm(self) -> None:
        """Record nothing any more, and forget everything."""
        if self.armed:
            self._finalizer()
            self._handles = []
            self._forget()

    def discard(self) -> None:
        """Forget what was summed so far, but not the forward passes whose backward is still to come."""
        self._uses.discard()

    def _forget(self) -> None:
        """Forget forward passes too, and leave one that was cut short by something like `KeyboardInterrupt`."""
        self._uses.clear()
        if self._whole is not None:
            self._whole.forget()
        self._unsupported = {}
        self._input_shapes = {}
        self._model_calls.clear()
        self._expressions.clear()
        self._origins.clear()
        outermost = self._outermost
        if outermost.mode is not None and is_current_mode(outermost.mode):
            outermost.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        outermost.module = outermost.mode = None

    def _forget_call(self) -> None:
        """Forget what is known of tensors that the model's call has made, but for weights that the next one may use."""
        self._origins.clear()
        if not keeps_parametrized():
            self._expressions.clear()

    # Forward: calls of the model, and function calls in them ------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_joinable(module):
            self.joinables.add(module)
        outermost = self._outermost
        is_outermost = (
            outermost.module is None
            and id(module) in self._modules
            and torch.is_grad_enabled()
            and not is_transformed()
            and not runs_other_method(module)
        )
        if is_outermost and not self._is_read:
            self._read_model()
        elif outermost.module is None and not torch.is_grad_enabled():
            self._model_calls.note_pass()
        if (layers := self._shaping.get(id(module))) is not None:
            shape = args[0].shape if args and isinstance(args[0], Tensor) else None
            self._input_shapes.update(dict.fromkeys(layers, shape))
        if outermost.module is module:
            outermost.depth += 1
        elif is_outermost:
            mode = CaptureMode(weakref.ref(self))
            outermost.module, outermost.depth, outermost.mode = module, 1, mode
            if self._expressions.known and not keeps_parametrized():  # as it was in the call before
                self._expressions.clear()
            self._model_calls.begin(args)
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
            self._model_calls.end(each.value for each in self._expressions.known.values())
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

    def sums_gradients_of(self, product: Product, time_major: TimeMajor | None) -> bool:
        """Whether the gradient of a product's weight may be found on the way to the curvature.

        Where a sample has few positions its gradient is not formed, see `ngplus.curvature.second_moment`.
        """
        layer = self._layers.get(id(product.weight))
        if layer is None or self._whole is not None or id(product.weight) not in self._awaited:
            return False
        positions = product.count_positions(layer.batch_dim if time_major is None else 1)
        return (
            4 * positions >= min(layer.matrix[1:])
            and self._accumulator.sums_gradients
            and self._sampling.samples == "batch"
            and product.weight.requires_grad
            and torch.is_grad_enabled()
            and not (is_transformed() or is_dual() or is_autocast_enabled() or is_watched())
        )

    def record_call(self, call: FunctionCall) -> None:
        """Record the uses of weights in a function call that the forward pass made."""
        with self._stopwatch.measure("curvature"):
            self._record_call(call)

    def _record_call(self, call: FunctionCall) -> None:
        expressions = self._expressions
        unread: _Unread | None = None
        arguments, free, transformed = 0, True, is_transformed()
        loose, is_read = False, False
        for argument in call.tensors:
            self._model_calls.trace(argument)
            arguments += 1
            argument = unwrap_transformed(argument) if transformed else argument
            tensor = find_owner(argument)
            owner = id(tensor) if self._whole is None else self._whole.find(tensor)
            if owner in expressions.static:
                unread = unread or _Unread(find_weights(call))
                is_read |= self._record_parameter(call, argument, owner, unread)
            elif expressions.is_loose(argument, tensor):
                loose = True
            elif expressions.known:
                if (known := expressions.find(argument)) is not None:
                    unread = unread or _Unread(find_weights(call))
                    unread.sources.update(known.sources)
                else:
                    free = free and expressions.is_free(argument, tensor)
            else:
                free = False
        loose = loose or (arguments == 0 and call.function in LOOSE)
        free = free and (arguments > 0 or loose or call.function in CONSTANTS)
        if free and loose and unread is not None and (is_read or unread.sources):
            free, loose = not is_read and self._keeps_shape(call, unread), False
        if self._accumulator.reads_any_function:
            self._follow(call, unread, free, loose, transformed)
            return
        for layer, reason in unread.reasons.items() if unread is not None else ():
            self._uses.refuse(layer, call, reason)
        if free:
            expressions.follow(call, {}, loose=loose)
        else:
            expressions.drop(call)

    def _keeps_shape(self, call: FunctionCall, unread: _Unread) -> bool:
        """Whether what a call returns has the shape of an argument that carries a gradient to weights."""
        carrying = {id(source.parameter) for source in unread.sources.values()}
        shape = call.output.shape if isinstance(call.output, Tensor) else None
        return any(
            each.shape == shape
            for each in call.tensors
            if id(find_owner(each)) in carrying or ((known := self._expressions.find(each)) and known.sources)
        )

    def _follow(self, call: FunctionCall, unread: _Unread | None, free: bool, loose: bool, transformed: bool) -> None:
        """Note what is free of samples, and record what no handler reads.

        Args:
            call: the call.
            unread: what no handler reads of it.
            free: whether all of its arguments are free of samples.
            loose: whether what it returns may hold samples after all.
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
            expressions.follow(call, unread.sources if unread is not None else {}, loose=free and loose)
        else:
            expressions.drop(call)
            if unread is not None and unread.sources:
                self._record_function(call, unread)
        if self._sampling.samples == "batch" and (loose or not free) and call.time_major is None:
            self._origins.follow(call)

    def _identify(self, tensor: Tensor) -> int:
        """The id of the optimizer's parameter that a tensor is, is a view of, or is all of."""
        owner = find_owner(tensor)
        return id(owner) if self._whole is None else self._whole.find(owner)

    def _as_used(self, layer: Layer) -> Layer:
        """The layer with the parameters that the running call of the model has."""
        return layer if self._whole is None else self._whole.of_layer(layer)

    def _original(self, layer: Layer) -> Layer:
        """The optimizer's layer for one that `_as_used` gave."""
        return layer if self._whole is None else self._whole.original(layer)

    def _record_parameter(self, call: FunctionCall, argument: Tensor, owner: int, unread: _Unread) -> bool:
        """Record the use of a parameter, or note that no handler reads it.

        Args:
            call: the call.
            argument: the parameter among its arguments, or a view of it.
            owner: id of the optimizer's parameter that it is; it may be a buffer.
            unread: what no handler reads of this call, which gets more.

        Returns:
            Whether a handler reads its use.
        """
        layer, biased = self._layers.get(owner), self._biases.get(owner, ())
        if layer is not None and not (owner in self._awaited and layer.weight.requires_grad):
            layer = None
        if layer is None:
            if biased:
                self._find_apart(biased, call, argument, unread)
            return False
        layer = self._as_used(layer)
        used = call.passes_gradient_to(argument)
        if not (used or torch.is_grad_enabled()):
            self._model_calls.note_hidden()
        try:
            if used:
                self._record_use(layer, call, argument, unread.weights)
                return True
            unread.is_view = isinstance(call.output, Tensor) and call.output._base is find_owner(argument)
        except NoSampleGradient as reason:
            self._uses.refuse(layer, call, str(reason))
            return False
        except UnsupportedCall as reason:
            unread.reasons[layer] = str(reason)
        unread.add(Source(layer, layer.weight))
        return False

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
            awaited = id(layer.weight) in self._awaited and layer.weight.requires_grad
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
        except UNREADABLE as error:
            raise UnsupportedCall(f"is used by {call.name} in a way that is not known ({error})") from error
        self._accumulator.check(op_call)
        batch_dim = layer.batch_dim if call.time_major is None else 1
        self._await_use(layer, call, op_call, op_call.source, batch_dim, call.output.dtype)

    def _is_one_sample(self, layer: Layer, source: Any, size: int) -> bool:
        """Whether a layer gets something free of samples, as positions, that is not as long as the batch."""
        is_free = isinstance(source, Tensor) and self._expressions.is_free(source, find_owner(source))
        return is_free and size > 1 and not self._model_calls.may_be_samples(layer, size)

    def _record_function(self, call: FunctionCall, unread: _Unread) -> None:
        """Await the gradient of the output of a call that no handler reads, for every layer that it carries one to."""
        sources, reasons = unread.sources, unread.reasons
        outputs = list(find_outputs(call))
        carries = any(each.requires_grad for each in outputs)
        if not (carries or is_transformed() or reasons) or not any(each.numel() for each in outputs):
            return  # of no rows, as an expert may get, there is nothing to sum
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
                has_weight = any(source.parameter is layer.weight for source in own)
                self._uses.refuse(layer, call, str(reason) if has_weight else reasons.get(layer, str(reason)))

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
        named = index is not None and index.find_index(layer.module) is not None
        told = layer.bare or not op_call.is_read
        followed, is_shared = None, False
        if not named and self._sampling.samples == "batch":
            if told:
                followed = self._origins.find_samples(call, op_call, layer.batch_dim)
            elif call.time_major is None and self._is_one_sample(layer, source, size):
                followed, is_shared = (torch.zeros(size, dtype=torch.long, device=call.output.device), 1), True
        if followed is not None:
            rows, size = followed
            index = SampleIndex({"*": rows}, count=size)
        as_many = told and self.sample_index is None
        picked = None if told or layer.batch_dim else self._origins.find_rows(source)
        if not is_shared:
            self._model_calls.add_use(layer, size, op_call.unbatched, call.time_major, op_call.leading, as_many, picked)
        if op_call.unbatched and isinstance(source, Tensor) and source.dim() > 1:
            self._model_calls.add_unbatched()
        is_products = call.total is not None and call.total.weight is layer.weight and op_call.is_read
        self._uses.await_gradient(
            layer,
            call,
            WeightUse(
                call=op_call,
                output_shape=call.output.shape,
                dtype=dtype,
                accumulator=find_accumulator(layer.weight),
                sample_index=index,
                is_followed=followed is not None,
                is_shared=is_shared,
                batch_dim=batch_dim,
                size=size,
                total=call.total if index is None and is_products else None,
                inside=call.time_major,
                model_call=self._model_calls.current,
                recomputed_in=self._model_calls.backward,
                versions=record_versions(call),
            ),
        )

    # The end of the step ------------------------------------------------------------------------------------------

    def collect(self) -> dict[Layer, Statistic]:
        """What was summed since the last `discard`, for the layers whose gradients came back and are complete."""
        with self._stopwatch.measure("curvature"):
            collected, self._unsupported = self._uses.collect()
        if self._whole is None:
            return collected
        self._unsupported = {self._whole.original(layer): reason for layer, reason in self._unsupported.items()}
        return {self._whole.original(layer): statistic for layer, statistic in collected.items()}

    def unsupported(self) -> dict[Layer, str]:
        """The layers that the latest `collect` left out, with the reason."""
        return self._unsupported


def _release(handles: Iterable[RemovableHandle], hooks: list[WeightHook]) -> None:
    for handle in handles:
        handle.remove()
    remove_hooks(hooks)
    release_eager()


__all__ = ["Recorder"]
