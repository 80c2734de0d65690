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
    input, weight, bias = call.input, call.weight, call.bias
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or not _is_plain(input, weight.dtype):
        return None
    if not (bias is None or (_is_plain(bias, weight.dtype) and bias.shape == weight.shape[:1])):
        return None  # one that is broadcast
    if isinstance(call, Linear):
        fits = input.dim() > 2 and weight.dim() == 2
    else:
        fits = input.dim() == weight.dim() == 2 + len(call.stride) and min(call.stride) > 0
    return call if fits and weight.layout == torch.strided else None


def _is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor is torch's own, dense, and of this dtype."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested:
        return False
    return bool(tensor.layout == torch.strided and tensor.dtype == dtype)


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
        # In torch's order, that of their hooks; the transpose keeps the weight's memory of now, as torch's does.
        output: Tensor = _Multiply.apply(self.bias, self.input, self.weight.mT, total)
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


class _Multiply(torch.autograd.Function):
    """x Wᵀ + b, of b, x and Wᵀ."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        bias, input, transposed, ctx.total = args
        ctx.set_materialize_grads(False)
        ctx.input_shape = input.shape
        _, of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, transposed if of_input else None)
        output = F.linear(input, transposed.mT, bias)
        # Torch returns a view of a product of matrices for some inputs, and what becomes of hooks on it where an
        # activation changes it in place depends on that: here the product is returned, and viewed outside.
        return output if output._base is None else output._base

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, None
        input, transposed = ctx.saved_tensors
        of_bias, of_input, of_weight, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        found: Tensor | None = None
        if of_weight:
            known = _take_known(ctx.total, gradient)
            found = input.reshape(-1, input.shape[-1]).mT @ rows if known is None else known.mT
        return (
            rows.sum(dim=0) if of_bias else None,
            (rows @ transposed.mT).view(ctx.input_shape) if of_input else None,
            found,
            None,
        )


def _take_known(total: GradientSum, gradient: Tensor) -> Tensor | None:
    """The weight's gradient where it is known; not where a second derivative is to go through it."""
    return None if torch.is_grad_enabled() else total.take(gradient, backward_pass_number())


class _Convolve(torch.autograd.Function):
    """A convolution."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *arguments, ctx.total = args
        ctx.set_materialize_grads(False)
        call = Convolution(*arguments)
        ctx.save_for_backward(call.input, call.weight)
        ctx.bias_sizes = None if call.bias is None else list(call.bias.shape)
        ctx.settings = call[3:]
        functions = list(_CONVOLUTIONS)
        return functions[call.weight.dim() - 3](*call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        found: tuple[Tensor | None, ...] = (None, None, None)
        if gradient is not None:
            input, weight = ctx.saved_tensors
            stride, padding, dilation, groups = ctx.settings
            of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
            known = _take_known(ctx.total, gradient) if of_weight else None
            wanted = [of_input, of_weight and known is None, of_bias]
            if any(wanted):
                found = torch.ops.aten.convolution_backward(
                    gradient,
                    input,
                    weight,
                    ctx.bias_sizes,
                    stride,
                    padding,
                    dilation,
                    False,
                    [0] * len(stride),
                    groups,
                    wanted,
                )
            found = found[0], found[1] if known is None else known, found[2]
        return *found, None, None, None, None, None


__all__ = ["Product", "find_product"]
