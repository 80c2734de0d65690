"""The factor Aᵢ of a convolution: the patches that its kernel is multiplied by, unfolded only where they must be."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplus.factors import statistics_dtype, with_tail


@dataclass(frozen=True)
class Patches:
    """The input patches that a convolution multiplies its kernel by.

    Attributes:
        images: (b, channels, *spatial), not padded.
        kernel: kernel size in each spatial direction.
        stride: likewise.
        dilation: likewise.
        padding: zeros (before, after) in each spatial direction.
        groups: of the convolution; channels are cut into so many equal parts.
        tail: as in `Dense`.
    """

    images: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    tail: float | None = None

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.images.device

    @property
    def samples(self) -> int:
        """Number of samples b."""
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        """Channels of one group."""
        return self.images.shape[1] // self.groups

    @property
    def size(self) -> int:
        """Channels of a group times kernel area, and the constant row."""
        return self.channels * math.prod(self.kernel) + (self.tail is not None)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Output positions in each spatial direction."""
        return tuple(
            (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for length, (before, after), kernel, stride, dilation in zip(
                self.images.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    @property
    def positions(self) -> int:
        """Output positions κ."""
        return math.prod(self.output_size)

    def _shifted_cost(self) -> int:
        pixels = math.prod(self.images.shape[2:])
        return 2 * pixels**2 * self.channels + sum(self.kernel) * pixels**2

    def _unfolded_cost(self) -> int:
        return 2 * self.positions**2 * self.channels * math.prod(self.kernel)

    def gram_cost(self) -> int:
        """Of the cheaper of the two ways to the Gram matrix."""
        return min(self._shifted_cost(), self._unfolded_cost())

    def _images(self) -> Tensor:
        return self.images.to(statistics_dtype(self.images.dtype))

    def _padded(self, images: Tensor) -> Tensor:
        """``images`` with zeros around their spatial directions."""
        amounts = list(itertools.chain.from_iterable(reversed(self.padding)))
        return F.pad(images, amounts) if any(amounts) else images

    def _windows(self, images: Tensor) -> Tensor:
        """A view (*lead, *output, *kernel) of padded images (*lead, *spatial)."""
        lead = images.dim() - len(self.kernel)
        strides = images.stride()[lead:]
        steps = [step * stride for step, stride in zip(strides, self.stride, strict=True)]
        offsets = [step * dilation for step, dilation in zip(strides, self.dilation, strict=True)]
        return images.as_strided(
            (*images.shape[:lead], *self.output_size, *self.kernel),
            (*images.stride()[:lead], *steps, *offsets),
            images.storage_offset(),
        )

    def dense(self) -> Tensor:
        """The unfolded patches, (b, groups, channels·kernel, κ)."""
        directions = len(self.kernel)
        windows = self._windows(self._padded(self._images()))  # (b, C, *output, *kernel)
        output, kernel = range(2, 2 + directions), range(2 + directions, 2 + 2 * directions)
        columns = windows.permute(0, 1, *kernel, *output)
        shape = (self.samples, self.groups, self.channels * math.prod(self.kernel), self.positions)
        return with_tail(columns.reshape(shape), self.tail)

    def gram(self) -> Tensor:
        """Inner products of patches, by shifted products of pixels where that is cheaper."""
        if self._shifted_cost() < self._unfolded_cost():
            gram = self._shifted_gram()
        else:
            columns = replace(self, tail=None).dense()
            gram = columns.mT @ columns
        return gram + 1.0 if self.tail else gram

    def _shifted_gram(self) -> Tensor:
        """Σ over kernel offsets δ of M[o+δ, o'+δ], M the pixels' inner products over channels.

        The sum is made one direction after the other, k + k instead of k·k terms for a square kernel.
        """
        spatial = self.images.shape[2:]
        pixels = self._images().reshape(self.samples, self.groups, self.channels, -1)
        products = (pixels.mT @ pixels).view(self.samples, self.groups, *spatial, *spatial)
        for direction in range(len(spatial)):
            products = self._summed_over_offsets(products, direction)
        return products.reshape(self.samples, self.groups, self.positions, self.positions)

    def _summed_over_offsets(self, products: Tensor, direction: int) -> Tensor:
        """Σ_δ products[..., s·o + δ, ..., s·o' + δ, ...] along one direction; outside of the image are zeros."""
        axes = (2 + direction, 2 + direction + len(self.kernel))
        outputs, stride = self.output_size[direction], self.stride[direction]
        length, before = self.images.shape[2 + direction], self.padding[direction][0]
        shape = list(products.shape)
        shape[axes[0]] = shape[axes[1]] = outputs
        total = products.new_zeros(shape)
        for offset in range(self.kernel[direction]):
            shift = offset * self.dilation[direction] - before
            first = max(0, -(shift // stride))  # the first o with s·o + shift ≥ 0
            last = min(outputs, (length - 1 - shift) // stride + 1)
            if last > first:
                source = slice(stride * first + shift, stride * (last - 1) + shift + 1, stride)
                _square(total, axes, slice(first, last)).add_(_square(products, axes, source))
        return total

    def squared_norms(self) -> Tensor:
        """Squared norms of patches: windows summed over the pixels' own."""
        images = self._images()
        images = images.view(self.samples, self.groups, self.channels, *images.shape[2:])
        energy = self._padded(images.square().sum(dim=2))  # (b, groups, *spatial)
        windows = self._windows(energy)
        norms = windows.sum(dim=tuple(range(-len(self.kernel), 0))).flatten(2)
        return norms + 1.0 if self.tail else norms

    def at_offset(self, images: Tensor, offset: tuple[int, ...]) -> Tensor:
        """What one place of the kernel meets at each position.

        Args:
            images: (b, channels, *spatial), not padded: some of the channels.
            offset: the place, one number for each spatial direction.

        Returns:
            (b, channels, κ), in the statistics' dtype.
        """
        padded = self._padded(images.to(statistics_dtype(images.dtype)))
        slices = [
            slice(place * dilation, place * dilation + (count - 1) * stride + 1, stride)
            for place, dilation, stride, count in zip(offset, self.dilation, self.stride, self.output_size, strict=True)
        ]
        return padded[(slice(None), slice(None), *slices)].flatten(2)

    def slice(self, start: int, stop: int) -> Patches:
        """The samples ``start`` to ``stop``."""
        return replace(self, images=self.images[start:stop])

    def flat(self) -> Normed:
        """Every position a sample, of which only the norm is known."""
        return Normed(self.squared_norms().transpose(1, 2).flatten(0, 1).unsqueeze(-1), self)


@dataclass(frozen=True)
class Normed:
    """Positions of patches as samples: their squared norms, and the entries only where they are asked for.

    Attributes:
        norms: (b·κ, groups, 1).
        patches: which they are the norms of.
        start: first of the patches' positions, counted over all samples.
    """

    norms: Tensor
    patches: Patches
    start: int = 0

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.norms.device

    @property
    def samples(self) -> int:
        """Number of positions."""
        return self.norms.shape[0]

    @property
    def size(self) -> int:
        """Entries of a patch."""
        return self.patches.size

    @property
    def positions(self) -> int:
        """One a sample."""
        return 1

    def gram_cost(self) -> int:
        """The norms are there."""
        return 1

    def dense(self) -> Tensor:
        """The patches written out, (samples, groups, d, 1)."""
        entries = self.patches.dense().permute(0, 3, 1, 2).flatten(0, 1)
        return entries[self.start : self.start + self.samples].unsqueeze(-1)

    def gram(self) -> Tensor:
        """The squared norm as a 1×1 matrix."""
        return self.norms.unsqueeze(-1)

    def squared_norms(self) -> Tensor:
        """The norms."""
        return self.norms

    def slice(self, start: int, stop: int) -> Normed:
        """The positions ``start`` to ``stop``."""
        return replace(self, norms=self.norms[start:stop], start=self.start + start)

    def flat(self) -> Normed:
        """Positions are samples already."""
        return self


def _square(products: Tensor, axes: tuple[int, int], part: slice) -> Tensor:
    """The view with the same part of two axes."""
    index = [slice(None)] * products.dim()
    index[axes[0]] = index[axes[1]] = part
    return products[tuple(index)]
