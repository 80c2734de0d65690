"""The abstract optimizer that preconditions the gradients of a model's layers before a base's step."""

from __future__ import annotations

import operator
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from ngplus._torch_internals import run_outside_of_graphs
from ngplus.apply.grouped import PreconditionedLayer
from ngplus.apply.layer import precondition_
from ngplus.apply.plan import ApplyPlan
from ngplus.apply.sparse_grad import NonzeroRows, TemporaryLayout
from ngplus.capture.accumulator import Accumulator, Statistic, is_zero
from ngplus.capture.loss_reduction import find_reduction
from ngplus.capture.recorder import Recorder
from ngplus.capture.sample_index import SampleIndex
from ngplus.config import (
    LayerwiseOptions,
    Params,
    check_group,
    check_no_settings,
    check_patterns,
    check_positive,
    check_whole,
    make_base,
    model_and_params,
)
from ngplus.curvature.all_reduce import check_processes, largest, name_lost_processes, world_size
from ngplus.curvature.coverage import Coverage
from ngplus.curvature.store import CurvatureStore
from ngplus.curvature.update import LayerCurvature
from ngplus.dtensors import find_mesh, is_sharded, reshard
from ngplus.guards.amp import loss_scale, without_autocast
from ngplus.guards.compile_guard import refuse_fullgraph
from ngplus.guards.finite_check import FiniteCheck, raise_if_nonfinite, zero_where_
from ngplus.guards.join import StepHook, find_joinables, refuse_without
from ngplus.guards.model_parameters import ModelParameters
from ngplus.guards.private_gradients import refuse_private
from ngplus.guards.step_hooks import find_inner_step
from ngplus.guards.wrappers import set_on_wrapped
from ngplus.inspection import Inspection
from ngplus.layers import (
    SUPPORTED,
    Layer,
    find_layers,
    find_parameter_layers,
    find_unsupported_matrices,
    rekey_layers,
)
from ngplus.profiling import Stopwatch
from ngplus.sharded.directions import ShardedDirections
from ngplus.sharded.refusals import check_sharding
from ngplus.sharded.sharding import Inverses, Sharding
from ngplus.state import SavedState, initializes_state
from ngplus.tuning import DEFAULT, Tuning

UNCAPTURED = "has a gradient on a curvature step, but no backward pass through the model was captured to bring it"
"""Why a layer that has a curvature is left to the base where none of its uses was captured."""


_DEVICE = operator.attrgetter("device")


