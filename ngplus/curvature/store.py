"""What is kept of all layers between curvature steps: found, packed and unpacked by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ngplus.curvature.layer_state import LayerState, empty_entries, pad
from ngplus.dtensors import whole
from ngplus.layers import Layer
from ngplus.sharded.remote_inverse import RemoteInverse
from ngplus.sharded.saved_stacks import scatter_stack, zero_stack
from ngplus.solvers.dense import DenseInverse
from ngplus.solvers.preconditioner import Entries

if TYPE_CHECKING:
    from ngplus.sharded.sharding import Sharding


class CurvatureStore(ABC):
    """What is kept of each layer of a model.

    Args:
        block_size: p of (18), or None.

    Attributes:
        states: by layer, of those that have a curvature.
        sharding: who keeps what of sharded layers; None where there are none.
    """

    state_class: ClassVar[type[LayerState]] = LayerState
    averages_fit: ClassVar[bool] = True
    """Whether averages of other sizes are refused; else they are dropped when they are updated."""

    def __init__(self, block_size: int | None = None) -> None:
        self._block_size = block_size
        self.states: dict[Layer, LayerState] = {}
        self.sharding: Sharding | None = None

    @abstractmethod
    def _blank_entries(self, layer: Layer) -> Entries:
        """The entries that every layer saves, their tensors without memory."""

    @property
    def _keeps_average(self) -> bool:
        """Whether a state without an average was cut short."""
        return False

    def find_ready(self, layer: Layer) -> LayerState | None:
        """What is kept of a layer that has a gradient, moved to the gradient's device if need be.

        Args:
            layer: the layer. What no longer fits its matrix is dropped.

        Returns:
            The state, or None.
        """
        state, gradient = self.states.get(layer), layer.weight.grad
        if state is None or gradient is None:
            return None
        if not state.fits(layer):  # its bias was frozen or freed meanwhile, or its table has grown
            del self.states[layer]
            return None
        if state.preconditioner.main.device != gradient.device:
            state.to_(gradient.device)
        return state

    def pack(self, layer: Layer) -> Entries:
        """Pack what is saved of a layer, with or without curvature, by names and in sizes that follow from the options.

        `torch.distributed.checkpoint` fills tensors that it is given, and knows no others: an optimizer that has no
        curvature yet has to offer tensors of the right sizes. A rank depends on the batch; its columns are padded with
        zeros to p×p, which is no more than the weight.

        Args:
            layer: the layer.

        Returns:
            Tensors and numbers by name.
        """
        kept, device, shape = self.states.get(layer), layer.weight.device, layer.shape(self._block_size)
        sharding = self.sharding if self.sharding is not None and self.sharding.keeper(layer) is not None else None
        if kept is not None and not (kept.fits(layer) if sharding is None else kept.shape == shape):
            kept = None
        entries = empty_entries(shape) if kept is None else kept.entries()
        blank = self._blank_entries(layer)
        if sharding is not None:
            return self._pack_shards(sharding, layer, entries, blank)
        if kept is not None and kept.shape != shape:  # of a layer that is frozen as a whole: in its own sizes
            blank = {name: like for name, like in blank.items() if name not in entries}
        filled = {name: pad(entries.get(name), like, device) for name, like in blank.items()}
        others = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in entries.items()}
        return {**others, **filled}

    def _pack_shards(self, sharding: Sharding, layer: Layer, entries: Entries, blank: Entries) -> Entries:
        """Pack a layer of which one process keeps the stacks: each saves some rows of them."""
        keeper, device = sharding.keeper(layer), layer.weight.device
        assert keeper is not None
        stacks = {name: like for name, like in blank.items() if isinstance(like, Tensor) and like.dim() == 3}
        packed = {name: pad(entries.get(name), like, device) for name, like in blank.items() if name not in stacks}
        for name, like in stacks.items():
            stack = entries.get(name)
            if entries["updates"]:
                packed[name] = scatter_stack(
                    sharding, keeper, stack if isinstance(stack, Tensor) else None, like, device
                )
            else:
                packed[name] = zero_stack(sharding, like, device)
        same = ("matrix", "updates", "damping", "averaged")  # on every process
        return {**{name: entries[name] for name in same}, **packed}

    def unpack(self, layer: Layer, entries: Mapping[str, Any]) -> LayerState | None:
        """Restore what `pack` gave.

        Args:
            layer: the layer.
            entries: what `pack` gave.

        Returns:
            The layer's state; None where there was no curvature yet.

        Raises:
            ValueError: an entry is missing, or is of another matrix.
        """
        # torch's unflattening gives an empty dictionary for an entry that it does not find.
        found = {name: whole(each) for name, each in entries.items() if not isinstance(each, dict)}
        try:
            if not found["updates"]:
                return None
            self._check_kinds(layer, found)
            state = self.state_class.from_entries(layer, found)
            if found["averaged"] and not state.average and self._keeps_average:
                raise KeyError("average0")
        except KeyError as error:
            raise ValueError(
                f"the state of {layer.name} has no {error.args[0]}: it was cut short, or saved with other options"
            ) from None
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"the state of {layer.name} cannot be read: {error}") from error
        if self.averages_fit and state.shape == layer.shape(self._block_size):
            self._check_averages(layer, found)
        if self.sharding is not None and self.sharding.keeper(layer) is not None:
            self._keep_alone_(self.sharding, layer, state)
        return state

    def _check_kinds(self, layer: Layer, found: Mapping[str, Any]) -> None:
        """Refuse what is no tensor of real numbers where one is kept."""
        for name, like in self._blank_entries(layer).items():
            entry = found.get(name, like)
            if isinstance(like, Tensor) and like.is_floating_point():
                if not isinstance(entry, Tensor):
                    raise TypeError(f"its {name} must be a tensor, got {entry!r}")
                if not entry.is_floating_point():
                    raise TypeError(f"its {name} must hold real numbers, got {entry.dtype}")

    def _check_averages(self, layer: Layer, found: Mapping[str, Any]) -> None:
        """Refuse averages of another size than the layer's, of which the next curvature step would make one."""
        for name, like in self._blank_entries(layer).items():
            entry = found.get(name)
            if not (name.startswith("average") and isinstance(entry, Tensor) and isinstance(like, Tensor)):
                continue
            if entry.shape != like.shape:
                raise ValueError(
                    f"the state of {layer.name} has {name} of shape {tuple(entry.shape)}, and the layer's is "
                    f"{tuple(like.shape)}"
                )

    def _keep_alone_(self, sharding: Sharding, layer: Layer, state: LayerState) -> None:
        """Keep a restored state on one process, in the form in which several processes save it."""
        if sharding.is_elsewhere(layer):
            state.preconditioner = RemoteInverse.like(layer.weight)
            state.average = None if state.average is None else []
        elif not isinstance(state.preconditioner, DenseInverse):
            identity = torch.eye(state.shape.short).to(state.preconditioner.main).unsqueeze(0)
            inverse, _ = state.preconditioner.apply(identity, None, state.shape.side)
            state.preconditioner = DenseInverse([inverse.contiguous()], state.shape)


__all__ = ["CurvatureStore"]
