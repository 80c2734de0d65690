"""Whether the estimate is right: predicted compared with measured seconds an epoch, on runs that can be done here.

Each round estimates a case and then really runs it, so that both see the same machine; medians over rounds are
compared. On a machine that is busy with other things, seconds on a processor say more than those on the wall.

    python -m experiments.estimate.check --out results/bench/estimate-cpu.csv
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import typer

from experiments.config.recipe import Recipe, load_recipe
from experiments.estimate.estimating import Options, estimate
from experiments.launch.one_line_errors import report_errors_in_one_line
from experiments.records.provenance import device_name
from experiments.training.distributed import choose_device
from experiments.training.run import RunOptions, run


@dataclass(frozen=True, kw_only=True)
class Case:
    """Some optimizers of a recipe, trained for some epochs, with other values than the recipe's."""

    task: str
    scale: str
    optimizers: tuple[str, ...]
    epochs: int
    changes: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """What is estimated and run."""
        return load_recipe(self.task, self.scale, overrides=(f"run.epochs={self.epochs}", *self.changes))


CASES = (
    Case(task="resnet50-imagenet", scale="tiny", optimizers=("sgd", "ngplus"), epochs=1),
    Case(task="schnet-qm9", scale="tiny", optimizers=("adam", "ngplus-adam"), epochs=2),
    Case(task="schnet-matproj", scale="tiny", optimizers=("adam", "ngplus-adam"), epochs=3),
    Case(task="transformer-iwslt14", scale="tiny", optimizers=("adam", "ngplus-adam"), epochs=1),
    Case(task="dlrm-criteo", scale="tiny", optimizers=("adagrad", "ngplus-adagrad"), epochs=4),
    Case(task="schnet-qm9", scale="small", optimizers=("adam", "ngplus-adam"), epochs=1),
    Case(task="dlrm-criteo", scale="small", optimizers=("adagrad", "ngplus-adagrad"), epochs=1),
)


def compare(case: Case, *, rounds: int, options: Options) -> pd.DataFrame:
    """A row an optimizer: medians over rounds of an estimate and a run, one after the other."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in case.optimizers}
    for _ in range(rounds):
        for name, found in pairs.items():
            (prediction,) = estimate(case.recipe, [name], options).predictions
            found.append((prediction.epoch_s, measure_epoch_s(case.recipe, name, options)))
    rows = [_row(case, name, found) for name, found in pairs.items()]
    device = device_name(choose_device(options.device).type)
    return pd.DataFrame(rows).assign(seconds="processor" if options.cpu_time else "wall", rounds=rounds, device=device)


def measure_epoch_s(recipe: Recipe, optimizer: str, options: Options) -> float:
    """What an epoch really takes: a run's seconds on the clock over its epochs; its record is not kept."""
    processor = _ProcessorTime()
    with tempfile.TemporaryDirectory() as folder:
        chosen = RunOptions(device=options.device, data_dir=options.data_dir, results_dir=Path(folder), bar=False)
        end = run(recipe, optimizer, recipe.run.seeds[0], chosen, [processor]).end
    assert end is not None
    return (processor.seconds if options.cpu_time else end.seconds) / recipe.run.epochs


class _ProcessorTime:
    """Seconds on a processor from what was recorded before an epoch to its last step; evaluation is left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = self._now = 0.0

    def on_start(self, *_: Any) -> None:
        """Nothing has been recorded yet."""

    def on_step(self, step_in_epoch: int) -> None:
        """Note the time, in case this is the epoch's last step."""
        self._now = time.process_time()

    def on_epoch(self, epoch: Any) -> None:
        """The steps behind are an epoch, the ones that follow are the next."""
        if self._now > self._start:
            self.seconds += self._now - self._start
        self._start = time.process_time()

    def on_end(self, *_: Any) -> None:
        """All was recorded."""

    def close(self) -> None:
        """Nothing is held."""


def _row(case: Case, name: str, found: Sequence[tuple[float, float]]) -> dict[str, object]:
    predicted, measured = (median(side) for side in zip(*found, strict=True))
    return {
        "task": case.task,
        "scale": case.scale,
        "optimizer": name,
        "epochs": case.epochs,
        "predicted_s_per_epoch": predicted,
        "measured_s_per_epoch": measured,
        "ratio": predicted / measured,
    }


def main(
    rounds: Annotated[int, typer.Option(help="estimates and runs of each, one after the other")] = 3,
    task: Annotated[list[str] | None, typer.Option(help="only these tasks")] = None,
    scale: Annotated[list[str] | None, typer.Option(help="only these scales")] = None,
    steps: Annotated[int | None, typer.Option(help="to measure for an estimate; by default ten seconds")] = None,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="seconds on a processor, if others need it too")] = False,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda")] = "cpu",
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="where the datasets are kept")] = Path("data"),
    out: Annotated[Path, typer.Option(help="the table")] = Path("results/bench/estimate-cpu.csv"),
) -> None:
    """Estimate and run, print both, and write them down."""
    options = Options(device=device, data_dir=data_dir, steps=steps, cpu_time=cpu_time)
    frames = []
    for case in CASES:
        if (task is None or case.task in task) and (scale is None or case.scale in scale):
            frames.append(compare(case, rounds=rounds, options=options))
            print(frames[-1].round(3).to_string(index=False), flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            pd.concat(frames).to_csv(out, index=False, float_format="%.4g")


if __name__ == "__main__":
    report_errors_in_one_line(lambda: typer.run(main))
