"""What a user of an optimizer chooses, checked before anything is made of it."""

from __future__ import annotations

import bisect
import functools
import heapq
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.capture.loss_reduction import LossReduction, check_loss_reduction
from ngplus.sharded.sharding import Inverses
from ngplus.solvers.by_name import SolverName
from ngplus.solvers.eigenbasis import Sides

Curvature = Literal["per_sample", "mini_batch", "momentum"]
Basis = Literal["eigen"]
Samples = Literal["batch", "rows"]
ModelCallSamples = Literal["separate", "joined", "apart"]
PartialCapture = Literal["base", "accept"]
FunctionFallback = Literal["vmap", "base"]
DampingRule = Literal["paper", "released"]
NonFinite = Literal["skip", "raise"]


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> float:
    """Check a number: Python's, NumPy's, or a tensor with one element, which is read from its device.

    Args:
        name: of the argument, for the error.
        value: what was given.
        or_zero: whether 0 is allowed too.

    Returns:
        The number.

    Raises:
        TypeError: where it is no number.
        ValueError: where it is not finite, or not above zero.
    """
    allowed = "≥ 0" if or_zero else "> 0"
    number = _as_float(value)
    if number is None:
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    if not (0 < number < float("inf") or (or_zero and number == 0)):
        raise ValueError(f"{name} must be a finite number {allowed}, got {number!r}")
    return number


def _as_float(value: Any) -> float | None:
    """A real number as a float, None for anything else."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one element, or a tensor without memory
            return None
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that is too large for one
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def check_count(name: str, value: Any, *, optional: bool = True) -> int | None:
    """Check an integer above zero, Python's or NumPy's.

    Args:
        name: of the argument, for the error.
        value: what was given.
        optional: whether None is allowed too.

    Returns:
        It as Python's.

    Raises:
        TypeError: where it is no integer.
        ValueError: where it is not above zero.
    """
    if optional and value is None:
        return None
    allowed = f"an integer ≥ 1{' or None' if optional else ''}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if not 1 <= int(value) < 2**63:
        raise ValueError(f"{name} must be {allowed}{'' if value < 1 else ' below 2⁶³'}, got {value!r}")
    return int(value)


def check_ema(value: Any) -> float:
    """Check the β of a moving average.

    Args:
        value: what was given.

    Returns:
        It as a float.

    Raises:
        TypeError: where it is no number.
        ValueError: where it is not in [0, 1).
    """
    ema = _as_float(value)
    if ema is None:
        raise TypeError(f"ema must be a number in [0, 1), got {value!r}")
    if not 0 <= ema < 1:
        raise ValueError(f"ema must be in [0, 1), got {value!r}")
    return ema


def check_patterns(name: str, given: Any, modules: Iterable[str]) -> None:
    """Check that every name or pattern of module names fits a module of the model.

    Args:
        name: of the argument, for the error.
        given: what was given: a dict by such patterns, or anything else, which has none.
        modules: names of the model's modules.

    Raises:
        ValueError: one that fits none.
    """
    if not isinstance(given, Mapping):
        return
    known = list(modules)
    for pattern in given:
        if not any(fnmatchcase(module, str(pattern)) for module in known):
            shown = ", ".join(repr(module) for module in known[:_NAMES_SHOWN]) + (
                f" and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            )
            raise ValueError(f"{name} has {pattern!r}, which is no module of the model and fits none; it has {shown}")


_NAMES_SHOWN = 12


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Check one of several strings.

    Args:
        name: of the argument, for the error.
        value: what was given.
        allowed: a `Literal`.

    Raises:
        ValueError: where it is none of them.
    """
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class LayerwiseOptions:
    """The choices that every `LayerwiseOptimizer` has, for all parameter groups; see `NGPlus` for what each means."""

    update_every: int
    samples: Samples = "batch"
    batch_dim: int | Mapping[str, int] = 0
    model_calls: ModelCallSamples = "separate"
    loss_reduction: LossReduction = "mean"
    partial_capture: PartialCapture = "base"
    max_samples: int | None = None
    nonfinite: NonFinite = "skip"

    def is_due(self, step: int) -> bool:
        """Whether a step is a curvature step of all layers."""
        return step % self.update_every == 0

    def describe(self) -> list[str]:
        """What must be the same on all processes, each as ``name=value``; the loss may have a divisor of its own."""
        return [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name != "loss_reduction"]

    def __post_init__(self) -> None:
        self._check_counts("update_every", optional=False)
        self._check_counts("max_samples")
        check_choice("samples", self.samples, Samples)
        check_choice("model_calls", self.model_calls, ModelCallSamples)
        check_choice("partial_capture", self.partial_capture, PartialCapture)
        check_choice("nonfinite", self.nonfinite, NonFinite)
        check_loss_reduction(self.loss_reduction)
        self._check_batch_dim()

    def _check_counts(self, *names: str, optional: bool = True) -> None:
        """Check integers ≥ 1, and make Python's of NumPy's."""
        for name in names:
            object.__setattr__(self, name, check_count(name, getattr(self, name), optional=optional))

    def _check_batch_dim(self) -> None:
        for name in self.batch_dim if isinstance(self.batch_dim, Mapping) else ():
            if not isinstance(name, str):
                raise TypeError(f"batch_dim must map names of modules, or patterns of them, got {name!r} as one")
        dims = self.batch_dim.values() if isinstance(self.batch_dim, Mapping) else [self.batch_dim]
        for dim in dims:
            if isinstance(dim, bool) or not isinstance(dim, Integral):
                raise TypeError(f"batch_dim must be an integer ≥ 0 or a dict of them by module name, got {dim!r}")
            if dim < 0:
                raise ValueError(f"batch_dim must be ≥ 0, got {dim!r}")


