"""The datasets, by name. A new one is one module in its task's folder and one line in `PREPARE`."""

from collections.abc import Callable
from pathlib import Path

from experiments.tasks.dlrm import criteo, flights
from experiments.tasks.gpt import django_docs
from experiments.tasks.resnet50 import fashion_mnist
from experiments.tasks.schnet import materials_project, qm9
from experiments.tasks.transformer import ding, iwslt14, libreoffice_help

PREPARE: dict[str, Callable[[Path], Path]] = {
    "criteo": criteo.prepare,
    "ding": ding.prepare,
    "django-docs": django_docs.prepare,
    "fashion-mnist": fashion_mnist.prepare,
    "flights": flights.prepare,
    "iwslt14": iwslt14.prepare,
    "libreoffice-help": libreoffice_help.prepare,
    "materials-project": materials_project.prepare,
    "qm9": qm9.prepare,
}
"""Name to function: put the dataset into a data folder (no network if it is there), return where it is."""
