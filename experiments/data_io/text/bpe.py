"""From sentences to subwords: Moses tokens (sacremoses), cleaning, byte pair encoding (subword-nmt)."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr

TokenPair = tuple[str, str]
"""A German and an English sentence, tokens separated by blanks."""

MAX_TOKENS, MAX_RATIO = 175, 1.5  # what fairseq's recipe for IWSLT14 gives Moses' clean-corpus-n

_LAST_FULL_STOP = re.compile(r"(?<=\S)\.$")


def tokenise(
    pairs: Iterable[tuple[str, str]], *, lowercase: bool = False, split_last_full_stop: bool = True
) -> list[TokenPair]:
    """Moses tokens of each side, as ``tokenizer.perl`` makes them.

    The Perl script makes the full stop that ends a sentence a token of its own whatever the word before it: "U.S ."
    and "3 .", where sacremoses keeps "U.S." and "3.". Characters of Chinese, Japanese and Korean are letters for the
    script, but not for sacremoses, which sets them apart.

    Args:
        pairs: German and English sentences.
        lowercase: write everything in lower case.
        split_last_full_stop: as the script does it; else as sacremoses does.

    Returns:
        Tokens of the German and the English side of each pair.
    """
    from sacremoses import MosesTokenizer

    class Tokenizer(MosesTokenizer):
        def handles_nonbreaking_prefixes(self, text: str) -> str:
            kept = super().handles_nonbreaking_prefixes(text)
            # Here "..." is still a word without a full stop, so that it stays whole.
            return _LAST_FULL_STOP.sub(" .", kept) if split_last_full_stop else kept

    tokenizers = Tokenizer("de"), Tokenizer("en")
    tokens = (
        tuple(t.tokenize(text, return_str=True) for t, text in zip(tokenizers, pair, strict=True)) for pair in pairs
    )
    return [(de.lower(), en.lower()) if lowercase else (de, en) for de, en in tokens]


def clean(pairs: Sequence[TokenPair]) -> tuple[list[TokenPair], Counter[str]]:
    """Leave out what cannot be a translation, as Moses' ``clean-corpus-n -ratio 1.5 … 1 175`` does.

    Args:
        pairs: tokens of both sides.

    Returns:
        The pairs that are kept, and how many were left out, by reason.
    """
    kept, dropped = [], Counter[str]()
    for pair in pairs:
        lengths = [len(side.split()) for side in pair]
        if not min(lengths):
            dropped["empty"] += 1
        elif max(lengths) > MAX_TOKENS:
            dropped[f"longer than {MAX_TOKENS} tokens"] += 1
        elif max(lengths) > MAX_RATIO * min(lengths):
            dropped[f"one side more than {MAX_RATIO} times as long"] += 1
        else:
            kept.append(pair)
    return kept, dropped


def learn_codes(pairs: Iterable[TokenPair], merges: int) -> str:
    """The merge operations of both languages together, as ``subword-nmt learn-bpe`` writes them.

    Args:
        pairs: tokens of both sides.
        merges: how many operations.

    Returns:
        A text, one operation a line.
    """
    from subword_nmt.learn_bpe import learn_bpe

    codes = io.StringIO()
    text = [f"{side}\n" for pair in pairs for side in pair]
    with redirect_stderr(io.StringIO()):  # a progress bar
        learn_bpe(text, codes, merges)
    return codes.getvalue()


def apply_codes(pairs: Iterable[TokenPair], codes: str) -> list[TokenPair]:
    """Tokens cut into subwords; a piece that goes on ends in ``@@``.

    Args:
        pairs: tokens of both sides.
        codes: from `learn_codes`.

    Returns:
        Subwords of both sides.
    """
    from subword_nmt.apply_bpe import BPE

    bpe = BPE(io.StringIO(codes))
    return [(bpe.process_line(de), bpe.process_line(en)) for de, en in pairs]
