"""`Shampoo`: a matrix for every side of a tensor, from the mini-batch gradients alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.config import LayerwiseOptions, NonFinite, Params, check_choice, check_count
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.store import CurvatureStore
from ngplus.devices import factor_dtype
from ngplus.factors.factor import statistics_dtype
from ngplus.layers import Layer, MatrixShape, Side
from ngplus.layerwise import LayerwiseOptimizer
from ngplus.solvers.preconditioner import Entries, Preconditioner
from ngplus.tuning import DEFAULT, Tuning

Grafting = Literal["none", "sgd"]


@dataclass(frozen=True, kw_only=True)
class ShampooOptions(LayerwiseOptions):
    """The choices of `Shampoo`; see there for what each means."""

    ema: float | None
    max_side: int
    grafting: Grafting

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema is not None and (isinstance(self.ema, bool) or not isinstance(self.ema, int | float)):
            raise TypeError(f"ema must be a number in [0, 1), or None for the sum, got {self.ema!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), or None for the sum, got {self.ema!r}")
        check_count("max_side", self.max_side, optional=False)
        check_choice("grafting", self.grafting, Grafting)


@dataclass(eq=False)
class Roots(Preconditioner):
    """G ↦ G ×ᵢ Lᵢ^(−1/2k) over the k sides that are kept.

    Attributes:
        sides: by the tensor's dimension, (d, d).
    """

    sides: dict[int, Tensor]

    @property
    def main(self) -> Tensor:
        """The first side's."""
        return next(iter(self.sides.values()))

    def multiply(self, gradient: Tensor) -> Tensor:
        """The direction of a gradient in its tensor's own shape."""
        for dim, root in self.sides.items():
            gradient = torch.tensordot(gradient, root, dims=([dim], [0])).movedim(-1, dim)
        return gradient

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply a gradient in its tensor's own shape, whichever side is short; a bias is a tensor of its own."""
        return self.multiply(gradient), None

    def tensors(self) -> dict[str, Tensor]:
        """The sides, by their number."""
        return {str(dim): root for dim, root in self.sides.items()}

    def to(self, device: torch.device) -> Roots:
        """A copy on another device."""
        return Roots({dim: root.to(device) for dim, root in self.sides.items()})

    def entries(self) -> Entries:
        """The same, and which sides are kept."""
        return {f"side{dim}": root for dim, root in self.sides.items()}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Roots:
        """Restore one, see `Preconditioner.from_entries`."""
        dims = sorted(int(name.removeprefix("side")) for name in entries if name.startswith("side"))
        if not dims:
            raise KeyError("side0")
        return cls({dim: entries[f"side{dim}"].contiguous() for dim in dims})


