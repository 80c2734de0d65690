"""The command line, ``python -m experiments``: train, tune, compare, judge the paper's claims, fetch data.

Each command imports what it needs itself: torch alone takes seconds, and help and mistakes should not wait for it.
"""

from pathlib import Path
from typing import Annotated

import typer

from experiments.cli import challenge_commands
from experiments.cli.shared_options import (
    CheckpointDir,
    CheckpointEvery,
    DataDir,
    Device,
    Epochs,
    Force,
    OptimizerNames,
    Overrides,
    ResultsDir,
    Scale,
    Seeds,
    TableFormat,
    TaskName,
    TensorBoard,
    Threads,
    Variant,
    Workers,
    say_loading,
)
from experiments.dataclass_io import list_allowed
from experiments.errors import UserError
from experiments.launch.one_line_errors import report_errors_in_one_line

OWN_RESULTS = Path("build/results")
"""Apart from the recorded ones in ``results``, which commands that train touch only if they are told to."""

app = typer.Typer(
    help="Reproduce the experiments of NG+: train, list what there is, print the comparison tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; what a user can fix is one line and exit status 2."""
    report_errors_in_one_line(app)


@app.command("run")
def run_command(
    task: TaskName,
    scale: Scale = "tiny",
    optimizer: OptimizerNames = None,
    seed: Seeds = None,
    epochs: Epochs = None,
    set_: Overrides = None,
    variant: Variant = None,
    force: Force = False,
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
    results_dir: ResultsDir = OWN_RESULTS,
    checkpoint_dir: CheckpointDir = None,
    checkpoint_every: CheckpointEvery = 60.0,
    tensorboard: TensorBoard = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun, shard the model's parameters over the processes.")
    ] = False,
) -> None:
    """Train a task, and record each run.

    One run is one optimizer from one seed. What is finished is not run again, and what was interrupted goes on
    where it stopped. Several runs go one after the other, all optimizers for the first seed, then all for the
    next. Under torchrun, the processes train each run together.
    """
    say_loading()
    from experiments.launch.jobs import make_jobs, run_jobs
    from experiments.training.run import RunOptions

    options = RunOptions(
        device=device,
        data_dir=data_dir,
        results_dir=results_dir,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=checkpoint_every,
        force=force,
        tensorboard=tensorboard,
        shard=shard,
    )
    run_jobs(make_jobs(task, scale, optimizer, seed, _overrides(set_, epochs), options, variant))


@app.command("sweep")
def sweep_command(
    task: Annotated[list[str], typer.Argument(metavar="TASK...", help="The tasks, e.g. resnet50-imagenet.")],
    scale: Scale = "tiny",
    optimizer: OptimizerNames = None,
    seed: Seeds = None,
    epochs: Epochs = None,
    set_: Overrides = None,
    variant: Variant = None,
    force: Force = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Runs at a time. Default: 2, or no limit with --slurm.")
    ] = None,
    threads: Threads = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs to SLURM instead.")] = False,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="SLURM's partition.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs of each node, with --slurm.")] = 0,
    nodes: Annotated[int, typer.Option(metavar="N", help="Nodes that train a run together, with --slurm.")] = 1,
    minutes: Annotated[
        int, typer.Option(metavar="N", help="Until a job is queued again, with --slurm; at least 3.")
    ] = 1440,
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
    results_dir: ResultsDir = OWN_RESULTS,
    checkpoint_dir: CheckpointDir = None,
    checkpoint_every: CheckpointEvery = 60.0,
    tensorboard: TensorBoard = False,
) -> None:
    """Train many runs at once on this machine, or on a SLURM cluster.

    All optimizers for the first seed come before the next seed. What is finished is not run again, what was
    interrupted goes on where it stopped, and a run that fails does not stop the others.
    """
    say_loading()
    from experiments.launch.jobs import make_jobs, run_jobs
    from experiments.training.run import RunOptions

    options = RunOptions(
        device=device,
        data_dir=data_dir,
        results_dir=results_dir,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every_s=checkpoint_every,
        force=force,
        tensorboard=tensorboard,
        bar=False,
    )
    overrides = _overrides(set_, epochs)
    jobs = [job for name in task for job in make_jobs(name, scale, optimizer, seed, overrides, options, variant)]
    if not slurm:
        run_jobs(jobs, workers=workers or 2, threads=threads)
        return
    from experiments.launch.slurm import Resources, submit

    resources = Resources(
        partition=partition, nodes=nodes, gpus=gpus, threads=threads, minutes=minutes, at_once=workers
    )
    folder = results_dir / "slurm"
    for job, submitted in submit(jobs, resources, folder):
        typer.echo(f"{job.name}: SLURM job {submitted.job_id}, its output is in {folder}")


