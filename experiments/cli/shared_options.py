"""The arguments and options that several commands share, and their first line."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task, e.g. resnet50-imagenet; see `list`.")]
Scale = Annotated[
    str,
    typer.Option(
        metavar="SCALE", help="How big: tiny (minutes on 2 cores), small (hours), or paper (the paper's settings)."
    ),
]
DataDir = Annotated[Path, typer.Option(metavar="DIR", help="Where datasets are kept.")]
ResultsDir = Annotated[Path, typer.Option(metavar="DIR", help="Where records, tables and figures are kept.")]
OptimizerNames = Annotated[
    list[str] | None,
    typer.Option(
        "--optimizer", metavar="NAME", help="An optimizer of the recipe; may be repeated. Default: all of them."
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", metavar="N", help="A seed; may be repeated. Default: the recipe's seeds."),
]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="Train this many epochs instead of the recipe's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the recipe, e.g. optimizers.sgd.lr=0.2; may be repeated.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="SUFFIX",
        help="Record the runs as <optimizer>-SUFFIX, to stand next to those without --set.",
    ),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")]
Force = Annotated[bool, typer.Option("--force", help="Run again what is finished; start over what is not.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")]
CheckpointDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where checkpoints are kept. Default: checkpoints/ in the results.")
]
CheckpointEvery = Annotated[float, typer.Option(metavar="SECONDS", help="Time between checkpoints inside an epoch.")]
Workers = Annotated[int, typer.Option(metavar="N", min=1, help="Runs at a time.")]
Threads = Annotated[int, typer.Option(metavar="N", min=1, help="CPU threads of each process.")]
TableFormat = Annotated[
    Literal["terminal", "markdown", "latex", "csv"], typer.Option("--format", help="How to print the table.")
]


def say_loading() -> None:
    """Print the first line, before torch is imported; only for a person."""
    if sys.stderr.isatty():
        print("loading torch …", file=sys.stderr, flush=True)
