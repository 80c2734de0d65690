"""A miniature ImageNet tree of real JPEG files."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850")


def write_tree(root: Path, *, train: int = 8, val: int = 3) -> Path:
    """Photo-sized noise whose mean colour tells the class; sizes and aspects differ from file to file."""
    generator = np.random.default_rng(0)
    for half, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = generator.integers(60, 140, 2)
                pixels = generator.normal(60 + 60 * label, 40, (height, width, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
                # ImageNet has some grey files too.
                (image if number else image.convert("L")).save(folder / f"{name}_{number}.JPEG", "JPEG")
    return root
