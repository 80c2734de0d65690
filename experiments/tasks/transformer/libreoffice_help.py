"""The help pages of LibreOffice 7.4 in German and English: sentence pairs that any machine with apt can have.

The pages come from the Debian packages ``libreoffice-help-de`` and ``libreoffice-help-en-us``: two trees of
HTML files of the same names, whose headings and paragraphs carry the same element ids. Paragraphs of one id
are split into sentences and paired where both have equally many. What is kept is in `_is_prose`. Much of the
text is repeated from page to page, with other numbers, so that a sentence is taken once.

The pairs are in ``<data_dir>/libreoffice-help/pairs.tsv``, frozen by checksum. A sample of them is kept in the
repository for the tiny scale.

Licence: Mozilla Public License 2.0, copyright LibreOffice contributors.
"""

import hashlib
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data_io.checksum import DataFileError, compute_sha256, verify
from experiments.data_io.packages import debian_package
from experiments.data_io.text.parallel_text import Pair, drop_repeats, load_frozen, parse_tsv_line, prepare_frozen

NAME = "libreoffice-help"
LICENCE = "MPL-2.0"
PACKAGES = {"de": ("libreoffice-help-de", "de"), "en": ("libreoffice-help-en-us", "en-US")}
TREE = Path("usr/share/libreoffice/help")
SHA256 = "8a898330c4742953571fae67ebbbbb3a8d72a791b23a903275b74fbf1a2f7a0d"

EMBEDDED = Path(__file__).parent / "embedded" / "libreoffice_help.tsv.xz"
EMBEDDED_SHA256 = "68fd63b1b8a58b0fa256d1419693076162efb9ac572e53081ab8b2f8244b0686"
EMBEDDED_PAIRS = 4000

REMEDY = "run `make data-libreoffice-help`"

_PARAGRAPHS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ„“\"])")
_WORDS = range(4, 81)
_LENGTH_RATIO = 2.5


def prepare(data_dir: Path) -> Path:
    """Put the frozen pairs into ``<data_dir>/libreoffice-help/pairs.tsv`` and return that file.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The file.

    Raises:
        DataFileError: the packages cannot be had, or are of another version with other text.
    """
    return prepare_frozen(data_dir / NAME, SHA256, _fetch, made_with="version 4:7.4.7 of the packages")


def _fetch(scratch: Path) -> list[Pair]:
    roots = {
        language: debian_package(package, scratch) / TREE / folder / "text"
        for language, (package, folder) in PACKAGES.items()
    }
    return read_pairs(roots["de"], roots["en"])


def load(data_dir: Path) -> list[Pair]:
    """All pairs, in the order of pages and paragraphs.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The pairs.

    Raises:
        DataFileError: the file is missing or not the one that `prepare` makes.
    """
    return load_frozen(data_dir / NAME, SHA256, remedy=REMEDY)


def read_pairs(german: Path, english: Path) -> list[Pair]:
    """The sentence pairs of two trees of pages.

    Args:
        german: the root of the German pages.
        english: the root of the English pages.

    Returns:
        The pairs, each sentence once.

    Raises:
        DataFileError: there is no page that both have.
    """
    pages = sorted(path.relative_to(german) for path in german.rglob("*.html"))
    both = [page for page in pages if (english / page).is_file()]
    if not both:
        raise DataFileError(f"{german} and {english} have no page in common")
    pairs = (pair for page in both for pair in _page_pairs(page, german / page, english / page))
    return drop_repeats(pairs)


def _page_pairs(page: Path, german: Path, english: Path) -> Iterator[Pair]:
    theirs = _paragraphs(english)
    for key, paragraph in _paragraphs(german).items():
        de, en = (_SENTENCE_END.split(text) for text in (paragraph, theirs.get(key, "")))
        if len(de) == len(en):
            yield from (Pair(page.as_posix(), *pair) for pair in zip(de, en, strict=True) if _is_prose(*pair))


def _is_prose(de: str, en: str) -> bool:
    """Whether two sentences are whole sentences of about one length, translated, and not code or a caption."""
    lengths = len(de.split()), len(en.split())
    return (
        all(length in _WORDS for length in lengths)
        and max(lengths) <= _LENGTH_RATIO * min(lengths)
        and de != en
        and de[-1] in ".!?:"
        and en[-1] in ".!?:"
    )


def _paragraphs(page: Path) -> dict[str, str]:
    """The text of each heading and paragraph by its element id, blanks collapsed."""
    from lxml import html  # needed only where pages are read

    tree = html.fromstring(page.read_bytes(), parser=html.HTMLParser(encoding="utf-8"))
    return {
        element.get("id"): " ".join("".join(_visible(element)).split())
        for element in tree.iter(*_PARAGRAPHS)
        if element.get("id")
    }


def _visible(element: Any) -> Iterator[str]:
    """The text in an element; of the variants for several systems, which are hidden, the default one."""
    if isinstance(element.tag, str) and element.text:  # a comment's tag is a function
        yield element.text
    for child in element:
        if not child.get("hidden") or child.get("id", "").startswith("default"):
            yield from _visible(child)
        if child.tail:
            yield child.tail


# --- the embedded sample


def load_embedded() -> list[Pair]:
    """The sample that the repository carries.

    Returns:
        The pairs.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    verify(EMBEDDED, EMBEDDED_SHA256, remedy="restore it from version control")
    lines = lzma.decompress(EMBEDDED.read_bytes()).decode("utf-8").splitlines()
    return [parse_tsv_line(line, f"{EMBEDDED}, line {number}") for number, line in enumerate(lines, 1)]


def draw_embedded(data_dir: Path) -> list[Pair]:
    """Whole pages in the order of their names' SHA-256, until there are `EMBEDDED_PAIRS`; pairs in page order.

    Args:
        data_dir: has all pairs.

    Returns:
        The sample.
    """
    pairs = load(data_dir)
    pages = sorted({pair.document for pair in pairs}, key=lambda page: hashlib.sha256(page.encode()).digest())
    sizes = {page: sum(pair.document == page for pair in pairs) for page in pages}
    chosen, total = set(), 0
    for page in pages:
        if total >= EMBEDDED_PAIRS:
            break
        chosen.add(page)
        total += sizes[page]
    return [pair for pair in pairs if pair.document in chosen]


def write_embedded(pairs: list[Pair], target: Path) -> str:
    """Write the sample as a compressed TSV and return its SHA-256."""
    text = "".join("\t".join(pair) + "\n" for pair in pairs)
    target.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    return compute_sha256(target)
