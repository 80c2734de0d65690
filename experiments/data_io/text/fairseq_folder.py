"""Folders that ``fairseq-preprocess`` makes: writing one out of subword text, and reading one with every fault named.

A folder holds ``dict.<language>.txt`` (a word and its count a line) and for each split and language
``<split>.de-en.<language>.{bin,idx}``, the sentences as numbers of the dictionary and where each begins. One that
was written here also has ``about.json``.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_io.checksum import DataFileError, compute_sha256
from experiments.data_io.source_identity import require_table
from experiments.data_io.text.bpe import TokenPair
from experiments.data_io.text.fairseq_library import (
    NUMBER_KINDS,
    Dictionary,
    MMapIndexedDataset,
    options,
    preprocess,
    restore_logging,
)
from experiments.data_io.text_lines import BYTE_ORDER_MARK, read_lines

LANGUAGES = ("de", "en")
SPLITS = ("train", "valid", "test")
ABOUT = "about.json"

_OVERWRITE = " #fairseq:overwrite"  # at the end of a dictionary's line: the word may be there before


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A whole folder.

    Attributes:
        path: where it is.
        sha256: of the lines that ``sha256sum`` would print for its dictionaries and sentences.
        sizes: number of sentence pairs of each split.
        empty: number of pairs of each split of which a side has no word.
        longest: tokens of the longest sentence of each split, the end counted.
        about: what the one who wrote it says; empty for a folder from elsewhere.
    """

    path: Path
    sha256: str
    sizes: Mapping[str, int]
    empty: Mapping[str, int]
    longest: Mapping[str, int]
    about: Mapping[str, Any] = field(default_factory=dict)


