"""Each sample's gradient of a weight that goes into any function: `torch.func.vmap` of its vector-Jacobian product.

A call y = f(x₁, …, W) on a batch is called again on single elements of the batch, where nothing but f itself is known.
Which dimension holds the batch is told by trying: along it, one element of the inputs gives one element of the output.
That f treats elements alike is not proven here. Where it does not, as a batch norm, the gradients do not add up to the
weight's, and the comparison with it finds that (`ngplus.capture.completeness`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus._torch_internals import quiet_vmap
from ngplus.capture.contractions import UnsupportedCall
from ngplus.capture.expressions import Expressions, Program, Source
from ngplus.capture.function_mode import FunctionCall
from ngplus.capture.op_handlers import OpCall
from ngplus.factors.dense import Dense
from ngplus.factors.factor import statistics_dtype
from ngplus.factors.formed import Formed, pair_formed
from ngplus.factors.pair import FactorPair
from ngplus.layers import Layer

_FAILURES = (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError, AttributeError)
"""What a function may raise of inputs of another size."""


@dataclass(frozen=True)
class Batch:
    """Where the elements of the batch are.

    Attributes:
        dim: of the output, and of the inputs that have them.
        size: b.
        inputs: which of the inputs have them.
        shared: which of the tensors that are free of samples do.
    """

    dim: int
    size: int
    inputs: Sequence[bool]
    shared: Sequence[bool]


@dataclass(frozen=True, eq=False)
class DifferentiatedCall:
    """A call whose function is differentiated again.

    Attributes:
        op_call: the call, with its inputs as source.
        source: the first input that has the samples.
        dtype: the one with the fewest bits that it was computed in.
    """

    op_call: OpCall
    source: Tensor
    dtype: torch.dtype


def parse_function(call: FunctionCall, sources: Sequence[Source], expressions: Expressions) -> DifferentiatedCall:
    """Parse a call of a function that no handler reads.

    Args:
        call: the call.
        sources: the parameters of one layer, its weight, its bias or both, that it carries a gradient to.
        expressions: what its arguments are made of.

    Returns:
        The call, whose factors are made by differentiating it again.

    Raises:
        UnsupportedCall: where no dimension holds the samples.
    """
    layer = sources[0].layer
    if not isinstance(call.output, Tensor):
        raise UnsupportedCall(f"is used by {call.name}, which has no single output")
    program = Program(call, [source.parameter for source in sources], expressions)
    batch = find_batch(program, sources, call.output.shape, _first_tried(layer, call))
    if batch is None:
        raise UnsupportedCall(f"is used by {call.name}")

    def factors(inputs: list[Tensor], gradient: Tensor) -> FactorPair:
        return FunctionGradients(program, batch, sources, inputs, gradient).pair()

    source = next(each for each, it in zip(program.inputs, batch.inputs, strict=True) if it)
    op_call = OpCall(
        layer, program.inputs, factors, batch.size, leading=source.shape[:-1], is_read=False, dim=batch.dim
    )
    return DifferentiatedCall(op_call, source, program.dtype)


def _first_tried(layer: Layer, call: FunctionCall) -> int:
    """The dimension that is tried first: in attention linear functions get (T, B, E), and others (B · heads, …)."""
    if call.time_major is None:
        return layer.batch_dim
    return int(call.function is F.linear and call.output.dim() == 3)


def find_batch(program: Program, sources: Sequence[Source], output: torch.Size, first: int) -> Batch | None:
    """Find the dimension along which one element of the inputs gives one element of the output, on the meta device.

    Args:
        program: the call.
        sources: the parameters.
        output: shape of what it returned.
        first: the dimension that is tried first.

    Returns:
        The first that there is, or None.
    """

    def to_meta(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta")

    inputs = list(map(to_meta, program.inputs))
    with torch.no_grad():
        try:
            values = {id(source.parameter): to_meta(source.parameter) for source in sources}
            shared = program.evaluate_shared(values, to_meta)
        except _FAILURES:
            return None
        for dim, splits in _candidates(output, first, program):
            size = output[dim]
            has = [each.dim() > dim and each.shape[dim] == size for each in inputs]
            split = [
                it and each.dim() > dim and each.shape[dim] == size for each, it in zip(shared, splits, strict=True)
            ]
            if not any(has):
                continue
            one = [each.narrow(dim, 0, 1) if it else each for each, it in zip(inputs, has, strict=True)]
            parts = [each.narrow(dim, 0, 1) if it else each for each, it in zip(shared, split, strict=True)]
            try:
                found = program.run(one, parts, to_meta)
            except _FAILURES:
                continue
            if isinstance(found, Tensor) and found.shape == (*output[:dim], 1, *output[dim + 1 :]):
                folded = size == 1 and program.has_copies  # a copy for each sample, and all samples in one
                return None if folded else Batch(dim, size, has, split)
    return None


def _candidates(output: torch.Size, first: int, program: Program) -> Iterator[tuple[int, list[bool]]]:
    """The dimensions that may hold the samples, and which of ``shared`` have them too, in the order of trial.

    Weights that are repeated have one copy a sample. Others are the same for all samples as long as that may be: along
    the first dimension of several models' stacked weights the models are counted, and not the samples.
    """
    none, every = [False] * len(program.shared), [True] * len(program.shared)
    others = [dim for dim in range(len(output)) if dim != first]
    firsts = [first] if first < len(output) else []
    for dim in firsts:
        yield dim, none
        if any(copies := program.repeats(dim)):
            yield dim, copies
            yield dim, every
    long = [dim for dim in others if output[dim] > 1]
    yield from ((dim, none) for dim in long)
    yield from ((dim, every) for dim in (*firsts, *long))
    yield from ((dim, splits) for dim in others if output[dim] == 1 for splits in (none, every))


@dataclass(eq=False)
class FunctionGradients:
    """The gradients of single elements of a batch.

    Attributes:
        program: the call.
        batch: where the elements are.
        sources: the parameters of the layer that it carries a gradient to.
        inputs: of the call.
        gradient: of its output.
    """

    program: Program
    batch: Batch
    sources: Sequence[Source]
    inputs: Sequence[Tensor]
    gradient: Tensor

    def __post_init__(self) -> None:
        self._dtype = statistics_dtype(self.sources[0].layer.weight.dtype)
        self.gradient = self._convert(self.gradient)

    def _convert(self, tensor: Tensor) -> Tensor:
        """What the statistics are computed in; autocast and the model may have had fewer bits."""
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def pair(self) -> FactorPair:
        """The gradients as factors: 𝒢ᵢ · I, or of a bias alone its column."""
        layer = self.sources[0].layer
        elements = torch.arange(self.batch.size, device=self.gradient.device).unsqueeze(1)
        if any(source.parameter is layer.weight for source in self.sources):
            groups, m, n = layer.matrix
            n += layer.trained_bias is not None
            return pair_formed(Formed(self._form_matrices, elements, (groups, m, n), self._dtype))
        (columns,) = self._differentiate(elements)
        groups, m, n = layer.matrix
        rows = columns[:, layer.bias_slice].reshape(-1, groups, m, 1)
        zeros = rows.new_zeros(1, 1, 1, 1).expand(len(rows), groups, n, 1)
        return FactorPair(Dense(rows), Dense(zeros, appended=1.0))

    def _form_matrices(self, elements: Tensor) -> Tensor:
        """𝒢ᵢ for the samples of these elements (c, k), (c, groups, m, n)."""
        layer = self.sources[0].layer
        gradients = self._differentiate(elements)
        found = {id(source.parameter): each for source, each in zip(self.sources, gradients, strict=True)}
        matrices = found[id(layer.weight)].reshape(len(elements), *layer.matrix)
        if (bias := layer.trained_bias) is None:
            return matrices
        column = found.get(id(bias))
        shape = (*matrices.shape[:3], 1)
        values = matrices.new_zeros(shape) if column is None else column[:, layer.bias_slice].reshape(shape)
        return torch.cat([matrices, values], dim=3)

    def _differentiate(self, elements: Tensor) -> Sequence[Tensor]:
        """The gradients of the parameters, (c, *shape) each."""
        self.program.check_memory()
        batch, at = self.batch, elements.clamp_min(0)
        inputs = [self._convert(each.detach()) for each in self.inputs]
        mapped = [each.movedim(batch.dim, 0)[at] for each, it in zip(inputs, batch.inputs, strict=True) if it]
        gradient = self.gradient.movedim(batch.dim, 0)[at]
        kept = (elements >= 0).view(*elements.shape, *[1] * (gradient.dim() - 2))
        parameters = [self._convert(source.parameter.detach()) for source in self.sources]

        def pull_back(one: list[Tensor], at: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
            of_batch = iter(each.movedim(0, batch.dim) for each in one)
            every = [next(of_batch) if it else each for each, it in zip(inputs, batch.inputs, strict=True)]

            def run(*values: Tensor) -> Tensor:
                by_id = {id(source.parameter): each for source, each in zip(self.sources, values, strict=True)}
                made = self.program.evaluate_shared(by_id, self._convert)
                shared = [
                    self._convert(tensor.index_select(batch.dim, at) if split else tensor)
                    for tensor, split in zip(made, batch.shared, strict=True)
                ]
                output: Tensor = self._convert(self.program.run(every, shared, self._convert))
                return output

            pull: Any = torch.func.vjp(run, *parameters)[1]
            gradients: tuple[Tensor, ...] = pull(gradient.movedim(0, batch.dim))
            return gradients

        with quiet_vmap():
            gradients: tuple[Tensor, ...] = torch.func.vmap(pull_back)(mapped, at, gradient * kept)
        return gradients


__all__ = ["parse_function"]
