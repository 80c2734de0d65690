"""``python -m experiments.theory.costs``."""

import typer

from experiments.theory.costs.method_costs import main

typer.run(main)
