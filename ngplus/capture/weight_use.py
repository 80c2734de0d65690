"""Uses of a layer's weight between forward and backward, and what is known of a layer meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ngplus.capture.accumulator import Statistic, is_zero
from ngplus.capture.function_mode import FunctionCall, TimeMajor, find_owner
from ngplus.capture.op_handlers import OpCall
from ngplus.capture.sample_index import SampleIndex
from ngplus.comparison.completeness import Comparison
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.factors.formed import Formed
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer
from ngplus.tuning import Tuning


def record_versions(call: FunctionCall) -> list[tuple[Tensor, int]]:
    """The arguments of a call that are no parameters, with their versions: in-place operations count them up."""
    arguments = (each for each in call.tensors if not isinstance(find_owner(each), nn.Parameter))
    return [(each, each._version) for each in arguments if not each.is_inference()]


@dataclass(eq=False, slots=True, weakref_slot=True)
class WeightUse:
    """A call that uses a weight, whose output's gradient has not come back yet.

    Attributes:
        call: with its input.
        output_shape: of what it returned.
        dtype: that it was computed in.
        accumulator: of the weight's gradient.
        sample_index: which rows belong to which sample, or None.
        is_followed: whether that was found by following the rows, and not given by the user.
        is_shared: whether it is on something free of samples, and by one sample, the batch.
        batch_dim: where the samples are.
        size: of that dimension.
        total: gets Σᵢ 𝒢ᵢ in the backward pass, or None.
        inside: the attention or the recurrent layer that it is a part of, or None.
        model_call: number of the outermost call of the model that it is in.
        recomputed_in: number of the outermost backward pass that it was made in, as a reentrant checkpoint's is, or −1.
        versions: of its arguments, and of the output's gradient.
        gradient: of the output, while the graph is retained and more may come.
        returned: whether all of the gradient is back.
    """

    call: OpCall
    output_shape: torch.Size
    dtype: torch.dtype
    accumulator: Node
    sample_index: SampleIndex | None
    is_followed: bool
    is_shared: bool
    batch_dim: int
    size: int
    total: GradientSum | None
    inside: TimeMajor | None
    model_call: int
    recomputed_in: int
    versions: list[tuple[Tensor, int]]
    gradient: Tensor | None = None
    returned: bool = False

    def add_gradient(self, gradient: Tensor) -> None:
        """Add what a backward pass brings to the output's gradient."""
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient.detach()

    def take_gradient(self) -> Tensor | None:
        """The output's gradient, which is complete and not kept any longer."""
        gradient, self.gradient, self.returned = self.gradient, None, True
        return gradient

    def watch(self, gradient: Tensor) -> None:
        """Have `was_overwritten` look at the output's gradient too, of which the factors may be views."""
        if not gradient.is_inference():
            self.versions.append((gradient, gradient._version))

    def was_overwritten(self) -> bool:
        """Whether any argument, or the gradient that it watches, has been changed in place since."""
        return any(tensor._version != version for tensor, version in self.versions)

    def forget_versions(self) -> None:
        """Let go of what `was_overwritten` looks at."""
        self.versions = []


@dataclass(eq=False, slots=True)
class CapturedPair:
    """The factors of a use whose gradient is back.

    Attributes:
        use: the use.
        pair: its factors.
        is_apart: whether its rows are samples of their own, whatever others there are: those that one of several
            matrices was multiplied by.
    """

    use: WeightUse
    pair: FactorPair
    is_apart: bool = False


