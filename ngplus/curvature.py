"""From a curvature step's sums to preconditioners: scale, average over processes and time, invert."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ngplus import batching, direction, distributed, gfim, preconditioner
from ngplus.batching import Batch, Member, Series
from ngplus.capture import Sampling, Statistic
from ngplus.factors import statistics_dtype
from ngplus.gfim import Shape
from ngplus.inverse import Request, invert
from ngplus.layers import Layer, as_matrix, sparse_in_rows
from ngplus.nonfinite import Watch
from ngplus.options import Options
from ngplus.preconditioner import DenseInverse, Entries, Preconditioner
from ngplus.touched import TouchedRows

LOW_RANK_BELOW = 1 / 2
"""Rank/p up to which applying (14), 4prq operations, is no dearer than applying the p×p inverse, 2p²q."""


@dataclass(eq=False)
class LayerState:
    """What NG+ keeps of one layer.

    Attributes:
        shape: of the layer's matrix.
        preconditioner: (λI + L)⁻¹.
        average: L̄ of (11), kept only with ``ema > 0``.
        damping: λ that was added, which is more than the group's where a matrix would not factorise.
        updates: curvature steps so far.
    """

    shape: Shape
    preconditioner: Preconditioner
    average: list[Tensor] | None = None
    damping: float = 0.0
    updates: int = 0

    def __repr__(self) -> str:
        side = "λI + L" if self.shape.side == "left" else "λI + R"
        kind = type(self.preconditioner).__name__
        size = f"{self.shape.groups}×" if self.shape.groups > 1 else ""
        return (
            f"LayerState(matrix {size}{self.shape.rows}×{self.shape.columns}, {kind} of {side}, "
            f"damping {self.damping:.4g}, {self.updates} updates, {self.numel():,} numbers kept)"
        )

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [*self.preconditioner.tensors().values(), *(self.average or [])]

    def numel(self) -> int:
        """Numbers kept."""
        return sum(tensor.numel() for tensor in self.tensors())

    def share(self) -> float | None:
        """How much the curvature takes of the gradient where it takes most: s/(λ + s), s the largest eigenvalue of L.

        Near 0 the direction is G/λ, and NG+ is its base with another learning rate. Near 1 the damping does not count
        in that direction. Waits for the device, and takes as long as an inverse does.

        Returns:
            A number in [0, 1); None where it is not known: for a sketch, and for other methods' curvature.
        """
        return preconditioner.largest_share(self.preconditioner, self.damping)

    def fits(self, layer: Layer) -> bool:
        """Whether this is of the layer's matrix as it is now: its bias may have been frozen, freed or added since."""
        return layer.shape(self.shape.block_size) == self.shape

    def entries(self) -> Entries:
        """What is saved: tensors and numbers by name."""
        averages = self.average or []
        return {
            "matrix": _pack_shape(self.shape),
            "updates": self.updates,
            "damping": self.damping,
            "averaged": int(bool(averages)),
            **{f"average{i}": stack for i, stack in enumerate(averages)},
            **self.preconditioner.entries(),
        }

    @classmethod
    def from_entries(cls, layer: Layer, entries: Mapping[str, Any]) -> LayerState:
        """What `entries` gave, on the device of the layer's weight.

        Raises:
            KeyError: an entry is missing.
            ValueError: the layer's matrix has another shape.
        """
        shape = _check_shape(layer, *entries["matrix"].tolist())
        made = cls._from_entries(entries, shape, entries["damping"])
        average = _collect_averages(entries) if entries["averaged"] else None
        return cls._move_to_weight(layer, cls(shape, made, average, entries["damping"], entries["updates"]))

    @classmethod
    def from_first_layout(cls, layer: Layer, packed: Mapping[str, Any]) -> LayerState:
        """The same from a file of the first layout, which had a nested dictionary for each layer.

        Raises:
            ValueError: the layer's matrix has another shape.
        """
        groups, rows, columns = packed["matrix"]
        shape = _check_shape(layer, groups, rows, columns, packed["block_size"] or 0)
        made = cls._preconditioner(packed["preconditioner"], shape)
        return cls._move_to_weight(layer, cls(shape, made, packed["average"], packed["damping"], packed["updates"]))

    @staticmethod
    def _move_to_weight(layer: Layer, state: LayerState) -> LayerState:
        state.to(layer.weight.device)
        return state

    @staticmethod
    def _from_entries(entries: Mapping[str, Any], shape: Shape, damping: float) -> Preconditioner:
        return preconditioner.from_entries(entries, shape, damping)

    @staticmethod
    def _preconditioner(tensors: dict[str, Tensor], shape: Shape) -> Preconditioner:
        return preconditioner.from_tensors(tensors, shape)

    def to(self, device: torch.device) -> None:
        """Follow a model that was moved."""
        moved = {name: tensor.to(device) for name, tensor in self.preconditioner.tensors().items()}
        self.preconditioner = self._preconditioner(moved, self.shape)
        self.average = None if self.average is None else [stack.to(device) for stack in self.average]


