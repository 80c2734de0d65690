"""A model that is run and left exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore on exit, after an error too, what running a model changes.

    That is its gradients, the values of its buffers (running statistics), the mode of each module, and the random
    states of torch, on the CPU and on the GPUs of its parameters, and of Python. Gradients are None inside.

    Args:
        model: any.

    Yields:
        Nothing.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
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
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                buffer.copy_(values)
                module._buffers[name] = buffer


__all__ = ["unchanged"]
