"""German-English sentence pairs: read with every fault named by file and line, kept as a TSV, split by document."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.data_io.checksum import DataFileError, compute_sha256, verify
from experiments.data_io.text_lines import read_lines


class Pair(NamedTuple):
    """A German sentence and its English counterpart.

    Attributes:
        document: the name of the text they come from; a document is never cut by a split.
        de: the German sentence.
        en: the English sentence.
    """

    document: str
    de: str
    en: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Sentence pairs by what they are for; no document is in two of them."""

    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair]


def prepare_frozen(folder: Path, expected: str, make: Callable[[Path], Iterable[Pair]], *, made_with: str) -> Path:
    """Put the pairs that ``make`` finds into ``<folder>/pairs.tsv``, if they are not there, and return that file.

    Args:
        folder: where.
        expected: SHA-256 of the file.
        make: takes an empty folder for what it fetches, which is removed afterwards, to the pairs.
        made_with: what the file with that checksum was made with, for the error.

    Returns:
        ``<folder>/pairs.tsv``.

    Raises:
        DataFileError: the pairs cannot be had, or are others.
    """
    target = folder / "pairs.tsv"
    if target.is_file() and compute_sha256(target) == expected:
        return target
    scratch = folder / ".download"
    scratch.mkdir(parents=True, exist_ok=True)
    write_tsv(make(scratch), target)
    verify(target, expected, remedy=f"the source is of another version than {made_with}, which this was made with")
    shutil.rmtree(scratch)
    return target


def load_frozen(folder: Path, expected: str, *, remedy: str) -> list[Pair]:
    """The pairs that `prepare_frozen` left, in the order of the file.

    Args:
        folder: from `prepare_frozen`.
        expected: SHA-256 of the file.
        remedy: what the reader of an error can do about it.

    Returns:
        The pairs with their documents.

    Raises:
        DataFileError: the file is missing or not the expected one.
    """
    path = folder / "pairs.tsv"
    verify(path, expected, remedy=remedy)
    return read_tsv(path)


def write_tsv(pairs: Iterable[Pair], path: Path) -> None:
    """Write ``document<tab>German<tab>English`` lines; the file appears under its name when it is whole."""
    partial = path.with_name(path.name + ".part")
    partial.write_text("".join("\t".join(pair) + "\n" for pair in pairs), encoding="utf-8", newline="\n")
    partial.replace(path)


def read_tsv(path: Path) -> list[Pair]:
    """The pairs of a file that `write_tsv` wrote.

    Args:
        path: the file.

    Returns:
        The pairs with their documents.

    Raises:
        DataFileError: the file is missing or not UTF-8, or a line has not three parts, none of them empty.
    """
    return [parse_tsv_line(line, f"{path}, line {number}") for number, line in enumerate(read_lines(path), 1)]


def parse_tsv_line(line: str, where: str) -> Pair:
    """A pair out of a line of `write_tsv`.

    Args:
        line: without its line feed.
        where: file and line, for the error.

    Returns:
        The pair with its document.

    Raises:
        DataFileError: the line has not three parts, none of them empty.
    """
    parts = line.split("\t")
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise DataFileError(f"{where}: must be document, German and English, separated by tabs, none empty: {line!r}")
    return Pair(*parts)


def drop_repeats(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs of which neither side came before, letters alone compared: texts repeat, with other numbers.

    Args:
        pairs: in the order in which the first is kept.

    Returns:
        The pairs that are left, in order.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for pair in pairs:
        keys = {("de", _letters(pair.de)), ("en", _letters(pair.en))}
        if not keys & seen:
            kept.append(pair)
        seen |= keys
    return kept


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalpha())


def split_by_document(pairs: Sequence[Pair], *, train_size: int | None, validation_size: int, test_size: int) -> Splits:
    """Cut a collection into three, no document in two of them.

    Documents are taken in the order of their names' SHA-256: first for the test split until it is full, then
    for validation, then for training. What a document has beyond a split's size is left out.

    Args:
        pairs: in any order.
        train_size: pairs to train on, ``None`` for all that are left.
        validation_size: pairs of the validation split.
        test_size: pairs of the test split.

    Returns:
        The three splits.

    Raises:
        ValueError: there are too few pairs.
    """
    order = sorted(pairs, key=lambda pair: (hashlib.sha256(pair.document.encode()).digest(), pair.document))
    test, rest = _take(order, test_size, "test_size")
    valid, rest = _take(rest, validation_size, "validation_size")
    train, _ = (rest, []) if train_size is None else _take(rest, train_size, "train_size")
    if not train:
        raise ValueError(f"train_size = {train_size}: no pair is left to train on out of {len(pairs):,}")
    return Splits(train=train, valid=valid, test=test)


def _take(pairs: Sequence[Pair], size: int, name: str) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """The first ``size`` pairs, and the pairs of the documents that none of these comes from."""
    if size > len(pairs):
        raise ValueError(f"{name} = {size}: there are only {len(pairs):,} pairs left")
    taken = pairs[:size]
    used = {pair.document for pair in taken}
    return taken, [pair for pair in pairs[size:] if pair.document not in used]
