"""``python -m experiments``."""

from experiments.cli.app import main

main()
