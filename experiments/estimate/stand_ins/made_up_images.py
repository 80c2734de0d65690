"""ImageNet-1k without ImageNet: noise of the recipe's size."""

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch

from experiments.dataclass_io import read_settings
from experiments.tasks.protocol import DatasetInfo
from experiments.tasks.resnet50.image_sources import Batch
from experiments.tasks.resnet50.resnet50_imagenet import ResNet50ImageNet, Settings

# ILSVRC 2012; Russakovsky et al., IJCV 115 (2015), Table 2.
IMAGES, CLASSES, CHANNELS = 1_281_167, 1_000, 3


class Noise:
    """One batch of noise, again and again; see `experiments.tasks.resnet50.image_sources.ImageSource`."""

    channels, classes = CHANNELS, CLASSES

    def __init__(self, image_size: int, train_size: int) -> None:
        self.image_size = image_size
        self.info = DatasetInfo(name="noise", sha256="", licence="", train_size=train_size, eval_size=0)

    def train_batches(self, batch_size: int, **_: int) -> Iterator[Batch]:
        """Images (B, 3, S, S) and labels (B,)."""
        images = torch.randn(batch_size, self.channels, self.image_size, self.image_size)
        return repeat((images, torch.randint(self.classes, (batch_size,))), self.info.train_size // batch_size)


class MadeUpImages(ResNet50ImageNet):
    """ResNet50 on noise."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        self.settings = read_settings(Settings, settings, f"{self.name}/{scale}, [task]")
        size = self.settings.train_size or IMAGES - self.settings.validation_size
        self._source = Noise(self.settings.image_size, size)
        self.dataset = self._source.info
        self.made_up = (
            f"one batch of noise at {self.settings.image_size}² pixels stands for the {size:,} training images "
            "of ImageNet-1k (Russakovsky et al., 2015, Table 2)"
        )
