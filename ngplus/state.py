"""The state dict of an optimizer around a base: what the base saves, and what is kept of each layer.

The entries of a layer are stored under ``state`` with the base's own of its weight, and the counters in the first of
``param_groups``, so that all of it goes through whatever carries an optimizer's state: `torch.save`,
`torch.distributed.checkpoint`, hooks.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.curvature.all_reduce import largest, world_size
from ngplus.curvature.coverage import Coverage
from ngplus.curvature.layer_state import LayerState
from ngplus.curvature.store import CurvatureStore
from ngplus.dtensors import is_sharded, local_part
from ngplus.layers import Layer, rekey_layers
from ngplus.solvers.preconditioner import Entries

_COUNTERS = ("base", "steps", "skipped", "generator")


_FIRST_LAYOUT = ("base", "steps", "late", "tries", "skipped", "generator", "layers")


@dataclass(kw_only=True)
class Progress:
    """What an optimizer knows beyond its base and its options.

    Attributes:
        steps: taken so far.
        skipped: of these, steps whose gradients counted as zero because they were not finite.
        generator: the state of the generator that sketches are sampled with.
        states: the curvature of the layers that have one.
        pending: layers that are tried again on the next step.
        tries: how often a layer with a gradient was left without curvature.
        unsupported: layers whose last curvature step found a use that has no curvature.
    """

    steps: int
    skipped: int | Tensor
    generator: Tensor
    states: dict[Layer, LayerState]
    pending: list[Layer] = field(default_factory=list)
    tries: dict[Layer, int] = field(default_factory=dict)
    unsupported: set[Layer] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the entries of an optimizer are in its state dict.

    Attributes:
        owner: the optimizer's class, for messages.
        key: what the names of its entries start with.
        base: the class of its base.
        groups: its parameter groups.
        layers: its layers.
        curvature: packs and unpacks what is kept of a layer.
    """

    owner: str
    key: str
    base: str
    groups: Sequence[dict[str, Any]]
    layers: Sequence[Layer]
    curvature: CurvatureStore

    def pack(self, progress: Progress, base_state: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of an optimizer.

        Args:
            progress: what to add.
            base_state: the state dict of the base, which is not changed.

        Returns:
            ``base_state`` with the counters in its first group and the entries of each parameter in its ``state``.
        """
        groups = [dict(group) for group in base_state.get("param_groups", self._number_groups())]
        groups[0][self.key] = self._counters(progress)
        state = dict(base_state.get("state", {}))
        entries = self.entries(progress)
        for parameter, index in self._match_keys(groups):
            state[index] = {**state.get(index, {}), **entries[parameter]}
        return {**base_state, "state": state, "param_groups": groups}

    def entries(self, progress: Progress) -> dict[nn.Parameter, Entries]:
        """What is saved of each parameter; a layer's stands under its weight.

        There is an entry of every parameter: torch's ``set_state_dict`` asks for all of them where there is one of any.
        """
        layers = {id(layer.weight): layer for layer in self.layers}
        parameters = [parameter for group in self.groups for parameter in group["params"]]
        found = [(parameter, layers.get(id(parameter))) for parameter in parameters]
        return {
            parameter: self._add_prefix({"updates": 0} if layer is None else self._layer_entries(layer, progress))
            for parameter, layer in found
        }

    def _layer_entries(self, layer: Layer, progress: Progress) -> Entries:
        place = progress.pending.index(layer) + 1 if layer in progress.pending else 0
        tries, unsupported = progress.tries.get(layer, 0), int(layer in progress.unsupported)
        return {**self.curvature.pack(layer), "pending": place, "tries": tries, "unsupported": unsupported}

    def _add_prefix(self, entries: Entries) -> Entries:
        return {f"{self.key}_{name}": each for name, each in entries.items()}

    def _counters(self, progress: Progress) -> dict[str, Any]:
        # On the weights' device: of all that is saved, torch's set_state_dict wants the tensors on one.
        generator = progress.generator.to(self.layers[0].weight.device)
        return {"base": self.base, "steps": progress.steps, "skipped": int(progress.skipped), "generator": generator}

    def _number_groups(self) -> Iterator[dict[str, Any]]:
        """Groups that hold the numbers of their parameters alone, for a base whose state dict has no groups."""
        start = 0
        for group in self.groups:
            yield {"params": list(range(start, start + len(group["params"])))}
            start += len(group["params"])

    def _match_keys(self, saved_groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[nn.Parameter, Any]]:
        """Each parameter and the key that it has in a state dict."""
        for group, saved in zip(self.groups, saved_groups, strict=True):
            yield from zip(group["params"], saved["params"], strict=True)

    def unpack(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        """The two parts of a state dict, of this layout or of the first.

        Args:
            state_dict: what `pack` gave, with other keys for the parameters perhaps.

        Returns:
            The state dict of the base, and the progress.

        Raises:
            ValueError: a state of another optimizer, base or model, or one that was cut short.
        """
        if self.key in state_dict:
            return self._unpack_first_layout(state_dict)
        self._check_mesh(state_dict.get("state", {}))
        groups = state_dict.get("param_groups", [])
        counters = next((group[self.key] for group in groups if self.key in group), None)
        if counters is None:
            raise ValueError(
                f"this is no state of {self.owner}: its keys are {sorted(state_dict)}, and {self.key!r} is in none of "
                "its parameter groups"
            )
        self._check_whole(counters, _COUNTERS)
        self._check_base(counters["base"])
        self._check_groups(groups)
        state, entries = self._split(state_dict.get("state", {}))
        base_groups = [{name: each for name, each in group.items() if name != self.key} for group in groups]
        base_state = {**state_dict, "state": state, "param_groups": base_groups}
        keys = {id(parameter): key for parameter, key in self._match_keys(groups)}
        of_layers = {layer: entries.pop(keys[id(layer.weight)], {}) for layer in self.layers}
        # What was no layer when it was saved has its number of updates alone, which is zero.
        of_layers = {layer: {} if each.keys() == {"updates"} else each for layer, each in of_layers.items()}
        self._check_no_curvature(entries)
        if lost := [layer.name for layer, each in of_layers.items() if not each]:
            warnings.warn(
                f"the state says nothing of {', '.join(lost)}: without curvature until the next curvature step",
                stacklevel=3,
            )
        return base_state, self._read_progress(counters, of_layers)

    def _split(self, state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Entries]]:
        """The base's part of ``state``, and the entries by the key of their parameter, without their prefix."""
        prefix = f"{self.key}_"
        ours: dict[Any, Entries] = {}
        theirs: dict[Any, Any] = {}
        for key, each in state.items():
            if not isinstance(each, Mapping):
                theirs[key] = each
                continue
            mine = [name for name in each if isinstance(name, str) and name.startswith(prefix)]
            ours[key] = {name.removeprefix(prefix): each[name] for name in mine}
            if rest := {name: value for name, value in each.items() if name not in mine}:
                theirs[key] = rest
        return theirs, ours

    def _read_progress(self, counters: Mapping[str, Any], entries: Mapping[Layer, Entries]) -> Progress:
        found = {layer: each for layer, each in entries.items() if each}
        for layer, each in found.items():
            self._check_whole(each, ("pending", "tries", "unsupported"), f"the state of {layer.name}")
        states = {layer: self.curvature.unpack(layer, each) for layer, each in found.items()}
        pending = [layer for layer, each in found.items() if each["pending"]]
        return Progress(
            steps=int(counters["steps"]),
            skipped=int(counters["skipped"]),
            generator=self._check_generator(counters["generator"]),
            states={layer: state for layer, state in states.items() if state is not None},
            pending=sorted(pending, key=lambda layer: found[layer]["pending"]),
            tries={layer: int(each["tries"]) for layer, each in found.items() if each["tries"]},
            unsupported={layer for layer, each in found.items() if each["unsupported"]},
        )

    def _check_generator(self, state: Any) -> Tensor:
        try:
            torch.Generator().set_state(state.cpu())
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"the state of {self.owner} has no state of a generator, a tensor of torch.uint8: {error}"
            ) from None
        assert isinstance(state, Tensor)
        return state

    def _check_whole(self, found: Mapping[str, Any], names: Sequence[str], what: str | None = None) -> None:
        if missing := [name for name in names if name not in found]:
            what = what or f"the state of {self.owner}"
            raise ValueError(f"{what} has no {', '.join(missing)}: it was cut short or made otherwise")

    def _check_base(self, base: str) -> None:
        if base != self.base:
            raise ValueError(f"the state is of {self.owner} around {base}, but this one is around {self.base}")

    def _check_mesh(self, state: Mapping[Any, Any]) -> None:
        """Refuse shards of other processes than those that are here."""
        entries = (value for each in state.values() if isinstance(each, Mapping) for value in each.values())
        here = {p.device_mesh.size() for group in self.groups for p in group["params"] if is_sharded(p)} or {1}
        there = {entry.device_mesh.size() for entry in entries if is_sharded(entry)}
        if there - here:
            raise ValueError(
                f"the state is sharded over {max(there - here)} processes, and the parameters here over {max(here)}: "
                "save and load it through torch.distributed.checkpoint, which shards it again"
            )

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        theirs, ours = ([len(group["params"]) for group in groups] for groups in (saved, self.groups))
        if theirs != ours:
            raise ValueError(f"the state has parameter groups of {theirs} parameters, but this optimizer's have {ours}")

    def _check_no_curvature(self, others: Mapping[Any, Entries]) -> None:
        if unknown := [str(key) for key, entries in others.items() if entries.get("updates")]:
            raise ValueError(f"the state has the curvature of parameters that are no layers here: {', '.join(unknown)}")

    # The first layout: everything but the base's state under one key, the layers by name ------------------------------

    def _unpack_first_layout(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        packed = state_dict[self.key]
        self._check_whole(packed, _FIRST_LAYOUT)
        self._check_base(packed["base"])
        self._check_groups(state_dict["param_groups"])
        layers = {layer.name: layer for layer in self.layers}
        if unknown := sorted(set(packed["layers"]) - set(layers)):
            raise ValueError(
                f"the state has layers that this model does not: {', '.join(unknown)}; it has {', '.join(layers)}"
            )
        unpack = self.curvature.state_class.from_first_layout
        progress = Progress(
            steps=packed["steps"],
            skipped=packed["skipped"],
            generator=packed["generator"],
            states={layers[name]: unpack(layers[name], each) for name, each in packed["layers"].items()},
            pending=[layers[name] for name in packed["late"] if name in layers],
            tries={layers[name]: count for name, count in packed["tries"].items() if name in layers},
        )
        return {name: each for name, each in state_dict.items() if name != self.key}, progress


def initializes_state(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a step is one that `torch.distributed.checkpoint` makes to have a base initialize its state.

    It gives every trained parameter a gradient of zeros and sets every lr to 0. A warm-up's first step, whose lr may be
    0 too, has other gradients; only there they are searched, which synchronizes with the device.

    Args:
        groups: parameter groups.

    Returns:
        Whether it is.
    """
    if any(float(group.get("lr", 0.0)) != 0 for group in groups):
        return False
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    dense = [local_part(gradient) for gradient in gradients if gradient is not None and not gradient.is_sparse]
    initializes = len(dense) == len(gradients) and not any(bool(torch.count_nonzero(gradient)) for gradient in dense)
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded or world_size() == 1:
        return initializes
    return largest([float(not initializes)], sharded[0].device) == [0.0]  # one's shard may be zeros, or have no rows


@contextmanager
def _undone_by_errors(base: Optimizer) -> Iterator[None]:
    """Give an optimizer the state and the settings back that it had, where loading others fails halfway."""
    attributes, groups = dict(base.__dict__), [dict(group) for group in base.param_groups]
    try:
        yield
    except BaseException:
        base.__dict__.clear()
        base.__dict__.update(attributes)
        for group, settings in zip(base.param_groups, groups, strict=True):
            group.clear()
            group.update(settings)
        raise


class SavedState(ABC):
    """Saving, loading and copying of a `LayerwiseOptimizer`."""

    key: ClassVar[str]
    param_groups: list[dict[str, Any]]
    _base: Optimizer
    _layers: list[Layer]
    _curvature: CurvatureStore
    _coverage: Coverage
    _generator: torch.Generator
    _skipped: Tensor | None
    _base_has_stepped: bool
    _state_is_complete: bool
    _optimizer_state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _optimizer_state_dict_post_hooks: OrderedDict[int, Callable[..., Any]]
    _optimizer_load_state_dict_pre_hooks: OrderedDict[int, Callable[..., Any]]
    _optimizer_load_state_dict_post_hooks: OrderedDict[int, Callable[..., Any]]

    # Of the optimizer ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _share_groups(self) -> None:
        """Use the list of groups that is `base`'s."""

    @abstractmethod
    def _start(self) -> None:
        """Make everything that is not pickled."""

    @abstractmethod
    def _update_layers(self) -> None:
        """Find the layers again."""

    @abstractmethod
    def _arm_recorder(self) -> None:
        """Record the next forward pass if its step builds curvature."""

    # The base, and its state --------------------------------------------------------------------------------------

    @property
    def _has_base(self) -> bool:
        """Whether `base` is known: of a wrapper too, which has no attributes of its own."""
        return isinstance(getattr(self, "_base", None), Optimizer)

    @property
    def base(self) -> Optimizer:
        """The optimizer that makes the steps."""
        self._hide_entries_()
        return self._base

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of `base`, and what is kept of each layer under its weight, named as in `state_dict`.

        From the first step on: an optimizer that has not stepped has no state, in torch.
        """
        if not self._state_is_complete and (self._base_has_stepped or self._base.state):
            for parameter, entries in self._layout().entries(self._progress()).items():
                self._base.state[parameter].update(entries)
            self._state_is_complete = True
        return self._base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._has_base:  # else it is `Optimizer.__init__`, and `base` has a state already
            self._base.state = state

    def _hide_entries_(self) -> None:
        """Remove from `base`'s state what is not its own; it may take a parameter without state for a new one."""
        if not self._state_is_complete:
            return
        self._state_is_complete = False
        prefix = f"{self.key}_"
        for parameter, entries in list(self._base.state.items()):
            if isinstance(parameter, Tensor):
                for name in [name for name in entries if isinstance(name, str) and name.startswith(prefix)]:
                    del entries[name]
                if not entries:
                    del self._base.state[parameter]

    # The state dict -----------------------------------------------------------------------------------------------

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
        self._hide_entries_()
        state_dict = self._layout().pack(self._progress(), self._base.state_dict())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, `base` by its own ``load_state_dict``.

        Args:
            state_dict: of this layout or of the first.

        Raises:
            ValueError: a state of another optimizer or another model.
            Exception: what ``base`` raises. Whatever is raised, nothing has changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        base_state, progress = self._layout().unpack(state_dict)
        self._hide_entries_()
        with _undone_by_errors(self._base):
            self._base.load_state_dict(base_state)
        self._share_groups()
        self._update_layers()
        self._restore(progress)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _layout(self) -> Layout:
        return Layout(
            owner=type(self).__name__,
            key=self.key,
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
            pending=self._coverage.pending,
            tries=self._coverage.tries,
            unsupported=self._coverage.unsupported,
        )

    def _restore(self, progress: Progress) -> None:
        self._set_counters(progress.steps)
        self._base_has_stepped = progress.steps > 0
        self._skipped = torch.tensor(progress.skipped)
        self._generator.set_state(progress.generator.cpu())
        self._curvature.states = rekey_layers(progress.states, self._layers)  # which may have got other names since
        self._coverage.pending = progress.pending
        self._coverage.tries = progress.tries
        self._coverage.unsupported = progress.unsupported
        self._coverage.rekey_(self._layers)
        self._arm_recorder()

    def _set_counters(self, steps: int) -> None:
        """Put the counters where `state_dict` has them, so that torch's tools know of their place."""
        for group in self.param_groups:
            group.pop(self.key, None)
        self._counters: dict[str, Any] = {"base": type(self._base).__name__, "steps": steps}
        self.param_groups[0][self.key] = self._counters

    @property
    def _steps(self) -> int:
        steps: int = self._counters["steps"]
        return steps

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._counters["steps"] = steps

    # Pickle and copy ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self._hide_entries_()
        names = ("defaults", "_model", "_base", "_options")
        return {name: getattr(self, name) for name in names} | {"_packed": self._layout().pack(self._progress(), {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_packed"})  # type: ignore[misc]
        self._share_groups()
        self._start()
        _, progress = self._layout().unpack(state["_packed"])
        self._restore(progress)


__all__ = ["Layout", "Progress", "SavedState", "initializes_state"]
