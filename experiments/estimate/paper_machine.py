"""The paper's Table 1 as a measurement of its machine: what SGD's epoch says it achieves, and what that predicts.

    rate = operations of an epoch of SGD / 517 s,        epoch of another method = its operations / rate

Operations are those of `experiments.theory.costs.operations` for ResNet50 at 224², batch 256: forward, backward,
direction on every step, building and inverting once in 𝒯 = 500 steps. The paper names no GPU, and neither does this.
"""

from collections.abc import Callable
from dataclasses import dataclass

from experiments.estimate.stand_ins.made_up_images import IMAGES
from experiments.theory.costs.model_shapes import paper_layers
from experiments.theory.costs.operations import (
    Cost,
    LayerShape,
    kfac_cost,
    model_operations,
    ngplus_cost,
    released_cost,
)

TASK, INTERVAL = "resnet50-imagenet", 500
SGD_EPOCH_S = 517.0
# method -> its cost a layer, and the paper's seconds an epoch (Table 1)
METHODS: dict[str, tuple[Callable[[LayerShape, int], Cost], float]] = {
    "NG+ as built here": (ngplus_cost, 600.0),
    "NG+ as released": (released_cost, 600.0),
    "K-FAC": (kfac_cost, 686.0),
}


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One method's epoch on the paper's machine.

    Attributes:
        method: its name.
        predicted_s: by operations alone.
        paper_s: in Table 1.
    """

    method: str
    predicted_s: float
    paper_s: float


def rate() -> float:
    """Operations a second that SGD's epoch shows.

    Returns:
        FLOP/s.
    """
    return _epoch_operations(None) / SGD_EPOCH_S


def epochs() -> list[Epoch]:
    """Every method's predicted epoch compared with the paper's.

    Returns:
        One a method of `METHODS`.
    """
    achieved = rate()
    return [
        Epoch(method=name, predicted_s=_epoch_operations(cost) / achieved, paper_s=paper_s)
        for name, (cost, paper_s) in METHODS.items()
    ]


def _epoch_operations(cost: Callable[[LayerShape, int], Cost] | None) -> float:
    layers, batch = paper_layers("resnet50")
    step: float = model_operations(layers, batch)
    for own in [] if cost is None else [cost(layer, batch) for layer in layers]:
        step += own.apply + (own.build + own.invert) / INTERVAL
    return IMAGES / batch * step
