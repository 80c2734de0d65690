"""Byte-level byte pair encoding, as GPT-2 has it, by Hugging Face's tokenizers: any text can be encoded."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

SEPARATOR = "<|endoftext|>"
"""Stands before each document; in a text it is text."""

LEAST_VOCABULARY = 257
"""The bytes and the separator."""


def learn_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer with at most so many tokens, fewer where the texts have no more to merge.

    Args:
        texts: to learn on.
        vocabulary: at least `LEAST_VOCABULARY`.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text.

    Args:
        tokenizer: from `learn_bpe`.
        texts: any.

    Returns:
        Token numbers.
    """
    return [each.ids for each in tokenizer.encode_batch(list(texts))]
