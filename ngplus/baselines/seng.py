"""`SENG`: the empirical Fisher matrix of a whole layer, inverted through the Gram matrix of its samples' gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.layer import precondition_
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.baselines.sample_gradients import LookedUp, SampleGradients, from_tensors, gather, join
from ngplus.capture.accumulator import Accumulator, Sampling, Statistic, is_zero
from ngplus.capture.loss_reduction import LossReduction
from ngplus.config import LayerwiseOptions, NonFinite, Params, Samples
from ngplus.curvature.all_reduce import world_size
from ngplus.curvature.damped_cholesky import InverseRequest, invert_one
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.update import InverseCurvature, LayerCurvature
from ngplus.factors.pair import FactorPair, sample_indices
from ngplus.layers import Layer, MatrixShape, Side
from ngplus.layerwise import LayerwiseOptimizer
from ngplus.solvers.preconditioner import Entries, Preconditioner, append_column, split_column
from ngplus.tuning import DEFAULT, Tuning


@dataclass(frozen=True, kw_only=True)
class SENGOptions(LayerwiseOptions):
    """The choices of `SENG`; see there for what each means."""

    sketch_size: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("sketch_size")


@dataclass(eq=False)
class SampleStatistic(Statistic):
    """The gradients themselves in place of sums of their products.

    Attributes:
        gathered: a micro-batch each.
    """

    gathered: list[SampleGradients] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Everything that was gathered."""
        return [tensor for each in self.gathered for tensor in each.tensors().values()]

    def is_zero(self) -> bool:
        """Whether a factor of every micro-batch is; row numbers are none."""
        factors = [[t for name, t in each.tensors().items() if name != "index"] for each in self.gathered]
        return all(any(is_zero(tensor) for tensor in tensors) for tensors in factors)


class SampleAccumulator(Accumulator):
    """Keeps the gradients of single samples as factors."""

    statistic = SampleStatistic
    sums_gradients = False
    adds_together = False

    def _add_used_(self, statistic: Statistic, pairs: list[FactorPair], total: GradientSum | None = None) -> None:
        assert isinstance(statistic, SampleStatistic)
        statistic.gathered.append(gather(pairs, statistic.shape.groups, self._tuning))


@dataclass(eq=False)
class GramInverse(Preconditioner):
    """G ↦ (λI + UUᵀ)⁻¹G = (G − Uy)/λ, U holding the gradients of N samples over √N as vectors.

    Attributes:
        gradients: U.
        core: (λI + UᵀU)⁻¹, (N, N), and y = core·UᵀG; or, where y is sketched, (λI + UᵀΩᵀΩU)⁻¹UᵀΩᵀΩ, (N, q).
        damping: λ.
        sampled: (q,), the entries that Ω keeps; None where y is exact.
    """

    gradients: SampleGradients
    core: Tensor
    damping: float
    sampled: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The core."""
        return self.core

    def apply(
        self, gradient: Tensor, column: Tensor | None, side: Side, tuning: Tuning = DEFAULT
    ) -> tuple[Tensor, Tensor | None]:
        """The same from both sides: the matrix is that of the whole layer."""
        G = append_column(gradient, column)
        products = self.gradients.inner(G) if self.sampled is None else G.flatten()[self.sampled]
        return split_column((G - self.gradients.combine(self.core @ products, G)) / self.damping, column)

    def tensors(self) -> dict[str, Tensor]:
        """U, the core, λ and the sampled entries."""
        kept = {"core": self.core, "damping": torch.tensor(self.damping, dtype=torch.float64)}
        return {**self.gradients.tensors(), **kept, **({} if self.sampled is None else {"drawn": self.sampled})}

    def to(self, device: torch.device) -> GramInverse:
        """A copy on another device."""
        return self.from_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()}, self.damping)

    def entries(self) -> Entries:
        """The same; λ is an entry of the layer."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "damping"}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> GramInverse:
        """Restore one, see `Preconditioner.from_entries`."""
        return cls.from_tensors(entries, damping)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], damping: float) -> GramInverse:
        """Restore one from what `tensors` gave.

        Args:
            tensors: by name.
            damping: λ.

        Returns:
            The preconditioner.
        """
        return cls(from_tensors(tensors), tensors["core"], damping, tensors.get("drawn"))


