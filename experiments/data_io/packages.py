"""Data that travels in a package of PyPI or Debian: fetched by pip or apt, as archives, never installed."""

import gzip
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

from experiments.data_io.checksum import DataFileError


def pypi_file(requirement: str, member: str, scratch: Path, *, source: bool = False) -> Path:
    """One file out of a PyPI package, e.g. ``pypi_file("qm9pack==1.0.3", "qm9pack/data/qm9_part1.csv", scratch)``.

    An archive that ``scratch`` holds already is not fetched again.

    Args:
        requirement: name and exact version.
        member: the file's path inside the archive; for a source archive without its leading
            ``<name>-<version>/``.
        scratch: an existing folder for the archive and the file.
        source: take the source archive, for a package whose wheel leaves the data out.

    Returns:
        The file, in ``scratch``.

    Raises:
        DataFileError: pip failed, or the archive has no such file.
    """
    archive = _pypi_archive(requirement, scratch, source=source)
    target = scratch / Path(member).name
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                target.write_bytes(opened.read(member))
        else:
            with tarfile.open(archive) as opened:
                found = opened.extractfile(f"{requirement.replace('==', '-')}/{member}")
                target.write_bytes(found.read() if found else b"")
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        archive.unlink()  # whole, but not what it should be: fetch it again
        raise DataFileError(f"{archive}: {member} cannot be read from it: {error}") from None
    return target


def pypi_source(requirement: str, scratch: Path) -> Path:
    """All files of a PyPI package's source archive, e.g. ``pypi_source("django==5.2.8", scratch)``.

    An archive that ``scratch`` holds already is not fetched again.

    Args:
        requirement: name and exact version.
        scratch: an existing folder for the archive and its files.

    Returns:
        The folder that the archive unpacks to.

    Raises:
        DataFileError: pip failed, or the archive cannot be read.
    """
    archive = _pypi_archive(requirement, scratch, source=True)
    try:
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        archive.unlink()  # as in `pypi_file`
        raise DataFileError(f"{archive}: cannot be read: {error}") from None
    return scratch / requirement.replace("==", "-")


def _pypi_archive(requirement: str, scratch: Path, *, source: bool) -> Path:
    stem = requirement.replace("==", "-")
    if not (found := sorted(scratch.glob(f"{stem}[.-]*"))):
        only = ["--no-binary", ":all:"] if source else []
        run_in(scratch, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *only, requirement])
        found = sorted(scratch.glob(f"{stem}[.-]*"))
    return found[0]


def debian_package(name: str, scratch: Path) -> Path:
    """The root of a Debian package's files, fetched and unpacked without root.

    Args:
        name: of the package.
        scratch: an existing folder for the archive and its files.

    Returns:
        The folder that stands for ``/``.

    Raises:
        DataFileError: apt-get or dpkg-deb failed or is not there.
    """
    run_in(scratch, ["apt-get", "download", name])
    package = max(scratch.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime)
    run_in(scratch, ["dpkg-deb", "-x", package.name, name])
    return scratch / name


def run_in(folder: Path, command: list[str]) -> None:
    """Run a command in a folder.

    Args:
        folder: the working directory.
        command: the program and its arguments.

    Raises:
        DataFileError: it failed or is not there; shows the end of what it said.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataFileError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise DataFileError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")
