"""Wrappers that take on the class of the optimizer that they wrap, as those of Lightning and Fabric do.

Such a wrapper has the optimizer's methods and properties and none of its attributes, which it reads from the optimizer.
What those methods and properties set would stay with the wrapper, and the optimizer's step would know nothing of it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer


def set_on_wrapped(self: Any, name: str, value: Any) -> None:
    """``__setattr__`` of a class that is an optimizer's behind one that is none: what is the optimizer's, it gets.

    Methods that are replaced on the wrapper, as a scheduler replaces ``step``, stay there.

    Args:
        self: a wrapper with the optimizer as its attribute ``_optimizer``, or any other object.
        name: of the attribute.
        value: of the attribute.
    """
    wrapped = self.__dict__.get("_optimizer")
    if isinstance(wrapped, Optimizer) and _belongs_to(wrapped, name):
        setattr(wrapped, name, value)
    else:
        object.__setattr__(self, name, value)


def _belongs_to(optimizer: Optimizer, name: str) -> bool:
    of_class = inspect.getattr_static(type(optimizer), name, None)
    return isinstance(of_class, property) or (name in vars(optimizer) and not callable(of_class))


__all__ = ["set_on_wrapped"]
