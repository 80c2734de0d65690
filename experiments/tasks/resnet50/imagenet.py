"""ImageNet-1k, or any tree of the same form: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

The augmentation is the one of torchvision's reference training of ResNet50 v1.5: a random crop resized to
224 and a random flip; for evaluation the shorter side to 256 and the central 224. Nothing is downloaded:
the images are under their owner's terms and are put in place by the user.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text_lines import shown_files

LICENCE = "ImageNet terms of access (non-commercial research); not redistributed"
SUFFIXES = {".jpeg", ".jpg"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One half of the tree, as a listing.

    Attributes:
        paths: the images in the order of their names.
        labels: int64, (N,): the position of the image's folder among the sorted class folders.
        classes: the class folders' names, sorted.
        sha256: of the lines ``<class>/<name> <bytes>``, sorted. Names and sizes only: hashing the 140 GB
            themselves would take longer than an epoch.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    sha256: str


def scan(root: Path) -> tuple[Folder, Folder]:
    """List ``root/train`` and ``root/val`` but for hidden files and folders.

    Args:
        root: of the tree of folders.

    Returns:
        The two halves.

    Raises:
        DataFileError: a folder is missing, a class has no image or one that is no file, or the two have different
            classes.
    """
    train, val = _scan_half(root / "train"), _scan_half(root / "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise DataFileError(
            f"{root}: train and val must have the same class folders; "
            f"only in train: {_some(only_train)}; only in val: {_some(only_val)}"
        )
    return train, val


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _scan_half(folder: Path) -> Folder:
    if not folder.is_dir():
        raise DataFileError(
            f"{folder} is missing: ImageNet is put in place by the user, as train/<class>/*.JPEG and val/<class>/*.JPEG"
        )
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataFileError(f"{folder} holds no class folders")
    files = [_images(folder / name) for name in classes]
    paths = tuple(path for group in files for path in group)
    listing = "".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n" for path in paths)
    return Folder(
        paths=paths,
        labels=np.repeat(np.arange(len(classes)), [len(group) for group in files]),
        classes=tuple(classes),
        sha256=hashlib.sha256(listing.encode()).hexdigest(),
    )


def _images(folder: Path) -> list[Path]:
    images = shown_files(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not images:
        raise DataFileError(f"{folder} holds no JPEG file")
    return images


def joint_sha256(train: Folder, val: Folder) -> str:
    """One checksum for both halves.

    Args:
        train: the training half.
        val: the validation half.

    Returns:
        In hexadecimal.
    """
    return hashlib.sha256(f"train {train.sha256}\nval {val.sha256}\n".encode()).hexdigest()


def train_transform(size: int) -> transforms.Compose:
    """RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3), flip, normalisation: (3, size, size).

    Args:
        size: of the image in pixels.

    Returns:
        From an image to a tensor.
    """
    return transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *_to_normalised()]
    )


def eval_transform(size: int) -> transforms.Compose:
    """Shorter side to 8/7 of ``size`` (256 for 224), the central crop, normalisation: (3, size, size).

    Args:
        size: of the image in pixels.

    Returns:
        From an image to a tensor.
    """
    return transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *_to_normalised()])


def _to_normalised() -> list[torch.nn.Module | transforms.ToTensor]:
    return [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def read_image(path: Path) -> Image.Image:
    """Decode one JPEG as RGB.

    Args:
        path: the file.

    Returns:
        The image.

    Raises:
        DataFileError: the file is missing, truncated or no image; names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise DataFileError(f"{path} cannot be decoded as a JPEG image: {error}") from error


class Images(Dataset[tuple[Tensor, int]]):
    """Images of a listing, transformed; random transforms are drawn from ``(seed, epoch, index)`` alone.

    So an image's crop depends neither on the number of worker processes or ranks nor on the order of reading.
    """

    def __init__(
        self, folder: Folder, indices: np.ndarray, transform: transforms.Compose, *, seed: int, epoch: int
    ) -> None:
        self.folder, self.indices, self.transform = folder, indices, transform
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = int(self.indices[position])
        image = read_image(self.folder.paths[index])
        # The fork keeps the global generator, from which dropout draws, as it was when there are no workers.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_image_seed(self.seed, self.epoch, index))
            return self.transform(image), int(self.folder.labels[index])


def _image_seed(seed: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batches(images: Images, order: Iterable[np.ndarray], *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (B, 3, size, size) and (B,) of the given positions, decoded by worker processes.

    Args:
        images: the dataset.
        order: the positions of each batch.
        workers: number of worker processes; 0 decodes in this one.

    Returns:
        An iterator over images and labels.

    Raises:
        DataFileError: a file cannot be decoded; names it.
    """
    return iter(
        DataLoader(
            images,
            batch_sampler=[positions.tolist() for positions in order],
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: the loader's draw of a base seed must not move the global one.
            generator=torch.Generator(),
        )
    )
