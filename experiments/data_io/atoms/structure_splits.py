"""Which structures are trained on, tuned on and reported: cut out of one order that is drawn once and kept."""

from dataclasses import dataclass

import numpy as np

from experiments.data_io.atoms.structures import Structures

ORDER_SEED = 0


@dataclass(frozen=True, kw_only=True)
class StructureSplit:
    """Indices of the structures in each part, int64, in the order they were drawn."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def draw_order(groups: np.ndarray) -> np.ndarray:
    """A permutation of the structures, drawn with `ORDER_SEED`, in which those of one group follow each other.

    Args:
        groups: the group of each structure, integers, (N,).

    Returns:
        Indices, int64, (N,).
    """
    generator = np.random.default_rng(ORDER_SEED)
    names, members = np.unique(groups, return_inverse=True)
    place = generator.permutation(len(names))[members]
    return np.argsort(place, kind="stable")


def one_a_group(structures: Structures) -> np.ndarray:
    """Groups of one structure each: the split is by structure.

    Args:
        structures: N of them.

    Returns:
        0 to N − 1.
    """
    return np.arange(len(structures))


def composition_groups(structures: Structures) -> np.ndarray:
    """The reduced formula of each structure as a number, (N,): Fe₂O₃ and Fe₄O₆ are one group.

    Split by structure, polymorphs of one formula would be on both sides and the energies of the test split
    be known in part.

    Args:
        structures: N of them.

    Returns:
        Numbers of formulas, int64, (N,).
    """
    counts = structures.element_counts()
    reduced = counts // np.gcd.reduce(counts, axis=1, keepdims=True)
    return np.unique(reduced, axis=0, return_inverse=True)[1].ravel()


def cut(
    order: np.ndarray, groups: np.ndarray, *, train_size: int | None, validation_size: int, test_size: int
) -> StructureSplit:
    """Cut the order into parts of the given sizes; no group is in two of them.

    The order is walked group by group, and the first of test, validation and training that still has room
    for a whole group gets it. So the test split depends on its own size alone, the validation split on the
    two sizes, and a smaller training set is part of a larger one.

    Args:
        order: from `draw_order`.
        groups: the group of each structure, (N,).
        train_size: structures trained on; ``None`` for all that are left.
        validation_size: structures to tune on.
        test_size: structures that are reported.

    Returns:
        Indices of each part.

    Raises:
        ValueError: the sizes add up to more than there is, or whole groups cannot fill them.
    """
    limits = [test_size, validation_size, len(order) if train_size is None else train_size]
    if (wanted := test_size + validation_size + (train_size or 0)) > len(order):
        raise ValueError(f"test_size + validation_size + train_size = {wanted}: there are {len(order)} structures only")
    owner = _deal(order, groups, limits)
    parts = [order[owner == part] for part in range(3)]
    names = ("test_size", "validation_size", "train_size")
    for name, part, limit in zip(names, parts, [test_size, validation_size, train_size], strict=True):
        if limit is not None and len(part) != limit:
            raise ValueError(f"{name} = {limit}: whole groups of one composition fill {len(part)} of them only")
    return StructureSplit(test=parts[0], validation=parts[1], train=parts[2])


def _deal(order: np.ndarray, groups: np.ndarray, limits: list[int]) -> np.ndarray:
    """The part of each place in the order, 3 for none."""
    borders = np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1))
    owner = np.full(len(order), 3, np.int8)
    room = list(limits)
    for first, behind in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        size = behind - first
        part = next((part for part in range(3) if room[part] >= size), None)
        if part is not None:
            owner[first:behind] = part
            room[part] -= size
    return owner