@dataclass(frozen=True, kw_only=True)
class Options(LayerwiseOptions):
    """The choices of `NGPlus` that hold for all parameter groups; see there for what each means."""

    curvature: Curvature = "per_sample"
    ema: float = 0.0
    solver: SolverName = "auto"
    block_size: int | None = None
    sketch_size: int | None = None
    damping_rule: DampingRule = "paper"
    function_fallback: FunctionFallback = "vmap"
    inverses: Inverses = "auto"
    update_growth: float | None = None
    staggered: bool = False
    basis: Basis | None = None
    sides: Sides = "short"
    max_side: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("block_size", "sketch_size")
        self._check_counts("max_side", optional=False)
        check_choice("curvature", self.curvature, Curvature)
        check_choice("solver", self.solver, SolverName)
        check_choice("damping_rule", self.damping_rule, DampingRule)
        check_choice("function_fallback", self.function_fallback, FunctionFallback)
        check_choice("inverses", self.inverses, Inverses)
        check_choice("sides", self.sides, Sides)
        if self.basis is not None:
            check_choice("basis", self.basis, Basis)
        object.__setattr__(self, "ema", check_ema(self.ema))
        if self.update_growth is not None:
            object.__setattr__(self, "update_growth", check_positive("update_growth", self.update_growth))
        if not isinstance(self.staggered, bool):
            raise TypeError(f"staggered must be True or False, got {self.staggered!r}")
        self._check_solver()
        self._check_basis()

    def is_due(self, step: int, turn: int = 0) -> bool:
        """Tell whether a step is a curvature step of the layers with this turn, see `find_turns`.

        Args:
            step: its number, from 0.
            turn: 0, if not ``staggered``.

        Returns:
            Whether it is.
        """
        if self.update_growth is None:
            return step % self.update_every == turn if step else True
        start, interval = find_phase(update_phases(self.update_every, self.update_growth), step)
        is_late = interval == self.update_every and step > start
        return (step - start) % interval == (turn if is_late else 0)

    def find_turns(self, costs: Sequence[int]) -> list[int]:
        """The turn of each layer: how many steps after those of turn 0 it has its curvature steps, but for the first.

        Args:
            costs: of each layer's curvature step, in any unit.

        Returns:
            0 to 𝒯 − 1, so that the costs of the steps are about equal; all 0 if not ``staggered``.
        """
        turns = [0] * len(costs)
        if self.staggered:
            loads = [(0, turn) for turn in range(min(self.update_every, len(costs)))]
            for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
                load, turns[index] = heapq.heappop(loads)
                heapq.heappush(loads, (load + costs[index], turns[index]))
        return turns

    def _check_basis(self) -> None:
        """Refuse what the other form alone has."""
        if self.basis is None:
            if self.curvature == "momentum":
                raise ValueError('curvature="momentum" is for basis="eigen", got basis=None')
            if self.sides != "short":
                raise ValueError(f'sides={self.sides!r} is for basis="eigen", got basis=None')
            return
        defaults = {"solver": "auto", "block_size": None, "damping_rule": "paper", "inverses": "auto"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                raise ValueError(f'{name}={value!r} is for basis=None: with basis="eigen" nothing is inverted')

    def _check_solver(self) -> None:
        if self.solver == "sketched" and self.sketch_size is None:
            raise ValueError('solver="sketched" needs sketch_size (q in (16) and (17)), got None')
        if self.sketch_size is not None and self.solver != "sketched":
            raise ValueError(f'sketch_size={self.sketch_size} is for solver="sketched", got solver={self.solver!r}')
        if self.solver == "low_rank" and self.block_size is not None:
            raise ValueError(f'solver="low_rank" has no blocks, got block_size={self.block_size}')


@functools.cache
def update_phases(update_every: int, growth: float) -> tuple[tuple[float, int], ...]:
    """How far apart the curvature steps are, from which step on: one, then two, up to ``update_every``.

    The one after step k is max(1, ⌈growth · k⌉) steps later.

    Args:
        update_every: 𝒯.
        growth: share by which the number of steps grows from one curvature step to the next.

    Returns:
        The first step of each phase, ascending from 0, and the interval in it. The last is ``update_every``, which no
        training comes to where its first step is infinite.
    """
    phases: list[tuple[float, int]] = []
    step: float = 0
    while (interval := max(1, math.ceil(step * growth - _ROUNDING))) < update_every:
        phases.append((step, interval))
        stay = ((interval + _ROUNDING) / growth - step) / interval  # times that it is the next interval too
        if stay > _ENDLESS:
            return (*phases, (math.inf, update_every))
        step += interval * max(1, math.floor(stay))
        while max(1, math.ceil(step * growth - _ROUNDING)) <= interval:
            step += interval
    return (*phases, (step, update_every))


_ROUNDING, _ENDLESS = 1e-9, 2**40


def find_phase(phases: Sequence[tuple[float, int]], step: int) -> tuple[int, int]:
    """The phase of a step.

    Args:
        phases: of `update_phases`.
        step: its number.

    Returns:
        The first step of the phase, and the interval in it.
    """
    start, interval = phases[bisect.bisect_right(phases, (step, math.inf)) - 1]
    return int(start), interval


Params = Iterable[Any]
"""Parameters, named parameters or parameter groups, as `torch.optim` takes them."""


def model_and_params(
    model: nn.Module | Params, params: Params | None, *, needs_model: bool
) -> tuple[nn.Module | None, Params]:
    """Tell a model from parameters.

    Args:
        model: the first argument of an optimizer.
        params: its argument of this name.
        needs_model: whether there must be a model.

    Returns:
        The model, if it is one, and what `base` is to train.

    Raises:
        TypeError: neither a model nor parameters, or both where one is wanted.
        ValueError: a model whose parameters have no shape or no memory yet.
    """
    for name, given in (("the first argument", model), ("params", params)):
        if isinstance(given, Tensor):
            raise TypeError(
                f"{name} must be an nn.Module or an iterable of tensors or dicts, got a tensor of shape "
                f"{tuple(given.shape)}: put it into a list"
            )
    if isinstance(model, nn.Module):
        check_ready(model)
        return model, list(model.parameters() if params is None else params)
    if needs_model:
        raise TypeError(
            'curvature="per_sample" captures the uses of a model\'s layers: NGPlus needs an nn.Module, got '
            f"{type(model).__name__}: give the model, and its parameters or groups of them as params=; "
            'curvature="mini_batch" takes parameters alone'
        )
    if params is not None:
        raise TypeError("params is for an nn.Module; without one, give the parameter groups as the first argument")
    return None, list(model)


def check_ready(model: nn.Module) -> None:
    """Refuse a model whose calls cannot be captured, or whose parameters have no shape, memory or matrix.

    Args:
        model: any.

    Raises:
        TypeError: trained parameters in a scripted module, or wrapped in FullyShardedDataParallel.
        ValueError: a parameter without a shape or without memory.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(each.requires_grad for each in module.parameters()):
            raise TypeError(
                f"{name or 'the model'} is a torch.jit.ScriptModule with trained parameters, whose uses cannot be "
                "captured: make the optimizer of a model that is not scripted"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet: run the model once before making the optimizer")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: give it memory (to_empty) before making the optimizer")
    if sharded := [name for name, m in model.named_modules() if type(m).__name__ == "FullyShardedDataParallel"]:
        raise TypeError(f"{sharded[0] or 'the model'} is wrapped in FullyShardedDataParallel: {_NO_FLAT_WEIGHTS}")


def check_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that are parts of a flat one, which have no matrix.

    Args:
        named: parameters by name.

    Raises:
        TypeError: for one that is.
    """
    for name, parameter in named:
        if getattr(parameter, "_fsdp_flattened", False):  # by FullyShardedDataParallel(…, use_orig_params=True)
            raise TypeError(f"{name} is a part of a FullyShardedDataParallel's flat parameter: {_NO_FLAT_WEIGHTS}")


_NO_FLAT_WEIGHTS = (
    "NG+ needs weights that have rows and columns; shard the model by torch.distributed.fsdp.fully_shard instead, or "
    "wrap it in torch.nn.parallel.DistributedDataParallel"
)


def make_base(
    base: Any, params: Params, lr: Any, options: dict[str, Any], owner: str, settings: Mapping[str, Any]
) -> Optimizer:
    """Make the base optimizer, its arguments checked by name first.

    Args:
        base: its class.
        params: what it trains.
        lr: of it.
        options: everything else that it takes.
        owner: name of the optimizer around it, for errors.
        settings: of that optimizer, which hold for all groups, by name.

    Returns:
        The base.

    Raises:
        TypeError: ``base`` is no optimizer class, or does not take one of the options.
        ValueError: a damping ≤ 0, ``differentiable=True``, or one of ``settings`` in a group.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base must be a torch.optim.Optimizer class, such as torch.optim.SGD, got {base!r}")
    known = inspect.signature(base).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if (unknown := sorted(set(options) - set(known))) and not open_ended:
        allowed = ", ".join(name for name in known if name not in ("params", "lr"))
        raise TypeError(
            f"{', '.join(unknown)} is an option of neither {owner} nor its base {base.__name__}, which takes {allowed}"
        )
    make = cast(Callable[..., Optimizer], base)
    groups = [check_group(group) for group in params]
    for group in groups:
        check_no_settings(group, settings, base)
    made = make(groups, lr=lr, **options)
    for group in made.param_groups:
        check_group(group)
    return made


def check_no_settings(group: Any, settings: Mapping[str, Any], base: type[Optimizer]) -> None:
    """Refuse settings in a parameter group that hold for all of them, and would have no effect there.

    Args:
        group: the group, or a parameter.
        settings: of the optimizer.
        base: whose own settings of such a name count.

    Raises:
        ValueError: one with another value than the optimizer's.
    """
    if not isinstance(group, dict):
        return
    known = inspect.signature(base).parameters
    given = [name for name in group.keys() & settings.keys() if name not in known]
    if found := sorted(name for name in given if not _is_same(group[name], settings[name])):
        raise ValueError(
            f"{', '.join(f'{name}={group[name]!r}' for name in found)} of a parameter group would have no effect: it "
            "holds for all groups, as an argument of the optimizer; a group has lr, damping and what the base takes"
        )


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | float | str) and bool(one == other))


def check_group(group: Any) -> Any:
    """Check a parameter group's damping, and make it a float; anything but a group is left to ``base``.

    Args:
        group: the group, or a parameter.

    Returns:
        It, copied where it has a damping.

    Raises:
        TypeError: a damping that is no number.
        ValueError: a damping ≤ 0, or ``differentiable=True``.
    """
    if not isinstance(group, dict):
        return group
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported: the preconditioned gradient is made without a graph, so that "
            "derivatives through the step would be wrong"
        )
    if "damping" not in group:
        return group
    return {**group, "damping": check_positive("damping of a parameter group", group["damping"])}


__all__ = [
    "Basis",
    "Curvature",
    "DampingRule",
    "FunctionFallback",
    "Inverses",
    "LayerwiseOptions",
    "ModelCallSamples",
    "NonFinite",
    "Options",
    "Params",
    "PartialCapture",
    "Samples",
    "Sides",
    "SolverName",
    "check_choice",
    "check_count",
    "check_ema",
    "check_group",
    "check_no_settings",
    "check_patterns",
    "check_positive",
    "check_ready",
    "check_whole",
    "find_phase",
    "make_base",
    "model_and_params",
    "update_phases",
]
