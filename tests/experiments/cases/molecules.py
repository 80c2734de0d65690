"""A few molecules and crystals, as entries and as files in the official formats."""

import csv
from pathlib import Path

import numpy as np

from experiments.data_io.atoms.structures import Entry, Structures, collect

SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
HARTREE = 27.211386024367243


def molecules(count: int = 12, *, seed: int = 0) -> list[Entry]:
    """Molecules of 1 to 6 atoms, their coordinates and energies rounded as QM9's are."""
    generator = np.random.default_rng(seed)
    entries = []
    for k in range(count):
        size = 1 + k % 6
        numbers = generator.choice(list(SYMBOLS), size)
        entries.append(
            Entry(
                name=f"dsgdb9nsd_{k + 1:06}.xyz",
                numbers=numbers,
                positions=generator.uniform(-2, 2, (size, 3)).round(10),
                target=round(-13.0 * numbers.sum() + generator.normal(), 6) * HARTREE,
            )
        )
    return entries


def crystals(count: int = 8, *, seed: int = 0) -> list[Entry]:
    """Crystals of 1 to 4 atoms in skewed cells; every second has the formula of the one before it."""
    generator = np.random.default_rng(seed)
    entries = []
    for k in range(count):
        size = 1 + k // 2 % 4
        cell = 4 * np.eye(3) + generator.uniform(-1, 1, (3, 3))
        entries.append(
            Entry(
                name=f"mp-{k + 1}",
                numbers=np.array([11, 17, 26, 8][:size]),
                positions=generator.random((size, 3)) @ cell,
                target=float(generator.normal()),
                cell=cell,
            )
        )
    return entries


def collect_entries(entries: list[Entry]) -> Structures:
    return collect(entries, "made up")


def write_qm9pack(entries: list[Entry], paths: list[Path]) -> None:
    """The tables of the package qm9pack, the entries spread over them; a float that is whole ends in its point."""
    columns = ["XYZ_file", "Index", "N_atoms", "Elements", "XYZ_Ang", "InternalEnergy_0K_au"]
    for path, part in zip(paths, np.array_split(np.arange(len(entries)), len(paths)), strict=True):
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for k in part:
                entry = entries[k]
                rows = ",".join("[" + ",".join(_short(x) for x in row) + "]" for row in entry.positions)
                symbols = ",".join(f"'{SYMBOLS[z]}'" for z in entry.numbers)
                energy = repr(round(float(entry.target) / HARTREE, 6))
                writer.writerow([entry.name, k + 1, len(entry.numbers), f"[{symbols}]", f"[{rows}]", energy])


def _short(value: float) -> str:
    return repr(float(value)).removesuffix("0") if float(value).is_integer() else repr(float(value))


def write_xyz(entries: list[Entry], folder: Path) -> None:
    """The published files, one a molecule; small numbers are written with ``*^``."""
    folder.mkdir(parents=True)
    for k, entry in enumerate(entries):
        energy = repr(round(float(entry.target) / HARTREE, 6))
        properties = ["1.0"] * 10 + [energy] + ["1.0"] * 4
        lines = [str(len(entry.numbers)), f"gdb {k + 1}\t" + "\t".join(properties)]
        for z, row in zip(entry.numbers, entry.positions, strict=True):
            numbers = [f"{x:.10e}".replace("e", "*^") if abs(x) < 0.1 else repr(float(x)) for x in row]
            lines.append("\t".join([SYMBOLS[z], *numbers, "-0.1"]))
        lines += ["1341.307\t1341.3284", "C\tC", "InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4"]
        (folder / f"dsgdb9nsd_{k + 1:06}.xyz").write_text("\n".join(lines) + "\n")


def write_database(
    entries: list[Entry], path: Path, target: str, *, unit: str = "eV", factor: float = 1.0, pbc: bool | None = None
) -> None:
    """A database as schnetpack writes it."""
    from ase import Atoms
    from schnetpack.data import ASEAtomsData

    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = ASEAtomsData.create(str(path), distance_unit="Ang", property_unit_dict={target: unit})
    atoms = [
        Atoms(
            numbers=entry.numbers,
            positions=entry.positions,
            cell=entry.cell,
            pbc=(entry.cell is not None) if pbc is None else pbc,
        )
        for entry in entries
    ]
    dataset.add_systems([{target: np.array([entry.target / factor])} for entry in entries], atoms)


def write_flla(entries: list[Entry], path: Path) -> None:
    """The table of Faber's set as matminer has it: a comment, then pymatgen's dictionaries."""
    from ase.data import chemical_symbols

    with path.open("w", newline="") as file:
        file.write("# ref: F. Faber et al.\n")
        writer = csv.writer(file)
        writer.writerow(["material_id", "formula", "structure", "formation_energy_per_atom"])
        for entry in entries:
            fractional = entry.positions @ np.linalg.inv(entry.cell)
            sites = [
                {"abc": row.tolist(), "species": [{"occu": 1, "element": chemical_symbols[z]}]}
                for z, row in zip(entry.numbers, fractional, strict=True)
            ]
            structure = {"lattice": {"matrix": entry.cell.tolist()}, "@class": "Structure", "sites": sites}
            writer.writerow([entry.name, "{}", repr(structure), repr(entry.target)])