class LayerwiseOptimizer(Inspection, SavedState, Optimizer, Joinable):
    """An optimizer around a base, which gets preconditioned gradients: NG+, K-FAC, Shampoo and SENG.

    A subclass says how layers are found, what is summed of their uses, and what is made of the sums. On a curvature
    step the sums become preconditioners; on every step the gradients of layers that have one are replaced by their
    directions, checked for NaN, and `base` makes its step with them. All other parameters go to `base` as they are.

    Args:
        model: whose parameters are trained, or parameters alone where the subclass takes them.
        base: optimizer class that gets the preconditioned gradients.
        options: checked already.
        lr: of ``base``, ≥ 0.
        damping: λ > 0, in ``param_groups``.
        params: parameter groups of ``model``, or None for all of its parameters in one group.
        base_options: everything else that ``base`` takes.

    Raises:
        TypeError: an argument of the wrong type, or one that ``base`` does not take.
        ValueError: a value out of range, or a model without a supported layer.
    """

    title: ClassVar[str]
    """The method's name, for messages."""

    key: ClassVar[str]
    """What the names of its entries in a state dict start with."""

    takes_parameters: ClassVar[bool] = False
    """Whether it can do without a model."""

    takes_shards: ClassVar[bool] = False
    """Whether it takes a model that `fully_shard` has sharded."""

    tuning: ClassVar[Tuning] = DEFAULT
    """Sizes at which one way of computing becomes cheaper than another."""

    def __init__(
        self,
        model: nn.Module | Params,
        base: type[Optimizer],
        options: LayerwiseOptions,
        *,
        lr: float | Tensor,
        damping: float,
        params: Params | None,
        base_options: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        if isinstance(model, nn.Module):
            reshard(model)
        if not (self.takes_parameters or isinstance(model, nn.Module)):
            raise TypeError(f"{name} finds its layers in a model: it needs an nn.Module, got {type(model).__name__}")
        self._options = options
        checked_lr, damping = check_positive("lr", lr, or_zero=True), check_positive("damping", damping)
        self._model, chosen = model_and_params(model, params, needs_model=not self._works_on_gradients)
        made = make_base(base, chosen, lr if isinstance(lr, Tensor) else checked_lr, base_options, name, self._settings)
        super().__init__(made.param_groups, {**made.defaults, "damping": damping})
        self._base = made
        for each in ("batch_dim", "loss_reduction"):
            self._check_names(each, getattr(options, each))
        self._check_parameters()
        self._share_groups()
        self._start()
        if not self._layers:
            raise ValueError(
                f"the model has no layer that {self.title} preconditions with its weight among the parameters given; "
                f"supported are {', '.join(kind.__name__ for kind in SUPPORTED)}"
            )
        self._warn_of_unsupported_matrices()
        if self._sharding is not None and world_size() > 1:  # the forward pass would wait for weights of other shapes
            frozen = [f"{layer.name} frozen" for layer in self._layers if not layer.weight.requires_grad]
            check_processes(name, [*self._describe(), *frozen], {}, self.join_device)

    def __init_subclass__(cls, **options: Any) -> None:
        """Have a wrapper that takes on this class set on the optimizer what it sets; see `set_on_wrapped`."""
        super().__init_subclass__(**options)
        if not issubclass(cls.__bases__[0], Optimizer) and cls.__setattr__ is object.__setattr__:
            cls.__setattr__ = set_on_wrapped  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        """``train`` and ``eval`` of a base that has them, as those of schedule-free methods have."""
        if name in ("train", "eval") and "_base" in self.__dict__:
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # What a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def _make_curvature(self) -> CurvatureStore:
        """Make the curvature of all layers."""

    def _make_accumulator(self) -> Accumulator:
        """Make what sums captured uses."""
        raise NotImplementedError

    @property
    def _works_on_gradients(self) -> bool:
        """Whether the curvature is made of gradients alone, and no uses are captured."""
        return False

    @property
    def _inverses(self) -> Inverses:
        """Where the inverses of sharded layers are kept, see `NGPlus`."""
        return "auto"

    def _find_layers(self) -> list[Layer]:
        """Find the layers whose weights may be preconditioned, whoever trains them."""
        if self._model is None:
            return find_parameter_layers(self.param_groups)
        return self._find_supported_layers(self._model)

    def _find_supported_layers(self, model: nn.Module) -> list[Layer]:
        """Find the layers of a model whose weights may be preconditioned."""
        return find_layers(model, self._options.batch_dim)

    def _why_unsupported(self, parameter: Tensor) -> str:
        """Why a matrix that no layer covers is left to the base, in words."""
        return "complex matrices are not supported" if parameter.is_complex() else "its module is not supported"

    def _precondition_layer_(self, member: PreconditionedLayer, tuning: Tuning) -> NonzeroRows | None:
        """Replace the gradients of one layer by its direction, see `ngplus.apply.layer.precondition_`."""
        return precondition_(member, tuning)

    def _sum_gradients(self, layers: Sequence[Layer]) -> Mapping[Layer, Statistic]:
        """The statistics of a curvature step where no uses are captured, from the gradients."""
        raise NotImplementedError

    # Set-up -------------------------------------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        """What holds for all parameter groups, by name."""
        return {each.name: getattr(self._options, each.name) for each in fields(self._options)}

    def _check_names(self, name: str, given: Any) -> None:
        """Refuse names and patterns that fit no module of the model."""
        if self._model is not None and isinstance(given, Mapping):
            check_patterns(name, given, (module for module, _ in self._model.named_modules()))

    def _check_parameters(self) -> None:
        """Refuse parameters that are distributed over processes in a way that is not supported."""
        name, named = type(self).__name__, self._named_parameters()
        check_whole(named)
        sharded = [each for each, parameter in named if is_sharded(parameter)]
        if sharded and not self.takes_shards:
            raise TypeError(
                f"{sharded[0]} is a DTensor: {name} needs whole weights; wrap the model in "
                "torch.nn.parallel.DistributedDataParallel instead"
            )
        if not sharded and self._inverses != "auto":
            raise ValueError(
                f"inverses={self._inverses!r} is for a model that torch.distributed.fsdp.fully_shard has sharded, and "
                "none of these parameters is"
            )
        check_sharding(self._model, named, name)

    def _share_groups(self) -> None:
        """Use the list of groups that is `base`'s, so that schedulers and inspection see what it uses."""
        self.param_groups = self._base.param_groups

    def _start(self) -> None:
        """Make everything that is not pickled: counters at zero, the layers, and what records them."""
        Joinable.__init__(self)
        self._joinables = WeakSet(find_joinables([] if self._model is None else self._model.modules()))
        self._weights_are_compared = False
        self._processes_agreed = False
        self._base_has_stepped = False
        self._state_is_complete = False
        self._set_counters(0)
        self._updates_curvature = True  # at the next evaluation of the gradients
        self._coverage = Coverage(type(self._base).__name__, self.tuning.capture_tries)
        self._skipped: Tensor | None = None
        self._devices = self._parameter_devices()
        self._temporary_layout = TemporaryLayout(self._base, self.tuning)
        self._sharding: Sharding | None = None
        self._sharded_directions: ShardedDirections | None = None
        self._generator = torch.Generator().manual_seed(0)
        self._stopwatch = Stopwatch()
        self._sample_index: SampleIndex | None = None
        self._curvature = self._make_curvature()
        self._apply_plan = ApplyPlan(self._curvature, self.tuning)
        self._model_parameters = None if self._model is None else ModelParameters(self._model)
        self._layers: list[Layer] = []
        self._recorder: Recorder | None = None
        self._update_layers()
        self._arm_recorder()

    def _update_layers(self) -> None:
        """Find the layers again, whose biases may be others now; what is kept of them stays."""
        if self._model is not None and self._sharding is not None:
            reshard(self._model)
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        self._trained, self._layers_are_old = self._find_trained(), False
        known = {id(layer.weight): layer for layer in self._layers}
        found = [
            layer if layer.bias is None or id(layer.bias) in groups else layer.without_bias()
            for layer in self._find_layers()
            if id(layer.weight) in groups
        ]
        self._layers = [
            before if (before := known.get(id(layer.weight))) is not None and before.equals(layer) else layer
            for layer in found
        ]
        self._groups = {layer: groups[id(layer.weight)] for layer in self._layers}
        self._shard_layers()
        self._curvature.states = rekey_layers(self._curvature.states, self._layers)
        self._coverage.rekey_(self._layers)
        self._make_recorder()

    def _shard_layers(self) -> None:
        """Decide who keeps the inverses of the layers that are sharded."""
        sharded = [layer for layer in self._layers if is_sharded(layer.weight)]
        self._whole_layers = [layer for layer in self._layers if not is_sharded(layer.weight)]
        if not sharded:
            return
        if self._sharding is None:
            self._sharding = Sharding(find_mesh(sharded[0].weight), self._inverses, self.tuning)
            self._sharded_directions = ShardedDirections(self._sharding, self.tuning)
        self._sharding.assign(sharded)
        self._curvature.sharding = self._sharding

    def _make_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.disarm()
        self._recorder = None
        if self._model is None or self._works_on_gradients:
            return
        accumulator = self._make_accumulator()
        self._recorder = Recorder(
            self._model, self._layers, accumulator.sampling, accumulator, self._stopwatch, self.tuning
        )
        self._recorder.sample_index = self._sample_index
        self._recorder.joinables = self._joinables

    def _warn_of_unsupported_matrices(self) -> None:
        if self._model is None:
            return
        matrices = find_unsupported_matrices(self._model, self._find_supported_layers(self._model))
        by_reason: dict[str, list[str]] = {}
        for name, parameter in matrices.items():
            by_reason.setdefault(self._why_unsupported(parameter), []).append(name)
        for reason, names in by_reason.items():
            warnings.warn(
                f"{self.title} does not precondition {', '.join(names)}: {reason}; "
                f"{'it goes' if len(names) == 1 else 'they go'} to {type(self._base).__name__} untouched",
                stacklevel=4,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, of the model the optimizer was made with (modules it has got since included).

        Args:
            param_group: as in `torch.optim`; a damping may be among its settings.

        Raises:
            TypeError: a damping that is no number.
            ValueError: a damping ≤ 0, or a setting that holds for all groups.
        """
        param_group = check_group(param_group)
        if not self._has_base:  # `Optimizer.__init__` goes through the groups of `base`
            super().add_param_group(param_group)
            return
        check_no_settings(param_group, self._settings, type(self._base))
        self._hide_entries_()
        self._base.add_param_group(param_group)
        self._share_groups()
        self.param_groups[-1].setdefault("damping", self.defaults["damping"])
        self._update_layers()
        self._arm_recorder()

    # The step -----------------------------------------------------------------------------------------------------

    @run_outside_of_graphs
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
        refuse_fullgraph(type(self).__name__)
        if torch.is_inference_mode_enabled():  # what it makes could not be changed in place later
            with torch.inference_mode(mode=False):
                return self._step(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._hide_entries_()
        if self._sharding is not None and self._model is not None:
            reshard(self._model)  # else the next forward pass would use whole weights of before this step
        if closure is None and not self._base_has_stepped and initializes_state(self.param_groups):
            self._base_has_stepped = True
            return find_inner_step(self._base)()
        if self._is_due or self._apply_plan.has_changed:
            self._check_model()
        self._check_join()
        self._updates_curvature = True
        try:
            if closure is None:
                self._precondition_()
                loss = find_inner_step(self._base)()
            else:
                loss = find_inner_step(self._base)(self._wrap_closure(closure))
            self._finish_base_step_()
        finally:
            self._restore_gradients_()
        self._base_has_stepped = True
        self._apply_plan.has_changed = False
        self._finish_step()
        return loss

    def _finish_base_step_(self) -> None:
        """Do what is left to do once `base` has made its step."""

    def _restore_gradients_(self) -> None:
        """Put back what was changed for the time of the base's step, after it or after an error."""
        self._temporary_layout.restore_()

    def _finish_step(self) -> None:
        self._steps += 1
        if self._layers_are_old:
            self._update_layers()
        self._plan_pending()
        self._arm_recorder()

    def _plan_pending(self) -> None:
        layers = self._layers if world_size() == 1 else []
        self._coverage.plan_pending(layers, self._curvature.states)

    def _check_model(self) -> None:
        """Raise or warn where the model's parameters are not those of the optimizer any more.

        Not on every step, since it reads what no other part of a step does: on curvature steps, on the first, and
        where a layer has lost its gradient or has one again.

        Parameters that were put into a group in place of others are layers from the next step on.
        """
        if self._trained != self._find_trained():
            self._note_replaced()
        if self._model_parameters is not None and (replaced := self._model_parameters.check(self.param_groups)):
            warnings.warn(replaced, stacklevel=2)
        if self._recorder is not None:
            refuse_private(parameter for group in self.param_groups for parameter in group["params"])
        if any(layer.weight.dim() < 2 for layer in self._layers):  # FullyShardedDataParallel has flattened it
            check_whole(self._named_parameters())
        self._apply_plan.has_changed = False

    def _find_trained(self) -> set[int]:
        """The ids of the parameters that the groups have now."""
        return {id(parameter) for group in self.param_groups for parameter in group["params"]}

    def _note_replaced(self) -> None:
        """Have the layers found again: where uses are recorded after this step, which goes on with what it has."""
        if self._recorder is None:
            self._update_layers()
        else:
            self._layers_are_old = True

    def _wrap_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self._restore_gradients_()
            with torch.enable_grad():
                loss = closure()
            self._hide_entries_()
            self._precondition_()
            return loss

        return evaluate

    @torch.no_grad()
    def _precondition_(self) -> None:
        """Replace the gradients by directions, outside of autocast, which would round every product."""
        with without_autocast(p.device.type for group in self.param_groups for p in group["params"]):
            if self._options.nonfinite == "raise":
                check = self._make_check()
                check.add_unchecked(self.param_groups)
                raise_if_nonfinite(check, "gradient", self._named_parameters())
            if self._updates_curvature:
                with name_lost_processes(type(self).__name__):
                    self._update_curvature(self._layers_to_capture())
            self._updates_curvature = False
            with self._stopwatch.measure("apply"):
                self._apply_()
            self._follow_devices()

    def _apply_(self) -> None:
        check = self._make_check()
        nonzero_rows = self._apply_plan.apply_(self._whole_layers, check, self._precondition_layer_)
        self._apply_to_shards_()
        if self._apply_plan.has_changed and not self._is_due:
            self._check_model()
        if self._keep_finite_(check):
            self._temporary_layout.convert_(nonzero_rows, self.param_groups)

    def _make_check(self) -> FiniteCheck:
        return FiniteCheck(self.tuning, None if self._sharding is None else self.join_device)

    def _apply_to_shards_(self) -> None:
        if self._sharded_directions is None:
            return
        sharded = [layer for layer in self._layers if is_sharded(layer.weight)]
        found = [(layer, state) for layer in sharded if (state := self._curvature.find_ready(layer)) is not None]
        members = [PreconditionedLayer(layer, state.preconditioner, state.shape) for layer, state in found]
        self._sharded_directions.precondition_(members)

    def _keep_finite_(self, check: FiniteCheck) -> bool:
        """Keep NaN and Inf from `base`, as ``nonfinite`` says.

        Args:
            check: that the directions were added to.

        Returns:
            Whether all gradients are known to be as they were.
        """
        check.add_unchecked(self.param_groups)
        if self._options.nonfinite == "raise":
            raise_if_nonfinite(check, "direction", self._named_parameters())
            return True
        nonfinite = check.find_nonfinite()
        if nonfinite is None:
            return True
        zero_where_(nonfinite, (p.grad for g in self.param_groups for p in g["params"] if p.grad is not None))
        self._skipped = nonfinite.long() if self._skipped is None else self._skipped.to(nonfinite.device) + nonfinite
        return False

    # The curvature ------------------------------------------------------------------------------------------------

    @property
    def _is_due(self) -> bool:
        """Whether the next step is a curvature step of all layers, or of those of the first turn."""
        return self._options.is_due(self._steps)

    def _layers_to_capture(self) -> list[Layer]:
        """The layers that get a curvature on this step; which of them are frozen may change before the next."""
        return self._layers if self._is_due else self._coverage.pending

    def _arm_recorder(self) -> None:
        """Record the next forward pass if its step builds curvature, else see that nothing is recorded."""
        if self._recorder is None:
            return
        if layers := self._layers_to_capture():
            self._recorder.arm(layers)
        else:
            self._recorder.disarm()

    def _update_curvature(self, layers: list[Layer], *, with_batch: bool = True) -> None:
        """Update the curvature of these layers.

        Args:
            layers: as `_layers_to_capture` says.
            with_batch: whether this process has a batch. Where others have one, theirs is what counts.
        """
        damping = {layer: self._damping(layer) for layer in layers}
        if world_size() > 1 and (layers or self._is_due or not self._processes_agreed):
            damping = self._agree(damping, with_batch)
        if not layers:
            return
        assert isinstance(self._curvature, LayerCurvature)
        statistics, reasons, scale = self._collect(layers) if with_batch else ({}, {}, 1.0)
        self._apply_plan.forget()
        with self._stopwatch.measure("inverse"):
            nonfinite, elsewhere = self._curvature.update(layers, statistics, damping, scale, reasons)
        reasons = {**dict.fromkeys(elsewhere, "is not supported as another process uses it"), **reasons}
        for layer in reasons:
            self._curvature.states.pop(layer, None)
        self._coverage.update(layers, reasons, nonfinite, self._curvature.states)

    def _collect(self, layers: Sequence[Layer]) -> tuple[Mapping[Layer, Statistic], Mapping[Layer, str], float]:
        """The sums of this process's batch, the layers that are not supported and why, and the scale of the loss."""
        if self._recorder is None:
            return self._sum_gradients(layers), {}, 1.0
        statistics, reasons = self._recorder.collect(), dict(self._recorder.unsupported())
        missing = [layer for layer in layers if layer not in statistics and layer not in reasons]
        reasons |= dict.fromkeys(self._find_uncaptured(missing), UNCAPTURED)
        for layer, statistic in list(statistics.items()):
            statistic.reduction = find_reduction(self._options.loss_reduction, layer.module)
            if statistic.reduction == 0:  # a batch whose targets are all ignored
                del statistics[layer]
        return statistics, reasons, loss_scale()

    def _find_uncaptured(self, layers: Iterable[Layer]) -> list[Layer]:
        """Those with a curvature whose gradient came without a captured use: what they have is of other gradients.

        A gradient of zeros is no use. Of several processes another one may have used the layer, and what a parameter
        that has left its group still has is nobody's.
        """
        if world_size() > 1:
            return []
        trained = self._find_trained()
        return [
            layer
            for layer in layers
            if layer in self._curvature.states
            and id(layer.weight) in trained
            and (grad := layer.weight.grad) is not None
            and not is_zero(grad)
        ]

    def _damping(self, layer: Layer) -> float:
        return check_positive(f"damping of the parameter group of {layer.name}", self._groups[layer].get("damping"))

    @run_outside_of_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what was summed of this step's curvature with them.

        Args:
            set_to_none: as in `torch.optim`.
        """
        super().zero_grad(set_to_none)
        if self._recorder is not None:
            self._recorder.discard()

    # Several processes, and uneven numbers of batches -------------------------------------------------------------

    def _agree(self, damping: Mapping[Layer, float], with_batch: bool) -> dict[Layer, float]:
        """Make sure that all processes update the same layers, and with the same λ: that of those with a batch.

        On the first step too where it updates none: of a process that has loaded a state alone.
        """
        layers, compared = list(damping), self._weights_are_compared or not damping
        weights_state = "compared its weights" if self._weights_are_compared else "not compared its weights"
        state = [f"made {self._steps} steps", *([weights_state] if layers else [])]
        weights = {} if compared else {each.name: each.weight for each in layers if not is_sharded(each.weight)}
        check_processes(type(self).__name__, [*state, *self._describe(layers)], weights, self.join_device)
        self._processes_agreed = True
        self._weights_are_compared |= bool(layers)
        if not layers:
            return {}
        values = largest([damping[layer] if with_batch else 0.0 for layer in layers], self.join_device)
        return dict(zip(layers, values, strict=True))

    def _describe(self, layers: Iterable[Layer] | None = None) -> list[str]:
        """What must be the same on all processes: settings, and layers, by default all of them."""
        known = self._layers if layers is None else layers
        return [*self._options.describe(), *(layer.describe() for layer in known)]

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
            self._update_curvature(self._layers_to_capture(), with_batch=False)
        self._finish_step()

    # Parameters ---------------------------------------------------------------------------------------------------

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        names = {} if self._model is None else {id(p): name for name, p in self._model.named_parameters()}
        parameters: Iterable[nn.Parameter] = (p for group in self.param_groups for p in group["params"])
        return [(names.get(id(p), f"parameter {i}"), p) for i, p in enumerate(parameters)]

    def _parameter_devices(self) -> set[torch.device]:
        return set().union(*(map(_DEVICE, group["params"]) for group in self.param_groups))

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


__all__ = ["LayerwiseOptimizer"]
