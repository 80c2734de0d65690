"""A data set of structures as the tasks see it: parsed once, kept with the order its splits are cut from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.array_folder import folder_sha256, open_folder, prepare_folder
from experiments.data_io.atoms.structure_splits import draw_order
from experiments.data_io.atoms.structures import Structures
from experiments.data_io.checksum import verify
from experiments.data_io.npz import write_npz
from experiments.data_io.source_identity import Identity

Grouping = Callable[[Structures], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StructureSet:
    """Structures, ready to be split.

    Attributes:
        name: of the data, for tables.
        structures: all of them.
        order: the permutation that splits are cut from, int64, (N,).
        groups: the group of each structure, see `draw_order`, (N,).
        sha256: of the file they came from, or of their folder's manifest.
        licence: of the data.
        folder: where they are kept; ``None`` for an embedded sample.
    """

    name: str
    structures: Structures
    order: np.ndarray
    groups: np.ndarray
    sha256: str
    licence: str
    folder: Path | None


def prepare_structures(
    folder: Path,
    description: Mapping[str, Any],
    read: Callable[[], Structures],
    grouping: Grouping,
    *,
    remedy: str,
    source: Callable[[], Identity] | None = None,
) -> Path:
    """Parse a source into a folder unless that is done; see `prepare_folder`.

    Args:
        folder: where the arrays go.
        description: what they are, plain values.
        read: parses the source.
        grouping: from structures to the group of each, (N,).
        remedy: what the reader of an error can do about it.
        source: what the source is known by now; left out if it cannot change.

    Returns:
        The folder.
    """

    def build() -> dict[str, np.ndarray]:
        structures = read()
        return structures.arrays() | {"order": draw_order(grouping(structures))}

    return prepare_folder(folder, description, build, remedy=remedy, source=source)


def open_structures(
    folder: Path, description: Mapping[str, Any], grouping: Grouping, *, name: str, licence: str, remedy: str
) -> StructureSet:
    """What `prepare_structures` left in a folder; raises as `open_folder` does.

    Args:
        folder: from `prepare_structures`.
        description: what they must be.
        grouping: from structures to the group of each, (N,).
        name: of the data, for tables.
        licence: of the data.
        remedy: what the reader of an error can do about it.

    Returns:
        The structures with their order and groups.
    """
    arrays = open_folder(folder, description, remedy=remedy)
    order = arrays.pop("order")
    structures = Structures(**arrays)
    return StructureSet(
        name=name,
        structures=structures,
        order=order,
        groups=grouping(structures),
        sha256=folder_sha256(folder),
        licence=licence,
        folder=folder,
    )


def write_sample(structures: Structures, target: Path) -> str:
    """Write an embedded sample, already in its drawn order, and return its SHA-256.

    Args:
        structures: in the order of the sample.
        target: the ``.npz`` file.

    Returns:
        In hexadecimal.
    """
    return write_npz(structures.arrays(), target)


def open_sample(path: Path, sha256: str, grouping: Grouping, *, name: str, licence: str) -> StructureSet:
    """An embedded sample.

    Args:
        path: the ``.npz`` file.
        sha256: its checksum.
        grouping: from structures to the group of each, (N,).
        name: of the data, for tables.
        licence: of the data.

    Returns:
        The structures in the order of the file.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    verify(path, sha256, remedy="restore it from version control")
    with np.load(path, allow_pickle=False) as arrays:
        structures = Structures(**arrays)
    return StructureSet(
        name=name,
        structures=structures,
        order=np.arange(len(structures)),
        groups=grouping(structures),
        sha256=sha256,
        licence=licence,
        folder=None,
    )