@app.command("tune")
def tune_command(
    task: TaskName,
    scale: Scale = "tiny",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An optimizer of the recipe; may be repeated. Default: all with a space."),
    ] = None,
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Trials each. Default: the recipe's.")] = None,
    keep_recipe: Annotated[bool, typer.Option("--keep-recipe", help="Do not change the recipe.")] = False,
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
    results_dir: ResultsDir = Path("results"),
    tuning_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the searches are kept, to go on from.")] = Path(
        "build/tuning"
    ),
) -> None:
    """Search the settings of each optimizer, and write the best ones into the recipe.

    Every optimizer gets the same number of trials in the spaces that the recipe declares, on the validation split
    at the tuning seed. The trials are kept in tuning.csv next to the results. What was interrupted goes on where it
    stopped.
    """
    say_loading()
    from experiments.config.recipe import load_recipe
    from experiments.training.run import RunOptions
    from experiments.tuning.tune import tune

    recipe = load_recipe(task, scale)
    if recipe.tuning is None:
        raise UserError(f"{recipe.path}: has no table [tuning]")
    options = RunOptions(device=device, data_dir=data_dir, results_dir=results_dir)
    for name in optimizer or [name for name, space in recipe.tuning.spaces.items() if space]:
        tune(recipe, name, options, folder=tuning_dir, trials=trials, write=not keep_recipe)


@app.command("sensitivity")
def sensitivity_command(
    task: TaskName,
    scale: Scale = "tiny",
    grid: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A grid of the recipe; may be repeated. Default: all.")
    ] = None,
    set_: Overrides = None,
    workers: Workers = 2,
    threads: Threads = 1,
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
    results_dir: ResultsDir = Path("results"),
    grid_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs are kept, to go on from.")] = Path(
        "build/sensitivity"
    ),
) -> None:
    """Run the grids of settings that the recipe declares, on the validation split at the tuning seed.

    Writes sensitivity.csv and heat maps next to the results; rows of grids that are not asked for stay. What is
    finished is not run again, and what was interrupted goes on where it stopped.
    """
    say_loading()
    from experiments.config.recipe import load_recipe
    from experiments.training.run import RunOptions
    from experiments.tuning.sensitivity import measure

    recipe = load_recipe(task, scale, overrides=tuple(set_ or ()))
    options = RunOptions(device=device, data_dir=data_dir, results_dir=results_dir, bar=False)
    typer.echo(f"{task}: {measure(recipe, options, folder=grid_dir, names=grid, workers=workers, threads=threads)}")


@app.command("estimate")
def estimate_command(
    task: TaskName,
    scale: Scale = "paper",
    optimizer: OptimizerNames = None,
    set_: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps to measure, each optimizer. Default: ten seconds of them.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Samples (or tokens) of a measured batch. Default: the recipe's, if it fits."),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Also predict for a machine that achieves this, e.g. 60e12 (FLOP/s)."),
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count seconds on a processor: for a CPU that others use too.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the table there.")] = None,
    format_: TableFormat = "terminal",
    device: Device = "auto",
    data_dir: DataDir = Path("data"),
) -> None:
    """Predict what training would take: seconds an epoch, hours and memory, from a few steps measured here.

    The paper's data need not be here: batches are made up where they are missing, of the true shape and number.
    Prints a table and what was assumed.
    """
    say_loading()
    from experiments.config.recipe import load_recipe
    from experiments.estimate import estimate_table, estimating

    recipe = load_recipe(task, scale, overrides=tuple(set_ or ()))
    options = estimating.Options(
        device=device, data_dir=data_dir, steps=steps, batch=batch, rate=flops, cpu_time=cpu_time
    )
    found = estimating.estimate(recipe, optimizer, options)
    estimate_table.show(found, format_)
    if csv:
        estimate_table.write(found, csv)


@app.command("list")
def list_command(results_dir: ResultsDir = Path("results")) -> None:
    """List tasks, recorded runs and datasets."""
    from experiments.cli import listing

    listing.print_tasks(results_dir)
    listing.print_datasets()


@app.command("table")
def table_command(
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="The task. Default: every task that has runs.")
    ] = None,
    scale: Scale = "tiny",
    format_: TableFormat = "terminal",
    results_dir: ResultsDir = OWN_RESULTS,
) -> None:
    """Compare the optimizers that were run.

    Prints the table, and writes comparison.csv and the curves next to the runs. Never starts a run.
    """
    from experiments.analysis import comparison, comparison_table
    from experiments.analysis.figures import curves

    for name in [task] if task else _tasks_with_runs(results_dir, scale):
        frame = comparison.compare(results_dir, name, scale)
        curves.draw(results_dir, name, scale)
        typer.echo(comparison_table.render(frame, format_))


