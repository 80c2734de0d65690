"""The cost of building the curvature as the authors' code does it, as a yardstick.

Always the left matrix L, also where m > n, and always from every sample's gradient 𝒢ᵢ written out. This is our own
reference for that cost; nothing trains with it.
"""

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from ngplus.factors.im2col import Patches

CHUNK = 2**24


def released_moments(layer: nn.Conv2d | nn.Linear, inputs: Tensor, gradients: Tensor) -> Tensor:
    """L = Σᵢ 𝒢ᵢ𝒢ᵢᵀ, (m, m), every 𝒢ᵢ (m, n) formed; in chunks of samples so that memory stays bounded.

    Args:
        layer: a linear layer or an ungrouped convolution.
        inputs: of the layer, (b, ...).
        gradients: of the layer's output, (b, ...).

    Returns:
        L, (m, m).
    """
    samples = inputs.shape[0]
    numbers = layer.weight.numel()
    step = max(1, CHUNK // numbers)
    moments = layer.weight.new_zeros(layer.weight.shape[0], layer.weight.shape[0])
    for start in range(0, samples, step):
        chunk = slice(start, start + step)
        G = _sample_gradients(layer, inputs[chunk], gradients[chunk])  # (b, m, n)
        rows = G.transpose(0, 1).flatten(1)  # (m, b·n)
        moments += rows @ rows.T
    return moments


def _sample_gradients(layer: nn.Conv2d | nn.Linear, inputs: Tensor, gradients: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return gradients.unsqueeze(2) * inputs.unsqueeze(1)
    padding = tuple((int(p), int(p)) for p in layer.padding)
    patches = Patches(inputs, layer.kernel_size, layer.stride, layer.dilation, padding, 1)
    return gradients.flatten(2) @ patches.dense()[:, 0].mT


class ReleasedCurvature:
    """Builds the released curvature inside every backward of ``model`` while the context is open.

    Args:
        model: whose backward it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> Self:
        layers = [module for module in self._model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        self._handles = [layer.register_forward_hook(self._see) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(partial(self._build, layer, inputs[0].detach()))

    @torch.no_grad()
    def _build(self, layer: nn.Conv2d | nn.Linear, inputs: Tensor, gradient: Tensor) -> None:
        released_moments(layer, inputs, gradient)
