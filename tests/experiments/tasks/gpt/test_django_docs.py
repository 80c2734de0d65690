"""The pages in the layout of the source archive, and the embedded sample."""

import io
import tarfile

import pytest

from experiments.data_io.checksum import DataFileError
from experiments.data_io.text.documents import Document, count_bytes
from experiments.tasks.gpt import django_docs

PAGES = {
    "index.txt": "Django\n",
    "topics/db.txt": "Databases: ü\n",
    "releases/5.2.txt": "Notes\n",
    "conf.py": "x = 1\n",
}


@pytest.fixture
def archive(tmp_path):
    """A data folder into which pip would have put an archive with these pages."""
    scratch = tmp_path / "django-docs" / ".download"
    scratch.mkdir(parents=True)
    with tarfile.open(scratch / "django-5.2.8.tar.gz", "w:gz") as opened:
        for name, text in PAGES.items():
            entry = tarfile.TarInfo(f"django-5.2.8/docs/{name}")
            entry.size = len(text.encode())
            opened.addfile(entry, io.BytesIO(text.encode()))
    return tmp_path


def test_preparing_freezes_all_pages_but_the_release_notes(archive, monkeypatch):
    with pytest.raises(DataFileError, match=r"django==5\.2\.8 holds other pages"):
        django_docs.prepare(archive)
    made = archive / "django-docs" / "documents.jsonl"
    monkeypatch.setattr(django_docs, "SHA256", django_docs.compute_sha256(made))
    made.write_text("damaged")
    assert django_docs.prepare(archive) == made
    expected = [Document("index.txt", "Django\n"), Document("topics/db.txt", "Databases: ü\n")]
    assert django_docs.load(archive) == expected
    assert [path.name for path in made.parent.iterdir()] == ["documents.jsonl"]
    monkeypatch.setattr(django_docs, "pypi_source", None)
    assert django_docs.prepare(archive) == made  # it is there: nothing is fetched


def test_an_archive_that_was_cut_is_removed_so_that_it_is_fetched_again(archive):
    (found,) = (archive / "django-docs" / ".download").iterdir()
    found.write_bytes(found.read_bytes()[:40])
    with pytest.raises(DataFileError, match="cannot be read"):
        django_docs.prepare(archive)
    assert not found.exists()


def test_missing_pages_are_named_with_what_fetches_them(tmp_path):
    with pytest.raises(DataFileError, match="make data-django-docs"):
        django_docs.load(tmp_path)


def test_the_embedded_sample_is_whole():
    pages = django_docs.load_embedded()
    assert count_bytes(pages) >= django_docs.EMBEDDED_BYTES
    assert len({page.name for page in pages}) == len(pages) == 34


def test_the_sample_is_whole_pages_and_makes_the_same_file_again(tmp_path, monkeypatch):
    pages = [Document(f"page {number}", f"{number} ü\n" * 50) for number in range(9)]
    monkeypatch.setattr(django_docs, "load", lambda _: pages)
    monkeypatch.setattr(django_docs, "EMBEDDED_BYTES", 600)
    drawn = django_docs.draw_embedded(tmp_path)
    assert set(drawn) < set(pages)
    assert drawn == sorted(drawn)
    assert 600 <= count_bytes(drawn) < 600 + count_bytes(pages[:1])
    digests = {django_docs.write_embedded(drawn, tmp_path / name) for name in ("a", "b")}
    monkeypatch.setattr(django_docs, "EMBEDDED", tmp_path / "a")
    monkeypatch.setattr(django_docs, "EMBEDDED_SHA256", *digests)
    assert django_docs.load_embedded() == drawn
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes()[:-1])
    with pytest.raises(DataFileError, match="restore it from version control"):
        django_docs.load_embedded()
