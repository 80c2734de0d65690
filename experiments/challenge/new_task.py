"""A task to begin with: the files of one that works, under a name of one's own."""

from pathlib import Path

from experiments.errors import UserError
from experiments.tasks import TASK_NAME, TASKS

TEMPLATE = Path(__file__).parent / "template"


def write_task(name: str, folder: Path) -> list[str]:
    """Write the files; none that is there is replaced.

    Args:
        name: of the task.
        folder: where they are put.

    Returns:
        What was written and what to do with it, a line each.

    Raises:
        UserError: the name is no name of a task or is taken, or a file is there.
    """
    if not TASK_NAME.fullmatch(name):
        raise UserError(f"name = {name!r}: must be small letters and digits, with hyphens between")
    if name in TASKS:
        raise UserError(f"name = {name!r}: is a task of the suite: must be another")
    module, cls = name.replace("-", "_"), "".join(part.capitalize() for part in name.split("-"))
    if not module.isidentifier():
        raise UserError(f"name = {name!r}: must begin with a letter, as its module's name does")
    package = folder / module
    files = {
        folder / "pyproject.toml": "pyproject.toml.txt",
        package / "__init__.py": None,
        package / f"{module}.py": "task.py.txt",
        package / "recipes" / name / "tiny.toml": "tiny.toml",
        folder / f"test_{module}.py": "test_task.py.txt",
    }
    for path in files:
        if path.exists():
            raise UserError(f"{path}: is there already; give another --folder")
    for path, source in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATE / source).read_text(encoding="utf-8") if source else ""
        for old, new in (("my-task", name), ("my_task", module), ("MyTask", cls)):
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    spec = f"{package / module}.py:{cls}"
    return [
        *(str(path) for path in files),
        f"test it:  pytest {folder / f'test_{module}.py'}",
        f"train it: ngplus-bench run {spec}",
        f"use it:   ngplus-bench challenge torch.optim:RMSprop --tasks {spec}",
    ]