def _pack_shape(shape: Shape) -> Tensor:
    """Groups, rows, columns and block size (0 for whole matrices) of a matrix."""
    return torch.tensor([shape.groups, shape.rows, shape.columns, shape.block_size or 0])


def _check_shape(layer: Layer, groups: int, rows: int, columns: int, block_size: int) -> Shape:
    """The shape of a saved matrix, which is to be the layer's."""
    shape = Shape(groups=groups, rows=rows, columns=columns, block_size=block_size or None)
    ours = layer.shape(shape.block_size)
    if ours != shape:
        raise ValueError(
            f"the state of {layer.name} is for a matrix {groups}×{rows}×{columns} (groups × rows × columns), "
            f"but the model's is {ours.groups}×{ours.rows}×{ours.columns}"
        )
    return shape


def _collect_averages(entries: Mapping[str, Any]) -> list[Tensor]:
    """The stacks ``average0``, ``average1`` and so on, as many as there are."""
    names = itertools.takewhile(entries.__contains__, (f"average{i}" for i in itertools.count()))
    return [entries[name] for name in names]


def sampling(options: Options) -> Sampling:
    """How a curvature step is sampled under these options."""
    exact_rank = options.ema == 0 and options.block_size is None and distributed.world_size() == 1
    ranks = {"auto": LOW_RANK_BELOW, "dense": 0.0, "low_rank": 1.0, "sketched": 1.0}
    return Sampling(
        samples=options.samples,
        model_calls=options.model_calls,
        partial_capture=options.partial_capture,
        max_samples=options.max_samples,
        block_size=options.block_size,
        max_rank=ranks[options.solver] if exact_rank else 0.0,
        sketch_size=options.sketch_size,
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which layers' gradients are turned together.

    Attributes:
        forms: what each layer's gradient and preconditioner were like, of which the rest follows.
        together: small ones, several at a time.
        alone: the others that have a gradient and a preconditioner.
    """

    forms: list[Hashable]
    together: list[Batch | Series]
    alone: list[Member]


class Curvature:
    """The curvature of all layers.

    Args:
        options: of the optimizer.
        generator: draws the rows of (16).

    Attributes:
        states: what is kept of each layer.
        replanned: whether layers have gained or lost a gradient or a curvature since somebody set it to False.
    """

    state: ClassVar[type[LayerState]] = LayerState

    def __init__(self, options: Options, generator: torch.Generator) -> None:
        self._options = options
        self._generator = generator
        self.states: dict[Layer, LayerState] = {}
        self._plan: _Plan | None = None
        self.replanned = True

    def update(
        self,
        layers: Sequence[Layer],
        statistics: Mapping[Layer, Statistic],
        damping: Mapping[Layer, float],
        loss_scale: float,
        unsupported: Collection[Layer] = (),
    ) -> tuple[list[Layer], list[Layer]]:
        """Take the sums of a curvature step into the preconditioners.

        Args:
            layers: for which this is a curvature step, the same on every process.
            statistics: what was summed; a layer without samples may be missing.
            damping: λ of each layer.
            loss_scale: factor by which all gradients were larger than the loss's.
            unsupported: layers that this process has no statistic of, so that no process may have one.

        Returns:
            Layers whose sums were not finite, which keep what they had; and those that another process does not
            support.
        """
        self._plan = None  # which would hold what is replaced now
        sums = {layer: self._scaled(layer, statistics[layer], loss_scale) for layer in layers if layer in statistics}
        elsewhere: list[Layer] = []
        if distributed.world_size() > 1:
            elsewhere = self._average_over_processes(layers, sums, unsupported)
        finite, rejected = _finite(sums)
        requests = {layer: self._prepare(layer, sums[layer], damping[layer]) for layer in finite}
        self._invert([request for stacks in requests.values() for request in stacks])
        for layer, stacks in requests.items():
            self._finish(layer, sums[layer], stacks, damping[layer])
        return rejected, elsewhere

    def _scaled(self, layer: Layer, statistic: Statistic, loss_scale: float) -> Statistic:
        scale = statistic.scale() / loss_scale**2
        statistic.moments = [stack * scale for stack in statistic.moments]
        statistic.columns = [columns * scale**0.5 for columns in statistic.columns]
        return statistic

    def _average_over_processes(
        self, layers: Sequence[Layer], sums: dict[Layer, Statistic], unsupported: Collection[Layer]
    ) -> list[Layer]:
        """Average over processes; afterwards ``sums`` has the same layers on all of them.

        Returns:
            Layers that another process does not support.
        """
        weights = [sums[layer].weight if layer in sums else 0.0 for layer in layers]
        device = layers[0].weight.device
        totals, flags = distributed.totals([weights, [float(layer in unsupported) for layer in layers]], device)
        used = [layer for layer, total, flag in zip(layers, totals, flags, strict=True) if total and not flag]
        ours = [sums.get(layer) or self._empty(layer) for layer in used]
        for statistic in ours:
            statistic.densify()
        weight, total = (dict(zip(layers, each, strict=True)) for each in (weights, totals))
        distributed.average(
            [statistic.moments for statistic in ours],
            [weight[layer] for layer in used],
            [total[layer] for layer in used],
        )
        sums.clear()
        for layer, statistic in zip(used, ours, strict=True):
            statistic.used = int(total[layer])
            sums[layer] = statistic
        return [layer for layer, flag in zip(layers, flags, strict=True) if flag and layer not in unsupported]

    def _empty(self, layer: Layer) -> Statistic:
        """What a process without samples brings to the average."""
        shape = layer.shape(self._options.block_size)
        dtype = statistics_dtype(layer.weight.dtype)
        zeros = [torch.zeros(size, dtype=dtype, device=layer.weight.device) for size in shape.stack_shapes]
        return Statistic(shape, moments=zeros)

    def _prepare(self, layer: Layer, statistic: Statistic, damping: float) -> list[Request]:
        """The matrices to invert for a layer; none where it is kept as columns."""
        if statistic.columns:
            return []
        average = self._moving_average(layer, statistic)
        return [Request(stack, self._shift(damping)) for stack in average]

    def _shift(self, damping: float) -> float:
        return damping**0.5 if self._options.damping_rule == "released" else damping

    def _moving_average(self, layer: Layer, statistic: Statistic) -> list[Tensor]:
        """L̄ₖ = β L̄ₖ₋₁ + (1 − β) Lₖ, which starts from L₀, equation (11), and anew where its form has changed."""
        before, moments, beta = self.states.get(layer), statistic.moments, self._options.ema
        if not beta or before is None or before.average is None or before.shape != statistic.shape:
            return moments
        if [old.shape for old in before.average] != [new.shape for new in moments]:  # a loaded K-FAC's other max_side
            return moments
        pairs = zip(before.average, moments, strict=True)
        return [old.to(new).mul(beta).add_(new, alpha=1 - beta) for old, new in pairs]

    def _invert(self, requests: Sequence[Request]) -> None:
        if distributed.world_size() > 1 and requests:
            distributed.invert_shared(requests)
        else:
            invert(requests)

    def _finish(self, layer: Layer, statistic: Statistic, requests: Sequence[Request], damping: float) -> None:
        made = self._made(statistic, requests, damping)
        if made is None:
            warnings.warn(
                f"the curvature matrix of {layer.name} would not factorise, even with its damping raised from "
                f"{damping:g} tenfold several times; what it had before is kept",
                stacklevel=5,
            )
            return
        for request in requests:
            if request.used_damping > request.damping:
                warnings.warn(
                    f"the damping of {layer.name} was raised from {request.damping:g} to {request.used_damping:g} for "
                    "this curvature step: the matrix would not factorise with less",
                    stacklevel=5,
                )
        used = max((request.used_damping for request in requests), default=self._shift(damping))
        before = self.states.get(layer)
        average = [request.matrices for request in requests] if self._options.ema else None
        updates = 1 + (before.updates if before else 0)
        self.states[layer] = self.state(statistic.shape, made, average, used, updates)

    def _made(self, statistic: Statistic, requests: Sequence[Request], damping: float) -> Preconditioner | None:
        if statistic.columns:
            return self._from_columns(torch.cat(statistic.columns, dim=1), self._shift(damping))
        inverses = [request.inverse for request in requests if request.inverse is not None]
        return DenseInverse(inverses, statistic.shape) if len(inverses) == len(requests) else None

    def _from_columns(self, columns: Tensor, damping: float) -> Preconditioner | None:
        size = self._options.sketch_size
        if self._options.solver == "sketched" and size is not None and size < columns.shape[0]:
            return preconditioner.sketched(columns, damping, gfim.drawn(columns.shape[0], size, self._generator))
        return preconditioner.low_rank(columns, damping)

    def precondition(self, layers: Sequence[Layer], watch: Watch) -> dict[nn.Parameter, TouchedRows]:
        """Replace the gradients of the layers that have a preconditioner by their directions (6).

        Args:
            layers: of the optimizer.
            watch: is shown the directions.

        Returns:
            The rows that are not zeros, of weights where they are known.
        """
        plan = self._planned(layers)
        touched: dict[nn.Parameter, TouchedRows] = {}
        # Those of small layers last, since the calls for them take longer than what they do: large gradients, which
        # the backward pass has just written, do not leave the cache meanwhile.
        for member in plan.alone:
            weight = member.layer.weight
            rows = self._replace(member)
            if rows is not None:
                touched[weight] = rows
            watch.look(weight.grad if rows is None else rows.values)  # type: ignore[arg-type]
            watch.seen.add(id(weight))
        for batch in plan.together:
            batch.precondition(watch)
        return touched

    def _planned(self, layers: Sequence[Layer]) -> _Plan:
        """The plan of the step before, where nothing that decides it has changed."""
        if self._plan is None or self._plan.forms != self._forms(layers):
            ready = [(layer, state) for layer in layers if (state := self._ready(layer)) is not None]
            members = [Member(layer, state.preconditioner, state.shape) for layer, state in ready]
            together, alone = batching.batches(members)
            self._plan = _Plan(self._forms(layers), together, alone)
            self.replanned = True
        return self._plan

    def _forms(self, layers: Iterable[Layer]) -> list[Hashable]:
        states = self.states
        return [
            (state.preconditioner, batching.form(layer)) if (state := states.get(layer)) is not None else None
            for layer in layers
        ]

    def _ready(self, layer: Layer) -> LayerState | None:
        """What is kept of a layer that has a gradient, where it fits the layer and is on the gradient's device."""
        state, gradient = self.states.get(layer), layer.weight.grad
        if state is None or gradient is None:
            return None
        if not state.fits(layer):  # its bias was frozen or freed meanwhile, or its table has grown
            del self.states[layer]
            return None
        if state.preconditioner.main.device != gradient.device:
            state.to(gradient.device)
        return state

    def pack(self, layer: Layer) -> Entries:
        """What is saved of a layer, with or without curvature, by names and in sizes that follow from the options.

        `torch.distributed.checkpoint` fills tensors that it is given, and knows no others: an optimizer that has no
        curvature yet has to offer tensors of the right sizes. A rank depends on the batch; its columns are filled up
        with zeros to p×p, which is no more than the weight.
        """
        state, device = self.states.get(layer), layer.weight.device
        if state is None or not state.fits(layer):
            entries = _make_empty(layer.shape(self._options.block_size))
        else:
            entries = state.entries()
        blank = self._blank(layer)
        filled = {name: _pad(entries.get(name), like, device) for name, like in blank.items()}
        others = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in entries.items()}
        return {**others, **filled}

    def unpack(self, layer: Layer, entries: Mapping[str, Any]) -> LayerState | None:
        """What `pack` gave; None where there was no curvature yet.

        Raises:
            ValueError: an entry is missing, or is of another matrix.
        """
        # torch's unflattening gives an empty dictionary for an entry that it does not find.
        there = {name: each for name, each in entries.items() if not isinstance(each, dict)}
        try:
            if not there["updates"]:
                return None
            state = self.state.from_entries(layer, there)
            if there["averaged"] and not state.average and self._keeps_average:
                raise KeyError("average0")
        except KeyError as error:
            raise ValueError(
                f"the state of {layer.name} has no {error.args[0]}: it was cut short, or saved with other options"
            ) from None
        return state

    @property
    def _keeps_average(self) -> bool:
        return self._options.ema > 0

    def _blank(self, layer: Layer) -> Entries:
        """Entries that every layer has, its tensors without memory."""
        shape, dtype = layer.shape(self._options.block_size), statistics_dtype(layer.weight.dtype)
        sketch_size = self._options.sketch_size if self._options.solver == "sketched" else None
        entries = preconditioner.make_blank(shape, sketch_size, dtype)
        if self._keeps_average:
            stacks = [torch.empty(size, dtype=dtype, device="meta") for size in shape.stack_shapes]
            entries |= {f"average{i}": stack for i, stack in enumerate(stacks)}
        return entries

    def _replace(self, member: Member) -> TouchedRows | None:
        """Put the direction in place of a layer's gradients; returns its rows that are not zeros, where it is known."""
        return direction.precondition(member)


