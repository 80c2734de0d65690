"""The layers of a sharded model as its forward pass has them: their weights whole.

Outside of the model's calls a module's parameters are those of the optimizer, of which each process has a shard. Inside
they are whole, plain ones, the same objects on every step. So a weight is looked up when a function is called with it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ngplus._torch_internals import find_kept_back
from ngplus.dtensors import is_sharded
from ngplus.layers import Layer

_Place = tuple[nn.Module, str]


class WholeWeights:
    """Finds the sharded parameter that a whole one stands for, and the layer with whole parameters.

    Args:
        model: while its parameters are sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[int, _Place] = {
            id(parameter): (module, name)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and is_sharded(parameter)
        }
        self._sharded: dict[int, tuple[Tensor, int]] = {}
        self._layers: dict[tuple[Layer, int, int], Layer] = {}
        self._originals: dict[Layer, Layer] = {}
        self._kept_back: tuple[int, set[int]] | None = None

    def find(self, parameter: Tensor) -> int:
        """The id of the sharded parameter that a whole one stands for, or of the parameter itself.

        Args:
            parameter: what a function was called with.

        Returns:
            The id.
        """
        known = self._sharded.get(id(parameter))
        if known is not None and known[0] is parameter:
            return known[1]
        if isinstance(parameter, nn.Parameter):
            for sharded, (module, name) in self._places.items():
                if module._parameters[name] is parameter:
                    self._sharded[id(parameter)] = parameter, sharded
                    return sharded
        return id(parameter)

    def of_layer(self, layer: Layer) -> Layer:
        """The layer with the parameters that its module has now, while the module is called."""
        weight, bias = self._now(layer.weight), self._now(layer.bias)
        # A recurrent module looks at its weights while they are replaced one by one: some are whole by then, some not.
        key = layer, id(weight), id(bias)
        if (known := self._layers.get(key)) is not None:
            return known
        assert weight is not None
        self._layers[key] = used = replace(layer, weight=weight, bias=bias)
        self._originals[used] = layer
        return used

    def is_kept_back(self, layer: Layer, backward_pass: int) -> bool:
        """Whether `fully_shard` keeps the gradient of a layer's weight back for a later backward pass.

        Args:
            layer: the optimizer's.
            backward_pass: the number of the one that runs.

        Returns:
            Whether it has one, though ``.grad`` has none.
        """
        if self._kept_back is None or self._kept_back[0] != backward_pass:
            self._kept_back = backward_pass, find_kept_back(self._model)
        return id(layer.weight) in self._kept_back[1]

    def forget(self) -> None:
        """Forget the layers; the ids of their parameters stand for them only as long as they are kept here."""
        self._layers, self._originals = {}, {}

    def original(self, used: Layer) -> Layer:
        """The layer that `of_layer` was given."""
        return self._originals.get(used, used)

    def _now(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        place = self._places.get(id(parameter))
        return parameter if place is None else place[0]._parameters[place[1]]


__all__ = ["WholeWeights"]
