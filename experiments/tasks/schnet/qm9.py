"""QM9: small organic molecules of H, C, N, O, F with their energy U0 at 0 K.

130,831 molecules travel in the PyPI package ``qm9pack``: the published 133,885 without those 3,054 that failed
the authors' consistency check. The published ``.xyz`` files and the database that schnetpack makes of them
are read too, if the user puts them in place. All three give the same arrays. Where nothing says which the 3,054 are,
more than 130,831 are refused, since some of the 3,054 must be among them: schnetpack's `QM9` writes all 133,885 unless
it is made with ``remove_uncharacterized=True``.

Source: Ramakrishnan, Dral, Rupp, von Lilienfeld, "Quantum chemistry structures and properties of 134 kilo
molecules", Scientific Data 1, 140022 (2014). The package is under the MIT licence, copyright 2024 Raghu.
"""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import track

from experiments.data_io.atoms.ase_database import count_rows, database_files, read_ase_database
from experiments.data_io.atoms.structure_cache import (
    StructureSet,
    open_sample,
    open_structures,
    prepare_structures,
    write_sample,
)
from experiments.data_io.atoms.structure_splits import one_a_group
from experiments.data_io.atoms.structures import READERS, Entry, Structures, collect
from experiments.data_io.checksum import DataFileError, verify
from experiments.data_io.packages import pypi_file
from experiments.data_io.source_identity import Identity, identify_jointly
from experiments.tasks.schnet.qm9_xyz import (
    HARTREE,
    NUMBERS,
    PUBLISHED,
    molecule_number,
    read_uncharacterized,
    read_xyz,
    xyz_files,
)

Source = Literal["package", "database", "xyz"]

PACKAGE = "qm9pack==1.0.3"
SHA256 = {
    "qm9_part1.csv": "19f0a5d595462d52cd82eef3370f3e9eb55a1f52cb14985657200349568deff3",
    "qm9_part2.csv": "2bca113fdc0b28a13563c80ed9b240e934f3da6c64c64fe74ddb4f0f36036e61",
    "qm9_part3.csv": "9c5efb5733d2af149db8d95d36ff198b4ffed12d9f7b344220a1e5877d5c6a43",
}
LICENCE = "MIT (package qm9pack)"
DATABASE, DATABASE_TARGET = "qm9.db", "energy_U0"
XYZ_FOLDER, UNCHARACTERIZED = "xyz-files", "uncharacterized.txt"

CHARACTERIZED = 130_831
"""Molecules of `PUBLISHED` that passed the authors' consistency check."""

ATOM_ENERGIES = {1: -0.500273, 6: -37.846772, 7: -54.583861, 8: -75.064579, 9: -99.718730}
"""U0 of the free atoms in hartree, published with the data set."""

EMBEDDED = Path(__file__).parent / "embedded" / "qm9.npz"
EMBEDDED_SHA256 = "91fe6d24a8f6ebe50bbe0bcd538e39d146efaeb50bf2f9764bd00c54346f56b5"
EMBEDDED_SIZE = 4000

REMEDY = "run `make data-qm9`"


def prepare(data_dir: Path, source: Source = "package") -> Path:
    """Parse a source into ``data_dir/qm9/<source>`` and return that folder.

    What is there and whole is kept. The package is fetched if need be; the other sources are
    ``data_dir/qm9/qm9.db`` and ``data_dir/qm9/xyz-files/*.xyz``.

    Args:
        data_dir: where the datasets are kept.
        source: which of the three.

    Returns:
        The folder.

    Raises:
        DataFileError: the source is missing, damaged, changed while it is read, holds an entry that cannot be used,
            or the molecules that failed the consistency check.
    """
    root = data_dir / "qm9"
    read = {"package": _read_package, "database": _read_database, "xyz": _read_xyz_folder}[source]
    return prepare_structures(
        root / source,
        _description(root, source),
        lambda: read(root),
        one_a_group,
        remedy=REMEDY,
        source=None if source == "package" else lambda: _identity(root, source),
    )


def load(data_dir: Path, source: Source = "package") -> StructureSet:
    """QM9 as `prepare` left it; a source that needs no network is prepared if it is not yet.

    Args:
        data_dir: where the datasets are kept.
        source: which of the three.

    Returns:
        The molecules.

    Raises:
        DataFileError: see `prepare`; or the package is not prepared, or what is there is damaged.
    """
    if source != "package":
        prepare(data_dir, source)
    root = data_dir / "qm9"
    opened = open_structures(
        root / source, _description(root, source), one_a_group, name="QM9", licence=LICENCE, remedy=REMEDY
    )
    return replace(opened, name=_name_data(len(opened.structures)))


def _name_data(molecules: int) -> str:
    """As tables name it; only the whole set is called QM9."""
    return "QM9" if molecules == CHARACTERIZED else f"{molecules:,} molecules in QM9's format"


