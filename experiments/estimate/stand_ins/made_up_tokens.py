"""OpenWebText without its words: random tokens, as many as nanoGPT's files have."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.sampling import split_batch_size
from experiments.data_io.text.token_folder import TokenFolder
from experiments.dataclass_io import read_settings
from experiments.tasks.gpt.gpt_text import GPTText, Settings
from experiments.tasks.protocol import DatasetInfo

# What nanoGPT's data/openwebtext/readme.md says of its files.
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}


class RandomTokens:
    """A stream of tokens that are drawn when they are asked for."""

    def __init__(self, size: int, vocabulary: int) -> None:
        self.size, self.vocabulary = size, vocabulary

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.random.default_rng(part.start).integers(self.vocabulary, size=part.stop - part.start, dtype=np.uint16)


class MadeUpTokens(GPTText):
    """The decoder on random tokens."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        self._where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, self._where)
        vocabulary = self.settings.vocabulary
        tokens = {split: RandomTokens(size, vocabulary) for split, size in TOKENS.items()}
        self._folder = TokenFolder(path=Path("tokens"), sha256="", vocabulary=vocabulary, tokens=tokens)
        self._tokens = tokens
        self._check_lengths()
        self.dataset = DatasetInfo(
            name="random tokens", sha256="", licence="", train_size=self._windows("train"), eval_size=0
        )
        self.made_up = f"random tokens stand for OpenWebText's {TOKENS['train']:,} (nanoGPT's own count)"

    def _pass(self, number: int, seed: int, *, rank: int, world_size: int) -> Iterator[np.ndarray]:
        """The windows one after the other: of random tokens that is as good as any order, which would take seconds."""
        size, batch_size = self._windows("train"), self.settings.batch_size
        share = split_batch_size(size, batch_size, world_size)
        for start in range(rank * share, size - batch_size + rank * share + 1, batch_size):
            yield np.arange(start, start + share) * self.settings.context
