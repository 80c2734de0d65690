"""Uses of weights from the forward pass to the sums over their samples.

A use waits for the gradient of its output, in a hook on it. When that comes back its factors are captured, compared
with the gradient that the same backward pass brings to the weight, and summed as soon as the uses by the same samples
are there, so that nothing is kept. Tensor hooks survive in-place activations, and a forward pass whose backward never
comes leaves nothing behind, since everything hangs on its graph.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ngplus._torch_internals import (
    accumulates,
    as_plain,
    at_end_of_backward,
    backward_pass_number,
    find_accumulator,
    is_transformed,
    retains_graph,
)
from ngplus.capture.accumulator import Accumulator, Addition, Sampling, Statistic
from ngplus.capture.contractions import UnsupportedCall
from ngplus.capture.expressions import find_outputs
from ngplus.capture.function_mode import FunctionCall, TimeMajor
from ngplus.capture.model_calls import CHECKPOINTS, DOUBTS, ORDER, PASSES, SIZES, ModelCalls
from ngplus.capture.sample_index import SampleIndex
from ngplus.capture.weight_use import CapturedPair, LayerRecord, WeightHook, WeightUse
from ngplus.capture.whole_weights import WholeWeights
from ngplus.comparison.completeness import Comparison, read_values
from ngplus.comparison.entries import ComparedEntries
from ngplus.comparison.sampling import choose_bias_entries, sample_entries
from ngplus.curvature.all_reduce import world_size
from ngplus.factors.pair import FactorPair
from ngplus.guards.amp import without_autocast
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

CHANGED = (
    "has a gradient that was changed between the backward passes of a step, so that it is not the sum of what they "
    "brought; scale the losses, or clip after the last of them"
)
"""Why a layer is left to the base whose accumulated gradient was scaled or clipped before all of it was there."""

OVERWRITTEN = (
    "had an input, or the gradient of an output, overwritten in place before all uses by the same samples were there; "
    "overwrite it after the last backward pass of the model's call"
)
"""Why a layer is left to the base of whose uses some were captured and gone when the last of them came."""

_NO_PASS = -1
"""`backward_pass_number` where no backward pass is running: on the step."""

_TOLD = DOUBTS | {CHANGED, OVERWRITTEN}
"""Reasons that say what is to be done."""

UNREADABLE = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError)
"""What a handler may raise of a layout or a dtype that it does not expect; it must not end the backward pass."""


class CapturedUses:
    """The uses of a model's weights since the optimizer's last step, and what was summed of them.

    Args:
        layers: whose uses they are.
        sampling: see `Sampling`.
        accumulator: sums what is captured.
        model_calls: which calls see the same samples.
        whole: the whole weights of a sharded model; None of others.
        stopwatch: gets the seconds spent on curvature.
        tuning: of the comparison with the gradient.

    Attributes:
        weight_hooks: on the weights whose gradients are compared.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sampling: Sampling,
        accumulator: Accumulator,
        model_calls: ModelCalls,
        whole: WholeWeights | None,
        stopwatch: Stopwatch,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self._layers = layers
        self._sampling = sampling
        self._accumulator = accumulator
        self._model_calls = model_calls
        self._whole = whole
        self._stopwatch = stopwatch
        self._tuning = tuning
        self._records: dict[Layer, LayerRecord] = {}
        self._hooked: set[tuple[Layer, int]] = set()
        self._random = random.Random(0)
        self._doubted: set[Layer] = set()
        self._waiting: list[LayerRecord] = []
        self._ending = _NO_PASS
        self.weight_hooks: list[WeightHook] = []

    def discard(self) -> None:
        """Forget what was summed so far, but not the uses whose gradients are still to come."""
        for record in self._records.values():
            record.discard()

    def clear(self) -> None:
        """Forget everything, and leave the weights as they were."""
        self._records = {}
        self._waiting = []
        remove_hooks(self.weight_hooks)
        self._hooked = set()

    # Forward: what is awaited -------------------------------------------------------------------------------------

    def refuse(self, layer: Layer, call: FunctionCall, reason: str) -> None:
        """Leave a layer to the base that a call uses in a way that cannot be captured, once a gradient comes back.

        Args:
            layer: the layer.
            call: the call.
            reason: why not.
        """
        record = self._record(layer)
        nodes = {each.grad_fn for each in find_outputs(call) if each.grad_fn is not None}
        if not nodes or is_transformed():  # whose outputs do not tell what the transform makes of them
            record.refused = record.unsupported = reason
            return
        if record.accumulator is None and layer.weight.requires_grad:
            record.accumulator = find_accumulator(layer.weight)
        hook = partial(_receive_refused, weakref.ref(self), layer, reason)
        for node in nodes:
            node.register_prehook(hook)

    def await_gradient(self, layer: Layer, call: FunctionCall, use: WeightUse) -> None:
        """Await the gradient of the output of a call that uses a layer's weight."""
        record = self._record(layer, call.output)
        record.accumulator = use.accumulator  # of older uses too, if their graph is alive
        record.pending.add(use)
        hook = partial(_receive_gradient, weakref.ref(self), use)  # weakly: a loss that is kept would keep this
        output = _hooked_tensor(call.output)
        if output.grad_fn is None:
            output.register_hook(hook)  # type: ignore[no-untyped-call]
        else:  # after all hooks on the tensor: those that change its gradient, and what gathers the weights of a shard
            output.grad_fn.register_prehook(partial(_receive_one, hook, output.output_nr))

    def _record(self, layer: Layer, output: Tensor | None = None) -> LayerRecord:
        """The record of a layer; a new one where there is none, or where the layer's matrix has another shape now."""
        shape = layer.shape(self._sampling.block_size)
        record = self._records.get(layer)
        if record is None or record.statistic.shape != shape:
            record = self._records[layer] = LayerRecord(layer, self._accumulator.statistic(shape))
            if self._sampling.partial_capture == "base":
                elements = 0 if output is None else output.values().numel() if output.is_nested else output.numel()
                doubted = self._original(layer) in self._doubted
                entries = sample_entries(layer, shape, elements, self._random, self._tuning, doubted=doubted)
                record.comparison = self._start_comparison(layer, layer.weight, entries)
                if layer.bias is not None and (bias_entries := choose_bias_entries(layer, entries)) is not None:
                    record.bias_comparison = self._start_comparison(layer, layer.bias, bias_entries)
                    if layer.bias.requires_grad and not is_transformed():
                        record.bias_accumulator = find_accumulator(layer.bias)
        return record

    def _original(self, layer: Layer) -> Layer:
        """The optimizer's layer, of a sharded model too."""
        return layer if self._whole is None else self._whole.original(layer)

    def _start_comparison(self, layer: Layer, parameter: Tensor, entries: ComparedEntries) -> Comparison:
        """Compare what is captured of a layer with the gradient that backward passes bring to one of its parameters."""
        if parameter.requires_grad and (layer, id(parameter)) not in self._hooked:
            self._hooked.add((layer, id(parameter)))
            hook = partial(_compare_gradient, weakref.ref(self), layer, parameter)
            self.weight_hooks.append(WeightHook(parameter, hook))
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
            self._begin_pass(record, backward_pass)
            self._check_checkpoint(record, use, backward_pass)
        record.pending.discard(use)
        if use.total is not None and use.gradient is None:
            use.total.start(gradient, backward_pass)
        use.add_gradient(gradient)
        if retains_graph():
            record.retained.add(use)
        else:
            self._finish(record, use)

    def receive_refused(self, layer: Layer, reason: str) -> None:
        """Leave a layer to the base, in a backward pass that brings a gradient to a use that cannot be captured."""
        record = self._records.get(layer)
        if record is None or not (record.accumulator is None or accumulates(record.accumulator)):
            return
        if record.backward_pass != (backward_pass := backward_pass_number()):
            self._begin_pass(record, backward_pass)
        record.unsupported = record.unsupported or reason

    def _begin_pass(self, record: LayerRecord, backward_pass: int) -> None:
        """Sum what other backward passes have completed, and drop what is gone of them."""
        joined = self._sampling.model_calls == "joined"
        self._reduce(record, [each for each in record.captured if joined or not self._is_awaited(record, each.use)])
        self._drop_stale(record)
        record.backward_pass = backward_pass

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
                self._check_passes(record, use)
                self._check_shared(record, use)
                self._capture(record, use, gradient)
            samples = self._find_root_call(use)
            captured = [each for each in record.captured if self._find_root_call(each.use) == samples]
            if self._sampling.samples == "batch" and self._sampling.model_calls == "separate":
                _check_order({each.use.inside for each in captured})
            awaited = self._is_awaited(record, use)
            if not awaited and len(record.captured) == 1 and self._accumulator.waits(record.captured[0].pair):
                self._await_end_of_pass(record)
            elif not awaited:
                self._reduce(record, captured)
        except UnsupportedCall as reason:
            record.unsupported = str(reason)
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            record.unsupported = f"could not be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        finally:
            use.call.release()
            if not any(each.use is use for each in record.captured):
                use.forget_versions()

    def _await_end_of_pass(self, record: LayerRecord) -> None:
        """Sum a small use with others at the end of the backward pass: what it is on may be overwritten after that."""
        self._waiting.append(record)
        number = backward_pass_number()
        if number not in (_NO_PASS, self._ending):
            self._ending = number
            at_end_of_backward(partial(_end_pass, weakref.ref(self)))

    def end_pass(self) -> None:
        """Sum the small uses that a backward pass has captured."""
        waiting, self._waiting = self._waiting, []
        self._reduce_all([r for r in waiting if len(r.captured) == 1 and not self._is_awaited(r, r.captured[0].use)])

    def _capture(self, record: LayerRecord, use: WeightUse, gradient: Tensor) -> None:
        if use.was_overwritten():
            raise UnsupportedCall("had its input overwritten in place between forward and backward")
        with torch.no_grad(), without_autocast([gradient.device.type]):
            index, source, gradient = use.sample_index, as_plain(use.call.source), as_plain(gradient)
            if isinstance(source, Tensor) and source.is_nested:
                if index is None and self._sampling.samples == "batch":
                    index = SampleIndex.of_jagged(source)
                pairs = use.call.pairs(source.values(), gradient.values())
            else:
                pairs = use.call.pairs(source, gradient.reshape(use.output_shape))
            numbers = None if index is None else index.find_index(record.layer.module)
            if (numbers is None or use.is_followed) and self._sampling.samples == "batch":
                doubt = self._model_calls.find_doubt(use.model_call, record.layer, use.size, use.is_followed)
                if doubt is not None:
                    raise UnsupportedCall(doubt)
            use.watch(gradient)
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

    def _find_root_call(self, use: WeightUse) -> int:
        """The number of the outermost call of a model that a use is in, the same for uses by the same samples."""
        return self._model_calls.root(use.model_call, use.size)

    def _is_awaited(self, record: LayerRecord, use: WeightUse) -> bool:
        """Whether the gradients of others by the same samples as a use are still to come."""
        if self._sampling.samples == "rows" or not (record.pending or record.retained):
            return False
        samples = self._find_root_call(use)
        return any(self._find_root_call(each) == samples for each in (*record.pending, *record.retained))

    def _check_checkpoint(self, record: LayerRecord, use: WeightUse, backward_pass: int) -> None:
        """Leave a layer to the base of which a backward pass brings some gradients in those of its checkpoints."""
        outer_pass = backward_pass if use.recomputed_in < 0 else use.recomputed_in
        together = self._sampling.samples == "batch" and self._sampling.model_calls != "apart"
        again = use.recomputed_in >= 0 and self._model_calls.recomputes_again
        if together and (again or outer_pass == record.outer_pass):
            record.unsupported = CHECKPOINTS
        record.outer_pass = outer_pass

    def _check_passes(self, record: LayerRecord, use: WeightUse) -> None:
        """Refuse a use by samples of which others have been summed before it was made."""
        if not record.summed or self._sampling.samples == "rows" or self._sampling.model_calls != "separate":
            return
        calls, samples = self._model_calls, self._find_root_call(use)
        if any(size == use.size and calls.root(number, size) == samples for number, size in record.summed):
            raise UnsupportedCall(PASSES)

    def _check_shared(self, record: LayerRecord, use: WeightUse) -> None:
        """Refuse a layer that a call uses on the batch and on what is free of samples, where both have a gradient."""
        if use.is_shared:
            record.shared.add(use.model_call)
        if not record.shared or self._sampling.model_calls != "separate":
            return
        others = {each.use.model_call for each in record.captured if not each.use.is_shared}
        others.update(number for number, _ in record.summed)
        if not use.is_shared:
            others.add(use.model_call)
        if not record.shared.isdisjoint(others):
            raise UnsupportedCall(SIZES)

    def _drop_stale(self, record: LayerRecord) -> None:
        """Drop the sums of a backward pass whose gradients are gone: a skipped step, then ``model.zero_grad()``.

        Gradients of zeros, where sums are not zero, are gone too: ``set_to_none=False``. It synchronizes with the
        device, on the second backward pass of a curvature step and those after it. Of a sharded weight, whose zeros
        another process may not have, only a gradient that is nowhere is gone; `fully_shard` keeps one of another
        dtype that awaits the next backward pass where nobody else finds it, and one to be reduced over replicas.
        """
        refused = record.unsupported is not None
        if not (record.statistic.used or record.retained or record.captured or refused):
            return
        gradient = record.layer.weight.grad
        if (original := self._original(record.layer)) is not record.layer:
            assert self._whole is not None
            may_be_gone = original.weight.dtype == record.layer.weight.dtype
            is_nowhere = gradient is None and original.weight.grad is None
            if may_be_gone and is_nowhere and not self._whole.is_kept_back(original, backward_pass_number()):
                record.discard()
            return
        if gradient is None or (
            record.has_zero_gradient and (record.captured or refused or not record.statistic.is_zero())
        ):
            record.discard()
        elif world_size() == 1 and not (refused or record.is_sum(gradient)):
            record.unsupported = CHANGED

    def _reduce(self, record: LayerRecord, captured: Sequence[CapturedPair]) -> None:
        """Sum the samples of ``captured``, which are among the record's."""
        record.captured = [each for each in record.captured if each not in captured]
        self._check_overwritten(record, captured)
        if captured and record.unsupported is None:
            self._note_summed(record, captured)
            self._add_(record, self._find_additions(record, captured))

    def _note_summed(self, record: LayerRecord, captured: Sequence[CapturedPair]) -> None:
        """Note which samples have been summed."""
        of_batch = (each.use for each in captured if not (each.is_apart or each.use.is_shared))
        record.summed.update((use.model_call, use.size) for use in of_batch)

    def _check_overwritten(self, record: LayerRecord, captured: Sequence[CapturedPair]) -> None:
        """Leave a layer to the base whose factors have been changed in place since they were captured."""
        if record.unsupported is None and any(each.use.was_overwritten() for each in captured):
            record.unsupported = OVERWRITTEN
        for each in captured:
            each.use.forget_versions()

    def _reduce_all(self, records: Iterable[LayerRecord]) -> None:
        """Sum all that is captured, small layers together."""
        additions: dict[LayerRecord, list[Addition]] = {}
        for record in records:
            captured, record.captured = record.captured, []
            self._check_overwritten(record, captured)
            if captured and record.unsupported is None:
                self._note_summed(record, captured)
                additions[record] = self._find_additions(record, captured)
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
                key = each.pair.rows.samples, self._find_root_call(each.use)
            together.setdefault(key, []).append(each.pair)
        total = captured[0].use.total if len(captured) == 1 else None
        return [Addition(record.layer, record.statistic, pairs, total) for pairs in together.values()]

    def _add_(self, record: LayerRecord, additions: Sequence[Addition]) -> None:
        try:
            with torch.no_grad(), without_autocast([record.layer.weight.device.type]):
                for addition in additions:
                    self._accumulator.add_(*addition)
        except UnsupportedCall as reason:
            record.unsupported = str(reason)

    # The end of the step ------------------------------------------------------------------------------------------

    def collect(self) -> tuple[dict[Layer, Statistic], dict[Layer, str]]:
        """Sum what is left.

        Returns:
            What was summed of the layers whose gradients came back and are complete; and those that are left to the
            base, with the reason.
        """
        records = self._records
        for record in records.values():
            for use in list(record.retained):
                self._finish(record, use)
        self._reduce_all(records.values())
        unsupported = {
            layer: reason if reason in _TOLD else f"{reason}, {self._accumulator.missing}"
            for layer, record in records.items()
            if (reason := record.unsupported) is not None and (self._whole is not None or record.has_gradient)
        }
        unsupported.update(self._find_incomplete([r for layer, r in records.items() if layer not in unsupported]))
        collected = {
            layer: record.statistic
            for layer, record in records.items()
            if record.statistic.used and layer not in unsupported
        }
        return collected, unsupported

    def _find_incomplete(self, records: Sequence[LayerRecord]) -> dict[Layer, str]:
        """The layers whose gradient is not the sum of what was captured, with the reason. Synchronizes once."""
        compared = [(record, comparison) for record in records for comparison in record.comparisons()]
        doubtful = [
            _doubtful_gradient(record) if comparison is record.comparison else None for record, comparison in compared
        ]
        values = read_values([each.vectors(gradient) for (_, each), gradient in zip(compared, doubtful, strict=True)])
        incomplete: dict[Layer, str] = {}
        for (record, comparison), gradient, known in zip(compared, doubtful, values, strict=True):
            if gradient is not None and not comparison.is_multiple(known):
                return dict.fromkeys(self._layers, BY_HAND)
            if not comparison.is_empty and not comparison.is_complete(known):
                reason = INCOMPLETE if comparison is record.comparison else INCOMPLETE_BIAS
                incomplete.setdefault(record.layer, reason)
                self._doubted.add(self._original(record.layer))
        return incomplete


