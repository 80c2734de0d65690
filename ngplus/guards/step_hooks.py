"""One call of the hooks that are registered for every optimizer where one step contains another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ngplus._torch_internals import with_globals

_REGISTRIES = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def find_inner_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Find the step of an optimizer that makes the step of another one, of which the user's code knows.

    The optimizer's own hooks are called. Those of `torch.optim.optimizer.register_optimizer_step_pre_hook` and
    ``register_optimizer_step_post_hook`` are not, since they are called for the other's step.

    Args:
        optimizer: the inner one.

    Returns:
        Its ``step``. Where hooks are registered for every optimizer, a copy of the function by which torch calls
        hooks around ``step``, in which there are none of these: taking them out of torch's registries for the time of
        the step would take them from steps in other threads too.
    """
    step = type(optimizer).step
    registered = any(getattr(torch_optimizer, name, None) for name in _REGISTRIES)
    if not registered or "step" in vars(optimizer) or not getattr(step, "hooked", False):
        return optimizer.step
    return partial(with_globals(step, {name: {} for name in _REGISTRIES}), optimizer)


__all__ = ["find_inner_step"]
