"""What Lightning and Fabric put around optimizers and models.

Their wrapper of an optimizer takes on its class: it has the optimizer's methods and properties and none of its
attributes, which it reads from the optimizer. What those methods and properties set would stay with the wrapper, and
the optimizer's step would know nothing of it.

With `DistributedDataParallel` they run another method of a model, as ``training_step``, in place of its ``forward``.
That is no call of the model, but the part of a training loop which calls it, once or several times.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def set_on_wrapped(self: Any, name: str, value: Any) -> None:
    """``__setattr__`` of a class that is an optimizer's behind one that is none: what is the optimizer's, it gets.

    Methods that are replaced on the wrapper, as a scheduler replaces ``step``, stay there.

    Args:
        self: a wrapper with the optimizer as its attribute ``_optimizer``, or any other object.
        name: of the attribute.
        value: of the attribute.
    """
    wrapped = self.__dict__.get("_optimizer")
    if type(wrapped) in type(self).__bases__ and name not in self.__dict__ and _belongs_to(wrapped, name):
        setattr(wrapped, name, value)
    else:
        object.__setattr__(self, name, value)


def _belongs_to(optimizer: Any, name: str) -> bool:
    of_class = inspect.getattr_static(type(optimizer), name, None)
    return isinstance(of_class, property) or (name in vars(optimizer) and not callable(of_class))


def runs_other_method(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of Lightning's or Fabric's for one call, or is around one that has."""
    forward = module.__dict__.get("forward")
    if forward is None:
        inside = list(module.children())
        return len(inside) == 1 and runs_other_method(inside[0])
    if inspect.ismethod(forward):
        return False
    return str(getattr(forward, "__module__", "")).partition(".")[0] in _LIGHTNING


def is_around_model(module: nn.Module) -> bool:
    """Whether a module is what `DistributedDataParallel` or Fabric puts around a model."""
    return isinstance(module, DistributedDataParallel) or type(module).__module__.partition(".")[0] in _LIGHTNING


__all__ = ["is_around_model", "runs_other_method", "set_on_wrapped"]