@app.command("profiles")
def profiles_command(
    scale: Scale = "tiny", format_: TableFormat = "terminal", results_dir: ResultsDir = Path("results")
) -> None:
    """Compare the optimizers over all tasks that were run: performance profiles and geometric-mean speed-ups.

    Prints the table, and writes profiles-SCALE.csv and a figure into the results. Never starts a run.
    """
    from experiments.analysis import profiles
    from experiments.table_formats import render_frame

    table = profiles.profile(results_dir, _tasks_with_runs(results_dir, scale), scale)
    typer.echo(render_frame(table.drop(columns="scale"), format_))


@app.command("overview")
def overview_command(
    scale: Scale = "tiny", format_: TableFormat = "markdown", results_dir: ResultsDir = Path("results")
) -> None:
    """Print every optimizer on every task that was run.

    A cell has the median over seeds of the best value ± its standard deviation, and in brackets the epochs to the
    reference's best. Never starts a run.
    """
    from experiments.analysis import overview

    typer.echo(overview.overview(results_dir, _tasks_with_runs(results_dir, scale), scale, format_))


@app.command("leaders")
def leaders_command(
    scale: Scale = "tiny", format_: TableFormat = "terminal", results_dir: ResultsDir = Path("results")
) -> None:
    """Print the best optimizers of every task that was run, and how far the first of them leads.

    Writes a picture of the five best of each task, leaders.svg and .png, next to its runs. Never starts a run.
    """
    from experiments.analysis import leaders

    found = leaders.load_leaders(results_dir, _tasks_with_runs(results_dir, scale), scale)
    for each in found:
        leaders.draw(each)
    typer.echo(leaders.table(found, format_))


@app.command("verdicts")
def verdicts_command(
    format_: TableFormat = "terminal",
    short: Annotated[bool, typer.Option("--short", help="Only the claims that the paper is read for.")] = False,
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Compare what was recorded with every claim of the paper, with a verdict and the reason.

    Prints the table, and writes verdicts.csv into the results. Never starts a run.
    """
    from experiments.analysis import verdict_table, verdicts

    frame = verdicts.judge(results_dir)
    typer.echo(verdict_table.render(frame, format_, short=short))


@app.command("verify-claim")
def verify_claim_command(
    claim: Annotated[str, typer.Argument(metavar="ID", help="The claim's id in verdicts.csv, e.g. epochs-sgd.")],
    results_dir: ResultsDir = Path("results"),
) -> None:
    """Judge one claim of the paper again from the records, and print each step.

    Names the files that are read, with the processor and threads they were made on. The exit status is 1 where
    verdicts.csv says otherwise. Never starts a run.
    """
    from experiments.cli import claim_steps

    lines, differences = claim_steps.follow(results_dir, claim)
    typer.echo("\n".join(lines))
    if differences:
        typer.echo("\n".join(["verdicts.csv says otherwise; `verdicts` writes it again:", *differences]), err=True)
        raise typer.Exit(1)
    typer.echo(f"{results_dir / 'verdicts.csv'} says the same")


@app.command("report")
def report_command(results_dir: ResultsDir = Path("results")) -> None:
    """Build report/index.html in the results: verdicts, tables and curves as one page that needs no network.

    Reads what is recorded and never starts a run. A record that cannot be read is named on the page.
    """
    from experiments.analysis.report import page

    typer.echo(page.build(results_dir))


@app.command("data")
def data_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The dataset, e.g. fashion-mnist; see `list`.")],
    data_dir: DataDir = Path("data"),
) -> None:
    """Fetch a dataset and check it.

    It is kept, so that runs need no network afterwards.
    """
    from experiments.tasks.datasets import PREPARE

    if name not in PREPARE:
        raise UserError(f"data = {name!r}: there is no such dataset; {list_allowed(PREPARE)}")
    typer.echo(f"{name}: {PREPARE[name](data_dir)}")


app.command("challenge")(challenge_commands.challenge_command)
app.command("verify")(challenge_commands.verify_command)
app.command("new-task")(challenge_commands.new_task_command)


def _tasks_with_runs(results_dir: Path, scale: str) -> list[str]:
    """The tasks of which there are runs, at least one."""
    from experiments.cli import listing

    names = listing.tasks_with_runs(results_dir, scale)
    if not names:
        raise UserError(f"{results_dir}: there are no runs at scale {scale}; `run` makes them")
    return names


def _overrides(given: list[str] | None, epochs: int | None) -> tuple[str, ...]:
    """What replaces the recipe's values."""
    return (*(given or ()), *([f"run.epochs={epochs}"] if epochs is not None else ()))
