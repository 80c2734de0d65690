"""Products whose backward pass takes the weight's gradient from the samples' gradients, where those are formed.

To form 𝒢ᵢ for every sample takes as many operations as the weight's gradient, which is their sum: on a curvature step
the backward pass would do the same work twice. So convolutions and linear layers of many positions a sample are called
as functions whose backward pass is torch's own, but for that gradient where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplus._torch_internals import backward_pass_number
from ngplus.curvature.gradient_sum import GradientSum
from ngplus.factors.im2col import per_direction

_CONVOLUTIONS: Mapping[Callable[..., Tensor], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
"""Their spatial directions."""


class Product(Protocol):
    """A call that multiplies by a parameter at every position of its input."""

    @property
    def weight(self) -> nn.Parameter:
        """What is multiplied by."""
        ...

    def count_positions(self, batch_dim: int) -> int:
        """About how many a sample has.

        Args:
            batch_dim: of the samples, where the input has several leading dimensions.

        Returns:
            The number.
        """
        ...

    def run(self, total: GradientSum) -> Tensor:
        """Multiply.

        Args:
            total: gives the weight's gradient in the backward pass where it is known there.

        Returns:
            What the function returns.
        """
        ...


def find_product(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
    """A call as a product; None of another function, and of what torch does more with.

    Args:
        function: what is called.
        args: its arguments.
        kwargs: its arguments by name.

    Returns:
        The product.
    """
    directions = _CONVOLUTIONS.get(function)
    if directions is None and function is not F.linear:
        return None
    try:
        call = Linear(*args, **kwargs) if directions is None else _bind_convolution(directions, *args, **kwargs)
    except (TypeError, ValueError):  # torch says what is wrong with them
        return None
    input, weight = call.input, call.weight
    if type(weight) is not nn.Parameter or type(input) not in (Tensor, nn.Parameter) or input.is_nested:
        return None
    dimensions = input.dim() > 2 and weight.dim() == 2
    if directions is not None:
        dimensions = input.dim() == weight.dim() == directions + 2
    plain = input.layout == weight.layout == torch.strided and input.dtype == weight.dtype
    return call if dimensions and plain and weight.is_floating_point() else None


class Linear(NamedTuple):
    """The arguments of `torch.nn.functional.linear`.

    Attributes:
        input: (*, n).
        weight: (m, n).
        bias: (m,), or None.
    """

    input: Tensor
    weight: nn.Parameter
    bias: Tensor | None = None

    def count_positions(self, batch_dim: int) -> int:
        """How many rows a sample has."""
        *leading, _ = self.input.shape
        return math.prod(leading) // max(1, leading[min(batch_dim, len(leading) - 1)])

    def run(self, total: GradientSum) -> Tensor:
        """(*, m), see `Product.run`."""
        output: Tensor = _Multiply.apply(*self, total)
        shape = self.input.shape[:-1]
        return output if output.shape[:-1] == shape else output.view(*shape, output.shape[-1])


class Convolution(NamedTuple):
    """The arguments of a convolution.

    Attributes:
        input: (b, channels, *spatial).
        weight: (out, channels of a group, *kernel).
        bias: (out,), or None.
        stride: for every spatial direction.
        padding: likewise.
        dilation: likewise.
        groups: as in `torch.nn.functional.conv2d`.
    """

    input: Tensor
    weight: nn.Parameter
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def count_positions(self, batch_dim: int) -> int:
        """Those of an image with as much padding as the kernel takes off."""
        return math.prod(self.input.shape[2:]) // math.prod(self.stride)

    def run(self, total: GradientSum) -> Tensor:
        """(b, out, *spatial), see `Product.run`."""
        output: Tensor = _Convolve.apply(*self, total)
        return output


def _bind_convolution(
    directions: int,
    input: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolution:
    sizes = [per_direction(each, directions) for each in (stride, padding, dilation)]
    return Convolution(input, weight, bias, sizes[0], sizes[1], sizes[2], groups)


def _take_known(ctx: Any, gradient: Tensor, weight: Tensor) -> Tensor | None:
    """The weight's gradient where it is known; not where a second derivative is to go through it."""
    if not ctx.needs_input_grad[1] or torch.is_grad_enabled():
        return None
    known: Tensor | None = ctx.total.take(gradient, backward_pass_number(), weight)
    return known


class _Multiply(torch.autograd.Function):
    """x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        input, weight, bias, ctx.total = args
        ctx.save_for_backward(input, weight)
        output = F.linear(input, weight, bias)
        # Torch returns a view of a product of matrices for some inputs, and what becomes of hooks on it where an
        # activation changes it in place depends on that: here the product is returned, and viewed outside.
        return output if output._base is None else output._base

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        known = _take_known(ctx, gradient, weight)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[1] and known is None:
            known = rows.mT @ input.reshape(-1, input.shape[-1])
        return (
            (rows @ weight).view(input.shape) if ctx.needs_input_grad[0] else None,
            known,
            rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
            None,
        )


class _Convolve(torch.autograd.Function):
    """A convolution."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arguments, ctx.total = args
        call = Convolution(*arguments)
        ctx.save_for_backward(call.input, call.weight)
        ctx.bias_sizes = None if call.bias is None else list(call.bias.shape)
        ctx.settings = call[3:]
        functions = list(_CONVOLUTIONS)
        return functions[call.weight.dim() - 3](*call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        known = _take_known(ctx, gradient, weight)
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and known is None, ctx.needs_input_grad[2]]
        found: tuple[Tensor | None, ...] = (None, None, None)
        if any(wanted):
            no_padding = [0] * len(stride)
            found = torch.ops.aten.convolution_backward(
                gradient, input, weight, ctx.bias_sizes, stride, padding, dilation, False, no_padding, groups, wanted
            )
        return found[0], found[1] if known is None else known, found[2], None, None, None, None, None


__all__ = ["Product", "find_product"]
