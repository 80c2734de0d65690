"""`suggest`: settings of `NGPlus` to start with, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ngplus.config import check_count, check_positive, check_ready
from ngplus.dtensors import is_sharded
from ngplus.layerwise import LayerwiseOptimizer
from ngplus.starting.measurement import Loss, MeasuredLayer, Measurement
from ngplus.starting.rules import (
    Choice,
    choose_base,
    choose_damping,
    choose_lr,
    choose_reduction,
    choose_samples,
    choose_update_every,
    scale_lr,
)
from ngplus.starting.unchanged import unchanged


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Settings to start with: ``NGPlus(model, **suggestion.settings)``, and ``print(suggestion)`` for why.

    Attributes:
        settings: arguments of `NGPlus`.
        reasons: why, by argument.
        layers: those that will be preconditioned, in the order of the model.
        to_base: the names of all other parameters, which go to the base as they are, by the reason.
        notes: what could not be read off, and what to do then.
    """

    settings: dict[str, Any]
    reasons: dict[str, str]
    layers: tuple[MeasuredLayer, ...]
    to_base: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        damping, elements = self.settings["damping"], sum(layer.elements for layer in self.layers)
        lines = [
            f"{len(self.layers)} layers with {elements:,} parameters are preconditioned",
            "",
            *self._show_settings(),
        ]
        lines += ["", *_table(["layer", "matrix", "largest s", "share"], [_row(each, damping) for each in self.layers])]
        for reason, names in self.to_base.items():
            lines += ["", f"to the base as it is, since it {reason}:", f"  {_join(names)}"]
        lines += [line for note in self.notes for line in ("", f"note: {note}")]
        return "\n".join(lines)

    def _show_settings(self) -> list[str]:
        shown = {name: _show(value) for name, value in self.settings.items()}
        widths = max(map(len, shown)), max(map(len, shown.values()))
        return [
            f"{name:{widths[0]}}  {value:{widths[1]}}  {self.reasons[name]}".rstrip() for name, value in shown.items()
        ]


def suggest(
    model: nn.Module,
    loss: Loss,
    *,
    base: type[Optimizer] | None = None,
    lr: float | None = None,
    steps: int | None = None,
    sample_index: Tensor | Mapping[str, Tensor] | None = None,
) -> Suggestion:
    """Suggest settings of `NGPlus` for a model, from one batch of its training, with the reason of each.

    The model is run forward two or three times and backward once or twice, and is left exactly as it was: parameters,
    gradients, buffers, modes, hooks and random states. An optimizer of it that exists already sees the runs as the
    loop's own: call this before a step's forward pass, not between ``backward`` and ``step``.

    Where ``base`` scales entries by their second moments, its learning rate stays; for `torch.optim.SGD` it is
    multiplied by ‖G‖/‖D‖, so that a first step is as long as it was. λ is such that half of the weights are in layers
    whose `LayerState.share` is .75 or more; docs/five_minutes.md has the records that this comes from.

    Args:
        model: to be trained, with the weights that training starts from.
        loss: takes nothing, runs the model forward on a batch of the usual size, and returns the loss that
            ``backward`` is to be called on; where gradients are accumulated, that of a micro-batch, not divided by
            their number.
        base: the optimizer class that the model is trained with now; default: `torch.optim.SGD` with momentum .9 where
            most weights are convolutions, else `torch.optim.AdamW`.
        lr: the learning rate that ``base`` is used with now; default: a guess.
        steps: length of the training in steps; default: not known.
        sample_index: of the batch, see `NGPlus.sample_index`.

    Returns:
        The settings, and a report that can be printed.

    Raises:
        TypeError: an argument of the wrong type; a loss that is no tensor; weights that are sharded.
        ValueError: a number out of range; a learning rate without its base; a base whose learning rate cannot be
            guessed; a loss that is not finite, has no graph or does not depend on the model; a model without a
            supported layer, or whose gradients are all zero or cannot be captured.

    Example:
        >>> from ngplus import NGPlus, suggest
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> inputs, labels = torch.randn(256, 20), torch.randint(3, (256,))
        >>> suggestion = suggest(model, lambda: torch.nn.functional.cross_entropy(model(inputs), labels))
        >>> print(suggestion)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        2 layers with 1,539 parameters are preconditioned
        ...
        >>> optimizer = NGPlus(model, **suggestion.settings)
    """
    _check(model, loss, base, lr)
    lr = None if lr is None else check_positive("lr", lr)
    chosen = _Chosen([choose_base(model, base), choose_update_every(check_count("steps", steps))])
    with unchanged(model), closing(Measurement(model, loss)) as measurement:
        shapes, graph = measurement.read_inputs()
        chosen.add(choose_samples(shapes, sample_index is not None))
        chosen.add(choose_reduction(graph))
        options = {name: chosen.settings[name] for name in ("samples", "batch_dim") if name in chosen.settings}
        layers, to_base = measurement.measure(
            **options, loss_reduction=chosen.settings["loss_reduction"], sample_index=sample_index
        )
        chosen.add(choose_damping(layers, is_regression=graph.is_regression))
        chosen.add(choose_lr(chosen.settings["base"], lr, layers, shapes))
        if issubclass(chosen.settings["base"], torch.optim.SGD):
            chosen.add(scale_lr(chosen.settings["lr"], *measurement.lengths(chosen.settings["damping"])))
    notes = [] if model.training else ["the model is in eval mode: call model.train() first if it is trained in it"]
    order = [name for name in _ORDER if name in chosen.settings]
    return Suggestion(
        settings={name: chosen.settings[name] for name in order},
        reasons={name: chosen.reasons[name] for name in order},
        layers=tuple(layers),
        to_base={reason: tuple(names) for reason, names in to_base.items()},
        notes=(*chosen.notes, *notes),
    )


