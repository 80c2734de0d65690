"""`KFAC`: Kronecker-factored approximate curvature on NG+'s capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.sparse_grad import NonzeroRows
from ngplus.baselines.kronecker import (
    FactorAccumulator,
    KroneckerCurvature,
    Split,
    is_table,
    precondition_factors_,
)
from ngplus.capture.accumulator import Accumulator, Sampling
from ngplus.capture.loss_reduction import LossReduction
from ngplus.config import LayerwiseOptions, NonFinite, Params, check_choice, check_count, check_ema
from ngplus.curvature.update import LayerCurvature
from ngplus.layerwise import LayerwiseOptimizer
from ngplus.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class KFACOptions(LayerwiseOptions):
    """The choices of `KFAC`; see there for what each means."""

    ema: float
    split: Split
    max_side: int

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ema", check_ema(self.ema))
        check_choice("split", self.split, Split)
        check_count("max_side", self.max_side, optional=False)


class KFAC(LayerwiseOptimizer):
    """K-FAC: the gradient G of each layer becomes (B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹.

    On every ``update_every``-th step, with N samples of T positions each (T = 1 but for convolutions and sequences;
    every further use of a layer in the same pass adds its positions),

        A = 1/N Σᵢₜ aᵢₜ aᵢₜᵀ,        B = 1/(N T) Σᵢₜ gᵢₜ gᵢₜᵀ,        π = √((tr A / dim A) / (tr B / dim B))

    where a is a layer's input, 1 appended for the bias, and g the gradient of a sample's own loss with respect to its
    output: the empirical Fisher matrix, from the backward that gives the gradient. Both are averaged over time.

    Args:
        model: whose parameters are trained.
        base: optimizer class that gets the preconditioned gradients.
        lr: of ``base``.
        damping: λ > 0, in ``param_groups``; a change takes effect at the next curvature step.
        update_every: steps between curvature steps.
        ema: β in [0, 1): A ← β A + (1 − β) A_new, from the first A on.
        split: "trace" for π as above, "equal" for π = 1.
        max_side: a factor longer than this is kept as its diagonal. So is, exactly, the A of an embedding.
        batch_dim: as for `NGPlus`.
        loss_reduction: as for `NGPlus`.
        nonfinite: as for `NGPlus`.
        params: as for `NGPlus`.
        **base_options: everything else goes to ``base``.

    A convolution's groups have a pair of factors each, damped with one π. A weight that is both looked up and
    multiplied, or multiplied from the other side (x W), goes to ``base`` as it is, as do the parameters that `NGPlus`
    leaves alone.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take.
        ValueError: a value out of range, or a model without a supported layer.

    Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015),
    sections 3, 5 and 6.3; convolutions: Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers" (2016), section 3.
    """

    title: ClassVar[str] = "K-FAC"
    key: ClassVar[str] = "kfac"

    _options: KFACOptions

    def __init__(
        self,
        model: nn.Module,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lr: float | Tensor = 0.1,
        damping: float = 0.1,
        update_every: int = 100,
        ema: float = 0.95,
        split: Split = "trace",
        max_side: int = 8192,
        batch_dim: int | Mapping[str, int] = 0,
        loss_reduction: LossReduction = "mean",
        nonfinite: NonFinite = "skip",
        params: Params | None = None,
        **base_options: Any,
    ) -> None:
        options = KFACOptions(
            update_every=update_every,
            ema=ema,
            split=split,
            max_side=max_side,
            batch_dim=batch_dim,
            loss_reduction=loss_reduction,
            nonfinite=nonfinite,
        )
        super().__init__(model, base, options, lr=lr, damping=damping, params=params, base_options=base_options)

    def _shown_options(self) -> Mapping[str, object]:
        names = ("update_every", "batch_dim", "loss_reduction", "nonfinite", "ema", "split", "max_side")
        return {name: getattr(self._options, name) for name in names}

    def _make_curvature(self) -> LayerCurvature:
        assert self._model is not None
        options = self._options
        return KroneckerCurvature(
            self._model, ema=options.ema, max_side=options.max_side, split=options.split, tuning=self.tuning
        )

    def _make_accumulator(self) -> Accumulator:
        assert self._model is not None
        return FactorAccumulator(
            Sampling.from_options(self._options),
            self._generator,
            self.tuning,
            tables=[layer for layer in self._layers if is_table(self._model, layer)],
            max_side=self._options.max_side,
        )

    def _precondition_layer_(self, member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
        return precondition_factors_(member, tuning)


__all__ = ["KFAC"]
