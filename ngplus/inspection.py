"""What users inspect and set on an optimizer between its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor

from ngplus.capture.loss_reduction import LossReduction
from ngplus.capture.sample_index import SampleIndex

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ngplus.capture.recorder import Recorder
    from ngplus.config import LayerwiseOptions
    from ngplus.curvature.layer_state import LayerState
    from ngplus.curvature.store import CurvatureStore
    from ngplus.layers import Layer
    from ngplus.profiling import StepTimes, Stopwatch


class Inspection(ABC):
    """The properties of a `LayerwiseOptimizer` that are for its users."""

    _base: Optimizer
    _options: LayerwiseOptions
    _layers: list[Layer]
    _curvature: CurvatureStore
    _recorder: Recorder | None
    _sample_index: SampleIndex | None
    _skipped: Tensor | None
    _stopwatch: Stopwatch

    @property
    def curvature(self) -> dict[str, LayerState]:
        """What is kept of each layer, by its weight's name."""
        return {layer.name: state for layer, state in self._curvature.states.items()}

    @property
    def curvature_is_due(self) -> bool:
        """Whether the next step builds curvature, of some layer at least."""
        return bool(self._layers_to_capture())

    @abstractmethod
    def _check_names(self, name: str, given: object) -> None:
        """Refuse names and patterns that fit no module of the model."""

    @abstractmethod
    def _layers_to_capture(self) -> list[Layer]:
        """The layers that get a curvature on the next step."""

    @property
    def sample_index(self) -> Mapping[str, Tensor] | None:
        """Which sample each row of a layer's input belongs to, where that is not its batch dimension.

        Set it before the forward pass of a step with `curvature_is_due`: an integer tensor for all layers, or a dict
        from patterns of module names (as in `fnmatch`, the first that fits counts) to such tensors; of shape (b,), or
        of the input's shape without its features. With ``samples="batch"``, rows of the same number are the positions
        of one sample, as the atoms of a molecule are; with ``samples="rows"`` each row stays a sample. Rows with a
        negative number count as none, as padding should. It holds until it is set again; None goes back to
        ``batch_dim``. `nn.MultiheadAttention` and recurrent layers know theirs; linear layers whose weights go to
        `F.multi_head_attention_forward`, as fairseq's attention does, take an index of shape (T, B). Where another
        object wraps the optimizer (accelerate's, Lightning's, fairseq's), it is set on ``wrapper.optimizer``.

        Raises:
            TypeError: no integer tensors by module name.
            ValueError: a pattern that fits no module of the model; in the backward pass, where a layer's input has
                another number of rows than its index.
        """
        return None if self._sample_index is None else self._sample_index.indices

    @sample_index.setter
    def sample_index(self, given: Tensor | Mapping[str, Tensor] | None) -> None:
        index = SampleIndex.of(given)
        if index is not None and given is not None and not isinstance(given, Tensor):
            modules = {layer.module for layer in self._layers}
            if not all(any(fnmatchcase(module, pattern) for module in modules) for pattern in given):
                self._check_names("sample_index", given)
        self._sample_index = index
        if self._recorder is not None:
            self._recorder.sample_index = self._sample_index

    @property
    def loss_reduction(self) -> LossReduction:
        """What the loss divides by, see `NGPlus`.

        Set it before the ``step`` of a step with `curvature_is_due`, as to the number of targets that are not ignored.

        Raises:
            TypeError: what is no loss reduction.
            ValueError: a number that is negative or not finite.
        """
        return self._options.loss_reduction

    @loss_reduction.setter
    def loss_reduction(self, value: LossReduction) -> None:
        self._options = replace(self._options, loss_reduction=value)

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients counted as zero because they were not finite. Synchronizes with the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def times(self) -> StepTimes:
        """Seconds spent on curvature, inverse and apply since `track_times`."""
        return self._stopwatch.times

    def track_times(self, on: bool = True) -> None:
        """Measure `times`; on a GPU this synchronizes at every stage."""
        self._stopwatch.on = on

    def _shown_options(self) -> Mapping[str, object]:
        """The options that `repr` shows."""
        return vars(self._options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._shown_options().items())
        return f"{type(self).__name__}({len(self._layers)} layers, {options})\nbase {self._base!r}"


__all__ = ["Inspection"]
