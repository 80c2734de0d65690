"""The curvature of every layer on one batch, measured by an `NGPlus` whose base makes no step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.capture.accumulator import Statistic, is_zero
from ngplus.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Layer, is_transposed_linear
from ngplus.optimizer import NGPlus
from ngplus.starting.loss_graph import LossGraph, read_loss

Loss = Callable[[], Any]
_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
_PRODUCTS = 30  # of the power iteration


@dataclass(frozen=True, kw_only=True)
class MeasuredLayer:
    """A layer that has a curvature.

    Attributes:
        name: of its weight.
        matrix: as m×n, with the groups of a grouped convolution before it.
        short: p, the shorter side.
        elements: of the weight and of the bias that is its last column.
        largest: s, the largest eigenvalue of L or R.
    """

    name: str
    matrix: str
    short: int
    elements: int
    largest: float

    def share(self, damping: float) -> float:
        """s/(λ + s), as `LayerState.share`.

        Args:
            damping: λ.

        Returns:
            A number in [0, 1].
        """
        return self.largest / (damping + self.largest)


@dataclass(frozen=True, kw_only=True)
class InputShapes:
    """What the modules of linear layers, embeddings and convolutions got.

    Attributes:
        leading: shapes without features by module, of a convolution its batch dimension alone.
        has_positions: whether a sample meets some weight at more than one position.
    """

    leading: Mapping[str, tuple[int, ...]]
    has_positions: bool

    @classmethod
    def of(cls, seen: Mapping[str, tuple[nn.Module, tuple[int, ...]]]) -> InputShapes:
        """Take the shapes of inputs apart.

        Args:
            seen: each module, and the shape of its first input. Embeddings count where there is nothing else, since
                the numbers of positions, which are the same for all samples, are looked up in one too.

        Returns:
            What is known of samples and positions.
        """
        others = {name: each for name, each in seen.items() if not isinstance(each[0], nn.Embedding)}
        leading = {name: _leading(module, shape) for name, (module, shape) in (others or seen).items()}
        has_positions = any(
            isinstance(module, _CONVOLUTIONS) or len(_leading(module, shape)) > 1 for module, shape in seen.values()
        )
        return cls(leading={name: shape for name, shape in leading.items() if shape}, has_positions=has_positions)


def _leading(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(module, _CONVOLUTIONS):
        return shape[:1]
    return shape if isinstance(module, nn.Embedding) else shape[:-1]


class _NoStep(Optimizer):
    """A base that leaves the parameters as they are."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        """Do nothing."""


class _Probe(NGPlus):
    """Keeps L itself, which the average is after one update, and why layers have no curvature."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.reasons: dict[Layer, str] = {}
        super().__init__(model, base=_NoStep, lr=0.0, damping=1.0, update_every=1, ema=0.5, solver="dense", **options)

    @property
    def covered(self) -> list[Layer]:
        """The layers that have a curvature."""
        return [layer for layer in self._layers if layer in self._curvature.states]

    def measure(self, layer: Layer) -> MeasuredLayer:
        """Measure what was kept of a layer."""
        state = self._curvature.states[layer]
        shape, bias = state.shape, layer.trained_bias
        grouped = f"{shape.groups}×" if shape.groups > 1 else ""
        return MeasuredLayer(
            name=layer.name,
            matrix=f"{grouped}{shape.rows}×{shape.columns}",
            short=shape.short,
            elements=layer.weight.numel() + (0 if bias is None else layer.weight.shape[0]),
            largest=max(find_largest_eigenvalue(stack) for stack in state.average or []),
        )

    def find_others(self, zero: Mapping[int, bool]) -> dict[str, list[str]]:
        """The names of the parameters of no covered layer by reason; ``zero`` is whether a gradient is, by id."""
        own = {id(each) for layer in self.covered for each in (layer.weight, layer.trained_bias)}
        reasons = {
            id(each): reason for layer, reason in self.reasons.items() for each in (layer.weight, layer.trained_bias)
        }
        others: dict[str, list[str]] = {}
        for name, parameter in [] if self._model is None else self._model.named_parameters():
            if id(parameter) not in own:
                reason = reasons.get(id(parameter)) or _explain(parameter, zero.get(id(parameter)))
                others.setdefault(reason, []).append(name)
        return others

    def disarm(self) -> None:
        """Take all hooks off the model."""
        if self._recorder is not None:
            self._recorder.disarm()

    def _collect(self, layers: Sequence[Layer]) -> tuple[Mapping[Layer, Statistic], Mapping[Layer, str], float]:
        statistics, reasons, scale = super()._collect(layers)
        self.reasons |= reasons
        return statistics, reasons, scale


