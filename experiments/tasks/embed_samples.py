"""``python -m experiments.tasks.embed_samples NAME``: an embedded sample again, to the byte, from the full data."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.tasks.dlrm import flights, flights_table
from experiments.tasks.gpt import django_docs
from experiments.tasks.resnet50 import fashion_mnist
from experiments.tasks.schnet import materials_project, qm9
from experiments.tasks.transformer import libreoffice_help

Draw = Callable[[Path], Any]

SAMPLES: dict[str, tuple[ModuleType, Draw]] = {
    "django-docs": (django_docs, django_docs.draw_embedded),
    "fashion-mnist": (fashion_mnist, fashion_mnist.draw_embedded),
    "flights": (flights, lambda data_dir: flights.draw_embedded(flights_table.load(data_dir))),
    "libreoffice-help": (libreoffice_help, libreoffice_help.draw_embedded),
    "materials-project": (materials_project, materials_project.draw_embedded),
    "qm9": (qm9, qm9.draw_embedded),
}
"""By name: the module, which has ``EMBEDDED``, its checksum and ``write_embedded``, and what draws the sample."""


def main() -> None:
    """Write an embedded sample and say whether it is the one that the code expects."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=list(SAMPLES))
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the full data are kept")
    parser.add_argument("--out", type=Path, help="the file to write; default: the one in the repository")
    arguments = parser.parse_args()
    module, draw = SAMPLES[arguments.name]
    target = arguments.out or module.EMBEDDED
    module.prepare(arguments.data_dir)
    digest = module.write_embedded(draw(arguments.data_dir), target)
    verdict = "as expected" if digest == module.EMBEDDED_SHA256 else f"NOT the expected {module.EMBEDDED_SHA256}"
    print(f"{target}: {target.stat().st_size:,} bytes, SHA-256 {digest}, {verdict}")


if __name__ == "__main__":
    main()
