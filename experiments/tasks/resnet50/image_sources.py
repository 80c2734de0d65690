"""Labelled images for a classification task: grey arrays in memory, or a folder of JPEG files.

Both hold a validation split out of the training set, draw the order of batches and the augmentation from
``(seed, epoch)`` alone, and yield ``(images, labels)`` of shapes (B, C, H, W), float32, and (B,), int64.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from experiments.data_io.sampling import epoch_batches, hold_out
from experiments.tasks.protocol import DatasetInfo, Split
from experiments.tasks.resnet50 import fashion_mnist, imagenet

Batch = tuple[Tensor, Tensor]
EVAL_BATCH = 250


class ImageSource(Protocol):
    """Where a task's images come from.

    Attributes:
        info: the data as the tables name it.
        channels: 1 for grey, 3 for colour.
        classes: number of classes.
    """

    info: DatasetInfo
    channels: int
    classes: int

    def train_batches(self, batch_size: int, *, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[Batch]:
        """One epoch of augmented training batches; each is this rank's part of a joint batch."""
        ...

    def eval_batches(self, split: Split) -> Iterator[Batch]:
        """A whole split, in order, without augmentation."""
        ...


class GreyImages:
    """Fashion-MNIST in memory; augmented by a flip and a crop out of a zero-padded image."""

    channels = 1
    classes = fashion_mnist.CLASSES
    MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale where white is 1

    def __init__(
        self,
        train: fashion_mnist.Images,
        test: fashion_mnist.Images,
        *,
        name: str,
        sha256: str,
        train_size: int | None,
        validation_size: int,
        crop_padding: int,
        flip: bool,
    ) -> None:
        chosen, held_out = hold_out(train.labels, train_size=train_size, validation_size=validation_size)
        self.train, self.crop_padding, self.flip = train[chosen], crop_padding, flip
        self.held_out: dict[Split, fashion_mnist.Images] = {"validation": train[held_out], "test": test}
        self.info = DatasetInfo(
            name=name.format(train=len(chosen)),
            sha256=sha256,
            licence=fashion_mnist.LICENCE,
            train_size=len(chosen),
            eval_size=len(test),
        )

    def train_batches(self, batch_size: int, *, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[Batch]:
        """See `ImageSource`; an image's crop and flip depend on ``(seed, epoch)`` and the image."""
        size = len(self.train)
        # Drawn for every image at once, so that they do not depend on which rank reads it.
        generator = np.random.default_rng([seed, epoch, 1])
        offsets = generator.integers(0, 2 * self.crop_padding + 1, (size, 2))
        flips = generator.random(size) < (0.5 if self.flip else 0.0)
        order = epoch_batches(size, batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
        for indices in order:
            images = self.train[indices]
            pixels = crop_and_flip(images.pixels, offsets[indices], flips[indices], padding=self.crop_padding)
            yield self._batch(pixels, images.labels)

    def eval_batches(self, split: Split) -> Iterator[Batch]:
        """See `ImageSource`."""
        images = self.held_out[split]
        for start in range(0, len(images), EVAL_BATCH):
            part = slice(start, start + EVAL_BATCH)
            yield self._batch(images.pixels[part], images.labels[part])

    def _batch(self, pixels: np.ndarray, labels: np.ndarray) -> Batch:
        grey = torch.from_numpy(pixels.astype(np.float32)).div_(255).sub_(self.MEAN).div_(self.STD)
        return grey.unsqueeze(1), torch.from_numpy(labels)


def crop_and_flip(pixels: np.ndarray, offsets: np.ndarray, flips: np.ndarray, *, padding: int) -> np.ndarray:
    """Pad with zeros, cut the original size out again at each image's offset, mirror where told.

    Args:
        pixels: (B, H, W).
        offsets: (B, 2): top and left edge of the crop in the padded image, 0 to 2 ``padding``.
        flips: bool, (B,).
        padding: pixels added on every side.

    Returns:
        (B, H, W).
    """
    _, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
    rows = offsets[:, :1] + np.arange(height)  # (B, H)
    columns = offsets[:, 1:] + np.arange(width)  # (B, W)
    columns = np.where(flips[:, None], columns[:, ::-1], columns)
    return padded[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


class JpegFolder:
    """An ImageNet tree on disk; its ``val`` folder is the test split."""

    channels = 3

    def __init__(
        self,
        train: imagenet.Folder,
        val: imagenet.Folder,
        *,
        train_size: int | None,
        validation_size: int,
        image_size: int,
        workers: int,
    ) -> None:
        chosen, held_out = hold_out(train.labels, train_size=train_size, validation_size=validation_size)
        self.train, self.chosen, self.workers = train, chosen, workers
        self.held_out = {"validation": (train, held_out), "test": (val, np.arange(len(val.paths)))}
        self.image_size = image_size
        self.classes = len(train.classes)
        self.info = DatasetInfo(
            name=_name(train, val, len(chosen)),
            sha256=imagenet.joint_sha256(train, val),
            licence=imagenet.LICENCE,
            train_size=len(chosen),
            eval_size=len(val.paths),
        )

    def train_batches(self, batch_size: int, *, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[Batch]:
        """See `ImageSource`; an image's crop and flip depend on ``(seed, epoch)`` and the image."""
        transform = imagenet.train_transform(self.image_size)
        images = imagenet.Images(self.train, self.chosen, transform, seed=seed, epoch=epoch)
        order = epoch_batches(len(images), batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
        return imagenet.batches(images, order, workers=self.workers)

    def eval_batches(self, split: Split) -> Iterator[Batch]:
        """See `ImageSource`."""
        folder, indices = self.held_out[split]
        transform = imagenet.eval_transform(self.image_size)
        images = imagenet.Images(folder, indices, transform, seed=0, epoch=0)
        order = (
            np.arange(start, min(start + EVAL_BATCH, len(indices))) for start in range(0, len(indices), EVAL_BATCH)
        )
        return imagenet.batches(images, order, workers=self.workers)


def _name(train: imagenet.Folder, val: imagenet.Folder, train_size: int) -> str:
    """Only the full ILSVRC 2012 set is called ImageNet-1k."""
    whole = (len(train.classes), len(train.paths), len(val.paths)) == (1000, 1_281_167, 50_000)
    if whole:
        return "ImageNet-1k" if train_size == len(train.paths) else f"ImageNet-1k, {train_size:,} images"
    return f"JPEG folder, {len(train.classes):,} classes, {train_size:,} images"
