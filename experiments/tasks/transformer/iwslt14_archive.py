"""From the official archive of IWSLT14 German-English to a folder as ``fairseq-preprocess`` makes it.

``python -m experiments.tasks.transformer.iwslt14_archive RAW`` leaves ``<data_dir>/iwslt14``. ``RAW`` is
``de-en.tgz`` of the 2014 evaluation campaign, or the folder it unpacks to, whose files `iwslt14_files` reads; or a
folder that ``fairseq-preprocess`` made, which is taken as it is.

What is made of the archive is what fairseq's recipe makes: Moses tokens in lower case; training pairs of 1 to 175
tokens whose lengths differ by a factor of at most 1.5, every 23rd of them for validation; all five dev and test
sets together for testing; 10,000 joint merges of byte pair encoding.
"""

import argparse
import lzma
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.bpe import TokenPair, clean, tokenise
from experiments.data_io.text.fairseq_folder import Folder, read_folder
from experiments.data_io.text.text_corpus import subword_folder
from experiments.errors import UserError
from experiments.tasks.transformer.iwslt14 import NAME, load, name_folder
from experiments.tasks.transformer.iwslt14_files import evaluation_pairs, training_pairs

MERGES = 10_000
EVAL_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")

_VALIDATION_EVERY = 23


def convert(raw: Path, data_dir: Path, *, merges: int = MERGES) -> Folder:
    """Put ``<data_dir>/iwslt14`` together.

    Args:
        raw: the official archive, the folder it unpacks to, or a folder that ``fairseq-preprocess`` made, which
            is copied as it is.
        data_dir: where the datasets are kept.
        merges: operations of the byte pair encoding.

    Returns:
        ``<data_dir>/iwslt14``, checked.

    Raises:
        DataFileError: ``raw`` is none of these, or a file of it is missing or damaged.
    """
    target = data_dir / NAME
    data_dir.mkdir(parents=True, exist_ok=True)
    if (raw / "dict.de.txt").is_file():
        read_folder(raw, "make it again with fairseq-preprocess")
        _copy(raw, target)
    else:
        with _unpack(raw) as folder:
            splits, dropped = read_official(folder)
        subword_folder(splits, merges, target, {"source": NAME, "left out of train and valid": dropped})
    return load(data_dir)


def _copy(source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        return
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


@contextmanager
def _unpack(raw: Path) -> Iterator[Path]:
    """The folder with the training files, unpacked for as long as it is needed."""
    if raw.is_dir():
        yield _inner(raw)
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(raw) as archive:
                _check_to_its_end(archive)
                archive.extractall(scratch, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())
            raise DataFileError(f"{raw}: neither a folder nor a tar archive that can be read: {reason}") from None
        try:
            yield _inner(Path(scratch))
        except DataFileError as error:  # names files that are gone by the time that it is read
            raise DataFileError(str(error).replace(scratch, str(raw))) from None


def _check_to_its_end(archive: tarfile.TarFile) -> None:
    """Read all of an archive, for the checksum that gzip has at its end, and see that its list of files has an end.

    `tarfile` stops where a file's header is damaged as if there were no more, and never reads the checksum.
    """
    archive.getmembers()
    stream = archive.fileobj
    stream.seek(archive.offset)
    ended = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    while stream.read(2**20):
        pass
    if not ended:
        raise tarfile.ReadError(f"it is cut short or damaged at byte {archive.offset:,} of what it unpacks to")


def _inner(folder: Path) -> Path:
    found = sorted(folder.rglob("train.tags.de-en.de"))
    if not found:
        raise DataFileError(
            f"{folder} holds neither train.tags.de-en.de, as the official archive does, nor dict.de.txt"
        )
    if len(found) > 1:
        raise DataFileError(f"{folder} must hold train.tags.de-en.de once, has {' and '.join(map(str, found))}")
    return found[0].parent


def read_official(folder: Path) -> tuple[dict[str, list[TokenPair]], dict[str, int]]:
    """The tokens of the three splits, and how many training pairs were left out by reason.

    Args:
        folder: that the archive unpacks to.

    Returns:
        Tokens by split, and counts by reason.

    Raises:
        DataFileError: a file is missing or not as it should be; see `training_pairs` and `evaluation_pairs`.
    """
    pairs, dropped = clean(tokenise(training_pairs(folder), lowercase=True))
    numbered = list(enumerate(pairs, 1))
    test = [pair for name in EVAL_SETS for pair in evaluation_pairs(folder, name)]
    return {
        "train": [pair for number, pair in numbered if number % _VALIDATION_EVERY],
        "valid": [pair for number, pair in numbered if not number % _VALIDATION_EVERY],
        "test": tokenise(test, lowercase=True),
    }, dict(dropped)


def main() -> None:
    """Make the folder and say what is in it; what a user can fix is one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tasks.transformer.iwslt14_archive", description=main.__doc__
    )
    parser.add_argument("raw", type=Path, help="de-en.tgz, the folder it unpacks to, or one of fairseq-preprocess")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the datasets are kept")
    arguments = parser.parse_args()
    try:
        folder = convert(arguments.raw, arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sizes = ", ".join(f"{count:,} {split}" for split, count in folder.sizes.items())
    print(f"{folder.path}: {name_folder(folder)}: {sizes} pairs; {folder.about or 'taken as it was'}")


if __name__ == "__main__":
    main()
