"""What a challenge does in processes of their own; why one failed is written down for whoever asks later."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from experiments.config.recipe import Recipe, load_recipe
from experiments.errors import UserError
from experiments.launch.jobs import Job
from experiments.launch.one_line_errors import report_errors_in_one_line
from experiments.plugins import describe_failure
from experiments.records.run_record import Run
from experiments.training.distributed import leave_workers
from experiments.training.run import OtherSettingsError, RunOptions, read_finished_run
from experiments.tuning.search import STARTUP_TRIALS, Search
from experiments.tuning.tune import tune


class Doable(Protocol):
    """Something that can be done in a process."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        ...

    def run(self) -> None:
        """Do it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Work whose failure is written to a file, and is one line on stderr.

    Attributes:
        work: what is done.
        failure: the file; it is not there unless the last attempt failed.
    """

    work: Doable
    failure: Path

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.work.name

    def run_in_one_line(self) -> None:
        """Do it as the whole of a process."""
        report_errors_in_one_line(self.run)

    def run(self) -> None:
        """Do it.

        Raises:
            UserError: it failed, whatever the reason.
        """
        self.failure.unlink(missing_ok=True)
        try:
            self.work.run()
        except UserError as error:
            self._write(str(error))
            raise
        except Exception as error:  # of the challenger for the most part, which may raise anything
            text = f"{type(error).__name__}: {error}\n{describe_failure(error)}"
            self._write(text)
            raise UserError(f"{self.name}: {text}") from None

    def _write(self, text: str) -> None:
        try:
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            self.failure.write_text(text, encoding="utf-8")
        except OSError:  # a full disk, say: what failed is on stderr
            return


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The search on one task.

    Attributes:
        task: what it is asked for by.
        scale: of the recipe.
        recipes: the challenge's.
        challenger: its name there.
        folder: where searches are kept.
        options: how to run.
    """

    task: str
    scale: str
    recipes: Path
    challenger: str
    folder: Path
    options: RunOptions

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.task} {self.challenger} search"

    def load(self) -> Recipe:
        """The recipe."""
        return load_recipe(self.task, self.scale, folder=self.recipes)

    def run(self) -> None:
        """Search, and write the best settings into the recipe."""
        tune(self.load(), self.challenger, self.options, folder=self.folder)


@dataclass(frozen=True, kw_only=True)
class FirstTrial:
    """One of the first trials of a search, which depend on no other."""

    tuning: Tuning
    number: int

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.tuning.task} {self.tuning.challenger} trial {self.number}"

    def run(self) -> None:
        """Run it before its turn."""
        tuning = self.tuning
        Search(tuning.load(), tuning.challenger, tuning.options, tuning.folder).run_ahead(self.number)


@dataclass(frozen=True, kw_only=True)
class Train:
    """One run."""

    job: Job

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.job.name

    def run(self) -> None:
        """Run it."""
        try:
            self.job.run()
        finally:
            leave_workers()


def list_first_trials(tuning: Tuning, trials: int) -> Sequence[FirstTrial]:
    """The trials of a search that can be run at once.

    Args:
        tuning: the search.
        trials: how many it has.

    Returns:
        Works.
    """
    return [FirstTrial(tuning=tuning, number=number) for number in range(min(trials, STARTUP_TRIALS))]


def find_finished(recipe: Recipe, name: str, seed: int, options: RunOptions) -> Run | None:
    """A finished run of this very recipe, ``None`` if there is none or it was of another.

    Args:
        recipe: that asks.
        name: of the optimizer.
        seed: of the run.
        options: where it would be.

    Returns:
        The record.
    """
    try:
        found = read_finished_run(recipe, name, seed, options)
    except OtherSettingsError:
        return None
    same = found is not None and (found.manifest.target, found.manifest.epochs) == (
        recipe.run.target,
        recipe.run.epochs,
    )
    return found if same else None
