"""Click logs as columns: dense numbers, categories, labels, in memory or mapped from files.

A category is stored as its rank: 0 is the value that the training part holds most often. What a table's row is for
a rank is chosen afterwards, so that one prepared folder serves every choice:

- `Frequent`: ranks whose value the training part holds at least ``min_count`` times have rows 1, 2, …; all others
  share row 0;
- `Hashed`: the value's number modulo a number of rows, as the DLRM's ``max_ind_range`` has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The values of every column in the order of their ranks.

    Attributes:
        values: uint32, all columns one after the other.
        counts: uint32, how often the training part holds each value; falling within a column.
        offsets: int64, (columns + 1,): column j is ``[offsets[j], offsets[j + 1])`` of both.
    """

    values: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    def sizes(self) -> np.ndarray:
        """Number of values of each column."""
        return np.diff(self.offsets)

    def column(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and counts of column j."""
        part = slice(self.offsets[j], self.offsets[j + 1])
        return self.values[part], self.counts[part]


class Rows(Protocol):
    """Which row of its table a category has.

    Attributes:
        sizes: rows of each table.
    """

    sizes: list[int]

    def to_rows(self, ranks: np.ndarray) -> np.ndarray:
        """Ranks, (B, columns), to rows, int64."""
        ...


class Frequent:
    """A row for each value that the training part holds ``min_count`` times or more, row 0 for all others.

    With ``min_count=0`` the values that only the test part holds have rows too, which no step ever moves.
    """

    def __init__(self, vocabulary: Vocabulary, min_count: int) -> None:
        columns = (vocabulary.column(j)[1] for j in range(len(vocabulary.offsets) - 1))
        # Counts fall within a column, so that the negated ones are sorted.
        kept = [int(np.searchsorted(-counts.astype(np.int64), -min_count, side="right")) for counts in columns]
        self.kept = np.array(kept)
        self.sizes = [each + 1 for each in kept]

    def to_rows(self, ranks: np.ndarray) -> np.ndarray:
        """See `Rows`."""
        return np.where(ranks < self.kept, ranks.astype(np.int64) + 1, 0)


class Hashed:
    """Row = number of the value mod ``rows``, in a table of min(values of the column, ``rows``) rows.

    This is the rule of the DLRM's data set for ``max_ind_range``. There values are numbered as they first come in the
    log, here by falling count; so in a column of more values than ``rows``, other values share a row, but as many. The
    DLRM's reader of the text, if it is given ``max_ind_range`` as well, numbers the remainders of the hexadecimal
    numbers instead, which makes the tables shorter still.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        self.rows = rows
        self.sizes = np.minimum(vocabulary.sizes(), rows).tolist()

    def to_rows(self, ranks: np.ndarray) -> np.ndarray:
        """See `Rows`."""
        return ranks.astype(np.int64) % self.rows


@dataclass(frozen=True, kw_only=True)
class Clicks:
    """A click log; its rows are in the order of time, part after part.

    Attributes:
        dense: float32, (N, numbers), as the model takes them.
        categories: int32, (N, columns): ranks.
        labels: uint8, (N,), 0 or 1.
        vocabulary: what the ranks stand for.
        parts: rows ``[start, stop)`` of each part.
    """

    dense: np.ndarray
    categories: np.ndarray
    labels: np.ndarray
    vocabulary: Vocabulary
    parts: Mapping[Part, tuple[int, int]]

    def __post_init__(self) -> None:
        lengths = {len(self.dense), len(self.categories), len(self.labels)}
        if len(lengths) > 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        if self.categories.shape[1] != len(self.vocabulary.offsets) - 1:
            raise ValueError(
                f"{self.categories.shape[1]} columns of categories, "
                f"but a vocabulary of {len(self.vocabulary.offsets) - 1}"
            )


def rank_categories(columns: np.ndarray, train: slice) -> tuple[np.ndarray, Vocabulary]:
    """Categories to ranks, for a log that fits in memory.

    Args:
        columns: unsigned values below 2³², (N, columns).
        train: the rows that are counted.

    Returns:
        Ranks, int32, (N, columns), and the vocabulary.
    """
    made = [_rank_column(column, train) for column in columns.T]
    ranks, values, counts = zip(*made, strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in values])])
    vocabulary = Vocabulary(values=np.concatenate(values), counts=np.concatenate(counts), offsets=offsets)
    return np.stack(ranks, axis=1), vocabulary


def _rank_column(column: np.ndarray, train: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, positions = np.unique(column, return_inverse=True)
    counts = np.bincount(positions[train], minlength=len(values))
    order = order_by_frequency(counts)
    return invert_order(order)[positions], values[order].astype(np.uint32), counts[order].astype(np.uint32)


def order_by_frequency(counts: np.ndarray) -> np.ndarray:
    """Positions by falling count; what ties stays in order, so that the ranks depend on the data alone.

    Args:
        counts: (n,).

    Returns:
        Positions, (n,).
    """
    return np.argsort(-counts.astype(np.int64), kind="stable")


def invert_order(order: np.ndarray) -> np.ndarray:
    """The inverse of a permutation, int32.

    Args:
        order: a permutation of 0 to n − 1, (n,).

    Returns:
        (n,).
    """
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return ranks
