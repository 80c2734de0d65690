"""Many molecules or crystals as a few flat arrays, whatever source they came from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from experiments.data_io.checksum import DataFileError

MAX_ATOMIC_NUMBER = 99  # SchNet's table of embeddings has rows 0 to 99

READERS = 2
"""Version of what is checked of files that the user puts in place: what was parsed by an earlier one is read again."""


@dataclass(frozen=True, kw_only=True)
class Structures:
    """N structures of A atoms in all.

    Attributes:
        numbers: atomic numbers, uint8, (A,).
        positions: in Å, float32, (A, 3).
        starts: int64, (N + 1,): structure k has the atoms ``starts[k]`` to ``starts[k + 1] - 1``.
        target: the property that is learnt, float64, (N,): total energy in eV of a molecule, formation
            energy in eV an atom of a crystal.
        cells: lattice vectors as rows in Å, float64, (N, 3, 3), periodic in all three; ``None`` for
            molecules.

    Raises:
        ValueError: arrays that do not fit each other, or an entry that no model can learn from; says which.
    """

    numbers: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    target: np.ndarray
    cells: np.ndarray | None = None

    def __post_init__(self) -> None:
        atoms, count = len(self.numbers), len(self.target)
        _expect("numbers", self.numbers, np.uint8, (atoms,))
        _expect("positions", self.positions, np.float32, (atoms, 3))
        _expect("starts", self.starts, np.int64, (count + 1,))
        _expect("target", self.target, np.float64, (count,))
        if self.cells is not None:
            _expect("cells", self.cells, np.float64, (count, 3, 3))
        if self.starts[0] != 0 or self.starts[-1] != atoms:
            raise ValueError(f"starts must go from 0 to {atoms}, got {self.starts[0]} to {self.starts[-1]}")

    def __len__(self) -> int:
        return len(self.target)

    @property
    def n_atoms(self) -> np.ndarray:
        """Atoms of each structure, int64, (N,)."""
        return np.diff(self.starts)

    def select(self, indices: np.ndarray) -> "Structures":
        """The structures of these indices, in their order."""
        atoms, starts = gather_ranges(self.starts, indices)
        return Structures(
            numbers=self.numbers[atoms],
            positions=self.positions[atoms],
            starts=starts,
            target=self.target[indices],
            cells=None if self.cells is None else self.cells[indices],
        )

    def element_counts(self) -> np.ndarray:
        """Atoms of each atomic number, int64, (N, 100)."""
        width = MAX_ATOMIC_NUMBER + 1
        owner = np.repeat(np.arange(len(self)), self.n_atoms)
        cells = np.bincount(owner * width + self.numbers, minlength=len(self) * width)
        return cells.reshape(len(self), width)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names, as they are stored."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}


def gather_ranges(starts: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of some ranges of a flat array, and where each range starts among them.

    Args:
        starts: (N + 1,): range k is ``starts[k]`` to ``starts[k + 1] - 1``.
        indices: of the ranges wanted, (B,).

    Returns:
        ``(positions, new_starts)`` of shapes (M,) and (B + 1,), int64.
    """
    sizes = starts[indices + 1] - starts[indices]
    new_starts = np.zeros(len(indices) + 1, np.int64)
    np.cumsum(sizes, out=new_starts[1:])
    return np.arange(new_starts[-1]) + np.repeat(starts[indices] - new_starts[:-1], sizes), new_starts


def _expect(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} must be {np.dtype(dtype)} of shape {shape}, got {array.dtype} of shape {array.shape}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One structure as a reader found it.

    Attributes:
        name: what the source calls it, for error messages.
        numbers: atomic numbers, (n,).
        positions: in Å, (n, 3).
        target: see `Structures`.
        cell: lattice vectors as rows in Å, (3, 3), ``None`` for a molecule.
    """

    name: str
    numbers: np.ndarray
    positions: np.ndarray
    target: float
    cell: np.ndarray | None = None


def collect(entries: Iterable[Entry], source: str) -> Structures:
    """Join entries into arrays, in their order.

    Args:
        entries: of which either all have a cell or none has.
        source: the file or folder, for error messages.

    Returns:
        All atoms in flat arrays, with the first atom of each structure.

    Raises:
        DataFileError: there are none; or one has no atoms, an unknown element, coordinates, a target or a cell that
            are not finite in float32, a degenerate cell, or is there twice. Names the source and the entry.
    """
    found: list[Entry] = []
    seen: dict[bytes, str] = {}
    for entry in entries:
        _check(entry, source)
        first = seen.setdefault(_content(entry), entry.name)
        if first is not entry.name:
            raise DataFileError(f"{source}: {entry.name} is the same structure as {first}")
        found.append(entry)
    if not found:
        raise DataFileError(f"{source}: holds no structure")
    starts = np.zeros(len(found) + 1, np.int64)
    np.cumsum([len(entry.numbers) for entry in found], out=starts[1:])
    return Structures(
        numbers=np.concatenate([entry.numbers for entry in found]).astype(np.uint8),
        positions=np.concatenate([entry.positions for entry in found]).astype(np.float32),
        starts=starts,
        target=np.array([entry.target for entry in found], np.float64),
        cells=None if found[0].cell is None else np.array([entry.cell for entry in found], np.float64),
    )


def _content(entry: Entry) -> bytes:
    cell = b"" if entry.cell is None else np.asarray(entry.cell, np.float32).tobytes()
    return bytes(entry.numbers.tolist()) + np.asarray(entry.positions, np.float32).tobytes() + cell


def _check(entry: Entry, source: str) -> None:
    problems: Mapping[str, Callable[[], bool]] = {
        "has no atoms": lambda: len(entry.numbers) == 0,
        f"has coordinates of shape {entry.positions.shape} for {len(entry.numbers)} atoms": lambda: (
            entry.positions.shape != (len(entry.numbers), 3)
        ),
        f"has an atomic number outside of 1 to {MAX_ATOMIC_NUMBER}": lambda: (
            min(entry.numbers) < 1 or max(entry.numbers) > MAX_ATOMIC_NUMBER
        ),
    }
    for problem, applies in problems.items():
        if applies():
            raise DataFileError(f"{source}: {entry.name} {problem}")
    for what, values in {
        "coordinate": entry.positions,
        "target": entry.target,
        "length in its cell": entry.cell,
    }.items():
        wrong = [] if values is None else _find_infinite(values)
        if len(wrong):
            raise DataFileError(f"{source}: {entry.name} has the {what} {wrong[0]}, must be finite in float32")
    if entry.cell is not None and not _has_volume(entry.cell):
        raise DataFileError(f"{source}: {entry.name} has a degenerate cell, one without a volume")


def _find_infinite(values: np.ndarray | float) -> np.ndarray:
    """The numbers that are not finite in the precision that models learn in."""
    flat = np.ravel(values)
    return flat[~(np.abs(flat) <= np.finfo(np.float32).max)]


def _has_volume(cell: np.ndarray) -> bool:
    """Whether three finite vectors span a volume that is no rounding error of their lengths."""
    lengths = np.linalg.norm(cell, axis=1)
    return bool(abs(np.linalg.det(cell)) > 1e-6 * max(lengths.prod(), 1e-12))