class SENGState(LayerState):
    """What SENG keeps of a layer."""

    def _pack(self) -> Entries:
        return self.preconditioner.entries()

    @staticmethod
    def _unpack(entries: Mapping[str, Any], shape: MatrixShape, damping: float) -> Preconditioner:
        return GramInverse.from_entries(entries, shape, damping)

    @staticmethod
    def _unpack_first_layout(tensors: Mapping[str, Tensor], shape: MatrixShape) -> Preconditioner:
        return GramInverse.from_tensors(tensors, float(tensors["damping"]))

    def __repr__(self) -> str:
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"SENGState(matrix {size}{self.shape.rows}×{self.shape.columns}, damping {self.damping:.4g}, "
            f"{self.updates} updates, {self.numel():,} elements kept)"
        )


class SENGCurvature(InverseCurvature):
    """The Gram matrices of all layers.

    Args:
        sketch_size: entries that Ω keeps of each layer, or None.
        generator: samples them.
        tuning: see `Tuning`.
    """

    state_class = SENGState

    def __init__(self, sketch_size: int | None, generator: torch.Generator, tuning: Tuning) -> None:
        super().__init__(tuning=tuning)
        self._sketch_size = sketch_size
        self._generator = generator

    def update(
        self,
        layers: Sequence[Layer],
        statistics: Mapping[Layer, Statistic],
        damping: Mapping[Layer, float],
        loss_scale: float,
        unsupported: Collection[Layer] = (),
    ) -> tuple[list[Layer], list[Layer]]:
        """Update the preconditioners as `LayerCurvature` does, in a single process.

        Args:
            layers: as for `LayerCurvature.update`.
            statistics: likewise.
            damping: likewise.
            loss_scale: likewise.
            unsupported: likewise.

        Returns:
            As `LayerCurvature.update` does.

        Raises:
            RuntimeError: where several processes train together.
        """
        if world_size() > 1:
            raise RuntimeError("SENG keeps the samples of one process: it does not train in several together")
        return super().update(layers, statistics, damping, loss_scale, unsupported)

    def _scale_(self, layer: Layer, statistic: Statistic, loss_scale: float) -> None:
        """U of all micro-batches: gradients of single samples over √|S|."""
        assert isinstance(statistic, SampleStatistic)
        scale = statistic.scale() ** 0.5 / loss_scale
        statistic.gathered = [join(statistic.gathered, statistic.shape.rows).scale(scale)]

    def _requests(self, layer: Layer, statistic: Statistic, damping: float) -> list[InverseRequest]:
        return []

    def _blank_entries(self, layer: Layer) -> Entries:
        """None: samples are as many as the batch has, so that their sizes are not known before."""
        return {}

    def _make(self, statistic: Statistic, inverses: list[Tensor], damping: float) -> Preconditioner | None:
        assert isinstance(statistic, SampleStatistic)
        (U,) = statistic.gathered
        shape = statistic.shape
        size, elements = self._sketch_size, shape.groups * shape.rows * shape.columns
        if size is None or size >= elements:
            core = invert_one(U.gram(self._tuning), damping)
            return None if core is None else GramInverse(U, core, damping)
        sampled = sample_indices(elements, size, self._generator).to(U.device)
        rows, square_scale = U.entries(sampled, shape), elements / size
        core = invert_one(square_scale * (rows @ rows.T), damping)
        return None if core is None else GramInverse(U, square_scale * (core @ rows), damping, sampled)


