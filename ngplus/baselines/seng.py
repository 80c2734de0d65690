"""`SENG`: the empirical Fisher matrix of a whole layer, inverted through the Gram matrix of its samples' gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus import distributed, gfim
from ngplus.arguments import Params
from ngplus.baselines.relative import Relative
from ngplus.baselines.sample_gradients import LookedUp, SampleGradients, from_tensors, gather, joined
from ngplus.batching import Member
from ngplus.capture import Capture, Statistic, is_zero
from ngplus.curvature import Curvature, LayerState, sampling
from ngplus.gfim import Part, Shape
from ngplus.inverse import Request, invert_one
from ngplus.layers import Layer
from ngplus.loss_reduction import LossReduction
from ngplus.options import NonFinite, Options, Samples, check_count
from ngplus.preconditioner import Entries, Preconditioner
from ngplus.touched import TouchedRows


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """How the least-squares problem for the coefficients is sketched."""

    sketch_size: int | None

    def __post_init__(self) -> None:
        check_count("sketch_size", self.sketch_size)


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


class SampleCapture(Capture):
    """Keeps the gradients of single samples as factors."""

    _statistic = SampleStatistic

    def _add_samples(self, statistic: Statistic, parts: list[Part]) -> None:
        assert isinstance(statistic, SampleStatistic)
        samples = parts[0].rows.samples
        room = self._room(statistic, samples)
        statistic.seen += samples
        statistic.used += room
        if room:
            parts = [Part(part.rows.slice(0, room), part.columns.slice(0, room)) for part in parts]
            statistic.gathered.append(gather(parts, statistic.shape.groups))

    def _add_rows(self, statistic: Statistic, part: Part) -> None:
        self._add_samples(statistic, [gfim.positions_as_samples(part)])


@dataclass(eq=False)
class GramInverse:
    """G ↦ (λI + UUᵀ)⁻¹G = (G − Uy)/λ, U holding the gradients of N samples over √N as vectors.

    Attributes:
        gradients: U.
        core: (λI + UᵀU)⁻¹, (N, N), and y = core·UᵀG; or, where y is sketched, (λI + UᵀΩᵀΩU)⁻¹UᵀΩᵀΩ, (N, q).
        damping: λ.
        drawn: (q,), the entries that Ω keeps; None where y is exact.
    """

    gradients: SampleGradients
    core: Tensor
    damping: float
    drawn: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The core."""
        return self.core

    def apply(self, gradient: Tensor) -> Tensor:
        """The direction of G (groups, m, n)."""
        seen = self.gradients.inner(gradient) if self.drawn is None else gradient.flatten()[self.drawn]
        return (gradient - self.gradients.combined(self.core @ seen, gradient)) / self.damping

    def apply_right(self, gradient: Tensor) -> Tensor:
        """The same: the matrix is that of the whole layer."""
        return self.apply(gradient)

    def tensors(self) -> dict[str, Tensor]:
        """U, the core, λ and what was drawn."""
        kept = {"core": self.core, "damping": torch.tensor(self.damping, dtype=torch.float64)}
        return {**self.gradients.tensors(), **kept, **({} if self.drawn is None else {"drawn": self.drawn})}

    def entries(self) -> Entries:
        """The same; λ is an entry of the layer."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "damping"}


class SENGState(LayerState):
    """What SENG keeps of a layer."""

    @staticmethod
    def _preconditioner(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
        damping = float(tensors["damping"])
        return GramInverse(from_tensors(tensors), tensors["core"], damping, tensors.get("drawn"))

    @staticmethod
    def _from_entries(entries: Mapping[str, Any], shape: Shape, damping: float) -> Preconditioner:
        return GramInverse(from_tensors(entries), entries["core"], damping, entries.get("drawn"))

    def __repr__(self) -> str:
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"SENGState(matrix {size}{self.shape.rows}×{self.shape.columns}, damping {self.damping:.4g}, "
            f"{self.updates} updates, {self.numel():,} numbers kept)"
        )


class SENGCurvature(Curvature):
    """The Gram matrices of all layers."""

    state = SENGState

    def __init__(self, options: Options, generator: torch.Generator, sketch_size: int | None) -> None:
        super().__init__(options, generator)
        self._sketch_size = sketch_size

    def update(
        self,
        layers: Sequence[Layer],
        statistics: Mapping[Layer, Statistic],
        damping: Mapping[Layer, float],
        loss_scale: float,
        unsupported: Collection[Layer] = (),
    ) -> tuple[list[Layer], list[Layer]]:
        """As in `Curvature`, in a single process.

        Raises:
            RuntimeError: where several processes train together.
        """
        if distributed.world_size() > 1:
            raise RuntimeError("SENG keeps the samples of one process: it does not train in several together")
        return super().update(layers, statistics, damping, loss_scale, unsupported)

    def _scaled(self, layer: Layer, statistic: Statistic, loss_scale: float) -> Statistic:
        """U of all micro-batches: gradients of single samples over √|S|."""
        assert isinstance(statistic, SampleStatistic)
        scale = statistic.scale() ** 0.5 / loss_scale
        statistic.gathered = [joined(statistic.gathered, statistic.shape.rows).scaled(scale)]
        return statistic

    def _prepare(self, layer: Layer, statistic: Statistic, damping: float) -> list[Request]:
        return []

    def _blank(self, layer: Layer) -> Entries:
        """None: samples are as many as the batch has, so that their sizes are not known before."""
        return {}

    def _made(self, statistic: Statistic, requests: Sequence[Request], damping: float) -> Preconditioner | None:
        assert isinstance(statistic, SampleStatistic)
        (U,) = statistic.gathered
        shape = statistic.shape
        size, numbers = self._sketch_size, shape.groups * shape.rows * shape.columns
        if size is None or size >= numbers:
            core = invert_one(U.gram(), damping)
            return None if core is None else GramInverse(U, core, damping)
        drawn = gfim.drawn(numbers, size, self._generator).to(U.device)
        rows, square_scale = U.entries(drawn, shape), numbers / size
        core = invert_one(square_scale * (rows @ rows.T), damping)
        return None if core is None else GramInverse(U, square_scale * (core @ rows), damping, drawn)

    def _replace(self, member: Member) -> TouchedRows | None:
        """As in `Curvature`; a table's sparse gradient comes back with the rows that samples looked up added."""
        layer, inverse, gradient = member.layer, member.preconditioner, member.layer.weight.grad
        if gradient is None or not gradient.is_sparse or layer.trained_bias is not None:
            return super()._replace(member)
        assert isinstance(inverse, GramInverse)
        touched = _touched_rows(gradient, inverse.gradients)
        dense = gradient.to_dense()
        rows = inverse.apply(dense.to(inverse.main.dtype).unsqueeze(0))[0, touched].to(gradient.dtype)
        indices = touched.unsqueeze(0)
        layer.weight.grad = torch.sparse_coo_tensor(indices, rows, gradient.shape, check_invariants=False)
        return None


