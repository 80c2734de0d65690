"""Archives of arrays whose bytes depend on the arrays alone, for samples that the repository carries."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data_io.checksum import compute_sha256


def write_npz(arrays: Mapping[str, np.ndarray], target: Path) -> str:
    """Write an ``.npz`` that `numpy.load` opens, and return its SHA-256.

    `numpy.savez_compressed` stamps the time of writing into the archive and its deflate is a sixth larger.

    Args:
        arrays: by name.
        target: the file; its folder is made.

    Returns:
        In hexadecimal.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            entry.create_system = 3
            archive.writestr(entry, buffer.getvalue())
    return compute_sha256(target)
