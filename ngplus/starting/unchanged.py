"""A model that is run and left exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore on exit, after an error too, what running a model changes.

    That is its gradients, the values of its parameters (a table with ``max_norm`` changes its own), its buffers
    (running statistics), those that it makes included, the mode of each module, and the random states of torch, on the
    CPU and on the GPUs of its parameters, and of Python. Gradients are None inside.

    Args:
        model: any.

    Yields:
        Nothing.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(each, _version(each), each.detach().clone()) for each in model.parameters()]
    values = [(each, each.detach().clone()) for each in model.buffers()]  # which batch norms change uncounted
    in_python = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]  # others make none
    buffers = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in in_python]
    state = random.getstate()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(state)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        for module, before, not_saved in buffers:
            module._buffers.clear()
            module._buffers.update(before)
            module._non_persistent_buffers_set = not_saved
        with torch.no_grad():
            for each, value in values:
                each.copy_(value)
            for each, version, value in parameters:
                if _version(each) != version:  # what is copied into is changed for the graphs that are alive
                    each.copy_(value)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; one made in inference mode does not count."""
    return -1 if tensor.is_inference() else tensor._version


__all__ = ["unchanged"]