class Measurement:
    """Runs a model on the batch of a loss, inside of `unchanged`.

    Args:
        model: of the loss.
        loss: runs the model forward and returns a scalar.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model = model
        self._loss = loss
        self._probe: _Probe | None = None

    def read_inputs(self) -> tuple[InputShapes, LossGraph]:
        """Run the model forward, and read the shapes of its layers' inputs and the end of the loss's graph.

        Returns:
            Both.

        Raises:
            TypeError, ValueError: what ``loss`` returns is no loss.
        """
        seen: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}

        def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, (module, tuple(args[0].shape)))

        handles = [
            module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
            for name, module in self._model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)) or is_transposed_linear(module)
        ]
        try:
            graph = read_loss(self._run())
        finally:
            for handle in handles:
                handle.remove()
        return InputShapes.of(seen), graph

    def measure(self, **options: Any) -> tuple[list[MeasuredLayer], dict[str, list[str]]]:
        """Run the model forward and backward, and measure the curvature of each layer.

        Args:
            **options: of `NGPlus` that say what a sample is and what the loss divides by; ``sample_index`` too.

        Returns:
            The layers that have one, in the order of the model; and the names of all other parameters, by why they have
            none.

        Raises:
            ValueError: no layer of the model is supported, or none has a curvature.
        """
        index = options.pop("sample_index", None)
        with _quiet():
            self._probe = _Probe(self._model, **options)
        self._probe.sample_index = index
        self._backward()
        zero = {id(each): is_zero(each.grad) for each in self._model.parameters() if each.grad is not None}
        self._step()
        others = self._probe.find_others(zero)
        if not self._probe.covered:
            reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in others.items())
            raise ValueError(f"no layer of the model has a curvature: {reasons}")
        return [self._probe.measure(layer) for layer in self._probe.covered], others

    def lengths(self, damping: float) -> tuple[float, float]:
        """Run the model forward and backward again, and precondition its gradients.

        Args:
            damping: λ.

        Returns:
            Norms of the gradient, and of the direction, over all layers that have a curvature.
        """
        assert self._probe is not None
        weights = [layer.weight for layer in self._probe.covered]
        self._probe.param_groups[0]["damping"] = damping
        self._probe.zero_grad()
        self._backward()
        before = _norm(weights)
        self._step()
        return before, _norm(weights)

    def close(self) -> None:
        """Take all hooks off the model."""
        if self._probe is not None:
            self._probe.disarm()

    def _run(self) -> Tensor:
        with torch.enable_grad():
            loss = self._loss()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return the loss, a tensor with one element, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss must return a tensor with one element, got one of shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(
                "loss returned a tensor without a graph: it must run the model forward on each call, not under "
                "torch.no_grad, and not return .item() or .detach()"
            )
        if not math.isfinite(value := float(loss.detach())):
            raise ValueError(f"loss returned {value}: there is no curvature to measure at these weights")
        return loss

    def _backward(self) -> None:
        torch.autograd.backward(self._run())
        if all(parameter.grad is None for parameter in self._model.parameters()):
            raise ValueError("the loss has no gradient with respect to the model: does it run this very model?")

    def _step(self) -> None:
        assert self._probe is not None
        with _quiet():
            self._probe.step()


def _explain(parameter: nn.Parameter, has_zero: bool | None) -> str:
    if not parameter.requires_grad:
        return "is frozen"
    if has_zero is None:
        return "has no gradient of this loss"
    if sum(size != 1 for size in parameter.shape) < 2:
        return "is a vector"
    return "has a gradient of zero" if has_zero else "has a gradient that no call of the model brings, or is not finite"


def find_largest_eigenvalue(stack: Tensor) -> float:
    """Find the largest eigenvalue of symmetric matrices that have no negative ones, by power iteration.

    Args:
        stack: (k, p, p).

    Returns:
        The largest of all; a little less where the next ones are about as large.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(*stack.shape[:2], 1, generator=generator).to(stack)
    for _ in range(_PRODUCTS):
        vectors = torch.nn.functional.normalize(stack @ vectors, dim=1)
    return float((vectors.mT @ stack @ vectors).max())


def _norm(weights: Sequence[nn.Parameter]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(each.grad)) for each in weights if each.grad is not None))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of layers that go to the base: the suggestion says which, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


__all__ = ["InputShapes", "Loss", "MeasuredLayer", "Measurement", "find_largest_eigenvalue"]
