"""The factor Aᵢ of a convolution: the patches that its kernel is multiplied by, unfolded only where they must be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ngplus.factors.dense import Dense
from ngplus.factors.factor import Factor, statistics_dtype
from ngplus.factors.flat import Flat, split_boxes
from ngplus.factors.products import multiply_by_transpose
from ngplus.factors.sketch import Sampled

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
"""By the number of spatial directions."""


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
        appended: as in `Dense`.
        start: first output position that counts, output positions being numbered row by row.
        stop: the output position after the last that counts; None for all.
    """

    images: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    appended: float | None = None
    start: int = 0
    stop: int | None = None

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self.images.device

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return statistics_dtype(self.images.dtype)

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
        return self._area + (self.appended is not None)

    @property
    def _area(self) -> int:
        return self.channels * math.prod(self.kernel)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Output positions in each spatial direction, whether they count or not."""
        return tuple(
            (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for length, (before, after), kernel, stride, dilation in zip(
                self.images.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    @property
    def _range(self) -> tuple[int, int]:
        return self.start, math.prod(self.output_size) if self.stop is None else self.stop

    @property
    def positions(self) -> int:
        """Output positions κ that count."""
        start, stop = self._range
        return stop - start

    @property
    def norm_elements(self) -> int:
        """Squares of pixels, over channels."""
        return self.channels

    def _shifted_cost(self) -> int:
        pixels = math.prod(self.images.shape[2:])
        return 2 * pixels**2 * self.channels + sum(self.kernel) * pixels**2

    def _unfolded_cost(self) -> int:
        return 2 * self.positions**2 * self._area

    @property
    def is_whole(self) -> bool:
        """Whether all positions count."""
        return (self.start, self.stop) == (0, None)

    def _is_shifted(self) -> bool:
        """Whether the Gram matrix is made of shifted products, which give that of all positions only."""
        return self.is_whole and self._shifted_cost() < self._unfolded_cost()

    def gram_cost(self) -> int:
        """Of the cheaper of the two ways to the Gram matrix."""
        return self._shifted_cost() if self._is_shifted() else self._unfolded_cost()

    def _by_group(self) -> Tensor:
        """The images, (b, groups, channels, *spatial)."""
        return torch.unflatten(self.images, 1, (self.groups, self.channels))

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

    def _boxes(self) -> Iterator[tuple[slice, Patches]]:
        """The positions that count in as few boxes of the output as there are, with their places among them."""
        if self.is_whole:
            yield slice(0, self.positions), self
            return
        place = 0
        for box in split_boxes(self.output_size, *self._range):
            part = self._box(box)
            yield slice(place, place + part.positions), part
            place += part.positions

    def _box(self, outputs: tuple[slice, ...]) -> Patches:
        """A box of output positions: those pixels alone that it is made from, with the zeros around them."""
        images, padding = self.images, []
        for direction, (output, (before, _)) in enumerate(zip(outputs, self.padding, strict=True)):
            length, stride = self.images.shape[2 + direction], self.stride[direction]
            first = output.start * stride - before
            last = (output.stop - 1) * stride - before + self.dilation[direction] * (self.kernel[direction] - 1)
            low = min(max(first, 0), length)
            count = max(min(last + 1, length) - low, 0)
            zeros = min(max(low - first, 0), last + 1 - first)
            images = images.narrow(2 + direction, low, count)
            padding.append((zeros, last + 1 - first - zeros - count))
        return replace(self, images=images, padding=tuple(padding), start=0, stop=None)

    def dense(self) -> Tensor:
        """The unfolded patches, (b, groups, channels·kernel, κ)."""
        entries = self.images.new_empty(self.samples, self.groups, self.size, self.positions, dtype=self.dtype)
        if self.appended is not None:
            entries[:, :, -1] = self.appended
        unfolded = torch.unflatten(entries[:, :, : self._area], 2, (self.channels, *self.kernel))
        directions = len(self.kernel)
        output, kernel = range(3, 3 + directions), range(3 + directions, 3 + 2 * directions)
        for place, box in self._boxes():
            windows = box._windows(box._padded(box._by_group().to(self.dtype)))
            columns = windows.permute(0, 1, 2, *kernel, *output)
            torch.unflatten(unfolded[..., place], -1, box.output_size).copy_(columns)
        return entries

    def gram(self) -> Tensor:
        """Inner products of patches, by shifted products of pixels where that is cheaper."""
        if self._is_shifted():
            gram = self._shifted_gram()
        else:
            columns = replace(self, appended=None).dense()
            gram = multiply_by_transpose(columns.mT)
        return gram + 1.0 if self.appended else gram

    def _shifted_gram(self) -> Tensor:
        """Σ over kernel offsets δ of M[o+δ, o'+δ], M the pixels' inner products over channels.

        The sum is made one direction after the other, k + k instead of k·k terms for a square kernel.
        """
        spatial = self.images.shape[2:]
        pixels = self.images.to(self.dtype).reshape(self.samples, self.groups, self.channels, -1)
        products = multiply_by_transpose(pixels.mT).view(self.samples, self.groups, *spatial, *spatial)
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

    def multiplies_at_once(self, outputs: Tensor, limit: int) -> bool:
        """Whether `multiply` is faster than a product of unfolded patches, and takes no more memory.

        Args:
            outputs: as for `multiply`.
            limit: elements of temporaries.

        Returns:
            True on a CPU with oneDNN, for float32 and for samples that are no larger than ``limit``.
        """
        with_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        is_fast = self.device.type == "cpu" and self.dtype == torch.float32 and with_onednn
        elements = (self.images.numel() + outputs.numel()) // max(1, self.samples)
        return is_fast and self.is_whole and elements <= limit

    def multiply(self, outputs: Tensor) -> Tensor:
        """𝒢ᵢ = Gᵢ Aᵢᵀ of (8) for all positions, by the convolution's own backward pass, which unfolds nothing.

        Args:
            outputs: G, (b, groups, rows, κ).

        Returns:
            (b, groups, rows, size).
        """
        rows, dtype = outputs.shape[2], self.dtype
        is_even = all(before == after for before, after in self.padding)
        padding = tuple(before for before, _ in self.padding) if is_even else 0
        products = self.images.new_empty(self.samples, self.groups, rows, self.size, dtype=dtype)
        weight_size = (self.groups * rows, self.channels, *self.kernel)
        for sample in range(self.samples):
            images = self.images[sample : sample + 1].to(dtype)
            images = images if is_even else self._padded(images)
            gradient = outputs[sample].to(dtype).reshape(1, -1, *self.output_size)
            weight = _WEIGHT_GRADIENTS[len(self.kernel)](
                images, weight_size, gradient, self.stride, padding, self.dilation, self.groups
            )
            products[sample, :, :, : self._area] = weight.reshape(self.groups, rows, -1)
        if self.appended is not None:
            products[..., -1] = self.appended * outputs.sum(dim=3, dtype=dtype)
        return products

    def squared_norms(self) -> Tensor:
        """Squared norms of patches: windows summed over the pixels' own."""
        norms = self.images.new_empty(self.samples, self.groups, self.positions, dtype=self.dtype)
        for place, box in self._boxes():
            norms[..., place] = box._norms()
        return norms + 1.0 if self.appended else norms

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

    def _norms(self) -> Tensor:
        images = self._by_group().to(self.dtype)
        energy = self._padded(images.square().sum(dim=2))  # (b, groups, *spatial)
        return self._windows(energy).sum(dim=tuple(range(-len(self.kernel), 0))).flatten(2)

    def slice(self, start: int, stop: int) -> Patches:
        """The samples ``start`` to ``stop``."""
        return replace(self, images=self.images[start:stop])

    def slice_positions(self, start: int, stop: int) -> Patches:
        """The positions ``start`` to ``stop``."""
        if (start, stop) == (0, self.positions):
            return self
        return replace(self, start=self.start + start, stop=self.start + stop)

    def flat(self) -> Flat:
        """Every position a sample, unfolded only where it is asked for."""
        return Flat.of(self)

    def gather(self, index: Tensor) -> Dense:
        """Patches by their indices, as in `Gathered`: no other is unfolded."""
        inside, pixel = self._pixels(torch.unravel_index(index % self.positions + self.start, self.output_size))
        images = self.images.flatten(2)
        entries = images[(index // self.positions).unsqueeze(-1), :, pixel]  # (samples, κ, kernel, channels)
        entries = entries.masked_fill_(~inside.unsqueeze(-1), 0.0).permute(0, 3, 2, 1)
        return Dense(entries.reshape(len(index), self.groups, self._area, -1), self.appended)

    def _pixels(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Whether each entry of some positions' patches is inside the image, and which pixel of it, (*lead, kernel)."""
        inside, pixel = torch.ones_like(outputs[0]).unsqueeze(-1).bool(), torch.zeros_like(outputs[0]).unsqueeze(-1)
        for direction, output in enumerate(outputs):
            offsets = torch.arange(self.kernel[direction], device=self.device) * self.dilation[direction]
            place = output.unsqueeze(-1) * self.stride[direction] - self.padding[direction][0] + offsets
            length = self.images.shape[2 + direction]
            inside = (inside.unsqueeze(-1) & ((place >= 0) & (place < length)).unsqueeze(-2)).flatten(-2)
            pixel = (pixel.unsqueeze(-1) * length + place.clamp(0, length - 1).unsqueeze(-2)).flatten(-2)
        return inside, pixel


def per_direction(value: int | Sequence[int], directions: int) -> tuple[int, ...]:
    """A stride, a padding or a dilation for every spatial direction.

    Args:
        value: one for all, alone or in a sequence, or one for each.
        directions: how many there are.

    Returns:
        One for each.

    Raises:
        ValueError: of anything else.
    """
    values = (value,) if isinstance(value, int) else tuple(value)
    values = values * directions if len(values) == 1 else values
    if len(values) != directions or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{value!r} is not for {directions} spatial directions")
    return values


def patches(
    images: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
    appended: float | None,
) -> Dense | Patches:
    """`Patches`; where each is a pixel and each pixel one, they are the images' own entries: `Dense`."""
    plain = set(kernel) == set(stride) == {1} and not any(itertools.chain.from_iterable(padding))
    if not plain:
        return Patches(images, kernel, stride, dilation, padding, groups, appended)
    return Dense(torch.unflatten(images.flatten(2), 1, (groups, -1)), appended)


def round_to_rows(factor: Factor, step: int) -> int:
    """Up to ``step`` positions that are whole rows, or planes, of a convolution's output: fewer boxes to unfold."""
    patches = factor.factor if isinstance(factor, Sampled) else factor
    unit = 1
    if isinstance(patches, Patches):
        for length in reversed(patches.output_size):
            if unit * length > step:
                break
            unit *= length
    return step // unit * unit


def _square(products: Tensor, axes: tuple[int, int], part: slice) -> Tensor:
    """The view with the same part of two axes."""
    index = [slice(None)] * products.dim()
    index[axes[0]] = index[axes[1]] = part
    return products[tuple(index)]