def precondition_gram_(member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
    """`ngplus.apply.layer.precondition_`, but that a sparse gradient stays so, with the samples' rows added."""
    layer, inverse, gradient = member.layer, member.preconditioner, member.layer.weight.grad
    if gradient is None or not gradient.is_sparse or layer.trained_bias is not None:
        return precondition_(member, tuning)
    assert isinstance(inverse, GramInverse)
    index = _find_moving_rows(gradient, inverse.gradients)
    dense = gradient.to_dense()
    D, _ = inverse.apply(dense.to(inverse.main.dtype).unsqueeze(0), None, member.shape.side, tuning)
    rows = D[0, index].to(gradient.dtype)
    layer.weight.grad = torch.sparse_coo_tensor(index.unsqueeze(0), rows, gradient.shape, check_invariants=False)
    return None


def _find_moving_rows(gradient: Tensor, gradients: SampleGradients) -> Tensor:
    """Rows of a table that its direction may change: those of the gradient and of the samples."""
    if not isinstance(gradients, LookedUp):
        return torch.arange(gradient.shape[0], device=gradient.device)
    both = torch.cat([gradient._indices()[0], gradients.index.flatten()])
    rows: Tensor = torch.unique(both)
    return rows


class SENG(LayerwiseOptimizer):
    """SENG: the gradient g of each layer, as one vector, becomes (λI + 1/N Σᵢ gᵢgᵢᵀ)⁻¹ g.

    On every ``update_every``-th step the gradients gᵢ of the N samples of the batch are kept, as factors where that is
    less, together with what inverts the N × N matrix of their inner products. With U = (g₁ … g_N)/√N every step is

        y = (λI + UᵀU)⁻¹Uᵀg,        d = (g − Uy)/λ

    and where ``sketch_size`` is given, y solves min ‖Ω(Uy − g)‖² + λ‖y‖² for an Ω of that many of the layer's entries,
    sampled uniformly with replacement.

    Args:
        model: whose parameters are trained.
        base: optimizer class that gets the directions.
        lr: of ``base``.
        damping: λ > 0, in ``param_groups``; a change takes effect at the next curvature step.
        update_every: steps between curvature steps.
        sketch_size: entries that Ω keeps of each layer; None, or as many as there are, for the exact y.
        samples: as for `NGPlus`.
        max_samples: as for `NGPlus`: what is kept and each step's work grow with it.
        batch_dim: as for `NGPlus`.
        loss_reduction: as for `NGPlus`.
        nonfinite: as for `NGPlus`.
        params: as for `NGPlus`.
        **base_options: everything else goes to ``base``.

    A layer's groups and its bias are part of the same vector. Trains in a single process.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take.
        ValueError: a value out of range, or a model without a supported layer.

    Source: Yang, Xu, Wen, Chen & Xu, "Sketch-Based Empirical Natural Gradient Methods for Deep Learning", arXiv
    2006.05924.
    """

    title: ClassVar[str] = "SENG"
    key: ClassVar[str] = "seng"

    _options: SENGOptions

    def __init__(
        self,
        model: nn.Module,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lr: float | Tensor = 0.1,
        damping: float = 0.2,
        update_every: int = 200,
        sketch_size: int | None = None,
        samples: Samples = "batch",
        max_samples: int | None = None,
        batch_dim: int | Mapping[str, int] = 0,
        loss_reduction: LossReduction = "mean",
        nonfinite: NonFinite = "skip",
        params: Params | None = None,
        **base_options: Any,
    ) -> None:
        options = SENGOptions(
            update_every=update_every,
            sketch_size=sketch_size,
            samples=samples,
            max_samples=max_samples,
            batch_dim=batch_dim,
            loss_reduction=loss_reduction,
            nonfinite=nonfinite,
        )
        super().__init__(model, base, options, lr=lr, damping=damping, params=params, base_options=base_options)

    def _shown_options(self) -> Mapping[str, object]:
        names = ("update_every", "batch_dim", "loss_reduction", "nonfinite", "samples", "max_samples", "sketch_size")
        return {name: getattr(self._options, name) for name in names}

    def _make_curvature(self) -> LayerCurvature:
        return SENGCurvature(self._options.sketch_size, self._generator, self.tuning)

    def _make_accumulator(self) -> Accumulator:
        return SampleAccumulator(Sampling.from_options(self._options), self._generator, self.tuning)

    def _precondition_layer_(self, member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
        return precondition_gram_(member, tuning)


__all__ = ["SENG"]
