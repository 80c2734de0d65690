"""Criteo's log without the log: tables of the official lengths, rows drawn by Zipf's law."""

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from experiments.dataclass_io import read_settings
from experiments.estimate.stand_ins.criteo_log import CLICKED, INTEGERS, VALUES, zipf
from experiments.tasks.dlrm.clicks import Clicks, Hashed, Vocabulary
from experiments.tasks.dlrm.criteo import OFFICIAL_LINES
from experiments.tasks.dlrm.criteo_format import count_test_lines
from experiments.tasks.dlrm.dlrm_criteo import Batch, DLRMCriteo, Settings
from experiments.tasks.protocol import DatasetInfo

DIFFERENT_BATCHES = 64


class EveryValue:
    """A row for every value and one for the rare ones; see `experiments.tasks.dlrm.clicks.Rows`."""

    def __init__(self) -> None:
        self.sizes = [values + 1 for values in VALUES]

    def to_rows(self, ranks: np.ndarray) -> np.ndarray:
        """Ranks, (B, columns), to rows, int64."""
        return ranks.astype(np.int64) + 1


class MadeUpClicks(DLRMCriteo):
    """The DLRM on made-up clicks."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        self.settings = read_settings(Settings, settings, f"{self.name}/{scale}, [task]")
        size = OFFICIAL_LINES - count_test_lines(OFFICIAL_LINES) - self.settings.validation_size
        self._clicks = _columns_without_lines(size)
        rows = self.settings.hash_rows
        self._rows = EveryValue() if rows is None else Hashed(self._clicks.vocabulary, rows)
        self.dataset = DatasetInfo(name="made-up clicks", sha256="", licence="", train_size=size, eval_size=0)
        self.made_up = (
            f"{DIFFERENT_BATCHES} made-up batches, rows by Zipf's law, stand for the {size:,} training lines of Criteo "
            f"Kaggle, six of seven days of {OFFICIAL_LINES:,} (the challenge's train.txt); its tables have "
            f"{sum(self._rows.sizes):,} rows"
        )

    def train_batches(self, epoch: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """`DIFFERENT_BATCHES` of them, in turn."""
        generator = np.random.default_rng([seed, epoch])
        made = [self._made_batch(generator) for _ in range(DIFFERENT_BATCHES)]
        return islice(cycle(made), self.steps_per_epoch())

    def _made_batch(self, generator: np.random.Generator) -> Batch:
        size = self.settings.batch_size
        ranks = np.stack([zipf(generator, values, size) for values in VALUES], axis=1)
        numbers = np.log1p(generator.lognormal(2, 2, (size, INTEGERS)))
        labels = generator.random(size) < CLICKED
        return (
            torch.from_numpy(numbers.astype(np.float32)),
            torch.from_numpy(self._rows.to_rows(ranks)),
            torch.from_numpy(labels.astype(np.float32)),
        )


def _columns_without_lines(train_size: int) -> Clicks:
    """A log that knows its columns and how long its parts are."""
    empty = np.empty(0, np.uint32)
    offsets = np.concatenate([[0], np.cumsum(VALUES)])
    return Clicks(
        dense=np.empty((0, INTEGERS), np.float32),
        categories=np.empty((0, len(VALUES)), np.int32),
        labels=np.empty(0, np.uint8),
        vocabulary=Vocabulary(values=empty, counts=empty, offsets=offsets),
        parts={"train": (0, train_size), "validation": (train_size, train_size), "test": (train_size, train_size)},
    )