def _make_empty(shape: Shape) -> Entries:
    """`LayerState.entries` where there is none."""
    return {"matrix": _pack_shape(shape), "updates": 0, "damping": 0.0, "averaged": 0}


def _pad(entry: Tensor | float | None, like: Tensor | float, device: torch.device) -> Tensor | float:
    """A tensor in the leading corner of zeros of the size and dtype of ``like``; as it is where it does not fit."""
    if not isinstance(like, Tensor):
        return like if entry is None else entry
    if not isinstance(entry, Tensor):
        return torch.zeros_like(like, device=device)
    entry = entry.to(device)
    if entry.dim() != like.dim() or any(ours > theirs for ours, theirs in zip(entry.shape, like.shape, strict=True)):
        return entry  # kept from a state that was saved with other options
    if entry.shape == like.shape:
        return entry
    whole = torch.zeros_like(like, device=device)
    whole[tuple(slice(size) for size in entry.shape)] = entry
    return whole


def _finite(sums: Mapping[Layer, Statistic]) -> tuple[list[Layer], list[Layer]]:
    """Layers whose sums are finite, and the others. Waits for the device once: NaN must not be factorised."""
    if not sums:
        return [], []
    flags = [
        torch.stack([stack.isfinite().all() for stack in statistic.tensors()]).all().cpu()
        for statistic in sums.values()
    ]
    good = torch.stack(flags).tolist()
    finite = [layer for layer, fine in zip(sums, good, strict=True) if fine]
    return finite, [layer for layer, fine in zip(sums, good, strict=True) if not fine]