class ShampooState(LayerState):
    """What Shampoo keeps of a tensor; ``average`` holds the Lᵢ of the sides that are kept."""

    def _pack(self) -> Entries:
        return self.preconditioner.entries()

    @staticmethod
    def _unpack(entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
        return Roots.from_entries(entries, shape, damping)

    @staticmethod
    def _unpack_first_layout(tensors: Mapping[str, Tensor], shape: MatrixShape) -> Preconditioner:
        return Roots({int(dim): root for dim, root in tensors.items()})

    @property
    def roots(self) -> Roots:
        """The preconditioner."""
        assert isinstance(self.preconditioner, Roots)
        return self.preconditioner

    def __repr__(self) -> str:
        sides = ", ".join(f"{dim}: {len(root)}" for dim, root in self.roots.sides.items())
        return f"ShampooState(sides {{{sides}}}, {self.updates} updates, {self.numel():,} elements kept)"


def multiply_sides(gradient: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """GᵢGᵢᵀ, where Gᵢ is the gradient as a matrix with dimension i first."""
    unfolded = [gradient.movedim(dim, 0).flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1) for dim in dims]
    return [matrix @ matrix.T for matrix in unfolded]


def inverse_root(matrix: Tensor, damping: float, order: int) -> Tensor:
    """(matrix + λI)^(−1/order) of a positive semidefinite matrix, by its eigenvalues in float64."""
    values, vectors = torch.linalg.eigh(matrix.to(factor_dtype(matrix)))
    powers = (values.clamp_min(0.0) + damping).pow(-1.0 / order)
    root: Tensor = (vectors * powers) @ vectors.T
    return root.to(matrix.dtype)


class ShampooCurvature(CurvatureStore):
    """The sides of all tensors, which every gradient adds to.

    Args:
        options: of the optimizer.
    """

    state_class = ShampooState
    states: dict[Layer, ShampooState]  # type: ignore[assignment]

    def __init__(self, options: ShampooOptions) -> None:
        super().__init__()
        self._options = options

    def add_gradient(self, layer: Layer, damping: float, update_roots: bool) -> None:
        """Add the gradient that is there to the tensor's matrices; a gradient that is not finite adds nothing.

        Args:
            layer: the tensor.
            damping: ε.
            update_roots: whether to make roots; they are made in any case where there are none yet.

        Raises:
            TypeError: a sparse gradient.
        """
        gradient, before = layer.weight.grad, self.states.get(layer)
        if gradient is None:
            return
        if gradient.is_sparse:
            raise TypeError(f"the gradient of {layer.name} is sparse, of which Shampoo has no matrices")
        kept = [dim for dim, size in enumerate(gradient.shape) if size <= self._options.max_side]
        dims = kept if before is None else list(before.roots.sides)
        if not dims:
            return
        products = multiply_sides(gradient.to(statistics_dtype(gradient.dtype)), dims)
        finite = torch.stack([product.isfinite().all() for product in products]).all()
        if before is None:
            if bool(finite):
                self.states[layer] = self._make_roots(layer, products, dims, damping, updates=1)
            return
        assert before.average is not None
        if before.preconditioner.main.device != gradient.device:
            before.to_(gradient.device)
        before.average = [matrix.to(products[0].dtype) for matrix in before.average]
        for matrix, product in zip(before.average, products, strict=True):
            self._add_(matrix, product, finite)
        if update_roots:
            self.states[layer] = self._make_roots(layer, before.average, dims, damping, before.updates + 1)

    def _add_(self, matrix: Tensor, product: Tensor, finite: Tensor) -> None:
        if self._options.ema is None:
            matrix.add_(torch.where(finite, product, 0.0))
        else:
            matrix.lerp_(torch.where(finite, product, matrix), 1 - self._options.ema)

    def _make_roots(
        self, layer: Layer, matrices: list[Tensor], dims: list[int], damping: float, updates: int
    ) -> ShampooState:
        roots = {dim: inverse_root(matrix, damping, 2 * len(dims)) for dim, matrix in zip(dims, matrices, strict=True)}
        return ShampooState(layer.shape(None), Roots(roots), matrices, damping, updates)

    @property
    def _keeps_average(self) -> bool:
        return True

    def _blank_entries(self, layer: Layer) -> Entries:
        sizes = {dim: size for dim, size in enumerate(layer.weight.shape) if size <= self._options.max_side}
        dtype = statistics_dtype(layer.weight.dtype)
        sides = {dim: torch.empty(size, size, dtype=dtype, device="meta") for dim, size in sizes.items()}
        averages = {f"average{i}": side for i, side in enumerate(sides.values())}
        return {**averages, **{f"side{dim}": side for dim, side in sides.items()}}


def _has_side(parameter: Tensor) -> bool:
    return parameter.dim() > 0 and not parameter.is_complex()


class Shampoo(LayerwiseOptimizer):
    """Shampoo: a gradient G of k sides becomes G multiplied along each side i by Lᵢ^(−1/(2k)).

    With Gᵢ the gradient as a matrix whose rows are side i,

        Lᵢ = εI + Σ GᵢGᵢᵀ over all steps so far,        for a matrix  L^(−1/4) G R^(−1/4)

    The Lᵢ grow on every step. Their roots are made on the first step, on the steps 1, 2, 4, 8 … and then on every
    ``update_every``-th, so that the first roots, which know one gradient, are not kept for long.

    Args:
        model: whose parameters are trained; every real one of one or more dimensions is preconditioned.
        base: optimizer class that gets the preconditioned gradients.
        lr: of ``base``.
        damping: ε > 0, in ``param_groups``; a change takes effect when roots are next made.
        update_every: 𝒯, steps between roots.
        ema: β in [0, 1): Lᵢ ← β Lᵢ + (1 − β) GᵢGᵢᵀ, from the first on, in place of the sum; None for the sum.
        max_side: a side longer than this is left as it is, and k counts the others: the direction's length does not
            depend on the gradient's then either.
        grafting: "sgd": each direction is made as long as its gradient, so that a learning rate means what it does for
            the base; "none": as the formula has it.
        nonfinite: as for `NGPlus`.
        params: as for `NGPlus`.
        **base_options: everything else goes to ``base``.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take; on a step, a sparse gradient.
        ValueError: a value out of range.

    Source: Gupta, Koren & Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization" (2018), Algorithm 2;
    grafting: Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates" (2020).
    """

    title: ClassVar[str] = "Shampoo"
    key: ClassVar[str] = "shampoo"

    _options: ShampooOptions
    _curvature: ShampooCurvature

    def __init__(
        self,
        model: nn.Module,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lr: float | Tensor = 0.1,
        damping: float = 1e-6,
        update_every: int = 10,
        ema: float | None = None,
        max_side: int = 2048,
        grafting: Grafting = "none",
        nonfinite: NonFinite = "skip",
        params: Params | None = None,
        **base_options: Any,
    ) -> None:
        options = ShampooOptions(
            update_every=update_every, ema=ema, max_side=max_side, grafting=grafting, nonfinite=nonfinite
        )
        super().__init__(model, base, options, lr=lr, damping=damping, params=params, base_options=base_options)

    def _shown_options(self) -> Mapping[str, object]:
        names = ("update_every", "nonfinite", "ema", "max_side", "grafting")
        return {name: getattr(self._options, name) for name in names}

    @property
    def _works_on_gradients(self) -> bool:
        return True

    def _make_curvature(self) -> ShampooCurvature:
        return ShampooCurvature(self._options)

    def _find_layers(self) -> list[Layer]:
        """Every real parameter that has a side, in place of layers with a matrix."""
        return [Layer(name, parameter, None) for name, parameter in self._named_parameters() if _has_side(parameter)]

    def _warn_of_unsupported_matrices(self) -> None:
        """There is nothing to warn of: no parameter is left out for what its module is."""

    def _layers_to_capture(self) -> list[Layer]:
        """Those whose gradient is added on this step: all of them, on every step."""
        return [layer for layer in self._layers if layer.weight.requires_grad]

    def _plan_pending(self) -> None:
        """There are none: a tensor's gradient is added whenever it has one."""

    @property
    def _is_due(self) -> bool:
        is_power_of_two = self._steps & (self._steps - 1) == 0
        return super()._is_due or (self._steps < self._options.update_every and is_power_of_two)

    def _update_curvature(self, layers: list[Layer], *, with_batch: bool = True) -> None:
        if not with_batch:  # the gradient is that of all processes, so that nothing is averaged
            return
        due = self._is_due
        self._apply_plan.forget()
        with self._stopwatch.measure("inverse" if due else "curvature"):
            for layer in layers:
                self._curvature.add_gradient(layer, self._damping(layer), due)

    def _precondition_layer_(self, member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
        """Put the direction in place of the tensor's gradient, as long as the gradient was if grafted."""
        gradient, roots = member.layer.weight.grad, member.preconditioner
        assert gradient is not None
        assert isinstance(roots, Roots)
        direction = roots.multiply(gradient.to(roots.main.dtype))
        if self._options.grafting == "sgd":
            length = direction.norm()
            direction = direction * torch.where(length > 0, gradient.norm() / length, 1.0)
        gradient.copy_(direction)
        return None


__all__ = ["Shampoo"]
