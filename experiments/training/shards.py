"""Training a model whose parameters are sharded over the processes, by `fully_shard`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from experiments.training.checkpoint import Checkpointed

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard_model(model: nn.Module) -> FSDPModule:
    """Shard a model in place: each member of its lists and sequences by itself, and what is left with the model.

    Members that share a weight with others are left with the model, since `fully_shard` takes a weight once.

    Args:
        model: on the device that it is trained on.

    Returns:
        It.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    inside = {id(member) for one in lists for outer in one for member in outer.modules() if member is not outer}
    members = [member for one in lists for member in one if id(member) not in inside]
    uses = Counter(id(parameter) for member in members for parameter in member.parameters())
    for member in members:
        parameters = list(member.parameters())
        if parameters and all(uses[id(parameter)] == 1 for parameter in parameters):
            fully_shard(member)
    return fully_shard(model)


def gather_model(model: nn.Module) -> dict[str, Any]:
    """The state of a sharded model with whole tensors, on the first process; every one must call this.

    Args:
        model: that `shard_model` has sharded.

    Returns:
        A state dict; empty on the others.
    """
    return get_model_state_dict(model, options=_WHOLE)


@dataclass(frozen=True, kw_only=True)
class ShardedParts(Checkpointed):
    """The parts of a run whose model is sharded; they are saved whole, so that every process must take part."""

    def states(self) -> dict[str, Any]:
        """The state dicts of model and optimizer, whole on the first process and empty on the others."""
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        return {"model": gather_model(self.model), "optimizer": optimizer}

    def load_states(self, states: Mapping[str, Any]) -> None:
        """Restore what `states` gave on the first process."""
        set_model_state_dict(self.model, states["model"], options=StateDictOptions(full_state_dict=True))
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"], options=options)


__all__ = ["ShardedParts", "gather_model", "shard_model"]