_ORDER = ("base", "momentum", "lr", "damping", "update_every", "samples", "batch_dim", "loss_reduction")


@dataclass
class _Chosen:
    """What is chosen so far; a later choice of a setting replaces an earlier one."""

    choices: list[Choice] = field(default_factory=list)

    def add(self, choice: Choice) -> None:
        self.choices.append(choice)

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for choice in self.choices for name, value in choice.settings.items()}

    @property
    def reasons(self) -> dict[str, str]:
        """The choice's reason for its first setting."""
        return {
            name: choice.reason if number == 0 else ""
            for choice in self.choices
            for number, name in enumerate(choice.settings)
        }

    @property
    def notes(self) -> list[str]:
        return [note for choice in self.choices for note in choice.notes]


def _check(model: Any, loss: Any, base: Any, lr: Any) -> None:
    """Refuse arguments of the wrong type, sharded weights, and a learning rate of an unnamed base."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(loss) or isinstance(loss, nn.Module):
        raise TypeError(
            "loss must be a function without arguments that runs the model and returns the loss, such as "
            f"lambda: criterion(model(inputs), targets), got {type(loss).__name__}"
        )
    if base is not None and not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base must be a torch.optim.Optimizer class, such as torch.optim.AdamW, got {base!r}")
    if base is not None and issubclass(base, LayerwiseOptimizer):
        raise TypeError(f"base must be what {base.__name__} is made around, such as torch.optim.AdamW, got {base!r}")
    check_ready(model)
    if lr is not None and base is None:
        raise ValueError(f"lr={lr!r} is of an optimizer: give its class as base too, such as torch.optim.AdamW")
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise TypeError(f"{sharded[0]} is a DTensor: call suggest before the model is sharded")


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else getattr(value, "__name__", repr(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in (header, *rows))
    ]


def _row(layer: MeasuredLayer, damping: float) -> list[str]:
    return [layer.name, layer.matrix, f"{layer.largest:.2g}", f"{layer.share(damping):.2f}"]


def _join(names: Sequence[str], most: int = 6) -> str:
    """Names with commas; the first ones where they are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["Suggestion", "suggest"]
