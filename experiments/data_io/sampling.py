"""Which samples, and in which order: functions of the labels and of explicit seeds alone."""

from collections.abc import Iterator

import numpy as np

SPLIT_SEED = 0


def draw_balanced(labels: np.ndarray, per_class: int, *, seed: int) -> np.ndarray:
    """Indices of ``per_class`` samples of every class, ascending.

    The choice is a function of the labels, ``per_class`` and ``seed``; subsets of the same seed are nested.

    Args:
        labels: the class of each sample, (N,).
        per_class: samples wanted of each class.
        seed: of the draw.

    Returns:
        Indices, int64, (classes · per_class,).

    Raises:
        ValueError: a class has fewer samples.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < per_class:
            raise ValueError(f"{per_class} samples of class {label} asked for, there are {len(members)}")
        chosen.append(members[:per_class])
    return np.sort(np.concatenate(chosen))


def hold_out(labels: np.ndarray, *, train_size: int | None, validation_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set into ``(train, validation)`` indices, class-balanced, by the fixed `SPLIT_SEED`.

    The validation samples depend on ``validation_size`` alone. What is not held out is the training set, or
    a subset of ``train_size`` of it.

    Args:
        labels: the class of each sample, (N,).
        train_size: samples to train on; ``None`` for all that are not held out.
        validation_size: samples to hold out.

    Returns:
        Indices to train on and to validate on, ascending.

    Raises:
        ValueError: a size is no multiple of the number of classes, or a class has too few samples.
    """
    validation = _draw_balanced(labels, np.arange(len(labels)), validation_size, "validation_size")
    rest = np.setdiff1d(np.arange(len(labels)), validation)
    if train_size is None:
        return rest, validation
    return _draw_balanced(labels, rest, train_size, "train_size"), validation


def _draw_balanced(labels: np.ndarray, pool: np.ndarray, size: int, name: str) -> np.ndarray:
    classes = len(np.unique(labels))
    if size % classes:
        raise ValueError(f"{name} = {size}: must be a multiple of the number of classes, {classes}")
    try:
        return pool[draw_balanced(labels[pool], size // classes, seed=SPLIT_SEED)]
    except ValueError as error:
        raise ValueError(f"{name} = {size}: {error}") from None


def split_batch_size(size: int, batch_size: int, world_size: int) -> int:
    """Samples of a joint batch that each process gets.

    Args:
        size: samples of an epoch.
        batch_size: samples of a joint batch.
        world_size: processes that train together.

    Returns:
        ``batch_size / world_size``.

    Raises:
        ValueError: ``batch_size`` is no multiple of ``world_size``, or exceeds ``size``.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} cannot be cut into world_size={world_size} equal parts")
    if batch_size > size:
        raise ValueError(f"batch_size={batch_size} exceeds the {size} training samples")
    return batch_size // world_size


def epoch_batches(
    size: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[np.ndarray]:
    """Index batches of one epoch: a permutation drawn from ``(seed, epoch)``, the incomplete batch left out.

    With ``world_size`` > 1 every joint batch is cut into equal consecutive parts; ``rank`` gets its own, so
    that the union over the ranks is what a single process sees.

    Args:
        size: samples of an epoch.
        batch_size: samples of a joint batch.
        seed: of the run.
        epoch: counted from 0.
        rank: of this process.
        world_size: processes that train together.

    Yields:
        Indices, int64, (batch_size / world_size,).

    Raises:
        ValueError: ``batch_size`` is no multiple of ``world_size``, or exceeds ``size``.
    """
    share = split_batch_size(size, batch_size, world_size)
    order = np.random.default_rng([seed, epoch]).permutation(size)
    for start in range(0, size - batch_size + 1, batch_size):
        yield order[start + rank * share : start + (rank + 1) * share]
