"""ResNet50 on ImageNet-1k (section 5.1, Tables 1 to 3), and the same code on Fashion-MNIST below it.

The model is torchvision's ResNet, unchanged except for a stem that suits 28×28 pixels. ResNet50 is the
"v1.5" of torchvision, whose stride is on the 3×3 convolution.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from experiments.dataclass_io import SettingsError, read_settings
from experiments.tasks.protocol import Evaluation, Metric, Split
from experiments.tasks.resnet50 import fashion_mnist, imagenet
from experiments.tasks.resnet50.image_sources import Batch, GreyImages, ImageSource, JpegFolder

BLOCKS = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


@dataclass(frozen=True, kw_only=True)
class Stem:
    """The layers before the first block; the defaults are torchvision's.

    Attributes:
        kernel: of the first convolution, odd; it is padded with ``kernel // 2``.
        stride: of the first convolution.
        pool: whether the 3×3 maximum with stride 2 follows.
    """

    kernel: int = 7
    stride: int = 2
    pool: bool = True

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel}: must be odd and positive")
        if self.stride < 1:
            raise ValueError(f"stride = {self.stride}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's ``[task]`` table.

    Attributes:
        data: the embedded sample, all of Fashion-MNIST, or an ImageNet tree in ``<data_dir>/imagenet``.
        model: torchvision's block type and depths; ``resnet10`` is one basic block a stage.
        batch_size: samples of a joint batch.
        validation_size: samples held out of the training set, equally many of each class. 0 trains on
            everything and leaves nothing to tune on.
        train_size: samples trained on, equally many of each class; ``None`` for all that are left.
        stem: see `Stem`.
        label_smoothing: of the training loss, 0 to 1. The reported loss has none.
        zero_gamma: start every residual branch's last batch-norm scale at 0.
        crop_padding: zero padding of the random crop of 28×28 images, in pixels.
        flip: mirror half of the 28×28 images. ImageNet's augmentation is fixed.
        image_size: side of the crops of ImageNet, in pixels.
        workers: processes that decode JPEG files.
    """

    data: Literal["fashion-mnist-embedded", "fashion-mnist", "imagenet"]
    model: Literal["resnet10", "resnet18", "resnet50"]
    batch_size: int
    validation_size: int
    train_size: int | None = None
    stem: Stem = Stem()
    label_smoothing: float = 0.0
    zero_gamma: bool = False
    crop_padding: int = 2
    flip: bool = True
    image_size: int = 224
    workers: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            # Batch normalisation of one value is an error where a feature map is one pixel.
            raise ValueError(f"batch_size = {self.batch_size}: must be at least 2")
        if self.train_size is not None and self.train_size < self.batch_size:
            raise ValueError(f"train_size = {self.train_size}: must hold one batch of {self.batch_size}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be in [0, 1)")
        for name, least in (("validation_size", 0), ("crop_padding", 0), ("workers", 0), ("image_size", 32)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")


class ResNet50ImageNet:
    """Image classification with a ResNet; top-1 accuracy on the test split is what counts.

    Args:
        settings: the recipe's ``[task]`` table, see `Settings`.
        scale: the recipe's scale, for error messages.
        data_dir: where the datasets are kept.

    Raises:
        SettingsError: a setting is unknown, mistyped or out of range, or the data has too few samples.
        DataFileError: a data file is missing or damaged.
    """

    name = "resnet50-imagenet"
    metric = Metric(name="top1", unit="fraction", higher_is_better=True)

    def __init__(self, settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> None:
        where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, where)
        try:
            self._source = _source(self.settings, data_dir)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
        self.dataset = self._source.info
        if self.dataset.train_size < self.settings.batch_size:
            raise SettingsError(
                f"{where}: batch_size = {self.settings.batch_size}: must not exceed the "
                f"{self.dataset.train_size} training images of {self.dataset.name}"
            )

    def build_model(self) -> ResNet:
        """The ResNet; its initial weights depend on torch's global generator only."""
        block, layers = BLOCKS[self.settings.model]
        model = ResNet(
            block,
            layers,
            num_classes=self._source.classes,
            zero_init_residual=self.settings.zero_gamma,
        )
        _fit_stem(model, self.settings.stem, self._source.channels)
        return model

    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return self.dataset.train_size // self.settings.batch_size

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One epoch: images (B, C, H, W), float32, and labels (B,), int64."""
        return self._source.train_batches(
            self.settings.batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy over the batch, with the recipe's label smoothing."""
        images, labels = batch
        return cross_entropy(model(images), labels, label_smoothing=self.settings.label_smoothing)

    def evaluate(self, model: nn.Module, split: Split) -> Evaluation:
        """Mean cross entropy, without smoothing, and the fraction of samples whose class scores highest.

        Args:
            model: in ``eval()``.
            split: which one.

        Returns:
            Loss and accuracy.

        Raises:
            SettingsError: the split is empty.
        """
        device = next(model.parameters()).device
        loss, hits, count = torch.zeros((), device=device), torch.zeros((), device=device), 0
        for images, labels in (self.to_device(batch, device) for batch in self._source.eval_batches(split)):
            logits = model(images).float()
            loss += cross_entropy(logits, labels, reduction="sum")
            hits += (logits.argmax(dim=1) == labels).sum()
            count += len(labels)
        if not count:
            raise SettingsError(f"the {split} split is empty: set {split}_size in the recipe's [task] table")
        return Evaluation(loss=loss.item() / count, metric=hits.item() / count)

    def to_device(self, batch: Batch, device: str | torch.device) -> Batch:
        """The batch on a device."""
        images, labels = batch
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _source(settings: Settings, data_dir: Path) -> ImageSource:
    sizes = {"train_size": settings.train_size, "validation_size": settings.validation_size}
    if settings.data == "imagenet":
        train, val = imagenet.scan(data_dir / "imagenet")
        return JpegFolder(train, val, image_size=settings.image_size, workers=settings.workers, **sizes)
    augmentation = {"crop_padding": settings.crop_padding, "flip": settings.flip}
    if settings.data == "fashion-mnist":
        return GreyImages(
            fashion_mnist.load(data_dir, "train"),
            fashion_mnist.load(data_dir, "test"),
            name="Fashion-MNIST, {train:,} images",
            sha256=fashion_mnist.FULL_SHA256,
            **sizes,
            **augmentation,
        )
    return GreyImages(
        fashion_mnist.load_embedded("train"),
        fashion_mnist.load_embedded("test"),
        name="Fashion-MNIST, {train:,} embedded images",
        sha256=fashion_mnist.EMBEDDED_SHA256,
        **sizes,
        **augmentation,
    )


def _fit_stem(model: ResNet, stem: Stem, channels: int) -> None:
    """Put the recipe's stem in place of torchvision's, initialised the way torchvision does."""
    if not stem.pool:
        model.maxpool = nn.Identity()
    if (stem.kernel, stem.stride, channels) == (7, 2, 3):
        return
    model.conv1 = nn.Conv2d(channels, 64, stem.kernel, stride=stem.stride, padding=stem.kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
