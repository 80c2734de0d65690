"""`NGPlus`: the thin optimizer around curvature, inverse and base."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from ngplus import distributed, eager
from ngplus.arguments import Params, check_group, check_whole, make_base, model_and_params
from ngplus.capture import Capture, Statistic, is_zero
from ngplus.curvature import Curvature as CurvatureOfLayers
from ngplus.curvature import LayerState, layer_statistic, sampling
from ngplus.distributed import world_size
from ngplus.grouping import SampleIndex
from ngplus.join import StepHook, joinables, refuse_without
from ngplus.layers import SUPPORTED, Layer, find_layers, parameter_layers, unsupported_modules
from ngplus.loss_reduction import LossReduction, reduction_of
from ngplus.mixed_precision import loss_scale, without_autocast
from ngplus.model_parameters import ModelParameters
from ngplus.nonfinite import Watch, nonfinite_names, zero_where
from ngplus.options import (
    Curvature,
    DampingRule,
    ModelCallSamples,
    NonFinite,
    Options,
    PartialCapture,
    Samples,
    Solver,
    check_positive,
)
from ngplus.state import Layout, Progress, initializes_state
from ngplus.step_hooks import step_within_a_step
from ngplus.times import StepTimes, Stopwatch
from ngplus.touched import Loan

LATE_TRIES = 3
"""How many steps in a row a layer that has a gradient but no curvature is watched for, between curvature steps."""


UNSEEN = "has a gradient on a curvature step, but no backward pass through the model was seen to bring it"
"""Why a layer that has a curvature is left to the base where none of its uses was captured."""


class NGPlus(Optimizer, Joinable):
    """NG+: the gradient of every layer, as a matrix, times the inverse of its generalized Fisher information.

    On every ``update_every``-th step the optimizer builds, for each weight matrix m × n (the bias is one more
    column), from the gradients 𝒢ᵢ of single samples

        L = 1/|S| Σᵢ 𝒢ᵢ𝒢ᵢᵀ   where m ≤ n  (4),        R = 1/|S| Σᵢ 𝒢ᵢᵀ𝒢ᵢ   where m > n  (5)

    and on every step it replaces the gradient G by

        (λI + L)⁻¹ G   or   G (λI + R)⁻¹   (6)

    before ``base`` makes its own step with it. Parameters outside of supported layers (norms, recurrent layers,
    bare parameters) go to ``base`` as they are.

    Args:
        model: whose parameters are trained. With ``curvature="mini_batch"`` also parameters or parameter groups.
        base: optimizer class that gets the preconditioned gradients. `torch.optim.SGD` with its defaults is (7).
        lr: learning rate α of ``base``, ≥ 0; Python's number, NumPy's, or a tensor with one element.
        damping: λ of (6), > 0, a number of any of these kinds. Lives in ``param_groups``, so that schedulers change
            it; a change takes effect at the next curvature step, since the inverse is kept until then (as the paper
            keeps it).
        update_every: 𝒯, steps between curvature steps, ≥ 1.
        curvature: "per_sample" for (4)(5), or "mini_batch" for (12): products of the mini-batch gradient itself.
        ema: β of (11) (and of (12), where γ = 1 − β), in [0, 1).
        solver: "dense" (6), "low_rank" (14), "sketched" (16)(17), or "auto": the cheapest exact one for each layer.
        block_size: p of (18): only diagonal blocks of this size are kept. None keeps the whole matrix.
        sketch_size: q of (16)(17), for ``solver="sketched"``.
        samples: "batch": a sample is one element of a layer's input along its batch dimension, its other dimensions
            are the positions κ of (8). "rows": every position is a sample of its own.
        batch_dim: where linear layers and embeddings have their samples: 1 for (T, B, C) inputs; or a dict from
            module names to dimensions. Convolutions and `nn.MultiheadAttention` know theirs.
        model_calls: which calls of the model before one ``backward`` see the same samples. "separate": a call is one
            batch, and sees the samples of another only where a gradient can flow from one into the other (an
            encoder's call and its decoder's, the time steps of a cell). "joined": row i of every call is sample i (the
            branches of a siamese network). Several uses of a layer inside one call are always by the same samples.
        loss_reduction: what the loss divides by: "mean" for the samples that a layer saw, "sum" for nothing, or the
            number N itself, where a mean is over fewer (targets that are not ignored, the sum of class weights) or
            over more (all tokens, of which an expert sees some). Also a dict from patterns of module names to these,
            or a function that returns one and is called on curvature steps; `loss_reduction` can be set before any
            step. With gradient accumulation the step's loss is the sum of all that went through ``backward``.
        partial_capture: what becomes of a layer whose gradient is not the sum of what was captured of it, since its
            weight is used outside of the model's calls too, or in a penalty, or in derivatives: "base" leaves it to
            ``base`` with a warning; "accept" takes the curvature of what was captured.
        damping_rule: "paper": L + λI; "released": L + √λ I, as the authors' code has it.
        max_samples: at most so many samples of a step are used for its curvature.
        nonfinite: "skip": where any preconditioned gradient holds NaN or Inf, all gradients count as zero for this
            step (decided on the device, without waiting for it); "raise": `FloatingPointError` before anything changes.
        params: parameter groups of ``model``, each with its own lr, damping, weight decay and so on; default: all of
            its parameters in one group.
        **base_options: everything else goes to ``base``.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take.
        ValueError: a value out of range, or a model without a supported layer.

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

    # What the baselines, which differ in the curvature alone, replace.
    _title: ClassVar[str] = "NG+"
    _key: ClassVar[str] = "ngplus"

    def _make_curvature(self) -> CurvatureOfLayers:
        return CurvatureOfLayers(self._options, self._generator)

    def _make_capture(self, model: nn.Module) -> Capture:
        return Capture(model, self._layers, sampling(self._options), self._stopwatch, self._generator)

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
        solver: Solver = "auto",
        block_size: int | None = None,
        sketch_size: int | None = None,
        samples: Samples = "batch",
        batch_dim: int | Mapping[str, int] = 0,
        model_calls: ModelCallSamples = "separate",
        loss_reduction: LossReduction = "mean",
        partial_capture: PartialCapture = "base",
        damping_rule: DampingRule = "paper",
        max_samples: int | None = None,
        nonfinite: NonFinite = "skip",
        params: Params | None = None,
        **base_options: Any,
    ) -> None:
        self._options = Options(
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
            damping_rule=damping_rule,
            max_samples=max_samples,
            nonfinite=nonfinite,
        )
        checked_lr, damping = check_positive("lr", lr, or_zero=True), check_positive("damping", damping)
        self._model, chosen = model_and_params(model, params, self._options)
        made = make_base(base, chosen, lr if isinstance(lr, Tensor) else checked_lr, base_options, type(self).__name__)
        super().__init__(made.param_groups, {**made.defaults, "damping": damping})
        self._base = made
        check_whole(self._named_parameters())
        self._share_groups()
        self._start()
        if not self._layers:
            raise ValueError(
                f"the model has no layer that {self._title} preconditions with its weight among the parameters given; "
                f"supported are {', '.join(kind.__name__ for kind in SUPPORTED)}"
            )
        self._warn_of_unsupported()

    # Set-up -----------------------------------------------------------------------------------------------------

    def _share_groups(self) -> None:
        """One list of groups for both, which is `base`'s, so that schedulers and inspection see what it uses."""
        self.param_groups = self._base.param_groups

    def _start(self) -> None:
        """Everything that is not pickled: counters at zero, the layers, and the watch on them."""
        Joinable.__init__(self)
        self._joinables = WeakSet(joinables([] if self._model is None else self._model.modules()))
        self._compared = False
        self._base_has_stepped = False
        self._state_is_complete = False
        self._set_counters(0)
        self._fresh = True
        self._late: list[Layer] = []
        self._rejected: list[Layer] = []
        self._tries: dict[Layer, int] = {}
        self._opaque: set[Layer] = set()
        self._warned: set[tuple[Layer, str]] = set()
        self._skipped: Tensor | None = None
        self._devices = self._parameter_devices()
        self._loan = Loan(self._base)
        self._generator = torch.Generator().manual_seed(0)
        self._stopwatch = Stopwatch()
        self._sample_index: SampleIndex | None = None
        self._curvature = self._make_curvature()
        self._model_parameters = None if self._model is None else ModelParameters(self._model)
        self._find_layers()
        self._watch()

    def _find_layers(self) -> None:
        mine = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        if self._model is None:
            found = parameter_layers(self.param_groups)
        else:
            found = find_layers(self._model, self._options.batch_dim)
        for layer in found:
            if layer.bias is not None and id(layer.bias) not in mine:
                layer.bias = None
        known = {id(layer.weight): layer for layer in getattr(self, "_layers", [])}
        self._layers = [layer.known_as(known) for layer in found if id(layer.weight) in mine]
        self._groups = {layer: mine[id(layer.weight)] for layer in self._layers}
        self._capture: Capture | None = None
        if self._model is not None and self._options.curvature == "per_sample":
            self._capture = self._make_capture(self._model)
            self._capture.sample_index = self._sample_index
            self._capture.joinables = self._joinables

    def _warn_of_unsupported(self) -> None:
        if self._model is None or not (modules := unsupported_modules(self._model)):
            return
        warnings.warn(
            f"{self._title} does not precondition {', '.join(modules)}; their parameters go to "
            f"{type(self._base).__name__} untouched",
            stacklevel=3,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, of the model the optimizer was made with (modules it has got since included)."""
        param_group = check_group(param_group)
        if "_base" not in self.__dict__:  # `Optimizer.__init__` goes through the groups of `base`
            super().add_param_group(param_group)
            return
        self._hide_curvature()
        self._base.add_param_group(param_group)
        self._share_groups()
        self.param_groups[-1].setdefault("damping", self.defaults["damping"])
        self._find_layers()
        self._watch()

    # The step ---------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Precondition the gradients, let `base` make its step, and get ready for the next one.

        Args:
            closure: evaluates the model again and returns the loss, as in `torch.optim`.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient that is not finite, with ``nonfinite="raise"``. Nothing has changed then.
            ValueError: a damping ≤ 0 in ``param_groups`` on a curvature step.
            TypeError, RuntimeError: where the model's parameters were replaced since the optimizer was made, by sharded
                ones or all of them; inside a function that is compiled with ``fullgraph=True``. Nothing has changed
                then.
        """
        eager.refuse_one_graph(type(self).__name__)
        if torch.is_inference_mode_enabled():  # what it makes could not be changed in place later
            with torch.inference_mode(mode=False):
                return self._step(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._hide_curvature()
        if closure is None and not self._base_has_stepped and initializes_state(self.param_groups):
            self._base_has_stepped = True
            return step_within_a_step(self._base)()
        if self._due or self._curvature.replanned:
            self._check_model()
        self._check_join()
        self._fresh = True
        try:
            if closure is None:
                self._precondition()
                loss = step_within_a_step(self._base)()
            else:
                loss = step_within_a_step(self._base)(self._preconditioning(closure))
        finally:
            self._loan.take_back()
        self._base_has_stepped = True
        self._curvature.replanned = False
        self._finish_step()
        return loss

    def _finish_step(self) -> None:
        self._steps += 1
        self._late = self._plan_late()
        self._rejected = []
        self._watch()

    def _check_model(self) -> None:
        """Raise or warn where the model's parameters are not those of the optimizer any more.

        Not on every step, since it reads what no other part of a step does: on curvature steps, on the first, and
        where a layer has lost its gradient or has one again.
        """
        if self._model_parameters is not None and (replaced := self._model_parameters.check(self.param_groups)):
            warnings.warn(replaced, stacklevel=2)
        if any(layer.weight.dim() < 2 for layer in self._layers):  # FullyShardedDataParallel has flattened it
            check_whole(self._named_parameters())
        self._curvature.replanned = False

    def _preconditioning(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self._loan.take_back()
            with torch.enable_grad():
                loss = closure()
            self._hide_curvature()
            self._precondition()
            return loss

        return evaluate

    @torch.no_grad()
    def _precondition(self) -> None:
        """Gradients to directions, whatever the loop around the step is in: autocast would round every product."""
        with without_autocast(p.device.type for group in self.param_groups for p in group["params"]):
            self._to_directions()

    def _to_directions(self) -> None:
        """The curvature first where it is due."""
        if self._options.nonfinite == "raise":
            self._raise_if(self._bad(Watch()), "gradient")
        if self._fresh:
            self._update_curvature(self._wanted())
        self._fresh = False
        with self._stopwatch.measure("apply"):
            watch = Watch()
            touched = self._curvature.precondition(self._layers, watch)
            if self._curvature.replanned and not self._due:
                self._check_model()
            if self._guard(watch):
                self._loan.give(touched, self.param_groups)
        self._follow_devices()

    @property
    def _due(self) -> bool:
        return self._steps % self._options.update_every == 0

    def _wanted(self) -> list[Layer]:
        """The layers that get a curvature on this step; which of them are frozen may change before the next."""
        return self._layers if self._due else self._late

    def _update_curvature(self, wanted: list[Layer], *, with_batch: bool = True) -> None:
        """Update the curvature of these layers.

        Args:
            wanted: as `_wanted` says.
            with_batch: whether this process has a batch. Where others have one, theirs is what counts.
        """
        damping = {layer: self._damping(layer) for layer in wanted}
        if world_size() > 1 and (wanted or self._due):
            damping = self._agree(damping, with_batch)
        if not wanted:
            return
        statistics, opaque, scale = self._collect(wanted) if with_batch else ({}, {}, 1.0)
        with self._stopwatch.measure("inverse"):
            rejected, elsewhere = self._curvature.update(wanted, statistics, damping, scale, opaque)
        opaque = {**dict.fromkeys(elsewhere, "is not supported as another process uses it"), **opaque}
        self._report_opaque(opaque)
        self._opaque = self._opaque.difference(wanted) | set(opaque)
        self._rejected = rejected
        for layer in self._without_curvature(wanted):
            self._tries[layer] = self._tries.get(layer, 0) + 1

    def _collect(self, wanted: Sequence[Layer]) -> tuple[Mapping[Layer, Statistic], Mapping[Layer, str], float]:
        """The sums of this process's batch, the layers whose samples are not known, and the scale of the loss."""
        if self._capture is not None:
            statistics, unsupported = self._capture.collect(), self._capture.unsupported()
            unseen = self._unseen([layer for layer in wanted if layer not in statistics and layer not in unsupported])
            for layer, statistic in list(statistics.items()):
                statistic.reduction = reduction_of(self._options.loss_reduction, layer.module)
                if statistic.reduction == 0:  # a batch whose targets are all ignored
                    del statistics[layer]
            return statistics, {**unsupported, **dict.fromkeys(unseen, UNSEEN)}, loss_scale()
        pairs = ((layer, layer_statistic(layer, self._options, self._generator)) for layer in wanted)
        return {layer: statistic for layer, statistic in pairs if statistic is not None}, {}, 1.0

    def _unseen(self, layers: Iterable[Layer]) -> list[Layer]:
        """Those with a curvature whose gradient came without a captured use: what they have is of other gradients.

        A gradient of zeros is no use. Of several processes another one may have used the layer.
        """
        if world_size() > 1:
            return []
        return [
            layer
            for layer in layers
            if layer in self._curvature.states and (grad := layer.weight.grad) is not None and not is_zero(grad)
        ]

    def _agree(self, damping: Mapping[Layer, float], with_batch: bool) -> dict[Layer, float]:
        """Make sure that all processes update the same layers, and with the same λ: that of those with a batch."""
        layers = list(damping)
        state = [f"made {self._steps} steps", "compared its weights" if self._compared else "not compared its weights"]
        described = [
            f"{layer.name} {tuple(layer.weight.shape)} {layer.weight.dtype}"
            + (" with a trained bias" if layer.trained_bias is not None else "")
            for layer in layers
        ]
        weights = {} if self._compared else {layer.name: layer.weight for layer in layers}
        distributed.check_processes(type(self).__name__, [*state, *described], weights, self.join_device)
        self._compared = True
        values = distributed.largest([damping[layer] if with_batch else 0.0 for layer in layers], self.join_device)
        return dict(zip(layers, values, strict=True))

    def _damping(self, layer: Layer) -> float:
        damping = self._groups[layer]["damping"]
        return check_positive(f"damping of the parameter group of {layer.name}", damping)

    def _report_opaque(self, opaque: Mapping[Layer, str]) -> None:
        layers: dict[str, list[Layer]] = {}
        for layer, reason in opaque.items():
            self._curvature.states.pop(layer, None)
            layers.setdefault(reason, []).append(layer)
        for reason, alike in layers.items():
            self._warn_once(alike, reason)

    def _warn_once(self, layers: Iterable[Layer], reason: str) -> None:
        """Say which layers go to `base`, and why: one warning for all, and each layer once for a reason."""
        names = [layer.name for layer in layers if (layer, reason) not in self._warned]
        self._warned.update((layer, reason) for layer in layers)
        if names:
            one = len(names) == 1
            warnings.warn(
                f"{names[0] if one else ', '.join(names) + ': each'} {reason}; {'it goes' if one else 'they go'} to "
                f"{type(self._base).__name__} untouched",
                stacklevel=2,
            )

    def _without_curvature(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that have a gradient, and could have a curvature, but have none."""
        states, opaque, rejected = self._curvature.states, self._opaque, self._rejected
        if all(map(states.__contains__, layers)):
            return []
        return [
            layer
            for layer in layers
            if layer not in states and layer.weight.grad is not None and layer not in opaque and layer not in rejected
        ]

    def _plan_late(self) -> list[Layer]:
        """Layers to watch for on the next step though it may be no curvature step.

        A layer whose sums were not finite is tried again. So is, in a single process, one that has a gradient but
        no curvature yet: it was not used, or not seen, when the others were. Several processes must agree on what
        they average, and only the first of these is the same on all.
        """
        late, given_up = list(self._rejected), list[Layer]()
        for layer in self._without_curvature(self._layers) if world_size() == 1 else []:
            (late if self._tries.get(layer, 0) < LATE_TRIES else given_up).append(layer)
        self._warn_once(
            given_up,
            f"has a gradient, but in {LATE_TRIES} steps no backward pass through the model was seen to bring it",
        )
        return late

    def _watch(self) -> None:
        """Arm the capture if the next step builds curvature, else see that nothing of it is left."""
        if self._capture is None:
            return
        if wanted := self._wanted():
            self._capture.arm(wanted)
        else:
            self._capture.disarm()

    # Uneven numbers of batches ----------------------------------------------------------------------------------

    def join_hook(self, **_kwargs: Any) -> JoinHook:
        """For ``torch.distributed.algorithms.Join([model, optimizer])``, with the model first."""
        return StepHook(self._step_without_batch)

    @property
    def join_device(self) -> torch.device:
        """Device of the collectives."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """Process group of the collectives: the default one."""
        return torch.distributed.group.WORLD

    def _check_join(self) -> None:
        if world_size() > 1:
            refuse_without(type(self).__name__, self._join_config, self._joinables, self.param_groups)
            Join.notify_join_context(self)

    @torch.no_grad()
    def _step_without_batch(self) -> None:
        """Take part in what the step of other processes averages, and count it."""
        with without_autocast([self.join_device.type]):
            self._update_curvature(self._wanted(), with_batch=False)
        self._finish_step()

    # Guards -----------------------------------------------------------------------------------------------------

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _guard(self, watch: Watch) -> bool:
        """Keep NaN and Inf from `base`, as ``nonfinite`` says; ``watch`` has seen the directions.

        Returns:
            Whether all gradients are known to be as they were.
        """
        bad = self._bad(watch)
        if bad is None:
            return True
        if self._options.nonfinite == "raise":
            self._raise_if(bad, "direction")
            return True
        zero_where(bad, self._gradients())
        self._skipped = bad.long() if self._skipped is None else self._skipped.to(bad.device) + bad
        return False

    def _bad(self, watch: Watch) -> Tensor | None:
        """`Watch.bad` of all gradients."""
        seen = watch.seen
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in seen and parameter.grad is not None:
                    watch.look(parameter.grad)
        return watch.bad()

    def _raise_if(self, bad: Tensor | None, what: str) -> None:
        """Waits for the device: whether to raise has to be known now."""
        if bad is not None and bool(bad):
            names = nonfinite_names(self._named_parameters())
            raise FloatingPointError(f"the {what} of {', '.join(names)} holds NaN or Inf; no parameter was changed")

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        names = {} if self._model is None else {id(p): name for name, p in self._model.named_parameters()}
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [(names.get(id(p), f"parameter {i}"), p) for i, p in enumerate(parameters)]

    def _parameter_devices(self) -> set[torch.device]:
        return {p.device for group in self.param_groups for p in group["params"]}

    def _follow_devices(self) -> None:
        """Move `base`'s state after parameters that were moved since the last step."""
        devices = self._parameter_devices()
        if devices != self._devices:
            for parameter, state in self._base.state.items():
                if not isinstance(parameter, Tensor):
                    continue
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.device != parameter.device:
                        state[name] = value.to(parameter.device)
            self._devices = devices

    # What users look at -----------------------------------------------------------------------------------------

    @property
    def base(self) -> Optimizer:
        """The optimizer that makes the steps."""
        self._hide_curvature()
        return self._base

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of `base`, with what is kept of each layer beside it, under its weight, as `state_dict` names it.

        From the first step on: an optimizer that has not stepped has no state, in torch.
        """
        if not self._state_is_complete and (self._base_has_stepped or self._base.state):
            for parameter, entries in self._layout().entries(self._progress()).items():
                self._base.state[parameter].update(entries)
            self._state_is_complete = True
        return self._base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "_base" in self.__dict__:  # else it is `Optimizer.__init__`, and `base` has a state already
            self._base.state = state

    def _hide_curvature(self) -> None:
        """Leave `base`'s state to `base`, which may tell by its being empty that a parameter is new."""
        if not self._state_is_complete:
            return
        self._state_is_complete = False
        prefix = f"{self._key}_"
        for parameter, entries in list(self._base.state.items()):
            if isinstance(parameter, Tensor):
                for name in [name for name in entries if isinstance(name, str) and name.startswith(prefix)]:
                    del entries[name]
                if not entries:
                    del self._base.state[parameter]

    @property
    def curvature(self) -> dict[str, LayerState]:
        """What is kept of each layer, by its weight's name."""
        return {layer.name: state for layer, state in self._curvature.states.items()}

    @property
    def curvature_is_due(self) -> bool:
        """Whether the next step builds curvature, of some layer at least."""
        return bool(self._wanted())

    @property
    def sample_index(self) -> Mapping[str, Tensor] | None:
        """Which sample each row of a layer's input belongs to, where that is not its batch dimension.

        Set it before the forward pass of a step with `curvature_is_due`: an integer tensor for all layers, or a dict
        from patterns of module names (as in `fnmatch`, the first that fits counts) to such tensors; of shape (b,), or
        of the input's shape without its features. With ``samples="batch"``, rows of the same number are the positions
        of one sample, as the atoms of a molecule are; with ``samples="rows"`` each row stays a sample. Rows with a
        negative number count as none, as padding should. It holds until it is set again; None goes back to
        ``batch_dim``. `nn.MultiheadAttention` knows its samples; linear layers whose weights are handed to
        `F.multi_head_attention_forward`, as fairseq's attention does, take an index of shape (T, B). Where another
        object wraps the optimizer (accelerate's, Lightning's, fairseq's), it is set on ``wrapper.optimizer``.

        Raises:
            TypeError: no integer tensors by module name.
            ValueError: in the backward pass, where a layer's input has another number of rows than its index.
        """
        return None if self._sample_index is None else self._sample_index.indices

    @sample_index.setter
    def sample_index(self, given: Tensor | Mapping[str, Tensor] | None) -> None:
        self._sample_index = SampleIndex.of(given)
        if self._capture is not None:
            self._capture.sample_index = self._sample_index

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
        """Steps whose gradients counted as zero because they were not finite. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def times(self) -> StepTimes:
        """Seconds spent on curvature, inverse and apply since `track_times`."""
        return self._stopwatch.times

    def track_times(self, on: bool = True) -> None:
        """Measure `times`; on a GPU this waits for the device at every stage."""
        self._stopwatch.on = on

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self._options).items())
        return f"{type(self).__name__}({len(self._layers)} layers, {options})\nbase {self._base!r}"

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what was summed of this step's curvature with them."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.clear()

    # Saving, loading, copying -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of `base` as `base` saves it, and the curvature.

        What is kept of a layer are entries of its weight in ``state``, tensors and numbers whose names start with
        ``ngplus_``; the counters are the entry ``"ngplus"`` of the first of ``param_groups``. Names and sizes follow
        from the model and the options alone, whatever was built so far (``ngplus_updates`` tells).

        Loads with ``torch.load(weights_only=True)``. Sums of a curvature step whose ``step`` has not come yet are not
        part of it, as gradients are not.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._hide_curvature()
        state_dict = self._layout().pack(self._progress(), self._base.state_dict())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, `base` by its own ``load_state_dict``.

        Raises:
            ValueError: a state of another optimizer or another model. Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        base_state, progress = self._layout().unpack(state_dict)
        self._hide_curvature()
        self._base.load_state_dict(base_state)
        self._share_groups()
        self._find_layers()
        self._restore(progress)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _layout(self) -> Layout:
        return Layout(
            owner=type(self).__name__,
            key=self._key,
            base=type(self._base).__name__,
            groups=self.param_groups,
            layers=self._layers,
            curvature=self._curvature,
        )

    def _progress(self) -> Progress:
        return Progress(
            steps=self._steps,
            skipped=0 if self._skipped is None else self._skipped,
            generator=self._generator.get_state(),
            states=self._curvature.states,
            pending=self._late,
            tries=self._tries,
            unsupported=self._opaque,
        )

    def _restore(self, progress: Progress) -> None:
        self._set_counters(progress.steps)
        self._base_has_stepped = progress.steps > 0
        self._skipped = torch.tensor(progress.skipped)
        self._generator.set_state(progress.generator.cpu())
        self._curvature.states = progress.states
        self._late, self._tries, self._opaque = progress.pending, progress.tries, progress.unsupported
        self._watch()

    def _set_counters(self, steps: int) -> None:
        """Put the counters where `state_dict` has them, so that torch's tools know of their place."""
        for group in self.param_groups:
            group.pop(self._key, None)
        self._counters: dict[str, Any] = {"base": type(self._base).__name__, "steps": steps}
        self.param_groups[0][self._key] = self._counters

    @property
    def _steps(self) -> int:
        steps: int = self._counters["steps"]
        return steps

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._counters["steps"] = steps

    def __getstate__(self) -> dict[str, Any]:
        self._hide_curvature()
        names = ("defaults", "_model", "_base", "_options")
        return {name: getattr(self, name) for name in names} | {"_packed": self._layout().pack(self._progress(), {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For pickle and copy."""
        super().__setstate__({name: value for name, value in state.items() if name != "_packed"})
        self._share_groups()
        self._start()
        _, progress = self._layout().unpack(state["_packed"])
        self._restore(progress)
