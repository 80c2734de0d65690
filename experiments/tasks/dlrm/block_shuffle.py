"""The order of batches for logs too long to be permuted as a whole, or to be read at random places of a disk."""

from collections.abc import Iterator

import numpy as np

from experiments.data_io.sampling import split_batch_size

BLOCK = 8_192
WINDOW = 128


def block_batches(
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    block: int = BLOCK,
    window: int = WINDOW,
) -> Iterator[np.ndarray]:
    """Index batches of one pass, the incomplete batch left out.

    Blocks of ``block`` neighbouring rows come in a random order, ``window`` of them at a time, and the rows of a
    window are permuted. Up to ``block · window`` rows (1,048,576 by default) that is a permutation of all rows,
    uniformly drawn; beyond, rows of one window stay together, and that many rows (157 MiB of Criteo's) are all
    that has to be in memory at a time. A function of ``(seed, epoch)`` alone.

    With ``world_size`` > 1 every joint batch is cut into equal consecutive parts; ``rank`` gets its own.

    Args:
        size: rows.
        batch_size: rows of a joint batch.
        seed: of the run.
        epoch: counted from 0.
        rank: of this process.
        world_size: processes that train together.
        block: neighbouring rows that are read together.
        window: blocks whose rows are permuted together.

    Yields:
        Indices, int64, (batch_size / world_size,).

    Raises:
        ValueError: ``batch_size`` is no multiple of ``world_size``, or exceeds ``size``.
    """
    share = split_batch_size(size, batch_size, world_size)
    left = np.empty(0, np.int64)
    for rows in _windows(size, block, window, np.random.default_rng([seed, epoch])):
        rows = np.concatenate([left, rows])
        whole = len(rows) - len(rows) % batch_size
        for start in range(0, whole, batch_size):
            yield rows[start + rank * share : start + (rank + 1) * share]
        left = rows[whole:]


def _windows(size: int, block: int, window: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    blocks = generator.permutation(-(-size // block))
    for first in range(0, len(blocks), window):
        rows = (blocks[first : first + window, None] * block + np.arange(block)).ravel()
        yield generator.permutation(rows[rows < size])
