"""What a start is chosen by; docs/five_minutes.md has the records that the constants come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ngplus.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, find_layers
from ngplus.starting.loss_graph import LossGraph
from ngplus.starting.measurement import InputShapes, MeasuredLayer

SHARE = 0.75
"""s/(λ + s) of the layer that half of the weights are in or above."""

PAPER_DAMPING = 0.16
"""λ where no curvature can be measured yet."""

UPDATES = 20
"""Updates of the curvature over a training."""

INTERVALS = (10, 200)
"""The least and the largest 𝒯."""

USUAL_INTERVAL = 100
"""𝒯 where the length of the training is not known."""

MOST_DAMPING = 10.0
"""The largest λ: D is about G/λ, and next to a smaller one the decay and the ε of a base would grow too much."""

ADAM_LR, ADAM_LR_TIMES_WIDTH = 3e-3, 0.4
"""The guess for Adam and its kind: at most the one, and the other over the width."""

SGD_LR, SGD_BATCH = 0.1, 256
"""The guess for SGD: the one for so many samples, in proportion."""

ADAGRAD_LR = 0.015
"""The guess for AdaGrad."""

_ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)  # AdamW is an Adam


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Some settings, why, and what a user should know.

    Attributes:
        settings: by argument of `NGPlus`.
        reason: of the first of them; the others say nothing.
        notes: sentences.
    """

    settings: dict[str, Any]
    reason: str
    notes: list[str] = field(default_factory=list)


def choose_base(model: nn.Module, base: type[Optimizer] | None) -> Choice:
    """Choose the base: the one that is given, else by the kind of most weights.

    Args:
        model: the model.
        base: what it is trained with now, or None.

    Returns:
        ``base``, and the momentum that goes with a base that was not given.
    """
    if base is not None:
        return Choice(settings={"base": base}, reason="as given")
    modules = dict(model.named_modules())
    kernels = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
    layers = [(layer.weight.numel(), isinstance(modules[layer.module], kernels)) for layer in find_layers(model)]
    convolved = sum(size for size, is_kernel in layers if is_kernel)
    if 2 * convolved > sum(size for size, _ in layers):
        return Choice(settings={"base": torch.optim.SGD, "momentum": 0.9}, reason="most weights are convolutions")
    return Choice(settings={"base": torch.optim.AdamW}, reason="most weights are not convolutions")


def choose_samples(shapes: InputShapes, has_index: bool) -> Choice:
    """Choose what one sample is, from the shapes of the layers' inputs.

    Args:
        shapes: see `InputShapes`.
        has_index: whether the user says which rows belong to which sample.

    Returns:
        ``samples``, and ``batch_dim`` where it is not 0.
    """
    if has_index:
        return Choice(settings={"samples": "batch"}, reason="a sample is what sample_index says")
    leading = list(shapes.leading.values())
    if len(sizes := {shape[0] for shape in leading}) < 2:
        if not shapes.has_positions:
            return Choice(settings={"samples": "batch"}, reason='each row is a sample, so that "rows" is the same')
        size = f"{sizes.pop()} " if sizes else ""
        return Choice(settings={"samples": "batch"}, reason=f"the layers see {size}samples, along dimension 0")
    several = [shape for shape in leading if len(shape) > 1]
    if 2 * len(several) >= len(leading):  # others see some of the rows, or all as one list
        if len(sizes := {shape[0] for shape in several}) == 1:
            reason = f"most layers see {sizes.pop()} samples, along dimension 0"
            return Choice(settings={"samples": "batch"}, reason=reason)
        if len(sizes := {shape[1] for shape in several}) == 1:
            reason = f"most layers see {sizes.pop()} samples, along dimension 1"
            return Choice(settings={"samples": "batch", "batch_dim": 1}, reason=reason)
    note = (
        "the layers see different numbers of rows, so that it is not known which belong to one sample. If your batch "
        "knows, set optimizer.sample_index, give it as sample_index here too, and a sample is what it says, "
        "which trains as well or better"
    )
    return Choice(settings={"samples": "rows"}, reason="the layers see different numbers of rows", notes=[note])


def choose_reduction(graph: LossGraph) -> Choice:
    """Choose what the loss divides by.

    Args:
        graph: what its graph says.

    Returns:
        ``loss_reduction``.
    """
    ignored, targets = graph.ignored
    if graph.reduction == "mean" and ignored:
        note = (
            f"{ignored} of {targets} targets are ignored, so that the loss is a mean over fewer than the layers see: "
            "set optimizer.loss_reduction to their number before each step with optimizer.curvature_is_due"
        )
        return Choice(settings={"loss_reduction": "mean"}, reason="the loss ends in a mean", notes=[note])
    if graph.reduction is not None:
        return Choice(settings={"loss_reduction": graph.reduction}, reason=f"the loss ends in a {graph.reduction}")
    return Choice(
        settings={"loss_reduction": "mean"},
        reason="taken for one",
        notes=[
            "it cannot be read off the loss whether it is a mean over samples: where it is not, set loss_reduction, "
            "and λ with it"
        ],
    )