def atom_energies() -> np.ndarray:
    """The free atoms' U0 in eV by atomic number, float64, (100,); NaN for other elements.

    Returns:
        (100,), in eV.
    """
    energies = np.full(100, np.nan)
    for number, energy in ATOM_ENERGIES.items():
        energies[number] = energy * HARTREE
    return energies


def _description(root: Path, source: Source) -> dict[str, Any]:
    """What the parsed folder was made from."""
    if source == "package":
        return {"data": "qm9", "source": PACKAGE}
    path = root / (DATABASE if source == "database" else XYZ_FOLDER)
    files = _xyz_files(root) if source == "xyz" else [file for file in [path] if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    return {"data": "qm9", "source": path.name, "files": len(sizes), "bytes": sum(sizes)}


def _identity(root: Path, source: Source) -> Identity:
    files = _xyz_files(root) if source == "xyz" else database_files(root / DATABASE)
    return {**identify_jointly(files), "readers": READERS}


def _xyz_files(root: Path) -> list[Path]:
    """The published files that are there, the list of molecules to leave out among them."""
    left_out = root / UNCHARACTERIZED
    return [*xyz_files(root / XYZ_FOLDER), *([left_out] if left_out.is_file() else [])]


# --- the package


def _read_package(root: Path) -> Structures:
    scratch = root / ".download"
    scratch.mkdir(parents=True, exist_ok=True)
    paths = [pypi_file(PACKAGE, f"qm9pack/data/{name}", scratch) for name in SHA256]
    for path in paths:
        verify(path, SHA256[path.name], remedy=f"delete {scratch} and {REMEDY}")
    structures = collect((entry for path in paths for entry in _read_csv(path)), PACKAGE)
    shutil.rmtree(scratch)
    return structures


def _read_csv(path: Path) -> Iterator[Entry]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        for row in track(list(csv.DictReader(file)), f"Reading {path.name}", transient=True):
            try:
                yield Entry(
                    name=row["XYZ_file"],
                    numbers=np.array(
                        [NUMBERS[symbol.strip(" '")] for symbol in row["Elements"].strip("[]").split(",")]
                    ),
                    positions=np.array(json.loads(_as_json(row["XYZ_Ang"]))),
                    target=float(row["InternalEnergy_0K_au"]) * HARTREE,
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataFileError(f"{path}: {row.get('XYZ_file')} cannot be read: {error!r}") from None


def _as_json(numbers: str) -> str:
    """JSON knows no number that ends in its point."""
    return numbers.replace(".,", ".0,").replace(".]", ".0]")


# --- what the user puts in place


def _read_database(root: Path) -> Structures:
    path = root / DATABASE
    if (count := count_rows(path)) > CHARACTERIZED:
        raise DataFileError(
            f"{path} holds {count:,} molecules, some that failed the consistency check of QM9's authors among "
            f"them; must be the {CHARACTERIZED:,} that passed it: delete it and let schnetpack make it again, "
            'QM9(..., remove_uncharacterized=True), or set data = "package"'
        )
    return collect(read_ase_database(path, DATABASE_TARGET, periodic=False), str(path))


def _read_xyz_folder(root: Path) -> Structures:
    folder, listed = root / XYZ_FOLDER, root / UNCHARACTERIZED
    paths, left_out = xyz_files(folder), read_uncharacterized(listed)
    if not paths:
        raise DataFileError(f"{folder} holds no .xyz file: they are put in place by the user")
    failed = PUBLISHED - CHARACTERIZED
    if len(paths) > CHARACTERIZED and len(left_out) != failed:
        found = f"lists {len(left_out):,} molecules" if left_out else "is missing or lists none"
        raise DataFileError(
            f"{folder} holds {len(paths):,} molecules of QM9, and {listed} {found}; it must list the {failed:,} that "
            "failed the consistency check of QM9's authors: put it in place, it is published with the files"
        )
    kept = [path for path in paths if molecule_number(path) not in left_out]
    return collect((read_xyz(path) for path in track(kept, f"Reading {folder}", transient=True)), str(folder))


# --- the embedded sample


def load_embedded() -> StructureSet:
    """The 4,000 molecules that the repository carries.

    Returns:
        The molecules.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    return open_sample(EMBEDDED, EMBEDDED_SHA256, one_a_group, name="QM9, embedded", licence=LICENCE)


def draw_embedded(data_dir: Path) -> Structures:
    """The first molecules of the drawn order.

    Args:
        data_dir: has the package, prepared.

    Returns:
        The sample.
    """
    whole = load(data_dir)
    return whole.structures.select(whole.order[:EMBEDDED_SIZE])


def write_embedded(structures: Structures, target: Path) -> str:
    """Write the sample's ``.npz`` and return its SHA-256."""
    return write_sample(structures, target)
