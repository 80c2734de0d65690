"""The tasks, by name. A new task is one folder here, one line in `TASKS` and one TOML a scale."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.tasks.protocol import Task


def _task(module: str, name: str, extra: str) -> Callable[..., Task]:
    """A function that imports the task's module when it is called: each needs packages the others do not."""

    def build(settings: Mapping[str, Any], *, scale: str, data_dir: Path) -> Task:
        try:
            found = import_module(f"experiments.tasks.{module}")
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is not installed: this task needs the extra {extra!r}: "
                f"pip install -e '.[{extra}]', or `make setup`"
            ) from None
        return getattr(found, name)(settings, scale=scale, data_dir=data_dir)

    return build


TASKS: dict[str, Callable[..., Task]] = {
    "dlrm-criteo": _task("dlrm.dlrm_criteo", "DLRMCriteo", "recsys"),
    "resnet50-imagenet": _task("resnet50.resnet50_imagenet", "ResNet50ImageNet", "vision"),
    "schnet-matproj": _task("schnet.schnet_matproj", "SchNetMatProj", "quantum"),
    "schnet-qm9": _task("schnet.schnet_qm9", "SchNetQM9", "quantum"),
    "transformer-iwslt14": _task("transformer.transformer_iwslt14", "TransformerIWSLT14", "translation"),
    # Beyond the paper.
    "gpt-text": _task("gpt.gpt_text", "GPTText", "text"),
}
