"""What a forward pass uses its weights for, whatever modules the model is made of.

torch's functions are recorded, not its modules: schnetpack's Dense applies its activation inside, fairseq's attention
hands the weights of its projections to a function, a tied weight belongs to two modules. Nothing of `ngplus` is used,
so that what is seen here can be an oracle for it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LOOKUPS = ("embedding", "embedding_bag")
FUNCTIONS = ("linear", *CONVOLUTIONS, *LOOKUPS)


class Use(NamedTuple):
    """One call of a function of torch with a module's weight.

    Attributes:
        layer: the name of the weight's module, the first of them if it is tied.
        module: that module.
        function: one of `FUNCTIONS`.
        inputs: what the weight was applied to.
        output: what came out, before any activation.
    """

    layer: str
    module: nn.Module
    function: str
    inputs: Tensor
    output: Tensor

    @property
    def positions(self) -> int:
        """How often the weight was applied: rows of a product, output pixels, or rows looked up."""
        if self.function in LOOKUPS:
            return self.inputs.numel()
        if self.function in CONVOLUTIONS:
            return self.output.numel() // self.output.shape[1]
        return self.output.numel() // self.output.shape[-1]


@contextmanager
def record_uses(model: nn.Module) -> Iterator[list[Use]]:
    """Every use of a weight of `model` while the context is open, in order.

    Args:
        model: whose weights are looked for.

    Yields:
        A list that grows with every use.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> with record_uses(model) as uses:
        ...     _ = model(torch.ones(5, 3))
        >>> [(use.layer, use.function, use.positions) for use in uses]
        [('0', 'linear', 5)]
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), (name, module))
    uses: list[Use] = []
    with patch.multiple(F, **{name: _record_function(name, owners, uses) for name in FUNCTIONS}):
        yield uses


def _record_function(name: str, owners: Mapping[int, tuple[str, nn.Module]], uses: list[Use]) -> Callable[..., Tensor]:
    """The function of that name, which notes down what it is called with; all take inputs and weight first."""
    function = getattr(F, name)

    def record(inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = function(inputs, weight, *args, **kwargs)
        if owner := owners.get(id(weight)):
            uses.append(Use(*owner, name, inputs, output))
        return output

    return record