def layer_statistic(layer: Layer, options: Options, generator: torch.Generator) -> Statistic | None:
    """The mini-batch form (12): G Gᵀ (or GᵀG) of the gradient that is there, as a `Statistic` of one sample."""
    if layer.weight.grad is None:
        return None
    gradient = sparse_in_rows(layer.weight.grad)
    shape = layer.shape(options.block_size)
    dtype = statistics_dtype(gradient.dtype)
    if gradient.is_sparse and shape.side == "right" and layer.trained_bias is None:
        G = gradient.coalesce()._values().to(dtype).unsqueeze(0)
    else:
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        G = as_matrix(layer, dense, dtype)
    bias = layer.trained_bias
    if bias is not None:
        column = torch.zeros_like(bias) if bias.grad is None else bias.grad
        G = torch.cat([G, column[layer.bias_slice].reshape(*G.shape[:2], 1).to(dtype)], dim=2)
    short_first = G if shape.side == "left" else G.mT
    if options.sketch_size is not None and options.sketch_size < short_first.shape[2]:
        drawn = gfim.drawn(short_first.shape[2], options.sketch_size, generator)
        scale = (short_first.shape[2] / options.sketch_size) ** 0.5
        short_first = short_first.index_select(2, drawn.to(G.device)) * scale
    return Statistic(shape, moments=gfim.product_of_columns(shape, short_first), seen=1, used=1)


__all__ = ["Curvature", "LayerState", "layer_statistic", "sampling"]
