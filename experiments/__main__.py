"""``python -m experiments``."""

import sys

try:
    import typer  # noqa: F401
except ModuleNotFoundError:
    sys.exit(
        f"error: typer is not installed for {sys.executable}: run `make setup` and then "
        ".venv/bin/python -m experiments, or pip install -e '.[bench]'"
    )

from experiments.cli.app import main

main()