def write_folder(splits: Mapping[str, Sequence[TokenPair]], target: Path, about: Mapping[str, Any], codes: str) -> None:
    """Binarise subword text; the folder appears under its name when it is whole.

    Args:
        splits: the pairs of "train", "valid" and "test".
        target: the folder to make; replaced if it is there.
        about: plain values to keep with it.
        codes: the byte pair encoding that made the subwords.
    """
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "text").mkdir(parents=True)
    for split, pairs in splits.items():
        for language, sentences in zip(LANGUAGES, zip(*pairs, strict=True), strict=True):
            text = "".join(f"{sentence}\n" for sentence in sentences)
            (partial / "text" / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")
    _run_preprocess(partial)
    (partial / "codes").write_text(codes, encoding="utf-8")
    (partial / ABOUT).write_text(json.dumps(dict(about), indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _run_preprocess(folder: Path) -> None:
    """What ``fairseq-preprocess`` does, on the files in ``text``."""
    prefixes = [f"--{split}pref={folder / 'text' / split}" for split in SPLITS]
    languages = [f"--source-lang={LANGUAGES[0]}", f"--target-lang={LANGUAGES[1]}"]
    with restore_logging():
        preprocess.main(options.get_preprocessing_parser().parse_args([*languages, *prefixes, f"--destdir={folder}"]))
    for handler in list(preprocess.logger.handlers):  # it opens a log file each time and leaves it open
        preprocess.logger.removeHandler(handler)
        handler.close()


def read_folder(path: Path, remedy: str) -> Folder:
    """Check a folder from end to end.

    Args:
        path: the folder.
        remedy: what the reader of an error can do about it.

    Returns:
        The folder with the sizes of its splits and dictionaries.

    Raises:
        DataFileError: a file is missing, cut short or not what it should be, a sentence does not begin where the one
            before it ends or has no end, the two languages have not equally many sentences, or a dictionary is not the
            one of the sentences; names file and line or sentence.
    """
    missing = [name for name in _names() if not (path / name).is_file()]
    if missing:
        raise DataFileError(f"{path} is no whole folder of fairseq-preprocess: {', '.join(missing)} missing: {remedy}")
    dictionaries = {language: read_dictionary(path / f"dict.{language}.txt") for language in LANGUAGES}
    read = {split: _read_split(path, split, dictionaries) for split in SPLITS}
    _check_counts(path, dictionaries, {language: read["train"][language] for language in LANGUAGES})
    lengths = {split: [sentences.lengths for sentences in sides.values()] for split, sides in read.items()}
    return Folder(
        path=path,
        sha256=_joint_sha256(path),
        sizes={split: len(sides[0]) for split, sides in lengths.items()},
        empty={split: int((np.minimum(*sides) <= 1).sum()) for split, sides in lengths.items()},
        longest={split: int(np.maximum(*sides).max(initial=0)) for split, sides in lengths.items()},
        about=require_table(path / ABOUT, remedy),
    )


def _names() -> list[str]:
    """The files of a whole folder."""
    sentences = [
        f"{split}.{LANGUAGES[0]}-{LANGUAGES[1]}.{language}.{kind}"
        for split in SPLITS
        for language in LANGUAGES
        for kind in ("bin", "idx")
    ]
    return [*(f"dict.{language}.txt" for language in LANGUAGES), *sentences]


def _joint_sha256(path: Path) -> str:
    lines = "".join(f"{compute_sha256(path / name)}  {name}\n" for name in sorted(_names()))
    return hashlib.sha256(lines.encode()).hexdigest()


# --- one file at a time


@dataclass(frozen=True, kw_only=True)
class _Words:
    """A dictionary file: its words and counts in order, and how many words fairseq puts before them."""

    path: Path
    words: list[str]
    counts: list[int]
    special: int

    def __len__(self) -> int:
        return self.special + len(self.words)


@dataclass(frozen=True, kw_only=True)
class _Sentences:
    """One language of one split: all tokens behind one another, and the length of each sentence."""

    path: Path
    tokens: np.ndarray
    lengths: np.ndarray


def read_dictionary(path: Path) -> _Words:
    """A dictionary file.

    Args:
        path: the file.

    Returns:
        The words, and how often each is in the training text.

    Raises:
        DataFileError: a line is not UTF-8, or not a word and a count; a word is there twice; or the file begins with a
            byte-order mark, which fairseq takes for a letter of the first word.
    """
    special = Dictionary()
    words, counts = [], []
    first = {word: f"one of fairseq's own, {', '.join(special.symbols)}" for word in special.symbols}
    for number, line in enumerate(read_lines(path), 1):
        word, _, rest = line.partition(" ")
        count = rest.removesuffix(_OVERWRITE)
        if not word or not count.isdecimal():
            raise DataFileError(f"{path}, line {number}: must be a word, a blank and its count: {line!r}")
        if number == 1 and word.startswith(BYTE_ORDER_MARK):
            raise DataFileError(f"{path}, line 1: begins with a byte-order mark, must begin with a word: {line!r}")
        if word in first and rest == count:
            raise DataFileError(f"{path}, line {number}: the word {word!r} is {first[word]}; must be there once")
        first.setdefault(word, f"in line {number} already")
        words.append(word)
        counts.append(int(count))
    return _Words(path=path, words=words, counts=counts, special=special.nspecial)


def _read_split(path: Path, split: str, dictionaries: Mapping[str, _Words]) -> dict[str, _Sentences]:
    prefix = f"{split}.{LANGUAGES[0]}-{LANGUAGES[1]}"
    sides = {language: _read_sentences(path / f"{prefix}.{language}", dictionaries[language]) for language in LANGUAGES}
    de, en = (len(side.lengths) for side in sides.values())
    if de != en:
        raise DataFileError(
            f"{path / prefix}: {de:,} German and {en:,} English sentences: "
            f"sentence {min(de, en) + 1} has no counterpart"
        )
    return sides


def _read_sentences(prefix: Path, dictionary: _Words) -> _Sentences:
    """The tokens of ``<prefix>.bin``, checked against ``<prefix>.idx`` and the dictionary."""
    index, data = (prefix.with_name(f"{prefix.name}.{kind}") for kind in ("idx", "bin"))
    if not data.stat().st_size:
        raise DataFileError(f"{data} is empty: the folder was not written to its end")
    lengths, starts, dtype = _read_index(index)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
    if expected != data.stat().st_size:
        raise DataFileError(
            f"{data} has {data.stat().st_size:,} bytes, but {index.name} speaks of {expected:,}: "
            "the folder was not written to its end"
        )
    stops = np.cumsum(lengths, dtype=np.int64)
    _check_starts(index, starts, stops, np.dtype(dtype).itemsize)
    tokens = np.fromfile(data, dtype=dtype)
    beyond = np.flatnonzero((tokens < 0) | (tokens >= len(dictionary)))
    if beyond.size:
        sentence = int(np.searchsorted(stops, beyond[0], side="right")) + 1
        raise DataFileError(
            f"{data}, sentence {sentence}: token {tokens[beyond[0]]}, but {dictionary.path.name} ends at "
            f"{len(dictionary) - 1}: it is the dictionary of another run"
        )
    _check_ends(data, tokens[stops - 1])
    return _Sentences(path=data, tokens=tokens, lengths=lengths)


def _check_starts(path: Path, starts: np.ndarray, stops: np.ndarray, size: int) -> None:
    """Each sentence begins where the one before it ends: fairseq goes by where it begins, the rest here by lengths."""
    right = np.concatenate([[0], stops[:-1]]) * size
    wrong = np.flatnonzero(starts != right)
    if wrong.size:
        k = int(wrong[0])
        raise DataFileError(
            f"{path}, sentence {k + 1}: begins at byte {starts[k]:,}, must begin at {right[k]:,}, where the lengths of "
            "those before it end"
        )


def _check_ends(path: Path, last: np.ndarray) -> None:
    end = Dictionary().eos()
    wrong = np.flatnonzero(last != end)
    if wrong.size:
        k = int(wrong[0])
        raise DataFileError(
            f"{path}, sentence {k + 1}: its last token is {last[k]}, must be {end}, the end of a sentence: "
            "its length is another's, or its end is lost"
        )


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray, type]:
    """Lengths and beginnings of the sentences and kind of number, of which fairseq's own reader checks little.

    The file is a magic word of 9 bytes, a version (int64), a code for the kind of number (one byte), the number of
    sentences (int64), their lengths (int32 each) and where they begin (int64 each).
    """
    raw = path.read_bytes()
    head = MMapIndexedDataset.Index._HDR_MAGIC + struct.pack("<Q", 1)
    dtype = NUMBER_KINDS.get(raw[len(head)]) if raw.startswith(head) and len(raw) > len(head) + 8 else None
    if dtype is None or not np.issubdtype(dtype, np.integer):
        raise DataFileError(f"{path}: cut short, or no index of fairseq's mmap format with tokens that are integers")
    (count,) = struct.unpack_from("<Q", raw, len(head) + 1)
    if len(raw) != len(head) + 9 + count * 12:
        raise DataFileError(f"{path}: cut short: it has {len(raw):,} bytes for {count:,} sentences")
    lengths = np.frombuffer(raw, dtype=np.int32, count=count, offset=len(head) + 9)
    if (short := np.flatnonzero(lengths < 1)).size:
        raise DataFileError(
            f"{path}, sentence {short[0] + 1}: length = {lengths[short[0]]}: must be 1 at least, the end of a sentence"
        )
    starts = np.frombuffer(raw, dtype=np.int64, count=count, offset=len(head) + 9 + count * 4)
    return lengths, starts, dtype


def _check_counts(path: Path, dictionaries: Mapping[str, _Words], train: Mapping[str, _Sentences]) -> None:
    """A dictionary keeps how often each word is in the training text, which tells another run's dictionary."""
    found = {
        language: np.bincount(train[language].tokens, minlength=len(words))[words.special :]
        for language, words in dictionaries.items()
    }
    joined = dictionaries["de"].words == dictionaries["en"].words
    for language, words in dictionaries.items():
        counts = found["de"] + found["en"] if joined else found[language]
        wrong = np.flatnonzero(counts != np.array(words.counts, dtype=np.int64))
        if wrong.size:
            line = int(wrong[0])
            raise DataFileError(
                f"{words.path}, line {line + 1}: {words.words[line]!r} is counted {words.counts[line]:,} times, but "
                f"the training text of {path} has it {counts[line]:,} times: it is the dictionary of another run"
            )
