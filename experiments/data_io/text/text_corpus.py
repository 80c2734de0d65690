"""From sentence pairs to a folder as ``fairseq-preprocess`` makes it: split, tokenised, cleaned, cut into subwords.

The folder is made once and kept under a name that depends on everything that went into it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.bpe import TokenPair, apply_codes, clean, learn_codes, tokenise
from experiments.data_io.text.fairseq_folder import SPLITS, Folder, read_folder, write_folder
from experiments.data_io.text.parallel_text import Pair, split_by_document

_MADE_BY = ("sacremoses", "subword-nmt", "fairseq-fixed")


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What becomes of a collection of sentence pairs.

    Attributes:
        merges: operations of the joint byte pair encoding, learned on the training split.
        train_size: pairs to train on before cleaning; ``None`` for all that are left.
        validation_size: pairs of the validation split.
        test_size: pairs of the test split.
        lowercase: write everything in lower case.
    """

    merges: int
    validation_size: int
    test_size: int
    train_size: int | None = None
    lowercase: bool = False

    def __post_init__(self) -> None:
        for name in ("merges", "validation_size", "test_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(f"train_size = {self.train_size}: must be at least 1, or left out for all pairs")


def corpus_folder(pairs: Sequence[Pair], settings: CorpusSettings, parent: Path) -> Folder:
    """The folder of these pairs under these settings, made if it is not there.

    Args:
        pairs: the whole collection.
        settings: see `CorpusSettings`.
        parent: the folder is made in it.

    Returns:
        The folder, checked.

    Raises:
        ValueError: there are too few pairs for the sizes asked for.
        DataFileError: the folder is there and damaged.
    """
    folder = parent / f"fairseq-{_digest(pairs, settings)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # runs side by side: one makes it, the others wait
        if not folder.is_dir():
            _make(pairs, settings, folder)
    return read_folder(folder, remedy="delete it, and it is made again")


def _make(pairs: Sequence[Pair], settings: CorpusSettings, folder: Path) -> None:
    splits = split_by_document(
        pairs,
        train_size=settings.train_size,
        validation_size=settings.validation_size,
        test_size=settings.test_size,
    )
    sides = {name: [pair[1:] for pair in getattr(splits, name)] for name in SPLITS}
    # Not as Moses' own script ends a sentence: the checksums of recorded runs are of folders made in this way.
    tokens = {
        name: tokenise(part, lowercase=settings.lowercase, split_last_full_stop=False) for name, part in sides.items()
    }
    subword_folder(tokens, settings.merges, folder, {"settings": asdict(settings)})


def subword_folder(
    tokens: Mapping[str, Sequence[TokenPair]], merges: int, target: Path, about: Mapping[str, object]
) -> None:
    """Clean, learn the subwords on the training split, cut every split and write the folder.

    The test split is not cleaned, since every sentence of it counts; but an empty one is left out.

    Args:
        tokens: tokens of each split.
        merges: operations of the joint byte pair encoding.
        target: the folder to write.
        about: plain values to keep with it, besides how many pairs were left out and why.

    Raises:
        DataFileError: a split has no pair left.
    """
    kept, dropped = {}, {}
    for name, pairs in tokens.items():
        if name == "test":
            kept[name] = [pair for pair in pairs if all(side.strip() for side in pair)]
            dropped[name] = {"empty": len(pairs) - len(kept[name])}
        else:
            kept[name], reasons = clean(pairs)
            dropped[name] = dict(reasons)
        if not kept[name]:
            raise DataFileError(f"{target}: no sentence pair is left for the {name} split: {dropped[name]}")
    codes = learn_codes(kept["train"], merges)
    subwords = {name: apply_codes(pairs, codes) for name, pairs in kept.items()}
    write_folder(subwords, target, {**about, "left out": dropped}, codes)


def _digest(pairs: Sequence[Pair], settings: CorpusSettings) -> str:
    """Of the pairs, the settings and the versions of what makes the folder."""
    made_by = {package: version(package) for package in _MADE_BY}
    digest = hashlib.sha256(json.dumps([asdict(settings), made_by], sort_keys=True).encode())
    for pair in pairs:
        digest.update("\t".join(pair).encode())
    return digest.hexdigest()
