"""`Shampoo`: a matrix for every side of a tensor, from the mini-batch gradients alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.arguments import Params
from ngplus.baselines.relative import Relative
from ngplus.batching import Member
from ngplus.curvature import Curvature, LayerState
from ngplus.devices import factor_dtype
from ngplus.factors import statistics_dtype
from ngplus.gfim import Shape
from ngplus.layers import Layer
from ngplus.options import NonFinite, Options, check_choice, check_count
from ngplus.preconditioner import Entries, Preconditioner
from ngplus.touched import TouchedRows

Grafting = Literal["none", "sgd"]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """How the matrices of a tensor's sides are gathered and used."""

    ema: float | None
    max_side: int
    grafting: Grafting

    def __post_init__(self) -> None:
        if self.ema is not None and (isinstance(self.ema, bool) or not isinstance(self.ema, int | float)):
            raise TypeError(f"ema must be a number in [0, 1), or None for the sum, got {self.ema!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), or None for the sum, got {self.ema!r}")
        check_count("max_side", self.max_side, optional=False)
        check_choice("grafting", self.grafting, Grafting)


@dataclass(eq=False)
class Roots:
    """G ↦ G ×ᵢ Lᵢ^(−1/2k) over the k sides that are kept.

    Attributes:
        sides: by the tensor's dimension, (d, d).
    """

    sides: dict[int, Tensor]

    @property
    def main(self) -> Tensor:
        """The first side's."""
        return next(iter(self.sides.values()))

    def apply(self, gradient: Tensor) -> Tensor:
        """The direction of a gradient in its tensor's own shape."""
        for dim, root in self.sides.items():
            gradient = torch.tensordot(gradient, root, dims=([dim], [0])).movedim(-1, dim)
        return gradient

    def apply_right(self, gradient: Tensor) -> Tensor:
        """The same."""
        return self.apply(gradient)

    def tensors(self) -> dict[str, Tensor]:
        """The sides, by their number."""
        return {str(dim): root for dim, root in self.sides.items()}

    def entries(self) -> Entries:
        """The same, and which sides are kept."""
        return {f"side{dim}": root for dim, root in self.sides.items()}