def _touched_rows(gradient: Tensor, gradients: SampleGradients) -> Tensor:
    """Rows of a table that its direction may change: those of the gradient and of the samples."""
    if not isinstance(gradients, LookedUp):
        return torch.arange(gradient.shape[0], device=gradient.device)
    both = torch.cat([gradient._indices()[0], gradients.index.flatten()])
    rows: Tensor = torch.unique(both)
    return rows


class SENG(Relative):
    """SENG: the gradient g of each layer, as one vector, becomes (λI + 1/N Σᵢ gᵢgᵢᵀ)⁻¹ g.

    On every ``update_every``-th step the gradients gᵢ of the N samples of the batch are kept, as factors where that is
    less, together with what inverts the N × N matrix of their inner products. With U = (g₁ … g_N)/√N every step is

        y = (λI + UᵀU)⁻¹Uᵀg,        d = (g − Uy)/λ

    and where ``sketch_size`` is given, y solves min ‖Ω(Uy − g)‖² + λ‖y‖² for an Ω of that many of the layer's entries,
    drawn uniformly with replacement.

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

    _title: ClassVar[str] = "SENG"
    _key: ClassVar[str] = "seng"
    _shared = (*Relative._shared, "samples", "max_samples")
    _settings: Sketch

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
        super().__init__(
            Sketch(sketch_size=sketch_size),
            model,
            base,
            lr=lr,
            damping=damping,
            update_every=update_every,
            samples=samples,
            max_samples=max_samples,
            batch_dim=batch_dim,
            loss_reduction=loss_reduction,
            nonfinite=nonfinite,
            params=params,
            **base_options,
        )

    def _make_curvature(self) -> Curvature:
        return SENGCurvature(self._options, self._generator, self._settings.sketch_size)

    def _make_capture(self, model: nn.Module) -> Capture:
        return SampleCapture(model, self._layers, sampling(self._options), self._stopwatch, self._generator)
