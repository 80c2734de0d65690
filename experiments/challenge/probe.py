"""The first steps of the challenger on a task: can it be trained at all, how long does it take, does it resume?"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.config.recipe import Recipe, load_recipe
from experiments.dataclass_io import read_settings, to_table
from experiments.errors import UserError
from experiments.launch.one_line_errors import report_errors_in_one_line
from experiments.plugins import describe_failure
from experiments.tasks.protocol import Task
from experiments.training.checkpoint import CheckpointError
from experiments.training.distributed import Workers, choose_device
from experiments.training.timing import Clock
from experiments.training.trainer import CheckpointPlan, Training

# Twice as many, with a checkpoint in between: beyond the first refresh of most preconditioners.
STEPS = 12
_NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What was found.

    Attributes:
        problem: why the challenger cannot be trained on the task, ``None`` if it can.
        seconds_per_step: on the training clock.
        seconds_per_evaluation: of one split.
        steps: optimizer steps an epoch.
        finite: whether the parameters were numbers after these steps, at the settings the search begins with.
        resumes: whether steps after a checkpoint are those without one to the bit.
        dataset_sha256: of the data, ``""`` if the task could not be made.
    """

    problem: str | None = None
    seconds_per_step: float = 0.0
    seconds_per_evaluation: float = 0.0
    steps: int = 0
    finite: bool = True
    resumes: bool = True
    dataset_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The probe of one task, as the work of a process.

    Attributes:
        task: what the task is asked for by.
        scale: of the recipe.
        recipes: the challenge's.
        challenger: its name there.
        out: the file that `Probed` is written to.
        data_dir: where datasets are kept.
        device: where to train.
    """

    task: str
    scale: str
    recipes: Path
    challenger: str
    out: Path
    data_dir: Path
    device: str

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"first steps on {self.task}"

    def run_in_one_line(self) -> None:
        """Probe as the whole of a process."""
        report_errors_in_one_line(self.run)

    def run(self) -> None:
        """Write down what was found; a failure is a finding."""
        try:
            found = self._probe()
        except UserError as error:
            found = Probed(problem=str(error))
        except Exception as error:
            found = Probed(problem=f"{type(error).__name__}: {error}\n{describe_failure(error)}")
        write_probed(self.out, found)

    def _probe(self) -> Probed:
        recipe = load_recipe(self.task, self.scale, folder=self.recipes)
        recipe = recipe.override({"run.report_split": "validation"})
        task = recipe.build_task(self.data_dir)
        return probe(recipe, self.challenger, task, choose_device(self.device), self.out.with_suffix(".pt"))


def probe(recipe: Recipe, name: str, task: Task, device: torch.device, checkpoint: Path) -> Probed:
    """Take steps, save, take more, and take those again from what was saved.

    Args:
        recipe: with the challenger in it.
        name: of the challenger.
        task: the recipe's.
        device: where to train.
        checkpoint: a file that is written, and removed.

    Returns:
        What was found.
    """
    plan = CheckpointPlan(path=checkpoint, every_s=_NEVER, identity={})

    def make() -> Training:
        return Training(recipe, name, recipe.run.tuning_seed, task=task, device=device, workers=Workers())

    training, clock = make(), Clock(device)
    training.evaluate()
    # Of the first step, which makes what the others have, and of all.
    seconds: dict[int, float] = {}
    saved: list[Exception | None] = []

    def look() -> None:
        if training.position.step == STEPS:
            saved.append(_try_to_save(training, plan))
        with training.clock.paused():
            seconds[training.position.step] = training.clock.seconds

    _take_steps(training, plan, 2 * STEPS, look)
    with clock.running():
        training.evaluate()
    try:
        again = make()
        resumes = saved == [None] and _resumes(training, again, plan)
    finally:
        checkpoint.unlink(missing_ok=True)
    return Probed(
        seconds_per_step=(seconds[STEPS - 1] - seconds[1]) / (STEPS - 2),
        seconds_per_evaluation=clock.seconds,
        steps=training.steps_per_epoch,
        finite=all(bool(torch.isfinite(each).all()) for each in training.model.parameters()),
        resumes=resumes,
        dataset_sha256=task.dataset.sha256,
    )


def read_probed(path: Path) -> Probed | None:
    """What was found before, ``None`` if nothing was.

    Args:
        path: the file.

    Returns:
        What was found.
    """
    if not path.exists():
        return None
    return read_settings(Probed, json.loads(path.read_text(encoding="utf-8")), str(path))


def write_probed(path: Path, found: Probed) -> None:
    """Write it down.

    Args:
        path: the file.
        found: what was found.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(to_table(found), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class _EnoughError(Exception):
    """There are enough steps."""


class _Counter:
    """A callback that looks at each step, and ends the training at one."""

    def __init__(self, training: Training, until: int, look: Callable[[], None]) -> None:
        self._training, self._until, self._look = training, until, look

    def on_step(self, step_in_epoch: int) -> None:
        """As `experiments.training.callbacks.Callback` is told."""
        self._look()
        if self._training.position.step >= self._until:
            raise _EnoughError


def _take_steps(training: Training, plan: CheckpointPlan, until: int, look: Callable[[], None]) -> None:
    """Train until so many steps were taken in all, over as many epochs as it takes."""
    counter: Any = _Counter(training, until, look)
    try:
        while True:
            training.train_epoch(plan, [counter])
    except _EnoughError:
        pass


def _try_to_save(training: Training, plan: CheckpointPlan) -> Exception | None:
    """Save, and return why that failed: a state may hold what no file can."""
    try:
        with training.clock.paused():
            training.save(plan)
    except Exception as error:
        return error
    return None


def _resumes(training: Training, again: Training, plan: CheckpointPlan) -> bool:
    """Whether another training comes to the same from the checkpoint."""
    try:
        again.restore(plan)
    except (CheckpointError, TypeError, AttributeError):
        return False
    _take_steps(again, plan, training.position.step, lambda: None)
    return _same(training, again)


def _same(one: Training, other: Training) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    # NaN is the same as NaN: whether they are numbers is said elsewhere.
    return all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs)
