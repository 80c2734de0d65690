"""`NGPlus`: its signature, and what it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.apply.rotation import Rotation
from ngplus.base_rules import find_rule
from ngplus.capture.accumulator import Accumulator, Sampling, Statistic
from ngplus.capture.loss_reduction import LossReduction
from ngplus.config import (
    Basis,
    Curvature,
    DampingRule,
    FunctionFallback,
    Inverses,
    ModelCallSamples,
    NonFinite,
    Options,
    Params,
    PartialCapture,
    Samples,
    Sides,
    SolverName,
)
from ngplus.curvature.eigen import EigenCurvature, ModeAccumulator
from ngplus.curvature.gfim import GFIM, sampling
from ngplus.curvature.store import CurvatureStore
from ngplus.dtensors import is_sharded
from ngplus.guards.finite_check import FiniteCheck
from ngplus.layers import Layer, find_layers
from ngplus.layerwise import LayerwiseOptimizer
from ngplus.sharded.sharding import find_cut_matrices


class NGPlus(LayerwiseOptimizer):
    """NG+: the gradient of every layer, as a matrix, times the inverse of its generalized Fisher information.

    On every ``update_every``-th step the optimizer builds, for each weight matrix m × n (the bias is one more
    column), from the gradients 𝒢ᵢ of single samples

        L = 1/|S| Σᵢ 𝒢ᵢ𝒢ᵢᵀ   where m ≤ n  (4),        R = 1/|S| Σᵢ 𝒢ᵢᵀ𝒢ᵢ   where m > n  (5)

    and on every step it replaces the gradient G by

        (λI + L)⁻¹ G   or   G (λI + R)⁻¹   (6)

    before ``base`` makes its own step with it. Norms, vectors and biases of other layers than
    these go to ``base`` as they are.

    Args:
        model: whose parameters are trained. With ``curvature="mini_batch"`` also parameters or parameter groups.
        base: optimizer class that gets the preconditioned gradients. `torch.optim.SGD` with its defaults is (7).
        lr: learning rate α of ``base``, ≥ 0; Python's number, NumPy's, or a tensor with one element.
        damping: λ of (6), > 0, a number of any of these kinds. Lives in ``param_groups``, so that schedulers change
            it; a change takes effect at the next curvature step, since the inverse is kept until then (as the paper
            keeps it).
        update_every: 𝒯, steps between curvature steps, ≥ 1.
        curvature: "per_sample" for (4)(5), or "mini_batch" for (12): products of the mini-batch gradient itself. With a
            basis also "momentum": products of the base's first moment.
        ema: β of (11) (and of (12), where γ = 1 − β), in [0, 1).
        solver: "dense" (6), "low_rank" (14), "sketched" (16)(17), or "auto": the cheapest exact one for each layer.
        block_size: p of (18): only diagonal blocks of this size are kept. None keeps the whole matrix.
        sketch_size: q of (16)(17), for ``solver="sketched"``.
        samples: "batch": a sample is one element of a layer's input along its batch dimension, its other dimensions
            are the positions κ of (8). "rows": every position is a sample of its own.
        batch_dim: where linear layers and embeddings have their samples: 1 for (T, B, C) inputs; or a dict from
            module names, or patterns of them, to dimensions; a name is for all that is inside of the module.
            Convolutions, recurrent layers and `nn.MultiheadAttention` know theirs.
        model_calls: which calls of the model before one ``backward`` see the same samples. "separate": a call is one
            batch, and sees the samples of another only where a gradient can flow from one into the other (an
            encoder's call and its decoder's, the time steps of a cell). "joined": row i of every call is sample i (the
            branches of a siamese network). Several uses of a layer inside one call are by the same samples; where they
            may be pieces of a batch that the call goes through, "separate" leaves the layer to ``base``, and "joined"
            does not. "apart": every use of a layer sees samples of its own, inside one call too.
        loss_reduction: what the loss divides by: "mean" for the samples that a layer saw, "sum" for nothing, or the
            number N itself, where a mean is over fewer (targets that are not ignored, the sum of class weights) or
            over more (all tokens, of which an expert sees some). Also a dict from patterns of module names to these,
            or a function that returns one and is called on curvature steps; `loss_reduction` can be set before any
            step. With gradient accumulation the step's loss is the sum of all that went through ``backward``.
        partial_capture: what becomes of a layer whose gradient is not the sum of what was captured of it, since its
            weight is used outside of the model's calls too, or in a penalty, or in derivatives: "base" leaves it to
            ``base`` with a warning; "accept" takes the curvature of what was captured.
        function_fallback: what becomes of a weight that goes into a function whose calls no handler reads, and of
            parameters of two or more dimensions of modules that are not supported: "vmap" differentiates the function
            again for single samples (`torch.func.vmap` of its vector-Jacobian product); "base" leaves them to ``base``.
        damping_rule: "paper": L + λI; "released": L + √λ I, as the authors' code has it.
        inverses: of a model after `torch.distributed.fsdp.fully_shard`, where they are kept. "replicated": on every
            process, so that a matrix sharded along its longer side needs no communication; "sharded": each on one
            process, which gets the gradient and returns the direction; "auto": on every process where that saves the
            communication and takes a sixteenth of the weight at most, else on one.
        max_samples: |S| of (4), at most: so many of a step's samples, the first that each layer gets, are used for its
            curvature. Several processes use equal shares of them.
        nonfinite: "skip": where any preconditioned gradient holds NaN or Inf, all gradients count as zero for this
            step (decided on the device, without synchronizing); "raise": `FloatingPointError` before anything changes.
        update_growth: share by which the number of steps grows from one curvature step to the next, > 0, until they are
            ``update_every`` apart; None for every ``update_every`` steps from the start.
        staggered: whether each layer has its curvature steps in its own turn, still ``update_every`` apart, once all
            have had their first: no later step then builds the curvature of the whole model.
        basis: None for (6). "eigen" (not in the paper): ``base`` makes its step on the gradient's coordinates in the
            eigenvectors of the curvature, Q_LᵀG Q_R, and its change Δʹ is brought back, Q_L Δʹ Q_Rᵀ. Nothing is
            inverted, and ``damping`` is not used. ``base`` must scale entries one by one, as Adam does; those of other
            packages than torch are declared by `register_base`. Then ``curvature`` may be "momentum" too: the product
            of the base's first moment, and the parameters of modules that are not supported go to ``base``, as biases
            do. See docs/eigenbasis.md.
        sides: with a basis, "short": of the shorter side of each matrix alone; "both": of both, and of a convolution's
            kernel positions apart from its input channels. The rows of an embedding have none.
        max_side: with a basis, the longest side that has one.
        params: parameter groups of ``model``, each with its own lr, damping, weight decay and so on; default: all of
            its parameters in one group.
        **base_options: everything else goes to ``base``.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take.
        ValueError: a value out of range, a name that fits no module, or a model without a supported layer.

    Source: Yang et al., "NG+: A Multi-Step Matrix-Product Natural Gradient Method for Deep Learning", Algorithm 1;
    deviations are in docs/errata.md.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = NGPlus(model, lr=0.1, damping=1.0, update_every=10, momentum=0.9)
        >>> x, y = torch.randn(16, 4), torch.randn(16, 1)
        >>> for _ in range(3):
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    title: ClassVar[str] = "NG+"
    key: ClassVar[str] = "ngplus"
    takes_parameters: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = True

    _options: Options
    _rotation: Rotation | None

    def __init__(
        self,
        model: nn.Module | Params,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        lr: float | Tensor = 0.18,
        damping: float = 0.16,
        update_every: int = 500,
        curvature: Curvature = "per_sample",
        ema: float = 0.0,
        solver: SolverName = "auto",
        block_size: int | None = None,
        sketch_size: int | None = None,
        samples: Samples = "batch",
        batch_dim: int | Mapping[str, int] = 0,
        model_calls: ModelCallSamples = "separate",
        loss_reduction: LossReduction = "mean",
        partial_capture: PartialCapture = "base",
        function_fallback: FunctionFallback = "vmap",
        damping_rule: DampingRule = "paper",
        inverses: Inverses = "auto",
        max_samples: int | None = None,
        nonfinite: NonFinite = "skip",
        update_growth: float | None = None,
        staggered: bool = False,
        basis: Basis | None = None,
        sides: Sides = "short",
        max_side: int = 8192,
        params: Params | None = None,
        **base_options: Any,
    ) -> None:
        options = Options(
            update_every=update_every,
            curvature=curvature,
            ema=ema,
            solver=solver,
            block_size=block_size,
            sketch_size=sketch_size,
            samples=samples,
            batch_dim=batch_dim,
            model_calls=model_calls,
            loss_reduction=loss_reduction,
            partial_capture=partial_capture,
            function_fallback=function_fallback,
            damping_rule=damping_rule,
            inverses=inverses,
            max_samples=max_samples,
            nonfinite=nonfinite,
            update_growth=update_growth,
            staggered=staggered,
            basis=basis,
            sides=sides,
            max_side=max_side,
        )
        if basis is not None:
            self._check_rule(base, curvature)
        super().__init__(model, base, options, lr=lr, damping=damping, params=params, base_options=base_options)

    @staticmethod
    def _check_rule(base: type[Optimizer], curvature: Curvature) -> None:
        """Refuse a base that cannot step in a basis, or has no first moment where that is wanted."""
        if find_rule(base).momentum is None and curvature == "momentum":
            raise ValueError(f'curvature="momentum" needs a base with a first moment, got base={base.__name__}')

    @property
    def _works_on_gradients(self) -> bool:
        return self._options.curvature != "per_sample"

    @property
    def _inverses(self) -> Inverses:
        return self._options.inverses

    def _check_parameters(self) -> None:
        """With a basis, refuse what is sharded: the base's step in it needs whole gradients."""
        super()._check_parameters()
        sharded = [name for name, parameter in self._named_parameters() if is_sharded(parameter)]
        if self._options.basis is not None and sharded:
            raise TypeError(
                f"{sharded[0]} is a DTensor: basis={self._options.basis!r} needs whole weights; take basis=None, or "
                "wrap the model in torch.nn.parallel.DistributedDataParallel"
            )

    def _make_curvature(self) -> CurvatureStore:
        self._rotation = None
        if self._options.basis is None:
            return GFIM(self._options, self._generator, self.tuning)
        rule = find_rule(type(self._base))
        momentum = rule.momentum if self._options.curvature == "momentum" else None
        curvature = EigenCurvature(self._options, momentum, self.tuning)
        self._rotation = Rotation(curvature, rule, self.tuning)
        return curvature

    def _find_supported_layers(self, model: nn.Module) -> list[Layer]:
        """Every matrix; with a basis those of supported modules alone."""
        every_matrix = self._options.function_fallback == "vmap" and self._options.basis is None
        found = find_layers(model, self._options.batch_dim, every_matrix=every_matrix)
        cut = set(find_cut_matrices(found))
        return [layer for layer in found if layer not in cut]

    def _why_unsupported(self, parameter: Tensor) -> str:
        if parameter.is_complex():
            return super()._why_unsupported(parameter)
        if self._options.basis is not None:
            return f"basis={self._options.basis!r} is for supported modules alone"
        if self._options.function_fallback == "base":
            return 'function_fallback="base" is for supported modules alone'
        return "each process has a part of every matrix of it; let fully_shard shard it along dimension 0"

    def _find_layers(self) -> list[Layer]:
        """With a basis a layer is its weight, if any mode of it has one.

        Without a model a matrix may be a table of rows. It is taken for none, but where the base takes tables alone.
        """
        found = super()._find_layers()
        if not isinstance(self._curvature, EigenCurvature):
            return found
        if self._model is None and not isinstance(self._base, torch.optim.SparseAdam):
            found = [replace(layer, row_sparse=False) for layer in found]
        return [layer.without_bias() for layer in found if self._curvature.modes(layer).kept]

    def _update_layers(self) -> None:
        super()._update_layers()
        shapes = [layer.shape(None) for layer in self._layers]
        sides = [sorted((shape.rows, shape.columns)) for shape in shapes]
        costs = [shape.groups * p * p * q for shape, (p, q) in zip(shapes, sides, strict=True)]
        self._turns: dict[int, list[Layer]] = {}
        for layer, turn in zip(self._layers, self._options.find_turns(costs), strict=True):
            self._turns.setdefault(turn, []).append(layer)

    def _layers_to_capture(self) -> list[Layer]:
        """Those whose turn it is, and those that are captured again."""
        if not self._options.staggered:
            return super()._layers_to_capture()
        due = [
            each for turn, layers in self._turns.items() if self._options.is_due(self._steps, turn) for each in layers
        ]
        return list(dict.fromkeys([*due, *self._coverage.pending]))

    def _make_accumulator(self) -> Accumulator:
        if self._rotation is None:
            return Accumulator(sampling(self._options, self.tuning), self._generator, self.tuning)
        sampled = Sampling.from_options(self._options, function_fallback=self._options.function_fallback)
        return ModeAccumulator(sampled, self._generator, self.tuning, options=self._options)

    def _sum_gradients(self, layers: Sequence[Layer]) -> Mapping[Layer, Statistic]:
        """The mini-batch form (12), or that of the momentum."""
        if isinstance(self._curvature, EigenCurvature):
            return self._curvature.sum_gradients(layers, self._base.state)
        assert isinstance(self._curvature, GFIM)
        return self._curvature.sum_mini_batch(layers)

    def _note_replaced(self) -> None:
        """With a basis, refuse it: what the base has of the new parameters is in the basis of the old ones."""
        trained = self._find_trained()
        if self._rotation is not None and any(id(layer.weight) not in trained for layer in self._layers):
            raise RuntimeError(
                "parameters of a group were replaced by others, whose state, if it was taken from the old ones, is in "
                f"the basis of those: with basis={self._options.basis!r} make the optimizer again, or take basis=None"
            )
        super()._note_replaced()

    # The base's step in the eigenbasis ------------------------------------------------------------------------------

    def _update_curvature(self, layers: list[Layer], *, with_batch: bool = True) -> None:
        if self._rotation is None or not layers:
            super()._update_curvature(layers, with_batch=with_batch)
            return
        self._rotation.check_state(layers, self._base.state)
        self._follow_devices()  # the base's state moves by a basis on the device of the gradients
        before = self._rotation.bases()
        super()._update_curvature(layers, with_batch=with_batch)
        self._rotation.forget()
        self._rotation.move_state_(before, self._base.state)

    def _apply_(self) -> None:
        if self._rotation is None:
            super()._apply_()
            return
        if self._trained != self._find_trained():
            self._check_model()
        check = FiniteCheck(self.tuning)
        self._rotation.rotate_(self._groups, check, self._base.state)
        self._keep_finite_(check)

    def _finish_base_step_(self) -> None:
        if self._rotation is None:
            return
        with torch.no_grad(), self._stopwatch.measure("apply"):
            self._rotation.rotate_back_()
        if not self._base_has_stepped:
            self._rotation.check_state(self._layers, self._base.state)

    def _restore_gradients_(self) -> None:
        super()._restore_gradients_()
        if self._rotation is not None:
            self._rotation.restore_()


__all__ = ["NGPlus"]
