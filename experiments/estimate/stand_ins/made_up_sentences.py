"""IWSLT14 without its sentences: random tokens in sentences of about the true lengths, batched by fairseq."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.data_io.text.fairseq_library import (
    Dictionary,
    LabelSmoothedCrossEntropyCriterion,
    LanguagePairDataset,
    TranslationConfig,
    TranslationTask,
)
from experiments.dataclass_io import read_settings
from experiments.tasks.protocol import DatasetInfo
from experiments.tasks.transformer.transformer_iwslt14 import Settings, TransformerIWSLT14
from experiments.tasks.transformer.translation import Batches

# What fairseq-preprocess says after fairseq's prepare-iwslt14.sh: pairs, tokens (the ends counted), dictionaries.
PAIRS = 160_239
TOKENS = 4_035_591, 3_949_114
TYPES = 8_848, 6_632
LONGEST = 176
SPREAD, DIFFERENCE = 0.6, 0.2
"""Standard deviations of the logarithms of a sentence's length and of the two sides' ratio; assumed."""


class RandomTokens:
    """Sentences of given lengths whose tokens are drawn when they are asked for."""

    def __init__(self, sizes: np.ndarray, dictionary: Dictionary) -> None:
        self.sizes, self.dictionary = sizes, dictionary

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Tensor:
        tokens = torch.randint(self.dictionary.nspecial, len(self.dictionary), (int(self.sizes[index]),))
        tokens[-1] = self.dictionary.eos()
        return tokens


class MadeUpSentences(TransformerIWSLT14):
    """The Transformer on random tokens."""

    def __init__(self, settings: Mapping[str, Any], *, scale: str) -> None:
        where = f"{self.name}/{scale}, [task]"
        self.settings = read_settings(Settings, settings, where)
        dictionaries = [_dictionary(types) for types in TYPES]
        self._task = TranslationTask(TranslationConfig(), *dictionaries)
        self._criterion = LabelSmoothedCrossEntropyCriterion(
            self._task, sentence_avg=False, label_smoothing=self.settings.label_smoothing
        )
        sides = zip(lengths(PAIRS, TOKENS), dictionaries, strict=True)
        source, target = ((RandomTokens(sizes, own), sizes, own) for sizes, own in sides)
        self._train = Batches(LanguagePairDataset(*source, *target), where, max_tokens=self.settings.max_tokens)
        self.dataset = DatasetInfo(name="random tokens", sha256="", licence="", train_size=PAIRS, eval_size=0)
        self.made_up = (
            f"random tokens stand for IWSLT14's {PAIRS:,} pairs of {TOKENS[0]:,} and {TOKENS[1]:,} tokens, "
            f"dictionaries of {TYPES[0]:,} and {TYPES[1]:,} (fairseq-preprocess's own log); the spread of lengths "
            "is assumed"
        )


def lengths(pairs: int, tokens: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal lengths of both sides of sentence pairs, with about these sums."""
    generator = np.random.default_rng(0)
    source = generator.lognormal(0, SPREAD, pairs)
    sides = source, source * generator.lognormal(0, DIFFERENCE, pairs)
    scaled = (side * total / side.sum() for side, total in zip(sides, tokens, strict=True))
    first, second = (np.clip(np.rint(side), 2, LONGEST).astype(np.int64) for side in scaled)
    return first, second


def _dictionary(types: int) -> Dictionary:
    dictionary = Dictionary()
    for number in range(types - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    return dictionary