class ShampooState(LayerState):
    """What Shampoo keeps of a tensor; ``average`` holds the Lᵢ of the sides that are kept."""

    @staticmethod
    def _preconditioner(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
        return Roots({int(dim): root for dim, root in tensors.items()})

    @staticmethod
    def _from_entries(entries: Mapping[str, Any], shape: Shape, damping: float) -> Preconditioner:
        dims = sorted(int(name.removeprefix("side")) for name in entries if name.startswith("side"))
        if not dims:
            raise KeyError("side0")
        return Roots({dim: entries[f"side{dim}"].contiguous() for dim in dims})

    @property
    def roots(self) -> Roots:
        """The preconditioner."""
        assert isinstance(self.preconditioner, Roots)
        return self.preconditioner

    def __repr__(self) -> str:
        sides = ", ".join(f"{dim}: {len(root)}" for dim, root in self.roots.sides.items())
        return f"ShampooState(sides {{{sides}}}, {self.updates} updates, {self.numel():,} numbers kept)"


def side_products(gradient: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """GᵢGᵢᵀ, where Gᵢ is the gradient as a matrix with dimension i first."""
    unfolded = [gradient.movedim(dim, 0).flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1) for dim in dims]
    return [matrix @ matrix.T for matrix in unfolded]


def inverse_root(matrix: Tensor, damping: float, order: int) -> Tensor:
    """(matrix + λI)^(−1/order) of a positive semidefinite matrix, by its eigenvalues in float64."""
    values, vectors = torch.linalg.eigh(matrix.to(factor_dtype(matrix)))
    powers = (values.clamp_min(0.0) + damping).pow(-1.0 / order)
    root: Tensor = (vectors * powers) @ vectors.T
    return root.to(matrix.dtype)


class ShampooCurvature(Curvature):
    """The sides of all tensors."""

    state = ShampooState
    states: dict[Layer, ShampooState]  # type: ignore[assignment]

    def __init__(self, options: Options, generator: torch.Generator, sides: Sides) -> None:
        super().__init__(options, generator)
        self._sides = sides

    def gather(self, layer: Layer, damping: float, renew: bool) -> None:
        """Add the gradient that is there to the tensor's matrices; make roots if asked, or if there are none yet.

        A gradient that is not finite adds nothing.
        """
        gradient, before = layer.weight.grad, self.states.get(layer)
        if gradient is None:
            return
        if gradient.is_sparse:
            raise TypeError(f"the gradient of {layer.name} is sparse, of which Shampoo has no matrices")
        kept = [dim for dim, size in enumerate(gradient.shape) if size <= self._sides.max_side]
        dims = kept if before is None else list(before.roots.sides)
        if not dims:
            return
        products = side_products(gradient.to(statistics_dtype(gradient.dtype)), dims)
        finite = torch.stack([product.isfinite().all() for product in products]).all()
        if before is None:
            if bool(finite):
                self.states[layer] = self._renewed(layer, products, dims, damping, updates=1)
            return
        assert before.average is not None
        if before.preconditioner.main.device != gradient.device:
            before.to(gradient.device)
        before.average = [matrix.to(products[0].dtype) for matrix in before.average]
        for matrix, product in zip(before.average, products, strict=True):
            self._add(matrix, product, finite)
        if renew:
            self.states[layer] = self._renewed(layer, before.average, dims, damping, before.updates + 1)

    @property
    def _keeps_average(self) -> bool:
        return True

    def _blank(self, layer: Layer) -> Entries:
        sizes = {dim: size for dim, size in enumerate(layer.weight.shape) if size <= self._sides.max_side}
        dtype = statistics_dtype(layer.weight.dtype)
        sides = {dim: torch.empty(size, size, dtype=dtype, device="meta") for dim, size in sizes.items()}
        averages = {f"average{i}": side for i, side in enumerate(sides.values())}
        return {**averages, **{f"side{dim}": side for dim, side in sides.items()}}

    def _add(self, matrix: Tensor, product: Tensor, finite: Tensor) -> None:
        if self._sides.ema is None:
            matrix.add_(torch.where(finite, product, 0.0))
        else:
            matrix.lerp_(torch.where(finite, product, matrix), 1 - self._sides.ema)

    def _renewed(
        self, layer: Layer, matrices: list[Tensor], dims: list[int], damping: float, updates: int
    ) -> ShampooState:
        roots = {dim: inverse_root(matrix, damping, 2 * len(dims)) for dim, matrix in zip(dims, matrices, strict=True)}
        return ShampooState(layer.shape(None), Roots(roots), matrices, damping, updates)

    def _replace(self, member: Member) -> TouchedRows | None:
        """Put the direction in place of the tensor's gradient, as long as the gradient was if grafted."""
        gradient, roots = member.layer.weight.grad, member.preconditioner
        assert gradient is not None
        direction = roots.apply(gradient.to(roots.main.dtype))
        if self._sides.grafting == "sgd":
            length = direction.norm()
            direction = direction * torch.where(length > 0, gradient.norm() / length, 1.0)
        gradient.copy_(direction)
        return None


def _has_side(parameter: Tensor) -> bool:
    return parameter.dim() > 0 and not parameter.is_complex()


class Shampoo(Relative):
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

    _title: ClassVar[str] = "Shampoo"
    _key: ClassVar[str] = "shampoo"
    _shared = ("update_every", "nonfinite")
    _settings: Sides
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
        super().__init__(
            Sides(ema=ema, max_side=max_side, grafting=grafting),
            model,
            base,
            lr=lr,
            damping=damping,
            update_every=update_every,
            curvature="mini_batch",
            nonfinite=nonfinite,
            params=params,
            **base_options,
        )

    def _make_curvature(self) -> ShampooCurvature:
        return ShampooCurvature(self._options, self._generator, self._settings)

    def _find_layers(self) -> None:
        """Every real parameter that has a side, in place of layers with a matrix."""
        known = {id(layer.weight): layer for layer in getattr(self, "_layers", [])}
        named = [(name, parameter) for name, parameter in self._named_parameters() if _has_side(parameter)]
        self._layers = [known.get(id(parameter), Layer(name, parameter, None)) for name, parameter in named]
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        self._groups = {layer: groups[id(layer.weight)] for layer in self._layers}
        self._capture = None

    def _warn_of_unsupported(self) -> None:
        """There is nothing to warn of: no parameter is left out for what its module is."""

    def _wanted(self) -> list[Layer]:
        """Those that gather on this step: all of them, on every step."""
        return [layer for layer in self._layers if layer.weight.requires_grad]

    def _plan_late(self) -> list[Layer]:
        """None: a tensor gathers whenever it has a gradient."""
        return []

    @property
    def _due(self) -> bool:
        is_power_of_two = self._steps & (self._steps - 1) == 0
        return super()._due or (self._steps < self._options.update_every and is_power_of_two)

    def _update_curvature(self, wanted: list[Layer], *, with_batch: bool = True) -> None:
        if not with_batch:  # the gradient is that of all processes, so that nothing is averaged
            return
        due = self._due
        with self._stopwatch.measure("inverse" if due else "curvature"):
            for layer in wanted:
                self._curvature.gather(layer, self._damping(layer), due)
