"""Recurrent layers step by step: the same function as torch's fused calls, in products that can be recorded.

A fused call of `nn.LSTM` takes its weights flat and tells nothing of what happens between. On curvature steps each of
its layers and directions runs here as one product with W_ih over all times and one product with W_hh a time, which are
read as any other's. The results are those of the fused call but for rounding; dropout between layers is sampled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x Wᵀ + b, as `F.linear`."""

State = tuple[Tensor, ...]
"""h, or h and c, (B, H) each."""

Step = Callable[[Tensor, Tensor, State], State]
"""Takes what W_ih and W_hh make of input and h to the next state, but for a projection of h."""


def _step_lstm(inside: Tensor, recurrent: Tensor, state: State) -> State:
    """C ← σ(f) c + σ(i) tanh(g), h ← σ(o) tanh(c)."""
    i, f, g, o = (inside + recurrent).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _step_gru(inside: Tensor, recurrent: Tensor, state: State) -> State:
    """H ← (1 − z) n + z h with n = tanh(n_x + r n_h); r and z are of sums, n_h has the reset gate r before it."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = inside.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + z * (state[0] - n),)


def _step_tanh(inside: Tensor, recurrent: Tensor, state: State) -> State:
    return ((inside + recurrent).tanh(),)


def _step_relu(inside: Tensor, recurrent: Tensor, state: State) -> State:
    return ((inside + recurrent).relu(),)


@dataclass(frozen=True, eq=False)
class Direction:
    """The weights of one layer and direction.

    Attributes:
        input: W_ih.
        recurrent: W_hh.
        input_bias: b_ih, or None.
        recurrent_bias: b_hh, or None.
        projection: W_hr of an LSTM that projects h, or None.
    """

    input: Tensor
    recurrent: Tensor
    input_bias: Tensor | None = None
    recurrent_bias: Tensor | None = None
    projection: Tensor | None = None

    def move(self, step: Step, linear: Linear, inside: Tensor, state: State) -> State:
        """The state after a time, whose input has become ``inside`` by W_ih."""
        h, *others = step(inside, linear(state[0], self.recurrent, self.recurrent_bias), state)
        return h if self.projection is None else linear(h, self.projection, None), *others


@dataclass(frozen=True, eq=False)
class RecurrentCall:
    """A fused call of a recurrent layer or cell.

    Attributes:
        step: of its kind.
        inputs: (T, B, I).
        state: h, or h and c, (layers · directions, B, H) each.
        directions: the weights, layer by layer, forward before backward.
        counts: (T, B), which samples have an input at which time; None for all.
        bidirectional: whether there are two directions a layer.
        dropout: share of a layer's outputs that the next one does not get; 0 in evaluation.
        dimensions: of the input that the module takes, with a batch.
        finish: takes the outputs (T, B, H · directions) and the last states to what the call returns.
    """

    step: Step
    inputs: Tensor
    state: State
    directions: Sequence[Direction]
    finish: Callable[[Tensor, State], Any]
    counts: Tensor | None = None
    bidirectional: bool = False
    dropout: float = 0.0
    dimensions: int = 3

    @property
    def batch(self) -> int:
        """B."""
        return self.inputs.shape[1]

    def run(self, linear: Linear) -> Any:
        """What the call returns.

        Args:
            linear: makes the products.

        Returns:
            Of the same form.
        """
        outputs, last = self.inputs, []
        ways = 2 if self.bidirectional else 1
        for number in range(0, len(self.directions), ways):
            if number and self.dropout:
                outputs = F.dropout(outputs, self.dropout)
            runs = [self._run_direction(linear, outputs, number + way, backward=way == 1) for way in range(ways)]
            outputs = torch.cat([each for each, _ in runs], dim=-1)
            last += [state for _, state in runs]
        return self.finish(outputs, tuple(torch.stack(each) for each in zip(*last, strict=True)))

    def _run_direction(self, linear: Linear, inputs: Tensor, number: int, *, backward: bool) -> tuple[Tensor, State]:
        """The outputs of one direction (T, B, H), and its last state."""
        weights, state = self.directions[number], tuple(each[number] for each in self.state)
        inside = linear(inputs, weights.input, weights.input_bias).unbind(0)
        outputs: list[Tensor] = []
        times = range(len(inside))
        for time in reversed(times) if backward else times:
            moved = weights.move(self.step, linear, inside[time], state)
            if self.counts is not None:
                counted = self.counts[time].unsqueeze(1)
                moved = tuple(torch.where(counted, new, old) for new, old in zip(moved, state, strict=True))
            state = moved
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backward else outputs), state


def _parse_layers(step: Step, *args: Any) -> RecurrentCall:
    """Parse a call on (T, B, I) or (B, T, I), or on a packed sequence."""
    if isinstance(args[1], Tensor) and not isinstance(args[2], list):
        return _parse_packed(step, *args)
    inputs, hx, flat, has_biases, _, dropout, training, bidirectional, batch_first = args
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)

    def finish(outputs: Tensor, last: State) -> Any:
        return (outputs.transpose(0, 1) if batch_first else outputs, *last)

    return RecurrentCall(
        step,
        inputs.transpose(0, 1) if batch_first else inputs,
        state,
        _split_weights(flat, has_biases, step is _step_lstm and state[0].shape[2] != state[1].shape[2]),
        finish,
        bidirectional=bidirectional,
        dropout=dropout if training else 0.0,
    )


def _parse_packed(
    step: Step,
    data: Tensor,
    batch_sizes: Tensor,
    hx: Any,
    flat: Sequence[Tensor],
    has_biases: bool,
    _: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> RecurrentCall:
    """Parse a call on a packed sequence: its rows time by time, those of fewer and fewer samples."""
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    batch = state[0].shape[1]
    place = torch.arange(batch)
    counts = (place < batch_sizes.unsqueeze(1)).to(data.device)
    starts = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1)
    rows = (starts + torch.minimum(place, batch_sizes.unsqueeze(1) - 1)).to(data.device)
    return RecurrentCall(
        step,
        data[rows],
        state,
        _split_weights(flat, has_biases, step is _step_lstm and state[0].shape[2] != state[1].shape[2]),
        lambda outputs, last: (outputs[counts], *last),
        counts=counts,
        bidirectional=bidirectional,
        dropout=dropout if training else 0.0,
    )


def _split_weights(flat: Sequence[Tensor], has_biases: bool, projects: bool) -> list[Direction]:
    """The weights of each layer and direction: W_ih, W_hh, then b_ih, b_hh, then W_hr, those that there are."""
    size = 2 + 2 * has_biases + projects
    directions = []
    for start in range(0, len(flat), size):
        input, recurrent, *others = flat[start : start + size]
        input_bias, recurrent_bias = others[:2] if has_biases else (None, None)
        directions.append(Direction(input, recurrent, input_bias, recurrent_bias, others[-1] if projects else None))
    return directions


def _parse_cell(
    step: Step,
    input: Tensor,
    hx: Any,
    input_weight: Tensor,
    recurrent_weight: Tensor,
    input_bias: Tensor | None = None,
    recurrent_bias: Tensor | None = None,
) -> RecurrentCall:
    """Parse a call on one time, (B, I)."""

    def finish(_: Tensor, last: State) -> Any:
        h, *others = (each[0] for each in last)
        return (h, *others) if others else h

    state = tuple(each.unsqueeze(0) for each in ((hx,) if isinstance(hx, Tensor) else hx))
    weights = Direction(input_weight, recurrent_weight, input_bias, recurrent_bias)
    return RecurrentCall(step, input.unsqueeze(0), state, [weights], finish, dimensions=2)


def _parser(parse: Callable[..., RecurrentCall], step: Step) -> Callable[..., RecurrentCall]:
    return lambda *args: parse(step, *args)


RECURRENT_CALLS: Mapping[Any, Callable[..., RecurrentCall]] = {
    torch.lstm: _parser(_parse_layers, _step_lstm),
    torch.gru: _parser(_parse_layers, _step_gru),
    torch.rnn_tanh: _parser(_parse_layers, _step_tanh),
    torch.rnn_relu: _parser(_parse_layers, _step_relu),
    torch.lstm_cell: _parser(_parse_cell, _step_lstm),
    torch.gru_cell: _parser(_parse_cell, _step_gru),
    torch.rnn_tanh_cell: _parser(_parse_cell, _step_tanh),
    torch.rnn_relu_cell: _parser(_parse_cell, _step_relu),
}
"""How the arguments of each fused call are parsed."""

__all__ = ["RECURRENT_CALLS", "RecurrentCall"]