def choose_damping(layers: Sequence[MeasuredLayer], *, is_regression: bool) -> Choice:
    """Choose λ so that half of the weights are in layers with a share of `SHARE` or more, `MOST_DAMPING` at most.

    Args:
        layers: those that have a curvature.
        is_regression: whether the loss is a squared error.

    Returns:
        ``damping``.

    Raises:
        ValueError: no layer has a gradient that is not zero.
    """
    known = [(layer.largest, layer.elements) for layer in layers if layer.largest > 0]
    if not known:
        raise ValueError("the gradient of every layer is zero on this batch, so that no damping can be suggested")
    if 2 * sum(elements for _, elements in known) < sum(layer.elements for layer in layers):
        return Choice(
            settings={"damping": PAPER_DAMPING},
            reason="the paper's for images: it cannot be measured here",
            notes=[
                "more than half of the weights have a gradient of zero, as behind what is initialized with zeros: call "
                "suggest again after some steps to measure λ"
            ],
        )
    measured = find_weighted_median(known) * (1 - SHARE) / SHARE
    reason = f"half of the weights are in layers whose share s/(λ + s) is {SHARE:g} or more"
    if measured > MOST_DAMPING:
        reason = f"the most that is suggested; {reason} up to λ = {measured:.2g}"
    note = (
        "the curvature of a squared error falls with the error, so that shares do too: if training is slow towards its "
        "end, lower damping"
    )
    return Choice(
        settings={"damping": round_to_two(min(measured, MOST_DAMPING))},
        reason=reason,
        notes=[note] if is_regression else [],
    )


def choose_lr(base: type[Optimizer], lr: float | None, layers: Sequence[MeasuredLayer], shapes: InputShapes) -> Choice:
    """Choose the learning rate of the base itself.

    Args:
        base: its class.
        lr: what it is used with now, or None.
        layers: those that have a curvature.
        shapes: of their inputs.

    Returns:
        ``lr``.

    Raises:
        ValueError: where there is none, and none can be guessed.
    """
    name = base.__name__
    if lr is not None:
        return Choice(settings={"lr": lr}, reason=f"{name}'s, as given; try half as much again too")
    if issubclass(base, _ADAMS):
        width = find_weighted_median([(layer.short, layer.elements) for layer in layers])
        guess = min(ADAM_LR, ADAM_LR_TIMES_WIDTH / width)
        why = f"for {name} and layers about {width:g} wide"
    elif issubclass(base, torch.optim.SGD):
        sizes = {shape[0] for shape in shapes.leading.values()}
        batch = sizes.pop() if len(sizes) == 1 else SGD_BATCH
        guess, why = SGD_LR * batch / SGD_BATCH, f"for {name} and {batch} samples"
    elif issubclass(base, torch.optim.Adagrad):
        guess, why = ADAGRAD_LR, f"for {name}"
    else:
        raise ValueError(f"lr cannot be guessed for base={name}: give the one that it is used with")
    return Choice(settings={"lr": round_to_two(guess)}, reason=f"a guess {why}: better give lr, that of your training")


def scale_lr(lr: float, gradient: float, direction: float) -> Choice:
    """Scale the learning rate of a base that does not scale entries itself, so that a first step is as long as its own.

    Args:
        lr: of the base.
        gradient: ‖G‖.
        direction: ‖D‖.

    Returns:
        ``lr``.
    """
    factor = gradient / direction
    return Choice(settings={"lr": round_to_two(lr * factor)}, reason=f"{lr:.3g} times ‖G‖/‖D‖ = {factor:.3g}")


def choose_update_every(steps: int | None) -> Choice:
    """Choose 𝒯: about `UPDATES` updates over the training.

    Args:
        steps: its length, or None.

    Returns:
        ``update_every``.
    """
    if steps is None:
        return Choice(
            settings={"update_every": USUAL_INTERVAL}, reason="the length of the training, steps, is not given"
        )
    least, most = INTERVALS
    return Choice(
        settings={"update_every": min(most, max(least, steps // UPDATES))},
        reason=f"1/{UPDATES} of {steps:,} steps, from {least} to {most}",
    )


def find_weighted_median(pairs: Sequence[tuple[float, int]]) -> float:
    """Find the value at which half of the whole weight is reached, from below.

    Args:
        pairs: values, and the weight of each.

    Returns:
        One of the values.
    """
    ordered, reached = sorted(pairs), 0
    for value, weight in ordered:
        reached += weight
        if 2 * reached >= sum(weight for _, weight in ordered):
            return value
    raise ValueError("there are no values")


def round_to_two(value: float) -> float:
    """Round to two significant digits.

    Args:
        value: any number.

    Returns:
        It, rounded.
    """
    return float(f"{value:.2g}")


__all__ = [
    "Choice",
    "choose_base",
    "choose_damping",
    "choose_lr",
    "choose_reduction",
    "choose_samples",
    "choose_update_every",
    "scale_lr",
]