@dataclass(eq=False, slots=True)
class LayerRecord:
    """What is known of a layer since the optimizer's last step.

    Attributes:
        layer: the layer.
        statistic: what was summed.
        comparison: of what was captured with the weight's gradient; None where partial capture is accepted.
        bias_comparison: the same for the bias; None also without a trained one.
        pending: uses whose gradients have not come back.
        retained: uses whose gradients have come back through a graph that is retained.
        captured: factors that are to be summed.
        summed: the numbers of the calls, and of samples, of those that have been.
        shared: the numbers of the calls of those that are by the batch as one sample.
        backward_pass: number of the pass that the latest gradient came in.
        outer_pass: number of the one that this was a checkpoint's in, or of itself.
        discarded: whether gradients of an earlier backward pass were thrown away.
        unsupported: why the layer goes to the base, or None.
        refused: the same, where a forward pass whose backward may still come has told.
        accumulator: of the weight's gradient.
        bias_accumulator: of the bias's, where that is compared.
    """

    layer: Layer
    statistic: Statistic
    comparison: Comparison | None = None
    bias_comparison: Comparison | None = None
    pending: weakref.WeakSet[WeightUse] = field(default_factory=weakref.WeakSet)
    retained: set[WeightUse] = field(default_factory=set)
    captured: list[CapturedPair] = field(default_factory=list)
    summed: set[tuple[int, int]] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    backward_pass: int = -1
    outer_pass: int = -1
    discarded: bool = False
    unsupported: str | None = None
    refused: str | None = None
    accumulator: Node | None = None
    bias_accumulator: Node | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether the layer has one that would go to the base."""
        bias = self.layer.bias
        return self.layer.weight.grad is not None or (bias is not None and bias.grad is not None)

    @property
    def has_zero_gradient(self) -> bool:
        """Whether the gradients of the weight and of its trained bias are zeros, or nowhere. Synchronizes.

        Where a layer's inputs are zeros, as a first state is, its weight's is zero and its bias's is not.
        """
        parameters = self.layer.weight, self.layer.trained_bias
        return all(each is None or each.grad is None or is_zero(each.grad) for each in parameters)

    def comparisons(self) -> list[Comparison]:
        """Those that there are."""
        return [each for each in (self.comparison, self.bias_comparison) if each is not None]

    def compare_use(self, pair: FactorPair, dtype: torch.dtype, tuning: Tuning) -> None:
        """Add a captured use to the comparisons.

        Args:
            pair: its factors, of all of its samples.
            dtype: that it was computed in.
            tuning: sizes of temporaries.
        """
        if not isinstance(pair.rows, Formed):
            if self.comparison is not None:
                rows = self.comparison.reduce_rows(pair)
                self.comparison.add_use(rows, pair, dtype)
                if self.bias_comparison is not None:
                    self.bias_comparison.add_use(rows, pair, dtype)
        elif comparisons := self.comparisons():
            total, squares = pair.rows.add_up(tuning.curvature_chunk(pair.rows.device))
            weight = self.layer.weight
            columns = self.layer.matrix[2]
            for comparison in comparisons:
                if comparison is self.comparison:
                    part = total[..., :columns].reshape(weight.shape)
                else:
                    assert self.layer.bias is not None
                    part = total.new_zeros(self.layer.bias.shape)
                    part[self.layer.bias_slice] = total[..., -1].flatten()
                comparison.add_sum(part, squares, dtype)

    def is_sum(self, gradient: Tensor) -> bool:
        """Whether the weight's ``.grad`` is the sum of what backward passes brought; also where hooks may change it."""
        hooks = self.layer.weight._backward_hooks or (), self.layer.weight._post_accumulate_grad_hooks or ()
        return self.comparison is None or len(hooks[0]) > 1 or bool(hooks[1]) or self.comparison.is_sum(gradient)

    def discard(self) -> None:
        """Forget what came back, but not the uses whose gradients may still come."""
        self.discarded |= bool(self.statistic.used or self.captured or self.retained)
        self.statistic = type(self.statistic)(self.statistic.shape)
        self.captured = []
        self.summed, self.shared = set(), set()
        self.unsupported = self.refused
        if self.comparison is not None:
            self.comparison = self.comparison.empty()
        if self.bias_comparison is not None:
            self.bias_comparison = self.bias_comparison.empty()
        for use in self.retained:
            use.gradient = None
            self.pending.add(use)
        self.retained = set()


class WeightHook:
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


__all__ = ["CapturedPair", "LayerRecord", "WeightHook", "WeightUse", "record_versions"]
