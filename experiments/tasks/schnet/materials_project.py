"""Crystals of the Materials Project with their formation energy an atom.

3,938 of them, of at most 25 atoms a cell, travel in the source archive of ``matminer`` 0.3.9: the set of Faber
et al. The database that schnetpack makes of the whole Materials Project is read too, if the user puts it
in place.

Sources: Jain et al., "Commentary: The Materials Project", APL Materials 1, 011002 (2013), CC BY 4.0; Faber,
Lindmaa, von Lilienfeld, Armiento, "Crystal structure representations for machine learning models of formation
energies", Int. J. Quantum Chem. 115, 1094 (2015).
"""

import ast
import csv
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import track

from experiments.data_io.atoms.ase_database import database_files, read_ase_database
from experiments.data_io.atoms.structure_cache import (
    StructureSet,
    open_sample,
    open_structures,
    prepare_structures,
    write_sample,
)
from experiments.data_io.atoms.structure_splits import composition_groups
from experiments.data_io.atoms.structures import READERS, Entry, Structures, collect
from experiments.data_io.checksum import DataFileError, verify
from experiments.data_io.packages import pypi_file
from experiments.data_io.source_identity import Identity, identify_jointly

Source = Literal["package", "database"]

PACKAGE, MEMBER = "matminer==0.3.9", "matminer/datasets/flla_2015.csv"
SHA256 = "35b8dbc0b92f4dc7e219fd6606c3a27bee18a9618f376cfee1ff731e306210bb"
LICENCE = "CC BY 4.0 (Materials Project)"
DATABASE, DATABASE_TARGET = "materials_project.db", "formation_energy_per_atom"
NAMES: dict[Source, str] = {"package": "Materials Project, Faber's set", "database": "Materials Project"}

EMBEDDED = Path(__file__).parent / "embedded" / "materials_project.npz"
EMBEDDED_SHA256 = "3d04daaeb91abd1069c4208489adf1a3d8a3cb10c35c3eaecb785db14d21d8af"
EMBEDDED_SIZE = 800

REMEDY = "run `make data-matproj`"


def prepare(data_dir: Path, source: Source = "package") -> Path:
    """Parse a source into ``data_dir/materials-project/<source>`` and return that folder.

    What is there and whole is kept. The package is fetched if need be; the database is
    ``data_dir/materials-project/materials_project.db``.

    Args:
        data_dir: where the datasets are kept.
        source: which of the two.

    Returns:
        The folder.

    Raises:
        DataFileError: the source is missing, damaged or holds an entry that cannot be used.
    """
    root = data_dir / "materials-project"
    read = {"package": _read_package, "database": _read_database}[source]
    return prepare_structures(
        root / source,
        _description(root, source),
        lambda: read(root),
        composition_groups,
        remedy=REMEDY,
        source=None if source == "package" else lambda: _identity(root),
    )


def load(data_dir: Path, source: Source = "package") -> StructureSet:
    """The crystals as `prepare` left them; the database is prepared if it is not yet.

    Args:
        data_dir: where the datasets are kept.
        source: which of the two.

    Returns:
        The crystals.

    Raises:
        DataFileError: see `prepare`; or the package is not prepared, or what is there is damaged.
    """
    if source != "package":
        prepare(data_dir, source)
    root = data_dir / "materials-project"
    return open_structures(
        root / source,
        _description(root, source),
        composition_groups,
        name=NAMES[source],
        licence=LICENCE,
        remedy=REMEDY,
    )


def _description(root: Path, source: Source) -> dict[str, Any]:
    """What the parsed folder was made from."""
    if source == "package":
        return {"data": "materials-project", "source": f"{PACKAGE}: {MEMBER}"}
    path = root / DATABASE
    return {
        "data": "materials-project",
        "source": path.name,
        "bytes": path.stat().st_size if path.is_file() else 0,
    }


def _identity(root: Path) -> Identity:
    return {**identify_jointly(database_files(root / DATABASE)), "readers": READERS}


def _read_package(root: Path) -> Structures:
    scratch = root / ".download"
    scratch.mkdir(parents=True, exist_ok=True)
    path = pypi_file(PACKAGE, MEMBER, scratch, source=True)
    verify(path, SHA256, remedy=f"delete {scratch} and {REMEDY}")
    structures = collect(_read_csv(path), f"{PACKAGE}: {MEMBER}")
    shutil.rmtree(scratch)
    return structures


def _read_csv(path: Path) -> Iterator[Entry]:
    """The rows of matminer's table; a structure is written as pymatgen's dictionary in Python's notation."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for row in track(rows, f"Reading {path.name}", transient=True):
        name = row.get("material_id")
        try:
            yield _entry(name, ast.literal_eval(row["structure"]), float(row["formation_energy_per_atom"]))
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise DataFileError(f"{path}: {name} cannot be read: {error!r}") from None


def _entry(name: str, structure: Mapping[str, Any], target: float) -> Entry:
    from ase.data import atomic_numbers  # ase takes a second to import

    cell = np.array(structure["lattice"]["matrix"], np.float64)
    sites = structure["sites"]
    if any(len(site["species"]) != 1 or site["species"][0]["occu"] != 1 for site in sites):
        raise ValueError("a site is shared by several elements or not always occupied")
    return Entry(
        name=name,
        numbers=np.array([atomic_numbers[site["species"][0]["element"]] for site in sites]),
        positions=np.array([site["abc"] for site in sites], np.float64) @ cell,
        target=target,
        cell=cell,
    )


def _read_database(root: Path) -> Structures:
    path = root / DATABASE
    return collect(read_ase_database(path, DATABASE_TARGET, periodic=True), str(path))


# --- the embedded sample


def load_embedded() -> StructureSet:
    """The 800 crystals that the repository carries.

    Returns:
        The crystals.

    Raises:
        DataFileError: the file is missing, truncated or damaged.
    """
    return open_sample(
        EMBEDDED, EMBEDDED_SHA256, composition_groups, name=f"{NAMES['package']}, embedded", licence=LICENCE
    )


def draw_embedded(data_dir: Path) -> Structures:
    """The first crystals of the drawn order.

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
