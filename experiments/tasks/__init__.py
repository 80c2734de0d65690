"""The tasks, by name. A new task is one folder here, one line in `TASKS` and one TOML a scale.

One from outside is an entry point of the group ``ngplus.tasks``, or a class in a file, ``./my_task.py:MyTask``; its
recipes are in the folder ``recipes`` next to that file.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.dataclass_io import SettingsError, list_allowed
from experiments.errors import UserError
from experiments.plugins import TASKS_GROUP, PluginError, is_spec, list_entry_points, load_plugin
from experiments.tasks.protocol import PROTOCOL, Task


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


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task as it is found.

    Attributes:
        name: what its records are called.
        build: makes it from a recipe's ``[task]`` table, a scale and the folder of datasets.
        recipes: where its recipes are, ``<name>/<scale>.toml``; ``None`` for this package's own.
        file: that a task from outside is in.
    """

    name: str
    build: Callable[..., Task]
    recipes: Path | None = None
    file: Path | None = None


TASK_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# What a task must have, by the protocol.
_NEEDED = ("metric", "build_model", "steps_per_epoch", "train_batches", "loss", "evaluate", "to_device")


def find_task(asked: str) -> TaskEntry:
    """The task of a name, or one from outside.

    Args:
        asked: a name in `TASKS`, an entry point of the group ``ngplus.tasks``, or where its class is.

    Returns:
        The task.

    Raises:
        SettingsError: there is no task of this name; lists those there are.
        PluginError: one from outside cannot be imported, or does not follow the protocol.
    """
    if asked in TASKS:
        return TaskEntry(name=asked, build=TASKS[asked])
    if not is_spec(asked) and asked not in (outside := list_entry_points(TASKS_GROUP)):
        raise SettingsError(f"task = {asked!r}: there is no such task; {list_allowed((*TASKS, *outside))}")
    cls = load_plugin(asked, group=TASKS_GROUP, where="task").value
    where = f"task = {asked!r}"
    _check_protocol(cls, where)
    file = Path(inspect.getfile(cls)).resolve()
    return TaskEntry(name=cls.name, build=cls, recipes=file.parent / "recipes", file=file)


def _check_protocol(cls: Any, where: str) -> None:
    if not isinstance(cls, type):
        raise PluginError(f"{where}: is a {type(cls).__name__}: must be a class that follows tasks/protocol.py")
    version = getattr(cls, "protocol", None)
    if version != PROTOCOL:
        raise PluginError(f"{where}: {cls.__name__}.protocol = {version!r}: this version reads protocol {PROTOCOL}")
    if missing := [name for name in _NEEDED if not hasattr(cls, name)]:
        raise PluginError(f"{where}: {cls.__name__} has no {', '.join(missing)}, which the protocol asks for")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not TASK_NAME.fullmatch(name) or name in TASKS:
        raise PluginError(
            f"{where}: {cls.__name__}.name = {name!r}: must be small letters and digits with hyphens between, "
            f"and none of {', '.join(sorted(TASKS))}"
        )
