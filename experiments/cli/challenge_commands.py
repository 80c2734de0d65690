"""The commands for optimizers and tasks from outside: challenge, verify, new-task."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.cli.shared_options import DataDir, Device, TableFormat, say_loading
from experiments.errors import UserError


def challenge_command(
    optimizer: Annotated[
        str | None,
        typer.Argument(
            metavar="OPTIMIZER",
            help="package.module:Class, ./file.py:Class, or an entry point of the group ngplus.optimizers.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK,...", help="Names, entry points or ./file.py:Class. Default: all of the suite."),
    ] = None,
    scale: Annotated[str | None, typer.Option(metavar="SCALE", help="tiny (the default), small or paper.")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LOW:HIGH[:log]",
            help="Where to search a setting; may be repeated. Default: lr, a decade and a half around its default.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the optimizer; may be repeated."),
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(metavar="N,...", help="Seeds to run. Default: the recipes' own.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Trials of each search, 0 for none. Default: the recipes' own.")
    ] = None,
    around: Annotated[str | None, typer.Option(metavar="ngplus", help="Let it step along NG+'s directions.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="recipe|constant", help="Its learning rate's: each reference's (the default), or none."),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Compare with these of the recipe, and with its reference."),
    ] = None,
    rerun_baselines: Annotated[
        bool, typer.Option("--rerun-baselines", help="Run the baselines here too, so that seconds compare.")
    ] = False,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What it is called. Default: its class.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="A challenge.toml; what else is given replaces its.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it is kept. Default: build/challenges/NAME.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes at a time. Default: the processors there are.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads of each; changes the last digits. Default: 1.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Run it on a SLURM cluster; waits for its jobs.")] = False,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="SLURM's partition.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of each job, with --slurm.")] = 0,
    minutes: Annotated[
        int, typer.Option(metavar="N", help="Until a job is queued again, with --slurm; at least 3.")
    ] = 1440,
    format_: TableFormat = "terminal",
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
) -> None:
    """Put an optimizer to the test: tune it, run it, compare it with the suite's.

    It is tuned on the validation split at the tuning seed with as many trials as the suite's own, and run at the
    recipes' seeds. Ends with tables, and a page in its folder: where it wins, where it does not, how sure. What is
    done is not done again: the same command goes on where it was stopped.
    """
    say_loading()
    from experiments.challenge import asking, conduct
    from experiments.challenge.folder import CHALLENGES, Folder
    from experiments.challenge.result import read_result

    given: dict[str, Any] = {
        "optimizer": optimizer,
        "tasks": _split(tasks),
        "scale": scale,
        "seeds": _integers(seeds),
        "trials": trials,
        "around": around,
        "schedule": schedule,
        "baselines": _split(baselines),
        "rerun_baselines": rerun_baselines or None,
        "name": name,
        "threads": threads,
    }
    question, file = asking.ask(given, settings=set_ or [], search=search or [], path=from_)
    place = Folder(folder or CHALLENGES / question.name)
    workers, cluster = jobs or _count_processors(), None
    if slurm:
        from experiments.launch.slurm import Resources

        cluster = Resources(partition=partition, gpus=gpus, threads=question.threads, minutes=minutes, at_once=jobs)
    options = conduct.Options(workers=workers, data_dir=data_dir, device=device, cluster=cluster)
    problems = conduct.conduct(question, place, options, file)
    _print_tables(read_result(place.result), format_)
    typer.echo(f"{place.page}: where it wins, where it does not, how sure")
    if problems:
        typer.echo(
            "\n".join(
                [
                    f"{len(problems)} {'task' if len(problems) == 1 else 'tasks'} could not be done:",
                    *(each.splitlines()[0] for each in problems),
                ]
            ),
            err=True,
        )
        raise typer.Exit(1)


def _count_processors() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_tables(result: Any, format: str) -> None:
    from experiments.challenge import challenge_page
    from experiments.table_formats import render_table

    for caption, header, rows in challenge_page.tables(result):
        if not rows:
            continue
        typer.echo(render_table(header, rows, format, title=caption) + "\n")
    for line in challenge_page.summarise(result):
        typer.echo(line)


def _split(texts: list[str] | None) -> list[str] | None:
    """What is given one after the other, or with commas between."""
    return None if texts is None else [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _integers(texts: list[str] | None) -> list[int] | None:
    parts = _split(texts)
    if parts is None:
        return None
    for part in parts:
        if not part.isdigit():
            raise UserError(f"--seeds {part!r}: must be integers with commas between, e.g. 1,2,3")
    return [int(part) for part in parts]


def verify_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder of a challenge, or a part of one.")],
    data_dir: DataDir = Path("data"),
) -> None:
    """Check the records of a challenge: that its numbers follow from them, and they from what it says was done.

    Checks schema, seeds, splits, hashes of data and records, and the number of trials; names each file that does not
    fit. The exit status is 1 where something does not. Never starts a run.
    """
    say_loading()
    from experiments.challenge.verify import verify

    checked, faults = verify(path, data_dir)
    typer.echo("\n".join(checked))
    if faults:
        typer.echo("\n".join([f"{len(faults)} faults:", *faults]), err=True)
        raise typer.Exit(1)
    typer.echo(f"{path}: the numbers follow from the records")


def new_task_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name, e.g. two-spirals.")],
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it is put. Default: NAME.")] = None,
) -> None:
    """Write a task of your own to begin with: the task, a recipe at scale tiny, a test, all of which work.

    It can be installed (it has an entry point of the group ngplus.tasks), or named by its file.
    """
    from experiments.challenge.new_task import write_task

    for line in write_task(name, folder or Path(name)):
        typer.echo(line)
