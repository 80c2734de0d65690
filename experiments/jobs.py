"""Several runs one after the other, each in a process of its own, so that its peak memory is its own."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.data import DataFileError
from experiments.errors import UserError
from experiments.parallel import leave_workers
from experiments.recipe import Recipe, load_recipe
from experiments.runner import RunOptions, finished_run, run


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as the command line asks for it; reads its recipe where it is run."""

    task: str
    scale: str
    overrides: tuple[str, ...]
    optimizer: str
    seed: int
    options: RunOptions

    @property
    def recipe(self) -> Recipe:
        """The recipe with the values given on the command line."""
        return load_recipe(self.task, self.scale, overrides=self.overrides)

    def is_finished(self) -> bool:
        """Whether there is nothing to do; says so."""
        done = finished_run(self.recipe, self.optimizer, self.seed, self.options)
        if done and _is_first():
            print(f"{self.optimizer} seed {self.seed}: {done.end.reason} before, see {done.path}")
        return done is not None

    def run(self) -> None:
        """Run it in this process."""
        run(self.recipe, self.optimizer, self.seed, self.options)

    def run_in_one_line(self) -> None:
        """Run it as the whole of a process."""
        in_one_line(self.run)


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run what is not finished; stops at the first run that fails, with its exit status."""
    waiting = [job for job in jobs if not job.is_finished()]
    apart = len(waiting) > 1 and "WORLD_SIZE" not in os.environ
    try:
        for job in waiting:
            _run_apart(job) if apart else job.run()
    finally:
        leave_workers()


def in_one_line(command: Callable[[], None]) -> None:
    """Call `command`; an error that the user can mend is one line on stderr and exit status 2."""
    try:
        command()
    except (UserError, DataFileError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _run_apart(job: Job) -> None:
    process = multiprocessing.get_context("spawn").Process(target=job.run_in_one_line)
    process.start()
    process.join()
    if process.exitcode:
        name = f"{job.optimizer} seed {job.seed}"
        if process.exitcode < 0:
            print(f"{name}: killed by {signal.Signals(-process.exitcode).name}", file=sys.stderr)
        sys.exit(process.exitcode if process.exitcode > 0 else 128 - process.exitcode)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
