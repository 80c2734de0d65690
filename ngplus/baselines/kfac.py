"""`KFAC`: Kronecker-factored approximate curvature on NG+'s capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.arguments import Params
from ngplus.baselines.kronecker import KroneckerCapture, KroneckerCurvature, Split
from ngplus.baselines.relative import Relative
from ngplus.capture import Capture
from ngplus.curvature import Curvature, sampling
from ngplus.loss_reduction import LossReduction
from ngplus.options import NonFinite, check_choice, check_count


@dataclass(frozen=True, kw_only=True)
class Factors:
    """How the factors are damped and kept."""

    split: Split
    max_side: int

    def __post_init__(self) -> None:
        check_choice("split", self.split, Split)
        check_count("max_side", self.max_side, optional=False)


class KFAC(Relative):
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

    _title: ClassVar[str] = "K-FAC"
    _key: ClassVar[str] = "kfac"
    _shared = (*Relative._shared, "ema")
    _settings: Factors

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
        super().__init__(
            Factors(split=split, max_side=max_side),
            model,
            base,
            lr=lr,
            damping=damping,
            update_every=update_every,
            ema=ema,
            batch_dim=batch_dim,
            loss_reduction=loss_reduction,
            nonfinite=nonfinite,
            params=params,
            **base_options,
        )

    def _make_curvature(self) -> Curvature:
        assert self._model is not None
        settings = self._settings
        return KroneckerCurvature(self._options, self._generator, self._model, settings.max_side, settings.split)

    def _make_capture(self, model: nn.Module) -> Capture:
        return KroneckerCapture(
            model, self._layers, sampling(self._options), self._stopwatch, self._generator, self._settings.max_side
        )
