"""Made-up German-English text, in the formats that translation data comes in."""

import random

from experiments.data_io.text.parallel_text import Pair

WORDS = {
    "der": "the", "ein": "a", "Hund": "dog", "Baum": "tree", "Mann": "man", "sieht": "sees", "sucht": "seeks",
    "kleine": "small", "grüne": "green", "schnell": "quickly", "heute": "today", "nicht": "not",
}  # fmt: skip


def translations(count, *, seed=0, longest=8):
    """Sentences of random words, translated word by word."""
    generator = random.Random(seed)
    for _ in range(count):
        words = generator.choices(list(WORDS), k=generator.randint(3, longest))
        yield " ".join([*words, "."]), " ".join([*(WORDS[word] for word in words), "."])


def pairs(count, *, seed=0, documents=10):
    return [
        Pair(f"page {number % documents}", de, en) for number, (de, en) in enumerate(translations(count, seed=seed))
    ]
