"""Several runs, named by what the command line asks for, in this process or in others."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.config.recipe import Recipe, check_seed, load_recipe
from experiments.errors import UserError
from experiments.launch.local import run_in_processes
from experiments.launch.one_line_errors import report_errors_in_one_line
from experiments.optimizers.registry import find_entry
from experiments.training.distributed import leave_workers
from experiments.training.run import OtherSettingsError, RunOptions, check_optimizer, read_finished_run, run


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as the command line asks for it; reads its recipe where it is run.

    With a `variant`, `optimizer` is the name that the record has, ``<name in the recipe>-<variant>``. The recipe is one
    of the folder `recipes`, by default the task's own.
    """

    task: str
    scale: str
    overrides: tuple[str, ...]
    optimizer: str
    seed: int
    options: RunOptions
    variant: str | None = None
    recipes: Path | None = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        own = f" with {', '.join(self.overrides)}" if self.overrides else ""
        return f"{self.task} {self.optimizer} seed {self.seed}{own}"

    @property
    def recipe(self) -> Recipe:
        """The recipe with the values given on the command line."""
        return _load(self.task, self.scale, self.overrides, self.variant, self.recipes)

    def is_finished(self) -> bool:
        """Whether there is nothing to do; says so."""
        done = read_finished_run(self.recipe, self.optimizer, self.seed, self.options)
        if done and os.environ.get("RANK", "0") == "0":
            what = f"{done.end.reason} before on {done.manifest.dataset.name}"
            print(f"{self.optimizer} seed {self.seed}: {what}, see {done.path}")
        return done is not None

    def run(self) -> None:
        """Run it in this process."""
        run(self.recipe, self.optimizer, self.seed, self.options)

    def run_in_one_line(self) -> None:
        """Run it as the whole of a process."""
        report_errors_in_one_line(self.run)


def make_jobs(
    task: str,
    scale: str,
    optimizers: Sequence[str] | None,
    seeds: Sequence[int] | None,
    overrides: tuple[str, ...],
    options: RunOptions,
    variant: str | None = None,
) -> list[Job]:
    """The runs of a recipe, all optimizers for the first seed, then all for the next.

    Args:
        task: the task's name.
        scale: its scale.
        optimizers: names in the recipe, ``None`` for all.
        seeds: ``None`` for those of the recipe.
        overrides: values that replace the recipe's.
        options: how and where to run.
        variant: what is added to each optimizer's name, to stand next to the runs without `overrides`.

    Returns:
        The runs, in the order in which they are to be started.

    Raises:
        UserError: for an optimizer that the recipe does not have, a variant that is one of it, or a seed out of range.
    """
    recipe = _load(task, scale, overrides, variant)
    names = [_join(name, variant) for name in optimizers] if optimizers else list(recipe.optimizers)
    for name in names:
        check_optimizer(recipe, name)
    for seed in seeds or ():
        try:
            check_seed(seed)
        except ValueError as error:
            raise UserError(str(error)) from None
    return [
        Job(
            task=task,
            scale=scale,
            overrides=overrides,
            optimizer=name,
            seed=seed,
            options=options,
            variant=variant,
        )
        for seed in seeds or recipe.run.seeds
        for name in names
    ]


def _join(name: str, variant: str | None) -> str:
    return f"{name}-{variant}" if variant else name


def _load(task: str, scale: str, overrides: tuple[str, ...], variant: str | None, folder: Path | None = None) -> Recipe:
    """The recipe, its optimizers called by the variant's names."""
    recipe = load_recipe(task, scale, overrides=overrides, folder=folder)
    if variant is None:
        return recipe
    optimizers = {_join(name, variant): each for name, each in recipe.optimizers.items()}
    for name in optimizers:
        find_entry(name, "variant")
        if name in recipe.optimizers:
            raise UserError(f"variant = {variant!r}: {name} is in {recipe.path} already; choose another name")
    return replace(recipe, optimizers=optimizers)


def run_jobs(jobs: Sequence[Job], *, workers: int = 1, threads: int | None = None) -> None:
    """Run what is not finished; a run that fails does not stop the others.

    A single run, and every run under ``torchrun``, is run in this process, the others apart: see `run_in_processes`.
    Of several, those that failed are named at the end, and the exit status is 1. Where one was finished, or begun
    and interrupted, with other settings, none is started.

    Args:
        jobs: in the order in which they are started.
        workers: processes at a time.
        threads: CPU threads each; ``None`` for what the environment says.

    Raises:
        OtherSettingsError: one was finished, or begun and interrupted, with other settings.
    """
    if len(jobs) == 1 or "WORLD_SIZE" in os.environ:
        _run_here(jobs)
        return
    waiting, failed = [], {}
    for job in jobs:
        try:
            if not job.is_finished():
                waiting.append(job)
        except OtherSettingsError:
            raise
        except UserError as error:
            failed[job.name] = str(error)
    failed |= run_in_processes(waiting, workers=workers, threads=threads)
    if failed:
        _report_failed(failed, len(jobs))


def _run_here(jobs: Sequence[Job]) -> None:
    try:
        for job in jobs:
            if not job.is_finished():
                job.run()
    finally:
        leave_workers()


def _report_failed(failed: Mapping[str, str], count: int) -> None:
    lines = [f"{len(failed)} of {count} runs failed; the same command tries them again:"]
    lines += [f"  {name}: {reason}" for name, reason in failed.items()]
    print("\n".join(lines), file=sys.stderr)
    sys.exit(1)
