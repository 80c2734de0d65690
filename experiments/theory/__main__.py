"""Theorems 2, 3 and 5, every erratum and the cost comparison in one go: ``python -m experiments.theory``.

Ends with status 1 if a corrected form fails its check, or a printed one passes.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from experiments.records.claim_checks import Erratum, write_rows
from experiments.theory import convergence, regret, sharded_costs
from experiments.theory.costs import method_costs
from experiments.theory.errata import FORMULAS


def show(errata: list[Erratum]) -> None:
    """Print the errata as a table."""
    table = Table("place", "measure (0 is right)", "printed", "corrected", "as expected")
    for erratum in errata:
        expected = erratum.printed_is_wrong and erratum.corrected_is_right
        numbers = f"{erratum.printed:.3g}", f"{erratum.corrected:.1g}"
        table.add_row(erratum.place, erratum.measure, *numbers, "yes" if expected else "NO")
    Console().print(table)


def main(
    seed: Annotated[int, typer.Option(help="of every draw; it changes no verdict")] = 0,
    out: Annotated[Path, typer.Option(help="folder for tables and figures")] = Path("results/theory"),
    quick: Annotated[bool, typer.Option(help="few steps and rounds, small matrices, for a first look")] = False,
) -> None:
    """Run the theorems' experiments, check every erratum, count the costs, and write it all under `out`."""
    errata = [check(np.random.default_rng([seed, index])) for index, check in enumerate(FORMULAS)]
    errata += convergence.run(seed, out / "convergence", 500 if quick else 5_000)
    errata += regret.run(seed, out / "regret", 300 if quick else 10_000)
    method_costs.run(out / "costs", quick=quick, seed=seed)
    sharded_costs.run(out / "sharded")
    write_rows(out / "errata.csv", [erratum.row() for erratum in errata])
    show(errata)
    if not all(erratum.printed_is_wrong and erratum.corrected_is_right for erratum in errata):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
