"""Uneven numbers of batches a process, with `torch.distributed.algorithms.Join`.

Under `Join` a process that has run out of batches takes part in the collectives of those that have not, through the
hooks of what the context manager was given. Curvature is averaged over all processes, so the optimizer has such a hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.distributed.algorithms.join import JoinHook


class StepHook(JoinHook):
    """Takes part in the steps of others.

    Args:
        step: what a process without a batch does for each step of those that have one.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def main_hook(self) -> None:
        """Take part in one step."""
        self._step()


def find_joinables(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Find those of the modules that `Join` may have been given: `DistributedDataParallel`."""
    return [module for module in modules if is_joinable(module)]


def is_joinable(module: nn.Module) -> bool:
    """Whether `Join` may have been given this module."""
    return "_join_config" in module.__dict__


def refuse_without(
    name: str, own: Any, modules: Iterable[nn.Module], param_groups: Iterable[Mapping[str, Any]]
) -> None:
    """Refuse to step under a `Join` that was given the model, but not its optimizer.

    Args:
        name: of the optimizer.
        own: the ``_join_config`` of the optimizer.
        modules: that `Join` may have been given.
        param_groups: of the optimizer.

    Raises:
        RuntimeError: where processes would have to wait for one that has run out of batches.
    """
    # With ``throw_on_early_termination`` all processes end when the first has run out.
    modules = [m for m in modules if (config := _config(m)).enable and not config.throw_on_early_termination]
    if own.enable or not modules:
        return
    trained = {id(parameter) for group in param_groups for parameter in group["params"]}
    for module in modules:
        if any(id(parameter) in trained for parameter in module.parameters()):
            raise RuntimeError(JOIN_BOTH.format(name=name))


def _config(module: nn.Module) -> Any:
    return module._join_config


JOIN_BOTH = (
    "{name} averages curvature over all processes and would wait for one that has run out of batches: "
    "give the optimizer to Join too, after the model, as in Join([model, optimizer])"
)