def _check_order(inside: set[TimeMajor | None]) -> None:
    """Refuse uses by the same samples in several recurrent calls of which any is on packed sequences."""
    if len(inside) > 1 and any(each is not None and each.is_sorted for each in inside):
        raise UnsupportedCall(ORDER)


def _receive_gradient(uses: weakref.ref[CapturedUses], use: WeightUse, gradient: Tensor | None) -> None:
    if (alive := uses()) is not None and gradient is not None:  # a function may return none
        with alive._stopwatch.measure("curvature"):
            alive.receive_gradient(use, gradient)


def _receive_refused(
    uses: weakref.ref[CapturedUses], layer: Layer, reason: str, gradients: tuple[Tensor | None, ...]
) -> None:
    if (alive := uses()) is not None and any(gradient is not None for gradient in gradients):
        alive.receive_refused(layer, reason)


def _end_pass(uses: weakref.ref[CapturedUses]) -> None:
    if (alive := uses()) is not None:
        with alive._stopwatch.measure("curvature"):
            alive.end_pass()


def _receive_one(hook: Callable[[Tensor], None], place: int, gradients: tuple[Tensor | None, ...]) -> None:
    if (gradient := gradients[place]) is not None:
        hook(gradient)


def _compare_gradient(
    uses: weakref.ref[CapturedUses], layer: Layer, parameter: Tensor, gradient: Tensor | None
) -> None:
    if (alive := uses()) is not None and gradient is not None:
        with alive._stopwatch.measure("curvature"):
            alive.compare_gradient(layer, parameter, gradient)


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


def remove_hooks(hooks: list[WeightHook]) -> None:
    """Leave the weights as they were."""
    for hook in hooks:
        hook.remove()
    hooks.clear()


__all__ = ["UNREADABLE", "CapturedUses", "remove_hooks"]
